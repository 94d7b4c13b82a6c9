"""A random stage of the real classes and a packed batch, on any device: what the GPU checks run on."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from vlgpt import seeds
from vlgpt.batch import Batch, ImageInput, to_device
from vlgpt.config import validate
from vlgpt.models.image_detokenizer import ImageDetokenizer
from vlgpt.models.image_tokenizer import ImageTokenizer
from vlgpt.models.language_models import build_language_model
from vlgpt.models.multimodal_lm import MultimodalLM
from vlgpt.models.unified import UnifiedModel
from vlgpt.planning.costs import StageCosts, Work, costs_of
from vlgpt.planning.meta import meta_language_model
from vlgpt.settings import LoraSettings, RunSettings
from vlgpt.stages.language import LanguageStage
from vlgpt.train.ds_config import merge_config
from vlgpt.train.engine import Engine, start_process_group, stop_process_group

NUM_STEPS, RESUME_AT = 6, 4


@dataclass(frozen=True)
class Setting:
    """Where and how large. The default is a GPU's; tests swap device, attention and sizes."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    attention: str = "flash_attention_2"
    width: int = 2048
    depth: int = 12
    mlp: int = 5632
    num_heads: int = 16
    vocabulary: int = 32064
    length: int = 512
    rows: int = 4
    num_visual: int = 32

    @property
    def config(self) -> dict[str, Any]:
        return {
            "model_type": "llama",
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.depth,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "tie_word_embeddings": False,
        }


def new_stage(setting: Setting, *, trained: str = "lora") -> LanguageStage:
    """LoRA on a random LLaMA, or all of it trained; the same weights for the same setting whatever the device."""
    seeds.seed_everything(0, "doctor")
    if setting.device == "meta":
        language_model = meta_language_model(AutoConfig.for_model(**setting.config))
    else:
        language_model = build_language_model(dict(setting.config), setting.attention)  # type: ignore[arg-type]
    lm = MultimodalLM(
        language_model,
        num_tokens=setting.vocabulary,
        num_visual=setting.num_visual,
        visual_width=setting.width,
    )
    if trained == "lora":
        lm.add_lora(LoraSettings(dropout=0.0), [setting.vocabulary - 2, setting.vocabulary - 1])
    part: dict[str, Any] = {"width": 64, "depth": 1, "num_heads": 4, "mlp_ratio": 2.0, "init_std": 1.0}
    shared: dict[str, Any] = {"num_visual": setting.num_visual, "visual_width": setting.width}
    model = UnifiedModel(
        lm=lm,
        image_tokenizer=ImageTokenizer(num_patches=4, patch_width=8, **shared, **part),
        image_detokenizer=ImageDetokenizer(
            image_tokens=2,
            image_width=8,
            text_tokens=2,
            text_width=8,
            **shared,
            **part,
        ),
    )
    return LanguageStage(model=model).to(setting.device, setting.dtype)


def new_batch(setting: Setting, *, seed: int = 0) -> Batch:
    """Rows of three documents of uneven lengths, an image in each, no padding."""
    n, length, rows = setting.num_visual, setting.length, setting.rows
    generator = seeds.torch_generator(0, "doctor", seed)
    token_ids = torch.randint(0, setting.vocabulary - 2, (rows, length), generator=generator)
    segment_ids = torch.ones(rows, length, dtype=torch.int32)
    position_ids = torch.zeros(rows, length, dtype=torch.int64)
    is_visual = torch.zeros(rows, length, dtype=torch.bool)
    is_target = torch.ones(rows, length, dtype=torch.bool)
    for row in range(rows):
        shift = row % 3
        bounds = [0, length // 4 + shift, length // 2 + 2 * shift, length]
        for number, (start, stop) in enumerate(pairwise(bounds), start=1):
            segment_ids[row, start:stop] = number
            position_ids[row, start:stop] = torch.arange(stop - start)
            is_visual[row, start + 2 : start + 2 + n] = True
            is_target[row, start] = False
    visual = torch.randn(3 * rows, n, setting.width, generator=generator)
    batch = Batch(
        token_ids=token_ids,
        segment_ids=segment_ids,
        position_ids=position_ids,
        is_visual=is_visual,
        is_target=is_target,
        source_ids=torch.zeros(rows, length, dtype=torch.int16),
        images=ImageInput("visual", visual),
        documents=tuple(tuple(f"{row}-{k}" for k in range(3)) for row in range(rows)),
        num_visual=n,
    )
    batch.validate()
    return to_device(batch, setting.device, setting.dtype)


def plan_of(setting: Setting, *, trained: str = "lora") -> tuple[StageCosts, Work]:
    """What a stage of this setting costs, and what its batch holds."""
    with torch.device("meta"):
        stage = new_stage(replace(setting, device="meta"), trained=trained)
    num_images = 3 * setting.rows
    num_visual = num_images * setting.num_visual
    num_text = setting.rows * (setting.length - 3) - num_visual
    work = Work(setting.rows, num_images, num_text, num_visual, has_tokenizing=False)
    return costs_of(stage, length=setting.length), work


def train_briefly(folder: Path, mode: str, shape: dict[str, object]) -> None:
    """One process of `check_training`, `python -m vlgpt.doctor.sample FOLDER whole|resumed SHAPE`.

    `whole` trains six steps and saves after four; `resumed` loads that and trains the last two.
    """
    start_process_group(timeout_s=120.0)
    world_size = torch.distributed.get_world_size()
    setting = Setting(**{**shape, "dtype": torch.float32})  # type: ignore[arg-type]
    # Several processes with a thread per core each would slow each other down.
    if setting.device == "cpu":
        torch.set_num_threads(1)
    values = {
        "name": "doctor",
        "output_dir": str(folder),
        "stage": {"kind": "language", "language_model": "random"},
        "data": {"sources": [{"name": "random", "path": "none"}]},
        "optimizer": {"lr": 1e-2, "warmup_steps": 0},
        "steps": NUM_STEPS,
        "global_batch": setting.rows * world_size,
        "micro_batch": setting.rows,
        "precision": "bf16",
    }
    settings = validate(RunSettings, values, where="doctor")
    zero = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1_000_000}}
    merged = merge_config(settings, zero, world_size=world_size, source="doctor")
    engine = Engine(new_stage(setting), settings, merged)
    engine.train()
    if mode == "resumed":
        engine.load(folder / "checkpoint", "four")
    losses = []
    for step in range(RESUME_AT if mode == "resumed" else 0, NUM_STEPS):
        batch = engine.place(new_batch(setting, seed=engine.rank))
        terms = engine.forward(batch)
        loss = terms["text"].total + terms["visual"].total
        losses.append(round(float(engine.all_sum(loss.detach().float())), 4))
        engine.backward(loss / float(batch.is_target.sum()))
        engine.end_micro_batch()
        if mode == "whole" and step + 1 == RESUME_AT:
            engine.save(folder / "checkpoint", "four")
    if engine.rank == 0:
        (folder / f"{mode}.json").write_text(json.dumps(losses))
    stop_process_group()


if __name__ == "__main__":
    train_briefly(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
