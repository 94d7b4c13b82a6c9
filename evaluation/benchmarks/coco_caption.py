"""COCO captions (paper, Table 2: CIDEr on Karpathy's test split), with BLEU-1..4 and ROUGE-L.

Every number is multiplied by 100. CIDEr is a corpus measure: it is only comparable on the whole split.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from evaluation.benchmarks.coco import CaptionedImage, load_coco
from evaluation.core import Benchmark, Decoding, Example, Prediction, Scores, metric
from evaluation.metrics.captions import score_captions
from evaluation.metrics.postprocess import cut_caption
from vlgpt import seeds
from vlgpt.document import Part
from vlgpt.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CocoCaption(Benchmark):
    """Splits test, val, train (Karpathy) and val2014, train2014 (official annotations).

    `tokenizer`: python (exact on real captions) or java (Stanford's, where Java and pycocoevalcap are
    installed). `java_metrics=true` adds METEOR, and SPICE where its models are there.
    """

    name: ClassVar[str] = "coco_caption"
    primary: ClassVar[str] = "CIDEr"
    default_decoding: ClassVar[Decoding] = Decoding(
        max_new_tokens=20, min_new_tokens=8, num_beams=5, length_penalty=-1.0
    )  # PAPER: not stated (table 5); Emu's settings (Emu1/mm_eval)

    split: str = "test"
    prompt: str = "caption"
    cut: str = "emu"
    tokenizer: str = "python"
    java_metrics: bool = False

    def examples(self, data: Path) -> Sequence[Example]:
        return [self._example(image) for image in load_coco(data, split=self.split)]

    def _example(self, image: CaptionedImage) -> Example:
        id = str(image.image_id)
        references = [text for _, text in image.captions]
        return Example(
            id, self.make_prompt(id, images=(image.path,)), references, {"image_id": image.image_id}
        )

    def pool(self, data: Path) -> Sequence[Example]:
        return replace(self, split="train2014" if self.split.endswith("2014") else "train").examples(data)

    def demonstration(self, example: Example, *, has_image: bool = True) -> tuple[Part, ...]:
        return self.template.parts("demonstration", has_image=has_image, caption=example.truth[0])

    def ideal(self, example: Example) -> str:
        """A human caption, if possible one that the cut leaves whole."""
        whole = [text for text in example.truth if ". " not in text.strip() and "\n" not in text.strip()]
        return (whole or example.truth)[0].strip()

    def clean(self, text: str) -> str:
        return cut_caption(text, self.cut)  # type: ignore[arg-type]

    def score(self, predictions: Mapping[str, Prediction], data: Path) -> Scores:
        examples = [example for example in self.loaded(data) if example.id in predictions]
        if without := [e.id for e in examples if not isinstance(predictions[e.id].get("text"), str)]:
            raise UserError(f"{self.name}: predictions without a caption: {', '.join(without[:10])}")
        references = {example.id: example.truth for example in examples}
        captions = {example.id: self.clean(predictions[example.id]["text"]) for example in examples}
        scores = score_captions(captions, references, tokenizer=self.tokenizer)  # type: ignore[arg-type]
        others = score_captions(self._captions_of_others(examples), references).corpus
        metrics = {
            name: metric(100 * value, len(examples), chance=100 * others[name])
            for name, value in scores.corpus.items()
        }
        if self.java_metrics:
            from evaluation.java_metrics import java_scores

            metrics |= {
                name: metric(100 * v, len(examples)) for name, v in java_scores(captions, references).items()
            }
        per_example = dict(zip(references, (100 * value for value in scores.per_image["CIDEr"])))
        return Scores(
            metrics, per_example, notes={"tokenizer": scores.tokenizer, "cut": self.cut, "scale": 100}
        )

    def _captions_of_others(self, examples: Sequence[Example]) -> dict[str, str]:
        """Human captions of other pictures (one fixed cycle): what chance means here."""
        order = seeds.generator("chance", self.name).permutation(len(examples))
        ideals = [self.clean(self.ideal(example)) for example in examples]
        return {examples[at].id: ideals[order[i - 1]] for i, at in enumerate(order)}

    def from_submission(self, records: Iterable[Mapping[str, Any]]) -> list[Prediction]:
        return [{"id": str(record["image_id"]), "text": record["caption"]} for record in records]

    def submission(self, predictions: Mapping[str, Prediction], data: Path) -> list[dict[str, Any]]:
        """COCO's result file `[{"image_id": int, "caption": str}]`."""
        return [{"image_id": int(id), "caption": self.clean(p["text"])} for id, p in predictions.items()]
