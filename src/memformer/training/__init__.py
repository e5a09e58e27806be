"""Replay, the loop, its optimizer, its checkpoints and its run folder."""
