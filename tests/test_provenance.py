"""What the report says of how a run was made: true where it is known, said where it is not, and nothing of who or where."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import pytest
import yaml

from pipeline.config import load_config
from pipeline.provenance import describe_making, find_machine, find_packages, find_revision, find_turned
from tests.conftest import ROOT, Cohort


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    (folder / "pipeline").mkdir(parents=True)
    (folder / "pipeline" / "model.py").write_text("LAYERS = 3\n")
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "first")
    return folder


def test_revision_is_gits_and_tells_what_changed_since(checkout: Path) -> None:
    commit = git(checkout, "log", "-1", "--format=%h of %cs")
    assert find_revision(checkout) == f"commit {commit}, and no change since"
    (checkout / "dvc.lock").write_text("written by every run\n")
    assert find_revision(checkout).endswith("no change since")
    (checkout / "pipeline" / "model.py").write_text("LAYERS = 4\n")
    assert find_revision(checkout) == f"commit {commit}, with changes that are not committed: pipeline/model.py"


def test_without_a_checkout_or_git_the_revision_is_not_known(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert find_revision(tmp_path) == "not known: not a git checkout of its own"
    assert find_revision(checkout / "pipeline").startswith("not known"), "a copy inside another project's checkout"
    monkeypatch.setenv("PATH", "")
    assert find_revision(checkout) == "not known: git is not installed"
    assert find_turned(load_config(ROOT / "params.yaml"), checkout) is None


def test_turned_parameters_are_those_that_differ_from_the_committed_ones(checkout: Path) -> None:
    values = yaml.safe_load((checkout / "params.yaml").read_text())
    values["train"] |= {"epochs": 99, "precision": "bf16"}
    values["source"]["dicom"] = "/home/somebody"
    values["index"]["patient_salt"] = "secret"
    (checkout / "params.yaml").write_text(yaml.safe_dump(values))
    committed = str(yaml.safe_load(git(checkout, "show", "HEAD:params.yaml"))["train"]["epochs"])
    turned = find_turned(load_config(checkout / "params.yaml"), checkout)
    assert turned == [("train.epochs", committed, "99"), ("train.precision", "auto", "bf16")]
    git(checkout, "commit", "-qam", "second")
    assert find_turned(load_config(checkout / "params.yaml"), checkout) == []


def test_nothing_tells_who_or_where(cohort: Cohort) -> None:
    making = describe_making(cohort.config(train__pretrained="/home/somebody/weights.pt", index__patient_salt="sesame"))
    assert ("train.pretrained", "weights.pt") in making.parameters
    said = repr(making)
    assert "somebody" not in said
    assert "sesame" not in said
    assert str(cohort.folder) not in said
    if len(platform.node()) > 5:  # a host may be called "linux"
        assert platform.node() not in said


def test_machine_and_versions_are_these() -> None:
    machine = dict(find_machine())
    assert int(machine["cores"]) == len(os.sched_getaffinity(0))
    assert machine["processor"]
    assert machine["GPU"]
    versions = find_packages()
    assert versions["Python"] == platform.python_version()
    assert {"torch", "numpy", "scikit-learn"} <= set(versions)


def test_gpus_are_named_as_the_driver_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("0000:19:00.0", "0000:3b:00.0"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "information").write_text(
            f"Model: \t\t NVIDIA H200\nIRQ:   \t\t 18\nBus Location: \t {place}\n"
        )
    monkeypatch.setattr("pipeline.provenance.GPUS", tmp_path)
    assert dict(find_machine())["GPU"] == "NVIDIA H200, NVIDIA H200"
    monkeypatch.setattr("pipeline.provenance.GPUS", tmp_path / "none")
    assert dict(find_machine())["GPU"] == "none"
