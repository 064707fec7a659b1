from __future__ import annotations

import numpy as np
import pytest

from pipeline.garbage import _count, is_garbage
from pipeline.hounsfield import find_padding, invert, is_inverted, is_wrapped, set_to_air, unwrap


def test_only_unsigned_12_bit_with_intercept_near_zero_is_wrapped() -> None:
    assert is_wrapped(12, False, 0)
    assert is_wrapped(12, False, 1)
    assert not is_wrapped(12, False, -1024)
    assert not is_wrapped(12, False, -1000)
    assert not is_wrapped(12, True, 0)
    assert not is_wrapped(16, True, 0)


@pytest.mark.parametrize("kind", [np.uint16, np.int16])
def test_unwrapping_undoes_the_wrap(kind: type) -> None:
    true_hu = np.array([[-1024, -1001, -500, 0, 40, 1000, 3000]])
    wrapped = (true_hu % 4096).astype(kind)
    np.testing.assert_array_equal(unwrap(wrapped).astype(int) - 1024, true_hu)


def head_like(kind: str = "int16") -> np.ndarray:
    """HU of a disk with a bright ring and noise, in air."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:256, :256] / 256 - 0.5
    radius = np.hypot(x, y)
    pixels_hu = np.where(radius < 0.35, 35.0, -1000.0)
    pixels_hu[(radius > 0.3) & (radius < 0.35)] = 1200
    return (pixels_hu + rng.normal(0, 8, pixels_hu.shape)).astype(kind)


def test_head_is_no_garbage_with_padding_and_with_metal() -> None:
    pixels_hu = head_like()
    assert not is_garbage(pixels_hu, slope=1, intercept=0)
    pixels_hu[:, :60] = -3024
    pixels_hu[120:140, 100:110] = 30_540
    assert not is_garbage(pixels_hu, slope=1, intercept=0)
    assert not is_garbage(pixels_hu // 2, slope=2, intercept=0)


STORED = [("int16", 1, 0), ("int16", -1, 0), ("uint16", 1, -32768), ("uint16", -1, 32767)]
"""Type, slope and intercept."""


def as_stored(pixels_hu: np.ndarray, kind: str, slope: int, intercept: int) -> np.ndarray:
    limits = np.iinfo(kind)
    return ((pixels_hu.astype(int) - intercept) * slope).clip(limits.min, limits.max).astype(kind)


@pytest.mark.parametrize(("kind", "slope", "intercept"), STORED)
@pytest.mark.parametrize(("low", "high"), [(-32768, 32767), (-1024, 3071), (-30000, -1200), (5000, 9000)])
def test_half_noise_is_garbage(low: int, high: int, kind: str, slope: int, intercept: int) -> None:
    pixels_hu = head_like()
    assert not is_garbage(as_stored(pixels_hu, kind, slope, intercept), slope=slope, intercept=intercept)
    pixels_hu[128:] = np.random.default_rng(0).integers(low, high, (128, 256))
    assert is_garbage(as_stored(pixels_hu, kind, slope, intercept), slope=slope, intercept=intercept)


@pytest.mark.parametrize("deviation_hu", [30, 90, 150])
def test_noise_of_a_sharp_kernel_is_no_garbage(deviation_hu: float) -> None:
    pixels_hu = head_like() + np.random.default_rng(0).normal(0, deviation_hu, (256, 256))
    assert pixels_hu.min() < -1100, "nothing is cut off at -1024"
    assert not is_garbage(pixels_hu.astype(np.int16), slope=1.0, intercept=0.0)


@pytest.mark.parametrize(("kind", "slope", "intercept"), STORED)
def test_compiled_or_not_a_sample_counts_the_same(kind: str, slope: int, intercept: int) -> None:
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (64, 64), (65, 300), (200, 33)):
        pixels_hu = rng.normal(-1000, 3000, shape)
        pixels_hu[rng.random(shape) < 0.4] = rng.choice([-32768, -3024, 32767])
        stored = as_stored(pixels_hu, kind, slope, intercept)
        arguments = (2, 3, slope > 0, -1500.0 - intercept, 4096.0 - intercept, 400.0)
        assert _count(stored, *arguments) == _count.__wrapped__(stored.astype(int), *arguments)


@pytest.mark.parametrize("kind", ["uint16", "int16"])
def test_negative_is_noticed_and_turned_positive(kind: str) -> None:
    stored = (head_like() + 1024).clip(0, 4095).astype(kind)
    assert not is_inverted(stored, None, slope=1, intercept=-1024)
    limits = 4095 if kind == "uint16" else -1
    negative = (limits - stored.astype(int)).astype(kind)
    assert is_inverted(negative, None, slope=1, intercept=-1024 if kind == "uint16" else 1024)
    np.testing.assert_array_equal(invert(negative, bits_stored=12), stored)


def test_tagged_padding_becomes_air_outside_the_head_and_water_stays_water() -> None:
    pixels_hu = head_like()
    pixels_hu[pixels_hu < -900] = 0  # padding of 0: as water
    inside = pixels_hu[128, 128] = 0
    padded = find_padding(pixels_hu, padding=0, limit=np.nan)
    assert padded is not None
    set_to_air(pixels_hu, padded, slope=1, intercept=0)
    assert pixels_hu[0, 0] == -1024
    assert pixels_hu[128, 128] == inside
    for absent in (np.nan, -2000, 77):
        assert find_padding(pixels_hu, padding=absent, limit=np.nan) is None


def test_range_of_padding_is_padding_whichever_end_is_named_first() -> None:
    stored = (head_like() + 1024).clip(0, 4095).astype(np.uint16)
    ring = np.hypot(*(np.mgrid[:256, :256] - 127.5)) > 120
    stored[ring] = np.random.default_rng(0).integers(4090, 4096, ring.sum())
    for padding, limit in ((4090, 4095), (4095, 4090)):
        np.testing.assert_array_equal(find_padding(stored, padding=padding, limit=limit), ring)
