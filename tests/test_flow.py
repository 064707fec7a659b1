"""The account of every file adds up from the files found to the slices scored, and the diagram says the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pydicom
import pytest

from pipeline.config import Config
from pipeline.flow import Flow, Node, count_flow, draw_flow
from pipeline.folds import deal_folds, write_folds
from pipeline.labels import LABELS
from pipeline.store import Store
from tests.conftest import Cohort
from tests.test_preprocess import run

NONE, BLEEDS = [0] * len(LABELS), [0, 0, 0, 0, 1, 1]
CHANGES: dict[str, Any] = {"folds__count": 3, "train__folds": [0, 2], "train__validation_fraction": 0.5}


def nodes(node: Node) -> list[Node]:
    return [node, *(inner for part in node.parts for inner in nodes(part))]


@pytest.fixture
def stored(cohort: Cohort) -> tuple[Config, Store]:
    """Eight studies: one of four has a slice without a label, one none at all; two files are no slices, one can't be decoded."""
    for number in range(8):
        labels: list[Any] = [BLEEDS if number % 2 else NONE, NONE, NONE, None if number == 3 else NONE]
        cohort.add_study(number, labels=[None] * 4 if number == 7 else labels, patient=6 if number == 5 else number)
    (cohort.dicom / "notes.txt").write_text("no slice")
    for name, image_type in (("scout", ["ORIGINAL", "PRIMARY", "LOCALIZER"]), ("damaged", None)):
        dataset = pydicom.dcmread(next(iter(sorted(cohort.dicom.glob("ID_000020000.dcm")))))
        dataset.SOPInstanceUID = f"ID_{name}"
        if image_type:
            dataset.ImageType = image_type
        else:
            dataset.ImagePositionPatient = [-100, -100, 30]
            dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLSLossless
            dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8 no picture"])
            dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
        dataset.save_as(cohort.dicom / f"{name}.dcm", enforce_file_format=False)
    store, _, _ = run(cohort, **CHANGES)
    config = cohort.config(**CHANGES)
    write_folds(cohort.data / "folds", deal_folds(config, store), config=config, store=store)
    return config, store


def count(stored: tuple[Config, Store], data: Path) -> Flow:
    config, store = stored
    flow = count_flow(config, store, data=data, folds_digest=deal_folds(config, store).digest)
    assert flow is not None
    return flow


def test_every_node_is_the_sum_of_its_parts(stored: tuple[Config, Store], cohort: Cohort) -> None:
    flow = count(stored, cohort.data)
    assert (flow.files, flow.found.slices, flow.fault) == (35, 35, "")
    for node in nodes(flow.found):
        if node.parts:
            assert node.slices == sum(part.slices for part in node.parts), node.title
        if node.reasons and "excluded" in node.title:
            assert node.slices == sum(node.reasons.values())
    by_header, by_pixels, in_store = flow.found.parts
    assert by_header.reasons == {"not_dicom": 1, "localizer": 1}
    assert by_pixels.reasons == {"undecodable": 1}
    assert (in_store.slices, in_store.studies, in_store.patients) == (32, 8, 7)
    labelled, unlabelled = in_store.parts
    assert (unlabelled.slices, unlabelled.studies, unlabelled.patients) == (5, 2, 2)
    assert (labelled.slices, labelled.studies, labelled.patients) == (27, 7, 6)
    assert list(labelled.dealings) == [0, 2]
    for parts in labelled.dealings.values():
        for unit in ("slices", "studies", "patients"):
            assert sum(getattr(part, unit) for part in parts) == getattr(labelled, unit), unit
        assert all(part.slices for part in parts)


def test_the_diagram_says_every_number_in_place_and_in_words(stored: tuple[Config, Store], cohort: Cohort) -> None:
    flow = count(stored, cohort.data)
    root = ElementTree.fromstring(draw_flow(flow))
    texts = [text.text or "" for text in root.iter("text")]
    labelled = flow.found.parts[-1].parts[0]
    for words in (
        "35 files found",
        "2 slices excluded by their headers",
        "32 slices in the store",
        "27 slices with labels",
    ):
        assert words in texts
        assert words in root.attrib["aria-label"]
    for fold, parts in labelled.dealings.items():
        assert f"fold {fold}" in texts
        for part in parts:
            assert f"{part.slices} slices" in texts
            assert f"{part.studies} studies of {part.patients} patients" in texts
            assert f"{part.slices:,} {part.title}" in root.attrib["aria-label"]
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    boxes = [[float(box.attrib[name]) for name in ("x", "y", "width", "height")] for box in root.iter("rect")]
    assert all(x >= 0 and x + w <= width and y >= 0 and y + h <= height for x, y, w, h in boxes)
    for number, (x, y, w, h) in enumerate(boxes):
        for left, top, wide, high in boxes[:number]:
            assert x >= left + wide or left >= x + w or y >= top + high or top >= y + h, "no box covers another"


def test_many_reasons_are_summed_up() -> None:
    reasons = dict(
        zip(["not_dicom", "localizer", "colour", "not_ct", "implausible", "no_pixels", "x"], range(1, 8), strict=True)
    )
    left_out = Node("excluded by their headers", 28, reasons=reasons)
    labelled, none = Node("with labels", 1, 1, 1), Node("without a label", 0, 0, 0)
    found = Node("found", 29, parts=(left_out, Node("in the store", 1, 1, 1, parts=(labelled, none))))
    svg = draw_flow(Flow(found, 29, ""))
    assert "3 for 2 other reasons" in svg
    assert "2 × a localizer" not in svg
    assert "7 × x" in svg, "a reason of another version"
    assert "0 slices" not in svg


def test_without_the_table_that_training_used_the_account_ends_at_the_labels_and_says_so(
    stored: tuple[Config, Store], cohort: Cohort
) -> None:
    config, store = stored
    other = count_flow(config, store, data=cohort.data, folds_digest="of another dealing")
    (cohort.data / "folds" / "folds.csv").unlink()
    missing = count(stored, cohort.data)
    assert other is not None
    for flow, says in ((other, "another fold table"), (missing, "folds/folds.csv: there is no fold table")):
        assert says in flow.fault
        assert str(cohort.folder) not in flow.fault
        assert flow.found.parts[-1].parts[0].dealings == {}
        assert "27 slices with labels" in draw_flow(flow)


def test_faults_of_another_run_are_not_told_apart(stored: tuple[Config, Store], cohort: Cohort) -> None:
    path = cohort.data / "preprocess" / "faults.parquet"
    faults = pd.read_parquet(path)
    pd.concat([faults, faults]).to_parquet(path)
    (left_out, _) = count(stored, cohort.data).found.parts
    assert left_out.reasons == {"not_dicom": 1, "localizer": 1, "undecodable": 1}
    path.unlink()
    assert count(stored, cohort.data).found.parts[0] == left_out
