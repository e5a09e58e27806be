"""Helpers that do not depend on models: files, checks, signals, progress bars, the machine."""
