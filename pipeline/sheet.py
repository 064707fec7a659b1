"""A contact sheet: one study's slices side by side, feet to head, with number, position and labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from pipeline.config import Window
from pipeline.labels import ANY, LABELS, SUBTYPES, UNKNOWN
from pipeline.store import Store

SHORT = {
    "epidural": "EDH",
    "intraparenchymal": "IPH",
    "intraventricular": "IVH",
    "subarachnoid": "SAH",
    "subdural": "SDH",
}
TILE_PX = 192
CAPTION_PX = 20
MARGIN_PX = 6
BACKGROUND, INK, QUIET, POSITIVE = (16, 18, 22), (236, 238, 242), (130, 136, 148), (255, 120, 92)


def draw_sheet(store: Store, study: int, windows: list[str], columns: int = 0) -> Image.Image:
    """Draw a study.

    Args:
        store: the opened store.
        study: its number.
        windows: names of the windows to show; several are drawn one below the other for every slice.
        columns: slices in a row; 0 chooses a sheet about as wide as high.

    Returns:
        An RGB image. Left in the image is the right of the patient, as radiologists look at it; slices run from the lowest.
    """
    pixels_SRCW = store.reader.read_study(study)
    count = len(pixels_SRCW)
    columns = columns or min(count, math.ceil(math.sqrt(1.3 * count * len(windows))))
    rows = math.ceil(count / columns)
    tile_height = TILE_PX * len(windows) + CAPTION_PX
    head_px = 46
    sheet = Image.new(
        "RGB",
        (columns * (TILE_PX + MARGIN_PX) + MARGIN_PX, rows * (tile_height + MARGIN_PX) + head_px),
        BACKGROUND,
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN_PX, 6), _heading(store, study, windows), INK, ImageFont.load_default(15))
    draw.text((MARGIN_PX, 26), _labels_of_study(store, study), QUIET, ImageFont.load_default(13))
    numbers = [list(store.windows).index(name) for name in windows]
    for place in range(count):
        left = MARGIN_PX + (place % columns) * (TILE_PX + MARGIN_PX)
        top = head_px + (place // columns) * (tile_height + MARGIN_PX)
        for row, number in enumerate(numbers):
            tile = Image.fromarray(pixels_SRCW[place, :, :, number]).resize(
                (TILE_PX, TILE_PX), Image.Resampling.LANCZOS
            )
            sheet.paste(tile.convert("RGB"), (left, top + row * TILE_PX))
        _caption(draw, store, study, place, left, top, tile_height)
    return sheet


def _heading(store: Store, study: int, windows: list[str]) -> str:
    shown = ", ".join(f"{name} {store.windows[name].centre:g}/{store.windows[name].width:g}" for name in windows)
    tilt = float(store.per_study["tilt_deg"][study])
    spacing = float(store.per_study["slice_spacing_mm"][study])
    return f"study {study}: {store.num_slices[study]} slices, {spacing:.1f} mm apart, tilt {tilt:.1f}°; {shown}"


def _labels_of_study(store: Store, study: int) -> str:
    labels_SL = store.labels[study, : store.num_slices[study]]
    if (labels_SL == UNKNOWN).all():
        return "no labels"
    counted = [f"{name} {int((labels_SL[:, number] == 1).sum())}" for number, name in enumerate(LABELS)]
    return "positive slices: " + ", ".join(counted)


def _caption(draw: ImageDraw.ImageDraw, store: Store, study: int, place: int, left: int, top: int, height: int) -> None:
    labels_L: npt.NDArray[np.int8] = store.labels[study, place]
    names = [SHORT[name] for number, name in enumerate(SUBTYPES) if labels_L[number] == 1]
    if labels_L[ANY] == 1 and not names:
        names = ["ICH"]
    if names:
        draw.rectangle((left - 2, top - 2, left + TILE_PX + 1, top + height - 1), outline=POSITIVE, width=2)
    y = top + height - CAPTION_PX + 2
    draw.text(
        (left + 2, y), f"{place + 1}   {store.position_mm[study, place]:.1f} mm", QUIET, ImageFont.load_default(13)
    )
    draw.text((left + TILE_PX - 2, y), " ".join(names), POSITIVE, ImageFont.load_default(13), anchor="ra")


HEAT_SHARE = 0.5
"""Of the colour where a heat map is highest: the CT must still be read under it."""


def blend_heat(grey_RC: npt.NDArray[np.uint8], heat_RC: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Lay a heat map over a slice; where it is cold the slice stays as it is.

    Args:
        grey_RC: uint8, one window.
        heat_RC: float32 in 0…1, as `pipeline.gradcam` makes it.

    Returns:
        uint8 [R, C, 3], red, green, blue.
    """
    colours_RC3 = cv2.applyColorMap(np.rint(heat_RC * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    share_RC1 = HEAT_SHARE * heat_RC[..., None]
    blended_RC3 = grey_RC[..., None] * (1 - share_RC1) + colours_RC3 * share_RC1
    return np.rint(blended_RC3).astype(np.uint8)


SUSPECTS_IN_A_ROW = 6
WINDOWS_SHOWN = 2
"""Of the suspects, one below the other: mostly brain, and the wider one in which blood along bone is seen."""


def draw_suspects(
    pixels_KRCW: npt.NDArray[np.uint8],
    *,
    windows: Mapping[str, Window],
    probabilities: Sequence[float],
    captions: Sequence[str],
    findings: Sequence[str],
    heading: str,
    subheading: str,
    warnings: Sequence[str],
    heat_KRC: npt.NDArray[np.float32] | None = None,
) -> Image.Image:
    """Draw K slices of a study that was predicted, with a bar under each as long as its probability of any bleed.

    Args:
        pixels_KRCW: uint8.
        windows: of the last axis, by name; the first ones are shown.
        probabilities: of any bleed, one a slice.
        captions: which slice it is.
        findings: what it most looks like.
        heading: the first line.
        subheading: the second line.
        warnings: a line each.
        heat_KRC: float32 in 0…1, laid over the first window in a further tile below; None for none.
    """
    shown = list(windows.items())[:WINDOWS_SHOWN]
    tiles = len(shown) + (heat_KRC is not None)
    columns, tile_height = SUSPECTS_IN_A_ROW, TILE_PX * tiles + CAPTION_PX
    head_px = 46 + 18 * len(warnings)
    rows = math.ceil(len(pixels_KRCW) / columns)
    size = (columns * (TILE_PX + MARGIN_PX) + MARGIN_PX, rows * (tile_height + MARGIN_PX) + head_px)
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    named = ", ".join(f"{name} {window.centre:g}/{window.width:g}" for name, window in shown)
    named += ", Grad-CAM of the likeliest subtype" if heat_KRC is not None else ""
    lines = [(f"{heading}; {named}", INK), (subheading, QUIET), *((warning, POSITIVE) for warning in warnings)]
    for number, (text, ink) in enumerate(lines):
        draw.text((MARGIN_PX, 6 + 18 * number), text, ink, ImageFont.load_default(13))
    for place, pixels_RCW in enumerate(pixels_KRCW):
        left = MARGIN_PX + (place % columns) * (TILE_PX + MARGIN_PX)
        top = head_px + (place // columns) * (tile_height + MARGIN_PX)
        pictures = [np.ascontiguousarray(pixels_RCW[..., window]) for window in range(len(shown))]
        if heat_KRC is not None:
            pictures.append(blend_heat(pictures[0], heat_KRC[place]))
        for row, picture in enumerate(pictures):
            tile = Image.fromarray(picture).resize((TILE_PX, TILE_PX), Image.Resampling.LANCZOS)
            sheet.paste(tile.convert("RGB"), (left, top + row * TILE_PX))
        below = top + tiles * TILE_PX
        draw.rectangle((left, below, left + round(probabilities[place] * (TILE_PX - 1)), below + 2), POSITIVE)
        font = ImageFont.load_default(12)
        draw.text((left + 2, below + 4), captions[place], QUIET, font)
        found = f"{probabilities[place]:.2f}  {findings[place]}"
        draw.text((left + TILE_PX - 2, below + 4), found, INK, font, anchor="ra")
    return sheet
