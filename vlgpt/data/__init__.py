"""Documents -> sequences -> rows -> batches, with exact elastic resume.

From the bottom up: `draws` (addressed choices), `mixture` (which sample stands where in the stream),
`assemble` (document -> token sequence), `packing` (sequences -> rows), `sources` and `samples` (reading),
`collate`, `stream` (positions -> batches of a rank and worker), `workers` (processes), `tally` and `state`
(what was met, where we stand), `loader` (what the training loop holds), `inspect` (what a person sees).
"""

from vlgpt.data.loader import Loader

__all__ = ["Loader"]
