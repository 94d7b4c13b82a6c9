"""VisDial v1.0: rank 100 answers to a question of a dialog (paper, Table 2: NDCG on val).

Files `visdial_1.0_{split}.json` and `visdial_1.0_{split}_dense_annotations.json`. An answer's score is its
log-likelihood after image, caption and history: the paper's "open-ended" wording cannot give a ranking.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from evaluation import prompts
from evaluation.core import (
    Benchmark,
    Example,
    JsonObject,
    Metric,
    Prediction,
    Predictions,
    Prompt,
    Record,
    Scores,
    find_file,
    find_folder,
    has_file,
    metric,
    read_json,
)
from evaluation.metrics.visdial import ndcg_scores, sparse_scores, submission_record
from vlgpt.document import Document
from vlgpt.errors import UserError


@dataclass(frozen=True, kw_only=True)
class VisDial(Benchmark):
    """`rounds=dense` answers only the annotated round of each dialog (all that NDCG needs, a tenth of the
    work); `rounds=all` every round, for MRR, R@k and mean rank too. `normalise`: sum | mean | emu
    (per-token treatment of the log-likelihood; sum is the challenge's own generative baseline)."""

    name: ClassVar[str] = "visdial"
    kind: ClassVar = "rank"
    primary: ClassVar[str] = "NDCG"
    answer_options: ClassVar[tuple[str, ...]] = ("normalise",)

    prompt: str = "dialog"
    rounds: Literal["dense", "all"] = "dense"
    normalise: str = "sum"

    def examples(self, data: Path) -> Sequence[Example]:
        """One example per scored round, in file order. Raises UserError when no round has dense annotations."""
        content = read_json(find_file(data, f"visdial/visdial_1.0_{self.split}.json"))["data"]
        dense = self._dense(data)
        folder = find_folder(data, f"visdial/VisualDialog_{self.split}2018", f"VisualDialog_{self.split}2018")
        examples = [e for dialog in content["dialogs"] for e in self._dialog(dialog, content, dense, folder)]
        if not examples:
            raise UserError("no round has dense annotations; check the files, or use --option rounds=all")
        return examples

    def _dense(self, data: Path) -> dict[tuple[int, int], list[float]]:
        """Relevance of the options by (image, round from 1)."""
        name = f"visdial/visdial_1.0_{self.split}_dense_annotations.json"
        if not has_file(data, name) and (self.split == "test" or self.rounds == "all"):
            return {}
        # The sample of the train split has `relevance` for `gt_relevance`.
        return {
            (record["image_id"], record["round_id"]): record.get("gt_relevance", record.get("relevance"))
            for record in read_json(find_file(data, name))
        }

    def _dialog(
        self,
        dialog: Record,
        content: Record,
        dense: Mapping[tuple[int, int], list[float]],
        folder: Path,
    ) -> Iterator[Example]:
        questions, answers, image_id = content["questions"], content["answers"], dialog["image_id"]
        image = folder / f"VisualDialog_{self.split}2018_{image_id:012d}.jpg"
        parts = self.template.parts("start", caption=dialog["caption"])
        for number, turn in enumerate(dialog["dialog"], 1):
            question = questions[turn["question"]]
            relevance = dense.get((image_id, number))
            # Of the test split, the server asks only for the one round that has no answer.
            is_open = self.split == "test" and "answer" not in turn
            is_asked = "answer_options" in turn and (relevance is not None or self.rounds == "all" or is_open)
            if is_asked:
                id = f"{image_id}-{number}"
                asked = prompts.merge_text(parts + self.template.parts("prompt", question=question))
                truth = {"gt_index": turn.get("gt_index"), "relevance": relevance}
                info = {"question": question, "image_id": image_id, "round_id": number}
                info["options"] = [answers[option] for option in turn["answer_options"]]
                yield Example(id, Prompt(Document(id, self.name, asked), (image,), id), truth, info)
            if "answer" in turn:
                answer = answers[turn["answer"]]
                parts += self.template.parts("demonstration", question=question, answer=answer)

    def candidates(self, example: Example) -> Sequence[str]:
        """The 100 answer options of the round, in the template's form."""
        return [self.template.candidate(option) for option in example.info["options"]]

    def ideal(self, example: Example) -> np.ndarray:
        """Scores in the order of relevance, the human answer first among equals."""
        scores = np.asarray(example.truth["relevance"] or np.zeros(len(example.info["options"])), np.float64)
        if example.truth["gt_index"] is not None:
            scores[example.truth["gt_index"]] += 1e-6
        return scores

    def score(self, examples: Sequence[Example], predictions: Predictions, data: Path) -> Scores:
        """NDCG times 100, with `rounds=all` also MRR and recall. Raises UserError for a wrong number of scores."""
        for example in examples:
            found, wanted = len(predictions[example.id].get("scores", ())), len(example.info["options"])
            if found != wanted:
                raise UserError(
                    f"{self.name}: prediction {example.id!r} has {found} scores for {wanted} options"
                )
        dense = [example for example in examples if example.truth["relevance"] is not None]
        metrics: dict[str, Metric] = {}
        per_example: dict[str, float] = {}
        if dense:
            relevance = np.array([example.truth["relevance"] for example in dense])
            result = ndcg_scores([predictions[e.id]["scores"] for e in dense], relevance)
            n = result.num_rounds - result.num_undefined
            metrics["NDCG"] = metric(100 * result.ndcg, n, chance=100 * chance_ndcg(relevance))
            per_example = {e.id: 100 * v for e, v in zip(dense, result.per_round) if np.isfinite(v)}
        sparse = [example for example in examples if example.truth["gt_index"] is not None]
        if self.rounds == "all" and sparse:
            metrics |= _sparse_metrics(sparse, predictions)
        if not metrics:
            raise UserError(
                f"{self.name} {self.split} has no public answers; upload submission.json to the server"
            )
        return Scores(metrics, per_example, notes={"normalise": self.normalise, "rounds": self.rounds})

    def from_submission(self, records: Iterable[Record]) -> list[Prediction]:
        """Scores from an official file of ranks: a better rank gets a higher score."""
        return [
            {"id": f"{r['image_id']}-{r['round_id']}", "scores": [-float(rank) for rank in r["ranks"]]}
            for r in records
        ]

    def submission(self, predictions: Predictions, data: Path) -> list[JsonObject]:
        """`[{"image_id", "round_id" from 1, "ranks": rank of every option}]`."""
        records = []
        for id, prediction in predictions.items():
            image_id, round_id = map(int, id.split("-"))
            records.append(submission_record(image_id, round_id, prediction["scores"]))
        return records


def _sparse_metrics(examples: Sequence[Example], predictions: Predictions) -> dict[str, Metric]:
    """MRR and R@k in percent, mean rank in ranks, with what a random order of the options scores."""
    scores = np.array([predictions[example.id]["scores"] for example in examples])
    result = sparse_scores(scores, [example.truth["gt_index"] for example in examples])
    n, options = len(examples), scores.shape[1]
    harmonic = float(np.sum(1 / np.arange(1, options + 1)))
    values = {
        "MRR": (100 * result.mean_reciprocal_rank, 100 * harmonic / options),
        "R@1": (100 * result.recall_at_1, 100 * min(1, 1 / options)),
        "R@5": (100 * result.recall_at_5, 100 * min(1, 5 / options)),
        "R@10": (100 * result.recall_at_10, 100 * min(1, 10 / options)),
        "mean_rank": (result.mean_rank, (options + 1) / 2),
    }
    return {name: metric(value, n, chance=chance) for name, (value, chance) in values.items()}


def chance_ndcg(relevance: np.ndarray) -> float:
    """Expected NDCG of a random order, exactly: (rounds, options) -> mean over rounds with a relevant option."""
    discount = 1 / np.log2(np.arange(relevance.shape[1]) + 2.0)
    expected = []
    for gains in relevance:
        k = int(np.count_nonzero(gains))
        if k:
            # Every option is equally likely at each of the first k places.
            ideal = float(np.sum(np.sort(gains)[::-1][:k] * discount[:k]))
            expected.append(gains.mean() * discount[:k].sum() / ideal)
    return float(np.mean(expected)) if expected else 0.0
