"""DICOM into the store: one study is one task's unit of work, one shard, one writer.

A finished shard is kept in `data/wip/shards/` under its fingerprint, which names the study's slices, the parameters that
shape them and the code that makes them. So a killed run continues, ten added studies cost ten studies, and a changed label
costs no pixels. The published store hard-links the shards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import pandas as pd

from pipeline import (
    compiled,
    convert,
    decoder,
    garbage,
    head,
    header,
    hounsfield,
    pixels,
    place,
    resample,
    series,
    shard,
)
from pipeline.cluster import run_tasks
from pipeline.config import Config, PreprocessConfig
from pipeline.convert import SliceFacts, StudyResult, StudyTask, count_parts, make_shards, shard_path
from pipeline.errors import SourceError
from pipeline.files import (
    disk_full,
    is_disk_full,
    only_one,
    remove_leftovers,
    require_free_space,
    write_parquet,
)
from pipeline.labels import LABELS, UNKNOWN
from pipeline.manifest import (
    EXCLUDED,
    PERHAPS_MENDED,
    REASONS,
    account,
    digest_manifest,
    kept,
    refuse_too_many_exclusions,
)
from pipeline.progress import Progress
from pipeline.publish import Target
from pipeline.series import ORIENTATION, turn_cosines
from pipeline.source import IDENTITY, containers, is_there, one_of_each_source
from pipeline.store import STUDY_ARRAYS, StoreContent, slice_axis, write_store

SLICES_PER_TASK = 512
"""About a quarter of a second of work: long enough to hide Dask's overhead, 10 ms a task, short enough to lose little."""

STORED_FRACTION = 0.35
"""Share of the raw bytes that a shard may need, for the check of free disk; heads measured 0.17 to 0.25."""

METADATA_BYTES = 1_000_000
"""What a small store takes on the disk beside its shards; each study adds less than 1 kB."""

PACKAGES = ("numpy", "scipy", "zstandard", "numba", "llvmlite", "opencv-python-headless", "pydicom")
DECODERS = ("isal", "python-gdcm", "pylibjpeg", "pylibjpeg-openjpeg", "pylibjpeg-rle", "pyjpegls")
"""Packages that decide a shard's bytes: another decoder may read what this one could not, or read it otherwise."""


FAULT_COLUMNS = [*IDENTITY, "image_id", "study_uid", "status", "reason"]


PLACE_IN_ZIP = ("method", "offset", "packed_size")


def preprocess(
    config: Config, manifest: pd.DataFrame, *, data: Path, store: str | None = None
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Convert the manifest's slices, and publish `data/store.zarr`.

    Args:
        config: the parameters.
        manifest: from `index`.
        data: the folder of the stages' outputs.
        store: where to put the store instead: a folder, or a URL such as ``s3://bucket/store.zarr``.

    Returns:
        The final accounting, and the files whose status changed when their pixels were read; also written to
        `data/preprocess/faults.parquet`.

    Raises:
        SourceError: the source is gone, files changed since `index` read them, or too many could not be used; what is finished
            is kept.
    """
    wip = data / "wip" / "shards"
    wip.mkdir(parents=True, exist_ok=True)
    target = Target(store, data)
    with only_one(data / "wip" / "preprocess.lock", "preprocess"), target.claimed():
        slices = kept(manifest).reset_index(drop=True)
        plan = Plan(slices, config, wip)
        results = {name: result for name in plan.fingerprints if (result := _read_result(wip, name))}
        waiting = [number for number, name in enumerate(plan.fingerprints) if name not in results]
        _check_source_and_space(config, plan, waiting, data)
        print(f"preprocess: {len(plan):,} studies, {len(plan) - len(waiting):,} finished before", flush=True)
        for result in _make_all(plan, waiting, config.preprocess, wip):
            results[result.fingerprint] = result
        in_order = [results[name] for name in plan.fingerprints]
        _refuse_changed(slices, in_order)
        final = _apply_faults(manifest, in_order)
        changed = final.loc[final["reason"] != manifest["reason"], FAULT_COLUMNS]
        # before anything is refused: it is what a person then looks at
        write_parquet(data / "preprocess" / "faults.parquet", changed)
        totals = account(final)
        refuse_too_many_exclusions(totals, most=config.index.max_excluded_fraction)
        for folder in (wip, data / "preprocess"):
            remove_leftovers(folder, ".*.tmp")
        attributes = {"manifest_sha256": digest_manifest(manifest), "accounting": totals}
        _publish(config.preprocess, slices, in_order, wip, attributes, target)
    return totals, changed


class Plan:
    """The studies to make: fingerprints now, and a task when a worker is free, so that memory stays small."""

    def __init__(self, slices: pd.DataFrame, config: Config, wip: Path) -> None:
        self.config, self.wip = config.preprocess, wip.absolute()
        self.bounds = _study_bounds(slices)
        self._containers = containers(config.source.entries, slices)
        self.seen = one_of_each_source(config.source.entries, slices)
        self._columns = {
            name: slices[name].to_numpy(object if slices[name].dtype == "str" else None) for name in SliceFacts._fields
        }
        shape = json.dumps(
            [
                _code_digest(),
                self.config.image_size,
                self.config.crop,
                [(name, w.centre, w.width) for name, w in self.config.windows.items()],
            ]
        ).encode()
        # not where in a zip a file lies: its checksum says what it is
        shaping = [column for name, column in self._columns.items() if name not in PLACE_IN_ZIP]
        self.fingerprints = [
            hashlib.sha256(shape + json.dumps(_rows(shaping, start, stop)).encode()).hexdigest()[:32]
            for start, stop in self.bounds
        ]

    def __len__(self) -> int:
        return len(self.bounds)

    def count_slices(self, number: int) -> int:
        start, stop = self.bounds[number]
        return stop - start

    def task(self, number: int) -> StudyTask:
        start, stop = self.bounds[number]
        facts = [SliceFacts._make(row) for row in _rows(self._columns.values(), start, stop)]
        config = self.config
        return StudyTask(
            self.fingerprints[number],
            self.wip,
            self._containers[start:stop],
            facts,
            config.image_size,
            config.crop,
            config.windows,
        )


def _rows(columns: Iterable[np.ndarray], start: int, stop: int) -> list[tuple[Any, ...]]:
    return list(zip(*(column[start:stop].tolist() for column in columns), strict=True))


def _study_bounds(slices: pd.DataFrame) -> list[tuple[int, int]]:
    """First and last row of each study: the manifest keeps a study's slices together."""
    uids = slices["study_uid"].to_numpy(object)
    starts = np.flatnonzero(np.r_[True, uids[1:] != uids[:-1]])
    return list(zip(starts.tolist(), [*starts[1:].tolist(), len(uids)], strict=True))


def _code_digest() -> str:
    """Names the code and the libraries that decide a shard's bytes."""
    digest = hashlib.sha256()
    for module in (
        compiled,
        convert,
        decoder,
        garbage,
        head,
        header,
        hounsfield,
        pixels,
        place,
        resample,
        series,
        shard,
    ):
        digest.update(Path(str(module.__file__)).read_bytes())
    for package in (*PACKAGES, *DECODERS):
        with suppress(PackageNotFoundError):
            digest.update(f"{package}={version(package)}".encode())
    return digest.hexdigest()


def _read_result(wip: Path, fingerprint: str) -> StudyResult | None:
    """The result of a finished study. It is written last, and tells the size of the shards, so that its presence vouches for
    them; a study with a file that is perhaps mended is tried again."""
    try:
        result = StudyResult(fingerprint, **json.loads((wip / f"{fingerprint}.json").read_bytes()))
        shards = [shard_path(wip, fingerprint, part) for part in range(count_parts(sum(result.kept)))]
        is_whole = sum(path.stat().st_size for path in shards) == result.stored_bytes
    except (OSError, ValueError, TypeError):  # not there, or damaged
        return None
    return result if is_whole and not set(PERHAPS_MENDED) & set(result.faults.values()) else None


def _check_source_and_space(config: Config, plan: Plan, waiting: Sequence[int], data: Path) -> None:
    if not waiting:
        return
    for entry in config.source.entries:
        if not is_there(entry):
            raise SourceError(
                f"source.dicom: {entry} was there when index ran and is gone; bring it back, or run index again"
            )
    slices = sum(map(plan.count_slices, waiting))
    raw_bytes = slices * config.preprocess.image_size**2 * len(config.preprocess.windows)
    require_free_space(data, int(raw_bytes * STORED_FRACTION) + 50_000_000, f"preprocessing {len(waiting):,} studies")


def _make_all(plan: Plan, waiting: Sequence[int], config: PreprocessConfig, wip: Path) -> Iterator[StudyResult]:
    total = sum(map(plan.count_slices, waiting))
    if not total:
        return
    faults = studies = done = stored_bytes = 0
    # a file that only who has the same folder of work sees
    with (
        NamedTemporaryFile(dir=wip.absolute(), prefix=".driver-", suffix=".tmp") as token,
        Progress(total, what="preprocess", unit="slices") as progress,
    ):
        workers = 0 if total <= SLICES_PER_TASK else config.workers  # not worth starting processes for
        try:
            batches = _batches(plan, waiting)
            for results in run_tasks(
                make_shards,
                batches,
                workers=workers,
                scheduler=config.scheduler,
                describe=_describe,
                seen=[*plan.seen, token.name],
            ):
                studies += len(results)
                faults += sum(REASONS[code][0] == EXCLUDED for result in results for code in result.faults.values())
                stored_bytes += sum(result.stored_bytes for result in results)
                slices = sum(len(result.kept) for result in results)
                done += slices
                progress.advance(slices, f"{studies:,} studies, {faults:,} slices excluded")
                yield from results
        except OSError as error:
            if not is_disk_full(error):
                raise
            raw_bytes = (total - done) * config.image_size**2 * len(config.windows)
            needed = int(stored_bytes / done * (total - done)) if done else int(raw_bytes * STORED_FRACTION)
            raise disk_full(wip, needed, f"the rest, {total - done:,} slices,") from None


def _batches(plan: Plan, waiting: Sequence[int]) -> Iterator[list[StudyTask]]:
    batch: list[StudyTask] = []
    slices = 0
    for number in waiting:
        batch.append(plan.task(number))
        slices += len(batch[-1].slices)
        if slices >= SLICES_PER_TASK:
            yield batch
            batch, slices = [], 0
    if batch:
        yield batch


def _describe(batch: Sequence[StudyTask]) -> str:
    return f"{len(batch)} studies, {batch[0].containers[0]} first"


def _refuse_changed(slices: pd.DataFrame, results: Sequence[StudyResult]) -> None:
    changed = {image_id for result in results for image_id, code in result.faults.items() if code == "changed"}
    if changed:
        first = slices[slices["image_id"].isin(changed)].iloc[0]
        raise SourceError(
            f"{len(changed)} file(s) changed, vanished or could not be read after index, {first['path']!r} first; "
            f"run `python -m stages.index` (or `dvc repro`) again; what is finished is kept"
        )


def _apply_faults(manifest: pd.DataFrame, results: Sequence[StudyResult]) -> pd.DataFrame:
    """The manifest with what reading the pixels added: exclusions, and repairs."""
    faults = {image_id: code for result in results for image_id, code in result.faults.items()}
    final = manifest.copy()
    if not faults:
        return final
    hit = (final["status"] != EXCLUDED) & final["image_id"].isin(faults)
    final.loc[hit, "reason"] = final.loc[hit, "image_id"].map(faults)
    final.loc[hit, "status"] = final.loc[hit, "reason"].map(lambda code: REASONS[code][0])
    return final


def _publish(
    config: PreprocessConfig,
    slices: pd.DataFrame,
    results: Sequence[StudyResult],
    wip: Path,
    attributes: dict[str, Any],
    target: Target,
) -> None:
    """Gather the shards into a store, and put it where it is wanted."""
    is_kept = np.concatenate([result.kept for result in results])
    slices = slices[is_kept].reset_index(drop=True)
    if slices.empty:
        raise SourceError("no slice's pixels could be read; see the reasons above")
    alive = [result for result in results if any(result.kept)]
    shards = {
        (study, part): shard_path(wip, result.fingerprint, part)
        for study, result in enumerate(alive)
        for part in range(count_parts(sum(result.kept)))
    }
    size, windows = config.image_size, config.windows
    try:
        write_store(
            target.temporary,
            _gather(slices, alive),
            shards,
            image_size=size,
            windows=windows,
            attributes=attributes,
        )
        target.publish()
    except OSError as error:
        if not is_disk_full(error):
            raise
        folder = target.final.parent
        is_copied = folder.stat().st_dev != wip.stat().st_dev  # else the shards are linked
        needed = METADATA_BYTES + sum(1000 + is_copied * result.stored_bytes for result in alive)
        raise disk_full(folder, needed, "the store") from None


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
    # NaN, and left out of the median, is what stands for the gap below a study's lowest slice
    gaps_mm = slices["gap_mm"].groupby(at[0]).median().reindex(range(len(bounds))).to_numpy()
    turns = first["turn"].to_numpy()
    derived: dict[str, Any] = {
        "num_slices": counts,
        "content": np.array([result.content for result in results], object),
        "slice_spacing_mm": gaps_mm,
        "lowest_hu": np.array([result.lowest_hu for result in results]),
        "orientation": turn_cosines(first[ORIENTATION].to_numpy(float), turns),
        "box_mm": np.array([result.box for result in results]),
    }
    per_study = {name: derived[name] if name in derived else first[name].to_numpy(object) for name in STUDY_ARRAYS}
    return StoreContent(first["study_uid"].to_numpy(object), per_study, image_id, position_mm, labels)
