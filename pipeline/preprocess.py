"""DICOM into the store: one study is one task's unit of work, one shard, one writer.

A finished shard is kept in `data/wip/shards/` under its fingerprint, which names the study's slices, the parameters that
shape them and the code that makes them. So a killed run continues, ten added studies cost ten studies, and a changed label
costs no pixels. The published store hard-links the shards.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd

from pipeline import dicom, hounsfield, shard
from pipeline.cluster import run_tasks
from pipeline.config import Config, PreprocessConfig, Window
from pipeline.dicom import PixelFault, read_stored
from pipeline.errors import SourceError
from pipeline.files import only_one, remove_folder, replace_folder, require_free_space, write_bytes
from pipeline.hounsfield import resize_hu, stored_to_hu, window_hu
from pipeline.index import locate
from pipeline.labels import LABELS, UNKNOWN
from pipeline.manifest import EXCLUDED, account, kept
from pipeline.progress import Progress
from pipeline.shard import SLOTS, build_shard, encode_chunk
from pipeline.store import STUDY_ARRAYS, StoreContent, slice_axis, write_store

SLICES_PER_TASK = 256
"""About half a second of work: long enough to hide Dask's overhead, short enough to lose little."""

STORED_FRACTION = 0.35
"""Share of the raw bytes that a shard may need, for the check of free disk; heads measured 0.17 to 0.25."""

PACKAGES = ("numpy", "numcodecs", "opencv-python-headless", "pydicom")
DECODERS = (
    "python-gdcm",
    "pylibjpeg",
    "pylibjpeg-libjpeg",
    "pylibjpeg-openjpeg",
    "pylibjpeg-rle",
    "pyjpegls",
    "pillow",
)
"""Packages that decide a shard's bytes: another decoder may read what this one could not, or read it otherwise."""

SLICE_COLUMNS = [
    "source", "path", "size", "mtime_ns", "image_id", "transfer_syntax", "rows", "columns", "bits_stored", "signed",
    "pixel_offset", "slope", "intercept", "row_spacing_mm", "column_spacing_mm", "reason",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class StudyTask:
    """What a worker needs to make one study's shards."""

    fingerprint: str
    shards: Path
    paths: list[str]
    slices: list[dict[str, Any]]
    image_size: int
    windows: dict[str, Window]


@dataclass(frozen=True, slots=True)
class StudyResult:
    """What became of a study; kept beside its shards."""

    fingerprint: str
    kept: list[bool]
    faults: dict[str, str]
    """Image id → reason of slices whose pixels could not be had."""
    lowest_hu: float


def preprocess(
    config: Config, manifest: pd.DataFrame, *, data: Path, manifest_digest: str
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Convert the manifest's slices, and publish `data/store.zarr`.

    Args:
        config: the parameters.
        manifest: from `index`.
        data: the folder of the stages' outputs.
        manifest_digest: goes into the store's attributes.

    Returns:
        The final accounting, and the files whose status changed when their pixels were read.

    Raises:
        SourceError: the source is gone, or files changed since `index` read them; what is finished is kept.
    """
    wip = data / "wip" / "shards"
    wip.mkdir(parents=True, exist_ok=True)
    with only_one(data / "wip" / "preprocess.lock", "preprocess"):
        slices = kept(manifest).reset_index(drop=True)
        tasks = list(_plan(slices, config, wip))
        waiting = [task for task in tasks if not _is_finished(task)]
        _check_source_and_space(config, waiting, data)
        print(f"preprocess: {len(tasks):,} studies, {len(tasks) - len(waiting):,} finished before", flush=True)
        _make_all(waiting, config.preprocess)
        results = [_read_result(task) for task in tasks]
        _refuse_changed(slices, results)
        final = _apply_faults(manifest, results)
        totals = account(final)
        _publish(
            config.preprocess,
            slices,
            tasks,
            results,
            data=data,
            attributes={"manifest_sha256": manifest_digest, "accounting": totals},
        )
    changed = final[(final["status"] != manifest["status"])]
    return totals, changed[["source", "path", "image_id", "study_uid", "status", "reason"]]


def _plan(slices: pd.DataFrame, config: Config, wip: Path) -> Iterator[StudyTask]:
    shape = json.dumps(
        [
            _code_digest(),
            config.preprocess.image_size,
            [(name, w.centre, w.width) for name, w in config.preprocess.windows.items()],
        ]
    )
    sources = [source.absolute() for source in config.source.dicom_paths]
    records = slices[SLICE_COLUMNS].to_dict("records")
    for start, stop in _study_bounds(slices):
        rows = [{str(key): value for key, value in record.items()} for record in records[start:stop]]
        paths = [str(locate(sources, row.pop("source"), row.pop("path"))) for row in rows]
        fingerprint = hashlib.sha256((shape + json.dumps(rows)).encode()).hexdigest()[:32]
        yield StudyTask(
            fingerprint, wip.absolute(), paths, rows, config.preprocess.image_size, config.preprocess.windows
        )


def _study_bounds(slices: pd.DataFrame) -> list[tuple[int, int]]:
    """First and last row of each study: the manifest keeps a study's slices together."""
    uids = slices["study_uid"].to_numpy()
    starts = np.flatnonzero(np.r_[True, uids[1:] != uids[:-1]])
    return list(zip(starts.tolist(), [*starts[1:].tolist(), len(uids)], strict=True))


def _code_digest() -> str:
    """Names the code and the libraries that decide a shard's bytes."""
    digest = hashlib.sha256()
    for module in (dicom, hounsfield, shard):
        digest.update(Path(str(module.__file__)).read_bytes())
    digest.update(Path(__file__).read_bytes())
    for package in (*PACKAGES, *DECODERS):
        with suppress(PackageNotFoundError):
            digest.update(f"{package}={version(package)}".encode())
    return digest.hexdigest()


def _result_path(task: StudyTask) -> Path:
    return task.shards / f"{task.fingerprint}.json"


def shard_path(folder: Path, fingerprint: str, part: int) -> Path:
    """Where unfinished work keeps a finished shard."""
    return folder / f"{fingerprint}.{part}.shard"


def _is_finished(task: StudyTask) -> bool:
    """The result is written last, so that its presence vouches for the shards; one with a changed file is tried again."""
    try:
        result = _read_result(task)
    except (OSError, ValueError, TypeError):  # not there, or damaged
        return False
    parts = -(-sum(result.kept) // SLOTS)
    return "changed" not in result.faults.values() and all(
        shard_path(task.shards, task.fingerprint, part).is_file() for part in range(parts)
    )


def _read_result(task: StudyTask) -> StudyResult:
    return StudyResult(task.fingerprint, **json.loads(_result_path(task).read_bytes()))


def _check_source_and_space(config: Config, waiting: Sequence[StudyTask], data: Path) -> None:
    if not waiting:
        return
    for source in config.source.dicom_paths:
        if not source.exists():
            raise SourceError(
                f"source.dicom: {source} was there when index ran and is gone; bring it back, or run index again"
            )
    raw_bytes = (
        sum(len(task.paths) for task in waiting) * config.preprocess.image_size**2 * len(config.preprocess.windows)
    )
    require_free_space(data, int(raw_bytes * STORED_FRACTION) + 50_000_000, f"preprocessing {len(waiting):,} studies")


def _make_all(waiting: Sequence[StudyTask], config: PreprocessConfig) -> None:
    total = sum(len(task.paths) for task in waiting)
    if not total:
        return
    faults = studies = 0
    with Progress(total, what="preprocess", unit="slices") as progress:
        workers = 0 if total <= SLICES_PER_TASK else config.workers  # not worth starting processes for
        for results in run_tasks(make_shards, _batches(waiting), workers=workers, scheduler=config.scheduler):
            studies += len(results)
            faults += sum(len(result.faults) for result in results)
            progress.advance(
                sum(len(result.kept) for result in results), f"{studies:,} studies, {faults:,} slices excluded"
            )


def _batches(tasks: Sequence[StudyTask]) -> Iterator[list[StudyTask]]:
    batch: list[StudyTask] = []
    for task in tasks:
        batch.append(task)
        if sum(len(task.paths) for task in batch) >= SLICES_PER_TASK:
            yield batch
            batch = []
    if batch:
        yield batch


def make_shards(batch: Sequence[StudyTask]) -> list[StudyResult]:
    """Make the shards of a few studies: the function that runs on the workers."""
    cv2.setNumThreads(1)  # one process a core already
    return [_make_study(task) for task in batch]


def _make_study(task: StudyTask) -> StudyResult:
    chunks: list[bytes] = []
    is_kept: list[bool] = []
    faults: dict[str, str] = {}
    lowest_hu = np.inf
    for path, facts in zip(task.paths, task.slices, strict=True):
        try:
            pixels, lowest = convert_slice(Path(path), facts, image_size=task.image_size, windows=task.windows)
        except PixelFault as fault:
            faults[facts["image_id"]] = fault.code
        else:
            chunks.append(encode_chunk(pixels))
            lowest_hu = min(lowest_hu, lowest)
        is_kept.append(facts["image_id"] not in faults)
    for part, start in enumerate(range(0, len(chunks), SLOTS)):
        write_bytes(shard_path(task.shards, task.fingerprint, part), build_shard(chunks[start : start + SLOTS]))
    result = StudyResult(task.fingerprint, is_kept, faults, float(lowest_hu) if chunks else 0.0)
    record = {"kept": is_kept, "faults": faults, "lowest_hu": result.lowest_hu}
    write_bytes(_result_path(task), json.dumps(record).encode())
    return result


def convert_slice(
    path: Path, facts: dict[str, Any], *, image_size: int, windows: dict[str, Window]
) -> tuple[hounsfield.Pixels, float]:
    """Convert one DICOM slice to windowed pixels: read, rescale and repair, resample, window.

    Args:
        path: the file.
        facts: the manifest's values of `SLICE_COLUMNS`.
        image_size: rows and columns of the result.
        windows: by name.

    Returns:
        uint8 [row, column, window], and the lowest HU of the slice before padding is raised to air.

    Raises:
        PixelFault: the pixels cannot be had.
    """
    stored = read_stored(
        path,
        size=facts["size"],
        mtime_ns=facts["mtime_ns"],
        transfer_syntax=facts["transfer_syntax"],
        rows=facts["rows"],
        columns=facts["columns"],
        bits_stored=facts["bits_stored"],
        signed=facts["signed"] == 1,
        pixel_offset=facts["pixel_offset"],
    )
    wrapped = facts["reason"] == "wrap_12bit"
    pixels_hu = stored_to_hu(stored, slope=facts["slope"], intercept=facts["intercept"], wrapped=wrapped)
    lowest_hu = float(stored.min()) * facts["slope"] + facts["intercept"] if not wrapped else float(pixels_hu.min())
    pixels_hu = resize_hu(
        pixels_hu, size=image_size, row_spacing_mm=facts["row_spacing_mm"], column_spacing_mm=facts["column_spacing_mm"]
    )
    return window_hu(pixels_hu, windows), lowest_hu


def _refuse_changed(slices: pd.DataFrame, results: Sequence[StudyResult]) -> None:
    changed = {image_id for result in results for image_id, code in result.faults.items() if code == "changed"}
    if changed:
        first = slices[slices["image_id"].isin(changed)].iloc[0]
        raise SourceError(
            f"{len(changed)} file(s) changed, vanished or could not be read after index, {first['path']!r} first; "
            f"run `python -m stages.index` (or `dvc repro`) again; what is finished is kept"
        )


def _apply_faults(manifest: pd.DataFrame, results: Sequence[StudyResult]) -> pd.DataFrame:
    """The manifest with what reading the pixels added."""
    faults = {image_id: code for result in results for image_id, code in result.faults.items()}
    final = manifest.copy()
    hit = (final["status"] != EXCLUDED) & final["image_id"].isin(faults)
    final.loc[hit, "reason"] = final.loc[hit, "image_id"].map(faults)
    final.loc[hit, "status"] = EXCLUDED
    return final


def _publish(
    config: PreprocessConfig,
    slices: pd.DataFrame,
    tasks: Sequence[StudyTask],
    results: Sequence[StudyResult],
    *,
    data: Path,
    attributes: dict[str, Any],
) -> None:
    """Gather the shards into a store under a temporary name, and rename it."""
    is_kept = np.concatenate([result.kept for result in results])
    slices = slices[is_kept].reset_index(drop=True)
    if slices.empty:
        raise SourceError("no slice's pixels could be read; see the reasons above")
    alive = [result for result in results if any(result.kept)]
    content = _gather(slices, alive)
    wip = tasks[0].shards
    shards = {
        (study, part): shard_path(wip, result.fingerprint, part)
        for study, result in enumerate(alive)
        for part in range(-(-sum(result.kept) // SLOTS))
    }
    temporary = data / "wip" / f"store-{os.getpid()}.zarr"
    remove_folder(temporary)
    try:
        write_store(
            temporary, content, shards, image_size=config.image_size, windows=config.windows, attributes=attributes
        )
        replace_folder(temporary, data / "store.zarr")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _gather(slices: pd.DataFrame, results: Sequence[StudyResult]) -> StoreContent:
    """The slices' table, one row a slice, into arrays [study, slice]."""
    bounds = _study_bounds(slices)
    starts = np.array([start for start, _ in bounds])
    counts = np.array([stop - start for start, stop in bounds])
    shape = (len(bounds), slice_axis(int(counts.max())))
    at = (np.repeat(np.arange(len(bounds)), counts), np.arange(len(slices)) - np.repeat(starts, counts))
    image_id = np.full(shape, "", object)
    image_id[at] = slices["image_id"].to_numpy(object)
    position_mm = np.full(shape, np.nan, np.float32)
    position_mm[at] = slices["position_mm"].to_numpy(np.float32)
    labels = np.full((*shape, len(LABELS)), UNKNOWN, np.int8)
    labels[at] = slices[list(LABELS)].to_numpy(np.int8)
    first = slices.iloc[starts]
    gaps = (
        slices["position_mm"]
        .groupby(np.repeat(np.arange(len(bounds)), counts))
        .apply(lambda mm: float(np.median(np.diff(mm))) if len(mm) > 1 else np.nan)
    )
    cosines = ["row_x", "row_y", "row_z", "column_x", "column_y", "column_z"]
    derived: dict[str, Any] = {
        "num_slices": counts,
        "fingerprint": np.array([result.fingerprint for result in results], object),
        "slice_spacing_mm": gaps.to_numpy(),
        "lowest_hu": np.array([result.lowest_hu for result in results]),
        "orientation": first[cosines].to_numpy(),
    }
    per_study = {name: derived[name] if name in derived else first[name].to_numpy(object) for name in STUDY_ARRAYS}
    return StoreContent(first["study_uid"].to_numpy(object), per_study, image_id, position_mm, labels)
