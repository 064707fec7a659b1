"""Find the files, read their headers, and decide for each one whether it is used, repaired or excluded, and why.

Only headers are read, and a file that has not changed since the last time is not read again: size and time of change tell.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.cluster import run_tasks
from pipeline.config import Config
from pipeline.dicom import NATIVE, Header, patient_key, read_header
from pipeline.errors import SourceError
from pipeline.hounsfield import is_wrapped
from pipeline.labels import LABELS, UNKNOWN, read_labels
from pipeline.manifest import EXCLUDED, REASONS, USED, kept
from pipeline.progress import Progress

HEADER_VERSION = "1"
"""Raise it when `read_header` reads more or otherwise: an older header table is then read anew."""

HEADERS_PER_TASK = 512
AXIAL_COSINE = np.cos(np.deg2rad(45.0))
"""A plane is axial if its normal is nearer to the body's axis than to any other: gantries tilt up to 30°."""

PLAUSIBLE_SPACING_MM = (0.01, 20.0)
FARTHEST_MM = 100_000.0
STEEPEST_SLOPE, FARTHEST_INTERCEPT_HU = 100.0, 32_768.0
FEWEST_PIXELS = 16
"""Beyond these a header is wrong whatever made it, and would only make rubbish, or fail, further on."""

FILE_COLUMNS = ["source", "path", "size", "mtime_ns"]
HEADER_COLUMNS = [field.name for field in fields(Header)]


def build_manifest(
    config: Config, known_headers: pd.DataFrame | None = None
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    """Index the sources of `config`.

    Args:
        config: the parameters.
        known_headers: the header table of an earlier run, to read only what changed.

    Returns:
        The manifest, the header table for the next run, and what was found of the labels.

    Raises:
        SourceError: a source is missing, or holds no file or no slice.
        LabelError: the label CSV is at fault.
    """
    labels = read_labels(Path(config.source.labels)) if config.source.labels else None
    files = find_files(config.source.dicom_paths)
    headers = read_headers(files, config, known_headers)
    manifest = classify(headers)
    if (manifest["status"] == EXCLUDED).all():
        reasons = manifest["reason"].value_counts()
        listed = "; ".join(f"{count} × {REASONS[str(reason)][1]}" for reason, count in reasons.items())
        raise SourceError(f"source.dicom: {len(manifest)} files found, none of them a usable axial CT slice ({listed})")
    manifest, found = join_labels(manifest, labels)
    return manifest, headers, found


def read_known_headers(path: Path) -> pd.DataFrame | None:
    """The header table of an earlier run, or None; it only saves time, so a damaged one is as good as none."""
    if not path.is_file():
        return None
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        print(f"{path}: cannot be read ({error}); reading every header anew", file=sys.stderr)
        return None


def find_files(sources: list[Path]) -> pd.DataFrame:
    """List every file under the sources, in the order of source and path, with size and time of change.

    Raises:
        SourceError: a source does not exist, or there is no file at all.
    """
    rows: list[tuple[int, str, int, int]] = []
    for number, source in enumerate(sources):
        if not source.exists():
            raise SourceError(
                f"source.dicom: {source} does not exist; set it to a folder of DICOM files, a file, or a list"
            )
        found = sorted(_walk(source)) if source.is_dir() else [("", source.stat())]
        rows += [(number, path, status.st_size, status.st_mtime_ns) for path, status in found]
    if not rows:
        raise SourceError(f"source.dicom: no file in {', '.join(map(str, sources))}")
    return pd.DataFrame(rows, columns=FILE_COLUMNS)


def _walk(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Files below `folder` with paths relative to it; links are followed, each folder is entered once."""
    entered: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        relative = waiting.pop()
        status = os.stat(folder / relative)
        if (status.st_dev, status.st_ino) in entered:
            continue
        entered.add((status.st_dev, status.st_ino))
        with os.scandir(folder / relative) as entries:
            for entry in entries:
                path = os.path.join(relative, entry.name)
                if entry.is_dir():
                    waiting.append(path)
                elif entry.is_file():
                    # A name that is no UTF-8 is shown escaped; nothing is found under it, so it is excluded as unreadable.
                    yield os.fsencode(path).decode("utf-8", "backslashreplace"), entry.stat()


def locate(sources: list[Path], source: int, path: str) -> Path:
    """The place of a manifest's file: its path is relative to a source, or empty where the source is the file itself."""
    return sources[source] / path if path else sources[source]


def read_headers(files: pd.DataFrame, config: Config, known: pd.DataFrame | None) -> pd.DataFrame:
    """Join `files` with their headers, reading only those that `known` does not hold unchanged."""
    version = f"{HEADER_VERSION}-{patient_key('', salt=config.index.patient_salt)}"
    if known is None or "version" not in known or not (known["version"] == version).all():
        known = pd.DataFrame(columns=[*FILE_COLUMNS, *HEADER_COLUMNS, "version"])
    known = known[known["fault"] != "unreadable"]  # perhaps the disk did not answer for a moment: ask again
    merged = files.reset_index().merge(
        known[FILE_COLUMNS].reset_index(), on=FILE_COLUMNS, how="left", suffixes=("", "_known")
    )
    is_new = merged["index_known"].isna().to_numpy()
    reused = known.loc[merged["index_known"][~is_new].astype(int), HEADER_COLUMNS].set_index(merged["index"][~is_new])
    parts = [reused] if len(reused) else []
    new = files[is_new]
    print(f"index: {len(files):,} files, {len(new):,} new or changed", flush=True)
    if len(new):
        parts.append(_read_new(new, config))
    headers = pd.concat(parts).sort_index()
    return pd.concat([files, headers], axis=1).assign(version=version)


def _read_new(new: pd.DataFrame, config: Config) -> pd.DataFrame:
    sources = config.source.dicom_paths
    tasks = (
        (
            part.index.to_numpy(),
            [str(locate(sources, *at).absolute()) for at in zip(part["source"], part["path"], strict=True)],
            config.index.patient_salt,
        )
        for part in (new.iloc[start : start + HEADERS_PER_TASK] for start in range(0, len(new), HEADERS_PER_TASK))
    )
    workers = 0 if len(new) <= HEADERS_PER_TASK else config.preprocess.workers  # not worth starting processes for
    parts = []
    with Progress(len(new), what="headers", unit="files") as progress:
        for part in run_tasks(_read_header_batch, tasks, workers=workers, scheduler=config.preprocess.scheduler):
            parts.append(part)
            progress.advance(len(part))
    return pd.concat(parts)


def _read_header_batch(task: tuple[np.ndarray, list[str], str]) -> pd.DataFrame:
    index, paths, patient_salt = task
    rows = [asdict(read_header(path, patient_salt=patient_salt)) for path in paths]
    return pd.DataFrame(rows, columns=HEADER_COLUMNS, index=index)


def classify(headers: pd.DataFrame) -> pd.DataFrame:
    """Give every file its position, status and reason, and put the kept slices in order.

    One series a study is used: the axial one with most slices (of equal ones, the first by uid). Slices are ordered along the
    slice normal (PS3.3 C.7.6.2.1.1), equal positions by image id.
    """
    manifest = headers.drop(columns="version").copy()
    reason = _header_faults(manifest)
    _exclude_duplicates(manifest, reason, ["study_uid", "series_uid", "image_id"])  # a series is as long as its images
    axial = reason == ""
    chosen = _choose_series(manifest[axial])
    reason[axial & (manifest["series_uid"] != manifest["study_uid"].map(chosen))] = "other_series"
    _exclude_duplicates(manifest, reason, ["image_id"])
    wrapped = [
        is_wrapped(bits, signed == 1, intercept)
        for bits, signed, intercept in zip(
            manifest["bits_stored"], manifest["signed"], manifest["intercept"], strict=True
        )
    ]
    reason[(reason == "") & np.array(wrapped)] = "wrap_12bit"
    statuses = {"": USED, **{code: status for code, (status, _) in REASONS.items()}}
    manifest["status"], manifest["reason"] = reason.map(statuses), reason
    manifest["position_mm"], manifest["tilt_deg"] = _measure_positions(manifest)
    return _in_order(manifest)


def _exclude_duplicates(files: pd.DataFrame, reason: pd.Series, columns: list[str]) -> None:
    """Keep the first sound file of each image; a damaged copy must not push out a whole one."""
    sound = files.loc[reason == "", columns]
    reason[sound.index[sound.duplicated()]] = "duplicate"


def _header_faults(files: pd.DataFrame) -> pd.Series:
    """The first reason that applies to each file, or an empty text."""
    geometry = [
        "position_x_mm",
        "position_y_mm",
        "position_z_mm",
        "row_x",
        "row_y",
        "row_z",
        "column_x",
        "column_y",
        "column_z",
    ]
    spacing = files[["row_spacing_mm", "column_spacing_mm"]]
    expected = files["rows"] * files["columns"] * files["samples"] * (files["bits_allocated"] // 8)
    native = files["transfer_syntax"].isin(NATIVE)
    image_type = files["image_type"].str.upper().str.split("\\")
    with np.errstate(invalid="ignore"):
        normal = _normals(files)
        axial = np.abs(normal[:, 2]) >= AXIAL_COSINE
    tests = {
        "unreadable": files["fault"] == "unreadable",
        "not_dicom": files["fault"] == "not_dicom",
        "dicomdir": files["fault"] == "dicomdir",
        "no_pixels": (files["rows"] <= 0) | (files["columns"] <= 0) | (native & (files["pixel_offset"] < 0)),
        "not_ct": files["modality"] != "CT",
        "localizer": image_type.map(lambda kinds: "LOCALIZER" in kinds),
        "colour": (files["samples"] != 1) | (files["photometric"] != "MONOCHROME2"),
        "multi_frame": files["frames"] != 1,
        "not_16_bit": (files["bits_allocated"] != 16)
        | ~files["bits_stored"].between(1, 16)
        | ~files["signed"].isin([0, 1]),
        "high_bit": (files["high_bit"] >= 0) & (files["high_bit"] != files["bits_stored"] - 1),
        "no_identifiers": (files["study_uid"] == "") | (files["series_uid"] == "") | (files["image_id"] == ""),
        "no_geometry": ~np.isfinite(files[geometry]).all(axis=1)
        | ~(spacing > 0).all(axis=1)
        | ~np.isfinite(spacing).all(axis=1),
        "not_axial": ~axial,
        "no_rescale": ~np.isfinite(files["slope"]) | ~np.isfinite(files["intercept"]) | (files["slope"] == 0),
        "implausible": (
            ~files[["row_spacing_mm", "column_spacing_mm"]]
            .apply(lambda mm: mm.between(*PLAUSIBLE_SPACING_MM))
            .all(axis=1)
            | ~(files[geometry[:3]].abs() < FARTHEST_MM).all(axis=1)
            | ~files["slope"].between(0, STEEPEST_SLOPE, inclusive="right")
            | (files["intercept"].abs() > FARTHEST_INTERCEPT_HU)
            | (files[["rows", "columns"]] < FEWEST_PIXELS).any(axis=1)
        ),
        "truncated_pixels": native
        & ((files["pixel_offset"] + expected > files["size"]) | files["pixel_length"].between(0, expected - 1)),
    }
    assert list(tests) == list(REASONS)[: len(tests)], "reasons are asked in the order of the documented list"
    chosen = np.select([np.asarray(test) for test in tests.values()], list(tests), default="")
    return pd.Series(chosen, index=files.index, dtype=object)


def _normals(files: pd.DataFrame) -> np.ndarray:
    """Slice normals, [file, 3], unit length, pointing to the head's end (larger z)."""
    normal = np.cross(
        files[["row_x", "row_y", "row_z"]].to_numpy(), files[["column_x", "column_y", "column_z"]].to_numpy()
    )
    length = np.linalg.norm(normal, axis=1, keepdims=True)
    normal = np.divide(normal, length, out=np.full_like(normal, np.nan), where=length > 0)
    return np.where(normal[:, 2:] < 0, -normal, normal)


def _choose_series(axial: pd.DataFrame) -> pd.Series:
    """Study uid → the uid of its series with most axial slices."""
    counts = axial.groupby(["study_uid", "series_uid"]).size().rename("slices").reset_index()
    counts = counts.sort_values(["study_uid", "slices", "series_uid"], ascending=[True, False, True])
    return counts.drop_duplicates("study_uid").set_index("study_uid")["series_uid"]


def _measure_positions(files: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Position in mm along the normal that most slices of the series share, and the tilt of each slice in degrees."""
    orientation = ["row_x", "row_y", "row_z", "column_x", "column_y", "column_z"]
    slices = files.loc[files["status"] != EXCLUDED, ["series_uid", *orientation]]
    rounded = [slices[column].round(3).rename(f"{column}_rounded") for column in orientation]
    grouped = slices.groupby([slices["series_uid"].rename("series"), *rounded])
    shared = grouped.first().assign(slices=grouped.size()).reset_index(drop=True)
    shared = shared.sort_values(
        ["series_uid", "slices", *orientation], ascending=[True, False, *[True] * 6]
    ).drop_duplicates("series_uid")
    normal_of = pd.DataFrame(_normals(shared), index=shared["series_uid"])
    normal = normal_of.reindex(files["series_uid"]).to_numpy()
    place = files[["position_x_mm", "position_y_mm", "position_z_mm"]].to_numpy()
    own_normal = _normals(files)
    tilt_deg = np.rad2deg(np.arccos(np.clip(np.abs(own_normal[:, 2]), 0, 1)))
    return pd.Series((normal * place).sum(axis=1), index=files.index), pd.Series(tilt_deg, index=files.index)


def _in_order(manifest: pd.DataFrame) -> pd.DataFrame:
    slices = kept(manifest).sort_values(["study_uid", "position_mm", "image_id"], kind="stable")
    rest = manifest[manifest["status"] == EXCLUDED]
    return pd.concat([slices, rest]).reset_index(drop=True)


def join_labels(manifest: pd.DataFrame, labels: pd.DataFrame | None) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Add the six label columns, and count what matches: slices with and without labels, labels without a slice."""
    if labels is None:
        labels = pd.DataFrame(columns=list(LABELS), index=pd.Index([], name="image_id", dtype=object))
    joined = labels.reindex(manifest["image_id"]).fillna(UNKNOWN).astype(np.int8).reset_index(drop=True)
    manifest = pd.concat([manifest, joined], axis=1)
    slices = kept(manifest)
    labelled = (slices[list(LABELS)] != UNKNOWN).any(axis=1)
    of_files = labels.index.isin(manifest["image_id"])
    of_slices = labels.index.isin(slices["image_id"])
    return manifest, {
        "studies": int(slices["study_uid"].nunique()),
        "patients": int(slices["patient_key"].nunique()),
        "slices": len(slices),
        "slices_with_labels": int(labelled.sum()),
        "slices_without_labels": int((~labelled).sum()),
        "labelled_images_excluded": int((of_files & ~of_slices).sum()),
        "labelled_images_not_found": int((~of_files).sum()),
        "positive_slices": {name: int((slices[name] == 1).sum()) for name in LABELS},
    }
