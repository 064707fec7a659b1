"""The benchmarks run, at toy size, and end in a line of JSON; no time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT, Cohort
from tests.test_store import make_store


def last_line(*arguments: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(figures, dict)
    return figures


MARKS: dict[str, list[pytest.MarkDecorator]] = {
    "bench_preprocess.py": [pytest.mark.program("dcm2niix")],
    "bench_loader.py": [pytest.mark.long],
    "bench_scale.py": [pytest.mark.long],
    "bench_train.py": [pytest.mark.long],
}
NAMES = sorted(path.name for path in (ROOT / "benchmarks").glob("bench_*.py"))


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, [])) for name in NAMES])
def test_benchmark_ends_in_figures(cohort: Cohort, name: str) -> None:
    arguments = {
        "bench_scale.py": ["--studies", "20", "--label-images", "1000"],
        "bench_preprocess.py": [
            "--size",
            "64",
            "--image-size",
            "32",
            "--rounds",
            "1",
            "--tasks",
            "6",
            "--files",
            "400",
        ],
        "bench_loader.py": [
            "--slices",
            "40",
            "--studies",
            "1",
            "--size",
            "64",
            "--image-size",
            "32",
            "--reads",
            "8",
            "--rounds",
            "1",
            "--workers",
            "1",
        ],
        "bench_train.py": [
            "--models",
            "compact",
            "--slices",
            "64",
            "--studies",
            "2",
            "--size",
            "64",
            "--image-size",
            "32",
            "--batch-size",
            "8",
            "--batches",
            "4",
            "--device",
            "cpu",
            "--no-compile",
            "--loader-workers",
            "0",
        ],
    }[name]
    cohort.add_study(1, 4)
    make_store(cohort)
    figures = last_line(f"benchmarks/{name}", *arguments)
    assert all(value for value in figures.values())
