"""Reproduction of the paper's tables: definitions of the tables, their runs, and the results beside the paper's."""
