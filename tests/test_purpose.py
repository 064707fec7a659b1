"""What headers say that a slice was made to show, in whatever words; contrast medium in whatever form, and nothing of its name is told."""

from __future__ import annotations

import io
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from pipeline.errors import SourceError
from pipeline.header import read_headers
from pipeline.place import HEAD_BYTES, Place
from pipeline.purpose import GIVEN, NOT_GIVEN, NOT_TOLD, body_class, contrast_class, is_projection
from pipeline.source import find_files
from tests.test_defects import bare, ct, enhanced, in_syntax, item, written


def place(content: bytes, folder: Path) -> Place:
    path = folder / "one.dcm"
    path.write_bytes(content)
    return Place(str(path), len(content), path.stat().st_mtime_ns)


silent_ct = partial(ct, SeriesDescription="Head")
silent_enhanced = partial(enhanced, SeriesDescription="Head")
"""Their own description says "nativ"."""


def read_contrast(place: Place) -> bool | None:
    """What is said of a file: of several frames, whether it was given for one of them."""
    return {1: True, 0: False, -1: None}[max(header.contrast for header in read_headers(place, patient_salt="a"))]


def read(content: bytes, folder: Path) -> bool | None:
    return read_contrast(place(content, folder))


@pytest.mark.parametrize(
    ("agent", "expected"),
    [
        ("", None),
        (" ", None),
        ("NONE", False),
        ("no", False),
        ("Non-Contrast ", False),
        ("without contrast", False),
        ("OMNIPAQUE 350", True),
        ("YES", True),
        ("NOVEL AGENT", True),
        ("NON-IONIC", True),
        ("350", True),
        ("NO IV CONTRAST", False),
        ("none given", False),
        ("W/O", False),
        ("NON CONTRAST HEAD", False),
        ("ohne KM", False),
        ("-", None),
        ("0", None),
        ("N/A", None),
        ("UNKNOWN", None),
        ("100 ml", True),
    ],
)
def test_an_agent_is_contrast_unless_it_says_that_there_was_none(
    agent: str, expected: bool | None, tmp_path: Path
) -> None:
    assert read(written(silent_ct(ContrastBolusAgent=agent)), tmp_path) is expected


SYNTAXES = [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: uid.keyword)
def test_contrast_is_found_in_every_transfer_syntax(syntax: UID, tmp_path: Path) -> None:
    for agent, expected in (("IOHEXOL", True), ("NONE", False), ("", None)):
        assert read(in_syntax(silent_ct(ContrastBolusAgent=agent), syntax, tmp_path), tmp_path) is expected


def test_contrast_is_found_without_a_preamble_and_behind_a_long_header(tmp_path: Path) -> None:
    assert read(bare(silent_ct(ContrastBolusAgent="IOHEXOL"), implicit=True), tmp_path) is True
    assert read(bare(silent_ct(ContrastBolusAgent="IOHEXOL"), implicit=False), tmp_path) is True
    long = silent_ct(ContrastBolusAgent="IOHEXOL")
    long.add_new(0x00090010, "LO", "Maker")
    long.add_new(0x00091001, "OB", bytes(2 * HEAD_BYTES))
    assert read(written(long), tmp_path) is True


def test_a_sequence_of_agents_is_contrast(tmp_path: Path) -> None:
    agents = item(CodeValue="C-B0322", CodingSchemeDesignator="SRT", CodeMeaning="Iohexol")
    assert read(written(silent_ct(ContrastBolusAgentSequence=agents)), tmp_path) is True
    assert read(written(silent_ct(ContrastBolusAgentSequence=Sequence([]))), tmp_path) is None


def use(dataset: Dataset, frame: int, administered: str, detected: str) -> None:
    usage = item(ContrastBolusAgentNumber=1, ContrastBolusAgentAdministered=administered)
    usage[0].ContrastBolusAgentDetected = detected
    dataset.PerFrameFunctionalGroupsSequence[frame].ContrastBolusUsageSequence = usage


def test_frames_of_an_enhanced_ct_say_whether_the_agent_was_given_by_then(tmp_path: Path) -> None:
    agents: dict[str, Any] = {"ContrastBolusAgentSequence": item(ContrastBolusAgentNumber=1)}
    assert read(written(silent_enhanced()), tmp_path) is None
    assert read(written(silent_enhanced(**agents)), tmp_path) is True
    before = silent_enhanced(**agents)
    for frame in range(4):
        use(before, frame, "NO", "")
    assert read(written(before), tmp_path) is False
    use(before, 3, "YES", "NO")
    assert read(written(before), tmp_path) is True
    shared = silent_enhanced()
    usage = item(ContrastBolusAgentNumber=1, ContrastBolusAgentAdministered="YES")
    shared.SharedFunctionalGroupsSequence[0].ContrastBolusUsageSequence = usage
    assert read(written(shared), tmp_path) is True


def test_contrast_is_found_in_zips_and_behind_urls(tmp_path: Path) -> None:
    content = written(silent_ct(ContrastBolusAgent="IOHEXOL"))
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = tmp_path / f"{method}.zip"
        with zipfile.ZipFile(path, "w", method) as packed:
            packed.writestr("first.txt", "no DICOM")
            packed.writestr("one.dcm", content)
        member = find_files([str(path)]).set_index("path").loc["one.dcm"]
        lies = [int(member[name]) for name in ("size", "stamp", "method", "offset", "packed_size")]
        assert read_contrast(Place(str(path), *lies)) is True
    fsspec.filesystem("memory").pipe_file("/contrast/one.dcm", content)
    assert read_contrast(Place("memory://contrast/one.dcm", len(content), 0)) is True
    with pytest.raises(SourceError, match="cannot be read"):
        read_contrast(Place("s3.none://contrast/one.dcm", 1, 0))


def test_a_header_that_is_damaged_does_not_tell_and_does_not_stop(tmp_path: Path) -> None:
    content = written(silent_ct(ContrastBolusAgent="IOHEXOL"))
    at = content.index(b"IOHEXOL")
    assert read(written(silent_ct()), tmp_path) is None
    assert read(content[: at - 12], tmp_path) is None
    assert read(bytes(200), tmp_path) is None
    assert read_contrast(Place(str(tmp_path / "gone.dcm"), 9, 0)) is None
    deflated = in_syntax(silent_ct(ContrastBolusAgent="IOHEXOL"), DeflatedExplicitVRLittleEndian, tmp_path)
    assert read(deflated[:-200] + bytes(200), tmp_path) in (None, True)


def test_an_agent_in_an_unknown_character_set_is_contrast(tmp_path: Path) -> None:
    content = written(silent_ct(SpecificCharacterSet="ISO_IR 100", ContrastBolusAgent="\u00c4\u00d6\u00dc\u00df"))
    assert io.BytesIO(content).read().count(b"\xc4\xd6\xdc\xdf") == 1
    assert read(content.replace(b"ISO_IR 100", b"ISO_XX 999"), tmp_path) is True


@pytest.mark.parametrize(
    ("part", "description", "kind"),
    [
        ("HEAD", "", "head"),
        ("", "Brain 5mm", "head"),
        ("", "Schädel nativ", "head"),
        ("", "Head and Neck", "head"),
        ("", "posterior fossa", ""),
        ("HEAD", "C-Spine 2.0", "other"),  # the protocol began with a head
        ("CHEST", "Head 5.0", "head"),
        ("CSPINE", "", "other"),
        ("", "HWS axial", "other"),
        ("", "Sinuses", "other"),
        ("", "Facial bones", "other"),
        ("ABDOMEN", "5.0 B30f", "other"),
        ("", "C spiral", ""),
        ("", "Series 3", ""),
        ("", "", ""),
    ],
)
def test_part_of_the_body_is_known(part: str, description: str, kind: str) -> None:
    assert body_class(part, description) == kind


@pytest.mark.parametrize(
    ("description", "expected"),
    [
        ("CTA 1.0", GIVEN),
        ("CT Angiography", GIVEN),
        ("HEAD C+", GIVEN),
        ("Perfusion 5mm", GIVEN),
        ("mit KM", GIVEN),
        ("Head with contrast", GIVEN),
        ("Head without contrast", NOT_GIVEN),
        ("HEAD W/O", NOT_GIVEN),
        ("ohne KM", NOT_GIVEN),
        ("Non-contrast", NOT_GIVEN),
        ("no contrast", NOT_GIVEN),
        ("pre contrast", NOT_GIVEN),
        ("unenhanced", NOT_GIVEN),
        ("Schädel nativ", NOT_GIVEN),
        ("HEAD C-", NOT_GIVEN),
        ("CT Head 5.0", NOT_TOLD),
        ("C-Spine", NOT_TOLD),
        ("", NOT_TOLD),
    ],
)
def test_description_tells_of_contrast_where_no_agent_does(description: str, expected: int) -> None:
    assert contrast_class("", has_agents=False, description=description) == expected
    assert contrast_class("OMNIPAQUE", has_agents=False, description=description) == GIVEN
    assert contrast_class("none", has_agents=False, description=description) == NOT_GIVEN


@pytest.mark.parametrize(
    ("image_type", "description", "expected"),
    [
        ("DERIVED\\SECONDARY\\AXIAL\\MIP", "", True),
        ("DERIVED\\SECONDARY\\AXIAL\\CT_SOM5 MIP", "", True),
        ("DERIVED\\PRIMARY\\VOLUME\\MAXIMUM", "", True),
        ("DERIVED\\SECONDARY\\PROJECTION IMAGE", "", True),
        ("DERIVED\\SECONDARY\\MINIP", "", True),
        ("DERIVED\\SECONDARY\\REFORMATTED\\AVERAGE", "thick MIP 10mm", True),
        ("DERIVED\\SECONDARY\\REFORMATTED\\AVERAGE", "Head 5mm", False),
        ("ORIGINAL\\PRIMARY\\AXIAL", "", False),
    ],
)
def test_projections_are_known(image_type: str, description: str, expected: bool) -> None:
    assert is_projection(image_type, description) is expected
