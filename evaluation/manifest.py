"""What a result depends on: written beside every set of predictions as run.json, copied into every results.json."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from evaluation.benchmarks import reference
from evaluation.core import Benchmark, DecodeSettings, Example, JsonObject, Record, Responder
from evaluation.prompts import PromptTemplate
from vlgpt.decoding.api import ImageLike
from vlgpt.errors import UserError
from vlgpt.files import hash_stream, write_atomic

Manifest: TypeAlias = JsonObject
PACKAGES = [
    "vlgpt",
    "numpy",
    "pillow",
    "torch",
    "transformers",
    "diffusers",
    "open_clip_torch",
    "nltk",
    "easy-vqa",
]
PROTOCOL_KEYS = (
    *("benchmark", "split", "prompt", "second_prompt", "decoding", "answer_options"),
    *("shots", "responder", "questions", "subset"),
)
"""Predictions made under different values of these may never end in one file."""


def export_hash(export: Path) -> str:
    """One hash over every file of an export folder but its README: names, sizes and contents."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(path for path in export.rglob("*") if path.is_file() and path.name != "README.md"):
        digest.update(f"{path.relative_to(export).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            hash_stream(file, digest)
    return digest.hexdigest()


def library_versions() -> dict[str, str]:
    """Versions of what can change a number; packages that are not installed are left out."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def questions_hash(examples: Sequence[Example]) -> str:
    """A hash of every id and zero-shot prompt, images by name: changes when the data or the prompt does."""
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        parts = example.prompt.document.to_record()["parts"]
        record = [example.id, parts, [_image_name(image) for image in example.prompt.images]]
        digest.update(json.dumps(record, ensure_ascii=False, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _image_name(image: ImageLike) -> str:
    if isinstance(image, Path):
        return image.name
    data = image if isinstance(image, bytes) else image.tobytes()  # type: ignore[union-attr]
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def build(
    benchmark: Benchmark,
    examples: Sequence[Example],
    *,
    responder: Responder,
    decoding: DecodeSettings,
    shots: JsonObject,
    subset: JsonObject | None,
) -> Manifest:
    """The manifest of a run."""
    second = benchmark.second_template
    return {
        "benchmark": reference(benchmark),
        "split": benchmark.split,
        "options": benchmark.options(),
        "answer_options": {name: getattr(benchmark, name) for name in benchmark.answer_options},
        "prompt": _prompt_record(benchmark.template),
        **({} if second is None else {"second_prompt": _prompt_record(second)}),
        "decoding": dataclasses.asdict(decoding) | {"stop": list(decoding.stop)},
        "shots": shots,
        "responder": dict(responder.identity),
        "questions": {"n": len(examples), "hash": questions_hash(examples)},
        "subset": subset,
        "versions": library_versions(),
    }


def _prompt_record(template: PromptTemplate) -> dict[str, str]:
    return {"id": template.id, "hash": template.hash, "source": template.source, **template.text}


def differences(a: Record, b: Record, *, prefix: str = "") -> list[str]:
    """Leaves that differ between two JSON objects, as "path: a | b" lines."""
    lines = []
    for key in sorted(a.keys() | b.keys()):
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            lines += differences(left, right, prefix=f"{prefix}{key}.")
        elif left != right:
            lines.append(f"{prefix}{key}: {json.dumps(left)} | {json.dumps(right)}")
    return lines


def _protocol(manifest: Manifest) -> Manifest:
    """The part of a manifest that predictions depend on; of the export its hash counts, not its path."""
    kept = {key: manifest[key] for key in PROTOCOL_KEYS if key in manifest}
    if isinstance(kept.get("responder"), dict):
        kept["responder"] = {key: value for key, value in kept["responder"].items() if key != "export"}
    return kept


def write_or_check(folder: Path, manifest: Manifest) -> None:
    """Write run.json, or compare with what is there. Raises UserError when the protocol has changed."""
    old = read(folder)
    if old is None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "run.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    elif changed := differences(_protocol(old), _protocol(manifest)):
        raise UserError(
            f"{folder} holds predictions of another protocol ({'; '.join(changed[:5])}: old | new); "
            "choose another --output or delete the folder"
        )


def read(folder: Path) -> Manifest | None:
    """run.json of a predictions folder, if it has one."""
    path = folder / "run.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
