"""The counting classifier on drawn heads, of which the number of blood pixels is known; the header classifier on made-up headers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import roc_auc_score

from pipeline.baseline import (
    HEADER_VALUES,
    SMALLEST_LEAF,
    Counter,
    balance_bins,
    balance_weights,
    counter_for,
    header_features,
    place_features,
    predict_from_headers,
)
from pipeline.config import Window

WINDOWS = {
    "brain": Window(centre=40, width=80),
    "subdural": Window(centre=80, width=200),
    "soft": Window(centre=40, width=380),
}
SIZE = 128


def disk(row: float, column: float, radius: float, size: int = SIZE) -> npt.NDArray[np.bool_]:
    rows, columns = np.mgrid[:size, :size]
    return (rows - row) ** 2 + (columns - column) ** 2 < radius**2


def head_hu(size: int = SIZE) -> npt.NDArray[np.float64]:
    """Air, a scalp of fat and muscle, a skull, and brain of 35 HU."""
    middle = (size - 1) / 2
    pixels_hu = np.full((size, size), -1000.0)
    for radius, hu in ((0.46, 20.0), (0.43, 1200.0), (0.39, 35.0)):
        pixels_hu[disk(middle, middle, radius * size, size)] = hu
    return pixels_hu


def windowed(pixels_hu: npt.NDArray[np.float64], windows: dict[str, Window] = WINDOWS) -> npt.NDArray[np.uint8]:
    fractions = [np.clip((pixels_hu - window.low_hu) / window.width, 0, 1) for window in windows.values()]
    return np.rint(np.stack(fractions, axis=-1) * 255).astype(np.uint8)


@pytest.fixture
def counter() -> Counter:
    found, window = counter_for(WINDOWS)
    assert found is not None
    assert window == "subdural", "brain ends at 80 HU, and soft is coarser"
    return found


def test_blood_inside_the_skull_is_counted_pixel_by_pixel(counter: Counter) -> None:
    pixels_hu, blood = head_hu(), disk(50, 60, 7)
    pixels_hu[blood] = 65
    assert counter.count(windowed(pixels_hu)) == blood.sum()


@pytest.mark.parametrize("hu", [35, 45, 95, 150, 400])
def test_brain_and_calcium_and_bone_inside_the_skull_are_not_counted(counter: Counter, hu: float) -> None:
    pixels_hu = head_hu()
    pixels_hu[disk(50, 60, 7)] = hu
    assert counter.count(windowed(pixels_hu)) == 0


def test_blood_density_outside_the_skull_is_not_counted(counter: Counter) -> None:
    pixels_hu = head_hu()
    scalp = pixels_hu == 20
    pixels_hu[scalp] = 65  # a scalp hematoma all the way round
    pixels_hu[:6] = 65  # and the head rest
    assert counter.count(windowed(pixels_hu)) == 0


def test_slice_without_a_skull_counts_nothing(counter: Counter) -> None:
    assert counter.count(windowed(np.full((SIZE, SIZE), -1000.0))) == 0
    assert counter.count(windowed(np.full((SIZE, SIZE), 65.0))) == 0
    assert counter.count(windowed(np.full((SIZE, SIZE), 1200.0))) == 0


@pytest.mark.parametrize("inner", [0.39, 0.42])
def test_gap_in_the_skull_is_bridged_even_where_it_is_thin(counter: Counter, inner: float) -> None:
    pixels_hu, blood = head_hu(), disk(50, 60, 7)
    pixels_hu[disk(63.5, 63.5, inner * SIZE)] = 35
    pixels_hu[blood] = 65
    gap = pixels_hu[:32, 62:66]
    gap[gap > 300] = 35
    assert counter.count(windowed(pixels_hu)) == blood.sum()


def test_head_cut_off_by_the_edge_of_the_slice_is_survived(counter: Counter) -> None:
    pixels_hu = np.roll(head_hu(), 20, axis=0)
    pixels_hu[disk(70, 60, 7)] = 65
    assert 0 <= counter.count(windowed(pixels_hu)) <= disk(70, 60, 7).sum() + 40


@pytest.mark.parametrize("size", [32, 64, 256])
def test_count_follows_the_size_of_the_slice(counter: Counter, size: int) -> None:
    pixels_hu, blood = head_hu(size), disk(0.4 * size, 0.5 * size, 0.06 * size, size)
    pixels_hu[blood] = 65
    assert counter.count(windowed(pixels_hu)) == blood.sum()


def test_bone_is_found_in_a_window_wider_than_bone() -> None:
    windows = {"subdural": Window(centre=80, width=200), "bone": Window(centre=480, width=2500)}
    found, _ = counter_for(windows)
    assert found is not None
    pixels_hu, blood = head_hu(), disk(50, 60, 7)
    pixels_hu[blood] = 65
    assert found.count(windowed(pixels_hu, windows)) == blood.sum()


@pytest.mark.parametrize(
    ("windows", "reason"),
    [
        ({"brain": Window(centre=40, width=80)}, "no window covers 50 to 90 HU"),
        ({"narrow": Window(centre=60, width=100)}, "bone cannot be told from blood"),
    ],
)
def test_windows_that_do_not_allow_counting_are_refused_with_the_reason(
    windows: dict[str, Window], reason: str
) -> None:
    found, why = counter_for(windows)
    assert found is None
    assert reason in why


STUDIES = 400


def made_headers(**values: npt.ArrayLike) -> dict[str, npt.NDArray[np.float64]]:
    """Headers that are all alike but for these values."""
    return {name: np.broadcast_to(values.get(name, 1.0), STUDIES).astype(float) for name in HEADER_VALUES}


def test_headers_that_give_the_answer_away_are_read() -> None:
    rng = np.random.default_rng(0)
    truth = (rng.random(STUDIES) < 0.4).astype(np.int8)
    wrong = rng.random(STUDIES) < 0.2
    padding = np.where((truth == 1) ^ wrong, -1024.0, -3024.0)  # as in RSNA's data: padded studies bleed less often
    features = header_features(made_headers(lowest_hu=padding, tilt_deg=rng.normal(10, 5, STUDIES)))
    learn = np.arange(STUDIES) < 200
    said = predict_from_headers(features, truth, learn_R=learn, predict=~learn)
    assert roc_auc_score(truth[~learn], said) == pytest.approx(0.8, abs=0.08), "of a fifth the header lies"


def test_headers_that_say_nothing_reach_chance() -> None:
    rng, aucs = np.random.default_rng(0), []
    learn = np.arange(STUDIES) < 200
    for _ in range(5):
        truth = (rng.random(STUDIES) < 0.4).astype(np.int8)
        features = header_features(made_headers(tilt_deg=rng.normal(10, 5, STUDIES)))
        said = predict_from_headers(features, truth, learn_R=learn, predict=~learn)
        aucs.append(roc_auc_score(truth[~learn], said))
    assert np.mean(aucs) == pytest.approx(0.5, abs=0.08)


def test_what_is_known_of_the_predicted_studies_does_not_reach_their_predictions() -> None:
    rng = np.random.default_rng(0)
    truth = (rng.random(STUDIES) < 0.4).astype(np.int8)
    features = header_features(made_headers(tilt_deg=rng.normal(10, 5, STUDIES)))
    learn = np.arange(STUDIES) < 300
    one = predict_from_headers(features, truth, learn_R=learn, predict=~learn)
    other = predict_from_headers(features, np.where(learn, truth, 1 - truth), learn_R=learn, predict=~learn)
    np.testing.assert_array_equal(one, other)


def test_headers_that_lack_a_value_or_all_agree_are_survived() -> None:
    assert header_features(made_headers(thickness_mm=np.nan)).shape == (STUDIES, 0)
    truth = (np.arange(STUDIES) % 4 == 0).astype(np.int8)
    learn = np.arange(STUDIES) < 200
    alike = predict_from_headers(header_features(made_headers()), truth, learn_R=learn, predict=~learn)
    assert set(alike) == {0.25}
    half = header_features(made_headers(thickness_mm=np.where(truth == 1, np.nan, 5.0)))
    assert half.shape == (STUDIES, 1)
    said = predict_from_headers(half, truth, learn_R=learn, predict=~learn)
    assert said[truth[~learn] == 1].min() > said[truth[~learn] == 0].max()


def test_headers_of_one_class_only_give_its_share() -> None:
    features = header_features(made_headers(tilt_deg=np.arange(STUDIES)))
    learn = np.arange(STUDIES) < 200
    for value in (0, 1):
        truth = np.full(STUDIES, value, np.int8)
        assert set(predict_from_headers(features, truth, learn_R=learn, predict=~learn)) == {value}


def test_place_of_a_slice_is_counted_from_both_ends_of_its_study() -> None:
    position = np.array([[10, 15, 21, np.nan], [-40, -37, -34, -31]], np.float32)
    slices = np.array([[0, 0], [0, 1], [0, 2], [1, 3]])
    nan = np.nan
    expected = [  # position, above the lowest, below the highest, to the neighbour below and above, share of the study
        [10, 0, 11, nan, 5, 0],
        [15, 5, 6, 5, 6, 0.5],
        [21, 11, 0, 6, nan, 1],
        [-31, 9, 0, 3, nan, 1],
    ]
    np.testing.assert_allclose(place_features(position, np.array([3, 4]), slices), expected)
    alone = place_features(np.array([[3.0], [3.0]]), np.array([1, 1]), np.array([[0, 0], [1, 0]]))
    assert alone.shape == (2, 0), "studies of one slice at one place tell nothing"


def test_leaves_of_slices_hold_as_many_studies_as_leaves_of_studies() -> None:
    """Slices alike within their study are no more than the study is: from too few studies nothing is learnt."""
    for studies, learns in ((2 * SMALLEST_LEAF - 1, False), (3 * SMALLEST_LEAF, True)):
        bleeds = np.arange(studies) % 3 == 0
        tilt = np.repeat(bleeds.astype(float), 10)
        learn = np.ones(10 * studies, bool)
        said = predict_from_headers(
            tilt[:, None], np.repeat(bleeds, 10).astype(np.int8), learn_R=learn, predict=learn, rows_a_study=10
        )
        assert (np.ptp(said) > 0) == learns


def test_balanced_rows_weigh_the_same_in_every_bin_and_leave_the_score_nothing() -> None:
    rng = np.random.default_rng(0)
    score = np.round(rng.normal(0, 1, 6000), 2)  # with ties
    truth = rng.random(6000) < 1 / (1 + np.exp(2 - 1.5 * score))
    seen = truth + rng.normal(0, 1, 6000)
    bins = balance_bins(truth, score)
    assert bins is not None
    weights = balance_weights(truth, bins)
    for one in np.unique(bins):
        assert weights[(bins == one) & truth].sum() == pytest.approx(weights[(bins == one) & ~truth].sum())
    assert weights.min() >= 0
    assert weights.max() <= 1
    assert roc_auc_score(truth, score) > 0.78
    assert roc_auc_score(truth, score, sample_weight=weights) == pytest.approx(0.5, abs=0.01)
    plain, balanced = roc_auc_score(truth, seen), roc_auc_score(truth, seen, sample_weight=weights)
    assert balanced == pytest.approx(plain, abs=0.02), "what owes the score nothing keeps its skill"


def test_too_few_rows_of_a_class_are_not_balanced() -> None:
    score = np.linspace(0, 1, 100)
    assert balance_bins(np.arange(100) % 7 == 0, score) is not None, "15 of 100"
    assert balance_bins(np.arange(100) % 8 == 0, score) is None, "13 of 100"
    assert balance_bins(np.arange(100) % 8 != 0, score) is None
