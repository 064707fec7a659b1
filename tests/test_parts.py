"""Who learns, who stops, who is held out and who is only predicted: each slice in one part, each patient on one side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import Config
from pipeline.errors import IchorError
from pipeline.folds import NO_FOLD, deal_folds
from pipeline.labels import LABELS
from pipeline.parts import HELD_OUT, TRAINING, UNLABELLED, VALIDATION, FoldSlices, check_apart, split_slices
from pipeline.store import Store
from tests.conftest import Cohort
from tests.test_folds import RSNA_STUDIES, bare_store, make_cohort, make_rsna_cohort

TEST_STUDIES = 3_518
"""Of the challenge's test set, whose labels are not published."""


def parts_of(parts: FoldSlices) -> dict[str, np.ndarray]:
    return {
        TRAINING: parts.training,
        VALIDATION: parts.validation,
        HELD_OUT: parts.held_out,
        UNLABELLED: parts.unlabelled,
    }


@pytest.fixture
def config(cohort: Cohort) -> Config:
    return cohort.config(folds__count=3, train__validation_fraction=0.25)


@pytest.fixture
def store(cohort: Cohort) -> Store:
    """52 studies of 30 patients, 3 slices each, all labelled."""
    keys, labels_SL = make_cohort(30, np.random.default_rng(5))
    return bare_store(cohort.data, keys, np.repeat(labels_SL[:, None], 3, axis=1))


def unlabel(store: Store, folder: Path, *, studies: list[int], slices: list[int]) -> Store:
    """The same store without the labels of some studies, and of some slices of each."""
    labels = store.labels[:, : int(store.num_slices[0])].copy()
    labels[studies] = -1
    labels[:, slices] = -1
    return bare_store(folder, store.patient_key, labels)


def test_patients_are_apart_and_every_labelled_slice_has_one_part(config: Config, store: Store) -> None:
    table = deal_folds(config, store)
    all_held_out = []
    for fold in range(3):
        parts = split_slices(config, store, fold, table)
        patients = {name: set(store.patient_key[part[:, 0]].tolist()) for name, part in parts_of(parts).items()}
        assert parts.patients == {name: len(found) for name, found in patients.items()}
        assert all(patients[name] for name in (TRAINING, VALIDATION, HELD_OUT))
        assert sum(map(len, patients.values())) == len(set.union(*patients.values())), "a patient is in two parts"
        slices = np.concatenate(list(parts_of(parts).values()))
        assert sorted(map(tuple, slices.tolist())) == [tuple(row) for row in store.slices.tolist()]
        assert parts.digest == table.digest
        all_held_out += parts.held_out.tolist()
    assert sorted(all_held_out) == store.slices.tolist()


def test_parts_are_those_of_earlier_versions_where_every_patient_has_labels(config: Config, store: Store) -> None:
    """As dealt before there was a fold table: h held out, v validation, t training; a letter a study."""
    before = [
        "hhhhhhhhhhhvvvvvvvvvvvvvthhtttthtthvtthtttttttthttth",
        "vvvvvvvvvvvhhhhhhhhhhhhhttthtthttttvttthtttttttthttt",
        "vvvvvvvvvvvttttttttttttthttthhtvhhthhhtthhhhhhhtthht",
    ]
    table = deal_folds(config, store)
    for fold, expected in enumerate(before):
        letters = np.full(len(store.study), "?")
        for name, part in parts_of(split_slices(config, store, fold, table)).items():
            letters[part[:, 0]] = name[0]
        assert "".join(letters) == expected


def test_unlabelled_slices_stay_out_of_training_but_are_predicted(cohort: Cohort, config: Config, store: Store) -> None:
    store = unlabel(store, cohort.folder / "less", studies=[], slices=[2])
    parts = split_slices(config, store, 0, deal_folds(config, store))
    assert (parts.training[:, 1] != 2).all()
    assert (parts.validation[:, 1] != 2).all()
    assert (parts.held_out[:, 1] == 2).any()
    assert len(parts.unlabelled) == 0


def test_patients_without_labels_are_in_every_fold_the_same_part(cohort: Cohort, config: Config, store: Store) -> None:
    _, patient_of_study, studies = np.unique(store.patient_key.astype(str), return_inverse=True, return_counts=True)
    several = np.flatnonzero(studies[patient_of_study] > 1)
    alone = np.flatnonzero(studies[patient_of_study] == 1)
    without = [*alone[:4].tolist(), int(several[0])]  # of the last, other studies have labels
    store = unlabel(store, cohort.folder / "less", studies=without, slices=[])
    table = deal_folds(config, store)
    for fold in range(3):
        parts = split_slices(config, store, fold, table)
        assert sorted(set(parts.unlabelled[:, 0].tolist())) == sorted(without[:4])
        assert len(parts.unlabelled) == 4 * 3
        assert parts.patients[UNLABELLED] == 4
        for part in (parts.training, parts.validation):
            assert not np.isin(part[:, 0], without).any()
            assert (store.labels[part[:, 0], part[:, 1]] >= 0).all()
        assert np.isin(several[0], parts.held_out[:, 0]) == (table.fold_S[several[0]] == fold)


def test_too_few_patients_to_learn_from_are_refused(cohort: Cohort) -> None:
    labels = np.zeros((3, 2, len(LABELS)), np.int8)
    labels[2] = -1
    store = bare_store(cohort.data, [*"abc"], labels)
    config = cohort.config(folds__count=2)
    with pytest.raises(IchorError, match=r"leaves 1 patient\(s\) to learn from"):
        split_slices(config, store, 0, deal_folds(config, store))


def test_leaking_table_and_leaking_parts_are_refused(config: Config, store: Store) -> None:
    table = deal_folds(config, store)
    leaking = table.fold_S.copy()
    leaking[0] = 1 - leaking[0] % 2  # the first patient has several studies
    with pytest.raises(IchorError, match="are in two folds"):
        split_slices(config, store, 0, replace(table, fold_S=leaking))
    parts = split_slices(config, store, 0, table)
    check_apart(store, parts)
    for name in ("validation", "held_out", "unlabelled"):
        with pytest.raises(IchorError, match="are in two folds"):
            check_apart(store, replace(parts, **{name: np.concatenate([getattr(parts, name), parts.training[:1]])}))


def test_rsna_and_its_test_set_are_split_whole(cohort: Cohort) -> None:
    keys, labels_SL = make_rsna_cohort(np.random.default_rng(0))
    assert len(keys) == RSNA_STUDIES
    keys = np.concatenate([keys, np.array([f"test{number:012x}" for number in range(TEST_STUDIES)], object)])
    labels = np.concatenate([labels_SL, np.full((TEST_STUDIES, len(LABELS)), -1, np.int8)])[:, None]
    store = bare_store(cohort.data, keys, np.repeat(labels, 2, axis=1))
    config = cohort.config(train__validation_fraction=0.05)
    table = deal_folds(config, store)
    assert (table.fold_S == NO_FOLD).sum() == TEST_STUDIES
    parts = split_slices(config, store, 0, table)
    assert len(parts.unlabelled) == 2 * TEST_STUDIES
    assert len(parts.held_out) == pytest.approx(2 * RSNA_STUDIES / 5, rel=0.01)
    assert len(parts.validation) == pytest.approx(2 * RSNA_STUDIES * 0.8 / 20, rel=0.01)
    assert len(parts.training) + len(parts.validation) + len(parts.held_out) == 2 * RSNA_STUDIES
