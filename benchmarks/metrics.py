"""Seconds of our metrics beside the implementations they equal, on made-up data of the benchmarks' sizes.

    OMP_NUM_THREADS=1 python benchmarks/metrics.py

One run each, wall clock, both sides in the same process one after the other, so a busy machine slows
both. Not run: pycocoevalcap, java and scipy where they are not installed, and slow loops at the full size of
a benchmark. The other references are literal re-statements, in our words, of what the official scripts do.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from evaluation.metrics import ptb
from evaluation.metrics.captions import score_tokenized
from evaluation.metrics.fid import frechet_distance
from evaluation.metrics.visdial import ndcg_scores, ranks_of
from evaluation.metrics.vqa import vqa_accuracy
from evaluation.metrics.vqa_text import CONTRACTIONS

NUM_VQA_QUESTIONS = 214_354  # VQAv2 val
NUM_VISDIAL_ROUNDS = 20_640  # VisDial 1.0 val
WORDS = """
    a the man woman dog cat on in with of red blue bus street table two three sitting standing next to
    large small people white black train plate pizza tennis court holding playing field near
    water his her is are and
""".strip().split()


class Row(NamedTuple):
    job: str
    reference: str
    reference_s: float | None  # None: not run
    ours_s: float
    largest_difference: float | None


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = call()
    return time.perf_counter() - start, value


def made_up_captions(count: int, generator: random.Random) -> list[str]:
    starts = ["A man's", "The dog's", "Two people,", "An e-mail", "It isn't a", "a"]
    return [
        f"{generator.choice(starts)} {' '.join(generator.choices(WORDS, k=generator.randint(7, 12)))}."
        for _ in range(count)
    ]


def tokenizer_row(num_captions: int) -> Row:
    captions = made_up_captions(num_captions, random.Random(0))
    ours_s, ours = timed(lambda: ptb.tokenize(captions))
    job, reference = f"PTB tokens, {num_captions:,} captions", "Java tokenizer (with its start)"
    if ptb.find_java_tokenizer() is None:
        return Row(job, reference, None, ours_s, None)
    java_s, java = timed(lambda: ptb.tokenize(captions, tokenizer="java"))
    return Row(job, reference, java_s, ours_s, float(sum(map(str.__ne__, ours.captions, java.captions))))


def caption_row(num_images: int) -> Row:
    generator = random.Random(1)
    hypotheses = dict(enumerate(ptb.tokenize(made_up_captions(num_images, generator)).captions))
    flat = ptb.tokenize(made_up_captions(5 * num_images, generator)).captions
    references = {image: flat[5 * image : 5 * image + 5] for image in range(num_images)}
    ours_s, ours = timed(lambda: score_tokenized(hypotheses, references))
    job, reference = f"BLEU + ROUGE_L + CIDEr, {num_images:,} x 5", "pycocoevalcap"
    if importlib.util.find_spec("pycocoevalcap") is None:
        return Row(job, reference, None, ours_s, None)
    theirs_s, theirs = timed(lambda: _pycocoevalcap(hypotheses, references))
    return Row(
        job, reference, theirs_s, ours_s, max(abs(ours.corpus[name] - theirs[name]) for name in theirs)
    )


def _pycocoevalcap(hypotheses: dict[int, str], references: dict[int, list[str]]) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    given = {image: [text] for image, text in hypotheses.items()}
    bleu, _ = Bleu(4).compute_score(references, given, verbose=0)
    scores = {f"Bleu_{order}": value for order, value in enumerate(bleu, start=1)}
    scores["ROUGE_L"], _ = Rouge().compute_score(references, given)
    scores["CIDEr"], _ = Cider().compute_score(references, given)
    return scores


def vqa_row(num_questions: int, *, has_reference: bool) -> Row:
    generator = random.Random(2)
    vocabulary = [
        " ".join(generator.choices(WORDS, k=generator.randint(1, 3))) + generator.choice(["", ".", "!"])
        for _ in range(9000)
    ]
    answers = []
    for _ in range(num_questions):
        favourite = generator.choice(vocabulary)
        answers.append(
            [favourite if generator.random() < 0.7 else generator.choice(vocabulary) for _ in range(10)]
        )
    predictions = [generator.choice(given) for given in answers]
    ours_s, ours = timed(lambda: vqa_accuracy(predictions, answers, mode="always"))
    job, reference = f"VQA accuracy, {num_questions:,} questions", "literal loop over annotators"
    if not has_reference:
        return Row(job, reference, None, ours_s, None)
    theirs_s, theirs = timed(lambda: literal_vqa(predictions, answers))
    return Row(job, reference, theirs_s, ours_s, abs(ours.overall - theirs))


def literal_vqa(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Normalises every answer of every question anew and leaves the annotators out one by one."""
    shares = []
    for prediction, given in zip(predictions, answers):
        normal = [_literal_normalise(answer) for answer in given]
        wanted = _literal_normalise(prediction)
        accuracies = []
        for left_out in range(len(normal)):
            others = [answer for index, answer in enumerate(normal) if index != left_out]
            accuracies.append(min(1.0, len([answer for answer in others if answer == wanted]) / 3))
        shares.append(sum(accuracies) / len(accuracies))
    return 100 * sum(shares) / len(shares)


def _literal_normalise(text: str) -> str:
    text = text.replace("\n", " ").replace("\t", " ").strip()
    result = text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        if mark + " " in text or " " + mark in text or re.search(r"(\d)(,)(\d)", text) is not None:
            result = result.replace(mark, "")
        else:
            result = result.replace(mark, " ")
    result = re.sub(r"(?!<=\d)(\.)(?!\d)", "", result, count=32)
    numbers = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
    numbers |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
    words = [numbers.get(word, word) for word in result.lower().split()]
    words = [word for word in words if word not in ["a", "an", "the"]]
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


def visdial_row(num_rounds: int, *, has_reference: bool) -> Row:
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(num_rounds, 100))
    relevance = rng.choice([0.0, 0.2, 0.5, 1.0], p=[0.9, 0.04, 0.03, 0.03], size=scores.shape)
    relevance[:, 0] = 1.0
    ours_s, (ours_ranks, ours) = timed(lambda: (ranks_of(scores), ndcg_scores(scores, relevance)))
    job, reference = f"VisDial ranks + NDCG, {num_rounds:,} rounds", "literal loop over options"
    if not has_reference:
        return Row(job, reference, None, ours_s, None)
    theirs_s, (ranks, mean) = timed(lambda: literal_visdial(scores, relevance))
    difference = max(abs(ours.ndcg - mean), float(np.abs(ours_ranks - ranks).max()))
    return Row(job, reference, theirs_s, ours_s, difference)


def literal_visdial(scores: np.ndarray, relevance: np.ndarray) -> tuple[np.ndarray, float]:
    """Fills the ranks one option at a time, then sums the gains of each round."""
    ranks = np.zeros(scores.shape, dtype=int)
    values = []
    for row in range(len(scores)):
        best_first = sorted(range(scores.shape[1]), key=lambda option: -scores[row][option])
        for place, option in enumerate(best_first):
            ranks[row][option] = place + 1
        num_relevant = int((relevance[row] != 0).sum())
        gains = [
            relevance[row][option] / np.log2(place + 2)
            for place, option in enumerate(best_first[:num_relevant])
        ]
        best = sorted(relevance[row], reverse=True)[:num_relevant]
        values.append(sum(gains) / sum(gain / np.log2(place + 2) for place, gain in enumerate(best)))
    return ranks, float(np.mean(values))


def fid_row(width: int) -> Row:
    rng = np.random.default_rng(4)
    first, second = rng.normal(size=(2 * width, width)), rng.normal(0.1, 1.1, size=(2 * width, width))
    m1, m2, s1, s2 = first.mean(0), second.mean(0), np.cov(first.T), np.cov(second.T)
    ours_s, ours = timed(lambda: frechet_distance(m1, s1, m2, s2))
    job, reference = f"Frechet distance, width {width}", "scipy.linalg.sqrtm (pytorch-fid)"
    if importlib.util.find_spec("scipy") is None:
        return Row(job, reference, None, ours_s, None)
    from scipy.linalg import sqrtm

    theirs_s, root = timed(lambda: sqrtm(s1 @ s2))
    theirs = (m1 - m2) @ (m1 - m2) + np.trace(s1) + np.trace(s2) - 2 * np.trace(root).real
    return Row(job, reference, theirs_s, ours_s, abs(ours - float(theirs)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--captions", type=int, default=25_000, help="captions for the tokenizers")
    parser.add_argument("--images", type=int, default=5_000, help="images with 5 references each")
    parser.add_argument("--questions", type=int, default=20_000, help="VQA questions, both sides")
    parser.add_argument("--rounds", type=int, default=2_000, help="VisDial rounds, both sides")
    parser.add_argument("--width", type=int, default=2048, help="feature width of the Frechet distance")
    options = parser.parse_args()
    jobs: list[Callable[[], Row]] = [
        lambda: tokenizer_row(options.captions),
        lambda: caption_row(options.images),
        lambda: vqa_row(options.questions, has_reference=True),
        lambda: vqa_row(NUM_VQA_QUESTIONS, has_reference=False),
        lambda: visdial_row(options.rounds, has_reference=True),
        lambda: visdial_row(NUM_VISDIAL_ROUNDS, has_reference=False),
        lambda: fid_row(options.width),
    ]
    print(f"{'job':42}{'reference':36}{'reference s':>12}{'ours s':>9}{'times':>8}{'difference':>12}")
    for job in jobs:
        row = job()
        missing = row.reference_s is None
        theirs = "not run" if row.reference_s is None else f"{row.reference_s:.2f}"
        times = "-" if row.reference_s is None else f"{row.reference_s / row.ours_s:.1f}"
        difference = "-" if missing or row.largest_difference is None else f"{row.largest_difference:.1e}"
        print(
            f"{row.job:42}{row.reference:36}{theirs:>12}{row.ours_s:>9.2f}{times:>8}{difference:>12}",
            flush=True,
        )


if __name__ == "__main__":
    main()
