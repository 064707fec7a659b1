"""The model card holds the figures of metrics.json and no others, and says what the cohort is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.labels import LABELS
from tests.conftest import ROOT, Cohort
from tests.test_evaluate import Run

PUBLISHED = {"0.98", "0.95", "0.84"}
"""Of other systems, in words that stand in the template."""


@pytest.fixture
def run(cohort: Cohort) -> Run:
    return Run(cohort, folds=[0, 1])


def tables(card: str) -> dict[str, list[list[str]]]:
    """Rows of cells by the first two headings of their table and how many came before of the same."""
    found: dict[str, list[list[str]]] = {}
    for block in re.findall(r"(?:^\|.*\n)+", card, re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines())
        name = " / ".join(head[:2])
        found[f"{name} {sum(one.startswith(name) for one in found)}"] = rows
    return found


def shown(figures: dict[str, Any], key: str) -> str:
    if figures[key] is None:
        return "–"
    ends = figures.get(f"{key}_ci")
    return f"{figures[key]:.3f}" + (f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends else "")


def flatten(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from flatten(inner)
    elif isinstance(value, int | float) and value is not None:
        yield float(value)


def test_every_table_holds_the_metrics_in_their_places(run: Run) -> None:
    metrics = run.evaluate()
    found = tables((run.report / "MODEL_CARD.md").read_text())
    for number, level in enumerate(("slice", "study")):
        for label, row in zip(LABELS, found[f"label / positive (patients) {number}"], strict=True):
            figures = metrics[level][label]
            scores = [shown(figures, key) for key in ("auc", "average_precision", "log_loss", "base_rate_log_loss")]
            assert row == [label, f"{figures['positives']} ({figures['positive_patients']})", *scores]
    keys = ("sensitivity", "specificity", "ppv", "npv", "ppv_at_prevalence", "npv_at_prevalence")
    for level, row in zip(("slice", "study"), found["any hemorrhage / thresholds 0"], strict=True):
        figures = metrics[level]["any"]
        thresholds = ", ".join(f"{one:.3f}" for one in figures["thresholds"])
        assert row == [f"by {level}", thresholds, *(shown(figures, key) for key in keys)]
    for label, row in zip(LABELS, found["label, by slice / Brier score 0"], strict=True):
        assert row == [label, *(shown(metrics["slice"][label], key) for key in ("brier", "ece", "ece_scaled"))]
    parts = [(kind, part, figures) for kind, of in metrics["strata"].items() for part, figures in of.items()]
    for (kind, part, figures), row in zip(parts, found["kind / part 0"], strict=True):
        scores = [shown(figures, key) for key in ("auc", "sensitivity", "specificity")]
        assert row == [kind, part, str(figures["patients"]), str(figures["rows"]), *scores]
    assert len(found) == 5, "no table goes unchecked"


def test_no_figure_stands_there_that_the_metrics_do_not_hold(run: Run) -> None:
    metrics = run.evaluate()
    card = (run.report / "MODEL_CARD.md").read_text()
    known = {f"{abs(value):.3f}" for value in flatten(metrics)} | PUBLISHED
    written = re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", card.replace("Apache 2.0", ""))
    assert len(written) > 100
    assert set(written) <= known
    assert (
        f"Weighted log loss, the RSNA 2019 challenge's metric: {shown(metrics['slice'], 'weighted_log_loss')}" in card
    )
    balanced = metrics["balanced"]["slice"]["any"]
    assert f"(they then reach {balanced['headers']:.3f}), the model reaches {shown(balanced, 'network')}." in card
    assert (
        f"{metrics['held_out']['labelled_slices']} labelled slices of 16 studies of 16 patients (folds 0, 1 of 2)"
        in card
    )
    assert f"reaches an AUC of {metrics['counting']['any_auc']:.3f}" in card
    assert "PPV at 8 %" in card
    assert "Of 104 files found, 96 slices are in the store; 8 were excluded" in card


def test_a_figure_that_cannot_be_had_is_a_dash(cohort: Cohort) -> None:
    run = Run(cohort, folds=[0])
    metrics = run.evaluate()
    missing = [label for label in LABELS if metrics["study"][label]["auc"] is None]
    rows = tables((run.report / "MODEL_CARD.md").read_text())["label / positive (patients) 1"]
    assert missing
    assert all(row[2] == "–" for row in rows if row[0] in missing)


@pytest.mark.parametrize(("labels", "made_up"), [("data/phantom/labels.csv", True), ("data/rsna/labels.csv", False)])
def test_it_says_plainly_what_the_cohort_is(cohort: Cohort, labels: str, made_up: bool) -> None:
    run = Run(cohort, folds=[0, 1], source__labels=labels)
    run.evaluate()
    card = (run.report / "MODEL_CARD.md").read_text()
    assert ("made-up cohort" in card) == made_up
    assert ("they say nothing about patients" in card) == made_up
    assert ("from 0.98 to 0.95" in card) != made_up
    assert "Not a medical device" in card
    secrets = [*run.store.study, *run.store.patient_key, run.config.index.patient_salt, str(run.cohort.folder), labels]
    assert not [secret for secret in secrets if secret in card.replace("Ichor", "")]


def test_checklists_hold_every_item_once_count_right_and_point_at_what_is_there() -> None:
    text = (ROOT / "docs" / "checklists.md").read_text()
    _, claim, tripod = re.split(r"^## ", text, flags=re.MULTILINE)
    for part, pattern, items in ((claim, r"\d+", 44), (tripod, r"\d+[a-g]?", 52)):
        rows = re.findall(rf"^\| ({pattern}) \| .+? \| (covered|partly|yours|none needed) \|", part, re.MULTILINE)
        assert len({number for number, _ in rows}) == len(rows) == items
        for state in ("covered", "partly", "yours"):
            assert f"{sum(found == state for _, found in rows)} {state}" in part.splitlines()[0]
    assert [number for number, _ in re.findall(r"^\| (\d+) \| (\S)", claim, re.MULTILINE)] == [
        str(n) for n in range(1, 45)
    ]
    assert {re.sub(r"\D", "", number) for number in re.findall(r"^\| (\d+[a-g]?) \|", tripod, re.MULTILINE)} == {
        str(number) for number in range(1, 28)
    }
    for name in re.findall(r"\]\((?!https)([^)]+)\)", text):
        assert (ROOT / "docs" / name).is_file(), name
    for name in re.findall(r"`((?:pipeline|tests)/\w+\.py)`", text):
        assert (ROOT / name).is_file(), name
    sections = re.findall(r"<h[23]>([^<{]+)</h[23]>", (ROOT / "pipeline" / "report.html.j2").read_text())
    sections += re.findall(r"^## (.+)$", (ROOT / "pipeline" / "card.md.j2").read_text(), re.MULTILINE)
    for name in re.findall(r"\*([A-Z][a-z ]+)\*", text.partition("## CLAIM")[2]):
        assert name in sections, f"neither report nor card has a section {name!r}"
