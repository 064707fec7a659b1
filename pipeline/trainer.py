"""The CNN's run over one fold: epochs, steps of the optimiser, and checkpoints from which a killed run goes on.

Patients are held apart three ways: those that the network learns from, a few of the training side that decide when to stop,
and the held-out fold, which is looked at once, at the end. The run's state is small and explicit, so that a killed run goes
on from its newest checkpoint and, on the CPU, ends in the same weights bit for bit.
"""

from __future__ import annotations

import copy
import io
import math
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.checkpoint import load_newest, save_checkpoint
from pipeline.config import TrainConfig
from pipeline.device import choose_device, choose_precision
from pipeline.errors import IchorError
from pipeline.inference import Seen, predict, scale, to_device
from pipeline.live import Live
from pipeline.loader import Batch, Loader, SliceDataset, epoch_order, name_batches
from pipeline.loss import METRIC, hemorrhage_loss
from pipeline.model import build_model
from pipeline.optimise import MovingAverage, draw_mixup, learning_rate_at, make_optimizer, mix
from pipeline.parts import HELD_OUT, TRAINING, VALIDATION, FoldSlices
from pipeline.processes import Processes
from pipeline.progress import Progress
from pipeline.store import Store

LOOK_EVERY = 20
"""Batches between two looks at the loss on a GPU: each makes it wait."""

LIVE_INTERVAL_S = 10.0
"""Seconds between two points of the live curves."""

NAMED_SLICES = 6
"""Slices of a bad batch that an error names."""

Weights = dict[str, Tensor]
Slices = npt.NDArray[np.int64]
"""int64 [n, 2]: study and slice number."""


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
    wait_seconds: float = 0.0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


class Trainer:
    """Holds the state of one fold's run.

    Args:
        config: the parameters.
        store: the opened store.
        slices: who learns, and who decides when to stop.
        identity: all that decides the weights; a checkpoint of another one is refused.
        folder: where checkpoints lie.
        processes: the others that share the work.
        live: the project's folder of live curves, or None.
    """

    def __init__(
        self,
        config: TrainConfig,
        store: Store,
        slices: FoldSlices,
        *,
        identity: dict[str, Any],
        folder: Path,
        processes: Processes,
        live: Path | None = None,
    ) -> None:
        self.config, self.store, self.slices = config, store, slices
        self.identity, self.folder, self.processes, self.live_folder = identity, folder, processes, live
        self.device = choose_device(config.device, local_rank=processes.local_rank)
        self.precision = choose_precision(config.precision, self.device)
        self.state = RunState()
        self.labels_NL = store.labels[slices.training[:, 0], slices.training[:, 1]]
        self.slices_an_epoch = len(self._order(0))
        self.batches = math.ceil(self.slices_an_epoch / config.batch_size)
        self.steps_an_epoch = math.ceil(self.batches / config.accumulate)
        torch.manual_seed(config.seed)
        channels = len(store.windows) * (2 * config.neighbours + 1)
        network = build_model(config.model, channels=channels, dropout=config.dropout, pretrained=config.pretrained)
        # channels_last: the store's own order of bytes, and what convolutions on CPUs and tensor cores want.
        self.network = network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.averaged = copy.deepcopy(self.network).eval()
        # not dynamic: else an epoch's short last batch would slow every batch after it
        forward: Any = torch.compile(self.network, dynamic=False) if config.compile else self.network
        self.forward = processes.wrap(forward, self.device)
        self.average = MovingAverage(self.averaged, self.network)
        self.newest: list[Weights] = []
        """Of the last epochs, as many as `snapshots`."""
        self.members: list[Weights] = []
        """Those of them when the best epoch had ended, the best last: whose predictions are averaged."""
        self.optimizer = make_optimizer(self.network, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision is torch.float16)
        self.grad_norm = torch.zeros((), device=self.device)
        self.live: Live | None = None
        self.mean_loss = math.nan
        self.saved_s = self.shown_s = time.monotonic()
        if processes.count > 1:
            torch.manual_seed(config.seed + processes.rank)  # each drops out other features

    def run(self) -> None:
        """Train to the last epoch, or until the validation loss no longer falls."""
        self._resume()
        self._describe()
        pin, workers = self.device.type == "cuda", self.config.loader_workers
        training = Loader(self._dataset(self.slices.training, augmented=True), workers=workers, pin=pin)
        watching = Loader(self._dataset(self._share(self.slices.validation)), workers=workers, pin=pin)
        total = self.slices_an_epoch * self.config.epochs
        done = self.state.epoch * self.slices_an_epoch + self.state.batch * self.config.batch_size
        if self.live_folder:
            self.live = Live(self.live_folder, name=f"fold-{self.identity['fold']}", step=self.state.step)
        try:
            with Progress(total, what=self._name, unit="slices", done=done, stream=self._stream()) as progress:
                while not self._is_finished():
                    self._train_epoch(training, progress)
                    self._end_epoch(watching)
        finally:
            training.close()
            watching.close()

    @property
    def _name(self) -> str:
        return f"train fold {self.identity['fold']}"

    def _stream(self) -> Any:
        return sys.stderr if self.processes.is_first else io.StringIO()

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        config = self.config
        return epoch_order(self.labels_NL, seed=config.seed, epoch=epoch, sampling=config.sampling)

    def _is_finished(self) -> bool:
        waited = self.state.epoch - 1 - self.state.best_epoch
        return self.state.epoch >= self.config.epochs or (self.state.epoch > 0 and waited >= self.config.patience)

    def _describe(self) -> None:
        if not self.processes.is_first:
            return
        patients = self.slices.patients
        precision = str(self.precision or torch.float32).removeprefix("torch.")
        together = f" × {self.processes.count} processes" if self.processes.count > 1 else ""
        begun = f", going on in epoch {self.state.epoch + 1} at batch {self.state.batch}" if self.state.step else ""
        print(
            f"train: fold {self.identity['fold']}, {self.config.model} "
            f"({sum(p.numel() for p in self.network.parameters()):,} parameters) on {self.device}{together}, {precision}; "
            f"{len(self.slices.training):,} slices of {patients[TRAINING]:,} patients to learn from, "
            f"{len(self.slices.validation):,} of {patients[VALIDATION]:,} to stop by, "
            f"{len(self.slices.held_out):,} of {patients[HELD_OUT]:,} held out{begun}",
            flush=True,
        )

    def _dataset(self, slices: Slices, *, augmented: bool = False) -> SliceDataset:
        return SliceDataset(
            self.store.reader,
            slices,
            self.store.labels[slices[:, 0], slices[:, 1]],
            neighbours=self.config.neighbours,
            augment=self.config.augment if augmented else None,
            seed=self.config.seed,
        )

    def _share(self, slices: Slices) -> Slices:
        """This process's share of slices that are to be predicted."""
        return np.array_split(slices, self.processes.count)[self.processes.rank]

    def _train_epoch(self, training: Loader, progress: Progress) -> None:
        state, config = self.state, self.config
        order = self._order(state.epoch)
        names = name_batches(
            order,
            batch_size=config.batch_size,
            epoch=state.epoch,
            first=state.batch,
            share=(self.processes.rank, self.processes.count),
        )
        self.network.train()
        pending: list[Tensor] = []
        self.since_s = time.monotonic()
        for batch in self._waited_for(to_device(training.batches(names), self.device)):
            numbers = order[state.batch * config.batch_size : (state.batch + 1) * config.batch_size]
            pending.append(self._train_batch(batch, self.labels_NL[self._of_step(order, state.batch)]).detach())
            state.batch += 1
            # Between two steps of the optimiser there are gradients that a checkpoint does not hold.
            is_due = self.device.type == "cpu" or len(pending) >= LOOK_EVERY or state.batch == self.batches
            if is_due and self._ends_step(state.batch):
                self._look(order, pending)
                pending = []
            progress.advance(len(numbers), self._note())

    def _waited_for(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, with the time that was spent waiting for them counted."""
        while True:
            started_s = time.monotonic()
            batch = next(batches, None)
            self.state.wait_seconds += time.monotonic() - started_s
            if batch is None:
                return
            yield batch

    def _note(self) -> str:
        state = self.state
        valid = f", valid {state.history[-1]['valid_loss']:.4f}" if state.history else ""
        loss = "" if math.isnan(self.mean_loss) else f", loss {self.mean_loss:.4f}"  # a GPU is not asked at each batch
        return f"epoch {state.epoch + 1}/{self.config.epochs}{loss}{valid}"

    def _of_step(self, order: npt.NDArray[np.int64], batch: int) -> npt.NDArray[np.int64]:
        """The slices of all batches between two steps of the optimiser, this batch among them."""
        size = self.config.batch_size * self.config.accumulate
        first = batch // self.config.accumulate * size
        return order[first : first + size]

    def _train_batch(self, batch: Batch, whole_NL: npt.NDArray[np.int8]) -> Tensor:
        """One batch, or this process's share of it; the optimiser steps after every `accumulate` of them, and after the last
        of an epoch.

        Args:
            batch: on the device.
            whole_NL: the labels of all slices of the step, all processes' together.

        Returns:
            The batch's share of the step's loss.
        """
        state, config, labels_NL = self.state, self.config, batch.labels_NL
        kept = draw_mixup(config.mixup, seed=config.seed, epoch=state.epoch, batch=state.batch)
        is_shared = self.processes.count > 1 or config.accumulate > 1
        whole = torch.from_numpy(whole_NL) if is_shared else None
        ends_step = self._ends_step(state.batch + 1)
        with nullcontext() if ends_step or self.processes.count == 1 else self.forward.no_sync():  # type: ignore[operator]
            with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
                logits_NL = self.forward(mix(scale(batch.slices_NRCX), kept))
            loss = hemorrhage_loss(logits_NL, labels_NL, config.loss, whole_NL=whole)
            if kept < 1:
                other = hemorrhage_loss(logits_NL, labels_NL.flip(0), config.loss, whole_NL=whole)
                loss = kept * loss + (1 - kept) * other
            # the processes' gradients are averaged, and their shares of the loss add up
            self.scaler.scale(loss * self.processes.count).backward()
        if ends_step:
            self._step()
        return loss

    def _ends_step(self, batches: int) -> bool:
        """Whether the optimiser steps after so many batches of an epoch."""
        return batches % self.config.accumulate == 0 or batches == self.batches

    def _step(self) -> None:
        state, config = self.state, self.config
        rate = learning_rate_at(state.step, steps_an_epoch=self.steps_an_epoch, config=config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.unscale_(self.optimizer)
        self.grad_norm = nn.utils.clip_grad_norm_(self.network.parameters(), config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        self.average.update(step=state.step, decay=config.ema_decay)

    def _look(self, order: npt.NDArray[np.int64], pending: list[Tensor]) -> None:
        """Take the losses of the batches since the last look off the device; stop at a bad one; save now and then."""
        state, size = self.state, self.config.batch_size
        now_s = time.monotonic()
        wants_save = self.processes.is_first and now_s - self.saved_s > self.config.checkpoint_seconds
        # fp16's own scaler skips steps whose gradients overflow
        norm = torch.zeros_like(self.grad_norm) if self.scaler.is_enabled() else self.grad_norm
        shares = torch.stack(
            [*pending, norm.to(pending[0]) / self.processes.count, torch.tensor(float(wants_save)).to(pending[0])]
        )
        *losses, norm_value, save = self.processes.sum(shares).tolist()
        first = state.batch - len(losses)
        for number, loss in enumerate(losses, start=first):
            numbers = order[number * size : (number + 1) * size]
            is_last = number == state.batch - 1
            if not math.isfinite(loss):
                raise self._diverged("loss", loss, number, numbers)
            if is_last and not math.isfinite(norm_value):
                raise self._diverged("gradient", norm_value, number, numbers)
            state.loss_sum += loss * len(self._of_step(order, number))
            state.loss_count += len(numbers)
        self.mean_loss = state.loss_sum / state.loss_count
        state.epoch_seconds += now_s - self.since_s
        self.since_s = now_s
        self._show()
        if save:
            self._save()
            self.since_s = time.monotonic()

    def _show(self) -> None:
        """A point of the live curves, now and then."""
        if self.live is None or time.monotonic() - self.shown_s < LIVE_INTERVAL_S:
            return
        self.shown_s = time.monotonic()
        self.live.log(self.state.step, "running", train_loss=self.mean_loss, **self._pace())

    def _pace(self) -> dict[str, float]:
        state = self.state
        seconds = max(1e-9, state.epoch_seconds)
        return {
            "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
            "slices_per_s": round(state.loss_count / seconds, 1),
            "wait_share": round(min(1.0, state.wait_seconds / seconds), 4),
        }

    def see(self, loader: Loader, total: int, *, with_features: bool = False, progress: Progress | None = None) -> Seen:
        """What the averaged network says of slices: of all processes' in the first, of its own share in any other."""
        names = name_batches(np.arange(len(loader.dataset)), batch_size=self.config.batch_size)
        batches = loader.batches(names)
        if progress:
            batches = _counted(batches, progress)
        seen = predict(
            self.averaged,
            batches,
            device=self.device,
            precision=self.precision,
            flips=self.config.test_flips,
            with_features=with_features,
        )
        counts = [len(share) for share in np.array_split(np.arange(total), self.processes.count)]
        parts = (self.processes.gather_rows(torch.from_numpy(part), counts).numpy() for part in seen)
        return Seen(*parts) if with_features else Seen(next(parts), seen.features_NF)

    def see_slices(self, slices: Slices, *, with_features: bool = False) -> Seen:
        """What the network says of slices, for good: the mean logits of all members, and the best one's features."""
        share = self._share(slices)
        loader = Loader(self._dataset(share), workers=self.config.loader_workers, pin=self.device.type == "cuda")
        what = f"predict fold {self.identity['fold']}"
        logits = []
        try:
            with Progress(len(share) * len(self.members), what=what, unit="slices", stream=self._stream()) as progress:
                for weights in self.members:
                    self.averaged.load_state_dict(weights)
                    seen = self.see(loader, len(slices), with_features=with_features, progress=progress)
                    logits.append(seen.logits_NL)
        finally:
            loader.close()
        return seen._replace(logits_NL=np.mean(logits, axis=0, dtype=np.float32))

    def _validate(self, watching: Loader) -> float:
        """The challenge's metric on the patients that decide when to stop; one figure for all processes."""
        valid = self.slices.validation
        seen = self.see(watching, len(valid))
        if not self.processes.is_first:
            return float(self.processes.share_from_first(None))
        labels_NL = torch.from_numpy(self.store.labels[valid[:, 0], valid[:, 1]])
        loss = hemorrhage_loss(torch.from_numpy(seen.logits_NL), labels_NL, METRIC).item()
        return float(self.processes.share_from_first(loss))

    def _end_epoch(self, watching: Loader) -> None:
        state = self.state
        started_s = time.monotonic()
        self.processes.share_buffers(self.averaged)
        valid_loss = self._validate(watching)
        if not math.isfinite(valid_loss):
            raise IchorError(f"train: the validation loss became {valid_loss} in epoch {state.epoch + 1}; {WAY_OUT}")
        state.seconds += state.epoch_seconds + time.monotonic() - started_s
        losses = {"train_loss": state.loss_sum / state.loss_count, "valid_loss": valid_loss}
        figures = {"epoch": state.epoch + 1, **losses, **self._pace(), "seconds": round(state.seconds, 1)}
        state.history.append(figures)
        if self.live:
            self.live.log(state.step, "epoch", **figures)
        weights = {name: value.detach().cpu().clone() for name, value in self.averaged.state_dict().items()}
        self.newest = [*self.newest, weights][-self.config.snapshots :]
        if valid_loss < state.best_loss:
            state.best_loss, state.best_epoch, self.members = valid_loss, state.epoch, list(self.newest)
        state.epoch += 1
        state.batch, state.loss_sum, state.loss_count = 0, 0.0, 0
        state.epoch_seconds = state.wait_seconds = 0.0
        self._save()

    def _diverged(self, what: str, value: float, batch: int, numbers: npt.NDArray[np.int64]) -> IchorError:
        study, slice_number = self.slices.training[numbers[:NAMED_SLICES]].T
        names = ", ".join(self.store.image_id[study, slice_number].tolist())
        more = f" and {len(numbers) - NAMED_SLICES} more" if len(numbers) > NAMED_SLICES else ""
        return IchorError(
            f"train: the {what} became {value} in epoch {self.state.epoch + 1} at batch {batch + 1} of {self.batches} "
            f"(slices {names}{more}); {WAY_OUT}"
        )

    def _save(self) -> None:
        rng = {
            "cpu": torch.get_rng_state(),
            "device": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        rngs = self.processes.gather(rng)
        if self.processes.is_first:
            content = {
                "identity": self.identity,
                "state": {**self.state.__dict__, "history": list(self.state.history)},
                "network": self.network.state_dict(),
                "averaged": self.averaged.state_dict(),
                "newest": self.newest,
                "members": self.members,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "rng": rngs,
                "threads": torch.get_num_threads(),
            }
            # Two positions can share a step (accumulation): count batches, which only grow.
            save_checkpoint(self.folder, self.state.epoch * self.batches + self.state.batch, content)
        self.saved_s = time.monotonic()

    def _resume(self) -> None:
        first = self.processes.is_first
        content = self.processes.share_from_first(load_newest(self.folder, self.identity) if first else None)
        if content is None:
            return
        self.state = RunState(**content["state"])
        self.network.load_state_dict(content["network"])
        self.averaged.load_state_dict(content["averaged"])
        self.newest, self.members = content["newest"], content["members"]
        self.optimizer.load_state_dict(content["optimizer"])
        for group in self.optimizer.param_groups:
            group["fused"] = self.device.type == "cuda"  # whatever it was where the checkpoint was made
        self.scaler.load_state_dict(content["scaler"])
        if len(content["rng"]) == self.processes.count:
            torch.set_num_threads(content["threads"])  # the number of threads changes the order of sums, so the weights
        if self.processes.rank < len(content["rng"]):
            rng = content["rng"][self.processes.rank]
            torch.set_rng_state(rng["cpu"])
            if self.device.type == "cuda" and rng["device"] is not None:
                torch.cuda.set_rng_state(rng["device"], self.device)


WAY_OUT = (
    "the last good checkpoint is kept. Lower train.learning_rate or train.clip_norm, or set train.precision to fp32; "
    "`python -m stages.inspect --verify` tells whether the store is sound"
)


def _counted(batches: Iterator[Batch], progress: Progress) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        progress.advance(len(batch.labels_NL))
