"""Ten thousand damaged files, and some made by hand to do harm: no file ends the run, hangs it, eats the memory or is lost from sight.

What is used of them decodes from the store. A native slice that is used holds what pydicom reads from the same file.
"""

from __future__ import annotations

import io
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    UID,
)

from pipeline import decoder
from pipeline.index import build_manifest
from pipeline.manifest import account
from pipeline.preprocess import preprocess
from pipeline.store import Store
from pipeline.survey import verify
from tests.conftest import SIGNED_16, UNSIGNED_12, Cohort
from tests.test_decoder import change

SEED = 20191
MUTANTS = 10_080
SIZE = 32
STUDY_SLICES = 60
IMAGE_ID, STUDY_ID = "ID_fedcba987", "ID_0123456789"
"""Stand in every seed, and are replaced by each mutant's own, so that it is not taken for a copy of another."""


def describe(syntax: UID) -> Dataset:
    """A hospital's slice: names, nested sequences of defined and undefined length, private elements, padding."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID, dataset.file_meta.MediaStorageSOPInstanceUID = CTImageStorage, "2.25.1"
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.Modality = CTImageStorage, IMAGE_ID, "CT"
    dataset.PatientName, dataset.PatientID = "SECRET^NAME", "ID_00000001"
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "1", "DCM", "a meaning"
    code.is_undefined_length_sequence_item = True
    inner = Dataset()
    inner.PurposeOfReferenceCodeSequence = Sequence([code])
    inner["PurposeOfReferenceCodeSequence"].is_undefined_length = True
    dataset.ReferencedImageSequence = Sequence([inner, inner])
    dataset.ProcedureCodeSequence = Sequence([code])
    dataset["ProcedureCodeSequence"].is_undefined_length = True
    dataset.private_block(0x0009, "MAKER", create=True).add_new(0x01, "UN", b"\1\2\3\4" * 20)
    dataset.SliceThickness, dataset.ConvolutionKernel = "5", "H31s"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.InstanceNumber = STUDY_ID, STUDY_ID, "3"
    dataset.ImagePositionPatient, dataset.ImageOrientationPatient = [-100, -100, 5], [1, 0, 0, 0, 1, 0]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows = dataset.Columns = SIZE
    dataset.PixelSpacing = [0.5, 0.5]
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 1
    dataset.PixelPaddingValue = -2000
    dataset.WindowCenter, dataset.WindowWidth = ["40", "600"], ["80", "2800"]
    dataset.RescaleIntercept, dataset.RescaleSlope = "0", "1"
    dataset.PixelData = head(1).tobytes()
    dataset["PixelData"].VR = "OW"
    return dataset


def head(frames: int) -> np.ndarray:
    """int16 [frame, row, column] in HU: something round with noise, and padding."""
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE - 0.5
    pixels_hu = np.where(x**2 + y**2 < 0.16, 40.0, -1000.0)
    pixels_hu = pixels_hu + np.random.default_rng(0).normal(0, 3, (frames, *pixels_hu.shape))
    pixels_hu[:, :2] = -2000
    return np.rint(pixels_hu).astype(np.int16)


def write(dataset: Dataset) -> bytes:
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def compressed(syntax: UID) -> bytes:
    dataset = describe(ExplicitVRLittleEndian)
    dataset.compress(syntax, generate_instance_uid=False)
    return write(dataset)


def big_endian() -> bytes:
    dataset = describe(ExplicitVRBigEndian)
    dataset.PixelData = head(1).byteswap().tobytes()
    return write(dataset)


def enhanced(frames: int = 3) -> Dataset:
    dataset = describe(ExplicitVRLittleEndian)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    shared, measures, plane = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = dataset.PixelSpacing, "5"
    plane.ImageOrientationPatient = dataset.ImageOrientationPatient
    value = Dataset()
    value.RescaleIntercept, value.RescaleSlope, value.RescaleType = "0", "1", "HU"
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Sequence([measures]), Sequence([plane])
    shared.PixelValueTransformationSequence = Sequence([value])
    dataset.SharedFunctionalGroupsSequence = Sequence([shared])
    groups = []
    for number in range(frames):
        group, position = Dataset(), Dataset()
        position.ImagePositionPatient = [-100, -100, 5 * number]
        group.PlanePositionSequence = Sequence([position])
        groups.append(group)
    dataset.PerFrameFunctionalGroupsSequence = Sequence(groups)
    for name in ("PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient", "RescaleSlope", "RescaleIntercept"):
        delattr(dataset, name)
    dataset.NumberOfFrames = frames
    dataset.PixelData = head(frames).tobytes()
    return dataset


def enhanced_rle() -> bytes:
    dataset = enhanced()
    dataset.compress(RLELossless, generate_instance_uid=False)
    return write(dataset)


def make_seeds(folder: Path) -> list[bytes]:
    """A whole file of each form."""
    cohort = Cohort(folder, size=SIZE)
    rsna = []
    for form in (UNSIGNED_12, SIGNED_16):
        (name,) = cohort.add_study(1, 1, patient=1, form=form)
        content = (cohort.dicom / f"{name}.dcm").read_bytes()
        content = content.replace(b"ID_000010000", IMAGE_ID.encode())
        rsna.append(
            content.replace(b"ID_0000000001", STUDY_ID.encode()).replace(b"ID_0000001001", STUDY_ID.encode())
        )
    hospital = describe(ExplicitVRLittleEndian)
    return [
        *rsna,
        write(hospital),
        rsna[0][132:],  # without preamble and prefix
        write(enhanced()),
        enhanced_rle(),
        compressed(RLELossless),
        compressed(JPEGLSLossless),
        compressed(JPEG2000Lossless),
        change(hospital, JPEGLosslessSV1, folder),
        write(describe(DeflatedExplicitVRLittleEndian)),
        big_endian(),
    ]


def with_identifiers(seed: bytes, number: int) -> bytes:
    """The seed as a slice of its own, in a study with its neighbours."""
    start = len(seed)
    if DEFLATED in seed[:400]:
        start = 144 + struct.unpack_from("<L", seed, 140)[0]
        seed = seed[:start] + zlib.decompress(seed[start:], -15)
    seed = seed.replace(IMAGE_ID.encode(), b"ID_%09x" % number)
    seed = seed.replace(STUDY_ID.encode(), b"ID_%010x" % (number // STUDY_SLICES))
    return seed[:start] + deflate(seed[start:]) if start < len(seed) else seed


def deflate(content: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(content) + packer.flush()


def length_fields(content: bytes) -> list[tuple[int, int, int]]:
    """Where the elements' length fields lie: offset, bytes, value."""
    dataset = pydicom.dcmread(io.BytesIO(content), force=True)
    size = len(content)
    found = []
    for item in dataset.values():
        at = getattr(item, "value_tell", 0)
        if DEFLATED in content[:400] or not 8 <= at <= size:
            continue
        short = not item.is_implicit_VR and item.VR in SHORT_VRS
        width = 2 if short else 4
        found.append((at - width, width, item.length))
    return found


def mutate(content: bytes, others: list[bytes], fields: list[tuple[int, int, int]], rng: random.Random) -> bytes:
    """One to three damages of one kind each."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        at = rng.randrange(len(changed)) if rng.random() < 0.7 else rng.randrange(min(len(changed), HEADER_BYTES))
        chunk = rng.choice((1, 1, 1, 2, 4, 16, 40))
        kind = rng.choice("bit bit bytes bytes cut insert delete length length swap value value value join".split())
        if kind == "bit":  # bits
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == "bytes":  # bytes
            changed[at : at + chunk] = rng.randbytes(chunk)
        elif kind == "cut":
            del changed[max(1, at) :]
        elif kind == "insert":
            changed[at:at] = rng.randbytes(chunk)
        elif kind == "delete":
            del changed[at : at + chunk]
        elif kind == "length" and fields:
            offset, width, length = rng.choice(fields)
            value = rng.choice((0, 1, length + 1, length - 1, length + 2, length * 2, 2**15, 2**16 - 1, 2**31, 2**32 - 2, 2**32 - 1))
            changed[offset : offset + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
        elif kind == "swap":  # two pieces change places
            other = rng.randrange(len(changed))
            first, second = changed[at : at + chunk], changed[other : other + chunk]
            changed[at : at + len(first)], changed[other : other + len(second)] = second[: len(first)], first[: len(second)]
        elif kind == "value":  # a value of the worst
            offset, width, length = rng.choice(fields) if fields else (at, 0, chunk)
            value = rng.choice(WORST)
            length = min(length, 64)
            changed[offset + width : offset + width + length] = value.ljust(length)[:length]
        elif kind == "join":  # the end of another file
            other_file = rng.choice(others)
            changed[at:] = other_file[rng.randrange(len(other_file)) :]
        if not changed:
            break
    return bytes(changed)


DEFLATED = str(DeflatedExplicitVRLittleEndian).encode()
HEADER_BYTES = 1100
SHORT_VRS = {"AE", "AS", "AT", "CS", "DA", "DS", "DT", "FD", "FL", "IS", "LO", "LT", "PN", "SH", "SL", "SS", "ST", "TM", "UI", "UL", "US"}
WORST = (
    b"\0", b"\xff" * 64, b"\0\x80", b"1e308", b"-1e308", b"nan", b"inf", b"1e-308", b"0", b"-1", b"999999999", b"1\\2", b"\\" * 64, b"\x00\x01" * 32, b"\x1b$B\x80", b"ID_\0\n\x1b[31m",
)  # fmt: skip


def mutants(seeds: list[bytes]) -> Iterator[tuple[str, bytes]]:
    rng = random.Random(SEED)
    fields = [length_fields(seed) for seed in seeds]
    for number in range(MUTANTS):
        which = number % len(seeds)
        yield f"{number:05}-{which}.dcm", mutate(with_identifiers(seeds[which], number), seeds, fields[which], rng)


def run_over(cohort: Cohort, **changes):
    config = cohort.config(preprocess__image_size=16, **changes)
    manifest, _, _ = build_manifest(config)
    totals, faults = preprocess(config, manifest, data=cohort.data, manifest_digest="m")
    return manifest, totals, faults


def test_no_mutant_crashes_hangs_or_is_lost(cohort: Cohort) -> None:
    seeds = make_seeds(cohort.folder / "seeds")
    cohort.dicom.mkdir()
    names = set()
    with zipfile.ZipFile(cohort.dicom / "mutants.zip", "w") as archive:
        for number, (name, content) in enumerate(mutants(seeds)):
            names.add(name)
            if number % 2:
                archive.writestr(name, content)
            else:
                (cohort.dicom / name).write_bytes(content)
    manifest, totals, faults = run_over(cohort)
    print(totals)


# ---- made by hand


def with_values(content: bytes, **values: object) -> bytes:
    """The file with other values in its header, whatever pydicom thinks of them."""
    dataset = pydicom.dcmread(io.BytesIO(content), force=True)
    for name, value in values.items():
        setattr(dataset, name, value)
    return write(dataset)


def with_frame(syntax: UID, frame: bytes, **values: object) -> bytes:
    dataset = describe(syntax)
    dataset.PixelData = encapsulate([frame])
    dataset["PixelData"].VR = "OB"
    for name, value in values.items():
        setattr(dataset, name, value)
    return write(dataset)


def frame_of(syntax: UID) -> bytes:
    return pydicom.encaps.get_frame(pydicom.dcmread(io.BytesIO(compressed(syntax))).PixelData, 0, number_of_frames=1)


def nested(depth: int) -> bytes:
    """Sequences in sequences, each of undefined length, in front of the pixel data."""
    opening = b"\x08\0\x40\x11SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\0\xe0\xff\xff\xff\xff"
    closing = b"\xfe\xff\x0d\xe0\0\0\0\0" + b"\xfe\xff\xdd\xe0\0\0\0\0"
    content = write(describe(ExplicitVRLittleEndian))
    at = content.index(b"\x08\0\x40\x11SQ")
    return content[:at] + opening * depth + closing * depth + content[at:]


ZEROS = deflate(bytes(1 << 20))[:-2]


def zeros(mib: int) -> bytes:
    """Deflated zeros, a thousandth of their size."""
    packer = zlib.compressobj(9, wbits=-15)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * mib


def inflates_to(content: bytes, mib: int) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(content) + packer.flush(zlib.Z_FULL_FLUSH) + zeros(mib) + b"\x03\0"


def deflate_bomb(mib: int, *, in_header: bool) -> bytes:
    content = write(describe(DeflatedExplicitVRLittleEndian))
    start = 144 + struct.unpack_from("<L", content, 140)[0]
    dataset = zlib.decompress(content[start:], -15)
    if in_header:
        at = dataset.index(b"\x20\0\x0d\0UI")
        dataset = dataset[:at] + b"\x11\0\x10\0UN\0\0" + struct.pack("<L", mib << 20)
    else:
        at = dataset.index(b"\xe0\x7f\x10\0")
        dataset = dataset[: at + 8] + struct.pack("<L", mib << 20)
    return content[:start] + inflates_to(dataset, mib)
