"""Batches out of the store: the order of an epoch, whole-batch reads, neighbouring slices as channels.

A batch is named by its epoch and slice numbers, and its content depends on nothing else; so any worker may make it, and a
resumed run gets the same batches. Pixels stay uint8 until they are on the device.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.augment import build_augment, slice_seed
from pipeline.config import AugmentConfig, SamplingConfig
from pipeline.errors import IchorError
from pipeline.labels import UNKNOWN
from pipeline.reader import SliceReader, share_array

AHEAD = 2
"""Batches that the thread prepares while the device works on another."""

PREFETCH = 2
"""Batches that each process is asked for at a time."""

PADDING = -1
"""The draw of a slice that only fills a process's share of a batch."""


_Made = npt.NDArray[np.int8] | Exception
"""What a worker process hands over: a batch's labels, its slices being in the ring, or what went wrong."""


class BatchName(NamedTuple):
    """What a batch is made of."""

    epoch: int
    numbers: npt.NDArray[np.int64]
    """Positions in the dataset's `slices`."""
    draws: npt.NDArray[np.int64]
    """How often the epoch has drawn that slice before, so that it is changed in another way; `PADDING`: its labels are unknown."""


def epoch_order(
    labels_NL: npt.NDArray[np.int8], *, seed: int, epoch: int, sampling: SamplingConfig
) -> npt.NDArray[np.int64]:
    """The slices of an epoch in their order, a function of (labels, seed, epoch) alone: int64 [draw], row numbers of `labels_NL`.

    With `balance` 0 and `negatives` 1 it is a permutation of all. `negatives` below 1 keeps that share of the slices without
    hemorrhage (none of their labels is 1), others in each epoch. `balance` above 0 draws as many slices as there are, with
    replacement; a slice's weight is the greatest of share ** −balance over its labels, where a label's share is how many slices
    have it. No label at all counts as a label too.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch))))
    kept = np.arange(len(labels_NL))
    if sampling.negatives < 1:
        negative = np.flatnonzero(~(labels_NL == 1).any(axis=1))
        left_out = rng.choice(negative, len(negative) - round(sampling.negatives * len(negative)), replace=False)
        kept = np.setdiff1d(kept, left_out, assume_unique=True)
    if sampling.balance:
        weights = _balance_weights(labels_NL[kept], sampling.balance)
        return rng.choice(kept, len(kept), p=weights / weights.sum())
    return kept[rng.permutation(len(kept))]


def _balance_weights(labels_NL: npt.NDArray[np.int8], balance: float) -> npt.NDArray[np.float64]:
    """How readily each slice is drawn, float64 [N]."""
    has = labels_NL == 1
    has = np.column_stack([has, ~has.any(axis=1)])
    return np.where(has, np.maximum(has.mean(axis=0), 1e-12) ** -balance, 0).max(axis=1)


def name_batches(
    order: npt.NDArray[np.int64], *, batch_size: int, epoch: int = 0, first: int = 0, share: tuple[int, int] = (0, 1)
) -> list[BatchName]:
    """Cut an order into batches, from batch number `first` on; the last one may be short.

    Args:
        order: positions in the dataset's `slices`; one may stand there more than once.
        batch_size: slices in a batch of all processes together.
        epoch: names the batches' random changes.
        first: batches to leave out, because a resumed run has seen them.
        share: (rank, of): the rank-th of so many equal runs of each batch. Where they cannot be equal, padding fills up the last.
    """
    draws = _count_draws(order)
    names = []
    for start in range(first * batch_size, len(order), batch_size):
        numbers, taken = order[start : start + batch_size], draws[start : start + batch_size]
        rank, of = share
        size = -(-len(numbers) // of)
        places = np.arange(rank * size, (rank + 1) * size)
        real = places < len(numbers)
        places[~real] = 0
        names.append(BatchName(epoch, numbers[places], np.where(real, taken[places], PADDING)))
    return names


def _count_draws(order: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How often each element stood there before: [5, 7, 5] → [0, 0, 1]."""
    by_number = np.argsort(order, kind="stable")
    is_new = np.diff(order[by_number], prepend=-1) != 0
    places = np.arange(len(order))
    draws = np.empty_like(places)
    draws[by_number] = places - np.maximum.accumulate(np.where(is_new, places, 0))
    return draws


@dataclass(frozen=True)
class Batch:
    """N slices of R rows and C columns; X channels are neighbours × windows."""

    slices_NRCX: Tensor
    """uint8."""
    labels_NL: Tensor
    """int8: 1, 0, −1 unknown."""


class SliceDataset(Dataset[Batch]):
    """Whole batches of a set of slices.

    Args:
        reader: of the store.
        slices: int64 [n, 2], study and slice number of each slice in the set.
        labels_NL: int8 [n, label].
        neighbours: slices on either side that come along as channels; beyond the ends, the end slice is repeated.
        augment: random changes, or None for the slices as they are.
        seed: of the random changes.
    """

    def __init__(
        self,
        reader: SliceReader,
        slices: npt.NDArray[np.int64],
        labels_NL: npt.NDArray[np.int8],
        *,
        neighbours: int,
        augment: AugmentConfig | None = None,
        seed: int = 0,
    ) -> None:
        self.reader = reader
        self.slices = slices
        self.labels_NL = labels_NL
        self.neighbours = neighbours
        self.augment_config = augment
        self.seed = seed
        self._augment = build_augment(augment) if augment else None

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, name: BatchName) -> Batch:
        slices_NRCX = torch.empty(self.shape(len(name.numbers)), dtype=torch.uint8)
        return Batch(slices_NRCX, torch.from_numpy(self.fill(name, slices_NRCX.numpy())))

    def shape(self, count: int) -> tuple[int, int, int, int]:
        """Of a batch of so many slices: slices, rows, columns, channels."""
        rows, columns, windows = self.reader.shape
        return count, rows, columns, windows * (2 * self.neighbours + 1)

    def fill(self, name: BatchName, out_NRCX: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
        """Write a batch's slices into `out_NRCX`, and return their labels: int8 [N, L].

        Raises:
            DamageError: a slice cannot be read; study and slice are named.
        """
        stack_KRCW = np.empty((2 * self.neighbours + 1, *self.reader.shape), np.uint8)
        for out_RCX, number, draw in zip(out_NRCX, name.numbers.tolist(), name.draws.tolist(), strict=True):
            if not self.neighbours:
                stack_KRCW = out_RCX[None]  # then there is nothing to interleave
            self._read_stack(number, stack_KRCW)
            changed_KRCW = stack_KRCW
            if self._augment:
                changed_KRCW = self._augment(stack_KRCW, slice_seed(self.seed, name.epoch, number, max(draw, 0)))
            if self.neighbours or changed_KRCW is not stack_KRCW:
                _interleave(changed_KRCW, out_RCX)
        labels_NL = np.array(self.labels_NL[name.numbers])
        labels_NL[name.draws == PADDING] = UNKNOWN
        return labels_NL

    def _read_stack(self, number: int, stack_KRCW: npt.NDArray[np.uint8]) -> None:
        """A slice between its neighbours, each read once."""
        study, centre = self.slices[number].tolist()
        last = int(self.reader.num_slices[study]) - 1
        wanted = [min(max(centre + k, 0), last) for k in range(-self.neighbours, self.neighbours + 1)]
        for place, slice_number in enumerate(wanted):
            if place and slice_number == wanted[place - 1]:
                stack_KRCW[place] = stack_KRCW[place - 1]
            else:
                self.reader.read_into(study, slice_number, stack_KRCW[place])

    def share(self) -> None:
        """Put its tables and the reader's where worker processes use them together; to be said before they start."""
        self.reader.share()
        self.slices, self.labels_NL = share_array(self.slices), share_array(self.labels_NL)

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_augment"}  # it holds a closure

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._augment = build_augment(self.augment_config) if self.augment_config else None


def _interleave(stack_KRCW: npt.NDArray[np.uint8], out_RCX: npt.NDArray[np.uint8]) -> None:
    """Neighbour k's window w becomes channel k · W + w; OpenCV takes 0.15 ms at 256² × 9, NumPy 0.86."""
    if len(stack_KRCW) == 1:
        out_RCX[...] = stack_KRCW[0]
        return
    pairs = [channel for x in range(out_RCX.shape[2]) for channel in (x, x)]
    cv2.mixChannels(list(stack_KRCW), [out_RCX], pairs)


class Loader:
    """Makes named batches ahead of their use, in worker processes or in a thread of this one.

    The processes write into a ring of buffers that are shared with this one and used again and again; a thread copies each batch
    out of it. Writing a slice of 256² × 3 to memory that is shared anew for each batch, as torch's own collating does, takes
    0.09 ms; into the ring 0.015, and out of it as much; 256² × 9 three times as long.

    Args:
        dataset: where they come from.
        workers: processes; 0 for a thread.
        pin: hand batches over in pinned memory, for a GPU.
    """

    def __init__(self, dataset: SliceDataset, *, workers: int, pin: bool = False) -> None:
        self.dataset = dataset
        self.workers = workers
        self.pin = pin
        self._names: list[BatchName] = []
        self._ring = torch.empty(0, 0, dtype=torch.uint8)
        self._processes: DataLoader[_Made] | None = None

    def close(self) -> None:
        """End the worker processes."""
        running = getattr(self._processes, "_iterator", None)
        if running is not None:
            running._shutdown_workers()  # now, not when the last reference to them goes
        self._processes = None

    def batches(self, names: list[BatchName]) -> Iterator[Batch]:
        """Yield the named batches in order.

        Raises:
            DamageError: a slice cannot be read; study and slice are named.
            IchorError: a worker process was killed.
        """
        source = self._from_processes(names) if self.workers else (self._pinned(self.dataset[name]) for name in names)
        with ThreadPoolExecutor(1, thread_name_prefix="loader") as thread:
            coming = deque(thread.submit(next, source) for _ in names[:AHEAD])
            try:
                for number in range(len(names)):
                    batch = coming.popleft().result()
                    if number + AHEAD < len(names):
                        coming.append(thread.submit(next, source))
                    yield batch
            finally:
                for future in coming:
                    future.cancel()

    def _pinned(self, batch: Batch) -> Batch:
        return Batch(batch.slices_NRCX.pin_memory(), batch.labels_NL.pin_memory()) if self.pin else batch

    def _from_processes(self, names: list[BatchName]) -> Iterator[Batch]:
        if not names:
            return
        try:
            self._start(max(len(name.numbers) for name in names))
        except RuntimeError as error:
            raise _explain(error, self.workers) from None
        self._names = names
        made: Iterator[_Made] = iter(self._processes or ())
        for number, name in enumerate(names):
            try:
                labels_NL = next(made)
            except RuntimeError as error:
                raise _explain(error, self.workers) from None
            if isinstance(labels_NL, Exception):
                raise labels_NL
            slices_NRCX = torch.empty(self.dataset.shape(len(name.numbers)), dtype=torch.uint8, pin_memory=self.pin)
            slices_NRCX.copy_(_buffer(self._ring, number, slices_NRCX.shape))
            labels = torch.from_numpy(labels_NL)
            yield Batch(slices_NRCX, labels.pin_memory() if self.pin else labels)

    def _start(self, count: int) -> None:
        """Start the processes, with a ring for batches of so many slices, unless that is done."""
        slot_bytes = int(np.prod(self.dataset.shape(count)))
        if self._processes is not None and slot_bytes <= self._ring.shape[1]:
            return
        self.close()
        self.dataset.share()
        # One more than are under way: a buffer is promised to the next batch just before its own is taken out.
        slots = self.workers * PREFETCH + 1
        storage = torch.UntypedStorage._new_shared(slots * slot_bytes)
        self._ring = torch.empty(0, dtype=torch.uint8).set_(storage).view(slots, slot_bytes)
        self._processes = DataLoader(
            _Maker(self.dataset, self._ring),
            batch_size=None,
            sampler=_Forward(self),
            num_workers=self.workers,
            prefetch_factor=PREFETCH,
            collate_fn=_keep,
            worker_init_fn=_end_with_the_trainer,
            multiprocessing_context=_context(),
            persistent_workers=True,
            # Its own: else torch draws a seed from the generator that dropout uses, once a pass, and a resumed run differs.
            generator=torch.Generator().manual_seed(0),
        )


def _buffer(ring: Tensor, number: int, shape: tuple[int, ...]) -> Tensor:
    """Where the batch of that number in its pass lies: uint8 [N, R, C, X]."""
    return ring[number % len(ring), : int(np.prod(shape))].view(shape)


def _context() -> multiprocessing.context.BaseContext:
    """Workers forked from a server that has only imported: a child forked from us, whose threads hold locks, can hang."""
    context = multiprocessing.get_context("forkserver")
    # Imported once, not in each worker, where that takes seconds and 185 MB.
    context.set_forkserver_preload(["pipeline.loader", "albumentations"])
    return context


def _explain(error: RuntimeError, workers: int) -> Exception:
    """What became of a worker, in our words; any other error stays as it is."""
    if not any(words in str(error) for words in ("DataLoader worker", "Pin memory thread", "shared memory")):
        return error
    return IchorError(
        f"train: the {workers} loader processes cannot go on ({str(error).splitlines()[0]}). Most likely the memory ran out, or the "
        f"shared memory by which batches are handed over (/dev/shm): a container may need more of it (docker run --shm-size=8g). "
        f"Or lower train.loader_workers or train.batch_size; 0 workers need no shared memory"
    )


class _Maker(Dataset[_Made]):
    """What a worker process does: fill a buffer of the ring, and hand over the labels, or what went wrong."""

    def __init__(self, dataset: SliceDataset, ring: Tensor) -> None:
        self.dataset = dataset
        self.ring = ring

    def __getitem__(self, task: tuple[int, BatchName]) -> _Made:
        number, name = task
        cv2.setNumThreads(1)  # the processes are what runs in parallel
        try:
            return self.dataset.fill(name, _buffer(self.ring, number, self.dataset.shape(len(name.numbers))).numpy())
        except (IchorError, OSError) as error:
            return error  # raised here, torch would put a traceback into its message


def _end_with_the_trainer(_worker: int) -> None:
    """A worker that waits for the end of who started it: torch's own waits for the server that forked it, which waits for its workers."""

    def watch(trainer: Any) -> None:
        trainer.join()
        os._exit(1)

    threading.Thread(target=watch, args=[multiprocessing.parent_process()], name="watch", daemon=True).start()


def _keep(made: Any) -> Any:
    """Instead of torch's collating, which would make a tensor of it."""
    return made


class _Forward(Iterable[tuple[int, BatchName]]):
    """Hands the loader's current names to torch's, which asks anew at the start of every pass."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[tuple[int, BatchName]]:
        return enumerate(self.loader._names)

    def __len__(self) -> int:
        return len(self.loader._names)
