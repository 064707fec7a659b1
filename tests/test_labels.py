from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipeline.errors import LabelError
from pipeline.labels import LABEL_WEIGHTS, LABELS, read_labels
from tests.conftest import ROOT


def write(tmp_path: Path, *lines: str, header: str = "ID,Label") -> Path:
    path = tmp_path / "labels.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def rows(image_id: str, values: str) -> list[str]:
    return [f"{image_id}_{name},{value}" for name, value in zip(LABELS, values, strict=True)]


def random_rows(images: int) -> list[str]:
    """Six rows an image, in random order."""
    rng = np.random.default_rng(1)
    lines = []
    for number in range(images):
        subtypes = rng.integers(0, 2, 5)
        lines += rows(f"ID_{number * 7919:09x}", "".join(map(str, [*subtypes, subtypes.max()])))
    rng.shuffle(lines)
    return lines


# pyarrow reads blocks of a megabyte, and each block numbers its own ids and values: 10,000 images are two of them
@pytest.mark.parametrize("images", [200, 10_000])
def test_agrees_with_a_plain_pandas_pivot(tmp_path: Path, images: int) -> None:
    path = write(tmp_path, *random_rows(images))
    plain = pd.read_csv(path)
    plain[["image_id", "name"]] = plain["ID"].str.rsplit("_", n=1, expand=True)
    expected = plain.pivot(index="image_id", columns="name", values="Label")[list(LABELS)]
    found = read_labels(path)
    assert found.index.tolist() == expected.index.tolist()
    np.testing.assert_array_equal(found.to_numpy(), expected.to_numpy())


def test_weights_are_those_of_the_challenge() -> None:
    assert dict(zip(LABELS, LABEL_WEIGHTS, strict=True))["any"] == 2
    assert sum(LABEL_WEIGHTS) == 7


def test_agreeing_duplicates_are_one(tmp_path: Path) -> None:
    found = read_labels(write(tmp_path, *rows("ID_a", "000011"), *rows("ID_a", "000011")))
    assert found.loc["ID_a"].tolist() == [0, 0, 0, 0, 1, 1]


def test_conflicting_duplicates_name_the_image(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match=r"image ID_a is labelled both 0 and 1 for subdural"):
        read_labels(write(tmp_path, *rows("ID_a", "000011"), "ID_a_subdural,0"))


def test_a_block_that_writes_its_values_otherwise_means_the_same(tmp_path: Path) -> None:
    lines = random_rows(10_000)
    expected = read_labels(write(tmp_path, *lines))
    found = read_labels(write(tmp_path, *lines[:50_000], *(line + ".0" for line in lines[50_000:])))
    pd.testing.assert_frame_equal(found, expected)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ID_a_any,2", "line 50002: Label is '2'"),
        ("ID_a_anything,1", "line 50002: 'ID_a_anything' names no known label"),
    ],
)
def test_a_fault_far_down_is_named_by_its_line(tmp_path: Path, line: str, message: str) -> None:
    lines = random_rows(10_000)
    with pytest.raises(LabelError, match=message):
        read_labels(write(tmp_path, *lines[:50_000], line, *lines[50_000:]))


@pytest.mark.parametrize(
    "written",
    [
        b"\xef\xbb\xbfID,Label\nID_a_any,1\n",
        b'"ID","Label"\n"ID_a_any","1"\n',
        b"ID,Label\r\nID_a_any,1\r\n",
        b"ID,Label\nID_a_any, 1.0",
        b"ID,Label\n\nID_a_any,1\n\n\n",
    ],
    ids=["byte order mark", "quoted", "CRLF", "decimal", "empty lines"],
)
def test_other_programs_ways_of_writing_are_read(tmp_path: Path, written: bytes) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(written)
    assert read_labels(path)["any"].to_dict() == {"ID_a": 1}


def test_labels_that_the_file_does_not_give_are_unknown(tmp_path: Path) -> None:
    found = read_labels(write(tmp_path, "ID_a_any,1"))
    assert found.loc["ID_a"].tolist() == [-1, -1, -1, -1, -1, 1]


def test_identifiers_may_hold_underscores(tmp_path: Path) -> None:
    assert read_labels(write(tmp_path, "site_3_slice_9_any,0")).index.tolist() == ["site_3_slice_9"]


def test_header_only_means_no_labels(tmp_path: Path) -> None:
    assert len(read_labels(ROOT / "data" / "unlabelled.csv")) == 0
    path = tmp_path / "labels.csv"
    for written in ("ID,Label", "ID,Label\n\n"):
        path.write_text(written)
        assert len(read_labels(path)) == 0


@pytest.mark.parametrize(
    ("lines", "header", "message"),
    [
        (["ID_a_any,1"], "image,target", "expected the header ID,Label, found 'image,target'"),
        (["ID_a_contusion,1"], "ID,Label", "line 2: 'ID_a_contusion' names no known label"),
        (["ID_a_any,0", "ID_b_any,2"], "ID,Label", "line 3: Label is '2', expected 0 or 1"),
        (["", "ID_a_any,0", "", "ID_b_any,2"], "ID,Label", "line 5: Label is '2', expected 0 or 1"),
        (["ID_a_any,"], "ID,Label", "Label is '', expected 0 or 1"),
        (["ID_a_any,1,9"], "ID,Label", "not a CSV with two columns"),
        (rows("ID_a", "000010"), "ID,Label", "image ID_a has a subtype but any = 0"),
    ],
)
def test_faults_are_named(tmp_path: Path, lines: list[str], header: str, message: str) -> None:
    with pytest.raises(LabelError) as fault:
        read_labels(write(tmp_path, *lines, header=header))
    assert message in str(fault.value)
    assert "labels.csv" in str(fault.value)


def test_absent_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="does not exist"):
        read_labels(tmp_path / "none.csv")
    with pytest.raises(LabelError, match=r"a folder; set source\.labels to a CSV"):
        read_labels(tmp_path)
    (tmp_path / "empty.csv").touch()
    with pytest.raises(LabelError, match="empty file"):
        read_labels(tmp_path / "empty.csv")
