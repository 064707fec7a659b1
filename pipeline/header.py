"""The header of a DICOM file as a flat record, one for each slice in it.

Headers are read once, by `index`. The record keeps the place of the pixel data in the file, so that an uncompressed slice is
later read with one read and no second parse. A header of the common form is walked here, at a tenth of pydicom's time; pydicom
reads every other one, and a test holds the two to the same answer.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import re
import warnings
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    LegacyConvertedEnhancedCTImageStorage,
    MediaStorageDirectoryStorage,
)

from pipeline.compiled import compiled
from pipeline.errors import SourceError
from pipeline.place import (
    UNREADABLE_METHOD,
    ChangedError,
    Place,
    read_head,
)
from pipeline.purpose import GIVEN, NOT_GIVEN, NOT_TOLD, body_class, contrast_class, is_projection, kernel_class
from pipeline.series import ORIENTATION, PLACE

# RSNA's identifiers are no UIDs: pydicom would warn several times a file, millions of times over the set.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # what it says of a header may quote it

NATIVE = (str(ExplicitVRLittleEndian), str(ImplicitVRLittleEndian))
"""Transfer syntaxes whose pixel data lie in the file as they are (PS3.5 A.1, A.2)."""

DEFLATED_SYNTAX = str(DeflatedExplicitVRLittleEndian)

ENHANCED = (str(EnhancedCTImageStorage), str(LegacyConvertedEnhancedCTImageStorage))
"""Multi-frame CT, whose geometry stands in functional groups (PS3.3 A.38, C.7.6.16)."""

TAGS: dict[str, int] = {
    "image_type": 0x00080008,
    "sop_class": 0x00080016,
    "image_id": 0x00080018,
    "modality": 0x00080060,
    "series_description": 0x0008103E,
    "patient_id": 0x00100020,
    "agent": 0x00180010,
    "agents": 0x00180012,
    "body_part": 0x00180015,
    "thickness_mm": 0x00180050,
    "kernel": 0x00181210,
    "study_uid": 0x0020000D,
    "series_uid": 0x0020000E,
    "position": 0x00200032,
    "orientation": 0x00200037,
    "samples": 0x00280002,
    "photometric": 0x00280004,
    "frames": 0x00280008,
    "rows": 0x00280010,
    "columns": 0x00280011,
    "spacing": 0x00280030,
    "bits_allocated": 0x00280100,
    "bits_stored": 0x00280101,
    "high_bit": 0x00280102,
    "signed": 0x00280103,
    "padding": 0x00280120,
    "padding_limit": 0x00280121,
    "window_centre": 0x00281050,
    "window_width": 0x00281051,
    "intercept": 0x00281052,
    "slope": 0x00281053,
    "unit": 0x00281054,
}
NAMES = {tag: name for name, tag in TAGS.items()}
MEDIA_SOP_CLASS_TAG, TRANSFER_SYNTAX_TAG, CHARACTER_SET_TAG = 0x00020002, 0x00020010, 0x00080005
WANTED = np.array(sorted((*NAMES, CHARACTER_SET_TAG)))
WANTED_OF_META = np.array([MEDIA_SOP_CLASS_TAG, TRANSFER_SYNTAX_TAG])
PLAIN_UID, PLAIN_CHARACTER_SET = re.compile(rb"[0-9.]{1,64}[ \0]*"), re.compile(rb"[A-Z0-9_ \\]*\0?")
"""What the walk takes; of anything else pydicom shall make what it can."""

PIXEL_DATA_TAGS = (b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10")
ITEM_TAG = b"\xfe\xff\x00\xe0"
PIXEL_ELEMENT_BYTES = 12
"""Tag, VR and length of (7FE0,0010) where they are longest."""

PIXEL_VRS = (b"OW", b"OB", b"UN")
"""An implicit header has a length here. Read as one, each of these is odd, which no length is (PS3.5 7.1.1)."""

HEADER_LIMIT_BYTES = 64 << 20
"""No header is longer: 20,000 frames of an Enhanced CT take 10 to 40 MB. What claims to be would only fill the memory."""

UNDEFINED_LENGTH = 0xFFFFFFFF
LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
SHORT_VRS = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
"""Value representations with 4 and with 2 bytes of length (PS3.5 7.1.2)."""

UNKNOWN_VR, SHORT_VR, LONG_VR = 0, 1, 2
VR_KINDS = np.zeros(1 << 16, np.uint8)
VR_KINDS[[int.from_bytes(vr) for vr in SHORT_VRS]] = SHORT_VR
VR_KINDS[[int.from_bytes(vr) for vr in LONG_VRS]] = LONG_VR
CODE_STRING = tuple(b"CS")

IMAGE_TYPES = frozenset(
    ("ORIGINAL", "DERIVED", "PRIMARY", "SECONDARY", "AXIAL", "LOCALIZER", "REFORMATTED", "MPR", "VOLUME", "PROJECTION")
)
"""The words of Image Type that are kept (PS3.3 C.8.2.1.1.1): free text may hold anything, a name too."""

PRINTABLE = re.compile(r"[ -~]{1,64}")
"""What an identifier may be: RSNA's are no UIDs, but none is longer (PS3.5 6.2)."""

MODALITIES = frozenset(("CT", "CR", "DX", "MR", "NM", "OT", "PR", "PT", "SC", "SR", "US", "XA"))
"""The modalities that are told (PS3.3 C.7.3.1.1.1); the rest is OT, other."""

OTHER_UNITS = frozenset(("OD", "MGML", "Z_EFF", "ED", "EDW", "PCT"))
"""Rescale Types of maps that are no HU (PS3.3 C.11.1.1.2); "US", unspecified, and words of a writer's own stand in ordinary CT too."""

PHOTOMETRIC = frozenset(("MONOCHROME1", "MONOCHROME2", "RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_RCT"))


GEOMETRY = (*PLACE, *ORIENTATION, "row_spacing_mm", "column_spacing_mm")


class Header(NamedTuple):
    """What one slice says of itself. Absent numbers are NaN or −1, absent texts are empty; `fault` names an unreadable file.

    No text leaves a header as it stands, but for the identifiers that tie files together and the words of fixed lists.
    """

    fault: str = ""
    frame: int = -1
    """Number of the frame in a multi-frame file, from 0; −1 where the file is one slice."""
    transfer_syntax: str = ""
    modality: str = ""
    image_type: str = ""
    study_uid: str = ""
    series_uid: str = ""
    image_id: str = ""
    patient_key: str = ""
    position_x_mm: float = np.nan
    position_y_mm: float = np.nan
    position_z_mm: float = np.nan
    row_x: float = np.nan
    row_y: float = np.nan
    row_z: float = np.nan
    column_x: float = np.nan
    column_y: float = np.nan
    column_z: float = np.nan
    rows: int = -1
    columns: int = -1
    row_spacing_mm: float = np.nan
    column_spacing_mm: float = np.nan
    thickness_mm: float = np.nan
    kernel: str = ""
    """``bone`` or ``soft`` where Convolution Kernel or Series Description says so, else empty."""
    body: str = ""
    """``head`` or ``other`` where Series Description or Body Part Examined says so, else empty."""
    contrast: int = NOT_TOLD
    """1 where contrast medium was given, 0 where none was, −1 where nothing is said of it."""
    projection: int = 0
    """1 where Image Type or Series Description says that the slice is the brightest or darkest of many."""
    samples: int = -1
    photometric: str = ""
    frames: int = 1
    bits_allocated: int = -1
    bits_stored: int = -1
    high_bit: int = -1
    signed: int = -1
    intercept: float = np.nan
    slope: float = np.nan
    unit: str = "HU"
    """Of what rescale makes: ``HU``, or ``other`` where Rescale Type says so."""
    padding: float = np.nan
    padding_limit: float = np.nan
    """The other end of the range of values that are padding."""
    window_centre: float = np.nan
    window_width: float = np.nan
    pixel_offset: int = -1
    pixel_length: int = -1


def read_headers(place: Place, *, patient_salt: str) -> list[Header]:
    """Read what `index` needs of one file, without its pixels.

    Args:
        place: any file.
        patient_salt: key of the hash that takes the place of (0010,0020) Patient ID; the raw id leaves no header.

    Returns:
        One header, or one for each frame of an Enhanced multi-frame CT; for a file that cannot be read, one whose `fault` is
        ``not_dicom``, ``unreadable``, ``zip_method`` or ``dicomdir``.
    """
    if place.method == UNREADABLE_METHOD:
        return [Header(fault="zip_method")]
    try:
        head = read_head(place)
        walked = _walk(head)
        if walked is None or _needs_pydicom(walked.values):
            return _read_with_pydicom(place, head, patient_salt=patient_salt)
        return [_interpret(walked, patient_salt=patient_salt)]
    except ChangedError:
        return [Header(fault="unreadable")]
    except SourceError:  # the storage itself is out of reach, which is no fault of the file
        raise
    except Exception:  # a mutated file can make a parser raise anything; the file is named, the run goes on
        return [Header(fault="unreadable")]


class Walked(NamedTuple):
    """The elements of `TAGS` that a data set holds, as bytes."""

    values: dict[str, bytes]
    transfer_syntax: str
    is_little_endian: bool
    pixel_offset: int
    pixel_length: int


def _walk(head: bytes) -> Walked | None:
    """Walk a header of the common form (PS3.10 7.1, PS3.5 7.1): a preamble, Explicit or Implicit VR little endian, no element of
    undefined length before the pixel data. None for every other file: pydicom shall read it."""
    if head[128:132] != b"DICM":
        return None
    meta, at = _walk_elements(head, 132, explicit=True, stop_group=0x0003, wanted=WANTED_OF_META)
    syntax = _text(meta.get(TRANSFER_SYNTAX_TAG))
    if at < 0 or not PLAIN_UID.fullmatch(meta.get(TRANSFER_SYNTAX_TAG, b"")):
        return None
    if syntax in (DEFLATED_SYNTAX, str(ExplicitVRBigEndian)):
        return None
    explicit = syntax != str(ImplicitVRLittleEndian)
    found, at = _walk_elements(head, at, explicit=explicit, stop_group=0x7FE0, wanted=WANTED)
    if at < 0 or head[at : at + 4] != PIXEL_DATA_TAGS[0] or len(head) < at + PIXEL_ELEMENT_BYTES:
        return None
    if explicit != (head[at + 4 : at + 6] in PIXEL_VRS):  # not what the transfer syntax says
        return None
    if not PLAIN_CHARACTER_SET.fullmatch(found.pop(CHARACTER_SET_TAG, b"")):
        return None
    start, offset = (at + 8, at + 12) if explicit else (at + 4, at + 8)
    length = int.from_bytes(head[start:offset], "little")
    values = {"sop_class": meta.get(MEDIA_SOP_CLASS_TAG, b"")}  # RSNA's data sets have none of their own
    values |= {NAMES[tag]: value for tag, value in found.items()}
    return Walked(values, syntax, True, offset, length)


def _walk_elements(
    head: bytes, at: int, *, explicit: bool, stop_group: int, wanted: npt.NDArray[np.int64]
) -> tuple[dict[int, bytes], int]:
    """The wanted elements before `stop_group`, and where that starts; −1 where pydicom shall read the file."""
    found = np.empty((len(wanted), 3), np.int64)
    count, at = _find_elements(np.frombuffer(head, np.uint8), at, explicit, stop_group, wanted, found)
    return {tag: head[start : start + length] for tag, start, length in found[:count].tolist()}, at


@compiled
def _find_elements(
    head: npt.NDArray[np.uint8],
    at: int,
    explicit: bool,
    stop_group: int,
    wanted: npt.NDArray[np.int64],
    found: npt.NDArray[np.int64],
) -> tuple[int, int]:
    """Note tag, start and length of the elements that are `wanted`, whose tags ascend, as those of a data set do. How many there
    are, and where `stop_group` starts, or −1."""
    end, count, place, before = len(head) - 8, 0, 0, np.int64(0)
    while at <= end:
        group = np.int64(head[at]) | np.int64(head[at + 1]) << 8
        tag = group << 16 | np.int64(head[at + 2]) | np.int64(head[at + 3]) << 8
        if group >= stop_group:
            return count, at
        start = at + 8
        is_code_string = True
        if explicit:
            first, second = np.int64(head[at + 4]), np.int64(head[at + 5])
            is_code_string = first == CODE_STRING[0] and second == CODE_STRING[1]
            kind = VR_KINDS[first << 8 | second]
            if kind == UNKNOWN_VR:
                return count, -1
            length = np.int64(head[at + 6]) | np.int64(head[at + 7]) << 8
            if kind == LONG_VR:
                if start + 4 > len(head):
                    return count, -1
                length = np.int64(head[start]) | np.int64(head[start + 1]) << 8
                length |= np.int64(head[start + 2]) << 16 | np.int64(head[start + 3]) << 24
                start += 4
        else:
            length = np.int64(head[at + 4]) | np.int64(head[at + 5]) << 8
            length |= np.int64(head[at + 6]) << 16 | np.int64(head[at + 7]) << 24
        if tag <= before or length == UNDEFINED_LENGTH:  # out of order: something is amiss
            return count, -1
        while place < len(wanted) and wanted[place] < tag:
            place += 1
        if place < len(wanted) and wanted[place] == tag:
            if tag == CHARACTER_SET_TAG and not is_code_string:
                return count, -1
            found[count, 0], found[count, 1], found[count, 2] = tag, start, length
            count += 1
        before, at = tag, int(start + length)
    return count, -1


def _needs_pydicom(values: dict[str, bytes]) -> bool:
    return _text(values.get("sop_class")) in ENHANCED or _integer_text(values.get("frames"), absent=1) != 1


def _read_with_pydicom(place: Place, head: bytes, *, patient_salt: str) -> list[Header]:
    """The general way, for headers of any form."""
    whole = head
    try:
        dataset, file = _parse(head)
        is_complete = len(head) >= place.size or dataset is None or _has_reached_pixels(file)
    except Exception:
        if len(head) >= place.size:
            raise
        is_complete = False
    if not is_complete:  # the header is longer than what was read, or lies in deflated bytes
        whole = read_head(place, HEADER_LIMIT_BYTES)
        dataset, file = _parse(whole)
    if dataset is None:
        return [Header(fault="not_dicom")]
    walked = _take(dataset, file)
    if _text(walked.values["sop_class"]) in ENHANCED:
        complete = read_quietly(io.BytesIO(whole), force=True)
        return list(_frames(complete, _interpret(walked, patient_salt=patient_salt)))
    return [_interpret(walked, patient_salt=patient_salt)]


def _parse(content: bytes) -> tuple[pydicom.FileDataset | None, io.BytesIO]:
    """Parse what is there up to the pixel data, at which the file is left."""
    tags: list[Any] = list(TAGS.values())
    file = io.BytesIO(content)
    try:
        return read_quietly(file, specific_tags=tags), file
    except InvalidDicomError:
        # a data set without preamble starts with group 0002 or 0008, the latter perhaps big endian
        is_big = content[:2] == b"\x00\x08" and content[4:6] in SHORT_VRS
        if content[:2] not in (b"\x02\x00", b"\x08\x00") and not is_big:
            return None, file
        file.seek(0)
        dataset = read_quietly(file, specific_tags=tags, force=True)
        return (dataset if len(dataset) else None), file


def read_quietly(file: io.BytesIO, **how: Any) -> pydicom.FileDataset:
    """A file's header by `pydicom.dcmread`, without its warnings; whatever that raises."""
    with warnings.catch_warnings(action="ignore"):  # it is read or it is not: warnings would quote it
        return pydicom.dcmread(_limit_inflation(file), stop_before_pixels=True, **how)


def _limit_inflation(file: io.BytesIO) -> io.BytesIO:
    """The file; if its data set is deflated (PS3.5 A.5), no more of that than a header may have: 4 MB may inflate to 4 GB."""
    content = file.getvalue()
    if DEFLATED_SYNTAX.encode() not in content[:1024]:
        return file
    start = 132 if content[128:132] == b"DICM" else 0
    meta, at = _walk_elements(content, start, explicit=True, stop_group=0x0003, wanted=WANTED_OF_META)
    if at < 0 or _text(meta.get(TRANSFER_SYNTAX_TAG)) != DEFLATED_SYNTAX:
        return file
    inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content[at:], HEADER_LIMIT_BYTES)
    if len(inflated) < HEADER_LIMIT_BYTES:
        return file
    packer = zlib.compressobj(0, wbits=-zlib.MAX_WBITS)  # as it is, in the form in which pydicom wants it
    return io.BytesIO(content[:at] + packer.compress(inflated) + packer.flush())


def _has_reached_pixels(file: io.BytesIO) -> bool:
    """Whether the element of the pixel data comes next, with its whole length."""
    at = file.tell()
    element = file.read(PIXEL_ELEMENT_BYTES)
    file.seek(at)
    return element[:4] in PIXEL_DATA_TAGS and len(element) == PIXEL_ELEMENT_BYTES


def _take(dataset: pydicom.FileDataset, file: io.BytesIO) -> Walked:
    values = {"sop_class": str(dataset.file_meta.get("MediaStorageSOPClassUID", "")).encode()}
    for name, tag in TAGS.items():
        value = getattr(dataset.get_item(tag), "value", None)
        if isinstance(value, bytes):
            values[name] = value
        elif isinstance(value, pydicom.Sequence):  # of which it is enough to know that it holds something
            values[name] = bytes(len(value))
    syntax = str(dataset.file_meta.get("TransferSyntaxUID", "")).strip()
    implicit, little = dataset.original_encoding  # as the transfer syntax says, or what pydicom found without one
    if not syntax:  # a data set without a file meta group: pydicom has found its encoding out
        syntax = str(ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian)
    offset = length = -1
    if syntax != DEFLATED_SYNTAX:
        at = file.tell()
        start_bytes = file.read(PIXEL_ELEMENT_BYTES)
        if start_bytes[:4] in PIXEL_DATA_TAGS:
            # asked of the element itself: a data set may be implicit whatever its transfer syntax says, and pydicom copes
            start = 8 if start_bytes[4:6] in PIXEL_VRS else 4
            offset = at + start + 4
            length = int.from_bytes(start_bytes[start : start + 4], "little" if little else "big")
    return Walked(values, syntax, bool(little), offset, length)


def _interpret(walked: Walked, *, patient_salt: str) -> Header:
    values, _, little, pixel_offset, pixel_length = walked
    get = values.get
    study_uid = _identifier(get("study_uid"))
    modality, photometric = _text(get("modality")), _text(get("photometric"))

    def integer(name: str) -> int:
        value = get(name) or b""
        return int.from_bytes(value[:2], "little" if little else "big") if len(value) >= 2 else -1

    signed, bits_stored = integer("signed"), integer("bits_stored")
    padding, padding_limit = (
        _as_stored(integer(name), bits_stored=bits_stored, signed=signed == 1) for name in ("padding", "padding_limit")
    )
    image_type, description = _text(get("image_type")).upper(), _text(get("series_description"))
    return Header(
        fault="dicomdir" if _text(get("sop_class")) == MediaStorageDirectoryStorage else "",
        transfer_syntax=walked.transfer_syntax if re.fullmatch(r"[0-9.]{1,64}", walked.transfer_syntax) else "",
        modality=modality if modality in MODALITIES or not modality else "OT",
        image_type="\\".join(word for word in image_type.split("\\") if word in IMAGE_TYPES),
        study_uid=study_uid,
        series_uid=_identifier(get("series_uid")),
        image_id=_identifier(get("image_id")),
        patient_key=patient_key(patient_id, salt=patient_salt) if (patient_id := _text(get("patient_id"))) else "",
        **_geometry(get("position"), get("orientation"), get("spacing")),
        rows=integer("rows"),
        columns=integer("columns"),
        thickness_mm=_floats(get("thickness_mm"), 1)[0],
        kernel=kernel_class(_text(get("kernel")), description),
        body=body_class(_text(get("body_part")), description),
        contrast=contrast_class(_text(get("agent")), has_agents=bool(get("agents")), description=description),
        projection=int(is_projection(image_type, description)),
        samples=integer("samples"),
        photometric=photometric if photometric in PHOTOMETRIC else "",
        frames=_integer_text(get("frames"), absent=1),
        bits_allocated=integer("bits_allocated"),
        bits_stored=bits_stored,
        high_bit=integer("high_bit"),
        signed=signed,
        intercept=_floats(get("intercept"), 1)[0],
        slope=_floats(get("slope"), 1)[0],
        unit="other" if _text(get("unit")) in OTHER_UNITS else "HU",
        padding=padding,
        padding_limit=padding_limit,
        window_centre=_floats(get("window_centre"), 1)[0],  # may be multi-valued: the first one counts
        window_width=_floats(get("window_width"), 1)[0],
        pixel_offset=pixel_offset,
        pixel_length=-1 if pixel_length == UNDEFINED_LENGTH else pixel_length,
    )


def _geometry(position: bytes | None, orientation: bytes | None, spacing: bytes | None) -> dict[str, Any]:
    """Where a slice lies: (0020,0032), (0020,0037) and (0028,0030), number by number; NaN where one is not as it should be."""
    numbers = [*_floats(position, 3), *_floats(orientation, 6), *_floats(spacing, 2)]
    return dict(zip(GEOMETRY, numbers, strict=True))


def _as_stored(padding: int, *, bits_stored: int, signed: bool) -> float:
    """(0028,0120) as the pixels that it speaks of are read: by their sign and their bits (PS3.3 C.7.5.1.1.2). It is often written
    as unsigned in signed data (63536 is −2000), or with more bits than the pixels have."""
    if padding < 0:
        return math.nan
    if not 1 <= bits_stored <= 16:
        return float(padding)
    padding &= (1 << bits_stored) - 1
    return float(padding - (1 << bits_stored) if signed and padding >> (bits_stored - 1) else padding)


def _frames(dataset: pydicom.FileDataset, whole: Header) -> Iterator[Header]:
    """One header for each frame: what its functional groups say, or those that all frames share (PS3.3 C.7.6.16)."""
    shared = dataset.get("SharedFunctionalGroupsSequence", [])
    groups = dataset.get("PerFrameFunctionalGroupsSequence", [])
    if whole.frames < 1 or len(groups) != whole.frames:
        yield whole._replace(frames=max(2, whole.frames))  # no geometry for each frame
        return
    native = whole.transfer_syntax in NATIVE
    frame_bytes = whole.rows * whole.columns * 2
    for number, group in enumerate(groups):

        def look(sequence: str, keyword: str, own: Any = group) -> bytes:
            for owner in (own, *shared[:1]):
                items = owner.get(sequence, [])
                if items and keyword in items[0]:
                    value = items[0][keyword].value
                    return "\\".join(map(str, [value] if isinstance(value, str | float | int) else value)).encode()
            return b""

        geometry = _geometry(
            look("PlanePositionSequence", "ImagePositionPatient"),
            look("PlaneOrientationSequence", "ImageOrientationPatient"),
            look("PixelMeasuresSequence", "PixelSpacing"),
        )
        frame_type = _text(look("CTImageFrameTypeSequence", "FrameType")).upper()
        intercept, slope, unit = (
            look("PixelValueTransformationSequence", keyword)
            for keyword in ("RescaleIntercept", "RescaleSlope", "RescaleType")
        )
        yield whole._replace(
            frame=number,
            frames=1,
            image_id=f"{whole.image_id}#{number + 1}",
            image_type="\\".join(word for word in frame_type.split("\\") if word in IMAGE_TYPES) or whole.image_type,
            projection=int(is_projection(frame_type, "") or whole.projection),
            contrast=_contrast_of_frame((group, *shared[:1]), whole.contrast),
            **geometry,
            thickness_mm=_floats(look("PixelMeasuresSequence", "SliceThickness"), 1)[0],
            kernel=kernel_class(
                _text(look("CTReconstructionSequence", "ConvolutionKernel")),
                _text(look("CTReconstructionSequence", "ConvolutionKernelGroup")),
            )
            or whole.kernel,
            intercept=_floats(intercept, 1)[0] if intercept else whole.intercept,
            slope=_floats(slope, 1)[0] if slope else whole.slope,
            unit="other" if _text(unit) in OTHER_UNITS else whole.unit,
            window_centre=_floats(look("FrameVOILUTSequence", "WindowCenter"), 1)[0],
            window_width=_floats(look("FrameVOILUTSequence", "WindowWidth"), 1)[0],
            pixel_offset=whole.pixel_offset + number * frame_bytes if native else whole.pixel_offset,
            pixel_length=min(frame_bytes, max(0, whole.pixel_length - number * frame_bytes)) if native else -1,
        )


def _contrast_of_frame(groups: tuple[Any, ...], of_file: int) -> int:
    """Whether an agent was given by then: Contrast/Bolus Usage Sequence (PS3.3 C.7.6.16.2.12), else what the file says."""
    said = {
        str(usage.get(name))
        for group in groups
        for usage in group.get("ContrastBolusUsageSequence") or ()
        for name in ("ContrastBolusAgentAdministered", "ContrastBolusAgentDetected")
    }
    return GIVEN if "YES" in said else NOT_GIVEN if "NO" in said else of_file


def patient_key(patient_id: str, *, salt: str) -> str:
    """A keyed hash, 16 hex digits, in the place of (0010,0020) Patient ID."""
    return hashlib.blake2b(patient_id.encode(), key=salt.encode(), digest_size=8).hexdigest()


def _text(value: bytes | None) -> str:
    return value.strip(b" \0").decode("latin-1") if value else ""


def _identifier(value: bytes | None) -> str:
    """An identifier, which need be no UID. One whose length is damaged runs on into the next elements, a name or a date among
    them: the bytes of their tags, which are no characters, give that away."""
    text = _text(value)
    return text if PRINTABLE.fullmatch(text) else ""


def _integer_text(value: bytes | None, *, absent: int) -> int:
    try:
        return int(value.strip(b" \0")) if value and value.strip(b" \0") else absent
    except ValueError:
        return -1


def _floats(value: bytes | None, count: int) -> list[float]:
    """The first `count` numbers of a decimal string; all NaN where it has fewer or other things."""
    parts = value.strip(b" \0").split(b"\\")[:count] if value else []
    try:
        numbers = [float(part.strip(b" \0")) for part in parts]
    except ValueError:
        numbers = []
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else [math.nan] * count
