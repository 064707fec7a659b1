"""Patients to folds: no patient on both sides, the rare labels spread evenly; and the table that says so.

The table has one row a study. It follows from patients, labels and the parameters `folds` alone, never from pixels. Training
reads it, and evaluation refuses folds that were trained on two tables, so that nobody differs about who was held out.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipeline.config import Config
from pipeline.errors import CheckpointError, IchorError
from pipeline.files import write_bytes, write_json
from pipeline.labels import LABELS
from pipeline.store import Store

NO_STRATUM = -1

NO_FOLD = -1
"""The fold of patients of whom no slice has a label, such as a challenge's test set: every fold's model predicts them."""

NAMES = ["patient_key", "study"]
COLUMNS = [*NAMES, "fold", *LABELS]
REMEDY = "run `python -m stages.folds` (or `dvc repro`) to make it anew"


@dataclass(frozen=True)
class FoldTable:
    """The fold of each study."""

    fold_S: npt.NDArray[np.int64]
    """int64 [study], in the store's order; `NO_FOLD` where the patient has no label."""
    digest: str
    """SHA-256 of patients, studies and folds: what ``cut -d, -f1-3 folds.csv | sha256sum`` gives."""


def assign_folds(
    patient_keys: npt.NDArray[np.object_], labels_SL: npt.NDArray[np.int8], *, count: int, seed: int
) -> npt.NDArray[np.int64]:
    """Deal studies to folds, by patient, stratified by the rarest label that a patient has.

    Patients with the rarest label are dealt first. Each goes to the fold that has fewest patients with that label, then
    fewest with the patient's other labels, then fewest studies (Sechidis et al. 2011, On the Stratification of Multi-Label
    Data). A patient's place in the order is a hash of key and seed: the order of the studies does not matter.

    Args:
        patient_keys: str [study].
        labels_SL: int8 [study, label]: 1 where any slice of the study has the label.
        count: number of folds.
        seed: another one gives other folds.

    Returns:
        int64 [study], the fold of each study.

    Raises:
        IchorError: there are fewer patients than folds.
    """
    patients, patient_of_study = np.unique(patient_keys.astype(str), return_inverse=True)
    if len(patients) < count:
        raise IchorError(
            f"folds.count = {count}: there are only {len(patients)} patients with labels; lower it, or add studies"
        )
    has_PL = np.zeros((len(patients), labels_SL.shape[1]), bool)
    np.logical_or.at(has_PL, patient_of_study, labels_SL == 1)
    stratum_P = _rarest_label(has_PL)
    studies_P = np.bincount(patient_of_study, minlength=len(patients))
    patients_with_L = has_PL.sum(axis=0)
    order = sorted(
        range(len(patients)),
        key=lambda patient: (
            patients_with_L[stratum_P[patient]] if stratum_P[patient] != NO_STRATUM else np.inf,
            -studies_P[patient],
            _hash(str(patients[patient]), seed),
        ),
    )
    fold_P = np.full(len(patients), -1)
    with_label_FL = np.zeros((count, has_PL.shape[1]), np.int64)
    studies_F = np.zeros(count, np.int64)
    for patient in order:
        others_F = with_label_FL @ has_PL[patient]
        rarest_F = with_label_FL[:, stratum_P[patient]] if stratum_P[patient] != NO_STRATUM else np.zeros(count)
        fold = np.lexsort((studies_F, others_F, rarest_F))[0]
        fold_P[patient] = fold
        with_label_FL[fold] += has_PL[patient]
        studies_F[fold] += studies_P[patient]
    folds = fold_P[patient_of_study]
    check_disjoint(patient_keys, folds)
    return folds


def check_disjoint(patient_keys: npt.NDArray[np.object_], folds: npt.NDArray[np.int64]) -> None:
    """Prove that no patient is in two folds.

    Args:
        patient_keys: str [study].
        folds: int64 [study].

    Raises:
        IchorError: one is.
    """
    on_both = find_on_both_sides(patient_keys, folds)
    if len(on_both):
        raise IchorError(
            f"{len(on_both)} patient(s) are in two folds, such as {on_both[0]}; this must not happen, please report it"
        )


def find_on_both_sides(patient_keys: npt.NDArray[np.object_], folds: npt.NDArray[np.int64]) -> list[str]:
    """The patients that are in more than one fold: those with a study in another fold than their first study's."""
    patients, first, patient_of_study = np.unique(patient_keys.astype(str), return_index=True, return_inverse=True)
    elsewhere = folds != folds[first][patient_of_study]
    return [str(key) for key in patients[np.unique(patient_of_study[elsewhere])]]


def _rarest_label(has_PL: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """For each patient, the label of theirs that fewest patients have, or −1 for none."""
    patients_with = has_PL.sum(axis=0)
    rank = np.where(has_PL, patients_with, np.iinfo(np.int64).max)
    return np.where(has_PL.any(axis=1), rank.argmin(axis=1), NO_STRATUM)


def _hash(key: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()


def deal_folds(config: Config, store: Store) -> FoldTable:
    """Deal a store's studies to folds, and those of patients without any label to none.

    Raises:
        IchorError: no slice has a label, or fewer patients have one than there are folds.
    """
    labels_SL = store.labels.max(axis=1)
    if not (labels_SL >= 0).any():
        raise IchorError(f"{store.path}: no slice has a label; set source.labels to a label CSV and run again")
    _, patient_of_study = np.unique(store.patient_key.astype(str), return_inverse=True)
    labelled_studies_P = np.bincount(patient_of_study, weights=(labels_SL >= 0).any(axis=1))
    is_dealt_S = (labelled_studies_P > 0)[patient_of_study]
    fold_S = np.full(len(store.study), NO_FOLD, np.int64)
    fold_S[is_dealt_S] = assign_folds(
        store.patient_key[is_dealt_S], labels_SL[is_dealt_S], count=config.folds.count, seed=config.folds.seed
    )
    return FoldTable(fold_S, _digest(_tabulate(store, fold_S)))


def write_folds(folder: Path, table: FoldTable, *, config: Config, store: Store) -> dict[str, Any]:
    """Check that no patient is on both sides; write folds.csv, and summary.json with the finding, digest and counts.

    Returns:
        The summary.

    Raises:
        IchorError: a patient is in two folds.
    """
    check_disjoint(store.patient_key, table.fold_S)
    rows = _tabulate(store, table.fold_S)
    summary = {
        "digest": table.digest,
        "params": config.folds.model_dump(),
        "patients_on_both_sides": len(find_on_both_sides(rows["patient_key"].to_numpy(), rows["fold"].to_numpy())),
        "folds": [{"fold": fold, **_count(store, table.fold_S == fold)} for fold in range(config.folds.count)],
        "unlabelled": _count(store, table.fold_S == NO_FOLD),
    }
    write_bytes(folder / "folds.csv", rows.to_csv(index=False, lineterminator="\n").encode())
    write_json(folder / "summary.json", summary)
    return summary


def read_folds(folder: Path, store: Store, config: Config) -> FoldTable:
    """Read the table that `write_folds` left, and check that it is whole and of this store and these parameters.

    Args:
        folder: where folds.csv and summary.json lie.
        store: whose studies were dealt.
        config: the parameters.

    Raises:
        CheckpointError: it is missing, damaged, of another store or of other parameters, or has a patient on both sides.
    """
    path = folder / "folds.csv"
    table, summary = _read_files(folder)
    if _digest(table) != summary["digest"]:
        raise CheckpointError(f"{path}: its content disagrees with the digest in summary.json; {REMEDY}")
    for key, now in config.folds.model_dump().items():
        then = summary["params"].get(key)
        if then != now:
            raise CheckpointError(
                f"{path}: dealt with folds.{key} = {then!r}, the parameters say {now!r}; {REMEDY}, or set folds.{key} back"
            )
    fold_S = np.full(len(store.study), NO_FOLD, np.int64)
    _check_store(path, table, _tabulate(store, fold_S), store=store)
    fold_S[_order(store)] = table["fold"].to_numpy()
    on_both = find_on_both_sides(store.patient_key, fold_S)
    if on_both:
        raise CheckpointError(f"{path}: {len(on_both)} patient(s) are in two folds, such as {on_both[0]}; {REMEDY}")
    return FoldTable(fold_S, summary["digest"])


def _read_files(folder: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    kinds = {name: str if name in NAMES else "int64" for name in COLUMNS}
    try:
        summary = json.loads((folder / "summary.json").read_bytes())
        table = pd.read_csv(folder / "folds.csv", dtype=kinds, keep_default_na=False)
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename}: there is no fold table; {REMEDY}") from None
    except ValueError as error:  # JSON, CSV and text encodings raise kinds of it
        raise CheckpointError(f"{folder}: the fold table cannot be read ({error}); {REMEDY}") from None
    if list(table) != COLUMNS:
        raise CheckpointError(
            f"{folder / 'folds.csv'}: expected the columns {', '.join(COLUMNS)}, found {', '.join(table)}; {REMEDY}"
        )
    if not isinstance(summary, dict) or not isinstance(summary.get("params"), dict) or "digest" not in summary:
        raise CheckpointError(f"{folder / 'summary.json'}: not the summary of a fold table; {REMEDY}")
    return table.sort_values(NAMES, ignore_index=True), summary  # a spreadsheet may have sorted it otherwise


def _check_store(path: Path, found: pd.DataFrame, expected: pd.DataFrame, *, store: Store) -> None:
    """Refuse a table whose studies, patients or labels are not the store's."""
    known = [name for name in COLUMNS if name != "fold"]
    both = found[known].merge(expected[known], how="outer", indicator=True)
    differing = both.loc[(both["_merge"] != "both") | both["study"].duplicated(), "study"].unique()
    if len(differing):
        raise CheckpointError(
            f"{path}: the table is not of {store.path}: studies in one of them only, or with another "
            f"patient or other labels: {len(differing)}, such as {differing[0]}; {REMEDY}"
        )


def _order(store: Store) -> npt.NDArray[np.int64]:
    """The studies by patient, then by uid: int64 [study]."""
    return np.lexsort((store.study.astype(str), store.patient_key.astype(str)))


def _tabulate(store: Store, fold_S: npt.NDArray[np.int64]) -> pd.DataFrame:
    order, labels_SL = _order(store), store.labels.max(axis=1)
    names = {"patient_key": store.patient_key[order], "study": store.study[order], "fold": fold_S[order]}
    return pd.DataFrame({**names, **{name: labels_SL[order, number] for number, name in enumerate(LABELS)}})


def _digest(table: pd.DataFrame) -> str:
    content = table[[*NAMES, "fold"]].to_csv(index=False, lineterminator="\n")
    return hashlib.sha256(content.encode()).hexdigest()


def _count(store: Store, is_counted_S: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """What some of the studies hold."""
    keys, labels_SKL = store.patient_key[is_counted_S].astype(str), store.labels[is_counted_S]
    has_SL = (labels_SKL == 1).any(axis=1)
    return {
        "patients": len(np.unique(keys)),
        "studies": len(keys),
        "slices": int(store.num_slices[is_counted_S].sum()),
        "labelled_slices": int((labels_SKL >= 0).any(axis=2).sum()),
        "positive_slices": dict(zip(LABELS, (labels_SKL == 1).sum(axis=(0, 1)).tolist(), strict=True)),
        "positive_patients": {name: len(np.unique(keys[has_SL[:, number]])) for number, name in enumerate(LABELS)},
    }


def describe_folds(summary: dict[str, Any]) -> str:
    """The summary as a table for people: what each fold holds, and how many of its patients have each label."""
    shown = ["patients", "studies", "slices"]
    widths = {name: max(8, len(name)) + 2 for name in [*shown, *LABELS]}
    rows = {str(counts["fold"]): counts for counts in summary["folds"]}
    if summary["unlabelled"]["studies"]:
        rows["unlabelled"] = summary["unlabelled"]
    lines = [
        f"{'fold':10s}" + "".join(f"{name:>{width}}" for name, width in widths.items()) + "   (patients with each)"
    ]
    for title, counts in rows.items():
        figures = {**{name: counts[name] for name in shown}, **counts["positive_patients"]}
        lines.append(f"{title:10s}" + "".join(f"{figures[name]:{width},}" for name, width in widths.items()))
    lines.append(f"{summary['patients_on_both_sides']} patients on both sides; digest {summary['digest'][:12]}")
    return "\n".join(lines)
