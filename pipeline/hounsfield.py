"""Stored values into Hounsfield units, and HU into the uint8 windows that the store holds.

Resampling happens in HU, before windowing: averaging after the clip would darken every edge between blood and bone.
"""

from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.config import Window

AIR_HU = -1024.0
"""The bottom of the CT scale. Padding (raw −2000, −3024 HU after rescale, in 40 % of RSNA slices) is raised to it, so that
area averaging does not darken the rim of the field of view."""

WRAP_INTERCEPTS = (-100, 100)
WRAP_OFFSET = 1000
WRAP_MODULUS = 4096

Pixels = npt.NDArray[np.uint8]
PixelsHU = npt.NDArray[np.float32]


def is_wrapped(bits_stored: int, signed: bool, intercept: float) -> bool:
    """Whether a slice has the 12-bit wrap: unsigned 12-bit data with an intercept near 0 cannot hold air.

    123 slices of RSNA 2019 have it. Signed slices with intercept 0 are right as they are.
    """
    return bits_stored == 12 and not signed and WRAP_INTERCEPTS[0] < intercept < WRAP_INTERCEPTS[1]


def stored_to_hu(stored: npt.NDArray[np.integer], *, slope: float, intercept: float, wrapped: bool = False) -> PixelsHU:
    """Rescale stored values to HU: HU = slope × stored + intercept (PS3.3 C.11.1.1.2, Modality LUT), air at the least.

    Args:
        stored: stored values, integer [row, column].
        slope: (0028,1053) Rescale Slope.
        intercept: (0028,1052) Rescale Intercept.
        wrapped: undo the 12-bit wrap first: add 1000, subtract 4096 where that reaches 4096, and use intercept −1000.

    Returns:
        float32 [row, column] in HU, never below −1024.
    """
    if wrapped:
        shifted = stored.astype(np.int32) + WRAP_OFFSET
        stored = np.where(shifted >= WRAP_MODULUS, shifted - WRAP_MODULUS, shifted)
        intercept = -WRAP_OFFSET
    pixels_hu = stored.astype(np.float32)
    if slope != 1:
        pixels_hu *= np.float32(slope)
    if intercept != 0:
        pixels_hu += np.float32(intercept)
    return np.maximum(pixels_hu, np.float32(AIR_HU), out=pixels_hu)


def resize_hu(
    pixels_hu: PixelsHU, *, size: int, row_spacing_mm: float = 1.0, column_spacing_mm: float = 1.0
) -> PixelsHU:
    """Resample a slice to `size` × `size`, padded with air where it is not square, its aspect in mm kept.

    Shrinking averages over areas; enlarging interpolates linearly.

    Args:
        pixels_hu: float32 [row, column] in HU.
        size: rows and columns of the result.
        row_spacing_mm: distance between rows, first value of (0028,0030) Pixel Spacing.
        column_spacing_mm: distance between columns, its second value.

    Returns:
        float32 [size, size] in HU.
    """
    height_mm = pixels_hu.shape[0] * row_spacing_mm
    width_mm = pixels_hu.shape[1] * column_spacing_mm
    longest_mm = max(height_mm, width_mm)
    rows = max(1, round(size * height_mm / longest_mm))
    columns = max(1, round(size * width_mm / longest_mm))
    if (rows, columns) != pixels_hu.shape:
        shrinking = rows <= pixels_hu.shape[0] and columns <= pixels_hu.shape[1]
        how = cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR
        pixels_hu = np.asarray(cv2.resize(pixels_hu, (columns, rows), interpolation=how), np.float32)
    if (rows, columns) == (size, size):
        return pixels_hu
    square = np.full((size, size), AIR_HU, np.float32)
    top, left = (size - rows) // 2, (size - columns) // 2
    square[top : top + rows, left : left + columns] = pixels_hu
    return square


def window_hu(pixels_hu: PixelsHU, windows: Mapping[str, Window]) -> Pixels:
    """Apply windows: HU at centre − width/2 becomes 0, at centre + width/2 becomes 255 (PS3.3 C.11.2.1.3.2, LINEAR_EXACT).

    Args:
        pixels_hu: float32 [row, column] in HU.
        windows: window by name; their order is the order of the last axis.

    Returns:
        uint8 [row, column, window], rounded to the nearest grey level.
    """
    out = np.empty((*pixels_hu.shape, len(windows)), np.uint8)
    for number, window in enumerate(windows.values()):
        gain = 255.0 / window.width
        # addWeighted clips and rounds while it writes uint8: a third of the time of the same in numpy.
        out[..., number] = cv2.addWeighted(pixels_hu, gain, pixels_hu, 0.0, -window.low_hu * gain, dtype=cv2.CV_8U)
    return out
