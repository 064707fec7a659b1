"""Numbers that describe a store, and a check that all of it can be read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

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
    slices = store.slices
    chosen = slices[np.unique(np.linspace(0, len(slices) - 1, min(SAMPLE, len(slices))).astype(int))]
    pixels_NRCW = np.stack([store.reader.read(study, number) for study, number in chosen.tolist()])
    return {
        name: {
            "centre": window.centre,
            "width": window.width,
            "mean": round(float(pixels_NRCW[..., number].mean()), 2),
            "below": round(float((pixels_NRCW[..., number] == 0).mean()), 4),
            "above": round(float((pixels_NRCW[..., number] == 255).mean()), 4),
        }
        for number, (name, window) in enumerate(store.windows.items())
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
