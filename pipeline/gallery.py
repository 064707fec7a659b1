"""The slices that teach most, as pictures: finds, misses, false alarms and rightly free ones, the surest and the least sure of each.

A slice is shown in all windows of the store, with a heat map of what its own fold's networks saw of the label in question.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.held_out import Bools, Scored, decide
from pipeline.labels import ANY, LABELS, SUBTYPES
from pipeline.sheet import SHORT, blend_heat
from pipeline.store import Store

KINDS = {
    "found": "Found: labelled, and called",
    "missed": "Missed: labelled, yet not called",
    "false_alarm": "False alarms: labelled as free of it, yet called",
    "rightly_free": "Rightly free: labelled as free of it, and not called",
}

NEAR_0 = "<0.01"

SUREST, LEAST_SURE = "surest", "least sure"

EACH = 2
"""Pictures of each kind and end: one row of the page."""

UNDECIDED = 0.5
"""The threshold for `any` where there are too few patients to choose one on others."""

LARGEST_PX = 256
"""Slices are shown no larger, for one file must hold all: 26 slices of the real CTs, in three windows and with a heat map, took
2.4 MB in it (2026-11-24)."""


@dataclass(frozen=True)
class Chosen:
    """A slice to show, and why."""

    kind: str
    """Of `KINDS`."""
    end: str
    """Whether the network was surest or least sure of what it called."""
    label: int
    """Number of the label that it was judged by, and that the heat map is of."""
    row: int
    """Among the held-out slices."""


@dataclass(frozen=True)
class Picture:
    """A slice of the gallery; it names a study by its number in the store, never by an identifier."""

    kind: str
    end: str
    label: str
    study: int
    slice_number: int
    """From 1, as the viewer counts."""
    slices: int
    """In the study."""
    fold: int
    """That held it out, and predicted it."""
    labelled: str
    predicted: str
    """Of every label."""
    windows: dict[str, str]
    """By name, a data URI."""
    heat: str | None
    """The first window under the heat map, a data URI."""


@dataclass(frozen=True)
class Gallery:
    """The pictures, and why some have no heat map."""

    pictures: list[Picture]
    without_heat: list[str]


def choose_all(slices: Scored) -> list[Chosen]:
    """The gallery: by `any` of every kind and end; by each subtype the worst miss and the loudest false alarm."""
    chosen = choose_slices(slices)
    for label in range(len(SUBTYPES)):
        chosen += [one for one in choose_slices(slices, label, each=1) if _is_worst(one)]
    return chosen


def _is_worst(one: Chosen) -> bool:
    return one.end == SUREST and one.kind in ("missed", "false_alarm")


def choose_slices(slices: Scored, label: int = ANY, each: int = EACH) -> list[Chosen]:
    """The gallery's slices by one label: of each kind those that the network was surest of, and least sure of.

    What is called is surest where its probability is highest, what is not called where it is lowest. A study stands at most
    once in a row, and a slice once under a kind.
    """
    known_N, truth, probability = slices.of(label)
    rows = np.flatnonzero(known_N)
    decisions = decide(slices, label)
    called = probability >= UNDECIDED if decisions is None else decisions.called
    of_kind: dict[str, Bools] = {
        "found": truth & called,
        "missed": truth & ~called,
        "false_alarm": ~truth & called,
        "rightly_free": ~truth & ~called,
    }
    chosen = []
    for kind, is_kind in of_kind.items():
        inside = np.flatnonzero(is_kind)
        sure = np.where(called[inside], probability[inside], -probability[inside])
        candidates = rows[inside[np.argsort(-sure, kind="stable")]]
        surest = _one_a_study(slices, candidates)[:each]
        rest = candidates[~np.isin(candidates, surest)][::-1]
        for end, found in ((SUREST, surest), (LEAST_SURE, _one_a_study(slices, rest)[:each])):
            chosen += [Chosen(kind, end, label, int(row)) for row in found]
    return chosen


def _one_a_study(slices: Scored, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The first row of each study, in the rows' order."""
    _, first = np.unique(slices.study_N[rows], return_index=True)
    return rows[np.sort(first)]


def draw_picture(
    store: Store, one: Chosen, slices: Scored, where_N2: npt.NDArray[np.int64], heat_RC: npt.NDArray[np.float32] | None
) -> Picture:
    """Draw a slice in every window, and write its captions.

    Args:
        store: what the folds were trained on.
        one: the slice.
        slices: the held-out slices.
        where_N2: study and slice number of each.
        heat_RC: float32 in 0…1, or None.

    Raises:
        DamageError: the slice cannot be read.
    """
    study, slice_number = (int(number) for number in where_N2[one.row])
    pixels_RCW = store.reader.read(study, slice_number)
    heat = None if heat_RC is None else png_uri(blend_heat(pixels_RCW[..., 0], heat_RC))
    return Picture(
        one.kind,
        one.end,
        LABELS[one.label],
        study,
        slice_number + 1,
        int(store.num_slices[study]),
        int(slices.fold_N[one.row]),
        _name_labels(slices.labels_NL[one.row]),
        _name_probabilities(slices.probabilities_NL[one.row]),
        {name: png_uri(pixels_RCW[..., number]) for number, name in enumerate(store.windows)},
        heat,
    )


def _name_labels(labels_L: npt.NDArray[np.int8]) -> str:
    subtypes = [name for name, value in zip(LABELS, labels_L, strict=True) if value == 1 and name != "any"]
    return ", ".join(subtypes) or ("bleeding of unnamed kind" if labels_L[ANY] == 1 else "no bleeding")


def _name_probabilities(probabilities_L: npt.NDArray[Any]) -> str:
    """Two digits, `any` first; what they would round to certainty says so, and the subtypes near 0 share a word."""
    shown = [_shorten(float(value)) for value in probabilities_L]
    told = [number for number in range(len(SUBTYPES)) if shown[number] != NEAR_0]
    named = [f"any {shown[ANY]}", *(f"{SHORT[SUBTYPES[number]]} {shown[number]}" for number in told)]
    rest = "every subtype" if not told else "the rest"
    return ", ".join(named if len(told) == len(SUBTYPES) else [*named, f"{rest} {NEAR_0}"])


def _shorten(probability: float) -> str:
    if probability < 0.005:
        return NEAR_0
    return ">0.99" if probability >= 0.995 else f"{probability:.2f}"


def png_uri(pixels: npt.NDArray[np.uint8]) -> str:
    """A picture, uint8 grey [R, C] or red, green, blue [R, C, 3], as a data URI, at most `LARGEST_PX` wide and high."""
    longest = max(pixels.shape[:2])
    if longest > LARGEST_PX:
        rows, columns = (round(side * LARGEST_PX / longest) for side in pixels.shape[:2])
        pixels = np.asarray(cv2.resize(pixels, (columns, rows), interpolation=cv2.INTER_AREA), np.uint8)
    ordered = pixels if pixels.ndim == 2 else pixels[..., ::-1]  # cv2 writes blue, green, red
    _, encoded = cv2.imencode(".png", np.ascontiguousarray(ordered))
    return "data:image/png;base64," + base64.b64encode(encoded.tobytes()).decode()
