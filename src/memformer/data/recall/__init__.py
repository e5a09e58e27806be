"""Recall tasks: facts to remember, questions to answer, made on the fly."""
