"""What training left of each fold: read, checked, and put beside the store's labels.

A fold counts only if it was trained on this very store, and for scores with these very parameters, so that one table never mixes
two experiments.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipeline.config import Config, differences
from pipeline.errors import CheckpointError, StoreError
from pipeline.held_out import Scored
from pipeline.labels import LABELS, UNKNOWN
from pipeline.store import Store

COLUMNS = ["image_id", "study_uid", "fold", *LABELS]

ALONE = "cnn_"
"""Before the columns of what the CNN says alone, where a sequence model has the last word."""

SUMMARY = {
    "fold", "store_digest", "params", "folds_params", "folds_digest", "epochs", "best_epoch", "best_valid_loss", "parameters", "device",
    "seconds", "train_slices", "valid_slices", "train_patients", "valid_patients",
}  # fmt: skip
"""What a fold's summary must hold."""

HISTORY = {"epoch", "train_loss", "valid_loss"}

Slices = npt.NDArray[np.int64]
"""int64 [N, 2]: study number and slice number in the store."""


@dataclass(frozen=True)
class TrainedFold:
    """What training one fold left: how it was trained, how it went, and what it said of its held-out patients."""

    fold: int
    summary: dict[str, Any]
    history: pd.DataFrame
    predictions: pd.DataFrame
    unlabelled: pd.DataFrame
    """What it says of studies that have no label."""


def read_fold(folder: Path, fold: int, *, config: Config, store_digest: str) -> TrainedFold:
    """Read a fold's results, and refuse them if they belong to another experiment.

    Raises:
        CheckpointError: see `evaluate`.
    """
    try:
        result = read_results(folder, fold, store_digest=store_digest)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{error.filename or folder}: fold {fold} is not trained, and train.folds = {config.train.folds} names it; "
            f"run `python -m stages.train --fold {fold}` (or `dvc repro`), or take {fold} out of train.folds"
        ) from None
    _check_params(folder, result, config)
    return result


def read_results(folder: Path, fold: int, *, store_digest: str) -> TrainedFold:
    """Read a fold's results, whatever parameters it was trained with.

    Raises:
        FileNotFoundError: it is not trained, or not yet.
        CheckpointError: a file cannot be read, is not of this fold, or was trained on another store.
    """
    try:
        result = TrainedFold(
            fold,
            json.loads((folder / "summary.json").read_bytes()),
            pd.read_csv(folder / "history.csv"),
            pd.read_parquet(folder / "predictions.parquet"),
            pd.read_parquet(folder / "unlabelled.parquet"),
        )
    except FileNotFoundError:
        raise
    except (ValueError, OSError) as error:  # JSON, CSV and Parquet raise kinds of these
        raise CheckpointError(f"{folder}: fold {fold}'s results cannot be read ({error}); train it again") from None
    _check_summary(folder, result, store_digest=store_digest)
    _check_predictions(folder, result)
    return result


def _check_summary(folder: Path, result: TrainedFold, *, store_digest: str) -> None:
    fold, summary = result.fold, result.summary
    if not isinstance(summary, dict) or SUMMARY - set(summary) or summary["fold"] != fold:
        raise CheckpointError(f"{folder}/summary.json: not the summary of fold {fold}; train fold {fold} again")
    if HISTORY - set(result.history):
        raise CheckpointError(f"{folder}/history.csv: not the history of fold {fold}; train fold {fold} again")
    if summary.get("store_digest") != store_digest:
        raise CheckpointError(
            f"{folder}: fold {fold} was trained on store {str(summary.get('store_digest'))[:12]}, the store is now "
            f"{store_digest[:12]}; run `dvc repro` to train it again, or preprocess with the old parameters"
        )


def _check_params(folder: Path, result: TrainedFold, config: Config) -> None:
    fold, summary = result.fold, result.summary
    expected = {"train": config.train.shaping(), "folds": config.folds.model_dump()}
    found = {"train": summary.get("params"), "folds": summary.get("folds_params")}
    for key, (then, now) in differences(found, expected).items():
        raise CheckpointError(
            f"{folder}: fold {fold} was trained with {key} = {then!r}, the parameters say {now!r}; run `dvc repro` to "
            f"train it again, or set {key} back"
        )


def check_one_dealing(folds: Sequence[TrainedFold]) -> None:
    """Folds of two dealings may hold one patient out twice, or learn from whom another holds out."""
    digests = {result.summary["folds_digest"]: result.fold for result in folds}
    if len(digests) > 1:
        raise CheckpointError(
            f"folds {', '.join(map(str, sorted(digests.values())))} were trained on different fold tables; run `dvc repro` to "
            f"train them again"
        )


def average_folds(folds: Sequence[TrainedFold]) -> pd.DataFrame:
    """The folds' mean probabilities for the slices of studies without any label, which no fold has held out.

    Returns:
        image_id, study_uid, folds (how many were averaged) and a column a label; in the store's order.
    """
    tables = pd.concat([result.unlabelled[COLUMNS] for result in folds], ignore_index=True)
    groups = tables.groupby(["image_id", "study_uid"], sort=False)
    means = groups[list(LABELS)].mean()
    means.insert(0, "folds", groups.size())
    return means.reset_index()


def _check_predictions(folder: Path, result: TrainedFold) -> None:
    _check_table(folder / "predictions.parquet", result.predictions, result.fold)
    _check_table(folder / "unlabelled.parquet", result.unlabelled, result.fold)


def _check_table(path: Path, table: pd.DataFrame, fold: int) -> None:
    missing = [column for column in COLUMNS if column not in table]
    if missing:
        raise CheckpointError(f"{path}: fold {fold} lacks the column(s) {', '.join(missing)}; train it again")
    alone = [column for column in table if column.startswith(ALONE)]
    try:
        probabilities = table[[*LABELS, *alone]].to_numpy(np.float64)
    except (ValueError, TypeError):
        raise CheckpointError(f"{path}: fold {fold} holds probabilities that are no numbers; train it again") from None
    bad = int((~((probabilities >= 0) & (probabilities <= 1))).any(axis=1).sum())  # NaN is neither
    if bad:
        raise CheckpointError(f"{path}: fold {fold} has {bad} row(s) with no probability in 0 to 1; train it again")
    found = sorted(set(table["fold"]))
    if found not in ([], [fold]):
        raise CheckpointError(f"{path}: expected fold {fold} only, found {found}; train fold {fold} again")


def have_alone(folds: Sequence[TrainedFold]) -> bool:
    """Whether every fold also tells what its CNN says without the sequence model."""
    return all(ALONE + name in result.predictions for result in folds for name in LABELS)


def gather(store: Store, folds: Sequence[TrainedFold], *, prefix: str = "") -> tuple[Scored, Slices]:
    """Put the folds' predictions beside the store's labels, in the store's order.

    Args:
        store: what the folds were trained on.
        folds: what training left.
        prefix: before the names of the columns with probabilities.

    Returns:
        The held-out slices, and which slice of the store each is.
    """
    columns = [*COLUMNS[:3], *(prefix + name for name in LABELS)]
    table = pd.concat([result.predictions[columns] for result in folds], ignore_index=True)
    check_held_out_once(table)
    number_N = locate(store, table)
    order = np.argsort(number_N)
    table, where_N2 = table.iloc[order], store.slices[number_N[order]]
    labels_NL = store.labels[where_N2[:, 0], where_N2[:, 1]]
    if not (labels_NL != UNKNOWN).any():
        raise StoreError(f"{store.path}: none of the {len(table):,} held-out slices has a label; set source.labels")
    scored = Scored(
        labels_NL,
        table[columns[3:]].to_numpy(np.float64),
        where_N2[:, 0],
        store.patient_key[where_N2[:, 0]],
        table["fold"].to_numpy(np.int64),
    )
    return scored, where_N2


def check_held_out_once(table: pd.DataFrame) -> None:
    """A slice that two folds hold out would count twice."""
    twice = table[table["image_id"].duplicated()]
    if len(twice):
        raise CheckpointError(
            f"{len(twice)} slice(s) are held out twice, one of them in fold {twice['fold'].iloc[0]}; expected each "
            f"in one fold; train these folds again"
        )


def locate(store: Store, table: pd.DataFrame) -> npt.NDArray[np.int64]:
    """Number of each predicted slice among all slices of the store."""
    stored = pd.Index(store.image_id[store.slices[:, 0], store.slices[:, 1]])
    number_N = stored.get_indexer(pd.Index(table["image_id"]))
    if (number_N < 0).any():
        first = table.iloc[int(np.argmax(number_N < 0))]
        raise StoreError(
            f"{store.path}: fold {first['fold']} predicts slice {first['image_id']}, which the store does not hold "
            f"({int((number_N < 0).sum())} such of {len(table):,}); train it again on this store"
        )
    return np.asarray(number_N, np.int64)
