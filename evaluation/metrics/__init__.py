"""Metrics: pure functions of lists and arrays in numpy and plain Python; of vlgpt they import the errors only."""
