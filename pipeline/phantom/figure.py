"""One picture of the phantom: a normal head from base to vertex, and the five bleeds in two windows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from pipeline.config import PhantomConfig
from pipeline.labels import SUBTYPES
from pipeline.phantom.study import RenderedSlice, StudyPlan, plan_cohort, render_slice

matplotlib.use("Agg")  # no display is needed to write a file

BRAIN_WINDOW, SUBDURAL_WINDOW = (40.0, 80.0), (80.0, 200.0)
LEVELS = (0.17, 0.30, 0.48, 0.64, 0.85)
"""Where the normal head is cut, from base (0) to vertex (1)."""

LENS_ABOVE_MM = 28.0
"""Epidural bleeds lower than this touch the tentorium in the picture, which blurs their shape."""

CANDIDATES = 8
"""Patients of each subtype from whom the largest bleed is chosen."""


def draw_figure(config: PhantomConfig, path: Path | str) -> None:
    """Draw a normal head at five levels and each bleed where it is largest, in the brain and the subdural window.

    Args:
        config: the cohort whose patients are drawn.
        path: the PNG, 1500 pixels wide.
    """
    # at least so many studies that every subtype occurs
    plans = plan_cohort(config.model_copy(update={"studies": max(config.studies, 100)}))
    # the plainest heads first: few dense membranes and vessels beside the bleed
    plans.sort(key=lambda plan: plan.head.falx_mm + 2 * plan.head.vessel_mm + plan.head.cupping_hu / 8)
    normal = next(plan for plan in plans if not plan.bleeds)
    heads = [render_slice(normal, round(level * (normal.slices - 1))).pixels_hu for level in LEVELS]
    bleeds = [_largest([plan for plan in plans if _is_typical(plan, name)][:CANDIDATES], name) for name in SUBTYPES]
    figure = Figure(figsize=(15, 9.6), dpi=100, facecolor="black")
    axes = figure.subplots(3, len(SUBTYPES))
    rows = (
        (heads, BRAIN_WINDOW, [f"no bleed, level {number}" for number in range(1, 6)]),
        ([bleed.pixels_hu for bleed in bleeds], BRAIN_WINDOW, [f"{name}, 40/80" for name in SUBTYPES]),
        ([bleed.pixels_hu for bleed in bleeds], SUBDURAL_WINDOW, [f"{name}, 80/200" for name in SUBTYPES]),
    )
    for axis_row, (pictures, window, names) in zip(axes, rows, strict=True):
        for axis, pixels_hu, name in zip(axis_row, pictures, names, strict=True):
            _show(axis, pixels_hu, window, name)
    figure.subplots_adjust(left=0.002, right=0.998, bottom=0.002, top=0.97, wspace=0.01, hspace=0.07)
    figure.savefig(path, facecolor="black")


def _is_typical(plan: StudyPlan, subtype: str) -> bool:
    """Whether a study has the subtype and, if it is epidural, high enough to be seen apart from the tentorium."""
    return any(
        bleed.subtype == subtype and (subtype != "epidural" or bleed.centre_mm[2] > LENS_ABOVE_MM)
        for bleed in plan.bleeds
    )


def _largest(plans: list[StudyPlan], subtype: str) -> RenderedSlice:
    """The slice with most blood of a subtype, in a patient with that bleed only."""
    alone = [replace(plan, bleeds=tuple(bleed for bleed in plan.bleeds if bleed.subtype == subtype)) for plan in plans]
    _, number, index = max(
        (_blood_mm2(plan, index, subtype), number, index)
        for number, plan in enumerate(alone)
        for index in range(plan.slices)
    )
    return render_slice(alone[number], index)


def _blood_mm2(plan: StudyPlan, index: int, subtype: str) -> float:
    """Blood in a slice, from a thumbnail of it, which takes a tenth of the time."""
    thumbnail = replace(plan, size=64, spacing_mm=plan.spacing_mm * plan.size / 64)
    return render_slice(thumbnail, index, noise=False).blood_mm2[SUBTYPES.index(subtype)]


def _show(axis: matplotlib.axes.Axes, pixels_hu: np.ndarray, window: tuple[float, float], name: str) -> None:
    centre, width = window
    axis.imshow(pixels_hu, cmap="gray", vmin=centre - width / 2, vmax=centre + width / 2, interpolation="antialiased")
    axis.set_title(name, color="white", fontsize=12, pad=3)
    axis.set_axis_off()
