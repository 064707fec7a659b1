"""What is said of new studies: the result of one, and all of them as tables, as JSON and in Kaggle's form.

Axes: K suspects of a study, R rows, C columns, W windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipeline.errors import LabelError
from pipeline.gradcam import HeatMaps
from pipeline.labels import HEADER, LABELS
from pipeline.operating import CALIBRATED, CALLED, OperatingPoints
from pipeline.place import Place
from pipeline.survey import SCOPE
from pipeline.trained import Model

DECIMALS = 8
"""Of probabilities in JSON: what float32 holds of the small ones that log loss looks at."""

TOLD = {True: "given", False: "none", None: "not told"}
"""Contrast medium, as headers tell of it."""

PREDICTED, REFUSED, ANYWAY = "predicted", "refused", "predicted anyway"


NO_POINTS = OperatingPoints(why_not="no operating points were given")


class Suspects(NamedTuple):
    """The K most suspicious slices of a study, in their order, with what a picture of them needs."""

    slices: npt.NDArray[np.int64]
    """Numbers in the study, [K]."""
    pixels_KRCW: npt.NDArray[np.uint8]
    """Windowed as the network saw them; the windows are the model's."""
    labels: npt.NDArray[np.int64]
    """Index in `LABELS` of each slice's likeliest subtype, [K]: what `heat_KRC` is of."""
    heat_KRC: HeatMaps | None
    """Where the networks saw it, mean of all folds; None where it was not wanted."""


class SliceFile(NamedTuple):
    """Where a slice lies."""

    place: Place
    frame: int
    """From 0 in a multi-frame file; −1 where the file is one slice."""


class Study(NamedTuple):
    """What became of a study."""

    uid: str
    status: str
    """Predicted, refused, or predicted anyway."""
    warnings: list[str]
    """Why it was, or would have been, refused; and what else is amiss."""
    slices: int
    table: pd.DataFrame | None = None
    """One row a slice, in order: slice, image_id, position_mm, the probability of each label, and what the operating points make
    of it: `<label>_calibrated` (float32, NaN where nothing was fitted) and `<label>_called` (boolean, NA there)."""
    sheet: str = ""
    """Name of its picture."""
    contrast: str = TOLD[None]
    """Contrast medium: given, none, or not told."""
    points: OperatingPoints = NO_POINTS
    suspects: Suspects | None = None
    """1 to 20 MB: not to be kept of many studies."""
    files: Sequence[SliceFile] = ()
    """Of the slices of `table`."""

    @property
    def probabilities(self) -> dict[str, float]:
        """The highest of its slices, as `pipeline.held_out.to_studies` has it; empty where it was refused."""
        return {} if self.table is None else {name: float(self.table[name].max()) for name in LABELS}

    @property
    def calibrated(self) -> dict[str, float | None]:
        """`probabilities`, scaled as a study's are; None where nothing was fitted."""
        points = self.points.studies
        scaled = {name: float(points[name].calibrate(value)) for name, value in self.probabilities.items()}
        return {name: None if np.isnan(value) else value for name, value in scaled.items()}

    @property
    def called(self) -> dict[str, bool | None]:
        """Whether a study's operating point is reached; None where there is none."""
        called = {name: self.points.studies[name].call(value) for name, value in self.probabilities.items()}
        return {name: None if value is None else bool(value) for name, value in called.items()}

    @property
    def suspicious_slice(self) -> int | None:
        """The one with the highest probability of any bleed."""
        return None if self.table is None else int(self.table["any"].argmax())


def say(study: Study, label: str) -> str:
    """A study's probability for people, marked as `explain_marks` has it."""
    calibrated = study.calibrated[label]
    if calibrated is None:
        raw = f"{study.probabilities[label]:.2f}"
        return raw if study.points.origin is None else f"({raw})"
    return f"{calibrated:.2f}{'*' if study.called[label] else ''}"


def explain_marks(points: OperatingPoints) -> str:
    """What the numbers of `say` are."""
    if points.origin is None:
        return "uncalibrated, without operating points"
    partly = any(point.temperature is None for point in points.studies.values())
    return f"calibrated, * at or above the operating point{', in brackets as the network says' if partly else ''}"


def slice_table(studies: Sequence[Study], model: Model) -> pd.DataFrame:
    """One row a slice of the studies that were predicted."""
    tables = [
        study.table.assign(study_uid=study.uid, warnings="; ".join(study.warnings))
        for study in studies
        if study.table is not None
    ]
    judged = [name + ending for ending in (CALIBRATED, CALLED) for name in LABELS]
    columns = ["study_uid", "slice", "image_id", "position_mm", *LABELS, *judged, "warnings"]
    table = pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)
    return table.assign(model=model.digest)


def study_table(studies: Sequence[Study], model: Model) -> pd.DataFrame:
    """One row a study, the refused ones too: their probabilities are empty."""
    rows = [
        {
            "study_uid": study.uid,
            "status": study.status,
            "slices": study.slices,
            **{name: study.probabilities.get(name) for name in LABELS},
            **{name + CALIBRATED: study.calibrated.get(name) for name in LABELS},
            **{name + CALLED: study.called.get(name) for name in LABELS},
            "contrast": study.contrast,
            "suspicious_slice": study.suspicious_slice,
            "sheet": study.sheet,
            "warnings": "; ".join(study.warnings),
            "model": model.digest,
        }
        for study in studies
    ]
    table = pd.DataFrame(rows)
    numbers = [*LABELS, *(name + CALIBRATED for name in LABELS)]
    called = dict.fromkeys((name + CALLED for name in LABELS), "boolean")
    return table.astype({"suspicious_slice": "Int64"} | dict.fromkeys(numbers, "float32") | called)


def describe_result(
    studies: Sequence[Study],
    model: Model,
    accounting: dict[str, Any],
    *,
    points: OperatingPoints = NO_POINTS,
) -> dict[str, Any]:
    """All of it as plain values, for programs."""
    unknown = [SCOPE[name] for name, found in model.scope.items() if not found]
    return {
        "notice": "research software, not a medical device",
        "model": model.describe(),
        "learnt_from_phantoms": model.phantom,
        "operating_points": points.describe(),
        "accounting": accounting,
        "not_checked": ["age", *(f"{meaning} (no training study told its own)" for meaning in unknown)],
        "studies": [_describe_study(study) for study in studies],
    }


def _describe_study(study: Study) -> dict[str, Any]:
    described: dict[str, Any] = {
        "study_uid": study.uid,
        "status": study.status,
        "warnings": study.warnings,
        "contrast": study.contrast,
        "probabilities": {name: round(value, DECIMALS) for name, value in study.probabilities.items()} or None,
        "calibrated": {name: value and round(value, DECIMALS) for name, value in study.calibrated.items()} or None,
        "called": study.called or None,
        "suspicious_slice": study.suspicious_slice,
        "sheet": study.sheet or None,
        "slices": [],
    }
    if study.table is not None:
        columns = [column.astype(object).where(column.notna(), None).tolist() for _, column in study.table.items()]
        for values in zip(*columns, strict=True):
            row = dict(zip(study.table.columns, values, strict=True))
            rounded = {name: round(value, DECIMALS) for name, value in row.items() if isinstance(value, float)}
            described["slices"].append(row | rounded)
    return described


def submission(slices: pd.DataFrame, sample: Path | None, *, anyway: bool) -> pd.DataFrame:
    """Kaggle's form: ID and Label, six rows an image; calibrated where a temperature was fitted, else the network's own.

    Args:
        slices: of `slice_table`.
        sample: the competition's sample, whose rows and order are taken; None for the slices as they come.
        anyway: take the sample's own Label where there is no prediction.

    Raises:
        LabelError: the sample is not of that form, or has rows without a prediction.
    """
    ids = [f"{image}_{name}" for image in slices["image_id"] for name in LABELS]
    raw, calibrated = (slices[[name + ending for name in LABELS]].to_numpy(np.float32) for ending in ("", CALIBRATED))
    best = np.where(np.isnan(calibrated), raw, calibrated)
    ours = pd.Series(best.ravel(), index=ids, dtype=np.float32)
    if sample is None:
        return pd.DataFrame({"ID": ours.index, "Label": ours.to_numpy()})
    wanted = read_sample(sample)
    found = ours.reindex(wanted["ID"]).to_numpy()
    missing = np.isnan(found)
    if missing.any() and not anyway:
        raise LabelError(
            f"{sample}: {missing.sum():,} of its {len(wanted):,} rows have no prediction, {wanted['ID'][missing.argmax()]} first; "
            f"give the files that are missing, or --anyway to take the sample's own Label there"
        )
    return pd.DataFrame({"ID": wanted["ID"], "Label": np.where(missing, wanted["Label"], found).astype(np.float32)})


def read_sample(path: Path) -> pd.DataFrame:
    """The competition's sample of a submission.

    Raises:
        LabelError: there is none, or it is of another form.
    """
    try:
        wanted = pd.read_csv(path, dtype={"ID": str, "Label": np.float32})
    except FileNotFoundError:
        raise LabelError(f"{path}: the sample does not exist; give --sample a CSV with the columns ID,Label") from None
    except (OSError, ValueError) as error:
        raise LabelError(f"{path}: not a CSV with ID,Label ({' '.join(str(error).split())[:160]})") from None
    if list(wanted.columns) != HEADER:
        raise LabelError(f"{path}: expected the header ID,Label, found {','.join(map(str, wanted.columns))[:80]!r}")
    return wanted
