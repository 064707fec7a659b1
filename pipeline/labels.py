"""The six labels, and the Kaggle label CSV that carries them.

The CSV has two columns, ``ID,Label``; an ID is ``<image id>_<label name>`` and an image has six rows. The real file has
4.5 million rows, so it is taken apart column-wise by pyarrow rather than row by row.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from pipeline.errors import LabelError

LABELS = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural", "any")
SUBTYPES = LABELS[:5]
ANY = LABELS.index("any")
LABEL_WEIGHTS = (1.0, 1.0, 1.0, 1.0, 1.0, 2.0)
"""Weights of the RSNA 2019 metric: `any` counts twice; the mean divides by their sum, 7."""

UNKNOWN = -1
"""The label of a slice that nobody has labelled; it is masked in the loss and left out of every score."""

HEADER = ["ID", "Label"]


def read_labels(path: Path | str) -> pd.DataFrame:
    """Read a Kaggle-form label CSV.

    Args:
        path: CSV with the header ``ID,Label``.

    Returns:
        One row an image, indexed by ``image_id`` in ascending order, with the six columns of `LABELS` as int8:
        1, 0, or −1 where the file does not say.

    Raises:
        LabelError: wrong header, an unknown label, a value other than 0 and 1, two rows that disagree about one image, or
            an image with a subtype but without `any`.
    """
    path = Path(path)
    ids, values = _read_columns(path)
    label_of_row, image_of_row = _split_ids(path, ids)
    image_ids, codes = np.unique(image_of_row, return_inverse=True)
    table = _pivot(path, image_ids, codes, label_of_row, values)
    _check_any(path, image_ids, table)
    return pd.DataFrame(table, index=pd.Index(image_ids, name="image_id", dtype=object), columns=list(LABELS))


def _read_columns(path: Path) -> tuple[pa.Array, np.ndarray]:
    if not path.is_file():
        raise LabelError(f"{path}: the label CSV does not exist; set source.labels to a CSV with the columns ID,Label")
    if path.stat().st_size == 0:
        raise LabelError(f"{path}: empty file; expected the header ID,Label")
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        header = [column.strip().strip('"') for column in file.readline().split(",")]
    if header != HEADER:
        raise LabelError(f"{path}: expected the header ID,Label, found {','.join(header)[:80]!r}")
    options = pyarrow.csv.ConvertOptions(
        column_types={"ID": pa.string(), "Label": pa.string()}, strings_can_be_null=False
    )
    reading = pyarrow.csv.ReadOptions(column_names=HEADER, skip_rows=1)
    try:
        table = pyarrow.csv.read_csv(path, read_options=reading, convert_options=options)
    except pa.ArrowInvalid as error:
        raise LabelError(f"{path}: not a CSV with two columns: {error}") from None
    text = pc.utf8_trim_whitespace(table["Label"].combine_chunks())
    numbers = text.to_numpy(zero_copy_only=False)
    allowed = pc.is_in(text, value_set=pa.array(["0", "1", "0.0", "1.0"])).to_numpy(zero_copy_only=False)
    if not allowed.all():
        row = int(np.argmin(allowed))
        raise LabelError(f"{path}, line {row + 2}: Label is {numbers[row]!r}, expected 0 or 1")
    ones = pc.is_in(text, value_set=pa.array(["1", "1.0"])).to_numpy(zero_copy_only=False)
    return table["ID"].combine_chunks(), ones.astype(np.int8)


def _split_ids(path: Path, ids: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Split ``<image id>_<label>`` into the label's number and the image id, row by row."""
    label_of_row = np.full(len(ids), -1, np.int8)
    image_of_row = np.empty(len(ids), object)
    for number, name in enumerate(LABELS):
        rows = np.flatnonzero(pc.ends_with(ids, "_" + name).to_numpy(zero_copy_only=False))
        stems = pc.utf8_slice_codeunits(ids.take(pa.array(rows)), 0, -(len(name) + 1))
        label_of_row[rows] = number
        image_of_row[rows] = stems.to_numpy(zero_copy_only=False)
    unknown = np.flatnonzero(label_of_row < 0)
    if len(unknown):
        row = int(unknown[0])
        raise LabelError(
            f"{path}, line {row + 2}: {ids[row].as_py()!r} names no known label; expected an image id followed by "
            f"_{', _'.join(LABELS)} ({len(unknown)} such lines)"
        )
    return label_of_row, image_of_row


def _pivot(
    path: Path, image_ids: np.ndarray, codes: np.ndarray, label_of_row: np.ndarray, values: np.ndarray
) -> np.ndarray:
    """Turn rows into a table [image, label]; the RSNA file has 24 agreeing duplicates, and disagreeing ones are an error."""
    table = np.full((len(image_ids), len(LABELS)), UNKNOWN, np.int8)
    table[codes, label_of_row] = values
    lowest = np.full_like(table, 2)
    np.minimum.at(lowest, (codes, label_of_row), values)
    np.maximum.at(table, (codes, label_of_row), values)
    conflicts = np.argwhere((table != UNKNOWN) & (lowest != table))
    if len(conflicts):
        image, label = conflicts[0]
        raise LabelError(
            f"{path}: image {image_ids[image]} is labelled both 0 and 1 for {LABELS[label]} "
            f"({len(conflicts)} such conflicts); keep one of the rows"
        )
    return table


def _check_any(path: Path, image_ids: np.ndarray, table: np.ndarray) -> None:
    contradictory = np.flatnonzero((table[:, :ANY] == 1).any(axis=1) & (table[:, ANY] == 0))
    if len(contradictory):
        raise LabelError(
            f"{path}: image {image_ids[contradictory[0]]} has a subtype but any = 0 ({len(contradictory)} such images); "
            f"`any` must be the OR of the five subtypes"
        )
