"""Files as hospitals and the RSNA set have them, from the file to the store: each ends with the right pixels or the right reason.

For HU the authority is pydicom: `apply_rescale` of its own pixel array.
"""

from __future__ import annotations

import io
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.filebase import DicomFileLike
from pydicom.filewriter import write_dataset
from pydicom.pixels import apply_rescale
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    LegacyConvertedEnhancedCTImageStorage,
    MediaStorageDirectoryStorage,
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
    XRayRadiationDoseSRStorage,
)

from pipeline import header
from pipeline.decoder import close
from pipeline.errors import SourceError
from pipeline.header import read_headers
from pipeline.index import build_manifest
from pipeline.manifest import REASONS, account, refuse_too_many_exclusions
from pipeline.phantom.dicom_writer import StoredForm
from pipeline.place import HEAD_BYTES, Place, read_head
from pipeline.preprocess import preprocess
from pipeline.store import Store
from tests.conftest import REAL_DICOM, ROOT, SIGNED_16, UNSIGNED_12, Cohort
from tests.test_decoder import change, high_throughput

SIZE = 32
SPACING_MM = 0.5
WINDOWS = {"fine": {"centre": 40, "width": 255}, "wide": {"centre": 1000, "width": 4080}}
"""One grey level is 1 HU around blood, and 16 HU from air to dense bone."""

EVIL_NAME = "Bölle^Jürgen^^Dr."
AXIAL = [1, 0, 0, 0, 1, 0]


@pytest.fixture(scope="module", autouse=True)
def no_decoder_stays() -> Iterator[None]:
    yield
    close()


# ---- files


def head(k: int = 0) -> np.ndarray:
    """HU of slice k: a head of its own brightness in a skull, in air; integers, none below −1000."""
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE - 0.5
    radius = np.hypot(x, y)
    pixels_hu = np.where(radius < 0.4, 30.0 + k, -1000.0)
    pixels_hu[(radius > 0.34) & (radius < 0.4)] = 900
    pixels_hu += np.random.default_rng(k).normal(0, 3, pixels_hu.shape)
    return np.rint(pixels_hu).clip(-1000).astype(int)


def ct(
    k: int = 0,
    pixels_hu: np.ndarray | None = None,
    *,
    bits: int = 12,
    signed: bool = False,
    slope: float = 1,
    intercept: float = -1024,
    **elements: Any,
) -> Dataset:
    """Slice k of a study as a scanner writes it; None takes an element away."""
    pixels_hu = head(k) if pixels_hu is None else pixels_hu
    stored = np.rint((pixels_hu - intercept) / slope)
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SpecificCharacterSet = "ISO_IR 100"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, f"1.2.3.{k}"
    dataset.Modality, dataset.Manufacturer, dataset.SeriesDescription = "CT", "ACME", "Schädel nativ"
    dataset.PatientName, dataset.PatientID = EVIL_NAME, "77"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.InstanceNumber = "1.2.1", "1.2.2", k + 1
    dataset.ImagePositionPatient, dataset.ImageOrientationPatient = [-8, -8, 5 * k], AXIAL
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.PixelSpacing = [SPACING_MM, SPACING_MM]
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, bits, bits - 1
    dataset.PixelRepresentation = int(signed)
    dataset.RescaleIntercept, dataset.RescaleSlope = intercept, slope
    dataset.WindowCenter, dataset.WindowWidth = 40, 80
    dataset.PixelData = stored.astype("<i2" if signed else "<u2").tobytes()
    dataset["PixelData"].VR = "OW"
    for name, value in elements.items():
        if value is None:
            del dataset[name]
        else:
            setattr(dataset, name, value)
    return dataset


def with_stored(dataset: Dataset, change_stored: Callable[[np.ndarray], np.ndarray]) -> Dataset:
    kind = "<i2" if dataset.PixelRepresentation else "<u2"
    stored = np.frombuffer(dataset.PixelData, kind).reshape(dataset.Rows, dataset.Columns).copy()
    dataset.PixelData = change_stored(stored).astype(kind).tobytes()
    return dataset


def written(dataset: Dataset) -> bytes:
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def in_syntax(dataset: Dataset, syntax: UID, tmp_path: Path) -> bytes:
    """The same slice in another transfer syntax."""
    if syntax in (JPEGLossless, JPEGLosslessSV1):
        return change(dataset, syntax, tmp_path)
    if syntax in (RLELossless, JPEG2000Lossless, JPEGLSLossless):
        dataset.compress(syntax, generate_instance_uid=False)
        return written(dataset)
    if syntax == ExplicitVRBigEndian:
        dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").byteswap().tobytes()
    dataset.file_meta.TransferSyntaxUID = syntax
    return written(dataset)


def bare(dataset: Dataset, *, implicit: bool, little: bool = True) -> bytes:
    """A data set with neither preamble nor file meta group."""
    buffer = io.BytesIO()
    file = DicomFileLike(buffer)
    file.is_implicit_VR, file.is_little_endian = implicit, little
    write_dataset(file, dataset)
    return buffer.getvalue()


def meta_and(content: bytes, syntax: UID) -> bytes:
    """A preamble and a file meta group without its group length, as in RSNA's implicit files, before a data set."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    return bytes(128) + b"DICM" + bare(meta, implicit=False) + content


def element(tag: int, vr: bytes, value: bytes) -> bytes:
    """One explicit element as bytes, of whatever length."""
    start = tag.to_bytes(4, "big")
    start = start[1::-1] + start[:1:-1] + vr
    return (
        start
        + (bytes(2) + len(value).to_bytes(4, "little") if vr in header.LONG_VRS else len(value).to_bytes(2, "little"))
        + value
    )


# ---- what becomes of them


class Outcome(NamedTuple):
    """The end of a run: reason by file name, and the pixels by image id."""

    reasons: dict[str, str]
    pixels: dict[str, np.ndarray]
    manifest: Any
    store: Store


def run(cohort: Cohort, **changes: Any) -> Outcome:
    config = cohort.config(preprocess__windows=WINDOWS, preprocess__image_size=SIZE, **changes)
    manifest, _, _ = build_manifest(config)
    _, faults = preprocess(config, manifest, data=cohort.data)
    of_image = dict(zip(faults["image_id"], faults["reason"], strict=True))
    final = manifest.assign(
        reason=[
            of_image.get(i, r) if s != "excluded" else r
            for i, r, s in zip(manifest["image_id"], manifest["reason"], manifest["status"], strict=True)
        ]
    )
    store = Store(cohort.data / "store.zarr")
    ids, counts = store.image_id, store.num_slices
    pixels = {
        str(ids[study, number]): np.array(store.reader.read(study, number))
        for study in range(len(counts))
        for number in range(int(counts[study]))
    }
    reasons = {Path(path).name: reason for path, reason in zip(final["path"], final["reason"], strict=True)}
    return Outcome(reasons, pixels, final, store)


def assert_shows(pixels: np.ndarray, pixels_hu: np.ndarray) -> None:
    """That pixels [row, column, window] are these HU, to half a grey level."""
    for number, window in enumerate(WINDOWS.values()):
        low = window["centre"] - window["width"] / 2
        expected = ((np.maximum(pixels_hu, -1024.0) - low) * 255 / window["width"]).clip(0, 255)
        assert np.abs(pixels[..., number] - expected).max() <= 0.5 + 1e-3


def put(cohort: Cohort, name: str, content: bytes | Dataset) -> Path:
    path = cohort.dicom / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(written(content) if isinstance(content, Dataset) else content)
    return path


def put_neighbours(cohort: Cohort) -> None:
    """Two sound slices of the study, 1 and 2; the one to be tried is 0."""
    for k in (1, 2):
        put(cohort, f"{k}.dcm", ct(k))


def hu_of(content: bytes) -> np.ndarray:
    """What pydicom makes of a file."""
    with warnings.catch_warnings(action="ignore"):
        dataset = pydicom.dcmread(io.BytesIO(content), force=True)
        if "TransferSyntaxUID" not in dataset.file_meta:
            implicit, little = dataset.original_encoding
            dataset.file_meta.TransferSyntaxUID = (
                ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
            )
        return np.asarray(apply_rescale(dataset.pixel_array, dataset))


def assert_used_as_pydicom_has_them(cohort: Cohort, contents: list[bytes]) -> None:
    """Slices 0, 1, 2 … of one study, each written in its own way."""
    for k, content in enumerate(contents):
        put(cohort, f"{k}", content)
    found = run(cohort)
    assert found.reasons == {f"{k}": "" for k in range(len(contents))}
    for k, content in enumerate(contents):
        assert_shows(found.pixels[f"1.2.3.{k}"], hu_of(content))


# ---- values


def test_every_form_of_stored_values_gives_its_hu(cohort: Cohort) -> None:
    forms: list[dict[str, Any]] = [
        {"bits": 12, "signed": False, "intercept": -1024},
        {"bits": 12, "signed": False, "intercept": -1000},
        {"bits": 16, "signed": True, "intercept": -1024},
        {"bits": 16, "signed": True, "intercept": 0},
        {"bits": 12, "signed": True, "intercept": 0},
        {"bits": 16, "signed": False, "intercept": -8192},
        {"bits": 16, "signed": True, "intercept": -1000.5, "slope": 0.5},
        {"bits": 12, "signed": False, "intercept": -1024, "slope": 2},
        {"bits": 16, "signed": True, "intercept": 24, "slope": -1},
        {"bits": 16, "signed": True, "intercept": -1024, "slope": -0.25},
        {"PhotometricInterpretation": "MONOCHROME1"},  # speaks of the display alone
    ]
    contents = [written(ct(k, **form)) for k, form in enumerate(forms)]
    for k, content in enumerate(contents):
        assert np.abs(hu_of(content) - head(k)).max() <= 1  # the files are what they are meant to be
    assert_used_as_pydicom_has_them(cohort, contents)


def test_rescale_beyond_16_bits_does_not_overflow(cohort: Cohort) -> None:
    pixels_hu = head() & ~1
    pixels_hu[5:7, 15:17], pixels_hu[5, 0] = 60_000, -60_000
    content = written(ct(0, pixels_hu, bits=16, signed=True, slope=2))
    assert hu_of(content).max() == 60_000
    assert_used_as_pydicom_has_them(cohort, [content])


def test_bits_above_bits_stored_are_not_seen(cohort: Cohort) -> None:
    dataset = with_stored(ct(), lambda stored: stored | 0xA000)
    assert np.frombuffer(dataset.PixelData, "<u2").max() > 4095
    assert_used_as_pydicom_has_them(cohort, [written(dataset)])


@pytest.mark.parametrize("signed", [False, True])
def test_monochrome1_stored_as_its_negative_is_turned_positive(cohort: Cohort, signed: bool) -> None:
    dataset = ct(PhotometricInterpretation="MONOCHROME1", signed=signed, intercept=0 if signed else -1024)
    put_neighbours(cohort)
    put(cohort, "0.dcm", with_stored(dataset, lambda stored: (-1 if signed else 4095) - stored))
    found = run(cohort)
    assert found.reasons["0.dcm"] == "inverted"
    assert_shows(found.pixels["1.2.3.0"], head())


@pytest.mark.parametrize("intercept", [0, 1])
def test_wrapped_12_bit_values_are_unwrapped(cohort: Cohort, intercept: int) -> None:
    put_neighbours(cohort)
    dataset = ct(intercept=intercept, pixels_hu=np.where(head() < 0, head() + 4096, head()))
    put(cohort, "0.dcm", dataset)
    found = run(cohort)
    assert found.reasons["0.dcm"] == "wrap_12bit"
    assert_shows(found.pixels["1.2.3.0"], head() - intercept)  # the intercept of such files is wrong too


def outside(size: int = SIZE) -> np.ndarray:
    """Beyond the scanner's circle."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    return np.hypot(x, y) > 0.45


def padded(dataset: Dataset, value: int) -> Dataset:
    return with_stored(dataset, lambda stored: np.where(outside(), value, stored))


def test_padding_below_air_is_air_tagged_or_not(cohort: Cohort) -> None:
    forms: list[tuple[int, str, dict[str, Any]]] = [
        (-2000, "US", {"bits": 16, "signed": True}),  # written as 63536
        (-2000, "SS", {"bits": 16, "signed": True}),
        (-1500, "SS", {"bits": 16, "signed": True, "intercept": 0}),
        (-2000, "SS", {"bits": 12, "signed": True, "intercept": 0}),
        (-32768, "SS", {"bits": 16, "signed": True, "intercept": 0}),
        (0, "US", {"bits": 12, "signed": False}),
        (-2000, "", {"bits": 16, "signed": True}),
    ]
    contents = []
    for k, (padding, vr, form) in enumerate(forms):
        dataset = padded(ct(k, **form), padding)
        if vr:
            dataset.add_new(0x00280120, vr, padding % 65536 if vr == "US" else padding)
        contents.append(written(dataset))
        assert hu_of(contents[k])[0, 0] <= -1024
    assert_used_as_pydicom_has_them(cohort, contents)


@pytest.mark.parametrize(
    ("padding", "form"),
    [
        (0, {"bits": 16, "signed": True, "intercept": 0}),  # would be water
        (2096, {"bits": 12, "signed": False}),  # −2000 in 12 bits, would be bone
        (63536, {"bits": 12, "signed": False}),  # the same, written with 16
        (0, {"bits": 16, "signed": True, "intercept": 1024, "slope": -1}),
    ],
)
def test_tagged_padding_that_would_be_tissue_is_set_to_air(cohort: Cohort, padding: int, form: dict[str, Any]) -> None:
    put_neighbours(cohort)
    dataset = padded(ct(**form), padding & (1 << form["bits"]) - 1)
    dataset.add_new(0x00280120, "US", padding)
    put(cohort, "0.dcm", dataset)
    found = run(cohort)
    assert found.reasons["0.dcm"] == "padding"
    assert_shows(found.pixels["1.2.3.0"], np.where(outside(), -1024, head()))


@pytest.mark.parametrize(
    ("form", "padding", "reason"),
    [
        ({"bits": 16}, 63536, "padding"),  # beyond every scanner's range
        ({"bits": 16, "signed": True, "intercept": 0}, 32767, "padding"),
        ({"PhotometricInterpretation": "MONOCHROME1", "inverted": True}, 0, "inverted"),  # air, until it is turned
        ({"PhotometricInterpretation": "MONOCHROME1"}, 4095, "padding"),
        ({"wrapped": True}, 2096, "wrap_12bit"),
    ],
)
def test_padding_is_found_before_anything_is_judged_by_its_values(
    cohort: Cohort, form: dict[str, Any], padding: int, reason: str
) -> None:
    put_neighbours(cohort)
    is_inverted, is_wrapped = form.pop("inverted", False), form.pop("wrapped", False)
    dataset = ct(**form)
    if is_wrapped:
        dataset = ct(intercept=0, pixels_hu=np.where(head() < 0, head() + 4096, head()))
    if is_inverted:
        dataset = with_stored(dataset, lambda stored: 4095 - stored)
    dataset = padded(dataset, padding)
    dataset.add_new(0x00280120, "US", padding)
    put(cohort, "0.dcm", dataset)
    found = run(cohort)
    assert found.reasons["0.dcm"] == reason
    assert_shows(found.pixels["1.2.3.0"], np.where(outside(), -1024, head()))


def test_range_of_padding_is_padding(cohort: Cohort) -> None:
    put_neighbours(cohort)
    noise = np.random.default_rng(0).integers(4090, 4096, (SIZE, SIZE))
    dataset = with_stored(ct(), lambda stored: np.where(outside(), noise, stored))
    dataset.add_new(0x00280120, "US", 4090)
    dataset.add_new(0x00280121, "US", 4095)
    put(cohort, "0.dcm", dataset)
    found = run(cohort)
    assert found.reasons["0.dcm"] == "padding"
    assert_shows(found.pixels["1.2.3.0"], np.where(outside(), -1024, head()))


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 4096), (-32768, 32767), (8000, 9000), (-9000, -3000)],
    ids=["12 bits", "16 bits", "beyond metal", "below padding"],
)
def test_half_noise_and_values_of_no_scanner_are_excluded(cohort: Cohort, low: int, high: int) -> None:
    put_neighbours(cohort)
    large: dict[str, Any] = {"bits": 16, "signed": True, "PixelSpacing": [SPACING_MM / 4, SPACING_MM / 4]}
    pixels_hu = np.kron(head(), np.ones((4, 4), int))
    put(cohort, "whole.dcm", ct(3, pixels_hu, **large))
    pixels_hu[64:] = np.random.default_rng(0).integers(low, high, (64, 128)) - 1024
    put(cohort, "0.dcm", ct(0, pixels_hu.clip(-33792, 31743), **large))
    found = run(cohort)
    assert found.reasons == {"0.dcm": "garbage", "1.dcm": "", "2.dcm": "", "whole.dcm": ""}
    assert set(found.pixels) == {"1.2.3.1", "1.2.3.2", "1.2.3.3"}


# ---- how much pixel data


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian], ids=lambda uid: uid.keyword)
def test_too_little_and_too_much_pixel_data(cohort: Cohort, syntax: UID) -> None:
    whole = ct(0).PixelData
    lengths = {"short": whole[:-2], "empty": b"", "absent": None, "twice": whole * 2, "one more": whole + b"\0\0"}
    put_neighbours(cohort)
    for k, (name, pixel_data) in enumerate(lengths.items(), start=3):
        put(cohort, name, in_syntax(ct(k, head(0), PixelData=pixel_data), syntax, cohort.folder))
    found = run(cohort)
    assert found.reasons == {
        "1.dcm": "",
        "2.dcm": "",
        "short": "truncated_pixels",
        "empty": "no_pixels",
        "absent": "no_pixels",
        "twice": "surplus_pixels",
        "one more": "surplus_pixels",
    }
    for k in (6, 7):
        assert_shows(found.pixels[f"1.2.3.{k}"], head(0))


def test_rsna_slice_cut_short_and_what_lies_behind_the_pixels(cohort: Cohort) -> None:
    put_neighbours(cohort)
    whole = written(ct())
    put(cohort, "cut.dcm", whole[: len(whole) - 370 * 2])
    put(cohort, "0.dcm", whole + element(0xFFFCFFFC, b"OB", bytes(100)))  # Data Set Trailing Padding, PS3.10 7.2
    found = run(cohort)
    assert found.reasons == {"cut.dcm": "truncated_pixels", "0.dcm": "", "1.dcm": "", "2.dcm": ""}
    assert_shows(found.pixels["1.2.3.0"], head())


def test_packed_pixel_data_cut_short_are_named(cohort: Cohort) -> None:
    put_neighbours(cohort)
    syntaxes = [RLELossless, JPEG2000Lossless, JPEGLSLossless, JPEGLosslessSV1, ExplicitVRBigEndian]
    for k, syntax in enumerate([*syntaxes, DeflatedExplicitVRLittleEndian], start=3):
        whole = in_syntax(ct(k), syntax, cohort.folder)
        put(cohort, syntax.keyword, whole[: len(whole) - 400])
    packed = in_syntax(ct(99), DeflatedExplicitVRLittleEndian, cohort.folder)
    put(cohort, "header of rubbish", packed[:400] + bytes(range(200)) + packed[600:])
    found = run(cohort)
    # deflated, the header is packed with the pixels: how much of it can be had is zlib's to say
    assert found.reasons.pop(DeflatedExplicitVRLittleEndian.keyword) in ("unreadable", "undecodable")
    expected = {"1.dcm": "", "2.dcm": "", "header of rubbish": "unreadable"}
    assert found.reasons == expected | {syntax.keyword: "undecodable" for syntax in syntaxes}


def test_encapsulated_pixels_in_a_file_that_calls_itself_native_are_not_read_as_pixels(cohort: Cohort) -> None:
    put_neighbours(cohort)
    dataset = ct()
    dataset.PixelData = encapsulate([dataset.PixelData])
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
    put(cohort, "0.dcm", written(dataset).replace(JPEG2000Lossless.encode(), b"1.2.840.10008.1.2.1\0\0\0"))
    assert run(cohort).reasons == {"0.dcm": "undecodable", "1.dcm": "", "2.dcm": ""}


# ---- transfer syntaxes and forms of header

SYNTAXES = [
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
    RLELossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEG2000Lossless,
]


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: uid.keyword)
def test_every_transfer_syntax_gives_the_same_pixels(cohort: Cohort, syntax: UID) -> None:
    """Unsigned and signed, with padding of −2000; all in one study."""
    forms: list[dict[str, Any]] = [{}, {"bits": 16, "signed": True}, {"bits": 16, "signed": True, "intercept": 0}]
    for k, form in enumerate(forms):
        dataset = ct(k, **form)
        if form:
            dataset = padded(dataset, -2000)
        put(cohort, f"{k}.dcm", in_syntax(dataset, syntax, cohort.folder))
    found = run(cohort)
    assert set(found.reasons.values()) == {""}
    for k, form in enumerate(forms):
        assert_shows(found.pixels[f"1.2.3.{k}"], np.where(outside() & bool(form), -1024, head(k)))


def test_high_throughput_jpeg_2000_is_used(cohort: Cohort) -> None:
    """Beside the same slice uncompressed, of another name."""
    put_neighbours(cohort)
    of_encoder, stored = high_throughput(signed=False, syntax=HTJ2KLossless)
    for k in (0, 3):
        dataset = ct(k, stored - 1024.0)
        if k == 0:
            dataset.file_meta.TransferSyntaxUID, dataset.PixelData = HTJ2KLossless, of_encoder.PixelData
        put(cohort, f"{k}.dcm", dataset)
    found = run(cohort)
    assert set(found.reasons.values()) == {""}
    assert np.ptp(found.pixels["1.2.3.3"]) == 255
    np.testing.assert_array_equal(found.pixels["1.2.3.0"], found.pixels["1.2.3.3"])


def test_unknown_transfer_syntax_is_undecodable(cohort: Cohort) -> None:
    put_neighbours(cohort)
    put(cohort, "0.dcm", written(ct()).replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.77"))
    assert run(cohort).reasons["0.dcm"] == "undecodable"


def tweak(name: str, k: int) -> bytes:
    """Slice k in one of the forms in which real writers write it."""
    dataset = ct(k)
    explicit = bare(dataset, implicit=False)
    group_8 = explicit.index(b"\x08\x00\x05\x00")
    patient = explicit.index(b"\x10\x00\x10\x00PN")
    match name:
        case "without preamble, implicit":
            return bare(dataset, implicit=True)
        case "without preamble, explicit":
            return explicit
        case "without preamble, big endian":
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").byteswap().tobytes()
            return bare(dataset, implicit=False, little=False)
        case "without preamble, with meta group":
            return written(dataset)[132:]
        case "meta group without transfer syntax":
            return bytes(128) + b"DICM" + element(0x00020002, b"UI", CTImageStorage.encode() + b"\0") + explicit
        case "implicit, meta group without length":
            return meta_and(bare(dataset, implicit=True), ImplicitVRLittleEndian)
        case "implicit, calls itself explicit":
            return meta_and(bare(dataset, implicit=True), ExplicitVRLittleEndian)
        case "explicit, calls itself implicit":
            return meta_and(explicit, ImplicitVRLittleEndian)
        case "pixel data as OB":
            dataset["PixelData"].VR = "OB"
        case "pixel data as UN":
            return meta_and(explicit.replace(b"\xe0\x7f\x10\x00OW", b"\xe0\x7f\x10\x00UN"), ExplicitVRLittleEndian)
        case "group lengths":
            explicit = element(0x00080000, b"UL", (patient - group_8).to_bytes(4, "little")) + explicit
            return meta_and(explicit, ExplicitVRLittleEndian)
        case "sequences of undefined length":
            items = Sequence([Dataset(), Dataset()])
            items[0].ReferencedSOPInstanceUID = "1.2.3.4"
            items[1].PurposeOfReferenceCodeSequence = Sequence([Dataset()])
            dataset.ReferencedImageSequence = items
            dataset["ReferencedImageSequence"].is_undefined_length = True
            for item in items:
                item.is_undefined_length_sequence_item = True
        case "sequences of defined length":
            dataset.ReferencedImageSequence = Sequence([Dataset()])
            dataset.ReferencedImageSequence[0].PatientID = "not the patient"
            dataset.ReferencedImageSequence[0].Rows = 7
        case "private elements":
            block = dataset.private_block(0x0009, "GEMS_IDEN_01", create=True)
            block.add_new(0x01, "LO", "CT_LIGHTSPEED")
            block.add_new(0x02, "UN", bytes(range(255)))
            dataset.private_block(0x7FE1, "SIEMENS CSA", create=True).add_new(0x10, "OB", bytes(500))
        case "private sequence of undefined length as UN":
            private = (
                b"\x09\x00\x10\x10UN\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\0\0\0\0" + b"\xfe\xff\xdd\xe0\0\0\0\0"
            )
            return meta_and(explicit[:patient] + private + explicit[patient:], ExplicitVRLittleEndian)
        case "utf-8":
            dataset.SpecificCharacterSet, dataset.PatientName = "ISO_IR 192", "王^小東"
        case "iso 2022":
            dataset.SpecificCharacterSet = ["", "ISO 2022 IR 87"]
            dataset.PatientName = "Yamada^Tarou=山田^太郎"
        case "character set of nobody":
            return meta_and(explicit.replace(b"ISO_IR 100", b"KLINGON\0\0\0"), ExplicitVRLittleEndian)
        case "odd lengths":
            explicit = explicit.replace(element(0x00200011, b"IS", b""), b"")
            odd = element(0x00100010, b"PN", b"Odd") + element(0x00100020, b"LO", b"77 "[:2] + b" ")
            end = explicit.index(b"\x20\x00\x0d\x00")
            return meta_and(explicit[:patient] + odd + explicit[end:], ExplicitVRLittleEndian)
        case "elements out of order":
            return meta_and(
                explicit[patient : (at := explicit.index(b"\x28\x00\x02\x00"))] + explicit[:patient] + explicit[at:],
                ExplicitVRLittleEndian,
            )
        case "element twice":
            return meta_and(
                explicit[:patient] + element(0x00100010, b"PN", b"A ") + explicit[patient:], ExplicitVRLittleEndian
            )
        case "overlay":
            dataset.add_new(0x60000010, "US", SIZE)
            dataset.add_new(0x60003000, "OW", bytes(SIZE * SIZE // 8))
        case "icon image":
            dataset.IconImageSequence = Sequence([Dataset()])
            icon = dataset.IconImageSequence[0]
            icon.Rows, icon.Columns, icon.PixelData = 2, 2, bytes(4)
            icon["PixelData"].VR = "OB"
            icon.BitsAllocated, icon.PixelRepresentation = 8, 0
        case "windows of several values":
            dataset.WindowCenter, dataset.WindowWidth = ["00040", "00600"], ["00080", "02800"]
        case "numbers in spaces and exponents":
            dataset = ct(k, RescaleIntercept=None, PixelSpacing=None)
            explicit = bare(dataset, implicit=False)
            at = explicit.index(b"\x28\x00\x53\x10")
            explicit = explicit[:at] + element(0x00281052, b"DS", b" -1.024E+03 ") + explicit[at:]
            at = explicit.index(b"\x28\x00\x00\x01")
            return meta_and(
                explicit[:at] + element(0x00280030, b"DS", b"0.500000 \\ +5e-1") + explicit[at:], ExplicitVRLittleEndian
            )
        case "no class":
            del dataset.SOPClassUID
            return meta_and(bare(dataset, implicit=False), ExplicitVRLittleEndian)
        case "one frame":
            dataset.NumberOfFrames = 1
    return written(dataset)


FORMS = re.findall(r'case "([^"]+)":', Path(__file__).read_text(encoding="utf-8"))


def test_unusual_but_right_headers_are_used(cohort: Cohort) -> None:
    assert len(FORMS) > 25
    assert_used_as_pydicom_has_them(cohort, [tweak(form, k) for k, form in enumerate(FORMS)])


@pytest.mark.parametrize("deflated", [False, True])
def test_header_longer_than_what_is_read_of_it_is_read_on(cohort: Cohort, deflated: bool) -> None:
    """64 KiB are read first; the pixel data may start on either side of that, and their own tag and length may lie across it."""
    contents = []
    for k in range(20):
        dataset = ct(k)
        block = dataset.private_block(0x0029, "SIEMENS CSA HEADER", create=True)
        block.add_new(0x10, "OB", b"")
        start = written(dataset).index(b"\xe0\x7f\x10\x00OW")
        wanted = HEAD_BYTES + 2 * (k - 10) if k else 3 * HEAD_BYTES
        block[0x10].value = bytes((wanted - start) // 2 * 2)
        content = written(dataset)
        assert abs(content.index(b"\xe0\x7f\x10\x00OW") - wanted) <= 2
        contents.append(in_syntax(dataset, DeflatedExplicitVRLittleEndian, cohort.folder) if deflated else content)
    assert_used_as_pydicom_has_them(cohort, contents)


def test_header_of_one_long_sequence_is_read(cohort: Cohort) -> None:
    dataset = ct()
    dataset.SourceImageSequence = Sequence([Dataset() for _ in range(900)])
    for item in dataset.SourceImageSequence:
        item.ReferencedSOPInstanceUID, item.is_undefined_length_sequence_item = "1.2.840.113619." + "4" * 40, True
        item.RescaleSlope, item.Rows, item.Modality = 7, 9, "MR"  # of other images
    dataset["SourceImageSequence"].is_undefined_length = True
    assert len(written(dataset)) > HEAD_BYTES
    assert_used_as_pydicom_has_them(cohort, [written(dataset)])


def test_element_that_ends_past_the_file_is_no_slice(cohort: Cohort) -> None:
    put_neighbours(cohort)
    whole = written(ct())
    at = whole.index(b"\x28\x00\x30\x00DS")
    put(cohort, "0.dcm", whole[:at] + b"\x28\x00\x30\x00OB\0\0\xf0\xff\xff\x7f" + whole[at + 8 :])
    put(cohort, "cut", whole[:at])
    assert run(cohort).reasons == {"0.dcm": "no_pixels", "cut": "no_pixels", "1.dcm": "", "2.dcm": ""}


@pytest.mark.parametrize("form", [UNSIGNED_12, SIGNED_16, StoredForm(bits=16, signed=True, intercept="-1024.000000")])
def test_rsna_slices_which_have_no_class_are_used(cohort: Cohort, form: StoredForm) -> None:
    cohort.size = SIZE
    ids = cohort.add_study(1, 3, form=form)
    contents = {image_id: (cohort.dicom / f"{image_id}.dcm").read_bytes() for image_id in ids}
    assert "SOPClassUID" not in pydicom.dcmread(io.BytesIO(contents[ids[0]]))
    found = run(cohort)
    for image_id, content in contents.items():
        assert_shows(found.pixels[image_id], hu_of(content))


# ---- other files in the folder


def test_each_other_file_gets_its_own_reason(cohort: Cohort) -> None:
    put_neighbours(cohort)
    capture: dict[str, Any] = {"SOPClassUID": SecondaryCaptureImageStorage}
    rgb = ct(
        10, **capture, PhotometricInterpretation="RGB", SamplesPerPixel=3, BitsAllocated=8, BitsStored=8, HighBit=7
    )
    rgb.PlanarConfiguration = 0
    palette = ct(11, **capture, PhotometricInterpretation="PALETTE COLOR")
    summary = ct(12, **capture, BitsAllocated=8, BitsStored=8, HighBit=7, PixelData=bytes(SIZE * SIZE))
    sagittal = ct(13, ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    oblique = ct(14, ImageOrientationPatient=[1, 0, 0, 0, 0.6, 0.8])
    report = ct(15, SOPClassUID=XRayRadiationDoseSRStorage, Modality="SR", Rows=None, Columns=None, PixelData=None)
    directory = Dataset()
    directory.file_meta = FileMetaDataset()
    directory.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    directory.SOPClassUID, directory.SOPInstanceUID = MediaStorageDirectoryStorage, "1.2.9"
    directory.FileSetID, directory.DirectoryRecordSequence = "X", Sequence([Dataset()])
    stack = MultiFrameGrayscaleWordSecondaryCaptureImageStorage
    contents: dict[str, tuple[Dataset | bytes, str]] = {
        "rgb": (rgb, "colour"),
        "palette": (palette, "colour"),
        "exam summary": (summary, "not_16_bit"),
        "mr": (ct(16, Modality="MR"), "not_ct"),
        "localizer": (ct(17, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "localizer"),
        "sagittal": (sagittal, "not_axial"),
        "oblique by 53 degrees": (oblique, "not_axial"),
        "dose report": (report, "not_ct"),
        "DICOMDIR": (directory, "dicomdir"),
        "several frames": (ct(18, SOPClassUID=stack, NumberOfFrames=2, PixelData=ct().PixelData * 2), "multi_frame"),
        "two values a pixel": (ct(19, HighBit=15), "high_bit"),
        "32 bits": (ct(20, BitsAllocated=32, PixelData=ct().PixelData * 2), "not_16_bit"),
        "no series": (ct(21, SeriesInstanceUID=None), "no_identifiers"),
        "no place": (ct(22, ImagePositionPatient=None), "no_geometry"),
        "no rescale": (ct(23, RescaleIntercept=None), "no_rescale"),
        "metres": (ct(24, PixelSpacing=[500, 500]), "implausible"),
        "wider than a gantry": (ct(26, np.kron(head(), np.ones((2, 2))), PixelSpacing=[19, 19]), "implausible"),
        "tiny": (ct(25, head()[:8, :8]), "implausible"),
        "picture.png": (b"\x89PNG\r\n\x1a\n" + bytes(300), "not_dicom"),
        "empty": (b"", "not_dicom"),
        "zeros": (bytes(10_000), "not_dicom"),
        "text": (b"The patients of this folder\n" * 30, "not_dicom"),
        "preamble alone": (bytes(128) + b"DICM", "no_pixels"),
    }
    for name, (content, _) in contents.items():
        put(cohort, name, content)
    found = run(cohort)
    assert found.reasons == {name: reason for name, (_, reason) in contents.items()} | {"1.dcm": "", "2.dcm": ""}
    for k in (1, 2):
        assert_shows(found.pixels[f"1.2.3.{k}"], head(k))


NUMBERS: dict[str, bytes] = {
    **dict.fromkeys(("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit"), b"US"),
    **dict.fromkeys(("PixelRepresentation", "PixelPaddingValue"), b"US"),
    **dict.fromkeys(("NumberOfFrames", "InstanceNumber"), b"IS"),
    **dict.fromkeys(("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"), b"DS"),
    **dict.fromkeys(("RescaleIntercept", "RescaleSlope", "WindowCenter", "WindowWidth"), b"DS"),
}
HARMLESS = ("PixelPaddingValue", "InstanceNumber", "SliceThickness", "WindowCenter", "WindowWidth")
NONSENSE = {
    b"US": [b"", b"\0", b"\0\0", b"\x01\0", b"\xff\xff", b"12345678"],
    b"IS": [b"", b"0", b"-1 ", b"1.5", b"x ", b"9" * 40, b"1\\2 "],
    b"DS": [
        b"",
        b"0 ",
        b"-1",
        b"1e308 ",
        b"nan ",
        b"inf ",
        b"x ",
        b"1,5 ",
        b"1\\2 ",
        b"\\".join([b"7"] * 9),
        b"\xff\0",
    ],
}


def spoilt(dataset: Dataset, values: dict[str, bytes]) -> bytes:
    """The file with other bytes in some of its numbers."""
    parts = {}
    for item in dataset:
        alone = Dataset()
        alone.add(item)
        parts[int(item.tag)] = bare(alone, implicit=False)
    for name, value in values.items():
        tag = pydicom.datadict.tag_for_keyword(name)
        assert tag is not None
        parts[tag] = element(tag, NUMBERS[name], value)
    return meta_and(b"".join(parts[tag] for tag in sorted(parts)), ExplicitVRLittleEndian)


def test_nonsense_in_one_number_ends_in_a_reason_or_in_the_same_pixels(cohort: Cohort) -> None:
    """And harms no other slice. Spacings have a study of their own: a study is shown as wide as its widest slice."""
    put_neighbours(cohort)
    tried: dict[str, tuple[str, int]] = {}
    for name, vr in NUMBERS.items():
        for value in NONSENSE[vr]:
            k = 100 + len(tried)
            dataset = ct(k, head(3))
            if name == "PixelSpacing":
                dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.99", "1.2.98"
            path = f"{name} {value!r}".replace("/", " ")
            put(cohort, path, spoilt(dataset, {name: value}))
            tried[path] = (name, k)
    found = run(cohort)
    excluded = {path for path, reason in found.reasons.items() if reason and REASONS[reason][0] == "excluded"}
    assert set(tried) > excluded
    for path, (name, k) in tried.items():
        if name in HARMLESS:
            assert found.reasons[path] in ("", "padding")
            assert_shows(found.pixels[f"1.2.3.{k}"], head(3))
    assert len(excluded) > 40
    assert {found.reasons[path] for path in excluded} <= set(list(REASONS)[:17]) | {"garbage"}
    for k in (1, 2):
        assert found.reasons[f"{k}.dcm"] == ""
        assert_shows(found.pixels[f"1.2.3.{k}"], head(k))


def test_nonsense_in_every_number_at_once_is_excluded(cohort: Cohort) -> None:
    put_neighbours(cohort)
    for number in range(6):
        put(cohort, f"{number}", spoilt(ct(3), {name: NONSENSE[vr][number] for name, vr in NUMBERS.items()}))
    found = run(cohort)
    assert all(REASONS[found.reasons[f"{number}"]][0] == "excluded" for number in range(6))
    assert {found.reasons[f"{k}.dcm"] for k in (1, 2)} == {""}


# ---- geometry


def test_slices_and_pixels_that_are_not_square_keep_their_shape(cohort: Cohort) -> None:
    whole = head()
    put(cohort, "square", ct(0, whole))
    put(cohort, "wide", ct(1, whole[8:24]))
    put(cohort, "tall", ct(2, whole[:, 8:24]))
    put(cohort, "fine rows", ct(3, np.repeat(whole, 2, axis=0), PixelSpacing=[SPACING_MM / 2, SPACING_MM]))
    put(cohort, "fine columns", ct(4, np.repeat(whole, 2, axis=1), PixelSpacing=[SPACING_MM, SPACING_MM / 2]))
    found = run(cohort)
    assert set(found.reasons.values()) == {""}
    rows, columns = np.mgrid[:SIZE, :SIZE]
    expected = [
        whole,
        np.where((rows >= 8) & (rows < 24), whole, -1024),
        np.where((columns >= 8) & (columns < 24), whole, -1024),
        whole,
        whole,
    ]
    for k, pixels_hu in enumerate(expected):
        assert_shows(found.pixels[f"1.2.3.{k}"], pixels_hu)


def test_mixed_sizes_and_fields_of_view_share_one_scale(cohort: Cohort) -> None:
    half = SPACING_MM / 2
    put(cohort, "whole", ct(0))
    put(cohort, "large matrix", ct(1, np.kron(head(1), np.ones((2, 2), int)), PixelSpacing=[half, half]))
    put(cohort, "small field", ct(2, head(2)[8:24, 8:24]))
    found = run(cohort)
    assert set(found.reasons.values()) == {""}
    assert_shows(found.pixels["1.2.3.0"], head(0))
    assert_shows(found.pixels["1.2.3.1"], head(1))
    expected = np.full((SIZE, SIZE), -1024)
    expected[8:24, 8:24] = head(2)[8:24, 8:24]
    assert_shows(found.pixels["1.2.3.2"], expected)


ORIENTATIONS = [
    [a * sign_a for a in first] + [b * sign_b for b in second]
    for first, second in (([1, 0, 0], [0, 1, 0]), ([0, 1, 0], [1, 0, 0]))
    for sign_a in (1, -1)
    for sign_b in (1, -1)
]


def test_mixed_orientations_prone_and_transposed_are_turned_to_one(cohort: Cohort) -> None:
    """Each pixel is put where its own position in the patient says (PS3.3 C.7.6.2.1.1): x runs to the left, y to the back."""
    x, y = np.meshgrid(np.arange(SIZE), np.arange(SIZE))
    pixels_hu = np.where((x - 14) ** 2 + (y - 17) ** 2 < 120, 20 + x + 2 * y, -1000)
    for k, orientation in enumerate(ORIENTATIONS):
        row, column = np.array(orientation[:3]), np.array(orientation[3:])
        first = np.where((row + column)[:2] > 0, 0, SIZE - 1)  # the corner from which both directions lead inside
        steps = np.arange(SIZE)
        places = first + steps[None, :, None] * row[:2] + steps[:, None, None] * column[:2]
        stored_hu = pixels_hu[places[..., 1], places[..., 0]]
        position = [*(first * SPACING_MM - 8), 5 * k]
        put(cohort, f"{k}", ct(k, stored_hu, ImageOrientationPatient=orientation, ImagePositionPatient=position))
    found = run(cohort)
    assert found.reasons == {f"{k}": "turned" if k else "" for k in range(8)}
    for k in range(8):
        assert_shows(found.pixels[f"1.2.3.{k}"], pixels_hu)
    assert found.store.image_id[0, :8].tolist() == [f"1.2.3.{k}" for k in range(8)]


def test_equal_positions_have_one_order_whatever_the_files_are_called(cohort: Cohort) -> None:
    orders = []
    for names in ("abcd", "dbca"):
        shutil.rmtree(cohort.dicom, ignore_errors=True)
        for k, name in enumerate(names):
            put(cohort, name, ct(k, ImagePositionPatient=[-8, -8, 5 * (k // 3)]))
        found = run(cohort)
        orders.append(found.store.image_id[0, :4].tolist())
        assert found.manifest["spacing"].tolist() == ["", "same_position", "same_position", ""]
    assert orders == [[f"1.2.3.{k}" for k in range(4)]] * 2


# ---- the same slice twice, and other people's


def test_foreign_patients_slice_in_a_study_is_excluded(cohort: Cohort) -> None:
    put_neighbours(cohort)
    put(cohort, "foreign", ct(3, PatientID="78"))
    put(cohort, "padded", ct(4, PatientID="77 "))
    assert run(cohort).reasons == {"1.dcm": "", "2.dcm": "", "foreign": "foreign_patient", "padded": ""}


def test_same_slice_twice_is_used_once_however_it_is_written(cohort: Cohort) -> None:
    put_neighbours(cohort)
    put(cohort, "b copy", ct(1))
    put(cohort, "c implicit", in_syntax(ct(1), ImplicitVRLittleEndian, cohort.folder))
    put(cohort, "d big endian", in_syntax(ct(1), ExplicitVRBigEndian, cohort.folder))
    put(cohort, "e jpeg", in_syntax(ct(1), JPEGLosslessSV1, cohort.folder))
    put(cohort, "f jpeg 2000", in_syntax(ct(1), JPEG2000Lossless, cohort.folder))
    put(cohort, "g deflated", in_syntax(ct(1), DeflatedExplicitVRLittleEndian, cohort.folder))
    put(cohort, "h renamed", ct(1, PatientName="Another^Spelling", InstanceNumber=99))
    found = run(cohort)
    assert found.reasons == {"1.dcm": "", "2.dcm": ""} | {
        path.name: "duplicate" for path in cohort.dicom.iterdir() if path.name > "a"
    }
    assert_shows(found.pixels["1.2.3.1"], head(1))


@pytest.mark.parametrize(
    "elements",
    [
        {"WindowCenter": 600, "WindowWidth": 2800},
        {"SeriesDescription": "BONE"},
        {"ImageType": ["DERIVED", "SECONDARY", "AXIAL"]},
        {"bits": 16},
        {"PixelPaddingValue": 0},
        {"ImagePositionPatient": [-8, -8, 5.00001]},
        {"PatientID": None},
        {"SliceThickness": 5},
    ],
    ids=lambda elements: str(next(iter(elements))),
)
def test_same_slice_exported_with_another_header_is_used_once(cohort: Cohort, elements: dict[str, Any]) -> None:
    put_neighbours(cohort)
    put(cohort, "b", ct(1, **elements))
    assert run(cohort).reasons == {"1.dcm": "", "2.dcm": "", "b": "duplicate"}


def test_slice_that_names_no_patient_is_its_studys(cohort: Cohort) -> None:
    put_neighbours(cohort)
    put(cohort, "unnamed", ct(3, PatientID=""))
    put(cohort, "another", ct(4, PatientID=None, StudyInstanceUID="1.2.8"))
    found = run(cohort)
    assert set(found.reasons.values()) == {""}
    keys = found.manifest.set_index("path")["patient_key"]
    assert keys["unnamed"] == keys["1.dcm"] != keys["another"]
    assert set(keys.str.len()) == {16}


def test_maps_that_are_no_hu_are_named(cohort: Cohort) -> None:
    put_neighbours(cohort)
    for k, kind in enumerate(("HU", "HU_MOD", "US", ""), start=3):
        put(cohort, f"{k}", ct(k, RescaleType=kind))
    put(cohort, "effective atomic number", ct(9, RescaleType="Z_EFF"))
    frames = enhanced(StudyInstanceUID="1.2.7", SOPInstanceUID="1.2.7.1")
    frames.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence[0].RescaleType = "ED"
    put(cohort, "electron density", frames)
    found = run(cohort)
    assert {name for name, reason in found.reasons.items() if reason} == {"effective atomic number", "electron density"}
    assert {found.reasons[name] for name in ("effective atomic number", "electron density")} == {"not_hu"}


def test_scouts_reports_and_reformats_are_no_defects(cohort: Cohort) -> None:
    """A whole study of a hospital, under the bound that params.yaml sets."""
    put_neighbours(cohort)
    put(cohort, "scout", ct(3, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]))
    put(cohort, "report", ct(4, Modality="SR", PixelData=None))
    for k in range(5, 20):
        put(cohort, f"coronal {k}", ct(k, SeriesInstanceUID="1.2.5", ImageOrientationPatient=[1, 0, 0, 0, 0, -1]))
    manifest, _, _ = build_manifest(cohort.config())
    totals = account(manifest)
    assert totals["excluded"] == 17
    refuse_too_many_exclusions(totals, most=0.0)
    put(cohort, "cut", written(ct(20))[:-300])
    totals = account(build_manifest(cohort.config())[0])
    with pytest.raises(SourceError, match=r"^1 of 3 slices are excluded by defect \(33.3%\)"):
        refuse_too_many_exclusions(totals, most=0.3)


def test_same_slice_in_two_sources_is_used_once(cohort: Cohort) -> None:
    put_neighbours(cohort)
    put(cohort, "../other/2.dcm", ct(2))
    put(cohort, "../other/3.dcm", ct(3))
    found = run(cohort, source__dicom=[str(cohort.dicom), str(cohort.folder / "other")])
    assert found.manifest["reason"].tolist() == ["", "", "", "duplicate"]
    assert sorted(found.pixels) == ["1.2.3.1", "1.2.3.2", "1.2.3.3"]


@pytest.mark.parametrize(
    "other",
    [
        lambda: with_stored(ct(3), lambda stored: stored + np.eye(SIZE, dtype=int)),
        lambda: ct(3, ImagePositionPatient=[-8, -8, 99]),
        lambda: ct(3, RescaleIntercept=-1000),
    ],
    ids=["pixels", "position", "rescale"],
)
def test_two_different_slices_of_one_name_are_both_refused(cohort: Cohort, other: Callable[[], Dataset]) -> None:
    put_neighbours(cohort)
    put(cohort, "a", ct(3))
    put(cohort, "b", other())
    assert run(cohort).reasons == {"1.dcm": "", "2.dcm": "", "a": "conflict", "b": "conflict"}


def test_damaged_copies_do_not_push_out_the_whole_slice(cohort: Cohort) -> None:
    put_neighbours(cohort)
    whole = written(ct(1))
    put(cohort, "0 cut", whole[:-300])
    put(cohort, "0 headless", whole[: whole.index(b"\x28\x00\x10\x00US")])
    packed = in_syntax(ct(1), RLELossless, cohort.folder)
    put(cohort, "0 packed", packed[:-300])
    found = run(cohort)
    assert found.reasons == {
        "1.dcm": "",
        "2.dcm": "",
        "0 cut": "truncated_pixels",
        "0 headless": "no_pixels",
        "0 packed": "undecodable",
    }
    assert_shows(found.pixels["1.2.3.1"], head(1))


# ---- multi-frame

POSITIONS_MM = [10.0, 0.0, 15.0, 5.0]
"""Frames need not lie in order."""


def item(**elements: Any) -> Sequence:
    """A functional group: a sequence of one item."""
    dataset = Dataset()
    for name, value in elements.items():
        setattr(dataset, name, value)
    return Sequence([dataset])


def enhanced(positions_mm: list[float] = POSITIONS_MM, *, per_frame: bool = False, **elements: Any) -> Dataset:
    """An Enhanced CT (PS3.3 A.38) with what all frames share in the shared groups, or said again in each frame's."""
    count = len(positions_mm)
    dataset = ct(0, np.concatenate([head(k) for k in range(count)]), bits=16, signed=True)
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleIntercept", "RescaleSlope"):
        del dataset[name]
    del dataset.WindowCenter, dataset.WindowWidth
    dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.NumberOfFrames = EnhancedCTImageStorage, "1.2.3", count
    dataset.Rows = SIZE
    shared = {
        "PixelMeasuresSequence": item(PixelSpacing=[SPACING_MM, SPACING_MM], SliceThickness=5),
        "PlaneOrientationSequence": item(ImageOrientationPatient=AXIAL),
        "PixelValueTransformationSequence": item(RescaleIntercept=-1024, RescaleSlope=1, RescaleType="HU"),
        "CTImageFrameTypeSequence": item(FrameType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]),
        "FrameVOILUTSequence": item(WindowCenter=40, WindowWidth=80),
        "CTReconstructionSequence": item(ConvolutionKernel="Hr40", ConvolutionKernelGroup="BRAIN"),
    }
    groups = [{"PlanePositionSequence": item(ImagePositionPatient=[-8, -8, z])} for z in positions_mm]
    dataset.SharedFunctionalGroupsSequence = item(**({} if per_frame else shared))
    dataset.PerFrameFunctionalGroupsSequence = Sequence(
        [item(**group, **(shared if per_frame else {}))[0] for group in groups]
    )
    for name, value in elements.items():
        setattr(dataset, name, value)
    return dataset


@pytest.mark.parametrize("per_frame", [False, True], ids=["shared", "per frame"])
@pytest.mark.parametrize(
    "syntax",
    [ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless, JPEG2000Lossless, DeflatedExplicitVRLittleEndian],
    ids=lambda uid: uid.keyword,
)
def test_enhanced_ct_is_a_slice_a_frame_in_order_of_position(cohort: Cohort, syntax: UID, per_frame: bool) -> None:
    content = in_syntax(enhanced(per_frame=per_frame), syntax, cohort.folder)
    put(cohort, "enhanced", content)
    found = run(cohort)
    assert found.manifest["status"].tolist() == ["used"] * 4
    assert found.store.image_id[0, :4].tolist() == ["1.2.3#2", "1.2.3#4", "1.2.3#1", "1.2.3#3"]
    assert found.manifest["position_mm"].tolist() == sorted(POSITIONS_MM)
    assert set(found.manifest["kernel"]) == {"soft"}
    frames = pydicom.dcmread(io.BytesIO(content)).pixel_array  # the rescale stands in the groups
    for k, frame in enumerate(frames):
        assert_shows(found.pixels[f"1.2.3#{k + 1}"], frame.astype(int) - 1024)


def test_enhanced_ct_of_one_frame_and_converted_ones_are_used(cohort: Cohort) -> None:
    put(cohort, "one", enhanced([20.0], SOPInstanceUID="1.2.4"))
    put(cohort, "legacy", enhanced(SOPClassUID=LegacyConvertedEnhancedCTImageStorage))
    found = run(cohort)
    assert found.manifest["status"].tolist() == ["used"] * 5
    assert_shows(found.pixels["1.2.4#1"], head(0))
    assert_shows(found.pixels["1.2.3#4"], head(3))


def test_frames_without_a_rescale_of_their_own_have_the_files(cohort: Cohort) -> None:
    dataset = enhanced(RescaleIntercept=-1024, RescaleSlope=1)
    del dataset.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence
    put(cohort, "frames.dcm", dataset)
    found = run(cohort)
    assert set(found.manifest["status"]) == {"used"}
    assert_shows(found.pixels["1.2.3#1"], head(0))


def test_frames_are_judged_each_by_itself(cohort: Cohort) -> None:
    dataset = enhanced()
    frames = dataset.PerFrameFunctionalGroupsSequence
    frames[0].CTImageFrameTypeSequence = item(FrameType=["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"])
    frames[1].PlaneOrientationSequence = item(ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    frames[3].PixelValueTransformationSequence = item(RescaleIntercept=-1000, RescaleSlope=2)
    put(cohort, "0", dataset)
    found = run(cohort)
    by_image = dict(zip(found.manifest["image_id"], found.manifest["reason"], strict=True))
    assert by_image == {"1.2.3#1": "localizer", "1.2.3#2": "not_axial", "1.2.3#3": "", "1.2.3#4": ""}
    assert_shows(found.pixels["1.2.3#3"], head(2))
    assert_shows(found.pixels["1.2.3#4"], (head(3) + 1024) * 2 - 1000)


def test_enhanced_ct_cut_short_loses_its_last_frames_alone(cohort: Cohort) -> None:
    whole = written(enhanced())
    put(cohort, "0", whole[: -SIZE * SIZE * 3])
    put(cohort, "padded", written(enhanced([40.0], SOPInstanceUID="1.2.4")) + bytes(2))
    found = run(cohort)
    by_image = dict(zip(found.manifest["image_id"], found.manifest["reason"], strict=True))
    assert by_image == {
        "1.2.3#1": "",
        "1.2.3#2": "",
        "1.2.3#3": "truncated_pixels",
        "1.2.3#4": "truncated_pixels",
        "1.2.4#1": "",
    }


@pytest.mark.parametrize(
    "spoil",
    [
        lambda ds: delattr(ds, "PerFrameFunctionalGroupsSequence"),
        lambda ds: ds.PerFrameFunctionalGroupsSequence.pop(),
        lambda ds: setattr(ds, "SOPClassUID", CTImageStorage),
        lambda ds: setattr(ds, "NumberOfFrames", "0"),
    ],
    ids=["no groups", "a group too few", "not enhanced", "no frames"],
)
def test_frames_without_a_geometry_for_each_are_excluded(cohort: Cohort, spoil: Callable[[Dataset], Any]) -> None:
    put_neighbours(cohort)
    dataset = enhanced()
    spoil(dataset)
    put(cohort, "0", dataset)
    assert run(cohort).reasons == {"1.dcm": "", "2.dcm": "", "0": "multi_frame"}


def test_frame_whose_groups_say_nothing_has_no_geometry(cohort: Cohort) -> None:
    put_neighbours(cohort)
    dataset = enhanced([0.0, 5.0])
    del dataset.SharedFunctionalGroupsSequence
    put(cohort, "0", dataset)
    found = run(cohort)
    assert found.manifest.loc[found.manifest["path"] == "0", "reason"].tolist() == ["no_geometry"] * 2


# ---- the fast walk and pydicom


def both_ways(content: bytes, path: Path) -> tuple[str, str]:
    """What the walk makes of a file, and what pydicom does; the first is empty where the walk leaves it to pydicom."""
    path.write_bytes(content)
    place = Place(str(path), len(content), path.stat().st_mtime_ns)
    start = read_head(place)

    def tried(way: Callable[[], Any]) -> str:
        try:
            return repr(way())
        except Exception:  # as `read_headers` has it
            return "unreadable"

    def walk() -> list[header.Header] | None:
        walked = header._walk(start)
        if walked is None or header._needs_pydicom(walked.values):
            return None
        return [header._interpret(walked, patient_salt="s")]

    walked = tried(walk)
    if walked == "None":
        return "", ""
    return walked, tried(lambda: header._read_with_pydicom(place, start, patient_salt="s"))


def headers_of_all_forms(tmp_path: Path) -> list[bytes]:
    forms = [tweak(form, k) for k, form in enumerate(FORMS)]
    forms += [in_syntax(ct(), syntax, tmp_path) for syntax in SYNTAXES]
    forms += [written(enhanced()), written(enhanced(per_frame=True)), written(ct(bits=16, signed=True))]
    cohort = Cohort(tmp_path, size=16)
    for number, form in enumerate((UNSIGNED_12, SIGNED_16)):
        (image_id,) = cohort.add_study(number, 1, form=form)
        forms.append((cohort.dicom / f"{image_id}.dcm").read_bytes())
    return forms


def test_walk_agrees_with_pydicom_on_every_form(tmp_path: Path) -> None:
    answers = [both_ways(content, tmp_path / "file") for content in headers_of_all_forms(tmp_path)]
    assert all(walked == of_pydicom for walked, of_pydicom in answers)
    assert sum(bool(walked) for walked, _ in answers) > len(answers) // 2


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """A header with a few bytes changed, lost or gained."""
    changed = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(128, max(129, len(changed) - 40)))
        match int(rng.integers(5)):
            case 0:
                changed[at] = rng.integers(256)
            case 1:
                changed[at] ^= 1 << int(rng.integers(8))
            case 2:
                changed[at] = rng.choice([0, 255, 32, 92])
            case 3:
                del changed[at : at + int(rng.integers(1, 5))]
            case _:
                changed[at:at] = rng.bytes(int(rng.integers(1, 5)))
    return bytes(changed)


def test_walk_agrees_with_pydicom_on_mutated_headers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    forms = [content for content in headers_of_all_forms(tmp_path) if both_ways(content, tmp_path / "file")[0]]
    forms = [content[: content.rindex(b"\xe0\x7f\x10\x00") + 60] for content in forms]
    answered = 0
    for number in range(3000):
        content = mutate(forms[number % len(forms)], rng)
        walked, of_pydicom = both_ways(content, tmp_path / "file")
        assert walked == of_pydicom, f"mutation {number}"
        answered += bool(walked)
    assert answered > 500  # else the walk would be tried on nothing


@pytest.mark.skipif(not REAL_DICOM.is_dir(), reason="the real head CTs are not here")
def test_walk_agrees_with_pydicom_on_real_files(tmp_path: Path) -> None:
    paths = [path for path in sorted(REAL_DICOM.rglob("*")) if path.is_file()]
    answers = [both_ways(path.read_bytes(), tmp_path / "file") for path in paths]
    assert all(walked == of_pydicom for walked, of_pydicom in answers)
    assert sum(bool(walked) for walked, _ in answers) > 60


def test_what_a_header_says_is_not_repeated_in_warnings(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file"
    path.write_bytes(
        meta_and(bare(ct(), implicit=False).replace(b"ISO_IR 100", b"MRSMILLER\0"), ImplicitVRLittleEndian)
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        (header,) = read_headers(Place(str(path), path.stat().st_size, path.stat().st_mtime_ns), patient_salt="s")
    assert header.rows == SIZE
    assert not said
    assert "MILLER" not in "".join(capfd.readouterr())


# ---- the documented list


def test_documented_list_is_the_list_of_reasons() -> None:
    table = (ROOT / "docs" / "defects.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*\|.*\|.*\|$", table, re.M)
    assert rows == list(REASONS)
