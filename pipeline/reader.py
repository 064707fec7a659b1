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
        self, pixels: Path, *, study_uids: npt.NDArray[np.str_], num_slices: npt.NDArray[np.integer], shape: tuple[int, int, int]
    ) -> None:
        self.pixels = pixels
        self.study_uids = study_uids
        self.num_slices = np.asarray(num_slices, np.int64)
        self.shape = shape
        self._parts = -(-self.num_slices // SLOTS)
        self._first_part = np.cumsum(self._parts) - self._parts
        self._indexes: npt.NDArray[np.uint64] | None = None

    def _shard_indexes(self) -> npt.NDArray[np.uint64]:
        """uint64 [shard, 64, 2], read when first asked for: each loader worker reads its own."""
        if self._indexes is None:
            indexes = np.empty((int(self._parts.sum()), SLOTS, 2), np.uint64)
            for study, parts in enumerate(self._parts):
                for part in range(parts):
                    indexes[self._first_part[study] + part] = self._read_index(study, part)
            self._indexes = indexes
        return self._indexes

    def _read_index(self, study: int, part: int) -> npt.NDArray[np.uint64]:
        try:
            return read_index(self.pixels / shard_name(study, part))
        except DamageError as damage:
            raise self._damage(study, part * SLOTS, damage) from None

    def read_into(self, study: int, slice_number: int, out: npt.NDArray[np.uint8]) -> None:
        """Read one slice into `out`, uint8 [row, column, window], contiguous.

        Raises:
            DamageError: its chunk is missing, cut short or altered; study and slice are named.
        """
        part, slot = divmod(slice_number, SLOTS)
        offset, length = (int(value) for value in self._shard_indexes()[self._first_part[study] + part, slot])
        try:
            if offset == EMPTY:
                raise DamageError("its chunk is missing")
            descriptor = os.open(self.pixels / shard_name(study, part), os.O_RDONLY)
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

    def verify_study(self, study: int) -> Iterator[str]:
        """Decode every slice of a study; yield a sentence for each that is damaged."""
        out = np.empty(self.shape, np.uint8)
        try:
            for part in range(self._parts[study]):
                self._read_index(study, part)
        except DamageError as damage:
            yield str(damage)
            return
        for slice_number in range(self.num_slices[study]):
            try:
                self.read_into(study, slice_number, out)
            except DamageError as damage:
                yield str(damage)

    def _damage(self, study: int, slice_number: int, damage: DamageError) -> DamageError:
        return DamageError(
            f"{self.pixels / shard_name(study, slice_number // SLOTS)}: study {self.study_uids[study]}, slice "
            f"{slice_number}: {damage}; run `python -m stages.inspect --verify`, then preprocess again to rebuild it"
        )
