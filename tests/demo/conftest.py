"""Small stand-ins for the emoji shards, a tiny CLIP as the judge, and a whole evaluation answered by the oracle."""

from pathlib import Path

import pytest

from tests.helpers import emoji_shards
from tests.helpers.evaluated import clip_folder, export  # noqa: F401 - fixtures


@pytest.fixture(scope="session")
def emoji_data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("emoji")
    emoji_shards.write_data(folder)
    return folder


@pytest.fixture(scope="session")
def evaluate(emoji_data, clip_folder):  # noqa: F811
    """evaluation.run_all with the demo's job list: (export or fake, output folder, more flags) -> exit code."""
    from evaluation.run_all import main

    def run_all(model, output: Path, *flags: str) -> int:
        arguments = [str(model), str(emoji_data), str(output), "--jobs", str(emoji_shards.JOBS)]
        arguments += ["--option", f"judge={clip_folder}", "--metrics", str(output / "metrics.json")]
        return main([*arguments, *flags])

    return run_all


@pytest.fixture(scope="session")
def emoji_oracle(tmp_path_factory, evaluate) -> Path:
    """A run folder whose `evaluation` was answered by the oracle."""
    folder = tmp_path_factory.mktemp("emoji-oracle")
    assert evaluate("oracle", folder / "evaluation") == 0
    return folder
