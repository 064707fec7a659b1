"""The five bleeds, each with the shape and the place that define it.

An epidural bleed is a lens against the inner table between two sutures; a subdural one a crescent along it, or a layer
on the falx; a subarachnoid one fills sulci and cisterns; an intraventricular one lies in the ventricles, dependent
because the patient lies on the back; an intraparenchymal one is a blob in the tissue with a rim of oedema.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from pipeline.phantom.anatomy import (
    VAULT_CENTRE_Y_MM,
    VAULT_CENTRE_Z_MM,
    Field,
    Head,
    Landmarks,
    ellipsoid,
    step,
    wave_noise,
)
from pipeline.phantom.tissue import paint

VISIBLE_MM2 = 80.0
"""Least area of blood in a slice for its label: a smaller patch is one that readers miss or disagree about."""

OEDEMA_HU = 20.0

SITES_MM = {
    # |x|, y, z: where blood breaks into the tissue, the deep grey nuclei first
    "basal ganglia": (26.0, -4.0, 18.0),
    "thalamus": (13.0, 10.0, 20.0),
    "frontal": (28.0, -42.0, 34.0),
    "parietal": (32.0, 30.0, 52.0),
    "temporal": (46.0, 2.0, 2.0),
    "occipital": (24.0, 54.0, 34.0),
    "cerebellum": (24.0, 50.0, -16.0),
}


@dataclass(frozen=True)
class Bleed:
    """One bleed.

    Attributes:
        subtype: one of `pipeline.labels.SUBTYPES`.
        kind: its place or form within the subtype.
        side: +1 the patient's left, −1 the right.
        centre_mm: head coordinates (x, y, z); of a lens or crescent, where it is thickest.
        size_mm: what the subtype's function says.
        hu: density of the blood.
        shift_mm: how far it pushes the midline to the other side.
    """

    subtype: str
    kind: str
    side: int
    centre_mm: tuple[float, float, float]
    size_mm: tuple[float, float, float]
    hu: float
    shift_mm: float = 0.0


def draw_bleed(subtype: str, *, head: Head, rng: np.random.Generator) -> Bleed:
    """Draw a bleed of a subtype for a patient."""
    side = int(rng.choice((-1, 1)))
    return _DRAW[subtype](head, side, rng)


def followed_up(bleed: Bleed) -> Bleed:
    """The same bleed some days later: a little smaller and paler."""
    width, length, height = bleed.size_mm
    return replace(bleed, size_mm=(0.92 * width, 0.95 * length, 0.95 * height), hu=bleed.hu - 4.0)


def _draw_epidural(head: Head, side: int, rng: np.random.Generator) -> Bleed:
    thick_mm = rng.uniform(9, 19)
    azimuth, z = rng.uniform(-0.45, 0.60), rng.uniform(8, 48)
    centre = _on_table(head, side, azimuth, z)
    size = (thick_mm, rng.uniform(20, 30), rng.uniform(14, 24))
    hu = rng.uniform(61, 75)
    return Bleed("epidural", "convexity", side, centre, size, hu, shift_mm=max(0.0, thick_mm - 10) * 0.6)


def _draw_subdural(head: Head, side: int, rng: np.random.Generator) -> Bleed:
    kind = str(rng.choice(("convexity", "convexity", "convexity", "falx")))
    hu = rng.uniform(60, 74)
    if kind == "falx":
        size = (rng.uniform(4.0, 6.5), rng.uniform(24, 40), rng.uniform(14, 22))
        return Bleed("subdural", kind, side, (side * 3.0, rng.uniform(0, 40), rng.uniform(55, 64)), size, hu)
    thick_mm = rng.uniform(6, 11)
    azimuth, z = rng.uniform(-0.25, 0.35), rng.uniform(30, 55)
    size = (thick_mm, rng.uniform(0.8, 1.25), rng.uniform(15, 26))
    centre = _on_table(head, side, azimuth, z)
    return Bleed("subdural", kind, side, centre, size, hu, shift_mm=max(0.0, thick_mm - 6) * 0.9)


def _draw_subarachnoid(head: Head, side: int, rng: np.random.Generator) -> Bleed:
    kind = str(rng.choice(("basal", "sylvian", "convexity")))
    hu = rng.uniform(60, 71)
    if kind == "basal":
        return Bleed("subarachnoid", kind, side, (0.0, -2.0, 4.0), (40.0, 30.0, rng.uniform(11, 15)), hu)
    if kind == "sylvian":
        return Bleed("subarachnoid", kind, side, (side * 46.0, -8.0, 15.0), (21.0, 28.0, rng.uniform(10, 15)), hu)
    centre = _on_table(head, side, rng.uniform(-0.9, 0.9), rng.uniform(45, 62))
    return Bleed("subarachnoid", kind, side, centre, (28.0, rng.uniform(24, 33), rng.uniform(11, 16)), hu)


def _draw_intraventricular(head: Head, side: int, rng: np.random.Generator) -> Bleed:
    kind = str(rng.choice(("layer", "layer", "layer", "cast", "all")))
    level_y_mm = rng.uniform(32, 44)
    return Bleed("intraventricular", kind, side, (side * 15.0, level_y_mm, 25.0), (1.2, 1.2, 1.2), rng.uniform(60, 77))


def _draw_intraparenchymal(head: Head, side: int, rng: np.random.Generator) -> Bleed:
    kind = str(rng.choice(tuple(SITES_MM), p=(0.28, 0.12, 0.14, 0.14, 0.12, 0.10, 0.10)))
    x, y, z = (float(value + offset) for value, offset in zip(SITES_MM[kind], rng.normal(0, 3.0, 3), strict=True))
    radius = rng.uniform(8.5, 12.0) if kind in ("thalamus", "cerebellum") else rng.uniform(9.0, 18.0)
    size = (radius * rng.uniform(0.75, 1.0), radius * rng.uniform(0.9, 1.3), radius * rng.uniform(0.8, 1.1))
    hu, shift_mm = rng.uniform(60, 77), max(0.0, radius - 10) * 0.5
    return Bleed("intraparenchymal", kind, side, (side * x, y, z), size, hu, shift_mm=shift_mm)


_DRAW: dict[str, Callable[[Head, int, np.random.Generator], Bleed]] = {
    "epidural": _draw_epidural,
    "intraparenchymal": _draw_intraparenchymal,
    "intraventricular": _draw_intraventricular,
    "subarachnoid": _draw_subarachnoid,
    "subdural": _draw_subdural,
}


def _on_table(head: Head, side: int, azimuth: float, z_mm: float) -> tuple[float, float, float]:
    """The point of the inner table at an azimuth (rad from straight sideways, positive to the back) and a height."""
    above = max(z_mm - VAULT_CENTRE_Z_MM, 0.0) / (head.top_mm - VAULT_CENTRE_Z_MM)
    across, back = np.cos(azimuth), np.sin(azimuth)
    reach = np.sqrt(1.0 - above**2) / np.hypot(across / head.half_width_mm, back / head.half_length_mm)
    return side * float(across * reach), VAULT_CENTRE_Y_MM + float(back * reach), z_mm


def midline_shift(bleeds: tuple[Bleed, ...]) -> float:
    """Shift of the midline in mm towards +x: every bleed pushes away from itself."""
    return -sum(bleed.side * bleed.shift_mm for bleed in bleeds)


def paint_bleed(brain_hu: Field, bleed: Bleed, head: Head, marks: Landmarks) -> Field:
    """Lay a bleed over the brain, in place.

    Returns:
        The weight 0 to 1 of the blood where it can be told from bone, [row, column].
    """
    inside = marks.inside
    weight = _SHAPE[bleed.subtype](bleed, head, marks) * inside
    if not weight.any():
        return weight
    if bleed.subtype == "intraparenchymal":
        rim = step(4.0 + 0.25 * bleed.size_mm[0] - _blob(bleed, head, marks), 3.0) * inside
        paint(brain_hu, OEDEMA_HU, rim * step(marks.depth - 3.0, 2.0) * (brain_hu > OEDEMA_HU))
    paint(brain_hu, bleed.hu + 2.0 * marks.noise, weight)
    return weight * (inside > 0.9)  # beside bone, partial volume hides it


def visible_mm2(weight: Field, *, pitch_mm: float) -> float:
    """Area in mm² over which blood fills at least half of the slice's thickness."""
    return float(np.count_nonzero(weight >= 0.5)) * pitch_mm**2


def _epidural(bleed: Bleed, head: Head, marks: Landmarks) -> Field:
    """Size: thickness, then half length along the table and half height. A lens that ends at sutures."""
    thick_mm, length_mm, height_mm = bleed.size_mm
    cx, cy, cz = bleed.centre_mm
    along2 = ((marks.x - cx) ** 2 + (marks.y - cy) ** 2) / length_mm**2 + ((marks.z - cz) / height_mm) ** 2
    return step(thick_mm * (1.0 - along2) - marks.depth, 1.4)


def _subdural(bleed: Bleed, head: Head, marks: Landmarks) -> Field:
    """Size: thickness, half length (rad along the convexity; mm along the falx), half height. A crescent or layer."""
    thick_mm, length, height_mm = bleed.size_mm
    _, cy, cz = bleed.centre_mm
    taper = 1.0 - ((marks.z - cz) / height_mm) ** 4
    own_side = bleed.side * marks.midline
    if bleed.kind == "falx":
        beside_falx = own_side - 0.5 * head.falx_mm
        layer = thick_mm * np.minimum(taper, 1.0 - ((marks.y - cy) / length) ** 4) - beside_falx
        return step(layer, 1.4) * step(beside_falx, 1.4) * step(42.0 - marks.depth, 6.0)
    if not (taper > 0).any():
        return np.zeros_like(marks.x)
    azimuth = np.arctan2(marks.y - VAULT_CENTRE_Y_MM, bleed.side * marks.x)
    middle = np.arctan2(cy - VAULT_CENTRE_Y_MM, bleed.side * bleed.centre_mm[0])
    crescent = thick_mm * np.minimum(taper, 1.0 - (np.abs(azimuth - middle) / length) ** 3)
    return step(crescent - marks.depth, 1.4) * step(own_side - 2.0, 2.0)


def _subarachnoid(bleed: Bleed, head: Head, marks: Landmarks) -> Field:
    """Size: half axes of the region whose sulci, fissures and cisterns hold the blood."""
    region = step(-ellipsoid(marks.x, marks.y, marks.z, bleed.centre_mm, bleed.size_mm), 6.0)
    if not (region > 0).any():
        return region
    swollen_mm = 1.4 - 0.4 * head.atrophy
    spaces = np.minimum(marks.sylvian, marks.cistern) - 0.6 - 0.5 * swollen_mm
    sulci = np.maximum(marks.sulcus - 1.1 - 0.4 * head.atrophy, marks.depth - 20.0)
    if bleed.kind == "basal":
        sulci = np.maximum(sulci, 99.0)
    return step(-np.minimum(spaces, sulci), 1.3) * region * step(marks.above_tentorium + 40.0, 2.0)


def _intraventricular(bleed: Bleed, head: Head, marks: Landmarks) -> Field:
    """Size is not used: the ventricles give the form; a layer fills what lies behind the level `centre_mm[1]`."""
    if bleed.kind == "all":
        return step(1.2 - np.minimum(marks.middle_ventricles, marks.lateral_ventricle + 2.5 * (marks.y < 30.0)), 1.4)
    own = step(1.2 - marks.lateral_ventricle, 1.4)
    if bleed.kind == "cast":
        return own * step(bleed.side * marks.x, 2.0) * step(marks.z - 6.0, 3.0)
    return own * step(marks.y - bleed.centre_mm[1], 1.5) * step(marks.z - 8.0, 3.0)


def _blob(bleed: Bleed, head: Head, marks: Landmarks) -> Field:
    ragged = wave_noise(marks.x, marks.y, marks.z, head.waves[:5], 17.0)
    return ellipsoid(marks.x, marks.y, marks.z, bleed.centre_mm, bleed.size_mm) + 0.11 * bleed.size_mm[0] * ragged


def _intraparenchymal(bleed: Bleed, head: Head, marks: Landmarks) -> Field:
    """Size: half axes of the blob, whose border is ragged."""
    return step(-_blob(bleed, head, marks), 1.6) * step(marks.depth - 4.0, 2.0)


_SHAPE: dict[str, Callable[[Bleed, Head, Landmarks], Field]] = {
    "epidural": _epidural,
    "intraparenchymal": _intraparenchymal,
    "intraventricular": _intraventricular,
    "subarachnoid": _subarachnoid,
    "subdural": _subdural,
}
