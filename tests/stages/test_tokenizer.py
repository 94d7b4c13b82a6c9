"""Laws of stage 1: causal embeddings, both losses, image-only data, statistics."""

import dataclasses

import pytest
import torch

from vlgpt.batch import ConditionBatch
from vlgpt.models.image_detokenizer import ImageDetokenizer
from vlgpt.models.image_tokenizer import ImageTokenizer
from vlgpt.models.standardise import ConditionStandardiser, Standardiser, accumulate
from vlgpt.stages.tokenizer import ImageTokenizerStage

SHAPE = {"width": 32, "depth": 2, "num_heads": 4}


def new_stage(**options):
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(
        num_patches=6, patch_width=12, num_visual=4, visual_width=20, init_std=1.0, **SHAPE
    )
    detokenizer = ImageDetokenizer(
        num_visual=4, visual_width=20, image_tokens=3, image_width=8, text_tokens=5, text_width=10, **SHAPE
    )
    return ImageTokenizerStage(tokenizer=tokenizer, detokenizer=detokenizer, num_sources=2, **options)


def new_batch(size=6, *, has_text=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return ConditionBatch(
        documents=tuple(f"d{i}" for i in range(size)),
        source_ids=torch.arange(size, dtype=torch.int16) % 2,
        is_valid=torch.ones(size, dtype=torch.bool),
        has_text=torch.full((size,), has_text),
        patches=torch.randn(size, 6, 12, generator=generator),
        image_condition=torch.randn(size, 3, 8, generator=generator) * 3 + 1,
        text_condition=torch.randn(size, 5, 10, generator=generator),
    )


def test_embedding_n_depends_on_queries_up_to_n_only():
    tokenizer = new_stage().tokenizer.eval()
    patches = new_batch().patches
    before = tokenizer(patches)
    shift = torch.randn(32)
    for slot in range(4):
        with torch.no_grad():
            tokenizer.transformer.queries[slot] += shift
            after = tokenizer(patches)
            tokenizer.transformer.queries[slot] -= shift
        assert torch.allclose(before[:, :slot], after[:, :slot], atol=1e-5)
        assert not torch.allclose(before[:, slot], after[:, slot], atol=1e-4)


def test_every_patch_can_reach_every_embedding():
    tokenizer = new_stage().tokenizer.eval()
    patches = new_batch(1).patches.requires_grad_()
    for slot in range(4):
        (gradient,) = torch.autograd.grad(tokenizer(patches)[0, slot].sum(), patches)
        assert (gradient.abs().sum(-1) > 0).all()


def test_loss_is_the_weighted_sum_of_the_two_mean_squared_errors():
    stage, batch = new_stage(image_weight=0.5, text_weight=2.0), new_batch()
    stage.prepare([batch], lambda x: x)
    terms = stage(batch)
    image, text = stage.detokenizer(stage.tokenizer(batch.patches))
    expected = (image - stage.detokenizer.image_targets(batch.image_condition)).square().mean((1, 2)).sum()
    assert terms["image"].total.item() == pytest.approx(expected.item(), rel=1e-5)
    expected = (text - stage.detokenizer.text_targets(batch.text_condition)).square().mean((1, 2)).sum()
    assert terms["text"].total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (terms["image"].weight, terms["text"].weight) == (0.5, 2.0)


def test_images_without_text_and_masked_slots_count_for_nothing_they_lack():
    stage = new_stage()
    batch = new_batch(has_text=False)
    assert stage.count_targets(batch) == {"image": 6.0, "text": 0.0}
    terms = stage(batch)
    assert terms["text"].total.item() == 0.0
    terms["text"].total.backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in stage.detokenizer.text_output.parameters())
    broken = batch.__class__(**{**vars(batch), "is_valid": torch.tensor([True] * 5 + [False])})
    assert stage.count_targets(broken)["image"] == 5.0
    assert stage(broken)["image"].total < stage(batch)["image"].total


@pytest.mark.parametrize("image_weight, text_weight", [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0)])
def test_every_parameter_gets_a_gradient_whatever_the_batch_holds(image_weight, text_weight):
    stage = new_stage(image_weight=image_weight, text_weight=text_weight)
    empty = dataclasses.replace(new_batch(), is_valid=torch.zeros(6, dtype=torch.bool))
    for batch in (new_batch(), new_batch(has_text=False), empty):
        stage.zero_grad()
        sum(term.weight * term.total for term in stage(batch).values()).backward()
        assert all(parameter.grad is not None for parameter in stage.parameters())


def test_statistics_standardise_and_invert_and_add_up_over_batches():
    first, second = torch.randn(50, 4, 6) * 3 + 2, torch.randn(30, 4, 6) * 3 + 2
    standardiser = Standardiser(4, 6)
    standardiser.set_statistics(accumulate(first) + accumulate(second))
    values = torch.cat([first, second])
    scaled = standardiser(values)
    assert scaled.mean(0).abs().max() < 1e-4 and (scaled.std(0, unbiased=False) - 1).abs().max() < 1e-3
    assert torch.allclose(standardiser.inverse(scaled), values, atol=1e-4)


def test_constant_dimensions_do_not_blow_up():
    standardiser = Standardiser(1, 3)
    values = torch.randn(40, 1, 3)
    values[:, :, 1] = 7.0
    standardiser.set_statistics(accumulate(values))
    assert torch.isfinite(standardiser(values)).all()
    assert standardiser(values)[:, :, 1].abs().max() < 1e-2


@pytest.mark.parametrize("has_mean_token", [False, True])
def test_condition_targets_invert_to_the_condition(has_mean_token):
    targets = ConditionStandardiser(5, 4, has_mean_token=has_mean_token)
    values = torch.randn(20, 5, 4) * 2 + 1
    targets.set_statistics(accumulate(targets.split(values)))
    assert torch.allclose(targets.inverse(targets(values)), values, atol=1e-4)


def test_the_mean_token_alone_decides_the_mean_of_a_condition():
    """Predicted residuals have a mean of their own, unlike true ones: it is an error and must not be added."""
    targets = ConditionStandardiser(5, 4, has_mean_token=True)
    values = torch.randn(20, 5, 4) * 2 + 1
    targets.set_statistics(accumulate(targets.split(values)))
    predicted = targets(values)
    predicted[:, 1:] += 3.0
    found = targets.inverse(predicted)
    assert torch.allclose(found.mean(1), values.mean(1), atol=1e-4)


def test_trained_parts_reload_bit_for_bit(tmp_path):
    stage, batch = new_stage(), new_batch()
    stage.prepare([batch], lambda x: x)
    stage.finish([batch], lambda x: x)
    stage.save(tmp_path)
    tokenizer = ImageTokenizer.from_folder(tmp_path / "image_tokenizer")
    detokenizer = ImageDetokenizer.from_folder(tmp_path / "image_detokenizer")
    encoded = stage.tokenizer.encode(batch.patches)
    assert torch.equal(tokenizer.encode(batch.patches), encoded)
    assert encoded.mean(0).abs().max() < 1e-3, "embeddings are standardised by their own statistics"
    assert torch.equal(detokenizer.decode(encoded)[0], stage.detokenizer.decode(encoded)[0])


@pytest.mark.parametrize("frozen", ["tokenizer", "detokenizer"])
def test_a_frozen_part_keeps_the_statistics_that_it_was_trained_with(frozen):
    stage = new_stage()
    getattr(stage, frozen).requires_grad_(False)
    before = {name: value.clone() for name, value in stage.state_dict().items()}
    stage.prepare([new_batch()], lambda values: values)
    stage.finish([new_batch()], lambda values: values)
    changed = {
        name.split(".")[0] for name, value in stage.state_dict().items() if not value.equal(before[name])
    }
    assert changed == {"tokenizer", "detokenizer"} - {frozen}


def test_frozen_towers_stay_in_eval_mode_while_the_stage_trains():
    """Their dropout, if any, must not run: cached features of the same tower would differ."""
    stage = new_stage(encoder=torch.nn.Dropout(0.5), conditioner=torch.nn.Dropout(0.5)).train()
    assert stage.tokenizer.training and not stage.encoder.training and not stage.conditioner.training
