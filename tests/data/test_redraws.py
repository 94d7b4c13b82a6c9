"""Law of the mixture: weights are shares of accepted sequences, whatever the sources reject."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.helpers.small_data import NUM_VISUAL, WORDS, chat, lengths_of, make_tokenizer, page, pair
from vlgpt.data.assemble import Assembler, ShardLengths
from vlgpt.data.mixture import SLOTS, Mixture, Slots, SourceOrder, base_weights
from vlgpt.data.packing import Packer, WindowPlan
from vlgpt.document import Document, ImagePart, TextPart
from vlgpt.errors import UserError
from vlgpt.settings import DataSettings, SourceSettings

TOKENIZER = make_tokenizer()


class RecordingMixture(Mixture):
    """Remembers every draw: (source, shard, sample) in the order in which they were made."""

    def _draw(self, source: np.ndarray, first: np.ndarray, key: np.ndarray) -> Slots:
        made = super()._draw(source, first, key)
        if not hasattr(self, "draws"):
            self.draws: list[tuple[int, int, int]] = []
        self.draws += zip(made.source.tolist(), made.shard.tolist(), made.sample.tolist())
        return made


def make_packer(
    sources: Sequence[SourceSettings],
    documents: Sequence[Sequence[Document]],
    *,
    shard_size: int = 100,
    **options: Any,
) -> Packer:
    """A real packer over real documents of these sources, in shards of up to `shard_size`."""
    lengths: dict[tuple[int, int], ShardLengths] = {}
    orders = []
    for s, (source, made) in enumerate(zip(sources, documents)):
        counts = []
        for shard, start in enumerate(range(0, len(made), shard_size)):
            lengths[s, shard] = lengths_of(made[start : start + shard_size], TOKENIZER)
            counts.append(len(made[start : start + shard_size]))
        orders.append(SourceOrder(source.name, seed=1, counts=np.array(counts), shuffle_shards=2))
    settings = DataSettings(sources=tuple(sources), mixing=options.pop("mixing", "weights"), temperature=3.0)
    weights = base_weights(settings, [len(made) for made in documents])
    return Packer(
        RecordingMixture(
            orders, seed=1, weights=weights, ramps=[source.ramp for source in sources], **options
        ),
        seed=1,
        assemblers=[Assembler(source, tokenizer=TOKENIZER, sequence_length=48) for source in sources],
        lengths=lambda source, shard: lengths[source, shard],
        packing="best_fit",
        sequence_length=48,
    )


def windows(packer: Packer, num_windows: int) -> list[WindowPlan]:
    """The first windows of the stream."""
    plans = [packer.window(0)]
    for window in range(1, num_windows):
        plans.append(packer.window(window, plans[-1].redrawn))
    return plans


def chat_without_reply(number: int) -> Document:
    return Document(f"mute-{number}", "chats", (TextPart(WORDS[number], "user"),))


SINGLE = Document("single", "s", (ImagePart(0), TextPart("w1")))
DOUBLE = Document("double", "s", (ImagePart(0), ImagePart(1), TextPart("w1")))
# as in the 7B configuration, and two that are hard: half of the chats have no target, three documents are a source
DOCUMENTS = [
    [pair(n) for n in range(700)],
    [page(n) for n in range(1500)],
    [page(n) for n in range(2000, 3000)],
    [(chat, chat_without_reply)[n % 2](n % 200) for n in range(400)],
    [SINGLE, SINGLE, DOUBLE],
]
OPTIONS: list[dict[str, Any]] = [
    {"name": "pairs", "image_first": 0.5},
    {"name": "mmc4", "start": "random", "image_first": 0.5},
    {"name": "obelics", "start": "random", "keep_single_image": 0.2},
    {"name": "chats"},
    {"name": "tiny", "keep_single_image": 0.1},
]
MIXTURES: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "weights": ([0.4, 0.2, 0.2, 0.1, 0.1], {}),
    "size": (["size"] * 5, {}),
    "temperature": (["size"] * 5, {"mixing": "temperature"}),
    "ramp": ([0.4, 0.2, 0.2, 0.1, 0.1], {"total_windows": 10}),
}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_every_source_gives_its_share_of_the_accepted_sequences_whatever_it_rejects(mixture: str) -> None:
    weights, options = MIXTURES[mixture]
    ramps = [(0.0, 0.5) if mixture == "ramp" and o["name"] == "obelics" else (0.0, 0.0) for o in OPTIONS]
    sources = [
        SourceSettings(path="x", weight=weight, ramp=ramp, **chosen)
        for weight, ramp, chosen in zip(weights, ramps, OPTIONS)
    ]
    packer = make_packer(sources, DOCUMENTS, **dict(options))
    sizes = [len(documents) for documents in DOCUMENTS]
    full = np.array(sizes if weights[0] == "size" else weights) ** (1 / 3 if mixture == "temperature" else 1)
    rejected: Counter[tuple[int, str]] = Counter()
    for number, plan in enumerate(windows(packer, 6)):
        factor = min(number / 10 / 0.5, 1) if mixture == "ramp" else 1
        wanted = full * [1, 1, factor, 1, 1]
        members = [slot for row in range(plan.num_rows) for slot in plan.row(row)]
        found = np.bincount(plan.slots.source[members], minlength=5) / SLOTS
        assert np.abs(found - wanted / wanted.sum()).max() < 1 / SLOTS
        rejected += plan.rejected
    assert {source for source, _ in rejected} == {1, 2, 3, 4}  # or nothing was tested


def test_every_document_is_offered_once_per_epoch_though_many_are_rejected() -> None:
    """The draws of a source, rejected ones among them, are its permuted order without gap or repeat."""
    sources = [SourceSettings(path="x", weight=1.0, **chosen) for chosen in OPTIONS]
    packer = make_packer(sources, DOCUMENTS)
    plans = windows(packer, 5)
    mixture = packer.plan
    assert isinstance(mixture, RecordingMixture)
    for s, documents in enumerate(DOCUMENTS):
        drawn = [draw for draw in mixture.draws if draw[0] == s]
        assert len(drawn) == mixture.draws_before(5, plans[-1].redrawn)[s]
        size = len(documents)
        for start in range(0, len(drawn) - size, size):
            assert len(set(drawn[start : start + size])) == size
    rejected = Counter[int]()
    for plan in plans:
        for (source, _), number in plan.rejected.items():
            rejected[source] += number
    assert plans[-1].redrawn == tuple(rejected[s] for s in range(5))


def test_a_rejection_does_not_tilt_what_comes_instead() -> None:
    """Of windows with one image 10 % stay: documents with one and with two images 2 : 1 become sequences 0.2 : 1."""
    source = SourceSettings(name="tiny", path="x", keep_single_image=0.1)
    plans = windows(make_packer([source], [[SINGLE, SINGLE, DOUBLE]]), 3)
    is_single = np.concatenate([plan.length for plan in plans]) == 3 + NUM_VISUAL + 2
    assert abs(is_single.mean() - 0.2 / 1.2) < 0.012  # 3.5 standard deviations


def test_where_nothing_is_rejected_nothing_is_drawn_anew() -> None:
    """Then a stream is what it was before rejected documents were replaced, and so is its position."""
    sources = [SourceSettings(name=name, path="x", weight=1.0) for name in ("pairs", "chats")]
    packer = make_packer(sources, [DOCUMENTS[0], [chat(n) for n in range(50)]])
    for window, plan in enumerate(windows(packer, 4)):
        wanted = packer.plan.slots(window)
        assert plan.redrawn == ()
        for name in ("source", "shard", "sample", "key"):
            assert (getattr(plan.slots, name) == getattr(wanted, name)).all()


@pytest.mark.parametrize(
    ("documents", "reason", "weight"),
    [
        ([chat_without_reply(n) for n in range(100)], "no_target", 0.01),
        ([SINGLE] * 700, "single_image", 0.5),
        ([Document("e", "s", ())], "empty", 0.004),
    ],
)
def test_a_source_that_rejects_everything_is_refused_with_the_reasons(
    documents: list[Document], reason: str, weight: float
) -> None:
    sources = [
        SourceSettings(name="good", path="x", weight=1 - weight),
        SourceSettings(name="bad", path="x", weight=weight, keep_single_image=0.0),
    ]
    with pytest.raises(UserError, match=f"'bad' gave 0 sequences in .*'{reason}': "):
        make_packer(sources, [DOCUMENTS[0], documents]).window(3)


def test_a_source_that_gives_a_sequence_for_every_fiftieth_draw_is_served() -> None:
    source = SourceSettings(name="rare", path="x", keep_single_image=0.0)
    plan = make_packer([source], [[*[SINGLE] * 49, DOUBLE]]).window(0)
    assert 0 <= 50 * SLOTS - (SLOTS + plan.redrawn[0]) < 50
    assert (plan.length == 3 + 2 * (NUM_VISUAL + 2)).all()
