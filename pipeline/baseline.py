"""What a network must beat: counting bright pixels, and never looking at a pixel at all.

The counting classifier: how many pixels of fresh blood's density, 50 to 90 HU, lie inside the skull of a slice. Counted on the
stored, windowed pixels, thus on the very slices that the network saw; 0.1 ms a slice of 128 × 128.

The header classifier: gradient boosting on how a study was stored and scanned and, of a slice, on where in the head it lies, on the
network's own folds. In RSNA's data the scanner tells much of the answer; a network may learn to read the scanner. What the
network knows beyond that shows on rows that are balanced: weighed so that this classifier can no longer tell them apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from sklearn.ensemble import HistGradientBoostingClassifier

from pipeline.config import Window

BLOOD_HU = (50.0, 90.0)
"""Clotted blood; brain is 20 to 45, calcium and bone are above 100."""

BONE_HU = 300.0
"""Cortical bone lies above; a window that tops lower (soft tissue: 230) shows bone as its top grey."""

LEAST_BONE_HU = 150.0
"""A window that tops lower than this would take blood, calcium and contrast for bone."""

GAP = 1 / 18
"""Gaps in the skull to bridge (sutures, air cells, thin bone lost to resampling): 14 mm of a slice of 250."""


HEADER_VALUES = (
    "num_slices",
    "rows",
    "columns",
    "row_spacing_mm",
    "column_spacing_mm",
    "slice_spacing_mm",
    "thickness_mm",
    "tilt_deg",
    "bits_stored",
    "signed",
    "intercept",
    "lowest_hu",
)
"""Of a study in the store: all that can be known without looking, but the lowest HU, which stands for the padding."""


SMALLEST_LEAF = 20
"""Studies in a leaf of the header classifier's trees (scikit-learn's own default): from fewer than twice as many it learns nothing. By
slice, as many studies' slices: leaves of 20 slices learn single studies by heart (log loss 0.61 for any on the phantom cohort,
0.43 with leaves of 540, 0.52 for the base rate)."""

BALANCE_BINS, LEAST_BINS, LEAST_IN_BIN = 20, 5, 3
"""Bins of the header classifier's score, how many at least, and how many rows of the rarer class each needs. On the phantom cohort, where
it reaches 0.72 to 0.81 by slice, 3 bins leave it up to 0.54, 5 bins 0.52, 20 bins 0.50."""


@dataclass(frozen=True)
class Counter:
    """Which window and greys are blood, which are bone."""

    blood_window: int
    """Number on the last axis of a slice."""
    blood_grey: tuple[int, int]
    """Lowest and highest, both included."""
    bone_window: int
    bone_grey: int

    def count(self, pixels: npt.NDArray[np.uint8]) -> int:
        """Pixels of blood's density inside the skull of one slice, uint8 [row, column, window]."""
        bone = np.ascontiguousarray(pixels[..., self.bone_window] >= self.bone_grey)
        grey = pixels[..., self.blood_window]
        blood = (grey >= self.blood_grey[0]) & (grey <= self.blood_grey[1])
        return int(np.count_nonzero(blood & inside(bone)))


def counter_for(windows: Mapping[str, Window]) -> tuple[Counter | None, str]:
    """Find the windows to count in: the finest that covers blood, and the one that reaches highest for bone.

    Args:
        windows: by name, in the order of a slice's last axis.

    Returns:
        The counter and the name of the window it counts in; or None and the reason why these windows do not allow it.
    """
    names = list(windows)
    covering = [name for name in names if windows[name].low_hu <= BLOOD_HU[0] and windows[name].high_hu >= BLOOD_HU[1]]
    if not covering:
        return None, f"no window covers {BLOOD_HU[0]:g} to {BLOOD_HU[1]:g} HU"
    blood = min(covering, key=lambda name: windows[name].width)
    bone = max(names, key=lambda name: windows[name].high_hu)
    if windows[bone].high_hu < LEAST_BONE_HU:
        return None, f"no window reaches {LEAST_BONE_HU:g} HU, so that bone cannot be told from blood"
    greys = (_grey(windows[blood], BLOOD_HU[0]), _grey(windows[blood], BLOOD_HU[1]))
    return Counter(names.index(blood), greys, names.index(bone), _grey(windows[bone], BONE_HU)), blood


def _grey(window: Window, hu: float) -> int:
    return int(np.clip(np.rint((hu - window.low_hu) / window.width * 255), 0, 255))


def inside(bone: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """What the skull encloses, without the bone itself.

    Args:
        bone: bool [row, column].

    Returns:
        bool [row, column]; nothing where the ring has a gap too wide to bridge.
    """
    width = max(3, round(bone.shape[1] * GAP)) | 1  # odd, so that the kernel has a centre
    framed = cv2.copyMakeBorder(bone.astype(np.uint8), width, width, width, width, cv2.BORDER_CONSTANT, value=0)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))
    # Thickened, the skull has no gap left; outside then grows back to the bone's outer face, but not through the gaps.
    # (A morphological closing bridges no gap in a line as thin as a temporal bone.)
    thick = cv2.dilate(framed, kernel)
    cv2.floodFill(thick, None, (0, 0), 2)  # the frame makes all of outside one piece
    outside = cv2.dilate((thick == 2).astype(np.uint8), kernel)
    enclosed: npt.NDArray[np.bool_] = outside[width:-width, width:-width] == 0
    return enclosed & ~bone


def header_features(per_study: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float64]:
    """The header values that differ between studies at all: float64 [S, F], NaN where a header lacks one."""
    return _differing(np.stack([np.asarray(per_study[name], np.float64) for name in HEADER_VALUES], axis=1))


def place_features(
    position_mm: npt.NDArray[Any], num_slices: npt.NDArray[np.int64], slices_N2: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Where in its study each slice lies.

    Args:
        position_mm: [S, slots] along the slice normal.
        num_slices: int64 [S].
        slices_N2: int64 [N, 2], study number and slice number.

    Returns:
        float64 [N, F]: position, height above the lowest slice, depth below the highest, distances to the neighbours below and above
        (NaN at the ends), all in mm, and the slice's number as a share of the study's. Those that are always the same are left out.
    """
    study_N, slice_N = slices_N2.T
    last_N = num_slices[study_N] - 1
    before_N, after_N = np.maximum(slice_N - 1, 0), np.minimum(slice_N + 1, last_N)
    here, lowest, highest, before, after = (
        position_mm[study_N, number].astype(np.float64)
        for number in (slice_N, np.zeros_like(slice_N), last_N, before_N, after_N)
    )
    below = np.where(slice_N > 0, here - before, np.nan)
    above = np.where(slice_N < last_N, after - here, np.nan)
    share = slice_N / np.maximum(last_N, 1)
    return _differing(np.stack([here, here - lowest, highest - here, below, above, share], axis=1))


def _differing(features_RF: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The columns with more than one value; NaNs count as one."""
    kept = [len(np.unique(column)) > 1 for column in features_RF.T]
    return features_RF[:, kept]


def predict_from_headers(
    features_RF: npt.NDArray[np.float64],
    truth_R: npt.NDArray[np.int8],
    *,
    learn_R: npt.NDArray[np.bool_],
    predict: npt.NDArray[Any],
    rows_a_study: float = 1.0,
) -> npt.NDArray[np.float64]:
    """Learn one label from some rows' headers, and predict others.

    Args:
        features_RF: what `header_features` gives, of slices with `place_features` beside it.
        truth_R: 1 or 0, of the rows to learn from.
        learn_R: which to learn from.
        predict: which to predict: their numbers, or bool [R].
        rows_a_study: 1 by study, else how many slices a study has.

    Returns:
        float64 [predicted]; everywhere the share of positives if there is nothing to learn.
    """
    truth, unseen_PF = truth_R[learn_R] == 1, features_RF[predict]
    leaf = round(SMALLEST_LEAF * rows_a_study)
    if not features_RF.shape[1] or len(truth) < 2 * leaf or not truth.any() or truth.all():
        return np.full(len(unseen_PF), truth.mean() if len(truth) else 0.0)
    model = HistGradientBoostingClassifier(
        learning_rate=0.05, min_samples_leaf=leaf, early_stopping=False, random_state=0
    )
    model.fit(features_RF[learn_R], truth)
    return np.asarray(model.predict_proba(unseen_PF)[:, 1], np.float64)


def balance_bins(truth: npt.NDArray[np.bool_], score: npt.NDArray[np.float64]) -> npt.NDArray[np.int64] | None:
    """Bins of a score, in each of which about as many rows of the rarer class lie: int64 [N]; None with too few of them."""
    rarer = score[truth] if truth.sum() <= (~truth).sum() else score[~truth]
    bins = min(BALANCE_BINS, len(rarer) // LEAST_IN_BIN)
    if bins < LEAST_BINS:
        return None
    edges = np.unique(np.quantile(rarer, np.linspace(0, 1, bins + 1)[1:-1]))
    return np.searchsorted(edges, score, side="right").astype(np.int64)


def balance_weights(truth: npt.NDArray[np.bool_], bin_N: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """What share of its bin the other class is: float64 [N]. So weighed, both classes weigh the same in every bin."""
    of_bin = np.stack([np.bincount(bin_N, truth == kind, int(bin_N.max()) + 1) for kind in (False, True)])
    share = of_bin[:, bin_N] / of_bin[:, bin_N].sum(axis=0)
    return np.where(truth, share[0], share[1])
