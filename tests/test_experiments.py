"""DVC's experiments, in a Git repository as people have one: one in the workspace, a queue of three, and what they cost."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.test_pipeline import Project

SMALL: dict[str, Any] = {
    "phantom": {"studies": 14, "slices": [8, 8], "size": 64, "seed": 5},
    "preprocess": {"image_size": 24, "workers": 0},
    "train": {"epochs": 1, "folds": [0], "learning_rate": 0.002},
}

RATES = {0.001, 0.004, 0.016}

pytestmark = pytest.mark.long

STAGES = ["phantom", "index", "preprocess", "train", "evaluate"]


class Repository(Project):
    """A copy of the project under Git, as a clone holds it: nothing has run here yet."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        tracked = ["dvc.lock", "data/phantom/dvc.lock", "data/report/headline.json", "data/report/metrics.json"]
        for name in (*tracked, ".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        shutil.copytree(ROOT / "data" / "live", folder / "data" / "live", ignore=shutil.ignore_patterns("fold-*"))
        self.set(**SMALL)
        self.git("init", "--quiet")
        self.git("config", "user.name", "A Person")
        self.git("config", "user.email", "person@example.org")
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "What a clone holds")

    def git(self, *arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=self.folder, check=True, capture_output=True, text=True)
        return done.stdout

    def headline(self) -> dict[str, float]:
        headline: dict[str, float] = json.loads((self.folder / "data" / "report" / "headline.json").read_text())
        return headline

    def wait_for_queue(self) -> str:
        """What `dvc queue status` says once nothing waits or runs any more."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            status = self.dvc("queue", "status")
            if "Queued" not in status and "Running" not in status:
                return status
            time.sleep(1)  # a look costs a second of a core, which the experiments need
        raise AssertionError(f"the queue did not end\n{status}")


@dataclass(frozen=True)
class Shown:
    """The repository after the experiments, and what DVC then said of them."""

    repository: Repository
    one: str
    headline: dict[str, float]
    queue: str
    experiments: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # other tests have the other cores
        yield run_experiments(Repository(tmp_path_factory.mktemp("repository")))


def run_experiments(repository: Repository) -> Shown:
    one = repository.dvc("exp", "run", "--name", "first", "--set-param", "train.dropout=0.4")
    headline = repository.headline()
    rates = "train.learning_rate=" + ",".join(str(rate) for rate in RATES)
    repository.dvc("exp", "run", "--queue", "--name", "rate", "--set-param", rates, "--downstream", "train")
    try:
        repository.dvc("queue", "start")  # the worker holds the pipe, so this waits for it, and costs no core
        queue = repository.wait_for_queue()
    except BaseException:
        repository.dvc("queue", "stop", "--kill")
        raise
    (baseline,) = [row for row in json.loads(repository.dvc("exp", "show", "--json")) if row["rev"] != "workspace"]
    experiments = {experiment["name"]: experiment["revs"][0]["data"] for experiment in baseline["experiments"]}
    return Shown(repository, one, headline, queue, experiments)


def headline_of(experiment: dict[str, Any]) -> dict[str, float]:
    headline: dict[str, float] = experiment["metrics"]["data/report/headline.json"]["data"]
    return headline


def train_params_of(experiment: dict[str, Any]) -> dict[str, Any]:
    params: dict[str, Any] = experiment["params"]["params.yaml"]["data"]["train"]
    return params


def test_one_experiment_runs_in_the_workspace_and_keeps_its_name(shown: Shown) -> None:
    assert [stage for stage in STAGES if f"stages.{stage}" in shown.one] == STAGES
    assert train_params_of(shown.experiments["first"])["dropout"] == 0.4
    assert headline_of(shown.experiments["first"]) == shown.headline


def test_queue_of_three_trains_three_networks(shown: Shown) -> None:
    assert shown.queue.count("Success") == len(RATES)
    queued = [experiment for name, experiment in shown.experiments.items() if name.startswith("rate-")]
    assert {train_params_of(experiment)["learning_rate"] for experiment in queued} == RATES
    assert len({headline_of(experiment)["weighted_log_loss"] for experiment in queued}) == len(RATES)


def test_queue_leaves_the_workspace_alone(shown: Shown) -> None:
    assert shown.repository.headline() == shown.headline
    assert "data/live" not in shown.repository.git("status", "--short")


def test_experiments_on_training_make_neither_cohort_nor_store_again(shown: Shown) -> None:
    log = shown.repository.dvc("queue", "logs", "rate-1")
    assert [stage for stage in STAGES if f"stages.{stage}" in log] == ["train", "evaluate"]


def test_applied_experiment_brings_its_results(shown: Shown) -> None:
    shown.repository.dvc("exp", "apply", "rate-2")
    assert shown.repository.headline() == headline_of(shown.experiments["rate-2"])
    rate = train_params_of(shown.experiments["rate-2"])["learning_rate"]
    assert f"+  learning_rate: {rate}" in shown.repository.git("diff", "params.yaml")
