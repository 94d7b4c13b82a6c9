"""The parts of a run as plain numbers: every layer, every parameter. No torch; tests compare with the classes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlgpt import settings as s
from vlgpt.log import UserError
from vlgpt.planning.shapes import ImageTower, image_tower, language_config, read_export

VOCABULARY_MULTIPLE = 64
SUPPORTED = ("llama", "mistral", "qwen2")  # their layers are equal but for the biases of qwen2


@dataclass(frozen=True)
class LanguageShape:
    """A decoder-only LM of the LLaMA family."""

    vocabulary: int
    width: int
    mlp: int
    depth: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    is_tied: bool
    has_qkv_bias: bool

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of the linear layers of one block: q, k, v, o, gate, up, down."""
        w, q, kv = self.width, self.num_heads * self.head_width, self.num_kv_heads * self.head_width
        return [(w, q), (w, kv), (w, kv), (q, w), (w, self.mlp), (w, self.mlp), (self.mlp, w)]

    @property
    def num_block_weights(self) -> int:
        return sum(a * b for a, b in self.linears)

    @property
    def num_table_parameters(self) -> int:
        """Embedding and LM head."""
        return self.vocabulary * self.width * (1 if self.is_tied else 2)

    @property
    def num_parameters(self) -> int:
        bias = sum(out for _, out in self.linears[:3]) if self.has_qkv_bias else 0
        return (
            self.num_table_parameters
            + self.depth * (self.num_block_weights + bias + 2 * self.width)
            + self.width
        )

    def num_lora(self, rank: int) -> int:
        return self.depth * rank * sum(a + b for a, b in self.linears)


@dataclass(frozen=True)
class QueryShape:
    """The image tokenizer or detokenizer: `num_queries` read `num_context` tokens; `outputs` are (tokens, width)."""

    num_queries: int
    num_context: int
    context_width: int
    width: int
    mlp: int
    depth: int
    num_heads: int
    outputs: tuple[tuple[int, int], ...]

    @property
    def num_parameters(self) -> int:
        w, c, m = self.width, self.context_width, self.mlp
        attention = (4 * w * w + 4 * w) + (2 * w * w + 2 * w + 2 * c * w + 2 * w)
        block = attention + 2 * w * m + m + w + 6 * w
        head = sum((w + 1) * out for _, out in self.outputs)
        return self.num_queries * w + self.num_context * c + 2 * c + self.depth * block + 2 * w + head


@dataclass(frozen=True)
class Architecture:
    """All parts of a run. `lm` is None in stage 1, `tower` when image features are read from disk."""

    tokenizer: QueryShape
    detokenizer: QueryShape
    num_visual: int
    visual_width: int
    tower: ImageTower | None
    lm: LanguageShape | None = None
    lora_rank: int | None = None  # None: all of the LM is trained
    lora_dropout: float = 0.0
    head: str = "linear"
    frozen: tuple[str, ...] = ()  # names as in the stage's settings
    origins: tuple[str, ...] = ()  # where the shapes came from

    @property
    def has_projection(self) -> bool:
        return self.lm is not None and self.lm.width != self.visual_width

    @property
    def head_linears(self) -> list[tuple[int, int]]:
        assert self.lm is not None
        w = self.lm.width
        return [(w, self.visual_width)] if self.head == "linear" else [(w, 2 * w), (2 * w, self.visual_width)]

    def parameters(self) -> dict[str, tuple[int, int]]:
        """Component -> (all, trained)."""
        parts = {
            "image_tokenizer": self.tokenizer.num_parameters,
            "image_detokenizer": self.detokenizer.num_parameters,
        }
        kept = {f"image_{name}" for name in self.frozen}
        counts = {name: (n, n if self.lm is None and name not in kept else 0) for name, n in parts.items()}
        if self.tower is not None:
            counts["image_encoder"] = (self.tower.num_parameters, 0)
        if self.lm is None:
            return counts
        n = self.lm.num_parameters
        tables = self.lm.num_table_parameters if "embeddings" in self.frozen else 0
        own: dict[str, tuple[int, int]] = {"language_model": (n, 0 if self.lora_rank else n - tables)}
        if self.lora_rank:
            lora, rows = self.lm.num_lora(self.lora_rank), 2 * self.lm.width * (1 if self.lm.is_tied else 2)
            own |= {"lora_adapters": (lora, lora), "token_rows": (rows, rows)}
        head = sum((a + 1) * b for a, b in self.head_linears)
        own["regression_head"] = (head, head)
        if self.has_projection:
            projection = (self.visual_width + 1) * self.lm.width
            own["input_projection"] = (projection, projection)
        own |= {name: (own[name][0], 0) for name in own.keys() & set(self.frozen)}
        return own | counts


def architecture_of(run: s.RunSettings) -> Architecture:
    """Shapes of a run's parts. Raises UserError when one is unknown, or when the stage is a part of the demo."""
    stage = run.stage
    if isinstance(stage, s.ImageTokenizerStage):
        tower = image_tower(stage.encoder.path) if stage.encoder else None
        tokenizer, detokenizer = image_shapes(stage.model_dump() | stage.shapes.model_dump())
        shape = (stage.num_visual, stage.visual_width)
        return Architecture(tokenizer, detokenizer, *shape, tower, frozen=stage.frozen)
    if not isinstance(stage, s.LanguageStage):
        raise UserError(f"stage {stage.kind!r} belongs to the demo: it trains in minutes and needs no plan")
    config, origin = language_config(stage.language_model)
    values, image_origin = _stored_image_parts(stage)
    tokenizer, detokenizer = image_shapes(values)
    return Architecture(
        tokenizer,
        detokenizer,
        values["num_visual"],
        values["visual_width"],
        image_tower(stage.encoder.path) if stage.encoder else None,
        lm=language_shape(config, has_image_tokens=read_export(stage.language_model) is not None),
        lora_rank=stage.lora.rank if stage.trained == "lora" else None,
        lora_dropout=stage.lora.dropout,
        head=stage.head,
        frozen=stage.frozen,
        origins=(f"language model: {origin}", f"image parts: {image_origin}"),
    )


def language_shape(config: dict[str, Any], *, has_image_tokens: bool) -> LanguageShape:
    """From a transformers configuration; the vocabulary grows by [IMG], [/IMG] and padding. Raises UserError."""
    kind = config.get("model_type")
    if kind not in SUPPORTED:
        raise UserError(f"language models of type {kind!r} cannot be planned, only: {', '.join(SUPPORTED)}")
    vocabulary = config["vocab_size"]
    if not has_image_tokens:
        vocabulary = -(-(vocabulary + 2) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    heads = config["num_attention_heads"]
    return LanguageShape(
        vocabulary=vocabulary,
        width=config["hidden_size"],
        mlp=config["intermediate_size"],
        depth=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_width=config.get("head_dim") or config["hidden_size"] // heads,
        is_tied=bool(config.get("tie_word_embeddings", False)),
        has_qkv_bias=kind == "qwen2" or bool(config.get("attention_bias", False)),
    )


def image_shapes(values: dict[str, Any]) -> tuple[QueryShape, QueryShape]:
    """Image tokenizer and detokenizer from the values of a stage-1 configuration."""

    def query_shape(
        part: dict[str, Any], queries: int, context: int, width: int, outputs: tuple[tuple[int, int], ...]
    ) -> QueryShape:
        mlp = int(part["width"] * part["mlp_ratio"])
        own = (part["width"], mlp, part["depth"], part["num_heads"])
        return QueryShape(queries, context, width, *own, outputs)

    n, d = values["num_visual"], values["visual_width"]
    image_tokens = values["image_tokens"] + int(values.get("has_mean_token", False))
    outputs = ((image_tokens, values["image_width"]), (values["text_tokens"], values["text_width"]))
    tokenizer = query_shape(values["tokenizer"], n, values["num_patches"], values["patch_width"], ((n, d),))
    num_targets = image_tokens + values["text_tokens"]
    return tokenizer, query_shape(values["detokenizer"], num_targets, n, d, outputs)


def _stored_image_parts(stage: s.LanguageStage) -> tuple[dict[str, Any], str]:
    """From the export, else from stage 1's result, else (stage 1 is yet to run) of the paper's size."""
    export = read_export(stage.language_model)
    if stage.image_tokenizer is None and export is not None:
        tokenizer, detokenizer = export["image_tokenizer"], export["image_detokenizer"]
        return detokenizer | tokenizer | {
            "tokenizer": tokenizer,
            "detokenizer": detokenizer,
        }, stage.language_model
    folder = Path(stage.image_tokenizer or "")
    files = [folder / name / "config.json" for name in ("image_tokenizer", "image_detokenizer")]
    if all(file.is_file() for file in files):
        tokenizer, detokenizer = (json.loads(file.read_text())["arguments"] for file in files)
        return detokenizer | tokenizer | {"tokenizer": tokenizer, "detokenizer": detokenizer}, str(folder)
    paper = s.ImageTokenizerStage(kind="image_tokenizer")
    values = paper.model_dump() | paper.shapes.model_dump()
    return values, f"the paper's size ({stage.image_tokenizer} is not there yet)"
