"""No name, date, institution or raw patient id leaves a header: every text element is planted, and all that is written is searched.

What is planted is every element of the DICOM dictionary whose value is text, in used files and in faulty ones, in sequences,
private elements and compressed data. Searched is every byte below the data folder, decoded where it is packed, and all that the
stages print. Identifiers (UI) stay, as do the names of files.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet
import pydicom
import pytest
import zarr
from PIL import Image, ImageDraw, PngImagePlugin
from pydicom.datadict import DicomDictionary
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import encapsulate
from pydicom.tag import Tag
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    RLELossless,
)

import pipeline.index
import pipeline.preprocess
from pipeline.errors import SourceError
from pipeline.header import TAGS, read_headers
from pipeline.index import build_manifest
from pipeline.manifest import account, kept, write_manifest
from pipeline.place import Place
from pipeline.preprocess import preprocess
from pipeline.sheet import draw_sheet
from pipeline.store import Store
from tests.conftest import SIGNED_16, UNSIGNED_12, Cohort, Ran

MARK = "ZQXJKV"
"""Six letters that stand nowhere else; the planted element's tag follows, so that a leak can be named."""

DATE, TIME, AGE, DECIMAL, INTEGER = "19451106", "072233.190745", "917Y", "73.40219", "734021907"
BY_FORM = {"DA": DATE, "TM": TIME, "DT": DATE + TIME, "AS": AGE, "DS": DECIMAL, "IS": INTEGER}
TEXT = ("AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT", *BY_FORM)
"""Value representations that hold text (PS3.5 6.2), but for UI."""

PLANTED = {tag: facts[0] for tag, facts in DicomDictionary.items() if facts[0] in TEXT and tag >> 16 not in (0, 2, 4)}

SOUGHT: dict[str, bytes] = {
    "a text": MARK.lower().encode(),
    "a text in 16 bits": MARK.lower().encode("utf-16-le"),
    "a date": DATE.encode(),
    "a date as people write it": b"1945-11-06",
    "a time": TIME.encode(),
    "an age": AGE.lower().encode(),
    "a decimal": DECIMAL.encode(),
    "a decimal in 8 bytes": struct.pack("<d", float(DECIMAL)),
    "a decimal in 4 bytes": struct.pack("<f", float(DECIMAL)),
    "an integer": INTEGER.encode(),
    "an integer in 4 bytes": struct.pack("<i", int(INTEGER)),
}
MAY_BE_PACKED = (
    "a text",
    "a text in 16 bits",
    "a date",
    "a date as people write it",
    "a time",
    "a decimal",
    "an integer",
)
"""What is long enough not to turn up by chance among megabytes of packed ones; short ones are sought where they are unpacked."""


def text_for(tag: int, form: str) -> str:
    return BY_FORM.get(form) or f"{MARK}{tag:08X}" + ("^GIVEN" if form == "PN" else "")


def plant(dataset: Dataset, tag: int, form: str, text: str | None = None, *, little: bool = True) -> None:
    """An element with a text in it, whether or not its VR allows it."""
    value = (text or text_for(tag, form)).encode()
    value += b" " * (len(value) % 2)
    dataset[Tag(tag)] = RawDataElement(Tag(tag), form, len(value), value, 0, False, little)


def plant_all(dataset: Dataset, *, below: int = 0x7FE00000) -> None:
    """Plant every text element that is not there; where one is needed as it is, a text goes beside it."""
    for tag, form in PLANTED.items():
        if tag < below and tag not in TAGS.values() and tag not in dataset:
            plant(dataset, tag, form)
    plant(dataset, 0x00080005, "CS", "ISO_IR 100")
    plant(dataset, TAGS["image_type"], "CS", f"ORIGINAL\\PRIMARY\\AXIAL\\{MARK}00080008")
    plant(dataset, TAGS["patient_id"], "LO", f"{MARK}00100020 {dataset.StudyInstanceUID}")
    plant(dataset, TAGS["kernel"], "SH", f"{MARK}00181210 soft")
    plant(dataset, TAGS["series_description"], "LO", f"{MARK}0008103E brain")


def plant_file_meta(dataset: FileDataset) -> None:
    for tag, form in ((0x00020013, "SH"), (0x00020016, "AE"), (0x00020017, "AE"), (0x00020018, "AE")):
        plant(dataset.file_meta, tag, form)
    dataset.preamble = f"{MARK}-PREAMBLE".encode().ljust(128, b"\0")


def plant_private(dataset: Dataset) -> None:
    """A private block with texts in the open, of unknown form, and in sequences within sequences."""
    plant(dataset, 0x00090010, "LO")
    for number, form in enumerate(form for form in TEXT):
        plant(dataset, 0x00091000 + number, form)
    plant(dataset, 0x000910F0, "UN")
    plant(dataset, 0x000910F1, "OB")
    inner, outer = Dataset(), Dataset()
    for item in (inner, outer):
        plant(item, 0x00100010, "PN")
        plant(item, 0x00100030, "DA")
    outer.ReferencedPatientSequence = [inner]
    dataset.RequestAttributesSequence = [outer]


def change(path: Path, edit: Callable[[FileDataset], object], **options: Any) -> None:
    dataset = pydicom.dcmread(path)
    edit(dataset)
    pydicom.dcmwrite(path, dataset, enforce_file_format=False, **options)


def plant_simply(dataset: FileDataset) -> None:
    plant_all(dataset, below=0x00180000)
    plant_file_meta(dataset)


def plant_fully(dataset: FileDataset) -> None:
    """More than `read_head` reads."""
    plant_all(dataset)
    plant(dataset, 0x00104000, "LT", f"{MARK}00104000" * 1000)
    plant_private(dataset)
    plant_file_meta(dataset)


@pytest.fixture(scope="module")
def planted_once(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """Studies whose every text element is planted, and faulty files that have something to say."""
    cohort = Cohort(tmp_path_factory.mktemp("planted"))
    for number in (1, 2, 3):
        cohort.add_study(number, 3, form=SIGNED_16 if number == 2 else UNSIGNED_12)
        for path in cohort.dicom.glob(f"ID_{number:05x}*"):
            change(path, plant_fully if number == 3 else plant_simply)  # the walk's form, and pydicom's
    add_enhanced(cohort)
    for fault, edit in FAULTS.items():
        # pixels that are not faulty by themselves: of each study one slice is
        cohort.add_study(9, 1, image_id=f"ID_{fault}", study_id="ID_faulty", series_id="ID_faulty", patient_id="F")
        path = cohort.dicom / f"{fault}.dcm"
        (cohort.dicom / "ID_000090000.dcm").rename(path)
        change(path, plant_simply)
        edit(path)
    add_conflict(cohort)
    (cohort.dicom / "text").write_text(f"{MARK}-TEXT {DATE}")
    with zipfile.ZipFile(cohort.dicom / "packed.zip", "w") as packed:
        packed.write(cohort.dicom / "text", "text")
        packed.writestr("bzip2", f"{MARK}-BZIP2", zipfile.ZIP_BZIP2)
    return cohort


@pytest.fixture
def planted(cohort: Cohort, planted_once: Cohort) -> Cohort:
    """A copy for each test."""
    shutil.copytree(planted_once.dicom, cohort.dicom)
    cohort.labels = planted_once.labels
    return cohort


def add_conflict(cohort: Cohort) -> None:
    """Two files of one image identifier and different pixels, and a slice of another patient."""
    for name, patient in (("one", "A"), ("two", "A"), ("foreign", "B")):
        image_id = "ID_foreign" if name == "foreign" else "ID_conflict"
        cohort.add_study(1, 1, image_id=image_id, position_mm=(-100.0, -100.0, 50.0), patient_id=patient)
        path = cohort.dicom / f"{name}.dcm"
        (cohort.dicom / "ID_000010000.dcm").rename(path)
        change(path, plant_simply)
        if name == "foreign":
            change(path, lambda dataset: plant(dataset, TAGS["patient_id"], "LO", f"{MARK}FOREIGN"))
    cohort.add_study(1, 1)
    change(cohort.dicom / "ID_000010000.dcm", plant_simply)


def add_enhanced(cohort: Cohort) -> None:
    """A multi-frame file, planted within its functional groups too."""
    cohort.add_study(4, 1)
    path = cohort.dicom / "enhanced.dcm"
    (cohort.dicom / "ID_000040000.dcm").rename(path)

    def edit(dataset: FileDataset) -> None:
        dataset.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
        dataset.SOPClassUID = EnhancedCTImageStorage
        dataset.NumberOfFrames = 3
        dataset.PixelData = dataset.PixelData * 3
        groups = []
        for k in range(3):
            group = Dataset()
            group.PlanePositionSequence = [Dataset()]
            group.PlanePositionSequence[0].ImagePositionPatient = ["0", "0", str(5 * k)]
            group.PlaneOrientationSequence = [Dataset()]
            group.PlaneOrientationSequence[0].ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
            group.FrameContentSequence = [Dataset()]
            plant(group.FrameContentSequence[0], 0x00209158, "LT")  # Frame Comments
            plant(group.FrameContentSequence[0], 0x00189074, "DT")  # Frame Acquisition DateTime
            group.CTImageFrameTypeSequence = [Dataset()]
            plant(group.CTImageFrameTypeSequence[0], 0x00089007, "CS", f"ORIGINAL\\PRIMARY\\{MARK}00089007")
            group.CTReconstructionSequence = [Dataset()]
            plant(group.CTReconstructionSequence[0], 0x00181210, "SH", f"{MARK}00181210 bone")
            plant_private(group)
            groups.append(group)
        shared = Dataset()
        shared.PixelMeasuresSequence = [Dataset()]
        shared.PixelMeasuresSequence[0].PixelSpacing = ["0.5", "0.5"]
        shared.PixelValueTransformationSequence = [Dataset()]
        shared.PixelValueTransformationSequence[0].RescaleIntercept = "-1024"
        shared.PixelValueTransformationSequence[0].RescaleSlope = "1"
        plant_private(shared)
        dataset.SharedFunctionalGroupsSequence = [shared]
        dataset.PerFrameFunctionalGroupsSequence = groups
        plant_fully(dataset)

    change(path, edit)


def with_text(name: str, form: str, text: str = "") -> Callable[[Path], None]:
    """The element of `TAGS` of that name becomes a text."""
    return lambda path: change(path, lambda dataset: plant(dataset, TAGS[name], form, text or f"{MARK}-{name}".upper()))


def replace(old: bytes, new: bytes) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = path.read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new, 1))

    return edit


def cut(path: Path) -> None:
    """In the middle of a planted text."""
    os.truncate(path, path.read_bytes().index(f"{MARK}00100010".encode()) + 10)


def compress(syntax: Any, damage: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def edit(dataset: FileDataset) -> None:
        if syntax == JPEGLosslessSV1:
            dataset.PixelData = encapsulate([damage(b"")])
            dataset["PixelData"].is_undefined_length = True
            dataset.file_meta.TransferSyntaxUID = syntax
        else:
            dataset.compress(syntax, generate_instance_uid=False)
            stream = bytearray(dataset.PixelData)
            dataset.PixelData = damage(bytes(stream))

    return lambda path: change(path, edit)


COMMENT = f"{MARK}-COMMENT".encode()
JPEG_COMMENT = b"\xff\xfe" + struct.pack(">H", 2 + len(COMMENT)) + COMMENT
FAULTS: dict[str, Callable[[Path], None]] = {
    "modality": with_text("modality", "CS"),
    "short_modality": with_text("modality", "CS", "QZX"),
    "photometric": with_text("photometric", "CS"),
    "position": with_text("position", "DS", f"{MARK}\\{MARK}\\{MARK}"),
    "spacing": with_text("spacing", "DS"),
    "slope": with_text("slope", "DS"),
    "frames": with_text("frames", "IS"),
    "rows": with_text("rows", "US"),
    "window": with_text("window_centre", "DS"),
    "character_set": replace(b"ISO_IR 100", f"{MARK}-SET".encode()),
    "transfer_syntax": replace(b"1.2.840.10008.1.2.1\0", f"1.2.{MARK}.1.2.1.4567\0".encode()[-20:]),
    "unknown_form": replace(b"\x10\0\x10\0PN", b"\x10\0\x10\0ZQ"),
    "undefined_length": replace(b"\x10\0\x10\0PN", b"\x10\0\x10\0UN"),
    "endless": replace(b"\x10\0\x30\0DA\x08\0", b"\x10\0\x30\0DA\xff\xff"),
    "cut": cut,
    "no_preamble": lambda path: path.write_bytes(path.read_bytes()[132:]),
    "preamble_alone": lambda path: path.write_bytes(b"\0" * 128 + b"DICM" + MARK.encode() * 9),
    "short_pixels": lambda path: os.truncate(path, path.stat().st_size - 100),
    "big_endian": lambda path: change(
        path, lambda dataset: setattr(dataset.file_meta, "TransferSyntaxUID", ExplicitVRBigEndian)
    ),
    "deflated": lambda path: change(
        path, lambda dataset: setattr(dataset.file_meta, "TransferSyntaxUID", DeflatedExplicitVRLittleEndian)
    ),
    "directory": lambda path: change(
        path, lambda dataset: setattr(dataset.file_meta, "MediaStorageSOPClassUID", "1.2.840.10008.1.3.10")
    ),
    "rle": compress(RLELossless, lambda stream: stream[:-900] + MARK.encode() * 150),
    "jpeg_2000": compress(JPEG2000Lossless, lambda stream: stream[:900] + MARK.encode() * 150 + stream[1800:]),
    "jpeg": compress(JPEGLosslessSV1, lambda _: b"\xff\xd8" + JPEG_COMMENT * 3 + MARK.encode() * 40 + b"\xff\xd9"),
    "jpeg_frame": compress(
        JPEGLosslessSV1,
        lambda _: (
            b"\xff\xd8" + JPEG_COMMENT + b"\xff\xc3\0\x0b\x10\0\x40\0\x40\x01\x01\x11\0"
            b"\xff\xc4\0\x14\0\x01"
            + bytes(15)
            + b"\x05\xff\xda\0\x08\x01\x01\0\x01\0\0"
            + MARK.encode() * 40
            + b"\xff\xd9"
        ),
    ),
}


# ---- the search


def what_is_there(folder: Path) -> Iterator[tuple[str, bytes, bool]]:
    """Every file below a folder: its name, its bytes, and whether these may be packed; packed ones once more, unpacked."""
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file():
            yield name, path.read_bytes(), path.suffix not in (".json", ".csv", ".txt")
        if path.suffix == ".parquet":
            for column in (table := pyarrow.parquet.read_table(path)).column_names:
                values = table[column].to_pandas().to_numpy()
                yield f"{name}:{column}", as_bytes(values), False
        if path.suffix == ".png":
            with Image.open(path) as picture:
                yield f"{name}:text", repr(picture.info).encode(), False
        if path.name == "zarr.json" and json.loads(path.read_bytes())["node_type"] == "array":
            array = zarr.open_array(path.parent, mode="r")
            is_pixels = path.parent.name == "pixels"
            yield f"{name}:values", as_bytes(np.asarray(array[...])), is_pixels


def as_bytes(values: np.ndarray) -> bytes:
    """Texts as they are, numbers both as texts and as they lie in memory."""
    if values.dtype.kind == "u" and values.ndim > 2:
        return values.tobytes()
    texts = "\0".join(map(str, values.ravel().tolist())).encode()
    numbers = [values.astype(kind).tobytes() for kind in ("<f8", "<f4")] if values.dtype.kind in "iuf" else []
    return b"\0".join([texts, *numbers])


def leaks(things: list[tuple[str, bytes, bool]]) -> list[str]:
    """A sentence for each thing in which something planted is found."""
    found = []
    for name, content, may_be_packed in things:
        lower = content.lower()
        for what, sought in SOUGHT.items():
            numeric = what.endswith("bytes")
            if (what in MAY_BE_PACKED or not may_be_packed) and sought in (content if numeric else lower):
                at = (content if numeric else lower).index(sought)
                found.append(f"{name} holds {what}: {content[max(0, at - 60) : at + 60]!r}")
    return found


def printed(*runs: Ran) -> list[tuple[str, bytes, bool]]:
    return [(name, text.encode(), False) for ran in runs for name, text in (("stdout", ran.out), ("stderr", ran.err))]


def test_search_finds_what_is_planted_in_each_kind_of_file(tmp_path: Path) -> None:
    """So that an empty answer means something."""
    pd.DataFrame({"x": [f"a{MARK.lower()}b"] * 50, "y": [float(DECIMAL)] * 50}).to_parquet(tmp_path / "t.parquet")
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", f"born {DATE}", zip=True)
    Image.new("L", (8, 8)).save(tmp_path / "p.png", pnginfo=info)
    (tmp_path / "j.json").write_text(json.dumps({"age": AGE.lower()}))
    group = zarr.create_group(tmp_path / "z.zarr")
    group.create_array("a", shape=(1, 2), dtype="string")[...] = np.array([[TIME, "x"]], object)
    group.create_array("b", data=np.array([float(DECIMAL)], np.float32))
    found = {sentence.split(" holds ")[0] for sentence in leaks(list(what_is_there(tmp_path)))}
    assert {
        "t.parquet:x",
        "t.parquet:y",
        "p.png:text",
        "j.json",
        "z.zarr/a/zarr.json:values",
        "z.zarr/b/zarr.json:values",
    } <= found
    assert [leak.split(":")[0] for leak in leaks(printed(Ran(1, "", f"error: {MARK}00100010")))] == [
        "stderr holds a text"
    ]


def test_planted_files_hold_every_text_element_of_the_dictionary(planted: Cohort) -> None:
    content = b"".join(path.read_bytes() for path in planted.dicom.iterdir())
    tags = {int(tag, 16) for tag in re.findall(rb"ZQXJKV([0-9A-F]{8})", content)}
    expected = {tag for tag, form in PLANTED.items() if form not in BY_FORM} - {0x00080005}
    needed = {tag for tag in TAGS.values() if tag not in (TAGS["image_type"], TAGS["patient_id"], TAGS["kernel"])}
    assert len(expected) > 1500
    assert expected - tags <= needed | {0x00200010}  # Study ID, which RSNA's files have empty
    for text in (DATE, TIME, AGE, DECIMAL, INTEGER):
        assert text.encode() in content


# ---- the stages


def test_nothing_planted_leaves_the_stages(planted: Cohort, run_stage: Callable[..., Ran]) -> None:
    planted.write_params()
    indexed = run_stage("index")
    assert indexed.code == 0, indexed.err
    manifest = pd.read_parquet(planted.data / "index" / "manifest.parquet")
    assert account(manifest)["excluded"] >= len(FAULTS) - 6
    assert {"enhanced.dcm", "ID_000030000.dcm", "ID_000020000.dcm"} <= set(kept(manifest)["path"])
    path = planted.dicom / "ID_000030001.dcm"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    os.utime(path, ns=(1, 1))
    refused = run_stage("preprocess")
    assert refused.code == 1
    assert "'ID_000030001.dcm' first" in refused.err
    os.utime(path, ns=times)
    made = run_stage("preprocess")
    assert made.code == 0, made.err
    assert "undecodable" in made.out
    sheet = planted.data / "sheet.png"
    looked = [
        run_stage("inspect"),
        run_stage("inspect", "--json"),
        run_stage("inspect", "--study", "0", "--out", str(sheet)),
    ]
    assert [ran.code for ran in looked] == [0, 0, 0]
    runs = (indexed, refused, made, *looked)
    assert leaks([*what_is_there(planted.data), *printed(*runs)]) == []
    tables = [pd.read_parquet(path) for path in planted.data.rglob("*.parquet")]
    assert not any((table == "QZX").any(axis=None) for table in tables)
    for ran in runs:
        assert "Traceback" not in ran.err
        assert "Warning" not in ran.err


def test_nothing_planted_is_drawn(planted: Cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    config = planted.config()
    manifest, _, _ = build_manifest(config)
    preprocess(config, manifest, data=planted.data)
    drawn: list[str] = []
    real = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "text",
        lambda self, xy, text, *rest, **given: drawn.append(text) or real(self, xy, text, *rest, **given),
    )
    store = Store(planted.data / "store.zarr")
    for study in range(len(store.study)):
        draw_sheet(store, study, ["brain"])
    assert len(drawn) > 10
    assert leaks([("a sheet", "\n".join(drawn).encode(), False)]) == []


def test_nothing_planted_leaves_dask_workers(
    planted: Cohort, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline.index, "FILES_PER_TASK", 20)
    monkeypatch.setattr(pipeline.preprocess, "SLICES_PER_TASK", 4)
    config = planted.config(preprocess__workers=1)
    manifest, headers, _ = build_manifest(config)
    write_manifest(planted.data / "index" / "manifest.parquet", manifest)
    headers.to_parquet(planted.data / "index" / "headers.parquet")
    os.utime(planted.dicom / "ID_000030001.dcm", ns=(1, 1))
    with pytest.raises(SourceError, match=r"'ID_000030001\.dcm' first") as refused:
        preprocess(config, manifest, data=planted.data)
    out, err = capfd.readouterr()
    assert "Dask dashboard" in out
    assert len(list((planted.data / "wip" / "shards").glob("*.shard"))) >= 3
    assert (
        leaks([*what_is_there(planted.data), *printed(Ran(1, out, err)), ("error", str(refused.value).encode(), False)])
        == []
    )
    assert "Warning" not in err


def test_damaged_header_tells_no_more_than_a_sound_one(planted: Cohort, tmp_path: Path) -> None:
    """A damaged length lets an element, an identifier among them, run on into the next ones."""
    contents = [path.read_bytes() for path in sorted(planted.dicom.glob("*.dcm"))]
    rng = np.random.default_rng(0)
    damaged = tmp_path / "damaged"
    found = []
    for number in range(800):
        content = bytearray(contents[number % len(contents)])
        for at in rng.integers(min(128, len(content) - 1), min(1200, len(content)), rng.integers(1, 6)).tolist():
            content[at] = rng.integers(256)
        damaged.write_bytes(content)
        status = damaged.stat()
        headers = read_headers(Place(str(damaged), status.st_size, status.st_mtime_ns), patient_salt="salt")
        found += leaks([(str(number), str(header).encode(), False) for header in headers])
    assert found == []
    long = RawDataElement(Tag(TAGS["image_id"]), "UI", 80, b"1.2." * 20, 0, False, True)
    dataset = pydicom.dcmread(planted.dicom / "ID_000010000.dcm")
    dataset[TAGS["image_id"]] = long
    pydicom.dcmwrite(damaged, dataset, enforce_file_format=False)
    (header,) = read_headers(Place(str(damaged), damaged.stat().st_size, 0), patient_salt="salt")
    assert header.image_id == ""


def test_patient_key_depends_on_the_salt_and_tells_patients_apart(planted: Cohort) -> None:
    keys = {}
    for salt in ("one", "two"):
        manifest, headers, _ = build_manifest(planted.config(index__patient_salt=salt))
        slices = kept(manifest)
        keys[salt] = slices.groupby("study_uid")["patient_key"].unique().map(list).to_dict()
        assert all(len(of_study) == 1 and re.fullmatch("[0-9a-f]{16}", of_study[0]) for of_study in keys[salt].values())
        assert len({of_study[0] for of_study in keys[salt].values()}) == len(keys[salt]) >= 4
        assert not (headers == salt).any(axis=None)
    assert not {key for of_study in keys["one"].values() for key in of_study} & {
        key for of_study in keys["two"].values() for key in of_study
    }
