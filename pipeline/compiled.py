"""Loops compiled by numba, for what every slice goes through: several times as fast as the same in steps of numpy or OpenCV, each of
which writes for the next to read what does not fit into the processor's cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numba

Loop = TypeVar("Loop", bound=Callable[..., object])


def compiled(loop: Loop) -> Loop:
    """Compile a function of numbers and arrays at its first call.

    What was compiled is kept beside the source, or in the user's cache where that cannot be written: half a second once, none after.
    """
    try:
        return cast("Loop", numba.njit(cache=True)(loop))
    except RuntimeError:  # neither can be written
        return cast("Loop", numba.njit(loop))
