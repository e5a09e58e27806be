"""Evaluation: likelihood, recall, retention, and their plots."""
