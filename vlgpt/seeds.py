"""Addressed randomness: every random draw has a name, so it does not depend on what was drawn before it.

`generator(seed, "mixture", epoch, rank)` always gives the same stream, whatever else the program did. The global
generators are touched here only (`seed_everything`, `rng_state`), because dropout inside torch modules reads them.
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


def address(*names: int | str) -> int:
    """A 64-bit number that depends on every name and its type, stable across processes and versions."""
    text = "\x1f".join(f"{type(name).__name__}:{name}" for name in names)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def generator(*names: int | str) -> np.random.Generator:
    """A numpy generator for this address."""
    return np.random.Generator(np.random.PCG64(address(*names)))


def torch_generator(*names: int | str) -> torch.Generator:
    """A CPU torch generator for this address: images depend on neither device nor batch."""
    import torch

    return torch.Generator().manual_seed(address(*names) & (2**63 - 1))


def seed_everything(*names: int | str) -> None:
    """Seed python, numpy and torch globally (dropout and initialisation read these)."""
    import torch

    value = address(*names)
    random.seed(value)
    np.random.seed(value & (2**32 - 1))  # noqa: NPY002 - third-party modules read the global generator
    torch.manual_seed(value & (2**63 - 1))


def rng_state() -> dict[str, Any]:
    """The global torch generators of this process, for a bit-exact resume."""
    import torch

    state: dict[str, Any] = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Inverse of `rng_state`."""
    import torch

    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
