"""Builds of data sets in this process, and what stands in them."""

import json
from collections.abc import Iterable
from pathlib import Path

from data_prep.build import main
from vlgpt.document import Document
from vlgpt.errors import run_command
from vlgpt.files import sha256_file
from vlgpt.shards import ShardReport, ShardSet


def build_arguments(source: str, folder: Path, output: Path, *options: object) -> list[str]:
    """The command line of a build without worker processes."""
    places = ["--input", str(folder), "--output", str(output)]
    return [source, *places, "--num-workers", "0", *map(str, options)]


def build(source: str, folder: Path, output: Path, *options: object) -> int:
    """Run it as the command does: -> the exit code."""
    return run_command(lambda: main(build_arguments(source, folder, output, *options)))


def write_imagefolder(folder: Path, files: Iterable[tuple[str, bytes | None, dict]]) -> Path:
    """Files (none: missing) and a table with the columns of each."""
    folder.mkdir(parents=True)
    rows = []
    for name, data, columns in files:
        if data is not None:
            (folder / name).write_bytes(data)
        rows.append(json.dumps({"file_name": name, **columns}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows))
    return folder


def assert_every_tar_is_whole(output: Path) -> None:
    """What stands under a final name has its report and its index."""
    for tar in output.glob("*.tar"):
        report = ShardReport.model_validate_json(tar.with_suffix(".json").read_bytes())
        assert sha256_file(tar) == report.sha256, tar.name
        assert tar.with_suffix(".idx").is_file()


def documents(shards: ShardSet | Path) -> list[Document]:
    """All documents of a data set, in order."""
    shards = shards if isinstance(shards, ShardSet) else ShardSet.open(shards)
    places = [(number, sample) for number, r in enumerate(shards.shards) for sample in range(r.num_samples)]
    return [shards.read(*place, with_images=False).document for place in places]
