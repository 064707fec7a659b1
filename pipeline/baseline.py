"""What a network must beat: counting bright pixels, and never looking at a pixel at all.

The counting classifier: how many pixels of fresh blood's density, 50 to 90 HU, lie inside the skull of a slice. Counted on the
stored, windowed pixels, thus on the very slices that the network saw; 0.1 ms a slice of 128 × 128.

The header classifier: gradient boosting on how a study was stored and scanned, on the network's own folds. In RSNA's data the
scanner tells much of the answer; a network may learn to read the scanner.
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
"""Studies in a leaf of the header classifier's trees (scikit-learn's own default): from fewer than twice as many it learns nothing."""


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
    columns = [np.asarray(per_study[name], np.float64) for name in HEADER_VALUES]
    differing = [column for column in columns if len(np.unique(column)) > 1]  # NaNs count as one value
    return np.stack(differing, axis=1) if differing else np.zeros((len(columns[0]), 0))


def predict_from_headers(
    features_SF: npt.NDArray[np.float64],
    truth_S: npt.NDArray[np.int8],
    *,
    learn_S: npt.NDArray[np.bool_],
    predict_S: npt.NDArray[np.bool_],
) -> npt.NDArray[np.float64]:
    """Learn one label from some studies' headers, and predict others.

    Args:
        features_SF: what `header_features` gives.
        truth_S: 1 or 0, of the studies to learn from.
        learn_S: which to learn from.
        predict_S: which to predict.

    Returns:
        float64 [predicted]; everywhere the share of positives if there is nothing to learn.
    """
    truth = truth_S[learn_S] == 1
    if not features_SF.shape[1] or len(truth) < 2 * SMALLEST_LEAF or not truth.any() or truth.all():
        return np.full(int(predict_S.sum()), truth.mean() if len(truth) else 0.0)
    model = HistGradientBoostingClassifier(
        learning_rate=0.05, min_samples_leaf=SMALLEST_LEAF, early_stopping=False, random_state=0
    )
    model.fit(features_SF[learn_S], truth)
    return np.asarray(model.predict_proba(features_SF[predict_S])[:, 1], np.float64)
