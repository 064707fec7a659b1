"""Stage one end to end: the right grey levels, the same bytes whatever happens on the way, and nothing done twice."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pydicom
import pytest
from pydicom.pixels import apply_rescale
from pydicom.uid import RLELossless

import pipeline.pixels
import pipeline.preprocess
from pipeline.config import Config
from pipeline.convert import SliceReader
from pipeline.decoder import DecodeError
from pipeline.errors import IchorError, SourceError
from pipeline.index import build_manifest
from pipeline.phantom.dicom_writer import StoredForm
from pipeline.preprocess import preprocess
from pipeline.store import Store
from tests.conftest import REAL_DICOM, SIGNED_16, Cohort, tree_bytes


def run(cohort: Cohort, data: Path | None = None, **changes: Any) -> tuple[Store, dict[str, Any], pd.DataFrame]:
    config = cohort.config(**changes)
    manifest, _, _ = build_manifest(config)
    data = data or cohort.data
    totals, faults = preprocess(config, manifest, data=data)
    return Store(data / "store.zarr"), totals, faults


def plain_windows(path: Path, config: Config, *, wrapped: bool = False) -> np.ndarray:
    """The straightforward way: pydicom's decoding and rescale, cv2's area average, windows in float64."""
    dataset = pydicom.dcmread(path)
    pixels_hu = apply_rescale(dataset.pixel_array, dataset).astype(np.float64)
    if wrapped:
        pixels_hu = (dataset.pixel_array.astype(int) + 1024) % 4096 - 1024.0
    size = config.preprocess.image_size
    if size != len(pixels_hu):
        pixels_hu = cv2.resize(pixels_hu, (size, size), interpolation=cv2.INTER_AREA)
    windows = config.preprocess.windows.values()
    return np.stack([(pixels_hu - (w.centre - w.width / 2)) / w.width * 255 for w in windows], axis=-1).clip(0, 255)


@pytest.mark.parametrize("image_size", [32, 64])
def test_windowed_values_agree_with_an_independent_windowing(cohort: Cohort, image_size: int) -> None:
    cohort.add_study(1, 2)
    cohort.add_study(2, 2, form=SIGNED_16)
    cohort.add_study(3, 2, form=StoredForm(bits=12, signed=True, intercept="0"))
    cohort.add_study(4, 2, form=StoredForm(bits=12, signed=False, intercept="1", wrapped=True))
    store, totals, _ = run(cohort, preprocess__image_size=image_size)
    config = cohort.config(preprocess__image_size=image_size)
    assert totals["repaired"] == 2
    for study, number in store.slices.tolist():
        path = cohort.dicom / f"{store.image_id[study, number]}.dcm"
        expected = plain_windows(path, config, wrapped=study == 3)
        assert np.abs(store.reader.read(study, number) - expected).max() <= 1


@pytest.mark.skipif(not REAL_DICOM.is_dir(), reason="the real head CTs are not here")
@pytest.mark.parametrize("image_size", [256, 512])
def test_real_heads_agree_with_an_independent_windowing(cohort: Cohort, image_size: int) -> None:
    cohort.folder.mkdir(exist_ok=True)
    changes = {"source__dicom": str(REAL_DICOM), "preprocess__image_size": image_size}
    store, totals, _ = run(cohort, **changes)
    config = cohort.config(**changes)
    assert (len(store.study), len(store.slices), totals["excluded"]) == (3, 68, 20)
    manifest, _, _ = build_manifest(config)
    paths = dict(zip(manifest["image_id"], manifest["path"], strict=True))
    for study, number in store.slices.tolist()[::3]:
        expected = plain_windows(REAL_DICOM / paths[store.image_id[study, number]], config)
        difference = np.abs(store.reader.read(study, number) - expected)
        # padding is air for us and −1500 HU for pydicom: only an area that straddles both can differ
        assert np.quantile(difference, 0.9999) <= 1
        assert difference[image_size // 4 : -image_size // 4, image_size // 4 : -image_size // 4].max() <= 1


def test_bytes_do_not_depend_on_workers_or_order(
    cohort: Cohort, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for number in range(5):
        cohort.add_study(number, 3)
    alone, _, _ = run(cohort)
    monkeypatch.setattr(pipeline.preprocess, "SLICES_PER_TASK", 4)
    shared, _, _ = run(cohort, data=tmp_path / "other", preprocess__workers=2)
    assert tree_bytes(alone.path) == tree_bytes(shared.path)


def test_second_run_makes_no_shard_and_an_added_study_costs_one(
    cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2, 4):
        cohort.add_study(number, 3)
    first, _, _ = run(cohort)
    before = tree_bytes(first.path)
    made: list[str] = []
    real = SliceReader.read

    def spy(self: SliceReader, container: str, *args: Any) -> Any:
        made.append(Path(container).name)
        return real(self, container, *args)

    monkeypatch.setattr(SliceReader, "read", spy)
    second, _, _ = run(cohort)
    assert made == []
    assert tree_bytes(second.path) == before
    cohort.add_study(3, 2)
    third, _, _ = run(cohort)
    assert sorted(made) == ["ID_000030000.dcm", "ID_000030001.dcm"]
    assert third.study.tolist() == [f"ID_{number:010x}" for number in (1, 2, 3, 4)]


def test_changed_label_costs_no_pixels(cohort: Cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    cohort.add_study(1, 2)
    first, _, _ = run(cohort)
    monkeypatch.setattr(SliceReader, "read", lambda *_: pytest.fail("a pixel was read"))
    cohort.labels["ID_000010000"] = [1, 0, 0, 0, 0, 1]
    second, _, _ = run(cohort)
    assert second.labels[0, 0].tolist() == [1, 0, 0, 0, 0, 1]
    assert second.digest != first.digest


def test_changed_window_makes_all_anew(cohort: Cohort) -> None:
    cohort.add_study(1, 2)
    first, _, _ = run(cohort)
    second, _, _ = run(cohort, preprocess__windows={"bone": {"centre": 600, "width": 2800}})
    assert list(second.windows) == ["bone"]
    assert second.per_study["content"][0] != first.per_study["content"][0]
    assert second.reader.read(0, 0).shape == (32, 32, 1)


def test_study_of_more_than_64_slices_leaves_every_other_shard_as_it_was(cohort: Cohort) -> None:
    cohort.size = 16
    for number in (1, 3):
        cohort.add_study(number, 3)
    before, _, _ = run(cohort, preprocess__image_size=16)
    shards = sorted((before.path / "pixels").glob("c.*"))
    contents = [shard.read_bytes() for shard in shards]
    cohort.add_study(2, 70)
    after, _, _ = run(cohort, preprocess__image_size=16)
    pixels = after.path / "pixels"
    assert after.num_slices.tolist() == [3, 70, 3]
    assert after.image_id.shape == (3, 128)
    assert [(pixels / name).read_bytes() for name in ("c.0.0.0.0.0", "c.2.0.0.0.0")] == contents
    assert (pixels / "c.1.1.0.0.0").is_file()
    import zarr

    array = zarr.open_group(after.path, mode="r")["pixels"]
    assert isinstance(array, zarr.Array)
    for number in range(70):
        np.testing.assert_array_equal(after.reader.read(1, number), array[1, number])


def test_undecodable_slice_is_excluded_by_name_and_the_study_goes_on(cohort: Cohort) -> None:
    cohort.add_study(1, 3)
    path = cohort.dicom / "ID_000010001.dcm"
    dataset = pydicom.dcmread(path)
    dataset.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    dataset.save_as(path)
    content = path.read_bytes()
    path.write_bytes(content[:-600] + bytes(600))  # rubbish where the runs are
    os.truncate(path, len(content) - 700)
    store, totals, faults = run(cohort)
    assert store.num_slices.tolist() == [2]
    assert totals["excluded"] == 1
    assert faults["image_id"].tolist() == ["ID_000010001"]
    assert faults["reason"].tolist() == ["undecodable"]


def test_file_changed_after_index_is_an_error_and_what_is_finished_is_kept(cohort: Cohort) -> None:
    cohort.add_study(1, 2)
    cohort.add_study(2, 2)
    config = cohort.config()
    manifest, _, _ = build_manifest(config)
    os.utime(cohort.dicom / "ID_000020001.dcm", ns=(1, 1))
    with pytest.raises(
        SourceError, match=r"1 file\(s\) changed, vanished or could not be read after index, 'ID_000020001.dcm' first"
    ):
        preprocess(config, manifest, data=cohort.data)
    assert len(list((cohort.data / "wip" / "shards").glob("*.shard"))) == 2
    assert not (cohort.data / "store.zarr").exists()
    run(cohort)


def test_file_that_is_away_for_a_while_is_not_forgotten(cohort: Cohort) -> None:
    cohort.add_study(1, 3)
    config = cohort.config()
    manifest, _, _ = build_manifest(config)
    away = cohort.dicom / "ID_000010001.dcm"
    away.rename(cohort.folder / "away")
    with pytest.raises(SourceError, match="vanished or could not be read"):
        preprocess(config, manifest, data=cohort.data)
    (cohort.folder / "away").rename(away)
    preprocess(config, manifest, data=cohort.data)
    assert Store(cohort.data / "store.zarr").num_slices.tolist() == [3]


def test_vanished_source_is_an_error(cohort: Cohort) -> None:
    cohort.add_study(1, 2)
    config = cohort.config()
    manifest, _, _ = build_manifest(config)
    cohort.dicom.rename(cohort.folder / "elsewhere")
    with pytest.raises(SourceError, match="was there when index ran and is gone"):
        preprocess(config, manifest, data=cohort.data)


def test_too_little_disk_is_said_before_the_start(cohort: Cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    cohort.add_study(1, 2)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1_000_000})())
    with pytest.raises(IchorError, match=r"needs about 50\.0 MB, but 1\.0 MB are free"):
        run(cohort)


def test_preprocess_without_index_says_what_to_do(cohort: Cohort, run_stage: Callable[..., Any]) -> None:
    cohort.write_params()
    ran = run_stage("preprocess")
    assert ran.code == 1
    assert "no manifest; run `python -m stages.index`" in ran.err


def test_crop_shows_the_head_and_the_store_says_where_it_was(cohort: Cohort) -> None:
    spacing_mm = 4.0  # a disk of 205 mm in a field of 256
    cohort.add_study(1, 4, spacing_mm=spacing_mm)
    whole, _, _ = run(cohort)
    np.testing.assert_array_equal(whole.per_study["box_mm"], [[-128, -128, 256]])
    cropped, _, _ = run(cohort, preprocess__crop="head", preprocess__image_size=64)
    top_mm, left_mm, side_mm = cropped.per_study["box_mm"][0].tolist()
    assert 205 < side_mm < 235
    assert top_mm == pytest.approx(-side_mm / 2, abs=4)
    assert left_mm == pytest.approx(-side_mm / 2, abs=4)
    assert cropped.per_study["content"][0] != whole.per_study["content"][0]
    # the rim of the disk, mapped back by the box, lies where it lies in the file
    brain = cropped.reader.read(0, 0)[..., 0]
    columns = np.flatnonzero(brain[32] > 10)
    pixel_mm = side_mm / 64
    first_mm, last_mm = (left_mm + (column + 0.5) * pixel_mm for column in (columns[0], columns[-1]))
    stored = pydicom.dcmread(cohort.dicom / "ID_000010000.dcm").pixel_array
    row = 32 + round((top_mm + 32.5 * pixel_mm) / spacing_mm)
    inside = np.flatnonzero(stored[row] > 500)
    assert first_mm == pytest.approx((inside[0] + 0.5 - 32) * spacing_mm, abs=4)
    assert last_mm == pytest.approx((inside[-1] + 0.5 - 32) * spacing_mm, abs=4)


def test_study_without_a_head_is_shown_whole(cohort: Cohort) -> None:
    cohort.add_study(1, 2, spacing_mm=0.1)
    store, _, _ = run(cohort, preprocess__crop="head")
    np.testing.assert_allclose(store.per_study["box_mm"], [[-3.2, -3.2, 6.4]], rtol=1e-5)


@pytest.mark.skipif(not REAL_DICOM.is_dir(), reason="the real head CTs are not here")
def test_crop_of_real_heads_keeps_bone_and_drops_the_air_around(cohort: Cohort) -> None:
    changes = {"source__dicom": str(REAL_DICOM), "preprocess__image_size": 128}
    cohort.folder.mkdir(exist_ok=True)
    whole, _, _ = run(cohort, **changes)
    cropped, _, _ = run(cohort, data=cohort.folder / "cropped", preprocess__crop="head", **changes)
    share = cropped.per_study["box_mm"][:, 2] / whole.per_study["box_mm"][:, 2]
    assert (share < 0.95).all()
    for study in range(3):
        skull_whole = (whole.reader.read_study(study)[..., 2] == 255).mean()
        skull_cropped = (cropped.reader.read_study(study)[..., 2] == 255).mean()
        assert skull_cropped > skull_whole  # what went was not head


@pytest.mark.parametrize("code", ["decoder_died", "decoder_hung"])
def test_slice_whose_decoder_was_ended_is_tried_again(
    cohort: Cohort, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Perhaps it was the machine's fault, which had no memory."""
    for path in (cohort.dicom / f"{name}.dcm" for name in cohort.add_study(1, 2)):
        dataset = pydicom.dcmread(path)
        dataset.compress(RLELossless, generate_instance_uid=False)
        dataset.save_as(path)
    expected, _, _ = run(cohort)
    shutil.rmtree(cohort.data)

    def end(*_: Any, **__: Any) -> None:
        raise DecodeError(code)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.pixels, "decode", end)
        with pytest.raises(SourceError, match="no slice's pixels could be read"):
            run(cohort)
        faults = pd.read_parquet(cohort.data / "preprocess" / "faults.parquet")
        assert faults["reason"].tolist() == [code, code]
    assert run(cohort)[0].digest == expected.digest
