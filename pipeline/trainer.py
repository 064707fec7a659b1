"""The run: one fold of the CNN, from the store to out-of-fold predictions.

Patients are held apart three ways: those that the network learns from, a few of the training side that decide when to stop,
and the held-out fold, which is looked at once, at the end. The run's state is small and explicit, so that a killed run goes
on from its newest checkpoint and, on the CPU, ends in the same weights bit for bit.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from pipeline import augment, folds, loader, loss, model, parts
from pipeline.checkpoint import load_newest, save_checkpoint
from pipeline.config import Config, TrainConfig
from pipeline.device import choose_device, choose_precision
from pipeline.errors import IchorError
from pipeline.labels import LABELS
from pipeline.loader import Batch, Loader, SliceDataset, epoch_order, name_batches
from pipeline.loss import hemorrhage_loss
from pipeline.model import build_model
from pipeline.parts import HELD_OUT, TRAINING, VALIDATION, FoldSlices, split_slices
from pipeline.progress import Progress
from pipeline.store import Store

CHECK_EVERY = 20
"""Batches between two looks at the loss: reading it makes a GPU wait."""


@dataclass
class RunState:
    """Where a run stands, beside the tensors: what a checkpoint holds in plain numbers."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    best_loss: float = math.inf
    best_epoch: int = -1
    epoch_seconds: float = 0.0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class FoldResult:
    """What training a fold gives."""

    weights: dict[str, Tensor]
    predictions: pd.DataFrame
    history: pd.DataFrame
    summary: dict[str, Any]


def train_fold(config: Config, store: Store, fold: int, *, wip: Path) -> FoldResult:
    """Train one fold, or go on with it, and predict its held-out slices.

    Args:
        config: the parameters.
        store: the opened store.
        fold: its number.
        wip: folder for checkpoints; the fold's own is below it, named by fingerprint.

    Raises:
        IchorError: too few patients or labels, a loss that is no number, or a device that is not there.
    """
    identity = describe_run(config, store, fold)
    folder = wip / f"fold-{fold}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    slices = split_slices(config, store, fold)
    return Trainer(config.train, store, slices, identity=identity, folder=folder).run()


def describe_run(config: Config, store: Store, fold: int) -> dict[str, Any]:
    """All that decides a fold's weights; plain values, so that a checkpoint can hold and compare it."""
    digest = hashlib.sha256()
    for module in (augment, folds, loader, loss, model, parts):
        digest.update(Path(str(module.__file__)).read_bytes())
    digest.update(Path(__file__).read_bytes())
    return {
        "fold": fold,
        "store_digest": store.digest,
        "params": config.train.shaping(),
        "folds_params": config.folds.model_dump(),
        "torch": str(torch.__version__),
        "code": digest.hexdigest()[:16],
    }


def learning_rate_at(step: int, *, steps: int, warmup_steps: int, peak: float) -> float:
    """Linear warm-up, then half a cosine to zero (Loshchilov & Hutter 2017, SGDR, without restarts)."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Trainer:
    """Holds the state of one fold's run."""

    def __init__(
        self, config: TrainConfig, store: Store, slices: FoldSlices, *, identity: dict[str, Any], folder: Path
    ) -> None:
        self.config, self.store, self.slices = config, store, slices
        self.identity, self.folder = identity, folder
        self.device = choose_device(config.device)
        self.precision = choose_precision(config.precision, self.device)
        self.state = RunState()
        self.batches = math.ceil(len(slices.training) / config.batch_size)
        self.steps = math.ceil(self.batches / config.accumulate) * config.epochs
        torch.manual_seed(config.seed)
        channels = len(store.windows) * (2 * config.neighbours + 1)
        network = build_model(config.model, channels=channels, dropout=config.dropout, pretrained=config.pretrained)
        # channels_last: the store's own order of bytes, and what convolutions on CPUs and tensor cores want.
        self.network: nn.Module = network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.averaged: nn.Module = copy.deepcopy(self.network).eval()
        self.forward = torch.compile(self.network) if config.compile else self.network
        self.best: dict[str, Tensor] = {}
        self.optimizer = torch.optim.AdamW(self._parameter_groups(), lr=config.learning_rate)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision is torch.float16)
        self.mean_loss = math.nan
        self.saved_s = time.monotonic()

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Weight decay on weights alone: on biases and norms it only fights what they are for."""
        matrices = [parameter for parameter in self.network.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in self.network.parameters() if parameter.ndim <= 1]
        return [
            {"params": matrices, "weight_decay": self.config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]

    def run(self) -> FoldResult:
        """Train to the last epoch or until the validation loss no longer falls, then predict the held-out slices."""
        self._resume()
        self._describe()
        training = Loader(
            self._dataset(self.slices.training, augmented=True),
            workers=self.config.loader_workers,
            pin=self.device.type == "cuda",
        )
        total = len(self.slices.training) * self.config.epochs
        done = self.state.epoch * len(self.slices.training) + self.state.batch * self.config.batch_size
        with Progress(total, what=f"train fold {self.identity['fold']}", unit="slices", done=done) as progress:
            while not self._is_finished():
                self._train_epoch(training, progress)
                self._end_epoch()
        training.close()
        return self._result()

    def _is_finished(self) -> bool:
        waited = self.state.epoch - 1 - self.state.best_epoch
        return self.state.epoch >= self.config.epochs or (self.state.epoch > 0 and waited >= self.config.patience)

    def _describe(self) -> None:
        patients = self.slices.patients
        precision = str(self.precision or torch.float32).removeprefix("torch.")
        begun = f", going on in epoch {self.state.epoch + 1} at batch {self.state.batch}" if self.state.step else ""
        print(
            f"train: fold {self.identity['fold']}, {self.config.model} "
            f"({sum(p.numel() for p in self.network.parameters()):,} parameters) on {self.device}, {precision}; "
            f"{len(self.slices.training):,} slices of {patients[TRAINING]:,} patients to learn from, "
            f"{len(self.slices.validation):,} of {patients[VALIDATION]:,} to stop by, "
            f"{len(self.slices.held_out):,} of {patients[HELD_OUT]:,} held out{begun}",
            flush=True,
        )

    def _dataset(self, slices: npt.NDArray[np.int64], *, augmented: bool) -> SliceDataset:
        return SliceDataset(
            self.store.reader,
            slices,
            self.store.labels[slices[:, 0], slices[:, 1]],
            neighbours=self.config.neighbours,
            augment=self.config.augment if augmented else None,
            seed=self.config.seed,
        )

    def _train_epoch(self, training: Loader, progress: Progress) -> None:
        state, config = self.state, self.config
        order = epoch_order(len(self.slices.training), seed=config.seed, epoch=state.epoch)
        names = name_batches(order, batch_size=config.batch_size, epoch=state.epoch, first=state.batch)
        self.network.train()
        started_s = time.monotonic()
        loss_sum = torch.tensor(state.loss_sum, dtype=torch.float64, device=self._sum_device())
        for batch in training.batches(names):
            loss_value = self._train_batch(batch)
            count = len(batch.labels_NL)
            loss_sum += loss_value.detach().to(loss_sum) * count
            state.loss_count += count
            state.batch += 1
            if self.device.type == "cpu" or state.batch % CHECK_EVERY == 0 or state.batch == self.batches:
                state.loss_sum = self._finite(loss_sum.item())
                self.mean_loss = state.loss_sum / state.loss_count
            progress.advance(count, self._note())
            # Between two steps of the optimiser there are gradients that a checkpoint does not hold.
            if self._ends_step(state.batch) and time.monotonic() - self.saved_s > config.checkpoint_seconds:
                state.loss_sum = self._finite(loss_sum.item())
                state.epoch_seconds += time.monotonic() - started_s
                started_s = time.monotonic()
                self._save()
        state.epoch_seconds += time.monotonic() - started_s

    def _sum_device(self) -> torch.device:
        return torch.device("cpu") if self.device.type == "mps" else self.device  # mps has no float64

    def _note(self) -> str:
        state = self.state
        valid = f", valid {state.history[-1]['valid_loss']:.4f}" if state.history else ""
        return f"epoch {state.epoch + 1}/{self.config.epochs}, loss {self.mean_loss:.4f}{valid}"

    def _train_batch(self, batch: Batch) -> Tensor:
        """One batch; the optimiser steps after every `accumulate` of them, and after the last of an epoch."""
        state, config = self.state, self.config
        logits_NL = self._logits(self.forward, batch)
        loss_value = hemorrhage_loss(logits_NL, batch.labels_NL.to(self.device), config.loss)
        self.scaler.scale(loss_value / config.accumulate).backward()
        if self._ends_step(state.batch + 1):
            self._step()
        return loss_value

    def _ends_step(self, batches: int) -> bool:
        """Whether the optimiser steps after so many batches of an epoch."""
        return batches % self.config.accumulate == 0 or batches == self.batches

    def _step(self) -> None:
        state, config = self.state, self.config
        warmup_steps = int(config.warmup_epochs * self.steps / config.epochs)
        rate = learning_rate_at(state.step, steps=self.steps, warmup_steps=warmup_steps, peak=config.learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.network.parameters(), config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        self._average_weights()

    @torch.no_grad()
    def _average_weights(self) -> None:
        """Exponential moving average of the weights; at first over a shorter time, as the first weights are noise."""
        decay = min(self.config.ema_decay, (1 + self.state.step) / (10 + self.state.step))
        for mean, now in zip(self.averaged.state_dict().values(), self.network.state_dict().values(), strict=True):
            if mean.dtype.is_floating_point:
                mean.lerp_(now, 1 - decay)
            else:
                mean.copy_(now)

    def _logits(self, network: nn.Module | Any, batch: Batch) -> Tensor:
        """uint8 across the bus, scaled to 0…1 on the device."""
        slices_NRCX = batch.slices_NRCX.to(self.device, non_blocking=True)
        slices_NXRC = slices_NRCX.permute(0, 3, 1, 2).float().div_(255)
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
            logits_NL: Tensor = network(slices_NXRC)
        return logits_NL.float()

    @torch.inference_mode()
    def _predict(self, network: nn.Module, slices: npt.NDArray[np.int64]) -> Tensor:
        """Logits of slices in their order: float32 [slice, label], on the CPU."""
        loader = Loader(self._dataset(slices, augmented=False), workers=0)
        names = name_batches(np.arange(len(slices)), batch_size=self.config.batch_size)
        parts = [self._logits(network, batch).cpu() for batch in loader.batches(names)]
        return torch.cat(parts) if parts else torch.empty(0, len(LABELS))

    def _end_epoch(self) -> None:
        state = self.state
        started_s = time.monotonic()
        labels_NL = torch.from_numpy(self.store.labels[self.slices.validation[:, 0], self.slices.validation[:, 1]])
        logits_NL = self._predict(self.averaged, self.slices.validation)
        valid_loss = self._finite(
            hemorrhage_loss(logits_NL, labels_NL, self.config.loss.model_copy(update={"label_smoothing": 0.0})).item()
        )
        state.seconds += state.epoch_seconds + time.monotonic() - started_s
        state.history.append(
            {
                "epoch": state.epoch + 1,
                "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
                "train_loss": state.loss_sum / state.loss_count,
                "valid_loss": valid_loss,
                "slices_per_s": round(state.loss_count / max(1e-9, state.epoch_seconds), 1),
                "seconds": round(state.seconds, 1),
            }
        )
        if valid_loss < state.best_loss:
            state.best_loss, state.best_epoch = valid_loss, state.epoch
            self.best = {name: value.detach().cpu().clone() for name, value in self.averaged.state_dict().items()}
        state.epoch += 1
        state.batch, state.loss_sum, state.loss_count, state.epoch_seconds = 0, 0.0, 0, 0.0
        self._save()

    def _finite(self, value: float) -> float:
        if not math.isfinite(value):
            raise IchorError(
                f"train: the loss became {value} in epoch {self.state.epoch + 1} before batch {self.state.batch + 1}; the last good "
                f"checkpoint is kept. Lower train.learning_rate or train.clip_norm, or set train.precision to fp32"
            )
        return value

    def _save(self) -> None:
        content = {
            "identity": self.identity,
            "state": {**self.state.__dict__, "history": list(self.state.history)},
            "network": self.network.state_dict(),
            "averaged": self.averaged.state_dict(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "device_rng": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
            "threads": torch.get_num_threads(),
        }
        # Two positions can share a step (accumulation): count batches, which only grow.
        save_checkpoint(self.folder, self.state.epoch * self.batches + self.state.batch, content)
        self.saved_s = time.monotonic()

    def _resume(self) -> None:
        content = load_newest(self.folder, self.identity)
        if content is None:
            return
        self.state = RunState(**content["state"])
        self.network.load_state_dict(content["network"])
        self.averaged.load_state_dict(content["averaged"])
        self.best = content["best"]
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        torch.set_rng_state(content["rng"])
        if self.device.type == "cuda" and content["device_rng"] is not None:
            torch.cuda.set_rng_state(content["device_rng"])
        torch.set_num_threads(content["threads"])  # the number of threads changes the order of sums, so the weights

    def _result(self) -> FoldResult:
        state, slices = self.state, self.slices
        self.averaged.load_state_dict(self.best)
        probabilities_NL = self._predict(self.averaged, slices.held_out).sigmoid().numpy()
        study, slice_number = slices.held_out.T
        predictions = pd.DataFrame(
            {
                "image_id": self.store.image_id[study, slice_number].astype(str),
                "study_uid": self.store.study[study].astype(str),
                "fold": np.full(len(study), self.identity["fold"], np.int16),
                **{name: probabilities_NL[:, number] for number, name in enumerate(LABELS)},
            }
        )
        summary = {
            **self.identity,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "parameters": sum(parameter.numel() for parameter in self.network.parameters()),
            "epochs": state.epoch,
            "best_epoch": state.best_epoch + 1,
            "best_valid_loss": state.best_loss,
            "seconds": round(state.seconds, 1),
            "train_slices": len(slices.training),
            "valid_slices": len(slices.validation),
            "held_out_slices": len(slices.held_out),
            "train_patients": slices.patients[TRAINING],
            "valid_patients": slices.patients[VALIDATION],
            "held_out_patients": slices.patients[HELD_OUT],
        }
        return FoldResult(self.best, predictions, pd.DataFrame(state.history), summary)
