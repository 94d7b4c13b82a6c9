"""Precomputed features beside the shards: one memory-mapped array per shard, one row per image or per text
part.

`features/NAME/spec.json` says how they were made; `NNNNN.npy` holds the rows `(R, views, *shape)`; int8
features have their scales `(R, views, *shape[:-1])` in `NNNNN.scale.npy`; `NNNNN.json` names the tar that the
rows belong to.
"""

from __future__ import annotations

import io
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from threading import Lock

import numpy as np
from pydantic import ValidationError

from vlgpt.log import UserError
from vlgpt.shards.atomic import write_atomic
from vlgpt.shards.schema import FeatureSpec, ShardIndex

MAX_OPEN_ARRAYS = 256


def feature_path(folder: Path, name: str, *parts: str) -> Path:
    """`features/NAME/...` inside a data set folder."""
    return folder.joinpath("features", name, *parts)


def write_spec(folder: Path, spec: FeatureSpec) -> None:
    """Store the specification; raises UserError when the folder already holds features made in another
    way.
    """
    path = feature_path(folder, spec.name, "spec.json")
    if path.is_file() and (old := read_spec(path)) != spec:
        changed = [key for key, value in spec.model_dump().items() if getattr(old, key) != value]
        raise UserError(
            f"{path.parent} holds features with another {', '.join(changed)}; remove that folder to rebuild"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, spec.model_dump_json(indent=1).encode())


def read_spec(path: Path) -> FeatureSpec:
    """Raises FileNotFoundError, or UserError when the file is damaged."""
    try:
        return FeatureSpec.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(f"{path} is not a feature specification: {str(error).splitlines()[0]}") from error


def write_feature_rows(
    folder: Path, spec: FeatureSpec, shard: str, rows: np.ndarray, *, tar_sha256: str
) -> None:
    """Store all rows of one shard, `(R, views, *shape) float`, quantised when the spec says int8.

    The little `NNNNN.json` is written last: without it the shard counts as not done.
    """
    if rows.shape[1:] != (spec.views, *spec.shape):
        raise ValueError(
            f"feature {spec.name}: rows of shape {rows.shape[1:]}, the spec says {(spec.views, *spec.shape)}"
        )
    if spec.dtype == "int8":
        rows, scales = quantise(rows)
        write_atomic(feature_path(folder, spec.name, f"{shard}.scale.npy"), _npy_bytes(scales))
    write_atomic(
        feature_path(folder, spec.name, f"{shard}.npy"), _npy_bytes(rows.astype(spec.dtype, copy=False))
    )
    owner = {"tar_sha256": tar_sha256, "rows": len(rows)}
    write_atomic(feature_path(folder, spec.name, f"{shard}.json"), json.dumps(owner).encode())


def has_feature_rows(folder: Path, name: str, shard: str, *, tar_sha256: str) -> bool:
    """Whether the rows of this very tar are stored: how an interrupted feature run continues."""
    try:
        return json.loads(feature_path(folder, name, f"{shard}.json").read_text())["tar_sha256"] == tar_sha256
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def quantise(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 with one scale per last-axis vector. (..., C) float -> (..., C) int8, (...) float32."""
    rows = rows.astype(np.float32)
    scales = np.abs(rows).max(axis=-1) / 127
    safe = np.where(scales > 0, scales, 1)
    return np.rint(rows / safe[..., None]).astype(np.int8), scales.astype(np.float32)


def dequantise(rows: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Inverse of `quantise` up to half a step. (..., C) int8, (...) float32 -> (..., C) float32."""
    return rows.astype(np.float32) * scales[..., None]


class FeatureReader:
    """Rows of one feature of a data set. Arrays are memory-mapped on first use and checked against the
    index.
    """

    def __init__(
        self,
        name: str,
        *,
        shards: list[str],
        locate: Callable[[str], Path],
        index: Callable[[int], ShardIndex],
        where: str,
    ):
        """`locate` maps a name relative to the data set to a local file; `where` is the data set, for
        messages.
        """
        self.name, self._shards, self._locate, self._index = name, shards, locate, index
        self._command = f"python -m data_prep.features {where} --features {name}"
        self._open: OrderedDict[int, tuple[np.ndarray, np.ndarray | None]] = OrderedDict()
        self._lock = Lock()
        try:
            self.spec = read_spec(locate(f"features/{name}/spec.json"))
        except FileNotFoundError as error:
            raise UserError(f"{where} has no feature {name!r}; compute it: {self._command}") from error

    def rows(self, shard: int, start: int, stop: int, *, view: int | None = None) -> np.ndarray:
        """Rows start..stop of a shard. -> (stop - start, views, *shape) float16 or float32 (int8 is
        dequantised); with `view` only that one is read: -> (stop - start, *shape)

        Raises UserError when the shard's rows are missing or belong to another tar.
        """
        with self._lock:
            rows, scales = self._open.get(shard) or self._map(shard)
            self._open[shard] = rows, scales
            self._open.move_to_end(shard)
            if len(self._open) > MAX_OPEN_ARRAYS:
                self._open.popitem(last=False)
        wanted = slice(start, stop) if view is None else (slice(start, stop), view)
        part = np.array(rows[wanted])
        return part if scales is None else dequantise(part, np.array(scales[wanted]))

    def _map(self, shard: int) -> tuple[np.ndarray, np.ndarray | None]:
        name, index = self._shards[shard], self._index(shard)
        try:
            owner = json.loads(self._locate(f"features/{self.name}/{name}.json").read_text())
            rows = np.load(
                self._locate(f"features/{self.name}/{name}.npy"), mmap_mode="r", allow_pickle=False
            )
            scales = None
            if self.spec.dtype == "int8":
                scales = np.load(
                    self._locate(f"features/{self.name}/{name}.scale.npy"), mmap_mode="r", allow_pickle=False
                )
        except (FileNotFoundError, ValueError) as error:
            raise UserError(
                f"feature {self.name!r} of shard {name} is missing or damaged; run: {self._command}"
            ) from error
        wanted = index.num_images if self.spec.per == "image" else index.num_texts
        if owner.get("tar_sha256") != index.tar_sha256 or len(rows) != wanted:
            raise UserError(
                f"feature {self.name!r} of shard {name} has {len(rows)} rows of another build, the shard "
                f"needs {wanted}; "
                f"remove features/{self.name} and run: {self._command}"
            )
        return rows, scales

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=Lock())


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()
