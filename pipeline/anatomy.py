"""A head as formulas: one patient's anatomy, evaluated on any plane through it.

Head coordinates are in mm, along DICOM's patient axes: x to the patient's left, y to the back, z to the top; the origin lies
at the sella. Tissue borders are signed distances with a soft step as wide as a pixel or as the slice is oblique to them, so
that partial volume comes for free. Everything is float32 on a coarse grid: a 512 × 512 slice is evaluated at 256 × 256.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Field = np.ndarray
"""Float32 [row, column]: a distance in mm, a weight from 0 to 1, or HU."""

AIR_HU, FAT_HU, MUSCLE_HU, TABLE_HU, DIPLOE_HU = -1000.0, -90.0, 55.0, 1250.0, 620.0
VAULT_CENTRE_Y_MM, VAULT_CENTRE_Z_MM = 2.0, 16.0
FOSSA_DEPTH_MM = 66.0
BASE_TOP_MM = 32.0
"""Nothing of the skull's base or the face reaches higher."""
GYRUS_MM = 23.0
"""Wavelength of the random waves whose zero set is the sulci: two sulci lie about half of it apart."""

LATERAL_VENTRICLE = (
    # start and end (|x|, y, z) in mm, and the radius at both ends
    ((6.0, -36.0, 21.0), (8.0, -12.0, 32.0), 4.2, 4.6),
    ((8.0, -12.0, 32.0), (14.0, 18.0, 38.0), 4.4, 5.0),
    ((14.0, 18.0, 38.0), (24.0, 36.0, 24.0), 5.2, 7.0),
    ((24.0, 36.0, 24.0), (22.0, 56.0, 22.0), 6.2, 3.6),
    ((25.0, 34.0, 18.0), (30.0, 4.0, -2.0), 3.6, 1.8),
)


@dataclass(frozen=True)
class Head:
    """One patient's anatomy: lengths in mm, densities in HU."""

    half_width_mm: float
    half_length_mm: float
    top_mm: float
    egg: float
    skew: float
    skull_mm: float
    scalp_mm: float
    atrophy: float
    ventricles: float
    ventricle_asymmetry: float
    white_hu: float
    grey_hu: float
    csf_hu: float
    pool_hu: float
    falx_hu: float
    falx_mm: float
    falx_plaques: float
    choroid_hu: float
    choroid_mm: tuple[float, float]
    pineal_hu: float
    pineal_mm: float
    ganglia_hu: float
    ganglia_mm: float
    hardening_hu: float
    waves: np.ndarray
    """[wave, 4]: direction (x, y, z), phase in rad."""


def draw_head(rng: np.random.Generator) -> Head:
    """Draw a patient: size, shape, densities, and the calcifications and dense vessels that pass for blood."""
    directions = rng.normal(size=(9, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    waves = np.concatenate([directions, rng.uniform(0, 2 * np.pi, (9, 1))], axis=1).astype(np.float32)
    age = rng.beta(2.0, 2.0)
    return Head(
        half_width_mm=rng.uniform(61, 68),
        half_length_mm=rng.uniform(76, 84),
        top_mm=rng.uniform(86, 95),
        egg=rng.uniform(0.04, 0.10),
        skew=rng.uniform(-0.04, 0.04),
        skull_mm=rng.uniform(5.5, 8.5),
        scalp_mm=rng.uniform(4.0, 8.0),
        atrophy=0.45 + 0.8 * age,
        ventricles=0.75 + 0.6 * age,
        ventricle_asymmetry=rng.uniform(-0.12, 0.12),
        white_hu=rng.uniform(27.5, 30.0),
        grey_hu=rng.uniform(37.0, 40.0),
        csf_hu=rng.uniform(4.0, 9.0),
        pool_hu=rng.uniform(55, 73),
        falx_hu=rng.uniform(52, 75),
        falx_mm=rng.uniform(1.2, 3.2),
        falx_plaques=float(rng.uniform() < 0.4) * rng.uniform(2.0, 4.5),
        choroid_hu=rng.uniform(75, 210),
        choroid_mm=(float(rng.uniform() < 0.8) * rng.uniform(2.5, 6.5), float(rng.uniform() < 0.8) * rng.uniform(2.5, 6.5)),
        pineal_hu=rng.uniform(80, 260),
        pineal_mm=float(rng.uniform() < 0.75) * rng.uniform(2.0, 4.5),
        ganglia_hu=rng.uniform(55, 120),
        ganglia_mm=float(rng.uniform() < 0.45) * rng.uniform(2.5, 5.0),
        hardening_hu=rng.uniform(4, 16),
        waves=waves,
    )


@dataclass
class Landmarks:
    """Distances in mm on one slice, each [row, column]; the bleeds are drawn from them.

    `depth` and `above_floor` are positive inside the skull; the others are negative inside their structure.
    """

    x: Field
    y: Field
    z: Field
    pitch_mm: float
    obliquity_mm: Field
    depth: Field
    outer_depth: Field
    above_floor: Field
    above_tentorium: Field
    midline: Field
    noise: Field
    sulcus: Field
    sylvian: Field
    cistern: Field
    lateral_ventricle: Field
    middle_ventricles: Field

    @property
    def inside(self) -> Field:
        """Weight of the intracranial space."""
        return step(self.depth, self.obliquity_mm) * step(self.above_floor, 2.0)


def step(distance_mm: Field, width_mm: float | Field) -> Field:
    """Weight 0 to 1 of what lies at a positive distance; the border is `width_mm` wide."""
    return np.clip(distance_mm / width_mm + 0.5, 0.0, 1.0)


def paint(pixels_hu: Field, value_hu: float | Field, weight: Field) -> None:
    """Lay a tissue of `value_hu` over `pixels_hu`, in place."""
    pixels_hu += weight * (value_hu - pixels_hu)


def ellipsoid(x: Field, y: Field, z: Field, centre_mm: tuple[float, ...], radii_mm: tuple[float, ...]) -> Field:
    """Approximate signed distance in mm to an ellipsoid, negative inside."""
    (cx, cy, cz), (rx, ry, rz) = centre_mm, radii_mm
    rho = np.sqrt(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 + ((z - cz) / rz) ** 2)
    return (rho - 1.0) * min(rx, ry, rz)


def wave_noise(x: Field, y: Field, z: Field, waves: np.ndarray, wavelength_mm: float) -> Field:
    """Smooth noise of unit variance and one wavelength, as a sum of plane waves: its zero set winds like sulci."""
    total = np.zeros_like(x)
    for wx, wy, wz, phase in waves * np.float32([1, 1, 1, wavelength_mm / (2 * np.pi)]) * (2 * np.pi / wavelength_mm):
        total += np.sin(wx * x + wy * y + wz * z + phase)
    return total * np.float32(np.sqrt(2.0 / len(waves)))


def locate(head: Head, x: Field, y: Field, z: Field, *, pitch_mm: float, thickness_mm: float, shift_mm: float) -> Landmarks:
    """Measure every distance that tissues and bleeds are drawn from.

    Args:
        head: the patient.
        x, y, z: head coordinates in mm, float32 [row, column].
        pitch_mm: distance between two grid points.
        thickness_mm: of the slice.
        shift_mm: how far the midline is pushed towards +x by a bleed.
    """
    depth, outer_depth, obliquity = _vault(head, x, y, z)
    bent = x - shift_mm * np.exp(-(((y + 5) / 55) ** 2) - ((z - 28) / 32) ** 2) if shift_mm else x
    noise, sulcus = _sulci(head, bent, y, z, depth)
    side = np.abs(bent)
    lateral_x = side * (1.0 + head.ventricle_asymmetry * np.sign(bent))
    middle = np.minimum(
        ellipsoid(bent, y, z, (0.0, -1.0, 14.0), (1.6 + 1.6 * head.ventricles, 12.0, 9.0)),
        ellipsoid(bent, y, z, (0.0, 40.0, -14.0), (5.0 + 3.0 * head.ventricles, 5.5, 11.0)),
    )
    # in front of the tentorium there is no below: the height counts as above
    tentorium = z - (27.0 - 0.33 * side - 0.16 * (y - 40.0)) + 1.5 * np.maximum(10.0 + 0.15 * side - y, 0.0)
    return Landmarks(
        x=bent, y=y, z=z, pitch_mm=pitch_mm, obliquity_mm=pitch_mm + thickness_mm * obliquity,
        depth=depth, outer_depth=outer_depth, above_floor=z - _floor(side, y), above_tentorium=tentorium,
        midline=bent - 0.8 * np.sin(y / 23.0 + head.waves[0, 3]), noise=noise, sulcus=sulcus,
        sylvian=_sylvian(head, side, y, z, noise), cistern=_cisterns(head, bent, y, z, noise),
        lateral_ventricle=_lateral(head, lateral_x, y, z), middle_ventricles=middle,
    )  # fmt: skip


def _vault(head: Head, x: Field, y: Field, z: Field) -> tuple[Field, Field, Field]:
    """Depth below the inner table, the same for the head's outline (a cylinder at the base), and the slope of the table."""
    back, up = y - VAULT_CENTRE_Y_MM, z - VAULT_CENTRE_Z_MM
    v = back / head.half_length_mm
    u = (x + head.skew * back) / (head.half_width_mm * (1.0 + head.egg * v - 0.05 * v * v))
    above, below = np.maximum(up, 0.0) / (head.top_mm - VAULT_CENTRE_Z_MM), np.minimum(up, 0.0) / FOSSA_DEPTH_MM
    flat = u * u + v * v - 0.30 * (u * v) ** 2
    w = above * above + below**4
    rho = np.sqrt(flat + w) + 1e-4
    radius = np.sqrt(x * x + back * back + up * up)
    outer_rho = np.sqrt(flat + above * above + 0.1 * below**4) + 1e-4
    outer_radius = np.sqrt(x * x + back * back + np.maximum(up, 0.0) ** 2)
    slope = np.sqrt(w / (flat * 1.4 + w + 1e-3))
    return radius * (1.0 / rho - 1.0), outer_radius * (1.0 / outer_rho - 1.0), slope


def _floor(side: Field, y: Field) -> Field:
    """Height in mm of the skull's floor: three steps, the front fossa highest, the back one lowest."""
    front = step(-31.0 - y + 0.10 * side, 7.0)
    back = step(y - 4.0 - 0.38 * side, 6.0)
    middle_mm = -4.0 - 18.0 * step(side - 16.0, 12.0)
    return front * (6.0 + 0.002 * side * side) + back * -50.0 + np.maximum(1.0 - front - back, 0.0) * middle_mm


def _sulci(head: Head, x: Field, y: Field, z: Field, depth: Field) -> tuple[Field, Field]:
    """Noise, and the distance to the nearest sulcus: sheets that run inward from the surface and fade 20 mm deep."""
    back, up = y - VAULT_CENTRE_Y_MM, z - VAULT_CENTRE_Z_MM
    radial = (70.0 / np.sqrt(x * x + back * back + up * up + 100.0)) ** 0.75
    # each hemisphere has sulci of its own: no sulcus crosses the midline
    noise = wave_noise((x + 17.0 * np.sign(x)) * radial, back * radial, up * radial, head.waves, GYRUS_MM)
    return noise, np.abs(noise) * (GYRUS_MM / 6.3) / np.maximum(radial, 0.5) + np.maximum(depth - 15.0, 0.0) * 0.45


def _sylvian(head: Head, side: Field, y: Field, z: Field, noise: Field) -> Field:
    """Signed distance to the Sylvian fissure: a gap from the surface to the insula, and the cistern along the insula."""
    wave = 1.2 * noise
    centre_y = -14.0 + 0.45 * (z - 8.0)
    opening = np.maximum(np.abs(y - centre_y - 0.25 * (side - 40.0) + wave), 37.0 - side)
    insula = np.maximum(np.abs(side - 38.0 + 0.010 * (y - centre_y) ** 2 + 0.7 * wave), np.abs(y - centre_y - 3.0) - 14.0)
    outside = np.maximum(np.abs(z - 15.0) - 15.0, 0.0)
    return np.minimum(opening, insula) + 0.35 * outside - (0.5 + 1.3 * head.atrophy)


def _cisterns(head: Head, x: Field, y: Field, z: Field, noise: Field) -> Field:
    """Signed distance to the basal cisterns: the suprasellar star, the ring round the midbrain, the water before the pons."""
    side = np.abs(x)
    star = np.maximum(np.abs(z - 0.0) - 6.0, np.minimum(
        np.abs(y + 10.0 + 0.45 * side) - 2.6, np.abs(y + 7.0 - 0.55 * side) - 2.6)) + np.maximum(side - 17.0, 0.0)
    core = np.maximum(np.abs(z - 0.0) - 6.0, np.hypot(x, y + 8.0) - 7.5)
    ring = np.abs(np.hypot(x / 1.12, y - 12.0) - 15.5 + 1.5 * noise) + 0.5 * np.maximum(np.abs(z - 4.0) - 8.0, 0.0)
    ring += 0.5 * np.maximum(10.0 - y, 0.0) - 1.0 - head.atrophy
    quadrigeminal = np.maximum(np.hypot(x / 1.8, y - 30.0) - 4.5, np.abs(z - 10.0) - 6.0)
    prepontine = np.maximum(np.abs(y - 1.0 + 0.008 * x * x) - 2.2, np.maximum(np.abs(z + 16.0) - 9.0, side - 17.0))
    together = np.minimum(np.minimum(np.minimum(star, core), np.minimum(ring, prepontine)), quadrigeminal)
    return together + 0.5 * noise - 0.8 * (head.atrophy - 0.8)


def _lateral(head: Head, side: Field, y: Field, z: Field) -> Field:
    """Signed distance to the lateral ventricles, a chain of capsules on each side, higher than they are wide in front."""
    nearest = np.full_like(side, 99.0)
    for start, end, start_radius, end_radius in LATERAL_VENTRICLE:
        (ax, ay, az), (bx, by, bz) = start, end
        dx, dy, dz = bx - ax, by - ay, bz - az
        along = np.clip(((side - ax) * dx + (y - ay) * dy + (z - az) * dz) / (dx * dx + dy * dy + dz * dz), 0.0, 1.0)
        apart = np.sqrt((side - ax - along * dx) ** 2 + (y - ay - along * dy) ** 2 + 0.6 * (z - az - along * dz) ** 2)
        nearest = np.minimum(nearest, apart - head.ventricles * (start_radius + along * (end_radius - start_radius)))
    return np.maximum(nearest, 0.9 - side)


def paint_brain(pixels_hu: Field, head: Head, marks: Landmarks) -> None:
    """Lay brain, water, membranes, vessels and calcifications inside the skull, in place."""
    pitch, side = marks.pitch_mm, np.abs(marks.x)
    brain = np.full_like(pixels_hu, head.white_hu)
    upper = step(marks.above_tentorium, 3.0)
    stem = step(-ellipsoid(marks.x, marks.y, marks.z, (0.0, 15.0, -5.0), (15.0, 13.0, 60.0)), 2.0)
    fissure = np.abs(marks.midline) + np.maximum(marks.depth - _falx_depth(marks) - 4.0, 0.0)
    cortex = np.minimum(np.minimum(marks.sulcus, marks.depth - 1.0), np.minimum(fissure, marks.sylvian + 1.5))
    paint(brain, head.grey_hu, step(3.4 - cortex, 1.6))
    for centre, radii in (
        ((24.0, -6.0, 17.0), (7.0, 15.0, 11.0)), ((10.5, 9.0, 19.0), (8.0, 13.0, 10.0)), ((13.0, -24.0, 26.0), (5.0, 9.0, 10.0)),
    ):  # fmt: skip
        paint(brain, head.grey_hu - 1.0, step(-ellipsoid(side, marks.y, marks.z, centre, radii), 2.0))
    folia = 2.0 * np.sin((np.hypot(side - 8.0, marks.y - 22.0) + 1.5 * marks.noise) * 1.45)
    paint(brain, head.grey_hu - 2.5 + folia * step(marks.depth, 4.0), 1.0 - upper)
    paint(brain, head.white_hu + 1.5, stem * step(8.0 - marks.z, 3.0))
    _paint_water(brain, head, marks, upper, fissure)
    brain += 5.0 * np.exp(-np.maximum(marks.depth, 0.0) / 5.0)  # cupping: the skull's shadow is over-corrected
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
    leaf = step(0.35 * head.falx_mm + 0.2 - 0.8 * np.abs(marks.above_tentorium), pitch + 0.5) * step(notch, 2.0)
    paint(brain, head.falx_hu - 6.0, leaf * step(marks.y - 6.0, 3.0))
    sagittal = np.hypot(marks.midline / 1.2, marks.depth - 2.0) - 3.6
    transverse = np.hypot(marks.above_tentorium, marks.depth - 2.5) - 3.6
    paint(brain, head.pool_hu, step(-sagittal, 1.5) * step(marks.z + 0.7 * marks.y - 30.0, 8.0))
    paint(brain, head.pool_hu, step(-transverse, 1.5) * step(marks.y - 20.0, 6.0))
    straight = np.hypot(marks.midline, marks.above_tentorium - 1.0) - 2.4
    paint(brain, head.pool_hu, step(-straight, 1.5) * step(marks.y - 34.0, 4.0))
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
        spots = ellipsoid(np.abs(x), y, z, (20.0, -5.0, 15.0), (head.ganglia_mm, 1.7 * head.ganglia_mm, head.ganglia_mm))
        paint(brain, head.ganglia_hu, step(-spots + 0.9 * marks.noise, 2.0))
    if head.falx_plaques:
        plaque = np.abs(marks.midline) - head.falx_plaques * np.clip(np.sin(y / 9.0 + z / 14.0 + head.waves[1, 3]) - 0.5, 0, 1)
        paint(brain, 170.0, step(-plaque, 1.5) * step(_falx_depth(marks) - 6.0 - marks.depth, 4.0) * step(z - 35.0, 5.0))


def paint_shell(pixels_hu: Field, head: Head, marks: Landmarks) -> None:
    """Lay scalp, muscle, skull, and the base with its orbits and air spaces over the picture, in place."""
    depth, outer, z = marks.depth, marks.outer_depth, marks.z
    skull_mm = head.skull_mm * (1.0 + 0.15 * np.sin(marks.y / 31.0 + head.waves[2, 3]) + 0.02 * marks.noise)
    skin_mm = head.skull_mm + head.scalp_mm + 2.0 * step(12.0 - z, 20.0)
    paint(pixels_hu, 25.0, step(outer + skin_mm, marks.obliquity_mm))
    tissue = FAT_HU + (MUSCLE_HU - FAT_HU) * step(_lumps(marks) + 0.2, 0.5) * step(22.0 - z, 14.0)
    paint(pixels_hu, tissue, step(outer + skin_mm - 2.0, marks.obliquity_mm))
    within = step(depth + skull_mm, marks.obliquity_mm) * step(marks.y + 42.0 + 1.5 * np.maximum(z, -20.0), 8.0)
    layer = np.abs(-depth / skull_mm - 0.5)
    paint(pixels_hu, DIPLOE_HU + (TABLE_HU - DIPLOE_HU) * step(layer - 0.27, 0.3), within)
    floor = step(marks.above_floor + 5.0, 2.0) * step(depth + 2.0, 2.0)
    paint(pixels_hu, 900.0, floor)


def _lumps(marks: Landmarks) -> Field:
    """Slow noise that parts muscle from fat."""
    return np.sin(0.11 * marks.x) * np.sin(0.10 * marks.y + 0.03 * marks.z) + 0.35 * np.sin(0.21 * marks.y - 0.17 * np.abs(marks.x))


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
    paint(pixels_hu, 40.0, step(2.2 - np.hypot(side - 33.0 - 0.45 * (y + 63.0), z + 13.0), 1.5) * step(-38.0 - y, 2.0) *
          step(y + 66.0, 2.0))  # fmt: skip
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
    height = np.exp(-(((marks.z + 8.0) / 9.0) ** 2)) * marks.inside
    bands = np.sin(marks.y / 3.1 + 0.05 * marks.x * np.sin(head.waves[3, 3]) + head.waves[4, 3]) - 0.35
    pixels_hu += head.hardening_hu * height * bands * np.exp(-(((marks.y - 16.0) / 20.0) ** 2))
