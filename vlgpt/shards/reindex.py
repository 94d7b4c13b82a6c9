"""Makes the index of a finished shard anew: for another tokenizer, or because the index was damaged."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vlgpt.document import Document, TextPart, text_places
from vlgpt.errors import UserError
from vlgpt.shards.index import IndexBuilder, Member, crc32
from vlgpt.shards.schema import ShardIndex, TextTokenizer


def retokenise(index: ShardIndex, documents: Iterator[Document], *, tokenizer: TextTokenizer) -> ShardIndex:
    """The same index with the token lengths of another tokenizer; `documents` are the shard's, in order."""
    tokens = np.zeros_like(index.part_tokens)
    position = 0
    for document in documents:
        for part, place in zip(document.parts, text_places([part.role for part in document.parts])):
            if isinstance(part, TextPart):
                tokens[position] = len(tokenizer.encode_text(part.text, place))
            position += 1
    if position != len(tokens):
        raise UserError(
            f"the documents have {position} parts, the index has {len(tokens)}; rebuild the index"
        )
    return dataclasses.replace(index, part_tokens=tokens, tokenizer=tokenizer.fingerprint)


def rebuild_index(tar: Path, *, tokenizer: TextTokenizer | None) -> ShardIndex:
    """Index one of our own tars from its content alone. Raises UserError when the tar itself is damaged."""
    builder, digest = IndexBuilder(tokenizer), hashlib.sha256()
    with tar.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        try:
            for key, members in _samples(tar, file.fileno()):
                record = os.pread(file.fileno(), members[0].size, members[0].offset)
                builder.add(key, Document.from_record(json.loads(record)), members)
        except (tarfile.TarError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{tar} is damaged ({error}); remove it and run its build again") from error
    return builder.build(tar_sha256=digest.hexdigest())


def _samples(tar: Path, descriptor: int) -> Iterator[tuple[str, list[Member]]]:
    """(key, [record, images in order]) of every sample."""
    key = ""
    members: list[Member] = []
    with tarfile.open(tar, mode="r:") as archive:
        for info in archive:
            stem, _, suffix = info.name.partition(".")
            data = os.pread(descriptor, info.size, info.offset_data)
            member = Member(suffix.rpartition(".")[2], info.offset_data, info.size, crc32(data))
            if suffix == "json":
                if members:
                    yield key, members
                key, members = stem, [member]
            elif stem != key or suffix.partition(".")[0] != str(len(members) - 1):
                raise ValueError(f"member {info.name!r} does not follow its record")
            else:
                members.append(member)
    if members:
        yield key, members
