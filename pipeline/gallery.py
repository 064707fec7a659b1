"""The slices that teach most: the surest finds, the worst misses and the loudest false alarms, as pictures."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.config import Window
from pipeline.labels import ANY, LABELS
from pipeline.metrics import Bools, Scored, decide

KINDS = {
    "found": "Found: labelled as bleeding, and called so with the highest probability",
    "missed": "Missed: labelled as bleeding, yet not called; the lowest probabilities first",
    "false_alarm": "False alarms: labelled as free of bleeding, yet called; the highest probabilities first",
}

EACH = 4
"""Pictures of each kind: one row of the page."""

UNDECIDED = 0.5
"""The threshold for `any` where there are too few patients to choose one on others."""


@dataclass(frozen=True)
class Picture:
    """A slice of the gallery; it names a study by its number in the store, never by an identifier."""

    kind: str
    study: int
    slice_number: int
    labelled: str
    predicted: str
    png: str
    """A data URI."""


def choose_slices(slices: Scored, each: int = EACH) -> list[tuple[str, int]]:
    """Kind and row of the gallery's slices, judged by `any`; a study stands at most once under a kind."""
    known_N, truth, probability = slices.of(ANY)
    rows = np.flatnonzero(known_N)
    decisions = decide(slices, ANY)
    called = probability >= UNDECIDED if decisions is None else decisions.called
    of_kind: dict[str, tuple[Bools, npt.NDArray[Any]]] = {
        "found": (truth & called, -probability),
        "missed": (truth & ~called, probability),
        "false_alarm": (~truth & called, -probability),
    }
    chosen = []
    for kind, (is_kind, order) in of_kind.items():
        candidates = np.flatnonzero(is_kind)
        candidates = candidates[np.argsort(order[candidates], kind="stable")]
        _, first = np.unique(slices.study_N[rows[candidates]], return_index=True)
        chosen += [(kind, int(rows[candidate])) for candidate in candidates[np.sort(first)[:each]]]
    return chosen


def show_window(windows: Mapping[str, Window]) -> str:
    """The window to show: `brain`, or else the narrowest."""
    return "brain" if "brain" in windows else min(windows, key=lambda name: windows[name].width)


def make_picture(
    kind: str,
    pixels: npt.NDArray[np.uint8],
    *,
    study: int,
    slice_number: int,
    labels_L: npt.NDArray[np.int8],
    probabilities_L: npt.NDArray[Any],
) -> Picture:
    """A picture of one windowed slice, uint8 [row, column], and its captions."""
    subtypes = [name for name, value in zip(LABELS, labels_L, strict=True) if value == 1 and name != "any"]
    labelled = ", ".join(subtypes) or ("bleeding of unnamed kind" if labels_L[ANY] == 1 else "no bleeding")
    likeliest = int(np.argmax(probabilities_L[:ANY]))
    predicted = f"any {probabilities_L[ANY]:.2f}, {LABELS[likeliest]} {probabilities_L[likeliest]:.2f}"
    return Picture(kind, study, slice_number, labelled, predicted, png_uri(pixels))


def png_uri(pixels: npt.NDArray[np.uint8]) -> str:
    """A grey picture, uint8 [row, column], as a data URI."""
    _, encoded = cv2.imencode(".png", np.ascontiguousarray(pixels))
    return "data:image/png;base64," + base64.b64encode(encoded.tobytes()).decode()
