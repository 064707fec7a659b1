"""One study from DICOM into finished shards: what runs on the workers.

A shard is written under a name made of its fingerprint, and the study's result last: so a study may be made twice, by whomever,
and the same bytes come out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from pipeline.config import Window
from pipeline.files import write_bytes
from pipeline.garbage import is_garbage
from pipeline.head import Box, find_head
from pipeline.hounsfield import (
    AIR_HU,
    WRAP_OFFSET,
    Stored,
    find_padding,
    invert,
    is_inverted,
    lowest_hu,
    set_to_air,
    unwrap,
)
from pipeline.pixels import PixelFault, read_stored
from pipeline.place import Place, Scratch
from pipeline.resample import Converter, Pixels, PixelsHU
from pipeline.series import TRANSPOSED, turn
from pipeline.shard import SLOTS, build_shard, digest_chunks, encode_chunk


class SliceFacts(NamedTuple):
    """What a worker must know of one slice: columns of the manifest."""

    size: int
    stamp: int
    method: int
    offset: int
    packed_size: int
    image_id: str
    transfer_syntax: str
    frame: int
    rows: int
    columns: int
    bits_stored: int
    signed: int
    pixel_offset: int
    slope: float
    intercept: float
    padding: float
    padding_limit: float
    photometric: str
    row_spacing_mm: float
    column_spacing_mm: float
    field_mm: float
    turn: int
    reason: str


class StudyTask(NamedTuple):
    """What a worker needs to make one study's shards."""

    fingerprint: str
    shards: Path
    containers: list[str]
    slices: list[SliceFacts]
    image_size: int
    crop: str
    windows: dict[str, Window]

    @property
    def whole(self) -> Box:
        """All of the study's field of view."""
        side_mm = self.slices[0].field_mm
        return Box(-side_mm / 2, -side_mm / 2, side_mm)


class StudyResult(NamedTuple):
    """What became of a study; kept beside its shards."""

    fingerprint: str
    kept: list[bool]
    faults: dict[str, str]
    """Image id → reason of slices whose pixels could not be had, or were repaired."""
    lowest_hu: float
    box: list[float]
    """Top, left and side of what is shown, in mm from the centre of the slice."""
    stored_bytes: int
    content: str
    """Stands for the shards' bytes."""


def shard_path(folder: Path, fingerprint: str, part: int) -> Path:
    """Where unfinished work keeps a finished shard."""
    return folder / f"{fingerprint}.{part}.shard"


def count_parts(slices_kept: int) -> int:
    """How many shards so many slices take."""
    return -(-slices_kept // SLOTS)


def make_shards(batch: Sequence[StudyTask]) -> list[StudyResult]:
    """Make the shards of a few studies: the function that runs on the workers."""
    cv2.setNumThreads(1)  # one process a core already
    return [_make_study(task) for task in batch]


def _make_study(task: StudyTask) -> StudyResult:
    reader = _open_reader(task.image_size, tuple(task.windows.items()))
    chunks: list[bytes] = []
    is_kept: list[bool] = []
    faults: dict[str, str] = {}
    lowest = np.inf
    box = _find_box(task, reader)
    for container, facts in zip(task.containers, task.slices, strict=True):
        try:
            pixels, of_slice_hu, repair = reader.read(container, facts, box)
        except PixelFault as fault:
            faults[facts.image_id] = fault.code
            is_kept.append(False)
        else:
            chunks.append(encode_chunk(pixels))
            lowest = min(lowest, of_slice_hu)
            is_kept.append(True)
            if repair:
                faults[facts.image_id] = repair
    stored_bytes = 0
    for part, start in enumerate(range(0, len(chunks), SLOTS)):
        content = build_shard(chunks[start : start + SLOTS])
        write_bytes(shard_path(task.shards, task.fingerprint, part), content)
        stored_bytes += len(content)
    content_digest = digest_chunks(chunks)
    place = [box.top_mm, box.left_mm, box.side_mm]
    result = StudyResult(
        task.fingerprint, is_kept, faults, float(lowest) if chunks else 0.0, place, stored_bytes, content_digest
    )
    record = {name: value for name, value in result._asdict().items() if name != "fingerprint"}
    # Not synced: if a power cut takes it, the study is made again.
    write_bytes(task.shards / f"{task.fingerprint}.json", json.dumps(record).encode(), synced=False)
    return result


@lru_cache(maxsize=1)
def _open_reader(image_size: int, windows: tuple[tuple[str, Window], ...]) -> SliceReader:
    """The one reader of a worker: its memory serves slice after slice."""
    return SliceReader(image_size=image_size, windows=dict(windows))


def _find_box(task: StudyTask, reader: SliceReader) -> Box:
    """What of the study's slices is shown: all of the field of view, or the head in it."""
    if task.crop == "none":
        return task.whole
    coarse = []
    for container, facts in zip(task.containers, task.slices, strict=True):
        with suppress(PixelFault):  # it is named when it is read in earnest
            coarse.append(reader.read_coarse(container, facts, task.whole))
    return (find_head(np.stack(coarse), side_mm=task.whole.side_mm) if coarse else None) or task.whole


class SliceReader:
    """Reads slices and converts them: stored values, repairs, resampling, windows.

    Args:
        image_size: rows and columns of the result.
        windows: by name.
    """

    def __init__(self, *, image_size: int, windows: dict[str, Window]) -> None:
        self.converter = Converter(image_size=image_size, windows=windows)
        self.scratch = Scratch()

    def read(self, container: str, facts: SliceFacts, box: Box) -> tuple[Pixels, float, str]:
        """Read one slice.

        Args:
            container: the file, URL or zip that holds it.
            facts: the manifest's values.
            box: what to show of it.

        Returns:
            uint8 [row, column, window], good until the next call; the lowest HU before padding is raised to air; and the repair
            that its pixels needed, or an empty text.

        Raises:
            PixelFault: the pixels cannot be had, or are no CT's.
        """
        stored, intercept, lowest, repair = self._read_stored(container, facts)
        pixels = self.converter.window(
            turn(stored, facts.turn),
            slope=facts.slope,
            intercept=intercept,
            spacing_mm=_spacing(facts),
            box=box,
        )
        return pixels, lowest, repair if not facts.reason else ""

    def read_coarse(self, container: str, facts: SliceFacts, box: Box) -> PixelsHU:
        """Read one slice in the size in which the head is looked for: float32 [row, column] in HU."""
        stored, intercept, _, _ = self._read_stored(container, facts)
        return self.converter.coarse_hu(
            turn(stored, facts.turn), slope=facts.slope, intercept=intercept, spacing_mm=_spacing(facts), box=box
        )

    def _read_stored(self, container: str, facts: SliceFacts) -> tuple[Stored, float, float, str]:
        """Stored values, repaired; the intercept that goes with them; the lowest HU; and the repair."""
        stored = read_stored(
            Place(container, facts.size, facts.stamp, facts.method, facts.offset, facts.packed_size),
            scratch=self.scratch,
            transfer_syntax=facts.transfer_syntax,
            frame=facts.frame,
            rows=facts.rows,
            columns=facts.columns,
            bits_stored=facts.bits_stored,
            signed=facts.signed == 1,
            pixel_offset=facts.pixel_offset,
        )
        is_wrapped, may_be_inverted = facts.reason == "wrap_12bit", facts.photometric == "MONOCHROME1"
        # what is below air is raised to it anyway; but unwrapped or inverted, padding would become anything
        is_tissue = facts.slope * _highest(facts) + facts.intercept > AIR_HU
        padded = None
        if is_tissue or is_wrapped or may_be_inverted:
            padded = find_padding(stored, padding=facts.padding, limit=facts.padding_limit)
        intercept, repair = facts.intercept, "padding" if padded is not None and is_tissue else ""
        if is_wrapped:
            stored, intercept = unwrap(stored), -float(WRAP_OFFSET)
        rescale = {"slope": facts.slope, "intercept": intercept}
        if may_be_inverted and is_inverted(stored, padded, **rescale):
            stored, repair = invert(stored, bits_stored=facts.bits_stored), "inverted"
        if padded is not None:
            set_to_air(stored, padded, **rescale)
        if is_garbage(stored, **rescale):
            raise PixelFault("garbage")
        return stored, intercept, lowest_hu(stored, **rescale), repair


def _highest(facts: SliceFacts) -> float:
    """The padding value, or end of its range, that has most HU; NaN where there is none."""
    ends = [end for end in (facts.padding, facts.padding_limit) if math.isfinite(end)]
    return (max if facts.slope > 0 else min)(ends, default=math.nan)


def _spacing(facts: SliceFacts) -> tuple[float, float]:
    """Between rows, and between columns, after the turn."""
    spacing_mm = (facts.row_spacing_mm, facts.column_spacing_mm)
    return spacing_mm[::-1] if facts.turn & TRANSPOSED else spacing_mm
