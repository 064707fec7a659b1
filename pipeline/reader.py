"""Random access to the slices of a store, at the bytes: what training streams from, and what verification walks.

A slice costs one `pread`, one CRC-32C and one zstd decode into the caller's buffer. Shards are opened from their open folder: they are
those of the store that was opened, though another may have taken its place. A shard's index is read when its first slice
is, and kept: 512 bytes a study, 13 MB for 25,000, which worker processes can share.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import DamageError, ReplacedError
from pipeline.shard import EMPTY, SLOTS, decode_chunk, read_index

LENGTH_BITS = 28
"""A chunk's place is kept as (offset << 28) + length: chunks to 268 MB, in shards to 69 GB. One number of 8 bytes is written at once,
so that no process sees half of what another writes. 0, the place of no chunk, stands for a shard not yet looked into."""


def shard_name(study: int, part: int) -> str:
    """Name of a shard inside `pixels/`: Zarr's chunk key with the separator `.`, so that all lie in one flat folder.

    DVC's first hash of 25,000 shards takes 15 s so, and 76 s with nested keys.
    """
    return f"c.{study}.{part}.0.0.0"


class SharedArray(np.ndarray):
    """An array that a starting worker process gets as a handle to the same memory; any other would be pickled and copied."""

    memory: Any = None
    """Set on the whole array, not on views of it."""

    def __reduce__(self) -> tuple[Callable[..., Any], Any]:
        if self.memory is None:
            return np.array, (self.tolist(), self.dtype)
        return _attach, (self.memory, self.shape, self.dtype)


def share_array(values: npt.NDArray[Any]) -> SharedArray:
    """Copy an array to memory that is a file without a name in /dev/shm, or where that is full, in the temporary folder."""
    shared = _attach(RawArray("B", max(1, values.nbytes)), values.shape, values.dtype)
    shared[...] = values
    return shared


def _attach(memory: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> SharedArray:
    shared = np.ndarray(shape, dtype, memory).view(SharedArray)
    shared.memory = memory
    return shared


class SliceReader:
    """Reads slices of one store by study and slice number.

    Args:
        pixels: the folder of the store's `pixels` array.
        study_uids: str [study]; damage is reported with them.
        num_slices: int [study], real slices of each study.
        shape: (rows, columns, windows) of a slice.
    """

    def __init__(
        self,
        pixels: Path,
        *,
        study_uids: npt.NDArray[np.str_],
        num_slices: npt.NDArray[np.integer],
        shape: tuple[int, int, int],
    ) -> None:
        self.pixels = pixels
        self.study_uids = study_uids
        self.num_slices = np.asarray(num_slices, np.int64)
        self.shape = shape
        self._parts = -(-self.num_slices // SLOTS)
        self._first_part = np.cumsum(self._parts) - self._parts
        self._places = np.zeros((int(self._parts.sum()), SLOTS), np.uint64)
        self._identity = _identify(pixels)
        self._folder: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_folder": None}  # a descriptor means nothing in another process

    def __del__(self) -> None:
        if self._folder is not None:
            os.close(self._folder)

    def _open_folder(self) -> int:
        """The folder of shards, kept open, so that every shard is of the store that was opened: by its path, another's might be read
        where preprocess has put a new store in its place."""
        if self._folder is None:
            self._folder = os.open(self.pixels, os.O_RDONLY | os.O_DIRECTORY)
            self._require_same()
        return self._folder

    def _require_same(self) -> None:
        if _identify(self.pixels) != self._identity:
            raise ReplacedError(
                f"{self.pixels.parent}: the store was replaced while it was read; run the same command again"
            )

    def share(self) -> None:
        """Put the shards' indexes where worker processes fill and read them together; to be said before they start."""
        if isinstance(self._places, SharedArray):
            return
        self.study_uids = share_array(np.asarray(self.study_uids, np.str_))
        self.num_slices, self._parts = share_array(self.num_slices), share_array(self._parts)
        self._first_part, self._places = share_array(self._first_part), share_array(self._places)

    def _find_chunk(self, study: int, slice_number: int) -> tuple[int, int]:
        """Offset and length of a slice's chunk; a shard's index is read when it is first asked for."""
        part, slot = divmod(slice_number, SLOTS)
        row = self._first_part[study] + part
        place = int(self._places[row, slot])
        if not place:
            self._places[row] = _pack(read_index(shard_name(study, part), self._open_folder()))
            place = int(self._places[row, slot])
        if place == EMPTY:
            raise DamageError("its chunk is missing")
        return place >> LENGTH_BITS, place & ((1 << LENGTH_BITS) - 1)

    def read_into(self, study: int, slice_number: int, out: npt.NDArray[np.uint8]) -> None:
        """Read one slice into `out`, uint8 [row, column, window], contiguous.

        Raises:
            DamageError: its chunk is missing, cut short or altered; study and slice are named.
            ReplacedError: it is another store by now.
        """
        try:
            offset, length = self._find_chunk(study, slice_number)
            descriptor = os.open(shard_name(study, slice_number // SLOTS), os.O_RDONLY, dir_fd=self._open_folder())
            try:
                chunk = os.pread(descriptor, length, offset)
            finally:
                os.close(descriptor)
            if len(chunk) != length:
                raise DamageError(f"{len(chunk)} of {length} bytes are there")
            decode_chunk(chunk, out)
        except FileNotFoundError:
            self._require_same()
            raise self._damage(study, [slice_number], DamageError("its shard is missing")) from None
        except DamageError as damage:
            self._require_same()
            raise self._damage(study, [slice_number], damage) from None

    def read(self, study: int, slice_number: int) -> npt.NDArray[np.uint8]:
        """Read one slice: uint8 [row, column, window]."""
        out = np.empty(self.shape, np.uint8)
        self.read_into(study, slice_number, out)
        return out

    def read_study(self, study: int) -> npt.NDArray[np.uint8]:
        """Read one study: uint8 [slice, row, column, window]."""
        out = np.empty((int(self.num_slices[study]), *self.shape), np.uint8)
        for slice_number in range(len(out)):
            self.read_into(study, slice_number, out[slice_number])
        return out

    def shard_paths(self, study: int) -> list[Path]:
        """The files that hold a study."""
        return [self.pixels / shard_name(study, part) for part in range(self._parts[study])]

    def verify_study(self, study: int) -> Iterator[str]:
        """Decode every slice of a study; yield a sentence for each that is damaged."""
        out = np.empty(self.shape, np.uint8)
        first = self._first_part[study]
        self._places[first : first + self._parts[study]] = 0  # what is in memory proves nothing about the disk
        for part in range(self._parts[study]):
            slices = range(part * SLOTS, min(part * SLOTS + SLOTS, int(self.num_slices[study])))
            try:
                read_index(shard_name(study, part), self._open_folder())
            except DamageError as damage:  # once, not for each slice
                self._require_same()
                yield str(self._damage(study, slices, damage))
                continue
            for slice_number in slices:
                try:
                    self.read_into(study, slice_number, out)
                except DamageError as damage:
                    yield str(damage)

    def _damage(self, study: int, slices: Sequence[int], damage: DamageError) -> DamageError:
        which = f"slice {slices[0]}" if len(slices) == 1 else f"slices {slices[0]} to {slices[-1]}"
        return DamageError(
            f"{self.pixels / shard_name(study, slices[0] // SLOTS)}: study {self.study_uids[study]}, {which}: {damage}; "
            f"run `python -m stages.inspect --verify --discard`, then preprocess again"
        )


def _identify(folder: Path) -> tuple[int, int] | None:
    """Which folder it is, whatever its name; None where there is none."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _pack(index: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A shard's index, uint64 [slot, 2], as places, uint64 [slot]; an empty slot stays 2⁶⁴−1."""
    offsets, lengths = index.T
    assert lengths[lengths != EMPTY].max(initial=0) >> LENGTH_BITS == 0, "a chunk of more than 268 MB"
    return np.where(offsets == EMPTY, offsets, (offsets << LENGTH_BITS) | lengths)
