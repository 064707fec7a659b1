"""DICOM files: the header as a flat record, and the stored values of one slice. The one reader here that knows pydicom.

Headers are read once, by `index`. The record keeps the place of the pixel data in the file, so that an uncompressed slice
is later read with one seek and no second parse.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
)

# RSNA's identifiers are no UIDs: pydicom would warn several times a file, millions of times over the set.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

NATIVE = (str(ExplicitVRLittleEndian), str(ImplicitVRLittleEndian))
"""Transfer syntaxes whose pixel data lie in the file as they are (PS3.5 A.1, A.2)."""

TAGS: dict[str, int] = {
    "sop_class": 0x00080016,
    "image_id": 0x00080018,
    "image_type": 0x00080008,
    "modality": 0x00080060,
    "patient_id": 0x00100020,
    "kernel": 0x00181210,
    "thickness_mm": 0x00180050,
    "study_uid": 0x0020000D,
    "series_uid": 0x0020000E,
    "position": 0x00200032,
    "orientation": 0x00200037,
    "samples": 0x00280002,
    "photometric": 0x00280004,
    "frames": 0x00280008,
    "rows": 0x00280010,
    "columns": 0x00280011,
    "spacing": 0x00280030,
    "bits_allocated": 0x00280100,
    "bits_stored": 0x00280101,
    "high_bit": 0x00280102,
    "signed": 0x00280103,
    "padding": 0x00280120,
    "window_centre": 0x00281050,
    "window_width": 0x00281051,
    "intercept": 0x00281052,
    "slope": 0x00281053,
}
PIXEL_TAG = 0x7FE00010
PIXEL_TAG_BYTES = b"\xe0\x7f\x10\x00"
UNDEFINED_LENGTH = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Header:
    """What one file says of itself. Absent numbers are NaN or −1, absent texts are empty; `fault` names an unreadable file."""

    fault: str = ""
    transfer_syntax: str = ""
    sop_class: str = ""
    modality: str = ""
    image_type: str = ""
    study_uid: str = ""
    series_uid: str = ""
    image_id: str = ""
    patient_key: str = ""
    position_x_mm: float = np.nan
    position_y_mm: float = np.nan
    position_z_mm: float = np.nan
    row_x: float = np.nan
    row_y: float = np.nan
    row_z: float = np.nan
    column_x: float = np.nan
    column_y: float = np.nan
    column_z: float = np.nan
    rows: int = -1
    columns: int = -1
    row_spacing_mm: float = np.nan
    column_spacing_mm: float = np.nan
    thickness_mm: float = np.nan
    kernel: str = ""
    samples: int = -1
    photometric: str = ""
    frames: int = 1
    bits_allocated: int = -1
    bits_stored: int = -1
    high_bit: int = -1
    signed: int = -1
    intercept: float = np.nan
    slope: float = np.nan
    padding: float = np.nan
    window_centre: float = np.nan
    window_width: float = np.nan
    pixel_offset: int = -1
    pixel_length: int = -1


def read_header(path: Path | str, *, patient_salt: str) -> Header:
    """Read what `index` needs of one file, without its pixels.

    Args:
        path: any file.
        patient_salt: key of the hash that takes the place of (0010,0020) Patient ID; the raw id leaves no header.

    Returns:
        The header; for a file that cannot be read, one whose `fault` is ``not_dicom``, ``unreadable`` or ``dicomdir``.
    """
    try:
        with open(path, "rb") as file:
            dataset = _parse_header(file)
            if dataset is None:
                return Header(fault="not_dicom")
            return _flatten(dataset, *_find_pixels(file, dataset), patient_salt=patient_salt)
    except OSError:
        return Header(fault="unreadable")
    except Exception:  # a mutated file can make a parser raise anything; the file is named, the run goes on
        return Header(fault="unreadable")


def _parse_header(file: BufferedReader) -> pydicom.FileDataset | None:
    tags: list[Any] = list(TAGS.values())
    try:
        return pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags)
    except InvalidDicomError:
        file.seek(0)
        group = int.from_bytes(file.read(2), "little")
        if group not in (0x0002, 0x0008):  # a data set without preamble starts with one of these groups
            return None
        file.seek(0)
        dataset = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags, force=True)
        return dataset if len(dataset) else None


def _find_pixels(file: BufferedReader, dataset: pydicom.FileDataset) -> tuple[int, int]:
    """Offset and length of the pixel data's value, or −1, −1 (pydicom leaves the file at the element's tag)."""
    syntax = str(dataset.file_meta.get("TransferSyntaxUID", ImplicitVRLittleEndian))
    if syntax == str(DeflatedExplicitVRLittleEndian):
        return -1, -1
    element = file.read(12)
    if element[:4] != PIXEL_TAG_BYTES:
        return -1, -1
    if dataset.original_encoding[0]:  # implicit VR: tag, length
        return file.tell() - len(element) + 8, int.from_bytes(element[4:8], "little")
    return file.tell() - len(element) + 12, int.from_bytes(element[8:12], "little")


def _flatten(dataset: pydicom.FileDataset, pixel_offset: int, pixel_length: int, *, patient_salt: str) -> Header:
    values: dict[str, Any] = {}
    for name, tag in TAGS.items():
        element = dataset.get(tag)
        values[name] = None if element is None else element.value
    meta = dataset.file_meta
    sop_class = str(values["sop_class"] or meta.get("MediaStorageSOPClassUID", ""))
    position, orientation = _floats(values["position"], 3), _floats(values["orientation"], 6)
    spacing = _floats(values["spacing"], 2)
    study_uid = _text(values["study_uid"])
    return Header(
        fault="dicomdir" if sop_class == MediaStorageDirectoryStorage else "",
        transfer_syntax=str(meta.get("TransferSyntaxUID", ImplicitVRLittleEndian)),
        sop_class=sop_class,
        modality=_text(values["modality"]),
        image_type=_text(values["image_type"]),
        study_uid=study_uid,
        series_uid=_text(values["series_uid"]),
        image_id=_text(values["image_id"]),
        patient_key=patient_key(_text(values["patient_id"]) or study_uid, salt=patient_salt),
        position_x_mm=position[0],
        position_y_mm=position[1],
        position_z_mm=position[2],
        row_x=orientation[0],
        row_y=orientation[1],
        row_z=orientation[2],
        column_x=orientation[3],
        column_y=orientation[4],
        column_z=orientation[5],
        rows=_integer(values["rows"]),
        columns=_integer(values["columns"]),
        row_spacing_mm=spacing[0],
        column_spacing_mm=spacing[1],
        thickness_mm=_floats(values["thickness_mm"], 1)[0],
        kernel=_text(values["kernel"]),
        samples=_integer(values["samples"]),
        photometric=_text(values["photometric"]),
        frames=_integer(values["frames"], absent=1),
        bits_allocated=_integer(values["bits_allocated"]),
        bits_stored=_integer(values["bits_stored"]),
        high_bit=_integer(values["high_bit"]),
        signed=_integer(values["signed"]),
        intercept=_floats(values["intercept"], 1)[0],
        slope=_floats(values["slope"], 1)[0],
        padding=_floats(values["padding"], 1)[0],
        window_centre=_floats(values["window_centre"], 1)[0],  # may be multi-valued: the first one counts
        window_width=_floats(values["window_width"], 1)[0],
        pixel_offset=pixel_offset,
        pixel_length=-1 if pixel_length == UNDEFINED_LENGTH else pixel_length,
    )


def patient_key(patient_id: str, *, salt: str) -> str:
    """A keyed hash, 16 hex digits, in the place of (0010,0020) Patient ID."""
    return hashlib.blake2b(patient_id.encode(), key=salt.encode(), digest_size=8).hexdigest()


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value.strip() if isinstance(value, str) else "\\".join(str(part) for part in value)


def _integer(value: Any, absent: int = -1) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        return absent


def _floats(value: Any, count: int) -> list[float]:
    """The first `count` numbers of a value; all NaN where it has fewer or other things."""
    if value is None:
        return [np.nan] * count
    parts = [value] if isinstance(value, str | float | int) else list(value)
    try:
        numbers = [float(part) for part in parts[:count]]
    except (TypeError, ValueError):
        numbers = []
    return numbers if len(numbers) == count else [np.nan] * count


class PixelFault(Exception):
    """The pixels of one slice cannot be had; `code` is a reason of the manifest."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


def read_stored(
    path: Path,
    *,
    size: int,
    mtime_ns: int,
    transfer_syntax: str,
    rows: int,
    columns: int,
    bits_stored: int,
    signed: bool,
    pixel_offset: int,
) -> npt.NDArray[np.integer]:
    """Read the stored values of one slice that `index` accepted.

    Args:
        path: the file.
        size: its size in bytes when `index` read it.
        mtime_ns: its time of change then.
        transfer_syntax: (0002,0010).
        rows: (0028,0010).
        columns: (0028,0011).
        bits_stored: (0028,0101), at most 16.
        signed: (0028,0103) is 1.
        pixel_offset: where the value of (7FE0,0010) starts.

    Returns:
        int16 or uint16 [row, column].

    Raises:
        PixelFault: `changed` where the file is gone, cannot be read, or is not the one that `index` saw; `truncated_pixels`;
            `undecodable`.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != (size, mtime_ns):
                raise PixelFault("changed")
            if transfer_syntax not in NATIVE or pixel_offset < 0:
                return _decode(path, rows=rows, columns=columns)
            content = os.pread(file.fileno(), rows * columns * 2, pixel_offset)
    except (
        OSError
    ):  # gone, or a disk that does not answer: perhaps for a moment, so it must not be remembered as a defect
        raise PixelFault("changed") from None
    if len(content) != rows * columns * 2:
        raise PixelFault("truncated_pixels")
    stored = np.frombuffer(content, "<i2" if signed else "<u2").reshape(rows, columns)
    return _without_unused_bits(stored, bits_stored=bits_stored)


def _without_unused_bits(stored: npt.NDArray[np.integer], *, bits_stored: int) -> npt.NDArray[np.integer]:
    """Bits above Bits Stored mean nothing (PS3.5 8.1.1): clear them, or carry the sign into them."""
    unused = 16 - bits_stored
    return stored if unused <= 0 else (stored << unused) >> unused


def _decode(path: Path, *, rows: int, columns: int) -> npt.NDArray[np.integer]:
    """The general way, through pydicom's decoders, for whatever is compressed or big endian."""
    try:
        stored = pydicom.dcmread(path, force=True).pixel_array
    except MemoryError:
        raise
    except Exception:  # decoders raise what they like
        raise PixelFault("undecodable") from None
    if stored.shape != (rows, columns):
        raise PixelFault("undecodable")
    return stored
