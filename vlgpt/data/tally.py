"""What the loader read: counts by source and reason, the quarantine file, the limit of bad samples, time waited."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlgpt.data.stream import Report, SkippedSample
from vlgpt.log import get_logger

BAD_WINDOW = 10_000  # samples over which `max_bad_fraction` is judged
MAX_CONSECUTIVE_BAD = 100
MAX_QUARANTINE_LINES = 100_000
WAIT_WARNING_SHARE, WAIT_WARNING_PERIOD_S = 0.05, 300.0


class TooManyBadSamples(RuntimeError):
    """A source has more bad samples than `data.max_bad_fraction` allows."""


class Tally:
    """Adds up the reports of a rank. All its numbers may be summed over ranks."""

    def __init__(
        self, source_names: Sequence[str], *, max_bad_fraction: float, quarantine: Path | None, rank: int = 0
    ):
        self._names, self._max_bad_fraction, self._rank = tuple(source_names), max_bad_fraction, rank
        self.bad: Counter[tuple[int, str]] = Counter()
        self.rejected: Counter[tuple[int, str]] = Counter()
        self.good: Counter[int] = Counter()
        self.tokens: Counter[int] = Counter()
        self.num_positions = self.num_dropped_images = self.num_windows_planned = 0
        self.planning_ms = 0.0
        self._recent_read: Counter[int] = Counter()
        self._recent_bad: Counter[int] = Counter()
        self._consecutive_bad: Counter[int] = Counter()
        self._quarantine, self._quarantined = quarantine, set[tuple[str, str]]()

    def add(self, report: Report) -> None:
        """Count one batch. Raises TooManyBadSamples."""
        self.tokens.update(report.tokens)
        self.rejected.update(report.rejected)
        self.num_positions += report.num_positions
        self.num_dropped_images += report.num_dropped_images
        self.num_windows_planned += report.num_windows_planned
        self.planning_ms += report.planning_ms
        for source, bad in report.outcomes:
            self._recent_read[source] += 1
            if bad is None:
                self.good[source] += 1
                self._consecutive_bad[source] = 0
            else:
                self._add_bad(bad)
            if self._recent_read[source] >= BAD_WINDOW:
                self._recent_read[source] = self._recent_bad[source] = 0

    def _add_bad(self, bad: SkippedSample) -> None:
        source, name = bad.source, self._names[bad.source]
        self.bad[source, bad.reason] += 1
        self._recent_bad[source] += 1
        self._consecutive_bad[source] += 1
        self.quarantine(bad)
        last = f"{bad.reason} (sample {bad.key} of shard {bad.shard})"
        found = f"the last one: {last}; all: {self.by_source(self.bad)[name]}"
        if self._recent_bad[source] > self._max_bad_fraction * BAD_WINDOW:
            raise TooManyBadSamples(
                f"source {name!r}: {self._recent_bad[source]} bad of the last {self._recent_read[source]} samples; "
                f"data.max_bad_fraction {self._max_bad_fraction} allows {self._max_bad_fraction * BAD_WINDOW:.0f} of "
                f"{BAD_WINDOW}; {found}"
            )
        if self._consecutive_bad[source] > MAX_CONSECUTIVE_BAD:
            raise TooManyBadSamples(
                f"source {name!r}: {self._consecutive_bad[source]} bad samples in a row; {found}"
            )

    def quarantine(self, bad: SkippedSample) -> None:
        """Write a bad sample to the quarantine file, once, and the first few to the log."""
        if (bad.shard, bad.key) in self._quarantined or len(self._quarantined) >= MAX_QUARANTINE_LINES:
            return
        self._quarantined.add((bad.shard, bad.key))
        name = self._names[bad.source]
        if len(self._quarantined) <= 10:
            get_logger(__name__).warning(
                "bad sample: %s, shard %s, key %s: %s", name, bad.shard, bad.key, bad.reason
            )
        if self._quarantine is not None:
            record = {
                "source": name,
                "shard": bad.shard,
                "key": bad.key,
                "reason": bad.reason,
                "rank": self._rank,
            }
            self._quarantine.parent.mkdir(parents=True, exist_ok=True)
            with self._quarantine.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def by_source(self, counts: Counter[tuple[int, str]]) -> dict[str, dict[str, int]]:
        """{(source, reason): n} -> {source name: {reason: n}}."""
        result: dict[str, dict[str, int]] = {}
        for (source, reason), count in sorted(counts.items()):
            result.setdefault(self._names[source], {})[reason] = count
        return result

    def statistics(self) -> dict[str, object]:
        """The counts and shares of this rank so far."""
        num_good, num_tokens = sum(self.good.values()), sum(self.tokens.values())
        result: dict[str, object] = {
            "samples": {name: self.good[s] for s, name in enumerate(self._names)},
            "mixture": {name: self.good[s] / max(num_good, 1) for s, name in enumerate(self._names)},
            "bad": self.by_source(self.bad),
            "rejected": self.by_source(self.rejected),
            "planning_ms": self.planning_ms / max(self.num_windows_planned, 1),
        }
        if self.num_positions:
            result["tokens"] = {name: self.tokens[s] for s, name in enumerate(self._names)}
            result["padding_share"] = 1.0 - num_tokens / self.num_positions
            result["dropped_images"] = self.num_dropped_images
        return result


class Waits:
    """How long a trainer waited for data since the iteration began."""

    def __init__(self) -> None:
        self._wait_s = self._started_s = self._warned_s = self._warned_wait_s = 0.0

    def restart(self) -> None:
        """Start the clock again and forget the waits so far."""
        self._started_s = self._warned_s = time.monotonic()
        self._wait_s = self._warned_wait_s = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """What is done in this context is waiting."""
        before_s = time.monotonic()
        yield
        self._wait_s += time.monotonic() - before_s

    def warn_when_slow(self, num_workers: int) -> None:
        """A warning every few minutes in which the trainer waited more than 5 % of the time."""
        now_s = time.monotonic()
        if now_s - self._warned_s < WAIT_WARNING_PERIOD_S:
            return
        share = (self._wait_s - self._warned_wait_s) / (now_s - self._warned_s)
        if share > WAIT_WARNING_SHARE:
            get_logger(__name__).warning(
                "the trainer waited for data %.0f %% of the last %.0f s: raise data.num_workers (now %d)",
                100 * share,
                now_s - self._warned_s,
                num_workers,
            )
        self._warned_s, self._warned_wait_s = now_s, self._wait_s

    def statistics(self) -> dict[str, float]:
        """`data_wait_s`, seconds waited, and `data_wait_share`, their share of the time since the start."""
        elapsed_s = time.monotonic() - self._started_s if self._started_s else 0.0
        share = self._wait_s / elapsed_s if elapsed_s else 0.0
        return {"data_wait_s": self._wait_s, "data_wait_share": share}
