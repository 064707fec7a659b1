"""Augmentation: each parameter does what it says, to a slice and its neighbours alike, and depends on its seed alone."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.augment import Pixels, build_augment, slice_seed
from pipeline.config import AugmentConfig

OFF = AugmentConfig(flip=0, rotate_deg=0, shift=0, scale=0, brightness=0, contrast=0, noise=0, cutout=0)
ALL = AugmentConfig(
    flip=0.5, rotate_deg=10, shift=0.05, scale=0.1, brightness=0.1, contrast=0.1, noise=0.05, cutout=0.5
)


def only(**values: float) -> AugmentConfig:
    return OFF.model_copy(update=values)


def draw(size: int = 32, slices: int = 3, windows: int = 3) -> Pixels:
    return np.random.default_rng(0).integers(0, 255, (slices, size, size, windows)).astype(np.uint8)


def blob(column: float, size: int = 64) -> Pixels:
    """A soft spot in the middle row."""
    y, x = np.mgrid[:size, :size]
    spot = 200 * np.exp(-((x - column) ** 2 + (y - (size - 1) / 2) ** 2) / 18)
    return np.repeat(spot.astype(np.uint8)[None, :, :, None], 3, axis=3)


def centre(pixels_KRCW: Pixels) -> tuple[float, float]:
    """Row and column of the centre of mass, from the middle."""
    weights = pixels_KRCW[0, ..., 0].astype(float)
    y, x = np.mgrid[: weights.shape[0], : weights.shape[1]] - (len(weights) - 1) / 2
    return (y * weights).sum() / weights.sum(), (x * weights).sum() / weights.sum()


def test_draw_depends_on_its_seed_alone() -> None:
    augment, other = build_augment(ALL), build_augment(ALL)
    first = augment(draw(), 7)
    for seed in range(5):
        other(draw(), seed)  # what came before must not matter
    np.testing.assert_array_equal(first, other(draw(), 7))
    assert (first != augment(draw(), 8)).any()
    assert first.shape == draw().shape
    assert first.dtype == np.uint8


def test_nothing_changes_when_all_is_off() -> None:
    augment = build_augment(OFF)
    for seed in range(5):
        np.testing.assert_array_equal(augment(draw(), seed), draw())


@pytest.mark.parametrize("windows", [1, 2, 3, 5])
def test_one_geometric_transform_serves_all_slices_and_windows(windows: int) -> None:
    one = draw(windows=1)[:1]
    pixels = np.broadcast_to(one, (3, 32, 32, windows)).copy()
    geometry = only(flip=0.5, rotate_deg=20.0, shift=0.1, scale=0.2, cutout=0.5)
    for seed in range(6):
        changed = build_augment(geometry)(pixels.copy(), seed)
        assert (changed == changed[:1, ..., :1]).all()
        assert (changed != pixels).any()


def test_flip_turns_all_slices_over_or_none() -> None:
    pixels, flipped = draw(), 0
    for seed in range(200):
        changed = build_augment(only(flip=0.5))(pixels.copy(), seed)
        is_flipped = bool((changed != pixels).any())
        np.testing.assert_array_equal(changed, pixels[:, :, ::-1] if is_flipped else pixels)
        flipped += is_flipped
    assert 75 < flipped < 125


def test_rotation_keeps_to_its_range_and_reaches_both_sides() -> None:
    augment = build_augment(only(rotate_deg=30.0))
    places = [centre(augment(blob(51.5), seed)) for seed in range(60)]
    degrees = [np.degrees(np.arctan2(row, column)) for row, column in places]
    assert max(map(abs, degrees)) < 31
    assert min(degrees) < -15
    assert max(degrees) > 15
    for row, column in places:
        assert np.hypot(row, column) == pytest.approx(20, abs=0.7)  # about the middle


def test_shift_keeps_to_its_share_of_the_size() -> None:
    augment = build_augment(only(shift=0.1))
    places = np.array([centre(augment(blob(31.5), seed)) for seed in range(60)])
    assert np.abs(places).max() < 0.1 * 64 + 0.5
    assert (places.min(axis=0) < -3).all()
    assert (places.max(axis=0) > 3).all()


def test_scale_keeps_to_its_range() -> None:
    augment = build_augment(only(scale=0.2))
    columns = [centre(augment(blob(51.5), seed))[1] / 20 for seed in range(60)]
    assert 0.77 < min(columns) < 0.9
    assert 1.1 < max(columns) < 1.23


def test_what_comes_in_from_outside_is_air() -> None:
    full = np.full((1, 32, 32, 3), 200, np.uint8)
    assert {*build_augment(only(rotate_deg=45.0))(full, 1)[0, 0, 0].tolist()} == {0}


def test_flip_and_rotation_are_drawn_apart() -> None:
    augment = build_augment(only(flip=0.5, rotate_deg=30.0))
    signs = {(row > 0, column > 0) for row, column in (centre(augment(blob(51.5), seed)) for seed in range(40))}
    assert len(signs) == 4  # under one seed for each, what is flipped would always turn the same way


def test_brightness_adds_within_the_window() -> None:
    augment = build_augment(only(brightness=0.2))
    grey = np.full((1, 8, 8, 3), 100, np.uint8)
    grey[0, 0], grey[0, 1] = 2, 254
    added = []
    for seed in range(60):
        changed = augment(grey.copy(), seed).astype(int)
        added.append(changed[0, 4, 4, 0] - 100)
        assert changed[0, 0, 0, 0] == pytest.approx(max(0, 2 + added[-1]), abs=1)
        assert changed[0, 1, 0, 0] == pytest.approx(min(255, 254 + added[-1]), abs=1)
    assert -52 <= min(added) < -25
    assert 25 < max(added) <= 52


def test_contrast_multiplies_within_the_window() -> None:
    augment = build_augment(only(contrast=0.2))
    grey = np.zeros((1, 3, 8, 3), np.uint8)
    grey[0, 1], grey[0, 2] = 100, 250
    factors = []
    for seed in range(60):
        changed = augment(grey.copy(), seed)[0, :, 0, 0].astype(float)
        factors.append(changed[1] / 100)
        assert changed[0] == 0
        assert changed[2] == pytest.approx(min(255, 250 * factors[-1]), abs=3)
    assert 0.79 <= min(factors) < 0.9
    assert 1.1 < max(factors) <= 1.21


def test_noise_is_normal_of_its_own_in_each_slice_and_the_same_in_its_windows() -> None:
    augment = build_augment(only(noise=0.04))
    grey = np.full((3, 128, 128, 3), 128, np.uint8)
    deviations = []
    for seed in range(60):
        noise = augment(grey.copy(), seed).astype(float) - 128
        deviations.append(noise.std())
        assert abs(noise.mean()) < 0.6
        assert (noise == noise[..., :1]).all()
        if noise.std() > 3:
            assert np.abs(np.corrcoef(noise[..., 0].reshape(3, -1))[np.triu_indices(3, 1)]).max() < 0.05
            kurtosis = (noise**4).mean() / (noise**2).mean() ** 2
            assert kurtosis == pytest.approx(3, abs=0.2)
    assert 15 < sum(deviation == 0 for deviation in deviations) < 45  # every other slice has none
    assert 0.8 * 0.04 * 255 < max(deviations) < 1.05 * 0.04 * 255


def test_cutout_blackens_the_same_holes_everywhere() -> None:
    full = np.full((3, 64, 64, 3), 200, np.uint8)
    augment = build_augment(only(cutout=0.5))
    share = [float((augment(full.copy(), seed) == 0).mean()) for seed in range(100)]
    assert 30 < sum(one > 0 for one in share) < 70
    assert max(share) <= 3 * 0.2**2
    holes = next(changed for seed in range(20) if not (changed := augment(full.copy(), seed)).all())
    assert (holes == holes[:1, ..., :1]).all()


def test_seeds_of_slices_epochs_and_draws_differ() -> None:
    seeds = {slice_seed(0, epoch, n, again) for epoch in range(10) for n in range(200) for again in range(2)}
    assert len(seeds) == 4000
