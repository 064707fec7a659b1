"""What was excluded, for a person to judge: a list by reason, and a picture of the slices that can be decoded all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from pipeline.errors import SourceError
from pipeline.manifest import EXCLUDED, REASONS, read_manifest
from pipeline.place import Place
from pipeline.sheet import BACKGROUND, CAPTION_PX, INK, MARGIN_PX, QUIET, TILE_PX
from pipeline.source import IDENTITY, containers, is_there

EACH = 8
"""Slices of a reason in the picture, evenly spread over its files."""

PICTURE_CENTRE_HU, PICTURE_WIDTH_HU = 40.0, 380.0
"""Soft tissue and bone both show; what is excluded may be anything."""

AXIAL_REASONS = ("foreign_patient", "duplicate", "conflict", "other_series", "garbage")
"""Exclusions of what is, or may be, an axial CT slice, with a rescale that means something."""


def read_exclusions(data: Path) -> pd.DataFrame:
    """The manifest's excluded rows, with what `preprocess` found when it read the pixels.

    Raises:
        SourceError: there is no manifest.
    """
    manifest = read_manifest(data / "index" / "manifest.parquet")
    path = data / "preprocess" / "faults.parquet"
    if path.is_file():
        faults = pd.read_parquet(path).query("status == @EXCLUDED")
        # of the file as it was then: since, it may have been replaced by a better one
        found = manifest.merge(faults[[*IDENTITY, "image_id", "reason"]], on=[*IDENTITY, "image_id"], how="left")
        late = (manifest["status"] != EXCLUDED) & found["reason_y"].notna()
        manifest.loc[late, "reason"], manifest.loc[late, "status"] = found.loc[late, "reason_y"], EXCLUDED
    return manifest[manifest["status"] == EXCLUDED].reset_index(drop=True)


def list_exclusions(excluded: pd.DataFrame) -> dict[str, list[str]]:
    """Reason → the files excluded for it, most frequent reason first."""
    names = excluded["path"].where(excluded["archive"] == "", excluded["archive"] + "/" + excluded["path"])
    counts = excluded["reason"].value_counts()
    return {str(reason): names[excluded["reason"] == reason].tolist() for reason in counts.index}


def draw_exclusions(excluded: pd.DataFrame, sources: list[str]) -> tuple[Image.Image, int]:
    """Draw the excluded slices that can be decoded, a row for each reason.

    Args:
        excluded: from `read_exclusions`.
        sources: the entries of `source.dicom` that were indexed.

    Returns:
        An RGB image, and how many slices are in it.

    Raises:
        SourceError: a source is not there.
    """
    gone = [source for source in sources if not is_there(source)]
    if gone:
        raise SourceError(
            f"source.dicom: {gone[0]} is not there, and nothing of it can be drawn; give --params FILE with the sources that were indexed"
        )
    rows = []
    for reason in excluded["reason"].value_counts().index:
        of_reason = excluded[(excluded["reason"] == reason) & (excluded["rows"] > 0)]
        chosen = of_reason.iloc[
            np.unique(np.linspace(0, max(0, len(of_reason) - 1), EACH).astype(int))[: len(of_reason)]
        ]
        tiles = [tile for record in _records(chosen, sources) if (tile := _draw_tile(*record)) is not None]
        if tiles:
            rows.append((str(reason), int((excluded["reason"] == reason).sum()), tiles))
    return _lay_out(rows), sum(len(tiles) for _, _, tiles in rows)


def _records(chosen: pd.DataFrame, sources: list[str]) -> list[tuple[Place, dict[str, Any]]]:
    places = containers(sources, chosen)
    facts = chosen.to_dict("records")
    return [
        (
            Place(place, *(int(fact[name]) for name in Place._fields[1:])),
            {str(key): value for key, value in fact.items()},
        )
        for place, fact in zip(places, facts, strict=True)
    ]


def _draw_tile(place: Place, facts: dict[str, Any]) -> Image.Image | None:
    from pipeline.pixels import read_picture  # pydicom is of no use to the other things that `inspect` does

    values = read_picture(place, frame=int(facts["frame"]), rows=int(facts["rows"]), columns=int(facts["columns"]))
    if values is None:
        return None
    is_slice = facts["reason"] in AXIAL_REASONS
    tile = Image.fromarray(_to_grey(values, *((facts["slope"], facts["intercept"]) if is_slice else (0.0, 0.0))))
    tile.thumbnail((TILE_PX, TILE_PX))
    return tile.convert("RGB")


def _to_grey(values: npt.NDArray[Any], slope: float, intercept: float) -> npt.NDArray[np.uint8]:
    """Colours as they are; axial slices in a wide window; all else from its darkest to its brightest hundredth."""
    if values.ndim == 3:
        return np.asarray(values, np.uint8)
    floats = values.astype(np.float32)
    low, high = map(float, np.percentile(floats, (1, 99)))
    if slope != 0:
        floats = floats * np.float32(slope) + np.float32(intercept)
        low, high = PICTURE_CENTRE_HU - PICTURE_WIDTH_HU / 2, PICTURE_CENTRE_HU + PICTURE_WIDTH_HU / 2
    return np.asarray(((floats - low) * (255 / max(high - low, 1.0))).clip(0, 255), np.uint8)


def _lay_out(rows: list[tuple[str, int, list[Image.Image]]]) -> Image.Image:
    columns = max((len(tiles) for _, _, tiles in rows), default=1)
    heights = [CAPTION_PX + max(tile.height for tile in tiles) + MARGIN_PX for _, _, tiles in rows]
    size = (max(columns * (TILE_PX + MARGIN_PX), 480) + MARGIN_PX, (sum(heights) or CAPTION_PX) + MARGIN_PX)
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    if not rows:
        draw.text((MARGIN_PX, MARGIN_PX), "nothing that was excluded can be decoded", QUIET, ImageFont.load_default(13))
    top = MARGIN_PX
    for (reason, count, tiles), height in zip(rows, heights, strict=True):
        draw.text((MARGIN_PX, top), f"{reason}   {count:,}   {REASONS[reason][1]}", INK, ImageFont.load_default(13))
        for place, tile in enumerate(tiles):
            sheet.paste(tile, (MARGIN_PX + place * (TILE_PX + MARGIN_PX), top + CAPTION_PX))
        top += height
    return sheet
