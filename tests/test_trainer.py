"""A run that is killed goes on and ends in the same weights; processes that share it learn the same; what goes wrong is said."""

from __future__ import annotations

import json
import math
import os
import random
import resource
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
from pipeline.augment import build_augment
from pipeline.checkpoint import load_newest, save_checkpoint, write_tensors
from pipeline.config import Config, load_config
from pipeline.device import choose_device
from pipeline.errors import CheckpointError, ConfigError, IchorError
from pipeline.fold import FoldResult, train_fold
from pipeline.folds import deal_folds
from pipeline.inference import predict, to_device
from pipeline.labels import LABELS
from pipeline.loader import Loader, SliceDataset, name_batches
from pipeline.model import build_model
from pipeline.optimise import MovingAverage, draw_mixup, learning_rate_at, make_optimizer, mix
from pipeline.parts import split_slices
from pipeline.store import Store
from pipeline.trainer import Trainer
from tests.conftest import ROOT, Cohort
from tests.test_store import make_store

SMALL: dict[str, Any] = {
    "folds__count": 3,
    "train__epochs": 3,
    "train__batch_size": 8,
    "train__neighbours": 1,
    "train__checkpoint_seconds": 1000,
    "train__sequence__kind": "none",
    "train__validation_fraction": 0.25,
}

KILLS = 20


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


def train(config: Config, store: Store, wip: Path, fold: int = 0) -> FoldResult:
    result = train_fold(config, store, fold, deal_folds(config, store), wip=wip)
    assert result is not None
    return result


def same(one: FoldResult, other: FoldResult) -> None:
    """Bit for bit, but for the time it took."""
    assert len(one.members) == len(other.members)
    for weights, others in zip(one.members, other.members, strict=True):
        assert weights.keys() == others.keys()
        for name, weight in weights.items():
            assert torch.equal(weight, others[name]), name
    pd.testing.assert_frame_equal(one.predictions, other.predictions)
    of_time = ["seconds", "slices_per_s", "wait_share"]
    pd.testing.assert_frame_equal(one.history.drop(columns=of_time), other.history.drop(columns=of_time))


def test_weights_do_not_depend_on_the_loader_workers(config: Config, store: Store, tmp_path: Path) -> None:
    same(train(config, store, tmp_path / "a"), train(change(config, loader_workers=1), store, tmp_path / "b"))


# ---- stopped, killed, resumed


class StoppedError(Exception):
    pass


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "snapshots": {"snapshots": 2, "mixup": 0.4, "test_flips": True},
    "step": {"schedule": "step"},
}


@pytest.mark.parametrize(("stop_after", "variant"), [(1, "plain"), (4, "snapshots"), (6, "step"), (11, "snapshots")])
def test_stopped_run_goes_on_mid_epoch_and_ends_in_the_same_weights(
    config: Config, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int, variant: str
) -> None:
    config = change(config, accumulate=2, **VARIANTS[variant])
    whole = train(config, store, tmp_path / "whole")
    often = change(config, checkpoint_seconds=1e-9)  # after every batch
    batches = 0
    real = Trainer._train_batch

    def stop(self: Trainer, *arguments: Any) -> Any:
        nonlocal batches
        batches += 1
        if batches > stop_after:
            raise StoppedError
        return real(self, *arguments)

    monkeypatch.setattr(Trainer, "_train_batch", stop)
    with pytest.raises(StoppedError):
        train(often, store, tmp_path / "parts")
    done = []
    monkeypatch.setattr(Trainer, "_train_batch", lambda self, *rest: [done.append(1), real(self, *rest)][1])
    torch.manual_seed(99)  # nothing outside the checkpoint may matter
    resumed = train(often, store, tmp_path / "parts")
    assert len(done) == 4 * 3 - stop_after // 2 * 2, "batches that were done before are not to be done again"
    same(whole, resumed)


def run_and_kill(params: str, data: str, folder: str, kills: int) -> None:
    """Train again and again in a child that is killed at a random moment; once it may end, and what it leaves is kept.

    Runs in a process of its own, which has imported torch and computed nothing: so that a forked child starts in no time.
    """
    torch.set_num_threads(1)
    config, store = load_config(params), Store(Path(data) / "store.zarr")
    build_augment(config.train.augment)  # which imports its library
    rng, positions = random.Random(1), []

    def start(wip: Path, out: Path) -> int:
        if child := os.fork():
            return child
        result = train(config, store, wip)
        torch.save({"weights": result.members[0], "predictions": result.predictions.to_dict("list")}, out)
        os._exit(0)

    os.waitpid(start(Path(folder, "whole"), Path(folder, "whole.pt")), 0)
    rounds = 0
    while kills:
        wip = Path(folder, f"wip-{rounds}")
        before = set(wip.glob("fold-0/step-*.pt"))
        child = start(wip, Path(folder, f"killed-{rounds}.pt"))
        # however loaded the machine, every run gets somewhere: its first checkpoint, and then any moment up to the next ones
        while not (has_ended := os.waitpid(child, os.WNOHANG)[0]) and set(wip.glob("fold-0/step-*.pt")) <= before:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        if has_ended or os.waitpid(child, os.WNOHANG)[0]:
            rounds += 1
            continue
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills -= 1
        for kept in Path(folder, f"wip-{rounds}").glob("fold-0/step-*.pt"):
            positions.append(int(kept.stem.removeprefix("step-")))
    os.waitpid(start(Path(folder, f"wip-{rounds}"), Path(folder, f"killed-{rounds}.pt")), 0)
    Path(folder, "positions.json").write_text(json.dumps(positions))


@pytest.mark.long
def test_run_killed_at_twenty_random_points_ends_in_the_same_weights(cohort: Cohort, tmp_path: Path) -> None:
    add_studies(cohort, 14, slices=8)
    changes = {**SMALL, "train__epochs": 8, "train__batch_size": 2, "train__checkpoint_seconds": 0.1}
    make_store(cohort, **changes)
    params = cohort.write_params(**changes)
    arguments = [str(params), str(cohort.data), str(tmp_path), KILLS]
    script = f"from tests.test_trainer import run_and_kill; run_and_kill(*{arguments!r})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    batches_an_epoch = 24
    within = {
        position for position in json.loads((tmp_path / "positions.json").read_text()) if position % batches_an_epoch
    }
    assert len(within) >= 3, "most kills were to be within an epoch"
    expected = torch.load(tmp_path / "whole.pt", weights_only=True)
    ended = list(tmp_path.glob("killed-*.pt"))
    assert ended
    for path in ended:
        found = torch.load(path, weights_only=True)
        for name, weight in expected["weights"].items():
            assert torch.equal(weight, found["weights"][name]), name
        assert found["predictions"] == expected["predictions"]


@pytest.mark.long
def test_killed_stage_goes_on_and_ends_in_the_same_weights(cohort: Cohort, run_stage: Callable[..., Any]) -> None:
    cohort.size = 32
    add_studies(cohort, 14, slices=10)
    params = {**SMALL, "train__epochs": 4, "train__checkpoint_seconds": 0.05}
    make_store(cohort, **params)
    cohort.write_params(**params)
    assert run_stage("folds").code == 0
    assert run_stage("train").code == 0
    outputs = cohort.data / "train" / "fold-0"
    whole = torch.load(outputs / "model.pt", weights_only=True)["members"][0]
    predictions = (outputs / "predictions.parquet").read_bytes()
    assert not list((cohort.data / "wip" / "train").glob("*/")), "finished checkpoints are to be cleared away"
    (outputs / "model.pt").unlink()
    command = [sys.executable, "-m", "stages.train", "--params", str(cohort.folder / "params.yaml")]
    process = subprocess.Popen([*command, "--data", str(cohort.data)], cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list((cohort.data / "wip" / "train").glob("*/step-*.pt"))) < 2:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (outputs / "model.pt").exists(), "the run was to be killed half-way"
    resumed = run_stage("train")
    assert resumed.code == 0, resumed.err
    assert "going on in epoch" in resumed.out
    for name, weight in torch.load(outputs / "model.pt", weights_only=True)["members"][0].items():
        assert torch.equal(weight, whole[name]), name
    assert (outputs / "predictions.parquet").read_bytes() == predictions


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


def test_damaged_checkpoint_is_passed_over_whatever_byte_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"identity": {}, "step": step, "weights": torch.arange(40.0)})
    newest = tmp_path / "step-000000002.pt"
    content, rng = newest.read_bytes(), random.Random(0)
    for _ in range(200):
        damaged = bytearray(content[: rng.randrange(1, len(content))] if rng.random() < 0.5 else content)
        for _ in range(rng.randrange(1, 9)):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        newest.write_bytes(bytes(damaged))
        found = load_newest(tmp_path, {})
        assert found is not None
        assert found["step"] in (1, 2)
    assert "damaged, passed over" in capfd.readouterr().err


def test_checkpoint_of_other_parameters_is_refused_by_name(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"identity": {"fold": 0, "params": {"loss": {"focal_gamma": 2.0}, "epochs": 3}}})
    with pytest.raises(CheckpointError, match=r"made with params\.loss\.focal_gamma = 2\.0, this run has 0\.0"):
        load_newest(tmp_path, {"fold": 0, "params": {"loss": {"focal_gamma": 0.0}, "epochs": 3}})


def test_checkpoint_holds_all_that_a_run_goes_on_from(config: Config, store: Store, tmp_path: Path) -> None:
    train(config, store, tmp_path)
    (folder,) = tmp_path.glob("fold-0")
    kept = load_newest(folder, {})  # by weights_only=True
    assert kept is not None
    assert {"identity", "state", "network", "averaged", "optimizer", "scaler", "rng", "threads"} <= kept.keys()
    assert kept["identity"]["params"] == config.train.shaping()
    assert kept["identity"]["store_digest"] == store.digest
    assert kept["threads"] == torch.get_num_threads()


# ---- several processes


@pytest.mark.long
def test_two_processes_learn_as_one_with_the_same_batch(cohort: Cohort, run_stage: Callable[..., Any]) -> None:
    add_studies(cohort, 14)
    # 9 slices do not part evenly, and what is dropped out differs between processes
    params = {**SMALL, "train__batch_size": 9, "train__dropout": 0.0, "train__accumulate": 2, "train__snapshots": 2}
    del cohort.labels[next(iter(cohort.labels))]
    make_store(cohort, **params)
    cohort.write_params(**params)
    assert run_stage("folds").code == 0
    alone = run_stage("train")
    assert alone.code == 0, alone.err
    outputs = cohort.data / "train" / "fold-0"
    one = pd.read_csv(outputs / "history.csv"), pd.read_parquet(outputs / "predictions.parquet")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "stages.train", "--params", str(cohort.folder / "params.yaml")]
    done = subprocess.run(
        [*command, "--data", str(cohort.data)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "× 2 processes" in done.stdout
    two = pd.read_csv(outputs / "history.csv"), pd.read_parquet(outputs / "predictions.parquet")
    for column in ("train_loss", "valid_loss", "learning_rate"):
        np.testing.assert_allclose(one[0][column], two[0][column], rtol=2e-4)
    np.testing.assert_allclose(one[1][list(LABELS)], two[1][list(LABELS)], atol=1e-3)
    assert one[1]["image_id"].tolist() == two[1]["image_id"].tolist()


# ---- what comes out


def test_outputs_have_the_form_that_others_read(config: Config, store: Store, tmp_path: Path) -> None:
    result = train(config, store, tmp_path, fold=1)
    assert list(result.predictions) == ["image_id", "study_uid", "fold", *LABELS]
    held_out = split_slices(config, store, 1, deal_folds(config, store)).held_out
    assert result.predictions["image_id"].tolist() == store.image_id[held_out[:, 0], held_out[:, 1]].tolist()
    assert (result.predictions["fold"] == 1).all()
    assert result.predictions[list(LABELS)].to_numpy().min() > 0
    columns = ["epoch", "train_loss", "valid_loss", "learning_rate", "slices_per_s", "wait_share", "seconds"]
    assert list(result.history) == columns
    assert result.history["wait_share"].between(0, 1).all()
    assert result.summary["store_digest"] == store.digest
    assert result.summary["params"] == config.train.shaping()
    assert result.summary["best_valid_loss"] == result.history["valid_loss"].min()
    assert result.unlabelled.empty


def test_studies_without_labels_are_predicted_by_every_fold(cohort: Cohort, tmp_path: Path) -> None:
    add_studies(cohort, 12)
    for name in [name for name in cohort.labels if name.startswith("ID_00003")]:
        del cohort.labels[name]
    store, config = make_store(cohort, **SMALL), cohort.config(**SMALL)
    for fold in (0, 1):
        result = train(change(config, epochs=1), store, tmp_path, fold=fold)
        assert set(result.unlabelled["image_id"]) == {f"ID_00003{k:04x}" for k in range(5)}
        assert not set(result.predictions["image_id"]) & set(result.unlabelled["image_id"])
        assert (result.unlabelled["fold"] == fold).all()


@pytest.mark.parametrize("kind", ["gru", "transformer"])
def test_sequence_model_is_trained_on_what_the_network_sees(
    config: Config, store: Store, tmp_path: Path, kind: str
) -> None:
    sequence = config.train.sequence.model_copy(update={"kind": kind, "width": 16, "epochs": 3})
    config = change(config, epochs=1, sequence=sequence)
    torch.manual_seed(5)
    one = train(config, store, tmp_path / "a")
    torch.manual_seed(6)
    other = train(config, store, tmp_path / "b")
    same(one, other)
    assert one.sequence is not None
    assert one.sequence.best_loss <= one.summary["best_valid_loss"] + 1e-3, "the CNN alone is one of the choices"
    plain = train(change(config, sequence=sequence.model_copy(update={"kind": "none"})), store, tmp_path / "c")
    for name in LABELS:
        # float16 rounds nothing here: the CNN's own column comes from its logits
        np.testing.assert_allclose(one.predictions[f"cnn_{name}"], plain.predictions[name], atol=1e-6)


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
    store, config = make_store(cohort, **changes), cohort.config(**changes)
    result = train(config, store, tmp_path)
    study, number = split_slices(config, store, 0, deal_folds(config, store)).held_out.T
    assert roc_auc_score(store.labels[study, number, -1], result.predictions["any"]) > 0.95
    assert result.history["train_loss"].iloc[-1] < result.history["train_loss"].iloc[0]


def test_training_stops_early_and_keeps_the_best_epoch(
    config: Config, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([0.5, 0.4, 0.6, 0.7, 0.3])
    real = pipeline.trainer.hemorrhage_loss

    def scripted(logits: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        return real(logits, *rest, **more) if logits.requires_grad else torch.tensor(next(losses))

    monkeypatch.setattr(pipeline.trainer, "hemorrhage_loss", scripted)
    result = train(change(config, epochs=5, patience=2), store, tmp_path)
    assert len(result.history) == 4
    assert result.summary["best_epoch"] == 2
    assert result.summary["best_valid_loss"] == pytest.approx(0.4)


def test_snapshots_predict_by_the_mean_of_the_last_epochs(config: Config, store: Store, tmp_path: Path) -> None:
    config = change(config, snapshots=2)
    result = train(config, store, tmp_path)
    assert len(result.members) == 2
    slices = split_slices(config, store, 0, deal_folds(config, store)).held_out
    dataset = SliceDataset(store.reader, slices, store.labels[slices[:, 0], slices[:, 1]], neighbours=1)
    network, logits = build_model("compact", channels=9, dropout=0.0).eval(), []
    for weights in result.members:
        network.load_state_dict(weights)
        batches = Loader(dataset, workers=0).batches(name_batches(np.arange(len(slices)), batch_size=8))
        logits.append(predict(network, batches, device=torch.device("cpu"), precision=None, flips=False).logits_NL)
    assert not np.allclose(*logits, atol=1e-4), "two epochs are to differ"
    expected = torch.tensor(np.mean(logits, axis=0)).sigmoid().numpy()
    np.testing.assert_allclose(result.predictions[list(LABELS)], expected, atol=1e-6)


def test_flipped_prediction_does_not_tell_left_from_right() -> None:
    from pipeline.loader import Batch

    network = build_model("compact", channels=3, dropout=0.0).eval()
    slices = torch.randint(0, 255, (4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(4, len(LABELS), dtype=torch.int8)

    def logits(slices: torch.Tensor, *, flips: bool) -> np.ndarray:
        batches = [Batch(slices, labels)]
        return predict(network, batches, device=torch.device("cpu"), precision=None, flips=flips).logits_NL

    mirrored = slices.flip(2)
    assert not np.allclose(logits(slices, flips=False), logits(mirrored, flips=False), atol=1e-5)
    np.testing.assert_allclose(logits(slices, flips=True), logits(mirrored, flips=True), atol=1e-5)


def test_prediction_of_no_slice_is_empty() -> None:
    network = build_model("compact", channels=3, dropout=0.0).eval()
    seen = predict(network, [], device=torch.device("cpu"), precision=None, flips=False, with_features=True)
    assert seen.logits_NL.shape == (0, len(LABELS))
    assert seen.features_NF.shape == (0, network.feature_size)


def test_batches_reach_the_device_as_they_are() -> None:
    from pipeline.loader import Batch

    batch = Batch(torch.arange(24, dtype=torch.uint8).reshape(1, 2, 3, 4), torch.zeros(1, 6, dtype=torch.int8))
    (here,) = to_device([batch], torch.device("cpu"))
    assert torch.equal(here.slices_NRCX, batch.slices_NRCX)
    assert here.slices_NRCX.dtype == torch.uint8


# ---- how weights move


def test_cosine_warms_up_and_falls_to_zero(config: Config) -> None:
    train_config = config.train.model_copy(update={"learning_rate": 0.1, "epochs": 10, "warmup_epochs": 1.0})
    rates = [learning_rate_at(step, steps_an_epoch=10, config=train_config) for step in range(101)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[10] == max(rates) == pytest.approx(0.1)
    assert rates[100] == pytest.approx(0)
    assert np.all(np.diff(rates[10:]) < 0)


def test_step_decay_is_that_of_torch(config: Config) -> None:
    train_config = config.train.model_copy(
        update={"learning_rate": 0.1, "schedule": "step", "step_decay": 0.8, "warmup_epochs": 0.0}
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    theirs = torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.8)
    for step in range(23):
        ours = learning_rate_at(step, steps_an_epoch=5, config=train_config)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


def test_moving_average_is_that_of_torch() -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    ours = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    ours.load_state_dict(network.state_dict())
    average = MovingAverage(ours, network)
    theirs = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    theirs.update_parameters(network)  # the first only copies
    for step in range(1000, 1005):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        network(torch.randn(4, 3))
        average.update(step=step, decay=0.9)
        theirs.update_parameters(network)
    for name, value in ours.state_dict().items():
        if value.dtype.is_floating_point:
            torch.testing.assert_close(value, theirs.module.state_dict()[name])
        else:
            assert torch.equal(value, network.state_dict()[name])


def test_only_weights_decay(config: Config) -> None:
    network = build_model("compact", channels=3, dropout=0.0)
    decayed, kept = make_optimizer(network, config.train).param_groups
    assert decayed["weight_decay"] == config.train.weight_decay
    assert kept["weight_decay"] == 0
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(list(network.parameters()))


def test_mixup_keeps_at_least_half_and_is_a_function_of_its_place() -> None:
    assert draw_mixup(0.0, seed=0, epoch=0, batch=0) == 1.0
    shares = [draw_mixup(0.4, seed=0, epoch=epoch, batch=batch) for epoch in range(3) for batch in range(50)]
    assert all(0.5 <= share <= 1 for share in shares)
    assert len(set(shares)) == len(shares)
    assert draw_mixup(0.4, seed=0, epoch=1, batch=7) == shares[57]
    slices = torch.rand(3, 1, 2, 2)
    mixed = mix(slices, 0.75)
    torch.testing.assert_close(mixed[0], 0.75 * slices[0] + 0.25 * slices[2])
    torch.testing.assert_close(mixed[1], slices[1])


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_batches_step_as_one_does(
    config: Config, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    monkeypatch.setattr(SliceDataset, "__getitem__", _unchanged(SliceDataset.__getitem__))
    plain = change(config, dropout=0.0, batch_size=16, epochs=2)
    one = train(plain, store, tmp_path / "one")  # 30 slices: the last step is of 14
    small = change(plain, batch_size=16 // accumulate, accumulate=accumulate)
    other = train(small, store, tmp_path / "other")
    for name, weight in one.members[0].items():
        torch.testing.assert_close(weight, other.members[0][name], rtol=1e-3, atol=2e-4)
    for column in ("train_loss", "valid_loss", "learning_rate"):
        np.testing.assert_allclose(one.history[column], other.history[column], rtol=1e-4)


def test_bf16_learns_as_float32_does(config: Config, store: Store, tmp_path: Path) -> None:
    exact = train(change(config, dropout=0.0), store, tmp_path / "fp32")
    half = train(change(config, dropout=0.0, precision="bf16"), store, tmp_path / "bf16")
    assert not torch.equal(*(result.members[0]["head.weight"] for result in (exact, half))), "nothing was rounded"
    np.testing.assert_allclose(half.history["train_loss"], exact.history["train_loss"], rtol=0.03)
    assert half.predictions["any"].nunique() == len(half.predictions), "the head is to stay float32"


def _unchanged(real: Any) -> Any:
    """A dataset without random changes."""

    def read(self: SliceDataset, name: Any) -> Any:
        self._augment = None
        return real(self, name)

    return read


# ---- what goes wrong


def test_loss_that_is_no_number_names_its_batch_and_keeps_the_checkpoint(
    config: Config, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trainer._train_batch

    def spoil(self: Trainer, *arguments: Any) -> Any:
        loss = real(self, *arguments)
        return loss * float("nan") if (self.state.epoch, self.state.batch) == (1, 2) else loss

    monkeypatch.setattr(Trainer, "_train_batch", spoil)
    with pytest.raises(IchorError, match=r"the loss became nan in epoch 2 at batch 3 of 4 \(slices ID_") as caught:
        train(config, store, tmp_path)
    named = str(caught.value).split("(slices ")[1].split(" and ")[0].split(", ")
    slices = split_slices(config, store, 0, deal_folds(config, store)).training
    learning = set(store.image_id[slices[:, 0], slices[:, 1]].tolist())
    assert len(named) == 6
    assert set(named) <= learning
    (folder,) = tmp_path.glob("fold-0")
    kept = load_newest(folder, {})
    assert kept is not None
    assert kept["state"]["epoch"] == 1
    assert all(torch.isfinite(weight).all() for weight in kept["network"].values())


def test_gradient_that_is_no_number_stops_before_it_is_saved(
    config: Config, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trainer._step

    def spoil(self: Trainer) -> None:
        if self.state.step == 5:
            next(self.network.parameters()).grad.fill_(math.inf)  # type: ignore[union-attr]
        real(self)

    monkeypatch.setattr(Trainer, "_step", spoil)
    with pytest.raises(IchorError, match=r"the gradient became (inf|nan) in epoch 2 at batch 2 of 4"):
        train(change(config, checkpoint_seconds=1e-9), store, tmp_path)
    (folder,) = tmp_path.glob("fold-0")
    kept = load_newest(folder, {})
    assert kept is not None
    assert kept["state"]["step"] == 5
    assert all(torch.isfinite(weight).all() for weight in kept["network"].values())


def test_full_memory_says_which_parameters_to_lower(
    config: Config, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Trainer, "_train_batch", full)
    with pytest.raises(IchorError, match=r"memory is full \(CUDA out of memory.*Lower train\.batch_size \(now 8;"):
        train(config, store, tmp_path)


def test_weights_that_know_the_held_out_patients_are_refused(config: Config, store: Store, tmp_path: Path) -> None:
    short = change(config, epochs=1)
    result = train(short, store, tmp_path, fold=1)
    path = tmp_path / "model.pt"
    write_tensors(path, {"members": result.members, **result.summary})
    with pytest.raises(ConfigError, match="a model of fold 1 of this very store has learnt from patients whom fold 0"):
        train(change(short, pretrained=str(path)), store, tmp_path / "leak", fold=0)
    again = train(change(short, pretrained=str(path)), store, tmp_path / "again", fold=1)
    assert again.summary["params"]["pretrained"] == str(path)
    write_tensors(path, {"members": result.members, **result.summary, "store_digest": "another"})
    train(change(short, pretrained=str(path)), store, tmp_path / "other", fold=0)


def test_unfinished_run_of_other_parameters_is_refused_by_name(config: Config, store: Store, tmp_path: Path) -> None:
    train(change(config, epochs=1), store, tmp_path)
    with pytest.raises(CheckpointError, match=r"params\.weight_decay = 0\.02, this run has 0\.5"):
        train(change(config, epochs=1, weight_decay=0.5), store, tmp_path)


def test_full_disk_is_said_in_words(tmp_path: Path) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    script = (
        "import sys, torch, pathlib, pipeline.files as files\n"
        "files.is_disk_full = lambda error: True\n"  # at the limit of a file's size, instead of the disk's
        "from pipeline.checkpoint import save_checkpoint\n"
        "try:\n    save_checkpoint(pathlib.Path(sys.argv[1]), 1, {'weights': torch.zeros(9999)})\n"
        "except files.IchorError as error:\n    print('said:', error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT,
        preexec_fn=limited,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("said:"), done.stderr
    assert not list(tmp_path.iterdir())


def test_store_without_labels_is_refused(cohort: Cohort, run_stage: Callable[..., Any]) -> None:
    for number in range(3):
        cohort.add_study(number, 2)
    make_store(cohort, source__labels=str(ROOT / "data" / "unlabelled.csv"))
    ran = run_stage("folds")
    assert ran.code == 1
    assert "label" in ran.err
    ran = run_stage("train")
    assert ran.code == 1
    assert "stages.folds" in ran.err


def test_absent_device_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.device = 'quantum'"):
        choose_device("quantum")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="set it to auto or cpu"):
            choose_device("cuda")


def test_fold_that_does_not_exist_is_refused(config: Config, run_stage: Callable[..., Any]) -> None:
    assert run_stage("folds").code == 0
    ran = run_stage("train", "--fold", "9")
    assert ran.code == 2
    assert "folds.count = 3 makes folds 0 to 2" in ran.err
