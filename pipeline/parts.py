"""Who learns, who decides when to stop, who is held out: the slices of one fold by their part in it, apart by patient."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.config import Config
from pipeline.errors import IchorError
from pipeline.folds import NO_FOLD, FoldTable, assign_folds, check_disjoint
from pipeline.store import Store

HELD_OUT, VALIDATION, TRAINING, UNLABELLED = "held out", "validation", "training", "unlabelled"


@dataclass(frozen=True)
class FoldSlices:
    """The slices of one fold by their part in it: int64 [n, 2], study and slice number."""

    training: npt.NDArray[np.int64]
    validation: npt.NDArray[np.int64]
    held_out: npt.NDArray[np.int64]
    unlabelled: npt.NDArray[np.int64]
    """Of patients without any label: no fold's own, and predicted by every fold's model."""
    patients: dict[str, int]
    digest: str
    """That of the fold table."""


def split_slices(config: Config, store: Store, fold: int, table: FoldTable) -> FoldSlices:
    """Deal the store's slices to training, validation, the held-out fold and the unlabelled, by patient.

    Slices without a label are in neither training nor validation, but are predicted where their patient is held out.

    Raises:
        IchorError: there are too few patients, or one is in two parts.
    """
    part_S = _parts_of_studies(config, store, fold, table)
    slices = store.slices
    is_known = (store.labels[slices[:, 0], slices[:, 1]] >= 0).any(axis=1)

    def of(name: str) -> npt.NDArray[np.bool_]:
        return (part_S == name)[slices[:, 0]]

    parts = FoldSlices(
        training=slices[of(TRAINING) & is_known],
        validation=slices[of(VALIDATION) & is_known],
        held_out=slices[of(HELD_OUT)],
        unlabelled=slices[of(UNLABELLED)],
        patients={
            name: len(np.unique(store.patient_key[part_S == name].astype(str)))
            for name in (TRAINING, VALIDATION, HELD_OUT, UNLABELLED)
        },
        digest=table.digest,
    )
    check_apart(store, parts)
    return parts


def _parts_of_studies(config: Config, store: Store, fold: int, table: FoldTable) -> npt.NDArray[np.object_]:
    """The part of each study: str [study]; those that stop the training are dealt as the folds are, out of the rest."""
    part_S = np.select([table.fold_S == fold, table.fold_S == NO_FOLD], [HELD_OUT, UNLABELLED], TRAINING).astype(object)
    rest = np.flatnonzero(part_S == TRAINING)
    patients = len(np.unique(store.patient_key[rest].astype(str)))
    if patients < 2:
        raise IchorError(
            f"train: fold {fold} leaves {patients} patient(s) to learn from and to stop by, and needs 2; add studies with labels"
        )
    inner = assign_folds(
        store.patient_key[rest],
        store.labels[rest].max(axis=1),
        count=min(patients, max(2, round(1 / config.train.validation_fraction))),
        seed=config.folds.seed,
    )
    part_S[rest[inner == 0]] = VALIDATION
    return part_S


def check_apart(store: Store, parts: FoldSlices) -> None:
    """Prove, on the slices themselves, that no patient is in two parts.

    Raises:
        IchorError: one is.
    """
    studies = [np.unique(part[:, 0]) for part in (parts.training, parts.validation, parts.held_out, parts.unlabelled)]
    number_of_part = np.repeat(np.arange(len(studies)), [len(part) for part in studies])
    check_disjoint(store.patient_key[np.concatenate(studies)], number_of_part)
