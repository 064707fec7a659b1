"""The store: a Zarr v3 group with the windowed slices of every study, their labels, positions and geometry.

Anything that reads Zarr can open it: ``xarray.open_zarr("data/store.zarr", chunks=None)``. `pixels` is
[study, slice, row, column, window] uint8; one study is one shard, one slice is one chunk (`pipeline.shard`). The one module
that knows zarr-python; it makes the metadata and the small arrays, and never touches a pixel.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from pipeline.config import Window
from pipeline.errors import StoreError
from pipeline.files import sync
from pipeline.labels import LABELS, UNKNOWN
from pipeline.reader import SliceReader, shard_name
from pipeline.shard import LEVEL, SLOTS

FORMAT, FORMAT_VERSION = "ichor-store", 4
"""Raise the version when a store of the old form would be misread."""

PACKAGES = ("zarr", "zstandard", "numba", "numpy", "pydicom", "opencv-python-headless")

STUDY_ARRAYS: dict[str, tuple[str, str]] = {
    "num_slices": ("int32", "real slices; the rest of the slice axis is not stored"),
    "patient_key": ("string", "keyed hash that stands for the patient"),
    "content": ("string", "stands for the study's pixels, as they are stored"),
    "rows": ("int32", "rows before resampling"),
    "columns": ("int32", "columns before resampling"),
    "row_spacing_mm": ("float32", "distance between rows before resampling"),
    "column_spacing_mm": ("float32", "distance between columns before resampling"),
    "slice_spacing_mm": ("float32", "median distance between neighbouring slices along the normal"),
    "thickness_mm": ("float32", "slice thickness where the header has it, else NaN"),
    "tilt_deg": ("float32", "angle between the slice normal and the body's axis"),
    "bits_stored": ("int32", "bits of a stored value"),
    "signed": ("int32", "1 if stored values are signed"),
    "intercept": ("float32", "rescale intercept in HU"),
    "lowest_hu": ("float32", "lowest HU before padding is raised to air: below −1100 the study is padded"),
    "orientation": ("float32", "direction cosines of rows and columns"),
    "box_mm": ("float32", "what is shown of a slice: top, left and side of a square, in mm from the slice's centre"),
}
"""Arrays with one value a study (orientation six, box_mm three): type, and what it is."""

WIDE = {"orientation": "cosine", "box_mm": "edge"}
"""The second dimension of those that have one."""


@dataclass(frozen=True)
class StoreContent:
    """All of a store but its pixels. S studies, K slots on the slice axis, L labels."""

    study: npt.NDArray[Any]
    """Study uids, str [S]."""
    per_study: Mapping[str, npt.NDArray[Any]]
    """The arrays of `STUDY_ARRAYS`."""
    image_id: npt.NDArray[Any]
    """str [S, K], empty where there is no slice."""
    position_mm: npt.NDArray[np.float32]
    """float32 [S, K] along the slice normal, NaN where there is no slice."""
    labels: npt.NDArray[np.int8]
    """int8 [S, K, L]: 1, 0, −1 unknown."""


def slice_axis(longest: int) -> int:
    """Length of the slice axis: a multiple of 64, whatever the longest study."""
    return max(1, -(-longest // SLOTS)) * SLOTS


def digest_content(content: StoreContent) -> str:
    """SHA-256 over all of a store: format, pixels (by what stands for them), identities, geometry, positions and labels."""
    digest = hashlib.sha256(f"ichor-store-{FORMAT_VERSION}".encode())
    for values in (
        content.study,
        *(content.per_study[name].astype(_dtype(name)) for name in STUDY_ARRAYS),
        content.image_id,
    ):
        digest.update("\0".join(values.ravel().tolist()).encode() if values.dtype == object else values.tobytes())
    digest.update(np.ascontiguousarray(content.position_mm, "<f4").tobytes())
    digest.update(np.ascontiguousarray(content.labels).tobytes())
    return digest.hexdigest()


def write_store(
    folder: Path,
    content: StoreContent,
    shards: Mapping[tuple[int, int], Path],
    *,
    image_size: int,
    windows: Mapping[str, Window],
    attributes: Mapping[str, Any],
) -> None:
    """Make a store in the new folder `folder` from finished shards, which are hard-linked, not copied.

    Args:
        folder: must not exist; rename it into place afterwards.
        content: all but the pixels.
        shards: (study, part) → the file with its bytes.
        image_size: rows and columns of a slice.
        windows: by name, in the order of the last axis.
        attributes: further attributes, such as the manifest's digest and the accounting.
    """
    shape = (len(content.study), content.image_id.shape[1], image_size, image_size, len(windows))
    # In memory first: zarr-python makes files by hard links, which not every file system has, and syncs none.
    files: dict[str, Buffer] = {}
    group = zarr.create_group(
        MemoryStore(files),
        attributes={
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "digest": digest_content(content),
            "image_size": image_size,
            "windows": {name: {"centre": window.centre, "width": window.width} for name, window in windows.items()},
            "packages": {name: version(name) for name in PACKAGES},
            **attributes,
        },
    )
    _create_pixels(group, shape)
    _write_small_arrays(group, content, list(windows))
    with warnings.catch_warnings():
        # zarr-python warns that consolidated metadata is not yet in the v3 specification; without it, every opening warns.
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        zarr.consolidate_metadata(group.store)
    for name, content_of_file in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content_of_file.to_bytes())
        sync(path)
    for (study, part), source in shards.items():
        _link(source, folder / "pixels" / shard_name(study, part))  # synced when it was made
    for path in folder.iterdir():
        sync(path)
    sync(folder)


def _create_pixels(group: zarr.Group, shape: tuple[int, int, int, int, int]) -> None:
    group.create_array(
        "pixels",
        shape=shape,
        dtype="uint8",
        shards=(1, SLOTS, *shape[2:]),
        chunks=(1, 1, *shape[2:]),
        compressors=[ZstdCodec(level=LEVEL), Crc32cCodec()],
        fill_value=0,
        dimension_names=["study", "slice", "row", "column", "window"],
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
        attributes={"long_name": "windowed slices, 0 at the window's lower end, 255 at its upper end"},
    )


def _write_small_arrays(group: zarr.Group, content: StoreContent, windows: list[str]) -> None:
    slices = ("study", "slice")
    _write(group, "study", content.study, ("study",), "study uid")
    _write(group, "window", np.array(windows, object), ("window",), "window name")
    _write(group, "label", np.array(LABELS, object), ("label",), "label name")
    for name, (_, meaning) in STUDY_ARRAYS.items():
        dimensions = ("study", WIDE[name]) if name in WIDE else ("study",)
        _write(group, name, content.per_study[name].astype(_dtype(name)), dimensions, meaning)
    _write(group, "image_id", content.image_id, slices, "identifier of each slice")
    _write(group, "position_mm", content.position_mm, slices, "position along the slice normal", fill=np.nan)
    _write(group, "labels", content.labels, (*slices, "label"), "1, 0, or −1 where unknown", fill=UNKNOWN)


def _dtype(name: str) -> Any:
    return object if STUDY_ARRAYS[name][0] == "string" else STUDY_ARRAYS[name][0]


def _write(
    group: zarr.Group,
    name: str,
    values: npt.NDArray[Any],
    dimensions: tuple[str, ...],
    meaning: str,
    fill: float | None = None,
) -> None:
    is_text = values.dtype == object
    array = group.create_array(
        name,
        shape=values.shape,
        chunks=values.shape,
        dtype="string" if is_text else values.dtype,
        fill_value="" if is_text else (0 if fill is None else fill),
        dimension_names=list(dimensions),
        chunk_key_encoding={"name": "default", "separator": "."},
        attributes={"long_name": meaning, **({"units": "mm"} if name.endswith("_mm") else {})},
    )
    array[...] = values


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        target.write_bytes(source.read_bytes())
        sync(target)


class Store:
    """An opened store: identities, labels and geometry in memory, slices on demand through `reader`.

    Args:
        path: the store's folder.

    Raises:
        StoreError: there is no store, it is of another format version, or it was altered.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.attributes = _read_attributes(self.path)
        try:
            content, windows = _read_content(self.path)
            self.windows = {name: Window(**self.attributes["windows"][name]) for name in windows}
            sound = digest_content(content) == self.attributes["digest"]
        except Exception as error:  # what is damaged makes zarr and its codecs raise anything
            raise StoreError(f"{self.path}: its arrays cannot be read ({error}); preprocess again") from None
        if not sound:
            raise StoreError(
                f"{self.path}: its labels, identifiers or geometry were altered or are missing; preprocess again"
            )
        self.study, self.per_study = content.study, content.per_study
        self.image_id, self.position_mm, self.labels = content.image_id, content.position_mm, content.labels
        self.num_slices: npt.NDArray[np.int64] = self.per_study["num_slices"].astype(np.int64)
        self.patient_key = self.per_study["patient_key"]
        self.image_size = int(self.attributes["image_size"])
        self.digest = str(self.attributes["digest"])
        self.reader = SliceReader(
            self.path / "pixels",
            study_uids=self.study,
            num_slices=self.num_slices,
            shape=(self.image_size, self.image_size, len(self.windows)),
        )

    @property
    def slices(self) -> npt.NDArray[np.int64]:
        """Every real slice in order: int64 [slice, 2], study number and slice number."""
        study = np.repeat(np.arange(len(self.study)), self.num_slices)
        first = np.repeat(np.cumsum(self.num_slices) - self.num_slices, self.num_slices)
        return np.stack([study, np.arange(len(study)) - first], axis=1)

    def find_study(self, name: str) -> int:
        """A study's number from its uid or its number.

        Raises:
            StoreError: there is no such study.
        """
        matches = np.flatnonzero(self.study == name)
        if len(matches):
            return int(matches[0])
        if name.isdecimal() and int(name) < len(self.study):
            return int(name)
        raise StoreError(
            f"{self.path}: no study {name!r}; give a study uid or a number from 0 to {len(self.study) - 1}"
        )


def _read_content(path: Path) -> tuple[StoreContent, list[str]]:
    """Everything but the pixels, and the names of the windows."""
    group = zarr.open_group(path, mode="r")
    per_study = {name: _read(group, name) for name in STUDY_ARRAYS}
    arrays = (_read(group, name) for name in ("image_id", "position_mm", "labels"))
    return StoreContent(_read(group, "study"), per_study, *arrays), _read(group, "window").tolist()


def _read(group: zarr.Group, name: str) -> npt.NDArray[Any]:
    array = group[name]
    assert isinstance(array, zarr.Array)
    values = np.asarray(array[...])
    return values if values.dtype.kind in "iufb" else values.astype(object)


def _read_attributes(path: Path) -> dict[str, Any]:
    try:
        metadata = json.loads((path / "zarr.json").read_text(encoding="utf-8"))
        attributes = dict(metadata["attributes"])
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"{path}: no store; run `python -m stages.preprocess` (or `dvc repro`) first") from None
    except (ValueError, KeyError, TypeError):
        raise StoreError(f"{path}/zarr.json: not the metadata of a store; preprocess again") from None
    if attributes.get("format") != FORMAT:
        raise StoreError(f"{path}: a Zarr group, but not a store that preprocess made")
    if attributes.get("format_version") != FORMAT_VERSION:
        raise StoreError(
            f"{path}: format version {attributes.get('format_version')}, this code reads {FORMAT_VERSION}; preprocess again"
        )
    return attributes
