"""The six labels, and the Kaggle label CSV that carries them.

The CSV has two columns, ``ID,Label``; an ID is ``<image id>_<label name>`` and an image has six rows. The real file has
4.5 million rows, so it is taken apart column-wise by pyarrow rather than row by row: three seconds and 0.5 GB.
"""

from __future__ import annotations

from itertools import islice
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
VALUES = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}


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
    label_of_row = _label_of_row(path, ids)
    # Every ID ends in a label from here on, so that what stands before its last underscore is the image.
    codes = pc.list_element(pc.split_pattern(ids, "_", max_splits=1, reverse=True), 0).dictionary_encode()
    image_of_row, image_ids = _in_order(codes.combine_chunks())
    table = _pivot(path, image_ids, image_of_row, label_of_row, values)
    _check_any(path, image_ids, table)
    # object, not pandas' str: `isin` takes a quarter of a second for 750,000 images instead of four
    index = pd.Index(image_ids.to_numpy(zero_copy_only=False), name="image_id", dtype=object)
    return pd.DataFrame(table, index=index, columns=list(LABELS))


def _read_columns(path: Path) -> tuple[pa.ChunkedArray, np.ndarray]:
    """The IDs, and the values as 0 and 1, row by row."""
    if not path.is_file():
        found = "a folder" if path.is_dir() else "the label CSV does not exist"
        raise LabelError(f"{path}: {found}; set source.labels to a CSV with the columns ID,Label")
    if path.stat().st_size == 0:
        raise LabelError(f"{path}: empty file; expected the header ID,Label")
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        header = [column.strip().strip('"') for column in file.readline().split(",")]
        has_rows = bool(file.read(1))
    if header != HEADER:
        raise LabelError(f"{path}: expected the header ID,Label, found {','.join(header)[:80]!r}")
    if not has_rows:
        return pa.chunked_array([pa.array([], pa.string())]), np.zeros(0, np.int8)
    options = pyarrow.csv.ConvertOptions(
        column_types={"ID": pa.string(), "Label": pa.dictionary(pa.int32(), pa.string())}, strings_can_be_null=False
    )
    reading = pyarrow.csv.ReadOptions(column_names=HEADER, skip_rows=1)
    try:
        table = pyarrow.csv.read_csv(path, read_options=reading, convert_options=options)
    except pa.ArrowInvalid as error:
        raise LabelError(f"{path}: not a CSV with two columns: {error}") from None
    column = table["Label"].combine_chunks()
    kinds = [kind.strip() for kind in column.dictionary.to_pylist()]  # two of them, where all is well
    value_of_kind = np.array([VALUES.get(kind, UNKNOWN) for kind in kinds], np.int8)
    values = value_of_kind[column.indices.to_numpy()]
    if (values == UNKNOWN).any():
        row = int(np.argmax(values == UNKNOWN))
        raise LabelError(
            f"{path}, line {_line_of(path, row)}: Label is {kinds[column.indices[row].as_py()]!r}, expected 0 or 1"
        )
    return table["ID"], values


def _line_of(path: Path, row: int) -> int:
    """The line, from 1, that holds a row: empty lines are none, and the header is the first."""
    with path.open("rb") as file:
        filled = (number for number, line in enumerate(file, start=1) if line.strip(b"\r\n"))
        return next(islice(filled, row + 1, None), 0)


def _label_of_row(path: Path, ids: pa.ChunkedArray) -> np.ndarray:
    """The number of the label that each ID, ``<image id>_<label>``, ends in."""
    label_of_row = np.full(len(ids), -1, np.int8)
    for number, name in enumerate(LABELS):
        label_of_row[pc.ends_with(ids, "_" + name).to_numpy()] = number
    unknown = np.flatnonzero(label_of_row < 0)
    if len(unknown):
        row = int(unknown[0])
        raise LabelError(
            f"{path}, line {_line_of(path, row)}: {ids[row].as_py()!r} names no known label; expected an image id followed by "
            f"_{', _'.join(LABELS)} ({len(unknown)} such lines)"
        )
    return label_of_row


def _in_order(images: pa.DictionaryArray) -> tuple[np.ndarray, pa.Array]:
    """The image ids in ascending order, and the place in that order of each row's image."""
    order = pc.sort_indices(images.dictionary)
    place = np.empty(len(order), np.int64)
    place[order.to_numpy()] = np.arange(len(order))
    return place[images.indices.to_numpy()], images.dictionary.take(order)


def _pivot(
    path: Path, image_ids: pa.Array, image_of_row: np.ndarray, label_of_row: np.ndarray, values: np.ndarray
) -> np.ndarray:
    """Turn rows into a table [image, label]; the RSNA file has 24 agreeing duplicates, and disagreeing ones are an error."""
    shape = (len(image_ids), len(LABELS))
    cells = image_of_row * len(LABELS) + label_of_row
    is_0, is_1 = (np.bincount(cells[values == v], minlength=shape[0] * shape[1]).reshape(shape) > 0 for v in (0, 1))
    conflicts = np.argwhere(is_0 & is_1)
    if len(conflicts):
        image, label = conflicts[0]
        raise LabelError(
            f"{path}: image {image_ids[image]} is labelled both 0 and 1 for {LABELS[label]} "
            f"({len(conflicts)} such conflicts); keep one of the rows"
        )
    return np.select([is_1, is_0], [np.int8(1), np.int8(0)], np.int8(UNKNOWN))


def _check_any(path: Path, image_ids: pa.Array, table: np.ndarray) -> None:
    contradictory = np.flatnonzero((table[:, :ANY] == 1).any(axis=1) & (table[:, ANY] == 0))
    if len(contradictory):
        raise LabelError(
            f"{path}: image {image_ids[contradictory[0]]} has a subtype but any = 0 ({len(contradictory)} such images); "
            f"`any` must be the OR of the five subtypes"
        )
