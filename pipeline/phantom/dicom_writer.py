"""Write a slice in the exact form of the RSNA 2019 files: 22 elements, no true UIDs, nothing compressed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom.config
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import PYDICOM_IMPLEMENTATION_UID, UID, CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian

PADDING = -2000
"""Stored value outside the field of view in many RSNA files, with no element that says so."""

BITS_16 = 16


@dataclass(frozen=True)
class StoredForm:
    """How a study's slices are stored: the columns of the RSNA set's own table of forms.

    Attributes:
        bits: BitsStored (0028,0101), 12 or 16.
        signed: PixelRepresentation (0028,0103) 1 instead of 0.
        intercept: Rescale Intercept (0028,1052) as written, such as ``-1024`` or ``-1024.000000``.
        explicit: Explicit VR little endian instead of implicit.
        padded: `PADDING` outside the circular field of view.
        wrapped: the defect of 123 RSNA slices, in which HU below 0 wrap round to the top of the 12 bits.
    """

    bits: int
    signed: bool
    intercept: str = "-1024"
    explicit: bool = True
    padded: bool = False
    wrapped: bool = False

    @property
    def windows(self) -> tuple[list[str], list[str]]:
        """Window Center and Window Width as written: 12-bit files hold two, padded with zeros."""
        if self.bits == BITS_16:
            return ["30"], ["80"]
        return ["00036", "00036"], ["00080", "00080"]


def stored_values(pixels_hu: np.ndarray, *, form: StoredForm, field_of_view: np.ndarray | None = None) -> np.ndarray:
    """Turn HU into what the file stores.

    Args:
        pixels_hu: [row, column].
        form: the form of the study.
        field_of_view: bool [row, column], False outside the scanner's circle; None is all True.

    Returns:
        uint16 or int16 [row, column].
    """
    rounded = np.rint(pixels_hu).astype(np.int32)
    # wrapped: the repair adds 1000, takes 4096 off what reaches that, and uses intercept -1000; so HU modulo 4096
    values = rounded % 4096 if form.wrapped else rounded - int(float(form.intercept))
    if not form.signed:
        values = np.clip(values, 0, 4095)
    if field_of_view is not None and not form.wrapped:
        values[~field_of_view] = PADDING if form.padded else 0
    return values.astype(np.int16 if form.signed else np.uint16)


def write_rsna_slice(
    path: Path | str,
    *,
    stored: np.ndarray,
    form: StoredForm,
    image_id: str,
    study_id: str,
    series_id: str,
    patient_id: str,
    position_mm: tuple[float, float, float],
    orientation: tuple[float, float, float, float, float, float],
    spacing_mm: float,
) -> None:
    """Write one slice; the same arguments give the same bytes.

    Args:
        path: the file, whose folder exists.
        stored: stored values, uint16 or int16 [row, column].
        form: how they are to be described.
        image_id: ``ID_`` and 9 hex digits, the SOPInstanceUID.
        study_id, series_id: ``ID_`` and 10 hex digits.
        patient_id: ``ID_`` and 8 hex digits.
        position_mm: centre of the first pixel, patient axes.
        orientation: direction of a row, then of a column.
        spacing_mm: between rows, and between columns.
    """
    centres, widths = form.windows
    writing_mode = pydicom.config.settings.writing_validation_mode
    reading_mode = pydicom.config.settings.reading_validation_mode
    # RSNA's identifiers are no UIDs; pydicom would warn several times a file
    pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    try:
        dataset = Dataset()
        dataset.SOPInstanceUID = image_id
        dataset.Modality = "CT"
        dataset.PatientID = patient_id
        dataset.StudyInstanceUID = study_id
        dataset.SeriesInstanceUID = series_id
        dataset.StudyID = ""
        dataset.ImagePositionPatient = [f"{value:.6f}" for value in position_mm]
        dataset.ImageOrientationPatient = [f"{value:.6f}" for value in orientation]
        dataset.SamplesPerPixel = 1
        dataset.PhotometricInterpretation = "MONOCHROME2"
        dataset.Rows, dataset.Columns = stored.shape
        dataset.PixelSpacing = [f"{spacing_mm:.6f}"] * 2
        dataset.BitsAllocated = BITS_16
        dataset.BitsStored, dataset.HighBit = form.bits, form.bits - 1
        dataset.PixelRepresentation = int(form.signed)
        dataset.WindowCenter, dataset.WindowWidth = centres, widths
        dataset.RescaleIntercept, dataset.RescaleSlope = form.intercept, "1"
        dataset.PixelData = stored.astype("<i2" if form.signed else "<u2", copy=False).tobytes()
        dataset["PixelData"].VR = "OW"
        file = FileDataset(str(path), dataset, preamble=b"\0" * 128, file_meta=_file_meta(image_id, form))
        # not enforced: an implicit file of the RSNA set has no group length, and SOP identifiers that disagree
        pydicom.dcmwrite(
            path, file, enforce_file_format=False, implicit_vr=not form.explicit, little_endian=True, overwrite=True
        )
    finally:
        pydicom.config.settings.writing_validation_mode = writing_mode
        pydicom.config.settings.reading_validation_mode = reading_mode


def _file_meta(image_id: str, form: StoredForm) -> FileMetaDataset:
    meta = FileMetaDataset()
    if form.explicit:
        meta.FileMetaInformationGroupLength = 0  # counted on writing, but only where it is present
    meta.FileMetaInformationVersion = b"\x00\x01"
    meta.MediaStorageSOPClassUID = CTImageStorage
    # 2.25 is the root that needs no registration; RSNA's files hold a true UID here, which is not the SOPInstanceUID
    meta.MediaStorageSOPInstanceUID = UID(f"2.25.{int(hashlib.sha256(image_id.encode()).hexdigest()[:30], 16)}")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian if form.explicit else ImplicitVRLittleEndian
    meta.ImplementationClassUID = PYDICOM_IMPLEMENTATION_UID
    meta.ImplementationVersionName = "PHANTOM"
    return meta
