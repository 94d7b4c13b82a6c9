"""The parts of a run as plain numbers: foreign classes are built on the meta device, ours are formulas, tested."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlgpt import settings as s
from vlgpt.errors import UserError
from vlgpt.planning.shapes import configuration, read_export
from vlgpt.planning.towers import Tower, conditioner_towers, image_tower

VOCABULARY_MULTIPLE = 64


@dataclass(frozen=True)
class LanguageShape:
    """A causal LM of transformers, read off its own class without weights.

    `linears` are (in, out) of the linear layers of all blocks, which LoRA adapts; `num_expert_weights` those of the
    experts that one token meets.
    """

    vocabulary: int
    entered_width: int
    width: int
    depth: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    linears: tuple[tuple[int, int], ...]
    num_expert_weights: int
    num_table_parameters: int
    num_parameters: int
    is_tied: bool

    @property
    def num_block_weights(self) -> int:
        """Of all blocks: each costs a token one multiply-add."""
        return sum(a * b for a, b in self.linears) + self.num_expert_weights

    @property
    def mlp(self) -> int:
        return max(a for a, _ in self.linears)

    @property
    def num_gates(self) -> int:
        """Matrices that lead into an MLP: 2 where it is gated, 1 where it is not."""
        return max(1, sum(b // self.mlp for _, b in self.linears if b % self.mlp == 0) // self.depth)

    def num_lora(self, rank: int) -> int:
        return rank * sum(a + b for a, b in self.linears)


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
    """All parts of a run. `lm` is None in stage 1; `towers` are the frozen encoders by name."""

    tokenizer: QueryShape
    detokenizer: QueryShape
    num_visual: int
    visual_width: int
    towers: Mapping[str, Tower] = field(default_factory=dict)
    lm: LanguageShape | None = None
    lora_rank: int | None = None  # None: all of the LM is trained
    lora_dropout: float = 0.0
    head: str = "linear"
    frozen: tuple[str, ...] = ()  # names as in the stage's settings
    origins: tuple[str, ...] = ()  # where the shapes came from

    @property
    def has_projection(self) -> bool:
        return self.lm is not None and self.lm.entered_width != self.visual_width

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
        counts |= {name: (tower.num_parameters, 0) for name, tower in self.towers.items()}
        if self.lm is None:
            return counts
        n = self.lm.num_parameters
        tables = self.lm.num_table_parameters if "embeddings" in self.frozen else 0
        own: dict[str, tuple[int, int]] = {"language_model": (n, 0 if self.lora_rank else n - tables)}
        if self.lora_rank:
            lora = self.lm.num_lora(self.lora_rank)
            rows = 2 * (self.lm.entered_width + (0 if self.lm.is_tied else self.lm.width))
            own |= {"lora_adapters": (lora, lora), "token_rows": (rows, rows)}
        head = sum((a + 1) * b for a, b in self.head_linears)
        own["regression_head"] = (head, head)
        if self.has_projection:
            projection = (self.visual_width + 1) * self.lm.entered_width
            own["input_projection"] = (projection, projection)
        own |= {name: (own[name][0], 0) for name in own.keys() & set(self.frozen)}
        return own | counts


def architecture_of(run: s.RunSettings) -> Architecture:
    """Shapes of a run's parts. Raises UserError when one is unknown, or when the stage is not one of ours."""
    stage = run.stage
    if isinstance(stage, s.TokenizerStageSettings):
        tokenizer, detokenizer = image_shapes(stage.model_dump() | stage.shapes.model_dump())
        shape = (stage.num_visual, stage.visual_width)
        return Architecture(
            tokenizer, detokenizer, *shape, _stage_one_towers(run, stage), frozen=stage.frozen
        )
    if not isinstance(stage, s.LanguageStageSettings):
        raise UserError(f"stage.kind {stage.kind!r} cannot be planned; valid: {', '.join(s.STAGES)}")
    values, image_origin = image_values(stage)
    tokenizer, detokenizer = image_shapes(values)
    has_image_tokens = read_export(stage.language_model) is not None
    return Architecture(
        tokenizer,
        detokenizer,
        values["num_visual"],
        values["visual_width"],
        {"image_encoder": image_tower(stage.encoder)} if stage.encoder else {},
        lm=language_shape(
            configuration(stage.language_model), has_image_tokens=has_image_tokens, stage=stage
        ),
        lora_rank=stage.lora.rank if stage.trained == "lora" else None,
        lora_dropout=stage.lora.dropout,
        head=stage.head,
        frozen=stage.frozen,
        origins=(f"image parts: {image_origin}",),
    )


def _stage_one_towers(run: s.RunSettings, stage: s.TokenizerStageSettings) -> dict[str, Tower]:
    """What stage 1 computes online; a tower whose features are read from disk is held, but does not run."""
    towers = {"image_encoder": image_tower(stage.encoder)} if stage.encoder else {}
    towers |= conditioner_towers(stage.conditioner) if stage.conditioner else {}
    stored = {name.replace("_condition", "_conditioner") for name in run.data.features}
    stored |= {"image_encoder"} if "patches" in stored else set()
    return {name: replace(tower, flops=0) if name in stored else tower for name, tower in towers.items()}


def language_shape(
    config: Any, *, has_image_tokens: bool, stage: s.LanguageStageSettings | None = None
) -> LanguageShape:
    """From a transformers configuration; the vocabulary grows by [IMG], [/IMG] and padding.

    Raises UserError for a model that cannot be trained as the stage says.
    """
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from vlgpt.models.language_models import check_parts, from_configuration

    config = copy.deepcopy(config)
    if not has_image_tokens:
        config.vocab_size = -(-(config.vocab_size + 2) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    with torch.device("meta"):
        model = from_configuration(config, "sdpa_or_eager")
    if stage is not None:
        check_parts(model, name=stage.language_model, trained=stage.trained)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    weights = [m.weight for m in model.base_model.modules() if isinstance(m, (nn.Linear, Conv1D))]
    experts = [p for p in model.base_model.parameters() if p.ndim == 3]
    met = getattr(config, "num_experts_per_tok", None) or 1
    heads = config.num_attention_heads
    return LanguageShape(
        vocabulary=config.vocab_size,
        entered_width=table.embedding_dim,
        width=head.in_features,
        depth=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_width=getattr(config, "head_dim", None) or config.hidden_size // heads,
        linears=tuple((w.shape[1], w.shape[0]) for w in weights),
        num_expert_weights=sum(p.numel() // p.shape[0] * met for p in experts),
        num_table_parameters=sum(p.numel() for p in {*table.parameters(), *head.parameters()}),
        num_parameters=sum(p.numel() for p in model.parameters()),
        is_tied=head.weight is table.weight,
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


def image_values(stage: s.LanguageStageSettings) -> tuple[dict[str, Any], str]:
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
    paper = s.TokenizerStageSettings(kind="image_tokenizer")
    values = paper.model_dump() | paper.shapes.model_dump()
    return values, f"the paper's size ({stage.image_tokenizer} is not there yet)"
