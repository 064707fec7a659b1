from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipeline.errors import LabelError
from pipeline.labels import LABEL_WEIGHTS, LABELS, read_labels


def write(tmp_path: Path, *lines: str, header: str = "ID,Label") -> Path:
    path = tmp_path / "labels.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def rows(image_id: str, values: str) -> list[str]:
    return [f"{image_id}_{name},{value}" for name, value in zip(LABELS, values, strict=True)]


def test_agrees_with_a_plain_pandas_pivot(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    lines = []
    for number in range(200):
        subtypes = rng.integers(0, 2, 5)
        lines += rows(f"ID_{number * 7919:09x}", "".join(map(str, [*subtypes, subtypes.max()])))
    rng.shuffle(lines)
    path = write(tmp_path, *lines)
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


def test_labels_that_the_file_does_not_give_are_unknown(tmp_path: Path) -> None:
    found = read_labels(write(tmp_path, "ID_a_any,1"))
    assert found.loc["ID_a"].tolist() == [-1, -1, -1, -1, -1, 1]


def test_identifiers_may_hold_underscores(tmp_path: Path) -> None:
    assert read_labels(write(tmp_path, "site_3_slice_9_any,0")).index.tolist() == ["site_3_slice_9"]


def test_header_only_means_no_labels() -> None:
    from tests.conftest import ROOT

    assert len(read_labels(ROOT / "data" / "unlabelled.csv")) == 0


@pytest.mark.parametrize(
    ("lines", "header", "message"),
    [
        (["ID_a_any,1"], "image,target", "expected the header ID,Label, found 'image,target'"),
        (["ID_a_contusion,1"], "ID,Label", "line 2: 'ID_a_contusion' names no known label"),
        (["ID_a_any,0", "ID_b_any,2"], "ID,Label", "line 3: Label is '2', expected 0 or 1"),
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
    (tmp_path / "empty.csv").touch()
    with pytest.raises(LabelError, match="empty file"):
        read_labels(tmp_path / "empty.csv")
