"""What `Batch.validate` must refuse: a batch that breaks one law of packing would train on wrong pairs unseen."""

from dataclasses import replace

import pytest
import torch

from tests.helpers.batches import pack, random_document
from tests.helpers.tiny_unified import NUM_VISUAL, new_document_tokenizer
from vlgpt.batch import Batch, ImageInput

TOKENIZER = new_document_tokenizer()


def two_documents() -> Batch:
    """One row: a document with two images, a text, and padding."""
    row = [random_document(0, num_images=2), random_document(1, num_images=0)]
    return pack([row], TOKENIZER)


def changed(batch: Batch, name: str, at: int, value: int | bool) -> Batch:
    tensor = getattr(batch, name).clone()
    tensor[0, at] = value
    return replace(batch, **{name: tensor})


def start_of(batch: Batch, segment: int) -> int:
    return int((batch.segment_ids[0] == segment).nonzero()[0])


@pytest.mark.parametrize("num_images", [1, 3, 0])
def test_visual_positions_must_be_as_many_as_embeddings(num_images):
    batch = two_documents()
    values = torch.zeros(num_images, *batch.images.values.shape[1:])
    found = replace(batch, images=ImageInput("patches", values) if num_images else None)
    with pytest.raises(ValueError, match=f"{2 * NUM_VISUAL} visual positions for {num_images} images"):
        found.validate()


def test_visual_positions_must_come_in_runs_of_one_image():
    batch = two_documents()
    first = int(batch.is_visual[0].nonzero()[0])
    moved = changed(changed(batch, "is_visual", first, False), "is_visual", first - 2, True)
    with pytest.raises(ValueError, match="do not come in runs"):
        moved.validate()


def test_an_image_must_lie_in_one_segment():
    batch = two_documents()
    first = int(batch.is_visual[0].nonzero()[0])
    segments = batch.segment_ids.clone()
    segments[0, first + 2 :] += segments[0, first + 2 :] > 0
    with pytest.raises(ValueError, match="an image crosses a segment border"):
        replace(batch, segment_ids=segments).validate()


@pytest.mark.parametrize("segment", [1, 2])
def test_a_target_needs_a_position_before_it_in_its_own_segment(segment):
    batch = two_documents()
    with pytest.raises(ValueError, match="first position is a target"):
        changed(batch, "is_target", start_of(batch, segment), True).validate()


def test_padding_must_not_be_predicted():
    batch = two_documents()
    with pytest.raises(ValueError, match="padding positions are marked as targets"):
        changed(batch, "is_target", start_of(batch, 0) + 1, True).validate()


def test_positions_must_restart_in_every_segment_and_count_up_by_one():
    batch = two_documents()
    going_on = replace(batch, position_ids=torch.arange(batch.position_ids.shape[1])[None])
    with pytest.raises(ValueError, match="do not restart at 0"):
        going_on.validate()
    with pytest.raises(ValueError, match="do not count up by one"):
        changed(batch, "position_ids", 3, 7).validate()
