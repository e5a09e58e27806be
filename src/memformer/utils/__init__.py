"""Helpers that know nothing of models: files, checks, signals, progress, the machine."""
