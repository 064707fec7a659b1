"""Streaming: the order of an epoch, batches whatever makes them, memory that workers share, and faults that are named."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import AugmentConfig, SamplingConfig
from pipeline.errors import DamageError, IchorError
from pipeline.loader import PADDING, BatchName, Loader, SliceDataset, epoch_order, name_batches
from pipeline.reader import SliceReader, shard_name
from pipeline.shard import build_shard, encode_chunk
from pipeline.store import Store
from tests.conftest import ROOT, Cohort
from tests.test_store import make_store

EACH_ONCE = SamplingConfig(balance=0.0, negatives=1.0)
AUGMENT = AugmentConfig(
    flip=0.5, rotate_deg=10, shift=0.05, scale=0.1, brightness=0.1, contrast=0.1, noise=0.05, cutout=0.5
)


def rare_labels(count: int = 1000) -> np.ndarray:
    """A tenth has the first label, a fiftieth of all the second; the last label says that any is there."""
    labels_NL = np.zeros((count, 6), np.int8)
    labels_NL[: count // 10, [0, 5]] = 1
    labels_NL[: count // 50, 1] = 1
    return labels_NL


def named(numbers: list[int], epoch: int = 0) -> BatchName:
    return BatchName(epoch, np.array(numbers), np.zeros(len(numbers), np.int64))


# the order of an epoch


def test_order_is_a_permutation_and_a_function_of_seed_and_epoch() -> None:
    labels_NL = rare_labels()
    order = epoch_order(labels_NL, seed=3, epoch=5, sampling=EACH_ONCE)
    expected = np.random.Generator(np.random.PCG64(np.random.SeedSequence((3, 5)))).permutation(1000)
    np.testing.assert_array_equal(order, expected)
    assert sorted(order.tolist()) == list(range(1000))
    assert (order != epoch_order(labels_NL, seed=3, epoch=6, sampling=EACH_ONCE)).any()
    assert (order != epoch_order(labels_NL, seed=4, epoch=5, sampling=EACH_ONCE)).any()


def test_share_of_negatives_is_another_in_each_epoch_and_keeps_all_others() -> None:
    labels_NL = rare_labels()
    labels_NL[500:600] = -1  # nobody knows: no hemorrhage is known of
    some = SamplingConfig(balance=0.0, negatives=0.3)
    orders = [epoch_order(labels_NL, seed=0, epoch=epoch, sampling=some) for epoch in range(20)]
    for order in orders:
        assert len(order) == 100 + 270
        assert len(set(order.tolist())) == len(order)
        assert set(range(100)) <= set(order.tolist())
    assert set(np.concatenate(orders).tolist()) == set(range(1000))
    again = epoch_order(labels_NL, seed=0, epoch=7, sampling=some)
    np.testing.assert_array_equal(orders[7], again)


@pytest.mark.parametrize("balance", [0.5, 1.0])
def test_balance_draws_slices_by_the_rarest_of_their_labels(balance: float) -> None:
    labels_NL = rare_labels()
    sampling = SamplingConfig(balance=balance, negatives=1.0)
    drawn = np.concatenate([epoch_order(labels_NL, seed=0, epoch=epoch, sampling=sampling) for epoch in range(100)])
    assert len(drawn) == 100 * 1000
    sizes = np.array([20, 80, 900])  # the second label; the first without it; none
    weights = sizes * np.array([0.02, 0.1, 0.9]) ** -balance
    counts = np.histogram(drawn, [0, 20, 100, 1000])[0]
    np.testing.assert_allclose(counts / len(drawn), weights / weights.sum(), rtol=0.03)


# batches by name


def test_batches_from_the_middle_are_the_same_batches() -> None:
    order = np.random.default_rng(0).integers(0, 40, 103)
    every = name_batches(order, batch_size=10)
    assert [len(name.numbers) for name in every] == [10] * 10 + [3]
    for one, other in zip(every[4:], name_batches(order, batch_size=10, first=4), strict=True):
        np.testing.assert_array_equal(one.numbers, other.numbers)
        np.testing.assert_array_equal(one.draws, other.draws)


def test_draws_count_how_often_a_slice_came_before() -> None:
    order = np.array([5, 7, 5, 0, 5, 7])
    assert np.concatenate([name.draws for name in name_batches(order, batch_size=4)]).tolist() == [0, 0, 1, 0, 2, 1]


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_shares_of_the_processes_are_equal_and_together_the_batch(processes: int) -> None:
    order = np.random.default_rng(0).permutation(103)
    shares = [name_batches(order, batch_size=10, epoch=2, share=(rank, processes)) for rank in range(processes)]
    for whole, *parts in zip(name_batches(order, batch_size=10), *shares, strict=True):
        assert len({len(part.numbers) for part in parts}) == 1
        real = [number for part in parts for number in part.numbers[part.draws != PADDING].tolist()]
        assert real == whole.numbers.tolist()


@pytest.fixture
def store(cohort: Cohort) -> Store:
    for number in range(3):
        cohort.add_study(number, 4, labels=[[0, 0, 0, 0, 1, 1]] * 4)
    return make_store(cohort)


@pytest.fixture
def load() -> Iterator[Callable[..., Loader]]:
    """Makes loaders, and ends their processes."""
    loaders: list[Loader] = []

    def make(dataset: SliceDataset, **options: Any) -> Loader:
        loaders.append(Loader(dataset, **options))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def dataset_of(store: Store, **options: Any) -> SliceDataset:
    slices = store.slices
    return SliceDataset(store.reader, slices, store.labels[slices[:, 0], slices[:, 1]], **{"neighbours": 0, **options})


def test_batches_hold_the_slices_of_the_store(store: Store) -> None:
    batch = dataset_of(store)[named([5, 0, 11])]
    expected = [store.reader.read(*store.slices[number]) for number in (5, 0, 11)]
    np.testing.assert_array_equal(batch.slices_NRCX.numpy(), np.stack(expected))
    assert batch.labels_NL.tolist() == [[0, 0, 0, 0, 1, 1]] * 3


def test_padding_has_no_labels(store: Store) -> None:
    dataset = dataset_of(store)
    *_, last = name_batches(np.arange(12), batch_size=5, share=(1, 2))
    batch = dataset[last]  # two slices for two processes: one each
    assert batch.labels_NL.tolist() == [[0, 0, 0, 0, 1, 1]]
    *_, last = name_batches(np.arange(11), batch_size=5, share=(1, 2))
    assert dataset[last].labels_NL.tolist() == [[-1] * 6]
    assert (dataset.labels_NL == [0, 0, 0, 0, 1, 1]).all()


def test_neighbours_come_as_channels_and_the_ends_repeat(store: Store) -> None:
    batch = dataset_of(store, neighbours=1)[named([4, 5])]  # first two slices of the second study
    windows = len(store.windows)
    below, here, above = (batch.slices_NRCX[..., k * windows : (k + 1) * windows].numpy() for k in range(3))
    np.testing.assert_array_equal(below[0], here[0])
    np.testing.assert_array_equal(below[1], here[0])
    np.testing.assert_array_equal(above[0], here[1])
    np.testing.assert_array_equal(above[1], store.reader.read(1, 2))


def test_each_slice_of_a_stack_is_read_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    read: Counter[int] = Counter()
    real = SliceReader.read_into

    def spy(self: SliceReader, study: int, slice_number: int, out: np.ndarray) -> None:
        read[slice_number] += 1
        real(self, study, slice_number, out)

    monkeypatch.setattr(SliceReader, "read_into", spy)
    dataset_of(store, neighbours=3)[named([4])]
    assert read == {0: 1, 1: 1, 2: 1, 3: 1}


def test_a_slice_drawn_again_is_changed_in_another_way(store: Store) -> None:
    (name,) = name_batches(np.array([3, 3]), batch_size=2)
    first, second = dataset_of(store, augment=AUGMENT)[name].slices_NRCX.numpy()
    assert (first != second).any()


@pytest.mark.parametrize("neighbours", [0, 1])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_do_not_depend_on_the_workers(
    store: Store, load: Callable[..., Loader], workers: int, neighbours: int
) -> None:
    dataset = dataset_of(store, neighbours=neighbours, augment=AUGMENT, seed=1)
    loader = load(dataset, workers=workers)
    for epoch, size in enumerate((5, 2, 7)):  # the last is larger than what the workers started with
        order = epoch_order(dataset.labels_NL, seed=0, epoch=epoch, sampling=EACH_ONCE)
        names = name_batches(np.tile(order, 3), batch_size=size, epoch=epoch)
        batches = list(loader.batches(names))  # all kept: none may be written over
        for name, batch in zip(names, batches, strict=True):
            np.testing.assert_array_equal(batch.slices_NRCX.numpy(), dataset[name].slices_NRCX.numpy())
            np.testing.assert_array_equal(batch.labels_NL.numpy(), dataset[name].labels_NL.numpy())
    assert list(loader.batches([])) == []


def test_a_pass_given_up_leaves_nothing_behind(store: Store, load: Callable[..., Loader]) -> None:
    dataset = dataset_of(store)
    loader = load(dataset, workers=2)
    given_up = loader.batches(name_batches(np.arange(12), batch_size=1))
    next(given_up)
    given_up.close()
    names = name_batches(np.arange(12)[::-1], batch_size=2)
    for name, batch in zip(names, loader.batches(names), strict=True):
        np.testing.assert_array_equal(batch.slices_NRCX.numpy(), dataset[name].slices_NRCX.numpy())


# faults


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_chunk_stops_the_loader_with_study_and_slice(
    store: Store, load: Callable[..., Loader], workers: int
) -> None:
    path = store.path / "pixels" / shard_name(1, 0)
    content = bytearray(path.read_bytes())
    content[30] ^= 1
    path.unlink()
    path.write_bytes(bytes(content))
    loader = load(dataset_of(store), workers=workers)
    with pytest.raises(DamageError, match="study ID_0000000001, slice 0") as raised:
        list(loader.batches(name_batches(np.arange(12), batch_size=4)))
    assert "\n" not in str(raised.value)  # no traceback of a worker in it


def test_killed_worker_is_said_to_have_been_killed(store: Store, load: Callable[..., Loader]) -> None:
    loader = load(dataset_of(store), workers=1)
    batches = loader.batches(name_batches(np.arange(12).repeat(20), batch_size=1))
    next(batches)
    os.kill(worker_pids(loader)[0], signal.SIGKILL)
    with pytest.raises(IchorError, match=r"cannot go on.*/dev/shm"):
        list(batches)


TRAINER = """
import sys, time
from pathlib import Path
from pipeline.loader import Loader, name_batches
from pipeline.store import Store
from tests.test_loader import dataset_of, worker_pids
if __name__ == "__main__":
    dataset = dataset_of(Store(Path(sys.argv[1])))
    loader = Loader(dataset, workers=2)
    batches = loader.batches(name_batches(dataset.slices[:, 0] * 0, batch_size=1))
    next(batches)
    print(*worker_pids(loader), flush=True)
    time.sleep(600)
"""


def test_workers_end_with_a_trainer_that_was_killed(store: Store) -> None:
    command = [sys.executable, "-c", TRAINER, str(store.path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout is not None
        workers = [int(pid) for pid in trainer.stdout.readline().split()]
        assert list(map(is_running, workers)) == [True, True]
        trainer.kill()
    deadline_s = time.monotonic() + 60
    while any(map(is_running, workers)) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert list(map(is_running, workers)) == [False, False]


def is_running(pid: int) -> bool:
    """Whether a process is there, and more than the entry that waits for its parent to ask how it ended."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


# memory


def worker_pids(loader: Loader) -> list[int]:
    assert loader._processes is not None
    return [worker.pid for worker in loader._processes._iterator._workers]  # type: ignore[union-attr]


def private_bytes(pid: int) -> int:
    """What a process holds for itself alone."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * sum(int(kilobytes) for kilobytes in re.findall(r"Private_\w+:\s+(\d+) kB", rollup))


def many_studies(folder: Path, count: int) -> SliceDataset:
    """So many studies of four slices, all of them the same file."""
    pixels = np.random.default_rng(0).integers(0, 255, (4, 8, 8, 3)).astype(np.uint8)
    shard = build_shard([encode_chunk(one) for one in pixels])
    for study in range(count):
        if study % 10_000 == 0:
            kept = folder / f"shard {study}"  # a file has at most 65,000 names
            kept.write_bytes(shard)
        os.link(kept, folder / shard_name(study, 0))
    uids = np.array([f"1.2.840.113619.2.55.3.{study}" for study in range(count)], object)
    reader = SliceReader(folder, study_uids=uids, num_slices=np.full(count, 4), shape=(8, 8, 3))
    slices = np.stack([np.repeat(np.arange(count), 4), np.tile(np.arange(4), count)], axis=1)
    return SliceDataset(reader, slices, np.zeros((len(slices), 6), np.int8), neighbours=0)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux tells what memory is private")
def test_25000_studies_take_little_memory_and_that_is_shared(tmp_path: Path, load: Callable[..., Loader]) -> None:
    (tmp_path / "few").mkdir()
    few = load(many_studies(tmp_path / "few", 10), workers=1)
    list(few.batches(name_batches(np.arange(40), batch_size=32)))
    dataset = many_studies(tmp_path, 25_000)
    many = load(dataset, workers=2)
    once = np.arange(0, 100_000, 4)  # a slice of each study
    list(many.batches(name_batches(once[:64], batch_size=32)))
    assert (dataset.reader._places != 0).any(axis=1).sum() == 64  # what the workers found is seen here
    held = []
    for _ in range(3):
        for _batch in many.batches(name_batches(once, batch_size=250)):
            pass
        held.append([private_bytes(pid) for pid in worker_pids(many)])
    assert (dataset.reader._places != 0).any(axis=1).all()
    assert dataset.reader._places.nbytes < 50e6 / 3
    assert max(held[-1]) - private_bytes(worker_pids(few)[0]) < 6e6  # the index alone has 13 MB
    assert max(np.subtract(held[-1], held[0])) < 1e6  # nothing piles up from pass to pass
