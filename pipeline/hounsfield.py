"""Stored values into the uint8 windows that the store holds, by way of Hounsfield units.

HU are a linear function of stored values (PS3.3 C.11.1.1.2), and so is averaging over areas: so a slice is resampled as it is
stored, and rescale and window are then one multiplication and one addition of what is left. Resampling comes before windowing:
averaging after the clip would darken every edge between blood and bone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.config import Window
from pipeline.head import Box

AIR_HU = -1024.0
"""The bottom of the CT scale. Padding (raw −2000, −3024 HU after rescale, in 40 % of RSNA slices) is raised to it, so that
area averaging does not darken the rim of the field of view."""

WRAP_INTERCEPTS = (-100, 100)
WRAP_OFFSET = 1024
"""Air with its noise reaches −1024. The well-known repair says 1000, which leaves air of −1001 HU as white specks of 3095."""

WRAP_MODULUS = 4096

HIGHEST_HU, LOWEST_HU = 4096.0, -1100.0
"""No tissue lies beyond these; metal and padding do, but metal is small and padding has few values."""

GARBAGE_SHARE = 0.05
"""Of the pixels beyond those, or of the rows that are noise. Metal with its streaks measured below 1 %."""

PADDING_VALUES = 16
"""Padding has one value or two; decoded garbage has hundreds."""

NOISE_STEP_HU = 400.0
"""Mean difference of two neighbouring rows. 40 to 120 HU in heads, 1365 where 12-bit values are drawn at random."""

SAMPLED = 8
"""Of so many rows and columns one is looked at: 4,096 pixels of 512²."""

COARSE_SIZE = 128
"""Rows and columns in which the head is looked for."""

Pixels = npt.NDArray[np.uint8]
PixelsHU = npt.NDArray[np.float32]
Stored = npt.NDArray[np.integer]


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


def stored_to_hu(stored: Stored, *, slope: float, intercept: float) -> PixelsHU:
    """Rescale stored values to HU: HU = slope × stored + intercept (PS3.3 C.11.1.1.2, Modality LUT), air at the least.

    Returns:
        float32 [row, column] in HU, never below −1024.
    """
    pixels_hu = stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    return np.maximum(pixels_hu, np.float32(AIR_HU), out=pixels_hu)


def lowest_hu(stored: Stored, *, slope: float, intercept: float) -> float:
    """Lowest HU of a slice, its padding included."""
    return slope * float(stored.min() if slope > 0 else stored.max()) + intercept


def is_garbage(stored: Stored, *, slope: float, intercept: float) -> bool:
    """Whether values are no CT's: out of any scanner's range for too much of the slice, or noise from row to row.

    What some decoders make of a damaged file without a word, and the half noise of ID_b79eed528. Looks at a sample of the pixels.
    """
    sample_hu = stored[::SAMPLED, ::SAMPLED].astype(np.float32) * np.float32(slope) + np.float32(intercept)
    most = GARBAGE_SHARE * sample_hu.size
    if np.count_nonzero(sample_hu > HIGHEST_HU) > most:
        return True
    below = sample_hu[sample_hu < LOWEST_HU]
    # nearly always one value, if any: only where it is not, they are counted
    if np.count_nonzero(below != below[:1]) > most and len(np.unique(below)) > PADDING_VALUES:
        return True
    upper, lower = stored[:-1:16, ::2].astype(np.int32), stored[1::16, ::2]
    step_hu = np.abs(upper - lower).mean(axis=1) * abs(slope)
    return bool((step_hu > NOISE_STEP_HU).mean() > GARBAGE_SHARE)


def is_inverted(stored: Stored, *, slope: float, intercept: float) -> bool:
    """Whether a slice is stored as its negative: brighter than bone all round its border, where air belongs.

    MONOCHROME1 speaks of the display alone (PS3.3 C.7.6.3.1.2) and leaves HU as they are; some writers invert the values too.
    """
    border = np.concatenate([stored[0], stored[-1], stored[:, 0], stored[:, -1]])
    return bool(slope * float(np.median(border)) + intercept > 500)


def invert(stored: Stored, *, bits_stored: int) -> Stored:
    """Turn a negative into its positive within the range of its stored bits, in place."""
    lowest = -(1 << (bits_stored - 1)) if stored.dtype.kind == "i" else 0
    np.subtract(2 * lowest + (1 << bits_stored) - 1, stored, out=stored)
    return stored


def clear_padding(stored: Stored, *, padding: float, slope: float, intercept: float) -> bool:
    """Set tagged padding to air, in place, where its value would be tissue; lower values are raised to air anyway.

    Only what is connected to the border: (0028,0120) Pixel Padding Value lies outside the image (PS3.3 C.7.5.1.1.2), and a value
    such as 0 may be water inside.

    Returns:
        Whether anything was set.
    """
    if not math.isfinite(padding) or slope * padding + intercept <= AIR_HU:
        return False
    mask = stored == padding
    if not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any()):
        return False
    _, parts = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    border = np.unique(np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]]))
    limits = np.iinfo(stored.dtype)
    stored[np.isin(parts, border[border > 0])] = np.clip(round((AIR_HU - intercept) / slope), limits.min, limits.max)
    return True


class Converter:
    """Converts slices into windowed pixels; holds the memory that every slice goes through.

    Fresh memory for each slice would cost three times the arithmetic, in page faults.

    Args:
        image_size: rows and columns of the result.
        windows: window by name; their order is the order of the last axis.
    """

    def __init__(self, *, image_size: int, windows: Mapping[str, Window]) -> None:
        self.image_size = image_size
        self.windows = tuple(windows.values())
        self._resampled = np.empty((image_size, image_size), np.float32)
        self._planes = [np.empty((image_size, image_size), np.uint8) for _ in self.windows]
        self._pixels = np.empty((image_size, image_size, len(self.windows)), np.uint8)
        self._coarse = np.empty((COARSE_SIZE, COARSE_SIZE), np.float32)
        self._floats = np.empty((0, 0), np.float32)
        self._air: Stored = np.empty((0, 0), np.int16)

    def window(
        self,
        stored: Stored,
        *,
        slope: float,
        intercept: float,
        spacing_mm: tuple[float, float],
        box: Box,
        is_padded: bool = True,
    ) -> Pixels:
        """Resample a slice and apply the windows: HU at centre − width/2 becomes 0, at centre + width/2 becomes 255 (PS3.3
        C.11.2.1.3.2, LINEAR_EXACT).

        Args:
            stored: stored values [row, column], of any strides; raised to air in place.
            slope: (0028,1053) Rescale Slope, not 0.
            intercept: (0028,1052) Rescale Intercept.
            spacing_mm: between rows, and between columns: (0028,0030) Pixel Spacing.
            box: the square to show, in mm from the centre of the slice; what it reaches beyond is air.
            is_padded: whether there may be values below air, which are to be raised to it.

        Returns:
            uint8 [row, column, window], rounded to the nearest grey level; good until the next call.
        """
        if is_padded:
            self._raise_to_air(stored, slope=slope, intercept=intercept)
        self._resample(stored, self._resampled, slope=slope, intercept=intercept, spacing_mm=spacing_mm, box=box)
        for window, plane in zip(self.windows, self._planes, strict=True):
            gain = 255.0 / window.width
            offset = (intercept - window.low_hu) * gain
            # addWeighted clips and rounds while it writes uint8: a third of the time of the same in numpy.
            cv2.addWeighted(self._resampled, slope * gain, self._resampled, 0.0, offset, dst=plane, dtype=cv2.CV_8U)
        if len(self._planes) == 1:
            self._pixels[..., 0] = self._planes[0]
        else:
            cv2.merge(self._planes, dst=self._pixels)
        return self._pixels

    def coarse_hu(
        self, stored: Stored, *, slope: float, intercept: float, spacing_mm: tuple[float, float], box: Box
    ) -> PixelsHU:
        """Resample a slice to the size in which the head is looked for: float32 [`COARSE_SIZE`, `COARSE_SIZE`] in HU."""
        self._raise_to_air(stored, slope=slope, intercept=intercept)
        self._resample(stored, self._coarse, slope=slope, intercept=intercept, spacing_mm=spacing_mm, box=box)
        return self._coarse * np.float32(slope) + np.float32(intercept)

    def _resample(
        self,
        stored: Stored,
        out: PixelsHU,
        *,
        slope: float,
        intercept: float,
        spacing_mm: tuple[float, float],
        box: Box,
    ) -> None:
        """Fill the square `out` with what lies in the box: areas averaged where it shrinks, else linear; air around."""
        air = (AIR_HU - intercept) / slope
        if self._floats.shape != stored.shape:
            self._floats = np.empty(stored.shape, np.float32)
        np.copyto(self._floats, stored)
        floats = self._floats
        size = len(out)
        rows = _overlap(floats.shape[0], spacing_mm[0], start_mm=box.top_mm, side_mm=box.side_mm, size=size)
        columns = _overlap(floats.shape[1], spacing_mm[1], start_mm=box.left_mm, side_mm=box.side_mm, size=size)
        if rows is None or columns is None:
            out.fill(air)
            return
        (first_row, end_row, top, height), (first_column, end_column, left, width) = rows, columns
        source = floats[first_row:end_row, first_column:end_column]
        how = cv2.INTER_AREA if height <= source.shape[0] and width <= source.shape[1] else cv2.INTER_LINEAR
        if (height, width) == (size, size):
            cv2.resize(source, (size, size), dst=out, interpolation=how)
            return
        out.fill(air)
        out[top : top + height, left : left + width] = cv2.resize(source, (width, height), interpolation=how)

    def _raise_to_air(self, stored: Stored, *, slope: float, intercept: float) -> None:
        """Raise what is below air to it, in place."""
        limits, air = np.iinfo(stored.dtype), (AIR_HU - intercept) / slope
        value = min(max(math.ceil(air) if slope > 0 else math.floor(air), limits.min), limits.max)
        if self._air.shape != stored.shape or self._air.dtype != stored.dtype or self._air[0, 0] != value:
            self._air = np.full(stored.shape, value, stored.dtype)
        # beside an array, as numpy takes five times as long beside a single number
        (np.maximum if slope > 0 else np.minimum)(stored, self._air, out=stored)


def _overlap(
    count: int, spacing_mm: float, *, start_mm: float, side_mm: float, size: int
) -> tuple[int, int, int, int] | None:
    """Along one axis: first and last source line inside the box, and first line and number of lines of the result."""
    start = count / 2 + start_mm / spacing_mm
    lines = side_mm / spacing_mm
    first, end = max(0, round(start)), min(count, round(start + lines))
    if end <= first:
        return None
    scale = size / lines
    length = min(size, max(1, round((end - first) * scale)))
    begin = min(max(0, round((first - start) * scale)), size - length)
    return first, end, begin, length
