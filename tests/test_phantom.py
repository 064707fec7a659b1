"""The phantom cohort: reproducible to the byte, in RSNA's form, and labelled by the blood that is really there."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from pipeline.config import PhantomConfig
from pipeline.errors import IchorError
from pipeline.files import only_one
from pipeline.labels import ANY, LABELS, SUBTYPES, read_labels
from pipeline.phantom import cohort, study
from pipeline.phantom.bleeds import VISIBLE_MM2, draw_bleed
from pipeline.phantom.cohort import MODIFIED_S, SPREAD_S, write_cohort, write_study
from pipeline.phantom.dicom_writer import PADDING, StoredForm, stored_values
from pipeline.phantom.study import StudyPlan, locate_slice, plan_cohort, render_slice

pytestmark = pytest.mark.filterwarnings("ignore:Invalid value for VR UI")

TINY = PhantomConfig(studies=2, slices=[8, 9], size=128, seed=3)
WHOLE = PhantomConfig(studies=100, slices=[24, 30], size=512, seed=2019)

RSNA_ELEMENTS = """
    SOPInstanceUID Modality PatientID StudyInstanceUID SeriesInstanceUID StudyID ImagePositionPatient
    ImageOrientationPatient SamplesPerPixel PhotometricInterpretation Rows Columns PixelSpacing BitsAllocated BitsStored
    HighBit PixelRepresentation WindowCenter WindowWidth RescaleIntercept RescaleSlope PixelData
"""


@pytest.fixture(scope="module")
def plans() -> list[StudyPlan]:
    return plan_cohort(WHOLE)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_cohort(TINY, folder=folder, wip=folder / "wip", workers=0)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in [*(folder / "dicom").iterdir(), folder / "labels.csv"]}


def written(plan: StudyPlan, folder: Path) -> list[pydicom.FileDataset]:
    """The study's files as pydicom reads them, from base to vertex."""
    write_study(plan, folder)
    slices = [pydicom.dcmread(path) for path in folder.iterdir()]
    return sorted(slices, key=lambda one: one.ImagePositionPatient[2])


def read_hu(dataset: pydicom.FileDataset) -> np.ndarray:
    return pydicom.pixels.apply_rescale(dataset.pixel_array, dataset)


def small(plan: StudyPlan, **changes: Any) -> StudyPlan:
    """A plan that renders quickly, on the very grid of the anatomy, so that weights and pixels agree."""
    scale = plan.size / 256
    return replace(plan, size=256, spacing_mm=plan.spacing_mm * scale, **changes)


# --- the same bytes ---------------------------------------------------------------------------------------------------


def test_same_seed_gives_same_bytes_whatever_the_workers(tiny: Path, tmp_path: Path) -> None:
    write_cohort(TINY, folder=tmp_path / "again", wip=tmp_path / "wip", workers=2)
    assert contents(tmp_path / "again") == contents(tiny)


def test_another_seed_gives_other_heads_and_other_identifiers(tiny: Path, tmp_path: Path) -> None:
    write_cohort(TINY.model_copy(update={"seed": 4}), folder=tmp_path, wip=tmp_path / "wip", workers=0)
    assert set(contents(tmp_path)) & set(contents(tiny)) == {"labels.csv"}


def test_file_times_are_fixed(tiny: Path) -> None:
    times_s = [path.stat().st_mtime - MODIFIED_S for path in tiny.rglob("*.dcm")]
    assert min(times_s) >= 0
    assert max(times_s) < SPREAD_S
    assert len(set(times_s)) == len(times_s)  # other pixels, another time: a changed slice is seen to have changed


def test_stopped_cohort_goes_on_and_shows_nothing_before_it_is_whole(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []

    def stops_at_second(plan: StudyPlan, folder: Path) -> cohort.Labels:
        begun.append(plan.number)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return write_study(plan, folder)

    monkeypatch.setattr(cohort, "write_study", stops_at_second)
    folder, wip = tmp_path / "phantom", tmp_path / "wip"
    with pytest.raises(KeyboardInterrupt):
        write_cohort(TINY, folder=folder, wip=wip, workers=0)
    assert not folder.exists()
    write_cohort(TINY, folder=folder, wip=wip, workers=0)
    assert begun == [0, 1, 1], "the finished study is not made again"
    assert contents(folder) == contents(tiny)
    assert not list(wip.iterdir())


def test_cohort_that_was_stopped_between_its_two_names_is_whole_again(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, wip = tmp_path / "phantom", tmp_path / "wip"
    rename = Path.rename

    def stops_at_the_labels(path: Path, target: Path) -> Path:
        if path.suffix == ".csv":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", stops_at_the_labels)
        with pytest.raises(KeyboardInterrupt):
            write_cohort(TINY, folder=folder, wip=wip, workers=0)
    write_cohort(TINY, folder=folder, wip=wip, workers=0)
    assert contents(folder) == contents(tiny)


def test_second_run_at_once_is_refused(tmp_path: Path) -> None:
    with (
        only_one(tmp_path / "wip" / "phantom.lock", "phantom"),
        pytest.raises(IchorError, match="another phantom is running on"),
    ):
        write_cohort(TINY, folder=tmp_path / "phantom", wip=tmp_path / "wip", workers=0)


def test_full_disk_is_refused_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: type("Usage", (), {"free": 12_345}))
    with pytest.raises(IchorError, match=r"writing 2 phantom studies needs about [\d.]+ MB, but 12.3 kB are free"):
        write_cohort(TINY, folder=tmp_path / "phantom", wip=tmp_path / "wip", workers=0)


# --- RSNA's form ------------------------------------------------------------------------------------------------------


def test_files_hold_exactly_the_22_elements_and_no_true_uids(tiny: Path) -> None:
    for path in (tiny / "dicom").iterdir():
        dataset = pydicom.dcmread(path)
        assert sorted(element.keyword for element in dataset) == sorted(RSNA_ELEMENTS.split())
        assert path.name in (f"{dataset.SOPInstanceUID}.dcm", dataset.SOPInstanceUID)
        assert re.fullmatch("ID_[0-9a-f]{9}", dataset.SOPInstanceUID)
        assert re.fullmatch("ID_[0-9a-f]{10}", dataset.StudyInstanceUID)
        assert re.fullmatch("ID_[0-9a-f]{10}", dataset.SeriesInstanceUID)
        assert re.fullmatch("ID_[0-9a-f]{8}", dataset.PatientID)
        assert dataset.file_meta.MediaStorageSOPInstanceUID.is_valid
        assert dataset.file_meta.MediaStorageSOPInstanceUID != dataset.SOPInstanceUID


@pytest.mark.parametrize("explicit", [True, False])
def test_only_explicit_files_have_a_group_length(plans: list[StudyPlan], tmp_path: Path, explicit: bool) -> None:
    form = StoredForm(12, signed=False, explicit=explicit)
    dataset = written(small(plans[0], slices=8, form=form), tmp_path)[0]
    assert dataset.file_meta.TransferSyntaxUID.is_implicit_VR is not explicit
    assert ("FileMetaInformationGroupLength" in dataset.file_meta) is explicit
    assert dataset.original_encoding == (not explicit, True)


def test_12_bit_files_have_two_zero_padded_windows(plans: list[StudyPlan], tmp_path: Path) -> None:
    dataset = written(small(plans[0], slices=8, form=StoredForm(12, signed=False)), tmp_path)[0]
    assert [value.original_string for value in dataset.WindowCenter] == ["00036", "00036"]
    assert [value.original_string for value in dataset.WindowWidth] == ["00080", "00080"]
    assert (dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation) == (12, 11, 0)


def test_padded_files_are_minus_2000_outside_the_circle_only(plans: list[StudyPlan], tmp_path: Path) -> None:
    dataset = written(small(plans[0], slices=8, form=StoredForm(16, signed=True, padded=True)), tmp_path)[4]
    stored = dataset.pixel_array
    along = np.arange(256) - 127.5
    outside = np.hypot(along[None, :], along[:, None]) > 128
    assert (stored[outside] == PADDING).all()
    assert (stored[~outside] >= 0).all()


def test_wrapped_slices_are_right_after_the_known_repair() -> None:
    pixels_hu = np.array([[-1000.0, -500.0, -1.0, 0.0, 40.0, 2500.0]])
    stored = stored_values(pixels_hu, form=StoredForm(12, signed=False, intercept="1", wrapped=True))
    assert stored[0, 0] == 3096, "air wraps round to the top of the range"
    repaired = stored.astype(np.int32) + 1000
    repaired[repaired >= 4096] -= 4096
    assert (repaired - 1000 == pixels_hu).all()


def test_cohort_has_wrapped_slices_in_one_study_only(plans: list[StudyPlan]) -> None:
    forms = [cohort._form_of_slice(plan, index) for plan in plans for index in range(plan.slices)]
    wrapped = [form for form in forms if form.wrapped]
    assert 3 <= len(wrapped) <= 10
    assert {form.intercept for form in wrapped} == {"0", "1"}
    assert {(form.bits, form.signed) for form in wrapped} == {(12, False)}


def test_shares_of_the_stored_forms_are_near_those_of_rsna(plans: list[StudyPlan]) -> None:
    assert np.mean([plan.form.explicit for plan in plans]) == pytest.approx(0.63, abs=0.12)
    assert np.mean([plan.form.bits == 12 for plan in plans]) == pytest.approx(0.47, abs=0.12)
    assert np.mean([plan.form.padded and plan.form.signed for plan in plans]) == pytest.approx(0.40, abs=0.12)


def test_positions_step_along_the_slice_normal_and_rise_to_the_vertex(plans: list[StudyPlan], tmp_path: Path) -> None:
    plan = small(next(plan for plan in plans if plan.tilt_deg > 15), slices=8)
    slices = written(plan, tmp_path)
    orientation = np.array(slices[0].ImageOrientationPatient, float)
    normal = np.cross(orientation[:3], orientation[3:])
    assert normal[2] > 0.9
    assert orientation[5] < -0.2, "the forehead's edge is the higher one"
    steps = np.diff([np.array(one.ImagePositionPatient, float) for one in slices], axis=0)
    assert np.allclose(steps, normal * plan.step_mm, atol=1e-4)


def test_gantry_tilt_that_equals_the_heads_gives_level_slices(plans: list[StudyPlan]) -> None:
    plan = small(plans[0], bleeds=(), tilt_deg=18.0, pitch_deg=18.0, turn_deg=0.0, offset_mm=(0.0, 0.0))
    z_mm = locate_slice(plan, 10).z
    assert np.ptp(z_mm) < 1e-3
    assert z_mm.mean() == pytest.approx(study.LOWEST_MM + 10 * plan.step_mm, abs=1e-3)


# --- labels -----------------------------------------------------------------------------------------------------------


def test_labels_are_in_kaggles_form_and_any_is_the_or(tiny: Path) -> None:
    lines = (tiny / "labels.csv").read_text().splitlines()
    images = [path.stem for path in (tiny / "dicom").iterdir()]
    assert lines[0] == "ID,Label"
    assert [line.rpartition(",")[0] for line in lines[1:]] == [f"{i}_{name}" for i in sorted(images) for name in LABELS]
    table = read_labels(tiny / "labels.csv")
    assert (table["any"] == table[list(SUBTYPES)].max(axis=1)).all()
    assert 0 < table["any"].mean() < 1


@pytest.mark.parametrize("subtype", SUBTYPES)
def test_label_agrees_with_the_blood_voxels_in_the_slice(plans: list[StudyPlan], subtype: str) -> None:
    """Authority: the same slice without the bleed. What became denser, to a blood-like HU, is blood."""
    column = SUBTYPES.index(subtype)
    plan = small(next(plan for plan in plans if subtype in plan.subtypes), slices=24)
    # no dense mimics: where blood lies over one, the slice hardly becomes denser
    plain = replace(plan.head, falx_hu=38.0, pool_hu=38.0, cupping_hu=2.0, ganglia_mm=0.0, vessel_mm=0.0)
    plan = replace(plan, head=plain)
    (bleed,) = (replace(bleed, shift_mm=0.0) for bleed in plan.bleeds if bleed.subtype == subtype)
    pixel_mm2 = plan.spacing_mm**2
    agreed = Counter[bool]()
    for index in range(plan.slices):
        bled = render_slice(replace(plan, bleeds=(bleed,)), index, noise=False)
        healthy = render_slice(replace(plan, bleeds=()), index, noise=False)
        denser = (bled.pixels_hu - healthy.pixels_hu > 8) & (bled.pixels_hu > 44)
        seen_mm2 = np.count_nonzero(denser) * pixel_mm2
        if bled.labels[column]:
            assert seen_mm2 > 0.6 * VISIBLE_MM2
        else:
            assert seen_mm2 < 2.5 * VISIBLE_MM2
        assert sum(bled.labels[:ANY]) == bled.labels[ANY] == bled.labels[column]
        assert healthy.labels == (0,) * len(LABELS)
        agreed[bool(bled.labels[column])] += 1
    assert agreed[True] >= 2
    assert agreed[False] >= 8


@pytest.mark.parametrize("subtype", SUBTYPES)
def test_nearly_every_bleed_that_is_drawn_is_visible(plans: list[StudyPlan], subtype: str) -> None:
    rng = np.random.default_rng(0)
    column = SUBTYPES.index(subtype)
    seen = 0
    for number in range(6):
        bleed = draw_bleed(subtype, head=plans[number].head, rng=rng)
        plan = replace(plans[number], size=64, spacing_mm=3.7, slices=16, bleeds=(bleed,))
        seen += any(render_slice(plan, index, noise=False).labels[column] for index in range(plan.slices))
    assert seen >= 5


def test_every_fold_can_have_four_positive_patients_of_each_subtype(plans: list[StudyPlan]) -> None:
    for subtype in SUBTYPES:
        assert len({plan.patient for plan in plans if subtype in plan.subtypes}) >= 20


def test_cohort_is_60_percent_positive_with_one_to_three_subtypes(plans: list[StudyPlan]) -> None:
    assert np.mean([bool(plan.bleeds) for plan in plans]) == pytest.approx(0.6, abs=0.08)
    assert {len(plan.subtypes) for plan in plans} == {0, 1, 2, 3}
    assert all(24 <= plan.slices <= 30 for plan in plans)


def test_studies_of_one_patient_show_the_same_head(plans: list[StudyPlan]) -> None:
    studies = Counter(plan.patient for plan in plans)
    assert len(studies) == 85
    assert max(studies.values()) >= 2
    repeated = studies.most_common(1)[0][0]
    first, second, *_ = (plan for plan in plans if plan.patient == repeated)
    assert first.head.half_width_mm == second.head.half_width_mm
    assert first.subtypes == second.subtypes
    assert first.tilt_deg != second.tilt_deg


@pytest.mark.parametrize("studies", [1, 2, 5])
def test_small_cohorts_are_planned_too(studies: int) -> None:
    plans = plan_cohort(PhantomConfig(studies=studies, slices=[8, 8], size=64, seed=0))
    assert len(plans) == studies
    assert any(plan.bleeds for plan in plans)


# --- tissues ----------------------------------------------------------------------------------------------------------


def test_tissues_have_their_hu_in_the_written_files(plans: list[StudyPlan], tmp_path: Path) -> None:
    head = replace(plans[0].head, ganglia_mm=0.0, vessel_mm=0.0, choroid_mm=(0.0, 0.0), ventricles=1.2)
    plan = small(plans[0], head=head, bleeds=(), slices=24, form=StoredForm(16, signed=True))
    slices = written(plan, tmp_path)
    tissues: dict[str, list[np.ndarray]] = {name: [] for name in ("white", "grey", "csf", "bone", "air")}
    for index in range(8, 20):
        marks, pixels_hu = locate_slice(plan, index), read_hu(slices[index])
        side = np.abs(marks.x)
        nuclei = np.hypot((side - 24) / 7, (marks.y + 6) / 15) < 0.7
        deep = (marks.depth > 32) & (marks.lateral_ventricle > 4) & (marks.z > 36) & (np.abs(marks.midline) > 12)
        tissues["white"].append(pixels_hu[deep])
        tissues["grey"].append(pixels_hu[nuclei & (np.abs(marks.z - 17) < 4)])
        tissues["csf"].append(pixels_hu[(marks.lateral_ventricle < -2) & (marks.y < 10)])
        tissues["bone"].append(pixels_hu[(marks.depth < -2) & (marks.depth > -4) & (marks.z > 35)])
        before = (marks.outer_depth < -30) & (marks.y < -20) & (np.hypot(marks.x, marks.y) < 100)
        tissues["air"].append(pixels_hu[before])
    medians = {name: float(np.median(np.concatenate(values))) for name, values in tissues.items()}
    assert 25 <= medians["white"] <= 32
    assert 35 <= medians["grey"] <= 42
    assert 0 <= medians["csf"] <= 12
    assert medians["bone"] > 500
    assert medians["air"] == pytest.approx(-1000, abs=5)


@pytest.mark.parametrize("subtype", SUBTYPES)
def test_blood_is_50_to_80_hu_in_the_written_files(plans: list[StudyPlan], tmp_path: Path, subtype: str) -> None:
    source = next(plan for plan in plans if subtype in plan.subtypes)
    (bleed,) = (replace(bleed, shift_mm=0.0) for bleed in source.bleeds if bleed.subtype == subtype)
    plan = small(source, bleeds=(bleed,), slices=12, form=StoredForm(12, signed=False))
    areas = [render_slice(plan, index, noise=False).blood_mm2[SUBTYPES.index(subtype)] for index in range(12)]
    index = int(np.argmax(areas))
    bled = render_slice(plan, index, noise=False).pixels_hu
    healthy = render_slice(replace(plan, bleeds=()), index, noise=False).pixels_hu
    pixels_hu = read_hu(written(plan, tmp_path)[index])
    assert 50 <= np.median(pixels_hu[(bled - healthy > 12) & (bled > 44)]) <= 80
