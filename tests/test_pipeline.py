"""The whole pipeline under DVC, from the phantom cohort to the report: what runs again, what doesn't, and what a kill costs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, tree_bytes

TINY: dict[str, Any] = {
    "phantom": {"studies": 30, "slices": [8, 9], "size": 64, "seed": 5},
    "preprocess": {"image_size": 32, "workers": 0},
    "folds": {"count": 3},
    "train": {"epochs": 2, "folds": [0], "validation_fraction": 0.2, "checkpoint_seconds": 0.2},
}


class Project:
    """A copy of the project with small parameters."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in (
            "pipeline",
            "stages",
            "data/phantom/dvc.yaml",
            "data/unlabelled.csv",
            "dvc.yaml",
            ".dvc/config",
            ".dvc/plots",
        ):
            source, target = ROOT / name, folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        config = folder / ".dvc" / "config"
        config.write_text(config.read_text().replace("[core]\n", "[core]\n    no_scm = true\n", 1))
        self.set(**TINY)

    def set(self, **changes: Any) -> None:
        path = self.folder / "params.yaml"
        values = yaml.safe_load((path if path.exists() else ROOT / "params.yaml").read_text())
        for section, keys in changes.items():
            values[section] |= keys
        path.write_text(yaml.safe_dump(values, sort_keys=False))

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        command = [sys.executable, "-m", "dvc", *arguments]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def dvc(self, *arguments: str) -> str:
        process = self.start(*arguments)
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
        return out

    def repro(self) -> tuple[list[str], str]:
        """Names of the stages that ran, and what they printed."""
        out = self.dvc("repro")
        ran = [line.split("'")[1] for line in out.splitlines() if line.startswith("Running stage")]
        return [name.removeprefix("data/phantom/dvc.yaml:") for name in ran], out

    def metrics(self) -> dict[str, Any]:
        return json.loads((self.folder / "data" / "report" / "metrics.json").read_text())


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("project"))
    ran, out = project.repro()
    assert ran == ["phantom", "index", "preprocess", "folds", "train@0", "evaluate"], out
    return project


def test_everything_is_there_after_one_command(project: Project) -> None:
    data = project.folder / "data"
    for name in ("store.zarr/zarr.json", "train/fold-0/model.pt", "report/metrics.json", "report/report.html"):
        assert (data / name).is_file(), name
    metrics = project.metrics()
    assert metrics["held_out"]["folds"] == [0]
    assert 0 <= metrics["slice"]["any"]["auc"] <= 1
    assert json.loads((data / "index" / "summary.json").read_text())["files"] == len(
        list((data / "phantom" / "dicom").iterdir())
    )


def test_second_repro_runs_nothing_but_the_index_check(project: Project) -> None:
    ran, out = project.repro()
    assert ran == ["index"]
    assert ", 0 new or changed" in out


def test_shards_are_not_copied_again_and_again(project: Project) -> None:
    shard = next((project.folder / "data" / "store.zarr" / "pixels").glob("c.*"))
    assert shard.stat().st_nlink >= 3, "the store, the kept shard and DVC's cache are to be one file"


def test_changed_window_runs_preprocess_and_what_follows_and_reads_no_header(project: Project) -> None:
    windows = yaml.safe_load((project.folder / "params.yaml").read_text())["preprocess"]["windows"]
    project.set(preprocess={"windows": {**windows, "brain": {"centre": 35, "width": 70}}})
    ran, out = project.repro()
    assert ran == ["index", "preprocess", "folds", "train@0", "evaluate"]
    assert ", 0 new or changed" in out


@pytest.mark.long
def test_more_folds_train_the_new_ones_only_and_fewer_leave_no_trace(project: Project) -> None:
    before = project.metrics()
    project.set(train={"folds": [0, 1]})
    assert project.repro()[0] == ["index", "train@1", "evaluate"]
    assert project.metrics()["held_out"]["folds"] == [0, 1]
    project.set(train={"folds": [0]})
    assert "train@" not in " ".join(project.repro()[0])
    assert project.metrics() == before


@pytest.mark.long
def test_changed_label_makes_no_pixel_again(project: Project) -> None:
    shards = project.folder / "data" / "wip" / "shards"
    before = {path.name: path.stat().st_mtime_ns for path in shards.iterdir()}
    lines = (project.folder / "data" / "phantom" / "labels.csv").read_text().splitlines()
    own = project.folder / "own.csv"
    own.write_text("\n".join([lines[0], *lines[7:]]) + "\n")  # the first image loses its labels
    project.set(source={"labels": "own.csv"})
    assert project.repro()[0] == ["index", "preprocess", "folds", "train@0", "evaluate"]
    assert {path.name: path.stat().st_mtime_ns for path in shards.iterdir()} == before


@pytest.mark.long
def test_changed_epochs_leave_the_store_alone_and_a_killed_repro_goes_on_with_training(project: Project) -> None:
    project.set(train={"epochs": 4})
    process = project.start("repro")
    checkpoints = project.folder / "data" / "wip" / "train"
    deadline = time.monotonic() + 120
    while process.poll() is None and not list(checkpoints.glob("fold-0/step-*.pt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert list(checkpoints.glob("fold-0/step-*.pt")), "training was to be under way"
    ran, out = project.repro()
    assert ran == ["index", "train@0", "evaluate"]
    assert "going on in epoch" in out
    assert project.metrics()["held_out"]["folds"] == [0]


def test_metrics_plots_and_dag_show_something(project: Project) -> None:
    assert "any_auc" in project.dvc("metrics", "show").replace(".", "_")
    assert "preprocess" in project.dvc("dag")
    project.dvc("plots", "show", "--out", "plots")
    page = (project.folder / "plots" / "index.html").read_text()
    assert "ROC by slice" in page
    assert "Training" in page


def test_store_bytes_are_those_of_a_run_without_dvc(project: Project, tmp_path: Path) -> None:
    for stage in ("index", "preprocess"):
        command = [sys.executable, "-m", f"stages.{stage}", "--data", str(tmp_path)]
        subprocess.run(command, cwd=project.folder, check=True, capture_output=True)
    assert tree_bytes(tmp_path / "store.zarr") == tree_bytes(project.folder / "data" / "store.zarr")
