"""Documents -> sequences -> rows -> batches, with exact elastic resume.

From the bottom up: `mixture` (which sample has which position in the stream), `assemble` (document -> token sequence),
`packing` (sequences -> rows), `sources` and `samples` (reading), `collate`, `stream` (positions -> batches of a rank
and worker), `workers` (processes), `tally` and `state` (counts, the position), `loader` (what the training loop holds),
`inspect` (what a person sees).
"""
