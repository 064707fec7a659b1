"""What was excluded can be listed and looked at, also where no store could be made."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pydicom
from PIL import Image

from tests.conftest import Cohort


def spoil(cohort: Cohort) -> None:
    """One study with a capture in colour, a slice that cannot be decoded and one that is noise; another series; no DICOM."""
    cohort.add_study(1, 8)
    cohort.add_study(2, 1, patient=1, study_id="ID_0000000001", series_id="ID_000000beef")
    path = cohort.dicom / "ID_000010001.dcm"
    dataset = pydicom.dcmread(path)
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit = 7
    dataset.PixelData = np.full((64, 64, 3), (250, 10, 10), np.uint8).tobytes()
    dataset.save_as(path)
    path = cohort.dicom / "ID_000010002.dcm"
    dataset = pydicom.dcmread(path)
    dataset.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    dataset.save_as(path)
    content = path.read_bytes()
    path.write_bytes(content[:-700])
    path = cohort.dicom / "ID_000010003.dcm"
    content = path.read_bytes()
    noise = np.random.default_rng(0).integers(0, 4096, 64 * 64).astype("<u2").tobytes()
    path.write_bytes(content[: -len(noise)] + noise)
    (cohort.dicom / "readme.txt").write_text("no DICOM")


def test_exclusions_of_both_stages_are_listed_by_reason(cohort: Cohort, run_stage: Callable[..., Any]) -> None:
    spoil(cohort)
    cohort.write_params()
    assert run_stage("index").code == 0
    assert run_stage("preprocess").code == 0
    ran = run_stage("inspect", "--excluded", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out) == {
        "other_series": ["ID_000020000.dcm"],
        "colour": ["ID_000010001.dcm"],
        "undecodable": ["ID_000010002.dcm"],
        "garbage": ["ID_000010003.dcm"],
        "not_dicom": ["readme.txt"],
    }
    shown = run_stage("inspect", "--excluded").out
    assert shown.startswith("5 excluded")
    assert "1 × its pixel data cannot be decoded (undecodable)\n  ID_000010002.dcm" in shown


def test_what_can_be_decoded_is_drawn(cohort: Cohort, run_stage: Callable[..., Any]) -> None:
    spoil(cohort)
    cohort.write_params()
    assert run_stage("index").code == 0
    assert run_stage("preprocess").code == 0
    out = cohort.folder / "excluded.png"
    ran = run_stage("inspect", "--excluded", "--out", str(out))
    assert "3 slices drawn" in ran.err
    picture = np.asarray(Image.open(out))
    assert ((picture == (250, 10, 10)).all(axis=-1)).sum() >= 64 * 64
    out.unlink()
    cohort.dicom.rename(cohort.folder / "elsewhere")
    ran = run_stage("inspect", "--excluded", "--out", str(out))
    assert ran.code == 1
    assert "give --params FILE with the sources that were indexed" in ran.err
    assert not out.exists()


def test_file_that_was_replaced_by_a_better_one_is_no_longer_listed(
    cohort: Cohort, run_stage: Callable[..., Any]
) -> None:
    names = cohort.add_study(1, 4)
    path = cohort.dicom / f"{names[2]}.dcm"
    content = path.read_bytes()
    path.write_bytes(content[:-8192] + np.random.default_rng(0).integers(0, 4096, 4096, np.uint16).tobytes())
    cohort.write_params()
    for stage in ("index", "preprocess"):
        assert run_stage(stage).code == 0
    assert "(garbage)" in run_stage("inspect", "--excluded").out
    path.write_bytes(content)
    assert run_stage("index").code == 0
    assert "garbage" not in run_stage("inspect", "--excluded").out


def test_too_many_exclusions_are_an_error_and_can_be_looked_at(cohort: Cohort, run_stage: Callable[..., Any]) -> None:
    spoil(cohort)
    cohort.write_params(index__max_excluded_fraction=0.3)
    assert run_stage("index").code == 0  # 1 of 8 by their headers; a capture and another series are no defects
    ran = run_stage("preprocess")
    assert ran.code == 1
    assert "3 of 8 slices are excluded by defect (37.5%), more than index.max_excluded_fraction = 0.3 allows" in ran.err
    assert "Traceback" not in ran.err
    assert not (cohort.data / "store.zarr").exists()
    assert "(garbage)" in run_stage("inspect", "--excluded").out
    cohort.write_params(index__max_excluded_fraction=0.1)
    ran = run_stage("index")
    assert ran.code == 1
    assert "1 of 8 slices are excluded by defect (12.5%)" in ran.err
    assert "(colour)" in run_stage("inspect", "--excluded").out


def test_without_a_manifest_inspect_says_what_to_do(cohort: Cohort, run_stage: Callable[..., Any]) -> None:
    ran = run_stage("inspect", "--excluded")
    assert ran.code == 1
    assert "run `python -m stages.index`" in ran.err
