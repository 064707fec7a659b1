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
from typing import Any

import numpy as np
import pandas as pd
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from pipeline import decoder
from pipeline.header import NATIVE
from pipeline.index import PIXEL_COLUMNS, build_manifest
from pipeline.manifest import kept
from pipeline.pixels import read_stored
from pipeline.place import Place, Scratch
from pipeline.preprocess import preprocess
from pipeline.store import Store
from pipeline.survey import verify
from tests.conftest import SIGNED_16, UNSIGNED_12, Cohort
from tests.test_decoder import change, high_throughput
from tests.test_survival import run

SEED = 20191
MUTANTS = 10_140
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


def encoded_elsewhere() -> bytes:
    dataset = describe(HTJ2KLossless)
    other, stored = high_throughput(signed=True, syntax=HTJ2KLossless)
    dataset.PixelData = other.PixelData
    dataset.Rows, dataset.Columns = stored.shape
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
        rsna.append(content.replace(b"ID_0000000001", STUDY_ID.encode()).replace(b"ID_0000001001", STUDY_ID.encode()))
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
        encoded_elsewhere(),
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
        kind = rng.choice(
            [
                "bit",
                "bit",
                "bytes",
                "bytes",
                "cut",
                "insert",
                "delete",
                "length",
                "length",
                "swap",
                "value",
                "value",
                "value",
                "join",
            ]
        )
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
            value = rng.choice(
                (0, 1, length + 1, length - 1, length + 2, length * 2, 2**15, 2**16 - 1, 2**31, 2**32 - 2, 2**32 - 1)
            )
            changed[offset : offset + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
        elif kind == "swap":  # two pieces change places
            other = rng.randrange(len(changed))
            first, second = changed[at : at + chunk], changed[other : other + chunk]
            changed[at : at + len(first)], changed[other : other + len(second)] = (
                second[: len(first)],
                first[: len(second)],
            )
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
SHORT_VRS = {
    "AE",
    "AS",
    "AT",
    "CS",
    "DA",
    "DS",
    "DT",
    "FD",
    "FL",
    "IS",
    "LO",
    "LT",
    "PN",
    "SH",
    "SL",
    "SS",
    "ST",
    "TM",
    "UI",
    "UL",
    "US",
}
WORST = (
    b"\0", b"\xff" * 64, b"\0\x80", b"1e308", b"-1e308", b"nan", b"inf", b"1e-308", b"0", b"-1", b"999999999", b"1\\2", b"\\" * 64, b"\x00\x01" * 32, b"\x1b$B\x80", b"ID_\0\n\x1b[31m",
)  # fmt: skip


def mutants(seeds: list[bytes]) -> Iterator[tuple[str, bytes]]:
    rng = random.Random(SEED)
    fields = [length_fields(seed) for seed in seeds]
    for number in range(MUTANTS):
        which = number % len(seeds)
        yield f"{number:05}-{which}.dcm", mutate(with_identifiers(seeds[which], number), seeds, fields[which], rng)


def convert(cohort: Cohort) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Index and preprocess once; every used slice decodes from the store. Returns the final manifest, and the totals."""
    config = cohort.config(preprocess__image_size=16)
    manifest, _, _ = build_manifest(config)
    totals, changed = preprocess(config, manifest, data=cohort.data)
    store = Store(cohort.data / "store.zarr")
    assert [fault for _, faults in verify(store) for fault in faults] == []
    final = manifest.copy()
    final.loc[changed.index, ["status", "reason"]] = changed[["status", "reason"]]
    assert sorted(store.image_id[store.image_id != ""]) == sorted(kept(final)["image_id"])
    return final, totals


def stored_by_pydicom(content: bytes, row: dict[str, Any]) -> np.ndarray:
    """The bytes of a native slice or frame, where pydicom finds them."""
    dataset = pydicom.dcmread(io.BytesIO(content), force=True)
    size = dataset.Rows * dataset.Columns * 2
    start = max(0, row["frame"]) * size
    stored = np.frombuffer(dataset.PixelData[start : start + size], "<i2" if dataset.PixelRepresentation else "<u2")
    unused = 16 - dataset.BitsStored
    return (stored.reshape(dataset.Rows, dataset.Columns) << unused) >> unused


@pytest.mark.filterwarnings("ignore")  # of pydicom, about what it reads here
def test_no_mutant_ends_the_run_or_is_lost_or_gives_a_wrong_slice(
    cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "TIME_LIMIT_S", 10.0)
    seeds = make_seeds(cohort.folder / "seeds")
    cohort.dicom.mkdir()
    contents = dict(mutants(seeds))
    with zipfile.ZipFile(cohort.dicom / "mutants.zip", "w") as archive:
        for number, (name, content) in enumerate(contents.items()):
            if number // len(seeds) % 2:
                archive.writestr(name, content)
            else:
                (cohort.dicom / name).write_bytes(content)
    final, totals = convert(cohort)
    assert sorted(final.loc[final["frame"] <= 0, "path"]) == sorted(contents)
    assert totals["files"] == MUTANTS
    assert totals["used"] + totals["repaired"] + totals["excluded"] == totals["slices_found"] == len(final)
    assert totals["used"] > MUTANTS // 4
    assert len(totals["reasons"]) > 20, "the damage is to be of many kinds"
    native = kept(final)[kept(final)["transfer_syntax"].isin(NATIVE)]
    compared, scratch = 0, Scratch()
    for row in native.to_dict("records"):
        stored = read_stored(place_of(cohort, row), scratch=scratch, **{name: row[name] for name in PIXEL_COLUMNS})
        try:
            expected = stored_by_pydicom(contents[row["path"]], row)
        except Exception:  # pydicom may be stricter about an element that is not needed
            continue
        np.testing.assert_array_equal(stored, expected)
        compared += 1
    assert compared > 0.98 * len(native)


def place_of(cohort: Cohort, row: dict[str, Any]) -> Place:
    container = str(cohort.dicom / (row["archive"] or row["path"]))
    return Place(container, *(row[name] for name in ("size", "stamp", "method", "offset", "packed_size")))


# ---- made by hand


def hospital(**values: Any) -> bytes:
    """The hospital's slice with other values in its header."""
    return write(changed(describe(ExplicitVRLittleEndian), values))


def changed(dataset: Dataset, values: dict[str, Any]) -> Dataset:
    for name, value in values.items():
        setattr(dataset, name, value)
    return dataset


def packed(syntax: UID, frame: bytes, **values: Any) -> bytes:
    """The hospital's slice around any codestream."""
    dataset = changed(describe(ExplicitVRLittleEndian), values)
    dataset.PixelData = encapsulate([frame])
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = syntax
    return write(dataset)


def codestream(syntax: UID) -> bytes:
    return get_frame(pydicom.dcmread(io.BytesIO(compressed(syntax))).PixelData, 0, number_of_frames=1)


def pixel_length(value: int) -> bytes:
    """The hospital's slice with another length of its pixel data."""
    content = bytearray(hospital())
    at = content.rindex(b"\xe0\x7f\x10\0OW")
    content[at + 8 : at + 12] = struct.pack("<L", value)
    return bytes(content)


def huge_jpeg_2000() -> bytes:
    """A codestream that says it has 2³¹ × 2³¹ pixels."""
    frame = bytearray(codestream(JPEG2000Lossless))
    at = frame.index(b"\xff\x51") + 6
    frame[at : at + 8] = struct.pack(">LL", 2**31 - 1, 2**31 - 1)
    return bytes(frame)


def huge_jpeg_ls() -> bytes:
    frame = bytearray(codestream(JPEGLSLossless))
    at = frame.index(b"\xff\xf7") + 5
    frame[at : at + 4] = b"\xff" * 4
    return bytes(frame)


def rle_bomb(size: int) -> bytes:
    """Zeros, 128 of which take two bytes: two segments, the high bytes and the low ones (PS3.5 G.4, G.5)."""
    segment = b"\x81\0" * (size * size // 128)
    header = struct.pack("<16L", 2, 64, 64 + len(segment), *[0] * 13)
    return packed(RLELossless, header + segment * 2, Rows=size, Columns=size, PixelSpacing=[0.05, 0.05])


def nested(depth: int) -> bytes:
    """Sequences in sequences, each of undefined length, in front of the pixel data."""
    opening = b"\x08\0\x40\x11SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\0\xe0\xff\xff\xff\xff"
    closing = b"\xfe\xff\x0d\xe0\0\0\0\0" + b"\xfe\xff\xdd\xe0\0\0\0\0"
    content = hospital()
    at = content.index(b"\x08\0\x40\x11SQ")
    return content[:at] + opening * depth + closing * depth + content[at:]


def zeros(mib: int) -> bytes:
    """Deflated zeros, a thousandth of their size."""
    packer = zlib.compressobj(9, wbits=-15)
    return (packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)) * mib


def inflates_to(content: bytes, mib: int) -> bytes:
    """A deflated stream of `content` and zeros."""
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(content) + packer.flush(zlib.Z_FULL_FLUSH) + zeros(mib) + b"\x03\0"


def deflate_bomb(mib: int, *, in_header: bool) -> bytes:
    """A deflated file with that much in a private element, or in its pixel data."""
    content = write(describe(DeflatedExplicitVRLittleEndian))
    start = 144 + struct.unpack_from("<L", content, 140)[0]
    dataset = zlib.decompress(content[start:], -15).replace(IMAGE_ID.encode(), b"ID_00000bomb")
    if in_header:
        dataset = dataset[: dataset.index(b"\x20\0\x0d\0UI")] + b"\x11\0\x10\0UN\0\0"
    else:
        dataset = dataset[: dataset.index(b"\xe0\x7f\x10\0") + 8]
    return content[:start] + inflates_to(dataset + struct.pack("<L", mib << 20), mib)


BOMB_MIB = 1100

NASTY: dict[str, tuple[str, Callable[[], bytes]]] = {
    "nothing": ("not_dicom", lambda: b""),
    "a byte": ("not_dicom", lambda: b"D"),
    "preamble alone": ("not_dicom", lambda: bytes(128)),
    "prefix alone": ("no_pixels", lambda: bytes(128) + b"DICM"),
    "meta group alone": ("no_pixels", lambda: hospital()[:300]),
    "65535 squared": ("implausible", lambda: hospital(Rows=65535, Columns=65535)),
    "65535 squared of RLE": (
        "implausible",
        lambda: packed(RLELossless, codestream(RLELossless), Rows=65535, Columns=65535),
    ),
    "65535 squared of JPEG 2000": (
        "implausible",
        lambda: packed(JPEG2000Lossless, huge_jpeg_2000(), Rows=65535, Columns=65535),
    ),
    "no rows": ("no_pixels", lambda: hospital(Rows=0)),
    "one column": ("implausible", lambda: hospital(Columns=1, Rows=1024)),
    "huge JPEG 2000": ("undecodable", lambda: packed(JPEG2000Lossless, huge_jpeg_2000())),
    "huge JPEG-LS": ("undecodable", lambda: packed(JPEGLSLossless, huge_jpeg_ls())),
    "RLE bomb": ("", lambda: rle_bomb(4096)),
    "RLE bomb too large": ("implausible", lambda: rle_bomb(8320)),
    "an empty fragment": ("undecodable", lambda: packed(RLELossless, bytes(2))),
    "a codestream of another syntax": ("undecodable", lambda: packed(JPEGLSLossless, codestream(JPEG2000Lossless))),
    "a syntax that nobody knows": (
        "undecodable",
        lambda: compressed(RLELossless).replace(b"1.2.840.10008.1.2.5", b"1.2.840.10008.1.2.9"),
    ),
    "video": ("undecodable", lambda: packed(UID("1.2.840.10008.1.2.4.100"), codestream(RLELossless))),
    "encapsulated and called native": (
        "undecodable",
        lambda: hospital(PixelData=encapsulate([codestream(RLELossless)] * 2)),
    ),
    "pixel data of undefined length": ("", lambda: pixel_length(2**32 - 1)),
    "pixel data of negative length": ("surplus_pixels", lambda: pixel_length(2**32 - 2)),
    "pixel data of 2 GB": ("surplus_pixels", lambda: pixel_length(2**31 - 2)),
    "pixel data of no length": ("no_pixels", lambda: pixel_length(0)),
    "pixel data of odd length": ("truncated_pixels", lambda: pixel_length(2047)),
    "a billion frames": ("multi_frame", lambda: hospital(NumberOfFrames=10**9)),
    "minus one frame": ("multi_frame", lambda: hospital(NumberOfFrames=-1)),
    "a billion enhanced frames": ("multi_frame", lambda: write(changed(enhanced(), {"NumberOfFrames": 10**9}))),
    "1000 frames, half of them without pixels": ("", lambda: write(enhanced(1000))[:-1_000_000]),
    "nested 50": ("", lambda: nested(50)),
    "nested 500": ("unreadable", lambda: nested(500)),
    "nested 200000": ("unreadable", lambda: nested(200_000)),
    "deflate bomb in the header": ("no_pixels", lambda: deflate_bomb(BOMB_MIB, in_header=True)),
    "deflate bomb in the pixels": ("", lambda: deflate_bomb(BOMB_MIB, in_header=False)),
    "identifier of 60 kB": ("no_identifiers", lambda: hospital(SOPInstanceUID="1" * 60_000)),
    "slope of nothing": ("implausible", lambda: hospital(RescaleSlope="1e-300", RescaleIntercept="-1e-300")),
    "slope of 1e300": ("implausible", lambda: hospital(RescaleSlope="1e300")),
    "slope below 0": ("padding", lambda: hospital(RescaleSlope="-1")),
    "intercept of 1e300": ("implausible", lambda: hospital(RescaleIntercept="1e300")),
    "spacing of nothing": ("implausible", lambda: hospital(PixelSpacing=["1e-300", "1e-300"])),
    "position of 1e300": ("implausible", lambda: hospital(ImagePositionPatient=["1e300", "0", "0"])),
    "orientation of no length": ("not_axial", lambda: hospital(ImageOrientationPatient=["0"] * 6)),
    "orientation with itself": ("not_axial", lambda: hospital(ImageOrientationPatient=["1", "0", "0", "1", "0", "0"])),
    "window of nan": ("", lambda: hospital(WindowCenter="nan", WindowWidth="-inf")),
    "bits": ("not_16_bit", lambda: hospital(BitsStored=0, HighBit=65535)),
    "sign of 7": ("not_16_bit", lambda: hospital(PixelRepresentation=7)),
    "escape sequences": ("not_ct", lambda: hospital(StudyInstanceUID="\x1b[31m\n\0x", Modality="C\0T")),
}
"""By name: the reason that it gets, and how it is made. The least that is said of any is that nothing else suffers."""

MEMORY_BYTES = 1 << 30
"""What a worker may take at most."""


def final_reasons(cohort: Cohort) -> dict[str, str]:
    """By path: the reason of each file, or of its first frame; empty where it is used."""
    manifest = pd.read_parquet(cohort.data / "index" / "manifest.parquet")
    faults = pd.read_parquet(cohort.data / "preprocess" / "faults.parquet").set_index(["path", "image_id"])["reason"]
    reasons = manifest[manifest["frame"] <= 0].set_index(["path", "image_id"])["reason"]
    reasons.update(faults)
    assert reasons.index.unique("path").size == len(reasons)
    return dict(reasons.droplevel("image_id"))


def test_files_made_to_do_harm_are_named_and_take_no_more_memory_than_a_worker_has(cohort: Cohort) -> None:
    cohort.dicom.mkdir()
    for number, (name, (_, make)) in enumerate(NASTY.items()):
        (cohort.dicom / name).write_bytes(make().replace(IMAGE_ID.encode(), b"ID_%09x" % number))
    (cohort.dicom / "sound").write_bytes(hospital(SOPInstanceUID="ID_sound"))
    content = hospital()
    with open(cohort.dicom / "terabyte", "wb") as sparse:  # a header with an element of 2 GB, and nothing behind it
        sparse.write(content[: content.index(b"\x20\0\x0d\0UI")] + b"\x11\0\x10\0UN\0\0" + struct.pack("<L", 2**31))
        sparse.truncate(1 << 40)
    cohort.write_params(preprocess__image_size=16)
    for stage in ("index", "preprocess"):
        assert run(cohort, stage).peak_bytes < MEMORY_BYTES
    expected = {name: reason for name, (reason, _) in NASTY.items()} | {"sound": "", "terabyte": "no_pixels"}
    found = final_reasons(cohort)
    assert found.keys() == expected.keys()
    assert {name: reason for name, reason in found.items() if reason != expected[name]} == {}
    assert [fault for _, faults in verify(Store(cohort.data / "store.zarr")) for fault in faults] == []


# ---- zips made to do harm

LOCAL, CENTRAL, END = "<4s5H3I2H", "<4s6H3I5H2I", "<4s4H2IH"
"""APPNOTE 4.3.7, 4.3.12, 4.3.16."""


def make_zip(members: dict[str, dict[str, Any]]) -> bytes:
    """A zip of deflated members that may lie about themselves."""
    content, directory = b"", b""
    for name, member in members.items():
        data = member["data"]
        size = member.get("size", len(member.get("content", b"")))
        facts = (member.get("crc", zlib.crc32(member.get("content", b""))), member.get("packed_size", len(data)), size)
        offset = member.get("offset", len(content))
        method = member.get("method", zipfile.ZIP_DEFLATED)
        content += struct.pack(LOCAL, b"PK\3\4", 20, 0, method, 0, 33, *facts, len(name), 0) + name.encode() + data
        directory += struct.pack(CENTRAL, b"PK\1\2", 20, 20, 0, method, 0, 33, *facts, len(name), 0, 0, 0, 0, 0, offset)
        directory += name.encode()
    end = struct.pack(END, b"PK\5\6", 0, 0, len(members), len(members), len(directory), len(content), 0)
    return content + directory + end


def test_zips_made_to_do_harm_cost_their_own_slices_alone(cohort: Cohort) -> None:
    cohort.dicom.mkdir()
    names = iter(range(100))

    def slice_of_its_own() -> bytes:
        return hospital().replace(IMAGE_ID.encode(), b"ID_%09x" % next(names))

    def member(**changes: Any) -> dict[str, Any]:
        content = slice_of_its_own()
        return {"content": content, "data": deflate(content), **changes}

    damaged = member()
    damaged["data"] = damaged["data"][:700] + bytes(40) + damaged["data"][740:]
    bomb = inflates_to(slice_of_its_own(), BOMB_MIB)
    members = {
        "sound": (member(), {""}),
        "damaged": (damaged, {"unreadable", "truncated_pixels", "undecodable", "zip_damaged"}),
        "cut short": (
            member(packed_size=500),
            {"no_pixels", "unreadable", "truncated_pixels", "undecodable", "zip_damaged"},
        ),
        "wrong checksum": (member(crc=1), {"unreadable", "truncated_pixels", "undecodable", "zip_damaged"}),
        "says it is small": (
            {"data": bomb, "size": 3000, "crc": 1},
            {"truncated_pixels", "unreadable", "undecodable", "zip_damaged"},
        ),
        "says it is 4 GB": (member(size=2**32 - 2), {"unreadable", "truncated_pixels", "undecodable", "zip_damaged"}),
        "lies nowhere": (member(offset=2**32 - 2), {"zip_method"}),
        "lies in another": (member(offset=50), {"unreadable"}),
        "is another": (member(offset=0), {"duplicate", "conflict", "changed"}),
        "packed otherwise": (member(method=99), {"zip_method"}),
        "zip in a zip.zip": ({"data": deflate(make_zip({"sound": member()}))}, {"not_dicom"}),
        "../../outside": (member(), {""}),
    }
    (cohort.dicom / "bad.zip").write_bytes(make_zip({name: facts for name, (facts, _) in members.items()}))
    cohort.write_params(preprocess__image_size=16)
    for stage in ("index", "preprocess"):
        assert run(cohort, stage).peak_bytes < MEMORY_BYTES
    found = final_reasons(cohort)
    assert found.keys() == members.keys()
    assert {name: reason for name, reason in found.items() if reason not in members[name][1]} == {}
    assert sorted(path.name for path in cohort.folder.iterdir()) == [
        "data",
        "dicom",
        "output.err",
        "output.out",
        "output.peak",
        "params.yaml",
    ]
