"""One folder with every benchmark's fixture, and a tiny CLIP, made once per session."""

from pathlib import Path

import emoji_shards
import official_files
import pytest


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("official")
    official_files.write_all(folder)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    official_files.write_clip(folder)
    return folder


@pytest.fixture(scope="session")
def emoji_data(tmp_path_factory) -> Path:
    """Small stand-ins for the emoji shards."""
    folder = tmp_path_factory.mktemp("emoji")
    emoji_shards.write_data(folder)
    return folder


@pytest.fixture(scope="session")
def emoji_oracle(tmp_path_factory, emoji_data, clip_folder) -> Path:
    """A run folder whose `evaluation` holds the emoji suite answered by the oracle."""
    from evaluation.run import main

    folder = tmp_path_factory.mktemp("emoji-oracle")
    arguments = [
        "--data",
        str(emoji_data),
        "--judge",
        str(clip_folder),
        "--output",
        str(folder / "evaluation"),
    ]
    assert main(["emoji", "--responder", "oracle", *arguments]) == 0
    return folder
