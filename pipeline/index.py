"""Find the files, read their headers, and decide for each one whether it is used, repaired or excluded, and why.

Only headers are read, and a file that has not changed since the last time is not read again: size and time of change tell, or
in a zip the CRC-32. Files that carry one image identifier are compared by their pixels too.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.cluster import run_tasks
from pipeline.config import Config
from pipeline.errors import SourceError
from pipeline.header import DEFLATED_SYNTAX, NATIVE, Header, patient_key, read_headers
from pipeline.hounsfield import is_wrapped
from pipeline.labels import LABELS, UNKNOWN, read_labels
from pipeline.manifest import EXCLUDED, PERHAPS_MENDED, REASONS, SPACINGS, USED, kept
from pipeline.pixels import PixelFault, read_stored
from pipeline.place import Place, Scratch
from pipeline.progress import Progress
from pipeline.series import (
    FURTHER_MM,
    ORIENTATION,
    PLACE,
    choose_series,
    find_turns,
    measure_gaps,
    measure_positions,
    measure_tilts,
    normals,
)
from pipeline.source import FILE_COLUMNS, IDENTITY, containers, find_files, one_of_each_source

HEADER_VERSION = "4"
"""Raise it when `read_headers` reads more or otherwise: an older header table is then read anew."""

FILES_PER_TASK = 512
AXIAL_COSINE = np.cos(np.deg2rad(45.0))
"""A plane is axial if its normal is nearer to the body's axis than to any other: gantries tilt up to 30°."""

PLAUSIBLE_SPACING_MM = (0.01, 20.0)
WIDEST_FIELD_MM = 1000.0
FARTHEST_MM = 100_000.0
FLATTEST_SLOPE, STEEPEST_SLOPE, FARTHEST_INTERCEPT_HU = 0.001, 100.0, 32_768.0
FEWEST_PIXELS, MOST_PIXELS = 16, 8192
"""Beyond these a header is wrong whatever made it, and would only make rubbish, or fail, further on. No gantry is a metre wide,
and one slice that claims to be would make all of its study small. 8192 × 8192 take 0.4 GB on the way."""

HEADER_COLUMNS = list(Header._fields)
PIXEL_COLUMNS = ["transfer_syntax", "frame", "rows", "columns", "bits_stored", "signed", "pixel_offset"]
"""What `read_stored` asks for."""

COMPARED = [
    "study_uid", "series_uid", "photometric", "rows", "columns", "signed", "slope", "intercept", *PLACE, *ORIENTATION,
    "row_spacing_mm", "column_spacing_mm",
]  # fmt: skip
"""What two files of one slice agree in, beside their pixels. One may be compressed, have another window, or have been told to be
derived; and numbers may have been written anew, with fewer digits."""

PLACES_AGREE_MM, NUMBERS_AGREE = 0.01, 0.001
"""Numbers of two files that differ by less are the same."""


def build_manifest(
    config: Config, known_headers: pd.DataFrame | None = None
) -> tuple[pd.DataFrame, pd.DataFrame | None, dict[str, Any]]:
    """Index the sources of `config`.

    Args:
        config: the parameters.
        known_headers: the header table of an earlier run, to read only what changed.

    Returns:
        The manifest; the header table for the next run, or None where the known one still stands; and what was found of the
        labels and of the gaps between slices.

    Raises:
        SourceError: a source is missing, or holds no file or no slice.
        LabelError: the label CSV is at fault.
    """
    labels = read_labels(Path(config.source.labels)) if config.source.labels else None
    known_headers = _usable(known_headers, config)
    files = find_files(config.source.entries, known_headers.loc[known_headers["frame"] <= 0, FILE_COLUMNS])
    headers = read_header_table(files, config, known_headers)
    is_known, known_digests = headers is known_headers, headers["pixel_digest"]
    del known_headers, files  # 25,000 studies have 400 MB of headers: once is enough
    manifest = classify(headers, config)
    is_known = is_known and headers["pixel_digest"].equals(known_digests)
    if (manifest["status"] == EXCLUDED).all():
        reasons = manifest["reason"].value_counts()
        listed = "; ".join(f"{count} × {REASONS[str(reason)][1]}" for reason, count in reasons.items())
        raise SourceError(
            f"source.dicom: {(headers['frame'] <= 0).sum()} files found, none of them a usable axial CT slice ({listed})"
        )
    manifest, found = join_labels(manifest, labels)
    return manifest, None if is_known else headers, found | _count_geometry(manifest)


def read_known_headers(path: Path) -> pd.DataFrame | None:
    """The header table of an earlier run, or None; it only saves time, so a damaged one is as good as none."""
    if not path.is_file():
        return None
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        print(f"{path}: cannot be read ({error}); reading every header anew", file=sys.stderr)
        return None


def _version(config: Config) -> str:
    return f"{HEADER_VERSION}-{patient_key('', salt=config.index.patient_salt)}"


def _usable(known: pd.DataFrame | None, config: Config) -> pd.DataFrame:
    """The header table of an earlier run; an empty one where there is none, or one that was made otherwise."""
    if known is None or "version" not in known or not (known["version"] == _version(config)).all():
        return pd.DataFrame(columns=[*FILE_COLUMNS, *HEADER_COLUMNS, "pixel_digest", "version"])
    return known


def read_header_table(files: pd.DataFrame, config: Config, known: pd.DataFrame) -> pd.DataFrame:
    """Join `files` with their headers, reading only those that `known` does not hold unchanged.

    Returns:
        One row a slice: `FILE_COLUMNS`, the header, ``pixel_digest`` (of slices that share an identifier), ``version``.
    """
    if known[FILE_COLUMNS].equals(files) and not (known["fault"] == "unreadable").any():
        print(f"index: {len(files):,} files, 0 new or changed", flush=True)
        return known
    known = known[known["fault"] != "unreadable"]  # perhaps the disk did not answer for a moment: ask again
    known = known.reset_index(drop=True)
    matched = files.reset_index().merge(known[IDENTITY].reset_index(), on=IDENTITY, how="left", suffixes=("", "_known"))
    is_new = matched["index_known"].isna().to_numpy()
    old = known.loc[matched["index_known"][~is_new].astype(int)].set_axis(matched["index"][~is_new])
    new = files[matched.drop_duplicates("index")["index_known"].isna().to_numpy()]
    print(f"index: {len(files):,} files, {len(new):,} new or changed", flush=True)
    headers = old.drop(columns=FILE_COLUMNS)
    del known, matched, old  # each as large as all that is known
    if len(new):
        read = _read_new(new, config).assign(pixel_digest="")
        headers = pd.concat([headers, read]) if len(headers) else read
        del read
    headers = headers.sort_index(kind="stable")
    table = files.loc[headers.index].reset_index(drop=True)
    table = pd.concat([table, headers.reset_index(drop=True)], axis=1).assign(version=_version(config))
    return table.astype({name: table.dtypes[name] for name in FILE_COLUMNS} | {"pixel_digest": "str", "version": "str"})


def _read_new(new: pd.DataFrame, config: Config) -> pd.DataFrame:
    tasks = (
        (part.index.to_numpy(), list(_places(part, config)), config.index.patient_salt)
        for part in (new.iloc[start : start + FILES_PER_TASK] for start in range(0, len(new), FILES_PER_TASK))
    )
    parts = []
    with Progress(len(new), what="headers", unit="files") as progress:
        for part in _run(_read_header_batch, tasks, new, config):
            parts.append(part)
            progress.advance(part.index.nunique())
    return pd.concat(parts)


def _run(function: Any, tasks: Iterator[Any], files: pd.DataFrame, config: Config) -> Iterator[Any]:
    workers = 0 if len(files) <= FILES_PER_TASK else config.preprocess.workers  # not worth starting processes for
    seen = one_of_each_source(config.source.entries, files)
    return run_tasks(
        function,
        tasks,
        workers=workers,
        scheduler=config.preprocess.scheduler,
        describe=lambda task: task[1][0].container,
        seen=seen,
    )


def _places(files: pd.DataFrame, config: Config) -> Iterator[Place]:
    columns = [files[name].tolist() for name in ("size", "stamp", "method", "offset", "packed_size")]
    return map(Place, containers(config.source.entries, files), *columns)


def _read_header_batch(task: tuple[np.ndarray, list[Place], str]) -> pd.DataFrame:
    index, places, patient_salt = task
    headers = [read_headers(place, patient_salt=patient_salt) for place in places]
    repeated = np.repeat(index, [len(of_file) for of_file in headers])
    rows = [header for of_file in headers for header in of_file]
    return pd.DataFrame(rows, columns=HEADER_COLUMNS, index=repeated)


def classify(headers: pd.DataFrame, config: Config) -> pd.DataFrame:
    """Give every slice its position, status and reason, and put the kept ones in order.

    One series a study is used (`pipeline.series.choose_series`). Slices are ordered along the slice normal (PS3.3 C.7.6.2.1.1),
    equal positions by image id. Pixel digests of slices that share an identifier are added to `headers`, for the next run.
    """
    manifest = headers.drop(columns=["version", "pixel_digest"])
    normal = normals(manifest)
    reason = _header_faults(manifest, normal)
    _exclude_foreign(manifest, reason, salt=config.index.patient_salt)
    _compare_duplicates(headers, reason, config)
    axial = manifest[(reason == "").to_numpy()]
    is_chosen, beyond_mm = choose_series(axial, rule=config.index.series, chosen=config.index.chosen_series)
    reason[axial.index[~is_chosen]] = "other_series"
    slices = manifest[(reason == "").to_numpy()]
    turns = find_turns(slices)
    repairs = _repairs(slices, turns)
    reason[repairs.index] = repairs
    statuses = {"": USED, **{code: status for code, (status, _) in REASONS.items()}}
    manifest["turn"] = pd.Series(turns, index=slices.index).reindex(manifest.index, fill_value=0)
    manifest["tilt_deg"] = measure_tilts(normal)
    manifest["position_mm"] = pd.Series(measure_positions(slices), index=slices.index)
    manifest["beyond_mm"] = pd.Series(beyond_mm, index=axial.index)
    longest_mm = np.maximum(slices["rows"] * slices["row_spacing_mm"], slices["columns"] * slices["column_spacing_mm"])
    manifest["field_mm"] = longest_mm.groupby(slices["study_uid"]).transform("max")
    manifest["status"], manifest["reason"] = reason.map(statuses).astype("str"), reason.astype("str")
    return _in_order(manifest)


def _header_faults(files: pd.DataFrame, normal: np.ndarray) -> pd.Series:
    """The first reason that applies to each slice, or an empty text."""
    spacing = files[["row_spacing_mm", "column_spacing_mm"]].to_numpy(float)
    expected = files["rows"] * files["columns"] * files["samples"] * (files["bits_allocated"] // 8)
    native = files["transfer_syntax"].isin(NATIVE)
    single = native & (files["frame"] < 0)
    with np.errstate(invalid="ignore"):
        axial = np.abs(normal[:, 2]) >= AXIAL_COSINE
    tests = {
        "unreadable": files["fault"] == "unreadable",
        "zip_method": files["fault"] == "zip_method",
        "not_dicom": files["fault"] == "not_dicom",
        "dicomdir": files["fault"] == "dicomdir",
        "not_ct": ~files["modality"].isin(["CT", ""]),
        "no_pixels": (files["rows"] <= 0)
        | (files["columns"] <= 0)
        | ((files["pixel_offset"] < 0) & (files["transfer_syntax"] != DEFLATED_SYNTAX))
        | (single & (files["pixel_length"] == 0)),
        "localizer": files["image_type"].str.contains("LOCALIZER", regex=False),
        "colour": (files["samples"] != 1) | ~files["photometric"].isin(["MONOCHROME1", "MONOCHROME2"]),
        "multi_frame": files["frames"] != 1,
        "not_16_bit": (files["bits_allocated"] != 16)
        | ~files["bits_stored"].between(1, 16)
        | ~files["signed"].isin([0, 1]),
        "high_bit": (files["high_bit"] >= 0) & (files["high_bit"] != files["bits_stored"] - 1),
        "no_identifiers": (files["modality"] == "")
        | (files["study_uid"] == "")
        | (files["series_uid"] == "")
        | (files["image_id"] == ""),
        "no_geometry": ~np.isfinite(files[[*PLACE, *ORIENTATION]].to_numpy(float)).all(axis=1)
        | ~(np.isfinite(spacing) & (spacing > 0)).all(axis=1),
        "not_axial": ~axial,
        "no_rescale": ~np.isfinite(files["slope"]) | ~np.isfinite(files["intercept"]) | (files["slope"] == 0),
        "not_hu": files["unit"] != "HU",
        "implausible": ~((spacing >= PLAUSIBLE_SPACING_MM[0]) & (spacing <= PLAUSIBLE_SPACING_MM[1])).all(axis=1)
        | (spacing > WIDEST_FIELD_MM / files[["rows", "columns"]].clip(lower=1).to_numpy()).any(axis=1)
        | ~(files[PLACE].abs() < FARTHEST_MM).all(axis=1)
        | ~files["slope"].abs().between(FLATTEST_SLOPE, STEEPEST_SLOPE)
        | (files["intercept"].abs() > FARTHEST_INTERCEPT_HU)
        | (files[["rows", "columns"]] < FEWEST_PIXELS).any(axis=1)
        | (files[["rows", "columns"]] > MOST_PIXELS).any(axis=1),
        "truncated_pixels": native
        & ((files["pixel_offset"] + expected > files["size"]) | files["pixel_length"].between(0, expected - 1)),
    }
    assert list(tests) == list(REASONS)[: len(tests)], "reasons are asked in the order of the documented list"
    chosen = np.select([np.asarray(test, bool) for test in tests.values()], list(tests), default="")
    return pd.Series(chosen, index=files.index, dtype=object)


def _exclude_foreign(files: pd.DataFrame, reason: pd.Series, *, salt: str) -> None:
    """A study is one patient's: the one of most of its slices. A slice that names nobody is its study's, and a study that names nobody
    is a patient of its own."""
    is_named = files["patient_key"] != ""
    named = files.loc[(reason == "") & is_named, ["study_uid", "patient_key"]]
    counts = named.value_counts(sort=False).rename("slices").reset_index()
    counts = counts.sort_values(["study_uid", "slices", "patient_key"], ascending=[True, False, True])
    owner = counts.drop_duplicates("study_uid").set_index("study_uid")["patient_key"]
    if len(owner) < len(counts):
        reason[named.index[named["patient_key"] != named["study_uid"].map(owner)]] = "foreign_patient"
    if not is_named.all():
        uids = files.loc[~is_named, "study_uid"]
        keys = {uid: owner.get(uid) or patient_key(uid, salt=salt) for uid in uids.unique()}
        files.loc[~is_named, "patient_key"] = uids.map(keys)


def _compare_duplicates(headers: pd.DataFrame, reason: pd.Series, config: Config) -> None:
    """Of files with one image identifier, keep the first if all hold the same slice; else none, as no one knows which is right."""
    sound = headers[(reason == "").to_numpy()]
    shared = sound[sound["image_id"].duplicated(keep=False)]
    if shared.empty:
        return
    undigested = shared[shared["pixel_digest"] == ""]
    tasks = (
        (part.index.to_numpy(), list(_places(part, config)), part[PIXEL_COLUMNS].to_dict("records"))
        for part in (undigested.iloc[start : start + 64] for start in range(0, len(undigested), 64))
    )
    with Progress(len(undigested), what="slices that share an identifier", unit="slices") as progress:
        for index, digests in _run(_digest_batch, tasks, undigested, config):
            headers.loc[index, "pixel_digest"] = digests
            progress.advance(len(index))
    shared = headers.loc[shared.index]
    faulty = shared["pixel_digest"].isin(REASONS)
    reason[shared.index[faulty]] = shared.loc[faulty, "pixel_digest"]
    headers.loc[shared.index[shared["pixel_digest"].isin(PERHAPS_MENDED)], "pixel_digest"] = ""
    shared = shared[~faulty]
    first = shared.groupby("image_id", sort=False)[[*COMPARED, "pixel_digest"]].transform("first")
    agrees = pd.concat([_agree(shared[name], first[name]) for name in first], axis=1).all(axis=1)
    all_agree = agrees.groupby(shared["image_id"]).transform("all")
    reason[shared.index[~all_agree]] = "conflict"
    reason[shared.index[all_agree & shared["image_id"].duplicated()]] = "duplicate"


def _agree(values: pd.Series, others: pd.Series) -> pd.Series:
    if values.dtype.kind != "f":
        return values == others
    return (values - others).abs() < (PLACES_AGREE_MM if values.name in PLACE else NUMBERS_AGREE)


def _digest_batch(task: tuple[np.ndarray, list[Place], list[dict[str, Any]]]) -> tuple[np.ndarray, list[str]]:
    """A digest of each slice's stored values, or the reason why they cannot be had."""
    index, places, facts = task
    digests = []
    scratch = Scratch()
    for place, fact in zip(places, facts, strict=True):
        try:
            stored = read_stored(place, scratch=scratch, **fact)
            digests.append(hashlib.blake2b(stored.tobytes(), digest_size=16).hexdigest())
        except PixelFault as fault:
            digests.append(fault.code)
    return index, digests


def _repairs(slices: pd.DataFrame, turns: np.ndarray) -> pd.Series:
    """The repairs that headers ask for; where a slice needs several, the first of the documented list is named."""
    wrapped = is_wrapped(slices["bits_stored"], slices["signed"], slices["intercept"]).to_numpy(bool)
    expected = slices["rows"] * slices["columns"] * 2
    surplus = slices["transfer_syntax"].isin(NATIVE) & (slices["pixel_length"] > expected + 1)
    tests = {"wrap_12bit": wrapped, "surplus_pixels": surplus.to_numpy(), "turned": turns != 0}
    named = pd.Series(np.select(list(tests.values()), list(tests), default=""), index=slices.index, dtype=object)
    return named[named != ""]


def _in_order(manifest: pd.DataFrame) -> pd.DataFrame:
    slices = kept(manifest)
    codes, uids = pd.factorize(slices["study_uid"])
    study = np.argsort(np.argsort(uids.to_numpy(object)))[codes]  # numbers in the order of the uids
    position_mm = slices["position_mm"].to_numpy(float)
    order = _sort_slices(study, position_mm, slices["image_id"])
    slices = slices.iloc[order]
    gap_mm, spacing = measure_gaps(study[order], position_mm[order])
    slices = slices.assign(gap_mm=gap_mm, spacing=spacing)
    rest = manifest[manifest["status"] == EXCLUDED].assign(gap_mm=np.nan, spacing="")
    ordered = (pd.concat([slices, rest]) if len(rest) else slices).reset_index(drop=True)
    return ordered.astype({"spacing": "str"})


def _sort_slices(study: np.ndarray, position_mm: np.ndarray, image_id: pd.Series) -> np.ndarray:
    """The order by study, position and image id; the last, slow to sort, is asked only where two slices share a place."""
    order = np.lexsort((position_mm, study))
    if not len(order):
        return order
    same = np.flatnonzero((np.diff(study[order]) == 0) & (np.diff(position_mm[order]) == 0))
    shared = order[np.union1d(same, same + 1)]
    rank = np.zeros(len(study), np.int64)
    rank[shared] = np.argsort(np.argsort(image_id.iloc[shared].to_numpy(object)))
    return np.lexsort((rank, position_mm, study)) if len(shared) else order


def _count_geometry(manifest: pd.DataFrame) -> dict[str, Any]:
    slices = kept(manifest)
    return {
        "studies_with_more_in_another_series": int(slices.loc[slices["beyond_mm"] > FURTHER_MM, "study_uid"].nunique()),
        "spacing": {
            name: {
                "slices": int((slices["spacing"] == name).sum()),
                "studies": int(slices.loc[slices["spacing"] == name, "study_uid"].nunique()),
            }
            for name in SPACINGS
        },
    }


def join_labels(manifest: pd.DataFrame, labels: pd.DataFrame | None) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Add the six label columns, and count what matches: slices with and without labels, labels without a slice."""
    if labels is None:
        labels = pd.DataFrame(columns=list(LABELS), index=pd.Index([], name="image_id", dtype=object))
    row = labels.index.get_indexer(manifest["image_id"].to_numpy(object))  # −1: no label
    table = np.vstack([labels.to_numpy(np.int8), np.full(len(LABELS), UNKNOWN, np.int8)])
    manifest = pd.concat([manifest, pd.DataFrame(table[row], columns=list(LABELS))], axis=1)
    slices = kept(manifest)
    labelled = (slices[list(LABELS)] != UNKNOWN).any(axis=1)
    of_files, of_slices = np.zeros((2, len(table)), bool)
    of_files[row] = of_slices[row[slices.index]] = True
    return manifest, {
        "studies": int(slices["study_uid"].nunique()),
        "patients": int(slices["patient_key"].nunique()),
        "slices": len(slices),
        "slices_with_labels": int(labelled.sum()),
        "slices_without_labels": int((~labelled).sum()),
        "labelled_images_excluded": int((of_files & ~of_slices)[:-1].sum()),
        "labelled_images_not_found": int((~of_files)[:-1].sum()),
        "positive_slices": {name: int((slices[name] == 1).sum()) for name in LABELS},
    }
