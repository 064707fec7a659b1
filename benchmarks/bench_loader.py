"""What random slices cost out of the store, and whole batches, against what one would use instead; same pixels, same run, warm.

The store is made here: phantom studies, rendered and preprocessed by the pipeline, then repeated, each time rolled elsewhere, to as
many slices as asked for. The reader runs in one thread. Beside a bare read and decode of the same chunks, each peer as its own
documents say: zarr-python's indexing; a PNG file a slice with cv2; windowing the DICOM on the fly with pydicom (rescale, window,
resize; the phantom's own files, not rolled); MONAI's PersistentDataset; WebDataset, which reads its tars in order through a shuffle
buffer of 1,000; LitData's optimised chunks. A memmap, which keeps every raw byte, is printed beside them, and so is DICOM resized
before it is windowed, the quickest order. The whole loader: processes, batches of 32 in random order, the same changes by the same
function, each through its own or torch's loader. Rounds are interleaved, medians taken. WebDataset and LitData stand in
requirements-bench.txt, and are left out where they are not installed. Prints a card; the last line is JSON.
"""

import argparse
import contextlib
import functools
import importlib.util
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
import torch
import zarr
from numcodecs import zstd
from torch.utils.data import DataLoader, Dataset, IterableDataset

from benchmarks.bench_preprocess import REAL_HEAD, configure
from pipeline.augment import build_augment, slice_seed
from pipeline.config import PhantomConfig, SamplingConfig, load_config
from pipeline.index import build_manifest
from pipeline.loader import Loader, SliceDataset, epoch_order, name_batches
from pipeline.phantom.cohort import write_cohort
from pipeline.preprocess import preprocess
from pipeline.reader import shard_name
from pipeline.shard import CHECKSUM_BYTES, EMPTY, build_shard, encode_chunk, read_index
from pipeline.store import Store, StoreContent, slice_axis, write_store

BATCH = 32
EVERY_SLICE = SamplingConfig(balance=0.0, negatives=1.0)
PEERS = ("png", "zarr", "dicom", "persistent", "webdataset", "litdata")
SLOW = ("zarr", "dicom", "dicom_resized_first")
"""Peers that read a tenth of the slices."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=2000, help="slices of the store, at least")
    parser.add_argument("--studies", type=int, default=8, help="phantom studies to render")
    parser.add_argument("--size", type=int, default=512, help="rows and columns of the phantom")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--reads", type=int, default=500, help="random slices a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store, dicom = make_store(folder, arguments)
        made = Made(store, dicom, folder)
        print(f"{len(made.slices)} slices of {store.reader.shape}, warm; {arguments.rounds} rounds, medians")
        figures = measure_reader(made, arguments) | measure_loader(made, arguments) | measure_stored(store, folder)
    print(json.dumps(figures))


# the store ---------------------------------------------------------------------------------------------------------


def make_store(folder: Path, arguments: argparse.Namespace) -> tuple[Store, Path]:
    """A store of at least so many slices, and the folder of the DICOM files that its first studies were made from."""
    phantom = PhantomConfig(studies=arguments.studies, slices=[24, 30], size=arguments.size, seed=0)
    write_cohort(phantom, folder=folder, wip=folder / "wip", workers="auto")
    first = preprocessed(folder / "dicom", folder / "first", arguments.image_size)
    copies = -(-arguments.slices // len(first.slices))
    studies = len(first.study)
    shards = {}
    for copy, study in itertools.product(range(copies), range(studies)):
        pixels_SRCW = np.roll(first.reader.read_study(study), (5 * copy, 3 * copy), axis=(1, 2))
        path = folder / "shards" / f"{copy}.{study}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(build_shard([encode_chunk(pixels_RCW) for pixels_RCW in pixels_SRCW]))
        shards[copy * studies + study, 0] = path
    content = StoreContent(
        study=np.array([f"{uid}-{copy}" for copy in range(copies) for uid in first.study], object),
        per_study={name: np.concatenate([values] * copies) for name, values in first.per_study.items()},
        image_id=np.concatenate([first.image_id] * copies),
        position_mm=np.concatenate([first.position_mm] * copies),
        labels=np.concatenate([first.labels] * copies),
    )
    assert content.image_id.shape[1] == slice_axis(1)
    write_store(
        folder / "many.zarr", content, shards, image_size=arguments.image_size, windows=first.windows, attributes={}
    )
    return Store(folder / "many.zarr"), folder / "dicom"


def preprocessed(source: Path, data: Path, image_size: int) -> Store:
    config = configure(source, image_size)
    manifest, _, _ = build_manifest(config)
    data.mkdir()
    preprocess(config, manifest, data=data)
    return Store(data / "store.zarr")


def measure_stored(store: Store, folder: Path) -> dict[str, Any]:
    """Share of the raw bytes that the store keeps, on a human head where one lies beside the checkout."""
    human = REAL_HEAD.is_dir()
    if human:
        store = preprocessed(REAL_HEAD, folder / "human", store.image_size)
    indexes = [read_index(path) for study in range(len(store.study)) for path in store.reader.shard_paths(study)]
    kept = sum(int(index[index[:, 0] != EMPTY, 1].sum()) for index in indexes)
    fraction = kept / (len(store.slices) * int(np.prod(store.reader.shape)))
    print(f"stored: {fraction:.3f} of the raw bytes of {'a human head' if human else 'the phantom'}")
    return {"stored_fraction": round(fraction, 3), "stored_of": "human head" if human else "phantom"}


class Made:
    """The same slices in every peer's form, and a function for each that reads one by its number."""

    def __init__(self, store: Store, dicom: Path, folder: Path) -> None:
        self.store, self.folder = store, folder
        self.dicom = {path.stem: path for path in dicom.iterdir()}  # some have no suffix
        self.slices = store.slices
        self.labels_NL = store.labels[self.slices[:, 0], self.slices[:, 1]]
        self.windows = list(store.windows.values())
        self.places = [self._place(study, number) for study, number in self.slices.tolist()]
        self.out = np.empty(store.reader.shape, np.uint8)
        array = zarr.open_group(store.path, mode="r")["pixels"]
        assert isinstance(array, zarr.Array)
        self.zarr = array
        (folder / "png").mkdir()
        raw = np.memmap(folder / "raw", np.uint8, "w+", shape=(len(self.slices), *store.reader.shape))
        for number in range(len(self.slices)):
            raw[number] = self.read(number)
            assert cv2.imwrite(str(folder / "png" / f"{number}.png"), raw[number])
        raw.flush()
        self.raw = np.memmap(folder / "raw", np.uint8, "r", shape=raw.shape)

    def _place(self, study: int, number: int) -> tuple[str, int, int]:
        path = self.store.path / "pixels" / shard_name(study, 0)
        offset, length = read_index(path)[number].tolist()
        return str(path), offset, length

    def read(self, number: int) -> np.ndarray:
        return self.store.reader.read(*self.slices[number].tolist())

    def read_ours(self, number: int) -> np.ndarray:
        self.store.reader.read_into(*self.slices[number].tolist(), self.out)
        return self.out

    def read_bare(self, number: int) -> np.ndarray:
        path, offset, length = self.places[number]
        descriptor = os.open(path, os.O_RDONLY)
        chunk = os.pread(descriptor, length, offset)
        os.close(descriptor)
        zstd.decompress(chunk[:-CHECKSUM_BYTES], self.out)
        return self.out

    def read_memmap(self, number: int) -> np.ndarray:
        return np.array(self.raw[number])

    def read_zarr(self, number: int) -> np.ndarray:
        study, slice_number = self.slices[number].tolist()
        return np.asarray(self.zarr[study, slice_number])

    def read_png(self, number: int) -> np.ndarray:
        pixels = cv2.imread(str(self.folder / "png" / f"{number}.png"), cv2.IMREAD_UNCHANGED)
        assert pixels is not None
        return pixels

    def _read_hu(self, number: int) -> np.ndarray:
        study, slice_number = self.slices[number].tolist()
        dataset = pydicom.dcmread(self.dicom[self.store.image_id[study, slice_number]])
        return dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)

    def _window(self, pixels_hu: np.ndarray) -> np.ndarray:
        return np.stack([np.clip((pixels_hu - w.low_hu) / w.width, 0, 1) * 255 for w in self.windows], axis=-1)

    def _resize(self, pixels: np.ndarray) -> np.ndarray:
        return cv2.resize(pixels, self.out.shape[1::-1], interpolation=cv2.INTER_AREA)

    def read_dicom(self, number: int) -> np.ndarray:
        return self._resize(self._window(self._read_hu(number))).astype(np.uint8)

    def read_dicom_resized_first(self, number: int) -> np.ndarray:
        return self._window(self._resize(self._read_hu(number))).astype(np.uint8)


# peers with datasets of their own -----------------------------------------------------------------------------------


class Numbered(Dataset[Any]):
    """A map-style dataset as one writes it for torch."""

    def __init__(self, read: Callable[[int], np.ndarray], change: Callable[..., Any], labels_NL: np.ndarray) -> None:
        self.read, self.change, self.labels_NL = read, change, labels_NL

    def __len__(self) -> int:
        return len(self.labels_NL)

    def __getitem__(self, number: int) -> Any:
        return self.change(self.read(number), number), torch.from_numpy(self.labels_NL[number])


class Change:
    """The same random changes for all."""

    def __init__(self) -> None:
        self.augment = build_augment(load_config().train.augment)

    def __call__(self, pixels_RCW: np.ndarray, number: int) -> torch.Tensor:
        return torch.from_numpy(self.augment(pixels_RCW[None].copy(), slice_seed(0, 0, number))[0])


def make_persistent(made: Made, *, changed: bool) -> Any:
    """MONAI's dataset: what is not random is done once and kept as one .pt file a slice."""
    from monai.data.dataset import PersistentDataset
    from monai.transforms.compose import Compose
    from monai.transforms.transform import RandomizableTransform, Transform

    class Read(Transform):
        def __call__(self, item: dict[str, int]) -> dict[str, Any]:
            number = item["number"]
            return {
                **item,
                "pixels": torch.from_numpy(made.read(number)),
                "labels": torch.from_numpy(made.labels_NL[number]),
            }

    class Changed(RandomizableTransform):
        change = Change()

        def __call__(self, item: dict[str, Any]) -> Any:
            return self.change(np.asarray(item["pixels"]), item["number"]), item["labels"]

    items = [{"number": number} for number in range(len(made.slices))]
    steps = [Read(), Changed()] if changed else [Read()]
    dataset = PersistentDataset(items, Compose(steps), cache_dir=made.folder / "persistent")
    for number in range(len(items)):
        dataset[number]  # fills the cache
    return dataset


def make_webdataset(made: Made, *, changed: bool) -> Any:
    import webdataset as wds

    tars = made.folder / "tars"
    if not tars.is_dir():
        tars.mkdir()
        with wds.ShardWriter(str(tars / "%04d.tar"), maxcount=-(-len(made.slices) // 8), verbose=0) as writer:
            for number in range(len(made.slices)):
                writer.write(
                    {"__key__": str(number), "pixels.npy": made.read(number), "labels.npy": made.labels_NL[number]}
                )
    urls = sorted(map(str, tars.glob("*.tar")))
    dataset = (
        wds.WebDataset(urls, shardshuffle=len(urls))
        .shuffle(1000)
        .decode()
        .to_tuple("__key__", "pixels.npy", "labels.npy")
    )
    if not changed:
        return dataset
    change = Change()
    return dataset.map(lambda item: (change(item[1], int(item[0])), torch.from_numpy(item[2]))).batched(
        BATCH, collation_fn=torch.utils.data.default_collate
    )


def optimised_sample(path: Path, number: int) -> dict[str, Any]:
    """One slice of a store, for LitData's writer."""
    store = open_store(path)
    study, slice_number = store.slices[number].tolist()
    labels_L = torch.from_numpy(store.labels[study, slice_number])
    return {"number": number, "pixels": store.reader.read(study, slice_number), "labels": labels_L}


@functools.lru_cache(maxsize=1)
def open_store(path: Path) -> Store:
    return Store(path)


def make_litdata(made: Made, *, changed: bool) -> Any:
    import litdata

    chunks = made.folder / "chunks"
    if not chunks.is_dir():
        sample = functools.partial(optimised_sample, made.store.path)
        numbers = list(range(len(made.slices)))
        for name in ("DATA_OPTIMIZER_CACHE_FOLDER", "DATA_OPTIMIZER_DATA_CACHE_FOLDER"):
            os.environ[name] = str(made.folder / name)  # else it leaves files elsewhere
        with silent():
            litdata.optimize(fn=sample, inputs=numbers, output_dir=str(chunks), chunk_bytes="64MB", num_workers=1)
    if not changed:
        return litdata.StreamingDataset(str(chunks))
    change = Change()

    class Changed(litdata.StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            item = super().__getitem__(index)
            return change(item["pixels"], item["number"]), item["labels"]

    return Changed(str(chunks), shuffle=True)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Processes of others print to our card otherwise."""
    kept = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in (1, 2):
            os.dup2(nowhere, number)
        yield
    finally:
        for number, descriptor in zip((1, 2), kept, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.close(nowhere)


MAKERS = {"persistent": make_persistent, "webdataset": make_webdataset, "litdata": make_litdata}


def installed() -> list[str]:
    """Peers that can be measured here."""
    libraries = {"persistent": "monai", "webdataset": "webdataset", "litdata": "litdata"}
    missing = [peer for peer in MAKERS if importlib.util.find_spec(libraries[peer]) is None]
    if missing:
        print(f"left out, as not installed (requirements-bench.txt): {', '.join(missing)}")
    return [peer for peer in PEERS if peer not in missing]


# measuring ----------------------------------------------------------------------------------------------------------


def interleaved(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median of each way's figure over the rounds, after one that is not counted."""
    for way in ways.values():
        way()
    taken = [{name: way() for name, way in ways.items()} for _ in range(rounds)]
    return {name: statistics.median(one[name] for one in taken) for name in ways}


def ms_a_read(read: Callable[[int], object], numbers: list[int]) -> float:
    started_s = time.perf_counter()
    for number in numbers:
        read(number)
    return (time.perf_counter() - started_s) / len(numbers) * 1000


def ms_a_turn(dataset: Iterable[Any], count: int) -> float:
    """Of an iterable that cannot be asked for a slice by number."""
    started_s = time.perf_counter()
    got = sum(1 for _ in itertools.islice(dataset, count))
    return (time.perf_counter() - started_s) / got * 1000


def measure_reader(made: Made, arguments: argparse.Namespace) -> dict[str, Any]:
    numbers = np.random.default_rng(0).permutation(len(made.slices))[: arguments.reads].tolist()
    names = ["ours", "bare", "memmap", *installed(), "dicom_resized_first"]
    ways: dict[str, Callable[[], float]] = {}
    for name in names:
        if name not in MAKERS:
            some = numbers[: max(2, len(numbers) // 10)] if name in SLOW else numbers
            ways[name] = functools.partial(ms_a_read, getattr(made, f"read_{name}"), some)
            continue
        dataset = MAKERS[name](made, changed=False)
        if isinstance(dataset, IterableDataset) and name == "webdataset":
            ways[name] = functools.partial(ms_a_turn, dataset, len(made.slices))
        else:
            ways[name] = functools.partial(ms_a_read, dataset.__getitem__, numbers)
    ms = interleaved(ways, arguments.rounds)
    print("one slice, one thread")
    for name, value in ms.items():
        print(f"  {name:20s}{value:8.3f} ms   ours is {value / ms['ours']:.2f} times as fast")
    return {
        "ratio_to_bare_read": round(ms["ours"] / ms["bare"], 3),
        "times_faster_than": {name: round(ms[name] / ms["ours"], 2) for name in PEERS if name in ms},
        "times_as_slow_as_memmap": round(ms["ours"] / ms["memmap"], 2),
        "times_faster_than_dicom_resized_first": round(ms["dicom_resized_first"] / ms["ours"], 2),
        "read_ms": round(ms["ours"], 4),
    }


def peer_loader(name: str, made: Made, workers: int) -> Iterable[Any]:
    """A peer's batches, in random order, changed, by its own loader or torch's."""
    # fork is what they would get on Linux; LitData's writer has set spawn for all
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": True, "multiprocessing_context": "fork"}
    if name not in MAKERS:
        dataset = Numbered(getattr(made, f"read_{name}"), Change(), made.labels_NL)
        return DataLoader(dataset, batch_size=BATCH, shuffle=True, **options)
    dataset = MAKERS[name](made, changed=True)
    if name == "webdataset":
        import webdataset as wds

        return wds.WebLoader(dataset, batch_size=None, **options)
    if name == "litdata":
        import litdata

        return litdata.StreamingDataLoader(dataset, batch_size=BATCH, **options)
    from monai.data.dataloader import DataLoader as MonaiLoader

    return MonaiLoader(dataset, batch_size=BATCH, shuffle=True, **options)


def slices_a_second(batches: Callable[[], Iterable[Any]]) -> float:
    started_s = time.perf_counter()
    got = sum(len(batch[1]) for batch in batches())
    return got / (time.perf_counter() - started_s)


def our_batches(loader: Loader, made: Made, passes: Iterator[int]) -> Iterator[Any]:
    epoch = next(passes)
    order = epoch_order(made.labels_NL, seed=0, epoch=epoch, sampling=EVERY_SLICE)
    for batch in loader.batches(name_batches(order, batch_size=BATCH, epoch=epoch)):
        yield batch.slices_NRCX, batch.labels_NL


def our_loader(made: Made, *, workers: int, neighbours: int = 0) -> Loader:
    augment = load_config().train.augment
    dataset = SliceDataset(made.store.reader, made.slices, made.labels_NL, neighbours=neighbours, augment=augment)
    return Loader(dataset, workers=workers)


def measure_loader(made: Made, arguments: argparse.Namespace) -> dict[str, Any]:
    workers = arguments.workers
    ours = {
        "ours": our_loader(made, workers=workers),
        "ours, one process": our_loader(made, workers=1),
        "ours, 2.5D": our_loader(made, workers=workers, neighbours=1),
    }
    ways = {
        name: functools.partial(slices_a_second, functools.partial(our_batches, loader, made, itertools.count()))
        for name, loader in ours.items()
    }
    for name in installed():
        loader = peer_loader(name, made, workers)
        ways[name] = functools.partial(slices_a_second, functools.partial(iter, loader))
    with silent() if "litdata" in ways else contextlib.nullcontext():
        rates = interleaved(ways, max(1, arguments.rounds // 2))
    for loader in ours.values():
        loader.close()
    print(f"batches of {BATCH}, {workers} processes, changed")
    for name, value in rates.items():
        print(f"  {name:20s}{value:8.0f} slices/s   ours gives {rates['ours'] / value:.2f} times as many")
    return {
        "loader_times_faster_than": {name: round(rates["ours"] / rates[name], 2) for name in PEERS if name in rates},
        "loader_slices_per_s": round(rates["ours"]),
        "loader_scaling": round(rates["ours"] / rates["ours, one process"], 2),
        "cost_of_neighbours": round(rates["ours"] / rates["ours, 2.5D"], 2),
        "slices": len(made.slices),
    }


if __name__ == "__main__":
    main()
    sys.stdout.flush()
