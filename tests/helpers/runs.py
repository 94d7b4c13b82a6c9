"""Settings of runs of which a test needs a few."""

from vlgpt.config import validate
from vlgpt.settings import RunSettings


def run_settings(**changes: object) -> RunSettings:
    """A run of one step on one row; nothing that it names exists."""
    values = {
        "name": "test",
        "output_dir": "none",
        "stage": {"kind": "language", "language_model": "none"},
        "data": {"sources": [{"name": "a", "path": "b"}]},
        "precision": "fp32",
        **dict.fromkeys(("steps", "global_batch", "micro_batch"), 1),
    }
    return validate(RunSettings, {**values, **changes}, where="test")
