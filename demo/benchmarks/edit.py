"""Emoji benchmark of edits: an image and an instruction, judged by probes and against the real target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from demo.benchmarks.data import SPLITS, ask, best_constant, chats, load, shuffled_score
from demo.benchmarks.images import PictureAnswers, draw_candidates
from evaluation.core import Example, Kind, Predictions, Scores, metric
from vlgpt.decoding.api import DecodeSettings

if TYPE_CHECKING:
    from demo.probes import Pictures, Probe


@dataclass(frozen=True, kw_only=True)
class EmojiEdit(PictureAnswers):
    """Edits with a real target image: skin tone of unseen concepts, gender towards images never trained on.

    accuracy: a probe sees the wanted attribute; its chance is what the unedited source gets. concept_kept (skin
    tone): the nearest of 150 real images, the target among them and the source not, shows the same concept in
    any skin tone; its chance is what edits of other images get.
    """

    name: ClassVar[str] = "emoji_edit"
    kind: ClassVar[Kind] = "image"
    primary: ClassVar[str] = "edit/tone_accuracy"
    default_decoding: ClassVar[DecodeSettings] = DecodeSettings(max_new_tokens=24, images="free")

    TASKS: ClassVar[tuple[tuple[str, str], ...]] = (("tone", "unseen"), ("gender", "target"))

    def examples(self, data: Path) -> Sequence[Example]:
        """Edit chats of every family with the target image as truth, from the family's split."""
        result = []
        for family, split in self.TASKS:
            for item in chats(data, split, kind="edit", family=family, limit=self.limit):
                source, target = item.images
                info = {"split": split, "family": family, "wanted": item.info["wanted"]}
                info |= {"source": item.info["source"]["id"], "picture": item.info["target"]["id"]}
                info |= {"concept": item.info["target"]["base"], "source_image": source}
                result.append(Example(item.document.id, ask(item), target, info))
        return result

    def score(self, examples: Sequence[Example], predictions: Predictions, data: Path) -> Scores:
        """Share of edits that a probe recognises by family, beside its accuracy on the unedited images."""
        judge = self.load_judge()
        metrics: dict[str, dict[str, float]] = {}
        per_example: dict[str, float] = {}
        for family, _ in self.TASKS:
            chosen = [example for example in examples if example.info["family"] == family]
            if not chosen:
                continue
            drawn = self.drawn(chosen, predictions, data)
            sources = judge.squares([example.info["source_image"] for example in chosen])
            wanted = [example.info["wanted"] for example in chosen]
            probe = train_probe(data, self.judge, family)
            obtained = np.array([a == b for a, b in zip(probe.predict(drawn), wanted)])
            name = f"edit/{family}_accuracy"
            chance = probe.accuracy(sources, wanted)
            metrics[name] = metric(float(obtained.mean()), len(chosen), chance=chance)
            metrics[f"probe/{family}"] = _probe_accuracy(data, self.judge, family)
            per_example |= {example.id: float(value) for example, value in zip(chosen, obtained)}
            if family == "tone":
                metrics |= self._concept_kept(chosen, drawn, sources, obtained, data)
        return Scores(metrics, per_example, notes=self.notes(predictions))

    def _concept_kept(
        self,
        examples: Sequence[Example],
        drawn: Pictures,
        sources: Pictures,
        obtained: np.ndarray,
        data: Path,
    ) -> dict[str, dict[str, float]]:
        judge, n = self.load_judge(), len(examples)
        items = chats(data, "unseen", kind="draw")
        ids = [item.info["picture"]["id"] for item in items]
        concepts = np.array([item.info["picture"]["base"] for item in items])
        gallery = judge.embed(judge.squares([item.images[0] for item in items]))
        candidates = [draw_candidates(ids, e.info["picture"], without=e.info["source"]) for e in examples]

        def kept(embeddings: np.ndarray) -> np.ndarray:
            result = []
            for embedding, example, (truth, others) in zip(embeddings, examples, candidates):
                rows = np.append(others, truth)  # a tie goes to another image
                nearest = rows[np.argmax(gallery[rows] @ embedding)]
                result.append(concepts[nearest] == example.info["concept"])
            return np.array(result)

        embeddings, unedited = judge.embed(drawn), kept(judge.embed(sources))
        is_kept = kept(embeddings)
        chance = shuffled_score(lambda order: float(kept(embeddings[order]).mean()), n, "concept_kept")
        return {
            "edit/concept_kept": metric(float(is_kept.mean()), n, chance=chance),
            "edit/concept_kept_unedited": metric(float(unedited.mean()), n, chance=chance),
            "edit/tone_and_concept": metric(float((is_kept & obtained).mean()), n),
        }


def _labelled(data: Path, folders: Sequence[str], attribute: str) -> tuple[list[bytes], list[str]]:
    """Real images to which an attribute applies, and its values."""
    from demo.probes import has_label

    items = [item for folder in folders for item in load(data / folder)]
    chosen = [item for item in items if item.info.get("kind", "describe") == "describe"]
    infos = [(item, item.info.get("picture", item.info)) for item in chosen]
    found = [(item.images[0], info[attribute]) for item, info in infos if has_label(info, attribute)]
    return [image for image, _ in found], [label for _, label in found]


@lru_cache(maxsize=8)
def train_probe(data: Path, judge: str, attribute: str) -> Probe:
    """A probe trained on all training images to which the attribute applies."""
    from demo.probes import Probe, load_judge

    images, labels = _labelled(data, ["pairs-train"], attribute)
    return Probe(attribute, load_judge(judge)).fit(load_judge(judge).squares(images), labels)


def _probe_accuracy(data: Path, judge: str, attribute: str) -> dict[str, float]:
    """How often the probe is right on the real images of all held-out splits."""
    from demo.probes import load_judge

    images, labels = _labelled(data, [f"instructions-{split}" for split in SPLITS], attribute)
    accuracy = train_probe(data, judge, attribute).accuracy(load_judge(judge).squares(images), labels)
    return metric(accuracy, len(labels), chance=best_constant(labels))
