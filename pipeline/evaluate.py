"""Held-out predictions of the chosen folds into scores, curves and pictures.

Only the folds of `train.folds` are read, so that what another run left behind leaves no trace; and only if they were
trained on this very store with these very parameters, so that one table never mixes two experiments.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipeline.baseline import counter_for
from pipeline.config import Config, differences
from pipeline.errors import CheckpointError, StoreError
from pipeline.gallery import Picture, choose_slices, make_picture, show_window
from pipeline.labels import ANY, LABELS, UNKNOWN
from pipeline.metrics import Curve, Scored, roc_curves, score, score_counting, thin, to_studies
from pipeline.progress import Progress
from pipeline.store import Store

COLUMNS = ["image_id", "study_uid", "fold", *LABELS]

SUMMARY = {
    "fold", "store_digest", "params", "folds_params", "folds_digest", "epochs", "best_epoch", "best_valid_loss", "parameters", "device",
    "seconds", "train_slices", "valid_slices", "train_patients", "valid_patients",
}  # fmt: skip
"""What a fold's summary must hold."""

HISTORY = {"epoch", "train_loss", "valid_loss"}

DECIMALS = 6
"""Of the figures in metrics.json: more than any cohort supports, few enough to read."""

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


@dataclass(frozen=True)
class Evaluation:
    """Everything that the stage writes."""

    metrics: dict[str, Any]
    curves: dict[str, list[Curve]]
    """By level: slice, study."""
    folds: list[TrainedFold]
    pictures: list[Picture]


def evaluate(config: Config, store: Store, *, train: Path) -> Evaluation:
    """Score the held-out predictions of `train.folds`.

    Args:
        config: the parameters.
        store: what the folds were trained on.
        train: the folder with `fold-K/` inside.

    Raises:
        CheckpointError: a fold is missing or unfinished, or was trained on another store or with other parameters.
        StoreError: a prediction is of a slice that the store does not hold.
    """
    folds = [
        read_fold(train / f"fold-{fold}", fold, config=config, store_digest=store.digest)
        for fold in sorted(config.train.folds)
    ]
    _check_one_dealing(folds)
    slices, where_N2 = gather(store, folds)
    levels = {"slice": slices, "study": to_studies(slices)}
    metrics = _metrics(levels, _count(store, slices, where_N2), config)
    curves = {level: [thin(curve) for curve in roc_curves(scored)] for level, scored in levels.items()}
    return Evaluation(rounded(metrics), curves, folds, _pictures(store, slices, where_N2))


def read_fold(folder: Path, fold: int, *, config: Config, store_digest: str) -> TrainedFold:
    """Read a fold's results, and refuse them if they belong to another experiment.

    Raises:
        CheckpointError: see `evaluate`.
    """
    try:
        result = TrainedFold(
            fold,
            json.loads((folder / "summary.json").read_bytes()),
            pd.read_csv(folder / "history.csv"),
            pd.read_parquet(folder / "predictions.parquet"),
            pd.read_parquet(folder / "unlabelled.parquet"),
        )
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{error.filename or folder}: fold {fold} is not trained, and train.folds = {config.train.folds} names it; "
            f"run `python -m stages.train --fold {fold}` (or `dvc repro`), or take {fold} out of train.folds"
        ) from None
    except (ValueError, OSError) as error:  # JSON, CSV and Parquet raise kinds of these
        raise CheckpointError(f"{folder}: fold {fold}'s results cannot be read ({error}); train it again") from None
    _check_summary(folder, result, config=config, store_digest=store_digest)
    _check_predictions(folder, result)
    return result


def _check_summary(folder: Path, result: TrainedFold, *, config: Config, store_digest: str) -> None:
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
    expected = {"train": config.train.shaping(), "folds": config.folds.model_dump()}
    found = {"train": summary.get("params"), "folds": summary.get("folds_params")}
    for key, (then, now) in differences(found, expected).items():
        raise CheckpointError(
            f"{folder}: fold {fold} was trained with {key} = {then!r}, the parameters say {now!r}; run `dvc repro` to "
            f"train it again, or set {key} back"
        )


def _check_one_dealing(folds: Sequence[TrainedFold]) -> None:
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
    probabilities = table[list(LABELS)].to_numpy(np.float64)
    bad = int((~((probabilities >= 0) & (probabilities <= 1))).any(axis=1).sum())  # NaN is neither
    if bad:
        raise CheckpointError(f"{path}: fold {fold} has {bad} row(s) with no probability in 0 to 1; train it again")
    found = sorted(set(table["fold"]))
    if found not in ([], [fold]):
        raise CheckpointError(f"{path}: expected fold {fold} only, found {found}; train fold {fold} again")


def gather(store: Store, folds: Sequence[TrainedFold]) -> tuple[Scored, Slices]:
    """Put the folds' predictions beside the store's labels, in the store's order.

    Returns:
        The held-out slices, and which slice of the store each is.
    """
    table = pd.concat([result.predictions[COLUMNS] for result in folds], ignore_index=True)
    twice = table[table["image_id"].duplicated()]
    if len(twice):
        raise CheckpointError(
            f"{len(twice)} slice(s) are held out twice, one of them in fold {twice['fold'].iloc[0]}; expected each "
            f"in one fold; train these folds again"
        )
    number_N = _locate(store, table)
    order = np.argsort(number_N)
    table, where_N2 = table.iloc[order], store.slices[number_N[order]]
    labels_NL = store.labels[where_N2[:, 0], where_N2[:, 1]]
    if not (labels_NL != UNKNOWN).any():
        raise StoreError(f"{store.path}: none of the {len(table):,} held-out slices has a label; set source.labels")
    scored = Scored(
        labels_NL,
        table[list(LABELS)].to_numpy(np.float64),
        where_N2[:, 0],
        store.patient_key[where_N2[:, 0]],
        table["fold"].to_numpy(np.int64),
    )
    return scored, where_N2


def _locate(store: Store, table: pd.DataFrame) -> npt.NDArray[np.int64]:
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


def _count(store: Store, slices: Scored, where_N2: Slices) -> dict[str, Any]:
    counter, detail = counter_for(store.windows)
    if counter is None:
        return {"any_auc": None, "any_auc_above_counting": None, "reason": detail}
    counts_N = np.zeros(len(where_N2), np.int64)
    with Progress(len(where_N2), what="count", unit="slices") as progress:
        for row, (study, slice_number) in enumerate(where_N2):
            counts_N[row] = counter.count(store.reader.read(int(study), int(slice_number)))
            progress.advance()
    return {**score_counting(slices, counts_N), "window": detail}


def _metrics(levels: dict[str, Scored], counting: dict[str, Any], config: Config) -> dict[str, Any]:
    slices = levels["slice"]
    scores = {level: score(scored) for level, scored in levels.items()}
    several = len(config.train.folds) > 1
    return {
        "headline": {
            "slice_any_auc": scores["slice"]["any"]["auc"],
            "study_any_auc": scores["study"]["any"]["auc"],
            "slice_macro_auc": scores["slice"]["macro"]["auc"],
            "weighted_log_loss": scores["slice"]["weighted_log_loss"],
            "base_rate_weighted_log_loss": scores["slice"]["base_rate_weighted_log_loss"],
            "any_auc_above_counting": counting["any_auc_above_counting"],
        },
        "held_out": {
            "folds": sorted(config.train.folds),
            "of_folds": config.folds.count,
            "slices": len(slices),
            "labelled_slices": int((slices.labels_NL[:, ANY] != UNKNOWN).sum()),
            "studies": len(levels["study"]),
            "patients": len(np.unique(slices.patient_N.astype(str))),
            "thresholds_chosen_on": "the other folds" if several else "the other half of the patients",
        },
        "counting": counting,
        **scores,
    }


def rounded(value: Any) -> Any:
    """Nested figures rounded to `DECIMALS`; what is not a finite number becomes None, as JSON has no word for it."""
    if isinstance(value, dict):
        return {str(key): rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    if isinstance(value, float):
        return round(value, DECIMALS) if math.isfinite(value) else None
    return value


def _pictures(store: Store, slices: Scored, where_N2: Slices) -> list[Picture]:
    window = list(store.windows).index(show_window(store.windows))
    pictures = []
    for kind, row in choose_slices(slices):
        study, slice_number = (int(number) for number in where_N2[row])
        pictures.append(
            make_picture(
                kind,
                store.reader.read(study, slice_number)[..., window],
                study=study,
                slice_number=slice_number,
                labels_L=slices.labels_NL[row],
                probabilities_L=slices.probabilities_NL[row],
            )
        )
    return pictures


def curve_table(curves: dict[str, list[Curve]]) -> pd.DataFrame:
    """The ROC curves as rows: level, label, fold (a number, or "all"), fpr, tpr."""
    rows = [
        pd.DataFrame({"level": level, "label": curve.label, "fold": curve.fold, "fpr": curve.fpr, "tpr": curve.tpr})
        for level, of_level in curves.items()
        for curve in of_level
    ]
    empty = pd.DataFrame(columns=["level", "label", "fold", "fpr", "tpr"])
    return pd.concat(rows, ignore_index=True).round(DECIMALS) if rows else empty


def training_table(folds: Sequence[TrainedFold]) -> pd.DataFrame:
    """The training curves as rows: fold, epoch, part (training, validation), loss."""
    parts = {"train_loss": "training", "valid_loss": "validation"}
    tables = [result.history.melt("epoch", list(parts), "part", "loss").assign(fold=result.fold) for result in folds]
    table = pd.concat(tables, ignore_index=True).replace({"part": parts})
    return table[["fold", "epoch", "part", "loss"]].round(DECIMALS)
