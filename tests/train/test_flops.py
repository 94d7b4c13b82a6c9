"""The operations that MFU is made of, against torch's own counter."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.batches import pack, random_document
from tests.helpers.tiny_unified import new_document_tokenizer, new_model
from vlgpt.planning.flops import FlopMeter, counting
from vlgpt.settings import LoraSettings
from vlgpt.stages.language import LanguageStage

TOKENIZER = new_document_tokenizer()


@contextlib.contextmanager
def counting_products():
    """torch's counter, with attention as plain products: no version has formulas for all fused kernels."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def linear_flops(counter):
    """Products with a weight; those of attention scores are batched."""
    counts = counter.get_flop_counts()["Global"]
    return sum(
        counts[operation] for operation in counts if operation in (torch.ops.aten.mm, torch.ops.aten.addmm)
    )


@pytest.mark.parametrize("is_lora", [False, True])
def test_linear_operations_equal_those_that_torch_counts(is_lora):
    """A trained model counts forward and both gradients; under LoRA the frozen weights get no gradient."""
    model = new_model(TOKENIZER)
    if is_lora:
        lora = LoraSettings(rank=4, alpha=4.0, dropout=0.0)
        model.lm.add_lora(lora, [TOKENIZER.begin_image_id, TOKENIZER.end_image_id])
    stage = LanguageStage(model=model, num_sources=2).train()
    batch = pack(
        [[random_document(3, num_images=2)], [random_document(4, num_images=1)]], TOKENIZER, length=96
    )
    meter = FlopMeter(stage)
    with counting_products() as counter:
        with counting(meter, None):
            terms = stage(batch)
        sum(term.total for term in terms.values()).backward()
    found, wanted = meter.take(), linear_flops(counter)
    assert found == pytest.approx(wanted, rel=0.03)


def test_scores_follow_real_segments_and_nothing_is_counted_outside_of_training():
    stage = LanguageStage(model=new_model(TOKENIZER), num_sources=2)
    meter = FlopMeter(stage)
    one = pack([[random_document(3, num_images=2)]], TOKENIZER, length=96)
    length = int((one.segment_ids == 1).sum())
    meter.add_scores(one)
    config = stage.model.lm.backbone.config
    assert meter.take() == 3 * 2 * length**2 * config.hidden_size * config.num_hidden_layers
    with torch.no_grad():
        stage(one)
    assert meter.take() == 0


def test_a_frozen_attention_tower_costs_a_forward_pass():
    tower = nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True))
    tower.requires_grad_(False).train()  # train(): the fused path of eval() is not what a counter sees
    meter = FlopMeter(tower)
    with counting_products() as counter, counting(meter, None):
        tower(torch.randn(2, 10, 32))
    assert meter.take() == pytest.approx(counter.get_total_flops(), rel=0.01)
