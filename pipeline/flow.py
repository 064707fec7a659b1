"""What became of every file, to the end: found, left out and why, stored, labelled, learnt from, held out; counted, then drawn.

Everything is counted in slices, of which a file mostly holds one; a node is the sum of its parts (a test adds them up).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipeline.config import Config
from pipeline.errors import CheckpointError, IchorError
from pipeline.folds import read_folds
from pipeline.labels import UNKNOWN
from pipeline.manifest import EXCLUDED, REASONS, REPAIRED
from pipeline.parts import split_slices
from pipeline.store import Store

Slices = npt.NDArray[np.int64]
"""int64 [N, 2]: study number and slice number in the store."""


@dataclass(frozen=True)
class Node:
    """Some of the slices."""

    title: str
    slices: int
    studies: int | None = None
    patients: int | None = None
    reasons: dict[str, int] = field(default_factory=dict)
    """Why: slices by the codes of `pipeline.manifest.REASONS`."""
    parts: tuple[Node, ...] = ()
    """Which together are the whole."""
    dealings: dict[int, tuple[Node, ...]] = field(default_factory=dict)
    """By fold: parts that together are the whole, dealt anew by each fold."""


@dataclass(frozen=True)
class Flow:
    """The whole account."""

    found: Node
    files: int
    fault: str
    """Why it ends before training, validation and held-out, or nothing."""


def count_flow(config: Config, store: Store, *, data: Path, folds_digest: str) -> Flow | None:
    """Count what became of every slice.

    Args:
        config: the parameters.
        store: which tells what became of the files that it was made of.
        data: the folder of the stages' outputs, with ``preprocess/faults.parquet`` and ``folds/``.
        folds_digest: of the fold table that the folds were trained on.

    Returns:
        None for a store that does not tell.
    """
    totals = store.attributes.get("accounting")
    if not totals:
        return None
    dealings, fault = _deal(config, store, data=data, folds_digest=folds_digest)
    slices = store.slices
    is_known = (store.labels[slices[:, 0], slices[:, 1]] != UNKNOWN).any(axis=1)
    labelled = _count(store, "with labels", slices[is_known], dealings=dealings)
    unlabelled = _count(store, "without a label", slices[~is_known])
    repairs = {code: count for code, count in totals["reasons"].items() if _status(code) == REPAIRED}
    stored = _count(store, "in the store", slices, reasons=repairs, parts=(labelled, unlabelled))
    left_out = _excluded(totals, _read_faults(data / "preprocess" / "faults.parquet"))
    found = Node("found", totals.get("slices_found", totals["files"]), parts=(*left_out, stored))
    return Flow(found, totals["files"], fault)


def _status(code: str) -> str:
    return REASONS.get(code, (EXCLUDED, ""))[0]


def _count(store: Store, title: str, slices: Slices, **more: Any) -> Node:
    studies = np.unique(slices[:, 0])
    patients = np.unique(store.patient_key[studies].astype(str))
    return Node(title, len(slices), len(studies), len(patients), **more)


def _read_faults(path: Path) -> dict[str, int]:
    """What was excluded only when its pixels were read, by reason; nothing where that can't be told."""
    try:
        faults = pd.read_parquet(path)
        counts = faults.loc[faults["status"] == EXCLUDED, "reason"].value_counts()
    except (OSError, ValueError, KeyError):
        return {}
    return {str(code): int(count) for code, count in counts.items()}


def _excluded(totals: dict[str, Any], faults: dict[str, int]) -> list[Node]:
    """What was excluded, apart by whether its header or its pixels told."""
    reasons = {code: count for code, count in totals["reasons"].items() if _status(code) == EXCLUDED}
    if any(count > reasons.get(code, 0) for code, count in faults.items()):
        faults = {}  # of another run than the store
    by_header = {code: count - faults.get(code, 0) for code, count in reasons.items()}
    named = (("excluded by their headers", by_header), ("excluded when their pixels were read", faults))
    return [
        Node(title, sum(counts.values()), reasons={code: count for code, count in counts.items() if count})
        for title, counts in named
        if sum(counts.values())
    ]


def _deal(config: Config, store: Store, *, data: Path, folds_digest: str) -> tuple[dict[int, tuple[Node, ...]], str]:
    """The labelled slices of each fold by their part in it, or none and why: the table is training's, and may be gone."""
    try:
        table = read_folds(data / "folds", store, config)
        if table.digest != folds_digest:
            raise CheckpointError("data/folds is another fold table than the folds were trained on; run `dvc repro`")
        found: dict[int, tuple[Node, ...]] = {}
        for fold in sorted(config.train.folds):
            parts = split_slices(config, store, fold, table)
            held_out = parts.held_out
            is_known = (store.labels[held_out[:, 0], held_out[:, 1]] != UNKNOWN).any(axis=1)
            found[fold] = (
                _count(store, "learnt from", parts.training),
                _count(store, "chose the epoch (validation)", parts.validation),
                _count(store, "held out, and scored", held_out[is_known]),
            )
    except IchorError as error:
        return {}, str(error).replace(f"{data}/", "")
    return found, ""


WIDTH = 760
"""Of the drawing, in the units that text is measured in."""

MAIN_WIDTH, SIDE_LEFT, GAP = 350, 400, 34
LINE, PADDING = 17, 11
MOST_REASONS = 5
LONGEST_REASON = 50
"""Characters: more would leave the box."""


def draw_flow(flow: Flow) -> str:
    """The account as a diagram: the way down is what stays, boxes at the side are what is left out on the way."""
    drawing = _Drawing()
    found = flow.found
    files = f"{flow.files:,} files found"
    holds = [] if flow.files == found.slices else [f"which hold {found.slices:,} slices"]
    *left_out, stored = found.parts
    drawing.step([files, *holds], [[_title(one), *_reasons(one)] for one in left_out])
    labelled, unlabelled = stored.parts
    repaired = sum(stored.reasons.values())
    as_they_were = f"{stored.slices - repaired:,} as they were, {repaired:,} repaired"
    aside = [[_title(unlabelled), _whose(unlabelled), "neither learnt from nor scored"]] if unlabelled.slices else []
    drawing.step([_title(stored), _whose(stored), as_they_were, *_reasons(stored)], aside)
    drawing.step([_title(labelled), _whose(labelled)], [])
    for fold, parts in labelled.dealings.items():
        drawing.deal(f"fold {fold}", [[f"{part.slices:,} slices", part.title, _whose(part)] for part in parts])
    return drawing.svg(_in_words(flow))


def _title(node: Node) -> str:
    return f"{node.slices:,} {'slice' if node.slices == 1 else 'slices'} {node.title}"


def _whose(node: Node) -> str:
    return f"{node.studies:,} studies of {node.patients:,} patients"


def _reasons(node: Node) -> list[str]:
    ordered = sorted(node.reasons.items(), key=lambda item: (-item[1], item[0]))
    lines = []
    for code, count in ordered[:MOST_REASONS]:
        sentence = REASONS.get(code, ("", code))[1]
        short = sentence if len(sentence) <= LONGEST_REASON else sentence[: LONGEST_REASON - 1].rstrip() + "…"
        lines.append(f"{count:,} × {short}")
    rest = ordered[MOST_REASONS:]
    return [*lines, f"{sum(count for _, count in rest):,} for {len(rest)} other reasons"] if rest else lines


def _in_words(flow: Flow) -> str:
    *left_out, stored = flow.found.parts
    labelled = stored.parts[0]
    words = [f"{flow.files:,} files found", *(_title(one) for one in (*left_out, stored, labelled))]
    for fold, parts in labelled.dealings.items():
        words.append(f"fold {fold}: " + ", ".join(f"{part.slices:,} {part.title}" for part in parts))
    return "; ".join(words)


class _Drawing:
    """Boxes from the top down; colours are the page's style sheet's."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.bottom = 0
        self.last: int | None = None
        """Where the last box of the way down ends."""

    def step(self, lines: Sequence[str], aside: Sequence[Sequence[str]]) -> None:
        """A box on the way down, and below it at the side those that leave the way."""
        top = 1 if self.last is None else max(self.last, self.bottom) + GAP
        if self.last is not None:
            self._arrow(MAIN_WIDTH // 2, self.last, MAIN_WIDTH // 2, top)
        self.last = self.bottom = top + self._box(0, top, MAIN_WIDTH, lines, "box")
        for one in aside:
            top = self.bottom + GAP // 2
            height = self._box(SIDE_LEFT, top, WIDTH - SIDE_LEFT, one, "box aside")
            self._arrow(MAIN_WIDTH // 2, top + height // 2, SIDE_LEFT, top + height // 2)
            self.bottom = top + height

    def deal(self, title: str, boxes: Sequence[Sequence[str]]) -> None:
        """A row of boxes, of one fold."""
        top = self.bottom + GAP + LINE
        between = 20
        width = (WIDTH - between * (len(boxes) - 1)) // len(boxes)
        if self.last == self.bottom and self.last is not None:
            self._arrow(MAIN_WIDTH // 2, self.last, MAIN_WIDTH // 2, top - LINE)
        self.parts.append(f'<text class="axis" x="0" y="{top - 6}">{escape(title)}</text>')
        heights = [
            self._box((width + between) * number, top, width, lines, "box part") for number, lines in enumerate(boxes)
        ]
        self.bottom = top + max(heights)

    def svg(self, describe: str) -> str:
        return (
            f'<svg viewBox="0 0 {WIDTH} {self.bottom + 1}" role="img" aria-label="{escape(describe)}" class="flow">'
            + "".join(self.parts)
            + "</svg>"
        )

    def _box(self, left: int, top: int, width: int, lines: Sequence[str], css_class: str) -> int:
        height = LINE * len(lines) + 2 * PADDING - 4
        self.parts.append(
            f'<rect class="{css_class}" x="{left + 0.5}" y="{top}" width="{width - 1}" height="{height}" rx="6"/>'
        )
        for number, line in enumerate(lines):
            y = top + PADDING + LINE * number + 10
            weight = ' class="head"' if number == 0 else ""
            self.parts.append(f'<text{weight} x="{left + 12}" y="{y}">{escape(line)}</text>')
        return height

    def _arrow(self, x1: int, y1: int, x2: int, y2: int) -> None:
        head = (
            f"{x2 - 4},{y2 - 7} {x2 + 4},{y2 - 7} {x2},{y2}"
            if x1 == x2
            else f"{x2 - 7},{y2 - 4} {x2 - 7},{y2 + 4} {x2},{y2}"
        )
        self.parts.append(
            f'<line class="arrow" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/><polygon class="arrow" points="{head}"/>'
        )
