"""One rule chooses the attention of all parts; a reference in the place of flash-attn checks its call contract."""

import logging
import re
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import torch
import torch.nn.functional as F
from transformers import modeling_flash_attention_utils as flash_utils

from tests.helpers.batches import pack, random_document
from tests.helpers.tiny_unified import new_document_tokenizer, new_model
from vlgpt.errors import UserError
from vlgpt.models import layers
from vlgpt.models.image_detokenizer import ImageDetokenizer
from vlgpt.models.image_tokenizer import ImageTokenizer
from vlgpt.models.language_models import build_language_model, implementations
from vlgpt.settings import LoraSettings
from vlgpt.stages.language import LanguageStage

SHAPE = {"num_visual": 4, "visual_width": 20, "width": 32, "depth": 2, "num_heads": 4}


def parts():
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(num_patches=6, patch_width=12, **SHAPE)
    return tokenizer, ImageDetokenizer(image_tokens=3, image_width=8, text_tokens=5, text_width=10, **SHAPE)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    """flash-attn's dense function in plain torch: (B, L, H, D); causal is aligned to the bottom right."""
    assert q.dim() == k.dim() == v.dim() == 4 and q.shape[2:] == k.shape[2:]
    assert not causal or q.shape[1] == k.shape[1]
    mixed = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal)
    return mixed.transpose(1, 2)


class Varlen:
    """flash-attn's padding-free function in plain torch: (T, H, D), one sequence between two bounds."""

    def __init__(self):
        self.bounds = []

    def __call__(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
        softcap=0.0, deterministic=False,
    ):  # fmt: skip
        assert causal and window_size == (-1, -1) and cu_seqlens_q.dtype == torch.int32
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and int(cu_seqlens_q[-1]) == q.shape[0] == k.shape[0]
        lengths = cu_seqlens_q.diff()
        assert isinstance(max_seqlen_q, int) and max_seqlen_q == max_seqlen_k == int(lengths.max())
        self.bounds.append(cu_seqlens_q.tolist())
        pieces = []
        for one in zip(*(x.split(lengths.tolist()) for x in (q, k, v))):
            query, key, value = (x.transpose(0, 1)[None] for x in one)
            mixed = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=softmax_scale, enable_gqa=True
            )
            pieces.append(mixed[0].transpose(0, 1))
        return torch.cat(pieces)


@pytest.fixture
def varlen(monkeypatch):
    """The package flash-attn with a reference inside: its names are stable, how transformers keeps them is not."""
    function = Varlen()
    package = types.SimpleNamespace(
        __spec__=ModuleSpec("flash_attn", None),
        __path__=[],
        flash_attn_func=flash_attn_func,
        flash_attn_varlen_func=function.__call__,
        flash_attn_with_kvcache=flash_attn_func,
    )
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    padding = types.SimpleNamespace(pad_input=None, unpad_input=None)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(flash_utils, "is_flash_attn_2_available", lambda *_, **__: True)
    monkeypatch.setattr(
        flash_utils, "_loaded_implementation", None
    )  # transformers looks for the package once
    return function


@pytest.mark.parametrize("mode", ["train", "eval", "checkpointing"])
@pytest.mark.parametrize("is_lora", [False, True])
def test_the_varlen_function_gets_exact_bounds_and_gives_what_sdpa_gives(varlen, mode, is_lora):
    tokenizer = new_document_tokenizer()
    model = new_model(tokenizer)
    if is_lora:
        lora = LoraSettings(rank=4, dropout=0.0)
        model.lm.add_lora(lora, [tokenizer.begin_image_id, tokenizer.end_image_id])
    stage = LanguageStage(model=model, num_sources=2).train(mode != "eval")
    rows = [[random_document(3 * row + n, num_images=(row + n) % 3) for n in range(3)] for row in range(3)]
    batch = pack(rows, tokenizer, length=128)
    segments = batch.segment_ids
    is_start = torch.ones_like(segments, dtype=torch.bool)
    is_start[:, 1:] = segments[:, 1:] != segments[:, :-1]
    wanted_bounds = [*is_start.flatten().nonzero().squeeze(1).tolist(), segments.numel()]
    if mode == "checkpointing":
        model.lm.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    results = {}
    for attention in ("sdpa", "flash_attention_2"):
        model.lm.backbone.config._attn_implementation = attention
        stage.zero_grad()
        terms = stage(batch)
        sum(term.total for term in terms.values()).backward()
        gradients = {name: p.grad.clone() for name, p in stage.named_parameters() if p.grad is not None}
        results[attention] = {name: term.total.item() for name, term in terms.items()}, gradients
    assert len(varlen.bounds) >= 2 and all(bounds == wanted_bounds for bounds in varlen.bounds)
    (losses, gradients), (flash_losses, flash_gradients) = results.values()
    assert flash_losses == pytest.approx(losses, rel=1e-5)
    scale = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(flash_gradients[name], gradient, atol=1e-5 * float(scale), rtol=1e-3)


@pytest.mark.parametrize("window", [None, 16])
def test_documents_one_by_one_give_what_a_mask_of_whole_rows_gives(window, monkeypatch):
    """Grouped heads; a sliding window shorter than the row keeps the mask."""
    from vlgpt.models import multimodal_lm
    from vlgpt.models.multimodal_lm import MultimodalLM

    calls = []
    right = multimodal_lm.attend_by_document
    monkeypatch.setattr(
        multimodal_lm, "attend_by_document", lambda *a, **o: (calls.append(a[3]), right(*a, **o))[1]
    )
    tokenizer = new_document_tokenizer()
    config = {
        "model_type": "mistral", "vocab_size": tokenizer.vocabulary_size, "hidden_size": 48, "head_dim": 16,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "sliding_window": window,
    }  # fmt: skip
    torch.manual_seed(0)
    lm = MultimodalLM(
        build_language_model(config, "sdpa"), num_tokens=tokenizer.num_tokens, num_visual=4, visual_width=48
    ).eval()
    rows = [[random_document(3 * row + n, num_images=1) for n in range(3)] for row in range(3)]
    batch = pack(rows, tokenizer, length=96)
    visual = torch.randn(len(batch.images), 4, 48)
    found = {}
    for attention in ("sdpa", "eager"):
        lm.backbone.config._attn_implementation = attention
        found[attention] = lm.hidden_states(batch, visual)
    is_real = batch.segment_ids > 0
    torch.testing.assert_close(found["sdpa"][is_real], found["eager"][is_real], atol=1e-5, rtol=1e-5)
    assert len(calls) == (2 if window is None else 0), "once per layer"
    assert all(sum(row) == 96 and len(row) == 4 for lengths in calls for row in lengths)


def test_image_parts_through_flash_equal_sdpa(monkeypatch):
    calls = []

    def counted(*args, **options):
        calls.append(options["causal"])
        return flash_attn_func(*args, **options)

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_func=counted))
    monkeypatch.setattr(layers, "flash_fault", lambda: "")
    tokenizer, detokenizer = parts()
    patches = torch.randn(2, 6, 12)
    results = []
    for backend in ("eager", "flash_attention_2"):
        for part in (tokenizer, detokenizer):
            layers.set_backend(part, backend)
        visual = tokenizer(patches)
        results.append((visual, *detokenizer(visual)))
    for found, wanted in zip(results[1], results[0]):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert calls == [True, False] * 4, "self-attention is causal, cross-attention is not"


def test_auto_is_sdpa_without_a_gpu_for_the_language_model_and_the_image_parts_alike():
    if layers.has_flash():
        pytest.skip("this machine has flash-attn")
    language_model = build_language_model({"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1})
    assert language_model.config._attn_implementation == "sdpa"
    tokenizer, _ = parts()
    assert {m.backend for m in tokenizer.modules() if isinstance(m, layers.Attention)} == {"auto"}
    patches = torch.randn(2, 6, 12)
    found = tokenizer(patches)
    layers.set_backend(tokenizer, "sdpa")
    assert torch.equal(found, tokenizer(patches))


PACKAGES = {
    "missing": (None, (8, 0), "not installed"),
    "on Turing": ("flash_attn_func = print", (7, 5), "compute capability 8.0 .* has 7.5"),
    "built for another torch": (
        "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c105Error')", (8, 0), "undefined symbol"
    ),
    "without its library": ("raise OSError('libcudart.so.12: cannot open')", (9, 0), "OSError: libcudart"),
    "of version 1": ("flash_attn_unpadded_func = print", (8, 6), "cannot import name 'flash_attn_func'"),
    "whole": ("flash_attn_func = print", (8, 0), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", PACKAGES)
def test_a_flash_attn_that_cannot_run_gives_way_to_sdpa_with_its_reason_in_one_line(
    name, tmp_path, monkeypatch, caplog
):
    source, capability, reason = PACKAGES[name]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    if source is not None:
        (tmp_path / "flash_attn").mkdir()
        (tmp_path / "flash_attn" / "__init__.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
    else:
        monkeypatch.setattr(layers, "find_spec", lambda package: None)
    for cached in (layers.flash_fault, layers.has_flash):
        cached.cache_clear()
        monkeypatch.setattr(layers, cached.__name__, cached)
    lines: list[
        str
    ] = []  # caplog sees a line once or twice, as other tests have configured the logger or not
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("vlgpt").addHandler(handler)
    try:
        with caplog.at_level("INFO", logger="vlgpt"):
            chosen = [implementations("auto")[0] for _ in range(2)]
            query = torch.randn(1, 2, 3, 4)
            assert layers.attend(query, query, query, is_causal=True, backend="auto").shape == query.shape
        (line,) = [line for line in lines if "attention: " in line]
        assert "\n" not in line and re.search(reason, line)
        assert set(chosen) == {"sdpa" if reason else "flash_attention_2"}
        if reason:  # asked for by name, it is an error of one line
            with pytest.raises(UserError, match=reason):
                implementations("flash_attention_2")
            with pytest.raises(UserError, match=reason):
                layers.set_backend(parts()[0], "flash_attention_2")
    finally:
        logging.getLogger("vlgpt").removeHandler(handler)
        layers.flash_fault.cache_clear()
        layers.has_flash.cache_clear()
        sys.modules.pop("flash_attn", None)  # imported here: another test would find it installed


def test_frequencies_statistics_and_scales_stay_fp32_when_weights_are_cast():
    """DeepSpeed casts whole modules; rotary frequencies in bf16 would turn positions by up to a radian at 500."""
    tokenizer = new_document_tokenizer()
    stage = LanguageStage(model=new_model(tokenizer), num_sources=2)
    before = {name: buffer.clone() for name, buffer in stage.model.named_buffers()}
    stage.bfloat16()
    assert all(parameter.dtype == torch.bfloat16 for parameter in stage.parameters())
    kept = dict(stage.model.named_buffers())
    assert any("inv_freq" in name for name in kept) and any("standardiser.mean" in name for name in kept)
    for name, buffer in kept.items():
        assert buffer.dtype == torch.float32 and torch.equal(buffer, before[name]), name
    batch = pack([[random_document(1, num_images=2)]], tokenizer)
    visual = stage.visual_of(batch.images.__class__("patches", batch.images.values.bfloat16()))
    assert visual.dtype == torch.bfloat16
    assert stage.model.lm.hidden_states(batch, visual).dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [False, True])
def test_token_rows_train_as_with_pefts_own_layer(tied):
    tokenizer = new_document_tokenizer()
    model = new_model(tokenizer, tied=tied)
    model.lm.add_lora(LoraSettings(rank=4, dropout=0.0), [tokenizer.begin_image_id, tokenizer.end_image_id])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "trainable_tokens" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    stage = LanguageStage(model=model, num_sources=2)
    batch = pack([[random_document(n, num_images=2) for n in (r, r + 3)] for r in range(2)], tokenizer)

    def losses_and_gradients():
        stage.zero_grad()
        terms = stage(batch)
        sum(term.total for term in terms.values()).backward()
        gradients = {name: p.grad.clone() for name, p in stage.named_parameters() if p.grad is not None}
        return {name: term.total.item() for name, term in terms.items()}, gradients

    losses, gradients = losses_and_gradients()
    for layer in model.lm.language_model.modules():
        layer.__dict__.pop("forward_adapters", None)
    pefts_losses, pefts_gradients = losses_and_gradients()
    assert losses == pytest.approx(pefts_losses, rel=1e-6) and gradients.keys() == pefts_gradients.keys()
    rows = [name for name in gradients if "trainable_tokens" in name]
    assert len(rows) == (1 if tied else 2) and all(gradients[name].abs().sum() > 0 for name in rows)
    for name, gradient in pefts_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-4, rtol=1e-4)


def test_flash_attention_gives_way_where_it_cannot_run():
    lm = new_model(new_document_tokenizer()).lm
    for device, dtype, wanted in (
        ("cuda", torch.bfloat16, "flash_attention_2"),
        ("cuda", torch.float32, "sdpa"),
        ("cpu", torch.bfloat16, "sdpa"),
    ):
        lm.backbone.config._attn_implementation = "flash_attention_2"
        lm.settle_attention(torch.device(device), dtype)
        assert lm.backbone.config._attn_implementation == wanted
