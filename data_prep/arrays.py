"""Arrays beside the shards (hashes, similarities, pairs of duplicates): .npz files that are whole or absent."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np

from vlgpt.files import write_atomic


def save_arrays(path: Path, **columns: np.ndarray | str) -> None:
    """Write the columns, equal bytes for equal content."""
    buffer = io.BytesIO()
    np.savez(buffer, **columns)  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())


def load_arrays(path: Path, **wanted: str) -> dict[str, np.ndarray] | None:
    """The columns; None when the file is missing or damaged, or when a column is not as `wanted`: then it belongs to
    another tar or other data.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            columns = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    is_wanted = all(name in columns and str(columns[name]) == value for name, value in wanted.items())
    return columns if is_wanted else None
