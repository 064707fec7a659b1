"""Operating points: the temperatures and thresholds that evaluation fitted for a run, and what they make of new probabilities.

They are that run's alone. Where its store, folds or parameters are not the model's they are left out, and the output says why.
Axes: N slices.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipeline.calibration import scale
from pipeline.config import differences
from pipeline.errors import CheckpointError
from pipeline.labels import LABELS

OPERATING_POINTS_FILE = "operating_points.json"

PLACES = ("", "..", "../../report")
"""Where a run has them, from the folder of a `model.pt`: beside it, beside its fold's folder, or in <data>/report."""

LEVELS = ("slice", "study")
CALIBRATED, CALLED = "_calibrated", "_called"
"""What follows a label in the names of columns."""

SHOWN_CHARACTERS = 16
"""Of a value that differs: enough of a digest to tell it by."""


class Point(NamedTuple):
    """One label's, at one level; both None where too few patients have the label, or lack it."""

    temperature: float | None = None
    """What log odds are divided by."""
    threshold: float | None = None
    """A label is called from here on; of the probability after scaling."""

    def calibrate(self, probability_N: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Probabilities after scaling; all NaN where no temperature was fitted."""
        raw_N = np.asarray(probability_N, np.float64)
        return np.full_like(raw_N, np.nan) if self.temperature is None else scale(raw_N, self.temperature)

    def call(self, probability_N: npt.ArrayLike) -> npt.NDArray[np.bool_] | None:
        """Whether the threshold is reached, by the probabilities before scaling; None where there is none."""
        return None if self.threshold is None else self.calibrate(probability_N) >= self.threshold


Points = Mapping[str, Point]
"""By label."""


@dataclass(frozen=True)
class OperatingPoints:
    """What was fitted for a run; nothing where there is none, or it is another run's."""

    slices: Points = field(default_factory=lambda: dict.fromkeys(LABELS, Point()))
    studies: Points = field(default_factory=lambda: dict.fromkeys(LABELS, Point()))
    origin: Mapping[str, Any] | None = None
    """The file, and the rule that it was made by."""
    why_not: str = ""
    """Why nothing is calibrated, if so."""

    def describe(self) -> dict[str, Any]:
        """Plain values for programs."""
        if self.origin is None:
            return {"used": False, "why_not": self.why_not}
        levels = zip(LEVELS, (self.slices, self.studies), strict=True)
        of_levels = {level: {name: point._asdict() for name, point in points.items()} for level, points in levels}
        return {"used": True, **self.origin, **of_levels}

    def extend(self, slices: pd.DataFrame) -> pd.DataFrame:
        """A table of slices with each label's calibrated probability, and whether it is called, behind its other columns."""
        calibrated = {
            name + CALIBRATED: self.slices[name].calibrate(slices[name]).astype(np.float32) for name in LABELS
        }
        called = {name + CALLED: _to_column(self.slices[name].call(slices[name]), len(slices)) for name in LABELS}
        return slices.assign(**calibrated, **called)


def _to_column(called_N: npt.NDArray[np.bool_] | None, count: int) -> Any:
    return pd.array([None] * count if called_N is None else called_N, dtype="boolean")


def find_operating_points(model: Path) -> Path | None:
    """The file of the run that a `model.pt` is of, or None."""
    paths = (Path(os.path.normpath(model.parent / place / OPERATING_POINTS_FILE)) for place in PLACES)
    return next((path for path in paths if path.is_file()), None)


def read_operating_points(path: Path, *, identity: Mapping[str, Any]) -> OperatingPoints:
    """Read what evaluation fitted, for the model that is to use it.

    Args:
        path: the file that `stages.evaluate` wrote.
        identity: store_digest, folds_digest, folds and params of the model; of these, what the file knows too must agree.

    Returns:
        Nothing but the reason, if they are another run's.

    Raises:
        CheckpointError: the file is missing, damaged, or something else.
    """
    try:
        content = json.loads(path.read_bytes())
        levels = [{name: _read_point(content[level][name]) for name in LABELS} for level in LEVELS]
        known = {key: content[key] for key in ("store_digest", "folds")} | content
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: does not exist; run `python -m stages.evaluate` first, or give --operating-points another"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise CheckpointError(
            f"{path}: not the operating points of an evaluation ({said}); run `python -m stages.evaluate` again"
        ) from None
    compared = [key for key in identity if identity[key] is not None and known.get(key) is not None]
    unlike = differences({key: known[key] for key in compared}, {key: identity[key] for key in compared})
    if unlike:
        listed = "; ".join(
            f"{key} {_shorten(found)}, the model's {_shorten(own)}" for key, (found, own) in unlike.items()
        )
        return OperatingPoints(
            why_not=f"{shorten_path(path)} is of another run ({listed}); run `python -m stages.evaluate` on the model's"
        )
    return OperatingPoints(levels[0], levels[1], {"file": shorten_path(path), "rule": str(content.get("rule", ""))})


def _read_point(content: Mapping[str, Any]) -> Point:
    """One point; ValueError where it can be none."""
    temperature, threshold = (None if content[key] is None else float(content[key]) for key in Point._fields)
    if temperature is not None and not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"a temperature of {temperature}")
    if threshold is not None and (temperature is None or not math.isfinite(threshold)):
        raise ValueError(f"a threshold of {threshold} at a temperature of {temperature}")
    return Point(temperature, threshold)


def shorten_path(path: Path) -> str:
    """The end of a path, enough to find it by: the folders before may name a person, and outputs are handed on."""
    return "/".join(path.absolute().parts[-3:])


def _shorten(value: Any) -> str:
    return str(value)[:SHOWN_CHARACTERS]
