"""python -m data_prep.index DIR [--tokenizer PATH]: token lengths of another tokenizer, or damaged indexes
anew.

The tars are read and never written. Each index is replaced atomically, so a kill leaves every shard with its
old index or its new one, and the next run continues.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.progress import track

from data_prep.job import SETTINGS
from vlgpt.errors import UserError, run_command
from vlgpt.files import write_atomic
from vlgpt.log import configure
from vlgpt.shards import ShardIndex, ShardSet
from vlgpt.shards.manifest import MANIFEST, read_manifest
from vlgpt.shards.reindex import rebuild_index, retokenise
from vlgpt.shards.schema import TextTokenizer


def load_tokenizer(path: str | None, *, template: str) -> TextTokenizer | None:
    """The tokenizer that training uses, or None. Raises UserError."""
    if path is None:
        return None
    from vlgpt.tokens import DocumentTokenizer

    return DocumentTokenizer.load(path, template=template)


def reindex_shard(folder: Path, shard: int, *, tokenizer_path: str | None, template: str = "vlgpt") -> bool:
    """Bring one index up to date; True when it was written. Raises UserError when the tar itself is
    damaged.
    """
    shards, tokenizer = ShardSet.open(folder), load_tokenizer(tokenizer_path, template=template)
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


def _note_tokenizer(folder: Path, fingerprint: str) -> None:
    """Once every index has it: the build's settings name the new tokenizer."""
    settings_path, manifest_path = folder / SETTINGS, folder / MANIFEST
    if not settings_path.is_file() or any(
        ShardIndex.load(path).tokenizer != fingerprint for path in _index_paths(folder)
    ):
        return
    manifest = read_manifest(manifest_path.read_bytes(), where=str(manifest_path))
    noted = manifest.model_copy(update={"build": {**manifest.build, "tokenizer": fingerprint}})
    write_atomic(manifest_path, noted.model_dump_json(indent=1).encode())
    settings = {**json.loads(settings_path.read_text()), "tokenizer": fingerprint}
    write_atomic(settings_path, json.dumps(settings, indent=1, sort_keys=True).encode())


def _index_paths(folder: Path) -> Iterator[Path]:
    shards = ShardSet.open(folder)
    return (shards.index_path(shard) for shard in range(len(shards.shards)))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0 done, 2 wrong use or a damaged tar."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.index", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="data set folders")
    parser.add_argument(
        "--tokenizer", help="tokenizer folder or hub name; without it only damaged indexes are made anew"
    )
    parser.add_argument(
        "--template", default="vlgpt", help="chat template of the run, own: the tokenizer's (default: vlgpt)"
    )
    parser.add_argument("--task-index", type=int, default=0, help="this task, from 0 (default: 0)")
    parser.add_argument("--num-tasks", type=int, default=1, help="tasks that share the work (default: 1)")
    parser.add_argument("--num-workers", type=int, default=1, help="processes (default: 1)")
    arguments = parser.parse_args(argv)
    configure()
    console = Console(stderr=True)
    options = {"tokenizer_path": arguments.tokenizer, "template": arguments.template}
    tokenizer = load_tokenizer(arguments.tokenizer, template=arguments.template)
    for folder in arguments.folders:
        mine = range(arguments.task_index, len(ShardSet.open(folder).shards), arguments.num_tasks)
        context = get_context("spawn")  # tokenizers hold threads, which do not survive a fork
        if arguments.num_workers > 1:
            with ProcessPoolExecutor(arguments.num_workers, mp_context=context) as pool:
                jobs = [pool.submit(reindex_shard, folder, shard, **options) for shard in mine]
                written = sum(job.result() for job in track(jobs, description=folder.name, console=console))
        else:
            steps = track(mine, description=folder.name, console=console)
            written = sum(reindex_shard(folder, shard, **options) for shard in steps)
        if tokenizer is not None:
            _note_tokenizer(folder, tokenizer.fingerprint)
        console.print(f"{folder}: {written} of {len(mine)} indexes written", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
