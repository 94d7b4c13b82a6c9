"""Finds the values of one long JSON list, without holding more of the file than a block."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from vlgpt.errors import UserError

BLOCK_BYTES = 16 << 20
MAX_VALUE_CHARS = 128 << 20


def list_values(stream: IO[bytes], path: Path) -> Iterator[tuple[int, int, Any]]:
    """The values of one JSON list, parsed block by block. Raises UserError where the list is no JSON."""
    decoder, pending = json.JSONDecoder(), _Pending(stream, path)
    pending.skip("[\ufeff")
    while True:
        pending.skip(",")
        if pending.text.startswith("]", pending.at):
            return
        try:
            value, end = decoder.raw_decode(pending.text, pending.at)
        except (json.JSONDecodeError, RecursionError) as error:
            if not pending.read_more():
                raise UserError(
                    f"{path} is no JSON list: at byte {pending.offset}: {error}; download it again"
                ) from error
            continue
        start = pending.offset
        pending.move(end)
        yield start, pending.offset, value


class _Pending:
    """Decoded text of a stream that is still to be parsed; `offset` is the byte at which `text[at]` lies."""

    def __init__(self, stream: IO[bytes], path: Path):
        self.text, self.at, self.offset = "", 0, 0
        self._stream, self._path = stream, path
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._is_ascii = True

    def skip(self, separators: str) -> None:
        """Go to the next character that is neither white space nor a separator."""
        while True:
            end = self.at
            while end < len(self.text) and (self.text[end].isspace() or self.text[end] in separators):
                end += 1
            self.move(end)
            if self.at < len(self.text) or not self.read_more():
                return

    def move(self, at: int) -> None:
        """Go on to character `at`."""
        passed = at - self.at if self._is_ascii else len(self.text[self.at : at].encode())
        self.at, self.offset = at, self.offset + passed

    def read_more(self) -> bool:
        """Append a block; False at the end of the file, or when a value is larger than any record can be."""
        if len(self.text) - self.at > MAX_VALUE_CHARS:
            return False
        try:
            block = self._stream.read(BLOCK_BYTES)
            more = self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self._path} is not UTF-8 text near byte {self.offset}: {error.reason}"
            ) from error
        self.text, self.at = self.text[self.at :] + more, 0
        self._is_ascii = self.text.isascii()
        return bool(block)
