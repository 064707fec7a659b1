"""Results as DICOM: dciodvfy, pydicom and highdicom read them, they say what predict says, and the patient is in them alone."""

from __future__ import annotations

import argparse
import ast
import json
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import cv2
import highdicom
import numpy as np
import pydicom
import pytest
import torch
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import (
    ComprehensiveSRStorage,
    CTImageStorage,
    EnhancedCTImageStorage,
    SecondaryCaptureImageStorage,
    generate_uid,
)

import pipeline.dicom_out
import stages.predict
from pipeline.answer import SliceFile, Study
from pipeline.config import load_config
from pipeline.dicom_out import (
    BAND_PX,
    CAPTURE_PX,
    FINDINGS,
    METHODS,
    NOTICE,
    OPERATING_POINT,
    REACHES,
    RENAMED,
    Coded,
    read_sources,
    remove_studies,
    write_study,
)
from pipeline.errors import SourceError
from pipeline.labels import LABELS
from pipeline.model import build_model
from pipeline.operating import OperatingPoints, Point
from pipeline.place import Place
from pipeline.predict import index_studies, predict_studies
from pipeline.sheet import blend_heat
from pipeline.survey import SCOPE
from pipeline.trained import Model, read_model
from tests.conftest import REAL_DICOM, ROOT, Cohort

pytestmark = pytest.mark.filterwarnings("ignore:Invalid value for VR UI")

MADE = datetime(2026, 11, 24, 10, 20, 30)
NAME = "Müller^Jürgen"
POINTS = OperatingPoints(
    studies={**dict.fromkeys(LABELS, Point()), "any": Point(2.0, 0.01), "subdural": Point(0.5, 0.99)},
    slices={**dict.fromkeys(LABELS, Point()), "any": Point(2.0, 0.5)},
    origin={"file": "points.json", "rule": "as given"},
)


@dataclass
class Written:
    """A study, and what was written of it."""

    study: Study
    folder: Path

    @property
    def report(self) -> Dataset:
        return pydicom.dcmread(self.folder / "report.dcm")

    @property
    def captures(self) -> list[Dataset]:
        return [pydicom.dcmread(path) for path in sorted(self.folder.glob("capture-*.dcm"))]

    @property
    def all(self) -> list[Dataset]:
        return [self.report, *self.captures]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's file as training leaves it, with the weights that a network starts with: it need not be right here."""
    params = load_config(ROOT / "params.yaml").train.model_dump()
    params["sequence"]["kind"] = "none"
    windows = {"brain": {"centre": 40.0, "width": 80.0}, "bone": {"centre": 600.0, "width": 2800.0}}
    channels = len(windows) * (2 * params["neighbours"] + 1)
    torch.manual_seed(1)
    network = build_model(params["model"], channels=channels, dropout=params["dropout"])
    content = {
        "members": [network.state_dict()],
        "sequence": None,
        "windows": windows,
        "image_size": 64,
        "params": params,
        "fold": 0,
        "store_digest": "0" * 64,
        "crop": "none",
        "scope": dict.fromkeys(SCOPE),
    }
    path = tmp_path_factory.mktemp("run") / "model.pt"
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def model(model_path: Path) -> Model:
    return read_model([model_path], device="cpu", store=model_path.parent)


def make_hospital(folder: Path, **changes: Any) -> None:
    """Headers as a hospital's: true UIDs, and a patient."""
    given = {
        "SpecificCharacterSet": "ISO_IR 100",
        "SOPClassUID": CTImageStorage,
        "PatientName": NAME,
        "PatientID": "4711",
        "PatientBirthDate": "19451106",
        "PatientSex": "F",
        "StudyDate": "20200229",
        "StudyTime": "235959.5",
        "StudyDescription": "Schädel",
        "StudyID": "S1",
        "AccessionNumber": "A17",
        "ReferringPhysicianName": "Groß^Änne",
        **changes,
    }
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
            dataset[name].value = generate_uid(entropy_srcs=[str(dataset[name].value)])
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        for name, value in given.items():
            setattr(dataset, name, value)
        dataset.save_as(path)


def predicted(paths: list[Path], cohort: Cohort, model: Model, points: OperatingPoints = POINTS, **more: Any) -> Study:
    """By the pipeline's own way; a disk is no head, so it must be told to go on."""
    texts, config = [str(path) for path in paths], cohort.config()
    manifest = index_studies(texts, config)
    folder = cohort.folder / "sheets"
    (study,) = predict_studies(manifest, model, config, paths=texts, sheets=folder, anyway=True, points=points, **more)
    return study


def write(cohort: Cohort, model: Model, *, name: str = "0000", **more: Any) -> Written:
    study = predicted([cohort.dicom], cohort, model, **more)
    write_study(cohort.folder / name, study, model, made=MADE)
    return Written(study, cohort.folder / name)


@pytest.fixture
def hospital(cohort: Cohort) -> Cohort:
    cohort.add_study(3, 9)
    make_hospital(cohort.dicom)
    return cohort


# ---- what is said


def find(items: Any, name: Any) -> list[Dataset]:
    """The content items of that concept."""
    value = name.value if hasattr(name, "value") else name[0]
    return [
        item
        for item in items
        if "ConceptNameCodeSequence" in item and coded(item.ConceptNameCodeSequence[0])[0] == value
    ]


def coded(code: Dataset) -> Coded:
    return (code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning)


def check_group(group: Any, label: str, study: Study, uids: list[str], model: Model) -> None:
    """One measurement group, as highdicom reads it, says what the study says of the label."""
    assert (group.finding_type.value, group.finding_type.meaning) == FINDINGS[label][0][::2]
    assert [site.value.value for site in group.finding_sites] == [FINDINGS[label][1][0]]
    (probability,) = group.get_measurements(codes.DCM.Probability)
    calibrated, called = study.calibrated[label], study.called[label]
    assert probability.value == pytest.approx(calibrated or study.probabilities[label], abs=1e-6)
    assert probability.unit == codes.UCUM.NoUnits
    (method,) = find(probability[0].ContentSequence, codes.SCT.MeasurementMethod)
    assert coded(method.ConceptCodeSequence[0]) == METHODS[calibrated is not None]
    assert study.table is not None
    (image,) = probability.referenced_images
    assert image.referenced_sop_instance_uid == uids[int(study.table[label].argmax())]
    points = find(group[0].ContentSequence, OPERATING_POINT)
    reached = find(group[0].ContentSequence, REACHES)
    if called is None:
        assert not points
        assert not reached
    else:
        assert points[0].MeasuredValueSequence[0].NumericValue == study.points.studies[label].threshold
        assert reached[0].ConceptCodeSequence[0].CodeMeaning == ("Yes" if called else "No")
    (version,) = find(group[0].ContentSequence, codes.DCM.AlgorithmVersion)
    (algorithm,) = find(group[0].ContentSequence, codes.DCM.AlgorithmName)
    assert (algorithm.TextValue, version.TextValue) == ("Ichor", model.digest)


def test_the_report_says_of_each_label_what_predict_says(hospital: Cohort, model: Model) -> None:
    written = write(hospital, model)
    study = written.study
    assert study.called == {**dict.fromkeys(LABELS), "any": True, "subdural": False}
    assert study.table is not None
    uids = study.table["image_id"].tolist()
    report = highdicom.sr.srread(written.folder / "report.dcm")
    assert report.SOPClassUID == ComprehensiveSRStorage
    assert coded(report.ConceptNameCodeSequence[0])[0] == "126000"  # Imaging Measurement Report, the root of TID 1500
    assert report.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    assert (report.VerificationFlag, report.PreliminaryFlag, report.CompletionFlag) == (
        "UNVERIFIED",
        "PRELIMINARY",
        "COMPLETE",
    )
    groups = report.content.get_image_measurement_groups()
    assert len(groups) == len(LABELS)
    for label in LABELS:
        (group,) = (one for one in groups if one.tracking_identifier == f"Ichor {label}")
        check_group(group, label, study, uids, model)
    (observer,) = find(report.ContentSequence, codes.DCM.ObserverType)
    assert observer.ConceptCodeSequence[0].CodeMeaning == "Device"
    (library,) = find(report.ContentSequence, codes.DCM.ImageLibrary)
    images = [item for item in library.ContentSequence[0].ContentSequence if item.ValueType == "IMAGE"]
    assert [item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for item in images] == uids
    comments = [item.TextValue for item in find(report.ContentSequence, codes.DCM.Comment)]
    assert comments[0] == NOTICE
    assert [text for text in comments if text.startswith("Warning")] == [f"Warning: {text}" for text in study.warnings]
    assert any("no head found" in text for text in comments)
    assert not any("no operating point" in text or RENAMED in text for text in comments)


def test_without_operating_points_it_says_that_nothing_is_calibrated(hospital: Cohort, model: Model) -> None:
    written = write(hospital, model, points=OperatingPoints(why_not=f"{NAME}: none"))
    comments = [item.TextValue for item in find(written.report.ContentSequence, codes.DCM.Comment)]
    assert any("There is no operating point" in text for text in comments)
    for group in highdicom.sr.srread(written.folder / "report.dcm").content.get_image_measurement_groups():
        (probability,) = group.get_measurements(codes.DCM.Probability)
        (method,) = find(probability[0].ContentSequence, codes.SCT.MeasurementMethod)
        assert coded(method.ConceptCodeSequence[0]) == METHODS[False]


def test_codes_that_the_standard_has_are_its_own() -> None:
    assert FINDINGS.keys() == set(LABELS)
    own = {
        "any": (codes.SCT.IntracranialHemorrhage, codes.SCT.IntracranialStructure),
        "epidural": (None, codes.SCT.IntracranialStructure),
        "intraparenchymal": (None, codes.SCT.Brain),
        "intraventricular": (codes.SCT.IntracranialHemorrhage, codes.SCT.BrainVentricle),
        "subarachnoid": (None, codes.SCT.CranialSubarachnoidSpace),
        "subdural": (None, codes.SCT.IntracranialStructure),
    }
    for label, standard in own.items():
        for (value, scheme, _), code in zip(FINDINGS[label], standard, strict=True):
            assert code is None or (code.value, code.scheme_designator) == (value, scheme)


def test_captures_show_the_most_suspicious_slices_with_their_heat(hospital: Cohort, model: Model) -> None:
    written = write(hospital, model)
    study = written.study
    assert study.table is not None
    assert study.suspects is not None
    assert study.suspects.heat_KRC is not None
    worst = np.argsort(-study.table["any"].to_numpy(), kind="stable")[:3]
    assert len(written.captures) == 3
    for number, capture in zip(worst.tolist(), written.captures, strict=True):
        assert capture.SOPClassUID == SecondaryCaptureImageStorage
        assert (capture.PhotometricInterpretation, capture.BitsAllocated, capture.SamplesPerPixel) == ("RGB", 8, 3)
        source = capture.SourceImageSequence[0]
        assert source.ReferencedSOPInstanceUID == study.table["image_id"][number]
        place = study.suspects.slices.tolist().index(number)
        size = (CAPTURE_PX, CAPTURE_PX)
        grey_RC = cv2.resize(study.suspects.pixels_KRCW[place, ..., 0].copy(), size, interpolation=cv2.INTER_CUBIC)
        heat_RC = cv2.resize(study.suspects.heat_KRC[place], size, interpolation=cv2.INTER_LINEAR)
        shown_RC3 = capture.pixel_array[BAND_PX:-BAND_PX]
        np.testing.assert_array_equal(shown_RC3, blend_heat(grey_RC, heat_RC))
        assert (capture.pixel_array[:BAND_PX] > 200).any(), "there is text above"
        assert (capture.pixel_array[-BAND_PX:] > 200).any(), "and below"


def test_without_heat_a_capture_is_the_slice_alone(hospital: Cohort, model: Model) -> None:
    for capture in write(hospital, model, heat=False).captures:
        shown_RC3 = capture.pixel_array[BAND_PX:-BAND_PX]
        assert (shown_RC3 == shown_RC3[..., :1]).all()
        assert "slices" in capture.SeriesDescription


# ---- whose they are


def test_objects_belong_to_the_study_and_its_patient(hospital: Cohort, model: Model) -> None:
    source = pydicom.dcmread(next(hospital.dicom.iterdir()))
    series = set()
    for one in write(hospital, model).all:
        assert one.StudyInstanceUID == source.StudyInstanceUID
        assert one.SeriesInstanceUID != source.SeriesInstanceUID
        series.add(one.SeriesInstanceUID)
        assert one.PatientName == NAME
        assert one.ReferringPhysicianName == "Groß^Änne"
        for name in (
            "PatientID",
            "PatientBirthDate",
            "PatientSex",
            "StudyDate",
            "StudyTime",
            "StudyID",
            "AccessionNumber",
        ):
            assert one[name].value == source[name].value
        assert one.StudyDescription == "Schädel"
        assert (one.ContentDate, one.ContentTime) == ("20261124", "102030")
    assert len(series) == 2, "one of the report, one of the captures"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"SpecificCharacterSet": ["", "ISO 2022 IR 87"], "PatientName": "Yamada^Tarou=山田^太郎"},
            {"PatientName": "Yamada^Tarou=山田^太郎"},
        ),
        ({"SpecificCharacterSet": "ISO_IR 999", "PatientName": "Doe"}, {"PatientName": "Doe"}),
        (
            {"PatientName": "", "PatientBirthDate": "6.11.45", "PatientSex": "female", "StudyTime": "noon"},
            {"PatientName": "", "PatientBirthDate": "", "PatientSex": "", "StudyTime": ""},
        ),
        (
            {"PatientID": "a\\b", "AccessionNumber": "1\n2", "PatientBirthDate": "19450000", "StudyTime": "2459"},
            {"PatientID": "a", "AccessionNumber": "12", "PatientBirthDate": "", "StudyTime": ""},
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value for VR", "ignore:Unknown encoding", "ignore:Incorrect value")
def test_odd_headers_are_carried_as_far_as_they_mean_something(
    cohort: Cohort, model: Model, changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    cohort.add_study(3, 8)
    make_hospital(cohort.dicom, **changes)
    for one in write(cohort, model, heat=False).all:
        assert one.SpecificCharacterSet == "ISO_IR 192"
        for name, value in expected.items():
            assert one[name].value == value, name


def test_a_study_in_rsnas_form_gets_uids_and_the_report_says_so(cohort: Cohort, model: Model) -> None:
    cohort.add_study(3, 8)
    written = write(cohort, model)
    for one in written.all:
        assert all(one[name].value.is_valid for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"))
        assert one.PatientID == "ID_00000003"
        assert one.PatientName == one.AccessionNumber == one.StudyDate == ""
    assert len({one.StudyInstanceUID for one in written.all}) == 1
    comments = [item.TextValue for item in find(written.report.ContentSequence, codes.DCM.Comment)]
    assert f"Warning: {RENAMED}" in comments


def test_the_same_study_and_model_give_the_same_objects_from_a_zip_too(hospital: Cohort, model: Model) -> None:
    first = write(hospital, model)
    packed = hospital.folder / "study.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(hospital.dicom.iterdir()):
            file.write(path, f"deep/{path.name}")
    write_study(hospital.folder / "zip", predicted([packed], hospital, model), model, made=MADE)
    names = sorted(path.name for path in first.folder.iterdir())
    assert names == ["capture-1.dcm", "capture-2.dcm", "capture-3.dcm", "report.dcm"]
    for name in names:
        assert (hospital.folder / "zip" / name).read_bytes() == (first.folder / name).read_bytes()


def test_uids_follow_what_is_said_and_not_the_clock(hospital: Cohort, model: Model) -> None:
    first = write(hospital, model)
    write_study(hospital.folder / "later", first.study, model, made=datetime(2027, 1, 1))
    later = Written(first.study, hospital.folder / "later")
    other = write(hospital, model, name="other", points=OperatingPoints())
    assert [one.SOPInstanceUID for one in later.all] == [one.SOPInstanceUID for one in first.all]
    assert later.report.ContentDate == "20270101"
    assert not {one.SOPInstanceUID for one in other.all} & {one.SOPInstanceUID for one in first.all}


# ---- what cannot be done


def place_of(path: Path) -> Place:
    return Place(str(path), path.stat().st_size, path.stat().st_mtime_ns)


def test_a_slice_without_a_study_is_refused_in_words(hospital: Cohort) -> None:
    paths = sorted(hospital.dicom.iterdir())[:2]
    lacking = pydicom.dcmread(paths[1])
    del lacking.StudyInstanceUID
    lacking.save_as(paths[1])
    with pytest.raises(
        SourceError, match=r"slice 1 has no StudyInstanceUID \(0020,000D\).*run without --dicom"
    ) as raised:
        read_sources([SliceFile(place_of(path), -1) for path in paths])
    assert NAME not in str(raised.value)


def test_frames_of_a_file_are_named_from_one(hospital: Cohort) -> None:
    place = place_of(next(hospital.dicom.iterdir()))
    sources = read_sources([SliceFile(place, frame) for frame in (4, 0)])
    assert [sources.refer(k)["referenced_frame_numbers"] for k in (0, 1)] == [[5], [1]]
    assert read_sources([SliceFile(place, -1)]).refer(0)["referenced_frame_numbers"] is None


def test_what_lies_beside_earlier_results_stays(tmp_path: Path) -> None:
    for name in ("0000/report.dcm", "0000/capture-1.dcm", "0001/report.dcm", "0001/mine.txt", "0002-mine/report.dcm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    remove_studies(tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["0001/mine.txt", "0002-mine/report.dcm"]
    assert not (tmp_path / "0000").exists()


# ---- the door


@pytest.fixture
def run_door(hospital: Cohort, model_path: Path) -> Callable[..., int]:
    """`stages.predict`'s own main; its exit code."""

    def run(*arguments: str) -> int:
        parser = argparse.ArgumentParser()
        stages.predict.add_arguments(parser)
        parsed = parser.parse_args(
            [str(hospital.dicom), "--model", str(model_path), "--out", str(hospital.folder / "out"), *arguments]
        )
        parsed.params, parsed.data = hospital.write_params(), hospital.data
        try:
            stages.predict.main(parsed)
        except SystemExit as left:
            return int(left.code or 0)
        return 0

    return run


def test_the_patient_is_in_the_objects_and_nowhere_else(
    hospital: Cohort, run_door: Callable[..., int], capsys: Any, caplog: Any, recwarn: Any
) -> None:
    assert run_door("--dicom", "--anyway") == 0
    out = hospital.folder / "out"
    written = sorted(path for path in out.rglob("*") if path.is_file())
    names = [str(path.relative_to(out)) for path in written]
    objects = [path for path in written if path.suffix == ".dcm"]
    assert [str(path.relative_to(out)) for path in objects] == [
        *(f"dicom/0000/capture-{k}.dcm" for k in (1, 2, 3)),
        "dicom/0000/report.dcm",
    ]
    for path in objects:
        assert "Müller".encode() in path.read_bytes()
    captured = capsys.readouterr()
    said = [captured.out, captured.err, caplog.text, *(str(one.message) for one in recwarn), *names]
    others = [path.read_bytes() for path in written if path.suffix != ".dcm"]
    assert len(others) == 4
    for content in [*others, *(text.encode() for text in said)]:
        for secret in ("Müller", "ller^J", "4711", "19451106", "20200229", "Schädel", "A17", "Groß"):
            assert secret.encode() not in content
            assert secret.encode("latin-1") not in content
    assert run_door("--dicom") == 3  # a disk is no head: refused, and of the first run nothing is left
    assert not list((out / "dicom").iterdir())


def test_a_study_without_objects_is_told_when_all_else_is_written(
    hospital: Cohort, run_door: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stages.predict.write_study

    def write_late(*arguments: Any, **more: Any) -> None:
        next(hospital.dicom.iterdir()).touch()  # as if somebody wrote the file anew, after it was predicted
        whole(*arguments, **more)

    monkeypatch.setattr(stages.predict, "write_study", write_late)
    with pytest.raises(
        SourceError, match=r"no DICOM objects of 1 study.*the file of slice \d changed, or went away"
    ) as raised:
        run_door("--dicom", "--anyway")
    assert NAME not in str(raised.value)
    result = json.loads((hospital.folder / "out" / "predictions.json").read_bytes())
    assert result["studies"][0]["probabilities"]
    assert not (hospital.folder / "out" / "dicom").exists()


def test_start_up_does_not_wait_for_highdicom() -> None:
    tree = ast.parse(Path(pipeline.dicom_out.__file__).read_text())
    at_once = {ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)}
    late = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)} - at_once
    assert late == {"import highdicom", "from pydicom.sr.codedict import codes"}  # 0.4 s


# ---- the standard's own judge


def complaints(folder: Path) -> list[str]:
    """What dciodvfy finds wrong; it must have recognised what each file is."""
    found = []
    for path in sorted(folder.glob("*.dcm")):
        done = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, errors="replace", check=False)
        said = (done.stdout + done.stderr).splitlines()
        assert ("ComprehensiveSR" if path.name == "report.dcm" else "SCImage") in said, said
        found += [f"{path.name}: {line}" for line in said if line.startswith(("Error", "Abort"))]
    return found


@pytest.mark.program("dciodvfy")
@pytest.mark.parametrize(
    "changes",
    [
        None,
        {},
        {"SpecificCharacterSet": ["", "ISO 2022 IR 87"], "PatientName": "Yamada^Tarou=山田^太郎"},
        {"PatientName": "", "PatientBirthDate": "6.11.45", "PatientSex": "female", "StudyID": ""},
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_dciodvfy_finds_no_error(cohort: Cohort, model: Model, changes: dict[str, Any] | None) -> None:
    cohort.add_study(3, 8)
    if changes is not None:  # else in RSNA's form
        make_hospital(cohort.dicom, **changes)
    assert complaints(write(cohort, model).folder) == []


@pytest.mark.program("dciodvfy")
def test_dciodvfy_finds_no_error_where_slices_are_frames_of_a_file(hospital: Cohort, model: Model) -> None:
    study = write(hospital, model).study
    path = next(hospital.dicom.iterdir())
    enhanced = pydicom.dcmread(path)
    enhanced.SOPClassUID = enhanced.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    enhanced.save_as(path)
    frames = [SliceFile(place_of(path), frame) for frame in range(study.slices)]
    write_study(hospital.folder / "frames", study._replace(files=frames), model, made=MADE)
    written = Written(study, hospital.folder / "frames")
    assert complaints(written.folder) == []
    source = written.captures[0].SourceImageSequence[0]
    assert source.ReferencedSOPInstanceUID == enhanced.SOPInstanceUID
    assert source.ReferencedFrameNumber == (study.suspicious_slice or 0) + 1


@pytest.mark.program("dciodvfy")
def test_dciodvfy_would_find_one(hospital: Cohort, model: Model) -> None:
    written = write(hospital, model)
    report, capture = written.report, written.captures[0]
    del report.CompletionFlag
    report.save_as(written.folder / "report.dcm")
    del capture.ConversionType
    capture.save_as(written.folder / "capture-1.dcm")
    assert {line.split(":")[0] for line in complaints(written.folder)} == {"report.dcm", "capture-1.dcm"}


@pytest.mark.program("dciodvfy")
@pytest.mark.skipif(not REAL_DICOM.is_dir(), reason="the real head CTs are not here")
def test_real_heads_give_objects_without_an_error(cohort: Cohort, model: Model) -> None:
    shutil.copytree(REAL_DICOM / "ge-head-trauma", cohort.dicom)
    written = write(cohort, model)
    source = pydicom.dcmread(next(cohort.dicom.iterdir()), stop_before_pixels=True)
    assert {str(one.StudyInstanceUID) for one in written.all} == {str(source.StudyInstanceUID)}
    assert complaints(written.folder) == []
