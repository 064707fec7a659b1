"""Random access to the slices of a store, at the bytes: what training streams from, and what verification walks.

A slice costs one `pread`, one CRC-32C and one Blosc decode into the caller's buffer. Shard indexes are read once and kept:
1 kB a study, 25 MB for 25,000.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.errors import DamageError
from pipeline.shard import EMPTY, SLOTS, decode_chunk, read_index


def shard_name(study: int, part: int) -> str:
    """Name of a shard inside `pixels/`: Zarr's chunk key with the separator `.`, so that all lie in one flat folder.

    DVC's first hash of 25,000 shards takes 15 s so, and 76 s with nested keys.
    """
    return f"c.{study}.{part}.0.0.0"


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
        self._indexes: npt.NDArray[np.uint64] | None = None
        self._is_read = np.zeros(int(self._parts.sum()), bool)

    def _find_chunk(self, study: int, slice_number: int) -> tuple[int, int]:
        """Offset and length of a slice's chunk; a shard's index is read when it is first asked for."""
        if self._indexes is None:
            self._indexes = np.empty((len(self._is_read), SLOTS, 2), np.uint64)
        part, slot = divmod(slice_number, SLOTS)
        number = self._first_part[study] + part
        if not self._is_read[number]:
            self._indexes[number] = read_index(self.pixels / shard_name(study, part))
            self._is_read[number] = True
        offset, length = self._indexes[number, slot].tolist()
        return offset, length

    def read_into(self, study: int, slice_number: int, out: npt.NDArray[np.uint8]) -> None:
        """Read one slice into `out`, uint8 [row, column, window], contiguous.

        Raises:
            DamageError: its chunk is missing, cut short or altered; study and slice are named.
        """
        try:
            offset, length = self._find_chunk(study, slice_number)
            if offset == EMPTY:
                raise DamageError("its chunk is missing")
            descriptor = os.open(self.pixels / shard_name(study, slice_number // SLOTS), os.O_RDONLY)
            try:
                chunk = os.pread(descriptor, length, offset)
            finally:
                os.close(descriptor)
            if len(chunk) != length:
                raise DamageError(f"{len(chunk)} of {length} bytes are there")
            decode_chunk(chunk, out)
        except FileNotFoundError:
            raise self._damage(study, slice_number, DamageError("its shard is missing")) from None
        except DamageError as damage:
            raise self._damage(study, slice_number, damage) from None

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
        self._is_read[first : first + self._parts[study]] = False  # what is in memory proves nothing about the disk
        for slice_number in range(self.num_slices[study]):
            try:
                self.read_into(study, slice_number, out)
            except DamageError as damage:
                yield str(damage)

    def _damage(self, study: int, slice_number: int, damage: DamageError) -> DamageError:
        return DamageError(
            f"{self.pixels / shard_name(study, slice_number // SLOTS)}: study {self.study_uids[study]}, slice "
            f"{slice_number}: {damage}; run `python -m stages.inspect --verify --discard`, then preprocess again"
        )
