"""Lay the tissues of a head over a slice, in HU: scalp and skull, brain, membranes and calcifications, the base.

Each function paints in place, over what those before it have left: `paint_shell`, `paint_brain`, then the bleeds, then
`paint_base` and `paint_hardening`.
"""

from __future__ import annotations

import numpy as np

from pipeline.phantom.anatomy import Field, Head, Landmarks, ellipsoid, step, wave_noise

AIR_HU, FAT_HU, MUSCLE_HU, TABLE_HU, DIPLOE_HU = -1000.0, -90.0, 55.0, 1250.0, 620.0
BASE_TOP_MM = 32.0
"""Nothing of the skull's base or the face reaches higher."""

DEEP_NUCLEI = (
    # centre (|x|, y, z) and half axes in mm: lentiform, thalamus, head of the caudate
    ((24.0, -6.0, 17.0), (7.0, 15.0, 11.0)),
    ((10.5, 9.0, 19.0), (8.0, 13.0, 10.0)),
    ((13.0, -24.0, 26.0), (5.0, 9.0, 10.0)),
)


def paint(pixels_hu: Field, value_hu: float | Field, weight: Field) -> None:
    """Lay a tissue of `value_hu` over `pixels_hu`, in place."""
    pixels_hu += weight * (value_hu - pixels_hu)


def paint_brain(pixels_hu: Field, head: Head, marks: Landmarks) -> None:
    """Lay brain, water, membranes, vessels and calcifications inside the skull, in place."""
    pitch, side = marks.pitch_mm, np.abs(marks.x)
    brain = np.full_like(pixels_hu, head.white_hu)
    upper = step(marks.above_tentorium, 3.0)
    stem = step(-ellipsoid(marks.x, marks.y, marks.z, (0.0, 15.0, -5.0), (15.0, 13.0, 60.0)), 2.0)
    fissure = np.abs(marks.midline) + np.maximum(marks.depth - _falx_depth(marks) - 4.0, 0.0)
    cortex = np.minimum(np.minimum(marks.sulcus, marks.depth - 1.0), np.minimum(fissure, marks.sylvian + 1.5))
    paint(brain, head.grey_hu, step(3.4 - cortex, 1.6))
    for centre, radii in DEEP_NUCLEI:
        paint(brain, head.grey_hu - 1.0, step(-ellipsoid(side, marks.y, marks.z, centre, radii), 2.0))
    folia = 2.0 * np.sin((np.hypot(side - 8.0, marks.y - 22.0) + 1.5 * marks.noise) * 1.45)
    paint(brain, head.grey_hu - 2.5 + folia * step(marks.depth, 4.0), 1.0 - upper)
    paint(brain, head.white_hu + 1.5, stem * step(8.0 - marks.z, 3.0))
    _paint_water(brain, head, marks, upper, fissure)
    # beam hardening, over-corrected: brain under the skull looks denser than it is, as a thin bleed would
    brain += head.cupping_hu * np.exp(-np.maximum(marks.depth, 0.0) / head.cupping_mm)
    _paint_membranes(brain, head, marks, pitch)
    _paint_calcifications(brain, head, marks)
    paint(pixels_hu, brain, marks.inside)


def _falx_depth(marks: Landmarks) -> Field:
    """How far the falx hangs down from the vault: 15 mm in front, 40 mm at the back."""
    return np.clip(27.0 + 0.28 * marks.y, 12.0, 42.0)


def _paint_water(brain: Field, head: Head, marks: Landmarks, upper: Field, fissure: Field) -> None:
    pitch = marks.pitch_mm
    gap_mm = head.atrophy * 1.25 * np.clip(1.25 - marks.depth / 24.0, 0.0, 1.0)
    sulci = step(gap_mm - marks.sulcus, pitch) * upper * np.minimum(1.0, 0.45 + 0.5 * head.atrophy)
    rim = step(0.4 + 1.2 * head.atrophy - marks.depth, 1.5)
    between = step(0.6 + head.atrophy - fissure, pitch) * upper * 0.8
    gaps = step(-np.minimum(marks.sylvian, marks.cistern), 1.3)
    ventricles = step(-np.minimum(marks.lateral_ventricle, marks.middle_ventricles), 1.3)
    for weight in (sulci, rim, between, gaps, ventricles):
        paint(brain, head.csf_hu, weight)


def _paint_membranes(brain: Field, head: Head, marks: Landmarks, pitch: float) -> None:
    """Falx, tentorium and the blood in the venous sinuses: thin and dense, and never a bleed."""
    hanging = step(_falx_depth(marks) - marks.depth, 3.0) * step(marks.above_tentorium, 2.0)
    paint(brain, head.falx_hu, np.minimum(step(0.5 * head.falx_mm - np.abs(marks.midline), pitch), hanging))
    notch = np.hypot(marks.x, marks.y - 12.0) - 21.0
    leaf = step(0.42 * head.falx_mm + 0.3 - 0.8 * np.abs(marks.above_tentorium), pitch + 0.5) * step(notch, 2.0)
    paint(brain, head.falx_hu, leaf * step(marks.y - 6.0, 3.0))
    sagittal = np.hypot(marks.midline / 1.2, marks.depth - 2.0) - head.sinus_mm
    transverse = np.hypot(marks.above_tentorium, marks.depth - 2.5) - head.sinus_mm
    paint(brain, head.pool_hu, step(-sagittal, 1.5) * step(marks.z + 0.7 * marks.y - 30.0, 8.0))
    paint(brain, head.pool_hu, step(-transverse, 1.5) * step(marks.y - 20.0, 6.0))
    straight = np.hypot(marks.midline, marks.above_tentorium - 1.0) - 0.7 * head.sinus_mm
    paint(brain, head.pool_hu, step(-straight, 1.5) * step(marks.y - 34.0, 4.0))
    if head.vessel_mm:  # dense middle cerebral arteries, as after contrast: thin, broken, on both sides alike
        artery = np.abs(marks.sylvian + 0.5 + 1.3 * head.atrophy) - head.vessel_mm
        paint(brain, head.pool_hu, step(-artery, pitch) * step(marks.noise + 0.8, 0.5))
    circle = np.abs(np.hypot(marks.x / 1.2, marks.y + 6.0) - 9.0) + np.abs(marks.z - 2.0) - 1.6
    paint(brain, head.pool_hu - 6.0, step(-circle, 1.5))


def _paint_calcifications(brain: Field, head: Head, marks: Landmarks) -> None:
    x, y, z = marks.x, marks.y, marks.z
    for sign, radius_mm in zip((-1.0, 1.0), head.choroid_mm, strict=True):
        if radius_mm:
            plexus = ellipsoid(sign * x, y, z, (22.0, 33.0, 26.0), (0.7 * radius_mm, 1.5 * radius_mm, 1.6 * radius_mm))
            paint(brain, head.choroid_hu, step(-plexus + 0.6 * marks.noise, 2.0))
    if head.pineal_mm:
        paint(brain, head.pineal_hu, step(-ellipsoid(x, y, z, (0.0, 22.0, 16.0), (head.pineal_mm,) * 3), 2.0))
    if head.ganglia_mm:
        radius_mm = head.ganglia_mm
        spots = ellipsoid(np.abs(x), y, z, (20.0, -5.0, 15.0), (radius_mm, 1.7 * radius_mm, radius_mm))
        paint(brain, head.ganglia_hu, step(-spots + 0.9 * marks.noise, 2.0))
    if head.falx_plaques:
        patches = np.clip(np.sin(y / 9.0 + z / 14.0 + head.waves[1, 3]) - 0.5, 0, 1)
        plaque = step(head.falx_plaques * patches - np.abs(marks.midline), 1.5) * step(z - 35.0, 5.0)
        paint(brain, 170.0, plaque * step(_falx_depth(marks) - 6.0 - marks.depth, 4.0))


def paint_shell(pixels_hu: Field, head: Head, marks: Landmarks) -> None:
    """Lay scalp, muscle, skull, and the base with its orbits and air spaces over the picture, in place."""
    depth, outer, z = marks.depth, marks.outer_depth, marks.z
    skull_mm = head.skull_mm * (1.0 + 0.15 * np.sin(marks.y / 31.0 + head.waves[2, 3]) + 0.02 * marks.noise)
    skin_mm = head.skull_mm + head.scalp_mm + 2.0 * step(12.0 - z, 20.0)
    paint(pixels_hu, 25.0, step(outer + skin_mm, marks.obliquity_mm))
    tissue = FAT_HU + (MUSCLE_HU - FAT_HU) * step(_lumps(marks) + 0.55, 0.5) * step(22.0 - z, 14.0)
    paint(pixels_hu, tissue, step(outer + skin_mm - 2.0, marks.obliquity_mm))
    within = step(depth + skull_mm, marks.obliquity_mm) * step(marks.y + 42.0 + 1.5 * np.maximum(z, -20.0), 8.0)
    layer = np.abs(-depth / skull_mm - 0.5)
    paint(pixels_hu, DIPLOE_HU + (TABLE_HU - DIPLOE_HU) * step(layer - 0.27, 0.3), within)
    floor = step(marks.above_floor + 5.0, 2.0) * step(depth + 2.0, 2.0)
    paint(pixels_hu, 900.0, floor)


def _lumps(marks: Landmarks) -> Field:
    """Slow noise that parts muscle from fat."""
    fine = np.sin(0.21 * marks.y - 0.17 * np.abs(marks.x))
    return np.sin(0.11 * marks.x) * np.sin(0.10 * marks.y + 0.03 * marks.z) + 0.35 * fine


def paint_base(pixels_hu: Field, head: Head, marks: Landmarks) -> None:
    """Lay the bones and air spaces of the base and face, in place; nothing of them lies above `BASE_TOP_MM`."""
    x, y, z, side = marks.x, marks.y, marks.z, np.abs(marks.x)

    def lay(value_hu: float, centre_mm: tuple[float, ...], radii_mm: tuple[float, ...], grow_mm: float = 0.0) -> None:
        paint(pixels_hu, value_hu, step(grow_mm - ellipsoid(side, y, z, centre_mm, radii_mm), 1.6))

    ridge = np.abs(y - 5.0 - 0.40 * side) - np.clip((3.0 - z) * 0.42, 0.0, 9.0)
    ridge = np.maximum(np.maximum(ridge, np.abs(side - 36.0) - 27.0), -26.0 - z)
    paint(pixels_hu, 1150.0, step(-ridge, 2.0) * step(3.0 - z, 3.0))
    lay(800.0, (0.0, -6.0, -20.0), (13.0, 7.0, 17.0))
    lay(700.0, (55.0, 28.0, -18.0), (11.0, 15.0, 15.0))
    cells = wave_noise(x, y, z, head.waves, 6.0)
    mastoid = step(-ellipsoid(side, y, z, (55.0, 28.0, -18.0), (9.0, 12.0, 13.0)), 2.0) * step(cells - 0.1, 0.5)
    paint(pixels_hu, -850.0, mastoid)
    lay(-950.0, (64.0, 8.0, -17.0), (13.0, 3.2, 3.2))
    lay(950.0, (0.0, -84.0 + 0.1 * head.half_length_mm, 16.0), (17.0, 7.0, 11.0))
    lay(-950.0, (0.0, -85.0 + 0.1 * head.half_length_mm, 16.0), (13.0, 4.0, 8.0))
    lay(900.0, (33.0, -60.0, -13.0), (17.0, 24.0, 16.0), 3.2)
    lay(FAT_HU, (33.0, -60.0, -13.0), (17.0, 24.0, 16.0))
    nerve = step(2.2 - np.hypot(side - 33.0 + 0.6 * (y + 63.0), z + 13.0), 1.5)
    paint(pixels_hu, 40.0, nerve * step(-38.0 - y, 2.0) * step(y + 66.0, 2.0))
    lay(48.0, (33.0, -73.0, -13.0), (12.5, 12.5, 12.5))
    lay(12.0, (33.0, -73.0, -13.0), (11.0, 11.0, 11.0))
    lay(85.0, (33.0, -81.0, -13.0), (4.0, 2.2, 4.0))
    nose = np.maximum(np.maximum(side - 11.0, np.abs(y + 55.0) - 22.0), np.abs(z + 25.0) - 26.0)
    paint(pixels_hu, 750.0, step(2.5 - nose, 2.0))
    paint(pixels_hu, -900.0, step(-nose, 2.0) * step(np.abs(cells) - 0.25, 0.4))
    lay(850.0, (0.0, -24.0, -14.0), (14.0, 10.0, 9.0), 2.5)
    lay(-970.0, (0.0, -24.0, -14.0), (14.0, 10.0, 9.0))
    lay(800.0, (27.0, -56.0, -44.0), (13.0, 16.0, 13.0), 2.2)
    lay(-980.0, (27.0, -56.0, -44.0), (13.0, 16.0, 13.0))


def paint_hardening(pixels_hu: Field, head: Head, marks: Landmarks) -> None:
    """Lay the dark and bright bands between the petrous bones (beam hardening), in place."""
    height = np.exp(-(((marks.z + 8.0) / 12.0) ** 2)) * marks.inside
    bands = np.sin(marks.y / 3.1 + 0.05 * marks.x * np.sin(head.waves[3, 3]) + head.waves[4, 3]) - 0.35
    pixels_hu += head.hardening_hu * height * bands * np.exp(-(((marks.y - 16.0) / 20.0) ** 2))
