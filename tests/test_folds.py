"""No patient is on both sides, labels are spread evenly, and the fold table is of this store or is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.config import Window
from pipeline.errors import CheckpointError, IchorError
from pipeline.folds import (
    COLUMNS,
    NO_FOLD,
    FoldTable,
    assign_folds,
    check_disjoint,
    deal_folds,
    describe_folds,
    find_on_both_sides,
    read_folds,
    write_folds,
)
from pipeline.labels import LABELS, SUBTYPES
from pipeline.store import STUDY_ARRAYS, WIDE, Store, StoreContent, slice_axis, write_store
from tests.conftest import Cohort

RSNA_PATIENTS, RSNA_SEVERAL, RSNA_STUDIES, RSNA_MOST = 18_938, 1_758, 21_744, 15
RSNA_RATES = np.array([0.016, 0.20, 0.15, 0.17, 0.16])
"""Of studies with each subtype, about; 42 % have any."""


def make_cohort(patients: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """As RSNA's: a few patients with up to 15 studies, epidural rare."""
    studies = np.ones(patients, int)
    studies[: patients // 11] = rng.integers(2, 16, patients // 11)
    keys = np.repeat(np.array([f"{number:016x}" for number in range(patients)], object), studies)
    rates = np.array([0.015, 0.12, 0.1, 0.13, 0.15])
    labels = (rng.random((len(keys), 5)) < rates).astype(np.int8)
    return keys, np.concatenate([labels, labels.max(axis=1, keepdims=True)], axis=1)


def make_rsna_cohort(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """RSNA's own counts of patients and studies."""
    studies = np.ones(RSNA_PATIENTS, int)
    studies[:RSNA_SEVERAL] = 2
    studies[0] = RSNA_MOST
    for _ in range(RSNA_STUDIES - studies.sum()):
        studies[rng.choice(np.flatnonzero(studies[1 : RSNA_SEVERAL // 4] < RSNA_MOST)) + 1] += 1
    keys = np.repeat(np.array([f"{number:016x}" for number in rng.permutation(RSNA_PATIENTS)], object), studies)
    bleeds = rng.random(len(keys)) < 0.42
    labels = ((rng.random((len(keys), 5)) < RSNA_RATES / 0.42) & bleeds[:, None]).astype(np.int8)
    return keys, np.concatenate([labels, labels.max(axis=1, keepdims=True)], axis=1)


def bare_store(
    folder: Path, keys: Any, labels_SKL: np.ndarray, *, names: Any = None, windows: tuple[str, ...] = ("brain",)
) -> Store:
    """A store with patients and labels, and no pixels: those the folds never read."""
    studies, slices = labels_SKL.shape[:2]
    axis = slice_axis(slices)
    names = [f"ID_{number:010x}" for number in range(studies)] if names is None else names
    per_study: dict[str, np.ndarray] = {
        name: np.full((studies, {"orientation": 6, "box_mm": 3}[name]) if name in WIDE else studies, "", object)
        if kind == "string"
        else np.zeros((studies, {"orientation": 6, "box_mm": 3}[name]) if name in WIDE else studies, kind)
        for name, (kind, _) in STUDY_ARRAYS.items()
    }
    per_study["num_slices"] = np.full(studies, slices, np.int32)
    per_study["patient_key"] = np.array(keys, object)
    per_study["content"] = np.array([f"{name}-{'-'.join(windows)}" for name in names], object)
    image_id = np.full((studies, axis), "", object)
    image_id[:, :slices] = [[f"{name}.{k}" for k in range(slices)] for name in names]
    labels = np.full((studies, axis, len(LABELS)), -1, np.int8)
    labels[:, :slices] = labels_SKL
    content = StoreContent(np.array(names, object), per_study, image_id, np.zeros((studies, axis), np.float32), labels)
    path = folder / "store.zarr"
    shown = {name: Window(centre=40.0, width=80.0) for name in windows}
    write_store(path, content, {}, image_size=16, windows=shown, attributes={})
    return Store(path)


def small_cohort() -> tuple[list[str], np.ndarray]:
    """12 patients, two of them with two studies of 3 slices; the last two patients have no labels, "c" only in one study."""
    keys = [*"abcdefghij", "a", "c", "k", "l"]
    labels = np.zeros((14, 3, len(LABELS)), np.int8)
    for study in range(0, 10, 2):
        labels[study, 1:, [study // 2, -1]] = 1
    labels[4, 0] = -1
    labels[11:] = -1
    return keys, labels


@pytest.fixture
def store(cohort: Cohort) -> Store:
    return bare_store(cohort.data, *small_cohort())


def dealt(cohort: Cohort, store: Store, **changes: Any) -> tuple[FoldTable, dict[str, Any], Path]:
    config, folder = cohort.config(**changes), cohort.data / "folds"
    table = deal_folds(config, store)
    return table, write_folds(folder, table, config=config, store=store), folder


def patients_with(keys: np.ndarray, labels: np.ndarray, folds: np.ndarray, count: int) -> np.ndarray:
    """Patients with each label in each fold, counted by pandas: [fold, label]."""
    table = pd.DataFrame(labels, columns=list(LABELS)).assign(patient=keys, fold=folds)
    patients = table.groupby(["fold", "patient"]).max()
    return patients.groupby("fold").sum().loc[range(count), list(LABELS)].to_numpy()


# ---- dealing


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


def test_folds_are_those_of_earlier_versions() -> None:
    """Whoever changes the dealing changes everybody's held-out patients: then scores of old and new runs do not compare."""
    folds = assign_folds(*make_cohort(30, np.random.default_rng(5)), count=5, seed=0)
    assert "".join(map(str, folds.tolist())) == "0000000000011111111111112303434024333222142442344232"


@pytest.mark.parametrize("count", [5, 10])
def test_cohort_of_rsna_size_is_dealt_evenly(count: int) -> None:
    keys, labels = make_rsna_cohort(np.random.default_rng(0))
    assert (len(keys), len(set(keys.tolist()))) == (RSNA_STUDIES, RSNA_PATIENTS)
    assert pd.Series(keys).value_counts().agg(["max", lambda n: (n > 1).sum()]).tolist() == [RSNA_MOST, RSNA_SEVERAL]
    folds = assign_folds(keys, labels, count=count, seed=0)
    assert find_on_both_sides(keys, folds) == []
    assert np.ptp(np.bincount(folds)) <= 2
    patients_FL = patients_with(keys, labels, folds, count)
    assert np.ptp(patients_FL[:, : len(SUBTYPES)], axis=0).max() <= 2
    # `any` follows from the subtypes, and how many a patient has at once is not dealt by
    assert np.ptp(patients_FL[:, -1]) < 0.04 * patients_FL[:, -1].mean()


def test_fewer_patients_than_folds_is_refused() -> None:
    with pytest.raises(IchorError, match="there are only 2 patients"):
        assign_folds(np.array(["a", "b", "a"], object), np.zeros((3, 6), np.int8), count=3, seed=0)


def test_check_finds_a_leak() -> None:
    keys = np.array(["a", "b", "a", "b", "c"], object)
    assert find_on_both_sides(keys, np.array([0, 1, 0, 1, 1])) == []
    assert find_on_both_sides(keys, np.array([0, 1, 0, 2, 1])) == ["b"]
    check_disjoint(keys, np.array([0, 1, 0, 1, 1]))
    with pytest.raises(IchorError, match=r"2 patient\(s\) are in two folds, such as a"):
        check_disjoint(keys, np.array([0, 1, 1, 0, 1]))


def test_patients_without_labels_belong_to_no_fold_and_change_none(cohort: Cohort, store: Store) -> None:
    table, summary, _ = dealt(cohort, store, folds__count=3)
    assert np.flatnonzero(table.fold_S == NO_FOLD).tolist() == [12, 13]
    assert table.fold_S[11] == table.fold_S[2], "a patient with labels in one study is dealt with both"
    labelled = slice(0, 12)
    alone = assign_folds(store.patient_key[labelled], store.labels[labelled].max(axis=1), count=3, seed=0)
    np.testing.assert_array_equal(table.fold_S[labelled], alone)
    unlabelled = summary["unlabelled"]
    assert [unlabelled[name] for name in ("patients", "studies", "slices", "labelled_slices")] == [2, 2, 6, 0]


# ---- the table


def test_door_writes_the_table_that_anybody_can_check(
    cohort: Cohort, store: Store, run_stage: Callable[..., Any]
) -> None:
    table, expected, _ = dealt(cohort, store, folds__count=3)
    ran = run_stage("folds")
    assert ran.code == 0, ran.err
    text = (cohort.data / "folds" / "folds.csv").read_text()
    summary = json.loads((cohort.data / "folds" / "summary.json").read_bytes())
    assert summary == expected
    rows = pd.read_csv(cohort.data / "folds" / "folds.csv")
    assert list(rows) == ["patient_key", "study", "fold", *LABELS] == COLUMNS
    assert rows["patient_key"].is_monotonic_increasing
    assert rows.set_index("study").loc[store.study.tolist(), "fold"].tolist() == table.fold_S.tolist()
    cut = "".join(",".join(line.split(",")[:3]) + "\n" for line in text.splitlines())
    assert hashlib.sha256(cut.encode()).hexdigest() == summary["digest"] == table.digest
    assert summary["patients_on_both_sides"] == 0
    assert rows.groupby("patient_key")["fold"].nunique().max() == 1
    assert summary["params"] == {"count": 3, "seed": 0}
    assert f"0 patients on both sides; digest {table.digest[:12]}" in ran.out
    header, *printed = [line.split() for line in ran.out.splitlines()[:5]]
    assert header[:10] == ["fold", "patients", "studies", "slices", *LABELS]
    assert [line[0] for line in printed] == ["0", "1", "2", "unlabelled"]
    assert printed[-1] == ["unlabelled", "2", "2", "6", "0", "0", "0", "0", "0", "0"]


def test_counts_are_those_that_pandas_finds(cohort: Cohort) -> None:
    rng = np.random.default_rng(3)
    keys, labels_SL = make_cohort(60, rng)
    labels = np.where(rng.random((len(keys), 4, 1)) < 0.5, labels_SL[:, None], 0)
    labels[rng.random((len(keys), 4)) < 0.2] = -1
    store = bare_store(cohort.data, keys, labels)
    table, summary, _ = dealt(cohort, store)
    slices = pd.DataFrame(labels.reshape(-1, len(LABELS)), columns=list(LABELS)).assign(
        patient=np.repeat(keys, 4), study=np.repeat(np.arange(len(keys)), 4), fold=np.repeat(table.fold_S, 4)
    )
    for found in summary["folds"]:
        of_fold = slices[slices["fold"] == found["fold"]]
        assert found["patients"] == of_fold["patient"].nunique()
        assert found["studies"] == of_fold["study"].nunique()
        assert found["slices"] == len(of_fold)
        assert found["labelled_slices"] == (of_fold["any"] >= 0).sum()
        for name in LABELS:
            positive = of_fold[of_fold[name] == 1]
            assert found["positive_slices"][name] == len(positive)
            assert found["positive_patients"][name] == positive["patient"].nunique()
    assert str(summary["folds"][0]["positive_patients"]["any"]) in describe_folds(summary).splitlines()[1]


def test_table_depends_on_neither_pixels_nor_the_order_of_studies(cohort: Cohort, store: Store) -> None:
    table, _, folder = dealt(cohort, store, folds__count=3)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    keys, labels = small_cohort()
    order = np.random.default_rng(0).permutation(len(keys))
    other = bare_store(
        cohort.folder / "other",
        np.array(keys, object)[order],
        labels[order],
        names=store.study[order],
        windows=("bone", "soft"),
    )
    assert other.digest != store.digest
    np.testing.assert_array_equal(dealt(cohort, other, folds__count=3)[0].fold_S, table.fold_S[order])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    read = read_folds(folder, other, cohort.config(folds__count=3))
    np.testing.assert_array_equal(read.fold_S, table.fold_S[order])
    assert read.digest == table.digest


def test_table_that_a_spreadsheet_sorted_is_the_same_table(cohort: Cohort, store: Store) -> None:
    table, _, folder = dealt(cohort, store, folds__count=3)
    rows = pd.read_csv(folder / "folds.csv").sort_values(["fold", "study"])
    rows.to_csv(folder / "folds.csv", index=False, lineterminator="\r\n")
    np.testing.assert_array_equal(read_folds(folder, store, cohort.config(folds__count=3)).fold_S, table.fold_S)


# ---- faults


def change_text(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return change


def cut_short(folder: Path) -> None:
    content = (folder / "folds.csv").read_bytes()
    (folder / "folds.csv").write_bytes(content[: len(content) * 2 // 3])


def deal_otherwise(folder: Path) -> None:
    """Another fold for one study of a patient with two, and a digest to fit."""
    rows = pd.read_csv(folder / "folds.csv")
    rows.loc[0, "fold"] = 1 - rows.loc[0, "fold"] % 2
    rows.to_csv(folder / "folds.csv", index=False)
    content = rows[["patient_key", "study", "fold"]].to_csv(index=False)
    summary = json.loads((folder / "summary.json").read_bytes())
    summary["digest"] = hashlib.sha256(content.encode()).hexdigest()
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "folds.csv").unlink(), r"folds\.csv: there is no fold table"),
        (lambda folder: (folder / "summary.json").unlink(), r"summary\.json: there is no fold table"),
        (cut_short, "disagrees with the digest|cannot be read"),
        (change_text("folds.csv", ",2,", ",1,"), r"folds\.csv: its content disagrees with the digest in summary\.json"),
        (change_text("folds.csv", ",2,", ",two,"), "cannot be read"),
        (
            change_text("folds.csv", "fold,", "part,"),
            r"expected the columns patient_key, study, fold, .*found patient_key",
        ),
        (lambda folder: (folder / "folds.csv").write_bytes(b""), "cannot be read"),
        (lambda folder: (folder / "folds.csv").write_bytes(b"\xff\xfe\x00\x81"), "cannot be read"),
        (change_text("summary.json", "{", ""), "cannot be read"),
        (lambda folder: (folder / "summary.json").write_text("[]"), "not the summary of a fold table"),
        (deal_otherwise, r"1 patient\(s\) are in two folds, such as a"),
    ],
)
def test_damaged_table_is_refused_with_the_way_out(
    cohort: Cohort, store: Store, spoil: Callable[[Path], None], said: str
) -> None:
    _, _, folder = dealt(cohort, store, folds__count=3)
    config = cohort.config(folds__count=3)
    read_folds(folder, store, config)
    spoil(folder)
    with pytest.raises(CheckpointError, match=rf"({said})[\s\S]*python -m stages\.folds"):
        read_folds(folder, store, config)


def test_table_of_other_parameters_is_refused_by_name(cohort: Cohort, store: Store) -> None:
    _, _, folder = dealt(cohort, store, folds__count=3)
    with pytest.raises(CheckpointError, match=r"folds\.count = 3, the parameters say 4; .*or set folds\.count back"):
        read_folds(folder, store, cohort.config(folds__count=4))
    with pytest.raises(CheckpointError, match=r"folds\.seed = 0, the parameters say 7"):
        read_folds(folder, store, cohort.config(folds__count=3, folds__seed=7))


def test_table_of_another_store_is_refused(cohort: Cohort, store: Store) -> None:
    _, _, folder = dealt(cohort, store, folds__count=3)
    keys, labels = small_cohort()
    relabelled = labels.copy()
    relabelled[1, 0, [0, -1]] = 1
    others = {
        "shorter": (keys[:-1], labels[:-1], "ID_000000000d"),
        "another patient": (["z", *keys[1:]], labels, "ID_0000000000"),
        "other labels": (keys, relabelled, "ID_0000000001"),
    }
    for name, (its_keys, its_labels, study) in others.items():
        other = bare_store(cohort.folder / name, its_keys, its_labels)
        with pytest.raises(CheckpointError, match=rf"not of .*{name}.*other labels: 1, such as {study}; run"):
            read_folds(folder, other, cohort.config(folds__count=3))


def test_store_without_labels_or_with_too_few_is_refused(cohort: Cohort, run_stage: Callable[..., Any]) -> None:
    keys, labels = small_cohort()
    store = bare_store(cohort.data, keys, np.full_like(labels, -1))
    cohort.write_params()
    ran = run_stage("folds")
    assert ran.code == 1
    assert "no slice has a label; set source.labels" in ran.err
    assert "Traceback" not in ran.err
    assert not (cohort.data / "folds").exists()
    labels[2:] = -1
    store = bare_store(cohort.folder / "few", keys, labels)
    with pytest.raises(IchorError, match=r"folds\.count = 3: there are only 2 patients with labels; lower it"):
        deal_folds(cohort.config(folds__count=3), store)


def test_table_with_a_patient_on_both_sides_is_never_written(cohort: Cohort, store: Store) -> None:
    leaking = FoldTable(np.arange(len(store.study)) % 3, "")
    with pytest.raises(IchorError, match="are in two folds"):
        write_folds(cohort.data / "folds", leaking, config=cohort.config(), store=store)
    assert not (cohort.data / "folds").exists()
