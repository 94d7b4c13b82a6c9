"""Law of packing, end to end: what the loader packs trains exactly as if every document had a row of its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.small_data import feature_spec, write_dataset
from tests.helpers.tiny_unified import NUM_PATCHES, PATCH_WIDTH, new_document_tokenizer, new_model
from vlgpt.batch import Batch, ImageInput
from vlgpt.data.loader import Loader
from vlgpt.document import Document, ImagePart, Part, TextPart
from vlgpt.models.losses import cross_entropies, targets_of
from vlgpt.seeds import generator
from vlgpt.settings import DataSettings, SourceSettings
from vlgpt.shards import ShardSet, write_feature_rows, write_spec
from vlgpt.stages.language import LanguageStage

TOKENIZER = new_document_tokenizer()
TEXTS = [
    "the quick brown fox",
    "a red circle",
    "what is in the picture?",
    "two elephants beside a lazy dog",
    "yes",
]


def document(number: int) -> Document:
    """A pair, a page or a chat."""
    rng = generator("model", number)

    def text(role: str = "plain") -> TextPart:
        return TextPart(TEXTS[int(rng.integers(len(TEXTS)))], role)  # type: ignore[arg-type]

    kinds: list[tuple[Part, ...]] = [
        (ImagePart(0), text()),
        (text(), ImagePart(0), text(), ImagePart(1), text()),
        (ImagePart(0, "user"), text("user"), text("assistant"), text("user"), ImagePart(1, "assistant")),
        (text(),),
    ]
    return Document(f"d-{number}", "mixed", kinds[number % 4])


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    """Three packed rows from the real loader, features stored beside the shards."""
    folder = tmp_path_factory.mktemp("packed") / "mixed"
    write_dataset(folder, [document(n) for n in range(60)], shard_sizes=[60], tokenizer=TOKENIZER)
    spec = feature_spec(name="patches", shape=(NUM_PATCHES, PATCH_WIDTH), dtype="float32")
    write_spec(folder, spec)
    shards = ShardSet.open(folder)
    rows = generator("patches").normal(size=(shards.num_images, 1, *spec.shape)).astype(np.float32)
    write_feature_rows(folder, spec, "00000", rows, tar_sha256=shards.shards[0].sha256)
    source = SourceSettings(name="mixed", path=str(folder), image_first=0.5)
    settings = DataSettings(sources=(source,), sequence_length=96, features=("patches",), num_workers=0)
    made = next(iter(Loader(settings, kind="packed", micro_batch=3, tokenizer=TOKENIZER)))
    assert isinstance(made, Batch)
    return made


def apart(batch: Batch) -> Batch:
    """Every segment in a row of its own, in the same order: the images stay as they are."""
    rows = [
        (r, (batch.segment_ids[r] == segment).nonzero()[:, 0])
        for r in range(batch.num_rows)
        for segment in range(1, int(batch.segment_ids[r].max()) + 1)
    ]
    length = max(len(at) for _, at in rows)
    fields = {}
    for name in ("token_ids", "segment_ids", "position_ids", "is_visual", "is_target", "source_ids"):
        values = getattr(batch, name)
        made = torch.zeros(len(rows), length, dtype=values.dtype)
        for i, (r, at) in enumerate(rows):
            made[i, : len(at)] = values[r, at]
        fields[name] = made
    for i, (_, at) in enumerate(rows):
        fields["segment_ids"][i, : len(at)] = 1
        fields["position_ids"][i, len(at) :] = torch.arange(length - len(at))
    names = tuple((name,) for row in batch.documents for name in row)
    result = replace(batch, documents=names, **fields)
    result.validate()
    return result


def new_stage(attention: str) -> LanguageStage:
    stage = LanguageStage(model=new_model(TOKENIZER))
    stage.model.lm.language_model.set_attn_implementation(attention)
    return stage


def errors_of(stage: LanguageStage, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every text target and squared error of every visual target, in reading order."""
    visual = stage.visual_of(batch.images)
    assert visual is not None
    targets = targets_of(batch)
    logits, predicted = stage.model.lm.predict(stage.model.lm.hidden_states(batch, visual), targets)
    squared = (predicted - visual.flatten(0, 1)[targets.visual_rows]).square().mean(dim=-1)
    return cross_entropies(logits, targets.text_ids), squared


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", ["train", "eval", "checkpointing"])
def test_packed_equals_unpacked_per_token_per_embedding_and_in_all_gradients(
    batch: Batch, attention: str, mode: str
) -> None:
    stage = new_stage(attention).train(mode != "eval")
    if mode == "checkpointing":
        stage.model.lm.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    found = []
    for rows in (batch, apart(batch)):
        stage.zero_grad()
        text, visual = errors_of(stage, rows)
        (text.sum() + visual.sum()).backward()
        gradients = {n: p.grad.clone() for n, p in stage.named_parameters() if p.grad is not None}
        found.append((text.detach(), visual.detach(), gradients))
    (text, visual, gradients), (text_apart, visual_apart, gradients_apart) = found
    assert len(text) > 50
    assert len(visual) > 20
    assert torch.allclose(text, text_apart, atol=1e-5, rtol=1e-5)
    assert torch.allclose(visual, visual_apart, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == gradients_apart.keys()
    for name, gradient in gradients.items():
        scale = max(float(gradients_apart[name].abs().max()), 1.0)
        assert (gradient - gradients_apart[name]).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("is_training", [True, False])
def test_perturbing_one_document_leaves_the_others_bit_equal(
    batch: Batch, attention: str, is_training: bool
) -> None:
    stage = new_stage(attention).train(is_training)
    row, segment = 1, 2
    chosen = torch.zeros_like(batch.is_target)
    chosen[row] = batch.segment_ids[row] == segment
    assert batch.images is not None
    ids = torch.where(chosen & ~batch.is_visual, (batch.token_ids + 3) % 300, batch.token_ids)
    of_image = chosen[batch.is_visual].reshape(-1, batch.num_visual)[:, 0]
    values = batch.images.values + of_image[:, None, None] * 2.0
    changed = replace(batch, token_ids=ids, images=ImageInput("patches", values))
    with torch.no_grad():
        before, after = (
            stage.model.lm.hidden_states(rows, stage.visual_of(rows.images)) for rows in (batch, changed)
        )
    assert torch.equal(before[~chosen], after[~chosen])
    assert not torch.allclose(before[chosen], after[chosen])
