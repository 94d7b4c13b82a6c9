"""Laws of the language stage: causality, one shift, packing, counts, frozen parts."""

import dataclasses

import pytest
import torch

from tests.helpers.batches import pack, random_document
from tests.helpers.runs import run_settings
from tests.helpers.tiny_unified import new_document_tokenizer, new_model
from vlgpt.batch import ImageInput
from vlgpt.models.losses import targets_of
from vlgpt.settings import LanguageStageSettings, LoraSettings
from vlgpt.stages.base import parameter_groups
from vlgpt.stages.language import LanguageStage


class CappedSettings(LanguageStageSettings):
    cap: float = 1.0


class CappedStage(LanguageStage):
    """What a lab may write: one more setting, everything else as it is."""

    settings_class = CappedSettings

    def __init__(self, *, cap, **options):
        super().__init__(**options)
        self.cap = cap

    @classmethod
    def options(cls, settings):
        return {**super().options(settings), "cap": settings.cap}


def test_a_stage_of_another_package_may_extend_this_one(tokenizer):
    stage = {"kind": f"{__name__}:CappedStage", "language_model": "none", "cap": 3.0, "text_weight": 0.5}
    run = run_settings(stage=stage)
    image_tokens = [tokenizer.begin_image_id, tokenizer.end_image_id]
    built = CappedStage.assemble(new_model(tokenizer), run.stage, image_tokens=image_tokens, num_sources=1)
    assert (type(built), built.cap, built.text_weight) == (CappedStage, 3.0, 0.5)
    assert built.model.lm.has_lora


@pytest.fixture
def tokenizer():
    return new_document_tokenizer()


@pytest.fixture
def stage(tokenizer):
    return LanguageStage(model=new_model(tokenizer), num_sources=2)


def hidden_of(stage, batch):
    stage.eval()
    with torch.no_grad():
        return stage.model.lm.hidden_states(batch, stage.visual_of(batch.images))


def test_a_token_changes_no_hidden_state_before_it(stage, tokenizer):
    batch = pack([[random_document(1, num_images=2)]], tokenizer)
    before = hidden_of(stage, batch)
    position = int((batch.segment_ids[0] == 1).sum()) - 3
    ids = batch.token_ids.clone()
    ids[0, position] = (ids[0, position] + 7) % 300
    after = hidden_of(stage, dataclasses.replace(batch, token_ids=ids))
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.allclose(before[:, position], after[:, position])


def test_a_visual_prediction_never_sees_its_own_embedding(stage, tokenizer):
    batch = pack([[random_document(2, num_images=1)]], tokenizer)
    visual = stage.visual_of(batch.images)
    targets = targets_of(batch)
    lm = stage.model.lm.eval()
    with torch.no_grad():
        _, before = lm.predict(lm.hidden_states(batch, visual), targets)
        for slot in range(tokenizer.num_visual):
            changed = visual.clone()
            changed[0, slot] += 5.0
            _, after = lm.predict(lm.hidden_states(batch, changed), targets)
            assert torch.equal(before[: slot + 1], after[: slot + 1])
            if slot + 1 < tokenizer.num_visual:
                assert not torch.allclose(before[slot + 1], after[slot + 1])


def test_there_is_exactly_one_shift(tokenizer):
    batch = pack([[random_document(3, num_images=1), random_document(4, num_images=0)]], tokenizer)
    targets = targets_of(batch)
    flat_ids = batch.token_ids.flatten()
    assert torch.equal(flat_ids[targets.text_from + 1], targets.text_ids)
    begin = (flat_ids == tokenizer.begin_image_id).nonzero()[0, 0]
    assert targets.visual_from[0] == begin, "slot 1 is predicted from [IMG]"
    assert targets.visual_rows.tolist() == list(range(tokenizer.num_visual))
    same_segment = batch.segment_ids.flatten()
    for places in (targets.text_from, targets.visual_from):
        assert torch.equal(same_segment[places], same_segment[places + 1]), "a prediction crosses segments"


def test_counts_are_those_of_the_masks_and_sums_add_up_over_sources(stage, tokenizer):
    batch = pack(
        [[random_document(8, num_images=2), random_document(9, num_images=1)]], tokenizer, length=128
    )
    counts, terms = stage.count_targets(batch), stage(batch)
    assert counts["visual"] == 3 * tokenizer.num_visual
    for name, term in terms.items():
        assert term.by_source[1].sum() == counts[name]
        assert term.by_source[0].sum().item() == pytest.approx(term.total.item(), rel=1e-5)


@pytest.mark.parametrize("trained", ["all", "lora"])
@pytest.mark.parametrize("visual_width", [48, 64])
def test_every_trained_parameter_gets_a_gradient_whatever_the_batch_holds(tokenizer, trained, visual_width):
    """Else ranks with other batches would wait for each other."""
    model = new_model(tokenizer, visual_width=visual_width)  # 64 is the width of the LM: no projection
    if trained == "lora":
        model.lm.add_lora(LoraSettings(rank=4), [tokenizer.begin_image_id, tokenizer.end_image_id])
    stage = LanguageStage(model=model, num_sources=2).train()
    both = pack([[random_document(1, num_images=2)]], tokenizer)
    words = pack([[random_document(2, num_images=0)]], tokenizer)
    nothing = torch.zeros_like(both.is_target)
    batches = [both, words, dataclasses.replace(words, is_target=torch.zeros_like(words.is_target))]
    batches += [dataclasses.replace(both, is_target=t) for t in (nothing, both.is_visual, ~both.is_visual)]
    wanted = {name for name, parameter in stage.named_parameters() if parameter.requires_grad}
    for batch in batches:
        stage.zero_grad()
        terms = stage(batch)
        sum(term.total for term in terms.values()).backward()
        assert {name for name, p in stage.named_parameters() if p.grad is not None} == wanted


def test_visual_inputs_need_no_patches_when_embeddings_are_given(stage, tokenizer):
    batch = pack([[random_document(11, num_images=1)]], tokenizer)
    visual = ImageInput("visual", stage.visual_of(batch.images))
    stage.eval()
    given, computed = stage(dataclasses.replace(batch, images=visual)), stage(batch)
    assert given["visual"].total.item() == pytest.approx(computed["visual"].total.item())


@pytest.mark.parametrize("tied", [False, True])
def test_lora_trains_the_adapter_the_head_and_two_token_rows_only(tokenizer, tied):
    """The rows of [IMG] and [/IMG] in both tables: without those of the LM head [IMG] could never be predicted."""
    model = new_model(tokenizer, tied=tied)
    rows = [tokenizer.begin_image_id, tokenizer.end_image_id]
    model.lm.add_lora(LoraSettings(rank=4, alpha=4, dropout=0.0), rows)
    stage = LanguageStage(model=model, num_sources=2)
    trained = [name for name, _ in stage.trainable()]
    assert any("lora_A" in name for name in trained) and any("trainable_tokens" in name for name in trained)
    assert all(
        any(k in n for k in ("lora_", "trainable_tokens", "regression_head", "projection")) for n in trained
    )
    frozen = {n: p.clone() for n, p in stage.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD(parameter_groups(stage, 0.0), lr=0.1)
    embedding_before = model.lm.embed(
        torch.arange(tokenizer.num_tokens)[None], torch.zeros(1, 1, dtype=torch.bool), None
    )
    hidden = torch.randn(1, model.lm.backbone.config.hidden_size)
    logits_before = model.lm.lm_head(hidden)
    for n in range(3):
        terms = stage(pack([[random_document(n, num_images=1)]], tokenizer))
        sum(term.total for term in terms.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in stage.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), f"{name} is frozen but changed"
    embedding = model.lm.embed(
        torch.arange(tokenizer.num_tokens)[None], torch.zeros(1, 1, dtype=torch.bool), None
    )
    changed = (embedding != embedding_before).any(-1)[0].nonzero().squeeze(1).tolist()
    assert set(changed) <= set(rows) and changed
    changed = (model.lm.lm_head(hidden) != logits_before)[0].nonzero().squeeze(1).tolist()
    assert sorted(changed) == sorted(rows)


def test_an_adapter_remembers_the_language_model_under_it(tokenizer):
    lora = LoraSettings(rank=4, dropout=0.0)

    def hashes(seed, dtype=torch.float32):
        model = new_model(tokenizer, seed=seed)
        model.lm.add_lora(lora, [tokenizer.begin_image_id, tokenizer.end_image_id])
        model.lm.backbone.to(dtype)
        return LanguageStage(model=model, num_sources=2).frozen_hashes()["language_model"]

    assert hashes(0) == hashes(0) != hashes(1)
    assert hashes(0) == hashes(0, torch.bfloat16)
    whole = LanguageStage(model=new_model(tokenizer), num_sources=2)
    assert "language_model" not in whole.frozen_hashes()
