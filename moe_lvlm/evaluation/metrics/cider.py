"""CIDEr-D: captions beside those of several people, by n-grams that count the more the fewer images have them.

Legend: C reference captions, E entries (an n-gram of a caption), V different n-grams, N = 4 lengths of n-grams.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from moe_lvlm.evaluation.metrics.caption_words import caption_words
from moe_lvlm.evaluation.metrics.outcome import Metric, Outcome, Truth

MAX_LENGTH = 4
SIGMA = 6.0
NUM_CANDIDATES = 100

NGram = tuple[str, ...]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def ngrams(words: Sequence[str]) -> Iterator[NGram]:
    """All runs of one to four words."""
    for length in range(1, MAX_LENGTH + 1):
        for start in range(len(words) - length + 1):
            yield tuple(words[start : start + length])


class References:
    """A set's reference captions as tf-idf vectors, and what other captions score beside them.

    Source: CIDEr-D (Vedantam et al. 2015), as pycocoevalcap computes it: idf = log(images / images in whose references
    the n-gram is, at least 1); for each n the cosine of the two vectors, the caption's weights clipped to the
    reference's; mean over n; times exp(-difference of lengths^2 / (2 * 6^2)); mean over an image's references; x 10.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        """references: by image, at least one each."""
        words = [caption_words(caption) for captions in references for caption in captions]
        sizes = np.array([len(captions) for captions in references])
        self._captions = words
        self._bounds = np.concatenate(([0], np.cumsum(sizes)))
        self._image_C = np.repeat(np.arange(len(sizes)), sizes)
        self._share_C = 1.0 / (sizes[self._image_C] * len(sizes))
        self._length_C = np.array([_length(caption) for caption in words])

        self._places: dict[NGram, int] = {}
        counts = [Counter(self._places.setdefault(ngram, len(self._places)) for ngram in ngrams(w)) for w in words]
        self._caption_E = np.repeat(np.arange(len(words)), [len(count) for count in counts])
        self._place_E = _ints(place for count in counts for place in count)
        self._n_V = _ints(len(ngram) - 1 for ngram in self._places)

        self._rarest = math.log(len(sizes))
        image_and_place = np.unique(self._image_C[self._caption_E] * len(self._places) + self._place_E)
        frequency_V = np.bincount(image_and_place % len(self._places), minlength=len(self._places))
        # the logarithm of a quotient, so that it is 0, and no rounding error, of what all images have
        self._idf_V: Floats = np.log(len(sizes) / frequency_V)
        self._weight_E = _ints(times for count in counts for times in count.values()) * self._idf_V[self._place_E]
        self._norm_CN = np.sqrt(self._sums_CN(slice(0, len(words)), self._weight_E**2))

    def score(self, caption: str, image: int) -> float:
        """A caption's CIDEr-D beside the references of one image: 0 to 10."""
        captions = slice(int(self._bounds[image]), int(self._bounds[image + 1]))
        return float(self._similarity_C(caption_words(caption), captions).mean())

    def best_constant(self) -> float:
        """The mean score of the best caption to give for every image.

        Tried are the 100 references that are most like all others: by the same measure without clipping and lengths,
        which is a product with the mean of all vectors. Equal ones in alphabetical order.
        """
        norm_E = self._norm_CN[self._caption_E, self._n_V[self._place_E]]
        unit_E = np.divide(self._weight_E, norm_E, out=np.zeros_like(norm_E), where=norm_E > 0)
        mean_V = np.bincount(self._place_E, unit_E * self._share_C[self._caption_E], len(self._places))
        likeness_C = np.bincount(self._caption_E, unit_E * mean_V[self._place_E], len(self._captions))
        likeness = {tuple(words): float(value) for words, value in zip(self._captions, likeness_C, strict=True)}
        candidates = sorted(likeness, key=lambda words: (-round(likeness[words], 9), words))[:NUM_CANDIDATES]
        everything = slice(0, len(self._captions))
        return max(float(self._similarity_C(words, everything) @ self._share_C) for words in candidates)

    def _similarity_C(self, words: Sequence[str], captions: slice) -> Floats:
        """One caption beside each of some references."""
        weight_V = np.zeros(len(self._places))
        norm_N = np.zeros(MAX_LENGTH)
        for ngram, count in Counter(ngrams(words)).items():
            place = self._places.get(ngram)
            weight = count * (self._rarest if place is None else self._idf_V[place])
            norm_N[len(ngram) - 1] += weight**2
            if place is not None:
                weight_V[place] = weight
        entries = self._entries(captions)
        reference_E = self._weight_E[entries]
        product_CN = self._sums_CN(captions, np.minimum(weight_V[self._place_E[entries]], reference_E) * reference_E)
        scale_CN = np.sqrt(norm_N) * self._norm_CN[captions]
        cosine_CN = np.divide(product_CN, scale_CN, out=np.zeros_like(product_CN), where=scale_CN > 0)
        difference_C = self._length_C[captions] - _length(words)
        return 10 * cosine_CN.mean(axis=1) * np.exp(-(difference_C**2) / (2 * SIGMA**2))

    def _entries(self, captions: slice) -> slice:
        start, stop = np.searchsorted(self._caption_E, (captions.start, captions.stop))
        return slice(int(start), int(stop))

    def _sums_CN(self, captions: slice, value_E: Floats) -> Floats:
        """Sums of these captions' entries, by caption and length of n-gram."""
        entries = self._entries(captions)
        cell_E = (self._caption_E[entries] - captions.start) * MAX_LENGTH + self._n_V[self._place_E[entries]]
        num_captions = captions.stop - captions.start
        sums = np.bincount(cell_E, value_E, num_captions * MAX_LENGTH).astype(np.float64, copy=False)
        return sums.reshape(num_captions, MAX_LENGTH)


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """The CIDEr-D of each image's caption, 0 to 10; their mean is the set's. references: by image."""
    known = References(references)
    return [known.score(caption, image) for image, caption in enumerate(captions)]


def _length(words: Sequence[str]) -> int:
    """Two-word runs, by which the published code compares lengths: so no words and one word are the same."""
    return max(len(words) - 1, 0)


def _ints(values: Iterator[int]) -> Ints:
    return np.fromiter(values, dtype=np.int64)


def _details(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Mean numbers of words: a model that goes on and on shows here."""
    said = [len(caption_words(outcome.prediction)) for outcome in outcomes]
    wanted = [len(caption_words(caption)) for outcome in outcomes for caption in outcome.truth.references]
    return {"words": sum(said) / len(said), "reference_words": sum(wanted) / len(wanted)}


def _check(truth: Truth) -> None:
    if not any(map(caption_words, truth.references)):
        raise ValueError(f"references: {list(truth.references)}; allowed: at least one caption with a word in it")


def _check_set(truths: Sequence[Truth]) -> None:
    if len(truths) < 2:
        raise ValueError(
            f"references: of {len(truths)} image; allowed: at least 2, since n-grams count by how few images have them"
        )


CIDER = Metric(
    credits=lambda outcomes: cider(
        [outcome.prediction for outcome in outcomes], [outcome.truth.references for outcome in outcomes]
    ),
    majority=lambda truths: References([truth.references for truth in truths]).best_constant(),
    check=_check,
    check_set=_check_set,
    details=_details,
    is_soft=True,
    right_from=None,
)
