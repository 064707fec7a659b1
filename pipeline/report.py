"""The scores for people: a table for the terminal, and one HTML file that opens anywhere.

The file needs no asset from elsewhere, and holds no identifier of a person, a study or a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
import pandas as pd
from markupsafe import Markup

from pipeline.baseline import LEAST_BINS, LEAST_IN_BIN
from pipeline.calibration import Reliability
from pipeline.charts import Axis, Band, Line, chart
from pipeline.config import Config, Window
from pipeline.curves import ALL_FOLDS, MACRO, MICRO, Curve, PrecisionRecall
from pipeline.flow import Flow, draw_flow
from pipeline.gallery import KINDS, LEAST_SURE, SUREST, Picture
from pipeline.labels import LABELS, SUBTYPES
from pipeline.manifest import EXCLUDED, REASONS, REPAIRED, USED
from pipeline.metrics import SPECIFICITIES
from pipeline.provenance import Provenance
from pipeline.sheet import SHORT

TEMPLATE = "report.html.j2"

DIGEST_SHOWN = 12
"""Characters of a digest that tell two stores apart."""

ROC_SIZE = (300, 300)
HISTORY_SIZE = (460, 260)

COUNTS = {"positives": "Positive", "negatives": "Negative", "positive_patients": "Positive patients"}

LABEL_COLUMNS = {
    "ranks": {
        **COUNTS,
        "auc": "ROC AUC",
        "average_precision": "Average precision",
        **{f"sensitivity_at_{at}": f"Sensitivity at {at} % specificity" for at in SPECIFICITIES},
    },
    "calls": {
        "sensitivity": "Sensitivity",
        "specificity": "Specificity",
        "ppv": "PPV",
        "npv": "NPV",
        "f1": "F1",
        "accuracy": "Accuracy",
        "ppv_at_prevalence": "PPV at {prevalence} %",
        "npv_at_prevalence": "NPV at {prevalence} %",
    },
    "calibration": {
        "log_loss": "Log loss",
        "base_rate_log_loss": "Base rate’s",
        "brier": "Brier score",
        "ece": "Calibration error",
        "log_loss_scaled": "Log loss, scaled",
        "brier_scaled": "Brier score, scaled",
        "ece_scaled": "Calibration error, scaled",
        "temperatures": "Temperature",
    },
}
"""Figure and heading of the report's tables."""

TERMINAL_COLUMNS = (
    ("positives", "positive", 9),
    ("positive_patients", "patients", 9),
    ("auc", "AUC", 7),
    ("auc_ci", "95 % CI", 15),
    ("average_precision", "AP", 7),
    ("sensitivity", "sens.", 7),
    ("specificity", "spec.", 7),
    ("log_loss", "log loss", 9),
    ("ece", "ECE", 7),
)
"""Figure, heading and width of the columns of the terminal's tables."""


@dataclass(frozen=True)
class Published:
    """What another system's authors report, and what to bear in mind beside it."""

    system: str
    split: str
    auc: str
    """Of any hemorrhage."""
    log_loss: str
    """Weighted, multi-label: the challenge's metric."""
    caveat: str


PUBLISHED = (
    Published(
        "RSNA 2019, 1st place (Wang et al. 2021)",
        "study; the challenge’s own test set",
        "0.988",
        "0.0438",
        "An ensemble. Its folds put one patient on both sides. Elsewhere 0.964 (PhysioNet, 75 CTs) and 0.949 (CQ500, 491 CTs). "
        "The published code is reported to give 0.046 to 0.050.",
    ),
    Published(
        "RSNA 2019, 2nd place, one model",
        "patient; the challenge’s own test set",
        "not given",
        "0.0461",
        "0.055 to 0.058 on its own validation folds, which is what a run held out by patient compares with.",
    ),
    Published(
        "RSNA 2019, 12th place",
        "series",
        "0.988 to 0.989 by slice",
        "0.0473",
        "AUC on its own folds, at a log loss of 0.060 to 0.064 there. Patients may be on both sides.",
    ),
    Published(
        "Burduja et al. 2020",
        "series; the challenge’s own test set",
        "in the paper",
        "0.0499",
        "256 × 256 pixels. Patients may be on both sides of its validation.",
    ),
    Published(
        "MaxViT and GRU (i-pan 2026)",
        "patient",
        "0.983 by slice, 0.980 by study",
        "not given",
        "Intervals by patient. It says itself that calibration, operating points and outside data were not examined.",
    ),
    Published(
        "MaxViT (ich-maxvit 2026)",
        "slice",
        "0.986 by slice",
        "0.0871",
        "Neighbouring slices of one CT are on both sides. Thresholds were chosen on the slices that they are scored on.",
    ),
    Published(
        "EfficientNet-B4 (Harshit-code-tech 2026)",
        "patient; 75,280 slices",
        "0.951 by slice",
        "not given",
        "A tenth of the data. Calibration error 0.030, 0.008 after temperature scaling.",
    ),
    Published(
        "The system that this project grew from",
        "slice",
        "not given",
        "not given",
        "92.1 % sensitivity for any hemorrhage, with slices of one CT on both sides.",
    ),
    Published(
        "A network trained on RSNA 2019, in Hong Kong (2023)",
        "another hospital, 1,372 CTs",
        "0.842",
        "not given",
        "What a change of hospital can cost: sensitivity 73 to 79 %, PPV 18.6 %.",
    ),
)
"""As their authors report them."""

ONE_CLASS = "the held-out slices are all bleeding or all free of it"


def render_report(
    config: Config,
    *,
    metrics: dict[str, Any],
    curves: dict[str, list[Curve]],
    precision_recall: dict[str, list[PrecisionRecall]],
    reliability: dict[str, dict[str, tuple[Reliability, Reliability | None]]],
    summaries: Sequence[dict[str, Any]],
    histories: Sequence[pd.DataFrame],
    pictures: Sequence[Picture],
    without_heat: Sequence[str],
    windows: Mapping[str, Window],
    accounting: dict[str, Any] | None,
    flow: Flow | None,
    making: Provenance,
    store_digest: str,
) -> str:
    """Make the page.

    Args:
        config: the parameters of the run.
        metrics: what metrics.json holds.
        curves: ROC curves by level.
        precision_recall: precision-recall curves by level.
        reliability: reliability by level and label, as predicted and after scaling.
        summaries: each fold's summary.json.
        histories: each fold's history, one row an epoch.
        pictures: the gallery.
        without_heat: why some pictures have no heat map.
        windows: the store's windows by name.
        accounting: what became of each file found.
        flow: the same to the end, or None.
        making: how the run was made.
        store_digest: names the store's content.

    Returns:
        HTML.
    """
    return open_template(TEMPLATE, escape=True).render(
        metrics=metrics,
        label_columns=LABEL_COLUMNS,
        labels=LABELS,
        is_phantom=config.source.is_phantom,
        several=len(summaries) > 1,
        roc=_roc_panels(metrics, curves),
        precision_recall=_precision_recall_panels(metrics, precision_recall),
        reliability=_reliability_panels(metrics, reliability["slice"]),
        published=PUBLISHED,
        prevalence=f"{100 * metrics['held_out']['prevalence']:g}",
        training=_training_panels(summaries, histories),
        summaries=summaries,
        gallery=_gallery(pictures),
        by_subtype=_by_subtype(pictures),
        without_heat=without_heat,
        short=SHORT,
        accounting=_accounting(accounting),
        one_class=ONE_CLASS,
        least_balanced=LEAST_BINS * LEAST_IN_BIN,
        windows=windows,
        flow=flow,
        flow_svg=Markup(draw_flow(flow)) if flow else None,
        making=making,
        trained=[_trained(summary) for summary in summaries],
        digest=store_digest[:DIGEST_SHOWN],
    )


def open_template(name: str, *, escape: bool) -> jinja2.Template:
    """A template beside this module, with the filters that write figures."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=escape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    templates.filters.update(figure=figure, signed=signed, count=count, minutes=minutes, between=between)
    return templates.get_template(name)


def figure(value: float | None, digits: int = 3) -> str:
    """A figure, or a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def signed(value: float | None) -> str:
    """A difference with its sign, or a dash."""
    return "–" if value is None else f"{value:+.3f}".replace("-", "−")


def count(value: int | None) -> str:
    """A whole number with thousands apart, or a dash."""
    return "–" if value is None else f"{value:,}"


def between(ends: Sequence[float] | None, digits: int = 3) -> str:
    """An interval, or nothing where there is none."""
    return "" if ends is None else f"{figure(ends[0], digits)} to {figure(ends[1], digits)}".replace("-", "−")


def minutes(seconds: float) -> str:
    """A duration: 48 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def describe(metrics: dict[str, Any]) -> str:
    """The scores for a terminal: one line a label, by slice and by study, then the log loss and the counting baseline."""
    held_out, slices = metrics["held_out"], metrics["slice"]
    folds = ", ".join(map(str, held_out["folds"]))
    return "\n".join(
        [
            f"held out (fold {folds} of {held_out['of_folds']}): {held_out['slices']:,} slices of "
            f"{held_out['studies']:,} studies of {held_out['patients']:,} patients",
            *_describe_level(metrics, "slice"),
            *_describe_level(metrics, "study"),
            "",
            f"weighted log loss   {figure(slices['weighted_log_loss'])} {_brackets(slices['weighted_log_loss_ci'])}; "
            f"predicting the base rates scores {figure(slices['base_rate_weighted_log_loss'])}; "
            f"after temperature scaling {figure(slices['weighted_log_loss_scaled'])}",
            _describe_counting(metrics["counting"]),
            *_describe_headers(metrics),
            *_describe_alone(metrics.get("without_sequence")),
            f"[95 % CI]           {held_out['resamples']:,} resamples of the patients",
        ]
    )


def _describe_level(metrics: dict[str, Any], level: str) -> list[str]:
    head = f"{'by ' + level:17s}" + "".join(f"{heading:>{width}s}" for _, heading, width in TERMINAL_COLUMNS)
    return ["", head, *(_describe_label(metrics[level][name], name) for name in (*LABELS, "macro"))]


def _describe_label(figures: dict[str, Any], label: str) -> str:
    line = f"{label:17s}"
    for key, _, width in TERMINAL_COLUMNS:
        value = figures.get(key, "")
        shown = _brackets(value) if key.endswith("_ci") else value if isinstance(value, int | str) else figure(value)
        line += f"{shown:>{width}}"
    return line


def _brackets(ends: Sequence[float] | None) -> str:
    return "[–]" if ends is None else f"[{figure(ends[0])}, {figure(ends[1])}]"


def _describe_headers(metrics: dict[str, Any]) -> list[str]:
    by_slice, by_study, balanced = metrics["headers_by_slice"], metrics["headers"], metrics["balanced"]["slice"]["any"]
    return [
        f"headers alone       any AUC {figure(by_slice['auc']['any'])} by slice, {figure(by_study['auc']['any'])} by study; "
        f"the network is {signed(by_slice['any_auc_above_headers'])} and {signed(by_study['any_auc_above_headers'])} above it",
        f"balanced by headers any AUC {figure(balanced['network'])} {_brackets(balanced['network_ci'])} by slice, "
        f"where headers alone reach {figure(balanced['headers'])}",
    ]


def _describe_alone(alone: dict[str, Any] | None) -> list[str]:
    if alone is None:
        return []
    return [
        f"the CNN alone       any AUC {figure(alone['slice_any_auc'])} by slice, {figure(alone['study_any_auc'])} by "
        f"study; weighted log loss {figure(alone['weighted_log_loss'])}"
    ]


def _describe_counting(counting: dict[str, Any]) -> str:
    above = counting["any_auc_above_counting"]
    if above is None:
        return f"counting baseline   none: {counting.get('reason', ONE_CLASS)}"
    return f"counting baseline   any AUC {figure(counting['any_auc'])} by slice; the network is {above:+.3f} above it"


def _square(lines: Sequence[Line], words: str, *, x: str, y: str, **more: Any) -> Markup:
    """A chart of one rate over another."""
    return Markup(chart(lines, describe=words, x=Axis(x, 0, 1), y=Axis(y, 0, 1), size=ROC_SIZE, **more))


def _roc_panels(metrics: dict[str, Any], curves: dict[str, list[Curve]]) -> list[dict[str, Any]]:
    """One panel a label, then the averages: each fold's slice curve thin, their mean and spread, the studies' and all slices' on top."""
    panels = []
    for label in (*LABELS, MICRO, MACRO):
        of_level = {level: [curve for curve in found if curve.label == label] for level, found in curves.items()}
        aucs = {level: _ranking(metrics[level], label) for level in of_level}
        single = [curve for curve in of_level["slice"] if curve.fold != ALL_FOLDS]
        lines = [Line(curve.fpr, curve.tpr, "fold", f"slices, fold {curve.fold}") for curve in single]
        for level, name in (("study", "studies"), ("slice", "slices")):
            whole = [curve for curve in of_level[level] if curve.fold == ALL_FOLDS]
            lines += [Line(curve.fpr, curve.tpr, name, name) for curve in whole]
        words = f"ROC curve of {label}: AUC {figure(aucs['slice'])} for slices, {figure(aucs['study'])} for studies"
        svg = _square(lines, words, x="1 − specificity", y="sensitivity", diagonal=True, bands=_spread(single))
        of_folds = metrics["slice"].get(label, {}).get("auc_by_fold", {})  # the averages have none
        by_fold = [auc for auc in of_folds.values() if auc is not None]
        spread = {"mean": float(np.mean(by_fold)), "sd": float(np.std(by_fold, ddof=1))} if len(by_fold) > 1 else None
        panels.append({"label": label, "svg": svg, "spread": spread, **aucs})
    return panels


def _ranking(of_level: dict[str, Any], label: str) -> float | None:
    """The ROC AUC of a label, or of an average over all labels."""
    found: float | None
    found = of_level["micro_auc"] if label == MICRO else of_level["macro" if label == MACRO else label]["auc"]
    return found


def _spread(single: Sequence[Curve]) -> list[Band]:
    """Mean ± standard deviation of the folds' sensitivities at equal specificity (vertical averaging, Fawcett 2006)."""
    if len(single) < 2:
        return []
    fpr = np.linspace(0, 1, 101)
    tpr = np.stack([np.interp(fpr, curve.fpr, curve.tpr) for curve in single])
    mean, sd = tpr.mean(axis=0), tpr.std(axis=0, ddof=1)
    return [Band(fpr, np.maximum(mean - sd, 0), np.minimum(mean + sd, 1), "spread", "folds, mean ± SD")]


def _precision_recall_panels(metrics: dict[str, Any], curves: dict[str, list[PrecisionRecall]]) -> list[dict[str, Any]]:
    """One panel a label: slices and studies, and what calling everything positive would reach."""
    panels = []
    for label in LABELS:
        figures = {level: metrics[level][label] for level in curves}
        of_level = {level: [curve for curve in found if curve.label == label] for level, found in curves.items()}
        lines = []
        for level, name in (("study", "studies"), ("slice", "slices")):
            lines += [Line(*_steps(curve), name, name) for curve in of_level[level]]
        rows = figures["slice"]["positives"] + figures["slice"]["negatives"]
        rate = figures["slice"]["positives"] / rows if rows else 0.0
        lines.append(Line(np.array([0, 1]), np.array([rate, rate]), "rate", "share of positive slices"))
        found = {level: figures[level]["average_precision"] for level in figures}
        words = (
            f"Precision-recall curve of {label}: average precision {figure(found['slice'])} for slices, "
            f"{figure(found['study'])} for studies"
        )
        svg = _square(lines, words, x="recall (sensitivity)", y="precision (PPV)")
        panels.append({"label": label, "svg": svg, **found})
    return panels


def _steps(curve: PrecisionRecall) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The curve as steps, under which lies the average precision; straight lines would promise more (Davis and Goadrich 2006)."""
    return np.repeat(curve.recall, 2)[:-1], np.repeat(curve.precision, 2)[1:]


def _reliability_panels(
    metrics: dict[str, Any], found: dict[str, tuple[Reliability, Reliability | None]]
) -> list[dict[str, Any]]:
    """One panel a label: share of positives over mean probability, as predicted and after scaling, by slice."""
    panels = []
    for label, (plain, scaled) in found.items():
        pairs = [(scaled, "scaled", "after temperature scaling"), (plain, "plain", "as predicted")]
        lines = [
            Line(bins.predicted, bins.observed, css_class, name, dots=True, radius=_radii(bins.rows))
            for bins, css_class, name in pairs
            if bins is not None
        ]
        figures = {key: metrics["slice"][label][key] for key in ("ece", "ece_scaled")}
        words = (
            f"Reliability of {label}, slices: expected calibration error {figure(figures['ece'])}, "
            f"{figure(figures['ece_scaled'])} after scaling"
        )
        svg = _square(lines, words, x="predicted probability", y="share of positives", diagonal=True)
        panels.append({"label": label, "svg": svg, **figures})
    return panels


def _radii(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Dots whose areas follow the rows, but for a rest that can be seen."""
    return 1.5 + 6 * np.sqrt(rows / rows.max())


def _training_panels(summaries: Sequence[dict[str, Any]], histories: Sequence[pd.DataFrame]) -> list[dict[str, Any]]:
    """One panel a fold, all with the same ends, so that they can be compared."""
    losses = [history[["train_loss", "valid_loss"]].to_numpy(float) for history in histories]
    highest = max((float(np.nanmax(loss)) for loss in losses if loss.size and np.isfinite(loss).any()), default=1.0)
    longest = max((int(history["epoch"].max()) for history in histories if len(history)), default=1)
    first = min((int(history["epoch"].min()) for history in histories if len(history)), default=0)
    panels = []
    for summary, history in zip(summaries, histories, strict=True):
        epoch = history["epoch"].to_numpy()
        lines = [
            Line(epoch, history[f"{part}_loss"].to_numpy(float), part, f"{name} loss", dots=True)
            for part, name in (("train", "training"), ("valid", "validation"))
        ]
        words = f"Fold {summary['fold']}: training and validation loss over {len(history)} epochs"
        svg = chart(
            lines,
            describe=words,
            x=Axis("epoch", first, max(longest, first + 1), whole=True),
            y=Axis("loss", 0, highest * 1.05),
            size=HISTORY_SIZE,
        )
        panels.append({"fold": summary["fold"], "svg": Markup(svg), "best": summary["best_epoch"]})
    return panels


Row = tuple[str, list[Picture]]
"""Of the gallery: what stands above it, and the pictures."""


def _gallery(pictures: Sequence[Picture]) -> list[tuple[str, list[Row]]]:
    """The pictures by `any`: kind by kind, the surest and the least sure."""
    whole = [picture for picture in pictures if picture.label == "any"]
    return [
        (
            title,
            [
                (end, [one for one in whole if (one.kind, one.end) == (kind, end)])
                for end in (SUREST, LEAST_SURE)
                if any((one.kind, one.end) == (kind, end) for one in whole)
            ],
        )
        for kind, title in KINDS.items()
    ]


def _by_subtype(pictures: Sequence[Picture]) -> list[Row]:
    """The worst miss and the loudest false alarm of each subtype that has one."""
    rows = [(label, [picture for picture in pictures if picture.label == label]) for label in SUBTYPES]
    return [row for row in rows if row[1]]


def _accounting(totals: dict[str, Any] | None) -> dict[str, Any] | None:
    """Totals with their shares, and the reasons as sentences."""
    if not totals:
        return None
    files = max(totals["files"], 1)
    unknown = (EXCLUDED, "of a kind that this version does not know")
    return {
        "files": totals["files"],
        "parts": [
            {"status": status, "files": totals[status], "percent": 100 * totals[status] / files}
            for status in (USED, REPAIRED, EXCLUDED)
        ],
        "reasons": [(*REASONS.get(code, unknown), code, number) for code, number in totals["reasons"].items()],
    }


def _machine(machine: Mapping[str, str]) -> str:
    if not machine:
        return "not recorded"
    return f"{machine['processor']}, {'no GPU' if machine['GPU'] == 'none' else machine['GPU']}"


def _trained(summary: Mapping[str, Any]) -> dict[str, str]:
    """What training recorded of how a fold was trained."""
    precision, device = summary["params"].get("precision", "not recorded"), summary["device"]
    if precision == "auto":
        precision = "auto (bf16 where the GPU has it)" if "cuda" in device else "auto (fp32)"
    return {
        "fold": str(summary["fold"]),
        "code": summary.get("code", "not recorded"),
        "fold table": str(summary["folds_digest"])[:DIGEST_SHOWN],
        "torch": summary.get("torch", "not recorded"),
        "device": f"{device}; processes {summary.get('processes', 1)}, threads {summary.get('threads', '?')}",
        "precision": precision,
        "seed": str(summary["params"].get("seed", "not recorded")),
        "time": minutes(summary["seconds"]),
        "machine": _machine(summary.get("machine", {})),
        "revision": summary.get("revision", "not recorded"),
    }
