"""Any causal language model of transformers: what can be trained is loaded, what cannot is refused with the reason.

Parts are found by transformers' own accessors (`get_input_embeddings`, `get_output_embeddings`, `base_model`), never by
attribute names. What a class does between its head and its logits is a `LogitRule`, checked against its own forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vlgpt.errors import UserError
from vlgpt.log import get_logger
from vlgpt.models.layers import has_flash, require_backend
from vlgpt.models.weights import load_whole
from vlgpt.tokens import NUM_IMAGE_TOKENS, DocumentTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Attention = Literal["auto", "flash_attention_2", "sdpa", "eager", "sdpa_or_eager"]
Trained = Literal["lora", "all"]
LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError)


@dataclass(frozen=True)
class LogitRule:
    """What a model does to the output of its head: `cap * tanh(x * scale / cap)`, both parts optional.

    Granite and Cohere scale, Gemma 2 caps. A head alone would train another distribution than the one that the model
    was pre-trained with.
    """

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig) -> LogitRule:
        """The rule of a transformers configuration."""
        scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        return cls(scale, getattr(config, "final_logit_softcapping", None))

    def __call__(self, logits: Tensor) -> Tensor:
        """(..., vocabulary) -> (..., vocabulary)."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def build_language_model(text_config: Mapping[str, Any], attention: Attention = "auto") -> PreTrainedModel:
    """A causal LM without its weights, from its configuration as a dictionary with `model_type`."""
    from transformers import AutoConfig

    values = dict(text_config)
    return from_configuration(AutoConfig.for_model(values.pop("model_type"), **values), attention)


def from_configuration(config: PreTrainedConfig, attention: str) -> PreTrainedModel:
    """A causal LM without its weights, on the default device.

    Args:
        config: a transformers configuration.
        attention: see `implementations`; the first that the class supports is taken. Or any other implementation that
            transformers knows by name.
    Raises UserError when transformers has no causal LM of this kind, or when it lacks the attention that was asked for.
    """
    from transformers import AutoModelForCausalLM

    # A training step reuses no keys, and with a cache transformers would not look at the positions of packed rows.
    config.use_cache = False
    reasons = []
    for implementation in implementations(attention):
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, attn_implementation=implementation
            )
        except LOADING_ERRORS as error:
            reasons.append(f"{implementation}: {str(error).splitlines()[0]}")
            continue
        if reasons:
            get_logger().info("attention: %s (%s)", implementation, reasons[-1])
        return model
    raise UserError(f"no causal language model of type {config.model_type!r}: {'; '.join(reasons)}")


def implementations(attention: str) -> list[str]:
    """What transformers calls the attention that was asked for, the fastest first. Raises UserError.

    `auto` is flash-attn where it can run, else SDPA, else eager; `sdpa_or_eager` is the same without flash-attn.
    """
    require_backend(attention)
    if attention not in ("auto", "sdpa_or_eager"):
        return [attention]
    return [*(["flash_attention_2"] if attention == "auto" and has_flash() else []), "sdpa", "eager"]


def leave_flash(backbone: PreTrainedModel) -> str:
    """Switch from flash-attn to SDPA, or to eager where the class has no SDPA; returns which."""
    for implementation in ("sdpa", "eager"):
        try:
            backbone.set_attn_implementation(implementation)
        except ValueError:
            continue
        return implementation
    raise AssertionError("every class of transformers has eager attention")


def load_language_model(
    path: str | Path,
    *,
    attention: Attention = "auto",
    dtype: torch.dtype = torch.float32,
    trained: Trained | None = None,
) -> PreTrainedModel:
    """Any transformers causal LM from a folder or hub name, shard by shard.

    Where `dtype` is that of the file, its weights stay mapped: processes of one machine share them. Raises UserError
    when the model cannot be loaded, lacks weights, or cannot be trained as `trained` says.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(path))
    except LOADING_ERRORS as error:
        raise UserError(_not_loaded(path, error)) from error
    # Built without weights first: what cannot be trained is refused before tens of gigabytes are read.
    with torch.device("meta"):
        skeleton = from_configuration(config, attention)
    check_parts(skeleton, name=str(path), trained=trained)
    try:
        model: PreTrainedModel = load_whole(
            AutoModelForCausalLM,
            str(path),
            dtype=dtype,
            attn_implementation=skeleton.config._attn_implementation,
            # nothing is ignored: only then does transformers list such tensors, and `load_whole` refuses them
            ignore_mismatched_sizes=True,
        )
    except LOADING_ERRORS as error:
        raise UserError(_not_loaded(path, error)) from error
    model.config.use_cache = False
    check_logits(model, name=str(path))
    return model


def _not_loaded(path: str | Path, error: Exception) -> str:
    return f"no language model could be loaded from {str(path)!r}: {str(error).splitlines()[0]}"


def check_parts(model: PreTrainedModel, *, name: str, trained: Trained | None = None) -> None:
    """Check what the rest of the project relies on; needs no weights. Raises UserError with the reason."""
    kind = type(model).__name__
    if model.config.get_text_config() is not model.config:
        raise UserError(f"{name} is a {kind} of several models: give the folder of its language model alone")
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not isinstance(model.get_input_embeddings(), nn.Embedding):
        raise UserError(f"{name} is a {kind}, whose token table or head is of a kind unknown here")
    if model.base_model is model:
        raise UserError(f"{name} is a {kind}, whose transformer cannot be run without its head")
    if not getattr(model.config, "max_position_embeddings", None):
        raise UserError(f"{name} is a {kind} without max_position_embeddings: it states no longest input")
    blocks = [n for n, p in model.base_model.named_parameters() if p.ndim > 2]
    if trained == "lora" and blocks:
        raise UserError(
            f"{name} is a {kind}: LoRA adapts linear layers, its experts ({blocks[0]}, {len(blocks)} in all) are none "
            "and would stay untrained: set stage.trained=all, or choose a dense model"
        )


class _FixedStates(nn.Module):
    """Replaces a transformer, or its decoder: returns given hidden states (B, L, D) for any input."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: object, **options: object) -> _States:
        return _States(self.hidden)

    def __getattr__(self, name: str) -> Any:
        # OPT's head calls `model.decoder`, not `model`.
        return self if name == "decoder" else super().__getattr__(name)


class _States(SimpleNamespace):
    """The output of a transformer: hidden states, and None for every other field (caches, attentions, routers)."""

    def __init__(self, hidden: Tensor):
        super().__init__(last_hidden_state=hidden)

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, place: int | slice) -> object:
        # Some classes take `outputs[0]` instead of the field.
        return (self.last_hidden_state,)[place]


@cache
def _cache_name(model: Callable[..., object]) -> str:
    return "cache" if "cache" in inspect.signature(model).parameters else "past_key_values"


def cache_argument(model: PreTrainedModel, kept: object) -> dict[str, Any]:
    """The KV cache as this model's `forward` names it: `past_key_values` ends with transformers 5.40."""
    return {_cache_name(type(model).forward): kept}


@torch.no_grad()
def check_logits(model: PreTrainedModel, *, name: str) -> None:
    """Compare head and `LogitRule` with the model's own forward. Raises UserError when they differ.

    A class may do more to its logits than the rule knows; then training would optimise another distribution than the
    one that generation by transformers draws from. Only the head runs: the transformer is replaced for the call.
    """
    head, (place, body) = model.get_output_embeddings(), _child(model, model.base_model)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 3, head.in_features, generator=generator).to(head.weight)
    model._modules[place] = _FixedStates(hidden)
    try:
        own = model(input_ids=torch.zeros(1, 3, dtype=torch.long), use_cache=False).logits.float()
    except (AttributeError, TypeError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"{name} is a {type(model).__name__}, whose head cannot be run without its transformer ({error})"
        ) from error
    finally:
        model._modules[place] = body
    found = LogitRule.of(model.config)(head(hidden)).float()
    # 2 %: a head in bf16, which keeps 8 bits, rounds by 0.4 %.
    if found.shape != own.shape or not torch.allclose(found, own, rtol=0.02, atol=0.02 * float(own.std())):
        raise UserError(
            f"{name} is a {type(model).__name__}, which does more to its logits than a scale and a soft cap: its head "
            "cannot be trained here"
        )


def _child(model: nn.Module, part: nn.Module) -> tuple[str, nn.Module]:
    """The name under which `part` hangs on `model`."""
    return next((name, child) for name, child in model.named_children() if child is part)


def embedding_scale(language_model: PreTrainedModel) -> Tensor:
    """RMS of the embeddings that words enter with: -> () fp32; 1 for a model without weights."""
    table: Any = language_model.get_input_embeddings()
    if table.weight.is_meta:
        return torch.ones(())
    with torch.no_grad():
        scale: Tensor = table.weight.detach().float().square().mean().sqrt()
        # Gemma scales inside its embedding layer: a few rows are looked up and compared with the table.
        rows = torch.arange(min(16, table.num_embeddings), device=table.weight.device)
        raw, entered = table.weight[rows].float(), table(rows).float()
        ratio: Tensor = entered.square().mean() / raw.square().mean().clamp_min(1e-20)
        return scale * ratio.sqrt()


def resize_vocabulary(language_model: PreTrainedModel, tokenizer: DocumentTokenizer) -> None:
    """Grow the embeddings to the padded vocabulary.

    Rows of new tokens start at the mean of the old ones (Hewitt 2021, "Initializing new word embeddings"): random rows
    of another scale would dominate the softmax at first. Raises UserError when the model has fewer rows than its
    tokenizer has base tokens.
    """
    model: Any = language_model
    num_rows = model.get_input_embeddings().weight.shape[0]
    num_old = tokenizer.num_tokens - NUM_IMAGE_TOKENS
    if num_rows < num_old:
        raise UserError(
            f"the language model has {num_rows} token rows, its tokenizer {num_old} tokens: they do not belong together"
        )
    if num_rows >= tokenizer.vocabulary_size:
        return
    model.resize_token_embeddings(tokenizer.vocabulary_size, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[num_rows:] = layer.weight[:num_rows].mean(0)
            if getattr(layer, "bias", None) is not None:
                layer.bias[num_rows:] = layer.bias[:num_rows].mean()
