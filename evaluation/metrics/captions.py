"""CIDEr-D, BLEU-1..4 and ROUGE-L of whole caption sets, equal to pycocoevalcap 1.2 within rounding.

N-grams become integers once and their counts serve CIDEr and BLEU alike, so 5,000 images take about a second.
All are corpus measures: gather the captions of all processes before scoring. CIDEr takes its word weights from the
references of the scored images, so the mean of two halves is not the score of the whole, and one image scores 0.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from evaluation.metrics.ptb import TokenizerName, tokenize

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Id = TypeVar("Id", bound=Hashable)

MAX_ORDER = 4
# as in pycocoevalcap: width of CIDEr-D's length penalty, and how much ROUGE-L prefers recall
_CIDER_SIGMA = 6.0
_ROUGE_BETA = 1.2
# BLEU's guards against zero, as in pycocoevalcap
_TINY, _SMALL = 1e-15, 1e-9


@dataclass(frozen=True)
class CaptionScores:
    """Scores as fractions (multiply by 100 to report); `per_image` follows `image_ids`."""

    image_ids: Sequence[Hashable]
    corpus: dict[str, float]
    per_image: dict[str, list[float]] = field(repr=False)


def score_captions(
    hypotheses: Mapping[Id, str],
    references: Mapping[Id, Sequence[str]],
    *,
    tokenizer: TokenizerName = "python",
) -> CaptionScores:
    """Tokenise raw captions as COCO does, then score them; see `score_tokenized`."""
    _check(hypotheses, references)
    image_ids = list(references)
    found = iter(tokenize([text for image in image_ids for text in references[image]], tokenizer=tokenizer))
    tokenized_references = {image: [next(found) for _ in references[image]] for image in image_ids}
    answers = tokenize([hypotheses[image] for image in image_ids], tokenizer=tokenizer)
    return score_tokenized(dict(zip(image_ids, answers)), tokenized_references)


def score_tokenized(hypotheses: Mapping[Id, str], references: Mapping[Id, Sequence[str]]) -> CaptionScores:
    """Score captions that are tokenised already: one string per image against its reference strings.

    Raises ValueError where the image ids of both differ, there are no images, or an image has no reference;
    TypeError where a hypothesis is not one string or the references of an image are.
    """
    _check(hypotheses, references)
    image_ids = list(references)
    answers = [hypotheses[image] for image in image_ids]
    targets = [list(references[image]) for image in image_ids]
    counts = _NgramCounts.of(answers, targets)
    per_image: dict[str, Floats] = {}
    corpus: dict[str, float] = {}
    bleu_images, bleu_corpus = _bleu(counts)
    for order in range(1, MAX_ORDER + 1):
        per_image[f"Bleu_{order}"] = bleu_images[order - 1]
        corpus[f"Bleu_{order}"] = float(bleu_corpus[order - 1])
    per_image["ROUGE_L"] = np.array([_rouge_l(answer, refs) for answer, refs in zip(answers, targets)])
    per_image["CIDEr"] = _cider(counts)
    for name in ("ROUGE_L", "CIDEr"):
        corpus[name] = float(per_image[name].mean())
    return CaptionScores(image_ids, corpus, {name: values.tolist() for name, values in per_image.items()})


def _check(hypotheses: Mapping[Id, str], references: Mapping[Id, Sequence[str]]) -> None:
    if not references:
        raise ValueError("no images to score")
    if hypotheses.keys() != references.keys():
        missing = list(references.keys() - hypotheses.keys())
        extra = list(hypotheses.keys() - references.keys())
        raise ValueError(
            f"{len(missing)} images have no caption (first: {missing[:3]}) and {len(extra)} captions have no "
            f"references (first: {extra[:3]}); merge all processes' predictions first"
        )
    for image, texts in references.items():
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"references of image {image!r} are {texts!r}; wanted a list of strings")
        if not texts:
            raise ValueError(f"image {image!r} has no reference caption")
    for image, answer in hypotheses.items():
        if not isinstance(answer, str):
            raise TypeError(f"caption of image {image!r} is {answer!r}; wanted one string")


@dataclass(frozen=True)
class _NgramCounts:
    """Counts of all n-grams in all captions, one entry per (caption, n-gram), sorted.

    Captions are numbered hypotheses first: 0 .. num_images - 1, then the references image by image. The same
    words have the same n-gram number in all captions. Shapes: `image_of` and `num_words` (captions,);
    `caption`, `ngram` and `count` (entries,); `order_of` (n-grams,), from 1 to MAX_ORDER.
    """

    num_images: int
    image_of: Ints
    num_words: Ints
    caption: Ints
    ngram: Ints
    count: Ints
    order_of: Ints

    @classmethod
    def of(cls, answers: Sequence[str], targets: Sequence[Sequence[str]]) -> _NgramCounts:
        texts = [*answers, *(text for refs in targets for text in refs)]
        split = [text.split() for text in texts]
        vocabulary: dict[str, int] = {}
        words = np.array(
            [vocabulary.setdefault(word, len(vocabulary)) for one in split for word in one], dtype=np.int64
        )
        num_words = np.array([len(one) for one in split], dtype=np.int64)
        caption_of_word = np.repeat(np.arange(len(texts)), num_words)
        words_left = np.repeat(np.cumsum(num_words), num_words) - np.arange(len(words))
        image_of = np.concatenate(
            [np.arange(len(answers)), np.repeat(np.arange(len(targets)), [len(refs) for refs in targets])]
        )
        entries, order_of = _count_ngrams(words, caption_of_word, words_left, max(len(vocabulary), 1))
        caption, ngram, count = entries
        return cls(len(answers), image_of, num_words, caption, ngram, count, order_of)

    @cached_property
    def in_references(self) -> tuple[Ints, Ints]:
        """Each n-gram of each image's references once: sorted image * num_ngrams + n-gram, and its highest count."""
        is_reference = self.caption >= self.num_images
        width = max(len(self.order_of), 1)
        keys = self.image_of[self.caption[is_reference]] * width + self.ngram[is_reference]
        # Nearly sorted already (one run for each reference), where numpy's stable sort is fastest.
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        first = np.flatnonzero(np.diff(keys, prepend=-1))
        count = self.count[is_reference][order]
        return keys[first], np.maximum.reduceat(count, first) if len(first) else count


def _count_ngrams(
    words: Ints, caption: Ints, words_left: Ints, num_words: int
) -> tuple[tuple[Ints, Ints, Ints], Ints]:
    """(words,) x 3 -> (entries,) x 3 caption, n-gram and count; (n-grams,) order of each n-gram."""
    starts = np.arange(len(words))
    # Number of the n-gram one word shorter that begins at each word: an n-gram is that number and one more word,
    # so every order needs only one sort of integers.
    shorter = np.zeros(len(words), dtype=np.int64)
    captions, ngrams, orders = [], [], []
    num_ngrams = 0
    for order in range(1, MAX_ORDER + 1):
        starts = starts[words_left[starts] >= order]
        unique, number = np.unique(
            shorter[starts] * num_words + words[starts + order - 1], return_inverse=True
        )
        shorter[starts] = number
        captions.append(caption[starts])
        ngrams.append(number.astype(np.int64) + num_ngrams)
        orders.append(np.full(len(unique), order))
        num_ngrams += len(unique)
    width = max(num_ngrams, 1)
    keys, count = np.unique(np.concatenate(captions) * width + np.concatenate(ngrams), return_counts=True)
    return (keys // width, keys % width, count.astype(np.int64)), np.concatenate(orders)


def _find(keys: Ints, wanted: Ints) -> tuple[NDArray[np.bool_], Ints]:
    """Which of `wanted` are in sorted `keys`, and where: (w,) -> (w,) bool, (w,) index."""
    place = np.searchsorted(keys, wanted)
    place[place == len(keys)] = 0
    return (keys[place] == wanted if len(keys) else np.zeros(len(wanted), dtype=bool)), place


def _cider(counts: _NgramCounts) -> Floats:
    """CIDEr-D per image: cosine of idf-weighted n-gram counts, clipped to the reference's, length penalty."""
    num_images, width = counts.num_images, max(len(counts.order_of), 1)
    image = counts.image_of[counts.caption]
    is_reference = counts.caption >= num_images
    frequency = np.bincount(counts.in_references[0] % width, minlength=width)
    # An n-gram of no reference counts as if one image had it, so its weight is finite and the highest.
    weight = counts.count * (np.log(float(num_images)) - np.log(np.maximum(frequency, 1.0)))[counts.ngram]
    order = counts.order_of[counts.ngram] - 1
    slots = len(counts.image_of) * MAX_ORDER
    norm = np.sqrt(np.bincount(counts.caption * MAX_ORDER + order, weight**2, minlength=slots))

    answer_keys = counts.caption[~is_reference] * width + counts.ngram[~is_reference]
    # Only n-grams that caption and reference share add to the cosine.
    is_shared, place = _find(answer_keys, image[is_reference] * width + counts.ngram[is_reference])
    theirs = weight[is_reference][is_shared]
    ours = weight[~is_reference][place[is_shared]]
    slot = (counts.caption * MAX_ORDER + order)[is_reference][is_shared]
    # CIDEr-D clips a count to the reference's, so that repeating a word gains nothing.
    dot = np.bincount(slot, np.minimum(ours, theirs) * theirs, minlength=slots).astype(np.float64)

    shape = (-1, MAX_ORDER)
    dot, norm = dot.reshape(shape)[num_images:], norm.reshape(shape)
    own_image = counts.image_of[num_images:]
    scale = norm[own_image] * norm[num_images:]
    cosine = np.divide(dot, scale, out=dot.copy(), where=scale != 0)
    # UPSTREAM: the length of a caption is its number of bigrams (cider_scorer.py, counts2vec).
    num_bigrams = np.maximum(counts.num_words - 1, 0)
    difference = (num_bigrams[own_image] - num_bigrams[num_images:]).astype(np.float64)
    similarity = cosine.mean(axis=1) * np.exp(-(difference**2) / (2 * _CIDER_SIGMA**2))
    return 10.0 * np.bincount(own_image, similarity, minlength=num_images) / np.bincount(own_image)


def _bleu(counts: _NgramCounts) -> tuple[Floats, Floats]:
    """BLEU of orders 1 .. MAX_ORDER: (orders, images) and (orders,) for the corpus."""
    num_images, width = counts.num_images, max(len(counts.order_of), 1)
    is_reference = counts.caption >= num_images
    unique, largest = counts.in_references
    answer, ngram, count = (values[~is_reference] for values in (counts.caption, counts.ngram, counts.count))
    is_shared, place = _find(unique, answer * width + ngram)
    matched = np.minimum(count[is_shared], largest[place[is_shared]])
    slot = answer[is_shared] * MAX_ORDER + counts.order_of[ngram[is_shared]] - 1
    sums = np.bincount(slot, matched, minlength=num_images * MAX_ORDER).astype(np.float64)
    correct = sums.reshape(num_images, MAX_ORDER).T

    length = counts.num_words[:num_images]
    guesses = np.maximum(length[None] - np.arange(MAX_ORDER)[:, None], 0)
    closest = _closest_reference_length(counts)
    images = _bleu_of_counts(correct, guesses, length, closest)
    total = _bleu_of_counts(correct.sum(1), guesses.sum(1), length.sum(), closest.sum())
    return images, total


def _bleu_of_counts(
    correct: Floats, guesses: Ints, length: Ints | np.int64, target: Ints | np.int64
) -> Floats:
    """(orders, ...) matches and guesses, (...) lengths -> (orders, ...)."""
    product = np.cumprod((correct + _TINY) / (guesses + _SMALL), axis=0)
    roots = np.stack([product[order] ** (1.0 / (order + 1)) for order in range(MAX_ORDER)])
    ratio = np.asarray((length + _TINY) / (target + _SMALL))
    brevity = np.exp(1 - 1 / np.minimum(ratio, 1.0))
    return roots * brevity


def _closest_reference_length(counts: _NgramCounts) -> Ints:
    """Length of the reference nearest to the caption's, the shorter one in a draw: -> (images,)."""
    own_image = counts.image_of[counts.num_images :]
    lengths = counts.num_words[counts.num_images :]
    distance = np.abs(lengths - counts.num_words[own_image])
    best = np.lexsort((lengths, distance, own_image))
    first = np.searchsorted(own_image[best], np.arange(counts.num_images))
    return lengths[best][first]


def _rouge_l(answer: str, references: Sequence[str]) -> float:
    # UPSTREAM: splits at single spaces only, so an empty caption is one empty word and a token with a
    # no-break space stays whole; best precision and best recall may come from different references.
    words = answer.split(" ")
    masks: dict[str, int] = {}
    for index, word in enumerate(words):
        masks[word] = masks.get(word, 0) | (1 << index)
    precision = recall = 0.0
    for reference in references:
        others = reference.split(" ")
        common = _longest_common(masks, len(words), others)
        precision = max(precision, common / len(words))
        recall = max(recall, common / len(others))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + _ROUGE_BETA**2) * precision * recall / (recall + _ROUGE_BETA**2 * precision)


def _longest_common(masks: Mapping[str, int], num_words: int, others: Sequence[str]) -> int:
    """Length of the longest common subsequence; `masks` has the places of each word as bits (Hyyro 2004)."""
    # One addition of integers does a whole row of the usual table.
    full = (1 << num_words) - 1
    row = full
    for word in others:
        hits = row & masks.get(word, 0)
        row = ((row + hits) | (row - hits)) & full
    return num_words - row.bit_count()
