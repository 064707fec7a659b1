"""Scores on plain arrays, for each label, at slice and at study level, each beside what guessing would score.

Nothing that is fitted is scored on what it was fitted to: thresholds and temperatures come from other patients' rows.

Axes: N rows (slices at slice level, studies at study level), L labels. A label of −1 is unknown and left out of every
figure. A figure that the data cannot give (one class only, too few positive patients) is None, never NaN.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from pipeline.bootstrap import AtPrevalence, Gaps, Ranked, Ratios, Statistic, interval, pivotal_interval
from pipeline.calibration import Reliability, find_bins, fit_temperature, reliability, scale
from pipeline.labels import ANY, LABEL_WEIGHTS, LABELS, UNKNOWN

SMALLEST_PROBABILITY = 1e-15
"""The challenge clips probabilities here; in float32 one minus it would be one, so the sums are made in float64."""

CURVE_POINTS = 200
"""Points of a thinned ROC curve: neighbours then lie 0.01 apart, less than a line's width in any figure."""

ALL_FOLDS = "all"

MICRO, MACRO = "micro average", "macro average"
"""Stand for a label where a curve is an average over all of them."""

WHOLE = "whole"
"""Stands for a label where a figure is of all labels at once."""

AVERAGED = ("auc", "average_precision", "sensitivity", "specificity", "log_loss", "base_rate_log_loss", "brier", "ece")

SPECIFICITIES = (90, 95)
"""Per cent; at each the highest sensitivity is read off the ROC curve."""

RATES = ("sensitivity", "specificity", "ppv", "npv", "f1", "accuracy")
"""Of calls; each is a sum over rows by another."""

CALIBRATION_ERRORS = ("ece", "ece_scaled")
"""Too high by chance, never too low; their intervals allow for it."""

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Scored:
    """Held-out rows: what is known, what was predicted, and whose they are."""

    labels_NL: npt.NDArray[np.int8]
    """1, 0, −1 unknown."""
    probabilities_NL: Floats
    study_N: npt.NDArray[np.int64]
    patient_N: npt.NDArray[Any]
    """Patient keys, str."""
    fold_N: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.study_N)

    def of(self, label: int) -> tuple[Bools, Bools, Floats]:
        """One label: which rows know it, bool [N]; and of those the truth and the probability, [known]."""
        known_N = self.labels_NL[:, label] != UNKNOWN
        return known_N, self.labels_NL[known_N, label] == 1, self.probabilities_NL[known_N, label]


@dataclass(frozen=True)
class Curve:
    """A ROC curve: a row is called positive where its probability is at least the threshold."""

    label: str
    fold: str
    """A fold's number, or "all"."""
    fpr: Floats
    tpr: Floats
    threshold: Floats


@dataclass(frozen=True)
class PrecisionRecall:
    """A precision-recall curve, from recall 0 to 1."""

    label: str
    recall: Floats
    precision: Floats


@dataclass(frozen=True)
class Decisions:
    """Calls made at thresholds that were chosen on other rows."""

    called: Bools
    """bool [known]"""
    thresholds: tuple[float, ...]
    """One for each group of rows, chosen on all the other groups."""


@dataclass(frozen=True)
class Scaled:
    """Probabilities after temperature scaling, by temperatures that were fitted on other rows."""

    probability: Floats
    """float64 [known]"""
    temperatures: tuple[float, ...]
    """One for each group of rows, fitted on all the other groups."""


@dataclass(frozen=True)
class Judged:
    """One label's known rows with all that is fitted on other rows; made once, for the figures, intervals and pictures."""

    label: int
    known_N: Bools
    truth: Bools
    probability: Floats
    decisions: Decisions | None
    scaled: Scaled | None


def to_studies(slices: Scored) -> Scored:
    """One row a study: its probability is the highest of its slices, its label the highest that is known of them."""
    study, first, row = np.unique(slices.study_N, return_index=True, return_inverse=True)
    labels_NL = np.full((len(study), slices.labels_NL.shape[1]), UNKNOWN, np.int8)
    probabilities_NL = np.zeros((len(study), slices.labels_NL.shape[1]))
    np.maximum.at(labels_NL, row, slices.labels_NL)
    np.maximum.at(probabilities_NL, row, slices.probabilities_NL)
    return Scored(labels_NL, probabilities_NL, study, slices.patient_N[first], slices.fold_N[first])


def judge(scored: Scored) -> list[Judged]:
    """Every label's known rows, called and scaled."""
    return [judge_label(scored, label) for label in range(len(LABELS))]


def judge_label(scored: Scored, label: int) -> Judged:
    """One label's known rows, called and scaled."""
    return Judged(label, *scored.of(label), decide(scored, label), scale_label(scored, label))


def score(scored: Scored, judged: Sequence[Judged], *, prevalence: float) -> dict[str, Any]:
    """Every figure of one level.

    Args:
        scored: the rows.
        judged: what `judge` makes of them.
        prevalence: share of studies with hemorrhage for which PPV and NPV are given as well.

    Returns:
        One entry a label, then `macro` (the mean over the labels that have the figure), the AUC of all labels' rows taken
        together, the weighted multi-label log loss (also after temperature scaling), and the same for someone who predicts
        each label's prevalence.
    """
    weights_N = to_prevalence(scored, prevalence)
    by_label = {LABELS[one.label]: score_label(scored, one, weights_N=weights_N) for one in judged}
    known_NL = scored.labels_NL != UNKNOWN
    return {
        **by_label,
        "macro": _macro(list(by_label.values())),
        "micro_auc": auc(scored.labels_NL[known_NL] == 1, scored.probabilities_NL[known_NL]),
        "weighted_log_loss": weighted_log_loss(scored.labels_NL, scored.probabilities_NL),
        "weighted_log_loss_scaled": weighted_log_loss(scored.labels_NL, _scaled_probabilities(scored, judged)),
        "base_rate_weighted_log_loss": weighted_log_loss(scored.labels_NL, base_rates(scored.labels_NL)),
    }


def score_label(scored: Scored, judged: Judged, *, weights_N: Floats | None) -> dict[str, Any]:
    """The figures of one label, with the number of positives that they rest on."""
    known_N, truth, probability = judged.known_N, judged.truth, judged.probability
    called = judged.decisions.called if judged.decisions else None
    return {
        "positives": int(truth.sum()),
        "negatives": int((~truth).sum()),
        "positive_studies": len(np.unique(scored.study_N[known_N][truth])),
        "positive_patients": len(np.unique(scored.patient_N[known_N][truth].astype(str))),
        "auc": auc(truth, probability),
        "average_precision": average_precision(truth, probability),
        **{f"sensitivity_at_{at}": sensitivity_at(truth, probability, at / 100) for at in SPECIFICITIES},
        **dict.fromkeys((*RATES, "log_loss_scaled", "brier_scaled")),
        **{name: _ratio(*parts) for name, parts in judged_parts(judged).items()},
        **_at_prevalence(judged, weights_N),
        "confusion": _confusion(truth, called),
        "thresholds": list(judged.decisions.thresholds) if judged.decisions else None,
        "base_rate_log_loss": log_loss(truth, np.full(len(truth), truth.mean() if len(truth) else 0.0)),
        **_calibration(judged),
        "auc_by_fold": {
            str(fold): auc(truth[here], probability[here])
            for fold in np.unique(scored.fold_N)
            for here in [scored.fold_N[known_N] == fold]
        },
    }


def judged_parts(judged: Judged) -> dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """The figures that are a sum over rows by another: numerator and denominator of each row, [known]."""
    truth, probability = judged.truth, judged.probability
    one = np.ones(len(truth))
    parts = {
        "log_loss": (losses(truth, probability), one),
        "brier": ((probability - truth) ** 2, one),
    }
    if judged.scaled is not None:
        after = judged.scaled.probability
        parts |= {"log_loss_scaled": (losses(truth, after), one), "brier_scaled": ((after - truth) ** 2, one)}
    if judged.decisions is None:
        return parts
    called = judged.decisions.called
    hit, either = truth & called, truth.astype(np.int64) + called
    return parts | {
        "sensitivity": (hit, truth),
        "specificity": (~truth & ~called, ~truth),
        "ppv": (hit, called),
        "npv": (~truth & ~called, ~called),
        "f1": (2 * hit, either),
        "accuracy": (truth == called, one),
    }


def prevalence_parts(judged: Judged) -> dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """As `judged_parts`: the figures that depend on how many studies have hemorrhage; none without calls."""
    if judged.decisions is None:
        return {}
    truth, called = judged.truth, judged.decisions.called
    return {"ppv_at_prevalence": (truth & called, called), "npv_at_prevalence": (~truth & ~called, ~called)}


def _ratio(numerator: npt.NDArray[Any], denominator: npt.NDArray[Any]) -> float | None:
    return float(numerator.sum() / denominator.sum()) if denominator.any() else None


def _confusion(truth: Bools, called: Bools | None) -> dict[str, int] | None:
    if called is None:
        return None
    return {
        "found": int((truth & called).sum()),
        "missed": int((truth & ~called).sum()),
        "false_alarms": int((~truth & called).sum()),
        "rightly_free": int((~truth & ~called).sum()),
    }


def to_prevalence(scored: Scored, prevalence: float) -> Floats | None:
    """Weights of rows that make studies with hemorrhage as frequent as `prevalence`, and change nothing else.

    All rows of a study weigh the same, so that slices and subtypes follow from the mix of studies. A study that nobody knows
    about weighs nothing.

    Returns:
        float64 [N], or None if all studies are positive or all negative.
    """
    any_S, _, row = _any_of_studies(scored)
    positive, known = int((any_S == 1).sum()), int((any_S != UNKNOWN).sum())
    if positive in (0, known):
        return None
    weights_S = np.where(any_S == 1, prevalence / positive, (1 - prevalence) / (known - positive))
    return np.where(any_S == UNKNOWN, 0.0, weights_S)[row]


def _any_of_studies(scored: Scored) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Each study's `any`, int8 [S]; the first of its rows, int64 [S]; and each row's study, int64 [N]."""
    study, first, row = np.unique(scored.study_N, return_index=True, return_inverse=True)
    any_S = np.full(len(study), UNKNOWN, np.int8)
    np.maximum.at(any_S, row, scored.labels_NL[:, ANY])
    return any_S, first, row


def _at_prevalence(judged: Judged, weights_N: Floats | None) -> dict[str, float | None]:
    found: dict[str, float | None] = {"ppv_at_prevalence": None, "npv_at_prevalence": None}
    if weights_N is None:
        return found
    weights = weights_N[judged.known_N]
    parts = prevalence_parts(judged)
    return found | {name: _ratio(weights * upper, weights * lower) for name, (upper, lower) in parts.items()}


def _calibration(judged: Judged) -> dict[str, Any]:
    """Expected calibration error, and what temperature scaling makes of it."""
    truth, scaled = judged.truth, judged.scaled
    after = scaled.probability if scaled else None
    return {
        "ece": reliability(truth, judged.probability).error,
        "ece_scaled": None if after is None else reliability(truth, after).error,
        "temperatures": list(scaled.temperatures) if scaled else None,
    }


def _scaled_probabilities(scored: Scored, judged: Sequence[Judged]) -> Floats:
    """After scaling, float64 [N, L]; a label that could not be scaled stands as it was."""
    probabilities_NL = scored.probabilities_NL.copy()
    for one in judged:
        if one.scaled is not None:
            probabilities_NL[one.known_N, one.label] = one.scaled.probability
    return probabilities_NL


def statistics(
    scored: Scored, judged: Sequence[Judged], *, patients: Sequence[str], prevalence: float
) -> dict[str, Statistic]:
    """What the bootstrap draws: by label (and `WHOLE`), then "/ranks", "/sums", "/gaps" or "/mix".

    Args:
        scored: the rows.
        judged: what `judge` makes of them.
        patients: sorted keys of all who may be drawn.
        prevalence: as for `score`.
    """
    patient_N, known_NL = number_patients(scored, patients), scored.labels_NL != UNKNOWN
    any_S, first_S, row_N = _any_of_studies(scored)
    studies_P2 = np.stack([np.bincount(patient_N[first_S], any_S == kind, len(patients)) for kind in (0, 1)], axis=1)
    found: dict[str, Statistic] = {}
    for one in judged:
        name, of_known = LABELS[one.label], patient_N[one.known_N]
        found[f"{name}/ranks"] = Ranked(one.truth, one.probability, patient_N=of_known, specificities=SPECIFICITIES)
        found[f"{name}/sums"] = Ratios(judged_parts(one), patient_N=of_known, patients=len(patients))
        found[f"{name}/gaps"] = Gaps(_gap_parts(one), patient_N=of_known, patients=len(patients))
        if one.decisions is not None:
            found[f"{name}/mix"] = AtPrevalence(
                prevalence_parts(one),
                in_positive_N=any_S[row_N][one.known_N],
                studies_P2=studies_P2,
                prevalence=prevalence,
                patient_N=of_known,
            )
    micro = (scored.labels_NL[known_NL] == 1, scored.probabilities_NL[known_NL])
    found[f"{WHOLE}/ranks"] = Ranked(*micro, patient_N=patient_N[np.nonzero(known_NL)[0]])
    found[f"{WHOLE}/sums"] = Ratios(_weighted_parts(scored, judged), patient_N=patient_N, patients=len(patients))
    return found


def _gap_parts(judged: Judged) -> dict[str, tuple[Floats, npt.NDArray[np.int64]]]:
    said = {"ece": judged.probability}
    if judged.scaled is not None:
        said["ece_scaled"] = judged.scaled.probability
    return {name: (judged.truth - probability, find_bins(probability)) for name, probability in said.items()}


def _weighted_parts(scored: Scored, judged: Sequence[Judged]) -> dict[str, tuple[Floats, Floats]]:
    said = {
        "weighted_log_loss": scored.probabilities_NL,
        "weighted_log_loss_scaled": _scaled_probabilities(scored, judged),
    }
    parts = {name: _weighted(scored.labels_NL, probabilities_NL) for name, probabilities_NL in said.items()}
    return {name: (losses_NL.sum(axis=1), weights_NL.sum(axis=1)) for name, (losses_NL, weights_NL) in parts.items()}


def number_patients(scored: Scored, patients: Sequence[str]) -> npt.NDArray[np.int64]:
    """Each row's patient as a number among the sorted keys: int64 [N]."""
    return np.searchsorted(np.asarray(patients, str), scored.patient_N.astype(str)).astype(np.int64)


def with_intervals(scores: Mapping[str, Any], drawn: Mapping[str, Mapping[str, Floats]]) -> dict[str, Any]:
    """One level's scores with `<figure>_ci`, [low, high], behind each figure that was drawn.

    Args:
        scores: what `score` gives.
        drawn: what `resample` makes of `statistics`.
    """
    by_label = {name: _of_label(drawn, name) for name in LABELS}
    labels = {name: _beside(scores[name], by_label[name]) for name in LABELS}
    macro = _beside(scores["macro"], _mean_draws(scores, by_label))
    whole = {**drawn[f"{WHOLE}/sums"], "micro_auc": drawn[f"{WHOLE}/ranks"]["auc"]}
    return _beside({**scores, **labels, "macro": macro}, whole)


def _of_label(drawn: Mapping[str, Mapping[str, Floats]], label: str) -> dict[str, Floats]:
    return {name: values for key, of in drawn.items() if key.split("/")[0] == label for name, values in of.items()}


def _mean_draws(scores: Mapping[str, Any], by_label: Mapping[str, Mapping[str, Floats]]) -> dict[str, Floats]:
    """Each draw's mean over the labels that have the figure."""
    found = {}
    for name in AVERAGED:
        of = [drawn[name] for label, drawn in by_label.items() if name in drawn and scores[label][name] is not None]
        if of:
            found[name] = np.mean(of, axis=0)
    return found


def _beside(figures: Mapping[str, Any], drawn: Mapping[str, Floats]) -> dict[str, Any]:
    found = {}
    for name, value in figures.items():
        found[name] = value
        if name in drawn:
            found[f"{name}_ci"] = None if value is None else _ends(name, value, drawn[name])
    return found


def _ends(name: str, figure: float, values_D: Floats) -> list[float] | None:
    return pivotal_interval(values_D, figure) if name in CALIBRATION_ERRORS else interval(values_D)


def _macro(by_label: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found = {name: [figures[name] for figures in by_label if figures[name] is not None] for name in AVERAGED}
    means = {name: float(np.mean(values)) if values else None for name, values in found.items()}
    return {"labels": len(found["auc"]), **means}


def has_both(truth: Bools) -> bool:
    """Whether there are positives and negatives, without which no ROC curve exists."""
    return bool(truth.any() and not truth.all())


def auc(truth: Bools, probability: npt.NDArray[Any], weights: Floats | None = None) -> float | None:
    """Area under the ROC curve, of rows that may weigh; None with one class only, or if none of a class weighs anything."""
    if weights is not None:
        truth, probability, weights = truth[weights > 0], probability[weights > 0], weights[weights > 0]
    return float(roc_auc_score(truth, probability, sample_weight=weights)) if has_both(truth) else None


def average_precision(truth: Bools, probability: Floats) -> float | None:
    """Average precision; None with one class only."""
    return float(average_precision_score(truth, probability)) if has_both(truth) else None


def sensitivity_at(truth: Bools, probability: Floats, specificity: float) -> float | None:
    """The highest sensitivity whose specificity is at least this, on the ROC curve of these rows; None with one class only."""
    if not has_both(truth):
        return None
    fpr, tpr, _ = roc_curve(truth, probability, drop_intermediate=False)
    return float(tpr[fpr <= 1 - specificity + 1e-12].max())  # 1 − 0.9 is a little less than 0.1


def log_loss(truth: Bools, probability: Floats) -> float | None:
    """Mean log loss of one label, probabilities clipped as the challenge does; None without rows."""
    return float(losses(truth, probability).mean()) if len(truth) else None


def weighted_log_loss(labels_NL: npt.NDArray[np.int8], probabilities_NL: Floats) -> float | None:
    """The challenge's metric: `any` counts twice, the mean is over the weights of what is known; None if nothing is."""
    losses_NL, weights_NL = _weighted(labels_NL, probabilities_NL)
    return _ratio(losses_NL, weights_NL)


def _weighted(labels_NL: npt.NDArray[np.int8], probabilities_NL: Floats) -> tuple[Floats, Floats]:
    """Each label's loss times its weight, and the weight, 0 where the label is unknown: float64 [N, L] both."""
    weights_NL = np.where(labels_NL != UNKNOWN, np.array(LABEL_WEIGHTS), 0.0)
    return weights_NL * losses(labels_NL == 1, probabilities_NL), weights_NL


def losses(truth: Bools, probability: Floats) -> Floats:
    """Each row's log loss, probabilities clipped as the challenge does."""
    clipped = np.clip(np.asarray(probability, np.float64), SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    return -np.where(truth, np.log(clipped), np.log1p(-clipped))


def base_rates(labels_NL: npt.NDArray[np.int8]) -> Floats:
    """Each label's prevalence among the rows that know it, repeated for every row: float64 [N, L]."""
    known_NL = labels_NL != UNKNOWN
    rates_L = (labels_NL == 1).sum(axis=0) / np.maximum(known_NL.sum(axis=0), 1)
    return np.broadcast_to(rates_L, labels_NL.shape).astype(np.float64)


def decide(scored: Scored, label: int) -> Decisions | None:
    """Call each row at a threshold chosen (Youden's J) on other patients' rows.

    With several folds a fold's threshold comes from the other folds; with one, from the other half of the patients.

    Returns:
        The calls, or None if some group's other rows lack a class, so that they have no threshold to give.
    """
    _, truth, probability = scored.of(label)
    called = np.zeros(len(truth), bool)
    thresholds = []
    for here in _held_out_groups(scored, label):
        thresholds.append(youden_threshold(truth[~here], probability[~here]))
        called[here] = probability[here] >= thresholds[-1]
    return Decisions(called, tuple(thresholds)) if thresholds else None


def scale_label(scored: Scored, label: int) -> Scaled | None:
    """Scale each row by a temperature fitted on other patients' rows, grouped as for `decide`; None as there."""
    _, truth, probability = scored.of(label)
    after = np.zeros(len(truth))
    temperatures = []
    for here in _held_out_groups(scored, label):
        temperatures.append(fit_temperature(truth[~here], probability[~here]))
        after[here] = scale(probability[here], temperatures[-1])
    return Scaled(after, tuple(temperatures)) if temperatures else None


def _held_out_groups(scored: Scored, label: int) -> list[Bools]:
    """The groups of the label's known rows, bool [known] each; none if the rows outside one of them lack a class."""
    known_N, truth, _ = scored.of(label)
    if not has_both(truth):
        return []
    group = _groups(truth, scored.patient_N[known_N], scored.fold_N[known_N])
    groups = [group == one for one in np.unique(group)]
    return groups if all(has_both(truth[~here]) for here in groups) else []


def fit_operating_points(judged: Sequence[Judged]) -> dict[str, dict[str, Any]]:
    """For new rows: by label the temperature and, on the probability after scaling by it, the threshold, fitted on all rows.

    Both rules are those of the cross-fitted figures, which alone are scores: what is fitted on all rows cannot be scored on them.
    A label without cross-fitted calls has neither, since nobody could say what they are worth.
    """
    return {LABELS[one.label]: _fit_operating_point(one) for one in judged}


def _fit_operating_point(judged: Judged) -> dict[str, Any]:
    truth, temperature, threshold = judged.truth, None, None
    if judged.decisions is not None:
        temperature = fit_temperature(truth, judged.probability)
        threshold = youden_threshold(truth, scale(judged.probability, temperature))
    counts = {"positives": int(truth.sum()), "negatives": int((~truth).sum())}
    return {"temperature": temperature, "threshold": threshold, **counts}


def youden_threshold(truth: Bools, probability: Floats) -> float:
    """The threshold with the highest sensitivity + specificity; halfway to the next lower probability.

    Every threshold between two neighbouring probabilities is as good here; the middle is the least tuned to these rows.
    """
    fpr, tpr, threshold = roc_curve(truth, probability, drop_intermediate=False)
    best = 1 + int(np.argmax((tpr - fpr)[1:]))  # the first point, at infinity, calls nothing positive
    lower = threshold[min(best + 1, len(threshold) - 1)]
    return float((threshold[best] + lower) / 2)


def _groups(truth: Bools, patient: npt.NDArray[Any], fold: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The folds, if there are several; else two halves of the patients, with half of the positive ones in each."""
    if len(np.unique(fold)) > 1:
        return fold
    keys, row = np.unique(patient.astype(str), return_inverse=True)
    is_positive = np.zeros(len(keys), bool)
    np.logical_or.at(is_positive, row, truth)
    drawn = [hashlib.sha256(key.encode()).hexdigest() for key in keys]
    order = sorted(range(len(keys)), key=lambda patient: (not is_positive[patient], drawn[patient]))
    half = np.empty(len(keys), np.int64)
    half[order] = np.arange(len(keys)) % 2
    return half[row]


def roc_curves(scored: Scored) -> list[Curve]:
    """For each label that has both classes: the curve of all rows, then one a fold if there are several."""
    folds = np.unique(scored.fold_N)
    curves = []
    for label, name in enumerate(LABELS):
        known_N, truth, probability = scored.of(label)
        subsets = {ALL_FOLDS: np.ones(len(truth), bool)}
        if len(folds) > 1:
            subsets.update({str(fold): scored.fold_N[known_N] == fold for fold in folds})
        for fold, here in subsets.items():
            if has_both(truth[here]):
                curves.append(Curve(name, fold, *roc_curve(truth[here], probability[here])))
    return curves


def average_roc_curves(scored: Scored) -> list[Curve]:
    """The micro average, all labels' rows ranked together, and the macro average, the labels' mean sensitivity at equal specificity
    (Fawcett 2006), over the labels that have both classes. Nothing where none has."""
    of_labels = [curve for curve in roc_curves(scored) if curve.fold == ALL_FOLDS]
    if not of_labels:
        return []
    known_NL = scored.labels_NL != UNKNOWN
    micro = Curve(MICRO, ALL_FOLDS, *roc_curve(scored.labels_NL[known_NL] == 1, scored.probabilities_NL[known_NL]))
    fpr = np.unique(np.concatenate([curve.fpr for curve in of_labels]))
    tpr = np.mean([_steps_at(curve, fpr) for curve in of_labels], axis=0)
    return [micro, Curve(MACRO, ALL_FOLDS, np.repeat(fpr, 2), tpr, np.full(2 * len(fpr), np.nan))]


def _steps_at(curve: Curve, fpr: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """A curve's sensitivity below and above its step at each 1 − specificity, float64 [2 · points]: so the area stays its own."""
    first, last = np.searchsorted(curve.fpr, fpr, "left"), np.searchsorted(curve.fpr, fpr, "right") - 1
    between = np.interp(fpr, curve.fpr, curve.tpr)
    below = np.where(first <= last, curve.tpr[np.minimum(first, len(curve.tpr) - 1)], between)
    above = np.where(first <= last, curve.tpr[last], between)
    return np.stack([below, above], axis=1).ravel()


def thin(curve: Curve, points: int = CURVE_POINTS) -> Curve:
    """At most `points` of a curve's own points, evenly spread along its length, both ends among them."""
    if len(curve.fpr) <= points:
        return curve
    walked = curve.fpr + curve.tpr  # both only grow, so that this is the way along the staircase
    kept = np.unique(np.searchsorted(walked, np.linspace(0, walked[-1], points - 1)))
    kept = np.union1d(kept, [0, len(walked) - 1])
    return Curve(curve.label, curve.fold, curve.fpr[kept], curve.tpr[kept], curve.threshold[kept])


def precision_recall_curves(scored: Scored, points: int = CURVE_POINTS) -> list[PrecisionRecall]:
    """For each label that has both classes: at most `points` of the curve's own, evenly spread in recall."""
    curves = []
    for label, name in enumerate(LABELS):
        _, truth, probability = scored.of(label)
        if has_both(truth):
            precision, recall, _ = precision_recall_curve(truth, probability)
            precision, recall = precision[::-1], recall[::-1]
            kept = np.unique(np.searchsorted(recall, np.linspace(0, 1, points)))
            curves.append(PrecisionRecall(name, recall[kept], precision[kept]))
    return curves


def reliabilities(judged: Sequence[Judged]) -> dict[str, tuple[Reliability, Reliability | None]]:
    """By label: reliability as predicted, and after temperature scaling."""
    return {
        LABELS[one.label]: (
            reliability(one.truth, one.probability),
            reliability(one.truth, one.scaled.probability) if one.scaled else None,
        )
        for one in judged
    }


def score_stratum(scored: Scored, judged: Judged, inside_N: Bools) -> dict[str, Any]:
    """One label's figures on some rows only, at the thresholds of all."""
    inside = inside_N[judged.known_N]
    truth, probability = judged.truth[inside], judged.probability[inside]
    called = judged.decisions.called[inside] if judged.decisions else None
    return {
        "rows": int(inside.sum()),
        "positives": int(truth.sum()),
        "patients": len(np.unique(scored.patient_N[judged.known_N][inside].astype(str))),
        "auc": auc(truth, probability),
        "log_loss": log_loss(truth, probability),
        "sensitivity": None if called is None else _ratio(truth & called, truth),
        "specificity": None if called is None else _ratio(~truth & ~called, ~truth),
    }


def score_counting(slices: Scored, counts_N: npt.NDArray[Any]) -> dict[str, Any]:
    """AUC of a count as a classifier of the same slices, and how far the model's AUC for `any` lies above it."""
    by_label = {}
    for label, name in enumerate(LABELS):
        known_N, truth, _ = slices.of(label)
        by_label[name] = auc(truth, counts_N[known_N])
    _, truth, probability = slices.of(ANY)
    model, counting = auc(truth, probability), by_label["any"]
    above = None if model is None or counting is None else model - counting
    return {"any_auc": counting, "any_auc_above_counting": above, "auc": by_label}
