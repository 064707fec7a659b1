"""What a slice costs to convert: against its floor, the straightforward way and dcm2niix; on two workers; and to index; warm cache.

The floor reads the same bytes and encodes the same output with zstd: no converter to this form can be faster. The straightforward
way is pydicom, float windows, cv2 and PNG. dcm2niix (`-z n`) writes its voxels as they are, without windows or compression, and does
not wait for the disk; our cost beside it holds the header, the conversion and the shard, without waiting either. Measured on phantom
studies, and on a real head where one lies beside the checkout; or on any folder of studies (`--dicom`). Prints a card; the last line
is JSON.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
import pydicom

from benchmarks.bench_scale import FORMS, make_template
from pipeline.cluster import run_tasks
from pipeline.config import Config, PhantomConfig, load_config
from pipeline.convert import SliceReader, StudyTask, make_shards
from pipeline.files import write_parquet
from pipeline.header import read_headers
from pipeline.index import build_manifest, read_known_headers
from pipeline.manifest import kept, write_manifest
from pipeline.phantom.cohort import write_cohort
from pipeline.place import Place
from pipeline.preprocess import SLICES_PER_TASK, Plan
from pipeline.shard import encode_chunk

COPIES, PASSES = 20, 10
FEWEST_TASKS = 6

REAL_HEAD = Path(__file__).resolve().parents[2] / "shared" / "dicom" / "ge-head-trauma"
"""A real head CT, measured too where it lies beside the checkout."""


def mean_ms(function: Callable[[int], Any], count: int) -> float:
    """Mean time of a call."""
    started_s = time.perf_counter()
    for number in range(count):
        function(number)
    return (time.perf_counter() - started_s) / count * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dicom", help="a folder of studies to measure on (default: two phantom studies)")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--size", type=int, default=512, help="rows and columns of the phantom")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=24, help="tasks to share between one worker, then two")
    parser.add_argument("--files", type=int, default=100_000, help="small files to index twice")
    arguments = parser.parse_args()
    if arguments.tasks < FEWEST_TASKS:
        parser.error(f"--tasks {arguments.tasks}: at least {FEWEST_TASKS}, as the first ones are left out")
    cv2.setNumThreads(1)
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE  # so the straightforward way is at its best
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not arguments.dicom:
            config = PhantomConfig(studies=2, slices=[24, 24], size=arguments.size, seed=0)
            write_cohort(config, folder=folder, wip=folder, workers=0)  # two studies
        figures = measure_slices(Path(arguments.dicom or folder / "dicom"), folder, arguments)
        if not arguments.dicom and REAL_HEAD.is_dir():
            (folder / "real").mkdir()
            figures["real_head"] = measure_slices(REAL_HEAD, folder / "real", arguments)
        figures |= measure_rescan(folder, arguments.files, arguments.rounds)
    print(json.dumps(figures))


def configure(source: Path, image_size: int) -> Config:
    config = load_config()
    preprocess = config.preprocess.model_copy(update={"image_size": image_size, "workers": 0})
    where = config.source.model_copy(update={"dicom": str(source), "labels": None})
    return config.model_copy(update={"source": where, "preprocess": preprocess})


def measure_slices(source: Path, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    config = configure(source, arguments.image_size)
    windows, size = config.preprocess.windows, arguments.image_size
    manifest, _, _ = build_manifest(config)
    slices = kept(manifest).reset_index(drop=True)
    (folder / "shards").mkdir()
    plan = Plan(slices, config, folder / "shards")
    tasks = [plan.task(number) for number in range(len(plan))]
    work = [
        (path, facts, task.whole) for task in tasks for path, facts in zip(task.containers, task.slices, strict=True)
    ]
    reader = SliceReader(image_size=size, windows=windows)
    converted = [reader.read(path, facts, box)[0].copy() for path, facts, box in work]
    places = [Place(path, facts.size, facts.stamp) for path, facts, _ in work]

    def plain(number: int) -> None:
        dataset = pydicom.dcmread(work[number][0])
        pixels_hu = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
        pixels_hu = cv2.resize(pixels_hu, (size, size), interpolation=cv2.INTER_AREA)
        channels = [np.clip((pixels_hu - w.low_hu) / w.width, 0, 1) * 255 for w in windows.values()]
        cv2.imencode(".png", np.stack(channels, axis=-1).astype(np.uint8))

    count = len(work)
    copy_series([Path(path) for path, *_ in work], folder)
    ways: dict[str, Callable[[], float]] = {
        "floor": lambda: mean_ms(lambda n: (Path(work[n][0]).read_bytes(), encode_chunk(converted[n])), count),
        "ours": lambda: mean_ms(lambda n: encode_chunk(reader.read(*work[n])[0]), count),
        "plain": lambda: mean_ms(plain, count),
        "header": lambda: mean_ms(lambda n: read_headers(places[n], patient_salt="bench"), count),
        "shards": lambda: measure_shards(tasks, folder / "shards") / count,
        "dcm2niix": lambda: measure_dcm2niix(folder) / count,
    }
    # in turn, and compared within a round: a shared machine is now quicker, now slower, for all of them
    rounds = [{name: way() for name, way in ways.items()} for _ in range(arguments.rounds)]
    median = {name: statistics.median(one[name] for one in rounds) for name in ways}
    print(f"{count} slices of {slices['rows'].iloc[0]}² to {size}² × {len(windows)} windows, one core, warm")
    for name, value in median.items():
        print(f"  {name:8s}{value:8.3f} ms a slice")
    encoded = sum(len(encode_chunk(one)) for one in converted)
    return {
        "ratio_to_floor": median_ratio((one["ours"], one["floor"]) for one in rounds),
        "ratio_to_plain": median_ratio((one["plain"], one["ours"]) for one in rounds),
        "ratio_to_dcm2niix": median_ratio((one["header"] + one["shards"], one["dcm2niix"]) for one in rounds),
        "ratio_two_workers": measure_two_workers(tasks, arguments.tasks, folder / "shards", min(arguments.rounds, 3)),
        "header_ms": round(median["header"], 3),
        "stored_fraction": round(encoded / sum(one.nbytes for one in converted), 3),
        "slices": count,
        "image_size": size,
    }


def median_ratio(pairs: Iterable[tuple[float, float]]) -> float:
    return round(statistics.median(above / below for above, below in pairs), 2)


def measure_shards(tasks: list[StudyTask], shards: Path) -> float:
    """Milliseconds for all studies, over several passes, as dcm2niix has its copies; each into an empty folder, as dcm2niix has one:
    ext4 waits for the disk where a file is renamed over another."""
    total_ms = 0.0
    for _ in range(PASSES):
        empty(shards)
        with mock.patch("os.fsync"):
            total_ms += mean_ms(lambda number: make_shards([tasks[number]]), len(tasks)) * len(tasks)
    return total_ms / PASSES


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def copy_series(paths: list[Path], folder: Path) -> None:
    """The same series once, and as twenty different ones, laid straight and evenly: of a tilted stack dcm2niix would also make one
    without the tilt, for ten times the cost."""
    for number, path in enumerate(paths):
        dataset = pydicom.dcmread(path)
        uid = dataset.SeriesInstanceUID
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        dataset.ImagePositionPatient = [-125, -125, 5 * number]
        for keyword in ("GantryDetectorTilt", "SliceLocation", "SpacingBetweenSlices"):
            if keyword in dataset:
                del dataset[keyword]
        for copy in range(COPIES):
            (folder / "many" / str(copy)).mkdir(parents=True, exist_ok=True)
            dataset.SeriesInstanceUID = f"{uid[:-2]}{copy:02d}"
            dataset.save_as(folder / "many" / str(copy) / f"{number}.dcm")
    (folder / "one").mkdir()
    shutil.copytree(folder / "many" / "0", folder / "one" / "0")


def measure_dcm2niix(folder: Path) -> float:
    """Milliseconds for the series, start of the process excluded: the slope between one and twenty copies of it."""
    program = shutil.which("dcm2niix")
    if program is None:
        sys.exit("dcm2niix is not installed; it is a package of Debian and Ubuntu: apt-get install dcm2niix")

    def run(name: str) -> tuple[float, int]:
        out = folder / "nii"
        out.mkdir()
        started_s = time.perf_counter()
        command = [program, "-z", "n", "-b", "n", "-o", str(out), "-f", "%s_%j_%d", str(folder / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        took_s = time.perf_counter() - started_s
        written = sum(path.stat().st_size for path in out.glob("*.nii"))
        assert written, f"dcm2niix wrote nothing: {done.stdout}{done.stderr}"
        shutil.rmtree(out)
        return took_s, written

    (one_s, one_bytes), (many_s, many_bytes) = run("one"), run("many")
    assert many_bytes == COPIES * one_bytes, "dcm2niix took copies for one series"
    return (many_s - one_s) / (COPIES - 1) * 1000


def measure_two_workers(tasks: list[StudyTask], count: int, shards: Path, rounds: int) -> float:
    """How much faster two Dask workers are than one, from the first result to the last: their start is left out."""
    studies = -(-SLICES_PER_TASK // max(len(task.slices) for task in tasks))  # a task, as the stage shares them out

    def draw() -> Iterator[list[StudyTask]]:
        for first in range(0, count * studies, studies):
            numbers = range(first, first + studies)
            yield [tasks[number % len(tasks)]._replace(fingerprint=f"{number}") for number in numbers]

    def seconds_a_task(workers: int) -> float:
        empty(shards)
        finished_s = [time.perf_counter() for _ in run_tasks(make_shards, draw(), workers=workers, scheduler=None)]
        skipped = 2 * workers  # the first of each worker imports the code
        return (finished_s[-1] - finished_s[skipped]) / (len(finished_s) - skipped - 1)

    return median_ratio([(seconds_a_task(1), seconds_a_task(2)) for _ in range(rounds)])


def measure_rescan(folder: Path, files: int, rounds: int) -> dict[str, Any]:
    """Microseconds a file of an `index` that finds nothing changed."""
    source = folder / "small"
    source.mkdir()
    template = make_template(FORMS[0], folder)
    for number in range(files):
        (source / f"{number}.dcm").write_bytes(template.fill(number))
    config = configure(source, 32)
    config = config.model_copy(update={"preprocess": config.preprocess.model_copy(update={"workers": "auto"})})
    _, headers, _ = build_manifest(config)
    assert headers is not None
    write_parquet(folder / "headers.parquet", headers)
    times = []
    for _ in range(rounds):
        started_s = time.perf_counter()
        manifest, headers, _ = build_manifest(config, read_known_headers(folder / "headers.parquet"))
        assert headers is None, "nothing has changed"
        write_manifest(folder / "manifest.parquet", manifest)
        times.append(time.perf_counter() - started_s)
    return {"rescan_us": round(statistics.median(times) / files * 1e6, 2)}


if __name__ == "__main__":
    main()
