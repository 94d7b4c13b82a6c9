"""COCO captions (paper, Table 2: CIDEr on Karpathy's test split), with BLEU-1..4 and ROUGE-L.

Every number is multiplied by 100. CIDEr is a corpus measure: it is only comparable on the whole split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from evaluation.benchmarks.coco import load_coco
from evaluation.core import Benchmark, DecodeSettings, Example, Predictions, Scores, metric
from evaluation.metrics.captions import score_captions
from evaluation.metrics.java import java_scores
from evaluation.metrics.postprocess import Style, cut_caption
from evaluation.metrics.ptb import TokenizerName
from vlgpt import seeds
from vlgpt.document import Part


@dataclass(frozen=True, kw_only=True)
class CocoCaption(Benchmark):
    """Splits test, val, train (Karpathy) and val2014, train2014 (official annotations).

    `tokenizer`: python (exact on real captions) or java (Stanford's, where Java and pycocoevalcap are
    installed). `java_metrics=true` adds METEOR, and SPICE where its models are there.
    """

    name: ClassVar[str] = "coco_caption"
    primary: ClassVar[str] = "CIDEr"
    # PAPER: not stated (table 5); Emu's settings (Emu1/mm_eval)
    default_decoding: ClassVar[DecodeSettings] = DecodeSettings(
        max_new_tokens=20, min_new_tokens=8, num_beams=5, length_penalty=-1.0
    )
    submission_keys: ClassVar = ("image_id", "caption")
    has_integer_ids: ClassVar[bool] = True

    split: str = "test"
    prompt: str = "caption"
    cut: Style = "emu"
    tokenizer: TokenizerName = "python"
    java_metrics: bool = False

    def examples(self, data: Path) -> Sequence[Example]:
        """Every image of the split with its human captions, five as a rule, as truth."""
        found = []
        for image in load_coco(data, split=self.split):
            id, references = str(image.image_id), [text for _, text in image.captions]
            prompt = self.make_prompt(id, images=(image.path,))
            found.append(Example(id, prompt, references, {"image_id": image.image_id}))
        return found

    def pool(self, data: Path) -> Sequence[Example]:
        """Training images: train2014 for an official split, Karpathy's train split otherwise."""
        return replace(self, split="train2014" if self.split.endswith("2014") else "train").examples(data)

    def demonstration(self, example: Example, *, has_image: bool = True) -> tuple[Part, ...]:
        """The image with the first of its human captions."""
        return self.template.parts("demonstration", has_image=has_image, caption=example.truth[0])

    def ideal(self, example: Example) -> str:
        """A human caption, if possible one that the cut leaves whole."""
        whole = [text for text in example.truth if ". " not in text.strip() and "\n" not in text.strip()]
        return (whole or example.truth)[0].strip()

    def clean(self, text: str) -> str:
        """The caption without what the model wrote after it, by the rule `cut`."""
        return cut_caption(text, self.cut)

    def score(self, examples: Sequence[Example], predictions: Predictions, data: Path) -> Scores:
        """CIDEr, BLEU and ROUGE_L times 100, beside the scores of other images' captions."""
        references = {example.id: example.truth for example in examples}
        captions = self.answers(predictions)
        scores = score_captions(captions, references, tokenizer=self.tokenizer)
        others = score_captions(self._captions_of_others(examples), references).corpus
        n = len(examples)
        metrics = {
            name: metric(100 * value, n, chance=100 * others[name]) for name, value in scores.corpus.items()
        }
        if self.java_metrics:
            metrics |= {name: metric(100 * v, n) for name, v in java_scores(captions, references).items()}
        per_example = dict(zip(references, (100 * value for value in scores.per_image["CIDEr"])))
        return Scores(
            metrics, per_example, notes={"tokenizer": self.tokenizer, "cut": self.cut, "scale": 100}
        )

    def _captions_of_others(self, examples: Sequence[Example]) -> dict[str, str]:
        """Human captions of other images (one fixed cycle): what chance means here."""
        order = seeds.generator("chance", self.name).permutation(len(examples))
        ideals = [self.clean(self.ideal(example)) for example in examples]
        return {examples[at].id: ideals[order[i - 1]] for i, at in enumerate(order)}
