"""One step is the gradient of sums over all targets, however they are dealt to ranks and micro-batches.

The engine of these tests takes the means that DeepSpeed takes, in one process; tests/train/test_training.py holds the
same law in processes of DeepSpeed.
"""

from typing import Any, NamedTuple

import pytest
import torch

from vlgpt.batch import LossTerm
from vlgpt.train.loop import train_step

WEIGHTS = {"text": 1.0, "visual": 0.25}


class Sample(NamedTuple):
    """Targets of one micro-batch by term: (targets, width)."""

    text: torch.Tensor
    visual: torch.Tensor


class LinearStage:
    """Losses of a linear model, as sums."""

    terms = tuple(WEIGHTS)

    def __init__(self, weight):
        self.weight = weight

    def count_targets(self, sample):
        return {name: len(getattr(sample, name)) for name in self.terms}

    def forward(self, sample):
        return {
            name: LossTerm((getattr(sample, name) @ self.weight).square().sum(), WEIGHTS[name])
            for name in self.terms
        }


class MeansEngine:
    """A rank of several whose gradients are divided by the accumulation; `everyone` is what all ranks have."""

    def __init__(self, stage, everyone):
        self.stage, self.everyone, self.world_size = stage, everyone, len(everyone)
        self.accumulation = len(everyone[0])

    def feed(self, samples):
        return ((sample, sample) for sample in samples)

    def all_sum(self, values):
        targets = [self.stage.count_targets(sample) for samples in self.everyone for sample in samples]
        return torch.tensor([sum(counts[name] for counts in targets) for name in self.stage.terms]).to(values)

    def forward(self, sample):
        return self.stage.forward(sample)

    def backward(self, loss):
        (loss / self.accumulation).backward()

    def __getattr__(self, name) -> Any:
        assert name in ("set_learning_rate", "end_micro_batch", "step_result"), name
        return lambda *arguments: None


def gradient(samples, *, world_size, accumulation):
    """The mean over ranks of their gradients of one step."""
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    dealt = [samples[rank::world_size] for rank in range(world_size)]
    assert all(len(mine) == accumulation for mine in dealt)
    for mine in dealt:
        train_step(MeansEngine(LinearStage(weight), dealt), mine, 1e-3)
    return weight.grad / world_size


@pytest.mark.parametrize("layout", [(1, 4), (2, 2), (4, 1)])
def test_a_step_is_the_gradient_of_weighted_sums_over_global_counts(layout):
    random = torch.Generator().manual_seed(0)
    # unequal numbers of targets; one micro-batch has no image at all
    sizes = [(5, 2), (1, 0), (9, 3), (2, 8)]
    samples = [
        Sample(*(torch.randn(size, 3, generator=random, dtype=torch.float64) for size in pair))
        for pair in sizes
    ]
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    for name in WEIGHTS:
        rows = torch.cat([getattr(sample, name) for sample in samples])
        ((rows @ weight).square().sum() * WEIGHTS[name] / len(rows)).backward()
    world_size, accumulation = layout
    found = gradient(samples, world_size=world_size, accumulation=accumulation)
    torch.testing.assert_close(found, weight.grad, atol=1e-12, rtol=1e-12)
