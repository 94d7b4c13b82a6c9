"""Seconds and memory of our metrics beside the implementations they equal, on made-up data of the benchmarks' sizes.

    OMP_NUM_THREADS=1 python benchmarks/metrics.py [--only vqa visdial ...] [--small]

Wall clock, one run each, both sides one after the other; each side runs in a process of its own that begins with the
same data in memory, and "MB" is what it takes on top of that. pycocoevalcap, its Java tokenizer and scipy are the
packages themselves. The VQA and VisDial references do in our words, step by step, what the official scripts do
(GT-Vision-Lab/VQA vqaEval.py of 2021; visdialch/metrics.py with its torch loops), in one thread like ours.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import multiprocessing
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from evaluation.metrics import ptb
from evaluation.metrics.captions import score_tokenized
from evaluation.metrics.fid import frechet_distance
from evaluation.metrics.visdial import ndcg_scores, sparse_scores
from evaluation.metrics.vqa import vqa_accuracy
from evaluation.metrics.vqa_text import CONTRACTIONS

if TYPE_CHECKING:
    from torch import Tensor

SIZES = {  # full, --small
    "tokenizer": (200_000, 10_000),  # captions
    "captions-5k": (5_000, 500),  # images with 5 references, COCO Karpathy test
    "captions-40k": (40_504, 1_000),  # COCO val2014
    "vqa": (214_354, 10_000),  # questions of VQAv2 val
    "score": (214_354, 10_000),  # the same through evaluation.score: files in, results.json out
    "visdial": (2_064, 100),  # dialogs of 10 rounds, VisDial 1.0 val
    "fid": (2_048, 256),  # feature width
}
GOALS = {
    "captions-5k": 3,
    "captions-40k": 5,
    "vqa": 20,
    "visdial": 100,
    "fid": 5,
}  # times as fast as the reference
WORDS = """
    a the man woman dog cat on in with of red blue bus street table two three sitting standing next to
    large small people white black train plate pizza tennis court field holding playing near
    water his her is are and
""".strip().split()


class Measured(NamedTuple):
    """Cost of one call: seconds, MB of extra memory, and what it returned."""

    seconds: float
    megabytes: float
    value: Any


class Row(NamedTuple):
    """One line of the table: a job done by the reference implementation and by ours."""

    job: str
    reference: str
    theirs: Measured | None  # None: not installed, or nothing to compare with
    ours: Measured
    largest_difference: float | None = None
    remark: str = ""


def measured(call: Callable[[], Any]) -> Measured:
    """Run in a forked process: seconds, memory on top of what was there, and the value."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        before = _peak_megabytes()
        start = time.perf_counter()
        value = call()
        seconds = time.perf_counter() - start
        sender.send((seconds, _peak_megabytes() - before, value))

    process = context.Process(target=work)
    process.start()
    sender.close()
    try:
        found = Measured(*receiver.recv())
    except EOFError as error:
        raise RuntimeError("the measured process ended without a result; see its message above") from error
    process.join()
    return found


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def made_up_captions(count: int, generator: random.Random) -> list[str]:
    """Random English-like captions with apostrophes and hyphens: `count` texts of 8 to 14 words."""
    starts = ["A man's", "The dog's", "Two people,", "An e-mail", "It isn't a", "a"]
    return [
        f"{generator.choice(starts)} {' '.join(generator.choices(WORDS, k=generator.randint(7, 12)))}."
        for _ in range(count)
    ]


def tokenizer_row(num_captions: int) -> Row:
    """Our PTB tokenizer beside Stanford's Java one; the difference counts captions with other tokens."""
    captions = made_up_captions(num_captions, random.Random(0))
    ours = measured(lambda: ptb.tokenize(captions).captions)
    theirs, difference = None, None
    if ptb.find_java_tokenizer() is not None:
        theirs = measured(lambda: ptb.tokenize(captions, tokenizer="java").captions)
        difference = float(sum(map(str.__ne__, ours.value, theirs.value)))
    speed = f"{num_captions / ours.seconds:,.0f} captions/s, goal 20,000"
    return Row(f"PTB tokens, {num_captions:,} captions", "Java tokenizer", theirs, ours, difference, speed)


def caption_row(num_images: int) -> Row:
    """Our CIDEr, BLEU and ROUGE_L beside pycocoevalcap, five references an image."""
    generator = random.Random(1)
    hypotheses = dict(enumerate(ptb.tokenize(made_up_captions(num_images, generator)).captions))
    flat = ptb.tokenize(made_up_captions(5 * num_images, generator)).captions
    references = {image: flat[5 * image : 5 * image + 5] for image in range(num_images)}
    ours = measured(lambda: score_tokenized(hypotheses, references).corpus)
    theirs, difference = None, None
    if importlib.util.find_spec("pycocoevalcap") is not None:
        theirs = measured(lambda: pycocoevalcap_scores(hypotheses, references))
        difference = max(abs(ours.value[name] - theirs.value[name]) for name in theirs.value)
    return Row(f"CIDEr + BLEU + ROUGE_L, {num_images:,} x 5", "pycocoevalcap", theirs, ours, difference)


def pycocoevalcap_scores(hypotheses: dict[int, str], references: dict[int, list[str]]) -> dict[str, float]:
    """Corpus scores of pycocoevalcap by metric name, from captions that are already tokenized."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    given = {image: [text] for image, text in hypotheses.items()}
    bleu, _ = Bleu(4).compute_score(references, given, verbose=0)
    scores = {f"Bleu_{order}": value for order, value in enumerate(bleu, start=1)}
    scores["ROUGE_L"], _ = Rouge().compute_score(references, given)
    scores["CIDEr"], _ = Cider().compute_score(references, given)
    return scores


def made_up_answers(num_questions: int) -> tuple[list[str], list[list[str]]]:
    """Predictions, and ten answers to each question: 11,000 different strings, some of them frequent, as in VQAv2."""
    generator = random.Random(2)
    marks = ["", "", "", ".", "!", ", two"]
    vocabulary = [
        " ".join(generator.choices(WORDS, k=generator.randint(1, 3))) + generator.choice(marks)
        for _ in range(11_000)
    ]
    weights = list(itertools.accumulate(1 / (place + 1) for place in range(len(vocabulary))))
    favourites = generator.choices(vocabulary, cum_weights=weights, k=num_questions)
    others = generator.choices(vocabulary, cum_weights=weights, k=10 * num_questions)
    answers = [
        [favourite if generator.random() < 0.7 else other for other in others[10 * i : 10 * i + 10]]
        for i, favourite in enumerate(favourites)
    ]
    return [generator.choice(given) for given in answers], answers


def vqa_row(num_questions: int) -> Row:
    """Our VQA accuracy beside the official algorithm, written out literally."""
    predictions, answers = made_up_answers(num_questions)
    ours = measured(lambda: vqa_accuracy(predictions, answers).overall)
    annotations = [
        [
            {"answer": text, "answer_confidence": "yes", "answer_id": place}
            for place, text in enumerate(given, 1)
        ]
        for given in answers
    ]
    theirs = measured(lambda: literal_vqa(predictions, annotations))
    return Row(
        f"VQA accuracy, {num_questions:,} questions",
        "official algorithm",
        theirs,
        ours,
        abs(ours.value - theirs.value),
    )


def literal_vqa(predictions: Sequence[str], annotations: Sequence[Sequence[Mapping[str, object]]]) -> float:
    """Cleans every answer, normalises where not all are equal, then leaves the annotators out one by one."""
    shares = []
    for prediction, given in zip(predictions, annotations):
        prediction = prediction.replace("\n", " ").replace("\t", " ").strip()
        for entry in given:
            entry["answer"] = entry["answer"].replace("\n", " ").replace("\t", " ").strip()
        if len({entry["answer"] for entry in given}) > 1:
            for entry in given:
                entry["answer"] = _literal_words(_literal_punctuation(entry["answer"]))
            prediction = _literal_words(_literal_punctuation(prediction))
        accuracies = []
        for left_out in given:
            others = [entry for entry in given if entry != left_out]
            matching = [entry for entry in others if entry["answer"] == prediction]
            accuracies.append(min(1.0, len(matching) / 3))
        shares.append(sum(accuracies) / len(accuracies))
    return 100 * sum(shares) / len(shares)


_MARKS = list(';/[]"{}()=+\\_-><@`,?!')
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
_COMMA = re.compile(r"(\d)(,)(\d)")
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
_NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}


def _literal_punctuation(text: str) -> str:
    result = text
    for mark in _MARKS:
        if (mark + " " in text or " " + mark in text) or _COMMA.search(text) is not None:
            result = result.replace(mark, "")
        else:
            result = result.replace(mark, " ")
    return _PERIOD.sub("", result, 32)


def _literal_words(text: str) -> str:
    words = []
    for word in text.lower().split():
        word = _NUMBERS.get(word, word)
        if word not in ["a", "an", "the"]:
            words.append(word)
    for place, word in enumerate(words):
        if word in CONTRACTIONS:
            words[place] = CONTRACTIONS[word]
    return " ".join(words)


def score_row(num_questions: int) -> Row:
    """The whole command: reads both official files and the submission, scores, computes chance, writes results."""
    predictions, answers = made_up_answers(num_questions)
    ids = [(262_148 + number // 3) * 1000 + number % 3 for number in range(num_questions)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        questions = [{"image_id": id // 1000, "question": "What is this?", "question_id": id} for id in ids]
        annotations = [
            {
                "question_id": id,
                "image_id": id // 1000,
                "question_type": f"what {id % 65}",
                "answer_type": "other",
                "answers": [
                    {"answer": text, "answer_confidence": "yes", "answer_id": place}
                    for place, text in enumerate(given, 1)
                ],
            }
            for id, given in zip(ids, answers)
        ]
        upload = [{"question_id": id, "answer": text} for id, text in zip(ids, predictions)]
        for file, content in (
            ("v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions}),
            ("v2_mscoco_val2014_annotations.json", {"annotations": annotations}),
            ("upload.json", upload),
        ):
            (folder / file).write_text(json.dumps(content))
        command = [sys.executable, "-m", "evaluation.score", "vqav2", "--data", name]
        command += ["--predictions", str(folder / "upload.json"), "--output", str(folder / "results.json")]
        root = Path(__file__).resolve().parents[1]
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        subprocess.run(command, check=True, cwd=root, timeout=600, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        peak = max(before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1024
        value = json.loads((folder / "results.json").read_text())["metrics"]["accuracy"]["value"]
    return Row(
        f"evaluation.score vqav2, {num_questions:,}",
        "-",
        None,
        Measured(seconds, peak, value),
        remark="whole process, goal 5 s",
    )


def visdial_row(num_dialogs: int) -> Row:
    """R@k, mean rank and MRR over ten rounds of every dialog, NDCG over one."""
    import torch

    torch.set_num_threads(1)
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(10 * num_dialogs, 100)).astype(np.float32)
    truth = rng.integers(0, 100, size=10 * num_dialogs)
    relevance = rng.choice([0.0, 0.2, 0.5, 1.0], p=[0.9, 0.04, 0.03, 0.03], size=(num_dialogs, 100))
    relevance[:, 0] = 1.0

    def ours_all() -> list[float]:
        sparse = sparse_scores(scores, truth)
        recalls = [sparse.recall_at_1, sparse.recall_at_5, sparse.recall_at_10]
        dense = ndcg_scores(scores[:num_dialogs], relevance)
        return [*recalls, sparse.mean_rank, sparse.mean_reciprocal_rank, dense.ndcg]

    ours = measured(ours_all)
    theirs = measured(lambda: literal_visdial(torch.from_numpy(scores), torch.from_numpy(truth), relevance))
    difference = max(abs(a - b) for a, b in zip(ours.value, theirs.value))
    return Row(
        f"VisDial sparse + NDCG, {10 * num_dialogs:,} rounds", "official algorithm", theirs, ours, difference
    )


def literal_visdial(scores: Tensor, truth: Tensor, relevance: np.ndarray) -> list[float]:
    """Fills a tensor of ranks entry by entry, takes the human answers' ranks, then sums the gains round by round."""
    import torch

    own = torch.stack([row[index] for row, index in zip(literal_ranks(scores), truth)]).float()
    recalls = [float((own <= k).float().mean()) for k in (1, 5, 10)]
    gains = torch.from_numpy(relevance).float()
    num_relevant = (gains != 0).sum(dim=-1)
    by_model = torch.sort(literal_ranks(scores[: len(gains)]), dim=-1).indices
    by_truth = torch.sort(gains, dim=-1, descending=True).indices

    def gain(order: Tensor, values: Tensor, k: Tensor) -> Tensor:
        kept = values[order[:k]]
        return (kept / torch.log2(torch.arange(len(kept)).float() + 2)).sum()

    values = []
    for row in range(len(gains)):
        k = num_relevant[row]
        values.append(gain(by_model[row], gains[row], k) / gain(by_truth[row], gains[row], k))
    return [*recalls, float(own.mean()), float(own.reciprocal().mean()), float(torch.stack(values).mean())]


def literal_ranks(scores: Tensor) -> Tensor:
    """Rank of each of the options, 1 for the best, by the nested loops of the official code: (N, 100) -> (N, 100)."""
    best_first = scores.sort(1, descending=True).indices
    ranks = best_first.clone().fill_(0)
    for row in range(best_first.size(0)):
        for place in range(best_first.size(1)):
            ranks[row][best_first[row][place]] = place
    return ranks + 1


def fid_row(width: int) -> Row:
    """Our Frechet distance beside scipy's matrix square root, for features of this width."""
    rng = np.random.default_rng(4)
    first, second = rng.normal(size=(2 * width, width)), rng.normal(0.1, 1.1, size=(2 * width, width))
    m1, m2, s1, s2 = first.mean(0), second.mean(0), np.cov(first.T), np.cov(second.T)
    ours = measured(lambda: frechet_distance(m1, s1, m2, s2))
    theirs, difference = None, None
    if importlib.util.find_spec("scipy") is not None:
        from scipy.linalg import sqrtm

        def with_scipy() -> float:
            trace = np.trace(sqrtm(s1 @ s2)).real
            return float((m1 - m2) @ (m1 - m2) + np.trace(s1) + np.trace(s2) - 2 * trace)

        theirs = measured(with_scipy)
        difference = abs(ours.value - theirs.value)
    return Row(f"Frechet distance, width {width}", "scipy.linalg.sqrtm", theirs, ours, difference)


JOBS: dict[str, Callable[[int], Row]] = {
    "tokenizer": tokenizer_row,
    "captions-5k": caption_row,
    "captions-40k": caption_row,
    "vqa": vqa_row,
    "score": score_row,
    "visdial": visdial_row,
    "fid": fid_row,
}


def line(name: str, row: Row) -> str:
    """A row as text of fixed columns, with the goal that was met or missed."""
    theirs_s = theirs_mb = times = "-"
    remark = row.remark
    if row.theirs is not None:
        ratio = row.theirs.seconds / row.ours.seconds
        theirs_s, theirs_mb, times = (
            f"{row.theirs.seconds:.2f}",
            f"{row.theirs.megabytes:.0f}",
            f"{ratio:.1f}",
        )
        if name in GOALS:
            remark = f"goal {GOALS[name]} x: {'met' if ratio >= GOALS[name] else 'MISSED'}"
    difference = "-" if row.largest_difference is None else f"{row.largest_difference:.1e}"
    return (
        f"{row.job:38}{row.reference:20}{theirs_s:>9}{row.ours.seconds:>9.3f}{times:>8}{theirs_mb:>8}"
        f"{row.ours.megabytes:>7.0f}{difference:>9}  {remark}"
    )


def main() -> None:
    """Command line: runs each job in both implementations and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--small", action="store_true", help="a twentieth of the work: does it run at all")
    options = parser.parse_args()
    heading = f"{'job':38}{'reference':20}{'ref. s':>9}{'ours s':>9}{'times':>8}{'ref. MB':>8}{'ours':>7}{'diff.':>9}"
    print(heading, flush=True)
    for name in options.only:
        print(line(name, JOBS[name](SIZES[name][options.small])), flush=True)


if __name__ == "__main__":
    main()
