"""The accounting: every file ends as used, repaired or excluded, slices are in order, and unchanged files are not read again."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pydicom
import pytest

import pipeline.index
from pipeline.errors import SourceError
from pipeline.header import Header
from pipeline.index import build_manifest
from pipeline.manifest import EXCLUDED, REASONS, account, kept
from pipeline.phantom.dicom_writer import StoredForm
from pipeline.place import Place
from pipeline.source import find_files
from tests.conftest import REAL_DICOM, Cohort


def reasons(manifest: pd.DataFrame) -> dict[str, str]:
    return {Path(path).name: reason for path, reason in zip(manifest["path"], manifest["reason"], strict=True)}


def change(path: Path, **values: Any) -> None:
    dataset = pydicom.dcmread(path)
    for name, value in values.items():
        if value is None:
            del dataset[name]
        else:
            setattr(dataset, name, value)
    dataset.save_as(path)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"Modality": "MR"}, "not_ct"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "colour"),
        ({"NumberOfFrames": 2}, "multi_frame"),
        ({"BitsAllocated": 8}, "not_16_bit"),
        ({"StudyInstanceUID": None}, "no_identifiers"),
        ({"ImagePositionPatient": None}, "no_geometry"),
        ({"PixelSpacing": None}, "no_geometry"),
        ({"PixelSpacing": ["0", "0"]}, "no_geometry"),
        ({"ImageOrientationPatient": ["0", "1", "0", "0", "0", "-1"]}, "not_axial"),
        ({"HighBit": 15}, "high_bit"),
        ({"PixelSpacing": ["1e308", "1e308"]}, "implausible"),
        ({"ImagePositionPatient": ["0", "0", "1e30"]}, "implausible"),
        ({"RescaleSlope": "1e9"}, "implausible"),
        ({"RescaleIntercept": "1e9"}, "implausible"),
        ({"RescaleIntercept": None}, "no_rescale"),
        ({"RescaleSlope": "0"}, "no_rescale"),
        ({"PixelData": None}, "no_pixels"),
        ({"PixelData": bytes(100)}, "truncated_pixels"),
        ({"Rows": 65}, "truncated_pixels"),
    ],
)
def test_each_defect_is_excluded_by_its_own_name(cohort: Cohort, values: dict[str, Any], reason: str) -> None:
    cohort.add_study(1, 3)
    target = cohort.dicom / "ID_000010001.dcm"
    change(target, **values)
    manifest, _, _ = build_manifest(cohort.config())
    assert reasons(manifest) == {"ID_000010000.dcm": "", "ID_000010001.dcm": reason, "ID_000010002.dcm": ""}
    assert account(manifest)["reasons"] == {reason: 1}


def test_file_cut_short_is_excluded(cohort: Cohort) -> None:
    cohort.add_study(1, 2)
    target = cohort.dicom / "ID_000010001.dcm"
    os.truncate(target, target.stat().st_size // 2)
    manifest, _, _ = build_manifest(cohort.config())
    assert reasons(manifest)["ID_000010001.dcm"] == "truncated_pixels"


def test_wrapped_slice_is_repaired_by_name_and_signed_ones_are_left_alone(cohort: Cohort) -> None:
    cohort.add_study(1, 1, form=StoredForm(bits=12, signed=False, intercept="0", wrapped=True))
    cohort.add_study(2, 1, form=StoredForm(bits=12, signed=True, intercept="0"))
    manifest, _, _ = build_manifest(cohort.config())
    assert manifest["reason"].tolist() == ["wrap_12bit", ""]
    assert manifest["status"].tolist() == ["repaired", "used"]


def test_slices_are_in_order_along_the_normal_of_a_tilted_stack(cohort: Cohort) -> None:
    tilt = np.deg2rad(25)
    normal = np.array([0, -np.sin(tilt), np.cos(tilt)])  # of a gantry tilted about the x axis
    orientation = (1.0, 0.0, 0.0, 0.0, float(np.cos(tilt)), float(np.sin(tilt)))
    steps = np.random.default_rng(0).permutation(8)
    for k, step in enumerate(steps.tolist()):
        shift = np.array(
            [0, 200.0 * np.cos(tilt) * (k % 2), 200.0 * np.sin(tilt) * (k % 2)]
        )  # within the plane: z alone would mislead
        place = np.array([-100.0, -100, 10]) + normal * 5 * step + shift
        cohort.add_study(1, 1, image_id=f"ID_{k:09x}", position_mm=tuple(place), orientation=orientation)
        (cohort.dicom / "ID_000010000.dcm").rename(cohort.dicom / f"{k}.dcm")
    manifest, _, _ = build_manifest(cohort.config())
    order = [int(Path(path).stem) for path in manifest["path"]]
    assert steps[order].tolist() == list(range(8))
    np.testing.assert_allclose(np.diff(manifest["position_mm"]), 5, atol=1e-3)
    np.testing.assert_allclose(manifest["tilt_deg"], 25, atol=1e-3)


def test_equal_positions_are_ordered_by_image_id(cohort: Cohort) -> None:
    for image_id in ("ID_000000003", "ID_000000001", "ID_000000002"):
        cohort.add_study(1, 1, image_id=image_id)
        (cohort.dicom / "ID_000010000.dcm").rename(cohort.dicom / f"{9 - int(image_id[-1])}.dcm")
    manifest, _, _ = build_manifest(cohort.config())
    assert manifest["image_id"].tolist() == ["ID_000000001", "ID_000000002", "ID_000000003"]


def test_series_with_most_slices_is_chosen_and_the_other_named(cohort: Cohort) -> None:
    cohort.add_study(1, 5)
    for k in range(2):
        cohort.add_study(1, 1, series_id="ID_other", image_id=f"ID_{k:09x}", position_mm=(0.0, 0.0, float(k)))
        (cohort.dicom / "ID_000010000.dcm").rename(cohort.dicom / f"other{k}.dcm")
    cohort.add_study(1, 5)
    manifest, _, _ = build_manifest(cohort.config())
    assert account(manifest) == {
        "files": 7,
        "slices_found": 7,
        "used": 5,
        "repaired": 0,
        "excluded": 2,
        "reasons": {"other_series": 2},
    }


def test_same_image_identifier_twice_is_used_once(cohort: Cohort) -> None:
    cohort.add_study(1, 3)
    shutil.copy(cohort.dicom / "ID_000010001.dcm", cohort.dicom / "copy.dcm")
    manifest, _, _ = build_manifest(cohort.config())
    assert account(manifest)["reasons"] == {"duplicate": 1}
    assert kept(manifest)["image_id"].is_unique


def test_series_is_chosen_by_its_images_not_by_its_files(cohort: Cohort) -> None:
    cohort.add_study(1, 3)
    other = cohort.dicom / "b"
    for k in range(2):
        cohort.add_study(1, 1, series_id="ID_other", image_id=f"ID_{k:09x}", position_mm=(0.0, 0.0, float(k)))
        other.mkdir(exist_ok=True)
        (cohort.dicom / "ID_000010000.dcm").rename(other / f"{k}.dcm")
    cohort.add_study(1, 3)
    manifest, _, _ = build_manifest(cohort.config(source__dicom=[str(cohort.dicom), str(other)]))
    assert account(manifest)["reasons"] == {"duplicate": 2, "other_series": 2}
    assert account(manifest)["used"] == 3


def test_file_name_that_is_no_utf8_is_excluded_and_the_rest_goes_on(cohort: Cohort) -> None:
    cohort.add_study(1, 2)
    with open(os.fsencode(cohort.dicom) + b"/\xff.dcm", "wb") as file:
        file.write(b"x")
    manifest, _, _ = build_manifest(cohort.config())
    assert account(manifest)["reasons"] == {"unreadable": 1}


@pytest.mark.parametrize("content", [b"", b"rubbish"])
def test_damaged_header_table_is_passed_over(cohort: Cohort, run_stage: Callable[..., Any], content: bytes) -> None:
    cohort.add_study(1, 2)
    cohort.write_params()
    assert run_stage("index").code == 0
    (cohort.data / "index" / "headers.parquet").write_bytes(content)
    ran = run_stage("index")
    assert ran.code == 0
    assert "reading every header anew" in ran.err
    (cohort.data / "index" / "manifest.parquet").write_bytes(content)
    ran = run_stage("preprocess")
    assert ran.code == 1
    assert "run `python -m stages.index` again" in ran.err
    assert "Traceback" not in ran.err


def test_damaged_copy_does_not_push_out_a_whole_one(cohort: Cohort) -> None:
    cohort.add_study(1, 3)
    whole = cohort.dicom / "ID_000010001.dcm"
    first = cohort.dicom / "A_first_by_path.dcm"
    first.write_bytes(whole.read_bytes()[:-500])
    manifest, _, _ = build_manifest(cohort.config())
    assert reasons(manifest)[first.name] == "truncated_pixels"
    assert reasons(manifest)[whole.name] == ""
    assert account(manifest)["used"] == 3


def test_every_file_is_accounted_for_among_rubbish(cohort: Cohort) -> None:
    cohort.add_study(1, 3)
    (cohort.dicom / "notes.txt").write_text("nothing")
    (cohort.dicom / "sub").mkdir()
    (cohort.dicom / "sub" / "empty").touch()
    (cohort.dicom / "ID_000010000.dcm").rename(cohort.dicom / "sub" / "without_suffix")
    manifest, _, _ = build_manifest(cohort.config())
    totals = account(manifest)
    assert totals["files"] == 5 == totals["used"] + totals["repaired"] + totals["excluded"]
    assert totals["reasons"] == {"not_dicom": 2}


def test_reasons_have_a_status_and_a_sentence() -> None:
    assert all(status in ("repaired", EXCLUDED) and sentence for status, sentence in REASONS.values())


def test_unchanged_files_are_not_read_again(cohort: Cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    cohort.add_study(1, 3)
    first, headers, _ = build_manifest(cohort.config())
    read: list[str] = []
    real = pipeline.index.read_headers

    def spy(place: Place, *, patient_salt: str) -> Any:
        read.append(Path(place.container).name)
        return real(place, patient_salt=patient_salt)

    monkeypatch.setattr(pipeline.index, "read_headers", spy)
    second, _, _ = build_manifest(cohort.config(), headers)
    assert read == []
    pd.testing.assert_frame_equal(first, second)
    cohort.add_study(2, 1)
    os.utime(cohort.dicom / "ID_000010001.dcm", ns=(1, 1))
    third, headers, _ = build_manifest(cohort.config(), headers)
    assert sorted(read) == ["ID_000010001.dcm", "ID_000020000.dcm"]
    assert len(third) == 4
    build_manifest(cohort.config(index__patient_salt="other"), headers)
    assert len(read) == 6  # another salt, another key: nothing old may be used


def test_unchanged_zip_is_not_parsed_again_and_a_longer_one_costs_what_is_new(
    cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort.add_study(1, 3)
    archive = cohort.folder / "ct.zip"

    def pack(mode: str) -> None:
        with zipfile.ZipFile(archive, mode) as file:  # type: ignore[call-overload]
            for path in sorted(cohort.dicom.iterdir()):
                file.write(path, path.name)
                path.unlink()

    pack("w")
    first, headers, _ = build_manifest(cohort.config(source__dicom=str(archive)))
    parsed: list[str] = []
    real = zipfile.ZipFile
    monkeypatch.setattr(zipfile, "ZipFile", lambda file: parsed.append("") or real(file))
    second, unchanged, _ = build_manifest(cohort.config(source__dicom=str(archive)), headers)
    assert unchanged is None
    assert not parsed
    pd.testing.assert_frame_equal(first, second)
    monkeypatch.setattr(zipfile, "ZipFile", real)
    cohort.add_study(2, 2)
    pack("a")
    read: list[int] = []
    read_headers = pipeline.index.read_headers
    monkeypatch.setattr(
        pipeline.index, "read_headers", lambda place, **salt: read.append(1) or read_headers(place, **salt)
    )
    third, _, _ = build_manifest(cohort.config(source__dicom=str(archive)), headers)
    assert len(read) == 2
    assert account(third)["used"] == 5


def test_file_that_could_not_be_read_is_asked_again(cohort: Cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    cohort.add_study(1, 3)
    real = pipeline.index.read_headers

    def hiccup(place: Place, *, patient_salt: str) -> Any:
        away = place.container.endswith("0001.dcm")
        return [Header(fault="unreadable")] if away else real(place, patient_salt=patient_salt)

    monkeypatch.setattr(pipeline.index, "read_headers", hiccup)
    manifest, headers, _ = build_manifest(cohort.config())
    assert account(manifest)["reasons"] == {"unreadable": 1}
    monkeypatch.setattr(pipeline.index, "read_headers", real)
    manifest, _, _ = build_manifest(cohort.config(), headers)
    assert account(manifest)["used"] == 3


def test_manifest_does_not_depend_on_the_workers(cohort: Cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        cohort.add_study(number, 4)
    alone, _, _ = build_manifest(cohort.config())
    monkeypatch.setattr(pipeline.index, "FILES_PER_TASK", 3)
    shared, _, _ = build_manifest(cohort.config(preprocess__workers=1))
    pd.testing.assert_frame_equal(alone, shared)


def test_labels_are_joined_and_what_does_not_match_is_counted(cohort: Cohort) -> None:
    cohort.add_study(1, 3, labels=[[0, 0, 0, 0, 1, 1], None, [0] * 6])
    cohort.labels["ID_absent"] = [0] * 6
    manifest, _, found = build_manifest(cohort.config())
    assert manifest["subdural"].tolist() == [1, -1, 0]
    assert (found["slices_with_labels"], found["slices_without_labels"], found["labelled_images_not_found"]) == (
        2,
        1,
        1,
    )
    assert found["positive_slices"]["any"] == 1


def test_several_sources_and_single_files_are_taken_together(cohort: Cohort) -> None:
    cohort.add_study(1, 2)
    other = cohort.folder / "other.dcm"
    (cohort.dicom / "ID_000010001.dcm").rename(other)
    manifest, _, _ = build_manifest(cohort.config(source__dicom=[str(cohort.dicom), str(other)]))
    assert manifest["source"].tolist() == [0, 1]
    assert account(manifest)["used"] == 2


def test_linked_folders_are_followed_once(cohort: Cohort) -> None:
    cohort.add_study(1, 2)
    (cohort.dicom / "loop").symlink_to(cohort.dicom)
    assert len(find_files([str(cohort.dicom)])) == 2


def test_missing_source_empty_folder_and_no_slice_are_errors(cohort: Cohort) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        build_manifest(cohort.config())
    cohort.dicom.mkdir()
    with pytest.raises(SourceError, match="no file in"):
        build_manifest(cohort.config())
    (cohort.dicom / "x").write_text("nothing")
    with pytest.raises(
        SourceError, match=r"1 files found, none of them a usable axial CT slice \(1 × not a DICOM file\)"
    ):
        build_manifest(cohort.config())


def test_bad_label_csv_stops_the_stage_with_a_message(cohort: Cohort, run_stage: Callable[..., Any]) -> None:
    cohort.add_study(1, 1)
    cohort.write_params()
    (cohort.folder / "labels.csv").write_text("image,target\n")
    ran = run_stage("index")
    assert ran.code == 1
    assert "expected the header ID,Label" in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.skipif(not REAL_DICOM.is_dir(), reason="the real head CTs are not here")
def test_real_heads_are_accounted_for(cohort: Cohort) -> None:
    manifest, _, found = build_manifest(cohort.config(source__dicom=str(REAL_DICOM)))
    totals = account(manifest)
    assert (totals["files"], totals["used"], totals["excluded"]) == (88, 68, 20)
    assert totals["reasons"] == {
        "other_series": 10,
        "colour": 3,
        "not_axial": 3,
        "dicomdir": 2,
        "localizer": 1,
        "not_dicom": 1,
    }
    assert found["studies"] == 3
    counts = kept(manifest).groupby(["study_uid"]).size()
    assert sorted(counts) == [12, 28, 28]
    for _, study in kept(manifest).groupby("study_uid"):
        numbers = [pydicom.dcmread(REAL_DICOM / path, stop_before_pixels=True).InstanceNumber for path in study["path"]]
        assert numbers == sorted(numbers)  # the scanner's own order
