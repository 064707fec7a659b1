"""What could be known without looking: the headers alone, and the network on rows of which the headers say the same.

The header classifier predicts each held-out study and slice from what it learnt of the other folds' patients, exactly as the
network does. Rows are then weighed so that it no longer tells positives from negatives; what the network still tells apart, it has
seen in the pixels.

Axes: N held-out rows of a level, R all rows of the store at that level, F features, L labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.baseline import balance_bins, balance_weights, header_features, place_features, predict_from_headers
from pipeline.bootstrap import Balanced, Floats, Ranked, Ratios, Statistic, interval
from pipeline.held_out import Scored
from pipeline.labels import ANY, LABELS, UNKNOWN
from pipeline.metrics import auc, log_loss, losses, number_patients
from pipeline.progress import Progress
from pipeline.results import Slices
from pipeline.store import Store

Drawn = Mapping[str, Mapping[str, Floats]]
"""Figures by name, float64 [D] each, of each statistic."""


@dataclass(frozen=True)
class Rows:
    """All rows of one level that the store has, and which of them are held out."""

    features_RF: Floats
    labels_RL: npt.NDArray[np.int8]
    patient_R: npt.NDArray[Any]
    held_out_N: npt.NDArray[np.int64]
    """Row numbers."""
    fold_N: npt.NDArray[np.int64]
    rows_a_study: float


def predict_levels(store: Store, levels: Mapping[str, Scored], where_N2: Slices) -> dict[str, Floats]:
    """What the headers alone say of each held-out slice and study: float64 [N, L] a level.

    Args:
        store: what the folds were trained on.
        levels: the held-out rows, slice and study.
        where_N2: study and slice number of the held-out slices.
    """
    tables = {
        "slice": _slice_rows(store, levels["slice"], where_N2),
        "study": _study_rows(store, levels["study"]),
    }
    folds = len(np.unique(levels["study"].fold_N))
    with Progress(len(tables) * folds * len(LABELS), what="what headers foretell", unit="labels") as progress:
        return {level: _predict(rows, progress=progress) for level, rows in tables.items()}


def _study_rows(store: Store, studies: Scored) -> Rows:
    features_SF, labels_SL = header_features(store.per_study), store.labels.max(axis=1)
    patient_S = store.patient_key.astype(str)
    return Rows(features_SF, labels_SL, patient_S, studies.study_N, studies.fold_N, rows_a_study=1.0)


def _slice_rows(store: Store, slices: Scored, where_N2: Slices) -> Rows:
    """A slice has its study's header values, and where in the study it lies."""
    study_R, number_R = store.slices.T
    of_study_SF = header_features(store.per_study)
    places_RF = place_features(store.position_mm, store.num_slices, store.slices)
    first_S = np.cumsum(store.num_slices) - store.num_slices
    return Rows(
        np.hstack([of_study_SF[study_R], places_RF]),
        store.labels[study_R, number_R],
        store.patient_key.astype(str)[study_R],
        first_S[where_N2[:, 0]] + where_N2[:, 1],
        slices.fold_N,
        rows_a_study=len(study_R) / len(store.study),
    )


def _predict(rows: Rows, *, progress: Progress) -> Floats:
    """A fold's rows by what is learnt from all rows of other patients, held out or not: float64 [N, L]."""
    found_NL = np.zeros((len(rows.held_out_N), len(LABELS)))
    for fold in np.unique(rows.fold_N):
        here_N = rows.fold_N == fold
        others_R = ~np.isin(rows.patient_R, np.unique(rows.patient_R[rows.held_out_N[here_N]]))
        for label in range(len(LABELS)):
            truth_R = rows.labels_RL[:, label]
            found_NL[here_N, label] = predict_from_headers(
                rows.features_RF,
                truth_R,
                learn_R=others_R & (truth_R != UNKNOWN),
                predict=rows.held_out_N[here_N],
                rows_a_study=rows.rows_a_study,
            )
            progress.advance()
    return found_NL


def shortcut_statistics(
    levels: Mapping[str, Scored], said: Mapping[str, Floats], *, patients: Sequence[str]
) -> dict[str, Statistic]:
    """What the bootstrap draws: "headers/<level>/ranks" and "/sums" of `any`; "balanced/<level>/<label>/network" and "/headers".

    Args:
        levels: the held-out rows, slice and study.
        said: what `predict_levels` gives.
        patients: sorted keys of all who may be drawn.
    """
    found: dict[str, Statistic] = {}
    for level, scored in levels.items():
        patient_N = number_patients(scored, patients)
        for label, name in enumerate(LABELS):
            known_N, truth, probability = scored.of(label)
            alone, of_known = said[level][known_N, label], patient_N[known_N]
            if label == ANY:
                parts = {"log_loss": (losses(truth, alone), np.ones(len(truth)))}
                found[f"headers/{level}/ranks"] = Ranked(truth, alone, patient_N=of_known)
                found[f"headers/{level}/sums"] = Ratios(parts, patient_N=of_known, patients=len(patients))
            bin_N = balance_bins(truth, alone)
            if bin_N is not None:
                for who, score_N in (("network", probability), ("headers", alone)):
                    key = f"balanced/{level}/{name}/{who}"
                    found[key] = Balanced(truth, score_N, bin_N=bin_N, patient_N=of_known)
    return found


def score_headers(scored: Scored, said_NL: Floats, drawn: Drawn, *, level: str) -> dict[str, Any]:
    """The header classifier's AUC and log loss at one level, and how far the network lies above it."""
    rows = {name: (*scored.of(label)[:2], said_NL[:, label]) for label, name in enumerate(LABELS)}
    aucs = {name: auc(truth, alone_N[known_N]) for name, (known_N, truth, alone_N) in rows.items()}
    log_losses = {name: log_loss(truth, alone_N[known_N]) for name, (known_N, truth, alone_N) in rows.items()}
    network, alone = auc(*scored.of(ANY)[1:]), aucs["any"]
    of_any = drawn[f"headers/{level}/ranks"]["auc"]
    return {
        "auc": aucs,
        "any_auc_ci": interval(of_any),
        "log_loss": log_losses,
        "any_log_loss": log_losses["any"],
        "any_log_loss_ci": interval(drawn[f"headers/{level}/sums"]["log_loss"]),
        "any_auc_above_headers": None if network is None or alone is None else network - alone,
        "any_auc_above_headers_ci": interval(drawn[f"{level}/any/ranks"]["auc"] - of_any),
    }


def score_balanced(scored: Scored, said_NL: Floats, drawn: Drawn, *, level: str) -> dict[str, Any]:
    """By label, the AUC of the network and of the headers where both classes weigh the same in each bin of what the headers say.

    `positives` are those in bins that hold negatives too: the others weigh nothing. None with too few rows of the rarer class.
    """
    return {
        name: _score_balanced(*scored.of(label)[1:], said_NL[scored.of(label)[0], label], drawn, f"{level}/{name}")
        for label, name in enumerate(LABELS)
    }


def _score_balanced(truth: npt.NDArray[np.bool_], probability: Floats, alone: Floats, drawn: Drawn, key: str) -> Any:
    bin_N = balance_bins(truth, alone)
    if bin_N is None:
        return {"positives": None, "network": None, "network_ci": None, "headers": None, "headers_ci": None}
    weights = balance_weights(truth, bin_N)
    return {
        "positives": int((weights[truth] > 0).sum()),
        "network": auc(truth, probability, weights),
        "network_ci": interval(drawn[f"balanced/{key}/network"]["auc"]),
        "headers": auc(truth, alone, weights),
        "headers_ci": interval(drawn[f"balanced/{key}/headers"]["auc"]),
    }
