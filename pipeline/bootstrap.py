"""95 % confidence intervals by resampling patients, whose slices and studies are alike and so count together or not at all.

A resample is a count a patient: how often it was drawn. Every figure is made from these counts and from what was sorted or
summed once, so that no resample sorts anything (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13).
All figures are made from the same draws, so that differences between them have intervals too.

Axes: N rows, P patients, D draws (resamples), K figures.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from pipeline.progress import Progress

BLOCK = 50
"""Draws at once: 8 MB of counts for the 18,938 patients of RSNA's training set."""

LEVEL = 0.95

MOST_UNDEFINED = 0.08
"""A figure that more draws than this cannot give has no interval. Of three positive patients all are missed by 5 % of the draws, of
two by 13: three are enough, two are not."""

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Key = TypeVar("Key", bound=Hashable)


class Statistic(Protocol):
    """Figures by name, float64 [D] each, of draws: float64 [D, P], how often each patient was drawn."""

    def of(self, counts_DP: Floats) -> dict[str, Floats]: ...


class Ratios:
    """Figures that are a sum over rows by another sum over rows: means, rates, F1.

    Args:
        parts: by name, numerator and denominator of each row, [N].
        patient_N: number of each row's patient, 0 to P − 1.
        patients: P.
    """

    def __init__(
        self,
        parts: Mapping[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]],
        *,
        patient_N: npt.NDArray[np.int64],
        patients: int,
    ) -> None:
        self.names = list(parts)
        sums = [np.bincount(patient_N, row_N, patients) for pair in parts.values() for row_N in pair]
        self.sums_PK = np.stack(sums, axis=1) if sums else np.zeros((patients, 0))

    def of(self, counts_DP: Floats) -> dict[str, Floats]:
        sums_DK = counts_DP @ self.sums_PK
        with np.errstate(invalid="ignore", divide="ignore"):  # a draw without the denominator's rows: undefined, NaN
            ratios_DK = sums_DK[:, ::2] / sums_DK[:, 1::2]
        return dict(zip(self.names, ratios_DK.T, strict=True))


class Ranked:
    """AUC and average precision, from ranks that are found once.

    The AUC is the share of pairs of a positive and a negative that are in order, ties half; average precision is the mean, over the
    positives, of the precision at each one's probability. Both need, at each positive, how many positives and how many
    negatives (by draw count) score at least as high: cumulative sums of the counts, read at places known beforehand.

    Args:
        truth: bool [N].
        score: [N], higher is likelier.
        patient_N: number of each row's patient, 0 to P − 1.
    """

    def __init__(self, truth: Bools, score: npt.NDArray[Any], *, patient_N: npt.NDArray[np.int64]) -> None:
        score = np.asarray(score, np.float64)
        up = np.argsort(score, kind="stable")
        positive, negative = up[truth[up]][::-1], up[~truth[up]][::-1]  # the likeliest first
        self.positive_patient, self.negative_patient = patient_N[positive], patient_N[negative]
        at = score[positive]
        negatives, positives = -score[negative], -at  # ascending, as searchsorted wants it
        self.higher = np.searchsorted(negatives, -at, "left")
        self.as_high = np.searchsorted(negatives, -at, "right")
        self.found = np.searchsorted(positives, -at, "right") - 1
        self.running = np.zeros(len(negative) + 1)

    def of(self, counts_DP: Floats) -> dict[str, Floats]:
        pairs = np.array([self._one(counts_P) for counts_P in counts_DP]).reshape(-1, 2)
        return {"auc": pairs[:, 0], "average_precision": pairs[:, 1]}

    def _one(self, counts_P: Floats) -> tuple[float, float]:
        np.cumsum(counts_P[self.negative_patient], out=self.running[1:])
        positive = counts_P[self.positive_patient]
        positives, negatives = positive.sum(), self.running[-1]
        if not positives or not negatives:
            return np.nan, np.nan
        as_high = self.running[self.as_high]
        found = np.cumsum(positive)[self.found]
        disordered = (positive * (self.running[self.higher] + as_high)).sum() / 2
        precision = found / np.maximum(found + as_high, 1)  # 0 by 0 only where the positive itself was not drawn
        return 1 - disordered / (positives * negatives), (positive * precision).sum() / positives


def draw(patients: int, *, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each patient is drawn when as many patients as there are get drawn with replacement: float64 [≤ BLOCK, P]."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, BLOCK):
        rows = min(BLOCK, resamples - start)
        drawn = rng.integers(patients, size=(rows, patients)) + np.arange(rows)[:, None] * patients
        yield np.bincount(drawn.ravel(), minlength=rows * patients).reshape(rows, patients).astype(np.float64)


def resample(
    statistics: Mapping[Key, Statistic], *, patients: int, resamples: int, seed: int
) -> dict[Key, dict[str, Floats]]:
    """Every figure of every statistic in each of the same draws, float64 [D]; NaN where a draw cannot give it."""
    blocks: dict[Key, list[dict[str, Floats]]] = {key: [] for key in statistics}
    with Progress(resamples, what="bootstrap", unit="resamples") as progress:
        for counts_DP in draw(patients, resamples=resamples, seed=seed):
            for key, statistic in statistics.items():
                blocks[key].append(statistic.of(counts_DP))
            progress.advance(len(counts_DP))
    return {
        key: {name: np.concatenate([block[name] for block in found]) for name in found[0]}
        for key, found in blocks.items()
    }


def interval(values_D: Floats) -> list[float] | None:
    """The middle 95 % of the draws that have the figure, by the percentile method.

    Returns:
        Lowest and highest; None if too many draws lack the figure, or if it is the same in all of the middle: where 14 of 14
        were found, every draw finds all, which says nothing of how sure that is.
    """
    defined = values_D[np.isfinite(values_D)]
    if not len(defined) or len(defined) < (1 - MOST_UNDEFINED) * len(values_D):
        return None
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)] if low < high else None
