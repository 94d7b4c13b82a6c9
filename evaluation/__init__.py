"""Benchmarks of VL-GPT: prompts out, predictions in, scores from saved predictions."""
