"""What stored values mean in Hounsfield units, and the repairs that need no more than them: 12-bit wrap, negatives, padding."""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

AIR_HU = -1024.0
"""The bottom of the CT scale. Padding (raw −2000, −3024 HU after rescale, in 40 % of RSNA slices) is raised to it, so that
area averaging does not darken the rim of the field of view."""

WRAP_INTERCEPTS = (-100, 100)
WRAP_OFFSET = 1024
"""Air with its noise reaches −1024. The well-known repair says 1000, which leaves air of −1001 HU as white specks of 3095."""

WRAP_MODULUS = 4096

Stored = npt.NDArray[np.integer]
Mask = npt.NDArray[np.bool_]


def is_wrapped(bits_stored: Any, signed: Any, intercept: Any) -> Any:
    """Whether a slice has the 12-bit wrap: unsigned 12-bit data with an intercept near 0 cannot hold air.

    123 slices of RSNA 2019 have it. Signed slices with intercept 0 are right as they are. Of numbers or, element by element, of arrays.
    """
    near_zero = (intercept > WRAP_INTERCEPTS[0]) & (intercept < WRAP_INTERCEPTS[1])
    return (bits_stored == 12) & (signed == 0) & near_zero


def unwrap(stored: Stored) -> Stored:
    """Undo the 12-bit wrap, in place: add 1024, subtract 4096 where that reaches 4096. The intercept is then −1024."""
    stored += WRAP_OFFSET
    stored %= WRAP_MODULUS
    return stored


def lowest_hu(stored: Stored, *, slope: float, intercept: float) -> float:
    """Lowest HU of a slice, its padding included."""
    return slope * float(stored.min() if slope > 0 else stored.max()) + intercept


def is_inverted(stored: Stored, padded: Mask | None, *, slope: float, intercept: float) -> bool:
    """Whether a slice is stored as its negative: brighter than bone all round its border, where air belongs.

    MONOCHROME1 speaks of the display alone (PS3.3 C.7.6.3.1.2) and leaves HU as they are; some writers invert the values too.

    Args:
        stored: stored values [row, column].
        padded: its padding, which is no part of the image: the border is then what lies beside it.
        slope: (0028,1053) Rescale Slope.
        intercept: (0028,1052) Rescale Intercept.
    """
    border = np.zeros(stored.shape, bool)
    border[[0, -1]] = border[:, [0, -1]] = True
    if padded is not None:
        border |= cv2.dilate(padded.view(np.uint8), np.ones((3, 3), np.uint8)).view(bool)
        border &= ~padded
    return bool(border.any() and slope * float(np.median(stored[border])) + intercept > 500)


def invert(stored: Stored, *, bits_stored: int) -> Stored:
    """Turn a negative into its positive within the range of its stored bits, in place."""
    lowest = -(1 << (bits_stored - 1)) if stored.dtype.kind == "i" else 0
    np.subtract(2 * lowest + (1 << bits_stored) - 1, stored, out=stored)
    return stored


def find_padding(stored: Stored, *, padding: float, limit: float) -> Mask | None:
    """Where a slice is padded by what its header says, before anything is repaired: (0028,0120) Pixel Padding Value is a stored value.

    Only what is connected to the border: it lies outside the image (PS3.3 C.7.5.1.1.2), and a value such as 0 may be water inside.

    Args:
        stored: stored values [row, column].
        padding: one end of the range of values that are padding.
        limit: (0028,0121) Pixel Padding Range Limit, the other end; NaN where there is none.

    Returns:
        bool [row, column], or None where nothing is padded.
    """
    if not math.isfinite(padding):
        return None
    low, high = (min(padding, limit), max(padding, limit)) if math.isfinite(limit) else (padding, padding)
    mask = stored == padding if low == high else (stored >= low) & (stored <= high)
    if not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any()):
        return None
    _, parts = cv2.connectedComponents(mask.view(np.uint8), connectivity=4)
    border = np.unique(np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]]))
    return np.isin(parts, border[border > 0])


def set_to_air(stored: Stored, padded: Mask, *, slope: float, intercept: float) -> None:
    """Set padding to air, in place."""
    limits = np.iinfo(stored.dtype)
    stored[padded] = np.clip(round((AIR_HU - intercept) / slope), limits.min, limits.max)
