"""A head as formulas: one patient's anatomy, evaluated on any plane through it.

Head coordinates are in mm, along DICOM's patient axes: x to the patient's left, y to the back, z to the top; the origin
lies at the sella. Tissue borders are signed distances with a soft step as wide as a pixel or as the slice is oblique to
them, so that partial volume comes for free. Everything is float32 on a coarse grid: a 512 × 512 slice is evaluated at
256 × 256.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Field = np.ndarray
"""Float32 [row, column]: a distance in mm, a weight from 0 to 1, or HU."""

VAULT_CENTRE_Y_MM, VAULT_CENTRE_Z_MM = 2.0, 16.0
FOSSA_DEPTH_MM = 66.0
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
    sinus_mm: float
    vessel_mm: float
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
    cupping_hu: float
    cupping_mm: float
    waves: np.ndarray
    """[wave, 4]: direction (x, y, z), phase in rad."""


def draw_head(rng: np.random.Generator) -> Head:
    """Draw a patient: size, shape, densities, and the calcifications and dense vessels that pass for blood."""
    directions = rng.normal(size=(9, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    waves = np.concatenate([directions, rng.uniform(0, 2 * np.pi, (9, 1))], axis=1).astype(np.float32)
    age = rng.beta(2.0, 2.0)
    scanner_hu = rng.uniform(-1.5, 2.0)  # no two scanners agree better than this
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
        white_hu=28.5 + scanner_hu,
        grey_hu=38.5 + scanner_hu,
        csf_hu=rng.uniform(4.0, 8.0) + scanner_hu,
        pool_hu=rng.uniform(53, 64),
        sinus_mm=rng.uniform(3.0, 9.0),
        vessel_mm=_sometimes(0.45, rng.uniform(1.2, 2.0), rng),
        falx_hu=rng.uniform(53, 64),
        falx_mm=rng.uniform(1.4, 6.8),
        falx_plaques=_sometimes(0.4, rng.uniform(2.0, 4.5), rng),
        choroid_hu=rng.uniform(65, 180),
        choroid_mm=(_sometimes(0.8, rng.uniform(2.5, 7.0), rng), _sometimes(0.8, rng.uniform(2.5, 6.5), rng)),
        pineal_hu=rng.uniform(80, 260),
        pineal_mm=_sometimes(0.75, rng.uniform(2.0, 4.5), rng),
        ganglia_hu=rng.uniform(58, 110),
        ganglia_mm=_sometimes(0.5, rng.uniform(2.5, 6.0), rng),
        hardening_hu=rng.uniform(5, 32),
        cupping_hu=2.0 + 22.0 * rng.beta(0.6, 0.6),
        cupping_mm=rng.uniform(4.0, 18.0),
        waves=waves,
    )


def _sometimes(chance: float, value: float, rng: np.random.Generator) -> float:
    """The value with this chance, else 0."""
    return value if rng.uniform() < chance else 0.0


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


def ellipsoid(x: Field, y: Field, z: Field, centre_mm: tuple[float, ...], radii_mm: tuple[float, ...]) -> Field:
    """Approximate signed distance in mm to an ellipsoid, negative inside."""
    (cx, cy, cz), (rx, ry, rz) = centre_mm, radii_mm
    rho = np.sqrt(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 + ((z - cz) / rz) ** 2)
    return (rho - 1.0) * min(rx, ry, rz)


def wave_noise(x: Field, y: Field, z: Field, waves: np.ndarray, wavelength_mm: float) -> Field:
    """Smooth noise of unit variance and one wavelength, as a sum of plane waves: its zero set winds like sulci."""
    total = np.zeros_like(x)
    per_mm = np.float32(2 * np.pi / wavelength_mm)
    for wx, wy, wz, phase in waves:
        total += np.sin((wx * per_mm) * x + (wy * per_mm) * y + (wz * per_mm) * z + phase)
    return total * np.float32(np.sqrt(2.0 / len(waves)))


def locate(
    head: Head, x: Field, y: Field, z: Field, *, pitch_mm: float, thickness_mm: float, shift_mm: float
) -> Landmarks:
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
        x=bent,
        y=y,
        z=z,
        pitch_mm=pitch_mm,
        obliquity_mm=pitch_mm + thickness_mm * obliquity,
        depth=depth,
        outer_depth=outer_depth,
        above_floor=z - _floor(side, y),
        above_tentorium=tentorium,
        midline=bent - 0.8 * np.sin(y / 23.0 + head.waves[0, 3]),
        noise=noise,
        sulcus=sulcus,
        sylvian=_sylvian(head, side, y, z, noise),
        cistern=_cisterns(head, bent, y, z, noise),
        lateral_ventricle=_lateral(head, lateral_x, y, z),
        middle_ventricles=middle,
    )


def _vault(head: Head, x: Field, y: Field, z: Field) -> tuple[Field, Field, Field]:
    """Depth below the inner table, the same for the head's outline (a cylinder at the base), and the table's slope."""
    back, up = y - VAULT_CENTRE_Y_MM, z - VAULT_CENTRE_Z_MM
    v = back / head.half_length_mm
    u = (x + head.skew * back) / (head.half_width_mm * (1.0 + head.egg * v - 0.05 * v * v))
    above, below = np.maximum(up, 0.0) / (head.top_mm - VAULT_CENTRE_Z_MM), np.minimum(up, 0.0) / FOSSA_DEPTH_MM
    flat = u * u + v * v - 0.30 * (u * v) ** 2
    below4 = (below * below) ** 2  # a fourth power by `**` takes 8 ms a slice, more than half of all the rest
    w = above * above + below4
    rho = np.sqrt(flat + w) + 1e-4
    radius = np.sqrt(x * x + back * back + up * up)
    outer_rho = np.sqrt(flat + above * above + 0.1 * below4) + 1e-4
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
    """Signed distance to the Sylvian fissure: a gap from the surface to the insula, and the space along the insula."""
    wave = 1.2 * noise
    centre_y = -14.0 + 0.45 * (z - 8.0)
    opening = np.maximum(np.abs(y - centre_y - 0.25 * (side - 40.0) + wave), 37.0 - side)
    along = y - centre_y
    insula = np.maximum(np.abs(side - 38.0 + 0.010 * along**2 + 0.7 * wave), np.abs(along - 3.0) - 14.0)
    outside = np.maximum(np.abs(z - 15.0) - 15.0, 0.0)
    return np.minimum(opening, insula) + 0.35 * outside - (0.5 + 1.3 * head.atrophy)


def _cisterns(head: Head, x: Field, y: Field, z: Field, noise: Field) -> Field:
    """Signed distance to the basal cisterns: suprasellar star, ring round the midbrain, water before the pons."""
    side = np.abs(x)
    arms = np.minimum(np.abs(y + 10.0 + 0.45 * side), np.abs(y + 7.0 - 0.55 * side)) - 2.6
    star = np.maximum(np.abs(z) - 6.0, arms) + np.maximum(side - 17.0, 0.0)
    core = np.maximum(np.abs(z) - 6.0, np.hypot(x, y + 8.0) - 7.5)
    ring = np.abs(np.hypot(x / 1.12, y - 12.0) - 15.5 + 1.5 * noise) + 0.5 * np.maximum(np.abs(z - 4.0) - 8.0, 0.0)
    ring += 0.5 * np.maximum(10.0 - y, 0.0) - 1.0 - head.atrophy
    quadrigeminal = np.maximum(np.hypot(x / 1.8, y - 30.0) - 4.5, np.abs(z - 10.0) - 6.0)
    prepontine = np.maximum(np.abs(y - 1.0 + 0.008 * x * x) - 2.2, np.maximum(np.abs(z + 16.0) - 9.0, side - 17.0))
    together = np.minimum(np.minimum(np.minimum(star, core), np.minimum(ring, prepontine)), quadrigeminal)
    return together + 0.5 * noise - 0.8 * (head.atrophy - 0.8)


def _lateral(head: Head, side: Field, y: Field, z: Field) -> Field:
    """Signed distance to the lateral ventricles, on each side a chain of capsules that are higher than wide."""
    nearest = np.full_like(side, 99.0)
    for start, end, start_radius, end_radius in LATERAL_VENTRICLE:
        (ax, ay, az), (bx, by, bz) = start, end
        dx, dy, dz = bx - ax, by - ay, bz - az
        along = np.clip(((side - ax) * dx + (y - ay) * dy + (z - az) * dz) / (dx * dx + dy * dy + dz * dz), 0.0, 1.0)
        apart = np.sqrt((side - ax - along * dx) ** 2 + (y - ay - along * dy) ** 2 + 0.6 * (z - az - along * dz) ** 2)
        nearest = np.minimum(nearest, apart - head.ventricles * (start_radius + along * (end_radius - start_radius)))
    return np.maximum(nearest, 0.9 - side)
