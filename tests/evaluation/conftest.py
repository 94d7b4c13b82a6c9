"""One folder with every benchmark's fixture, and a tiny CLIP, made once per session."""

from pathlib import Path

import pytest

from tests.helpers import official_files


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
