"""What training costs: slices/s of each model, the share of it spent waiting for data, memory, and the time of an RSNA epoch.

The trainer itself is timed, on a real store, by what it writes into its history: an epoch to warm up (compile, start workers),
then one that counts. The store is made for it: phantom studies, converted by the stages and copied under other names until there
are enough. Beside each model stands its roofline: the rate of a large matrix product, measured in this run, over the arithmetic of
a slice, forward and backward. Nothing is faster than that; a network of thin layers is held up by memory long before.

`--loader-only` times the loader alone, by neighbours and by workers. `torchrun --nproc-per-node N` runs it on N GPUs of one host; on
several hosts give them a `--store` that all can read. Without a GPU, ask for little, such as `--models compact --slices 64
--studies 2 --size 64 --image-size 32 --batch-size 8 --batches 4 --loader-workers 0 --no-compile`. Prints a card; the last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import stages  # noqa: F401  before torch, as in a stage: it says how threads are to wait

# isort: split
import numpy as np
import numpy.typing as npt
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from pipeline.config import MODELS, Config, TrainConfig, load_config
from pipeline.device import choose_device, choose_precision
from pipeline.errors import IchorError
from pipeline.files import human_bytes, remove_folder, require_free_space
from pipeline.loader import Loader, SliceDataset, name_batches
from pipeline.model import build_model
from pipeline.parts import HELD_OUT, TRAINING, VALIDATION, FoldSlices
from pipeline.processes import Processes
from pipeline.store import Store, StoreContent, write_store
from pipeline.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
RSNA_SLICES = 674_258
"""The labelled slices of RSNA 2019 that an epoch over all of them sees."""

MATRIX = {"cuda": 8192, "mps": 4096, "cpu": 1024}
"""Rows and columns of the matrices multiplied: large enough to keep the device full, small enough to take a second in all."""

GIB = 2**30
TITLES = {
    "slices_per_s": "slices/s",
    "wait_share": "waiting",
    "peak_gib": "peak GiB",
    "rsna_epoch_min": "RSNA, min",
    "gflop_a_slice": "GFLOP a slice",
    "roofline_slices_per_s": "roofline/s",
    "share_of_roofline": "of roofline",
}
"""Figures of a model, and how the card calls them."""


@dataclass(frozen=True)
class Bench:
    """What is measured, on what, by whom."""

    store: Store
    train: TrainConfig
    arguments: argparse.Namespace
    processes: Processes
    folder: Path
    """For unfinished work."""

    @property
    def device(self) -> torch.device:
        return choose_device(self.train.device, local_rank=self.processes.local_rank)

    @property
    def device_name(self) -> str:
        is_cuda = self.device.type == "cuda"
        return (
            torch.cuda.get_device_name(self.device) if is_cuda else f"{self.device}, {torch.get_num_threads()} threads"
        )

    @property
    def channels(self) -> int:
        return len(self.store.windows) * (2 * self.train.neighbours + 1)

    def say(self, text: str) -> None:
        """Print a line of the card, once for all processes."""
        if self.processes.is_first:
            print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=ROOT / "params.rsna.yaml")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument(
        "--batches", type=int, default=150, help="of an epoch, shared by all processes (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, help="default, like the next five: what --params says")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction)
    parser.add_argument("--neighbours", type=int, help="channels are windows × (2 × neighbours + 1)")
    parser.add_argument("--device")
    parser.add_argument(
        "--loader-workers", type=int, nargs="+", help="several for --loader-only (its default: 1 2 4 8 16)"
    )
    parser.add_argument("--loader-only", action="store_true", help="no model: how fast the loader alone feeds")
    parser.add_argument("--store", type=Path, help="an existing store to use")
    parser.add_argument("--slices", type=int, default=20_000, help="of the store to make (default: %(default)s)")
    parser.add_argument("--studies", type=int, default=24, help="to render, and then to copy (default: %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="rows and columns of the phantom")
    parser.add_argument("--image-size", type=int, help="of the store to make; default: what --params says")
    parser.add_argument(
        "--work", type=Path, help="make the store in a new folder in this one (default: a temporary one)"
    )
    parser.add_argument("--keep", action="store_true", help="leave the store there, for --store")
    parser.add_argument("--commit", default="not given", help="goes into the JSON line")
    arguments = parser.parse_args()
    try:
        run(arguments)
    except IchorError as error:
        sys.exit(f"error: {error}")


def run(arguments: argparse.Namespace) -> None:
    """Join the other processes, have the first one make a store, measure, and clear away."""
    processes = Processes.join()
    if arguments.work:
        arguments.work.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="ichor-train-", dir=arguments.work)).resolve()
    keep = arguments.keep and processes.is_first and not arguments.store
    try:
        config = configure(arguments, folder)
        if processes.is_first and not arguments.store:
            make_store(folder, arguments)
        path = Path(processes.share_from_first(str(arguments.store or folder / "store.zarr")))
        figures = measure(Bench(Store(path), config.train, arguments, processes, folder))
        processes.gather(None)  # until all are here
    finally:
        if keep:
            print(f"kept: {folder / 'store.zarr'}", file=sys.stderr)
        else:
            remove_folder(folder)
    if processes.is_first:
        print(json.dumps(figures))
    processes.leave()


def configure(arguments: argparse.Namespace, folder: Path) -> Config:
    """The parameters with the arguments in their places, for two epochs; written to `folder`/params.yaml for the stages."""
    values = load_config(arguments.params).model_dump()
    given = {name: getattr(arguments, name) for name in ("batch_size", "precision", "compile", "neighbours", "device")}
    given["loader_workers"] = arguments.loader_workers[0] if arguments.loader_workers else None
    values["train"] |= {name: value for name, value in given.items() if value is not None}
    values["train"] |= {"epochs": 2, "patience": 2, "pretrained": False, "snapshots": 1, "checkpoint_seconds": 1e9}
    values["preprocess"] |= {"workers": "auto", "scheduler": None}
    values["preprocess"] |= {"image_size": arguments.image_size} if arguments.image_size else {}
    values["phantom"] |= {"studies": arguments.studies, "size": arguments.size}
    made = folder / "data" / "phantom"
    values["source"] |= {"dicom": str(made / "dicom"), "labels": str(made / "labels.csv")}
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return load_config(path)


def make_store(folder: Path, arguments: argparse.Namespace) -> None:
    """Make `folder`/store.zarr: render a few studies, convert them as a user would, and copy them under other names.

    By the stages' own doors: what trains shall not import what reads DICOM, nor its loader's workers.
    """
    data = folder / "data"
    for stage in ("phantom", "index", "preprocess"):
        command = [
            sys.executable,
            "-m",
            f"stages.{stage}",
            "--params",
            str(folder / "params.yaml"),
            "--data",
            str(data),
        ]
        done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False)  # standard output is the card's
        if done.returncode:
            raise IchorError(f"stages.{stage} ended with {done.returncode}; it says above why")
    multiply(Store(data / "store.zarr"), folder, slices=arguments.slices)
    remove_folder(data)


def multiply(base: Store, folder: Path, *, slices: int) -> None:
    """Write `folder`/store.zarr with the studies of `base` again and again until there are so many slices.

    The shards are copied, not linked: so the store takes its full size on the disk and in the page cache.
    """
    rounds = -(-slices // int(base.num_slices.sum()))
    source_S = np.tile(np.arange(len(base.study)), rounds)
    enough = int(np.searchsorted(np.cumsum(base.num_slices[source_S]), slices)) + 1
    source_S, copy_S = source_S[:enough], (np.arange(len(source_S)) // len(base.study))[:enough]

    def renamed(names: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.array([f"{name}-{copy}" for name, copy in zip(names[source_S], copy_S, strict=True)], object)

    per_study = {name: values[source_S] for name, values in base.per_study.items()}
    per_study |= {name: renamed(base.per_study[name]) for name in ("patient_key", "content")}
    content = StoreContent(
        renamed(base.study), per_study, base.image_id[source_S], base.position_mm[source_S], base.labels[source_S]
    )
    shards = copy_shards([base.reader.shard_paths(study) for study in source_S], folder / "shards")
    write_store(folder / "store.zarr", content, shards, image_size=base.image_size, windows=base.windows, attributes={})
    remove_folder(folder / "shards")


def copy_shards(sources: list[list[Path]], folder: Path) -> dict[tuple[int, int], Path]:
    """Copy each study's shards into the new folder `folder`: (study, part) → the copy."""
    folder.mkdir()
    require_free_space(folder, sum(path.stat().st_size for paths in sources for path in paths), "the store")
    return {
        (study, part): Path(shutil.copyfile(path, folder / f"{study}.{part}"))
        for study, paths in enumerate(sources)
        for part, path in enumerate(paths)
    }


def measure(bench: Bench) -> dict[str, Any]:
    """Print the card; return what goes into the JSON line."""
    store = bench.store
    slices, stored_bytes = int(store.num_slices.sum()), warm(store)
    fraction = stored_bytes / (slices * int(np.prod(store.reader.shape)))
    is_warm = "warm" if stored_bytes < memory_bytes() / 2 else "partly cold, as memory is small"
    bench.say(
        f"{bench.device_name} × {bench.processes.count}, torch {torch.__version__}; {slices:,} slices of "
        f"{store.image_size}² × {len(store.windows)} windows, {fraction:.3f} of the raw bytes, {human_bytes(stored_bytes)}, "
        f"read once before: {is_warm}"
    )
    figures = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": bench.arguments.commit,
        "device": bench.device_name,
        "processes": bench.processes.count,
        "torch": str(torch.__version__),
        "slices": slices,
        "image_size": store.image_size,
        "stored_fraction": round(fraction, 3),
    }
    return figures | (measure_loaders(bench) if bench.arguments.loader_only else measure_models(bench))


def warm(store: Store) -> int:
    """Read every shard once, so that it lies in the page cache; returns their bytes."""
    return sum(len(path.read_bytes()) for study in range(len(store.study)) for path in store.reader.shard_paths(study))


def memory_bytes() -> int:
    """Memory of this machine, all of it."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def tile(slices: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """So many slices in random order, each as often as any other."""
    order = np.random.default_rng(0).permutation(len(slices))
    return slices[np.resize(order, count)]


def measure_loaders(bench: Bench) -> dict[str, Any]:
    """Slices/s of the loader alone: a pass to start the workers, then one that counts."""
    store, train, rates = bench.store, bench.train, {}
    slices = tile(store.slices, bench.arguments.batches * train.batch_size)
    labels_NL = store.labels[slices[:, 0], slices[:, 1]]
    names = name_batches(np.arange(len(slices)), batch_size=train.batch_size)
    bench.say(f"the loader alone, in batches of {train.batch_size}\n  neighbours   workers   slices/s")
    for neighbours in (0, 1):
        for workers in bench.arguments.loader_workers or (1, 2, 4, 8, 16):
            dataset = SliceDataset(store.reader, slices, labels_NL, neighbours=neighbours, augment=train.augment)
            loader = Loader(dataset, workers=workers, pin=bench.device.type == "cuda")
            try:
                _, rate = time_pass(loader, names), time_pass(loader, names)
            finally:
                loader.close()
            rates[f"neighbours {neighbours}, workers {workers}"] = round(rate, 1)
            bench.say(f"{neighbours:12d}{workers:10d}{rate:11,.0f}")
    return {"batch_size": train.batch_size, "loader_slices_per_s": rates}


def time_pass(loader: Loader, names: list[Any]) -> float:
    """Slices/s of one pass over the batches, from asking for the first to having the last."""
    started_s = time.perf_counter()
    count = sum(len(batch.labels_NL) for batch in loader.batches(names))
    return count / (time.perf_counter() - started_s)


def measure_models(bench: Bench) -> dict[str, Any]:
    """One model after another; what has no room is noted, and the next one goes on."""
    train, device, models = bench.train, bench.device, {}
    flops_per_s = sum(bench.processes.gather(measure_matmul(device)))
    precision = str(choose_precision(train.precision, device) or torch.float32).removeprefix("torch.")
    bench.say(
        f"{bench.channels} channels, batches of {train.batch_size}, {precision}, {'' if train.compile else 'not '}compiled, "
        f"{train.loader_workers} loader workers a process; matrix products of {MATRIX[device.type]} × {MATRIX[device.type]} "
        f"in {str(matrix_type(device)).removeprefix('torch.')} at {flops_per_s / 1e12:.3g} TFLOP/s"
    )
    bench.say(f"{'':18s}" + "".join(f"{title:>14s}" for title in TITLES.values()))
    for name in bench.arguments.models:
        figures = models[name] = measure_model(bench, name, flops_per_s=flops_per_s)
        shown = [f"{figures[key]:14,}" for key in TITLES] if "failed" not in figures else ["  ", figures["failed"]]
        bench.say(f"  {name:16s}" + "".join(shown))
    if all("failed" in figures for figures in models.values()):
        raise IchorError("no model could be measured; the card says why")
    keys = ("batch_size", "compile", "neighbours", "loader_workers")
    options = {"precision": precision, **{key: getattr(train, key) for key in keys}}
    return {"options": options, "matmul_tflops": round(flops_per_s / 1e12, 3), "models": models}


def matrix_type(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def measure_matmul(device: torch.device) -> float:
    """FLOP/s of a large matrix product, the best of several tries."""
    size, best_s = MATRIX[device.type], float("inf")
    left, right = (torch.randn(size, size, device=device, dtype=matrix_type(device)) for _ in range(2))
    for _ in range(8):
        started_s = time.perf_counter()
        for _ in range(5):
            product = left @ right
        product[0, 0].item()  # waits for the device
        best_s = min(best_s, (time.perf_counter() - started_s) / 5)
    return 2 * size**3 / best_s


def measure_model(bench: Bench, name: str, *, flops_per_s: float) -> dict[str, Any]:
    """The figures of one model, or why it has none."""
    forget_peak(bench.device)
    try:
        history = train_two_epochs(bench, bench.train.model_copy(update={"model": name}))
    except (torch.OutOfMemoryError, IchorError) as error:
        return {"failed": str(error).splitlines()[0][:200]}
    rate, peak = history[-1]["slices_per_s"], peak_gib(bench.device)
    flops = count_flops(name, channels=bench.channels, image_size=bench.store.image_size)
    return {
        "slices_per_s": rate,
        "wait_share": history[-1]["wait_share"],
        "peak_gib": peak,
        "rsna_epoch_min": round(RSNA_SLICES / rate / 60, 2),
        "gflop_a_slice": round(flops / 1e9, 3),
        "roofline_slices_per_s": round(flops_per_s / flops, 1),
        "share_of_roofline": round(rate * flops / flops_per_s, 4),
    }


def train_two_epochs(bench: Bench, train: TrainConfig) -> list[dict[str, float]]:
    """The history that the trainer itself writes: an epoch to warm up, and one that counts."""
    size = train.batch_size
    slices = tile(bench.store.slices, (bench.arguments.batches + 1) * size)
    parts = FoldSlices(
        training=slices[size:],
        validation=slices[:size],
        held_out=slices[:size],
        unlabelled=slices[:0],
        patients={TRAINING: len(bench.store.study), VALIDATION: 1, HELD_OUT: 1},
        digest="none",
    )
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        trainer = Trainer(
            train, bench.store, parts, identity={"fold": 0}, folder=Path(folder), processes=bench.processes
        )
        trainer.run()
    return trainer.state.history


def forget_peak(device: torch.device) -> None:
    """Let go of the model before, and count memory anew."""
    gc.collect()
    torch.compiler.reset()  # else the ninth model compiled is run as it stands: torch compiles a function eight times
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # Linux has it: proc(5)
            Path("/proc/self/clear_refs").write_text("5")


def peak_gib(device: torch.device) -> float:
    """Peak memory in GiB: the GPU's that torch took, or else this process's resident memory; its workers' is not in it."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / GIB, 2)
    with suppress(OSError):
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return round(int(status["VmHWM"].split()[0]) * 1024 / GIB, 2)
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / GIB  # bytes, where there is no /proc: macOS


def count_flops(name: str, *, channels: int, image_size: int) -> float:
    """FLOP of a slice in the real model's convolutions and matrix products, forward and backward.

    Shapes decide it, so the model is built without memory behind them.
    """
    with torch.device("meta"):
        network = build_model(name, channels=channels, dropout=0.0).train()
        slices_NXRC = torch.empty(2, channels, image_size, image_size)
    by_hand = {torch.ops.aten.convolution_backward: convolution_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=by_hand) as counter:
        network(slices_NXRC).sum().backward()
    return counter.get_total_flops() / len(slices_NXRC)


def convolution_backward_flops(
    grad_out: list[int], inputs: list[int], weights: list[int], *others: Any, out_shape: Any = None
) -> int:
    """Each of the two gradients costs what the forward pass did.

    torch 2.13's own formula forgets the groups in the weights' gradient: of EfficientNet-B0 it would make 42 GFLOP, not 3.1.
    """
    is_transposed, (of_inputs, of_weights, _) = others[4], others[7]
    return (of_inputs + of_weights) * conv_flop_count(inputs, weights, grad_out, is_transposed)


if __name__ == "__main__":
    main()
