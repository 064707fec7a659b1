"""A cohort of made-up head CTs, so that everything runs for people with no data of their own.

A cohort is planned first (who has which bleeds, how each study is stored) and rendered after, one study at a time; what
a study looks like depends on its plan only, so that any number of processes gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from pipeline.config import PhantomConfig
from pipeline.labels import SUBTYPES
from pipeline.phantom import anatomy, tissue
from pipeline.phantom.anatomy import Head
from pipeline.phantom.bleeds import VISIBLE_MM2, Bleed, draw_bleed, followed_up, midline_shift, paint_bleed, visible_mm2
from pipeline.phantom.dicom_writer import StoredForm
from pipeline.phantom.tissue import AIR_HU, BASE_TOP_MM, paint

PATIENTS_PER_STUDY = 0.85
POSITIVE_PATIENTS = 0.62
SUBTYPES_PER_PATIENT = (2, 3, 2, 1, 3)
"""How many subtypes one positive patient after another has: 2.2 on average, so that 100 studies hold 20 of each."""

LOWEST_MM, HIGHEST_MM = -37.0, 91.0
GRID = 256
"""Rows and columns on which anatomy is evaluated before it is scaled up: smooth shapes need no more, at a quarter of
the time."""

WRAPPED_STUDY = 3
"""Number of the study of which some slices carry the 12-bit wrap."""

TOP_HU = 2500.0


@dataclass(frozen=True)
class StudyPlan:
    """One study before it is rendered.

    Attributes:
        number: 0, 1, … in the cohort.
        patient: number of its patient.
        seed: of the cohort.
        head: the patient's anatomy.
        bleeds: what is wrong with it; empty for a negative study.
        slices: how many.
        size: rows and columns.
        spacing_mm: between rows, and between columns.
        tilt_deg: of the gantry; the upper edge of a slice (the forehead) is the higher one.
        pitch_deg, turn_deg: how the head lies: nodding, and rotated in the plane.
        offset_mm: of the head from the centre of the picture, in x and y.
        form: how its slices are stored.
    """

    number: int
    patient: int
    seed: int
    head: Head
    bleeds: tuple[Bleed, ...]
    slices: int
    size: int
    spacing_mm: float
    tilt_deg: float
    pitch_deg: float
    turn_deg: float
    offset_mm: tuple[float, float]
    form: StoredForm

    @property
    def step_mm(self) -> float:
        """Distance of two slices along the slice normal, which is the slice thickness too."""
        return (HIGHEST_MM - LOWEST_MM) / (self.slices - 1)

    @property
    def subtypes(self) -> tuple[str, ...]:
        """The planned subtypes, in the order of `SUBTYPES`."""
        return tuple(name for name in SUBTYPES if any(bleed.subtype == name for bleed in self.bleeds))

    @property
    def orientation(self) -> tuple[float, float, float, float, float, float]:
        """Image Orientation (Patient) (0020,0037): rows run to the left, columns to the back and down."""
        tilt = np.deg2rad(self.tilt_deg)
        return (1.0, 0.0, 0.0, 0.0, float(np.cos(tilt)), -float(np.sin(tilt)))


@dataclass(frozen=True)
class RenderedSlice:
    """One slice: what the scanner saw, and what is true.

    Attributes:
        pixels_hu: float32 [row, column].
        position_mm: Image Position (Patient) (0020,0032), the centre of the first pixel.
        blood_mm2: visible blood of each subtype, in the order of `SUBTYPES`.
    """

    pixels_hu: np.ndarray
    position_mm: tuple[float, float, float]
    blood_mm2: tuple[float, ...]

    @property
    def labels(self) -> tuple[int, ...]:
        """0 or 1 for each of `LABELS`; the last, `any`, is the OR of the others."""
        subtypes = tuple(int(area >= VISIBLE_MM2) for area in self.blood_mm2)
        return (*subtypes, int(any(subtypes)))


def plan_cohort(config: PhantomConfig) -> list[StudyPlan]:
    """Decide who is in the cohort and what they have; renders nothing."""
    rng = np.random.default_rng([config.seed, 0])
    patients = max(1, round(PATIENTS_PER_STUDY * config.studies))
    again = rng.integers(0, patients, config.studies - patients)
    patient_of_study = rng.permutation(np.concatenate([np.arange(patients), again]))
    subtypes = _deal_subtypes(patients, rng)
    first_number = {int(patient): number for number, patient in reversed(list(enumerate(patient_of_study)))}
    return [
        _plan_study(config, number, int(patient), subtypes[int(patient)], first=first_number[int(patient)] == number)
        for number, patient in enumerate(patient_of_study)
    ]


def _deal_subtypes(patients: int, rng: np.random.Generator) -> list[tuple[str, ...]]:
    """Give each positive patient one to three subtypes, the least used first, so that all are about equally common."""
    used = np.zeros(len(SUBTYPES))
    dealt: list[tuple[str, ...]] = [()] * patients
    positive = rng.permutation(patients)[: max(1, round(POSITIVE_PATIENTS * patients))]
    for turn, patient in enumerate(positive):
        count = SUBTYPES_PER_PATIENT[turn % len(SUBTYPES_PER_PATIENT)]
        chosen = np.argsort(used + rng.uniform(0, 1.5, len(SUBTYPES)))[:count]
        used[chosen] += 1
        dealt[patient] = tuple(SUBTYPES[index] for index in sorted(chosen))
    return dealt


def _plan_study(
    config: PhantomConfig, number: int, patient: int, subtypes: tuple[str, ...], *, first: bool
) -> StudyPlan:
    of_patient = np.random.default_rng([config.seed, 1, patient])
    rng = np.random.default_rng([config.seed, 2, number])
    head = anatomy.draw_head(of_patient)
    bleeds = tuple(draw_bleed(subtype, head=head, rng=of_patient) for subtype in subtypes)
    tilt = float(rng.uniform() < 0.85) * rng.uniform(4, 25)
    field_mm = rng.uniform(232, 254)
    return StudyPlan(
        number=number,
        patient=patient,
        seed=config.seed,
        head=head,
        bleeds=bleeds if first else tuple(followed_up(bleed) for bleed in bleeds),
        slices=int(rng.integers(config.slices[0], config.slices[1] + 1)),
        size=config.size,
        spacing_mm=field_mm / config.size,
        tilt_deg=tilt,
        pitch_deg=tilt + rng.uniform(-7, 7),
        turn_deg=rng.uniform(-8, 8),
        offset_mm=(rng.uniform(-7, 7), rng.uniform(-6, 6)),
        form=_draw_form(number, rng),
    )


def _draw_form(number: int, rng: np.random.Generator) -> StoredForm:
    """A stored form with the shares of the RSNA set."""
    explicit = bool(rng.uniform() < 0.63)
    chance, padded = rng.uniform(), bool(rng.uniform() < 0.75)
    if chance < 0.46 or number == WRAPPED_STUDY:
        return StoredForm(12, signed=False, explicit=explicit)
    if chance < 0.48:
        return StoredForm(12, signed=False, intercept="-1000", explicit=explicit)
    intercept = "-1024.000000" if chance < 0.56 else "-1024"
    return StoredForm(16, signed=True, intercept=intercept, explicit=explicit, padded=padded)


def render_study(plan: StudyPlan, *, noise: bool = True) -> Iterator[RenderedSlice]:
    """Render a study's slices from the base of the skull to the vertex."""
    for index in range(plan.slices):
        yield render_slice(plan, index, noise=noise)


def render_slice(plan: StudyPlan, index: int, *, noise: bool = True) -> RenderedSlice:
    """Render one slice of a study.

    Args:
        plan: the study.
        index: 0 is the lowest slice.
        noise: False gives the picture without the scanner's noise.
    """
    grid = min(plan.size, GRID)
    pitch_mm = plan.spacing_mm * plan.size / grid
    marks = locate_slice(plan, index)
    coarse_hu: np.ndarray = np.full((grid, grid), AIR_HU, np.float32)
    areas_mm2 = _paint_head(coarse_hu, plan, marks, pitch_mm)
    _paint_holder(coarse_hu, plan, grid, pitch_mm)
    pixels_hu: np.ndarray = coarse_hu
    if grid < plan.size:
        pixels_hu = cv2.resize(coarse_hu, (plan.size, plan.size), interpolation=cv2.INTER_LINEAR)
    if noise:
        pixels_hu = pixels_hu + _scanner_noise(plan, index, coarse_hu)
    x_mm, y_mm, z_mm = (float(value) for value in _plane(plan, index)[0])
    return RenderedSlice(np.clip(pixels_hu, -1024.0, TOP_HU), (x_mm, y_mm, z_mm), areas_mm2)


def locate_slice(plan: StudyPlan, index: int) -> anatomy.Landmarks:
    """The distances to every structure on a slice's coarse grid, [row, column] of at most `GRID` each way."""
    grid = min(plan.size, GRID)
    origin, across, down = _plane(plan, index)
    x, y, z = _head_coordinates(plan, origin, across, down, grid)
    pitch_mm = plan.spacing_mm * plan.size / grid
    return anatomy.locate(
        plan.head, x, y, z, pitch_mm=pitch_mm, thickness_mm=plan.step_mm, shift_mm=midline_shift(plan.bleeds)
    )


def _plane(plan: StudyPlan, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first pixel's centre, and the direction of rows and columns, in patient coordinates (mm)."""
    across, down = np.array(plan.orientation[:3]), np.array(plan.orientation[3:])
    normal = np.cross(across, down)
    half_mm = plan.spacing_mm * (plan.size - 1) / 2
    along_mm = LOWEST_MM + index * plan.step_mm
    return normal * along_mm - half_mm * (across + down), across, down


def _head_coordinates(
    plan: StudyPlan, origin: np.ndarray, across: np.ndarray, down: np.ndarray, grid: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Head coordinates x, y, z of the grid's points, float32 [row, column] each, from the geometry that is written."""
    turn, pitch = np.deg2rad(plan.turn_deg), np.deg2rad(plan.pitch_deg)
    yaw = np.array([[np.cos(turn), np.sin(turn), 0], [-np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    nod = np.array([[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)], [0, np.sin(pitch), np.cos(pitch)]])
    # a grid point is the centre of a block of pixels, so that scaling up with half-pixel centres lands on the pixels
    mm = (((np.arange(grid) + 0.5) * plan.size / grid - 0.5) * plan.spacing_mm).astype(np.float32)
    to_head = yaw @ nod
    shift = np.array([*plan.offset_mm, 0.0])
    start, step_across, step_down = ((to_head @ vector).astype(np.float32) for vector in (origin - shift, across, down))
    columns, rows = mm[None, :], mm[:, None]
    x, y, z = (start[axis] + step_across[axis] * columns + step_down[axis] * rows for axis in range(3))
    return x, y, z


def _paint_head(pixels_hu: np.ndarray, plan: StudyPlan, marks: anatomy.Landmarks, pitch_mm: float) -> tuple[float, ...]:
    """Paint every tissue, in place, and return the visible blood of each subtype in mm²."""
    head = plan.head
    tissue.paint_shell(pixels_hu, head, marks)
    blood = dict.fromkeys(SUBTYPES, 0.0)
    if float(marks.depth.max()) > 0:
        tissue.paint_brain(pixels_hu, head, marks)
        for bleed in plan.bleeds:
            blood[bleed.subtype] = visible_mm2(paint_bleed(pixels_hu, bleed, head, marks), pitch_mm=pitch_mm)
    if float(marks.z.min()) < BASE_TOP_MM:
        tissue.paint_base(pixels_hu, head, marks)
        tissue.paint_hardening(pixels_hu, head, marks)
    return tuple(blood.values())


def _paint_holder(pixels_hu: np.ndarray, plan: StudyPlan, grid: int, pitch_mm: float) -> None:
    """The head holder: a thin shell behind the head, where the picture holds nothing but air."""
    middle = (grid - 1) / 2
    along = (np.arange(grid, dtype=np.float32) - middle) * pitch_mm
    column_mm, row_mm = along[None, :], along[:, None]
    radius = np.hypot(column_mm / 0.92, row_mm)
    shell = anatomy.step(1.0 - np.abs(radius - 112.0), pitch_mm) * (row_mm > 15.0) * (pixels_hu < -950.0)
    paint(pixels_hu, 60.0, shell.astype(np.float32))


def _scanner_noise(plan: StudyPlan, index: int, coarse_hu: np.ndarray) -> np.ndarray:
    """Noise of about 4 HU in the brain, correlated over a pixel or two, and stronger where a slice holds much bone."""
    rng = np.random.default_rng([plan.seed, 3, plan.number, index])
    white = rng.standard_normal((plan.size, plan.size), dtype=np.float32)
    bone = float(np.count_nonzero(coarse_hu > 300.0)) / coarse_hu.size
    sigma_hu = (3.0 + 14.0 * bone) * np.sqrt(plan.size / 512.0 * 240.0 / (plan.spacing_mm * plan.size))
    # the 3 × 3 Gaussian leaves 0.54 of the standard deviation
    return cv2.GaussianBlur(white, (3, 3), 0.6) * np.float32(sigma_hu / 0.54)
