"""Who learns, who decides when to stop, who is held out: the slices of one fold by their part in it, apart by patient."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.config import Config
from pipeline.errors import IchorError
from pipeline.folds import assign_folds
from pipeline.store import Store

HELD_OUT, VALIDATION, TRAINING = "held out", "validation", "training"


@dataclass(frozen=True)
class FoldSlices:
    """The slices of one fold by their part in it: int64 [n, 2], study and slice number."""

    training: npt.NDArray[np.int64]
    validation: npt.NDArray[np.int64]
    held_out: npt.NDArray[np.int64]
    patients: dict[str, int]


def split_slices(config: Config, store: Store, fold: int) -> FoldSlices:
    """Deal the store's slices to training, validation and the held-out fold, by patient.

    Raises:
        IchorError: no slice has a label, or there are too few patients.
    """
    labels_SL = (store.labels == 1).any(axis=1).astype(np.int8)
    if not (store.labels >= 0).any():
        raise IchorError(f"{store.path}: no slice has a label; set source.labels to a label CSV and run again")
    fold_S = assign_folds(store.patient_key, labels_SL, count=config.folds.count, seed=config.folds.seed)
    part_S = np.where(fold_S == fold, HELD_OUT, TRAINING).astype(object)
    rest = np.flatnonzero(fold_S != fold)
    patients = len(np.unique(store.patient_key[rest].astype(str)))
    if patients < 2:
        raise IchorError(
            f"train: fold {fold} leaves {patients} patient(s) to learn from and to stop by, and needs 2; add studies with labels"
        )
    inner = assign_folds(
        store.patient_key[rest],
        labels_SL[rest],
        count=min(patients, max(2, round(1 / config.train.validation_fraction))),
        seed=config.folds.seed,
    )
    part_S[rest[inner == 0]] = VALIDATION
    slices = store.slices
    known = (store.labels[slices[:, 0], slices[:, 1]] >= 0).any(axis=1)
    part = part_S[slices[:, 0]]
    for name in (TRAINING, VALIDATION):
        if not ((part == name) & known).any():
            raise IchorError(
                f"train: no slice of fold {fold}'s {name} patients has a label; add labels, or change folds.seed"
            )
    return FoldSlices(
        training=slices[(part == TRAINING) & known],
        validation=slices[(part == VALIDATION) & known],
        held_out=slices[part == HELD_OUT],
        patients={
            name: len(np.unique(store.patient_key[part_S == name].astype(str)))
            for name in (TRAINING, VALIDATION, HELD_OUT)
        },
    )
