"""Entry point of the group `lmms_eval.models`: makes `--model vlgpt` known to lmms-eval (0.7 and later).

The class itself is in lmms_model.py, which imports lmms-eval's heavy parts only when the model is built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """What lmms-eval registers."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="vlgpt",
        simple_class_path="evaluation.adapters.lmms_model.VlGptLmms",
        aliases=("vl-gpt", "vl_gpt"),
    )
