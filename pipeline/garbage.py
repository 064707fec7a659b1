"""Values that are no CT's: what some decoders make of a damaged file without a word, and the half noise of ID_b79eed528."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from pipeline.compiled import compiled
from pipeline.hounsfield import Stored

HIGHEST_HU, LOWEST_HU = 4096.0, -1500.0
"""No tissue lies beyond these; metal and padding do, but metal is small and padding has few values. Nor does the noise of air, which a
sharp kernel spreads by 100 HU, or by 200 in a thin slice, where a scanner does not cut values off at −1024."""

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
"""Pixels looked at: whole stretches of few rows, as memory is read by the 32 pixels."""


def is_garbage(stored: Stored, *, slope: float, intercept: float) -> bool:
    """Whether values are no CT's: out of any scanner's range for too much of the slice, or noise from row to row.

    Args:
        stored: stored values [row, column]; a sample of them is looked at.
        slope: (0028,1053) Rescale Slope, not 0.
        intercept: (0028,1052) Rescale Intercept.
    """
    strides = max(1, len(stored) // SAMPLED_ROWS), max(1, stored.shape[1] // SAMPLED_COLUMNS)
    size = abs(slope)
    lowest, highest, noise = (LOWEST_HU - intercept) / size, (HIGHEST_HU - intercept) / size, NOISE_STEP_HU / size
    is_rising = slope > 0
    above, others, steps, noisy = _count(stored, *strides, is_rising, lowest, highest, noise)
    most = GARBAGE_SHARE * stored[:: strides[0], :: strides[1]].size
    if above > most:
        return True
    # nearly always padding has one value: only where it has not, they are counted
    if others > most and len(_values_below(stored[:: strides[0], :: strides[1]], is_rising, lowest)) > PADDING_VALUES:
        return True
    return len(stored) >= SMOOTH_ROWS and noisy > NOISY_ROWS_SHARE * steps


def _values_below(sample: Stored, is_rising: bool, lowest: float) -> npt.NDArray[np.integer]:
    return np.unique(sample[sample < lowest] if is_rising else sample[sample > -lowest])


@compiled
def _count(
    stored: Stored, by_rows: int, by_columns: int, is_rising: bool, lowest: float, highest: float, noise: float
) -> tuple[int, int, int, int]:
    """Count in a sample of stored values: those above `highest`; those below `lowest` that are not like the first of these; rows
    that have a next one; and those of them that differ from it by more than `noise` on average."""
    rows, columns = stored.shape
    above, others, steps, noisy = 0, 0, 0, 0
    first, is_first = np.int64(0), True
    for row in range(0, rows, by_rows):
        has_next = row + 1 < rows
        next_row = row + 1 if has_next else row
        change = np.int64(0)
        for column in range(0, columns, by_columns):
            stored_value = np.int64(stored[row, column])  # compiled, int() would leave it unsigned, and 16 bits wide
            change += abs(np.int64(stored[next_row, column]) - stored_value)
            value = stored_value if is_rising else -stored_value
            if value > highest:
                above += 1
            elif value < lowest:
                if is_first:
                    first, is_first = value, False
                if value != first:
                    others += 1
        if has_next:
            steps += 1
            if change > noise * math.ceil(columns / by_columns):
                noisy += 1
    return above, others, steps, noisy
