"""Write a phantom cohort to disk: DICOM files in the RSNA form and their labels, in parallel, whole or not at all.

Finished studies wait in a folder named by the fingerprint of what makes them, so that a stopped run goes on where it
was; the cohort gets its final name only when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from pipeline.cluster import run_tasks
from pipeline.config import PhantomConfig
from pipeline.files import only_one, remove_folder, require_free_space, write_bytes
from pipeline.labels import LABELS
from pipeline.phantom.dicom_writer import StoredForm, stored_values, write_rsna_slice
from pipeline.phantom.study import WRAPPED_STUDY, StudyPlan, plan_cohort, render_study
from pipeline.progress import Progress

MODIFIED_S, SPREAD_S = 1_546_300_800, 100_000_000
"""Times of change lie in the three years from 2019-01-01, and depend on the content alone: a cohort made twice is the same
to whoever compares times, and a cohort made otherwise is not."""

SPARE_BYTES = 64 * 2**20
"""Disk space to leave free, for the label CSV and whatever else is being written."""

Labels = dict[str, tuple[int, ...]]
"""0 or 1 for each of `LABELS`, by image id."""


def write_cohort(config: PhantomConfig, *, folder: Path, wip: Path, workers: int | Literal["auto"]) -> str:
    """Write ``dicom/`` and ``labels.csv`` into `folder`.

    Args:
        config: how many studies and slices, their size, and the seed; the same values give the same bytes.
        folder: where the cohort goes; what it holds of an older one is replaced.
        wip: folder for unfinished work, on the same file system.
        workers: processes; 0 works in this one, ``auto`` takes every core this process may use.

    Returns:
        What was made, in a few lines.

    Raises:
        IchorError: the disk has too little space, or another run is at it.
    """
    with only_one(wip / "phantom.lock", "phantom", is_kept=False):
        return _write_cohort(config, folder, wip, workers)


def _write_cohort(config: PhantomConfig, folder: Path, wip: Path, workers: int | str) -> str:
    plans = plan_cohort(config)
    unfinished = wip / f"phantom-{_fingerprint(config)}"
    if not (unfinished / "dicom").is_dir():  # it has never been, or was given its name just before a run was killed
        remove_folder(unfinished)
    todo = [plan for plan in plans if not _labels_path(unfinished, plan).is_file()]
    if todo:
        require_free_space(wip, sum(map(needed_bytes, todo)) + SPARE_BYTES, f"writing {len(todo)} phantom studies")
    (unfinished / "dicom").mkdir(parents=True, exist_ok=True)
    workers = 0 if len(todo) < 2 else workers  # not worth starting processes for
    tasks = [(plan, str(unfinished)) for plan in todo]
    with Progress(len(plans), what="phantom", unit="studies") as progress:
        progress.advance(len(plans) - len(todo))
        for _ in run_tasks(_finish_study, tasks, workers=workers, scheduler=None, describe=_describe_task):
            progress.advance()
    labels = {plan.number: _read_labels(_labels_path(unfinished, plan)) for plan in plans}
    _publish(unfinished, folder, labels)
    return describe(plans, labels)


def write_study(plan: StudyPlan, folder: Path | str) -> Labels:
    """Render a study, write its slices into `folder`, flat, in the RSNA form, and return their labels."""
    cv2.setNumThreads(1)  # the studies are what runs in parallel
    circle = _field_of_view(plan.size) if plan.form.signed else None
    study_id, series_id = _identifier(plan, "study", 10), _identifier(plan, "series", 10)
    patient_id = "ID_" + _digest(f"{plan.seed}/patient {plan.patient}", 8)
    labels: Labels = {}
    for index, rendered in enumerate(render_study(plan)):
        image_id, form = _identifier(plan, f"image {index}", 9), _form_of_slice(plan, index)
        path = Path(folder) / _file_name(image_id)
        stored = stored_values(rendered.pixels_hu, form=form, field_of_view=circle)
        write_rsna_slice(
            path,
            stored=stored,
            form=form,
            image_id=image_id,
            study_id=study_id,
            series_id=series_id,
            patient_id=patient_id,
            position_mm=rendered.position_mm,
            orientation=plan.orientation,
            spacing_mm=plan.spacing_mm,
        )
        # The time of change stands for the content: the same pixels have the same one whenever they are made, and other
        # pixels under the same name are seen to have changed.
        modified_s = MODIFIED_S + zlib.crc32(stored.tobytes()) % SPREAD_S
        os.utime(path, (modified_s, modified_s))
        labels[image_id] = rendered.labels
    return labels


def write_labels(labels: Labels, path: Path | str) -> None:
    """Write Kaggle's form: ``ID,Label``, six rows an image, images in the order of their ids."""
    rows = [
        f"{image_id}_{name},{value}"
        for image_id in sorted(labels)
        for name, value in zip(LABELS, labels[image_id], strict=True)
    ]
    Path(path).write_text("\n".join(["ID,Label", *rows]) + "\n", encoding="utf-8")
    os.utime(path, (MODIFIED_S, MODIFIED_S))


def needed_bytes(plan: StudyPlan) -> int:
    """Disk space that a study takes: its pixels, and a block for each header."""
    return plan.slices * (2 * plan.size**2 + 4096)


def describe(plans: list[StudyPlan], labels: dict[int, Labels]) -> str:
    """The cohort in a table: slices, studies and patients with each label."""
    slices = np.array([values for study in labels.values() for values in study.values()])
    studies = np.array([np.max(list(labels[plan.number].values()), axis=0) for plan in plans])
    patients = np.array([plan.patient for plan in plans])
    lines = [
        f"{len(plans):,} studies of {len(np.unique(patients)):,} patients, {len(slices):,} slices; with blood:",
        f"{'':<18}{'slices':>8}{'':>9}{'studies':>9}{'patients':>10}",
    ]
    for column, name in enumerate(LABELS):
        count = int(slices[:, column].sum())
        with_it = studies[:, column] == 1
        lines.append(
            f"{name:<18}{count:>8,}{count / len(slices):>9.1%}"
            f"{with_it.sum():>9,}{len(np.unique(patients[with_it])):>10,}"
        )
    return "\n".join(lines)


def _finish_study(task: tuple[StudyPlan, str]) -> None:
    """Write a study and, once it is whole, its labels: they are the mark that it is finished."""
    plan, folder = task[0], Path(task[1])
    labels = write_study(plan, folder / "dicom")
    write_bytes(_labels_path(folder, plan), json.dumps(labels).encode(), synced=False)


def _describe_task(task: tuple[StudyPlan, str]) -> str:
    return f"phantom study {task[0].number}"


def _labels_path(folder: Path, plan: StudyPlan) -> Path:
    return folder / f"labels-{plan.number}.json"


def _read_labels(path: Path) -> Labels:
    return {image_id: tuple(values) for image_id, values in json.loads(path.read_text(encoding="utf-8")).items()}


def _publish(unfinished: Path, folder: Path, labels: dict[int, Labels]) -> None:
    """Give the cohort its final name; the label CSV goes first and comes last, so it is never beside half a cohort."""
    folder.mkdir(parents=True, exist_ok=True)
    of_image = {image_id: values for study in labels.values() for image_id, values in study.items()}
    write_labels(of_image, unfinished / "all.csv")
    (folder / "labels.csv").unlink(missing_ok=True)
    remove_folder(folder / "dicom")
    (unfinished / "dicom").rename(folder / "dicom")
    (unfinished / "all.csv").rename(folder / "labels.csv")
    for stale in unfinished.parent.glob("phantom-*"):
        shutil.rmtree(stale, ignore_errors=True)


def _fingerprint(config: PhantomConfig) -> str:
    """Digest of all that decides the bytes: the parameters and the code."""
    digest = hashlib.sha256(config.model_dump_json().encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _form_of_slice(plan: StudyPlan, index: int) -> StoredForm:
    """The study's form, but for the slices that carry the 12-bit wrap: every fourth of one study, intercept 0 or 1."""
    if plan.number == WRAPPED_STUDY and index % 4 == 1:
        return replace(plan.form, wrapped=True, intercept=str(index % 8 // 4))
    return plan.form


def _field_of_view(size: int) -> np.ndarray:
    """The scanner's circle, bool [row, column]."""
    along = np.arange(size) - (size - 1) / 2
    return np.hypot(along[None, :], along[:, None]) <= size / 2


def _identifier(plan: StudyPlan, what: str, digits: int) -> str:
    """An identifier that looks random and sorts at random, as RSNA's do."""
    return "ID_" + _digest(f"{plan.seed}/study {plan.number}/{what}", digits)


def _digest(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def _file_name(image_id: str) -> str:
    """The image id with ``.dcm``, which about one file in 200 lacks, as a few of RSNA's do."""
    return image_id if int(image_id[-4:], 16) % 200 == 0 else f"{image_id}.dcm"
