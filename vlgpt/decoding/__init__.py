"""Interleaved decoding: what `vlgpt.generate.Generator` is made of."""
