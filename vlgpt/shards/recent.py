"""The last few values that were needed: indexes, open files, part lengths. One cache for all that a data set keeps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """At most `size` values, those used last. Threads may share it; a pickled copy is empty."""

    # Not functools.lru_cache: around a method it keeps the object and its open files alive until the next collection.

    def __init__(self, size: int):
        self._size, self._lock = size, Lock()
        self._values: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K, make: Callable[[K], V]) -> V:
        """The value of a key, made by `make(key)` unless it is still here."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        # Outside of the lock, since it may take long. Two threads may both make a value; either is right.
        value = make(key)
        with self._lock:
            self._values[key] = value
            if len(self._values) > self._size:
                self._values.popitem(last=False)
        return value

    def clear(self) -> None:
        """Forget all values."""
        with self._lock:
            self._values.clear()

    def __reduce__(self) -> tuple[type[Recent[K, V]], tuple[int]]:
        return Recent, (self._size,)
