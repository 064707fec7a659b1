"""Held-out predictions of the chosen folds into scores, curves and pictures.

Only the folds of `train.folds` are read, so that what another run left behind leaves no trace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipeline.baseline import counter_for
from pipeline.bootstrap import Floats, Ranked, Statistic, interval, resample
from pipeline.calibration import Reliability
from pipeline.config import Config, without_folders
from pipeline.curves import (
    Curve,
    PrecisionRecall,
    average_roc_curves,
    precision_recall_curves,
    reliabilities,
    roc_curves,
    thin,
)
from pipeline.gallery import Picture, choose_all, draw_picture
from pipeline.heat import explain_chosen
from pipeline.held_out import Judged, Scored, fit_operating_points, judge, to_studies
from pipeline.labels import ANY, LABELS, UNKNOWN
from pipeline.metrics import (
    DECIMALS,
    auc,
    number_patients,
    score,
    score_counting,
    score_stratum,
    statistics,
    weighted_log_loss,
    with_intervals,
)
from pipeline.progress import Progress
from pipeline.results import ALONE, Slices, TrainedFold, check_one_dealing, gather, have_alone, read_fold
from pipeline.shortcut import predict_levels, score_balanced, score_headers, shortcut_statistics
from pipeline.store import Store

PADDED_HU = -1100.0
"""Studies whose lowest HU lies below are padded around the circle that was scanned; air is −1000."""

STEPS = {
    "tilt_deg": ("gantry tilt", (1, 15), "°"),
    "slice_spacing_mm": ("distance between slices", (3, 6), " mm"),
    "thickness_mm": ("slice thickness", (3, 6), " mm"),
    "num_slices": ("slices in the study", (30, 40), ""),
}
"""Of the strata: name, where one ends and the next begins, unit."""

OPERATING_RULE = (
    "The log odds of a probability are divided by the temperature; a label is called where the probability after that is at "
    "least the threshold. Temperature: the lowest log loss on all held-out predictions (Platt's targets). Threshold: the highest "
    "sensitivity + specificity on them (Youden's J), halfway to the next lower probability. A study's probability is the "
    "highest of its slices' before scaling. null: too few positive or negative patients to score such a choice on others."
)
"""Stands in operating_points.json, for whoever reads it without this code."""

HEADLINE_CALLS = ("sensitivity", "specificity", "ppv_at_prevalence")
"""Of studies with any hemorrhage: what a ward would notice."""

Drawn = dict[str, dict[str, Floats]]
"""Figures by name, float64 [D] each, of each statistic."""

Strata = dict[str, dict[str, npt.NDArray[np.bool_]]]
"""By name and part: which of the store's studies, bool [S]."""


@dataclass(frozen=True)
class Evaluation:
    """Everything that the stage writes."""

    metrics: dict[str, Any]
    curves: dict[str, list[Curve]]
    """By level: slice, study."""
    precision_recall: dict[str, list[PrecisionRecall]]
    reliability: dict[str, dict[str, tuple[Reliability, Reliability | None]]]
    """By level and label: as predicted, and after temperature scaling."""
    operating_points: dict[str, Any]
    folds: list[TrainedFold]
    pictures: list[Picture]
    without_heat: list[str]
    """Why some pictures have no heat map."""


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
    check_one_dealing(folds)
    slices, where_N2 = gather(store, folds)
    levels = {"slice": slices, "study": to_studies(slices)}
    judged = {level: judge(scored) for level, scored in levels.items()}
    metrics = _score_all(config, store, levels, judged, where_N2)
    if have_alone(folds):
        metrics["without_sequence"] = _headline_figures(gather(store, folds, prefix=ALONE)[0])
    pictures, without_heat = _pictures(config, store, slices, where_N2, train=train)
    return Evaluation(
        rounded(metrics),
        {
            level: [thin(curve) for curve in [*roc_curves(scored), *average_roc_curves(scored)]]
            for level, scored in levels.items()
        },
        {level: precision_recall_curves(scored) for level, scored in levels.items()},
        {level: reliabilities(found) for level, found in judged.items()},
        operating_points(store, folds, judged),
        folds,
        pictures,
        without_heat,
    )


def operating_points(store: Store, folds: Sequence[TrainedFold], judged: dict[str, list[Judged]]) -> dict[str, Any]:
    """Temperatures and thresholds for reading new studies, with what they were fitted on.

    They are fitted on all held-out predictions at once and thus have no scores of their own: the scores in metrics.json are the
    cross-fitted ones, by the same rules on fewer patients. Each held-out prediction is one fold's; where several folds read a new
    study, the mean of what they say is scaled as if one had said it. Not rounded, so that a slice on the edge stays on its side.
    """
    return {
        "store_digest": store.digest,
        "folds_digest": folds[0].summary["folds_digest"],
        "folds": [result.fold for result in folds],
        "params": without_folders(folds[0].summary["params"]),
        "rule": OPERATING_RULE,
        **{level: fit_operating_points(found) for level, found in judged.items()},
    }


def _score_all(
    config: Config, store: Store, levels: dict[str, Scored], judged: dict[str, list[Judged]], where_N2: Slices
) -> dict[str, Any]:
    """The network's scores, the baselines' and the strata's, all with intervals from the same draws."""
    counts_N, detail = _count(store, where_N2)
    headers = predict_levels(store, levels, where_N2)
    strata = name_strata(store) | _header_thirds(store, levels["study"], headers["study"])
    patients = _patients(levels)
    others = _others(levels["slice"], judged["slice"][ANY], counts_N, strata, patients=patients)
    others |= shortcut_statistics(levels, headers, patients=patients)
    drawn = _draw(levels, judged, config, others=others)
    metrics = _metrics(levels, judged, drawn, config) | {
        "counting": _counting(levels["slice"], counts_N, detail, drawn),
        "headers": score_headers(levels["study"], headers["study"], drawn, level="study"),
        "headers_by_slice": score_headers(levels["slice"], headers["slice"], drawn, level="slice"),
        "balanced": {level: score_balanced(levels[level], headers[level], drawn, level=level) for level in levels},
        "strata": _score_strata(levels["slice"], judged["slice"][ANY], strata, drawn),
    }
    metrics["headline"]["any_auc_above_counting"] = metrics["counting"]["any_auc_above_counting"]
    metrics["headline"]["any_auc_balanced"] = metrics["balanced"]["slice"]["any"]["network"]
    return metrics


def _count(store: Store, where_N2: Slices) -> tuple[npt.NDArray[np.int64] | None, str]:
    """Bright pixels of each slice, int64 [N], and the window they lie in; or None and the reason."""
    counter, detail = counter_for(store.windows)
    if counter is None:
        return None, detail
    counts_N = np.zeros(len(where_N2), np.int64)
    with Progress(len(where_N2), what="bright pixels", unit="slices") as progress:
        for row, (study, slice_number) in enumerate(where_N2):
            counts_N[row] = counter.count(store.reader.read(int(study), int(slice_number)))
            progress.advance()
    return counts_N, detail


def _metrics(
    levels: dict[str, Scored], judged: dict[str, list[Judged]], drawn: Drawn, config: Config
) -> dict[str, Any]:
    slices = levels["slice"]
    prevalence = config.evaluate.prevalence
    scores = {
        level: with_intervals(score(scored, judged[level], prevalence=prevalence), _of_level(drawn, level))
        for level, scored in levels.items()
    }
    several = len(config.train.folds) > 1
    return {
        "headline": {
            "slice_any_auc": scores["slice"]["any"]["auc"],
            "study_any_auc": scores["study"]["any"]["auc"],
            "slice_macro_auc": scores["slice"]["macro"]["auc"],
            "weighted_log_loss": scores["slice"]["weighted_log_loss"],
            "base_rate_weighted_log_loss": scores["slice"]["base_rate_weighted_log_loss"],
            "any_ece": scores["slice"]["any"]["ece"],
            **{f"study_any_{name}": scores["study"]["any"][name] for name in HEADLINE_CALLS},
        },
        "held_out": {
            "folds": sorted(config.train.folds),
            "of_folds": config.folds.count,
            "slices": len(slices),
            "labelled_slices": int((slices.labels_NL[:, ANY] != UNKNOWN).sum()),
            "studies": len(levels["study"]),
            "patients": len(np.unique(slices.patient_N.astype(str))),
            "thresholds_chosen_on": "the other folds" if several else "the other half of the patients",
            "prevalence": prevalence,
            "resamples": config.evaluate.bootstrap,
        },
        **scores,
    }


def _headline_figures(slices: Scored) -> dict[str, Any]:
    """The headline's figures of another's predictions for the same slices."""
    macro = [found for label in range(len(LABELS)) if (found := auc(*slices.of(label)[1:])) is not None]
    return {
        "slice_any_auc": auc(*slices.of(ANY)[1:]),
        "study_any_auc": auc(*to_studies(slices).of(ANY)[1:]),
        "slice_macro_auc": float(np.mean(macro)) if macro else None,
        "weighted_log_loss": weighted_log_loss(slices.labels_NL, slices.probabilities_NL),
    }


def _draw(
    levels: dict[str, Scored], judged: dict[str, list[Judged]], config: Config, *, others: dict[str, Statistic]
) -> Drawn:
    """Every figure in the same resamples of the patients, by level/label/kind or the name of another statistic."""
    patients, settings = _patients(levels), config.evaluate
    wanted = {
        f"{level}/{key}": statistic
        for level, scored in levels.items()
        for key, statistic in statistics(
            scored, judged[level], patients=patients, prevalence=settings.prevalence
        ).items()
    }
    return resample(wanted | others, patients=len(patients), resamples=settings.bootstrap, seed=settings.seed)


def _patients(levels: dict[str, Scored]) -> list[str]:
    """Sorted keys of all who may be drawn."""
    return sorted(set(levels["slice"].patient_N.astype(str)))


def _of_level(drawn: Drawn, level: str) -> Drawn:
    return {key.removeprefix(f"{level}/"): figures for key, figures in drawn.items() if key.startswith(f"{level}/")}


def _others(
    slices: Scored,
    judged: Judged,
    counts_N: npt.NDArray[np.int64] | None,
    strata: Strata,
    *,
    patients: list[str],
) -> dict[str, Statistic]:
    """What else is ranked by `any`: the counts on all slices, and the network within each stratum."""
    truth_N, patient_N, known_N = slices.labels_NL[:, ANY] == 1, number_patients(slices, patients), judged.known_N
    found: dict[str, Statistic] = {}
    if counts_N is not None:
        found["counting"] = Ranked(truth_N[known_N], counts_N[known_N], patient_N=patient_N[known_N])
    for name, parts in strata.items():
        for part, inside_S in parts.items():
            rows = known_N & inside_S[slices.study_N]
            probability = slices.probabilities_NL[rows, ANY]
            found[f"strata/{name}/{part}"] = Ranked(truth_N[rows], probability, patient_N=patient_N[rows])
    return found


def _counting(slices: Scored, counts_N: npt.NDArray[np.int64] | None, detail: str, drawn: Drawn) -> dict[str, Any]:
    """The counting classifier's scores; the interval of the difference is that of the pairs of draws."""
    if counts_N is None:
        return {"any_auc": None, "any_auc_above_counting": None, "reason": detail}
    above_D = drawn["slice/any/ranks"]["auc"] - drawn["counting"]["auc"]
    return {
        **score_counting(slices, counts_N),
        "any_auc_ci": interval(drawn["counting"]["auc"]),
        "any_auc_above_counting_ci": interval(above_D),
        "window": detail,
    }


def name_strata(store: Store) -> Strata:
    """Kinds of studies by how they were stored and scanned: name → part → bool over the store's studies."""
    of = store.per_study
    forms = [
        f"{bits} bits, {'signed' if signed else 'unsigned'}, intercept {intercept:g}".replace("-", "−")
        for bits, signed, intercept in zip(of["bits_stored"], of["signed"], of["intercept"], strict=True)
    ]
    padded = np.where(of["lowest_hu"] < PADDED_HU, "padded", "not padded")
    named = {"stored as": np.array(forms), "around the scanned circle": padded}
    whole = {name: {str(part): part_S == part for part in np.unique(part_S)} for name, part_S in named.items()}
    return whole | {name: _steps(of[key], edges, unit) for key, (name, edges, unit) in STEPS.items()}


def _steps(values_S: npt.NDArray[Any], edges: tuple[int, int], unit: str) -> dict[str, npt.NDArray[np.bool_]]:
    low, high = edges
    return {
        f"under {low}{unit}": values_S < low,
        f"{low} to {high}{unit}": (values_S >= low) & (values_S < high),
        f"{high}{unit} or more": values_S >= high,
        "not known": ~np.isfinite(values_S),
    }


def _header_thirds(store: Store, studies: Scored, headers_SL: Floats) -> Strata:
    """The held-out studies in thirds by what the headers alone say of `any`: within one they say about the same."""
    said_S = np.full(len(store.study), np.nan)
    said_S[studies.study_N] = headers_SL[:, ANY]
    low, high = np.quantile(headers_SL[:, ANY], [1 / 3, 2 / 3])
    thirds = {
        "lowest third": said_S <= low,
        "middle third": (said_S > low) & (said_S <= high),
        "highest third": said_S > high,
    }
    return {"likelihood by the headers alone": thirds}


def _score_strata(slices: Scored, judged: Judged, strata: Strata, drawn: Drawn) -> dict[str, Any]:
    """`any` by slice within each part of each stratum; a stratum of which all slices lie in one part says nothing."""
    found: dict[str, Any] = {}
    for name, parts in strata.items():
        for part, inside_S in parts.items():
            figures = score_stratum(slices, judged, inside_S[slices.study_N])
            if figures["rows"]:
                ends = interval(drawn[f"strata/{name}/{part}"]["auc"])
                found.setdefault(name, {})[part] = {**figures, "auc_ci": ends}
    return {name: parts for name, parts in found.items() if len(parts) > 1}


def rounded(value: Any) -> Any:
    """Nested figures rounded to `DECIMALS`; what is not a finite number becomes None, as JSON has no word for it."""
    if isinstance(value, dict):
        return {str(key): rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    if isinstance(value, float):
        return round(value, DECIMALS) if math.isfinite(value) else None
    return value


def _pictures(
    config: Config, store: Store, slices: Scored, where_N2: Slices, *, train: Path
) -> tuple[list[Picture], list[str]]:
    """The gallery, and why some of its pictures have no heat map."""
    chosen = choose_all(slices)
    heats, faults = explain_chosen(config, store, chosen, slices, where_N2, train=train)
    pictures = [draw_picture(store, one, slices, where_N2, heats.get((one.row, one.label))) for one in chosen]
    return pictures, faults


def training_table(folds: Sequence[TrainedFold]) -> pd.DataFrame:
    """The training curves as rows: fold, epoch, part (training, validation), loss."""
    parts = {"train_loss": "training", "valid_loss": "validation"}
    tables = [result.history.melt("epoch", list(parts), "part", "loss").assign(fold=result.fold) for result in folds]
    table = pd.concat(tables, ignore_index=True).replace({"part": parts})
    return table[["fold", "epoch", "part", "loss"]].round(DECIMALS)
