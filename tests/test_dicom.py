"""Reading files: agreement with pydicom, and what becomes of files that are no slices."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.uid import ExplicitVRBigEndian, RLELossless

from pipeline.header import Header, read_headers
from pipeline.index import PIXEL_COLUMNS
from pipeline.phantom.dicom_writer import StoredForm
from pipeline.pixels import PixelFault, read_stored
from pipeline.place import Place, Scratch
from tests.conftest import SIGNED_16, UNSIGNED_12, Cohort


def place_of(path: Path) -> Place:
    status = path.stat()
    return Place(str(path), status.st_size, status.st_mtime_ns)


def header_of(path: Path, salt: str = "s") -> Header:
    (header,) = read_headers(place_of(path), patient_salt=salt)
    return header


def facts_of(header: Header) -> dict[str, Any]:
    return {name: getattr(header, name) for name in PIXEL_COLUMNS}


def read_pixels(path: Path) -> np.ndarray:
    return read_stored(place_of(path), scratch=Scratch(), **facts_of(header_of(path)))


@pytest.mark.parametrize(
    "form",
    [
        UNSIGNED_12,
        SIGNED_16,
        StoredForm(bits=12, signed=True, intercept="0"),
        StoredForm(bits=16, signed=True, padded=True),
    ],
)
def test_stored_values_and_header_agree_with_pydicom(cohort: Cohort, form: StoredForm) -> None:
    cohort.add_study(1, 1, form=form)
    (path,) = cohort.dicom.iterdir()
    dataset = pydicom.dcmread(path)
    header = header_of(path, "s")
    np.testing.assert_array_equal(read_pixels(path), dataset.pixel_array)
    assert header.image_id == dataset.SOPInstanceUID
    assert (header.rows, header.columns) == (dataset.Rows, dataset.Columns)
    assert header.intercept == float(dataset.RescaleIntercept)
    assert [header.position_x_mm, header.position_y_mm, header.position_z_mm] == dataset.ImagePositionPatient
    assert header.transfer_syntax == dataset.file_meta.TransferSyntaxUID
    assert path.read_bytes()[header.pixel_offset :] == dataset.PixelData


def test_bits_above_bits_stored_mean_nothing(cohort: Cohort) -> None:
    cohort.add_study(1, 1)
    (path,) = cohort.dicom.iterdir()
    dataset = pydicom.dcmread(path)
    stored = np.frombuffer(dataset.PixelData, "<u2") | 0xA000
    dataset.PixelData = stored.tobytes()
    dataset.save_as(path)
    np.testing.assert_array_equal(read_pixels(path), pydicom.dcmread(path).pixel_array)
    assert read_pixels(path).max() < 4096


@pytest.mark.parametrize("syntax", [RLELossless, ExplicitVRBigEndian])
def test_other_transfer_syntaxes_go_through_pydicom(cohort: Cohort, syntax: pydicom.uid.UID) -> None:
    cohort.add_study(1, 1)
    (path,) = cohort.dicom.iterdir()
    expected = read_pixels(path)
    dataset = pydicom.dcmread(path)
    if syntax == RLELossless:
        dataset.compress(syntax)
        dataset.save_as(path)
    else:
        dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").byteswap().tobytes()
        dataset.file_meta.TransferSyntaxUID = syntax
        pydicom.dcmwrite(path, dataset, little_endian=False, implicit_vr=False)
    np.testing.assert_array_equal(read_pixels(path), expected)


def test_file_without_preamble_is_read(cohort: Cohort) -> None:
    cohort.add_study(1, 1, form=SIGNED_16)
    (path,) = cohort.dicom.iterdir()
    expected = read_pixels(path)
    dataset = pydicom.dcmread(path)
    buffer = io.BytesIO()
    pydicom.filewriter.write_dataset(pydicom.filebase.DicomBytesIO(), dataset)
    fp = pydicom.filebase.DicomFileLike(buffer)
    fp.is_little_endian, fp.is_implicit_VR = True, True
    pydicom.filewriter.write_dataset(fp, dataset)
    path.write_bytes(buffer.getvalue())
    assert header_of(path, "s").fault == ""
    np.testing.assert_array_equal(read_pixels(path), expected)


@pytest.mark.parametrize("content", [b"", b"x", b"Copyright (c) 2019", b"\x89PNG\r\n\x1a\n" + bytes(200), bytes(4096)])
def test_other_files_are_not_dicom(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert header_of(path, "s").fault == "not_dicom"


def test_missing_file_is_unreadable(tmp_path: Path) -> None:
    assert read_headers(Place(str(tmp_path / "none"), 100, 0), patient_salt="s")[0].fault == "unreadable"


def test_raw_patient_id_leaves_no_header_and_the_salt_changes_the_key(cohort: Cohort) -> None:
    cohort.add_study(1, 1, patient_id="SECRET-77")
    (path,) = cohort.dicom.iterdir()
    one, other = header_of(path, "a"), header_of(path, "b")
    assert "SECRET-77" not in repr(one)
    assert one.patient_key != other.patient_key
    assert len(one.patient_key) == 16


def test_changed_and_truncated_files_are_refused(cohort: Cohort) -> None:
    cohort.add_study(1, 1)
    (path,) = cohort.dicom.iterdir()
    before, facts = place_of(path), facts_of(header_of(path))
    with path.open("r+b") as file:
        file.truncate(before.size - 100)
    with pytest.raises(PixelFault, match="changed"):
        read_stored(before, scratch=Scratch(), **facts)
    with pytest.raises(PixelFault, match="truncated_pixels"):
        read_stored(place_of(path), scratch=Scratch(), **facts)


def test_mutated_headers_never_raise(cohort: Cohort) -> None:
    cohort.add_study(1, 1)
    (path,) = cohort.dicom.iterdir()
    content = path.read_bytes()[:1500]
    rng = np.random.default_rng(0)
    for _ in range(400):
        mutated = bytearray(content)
        for _ in range(rng.integers(1, 20)):
            mutated[rng.integers(len(mutated))] = rng.integers(256)
        path.write_bytes(bytes(mutated[: rng.integers(1, len(mutated))]))
        assert header_of(path, "s").fault in ("", "unreadable", "not_dicom", "dicomdir")
