"""A folder in which the paths and hub names of the shipped configurations lead to miniatures of what they mean.

Run from there, a shipped YAML needs no other path: `huggyllama/llama-7b` is a folder with LLaMA's classes, fp16 shards
and tokenizer, `openai/clip-vit-large-patch14` has CLIP's, and `data/cc3m` is a data set of our writer with real JPEGs.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from data_prep import features, index
from tests.helpers import miniatures as mini
from tests.helpers import tiny_diffusion_parts as tiny
from tests.helpers.processes import ROOT
from tests.helpers.small_data import chat, page, pair, picture, words, write_dataset
from vlgpt import settings as s
from vlgpt.config import load_run
from vlgpt.document import Document, ImagePart, TextPart
from vlgpt.turns import SYSTEM_MESSAGE

CONFIGS = sorted(p for p in ROOT.glob("launchers/configs/*/*.yaml") if not p.parent.name.startswith("demo"))
NUM_VISUAL, VISUAL_WIDTH, VOCABULARY, NUM_DOCUMENTS = 4, 32, 512, 24
DECODER = "decoders/sd15/diffusion.json"  # docs/decoders.md
ZERO_SIZES = {  # small parameters must be taken apart as large ones are
    "reduce_bucket_size": 1_000_000,
    "allgather_bucket_size": 1_000_000,
    "stage3_prefetch_bucket_size": 100_000,
    "stage3_param_persistence_threshold": 100,
}


def edit(number: int) -> Document:
    """An instruction about a picture, answered with a picture."""
    asked = (ImagePart(0, "user"), TextPart(words("edit", number), "user"))
    return Document(f"edit-{number}", "edits", (*asked, ImagePart(1, "assistant")))


DOCUMENTS = {
    **dict.fromkeys(("cc3m", "laion-aesthetics", "laion-coco"), pair),
    **dict.fromkeys(("mmc4", "obelics"), page),
    **dict.fromkeys(("llava", "svit", "coco"), chat),
    **dict.fromkeys(("instructpix2pix", "magicbrush"), edit),
}


def write_llama_tokenizer(folder: Path) -> None:
    """LLaMA's tokenizer as published: sentencepiece's words with byte fallback in tokenizer.json, BOS added."""
    words = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    words.train_from_iterator([SYSTEM_MESSAGE, "USER: ASSISTANT: w0 w1 w2 w3 w4 w5 w6 w7 w8 w9"] * 3, trainer)
    words.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    record = json.loads(words.to_str())
    record["added_tokens"] = record["added_tokens"][:3]  # bytes are words like others
    (folder / "tokenizer.json").write_text(json.dumps(record))
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
    options = {"add_bos_token": True, "add_eos_token": False, "tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**marks, **options, "model_max_length": 2048}))


def write_llama(folder: Path, *, width: int) -> None:
    """`huggyllama/llama-7b`: fp16 in shards with an index, untied tables, a vocabulary that must grow."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=2048, rms_norm_eps=1e-6, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).half().save_pretrained(folder, max_shard_size="40KB")
    assert (folder / "model.safetensors.index.json").is_file()
    write_llama_tokenizer(folder)


def write_workspace(folder: Path) -> None:
    """Everything that the shipped configurations read, once. Features come from our own `data_prep.features`."""
    (folder / "launchers").symlink_to(ROOT / "launchers")
    (folder / "ds_configs").mkdir(parents=True)
    for path in sorted((ROOT / "ds_configs").glob("*.json")):
        record = json.loads(path.read_text())
        zero = record["zero_optimization"]
        zero |= {key: size for key, size in ZERO_SIZES.items() if key in zero}
        (folder / "ds_configs" / path.name).write_text(json.dumps(record))
    mini.write_diffusion(folder / Path(DECODER).parent)
    mini.write_open_clip(folder / "laion" / "open_clip", mini.OPEN_CLIP)
    for path in CONFIGS:
        run = load_run(path)
        for source in run.data.sources:
            if not (folder / source.path).exists():
                documents = [DOCUMENTS[source.name](number) for number in range(NUM_DOCUMENTS)]
                write_dataset(folder / source.path, documents, shard_sizes=[12, 12], make_picture=jpeg)
        if run.data.features:
            wanted = ["--features", ",".join(run.data.features), "--encoder", str(folder / DECODER)]
            folders = [str(folder / source.path) for source in run.data.sources]
            assert features.main([*folders, *wanted, "--library", "ip_adapter"]) == 0
        if not (folder / run.stage.encoder.path).exists():
            mini.write_clip(folder / run.stage.encoder.path)
        if isinstance(run.stage, s.LanguageStageSettings):
            if not (folder / run.stage.language_model).exists():
                write_llama(folder / run.stage.language_model, width=lm_width(run.stage))
            lengths = ["--tokenizer", str(folder / run.stage.language_model)]
            for source in run.data.sources:
                assert index.main([str(folder / source.path), *lengths]) == 0


def lm_width(stage: s.LanguageStageSettings) -> int:
    """As published, LLaMA-7B is as wide as the visual embeddings and other sizes are not."""
    return VISUAL_WIDTH if stage.language_model.endswith("7b") else VISUAL_WIDTH + 16


def jpeg(number: int) -> tuple[str, bytes]:
    return picture(number, size_px=40, suffix="jpg")


def sizes(run: s.RunSettings) -> dict[str, object]:
    """The only settings that the miniatures change: widths, depths, shapes and counts."""
    values: dict[str, object] = {
        "steps": 4,
        "global_batch": 8,
        "micro_batch": 2,
        "optimizer.warmup_steps": 2,
        "checkpoint.interval_steps": 1,
        "data.image_size_px": mini.SIZE_PX,
        "data.num_workers": 1,
    }
    if isinstance(run.stage, s.TokenizerStageSettings):
        num_patches = (mini.SIZE_PX // mini.PATCH_PX) ** 2 + 1
        values |= {
            "stage.shapes.num_patches": num_patches,
            "stage.shapes.patch_width": mini.VISION["hidden_size"],
            "stage.shapes.image_tokens": tiny.IMAGE_TOKENS,
            "stage.shapes.image_width": tiny.WIDTH,
            "stage.shapes.text_tokens": mini.TEXT_LENGTH,
            "stage.shapes.text_width": tiny.WIDTH,
            "stage.num_visual": NUM_VISUAL,
            "stage.visual_width": VISUAL_WIDTH,
            "stage.statistics_samples": 40,
        }
        for part in ("tokenizer", "detokenizer"):
            values |= {f"stage.{part}.width": 32, f"stage.{part}.depth": 2, f"stage.{part}.num_heads": 4}
    return values


def command_of(config: Path) -> list[str]:
    """The command that the YAML opens with: launcher, `--deepspeed`, JSON, `--config`, YAML."""
    first = config.read_text().splitlines()[0]
    assert first.startswith("# deepspeed launchers/"), first
    return first.split()[2:]
