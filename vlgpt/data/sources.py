"""The data sets of a mixture, opened and checked against each other before the first batch."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TypedDict

import numpy as np

from vlgpt.data.assemble import ShardLengths
from vlgpt.data.mixture import Mixture, OnePass, Redrawn, SlotPlan, Slots, SourceOrder, base_weights
from vlgpt.document import ROLES
from vlgpt.errors import UserError
from vlgpt.settings import DataSettings, SourceSettings
from vlgpt.shards import BadSample, FeatureReader, FeatureSpec, Sample, ShardSet
from vlgpt.shards.recent import Recent
from vlgpt.tokens import DocumentTokenizer

MAX_CACHED_LENGTHS = 64
DIGEST_BYTES = 3  # per shard in the loader's state: enough to name the shard that differs


class SourceState(TypedDict):
    """What identifies the data of a source: its fingerprint, and a short digest per shard to name one that differs."""

    fingerprint: str
    num_shards: int
    num_samples: int
    shard_digests: str


class OpenSource:
    """One data set of the mixture."""

    def __init__(self, settings: SourceSettings, *, shards: ShardSet, features: dict[str, FeatureReader]):
        self.settings, self.shards, self.features = settings, shards, features
        self.name = settings.name
        self.counts = np.array([shard.num_samples for shard in shards.shards], dtype=np.int64)
        self.has_images = any(shard.num_images for shard in shards.shards)
        self._lengths: Recent[int, ShardLengths] = Recent(MAX_CACHED_LENGTHS)
        self._announced: set[int] = set()

    @property
    def num_samples(self) -> int:
        return int(self.counts.sum())

    def lengths(self, shard: int, *, tokenizer: DocumentTokenizer) -> ShardLengths:
        """Part lengths of a shard. Raises UserError when they were made with another tokenizer."""
        return self._lengths.get(shard, partial(self._read_lengths, tokenizer))

    def _read_lengths(self, tokenizer: DocumentTokenizer, shard: int) -> ShardLengths:
        index = self.shards.index(shard)
        has_chats = bool((index.part_role != ROLES.index("plain")).any())
        if not tokenizer.fits(index.tokenizer, has_chats=has_chats):
            found = f"of tokenizer {index.tokenizer}" if index.tokenizer else "none"
            raise UserError(
                f"source {self.name!r}, shard {self.shards.shards[shard].name}: packing needs token lengths of the "
                f"run's tokenizer ({tokenizer.fingerprint}), found {found}; write them with: "
                f"python -m data_prep.index {self.settings.path} --tokenizer PATH --template "
                f"{tokenizer.template_name}"
            )
        return ShardLengths(index, image_length=tokenizer.image_length)

    def read(self, shard: int, sample: int, *, with_images: bool) -> Sample:
        """One sample, its images only on demand. Raises BadSample."""
        return self.shards.read(shard, sample, with_images=with_images)

    def prefetch(self, shards: Sequence[int]) -> None:
        """Start to fetch the shards of a remote data set that were not announced before, in this order."""
        new = [shard for shard in dict.fromkeys(shards) if shard not in self._announced]
        self._announced = set(shards)
        if new:
            self.shards.prefetch(new)

    def image_row(self, shard: int, sample: int) -> int:
        """Row of the sample's first image in every per-image feature of the shard."""
        return int(self.shards.index(shard).image_start[sample])

    def text_row(self, shard: int, sample: int) -> int:
        """Row of the sample's first text part in every per-text feature of the shard."""
        return int(self.shards.index(shard).text_start[sample])

    def bad(self, reason: str, shard: int, sample: int) -> BadSample:
        """The error that names this sample."""
        return BadSample(reason, str(self.shards.index(shard).keys[sample]), self.shards.shards[shard].name)

    def state(self) -> SourceState:
        """What identifies the data."""
        digests = b"".join(
            _digest(shard.name, shard.sha256, shard.num_samples) for shard in self.shards.shards
        )
        return {
            "fingerprint": self.shards.fingerprint,
            "num_shards": len(self.shards.shards),
            "num_samples": self.num_samples,
            "shard_digests": b64encode(digests).decode(),
        }

    def difference(self, state: SourceState) -> str:
        """What changed since `state` was saved, in words; "" when nothing did."""
        now = self.state()
        if now["fingerprint"] == state["fingerprint"]:
            return ""
        width = 4 * DIGEST_BYTES // 3
        for i, shard in enumerate(self.shards.shards):
            at = slice(i * width, (i + 1) * width)
            if now["shard_digests"][at] != state["shard_digests"][at]:
                what = "differs" if i < state["num_shards"] else "is new"
                return f"shard {shard.name} of source {self.name!r} {what}"
        return f"source {self.name!r} had {state['num_shards']} shards and now has {now['num_shards']}"


def _digest(name: str, sha256: str, num_samples: int) -> bytes:
    return hashlib.blake2b(f"{name}|{sha256}|{num_samples}".encode(), digest_size=DIGEST_BYTES).digest()


class PrefetchingPlan:
    """A plan whose remote shards are fetched ahead: those of the window asked for, then those of the next one."""

    def __init__(self, plan: SlotPlan, sources: Sequence[OpenSource]):
        self._plan, self._sources = plan, sources
        self.num_windows = plan.num_windows
        self.num_slots, self.epoch, self.redraw = plan.num_slots, plan.epoch, plan.redraw

    def slots(self, window: int, redrawn: Redrawn = ()) -> Slots:
        """The slots of the window, whose shards begin to be fetched."""
        # What the next window holds depends on how many of these slots are rejected. If none is, it holds the draws
        # that would otherwise take the places of rejected ones here: so its shards are right in both cases.
        has_next = self.num_windows is None or window + 1 < self.num_windows
        windows = [self._plan.slots(w, redrawn) for w in (window, window + 1)[: 1 + has_next]]
        for s, source in enumerate(self._sources):
            source.prefetch(np.concatenate([slots.shard[slots.source == s] for slots in windows]).tolist())
        return windows[0]


def make_orders(settings: DataSettings, sources: Sequence[OpenSource]) -> list[SourceOrder]:
    """The order of the draws of every source. Raises UserError for a source without samples."""
    options = {"seed": settings.seed, "shuffle_shards": settings.shuffle_shards}
    return [SourceOrder(source.name, counts=source.counts, **options) for source in sources]


def make_plan(
    settings: DataSettings, sources: Sequence[OpenSource], *, total_windows: int | None, is_one_pass: bool
) -> SlotPlan:
    """The stream of a mixture, or of one pass over its sources; shards of remote sources are fetched ahead."""
    plan: SlotPlan
    if is_one_pass:
        plan = OnePass([source.counts for source in sources], seed=settings.seed)
    else:
        plan = Mixture(
            make_orders(settings, sources),
            seed=settings.seed,
            weights=base_weights(settings, [source.num_samples for source in sources]),
            ramps=[source.settings.ramp for source in sources],
            total_windows=total_windows,
        )
    is_remote = any("://" in source.settings.path for source in sources)
    return PrefetchingPlan(plan, sources) if is_remote else plan


def open_sources(settings: DataSettings) -> list[OpenSource]:
    """Open every source with the features that the run reads.

    Raises FileNotFoundError or UserError: a missing data set or feature, two sources of one name, or features of two
    sources that were made differently.
    """
    names = [source.name for source in settings.sources]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"data.sources: the name {sorted(twice)[0]!r} is given twice; names must differ")
    opened = []
    for source in settings.sources:
        cache = Path(settings.cache_dir) if settings.cache_dir else None
        shards = ShardSet.open(source.path, cache_dir=cache, cache_bytes=settings.cache_bytes)
        features: dict[str, FeatureReader] = {name: shards.feature(name) for name in settings.features}
        opened.append(OpenSource(source, shards=shards, features=features))
    feature_specs(opened)
    return opened


def feature_specs(sources: Sequence[OpenSource]) -> dict[str, FeatureSpec]:
    """The specification of every feature. Raises UserError naming two sources whose features do not fit together."""
    specs: dict[str, tuple[str, FeatureSpec]] = {}
    for source in sources:
        for name, reader in source.features.items():
            first, spec = specs.setdefault(name, (source.name, reader.spec))
            if _meaning(spec) != _meaning(reader.spec):
                old, new = _meaning(spec), _meaning(reader.spec)
                changed = next(key for key in old if old[key] != new[key])
                raise UserError(
                    f"feature {name!r} of source {source.name!r} has {changed} {new[changed]!r}, of source {first!r} "
                    f"{old[changed]!r}; compute both with the same encoder (python -m data_prep.features)"
                )
    return {name: spec for name, (_, spec) in specs.items()}


def feature_dtype(sources: Sequence[OpenSource], name: str) -> np.dtype:
    """What a feature is handed over as: float16 when every source stores it so, else float32."""
    stored = {source.features[name].spec.dtype for source in sources}
    return np.dtype(np.float16 if stored == {"float16"} else np.float32)


def _meaning(spec: FeatureSpec) -> dict[str, object]:
    """What must agree between sources; storage type and number of views may differ."""
    return {key: value for key, value in spec.model_dump().items() if key not in ("dtype", "views")}
