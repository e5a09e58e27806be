"""Evaluation: likelihood, recall, retention, and their pictures."""
