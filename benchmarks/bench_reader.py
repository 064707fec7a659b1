"""What a random slice costs to read from the store, against zarr-python, a bare read and decode, and PNG; one thread, warm.

Prints a card; the last line is JSON. Reads the store that the pipeline has made (give --data for another).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import zarr
from numcodecs import blosc

from pipeline.reader import shard_name
from pipeline.shard import CHECKSUM_BYTES, read_index
from pipeline.store import Store


def median_ms(read: Callable[[int, int], object], slices: np.ndarray, rounds: int) -> float:
    """Median over rounds of the mean time of a read."""
    times = []
    for _ in range(rounds):
        started_s = time.perf_counter()
        for study, number in slices.tolist():
            read(study, number)
        times.append((time.perf_counter() - started_s) / len(slices) * 1000)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--slices", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    store = Store(arguments.data / "store.zarr")
    rng = np.random.default_rng(0)
    slices = store.slices[rng.permutation(len(store.slices))[: arguments.slices]]
    out = np.empty(store.reader.shape, np.uint8)
    array = zarr.open_group(store.path, mode="r")["pixels"]
    assert isinstance(array, zarr.Array)
    places = {
        (study, number): (
            store.path / "pixels" / shard_name(study, number // 64),
            *read_index(store.path / "pixels" / shard_name(study, number // 64))[number % 64].tolist(),
        )
        for study, number in slices.tolist()
    }
    pngs = {
        (study, number): cv2.imencode(".png", store.reader.read(study, number))[1] for study, number in slices.tolist()
    }

    def bare(study: int, number: int) -> None:
        path, offset, length = places[study, number]
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            blosc.decompress(file.read(length)[:-CHECKSUM_BYTES], out)

    ways: dict[str, Callable[[int, int], object]] = {
        "ours": lambda study, number: store.reader.read_into(study, number, out),
        "bare": bare,
        "zarr": lambda study, number: array[study, number],
        "png": lambda study, number: cv2.imdecode(pngs[study, number], cv2.IMREAD_UNCHANGED),
    }
    for way in ways.values():
        way(*slices[0].tolist())
    ms = {name: median_ms(way, slices, 1 if name == "zarr" else arguments.rounds) for name, way in ways.items()}
    print(f"{len(slices)} random slices of {out.shape}, one thread, warm")
    for name, value in ms.items():
        print(f"  {name:6s}{value:8.3f} ms a slice")
    print(
        json.dumps(
            {
                "ratio_to_bare_read": round(ms["ours"] / ms["bare"], 2),
                "times_faster_than": {name: round(ms[name] / ms["ours"], 1) for name in ("zarr", "png")},
                "slices": len(slices),
            }
        )
    )


if __name__ == "__main__":
    main()
