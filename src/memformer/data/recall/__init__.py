"""Recall tasks: generated episodes of facts, filler and questions."""
