"""python -m data_prep.index DIR [--tokenizer PATH]: damaged indexes, or another tokenizer's token lengths.

The tars are read and never written. Each index is replaced atomically, so a kill leaves every shard with its old index
or its new one, and the next run continues.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from pydantic import Field
from rich.console import Console
from rich.progress import Progress

from data_prep.job import SETTINGS
from data_prep.options import Folders, TokenizerOptions
from vlgpt.errors import UserError, run_command
from vlgpt.files import write_atomic
from vlgpt.log import configure
from vlgpt.options import ArrayOptions, parse
from vlgpt.processes import run_workers
from vlgpt.shards import ShardIndex, ShardSet
from vlgpt.shards.index import rebuild_index, retokenise
from vlgpt.shards.manifest import MANIFEST, read_manifest
from vlgpt.shards.schema import TextTokenizer

console = Console(stderr=True)


class IndexOptions(ArrayOptions, TokenizerOptions):
    """The command line."""

    folders: Folders = Field(description="data set folders")
    tokenizer: str | None = Field(
        None, description="tokenizer folder or hub name; without it only damaged indexes are rebuilt"
    )
    num_workers: int = Field(1, ge=1, description="processes")


def reindex_shard(shards: ShardSet, shard: int, *, folder: Path, tokenizer: TextTokenizer | None) -> bool:
    """Rebuild a missing or unfit index from its tar, or recount its tokens when another tokenizer made it.

    `tokenizer=None`: never recounted. True when it was written. Raises UserError when the tar is damaged or does not
    match the manifest; the index of a foreign tar is not rebuilt, its error is raised.
    """
    record, path = shards.shards[shard], shards.index_path(shard)
    try:
        index = shards.index(shard)
    except (UserError, FileNotFoundError):
        if shards.manifest is None:
            raise
        index = rebuild_index(folder / f"{record.name}.tar", tokenizer=tokenizer)
        if index.tar_sha256 != record.sha256:
            raise UserError(
                f"{folder}: shard {record.name} does not match the manifest; run its build again"
            ) from None
        write_atomic(path, index.save_bytes())
        return True
    if tokenizer is None or index.tokenizer == tokenizer.fingerprint:
        return False
    documents = (
        shards.read(shard, sample, with_images=False).document for sample in range(index.num_samples)
    )
    write_atomic(path, retokenise(index, documents, tokenizer=tokenizer).save_bytes())
    return True


def _reindex_share(options: IndexOptions, folder: Path, worker: int) -> Iterator[bool]:
    """Whether each index of one worker's share was written."""
    shards, tokenizer = ShardSet.open(folder), options.load_tokenizer()
    for shard in options.share.split(worker, options.num_workers).of(len(shards.shards)):
        yield reindex_shard(shards, shard, folder=folder, tokenizer=tokenizer)


def _reindex(options: IndexOptions, folder: Path) -> list[bool]:
    """This task's share of a folder."""
    total = len(options.share.of(len(ShardSet.open(folder).shards)))
    written: list[bool] = []
    works = [partial(_reindex_share, options, folder, worker) for worker in range(options.num_workers)]
    with Progress(console=console) as progress:
        bar = progress.add_task(folder.name, total=total)

        def on_item(worker: int, is_written: bool) -> None:
            written.append(is_written)
            progress.advance(bar)

        def on_death(worker: int, exit_code: int) -> None:
            raise UserError(f"process {worker} ended with exit code {exit_code}; run the same command again")

        if options.num_workers == 1:
            for is_written in works[0]():
                on_item(0, is_written)
        else:
            # tokenizers hold threads, which do not survive a fork
            run_workers(works, on_item=on_item, on_death=on_death, method="spawn")
    return written


def _note_tokenizer(folder: Path, fingerprint: str) -> None:
    """Name the new tokenizer in the build's settings, once every index has it."""
    settings_path, manifest_path = folder / SETTINGS, folder / MANIFEST
    if not settings_path.is_file() or any(
        ShardIndex.load(path).tokenizer != fingerprint for path in _index_paths(folder)
    ):
        return
    manifest = read_manifest(manifest_path.read_bytes(), where=str(manifest_path))
    noted = manifest.model_copy(update={"build": {**manifest.build, "tokenizer": fingerprint}})
    write_atomic(manifest_path, noted.model_dump_json(indent=1))
    settings = {**json.loads(settings_path.read_text()), "tokenizer": fingerprint}
    write_atomic(settings_path, json.dumps(settings, indent=1, sort_keys=True))


def _index_paths(folder: Path) -> Iterator[Path]:
    shards = ShardSet.open(folder)
    return (shards.index_path(shard) for shard in range(len(shards.shards)))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0 done, 2 wrong use or a damaged tar."""
    options = parse(IndexOptions, argv, prog="python -m data_prep.index", description=__doc__)
    configure()
    tokenizer = options.load_tokenizer()
    for folder in options.folders:
        written = _reindex(options, folder)
        if tokenizer is not None:
            _note_tokenizer(folder, tokenizer.fingerprint)
        console.print(
            f"{folder}: {sum(written)} of {len(written)} indexes written", highlight=False, soft_wrap=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
