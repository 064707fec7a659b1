"""A run that is killed goes on and ends in the same weights; patients stay apart; what goes wrong is said."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import pipeline.trainer
from pipeline.checkpoint import load_newest, save_checkpoint
from pipeline.config import Config
from pipeline.device import choose_device
from pipeline.errors import CheckpointError, ConfigError, IchorError
from pipeline.labels import LABELS
from pipeline.parts import split_slices
from pipeline.store import Store
from pipeline.trainer import Trainer, learning_rate_at, train_fold
from tests.conftest import ROOT, Cohort
from tests.test_store import make_store

SMALL: dict[str, Any] = {
    "folds__count": 3,
    "train__epochs": 3,
    "train__batch_size": 8,
    "train__neighbours": 1,
    "train__checkpoint_seconds": 1000,
    "train__validation_fraction": 0.25,
}


def add_studies(cohort: Cohort, studies: int, slices: int = 5) -> None:
    """Every other study bleeds: its upper slices are 45 HU brighter."""
    for number in range(studies):
        labels = [[0, 0, 0, 0, int(number % 2 and k > 1), int(number % 2 and k > 1)] for k in range(slices)]
        cohort.add_study(number, slices, labels=labels)


@pytest.fixture
def config(cohort: Cohort) -> Config:
    add_studies(cohort, 14)
    make_store(cohort, **SMALL)
    return cohort.config(**SMALL)


@pytest.fixture
def store(cohort: Cohort, config: Config) -> Store:
    return Store(cohort.data / "store.zarr")


def change(config: Config, **values: Any) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=values)})


def test_patients_are_apart_and_every_labelled_slice_has_one_part(config: Config, store: Store) -> None:
    for fold in range(3):
        parts = split_slices(config, store, fold)
        patients = [
            set(store.patient_key[part[:, 0]].tolist()) for part in (parts.training, parts.validation, parts.held_out)
        ]
        assert all(patients)
        assert sum(map(len, patients)) == len(set.union(*patients)), "a patient is in two parts"
        assert len(parts.training) + len(parts.validation) + len(parts.held_out) == len(store.slices)
    held_out = [tuple(row) for fold in range(3) for row in split_slices(config, store, fold).held_out.tolist()]
    assert sorted(held_out) == [tuple(row) for row in store.slices.tolist()]


def test_unlabelled_slices_stay_out_of_training_but_are_predicted(cohort: Cohort) -> None:
    add_studies(cohort, 9)
    for image_id in [name for name in cohort.labels if name.endswith("0002")]:
        del cohort.labels[image_id]
    store = make_store(cohort, **SMALL)
    parts = split_slices(cohort.config(**SMALL), store, 0)
    assert (parts.training[:, 1] != 2).all()
    assert (parts.held_out[:, 1] == 2).any()


def test_store_without_labels_is_refused(cohort: Cohort, run_stage: Callable[..., Any]) -> None:
    for number in range(3):
        cohort.add_study(number, 2)
    make_store(cohort, source__labels=str(ROOT / "data" / "unlabelled.csv"))
    ran = run_stage("train")
    assert ran.code == 1
    assert "no slice has a label; set source.labels" in ran.err


def test_partial_labels_and_too_few_patients_are_refused(cohort: Cohort) -> None:
    add_studies(cohort, 6)
    for name in list(cohort.labels)[5:]:
        del cohort.labels[name]
    store = make_store(cohort, **SMALL)
    with pytest.raises(IchorError, match="patients has a label"):
        _ = [split_slices(cohort.config(**SMALL), store, fold) for fold in range(3)]
    for path in cohort.dicom.iterdir():
        if not path.name.startswith(("ID_00000", "ID_00001")):
            path.unlink()
    config = cohort.config(**{**SMALL, "folds__count": 2})
    with pytest.raises(IchorError, match=r"leaves 1 patient\(s\) to learn from"):
        split_slices(config, make_store(cohort, **SMALL), 0)


def test_weights_do_not_depend_on_the_loader_workers(config: Config, store: Store, tmp_path: Path) -> None:
    alone = train_fold(config, store, 0, wip=tmp_path / "alone")
    helped = train_fold(change(config, loader_workers=1), store, 0, wip=tmp_path / "helped")
    for name, weight in alone.weights.items():
        assert torch.equal(weight, helped.weights[name]), name


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("stop_after", [1, 4, 6, 11])
def test_stopped_run_goes_on_mid_epoch_and_ends_in_the_same_weights(
    config: Config, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    config = change(config, accumulate=2)
    whole = train_fold(config, store, 0, wip=tmp_path / "whole")
    often = change(config, checkpoint_seconds=1e-9)  # after every batch
    batches = 0
    real = Trainer._train_batch

    def stop(self: Trainer, batch: Any) -> Any:
        nonlocal batches
        batches += 1
        if batches > stop_after:
            raise StoppedError
        return real(self, batch)

    monkeypatch.setattr(Trainer, "_train_batch", stop)
    with pytest.raises(StoppedError):
        train_fold(often, store, 0, wip=tmp_path / "parts")
    done = []
    monkeypatch.setattr(Trainer, "_train_batch", lambda self, batch: [done.append(1), real(self, batch)][1])
    torch.manual_seed(99)  # nothing outside the checkpoint may matter
    resumed = train_fold(often, store, 0, wip=tmp_path / "parts")
    assert len(done) == 4 * 3 - stop_after // 2 * 2, "batches that were done before are not to be done again"
    assert resumed.weights.keys() == whole.weights.keys()
    for name, weight in whole.weights.items():
        assert torch.equal(weight, resumed.weights[name]), name
    pd.testing.assert_frame_equal(whole.predictions, resumed.predictions)
    pd.testing.assert_frame_equal(
        whole.history.drop(columns=["seconds", "slices_per_s"]),
        resumed.history.drop(columns=["seconds", "slices_per_s"]),
    )


def test_killed_stage_goes_on_and_ends_in_the_same_weights(cohort: Cohort, run_stage: Callable[..., Any]) -> None:
    cohort.size = 32
    add_studies(cohort, 14, slices=10)
    params = {**SMALL, "train__epochs": 4, "train__checkpoint_seconds": 0.05}
    make_store(cohort, **params)
    cohort.write_params(**params)
    assert run_stage("train").code == 0
    outputs = cohort.data / "train" / "fold-0"
    whole = torch.load(outputs / "model.pt", weights_only=True)["weights"]
    predictions = (outputs / "predictions.parquet").read_bytes()
    assert not list((cohort.data / "wip" / "train").glob("*/")), "finished checkpoints are to be cleared away"
    (outputs / "model.pt").unlink()
    command = [
        sys.executable,
        "-m",
        "stages.train",
        "--params",
        str(cohort.folder / "params.yaml"),
        "--data",
        str(cohort.data),
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while process.poll() is None and len(list((cohort.data / "wip" / "train").glob("*/step-*.pt"))) < 2:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (outputs / "model.pt").exists(), "the run was to be killed half-way"
    resumed = run_stage("train")
    assert resumed.code == 0, resumed.err
    assert "going on in epoch" in resumed.out
    for name, weight in torch.load(outputs / "model.pt", weights_only=True)["weights"].items():
        assert torch.equal(weight, whole[name]), name
    assert (outputs / "predictions.parquet").read_bytes() == predictions


def test_outputs_have_the_form_that_others_read(config: Config, store: Store, tmp_path: Path) -> None:
    result = train_fold(config, store, 1, wip=tmp_path)
    assert list(result.predictions) == ["image_id", "study_uid", "fold", *LABELS]
    held_out = split_slices(config, store, 1).held_out
    assert result.predictions["image_id"].tolist() == store.image_id[held_out[:, 0], held_out[:, 1]].tolist()
    assert (result.predictions["fold"] == 1).all()
    assert result.predictions[list(LABELS)].to_numpy().min() > 0
    assert list(result.history) == ["epoch", "learning_rate", "train_loss", "valid_loss", "slices_per_s", "seconds"]
    assert result.summary["store_digest"] == store.digest
    assert result.summary["params"] == config.train.shaping()
    assert result.summary["best_valid_loss"] == result.history["valid_loss"].min()


def test_learning_tells_bleeding_from_not(cohort: Cohort, tmp_path: Path) -> None:
    from sklearn.metrics import roc_auc_score

    plain = cohort.render
    cohort.render = lambda number, k: plain(0, 0) + (40 if number % 2 and k > 1 else 0)  # type: ignore[method-assign]
    add_studies(cohort, 24)
    changes = {
        **SMALL,
        "train__epochs": 12,
        "train__learning_rate": 0.003,
        "train__dropout": 0.0,
        "train__ema_decay": 0.8,
    }
    store = make_store(cohort, **changes)
    result = train_fold(cohort.config(**changes), store, 0, wip=tmp_path)
    study, number = split_slices(cohort.config(**changes), store, 0).held_out.T
    assert roc_auc_score(store.labels[study, number, -1], result.predictions["any"]) > 0.95
    assert result.history["train_loss"].iloc[-1] < result.history["train_loss"].iloc[0]


def test_training_stops_early_and_keeps_the_best_epoch(
    config: Config, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([0.5, 0.4, 0.6, 0.7, 0.3])
    real = pipeline.trainer.hemorrhage_loss

    def scripted(logits: torch.Tensor, labels: torch.Tensor, options: Any) -> torch.Tensor:
        return real(logits, labels, options) if logits.requires_grad else torch.tensor(next(losses))

    monkeypatch.setattr(pipeline.trainer, "hemorrhage_loss", scripted)
    result = train_fold(change(config, epochs=5, patience=2), store, 0, wip=tmp_path)
    assert len(result.history) == 4
    assert result.summary["best_epoch"] == 2
    assert result.summary["best_valid_loss"] == pytest.approx(0.4)


def test_loss_that_is_no_number_stops_with_the_place_and_keeps_the_checkpoint(
    config: Config, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trainer._train_batch

    def spoil(self: Trainer, batch: Any) -> Any:
        loss = real(self, batch)
        return loss * float("nan") if self.state.epoch == 1 else loss

    monkeypatch.setattr(Trainer, "_train_batch", spoil)
    with pytest.raises(IchorError, match="the loss became nan in epoch 2"):
        train_fold(config, store, 0, wip=tmp_path)
    (folder,) = tmp_path.glob("fold-0-*")
    kept = load_newest(folder, {})
    assert kept is not None
    assert kept["state"]["epoch"] == 1
    assert all(torch.isfinite(weight).all() for weight in kept["network"].values())


def test_half_written_checkpoint_is_never_picked(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"identity": {"fold": 0}, "step": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000002.pt", "step-000000003.pt"]
    newest = tmp_path / "step-000000003.pt"
    newest.write_bytes(newest.read_bytes()[:200])
    found = load_newest(tmp_path, {"fold": 0})
    assert found is not None
    assert found["step"] == 2
    assert load_newest(tmp_path / "none", {}) is None


def test_checkpoint_of_other_parameters_is_refused_by_name(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"identity": {"fold": 0, "store_digest": "abc"}})
    with pytest.raises(CheckpointError, match="made with store_digest = 'abc', this run has 'def'"):
        load_newest(tmp_path, {"fold": 0, "store_digest": "def"})


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    rates = [learning_rate_at(step, steps=100, warmup_steps=10, peak=0.1) for step in range(101)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[10] == max(rates) == pytest.approx(0.1)
    assert rates[100] == pytest.approx(0)
    assert np.all(np.diff(rates[10:]) < 0)


def test_absent_device_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.device = 'quantum'"):
        choose_device("quantum")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="set it to auto or cpu"):
            choose_device("cuda")


def test_fold_that_does_not_exist_is_refused(config: Config, run_stage: Callable[..., Any]) -> None:
    ran = run_stage("train", "--fold", "9")
    assert ran.code == 1
    assert "folds.count = 3 makes folds 0 to 2" in ran.err
