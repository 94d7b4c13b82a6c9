"""What every causal language model of transformers must keep: its own logits, its own scale, one document at a time."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers.batches import pack, random_document
from tests.helpers.tiny_unified import new_document_tokenizer, new_model
from vlgpt.errors import UserError
from vlgpt.models.language_models import (
    LogitRule,
    build_language_model,
    check_logits,
    load_language_model,
    resize_vocabulary,
)
from vlgpt.models.multimodal_lm import MultimodalLM
from vlgpt.settings import LoraSettings
from vlgpt.stages.language import LanguageStage

TOKENIZER = new_document_tokenizer()
TINY = {
    "vocab_size": TOKENIZER.num_tokens - 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "initializer_range": 0.3,
}
SCALED = {
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "cohere": {"logit_scale": 0.25},
    "gemma2": {"final_logit_softcapping": 3.0},
    "gemma3_text": {"final_logit_softcapping": 2.0},
}


def language_model(kind, *, attention="auto", **more):
    torch.manual_seed(0)
    return build_language_model({"model_type": kind, **TINY, **more}, attention).eval()


def multimodal(kind, **more):
    model = language_model(kind, **more)
    resize_vocabulary(model, TOKENIZER)
    return MultimodalLM(model, num_tokens=TOKENIZER.num_tokens, num_visual=4, visual_width=48).eval()


@pytest.mark.parametrize("kind", [*SCALED, "llama", "gpt2", "phi", "opt"])
def test_logits_are_those_of_the_models_own_forward(kind):
    """Granite divides by a scale, Cohere multiplies, Gemma 2 caps: the head alone would be another distribution."""
    lm = multimodal(kind, **SCALED.get(kind, {}))
    ids = torch.arange(12)[None]
    own = lm.language_model(ids).logits[..., : TOKENIZER.num_tokens]
    found = lm.logits(lm.backbone(ids).last_hidden_state)[..., : TOKENIZER.num_tokens]
    torch.testing.assert_close(found, own, atol=1e-5, rtol=1e-5)
    assert (LogitRule.of(lm.language_model.config) != LogitRule()) == (kind in SCALED)


def test_rows_that_pad_the_vocabulary_have_no_probability():
    """The rows that round a vocabulary up belong to no token; every other row is one that may be drawn."""
    lm = multimodal("llama")
    logits = lm.logits(lm.backbone(torch.arange(12)[None]).last_hidden_state)
    padding = logits[..., TOKENIZER.num_tokens :]
    assert padding.shape[-1] > 0
    assert (padding == torch.finfo(logits.dtype).min).all()
    assert (logits[..., : TOKENIZER.num_tokens] > torch.finfo(logits.dtype).min).all()


@pytest.mark.parametrize("kind", SCALED)
def test_a_head_that_does_what_nobody_knows_is_refused(kind, monkeypatch):
    """The rule is compared with the model's own forward when it is loaded."""
    model = language_model(kind, **SCALED[kind])
    check_logits(model, name="known")
    monkeypatch.setattr(LogitRule, "of", staticmethod(lambda config: LogitRule()))
    with pytest.raises(UserError, match="does more to its logits"):
        check_logits(model, name="unknown")


@pytest.mark.parametrize("kind", ["llama", "gemma", "gemma2", "gemma3_text", "granite"])
def test_images_and_words_enter_at_one_scale(kind):
    """Gemma multiplies what it looks up by the root of its width: visual inputs must not stay behind."""
    lm = multimodal(kind, **SCALED.get(kind, {}))
    words = lm.embed(torch.arange(100)[None], torch.zeros(1, 100, dtype=torch.bool), None)
    images = lm.embed_visual(torch.randn(200, 4, 48))
    ratio = float(images.square().mean() / words.square().mean()) ** 0.5
    assert 0.8 < ratio < 1.25


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "qwen3_moe", "opt"])
def test_packed_documents_do_not_see_each_other(kind):
    multimodal(kind, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16).check_isolation()


def test_a_transformer_that_leaks_between_documents_is_refused():
    """An encoder sees what comes later; a state-space model carries its state from document to document."""
    models = [
        language_model("bert", attention="eager", is_decoder=False, head_dim=None),
        language_model("mamba", state_size=4, head_dim=None),
    ]
    for model in models:
        lm = MultimodalLM(model, num_tokens=TINY["vocab_size"], num_visual=4, visual_width=32).eval()
        with pytest.raises(UserError, match="packed documents, or later words, be seen"):
            lm.check_isolation()


def test_classes_without_sdpa_run_eager_with_one_line(caplog):
    with caplog.at_level("INFO", "vlgpt"):
        assert language_model("gemma2").config._attn_implementation == "eager"
    lines = [record.getMessage() for record in caplog.records if "attention" in record.getMessage()]
    assert [line for line in lines if "eager" in line] == lines[-1:], lines
    with pytest.raises(UserError, match="gemma2"):
        build_language_model({"model_type": "gemma2", **TINY}, "sdpa")


@pytest.mark.parametrize(
    ("kind", "more", "words"),
    [
        ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 16}, "experts"),
        ("mamba", {"max_position_embeddings": None}, "max_position_embeddings"),
        ("gemma3", {}, "several models"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_weights_are_read(kind, more, words, tmp_path):
    """The folder holds a configuration and no weights: whoever looked for them would say so."""
    values = {"text_config": {}, "vision_config": {}} if kind == "gemma3" else {**TINY, **more}
    AutoConfig.for_model(kind, **values).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        load_language_model(tmp_path, trained="lora")
    assert "\n" not in str(caught.value)


def test_a_model_of_bin_files_is_loaded_and_nothing_in_them_is_run(tmp_path):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY))
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    found = load_language_model(tmp_path)
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in model.state_dict().items())

    class Payload:
        def __reduce__(self):
            return (tmp_path.joinpath("executed").touch, ())

    torch.save({**model.state_dict(), "x": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="no language model could be loaded"):
        load_language_model(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_rows_of_new_tokens_stay_out_of_the_fingerprint():
    """They are made by the run, in its precision: an export in another one must still know its base."""
    hashes = []
    for dtype in (torch.float32, torch.bfloat16):
        model = language_model("llama").half().to(dtype)  # a file in fp16, as LLaMA-7B's
        resize_vocabulary(model, TOKENIZER)
        unified = new_model(TOKENIZER)
        unified.lm = MultimodalLM(model, num_tokens=TOKENIZER.num_tokens, num_visual=4, visual_width=48)
        unified.lm.add_lora(LoraSettings(rank=2), [TOKENIZER.begin_image_id, TOKENIZER.end_image_id])
        hashes.append(LanguageStage(model=unified).frozen_hashes()["language_model"])
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("kind", ["gemma3_text", "phi", "gpt2"])
def test_token_rows_count_as_after_a_merge(kind):
    """Gemma scales what its embedding layer looks up, phi's head has biases: the trained rows get both."""
    lm = multimodal(kind)
    lm.add_lora(LoraSettings(rank=2, dropout=0.0), [TOKENIZER.begin_image_id, TOKENIZER.end_image_id])
    lm.eval()
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "trainable_tokens" in name or "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if name.endswith("lm_head.token_adapter.base_layer.bias"):
                parameter.normal_()
    batch = pack([[random_document(3, num_images=2)]], TOKENIZER)
    visual = torch.randn(2, 4, 48)
    before = lm.logits(lm.hidden_states(batch, visual))
    lm.language_model = lm.language_model.merge_and_unload()
    torch.testing.assert_close(lm.logits(lm.hidden_states(batch, visual)), before, atol=1e-4, rtol=1e-4)
