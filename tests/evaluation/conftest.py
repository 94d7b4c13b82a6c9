"""One folder with every benchmark's fixture, and a tiny CLIP, made once per session."""

from pathlib import Path

import pytest

from tests.helpers import official_files
from tests.helpers.evaluated import clip_folder, export  # noqa: F401 - fixtures


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("official")
    official_files.write_all(folder)
    return folder
