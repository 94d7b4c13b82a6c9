"""Precomputed features beside the shards: one memory-mapped array per shard, one row per image or per text part.

`features/NAME/spec.json` says how they were made; `NNNNN.npy` holds the rows `(R, views, *shape)`; int8 features have
their scales `(R, views, *shape[:-1])` in `NNNNN.scale.npy`; `NNNNN.json` names the tar that the rows belong to.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from vlgpt.errors import UserError
from vlgpt.files import JsonObject, fsync_folder, open_locked, write_atomic
from vlgpt.shards.recent import Recent
from vlgpt.shards.schema import FeatureSpec, ShardIndex

MAX_OPEN_ARRAYS = 256
LARGEST = {
    "float16": 65504.0,
    "float32": float(np.finfo(np.float32).max),
    "int8": float(np.finfo(np.float32).max),
}


def feature_path(folder: Path, name: str, *parts: str) -> Path:
    """`features/NAME/...` inside a data set folder."""
    return folder.joinpath("features", name, *parts)


def write_spec(folder: Path, spec: FeatureSpec) -> None:
    """Store the specification; raises UserError when the folder already holds features made in another way."""
    path = feature_path(folder, spec.name, "spec.json")
    if path.is_file() and (old := read_spec(path)) != spec:
        changed = [key for key, value in spec.model_dump().items() if getattr(old, key) != value]
        raise UserError(
            f"{path.parent} holds features with another {', '.join(changed)}; remove that folder to rebuild"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, spec.model_dump_json(indent=1))


def read_spec(path: Path) -> FeatureSpec:
    """Raises FileNotFoundError, or UserError when the file is damaged."""
    try:
        return FeatureSpec.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(f"{path} is not a feature specification: {str(error).splitlines()[0]}") from error


class FeatureWriter:
    """The rows of one shard, batch by batch, so that memory holds one batch: quantised when the spec says int8.

    No file has its final name before `close`, and the small `NNNNN.json` is written last: without it the shard counts
    as not done. A second process that opens the same shard waits until the first is done.
    """

    def __init__(self, folder: Path, spec: FeatureSpec, shard: str, *, num_rows: int):
        self._spec, self._num_rows, self._written = spec, num_rows, 0
        self._owner = feature_path(folder, spec.name, f"{shard}.json")
        shape = (num_rows, spec.views, *spec.shape)
        self._rows = _NpyFile(feature_path(folder, spec.name, f"{shard}.npy"), shape, spec.dtype)
        self._scales = None
        if spec.dtype == "int8":
            path = feature_path(folder, spec.name, f"{shard}.scale.npy")
            self._scales = _NpyFile(path, shape[:-1], "float32")
        self._files = [file for file in (self._scales, self._rows) if file is not None]

    @property
    def num_bytes(self) -> int:
        """Written so far."""
        return sum(file.num_bytes for file in self._files)

    def add(self, rows: np.ndarray) -> None:
        """The next rows, `(r, views, *shape)` of any float type. Raises ValueError for another shape, and UserError
        for values that are not finite or too large for the stored type.
        """
        if rows.shape[1:] != (self._spec.views, *self._spec.shape):
            raise ValueError(
                f"feature {self._spec.name}: rows of shape {rows.shape[1:]}, the spec says "
                f"{(self._spec.views, *self._spec.shape)}"
            )
        largest = np.abs(rows).max(initial=0)
        if not largest <= LARGEST[self._spec.dtype]:
            raise UserError(
                f"feature {self._spec.name}: a value of {largest} cannot be stored as {self._spec.dtype}; compute in "
                "float32, or check the encoder's weights"
            )
        if self._scales is not None:
            rows, scales = quantise(rows)
            self._scales.write(scales)
        self._rows.write(rows.astype(self._spec.dtype, copy=False))
        self._written += len(rows)

    def close(self, *, tar_sha256: str) -> None:
        """Make the rows visible. Raises ValueError when they are not as many as announced."""
        if self._written != self._num_rows:
            raise ValueError(
                f"feature {self._spec.name}: {self._written} rows given, {self._num_rows} announced"
            )
        for file in self._files:
            file.finish()
        write_atomic(self._owner, json.dumps({"tar_sha256": tar_sha256, "rows": self._num_rows}).encode())
        for file in self._files:
            file.close()

    def abort(self) -> None:
        """Forget everything written so far."""
        for file in self._files:
            file.abort()


class _NpyFile:
    """A .npy file of known shape that is filled from its start and appears when it is complete."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: str):
        self._path, self._partial = path, path.with_name(f".{path.name}.partial")
        self._file = open_locked(self._partial)
        description = np.lib.format.dtype_to_descr(np.dtype(dtype))
        header = {"descr": description, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)
        self.num_bytes = 0

    def write(self, rows: np.ndarray) -> None:
        data = np.ascontiguousarray(rows).tobytes()
        self._file.write(data)
        self.num_bytes += len(data)

    def finish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self._partial, self._path)
        fsync_folder(self._path.parent)

    def close(self) -> None:
        self._file.close()

    def abort(self) -> None:
        self._partial.unlink(missing_ok=True)
        self._file.close()


def write_feature_rows(
    folder: Path, spec: FeatureSpec, shard: str, rows: np.ndarray, *, tar_sha256: str
) -> None:
    """Store all rows of one shard at once, `(R, views, *shape)` of any float type, as the spec's dtype.

    Raises ValueError for another shape, UserError for values that are not finite or too large for the dtype.
    """
    writer = FeatureWriter(folder, spec, shard, num_rows=len(rows))
    try:
        writer.add(rows)
        writer.close(tar_sha256=tar_sha256)
    except BaseException:
        writer.abort()
        raise


def has_feature_rows(folder: Path, name: str, shard: str, *, tar_sha256: str) -> bool:
    """Whether the rows of this very tar are stored: how an interrupted feature run continues."""
    try:
        owner: JsonObject = json.loads(feature_path(folder, name, f"{shard}.json").read_text())
        return bool(owner["tar_sha256"] == tar_sha256)
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
    values: np.ndarray = rows.astype(np.float32) * scales[..., None]
    return values


class FeatureReader:
    """Rows of one feature of a data set. Arrays are memory-mapped on first use and checked against the index."""

    def __init__(
        self,
        name: str,
        *,
        shards: list[str],
        locate: Callable[[str], Path],
        index: Callable[[int], ShardIndex],
        where: str,
    ):
        """`locate` maps a name relative to the data set to a local file; `where` is the data set, for messages."""
        self.name, self._shards, self._locate, self._index = name, shards, locate, index
        self._command = f"python -m data_prep.features {where} --features {name}"
        self._open: Recent[int, tuple[np.ndarray, np.ndarray | None]] = Recent(MAX_OPEN_ARRAYS)
        try:
            self.spec = read_spec(locate(f"features/{name}/spec.json"))
        except FileNotFoundError as error:
            raise UserError(f"{where} has no feature {name!r}; compute it: {self._command}") from error

    def rows(self, shard: int, start: int, stop: int, *, view: int | None = None) -> np.ndarray:
        """Rows start..stop of a shard. -> (stop - start, views, *shape) float16 or float32 (int8 is
        dequantised); with `view` only that one is read: -> (stop - start, *shape)

        Raises UserError when the shard's rows are missing or belong to another tar.
        """
        rows, scales = self._open.get(shard, self._map)
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
