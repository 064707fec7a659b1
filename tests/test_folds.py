from __future__ import annotations

import time

import numpy as np
import pytest

from pipeline.errors import IchorError
from pipeline.folds import assign_folds, check_disjoint


def make_cohort(patients: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """As RSNA's: a few patients with up to 15 studies, epidural rare."""
    studies = np.ones(patients, int)
    studies[: patients // 11] = rng.integers(2, 16, patients // 11)
    keys = np.repeat(np.array([f"{number:016x}" for number in range(patients)], object), studies)
    rates = np.array([0.015, 0.12, 0.1, 0.13, 0.15])
    labels = (rng.random((len(keys), 5)) < rates).astype(np.int8)
    return keys, np.concatenate([labels, labels.max(axis=1, keepdims=True)], axis=1)


def test_no_patient_is_in_two_folds_and_every_fold_has_its_share() -> None:
    keys, labels = make_cohort(2000, np.random.default_rng(0))
    folds = assign_folds(keys, labels, count=5, seed=0)
    assert {len(set(folds[keys == key].tolist())) for key in set(keys.tolist())} == {1}
    per_fold = np.array([labels[folds == fold].sum(axis=0) for fold in range(5)])
    assert np.bincount(folds).min() > 0.9 * len(keys) / 5
    assert (per_fold.min(axis=0) > 0.6 * per_fold.mean(axis=0)).all()
    patients_with_epidural = [len(set(keys[(folds == fold) & (labels[:, 0] == 1)].tolist())) for fold in range(5)]
    assert max(patients_with_epidural) - min(patients_with_epidural) <= 1  # the rarest label is spread evenly


def test_folds_depend_on_the_seed_and_on_nothing_else() -> None:
    keys, labels = make_cohort(300, np.random.default_rng(1))
    folds = assign_folds(keys, labels, count=5, seed=0)
    np.testing.assert_array_equal(folds, assign_folds(keys, labels, count=5, seed=0))
    assert (folds != assign_folds(keys, labels, count=5, seed=1)).any()
    shuffled = np.random.default_rng(2).permutation(len(keys))
    np.testing.assert_array_equal(folds[shuffled], assign_folds(keys[shuffled], labels[shuffled], count=5, seed=0))


def test_cohort_of_rsna_size_takes_seconds() -> None:
    keys, labels = make_cohort(18_938, np.random.default_rng(0))
    started_s = time.monotonic()
    folds = assign_folds(keys, labels, count=5, seed=0)
    print(f"{len(keys)} studies: {time.monotonic() - started_s:.1f} s")
    assert np.bincount(folds).tolist() == pytest.approx([len(keys) / 5] * 5, rel=0.01)


def test_fewer_patients_than_folds_is_refused() -> None:
    with pytest.raises(IchorError, match="there are only 2 patients"):
        assign_folds(np.array(["a", "b", "a"], object), np.zeros((3, 6), np.int8), count=3, seed=0)


def test_check_finds_a_leak() -> None:
    with pytest.raises(IchorError, match="two folds"):
        check_disjoint(np.array(["a", "a"], object), np.array([0, 1]))
