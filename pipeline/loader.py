"""Batches out of the store: true permutations, whole-batch reads, neighbouring slices as channels.

A batch is named by its epoch and slice numbers, and its content depends on nothing else; so any worker may make it, and a
resumed run gets the same batches. Pixels stay uint8 until they are on the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.augment import build_augment, slice_seed
from pipeline.config import AugmentConfig
from pipeline.reader import SliceReader

BatchName = tuple[int, npt.NDArray[np.int64]]
"""Epoch, and positions in the dataset's `slices`."""

AHEAD = 2
"""Batches that the thread prepares while the device works on another."""


def epoch_order(count: int, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """A permutation of 0…count−1 that is a function of (seed, epoch) alone."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch)))).permutation(count)


def name_batches(order: npt.NDArray[np.int64], *, batch_size: int, epoch: int = 0, first: int = 0) -> list[BatchName]:
    """Cut an order into batches, from batch number `first` on; the last one may be short."""
    return [(epoch, order[start : start + batch_size]) for start in range(first * batch_size, len(order), batch_size)]


@dataclass(frozen=True)
class Batch:
    """N slices of R rows and C columns; X channels are neighbours × windows."""

    slices_NRCX: Tensor
    """uint8."""
    labels_NL: Tensor
    """int8: 1, 0, −1 unknown."""

    def pin_memory(self) -> Batch:
        """Called by torch's loader, so that the copy to the device can overlap with work."""
        return Batch(self.slices_NRCX.pin_memory(), self.labels_NL.pin_memory())


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
        epoch, numbers = name
        rows, columns, windows = self.reader.shape
        out = np.empty((len(numbers), rows, columns, windows * (2 * self.neighbours + 1)), np.uint8)
        for place, number in enumerate(numbers.tolist()):
            self._read_with_neighbours(number, out[place])
            if self._augment:
                out[place] = self._augment(out[place], slice_seed(self.seed, epoch, number))
        return Batch(torch.from_numpy(out), torch.from_numpy(self.labels_NL[numbers]))

    def _read_with_neighbours(self, number: int, out_RCX: npt.NDArray[np.uint8]) -> None:
        study, centre = self.slices[number].tolist()
        if not self.neighbours:
            self.reader.read_into(study, centre, out_RCX)
            return
        last = int(self.reader.num_slices[study]) - 1
        windows = self.reader.shape[2]
        for place, offset in enumerate(range(-self.neighbours, self.neighbours + 1)):
            pixels = self.reader.read(study, min(max(centre + offset, 0), last))
            out_RCX[..., place * windows : (place + 1) * windows] = pixels

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_augment"}  # it holds a closure

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._augment = build_augment(self.augment_config) if self.augment_config else None


class Loader:
    """Makes named batches ahead of their use, in worker processes or in a thread of this one.

    Args:
        dataset: where they come from.
        workers: processes; 0 for a thread.
        pin: copy into pinned memory, for a GPU.
    """

    def __init__(self, dataset: SliceDataset, *, workers: int, pin: bool = False) -> None:
        self.dataset = dataset
        self.workers = workers
        self._names: list[BatchName] = []
        self._processes: DataLoader[Batch] | None = None
        if workers:
            # Not fork: a forked child of a process with threads, Blosc's or torch's, can hang.
            self._processes = DataLoader(
                dataset,
                batch_size=None,
                sampler=_Forward(self),
                num_workers=workers,
                multiprocessing_context="forkserver",
                persistent_workers=True,
                pin_memory=pin,
                # Its own: else torch draws a seed from the generator that dropout uses, once a pass, and a resumed run differs.
                generator=torch.Generator().manual_seed(0),
            )

    def close(self) -> None:
        """End the worker processes."""
        self._processes = None

    def batches(self, names: list[BatchName]) -> Iterator[Batch]:
        """Yield the named batches in order."""
        if self._processes is not None:
            self._names = names
            yield from self._processes
            return
        with ThreadPoolExecutor(1, thread_name_prefix="loader") as thread:
            coming = deque(thread.submit(self.dataset.__getitem__, name) for name in names[:AHEAD])
            try:
                for number in range(len(names)):
                    batch = coming.popleft().result()
                    if number + AHEAD < len(names):
                        coming.append(thread.submit(self.dataset.__getitem__, names[number + AHEAD]))
                    yield batch
            finally:
                for future in coming:
                    future.cancel()


class _Forward(Iterable[BatchName]):
    """Hands the loader's current names to torch's, which asks anew at the start of every pass."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[BatchName]:
        return iter(self.loader._names)

    def __len__(self) -> int:
        return len(self.loader._names)
