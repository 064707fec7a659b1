"""The store and its shards: zarr-python and xarray are the authorities, and no damaged bit goes unnoticed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import xarray as xr
import zarr
from numcodecs import blosc, zstd
from zarr.codecs import Crc32cCodec, ZstdCodec

from pipeline.errors import DamageError, StoreError
from pipeline.index import build_manifest
from pipeline.labels import LABELS
from pipeline.preprocess import preprocess
from pipeline.reader import shard_name
from pipeline.shard import LEVEL, SLOTS, build_shard, decode_chunk, encode_chunk
from pipeline.store import Store
from tests.conftest import ROOT, Cohort


def make_store(cohort: Cohort, **changes: Any) -> Store:
    config = cohort.config(**changes)
    manifest, _, _ = build_manifest(config)
    preprocess(config, manifest, data=cohort.data)
    return Store(cohort.data / "store.zarr")


@pytest.fixture
def store(cohort: Cohort) -> Store:
    cohort.add_study(1, 3, labels=[[0, 0, 0, 0, 1, 1], None, [0] * 6])
    cohort.add_study(2, 2)
    return make_store(cohort)


def test_shard_bytes_equal_those_that_zarr_python_writes(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 9, (7, 24, 24, 3)).astype(np.uint8)
    pixels[3] = 0  # an empty slice is a chunk like any other
    array = zarr.create_array(
        tmp_path / "z",
        shape=(1, SLOTS, 24, 24, 3),
        shards=(1, SLOTS, 24, 24, 3),
        chunks=(1, 1, 24, 24, 3),
        dtype="uint8",
        compressors=[ZstdCodec(level=LEVEL), Crc32cCodec()],
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
    )
    array[0, :7] = pixels
    assert (tmp_path / "z" / shard_name(0, 0)).read_bytes() == build_shard([encode_chunk(one) for one in pixels])


def test_reader_gives_the_bytes_that_zarr_python_gives(store: Store) -> None:
    pixels = zarr.open_group(store.path, mode="r")["pixels"]
    assert isinstance(pixels, zarr.Array)
    for study, number in store.slices.tolist():
        np.testing.assert_array_equal(store.reader.read(study, number), pixels[study, number])
    assert store.slices.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]]


def test_xarray_shows_names_and_coordinates_without_a_warning(store: Store) -> None:
    script = (
        "import sys, xarray as xr\n"
        "ds = xr.open_zarr(sys.argv[1], chunks=None)\n"
        "assert ds.pixels.dims == ('study', 'slice', 'row', 'column', 'window'), ds.pixels.dims\n"
        "assert set(ds.coords) == {'study', 'window', 'label'}, ds.coords\n"
        "one = ds.sel(study='ID_0000000001', window='brain').isel(slice=1)\n"
        "assert one.pixels.shape == (32, 32) and one.pixels.values.any()\n"
        "assert ds.labels.sel(label='subdural').values[0, :3].tolist() == [1, -1, 0]\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(store.path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_store_holds_the_arrays_of_the_design(store: Store) -> None:
    with xr.open_zarr(store.path, chunks=None) as opened:
        assert opened.pixels.dtype == np.uint8
        assert opened.labels.dtype == np.int8
        assert opened.num_slices.values.tolist() == [3, 2]
        assert opened.label.values.tolist() == list(LABELS)
        assert opened.window.values.tolist() == ["brain", "subdural", "soft"]
        assert opened.image_id.values[0, :4].tolist() == ["ID_000010000", "ID_000010001", "ID_000010002", ""]
        np.testing.assert_allclose(opened.position_mm.values[0, :3], [0, 5, 10])
        assert np.isnan(opened.position_mm.values[0, 3:]).all()
        assert (opened.labels.values[1, 2:] == -1).all()
        assert {"patient_key", "tilt_deg", "bits_stored", "signed", "intercept", "thickness_mm", "lowest_hu"} <= set(
            opened
        )
    assert store.attributes["accounting"]["used"] == 5
    assert store.attributes["packages"]["zarr"] == zarr.__version__


@pytest.mark.parametrize("seed", range(60))
def test_any_flipped_bit_of_a_shard_is_noticed(store: Store, seed: int) -> None:
    path = store.path / "pixels" / shard_name(0, 0)
    content = bytearray(path.read_bytes())
    place = int(np.random.default_rng(seed).integers(len(content) * 8))
    content[place // 8] ^= 1 << (place % 8)
    path.unlink()  # it shares its inode with the unfinished work
    path.write_bytes(bytes(content))
    with pytest.raises(DamageError, match=r"study ID_0000000001, slice [012]"):
        Store(store.path).reader.read_study(0)
    assert list(Store(store.path).reader.verify_study(0))
    assert not list(Store(store.path).reader.verify_study(1))


@pytest.mark.parametrize("keep", [0, 100, 2000, -1])
def test_short_or_missing_shard_is_noticed(store: Store, keep: int) -> None:
    path = store.path / "pixels" / shard_name(1, 0)
    content = path.read_bytes()
    path.unlink()
    if keep:
        path.write_bytes(content[:keep])
    with pytest.raises(DamageError, match="study ID_0000000002"):
        Store(store.path).reader.read(1, 0)


@pytest.mark.parametrize("shape", [(2, 2, 1), (8, 8, 3), (9, 9, 3), (24, 24, 3), (300, 300, 3), (512, 512, 3)])
def test_chunk_comes_back_and_only_into_its_own_size(shape: tuple[int, int, int]) -> None:
    """Of each form in which a zstd frame gives its size: in 1, 2 and 4 bytes, and behind that of its window."""
    pixels = np.random.default_rng(0).integers(0, 5, shape).astype(np.uint8)
    chunk, out = encode_chunk(pixels), np.empty(shape, np.uint8)
    decode_chunk(chunk, out)
    np.testing.assert_array_equal(out, pixels)
    for other in (np.empty(pixels.size + 1, np.uint8), np.empty(pixels.size - 1, np.uint8)):
        with pytest.raises(DamageError, match="does not hold one slice"):
            decode_chunk(chunk, other)


WHOLE = bytes(zstd.compress(bytes(192), LEVEL))


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        WHOLE[:4],
        WHOLE[:-1],
        WHOLE + b"\0",
        WHOLE + WHOLE,
        b"abc" * 99,
        bytes(zstd.compress(bytes(191), LEVEL)),
        blosc.compress(bytes(192), b"zstd", 1),
    ],
)
def test_what_is_no_frame_of_ours_is_damage(packed: bytes) -> None:
    checksum = google_crc32c.value(packed).to_bytes(4, "little")
    with pytest.raises(DamageError, match="does not hold one slice"):
        decode_chunk(packed + checksum, np.empty(192, np.uint8))


def test_missing_chunk_of_a_real_slice_is_damage_never_air(store: Store) -> None:
    path = store.path / "pixels" / shard_name(0, 0)
    path.unlink()
    path.write_bytes(build_shard([encode_chunk(np.zeros((32, 32, 3), np.uint8))] * 2))  # the study has three slices
    with pytest.raises(DamageError, match="slice 2: its chunk is missing"):
        Store(store.path).reader.read(0, 2)


def test_inspect_names_damage_and_discards_it_so_that_preprocess_heals(
    cohort: Cohort, store: Store, run_stage: Callable[..., Any]
) -> None:
    path = store.path / "pixels" / shard_name(0, 0)
    good = path.read_bytes()
    path.chmod(0o644)
    with path.open("r+b") as file:  # in place: the kept shard is the same file and is damaged with it
        file.seek(20)
        file.write(bytes([good[20] ^ 4]))
    verified = run_stage("inspect", "--verify")
    assert verified.code == 1
    assert "study ID_0000000001, slice 0" in verified.err
    assert "1 of 2 studies are damaged" in verified.err
    assert run_stage("inspect", "--verify", "--discard").code == 1
    assert run_stage("index").code == 0
    assert run_stage("preprocess").code == 0
    assert path.read_bytes() == good
    assert run_stage("inspect", "--verify").code == 0


def test_store_of_another_format_version_is_refused(store: Store, run_stage: Callable[..., Any]) -> None:
    metadata_path = store.path / "zarr.json"
    metadata = json.loads(metadata_path.read_text())
    metadata["attributes"]["format_version"] = 99
    metadata_path.write_text(json.dumps(metadata))
    with pytest.raises(StoreError, match="format version 99, this code reads 4"):
        Store(store.path)
    for stage in ("inspect", "train"):
        ran = run_stage(stage)
        assert ran.code == 1
        assert "format version 99" in ran.err
        assert "Traceback" not in ran.err


@pytest.mark.parametrize("name", ["labels", "position_mm", "image_id", "num_slices", "row_spacing_mm"])
def test_altered_or_missing_small_arrays_are_noticed(store: Store, name: str) -> None:
    chunk = next(path for path in (store.path / name).iterdir() if path.name.startswith("c"))
    content = chunk.read_bytes()
    for place in range(len(content)):
        altered = bytearray(content)
        altered[place] ^= 1
        chunk.write_bytes(bytes(altered))
        try:
            opened = Store(store.path)
        except StoreError:
            continue
        # A bit of the compressor's header that changes nothing: then nothing may have changed.
        np.testing.assert_array_equal(opened.labels, store.labels)
        np.testing.assert_array_equal(opened.position_mm, store.position_mm)
        np.testing.assert_array_equal(opened.num_slices, store.num_slices)
        assert opened.image_id.tolist() == store.image_id.tolist()
    chunk.unlink()
    with pytest.raises(StoreError, match="preprocess again"):
        Store(store.path)


@pytest.mark.parametrize("content", [None, "", "{}", '{"attributes": {}}'])
def test_what_is_no_store_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "zarr.json").write_text(content)
    with pytest.raises(StoreError):
        Store(tmp_path)


def test_summary_sheet_and_json_show_the_store(cohort: Cohort, store: Store, run_stage: Callable[..., Any]) -> None:
    summary = run_stage("inspect")
    assert summary.code == 0, summary.err
    assert "2 studies of 2 patients, 5 slices (4 with labels)" in summary.out
    assert "5 files found = 5 used + 0 repaired + 0 excluded" in summary.out
    facts = json.loads(run_stage("inspect", "--json").out)
    assert facts["labels"]["subdural"] == {"slices": 1, "studies": 1}
    sheet = cohort.folder / "sheet.png"
    drawn = run_stage("inspect", "--study", "ID_0000000001", "--window", "all", "--out", str(sheet))
    assert drawn.code == 0, drawn.err
    assert sheet.read_bytes()[:4] == b"\x89PNG"
    assert "give a study uid or a number from 0 to 1" in run_stage("inspect", "--study", "7").err


def test_zarr_metadata_is_plain_v3(store: Store) -> None:
    metadata = json.loads((store.path / "pixels" / "zarr.json").read_text())
    (sharding,) = metadata["codecs"]
    assert [codec["name"] for codec in sharding["configuration"]["codecs"]] == ["bytes", "zstd", "crc32c"]
    assert metadata["chunk_grid"]["configuration"]["chunk_shape"][:2] == [1, 64]
    assert metadata["dimension_names"] == ["study", "slice", "row", "column", "window"]
    assert ROOT.name not in json.dumps(store.attributes)  # no path of the machine that made it
