from __future__ import annotations

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.pixels import apply_rescale, apply_windowing

from pipeline.config import Window
from pipeline.hounsfield import is_wrapped, resize_hu, stored_to_hu, window_hu


@pytest.mark.parametrize(("slope", "intercept"), [(1, -1024), (1, 0), (0.5, -1000.5), (2, -1024)])
def test_rescale_agrees_with_pydicom(slope: float, intercept: float) -> None:
    stored = np.random.default_rng(0).integers(100, 4096, (32, 32)).astype(np.uint16)
    dataset = Dataset()
    dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept
    expected = np.maximum(apply_rescale(stored, dataset), -1024)
    np.testing.assert_allclose(stored_to_hu(stored, slope=slope, intercept=intercept), expected, atol=1e-3)


@pytest.mark.parametrize(("centre", "width"), [(40, 80), (80, 200), (40, 380), (600, 2800)])
def test_windowing_agrees_with_pydicom_to_one_grey_level(centre: float, width: float) -> None:
    pixels_hu = np.random.default_rng(0).uniform(-1024, 3000, (64, 64)).astype(np.float32)
    dataset = Dataset()
    dataset.PhotometricInterpretation, dataset.BitsStored, dataset.PixelRepresentation = "MONOCHROME2", 8, 0
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, 0
    dataset.WindowCenter, dataset.WindowWidth, dataset.VOILUTFunction = centre, width, "LINEAR_EXACT"
    expected = apply_windowing(pixels_hu.astype(np.float64), dataset)
    # pydicom spreads over the range of its stored bits, after rescale: 0 to 255 here
    found = window_hu(pixels_hu, {"w": Window(centre=centre, width=width)})[..., 0]
    assert np.abs(found.astype(float) - expected).max() <= 0.5 + 1e-3


def test_window_ends_are_0_and_255_and_the_order_is_kept() -> None:
    pixels_hu = np.array([[-2000, 0, 40, 80, 3000]], np.float32)
    windows = {"brain": Window(centre=40, width=80), "bone": Window(centre=600, width=2800)}
    found = window_hu(pixels_hu, windows)
    assert found.shape == (1, 5, 2)
    assert found[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    assert found[0, 1, 1] == round((0 + 800) * 255 / 2800)


def test_only_unsigned_12_bit_with_intercept_near_zero_is_wrapped() -> None:
    assert is_wrapped(12, False, 0)
    assert is_wrapped(12, False, 1)
    assert not is_wrapped(12, False, -1024)
    assert not is_wrapped(12, False, -1000)
    assert not is_wrapped(12, True, 0)
    assert not is_wrapped(16, True, 0)


def test_unwrapping_undoes_the_wrap() -> None:
    true_hu = np.array([[-1000, -500, 0, 40, 1000, 3000]])
    wrapped = (true_hu % 4096).astype(np.uint16)
    np.testing.assert_array_equal(stored_to_hu(wrapped, slope=1, intercept=0, wrapped=True), true_hu)


def test_padding_becomes_air() -> None:
    stored = np.array([[-2000, 0]], np.int16)
    assert stored_to_hu(stored, slope=1, intercept=-1024).tolist() == [[-1024, -1024]]


def test_shrinking_averages_areas() -> None:
    pixels_hu = np.random.default_rng(0).normal(40, 20, (64, 64)).astype(np.float32)
    expected = pixels_hu.reshape(16, 4, 16, 4).mean(axis=(1, 3))
    np.testing.assert_allclose(resize_hu(pixels_hu, size=16), expected, atol=1e-3)


def test_resampling_comes_before_the_window() -> None:
    edge = np.array([[40, 3000], [40, 3000]], np.float32)  # half blood, half bone
    window = {"brain": Window(centre=40, width=80)}
    assert window_hu(resize_hu(edge, size=1), window).item() == 255  # the mean of the clipped halves would be 191


def test_slices_that_are_not_square_are_padded_with_air_and_keep_their_aspect() -> None:
    found = resize_hu(np.full((40, 80), 50, np.float32), size=32)
    assert found.shape == (32, 32)
    assert (found[8:24] == 50).all()
    assert (found[:8] == -1024).all()
    assert (found[24:] == -1024).all()
    tall = resize_hu(np.full((64, 64), 50, np.float32), size=32, row_spacing_mm=1.0, column_spacing_mm=0.5)
    assert (tall[:, 8:24] == 50).all()
    assert (tall[:, :8] == -1024).all()
