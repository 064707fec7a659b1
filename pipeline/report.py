"""The scores for people: a table for the terminal, and one HTML file that opens anywhere.

The file needs no asset from elsewhere, and holds no identifier of a person, a study or a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

from pipeline.charts import Axis, Line, chart
from pipeline.config import Config, Window
from pipeline.gallery import KINDS, Picture
from pipeline.labels import LABELS
from pipeline.manifest import EXCLUDED, REASONS, REPAIRED, USED
from pipeline.metrics import ALL_FOLDS, Curve

TEMPLATE = "report.html.j2"

PACKAGES = ("torch", "monai", "zarr", "numpy", "scikit-learn", "pandas", "albumentations")
"""Those that can change a figure; one that is not installed is left out."""

DIGEST_SHOWN = 12
"""Characters of a digest that tell two stores apart."""

ROC_SIZE = (300, 300)
HISTORY_SIZE = (460, 260)

LABEL_COLUMNS = {
    "positives": "Positive",
    "negatives": "Negative",
    "positive_patients": "Positive patients",
    "auc": "ROC AUC",
    "average_precision": "Average precision",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "log_loss": "Log loss",
    "base_rate_log_loss": "Base rate’s",
}
"""Figure and heading of the report's tables."""

TERMINAL_COLUMNS = (
    ("slice", "positives", "positive", 9),
    ("slice", "positive_patients", "patients", 9),
    ("slice", "auc", "AUC", 7),
    ("slice", "average_precision", "AP", 7),
    ("slice", "sensitivity", "sens.", 7),
    ("slice", "specificity", "spec.", 7),
    ("study", "positives", "positive", 12),
    ("study", "auc", "AUC", 7),
    ("study", "sensitivity", "sens.", 7),
    ("study", "specificity", "spec.", 7),
)
"""Level, figure, heading and width of the columns of the terminal's table."""

ONE_CLASS = "the held-out slices are all bleeding or all free of it"


def render_report(
    config: Config,
    *,
    metrics: dict[str, Any],
    curves: dict[str, list[Curve]],
    summaries: Sequence[dict[str, Any]],
    histories: Sequence[pd.DataFrame],
    pictures: Sequence[Picture],
    windows: Mapping[str, Window],
    shown_window: str,
    accounting: dict[str, Any] | None,
    store_digest: str,
) -> str:
    """Make the page.

    Args:
        config: the parameters of the run.
        metrics: what metrics.json holds.
        curves: ROC curves by level.
        summaries: each fold's summary.json.
        histories: each fold's history, one row an epoch.
        pictures: the gallery.
        windows: the store's windows by name.
        shown_window: the window that the pictures show.
        accounting: what became of each file found.
        store_digest: names the store's content.

    Returns:
        HTML.
    """
    page = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters.update(figure=figure, signed=signed, count=count, minutes=minutes)
    return page.get_template(TEMPLATE).render(
        metrics=metrics,
        label_columns=LABEL_COLUMNS,
        labels=LABELS,
        is_phantom="phantom" in (config.source.labels or ""),
        several=len(summaries) > 1,
        roc=_roc_panels(metrics, curves),
        training=_training_panels(summaries, histories),
        summaries=summaries,
        gallery=_gallery(pictures),
        shown_window=shown_window,
        accounting=_accounting(accounting),
        one_class=ONE_CLASS,
        windows=windows,
        parameters=_parameters(config),
        packages=_packages(),
        digest=store_digest[:DIGEST_SHOWN],
    )


def figure(value: float | None, digits: int = 3) -> str:
    """A figure, or a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def signed(value: float | None) -> str:
    """A difference with its sign, or a dash."""
    return "–" if value is None else f"{value:+.3f}".replace("-", "−")


def count(value: int | None) -> str:
    """A whole number with thousands apart, or a dash."""
    return "–" if value is None else f"{value:,}"


def minutes(seconds: float) -> str:
    """A duration: 48 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def describe(metrics: dict[str, Any]) -> str:
    """The scores for a terminal: one line a label, then the log loss and the counting baseline."""
    held_out, slices = metrics["held_out"], metrics["slice"]
    folds = ", ".join(map(str, held_out["folds"]))
    return "\n".join(
        [
            f"held out (fold {folds} of {held_out['of_folds']}): {held_out['slices']:,} slices of "
            f"{held_out['studies']:,} studies of {held_out['patients']:,} patients",
            "",
            f"{'':17s}{'by slice':>9s}{'by study':>49s}",
            f"{'label':17s}" + "".join(f"{heading:>{width}s}" for _, _, heading, width in TERMINAL_COLUMNS),
            *(_describe_label(metrics, name) for name in (*LABELS, "macro")),
            "",
            f"weighted log loss   {figure(slices['weighted_log_loss'])}; "
            f"predicting the base rates scores {figure(slices['base_rate_weighted_log_loss'])}",
            _describe_counting(metrics["counting"]),
        ]
    )


def _describe_label(metrics: dict[str, Any], label: str) -> str:
    line = f"{label:17s}"
    for level, key, _, width in TERMINAL_COLUMNS:
        value = metrics[level][label].get(key, "")
        line += f"{value if isinstance(value, int | str) else figure(value):>{width}}"
    return line


def _describe_counting(counting: dict[str, Any]) -> str:
    above = counting["any_auc_above_counting"]
    if above is None:
        return f"counting baseline   none: {counting.get('reason', ONE_CLASS)}"
    return f"counting baseline   any AUC {figure(counting['any_auc'])} by slice; the network is {above:+.3f} above it"


def _roc_panels(metrics: dict[str, Any], curves: dict[str, list[Curve]]) -> list[dict[str, Any]]:
    """One panel a label: each fold's slice curve thin, the studies' and all slices' on top."""
    panels = []
    for label in LABELS:
        of_level = {level: [curve for curve in found if curve.label == label] for level, found in curves.items()}
        aucs = {level: metrics[level][label]["auc"] for level in of_level}
        single = [curve for curve in of_level["slice"] if curve.fold != ALL_FOLDS]
        lines = [Line(curve.fpr, curve.tpr, "fold", f"slices, fold {curve.fold}") for curve in single]
        for level, name in (("study", "studies"), ("slice", "slices")):
            whole = [curve for curve in of_level[level] if curve.fold == ALL_FOLDS]
            lines += [Line(curve.fpr, curve.tpr, name, name) for curve in whole]
        words = f"ROC curve of {label}: AUC {figure(aucs['slice'])} for slices, {figure(aucs['study'])} for studies"
        svg = chart(
            lines,
            describe=words,
            x=Axis("1 − specificity", 0, 1),
            y=Axis("sensitivity", 0, 1),
            size=ROC_SIZE,
            diagonal=True,
        )
        panels.append({"label": label, "svg": Markup(svg), "slice": aucs["slice"], "study": aucs["study"]})
    return panels


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


def _gallery(pictures: Sequence[Picture]) -> list[tuple[str, list[Picture]]]:
    return [(title, [picture for picture in pictures if picture.kind == kind]) for kind, title in KINDS.items()]


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


def _parameters(config: Config) -> list[tuple[str, str]]:
    """What shaped the result, dotted key by dotted key; where the studies lie, and the patients' salt, stay out."""
    chosen = {
        "preprocess": {"image_size": config.preprocess.image_size},
        "folds": config.folds.model_dump(),
        "train": {"folds": config.train.folds, **config.train.shaping()},
    }
    return list(_flat(chosen))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Sequence[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", _shown(value))]
    return rows


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
