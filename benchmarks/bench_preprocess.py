"""What a slice costs to convert, against its floor and against the straightforward way; one core, warm cache.

The floor reads the same bytes and Blosc-encodes the same output: no converter to this form can be faster. The straightforward
way is pydicom, float windows, cv2 and PNG. Prints a card; the last line is JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom

from pipeline.config import PhantomConfig, load_config
from pipeline.dicom import read_header
from pipeline.index import build_manifest
from pipeline.manifest import kept
from pipeline.phantom.cohort import write_cohort
from pipeline.preprocess import SLICE_COLUMNS, convert_slice
from pipeline.shard import encode_chunk


def median_ms(function: Callable[[int], Any], count: int, rounds: int) -> float:
    """Median over rounds of the mean time of a call."""
    times = []
    for _ in range(rounds):
        started_s = time.perf_counter()
        for number in range(count):
            function(number)
        times.append((time.perf_counter() - started_s) / count * 1000)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dicom", help="a folder of studies to measure on (default: two phantom studies)")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--size", type=int, default=512, help="rows and columns of the phantom")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not arguments.dicom:
            config = PhantomConfig(studies=2, slices=[24, 24], size=arguments.size, seed=0)
            write_cohort(config, folder=folder, wip=folder, workers="auto")
        measure(Path(arguments.dicom or folder / "dicom"), arguments)


def measure(source: Path, arguments: argparse.Namespace) -> None:
    config = load_config()
    config = config.model_copy(
        update={"source": config.source.model_copy(update={"dicom": str(source), "labels": None})}
    )
    windows, size = config.preprocess.windows, arguments.image_size
    manifest, _, _ = build_manifest(config)
    slices = kept(manifest)
    paths = [source / path for path in slices["path"]]
    facts = slices[SLICE_COLUMNS].to_dict("records")
    converted = [
        convert_slice(path, one, image_size=size, windows=windows)[0] for path, one in zip(paths, facts, strict=True)
    ]

    def plain(number: int) -> None:
        dataset = pydicom.dcmread(paths[number])
        pixels_hu = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
        pixels_hu = cv2.resize(pixels_hu, (size, size), interpolation=cv2.INTER_AREA)
        channels = [np.clip((pixels_hu - w.low_hu) / w.width, 0, 1) * 255 for w in windows.values()]
        cv2.imencode(".png", np.stack(channels, axis=-1).astype(np.uint8))

    count, rounds = len(paths), arguments.rounds
    ways = {
        "floor": lambda number: (paths[number].read_bytes(), encode_chunk(converted[number])),
        "ours": lambda number: encode_chunk(
            convert_slice(paths[number], facts[number], image_size=size, windows=windows)[0]
        ),
        "plain": plain,
        "header": lambda number: read_header(paths[number], patient_salt="bench"),
    }
    ms = {name: median_ms(way, count, rounds) for name, way in ways.items()}
    print(f"{count} slices of {slices['rows'].iloc[0]}² to {size}² × {len(windows)} windows, one core, warm")
    for name, value in ms.items():
        print(f"  {name:8s}{value:8.3f} ms a slice")
    figures = {
        "ratio_to_floor": round(ms["ours"] / ms["floor"], 2),
        "ratio_to_plain": round(ms["plain"] / ms["ours"], 2),
        "header_ms": round(ms["header"], 3),
        "stored_fraction": round(
            sum(len(encode_chunk(one)) for one in converted) / sum(one.nbytes for one in converted), 3
        ),
        "slices": count,
        "image_size": size,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
