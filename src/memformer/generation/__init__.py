"""Generation: sessions, which are token streams to feed, continue, save and load."""
