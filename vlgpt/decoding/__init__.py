"""Interleaved decoding: what `vlgpt.decoding.generator.Generator` is made of."""
