"""Numbers that describe a store, and a check that all of it can be read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.labels import LABELS, UNKNOWN
from pipeline.store import Store

SAMPLE = 256
"""Slices read, evenly spread, for the window statistics: a store of 30 GB is described in under a second."""

SCOPE = {
    "row_spacing_mm": "distance between rows",
    "column_spacing_mm": "distance between columns",
    "slice_spacing_mm": "distance between slices",
    "thickness_mm": "slice thickness",
}
"""Arrays of the store whose range a new study must lie in, and what they are."""

RARE = 0.005
"""Share of the training studies at either end that does not count: one odd study must not open the door to all like it."""


def survey(store: Store) -> dict[str, Any]:
    """Describe a store: sizes, labels, windows, accounting."""
    slices = store.slices
    labels_NL = store.labels[slices[:, 0], slices[:, 1]]
    pixel_bytes, all_bytes = _sizes(store)
    raw_bytes = len(slices) * int(np.prod(store.reader.shape))
    labels_SL = (store.labels == 1).any(axis=1)
    return {
        "studies": len(store.study),
        "patients": len(set(store.patient_key.tolist())),
        "slices": len(slices),
        "slices_with_labels": int((labels_NL != UNKNOWN).any(axis=1).sum()),
        "longest_study": int(store.num_slices.max()),
        "image_size": store.image_size,
        "bytes_on_disk": all_bytes,
        "raw_bytes": raw_bytes,
        "stored_fraction": round(pixel_bytes / raw_bytes, 4),
        "labels": {
            name: {"slices": int((labels_NL[:, number] == 1).sum()), "studies": int(labels_SL[:, number].sum())}
            for number, name in enumerate(LABELS)
        },
        "windows": _describe_windows(store),
        "accounting": store.attributes["accounting"],
        "format_version": store.attributes["format_version"],
        "digest": store.digest,
    }


def _sizes(store: Store) -> tuple[int, int]:
    pixel_bytes = sum(entry.stat().st_size for entry in os.scandir(store.path / "pixels"))
    rest = sum(path.stat().st_size for path in store.path.rglob("*") if path.is_file() and path.parent.name != "pixels")
    return pixel_bytes, pixel_bytes + rest


def _describe_windows(store: Store) -> dict[str, dict[str, float]]:
    counts_WV = count_values(store)
    mean_W = (counts_WV * np.arange(256)).sum(axis=1) / counts_WV.sum(axis=1)
    shares_WV = counts_WV / counts_WV.sum(axis=1, keepdims=True)
    return {
        name: {
            "centre": window.centre,
            "width": window.width,
            "mean": round(float(mean_W[number]), 2),
            "below": round(float(shares_WV[number, 0]), 4),
            "above": round(float(shares_WV[number, 255]), 4),
        }
        for number, (name, window) in enumerate(store.windows.items())
    }


def count_values(store: Store, study: int | None = None) -> npt.NDArray[np.int64]:
    """How often each stored value, 0 to 255, occurs in each window: int64 [window, value].

    Counted are the slices of one study, or `SAMPLE` of all, evenly spread.
    """
    slices = store.slices if study is None else store.slices[store.slices[:, 0] == study]
    most = len(slices) if study is not None else min(SAMPLE, len(slices))
    chosen = slices[np.unique(np.linspace(0, len(slices) - 1, most).astype(int))]
    counts_WV = np.zeros((len(store.windows), 256), np.int64)
    for of_study, number in chosen.tolist():
        pixels_RCW = store.reader.read(of_study, number)
        for window, counts_V in enumerate(counts_WV):
            counts_V += np.bincount(pixels_RCW[..., window].ravel(), minlength=256)
    return counts_WV


def describe_arrays(store: Store) -> dict[str, dict[str, Any]]:
    """Every array of the store, the pixels first: type, named dimensions, chunks, bytes on disk, and what it is."""
    names = sorted(entry.name for entry in os.scandir(store.path) if entry.is_dir())
    return {name: _describe_array(store.path / name) for name in sorted(names, key=lambda name: name != "pixels")}


def _describe_array(folder: Path) -> dict[str, Any]:
    metadata = json.loads((folder / "zarr.json").read_bytes())
    outer = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    inner = [codec["configuration"] for codec in metadata["codecs"] if codec["name"] == "sharding_indexed"]
    return {
        "type": metadata["data_type"],
        "dimensions": dict(zip(metadata["dimension_names"], metadata["shape"], strict=True)),
        "chunk": inner[0]["chunk_shape"] if inner else outer,
        "shard": outer if inner else None,
        "files": sum(entry.name != "zarr.json" for entry in os.scandir(folder)),
        "bytes": sum(entry.stat().st_size for entry in os.scandir(folder)),
        "meaning": metadata["attributes"].get("long_name", ""),
        "units": metadata["attributes"].get("units"),
    }


def verify(store: Store) -> Iterator[tuple[int, list[str]]]:
    """Decode every chunk of every study against its checksum; yield each study's number and a sentence for each fault."""
    for study in range(len(store.study)):
        yield study, list(store.reader.verify_study(study))


def discard_shards(store: Store, study: int, folders: list[Path]) -> int:
    """Remove every name that a study's shards have below `folders`, so that preprocess makes them anew.

    A shard, its copy among the unfinished work and the one in DVC's cache are one file with three names: what damaged one
    damaged all.

    Returns:
        How many names were removed.
    """
    shards = [path for path in store.reader.shard_paths(study) if path.exists()]
    inodes = {(path.stat().st_dev, path.stat().st_ino) for path in shards}
    removed = 0
    for folder in folders:
        for path in folder.rglob("*"):
            status = path.lstat()
            if (status.st_dev, status.st_ino) in inodes:
                path.unlink()
                removed += 1
    return removed


def find_crop(store: Store) -> str:
    """`none` if every study shows all of its field of view, which is a square about its centre; else `head`."""
    box_mm = store.per_study["box_mm"]
    return "none" if (box_mm[:, :2] == -box_mm[:, 2:] / 2).all() else "head"


def measure_scope(store: Store) -> dict[str, list[float] | None]:
    """Lowest and highest of each of `SCOPE` over the store's studies, without the rarest; None where no study tells."""
    scope: dict[str, list[float] | None] = {}
    for name in SCOPE:
        told = store.per_study[name][np.isfinite(store.per_study[name])]
        scope[name] = np.quantile(told, [RARE, 1 - RARE]).astype(float).tolist() if len(told) else None
    return scope
