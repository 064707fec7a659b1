"""A study's result as DICOM: a Structured Report by TID 1500, and Secondary Captures of the most suspicious slices.

They belong to the study that was read, and carry its patient: an object without one would be filed nowhere. Nothing else that is
written, printed or raised here holds any of that. highdicom quotes in a warning what it dislikes about a name; so it is given none,
and the patient is filled in when it is done.
Axes: S slices of the study, K of them suspects, L labels, R rows, C columns.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import pydicom
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import Dataset
from pydicom.uid import UID, CTImageStorage, generate_uid

from pipeline.answer import SliceFile, Study
from pipeline.errors import SourceError
from pipeline.files import written_whole
from pipeline.header import read_quietly
from pipeline.labels import ANY, LABELS, SUBTYPES
from pipeline.operating import CALIBRATED
from pipeline.place import ChangedError, Place, read_whole
from pipeline.sheet import BACKGROUND, INK, POSITIVE, QUIET, blend_heat
from pipeline.trained import Model

NAME = "Ichor"
NOTICE = "Research software, not a medical device; not for diagnosis."
RENAMED = "the study's own identifiers are no DICOM UIDs: UIDs derived from them stand here, and an archive will not file this with it"

REPORT, CAPTURE, CAPTURES_WRITTEN = "report.dcm", "capture-{}.dcm", "capture-*.dcm"

CAPTURES = 3
"""Slices shown, the most suspicious first; a study has `pipeline.predict.SUSPECTS` to take them from."""

CAPTURE_PX, BAND_PX, FONT_PX = 512, 40, 14
"""Side of the slice in a capture, a scanner's own; and the bands of text above and below it, of two lines."""

DECIMALS = 6
"""Of probabilities: a decimal string has 16 characters (PS3.5 6.2)."""

REPORT_SERIES, CAPTURE_SERIES = 9001, 9002
"""Series Number (0020,0011): behind all of a scanner's own."""

Coded = tuple[str, str, str]
"""Code Value, Coding Scheme Designator, Code Meaning (PS3.3 8.1)."""

OWN_SCHEME = "99ICHOR"
"""99 marks a scheme of one's own (PS3.3 8.2): for what no standard has a code."""

METHODS: dict[bool, Coded] = {
    True: ("CALIBRATED", OWN_SCHEME, "Calibrated by a temperature fitted on held-out studies"),
    False: ("UNCALIBRATED", OWN_SCHEME, "As the network says it, not calibrated"),
}
OPERATING_POINT: Coded = ("OPERATING_POINT", OWN_SCHEME, "Operating point of the probability")
REACHES: Coded = ("REACHES", OWN_SCHEME, "Probability reaches the operating point")

INTRACRANIAL: Coded = ("128319008", "SCT", "Intracranial structure")
HEMORRHAGE: Coded = ("1386000", "SCT", "Intracranial hemorrhage")

FINDINGS: dict[str, tuple[Coded, Coded]] = {
    "epidural": (("82999001", "SCT", "Epidural intracranial hemorrhage"), INTRACRANIAL),
    "intraparenchymal": (("274100004", "SCT", "Cerebral hemorrhage"), ("12738006", "SCT", "Brain")),
    "intraventricular": (HEMORRHAGE, ("35764002", "SCT", "Brain ventricle")),
    "subarachnoid": (
        ("21454007", "SCT", "Subarachnoid intracranial hemorrhage"),
        ("33930006", "SCT", "Cranial subarachnoid space"),
    ),
    "subdural": (("35486000", "SCT", "Subdural intracranial hemorrhage"), INTRACRANIAL),
    "any": (HEMORRHAGE, INTRACRANIAL),
}
"""Finding and its site in SNOMED CT.

Sites: DICOM PS3.16, as pydicom's dictionary of its codes has them (a test looks them up). 1386000, 274100004, 21454007: OHDSI's concept
set "intracranial bleed Hemorrhagic stroke" (OHDSI/Legend, inst/cohorts); the first also PS3.16 (and once by mistake "occlusion of
artery", which is 2929001) and the examples of HL7 FHIR. 35486000: the labels of the MR-RATE set, and the OMOP vocabulary. 82999001: the
OMOP vocabulary alone. Bleeding into a ventricle was found under four codes that contradict each other; so it is hemorrhage at that site.
"""

DATE = r"\d{4}(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])"
PATTERNS = {
    "PatientBirthDate": DATE,
    "PatientSex": r"[MFO]",
    "PatientAge": r"\d{3}[DWMY]",
    "StudyDate": DATE,
    "StudyTime": r"([01]\d|2[0-3])([0-5]\d([0-5]\d(\.\d{1,6})?)?)?",
}
"""What these must look like (PS3.5 6.2); one that does not is left empty, as if unknown."""

TYPE_2 = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
    *("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"),
)
OPTIONAL = ("IssuerOfPatientID", "StudyDescription", "PatientAge")
"""Of the patient and study modules (PS3.3 C.7.1.1, C.7.2.1, C.7.2.2) these go over; the first are there even if empty."""

UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")


class Sources(NamedTuple):
    """What is needed of the headers of a study's slices."""

    identity: Dataset
    """Patient and study."""
    slices: list[Dataset]
    """`UIDS`, all valid, and what else highdicom asks for."""
    frames: list[int]
    """From 1; 0 where a file is one slice."""
    is_renamed: bool
    """Whether some identifier was no UID, and one derived from it takes its place."""

    @property
    def study_uid(self) -> str:
        return str(self.slices[0].StudyInstanceUID)

    def refer(self, number: int) -> dict[str, Any]:
        """The arguments by which highdicom refers to a slice."""
        one, frame = self.slices[number], self.frames[number]
        return {
            "referenced_sop_class_uid": one.SOPClassUID,
            "referenced_sop_instance_uid": one.SOPInstanceUID,
            "referenced_frame_numbers": [frame] if frame else None,
        }


# ---- the files


def write_study(folder: Path, study: Study, model: Model, *, made: datetime, captures: int = CAPTURES) -> None:
    """Write ``report.dcm``, ``capture-1.dcm`` and so on; the same arguments give the same bytes.

    UIDs follow from the slices, the model and what is said: who reads a study twice stores its objects once.

    Args:
        folder: whose name says nothing of the patient.
        study: predicted, with its suspects.
        model: that predicted it.
        made: Content Date and Time.
        captures: how many slices are shown.

    Raises:
        SourceError: a file has changed since it was predicted, or its header has no StudyInstanceUID.
    """
    sources = read_sources(study.files)
    report = make_report(sources, study, model, made=made)
    shown = make_captures(sources, study, model, made=made, count=captures)
    _write(folder / REPORT, report)
    for number, capture in enumerate(shown, start=1):
        _write(folder / CAPTURE.format(number), capture)


def remove_studies(folder: Path) -> None:
    """Remove what an earlier run wrote, one numbered folder a study, and nothing else."""
    for old in (path for path in folder.glob("*") if path.name.isdigit()):
        for path in [old / REPORT, *old.glob(CAPTURES_WRITTEN)]:
            path.unlink(missing_ok=True)
        with suppress(OSError):  # something else is in it
            old.rmdir()


def _write(path: Path, dataset: Dataset) -> None:
    with _quiet(), written_whole(path) as temporary:
        dataset.save_as(temporary, enforce_file_format=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """No warning: pydicom's and highdicom's quote what they warn of, a name perhaps."""
    settings = pydicom.config.settings
    mode = settings.writing_validation_mode
    settings.writing_validation_mode = pydicom.config.IGNORE
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        settings.writing_validation_mode = mode


# ---- what is taken from the slices


def read_sources(files: Sequence[SliceFile]) -> Sources:
    """Read the headers of a study's slices.

    Raises:
        SourceError: a file has changed since it was predicted, or has no StudyInstanceUID.
    """
    headers: dict[Place, Dataset] = {}
    for number, (place, _) in enumerate(files):
        if place not in headers:  # a multi-frame file holds many slices
            headers[place] = _read_header(place, number)
    ordered = [headers[one.place] for one in files]
    slices = [_identify(header, number) for number, header in enumerate(ordered)]
    is_renamed = any(str(ordered[k].get(name)) != one[name].value for k, one in enumerate(slices) for name in UIDS)
    return Sources(_read_identity(ordered[0]), slices, [one.frame + 1 for one in files], is_renamed)


def _read_header(place: Place, number: int) -> Dataset:
    wanted: list[Any] = [*UIDS, "SOPClassUID", *TYPE_2, *OPTIONAL]
    try:
        return read_quietly(io.BytesIO(read_whole(place)), force=True, specific_tags=wanted)
    except ChangedError:
        raise SourceError(
            f"the file of slice {number} changed, or went away, since it was predicted; run again"
        ) from None


def _identify(header: Dataset, number: int) -> Dataset:
    """The identifiers of one slice, none of which says more than it must."""
    if not str(header.get("StudyInstanceUID") or ""):
        raise SourceError(
            f"slice {number} has no StudyInstanceUID (0020,000D): a DICOM object must say which study it belongs to; "
            f"run without --dicom"
        )
    identified = Dataset()
    for name in UIDS:
        text = str(header.get(name) or "")
        renamed = _uid("renamed", name, str(header.StudyInstanceUID), text)  # a series may be without a name
        setattr(identified, name, text if _is_uid(text) else renamed)
    kind = str(header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID") or "")
    identified.SOPClassUID = kind if _is_uid(kind) else CTImageStorage  # RSNA's files have none
    identified.Modality = "CT"
    for name in TYPE_2:
        setattr(identified, name, "")
    return identified


def _is_uid(text: str) -> bool:
    """Whether it is a UID (PS3.5 9.1) under one of the three roots that there are (ISO 9834-1)."""
    return UID(text).is_valid and text[:2] in ("0.", "1.", "2.")


def _read_identity(header: Dataset) -> Dataset:
    """Patient and study, in UTF-8 whatever they were in; what is not as it must be is left empty."""
    identity = Dataset()
    identity.SpecificCharacterSet = "ISO_IR 192"
    with _quiet():
        for name in (*TYPE_2, *OPTIONAL):
            text = _read_text(header, name)
            if name in PATTERNS and not re.fullmatch(PATTERNS[name], text):
                text = ""
            if text or name in TYPE_2:
                setattr(identity, name, text)
    return identity


def _read_text(header: Dataset, name: str) -> str:
    """One attribute, decoded; its first value if a stray backslash makes it several; empty where a parser gives it up."""
    try:
        value = header.get(name)
        values = value if isinstance(value, pydicom.multival.MultiValue) else [value]
        text = "" if not values or values[0] is None else str(values[0])
    except Exception:  # a damaged header makes pydicom raise anything
        return ""
    return re.sub(r"[\x00-\x1f\x7f\\]", "", text).strip()  # not allowed in any of these (PS3.5 6.2)


# ---- the objects


def _highdicom() -> Any:
    """highdicom, imported where it is needed: 0.4 s with its codes, that a run without it need not pay."""
    import highdicom

    logging.getLogger("highdicom").setLevel(logging.CRITICAL)  # what it says of a header may quote it
    return highdicom


def _codes() -> Any:
    """The codes of DICOM PS3.16 by their names; lazily, as above."""
    from pydicom.sr.codedict import codes

    return codes


def _uid(*sources: object) -> str:
    """A UID that only these sources give, under pydicom's root."""
    return str(generate_uid(entropy_srcs=[NAME, *(repr(one) for one in sources)]))


def _code(coded: Coded) -> Any:
    value, scheme, meaning = coded
    return _highdicom().sr.CodedConcept(value=value, scheme_designator=scheme, meaning=meaning)


def _equipment(model: Model, *, made: datetime, what: str) -> dict[str, Any]:
    return {
        "manufacturer": NAME,
        "manufacturer_model_name": model.params["model"],
        "software_versions": tuple(model.digest.split("+")),
        "series_description": f"{NAME} {what}, research only",
        "specific_character_set": "ISO_IR 192",
        "content_date": made.date(),
        "content_time": made.time().replace(microsecond=0),
    }


def _finish(dataset: Dataset, sources: Sources, *, made: datetime) -> Dataset:
    """The patient and the study, and the caller's clock in place of highdicom's."""
    with _quiet():
        dataset.update(sources.identity)
    dataset.InstanceCreationDate, dataset.InstanceCreationTime = f"{made:%Y%m%d}", f"{made:%H%M%S}"
    for equipment in dataset.ContributingEquipmentSequence:
        equipment.ContributionDateTime = f"{made:%Y%m%d%H%M%S}"
    return dataset


def make_report(sources: Sources, study: Study, model: Model, *, made: datetime) -> Dataset:
    """A Comprehensive SR by TID 1500, Measurement Report (PS3.16): a measurement group a label; complete, preliminary, unverified.

    Args:
        sources: of `read_sources`.
        study: predicted.
        model: that predicted it.
        made: Content Date and Time.
    """
    with _quiet():
        content = _measurement_report(sources, study, model)[0]
        report = _highdicom().sr.ComprehensiveSR(
            evidence=list({one.SOPInstanceUID: one for one in sources.slices}.values()),
            content=content,
            series_instance_uid=_uid("report series", sources.study_uid, model.digest),
            series_number=REPORT_SERIES,
            sop_instance_uid=_uid("report", sources.study_uid, model.digest, content.to_json()),
            instance_number=1,
            is_complete=True,
            is_final=False,
            is_verified=False,
            **_equipment(model, made=made, what="report"),
        )
    own = Dataset()
    own.CodingSchemeDesignator, own.CodingSchemeName = OWN_SCHEME, f"{NAME}'s own concepts"
    report.CodingSchemeIdentificationSequence = [own]
    return _finish(report, sources, made=made)


def _measurement_report(sources: Sources, study: Study, model: Model) -> Any:
    sr, codes = _highdicom().sr, _codes()
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=_uid("device", model.digest), name=NAME, manufacturer_name=NAME, model_name=model.params["model"]
    )
    observer = sr.ObserverContext(observer_type=codes.DCM.Device, observer_identifying_attributes=device)
    report = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=observer),
        procedure_reported=codes.LN.HeadCT,
        imaging_measurements=[_group(sources, study, model, label) for label in (LABELS[ANY], *SUBTYPES)],
    )
    items = report[0].ContentSequence
    items.insert(len(items) - 1, _image_library(sources))  # the template's order: before the measurements
    contains = sr.RelationshipTypeValues.CONTAINS
    for text in _comments(study, is_renamed=sources.is_renamed):
        items.append(sr.TextContentItem(name=codes.DCM.Comment, value=text, relationship_type=contains))
    return report


def _comments(study: Study, *, is_renamed: bool) -> list[str]:
    has_points = any(called is not None for called in study.called.values())
    return [
        NOTICE,
        "A study's probability is the highest of its slices'. Slices are named from 0, from the feet up.",
        *([] if has_points else ["There is no operating point: nothing is called positive or negative."]),
        *(f"Warning: {text}" for text in study.warnings),
        *([f"Warning: {RENAMED}"] if is_renamed else []),
    ]


def _group(sources: Sources, study: Study, model: Model, label: str) -> Any:
    """A label's finding (TID 1501): the study's probability with its most suspicious slice, and the operating point."""
    assert study.table is not None
    sr, codes = _highdicom().sr, _codes()
    finding, site = FINDINGS[label]
    calibrated, called = study.calibrated[label], study.called[label]
    seen = sr.SourceImageForMeasurement(**sources.refer(int(study.table[label].argmax())))
    value = study.probabilities[label] if calibrated is None else calibrated
    method = _code(METHODS[calibrated is not None])
    unit = codes.UCUM.NoUnits
    measured = [sr.Measurement(codes.DCM.Probability, _round(value), unit, method=method, referenced_images=[seen])]
    reached = []
    if called is not None:
        measured.append(sr.Measurement(_code(OPERATING_POINT), _round(study.points.studies[label].threshold), unit))
        reached.append(sr.QualitativeEvaluation(_code(REACHES), codes.SCT.Yes if called else codes.SCT.No))
    return sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(
            uid=_uid("finding", sources.study_uid, model.digest, label), identifier=f"{NAME} {label}"
        ),
        finding_type=_code(finding),
        finding_sites=[sr.FindingSite(anatomic_location=_code(site))],
        algorithm_id=sr.AlgorithmIdentification(name=NAME, version=model.digest, parameters=[f"label {label}"]),
        measurements=measured,
        qualitative_evaluations=reached,
    )


def _round(probability: float | None) -> float:
    assert probability is not None
    return round(probability, DECIMALS)


def _image_library(sources: Sources) -> Any:
    """The slices that were read (TID 1600). highdicom's own wants a slice thickness and more that not every header tells."""
    sr, codes = _highdicom().sr, _codes()
    kind = sr.RelationshipTypeValues
    library = sr.ContainerContentItem(name=codes.DCM.ImageLibrary, relationship_type=kind.CONTAINS)
    group = sr.ContainerContentItem(name=codes.DCM.ImageLibraryGroup, relationship_type=kind.CONTAINS)
    modality = sr.CodeContentItem(codes.DCM.Modality, codes.cid29.ComputedTomography, kind.HAS_ACQ_CONTEXT)
    source = _code(("260753009", "SCT", "Source"))  # highdicom's own name for them
    images = [
        sr.ImageContentItem(name=source, relationship_type=kind.CONTAINS, **sources.refer(number))
        for number in range(len(sources.slices))
    ]
    group.ContentSequence = sr.ContentSequence([modality, *images])
    library.ContentSequence = sr.ContentSequence([group])
    return library


# ---- the captures


def make_captures(
    sources: Sources, study: Study, model: Model, *, made: datetime, count: int = CAPTURES
) -> list[Dataset]:
    """Secondary Captures in 8-bit RGB (PS3.3 A.8.1) of one series, the most suspicious slice first.

    Args:
        sources: of `read_sources`.
        study: predicted, with its suspects.
        model: that predicted it.
        made: Content Date and Time.
        count: how many.
    """
    assert study.table is not None
    assert study.suspects is not None
    suspicion_K = study.table["any"].to_numpy()[study.suspects.slices]
    chosen = np.argsort(-suspicion_K, kind="stable")[:count]
    return [
        _finish(_make_capture(sources, study, model, place, number=number, made=made), sources, made=made)
        for number, place in enumerate(chosen.tolist(), start=1)
    ]


def _make_capture(sources: Sources, study: Study, model: Model, place: int, *, number: int, made: datetime) -> Dataset:
    assert study.suspects is not None
    pixels = np.ascontiguousarray(draw_capture(study, model, place))
    source = int(study.suspects.slices[place])
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()
    what = "slices" if study.suspects.heat_KRC is None else "heat maps"
    with _quiet():
        capture = _highdicom().sc.SCImage(
            pixel_array=pixels,
            photometric_interpretation="RGB",
            bits_allocated=8,
            coordinate_system="PATIENT",
            patient_orientation=("L", "P"),  # as `pipeline.series.turn` leaves every slice
            study_instance_uid=sources.study_uid,
            series_instance_uid=_uid("capture series", sources.study_uid, model.digest),
            series_number=CAPTURE_SERIES,
            sop_instance_uid=_uid("capture", sources.slices[source].SOPInstanceUID, source, model.digest, digest),
            instance_number=number,
            **_equipment(model, made=made, what=what),
        )
    capture.ConversionType = "SYN"  # a synthetic image (PS3.3 C.8.6.1)
    capture.DateOfSecondaryCapture, capture.TimeOfSecondaryCapture = f"{made:%Y%m%d}", f"{made:%H%M%S}"
    capture.BodyPartExamined = "HEAD"  # no paired part, which would want a Laterality
    capture.BurnedInAnnotation = "NO"  # of the kind that identifies a patient (PS3.3 C.7.6.1)
    capture.ImageComments = NOTICE
    capture.SourceImageSequence = [_refer(sources, source)]
    return capture


def _refer(sources: Sources, number: int) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = sources.slices[number].SOPClassUID
    item.ReferencedSOPInstanceUID = sources.slices[number].SOPInstanceUID
    if sources.frames[number]:
        item.ReferencedFrameNumber = sources.frames[number]
    purpose = Dataset()
    purpose.CodeValue, purpose.CodingSchemeDesignator = "121322", "DCM"
    purpose.CodeMeaning = "Source image for image processing operation"  # PS3.16 CID 7202
    item.PurposeOfReferenceCodeSequence = [purpose]
    return item


def draw_capture(study: Study, model: Model, place: int) -> npt.NDArray[np.uint8]:
    """Draw a suspect in the first window, with its heat map if it has one, between two bands of text.

    Args:
        study: predicted, with its suspects.
        model: whose windows they are in.
        place: of the suspect among them.

    Returns:
        uint8 [R, C, 3], red, green, blue; the slice lies between rows `BAND_PX` and `BAND_PX` + `CAPTURE_PX`.
    """
    assert study.suspects is not None
    heat_KRC = study.suspects.heat_KRC
    grey_RC = np.ascontiguousarray(study.suspects.pixels_KRCW[place, ..., 0])
    size = (CAPTURE_PX, CAPTURE_PX)
    picture: npt.NDArray[np.uint8] = cv2.resize(grey_RC, size, interpolation=cv2.INTER_CUBIC).astype(np.uint8)
    if heat_KRC is not None:
        heat_RC = cv2.resize(heat_KRC[place], size, interpolation=cv2.INTER_LINEAR).astype(np.float32)
        picture = blend_heat(picture, heat_RC)
    sheet = Image.new("RGB", (CAPTURE_PX, CAPTURE_PX + 2 * BAND_PX), BACKGROUND)
    sheet.paste(Image.fromarray(picture).convert("RGB"), (0, BAND_PX))
    draw = ImageDraw.Draw(sheet)
    lines = _describe_capture(study, model, place)
    for top, (text, ink) in zip((2, 21, BAND_PX + CAPTURE_PX + 2, BAND_PX + CAPTURE_PX + 21), lines, strict=True):
        draw.text((6, top), text, ink, ImageFont.load_default(FONT_PX))
    return np.asarray(sheet)


def _describe_capture(study: Study, model: Model, place: int) -> list[tuple[str, tuple[int, int, int]]]:
    """Two lines above a capture, and two below it, with their colours."""
    assert study.suspects is not None
    number, label = int(study.suspects.slices[place]), LABELS[study.suspects.labels[place]]
    name, window = next(iter(model.windows.items()))
    shown = (
        "no heat map" if study.suspects.heat_KRC is None else f"heat map (Grad-CAM) of {label}, scaled to this slice"
    )
    warned = "; mind the warnings in the report" if study.warnings else ""
    return [
        (f"{NAME}: {shown}", INK),
        (f"research only, not a medical device{warned}", POSITIVE),
        (f"this slice: {', '.join(_say(study, number, one) for one in (label, LABELS[ANY]))}", INK),
        (f"slice {number + 1} of {study.slices}, from the feet up; {name} window, {window.centre:g}/{window.width:g} HU", QUIET),
    ]  # fmt: skip


def _say(study: Study, number: int, label: str) -> str:
    """A slice's probability for people."""
    assert study.table is not None
    row = study.table.iloc[number]
    if np.isnan(row[label + CALIBRATED]):
        return f"{label} {row[label]:.2f} (uncalibrated)"
    return f"{label} {row[label + CALIBRATED]:.2f} (calibrated)"
