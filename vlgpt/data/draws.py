"""Random choices made for one slot of the stream: addressed by the slot's key and a purpose, never
consumed in order.
"""

from __future__ import annotations

from typing import Final

START: Final = 0  # where the window of a too long document begins
KEEP_SINGLE: Final = 1  # whether a sequence with one image is kept
IMAGE: Final = 2  # which image of a document (image stages)
TEXT: Final = 3  # which text of a document (image stages)
VIEW: Final = 1 << 10  # + image number: which stored view of its features
SWAP: Final = 1 << 20  # + part number: whether an image changes places with the text after it
LEFT_OUT: Final = 1 << 30  # + part number: which images of a window with too many are left out

_MASK = (1 << 64) - 1


class Draws:
    """Uniform numbers of one slot. SplitMix64 (Steele et al. 2014) over key and purpose: one draw costs
    under 1 us.
    """

    __slots__ = ("key",)

    def __init__(self, key: int):
        self.key = key

    def uniform(self, purpose: int) -> float:
        """A number in [0, 1)."""
        z = (self.key + (purpose + 1) * 0x9E3779B97F4A7C15) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return ((z ^ (z >> 31)) >> 11) * 2.0**-53

    def below(self, limit: int, purpose: int) -> int:
        """A whole number in [0, limit)."""
        return int(self.uniform(purpose) * limit)
