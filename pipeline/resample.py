"""Stored values into the uint8 windows that the store holds: resampled first, windowed then.

HU are a linear function of stored values (PS3.3 C.11.1.1.2), and so is averaging over areas: so a slice is resampled as it is
stored, and rescale and window are then one multiplication and one addition of what is left. Resampling comes before windowing:
averaging after the clip would darken every edge between blood and bone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.compiled import compiled
from pipeline.config import Window
from pipeline.head import Box
from pipeline.hounsfield import AIR_HU, Stored

COARSE_SIZE = 128
"""Rows and columns in which the head is looked for."""

Pixels = npt.NDArray[np.uint8]
PixelsHU = npt.NDArray[np.float32]


class Converter:
    """Converts slices into windowed pixels; holds the memory that every slice goes through.

    Fresh memory for each slice would cost more than the arithmetic, in page faults.

    Args:
        image_size: rows and columns of the result.
        windows: window by name; their order is the order of the last axis.
    """

    def __init__(self, *, image_size: int, windows: Mapping[str, Window]) -> None:
        self.image_size = image_size
        self._gains = np.array([255.0 / window.width for window in windows.values()])
        self._low_hu = np.array([window.low_hu for window in windows.values()])
        self._resampled = np.empty((image_size, image_size), np.float32)
        self._pixels = np.empty((image_size, image_size, len(windows)), np.uint8)
        self._lines = self._pixels.reshape(image_size, -1)
        self._coarse = np.empty((COARSE_SIZE, COARSE_SIZE), np.float32)
        self._floats = np.empty(0, np.float32)

    def window(
        self, stored: Stored, *, slope: float, intercept: float, spacing_mm: tuple[float, float], box: Box
    ) -> Pixels:
        """Resample a slice and apply the windows: HU at centre − width/2 becomes 0, at centre + width/2 becomes 255 (PS3.3
        C.11.2.1.3.2, LINEAR_EXACT).

        Args:
            stored: stored values [row, column], of any strides; what is below air counts as air.
            slope: (0028,1053) Rescale Slope, not 0.
            intercept: (0028,1052) Rescale Intercept.
            spacing_mm: between rows, and between columns: (0028,0030) Pixel Spacing.
            box: the square to show, in mm from the centre of the slice; what it reaches beyond is air.

        Returns:
            uint8 [row, column, window], rounded to the nearest grey level; good until the next call.
        """
        self._resample(stored, self._resampled, slope=slope, intercept=intercept, spacing_mm=spacing_mm, box=box)
        gains, offsets = slope * self._gains, (intercept - self._low_hu) * self._gains
        _apply_windows(self._resampled, gains.astype(np.float32), offsets.astype(np.float32), self._lines)
        return self._pixels

    def coarse_hu(
        self, stored: Stored, *, slope: float, intercept: float, spacing_mm: tuple[float, float], box: Box
    ) -> PixelsHU:
        """Resample a slice to the size in which the head is looked for: float32 [`COARSE_SIZE`, `COARSE_SIZE`] in HU."""
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
        air, size = (AIR_HU - intercept) / slope, len(out)
        rows = _overlap(stored.shape[0], spacing_mm[0], start_mm=box.top_mm, side_mm=box.side_mm, size=size)
        columns = _overlap(stored.shape[1], spacing_mm[1], start_mm=box.left_mm, side_mm=box.side_mm, size=size)
        if rows is None or columns is None:
            out.fill(air)
            return
        (first_row, end_row, top, height), (first_column, end_column, left, width) = rows, columns
        corner, shape = (first_row, first_column), (end_row - first_row, end_column - first_column)
        bounds = _bounds(stored.dtype, air, slope > 0)
        if (height, width) == (size, size):
            self._fill(stored, corner, shape, bounds, out)
            return
        out.fill(air)
        inside = np.empty((height, width), np.float32)
        self._fill(stored, corner, shape, bounds, inside)
        out[top : top + height, left : left + width] = inside

    def _fill(
        self,
        stored: Stored,
        corner: tuple[int, int],
        shape: tuple[int, int],
        bounds: tuple[np.integer, np.integer],
        target: PixelsHU,
    ) -> None:
        """Resample `shape` rows and columns from `corner` on into all of `target`."""
        (height, width), (rows, columns) = target.shape, shape
        if rows % height == 0 and rows // height * width == columns:
            _average(stored, *corner, rows // height, *bounds, target)
            return
        if len(self._floats) < rows * columns:
            self._floats = np.empty(rows * columns, np.float32)
        floats = self._floats[: rows * columns].reshape(shape)
        _average(stored, *corner, 1, *bounds, floats)
        smaller = min(height, rows), min(width, columns)
        if smaller == (height, width):
            cv2.resize(floats, (width, height), dst=target, interpolation=cv2.INTER_AREA)
            return
        if smaller != shape:  # OpenCV has one way for both axes: the one that shrinks is averaged first
            floats = np.asarray(cv2.resize(floats, smaller[::-1], interpolation=cv2.INTER_AREA), np.float32)
        cv2.resize(floats, (width, height), dst=target, interpolation=cv2.INTER_LINEAR)


@compiled
def _average(
    stored: Stored,
    first_row: int,
    first_column: int,
    ratio: int,
    lowest: np.integer,
    highest: np.integer,
    out: PixelsHU,
) -> None:
    """Means of squares of `ratio` × `ratio` stored values, each first brought between `lowest` and `highest`.

    The corner is given, not a view from there on: only of a whole array is it known that neighbours lie side by side.
    """
    height, width = out.shape
    sums = np.empty(width * ratio, np.int32)
    share = np.float32(1.0 / (ratio * ratio))
    for row in range(height):
        sums[:] = 0
        for line in range(first_row + row * ratio, first_row + (row + 1) * ratio):
            values = stored[line][first_column : first_column + width * ratio]
            for i in range(len(sums)):
                sums[i] += min(max(values[i], lowest), highest)
        means = out[row]
        # the usual ratios, and below the usual number of windows, are spelled out: only so are they done many at a time
        if ratio == 1:
            for i in range(width):
                means[i] = sums[i]
        elif ratio == 2:
            for i in range(width):
                means[i] = np.float32(sums[2 * i] + sums[2 * i + 1]) * share
        else:
            for i in range(width):
                total = sums[i * ratio]
                for k in range(1, ratio):
                    total += sums[i * ratio + k]
                means[i] = np.float32(total) * share


@compiled
def _apply_windows(
    values: PixelsHU, gains: npt.NDArray[np.float32], offsets: npt.NDArray[np.float32], lines: Pixels
) -> None:
    """`gain` × value + `offset` of each window, rounded and clipped to 0 … 255; into [row, column × window]."""
    height, width = values.shape
    count = len(gains)
    greys = np.empty((count, width), np.uint8)
    for row in range(height):
        line, out = values[row], lines[row]
        for number in range(count):
            gain, offset, grey = gains[number], offsets[number], greys[number]
            for i in range(width):
                grey[i] = np.int32(np.rint(min(max(line[i] * gain + offset, np.float32(0)), np.float32(255))))
        if count == 3:
            first, second, third = greys[0], greys[1], greys[2]
            for i in range(width):
                out[3 * i] = first[i]
                out[3 * i + 1] = second[i]
                out[3 * i + 2] = third[i]
        else:
            for number in range(count):
                grey = greys[number]
                for i in range(width):
                    out[count * i + number] = grey[i]


@lru_cache(maxsize=256)  # a study's slices are mostly alike
def _bounds(kind: np.dtype[np.integer], air: float, is_rising: bool) -> tuple[np.integer, np.integer]:
    """The lowest and highest stored values that are air or denser."""
    limits = np.iinfo(kind)
    edge = min(max(math.ceil(air) if is_rising else math.floor(air), limits.min), limits.max)
    return (kind.type(edge), kind.type(limits.max)) if is_rising else (kind.type(limits.min), kind.type(edge))


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
