"""Checkpoints of every component as they are published: same classes, folders and tensor names, few parameters."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from demo.tiny import CLIP_VISION as VISION
from demo.tiny import SIZE_PX, TEXT_LENGTH, clip_text, save_clip, save_clip_processor
from demo.tiny import save_clip_tokenizer as write_clip_tokenizer
from tests.helpers import tiny_diffusion_parts as tiny
from tests.helpers.tiny_unified import new_document_tokenizer

PATCH_PX = VISION["patch_size"]


def write_clip(folder: Path, *, is_tower: bool = False) -> None:
    """`openai/clip-vit-large-patch14`: both towers, processor and tokenizer; or its image tower alone."""
    torch.manual_seed(0)
    if is_tower:
        CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(folder)
        save_clip_processor(folder)
    else:
        save_clip(folder)


def write_siglip(folder: Path) -> None:
    """`google/siglip-*`: no class token. Its own tokenizer is sentencepiece; the folder format is any tokenizer's."""
    torch.manual_seed(1)
    size = write_clip_tokenizer(folder)
    SiglipModel(SiglipConfig(vision_config=VISION, text_config=clip_text(size))).save_pretrained(folder)
    SiglipImageProcessor(size={"height": SIZE_PX, "width": SIZE_PX}).save_pretrained(folder)


OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": SIZE_PX,
        "patch_size": PATCH_PX,
        "width": 24,
        "layers": 3,
        "head_width": 12,
    },
    "text_cfg": {"context_length": TEXT_LENGTH, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2},
}
OPEN_SIGLIP = {  # as ViT-B-16-SigLIP.json, with a small ViT of timm in the place of the large one
    "embed_dim": 64,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 160,
        "timm_model_name": "test_vit",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": {
        "context_length": TEXT_LENGTH,
        "vocab_size": 64,
        "width": 64,
        "heads": 2,
        "layers": 2,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
    },
}


def write_open_clip(folder: Path, config: dict) -> None:
    """A `local-dir:` folder of open_clip with the weights that its factory makes for this configuration."""
    import open_clip

    folder.mkdir(parents=True)
    record = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(record))
    torch.manual_seed(2)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    new_document_tokenizer().save(folder)


def write_diffusion(folder: Path, *, is_sdxl: bool = False, suffix: str = ".bin", **more) -> Path:
    """Pipeline, text encoders, ViT-H, IP-Adapter Plus, and the JSON that names them; constants are yet to be made."""
    tiny.write_pipeline(folder / "pipeline", is_sdxl=is_sdxl)
    torch.manual_seed(3)
    widths = (12, 20) if is_sdxl else (tiny.WIDTH,)
    kinds = (CLIPTextModel, CLIPTextModelWithProjection)
    for kind, width, number in zip(kinds, widths, ("", "_2")):
        size = write_clip_tokenizer(folder / "pipeline" / f"tokenizer{number}")
        config = CLIPTextConfig(**clip_text(size, hidden_size=width), projection_dim=tiny.POOLED)
        kind(config).save_pretrained(folder / "pipeline" / f"text_encoder{number}")
    vision = CLIPVisionConfig(**{**VISION, "hidden_size": tiny.FEATURE_WIDTH}, projection_dim=8)
    CLIPVisionModelWithProjection(vision).half().save_pretrained(folder / "image_encoder")
    tiny.write_adapter(folder / f"adapter{suffix}", tiny.adapter())
    parts = {"pipeline": "pipeline", "adapter": f"adapter{suffix}", "image_encoder": "image_encoder"}
    parts |= {"unconditional": "unconditional.safetensors", "num_steps": 2, **more}
    (folder / "diffusion.json").write_text(json.dumps(parts))
    return folder / "diffusion.json"


_SHAPE = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LANGUAGE_MODELS = {
    "llama-1": lambda: LlamaConfig(**_SHAPE, num_key_value_heads=4, tie_word_embeddings=False),
    "llama-2": lambda: LlamaConfig(**_SHAPE, num_key_value_heads=2, rms_norm_eps=1e-5),
    "llama-3": lambda: LlamaConfig(
        **_SHAPE, num_key_value_heads=2, rope_parameters=_LLAMA3_ROPE, tie_word_embeddings=True
    ),
    "qwen-2.5": lambda: Qwen2Config(**_SHAPE, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen-2.5-7b": lambda: Qwen2Config(**_SHAPE, num_key_value_heads=2, tie_word_embeddings=False),
    "mistral": lambda: MistralConfig(**_SHAPE, num_key_value_heads=2, head_dim=16, sliding_window=None),
}


def write_language_model(folder: Path, name: str, *, dtype: torch.dtype = torch.float32) -> None:
    """Weights in several shards with an index, configuration, and a text tokenizer without image tokens beside them.

    `llama-1` also holds the rotary frequencies that old checkpoints stored.
    """
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(LANGUAGE_MODELS[name]()).to(dtype)
    model.save_pretrained(folder, max_shard_size="40KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    if name == "llama-1":
        state = load_file(shards[0])
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        save_file(state, shards[0], metadata={"format": "pt"})
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = shards[0].name
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    text = new_document_tokenizer().text_tokenizer.backend_tokenizer.to_str()
    record = json.loads(text)
    record["added_tokens"] = [t for t in record["added_tokens"] if "IMG" not in t["content"]]
    from tokenizers import Tokenizer

    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(record)), bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def change_tensor(path: Path, *, drop: str = "", reshape: str = "") -> str:
    """Take one tensor out of a safetensors file, or give it another shape; -> its name."""
    state = load_file(path)
    name = next(n for n in sorted(state) if (drop or reshape) in n)
    if drop:
        state.pop(name)
    else:
        state[name] = torch.zeros(3, 5)
    save_file(state, path, metadata={"format": "pt"})
    return name
