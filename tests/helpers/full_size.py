"""`full_size.py YAML JSON FOLDER`: DeepSpeed starts a shipped run of stage 2 at its full size, without weights.

The parts have the published shapes, in memory that is reserved and not touched: a 13B model takes 1.5 GB. torch's
`fake` process group has the ranks that the YAML is written for and sends nothing. The rest is the real start and save.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import CLIPConfig, CLIPModel

from vlgpt.config import load_run
from vlgpt.models.unified import UnifiedConfig, UnifiedModel
from vlgpt.stages.language import LanguageStage
from vlgpt.train.ds_config import merge_config
from vlgpt.train.engine import Engine

NUM_RANKS, NUM_BASE_TOKENS = 32, 32000
# published: width, blocks, heads, inner width, parameters
LLAMA = {
    "huggyllama/llama-7b": (4096, 32, 32, 11008, 6_738_415_616),
    "huggyllama/llama-13b": (5120, 40, 40, 13824, 13_015_864_320),
}
CLIP_L = {
    "projection_dim": 768,
    "vision_config": {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
        "patch_size": 14, "image_size": 224,
    },
    "text_config": {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    },
}  # fmt: skip
CLIP_L_PARAMETERS = 427_616_513


def unified_config(run):
    """What `UnifiedModel` is made of, for the run's language model and the image tokenizer that is shipped with it."""
    width, depth, num_heads, inner, _ = LLAMA[run.stage.language_model]
    first = load_run(Path(sys.argv[1]).parents[1] / "tokenizer" / "vlgpt_7b.yaml").stage
    shapes, visual = first.shapes, {"num_visual": first.num_visual, "visual_width": first.visual_width}
    patches = {"num_patches": shapes.num_patches, "patch_width": shapes.patch_width}
    conditions = {
        name: getattr(shapes, name) for name in ("image_tokens", "image_width", "text_tokens", "text_width")
    }
    return UnifiedConfig(
        text_config={
            "model_type": "llama", "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": num_heads,
            "intermediate_size": inner, "vocab_size": NUM_BASE_TOKENS + 64, "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        },
        image_tokenizer={**visual, **patches, **first.tokenizer.model_dump()},
        image_detokenizer={**visual, **conditions, **first.detokenizer.model_dump()},
        num_tokens=NUM_BASE_TOKENS + 2,
        template=run.stage.template,
        head=run.stage.head,
        lora={**run.stage.lora.model_dump(), "tokens": [NUM_BASE_TOKENS, NUM_BASE_TOKENS + 1]},
    )  # fmt: skip


def build(run):
    """The stage on the meta device, then in memory that is only reserved."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = UnifiedModel.from_config(unified_config(run))
        tower = nn.Module()
        tower.model = CLIPModel(CLIPConfig(**CLIP_L)).requires_grad_(False)
        stage = LanguageStage(model=model, encoder=tower)
    torch.set_default_dtype(torch.float32)
    assert sum(p.numel() for p in model.lm.base_weights().values()) == LLAMA[run.stage.language_model][-1]
    assert sum(p.numel() for p in tower.parameters()) == CLIP_L_PARAMETERS
    assert any(p.ndim == 0 for p in stage.parameters()), "CLIP's logit_scale has no dimension"
    return stage.to_empty(device="cpu")


def main():
    import deepspeed

    config, zero, folder = sys.argv[1:]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(NUM_RANKS), "LOCAL_SIZE": "8"}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group("fake", rank=0, world_size=NUM_RANKS, store=FakeStore())
    deepspeed.init_distributed("fake", verbose=False)
    run = load_run(config)
    stage = build(run)
    merged = merge_config(run, json.loads(Path(zero).read_text()), world_size=NUM_RANKS, source=zero)
    engine = Engine(stage, run, merged)
    engine.save(Path(folder), "step")
    assert list(Path(folder, "step").iterdir())
    shutil.rmtree(folder)
    print(f"{sum(1 for _ in stage.parameters())} parameters accepted, {engine.num_trainable} numbers trained")


if __name__ == "__main__":
    main()
