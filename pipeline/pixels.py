"""The stored values of one slice, as `index` found it; and what can be seen of a file that was excluded."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom

from pipeline.decoder import DecodeError, decode
from pipeline.header import ITEM_TAG, NATIVE
from pipeline.place import ChangedError, DamagedError, Place, Scratch, read_part, read_whole


class PixelFault(Exception):
    """The pixels of one slice cannot be had; `code` is a reason of the manifest."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


Stored = npt.NDArray[np.integer]


def read_stored(
    place: Place,
    *,
    scratch: Scratch,
    transfer_syntax: str,
    frame: int,
    rows: int,
    columns: int,
    bits_stored: int,
    signed: bool,
    pixel_offset: int,
) -> Stored:
    """Read the stored values of one slice that `index` accepted.

    Args:
        place: the file, and what it was when `index` read it.
        scratch: memory to read into; the result may lie in it.
        transfer_syntax: (0002,0010).
        frame: number of the frame, from 0; −1 in a file of one slice.
        rows: (0028,0010).
        columns: (0028,0011).
        bits_stored: (0028,0101), at most 16.
        signed: (0028,0103) is 1.
        pixel_offset: where the value of (7FE0,0010), or this frame of it, starts.

    Returns:
        int16 or uint16 [row, column], writable.

    Raises:
        PixelFault: `changed` where the file is gone, cannot be read, or is not the one that `index` saw (perhaps for a moment: it
            must not be remembered as a defect), and so `zip_damaged`; `truncated_pixels`; `undecodable`, `decoder_died` or `decoder_hung`.
    """
    length = rows * columns * 2
    kind = np.dtype("<i2" if signed else "<u2")
    try:
        if transfer_syntax not in NATIVE or pixel_offset < 0:
            stored = _decode_twice(read_whole(place), frame=max(0, frame), rows=rows, columns=columns)
            if stored.dtype.itemsize != 2:
                raise PixelFault("undecodable")
            return np.require(stored, requirements=["C", "W"])
        content = read_part(place, pixel_offset, length, scratch)
    except DamagedError:
        raise PixelFault("zip_damaged") from None
    except ChangedError:
        raise PixelFault("changed") from None
    except DecodeError as error:
        raise PixelFault(error.code) from None
    if len(content) != length:
        raise PixelFault("truncated_pixels")
    # encapsulated, whatever the transfer syntax says: −2 and −8192 are no CT's first values
    if content[:4] == ITEM_TAG:
        raise PixelFault("undecodable")
    stored = np.frombuffer(content, kind).reshape(rows, columns)
    if not stored.flags.writeable:  # out of a zip, or a store of objects
        stored = stored.copy()
    return _clear_unused_bits(stored, bits_stored=bits_stored)


def _decode_twice(content: bytes, *, frame: int, rows: int, columns: int) -> Stored:
    """Decode; where the decoder died, once more in a new one: the file before may have damaged it."""
    try:
        return decode(content, frame=frame, rows=rows, columns=columns)
    except DecodeError as error:
        if error.code != "decoder_died":
            raise
    return decode(content, frame=frame, rows=rows, columns=columns)


def _clear_unused_bits(stored: Stored, *, bits_stored: int) -> Stored:
    """Bits above Bits Stored mean nothing (PS3.5 8.1.1): clear them, or carry the sign into them; in place."""
    unused = 16 - bits_stored
    if unused <= 0:
        return stored
    is_signed = stored.dtype.kind == "i"
    beyond = stored.max() >> (bits_stored - is_signed) > 0 or (is_signed and stored.min() < -(1 << (bits_stored - 1)))
    if beyond:
        np.left_shift(stored, unused, out=stored)
        np.right_shift(stored, unused, out=stored)
    return stored


def read_picture(place: Place, *, frame: int, rows: int, columns: int) -> npt.NDArray[Any] | None:
    """What can be seen of a file that was excluded: [row, column], or [row, column, 3] in colour; None where nothing can."""
    try:
        content = read_whole(place)
        dataset = pydicom.dcmread(io.BytesIO(content), force=True)
        if dataset.file_meta.get("TransferSyntaxUID") not in NATIVE:
            return decode(content, frame=max(0, frame), rows=rows, columns=columns)
        pixels: npt.NDArray[Any] = dataset.pixel_array
    except (ChangedError, DecodeError):
        return None
    except Exception:  # what was excluded may be damaged in any way
        return None
    if pixels.ndim == 3 and pixels.shape[-1] != 3:  # several frames: the middle one
        pixels = pixels[max(0, frame) or len(pixels) // 2]
    return pixels if pixels.ndim in (2, 3) else None
