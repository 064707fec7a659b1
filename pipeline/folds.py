"""Patients to folds: no patient on both sides, and the rare labels spread evenly."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from pipeline.errors import IchorError

NO_STRATUM = -1


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
        raise IchorError(f"folds.count = {count}: there are only {len(patients)} patients; lower it, or add studies")
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

    Raises:
        IchorError: one is.
    """
    pairs = {(key, fold) for key, fold in zip(patient_keys.tolist(), folds.tolist(), strict=True)}
    if len(pairs) != len({key for key, _ in pairs}):
        raise IchorError("a patient is in two folds; this must not happen, please report it")


def _rarest_label(has_PL: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """For each patient, the label of theirs that fewest patients have, or −1 for none."""
    patients_with = has_PL.sum(axis=0)
    rank = np.where(has_PL, patients_with, np.iinfo(np.int64).max)
    return np.where(has_PL.any(axis=1), rank.argmin(axis=1), NO_STRATUM)


def _hash(key: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
