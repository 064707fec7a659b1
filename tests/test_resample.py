from __future__ import annotations

import cv2
import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.pixels import apply_rescale, apply_windowing

from pipeline.config import Window
from pipeline.head import Box
from pipeline.resample import COARSE_SIZE, Converter


@pytest.mark.parametrize(("slope", "intercept"), [(1, -1024), (1, 0), (0.5, -1000.5), (2, -1024)])
def test_rescale_agrees_with_pydicom(slope: float, intercept: float) -> None:
    stored = np.random.default_rng(0).integers(0, 4096, (COARSE_SIZE, COARSE_SIZE)).astype(np.uint16)
    dataset = Dataset()
    dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept
    expected = np.maximum(apply_rescale(stored, dataset), -1024)
    converter, half_mm = Converter(image_size=1, windows={}), COARSE_SIZE / 2
    box = Box(-half_mm, -half_mm, 2 * half_mm)
    found = converter.coarse_hu(stored, slope=slope, intercept=intercept, spacing_mm=(1.0, 1.0), box=box)
    np.testing.assert_allclose(found, expected, atol=1e-3)


WHOLE = Box(-32.0, -32.0, 64.0)


def convert(
    stored: np.ndarray,
    windows: dict[str, Window] | None = None,
    *,
    size: int | None = None,
    slope: float = 1.0,
    intercept: float = 0.0,
    spacing_mm: tuple[float, float] = (1.0, 1.0),
    box: Box | None = None,
) -> np.ndarray:
    side_mm = float(max(stored.shape[0] * spacing_mm[0], stored.shape[1] * spacing_mm[1]))
    converter = Converter(
        image_size=size or max(stored.shape), windows=windows or {"grey": Window(centre=127.5, width=255)}
    )
    box = box or Box(-side_mm / 2, -side_mm / 2, side_mm)
    return converter.window(stored, slope=slope, intercept=intercept, spacing_mm=spacing_mm, box=box)


@pytest.mark.parametrize(("centre", "width"), [(40, 80), (80, 200), (40, 380), (600, 2800)])
@pytest.mark.parametrize(("slope", "intercept"), [(1, -1024), (0.5, -300.5), (-1, 1000)])
def test_windowing_agrees_with_pydicom_to_half_a_grey_level(
    centre: float, width: float, slope: float, intercept: float
) -> None:
    stored = np.random.default_rng(0).integers(0, 2000, (64, 64)).astype(np.uint16)
    dataset = Dataset()
    dataset.PhotometricInterpretation, dataset.BitsStored, dataset.PixelRepresentation = "MONOCHROME2", 8, 0
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, 0
    dataset.WindowCenter, dataset.WindowWidth, dataset.VOILUTFunction = centre, width, "LINEAR_EXACT"
    # pydicom spreads over the range of its stored bits, after rescale: 0 to 255 here
    expected = apply_windowing(np.maximum(stored.astype(float) * slope + intercept, -1024.0), dataset)
    windows = {"w": Window(centre=centre, width=width)}
    found = convert(stored, windows, slope=slope, intercept=intercept)[..., 0]
    assert np.abs(found.astype(float) - expected).max() <= 0.5 + 1e-3


def test_window_ends_are_0_and_255_and_the_order_is_kept() -> None:
    stored = np.tile(np.array([[-2000, 0, 40, 80, 3000]], np.int16), (5, 1))
    windows = {"brain": Window(centre=40, width=80), "bone": Window(centre=600, width=2800)}
    found = convert(stored, windows)
    assert found.shape == (5, 5, 2)
    assert found[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    assert found[0, 1, 1] == round((0 + 800) * 255 / 2800)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_number_of_windows_is_laid_out_alike(count: int) -> None:
    stored = np.random.default_rng(0).integers(-100, 300, (24, 24)).astype(np.int16)
    windows = {str(width): Window(centre=40, width=width) for width in (60, 80, 200, 400)[:count]}
    found = convert(stored, windows)
    for number, window in enumerate(windows.values()):
        np.testing.assert_array_equal(found[..., number], convert(stored, {"w": window})[..., 0])


@pytest.mark.parametrize("slope", [1.0, -1.0])
def test_padding_below_air_becomes_air(slope: float) -> None:
    pixels_hu = np.full((8, 8), 50.0)
    pixels_hu[:, :4] = -3024
    stored = ((pixels_hu + 1024) / slope).astype(np.int16)
    windows = {"air": Window(centre=-500, width=2000)}
    found = convert(stored, windows, size=1, slope=slope, intercept=-1024)
    assert found.item() == round((np.mean([-1024, 50]) + 1500) * 255 / 2000)


def test_shrinking_averages_areas() -> None:
    stored = np.random.default_rng(0).integers(0, 255, (64, 64)).astype(np.int16)
    expected = stored.reshape(16, 4, 16, 4).mean(axis=(1, 3))
    np.testing.assert_allclose(convert(stored, size=16)[..., 0], expected, atol=0.5)


@pytest.mark.parametrize("kind", [np.int16, np.uint16])
@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("turned", [False, True])
def test_areas_are_averaged_as_opencv_does(kind: type, ratio: int, turned: bool) -> None:
    """And so they are of a slice that was turned or cropped, whose rows lie anywhere in memory."""
    stored = np.random.default_rng(0).integers(0, 300, (16 * ratio, 16 * ratio)).astype(kind)
    given = np.asfortranarray(stored[::-1])[::-1] if turned else stored
    expected = cv2.resize(stored.astype(np.float32), (16, 16), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(convert(given, size=16)[..., 0], np.rint(expected.clip(0, 255)))


def test_axis_that_shrinks_is_averaged_though_the_other_grows() -> None:
    """Many short rows: each pixel of the result is the mean of what lies in it."""
    stored = np.repeat(np.random.default_rng(0).integers(0, 255, (128, 1)), 16, axis=1).astype(np.int16)
    found = convert(stored, size=32, spacing_mm=(0.125, 1.0))[..., 0]
    expected = stored.reshape(32, 4, 16).mean(axis=(1, 2))
    np.testing.assert_allclose(found, np.repeat(expected[:, None], 32, axis=1), atol=0.5)


def test_resampling_comes_before_the_window() -> None:
    edge = np.array([[40, 3000], [40, 3000]], np.int16)  # half blood, half bone
    window = {"brain": Window(centre=40, width=80)}
    assert convert(edge, window, size=1).item() == 255  # the mean of the clipped halves would be 191


def test_slices_that_are_not_square_are_padded_with_air_and_keep_their_aspect() -> None:
    found = convert(np.full((40, 80), 50, np.int16), size=32)[..., 0]
    assert found.shape == (32, 32)
    assert (found[8:24] == 50).all()
    assert (found[:8] == 0).all()
    assert (found[24:] == 0).all()
    tall = convert(np.full((64, 64), 50, np.int16), size=32, spacing_mm=(1.0, 0.5))[..., 0]
    assert (tall[:, 8:24] == 50).all()
    assert (tall[:, :8] == 0).all()


def test_smaller_field_of_view_keeps_its_scale_in_the_study() -> None:
    small = np.full((32, 32), 50, np.int16)
    found = convert(small, size=32, box=WHOLE)[..., 0]  # 32 mm of 64
    assert (found[8:24, 8:24] == 50).all()
    assert np.count_nonzero(found) == 16 * 16


def test_box_shows_what_lies_in_it_and_air_where_it_reaches_beyond() -> None:
    rows, columns = np.mgrid[:64, :64]
    stored = (rows + 2 * columns).astype(np.int16)
    box = Box(-16.0, -24.0, 32.0)  # rows 16 to 48, columns 8 to 40
    np.testing.assert_array_equal(convert(stored, size=32, box=box)[..., 0], stored[16:48, 8:40])
    beyond = convert(stored + 1, size=32, box=Box(16.0, 16.0, 32.0))[..., 0]  # rows 48 to 80
    np.testing.assert_array_equal(beyond[:16, :16], stored[48:, 48:] + 1)
    assert not beyond[16:].any()
    assert not convert(stored + 1, size=32, box=Box(500.0, 0.0, 32.0)).any()


def test_pixel_is_found_again_in_the_slice_it_came_from() -> None:
    stored = np.zeros((64, 64), np.int16)
    stored[20, 33] = 255
    box, size = Box(-20.0, -8.0, 30.0), 60
    found = convert(stored, size=size, box=box)[..., 0]
    row, column = np.unravel_index(found.argmax(), found.shape)
    pixel_mm = box.side_mm / size
    assert abs(32 + box.top_mm + (row + 0.5) * pixel_mm - 20.5) <= 0.5
    assert abs(32 + box.left_mm + (column + 0.5) * pixel_mm - 33.5) <= 0.5


def test_rescale_does_not_overflow_16_bits() -> None:
    stored = np.array([[30000, 32767], [-32768, 100]], np.int16)
    bone = {"bone": Window(centre=1000, width=2000)}
    assert convert(stored, bone, slope=2, intercept=20000).ravel().tolist() == [255, 255, 0, 255]
