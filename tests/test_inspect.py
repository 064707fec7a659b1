"""What `inspect` prints of a store's arrays and grey values: zarr-python and numpy are the authorities."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import stages.inspect
from pipeline.errors import UsageError
from pipeline.index import build_manifest
from pipeline.preprocess import preprocess
from pipeline.reader import shard_name
from pipeline.store import Store
from pipeline.survey import count_values, describe_arrays, survey, verify
from tests.conftest import Cohort


@pytest.fixture
def store(cohort: Cohort) -> Store:
    cohort.add_study(1, 3, labels=[[0, 0, 0, 0, 1, 1], None, [0] * 6])
    cohort.add_study(2, 2)
    config = cohort.config()
    manifest, _, _ = build_manifest(config)
    preprocess(config, manifest, data=cohort.data)
    return Store(cohort.data / "store.zarr")


def test_values_are_counted_as_numpy_counts_them(store: Store) -> None:
    pixels = zarr.open_group(store.path, mode="r")["pixels"]
    assert isinstance(pixels, zarr.Array)
    studies = [np.asarray(pixels[0, :3]), np.asarray(pixels[1, :2])]
    for study, of_study in enumerate(studies):
        for window, counts_V in enumerate(count_values(store, study)):
            np.testing.assert_array_equal(counts_V, np.histogram(of_study[..., window], np.arange(257))[0])
    np.testing.assert_array_equal(count_values(store), count_values(store, 0) + count_values(store, 1))
    everything = np.concatenate(studies)
    for window, facts in enumerate(survey(store)["windows"].values()):
        assert facts["mean"] == pytest.approx(everything[..., window].mean(), abs=0.01)
        assert facts["below"] == pytest.approx((everything[..., window] == 0).mean(), abs=1e-4)


def test_the_tree_says_of_every_array_what_zarr_python_says(store: Store) -> None:
    arrays = describe_arrays(store)
    group = zarr.open_group(store.path, mode="r")
    assert set(arrays) == set(group.array_keys())
    assert next(iter(arrays)) == "pixels"
    for name, array in group.arrays():
        facts = arrays[name]
        assert tuple(facts["dimensions"].values()) == array.shape
        assert tuple(facts["dimensions"]) == array.metadata.dimension_names
        assert tuple(facts["chunk"]) == array.chunks
        assert facts["shard"] == (None if array.shards is None else list(array.shards))
        assert facts["bytes"] == sum(path.stat().st_size for path in (store.path / name).iterdir())
    assert arrays["pixels"]["files"] == 2


def test_the_door_shows_tree_and_histogram(store: Store, run_stage: Callable[..., Any]) -> None:
    tree = run_stage("inspect", "--tree")
    assert tree.code == 0, tree.err
    assert "[study 2 × slice 64 × row 32 × column 32 × window 3]" in tree.out
    assert "2 shards of 1×64×32×32×3, in chunks of 1×1×32×32×3" in tree.out
    histogram = run_stage("inspect", "--histogram", "--study", "ID_0000000001")
    assert "brain 40/80, 3,072 pixels" in histogram.out
    counts = count_values(store, 0)[0]
    assert f"at or below       0 HU  {counts[0] / 3072:6.1%}" in histogram.out
    lines = histogram.out.splitlines()[1:19]
    assert sum(float(line.split("HU")[1].split("%")[0]) for line in lines) == pytest.approx(100, abs=1)
    fullest = max(lines[1:17], key=lambda line: line.count("█"))
    assert "from             30 HU" in fullest  # the cohort's disk has 31 to 33 HU
    as_json = json.loads(run_stage("inspect", "--histogram", "--json").out)
    assert as_json["soft"] == count_values(store)[2].tolist()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--tree --verify", "--tree and --verify: give one of them"),
        ("--excluded --study 0", "--excluded and --study: give one of them"),
        ("--discard", "--discard goes with --verify"),
        ("--out sheet.png", "--out goes with --study or --excluded"),
        ("--histogram --window brain", "--window goes with --study"),
        ("--verify --json", "--json goes with the summary or --excluded or --histogram or --tree"),
        ("--study 0 --out sheet.bmp", "expected a name that ends in .png, .jpg, .jpeg"),
        ("--study 0 --window bone", "the store has brain, subdural, soft"),
    ],
)
def test_options_that_do_not_go_together_are_refused(store: Store, given: str, said: str) -> None:
    parser = argparse.ArgumentParser()
    stages.inspect.add_arguments(parser)
    with pytest.raises(UsageError, match=re.escape(said)):
        stages.inspect.main(argparse.Namespace(data=store.path.parent, **vars(parser.parse_args(given.split()))))


def test_usage_ends_with_2_and_without_a_traceback(store: Store, run_stage: Callable[..., Any]) -> None:
    ran = run_stage("inspect", "--discard")
    assert ran.code == 2
    assert ran.err == "error: --discard goes with --verify\n"


def test_missing_shard_is_one_line_of_verify(store: Store) -> None:
    (store.path / "pixels" / shard_name(0, 0)).unlink()
    faults = [fault for _, of_study in verify(store) for fault in of_study]
    assert len(faults) == 1
    assert "study ID_0000000001, slices 0 to 2: the shard is missing" in faults[0]


def test_picture_that_cannot_be_written_leaves_nothing(
    store: Store, tmp_path: Path, run_stage: Callable[..., Any]
) -> None:
    (tmp_path / "sheet.png").mkdir()
    ran = run_stage("inspect", "--study", "0", "--out", str(tmp_path / "sheet.png"))
    assert ran.code == 1
    assert f"--out {tmp_path}/sheet.png: Is a directory" in ran.err
    assert not list(tmp_path.glob(".*.tmp"))
