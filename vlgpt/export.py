"""A trained model as one folder that anybody can load: safetensors, configuration, tokenizer, parts, model card.

`Generator.load` reads it, and so do `AutoModel` and `AutoProcessor` of transformers once `vlgpt.hf` is imported.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlgpt.decoding.load import DIFFUSION_PATHS, describe_decoder, located
from vlgpt.files import JsonObject
from vlgpt.log import get_logger
from vlgpt.model_card import write_card
from vlgpt.models.unified import UnifiedConfig, UnifiedModel
from vlgpt.models.weights import tensors_of, write_weights
from vlgpt.tokens import DocumentTokenizer

MAX_COPIED_BYTES = 200_000_000


def export_model(
    model: UnifiedModel,
    folder: Path,
    *,
    tokenizer: DocumentTokenizer,
    encoder: Mapping[str, Any] | None = None,
    picture_decoder: str | Path | None = None,
    merge_lora: bool = True,
    card: Mapping[str, Any] | None = None,
) -> None:
    """Write an export; config.json comes last, so that a folder without it is known to be incomplete.

    The model is not changed: adapters are merged tensor by tensor while writing, or kept apart with `merge_lora=False`
    (then logits equal the training model's bit by bit). `encoder` holds the fields of EncoderSettings. The image
    encoder and the parts of the image decoder are each copied when they are local and below 200 MB, else only named.
    `picture_decoder` is the folder of a saved decoder, or a JSON file (or a folder with diffusion.json) with the
    arguments of `DiffusionDecoder.load`. Raises UserError when one of them cannot be found.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    config = config_of(model, tokenizer, merge_lora=merge_lora)
    if encoder is not None:
        config.image_encoder = {**encoder, "path": carry(encoder["path"], folder, "image_encoder")}
    if picture_decoder is not None:
        config.picture_decoder = _carry_decoder(picture_decoder, folder)
    write_weights(tensors_of(model, merge_lora=merge_lora), folder)
    tokenizer.save(folder)
    _write_transformers_files(folder, tokenizer, config)
    write_card(folder / "README.md", model=model, config=config, card=card or {})
    (folder / "config.json").write_text(json.dumps(config.to_record(), indent=1) + "\n")


def config_of(model: UnifiedModel, tokenizer: DocumentTokenizer, *, merge_lora: bool) -> UnifiedConfig:
    """The configuration that rebuilds this model."""
    lm = model.lm
    text_config = lm.backbone.config.to_dict()
    text_config["model_type"] = lm.backbone.config.model_type
    text_config["dtype"] = str(lm.backbone.get_input_embeddings().weight.dtype).removeprefix("torch.")
    lora = None
    if lm.has_lora and not merge_lora:
        adapter: Any = lm.language_model.peft_config["default"]  # a LoraConfig; peft types it as its base
        lora = {
            "rank": adapter.r,
            "alpha": adapter.lora_alpha,
            "dropout": adapter.lora_dropout,
            "tokens": next(iter(adapter.trainable_token_indices.values())),
        }
    return UnifiedConfig(
        text_config=text_config,
        image_tokenizer=model.image_tokenizer.arguments,
        image_detokenizer=model.image_detokenizer.arguments,
        num_tokens=lm.num_tokens,
        template=tokenizer.template_name,
        rendering="parts" if tokenizer.rendering == "parts" else "saved",
        head=lm.head_name,
        head_options=lm.head_options or None,
        is_boundary_target=tokenizer.is_boundary_target,
        lora=lora,
    )


def carry(reference: str | Path, folder: Path, name: str) -> str:
    """Copy a small local file or folder into the export as `name`; anything else is only named.

    -> the path relative to the export, an absolute path, or the hub name as it is.
    """
    source = Path(reference)
    if not source.exists():
        return str(reference)
    files = [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]
    if sum(file.stat().st_size for file in files) >= MAX_COPIED_BYTES:
        get_logger("export").info("%s is large: the export names it, but holds no copy", source)
        return str(source.resolve())
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.resolve() != target.resolve():
        if source.is_file():
            shutil.copy2(source, target)
        else:
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("done.json", ".*"))
    return name


def _carry_decoder(path: str | Path, folder: Path) -> JsonObject:
    """The record of an image decoder, its small local parts copied."""
    record = describe_decoder(path, key="picture_decoder")
    if record["kind"] == "component":
        return {**record, "path": carry(record["path"], folder, "picture_decoder")}
    for name in DIFFUSION_PATHS:
        if reference := record.get(name):
            suffix = Path(reference).suffix if Path(reference).is_file() else ""
            record[name] = carry(reference, folder, f"picture_decoder/{name}{suffix}")
    return record


def _write_transformers_files(folder: Path, tokenizer: DocumentTokenizer, config: UnifiedConfig) -> None:
    """What `AutoProcessor` and `generate` of transformers look for."""
    from transformers import GenerationConfig

    processor = {
        "processor_class": "VLGPTProcessor",
        "num_visual": config.image_tokenizer["num_visual"],
        "template": config.template,
        "rendering": config.rendering,
        "is_boundary_target": config.is_boundary_target,
        "image_size_px": _image_size_px(folder, config),
    }
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=1) + "\n")
    ends = [tokenizer.eos_id]
    if (
        len(tokenizer.reply_end_ids) == 1 or not tokenizer.reply_end_text
    ):  # the last token ends a reply by itself
        ends.append(tokenizer.reply_end_ids[-1])
    GenerationConfig(
        bos_token_id=tokenizer.bos_id,
        eos_token_id=sorted(set(ends)),
        pad_token_id=tokenizer.eos_id,
        max_new_tokens=64,
        do_sample=False,
    ).save_pretrained(folder)


def _image_size_px(folder: Path, config: UnifiedConfig) -> int:
    """The size of the images that the encoder reads, from its own configuration; 224 when there is none to read."""
    place = Path(located(folder, config.image_encoder["path"])) if config.image_encoder else folder
    for name, keys in (
        ("open_clip_config.json", ("model_cfg", "vision_cfg")),
        ("config.json", ("vision_config",)),
    ):
        if (place / name).is_file():
            record = json.loads((place / name).read_text())
            for key in keys:
                record = record.get(key, {})
            size = record.get("image_size", 224)
            return size if isinstance(size, int) else int(size[0])
    return 224
