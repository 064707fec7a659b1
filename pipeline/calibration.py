"""Whether probabilities mean what they say: reliability in bins, the expected calibration error, and temperature scaling.

Guo et al., On Calibration of Modern Neural Networks (ICML 2017): a logit is divided by one number, the temperature, that is
fitted on other data. The order of the probabilities stays, thus every AUC does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BINS = 15
"""Equally wide, from 0 to 1, as by Guo et al., so that errors can be compared with published ones."""

CERTAIN = 1e-7
"""Probabilities are kept so far from 0 and 1 before a logit is taken: nearer, float32 cannot tell them from 0 and 1."""

TEMPERATURES = (0.05, 20.0)
"""Where the temperature is looked for; published networks need 0.5 to 4."""

HALVINGS = 30
"""Of that range, in logarithm: the temperature is then known to eight digits."""

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Reliability:
    """What was said and what was true, in those bins that hold rows."""

    rows: npt.NDArray[np.int64]
    predicted: Floats
    """Mean probability."""
    observed: Floats
    """Share of positives."""

    @property
    def error(self) -> float | None:
        """Expected calibration error: the mean distance between said and true, each bin by its rows; None without rows."""
        if not len(self.rows):
            return None
        return float(np.average(np.abs(self.observed - self.predicted), weights=self.rows))


def find_bins(probability: Floats) -> npt.NDArray[np.int64]:
    """Each row's bin, 0 to `BINS` − 1: int64 [N]; a probability on an edge falls into the lower bin, as in scikit-learn."""
    return np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], probability).astype(np.int64)


def reliability(truth: Bools, probability: Floats) -> Reliability:
    """Sort rows into `BINS` bins."""
    place = find_bins(probability)
    rows = np.bincount(place, minlength=BINS)
    held = rows > 0
    said, true = (np.bincount(place, values, BINS)[held] / rows[held] for values in (probability, truth))
    return Reliability(rows[held], said, true)


def fit_temperature(truth: Bools, probability: Floats) -> float:
    """The temperature with the lowest log loss, within `TEMPERATURES`.

    The targets are Platt's (n + 1) / (n + 2) and 1 / (n + 2) in place of 1 and 0, so that few rows that happen to be told
    apart do not ask for boundless certainty (Platt, Probabilistic Outputs for Support Vector Machines, 1999). The loss is convex
    in the slope, one by the temperature: the zero of its derivative is found by halving.
    """
    logit = to_logit(probability)
    target = np.where(truth, (truth.sum() + 1) / (truth.sum() + 2), 1 / ((~truth).sum() + 2))
    low, high = np.log(1 / TEMPERATURES[1]), np.log(1 / TEMPERATURES[0])
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        steeper = float(((_sigmoid(np.exp(middle) * logit) - target) * logit).sum()) < 0
        low, high = (middle, high) if steeper else (low, middle)
    return float(np.exp(-(low + high) / 2))


def scale(probability: Floats, temperature: float) -> Floats:
    """Probabilities whose logits are divided by the temperature."""
    return _sigmoid(to_logit(probability) / temperature)


def to_logit(probability: Floats) -> Floats:
    """Log odds, float64."""
    clipped = np.clip(np.asarray(probability, np.float64), CERTAIN, 1 - CERTAIN)
    return np.log(clipped) - np.log1p(-clipped)


def _sigmoid(logit: Floats) -> Floats:
    return 0.5 * (1 + np.tanh(0.5 * logit))  # as 1 / (1 + exp(−logit)), but exp cannot overflow
