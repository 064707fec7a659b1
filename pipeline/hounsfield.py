"""Stored values into the uint8 windows that the store holds, by way of Hounsfield units.

HU are a linear function of stored values (PS3.3 C.11.1.1.2), and so is averaging over areas: so a slice is resampled as it is
stored, and rescale and window are then one multiplication and one addition of what is left. Resampling comes before windowing:
averaging after the clip would darken every edge between blood and bone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
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
"""Of the pixels beyond those. Metal with its streaks measured below 1 %."""

NOISY_ROWS_SHARE = 0.2
"""Of the rows. Noise begins somewhere and goes on to the end; a head has an edge or two as steep, such as that of its padding."""

PADDING_VALUES = 16
"""Padding has one value or two; decoded garbage has hundreds."""

NOISE_STEP_HU = 400.0
"""Mean difference of two neighbouring rows. 40 to 120 HU in heads, 1365 where 12-bit values are drawn at random."""

SMOOTH_ROWS = 64
"""In a slice of fewer rows a head's own edges are as steep as noise; CT has 256 or more."""

SAMPLED_ROWS, SAMPLED_COLUMNS = 32, 128
"""Pixels looked at for garbage: whole stretches of few rows, as memory is read by the 32 pixels."""

STRIP_ROWS = 128
"""Rows of the result that are made at once: of a slice of 512², 256 kB of stored values and 512 kB of floats."""

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


def lowest_hu(stored: Stored, *, slope: float, intercept: float) -> float:
    """Lowest HU of a slice, its padding included."""
    return slope * float(stored.min() if slope > 0 else stored.max()) + intercept


def is_garbage(stored: Stored, *, slope: float, intercept: float) -> bool:
    """Whether values are no CT's: out of any scanner's range for too much of the slice, or noise from row to row.

    What some decoders make of a damaged file without a word, and the half noise of ID_b79eed528. Looks at a sample of the pixels.
    """
    by_rows, by_columns = max(1, len(stored) // SAMPLED_ROWS), max(1, stored.shape[1] // SAMPLED_COLUMNS)
    sample = np.ascontiguousarray(stored[::by_rows, ::by_columns])
    most = GARBAGE_SHARE * sample.size
    ends = int(sample.min()), int(sample.max())
    lowest, highest = ends if slope > 0 else ends[::-1]
    if slope * highest + intercept > HIGHEST_HU and np.count_nonzero(sample * slope + intercept > HIGHEST_HU) > most:
        return True
    if slope * lowest + intercept < LOWEST_HU and _has_many_values(sample[_is_below(sample, slope, intercept)], most):
        return True
    return len(stored) >= SMOOTH_ROWS and _is_noise(sample, stored[1::by_rows, ::by_columns], abs(slope))


def _is_below(sample: Stored, slope: float, intercept: float) -> npt.NDArray[np.bool_]:
    """Where a sample is below `LOWEST_HU`; compared as it is stored, for a third of the time of the same in HU."""
    limit = (LOWEST_HU - intercept) / slope
    return sample < math.ceil(limit) if slope > 0 else sample > math.floor(limit)


def _has_many_values(below: Stored, most: float) -> bool:
    """Whether there are more values than padding has, in more than `most` pixels."""
    # nearly always one value: only where it is not, they are counted
    is_padding = np.count_nonzero(below != below[:1]) <= most or len(np.unique(below)) <= PADDING_VALUES
    return not is_padding


def _is_noise(sample: Stored, next_rows: Stored, slope: float) -> bool:
    """Whether too many rows differ from the row that follows as only noise does."""
    steps = cv2.absdiff(sample[: len(next_rows)], np.ascontiguousarray(next_rows))
    sums = cv2.reduce(steps, 1, cv2.REDUCE_SUM, dtype=cv2.CV_32F)
    noisy = np.count_nonzero(sums * slope > NOISE_STEP_HU * sample.shape[1])
    return bool(noisy > NOISY_ROWS_SHARE * len(steps))


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
        self._gains = [(255.0 / window.width, window.low_hu) for window in windows.values()]
        self._resampled = np.empty((image_size, image_size), np.float32)
        self._planes = [np.empty((image_size, image_size), np.uint8) for _ in self._gains]
        self._pixels = np.empty((image_size, image_size, len(self._gains)), np.uint8)
        self._coarse = np.empty((COARSE_SIZE, COARSE_SIZE), np.float32)
        self._floats = np.empty(0, np.float32)
        self._air: Stored = np.empty(0, np.int16)

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
        rescale = {"slope": slope, "intercept": intercept}
        self._resample(stored, self._resampled, **rescale, spacing_mm=spacing_mm, box=box, is_padded=is_padded)
        for (gain, low_hu), plane in zip(self._gains, self._planes, strict=True):
            offset = (intercept - low_hu) * gain
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
        rescale = {"slope": slope, "intercept": intercept}
        self._resample(stored, self._coarse, **rescale, spacing_mm=spacing_mm, box=box, is_padded=True)
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
        is_padded: bool,
    ) -> None:
        """Fill the square `out` with what lies in the box: areas averaged where it shrinks, else linear; air around."""
        air, size = (AIR_HU - intercept) / slope, len(out)
        rows = _overlap(stored.shape[0], spacing_mm[0], start_mm=box.top_mm, side_mm=box.side_mm, size=size)
        columns = _overlap(stored.shape[1], spacing_mm[1], start_mm=box.left_mm, side_mm=box.side_mm, size=size)
        if rows is None or columns is None:
            out.fill(air)
            return
        (first_row, end_row, top, height), (first_column, end_column, left, width) = rows, columns
        source = stored[first_row:end_row, first_column:end_column]
        if is_padded:
            self._find_air(source, air=air, slope=slope)
        raise_to_air = (np.maximum if slope > 0 else np.minimum) if is_padded else None
        if (height, width) == (size, size):
            self._fill(source, out, raise_to_air)
            return
        out.fill(air)
        inside = np.empty((height, width), np.float32)
        self._fill(source, inside, raise_to_air)
        out[top : top + height, left : left + width] = inside

    def _find_air(self, source: Stored, *, air: float, slope: float) -> None:
        """Have as many stored values of air as a strip has pixels."""
        limits = np.iinfo(source.dtype)
        value = min(max(math.ceil(air) if slope > 0 else math.floor(air), limits.min), limits.max)
        if len(self._air) < source.size or self._air.dtype != source.dtype or self._air[0] != value:
            self._air = np.full(source.size, value, source.dtype)

    def _fill(self, source: Stored, target: PixelsHU, raise_to_air: Any) -> None:
        """Resample all of `source` into all of `target`: strip by strip, where a row of the one is made of whole rows of the
        other, so that what one step leaves the next finds in the processor's cache."""
        (height, width), is_shrunk = target.shape, target.shape <= source.shape and target.shape[1] <= source.shape[1]
        how = cv2.INTER_AREA if is_shrunk else cv2.INTER_LINEAR
        is_whole_ratio = is_shrunk and len(source) % height == 0
        ratio, lines = (len(source) // height, STRIP_ROWS) if is_whole_ratio else (1, height)
        for start in range(0, height, lines):
            part = source[start * ratio : (start + lines) * ratio] if is_whole_ratio else source
            if len(self._floats) < part.size:
                self._floats = np.empty(part.size, np.float32)
            floats = self._floats[: part.size].reshape(part.shape)
            if raise_to_air is not None:
                # beside an array, as numpy takes five times as long beside a single number
                raise_to_air(part, self._air[: part.size].reshape(part.shape), out=part)
            np.copyto(floats, part)
            strip = target[start : start + lines]
            cv2.resize(floats, (width, len(strip)), dst=strip, interpolation=how)


@lru_cache(maxsize=256)  # a study's slices are mostly alike
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
