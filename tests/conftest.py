"""Small real DICOM files and parameters that the tests share."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import stages  # noqa: F401  first, as in a stage: it says how threads are to wait, before torch is imported
from pipeline.config import Config, load_config
from pipeline.labels import LABELS
from pipeline.phantom.dicom_writer import StoredForm, write_rsna_slice

ROOT = Path(__file__).resolve().parent.parent
REAL_DICOM = ROOT.parent / "shared" / "dicom"

UNSIGNED_12 = StoredForm(bits=12, signed=False)
SIGNED_16 = StoredForm(bits=16, signed=True, explicit=False)


def pytest_configure() -> None:
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    # A shell's background jobs ignore Ctrl-C, and so would every stage that a test starts and interrupts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


LONG_FILES = ("test_pipeline", "test_trainer", "test_benchmarks", "test_survival", "test_fuzz")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: one that is left for the end has a worker wait for it, alone, for a minute."""
    order = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@dataclass
class Cohort:
    """Made-up studies on disk, and parameters that point at them."""

    folder: Path
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    labels: dict[str, list[int]] = field(default_factory=dict)
    size: int = 64

    @property
    def dicom(self) -> Path:
        return self.folder / "dicom"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def add_study(
        self,
        number: int,
        slices: int = 4,
        *,
        patient: int | None = None,
        form: StoredForm = UNSIGNED_12,
        labels: Any = None,
        **changes: Any,
    ) -> list[str]:
        """Write one study; slice k shows a disk of 30 + number + k HU, so that every slice is its own. Returns image ids."""
        self.dicom.mkdir(parents=True, exist_ok=True)
        image_ids = []
        for k in range(slices):
            image_id = f"ID_{number:05x}{k:04x}"
            pixels_hu = self.render(number, k)
            write_rsna_slice(
                self.dicom / f"{image_id}.dcm",
                **{
                    "stored": self.store(pixels_hu, form),
                    "form": form,
                    "image_id": image_id,
                    "study_id": f"ID_{number:010x}",
                    "series_id": f"ID_{number + 4096:010x}",
                    "patient_id": f"ID_{(number if patient is None else patient):08x}",
                    "position_mm": (-100.0, -100.0, 5.0 * k),
                    "orientation": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
                    "spacing_mm": 0.5,
                    **changes,
                },
            )
            row = labels[k] if labels is not None else [0] * len(LABELS)
            if row is not None:
                self.labels[image_id] = list(row)
            image_ids.append(image_id)
        return image_ids

    def render(self, number: int, k: int) -> np.ndarray:
        y, x = np.mgrid[: self.size, : self.size] / self.size - 0.5
        pixels_hu = np.where(x**2 + y**2 < 0.16, 30.0 + number % 20 + k, -1000.0)
        return pixels_hu + self.rng.normal(0, 3, pixels_hu.shape)

    @staticmethod
    def store(pixels_hu: np.ndarray, form: StoredForm) -> np.ndarray:
        from pipeline.phantom.dicom_writer import stored_values

        return stored_values(np.maximum(pixels_hu, -1024), form=form)

    def write_labels(self) -> Path:
        path = self.folder / "labels.csv"
        lines = ["ID,Label"]
        for image_id, row in self.labels.items():
            lines += [f"{image_id}_{name},{value}" for name, value in zip(LABELS, row, strict=True)]
        path.write_text("\n".join(lines) + "\n")
        return path

    def write_params(self, **changes: Any) -> Path:
        """The project's own params.yaml, pointed at this cohort; `changes` are keys with `__` for the dot."""
        values = yaml.safe_load((ROOT / "params.yaml").read_text())
        values["source"] = {"dicom": str(self.dicom), "labels": str(self.write_labels()) if self.labels else None}
        values["preprocess"] |= {"image_size": 32, "workers": 0}
        values["train"]["device"] = "cpu"  # where a sum is the same each time, and processes are not one a GPU
        values["index"]["max_excluded_fraction"] = 1.0
        for key, value in changes.items():
            *sections, last = key.split("__")
            place = values
            for section in sections:
                place = place[section]
            place[last] = value
        path = self.folder / "params.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    def config(self, **changes: Any) -> Config:
        return load_config(self.write_params(**changes))


PACKAGES = {"dciodvfy": "dicom3tools"}
"""Of programs that are called otherwise than Debian's package."""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked ``program(NAME)`` where that is missing; but in CI, which installs it, fail."""
    for marker in item.iter_markers("program"):
        (name,) = marker.args
        if shutil.which(name) is None:
            (pytest.fail if os.environ.get("CI") else pytest.skip)(
                f"{name} is not installed (apt-get install {PACKAGES.get(name, name)})"
            )


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is synced survives a power cut, and no test cuts the power; thousands of syncs would take minutes."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def cohort(tmp_path: Path) -> Cohort:
    return Cohort(tmp_path)


@dataclass(frozen=True)
class Ran:
    """A finished stage."""

    code: int
    out: str
    err: str


@pytest.fixture
def run_stage(cohort: Cohort) -> Callable[..., Ran]:
    """Run ``python -m stages.NAME`` on the cohort as a user would."""

    def run(name: str, *arguments: str, params: Path | None = None) -> Ran:
        command = [sys.executable, "-m", f"stages.{name}", "--data", str(cohort.data)]
        command += ["--params", str(params or cohort.folder / "params.yaml"), *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
        return Ran(done.returncode, done.stdout, done.stderr)

    return run


def tree_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
