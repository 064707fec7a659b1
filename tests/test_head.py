"""The box around the head: drawn heads whose bounds are known, the phantom's, and real ones read off by eye."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from scipy import ndimage

from pipeline.config import PhantomConfig
from pipeline.head import LEAST_SIDE_MM, MARGIN_MM, Box, find_head, find_mask, largest_piece
from pipeline.phantom import study
from tests.conftest import REAL_DICOM

COARSE = 128
SLICES = 24
FIELD_MM = 250.0
CENTRE_MM = (-14.0, 6.0)
"""Of the drawn head, down and to the right of the centre of the field."""
HEAD_MM = (92.0, 74.0)
"""Its half axes, down and to the right."""

Volume = npt.NDArray[np.float32]


class Drawing:
    """A study drawn at twice the coarse size and averaged, so that thin things fill pixels in part, as they really do."""

    def __init__(self, *, field_mm: float = FIELD_MM, slices: int = SLICES) -> None:
        self.field_mm = field_mm
        along = (np.arange(2 * COARSE) + 0.5) * field_mm / (2 * COARSE) - field_mm / 2
        self.row_mm, self.column_mm = along[:, None], along[None, :]
        self.fine_hu = np.full((slices, 2 * COARSE, 2 * COARSE), -1000.0, np.float32)

    def head(self, centre_mm: tuple[float, float] = CENTRE_MM, half_mm: tuple[float, float] = HEAD_MM) -> Drawing:
        """Scalp, skull and brain of an ellipsoid: whole in the first slices, small at the vertex."""
        for k, pixels_hu in enumerate(self.fine_hu):
            size = np.sqrt(max(1 - (max(k - 8, 0) / (len(self.fine_hu) - 8)) ** 2, 0))
            for shrink_mm, hu in ((0, 0.0), (6, 1100.0), (13, 35.0)):
                pixels_hu[self.radius(centre_mm, half_mm, size, shrink_mm) < 1] = hu
        return self

    def radius(
        self, centre_mm: tuple[float, float], half_mm: tuple[float, float], size: float = 1.0, shrink_mm: float = 0.0
    ) -> npt.NDArray[np.floating]:
        down, right = (max(half * size - shrink_mm, 1e-3) for half in half_mm)
        return np.hypot((self.row_mm - centre_mm[0]) / down, (self.column_mm - centre_mm[1]) / right)

    def frontal_sinus(self) -> Drawing:
        """A curved cell of air, 80 mm wide, behind a wall of 4 mm of scalp and 4 mm of bone."""
        front = (self.row_mm < CENTRE_MM[0]) & (np.abs(self.column_mm - CENTRE_MM[1]) < 40)
        for shrink_mm, hu in ((4, 1100.0), (8, -1000.0), (13, 1100.0), (17, 35.0)):
            self.fine_hu[:8, front & (self.radius(CENTRE_MM, HEAD_MM, 1.0, shrink_mm) < 1)] = hu
        return self

    def tilted(self) -> Drawing:
        """Each slice shifted by a mm against its neighbour, as the gantry's tilt does: base and vertex bound different sides."""
        for k, pixels_hu in enumerate(self.fine_hu):
            pixels_hu[:] = np.roll(pixels_hu, k - len(self.fine_hu) // 2, axis=0)
        return self

    def ears(self) -> Drawing:
        """Flaps of 4 by 14 mm at both sides."""
        for side in (-1, 1):
            column_mm = side * (self.column_mm - CENTRE_MM[1])
            ear = (
                (np.abs(self.row_mm - CENTRE_MM[0]) < 2) & (column_mm > HEAD_MM[1] - 4) & (column_mm < HEAD_MM[1] + 10)
            )
            self.fine_hu[4:8, ear] = 20.0
        return self

    def holder(self, *, thick_mm: float, hu: float, gap_mm: float = 0.0) -> Drawing:
        """A shell that bends around the back of the head, from one side to the other, at `gap_mm` from the scalp."""
        radius_mm = 1.2 * HEAD_MM[1] + 10
        middle = (CENTRE_MM[0] + HEAD_MM[0] + gap_mm - radius_mm, CENTRE_MM[1])
        distance = np.hypot(self.row_mm - middle[0], self.column_mm - middle[1]) - radius_mm
        self.fine_hu[:, (distance > 0) & (distance < thick_mm) & (self.row_mm > middle[0])] = hu
        return self

    def table(self) -> Drawing:
        """A shell of 4 mm around foam, below the head."""
        outer = (self.row_mm > 90) & (self.row_mm < 120) & (np.abs(self.column_mm) < 118)
        inner = (self.row_mm > 94) & (self.row_mm < 116) & (np.abs(self.column_mm) < 114)
        self.fine_hu[:, outer], self.fine_hu[:, inner] = 100.0, -900.0
        return self

    def pillow(self) -> Drawing:
        """Foam that touches the head at the back and both sides."""
        around = (self.radius(CENTRE_MM, HEAD_MM) < 1.25) & (self.row_mm > CENTRE_MM[0])
        for pixels_hu in self.fine_hu:
            pixels_hu[around & (pixels_hu < -900)] = -800.0
        return self

    def straps(self) -> Drawing:
        """A band of 4 mm over the forehead, from one side of the field to the other."""
        row_mm = CENTRE_MM[0] - HEAD_MM[0] + 8
        band = np.broadcast_to(np.abs(self.row_mm - row_mm) < 2, self.fine_hu.shape[1:])
        for pixels_hu in self.fine_hu:
            pixels_hu[band & (pixels_hu < -500)] = -50.0
        return self

    def coarse(self) -> Volume:
        return self.fine_hu.reshape(len(self.fine_hu), COARSE, 2, COARSE, 2).mean(axis=(2, 4))


def assert_holds(
    found: Box | None,
    *,
    field_mm: float = FIELD_MM,
    centre_mm: tuple[float, float] = CENTRE_MM,
    half_mm: tuple[float, float] = HEAD_MM,
    within: float = 2.0,
) -> None:
    """The box is the head's bounds and the margin, to `within` coarse pixels."""
    assert found is not None
    tolerance_mm = within * field_mm / COARSE
    side_mm = 2 * max(half_mm) + 2 * MARGIN_MM
    assert found.side_mm == pytest.approx(side_mm, abs=tolerance_mm)
    assert found.top_mm == pytest.approx(centre_mm[0] - side_mm / 2, abs=tolerance_mm)
    assert found.left_mm == pytest.approx(centre_mm[1] - side_mm / 2, abs=tolerance_mm)


@pytest.mark.parametrize("field_mm", [230.0, 250.0, 320.0, 500.0])
def test_box_is_the_heads_bounds_and_the_margin_in_any_field_of_view(field_mm: float) -> None:
    found = find_head(Drawing(field_mm=field_mm).head().coarse(), side_mm=field_mm)
    assert_holds(found, field_mm=field_mm)


def test_wall_of_a_frontal_sinus_is_head_however_thin() -> None:
    assert_holds(find_head(Drawing().head().frontal_sinus().coarse()[:8], side_mm=FIELD_MM))


@pytest.mark.parametrize(("thick_mm", "hu"), [(2.0, 200.0), (3.0, -200.0), (5.0, 200.0), (5.0, -100.0)])
@pytest.mark.parametrize("gap_mm", [-1.0, 0.0, 4.0])
def test_holder_that_touches_the_scalp_is_left_out_with_table_and_pillow(
    thick_mm: float, hu: float, gap_mm: float
) -> None:
    drawing = Drawing().head().ears().pillow().table().holder(thick_mm=thick_mm, hu=hu, gap_mm=gap_mm)
    assert_holds(find_head(drawing.coarse(), side_mm=FIELD_MM))


def test_holder_is_not_in_the_mask_but_the_ears_are() -> None:
    bare, ears = Drawing().head().coarse(), Drawing().head().ears().coarse()
    held = Drawing().head().ears().table().holder(thick_mm=4, hu=150).coarse()
    without, found, expected = (find_mask(one, side_mm=FIELD_MM) for one in (bare, held, ears))
    assert without is not None
    assert found is not None
    assert expected is not None
    assert np.count_nonzero(expected & ~without) > 60
    assert np.count_nonzero(expected & ~found) < 10
    # within 25 mm of the point of contact the gap is less than a coarse pixel, and the two cannot be told apart
    column_mm = (np.arange(COARSE) + 0.5) * FIELD_MM / COARSE - FIELD_MM / 2
    apart = np.abs(column_mm - CENTRE_MM[1]) > 25
    assert ((held > -300) & ~expected)[..., apart].sum() > 30 * SLICES
    assert (found & ~expected)[..., apart].sum() < SLICES


def test_straps_that_close_a_ring_with_the_holder_do_not_make_it_head() -> None:
    drawing = Drawing().head().straps().table().holder(thick_mm=4, hu=150)
    drawing.fine_hu[:, 60:236, 10:14] = drawing.fine_hu[:, 60:236, 242:246] = 150.0
    assert_holds(find_head(drawing.coarse(), side_mm=FIELD_MM))


def test_phantoms_head_is_found_as_if_it_lay_in_no_holder(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = study.plan_cohort(PhantomConfig(studies=6, slices=[10, 12], size=COARSE, seed=5))
    field_mm = [plan.spacing_mm * plan.size for plan in plans]
    held = [np.stack([one.pixels_hu for one in study.render_study(plan)]) for plan in plans]
    monkeypatch.setattr(study, "_paint_holder", lambda *_: None)
    for plan, volume, side_mm in zip(plans, held, field_mm, strict=True):
        bare = np.stack([one.pixels_hu for one in study.render_study(replace(plan), noise=False)]) > -300
        rows, columns = np.flatnonzero(bare.any(axis=(0, 2))), np.flatnonzero(bare.any(axis=(0, 1)))
        pitch_mm = side_mm / COARSE
        centre_mm = tuple((lines[0] + lines[-1] + 1) / 2 * pitch_mm - side_mm / 2 for lines in (rows, columns))
        half_mm = tuple((lines[-1] + 1 - lines[0]) / 2 * pitch_mm for lines in (rows, columns))
        found = find_head(volume, side_mm=side_mm)
        assert_holds(found, field_mm=side_mm, centre_mm=centre_mm, half_mm=half_mm)


@pytest.mark.parametrize("sigma_hu", [50.0, 150.0, 300.0])
def test_noise_moves_the_box_by_less_than_its_margin(sigma_hu: float) -> None:
    coarse = Drawing().head().table().holder(thick_mm=3, hu=100).coarse()
    noise = np.random.default_rng(0).normal(0, sigma_hu, coarse.shape).astype(np.float32)
    assert_holds(find_head(coarse + noise, side_mm=FIELD_MM), within=3)


def test_streaks_of_metal_do_not_widen_the_box() -> None:
    drawing = Drawing().head()
    teeth_mm = (CENTRE_MM[0] - 50, CENTRE_MM[1])
    angle = np.arctan2(drawing.row_mm - teeth_mm[0], drawing.column_mm - teeth_mm[1])
    streaks = (
        900 * np.cos(17 * angle) / (1 + np.hypot(drawing.row_mm - teeth_mm[0], drawing.column_mm - teeth_mm[1]) / 40)
    )
    drawing.fine_hu[2:5] = np.maximum(drawing.fine_hu[2:5] + 2 * streaks, -1024)
    drawing.fine_hu[3, np.abs(np.sin(17 * angle / 2)) < 0.1] = 3000
    assert_holds(find_head(drawing.coarse(), side_mm=FIELD_MM), within=3)


def garbage(name: str, pixels_hu: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(1)
    return {
        "inverted": -1000 - pixels_hu,
        "noise": rng.uniform(-1024, 3071, pixels_hu.shape).astype(np.float32),
        "full": np.full_like(pixels_hu, 50),
        "air": np.full_like(pixels_hu, -1024),
        "large": np.pad(np.full((108, 108), 50, np.float32), 10, constant_values=-1000),
        "elsewhere": np.pad(np.full((24, 24), 50, np.float32), ((0, 104), (104, 0)), constant_values=-1000),
        "half noise": np.where(np.arange(COARSE)[:, None] < 64, pixels_hu, rng.uniform(-1024, 3071, pixels_hu.shape)),
    }[name]


@pytest.mark.parametrize("name", ["inverted", "noise", "full", "air", "large", "elsewhere", "half noise"])
@pytest.mark.parametrize("place", [0, 7, 12, SLICES - 1])
def test_one_slice_of_garbage_changes_nothing(name: str, place: int) -> None:
    coarse = Drawing().head().tilted().coarse()
    clean = find_head(coarse, side_mm=FIELD_MM)
    coarse[place] = garbage(name, coarse[place])
    found = find_head(coarse, side_mm=FIELD_MM)
    assert clean is not None
    assert found is not None
    for before, after in zip(
        (clean.top_mm, clean.left_mm, clean.side_mm), (found.top_mm, found.left_mm, found.side_mm), strict=True
    ):
        assert after == pytest.approx(before, abs=FIELD_MM / COARSE)


def test_blank_slices_do_not_cut_the_head_in_two() -> None:
    coarse = Drawing().head().tilted().coarse()
    clean = find_head(coarse, side_mm=FIELD_MM)
    coarse = np.insert(coarse, [4, 4, 9, 9, 9, 12], -1024, axis=0)
    assert find_head(coarse, side_mm=FIELD_MM) == clean


def test_vertex_is_in_the_mask_and_the_order_of_the_slices_does_not_matter() -> None:
    coarse = Drawing().head().coarse()
    found = find_mask(coarse, side_mm=FIELD_MM)
    assert found is not None
    tissue = np.count_nonzero(coarse > -300, axis=(1, 2))
    assert tissue[-1] < tissue[0] / 3
    np.testing.assert_array_less(0.9 * tissue, np.count_nonzero(found, axis=(1, 2)))
    assert find_head(coarse[::-1], side_mm=FIELD_MM) == find_head(coarse, side_mm=FIELD_MM)


def test_shoulders_and_neck_do_not_widen_the_box() -> None:
    field_mm = 450.0
    head = Drawing(field_mm=field_mm).head()
    body = Drawing(field_mm=field_mm, slices=12)
    for k, pixels_hu in enumerate(body.fine_hu):  # shoulders, then the neck
        half_mm = (95.0, 210.0 - 6 * k) if k < 7 else (60.0, 62.0)
        pixels_hu[body.radius((20.0, 6.0), half_mm) < 1] = 40.0
    coarse = np.concatenate([body.coarse(), head.coarse()])
    assert_holds(find_head(coarse, side_mm=field_mm), field_mm=field_mm)


@pytest.mark.parametrize("centre_mm", [(-60.0, 6.0), (60.0, -80.0), (0.0, 90.0)])
def test_head_cut_by_the_border_gets_a_box_that_stays_in_the_field(centre_mm: tuple[float, float]) -> None:
    found = find_head(Drawing().head(centre_mm=centre_mm).coarse(), side_mm=FIELD_MM)
    assert found is not None
    half = FIELD_MM / 2
    for start_mm, centre, radius in zip((found.top_mm, found.left_mm), centre_mm, HEAD_MM, strict=True):
        assert -half <= start_mm
        assert start_mm + found.side_mm <= half + 1e-9
        assert start_mm <= max(centre - radius, -half) + 4
        assert start_mm + found.side_mm >= min(centre + radius, half) - 4


def test_head_larger_than_the_field_gets_the_whole_field() -> None:
    found = find_head(Drawing(field_mm=150.0).head(centre_mm=(0, 0)).coarse(), side_mm=150.0)
    assert found == Box(-75.0, -75.0, 150.0)
    full = find_head(np.full((5, COARSE, COARSE), 40, np.float32), side_mm=200.0)
    assert full == Box(-100.0, -100.0, 200.0)


@pytest.mark.parametrize("slices", [1, 2, 3])
def test_few_slices_are_enough(slices: int) -> None:
    drawing = Drawing().head().table().holder(thick_mm=3, hu=100)
    assert_holds(find_head(drawing.coarse()[:slices], side_mm=FIELD_MM))


def test_vertex_alone_is_not_blown_up_to_the_size_of_a_head() -> None:
    found = find_head(Drawing().head().coarse()[-2:], side_mm=FIELD_MM)
    assert found is not None
    assert found.side_mm == LEAST_SIDE_MM
    assert found.top_mm == pytest.approx(CENTRE_MM[0] - LEAST_SIDE_MM / 2, abs=2)


def test_no_head_gives_no_box() -> None:
    air = np.full((SLICES, COARSE, COARSE), -1024, np.float32)
    noise = np.random.default_rng(0).normal(-950, 120, air.shape).astype(np.float32)
    small = Drawing().head(half_mm=(14.0, 14.0)).coarse()
    nothing_but_holder = Drawing().table().pillow().holder(thick_mm=5, hu=200).coarse()
    unknown = np.full_like(air, np.nan)
    for volume in (air, noise, small, nothing_but_holder, unknown, air[:1], air[:0]):
        assert find_head(volume, side_mm=FIELD_MM) is None


def test_input_is_left_as_it_is_and_its_layout_in_memory_does_not_matter() -> None:
    coarse = Drawing().head().ears().table().holder(thick_mm=3, hu=100).coarse()
    before = coarse.copy()
    found = find_mask(coarse, side_mm=FIELD_MM)
    np.testing.assert_array_equal(coarse, before)
    for other in (np.asfortranarray(coarse), coarse.astype(np.float64)):
        np.testing.assert_array_equal(find_mask(other, side_mm=FIELD_MM), found)


def test_largest_piece_is_the_one_that_scipy_measures_largest() -> None:
    rng = np.random.default_rng(0)
    for share in (0.1, 0.25, 0.35):  # below and above the share at which pieces grow together
        mask = (rng.uniform(size=(9, 30, 31)) < share).astype(np.uint8)
        labels, count = ndimage.label(mask, ndimage.generate_binary_structure(3, 1))
        sizes = ndimage.sum_labels(mask, labels, range(1, count + 1))
        found = largest_piece(mask)
        assert found.sum() == sizes.max()
        assert len(np.unique(labels[found > 0])) == 1


def read_series(folder: str) -> tuple[Volume, float]:
    """A real series as the coarse volume, and its field of view in mm."""
    paths = REAL_DICOM / folder
    if not paths.is_dir():
        pytest.skip(f"{paths} is not here")
    slices = [pydicom.dcmread(path) for path in paths.iterdir()]

    def along_normal(one: pydicom.FileDataset) -> float:
        across, down = np.reshape(np.asarray(one.ImageOrientationPatient, float), (2, 3))
        return float(np.cross(across, down) @ np.asarray(one.ImagePositionPatient, float))

    volume = []
    for one in sorted(slices, key=along_normal):
        pixels_hu = one.pixel_array * np.float32(one.RescaleSlope) + np.float32(one.RescaleIntercept)
        volume.append(cv2.resize(np.maximum(pixels_hu, -1024), (COARSE, COARSE), interpolation=cv2.INTER_AREA))
    return np.stack(volume), float(slices[0].PixelSpacing[0]) * slices[0].Rows


def test_real_head_is_boxed_from_the_tip_of_the_nose_to_the_occiput() -> None:
    coarse, side_mm = read_series("ge-head-trauma")
    found = find_head(coarse, side_mm=side_mm)
    assert found is not None
    # read off the full slices by eye, pixels of 512: nose, occiput, and the outermost points of both ears
    nose, occiput, left_ear, right_ear = (pixel / 512 * side_mm - side_mm / 2 for pixel in (39, 485, 63, 451))
    assert found.top_mm == pytest.approx(nose - MARGIN_MM, abs=4)
    assert found.top_mm + found.side_mm == pytest.approx(occiput + MARGIN_MM, abs=4)
    assert found.left_mm + found.side_mm / 2 == pytest.approx((left_ear + right_ear) / 2, abs=4)


def test_rails_of_a_real_holder_are_not_head() -> None:
    coarse, side_mm = read_series("ge-head-trauma")
    found = find_mask(coarse, side_mm=side_mm)
    assert found is not None
    upper_hu, upper = coarse[21:], found[21:]  # here the head lies between columns 21 and 106, and away from the rails
    assert (upper_hu[..., :16] > 0).any()
    assert (upper_hu[..., 112:] > 0).any()
    assert not upper[..., :21].any()
    assert not upper[..., 106:].any()
    assert upper.any(axis=(1, 2)).all()


@pytest.mark.parametrize(
    ("folder", "rows", "columns"),
    # by eye, coarse pixels: the plastic skull's first row and column, and the ones after its last
    [("philips-phantom/head-5mm", (8, 110), (23, 101)), ("philips-phantom/head-tilted", (16, 101), (29, 95))],
)
def test_plastic_skull_is_boxed_whole_and_its_holder_is_not_head(
    folder: str, rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    coarse, side_mm = read_series(folder)
    found, mask = find_head(coarse, side_mm=side_mm), find_mask(coarse, side_mm=side_mm)
    assert found is not None
    assert mask is not None
    pitch_mm = side_mm / COARSE
    for start_mm, (first, last) in ((found.top_mm, rows), (found.left_mm, columns)):
        start = (start_mm + side_mm / 2) / pitch_mm
        assert start <= first
        assert start + found.side_mm / pitch_mm >= last
    assert (
        found.side_mm / pitch_mm <= max(last - first for first, last in (rows, columns)) + 2 * MARGIN_MM / pitch_mm + 2
    )
    outside = mask.copy()
    outside[:, rows[0] - 1 : rows[1] + 1, columns[0] - 1 : columns[1] + 1] = False
    assert not outside.any()
