"""Live figures: each point once however a run is stopped, nothing that stops the next start, and DVC shows them meanwhile."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from pipeline.live import Live
from tests.conftest import ROOT, tree_bytes


def start(folder: Path, step: int = 0, name: str = "fold-0") -> Live:
    return Live(folder, name=name, step=step)


def log_steps(live: Live, first: int, last: int, *, rate: float = 1e-6) -> None:
    """A point a step, and an epoch every four."""
    for step in range(first, last + 1):
        live.log(step, "running", train_loss=1 / step, learning_rate=step * rate)
        if step % 4 == 0:
            live.log(step, "epoch", number=step // 4, valid_loss=2 / step)


def curve(folder: Path, name: str) -> dict[int, float]:
    table = pd.read_csv(folder / "curves" / "fold-0" / "metrics" / f"{name}.tsv", sep="\t")
    assert table["step"].is_monotonic_increasing
    assert table["step"].is_unique
    return dict(zip(table["step"], table[name.split("/")[-1]], strict=True))


def newest(folder: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((folder / "latest" / "fold-0" / "metrics.json").read_text())
    return figures


def test_curves_and_newest_figures_are_those_that_were_logged(tmp_path: Path) -> None:
    log_steps(start(tmp_path), 1, 9)
    assert curve(tmp_path, "running/train_loss") == {step: 1 / step for step in range(1, 10)}
    assert curve(tmp_path, "epoch/valid_loss") == {4: 0.5, 8: 0.25}
    assert newest(tmp_path) == {
        "running": {"train_loss": 1 / 9, "learning_rate": 9e-6},
        "epoch": {"number": 2, "valid_loss": 0.25},
        "step": 9,
    }


@pytest.mark.parametrize("checkpoint", [3, 4, 7, 10])
def test_resumed_run_leaves_the_files_of_an_uninterrupted_one(tmp_path: Path, checkpoint: int) -> None:
    log_steps(start(tmp_path / "whole"), 1, 12)
    killed = start(tmp_path / "killed")
    log_steps(killed, 1, checkpoint)
    log_steps(killed, checkpoint + 1, 10, rate=3e-6)  # in no checkpoint, so the run that goes on measures them anew
    log_steps(start(tmp_path / "killed", checkpoint), checkpoint + 1, 12)
    assert tree_bytes(tmp_path / "killed" / "curves") == tree_bytes(tmp_path / "whole" / "curves")
    assert newest(tmp_path / "killed") == newest(tmp_path / "whole")


def test_newest_figures_after_a_start_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    log_steps(start(tmp_path), 1, 10)
    start(tmp_path, 6)
    figures = newest(tmp_path)
    assert figures["step"] == 6
    assert figures["running"]["train_loss"] == 1 / 6
    assert figures["epoch"] == {"number": 1, "valid_loss": 0.5}


def test_new_run_starts_with_empty_curves_and_leaves_other_folds_alone(tmp_path: Path) -> None:
    log_steps(start(tmp_path), 1, 5)
    log_steps(start(tmp_path, name="fold-1"), 1, 5)
    other = {path: content for path, content in tree_bytes(tmp_path).items() if "fold-1" in path}
    start(tmp_path)
    assert tree_bytes(tmp_path) == other


@pytest.mark.parametrize("torn", range(24))
def test_file_torn_anywhere_is_mended_at_the_next_start(tmp_path: Path, torn: int) -> None:
    log_steps(start(tmp_path), 1, 8)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    for path in files:
        os.truncate(path, max(0, path.stat().st_size - torn))
    log_steps(start(tmp_path, 8), 9, 10)
    points = curve(tmp_path, "running/train_loss")
    assert points == {step: 1 / step for step in points}
    assert {9, 10} <= points.keys()
    assert newest(tmp_path)["step"] == 10


@pytest.mark.parametrize(
    "content", [b"", b"step", b"step\ttrain_loss\n", b"\0" * 40, b"step\ttrain_loss\n1\tnan\n\xff\xfe\t\n"]
)
def test_file_without_a_point_starts_anew(tmp_path: Path, content: bytes) -> None:
    log_steps(start(tmp_path), 1, 2)
    (tmp_path / "curves" / "fold-0" / "metrics" / "running" / "train_loss.tsv").write_bytes(content)
    (tmp_path / "latest" / "fold-0" / ".metrics.json.0123456789ab.tmp").write_bytes(b"{")
    log_steps(start(tmp_path, 2), 3, 4)
    assert curve(tmp_path, "running/train_loss") == {3: 1 / 3, 4: 1 / 4}
    assert [path.name for path in (tmp_path / "latest" / "fold-0").iterdir()] == ["metrics.json"]


def test_unknown_figures_and_second_points_of_a_step_are_left_out(tmp_path: Path) -> None:
    live = start(tmp_path)
    live.log(1, "running", train_loss=math.nan, learning_rate=0.1)
    live.log(2, "running", train_loss=0.5, learning_rate=0.2)
    live.log(2, "running", train_loss=0.4, learning_rate=0.2)
    assert curve(tmp_path, "running/train_loss") == {2: 0.5}
    assert curve(tmp_path, "running/learning_rate") == {1: 0.1, 2: 0.2}


def test_newest_figures_are_replaced_and_never_written_over(tmp_path: Path) -> None:
    live = start(tmp_path)
    live.log(1, "running", train_loss=0.5)
    path, reader = tmp_path / "latest" / "fold-0" / "metrics.json", tmp_path / "reader.json"
    os.link(path, reader)
    before = reader.read_bytes()
    live.log(2, "running", train_loss=0.4)
    assert reader.read_bytes() == before
    assert path.read_bytes() != before


def test_nothing_is_opened_saved_or_sent(tmp_path: Path) -> None:
    script = (
        "import socket, sys\n"
        "from pathlib import Path\n"
        "def refuse(*_): raise AssertionError('something was to be sent')\n"
        "socket.socket.connect = refuse\n"
        "from pipeline.live import Live\n"
        "Live(Path('live'), name='fold-0', step=0).log(1, 'running', train_loss=0.5)\n"
        "print(*{name.split('.')[0] for name in sys.modules} & {'pydicom', 'dask', 'distributed', 'zarr', 'monai'})\n"
        "print(*{'dvc.repo', 'dvc.repo.experiments'} & sys.modules.keys())\n"
    )
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    studio = {
        "DVC_STUDIO_TOKEN": "token",
        "DVC_STUDIO_REPO_URL": "https://example.org",
        "DVC_STUDIO_URL": "http://127.0.0.1:9",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=tmp_path,
        env={**os.environ, **studio, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, [], "")
    assert {path.name for path in tmp_path.iterdir()} == {".git", "live"}


RUNNING = """
import sys, time
from pathlib import Path
from pipeline.live import Live
live = Live(Path('data/live'), name='fold-0', step=0)
for step in (10, 20):
    live.log(step, 'running', train_loss=1 / step)
live.log(20, 'epoch', number=1, valid_loss=0.123)
Path('started').touch()
while not Path('go-on').exists():
    time.sleep(0.05)
"""


@pytest.fixture
def small_project(tmp_path: Path) -> Path:
    """One stage that logs and then waits, with the project's own lines about live figures."""
    for name in (".dvc/config", ".dvcignore", "data/live"):
        source, target = ROOT / name, tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("fold-*"))
        else:
            shutil.copy(source, target)
    config = tmp_path / ".dvc" / "config"
    config.write_text(config.read_text().replace("[core]\n", "[core]\n    no_scm = true\n", 1))
    ours = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    (tmp_path / "running.py").write_text(RUNNING)
    lines = {
        "stages": {"train": {"cmd": f"{sys.executable} running.py", "always_changed": True}},
        "metrics": ours["metrics"],
        "plots": [plot for plot in ours["plots"] if "data/live/curves" in plot],
    }
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump(lines))
    return tmp_path


def dvc(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def test_dvc_shows_a_running_stage_and_has_no_complaint_before_the_first(small_project: Path) -> None:
    before = dvc(small_project, "plots", "show", "--out", "page")
    assert (before.returncode, "failed" in before.stderr + before.stdout) == (0, False)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen([sys.executable, "-m", "dvc", "repro", "-q"], cwd=small_project, env=environment)
    try:
        deadline = time.monotonic() + 60
        while not (small_project / "started").exists() and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        metrics, plots = dvc(small_project, "metrics", "show"), dvc(small_project, "plots", "show", "--out", "page")
        assert running.poll() is None, "the stage was to be under way"
    finally:
        (small_project / "go-on").touch()
        running.wait(timeout=60)
    assert "0.123" in metrics.stdout
    assert metrics.stderr == ""
    assert plots.returncode == 0
    page = (small_project / "page" / "index.html").read_text()
    assert "fold-0/metrics/epoch/valid_loss.tsv" in page
