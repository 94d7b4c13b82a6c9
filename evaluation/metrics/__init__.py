"""Metrics: pure functions of lists and arrays in numpy and plain Python, importing nothing of vlgpt."""
