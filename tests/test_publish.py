"""A store takes the place of a store and of nothing else, whatever the disk can do; the old one stays until the new one is there."""

from __future__ import annotations

import argparse
import errno
import fcntl
import os
import pickle
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

import pipeline.files
import stages.prune
from pipeline.errors import IchorError, ReplacedError, SourceError, StoreError
from pipeline.files import aside, replace_folder
from pipeline.index import build_manifest
from pipeline.preprocess import preprocess
from pipeline.publish import SENDING
from pipeline.store import Store
from tests.conftest import Cohort, tree_bytes
from tests.test_store import make_store


@pytest.fixture
def cohort(cohort: Cohort) -> Cohort:
    cohort.size = 32
    for number in (5, 6):
        cohort.add_study(number, 2)
    return cohort


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """A folder on another file system, to which nothing can be renamed or linked."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("there is no second file system here")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def publish(cohort: Cohort, target: Path | str, *, data: Path | None = None) -> None:
    config = cohort.config()
    preprocess(config, build_manifest(config)[0], data=data or cohort.data, store=str(target))


def fail_at(kind: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of os.KIND fail from now on, as on file systems that know nothing of the kind."""

    def refuse(*paths: Any, **_: Any) -> None:
        raise OSError(number, os.strerror(number), *map(str, paths[:1]))

    monkeypatch.setattr(os, kind, refuse)


# ---- whoever reads the old one


def test_store_that_is_replaced_while_it_is_read_is_said_and_never_shows_another_study(cohort: Cohort) -> None:
    store = make_store(cohort)
    shown = store.reader.read(1, 0)
    unopened = pickle.dumps(store.reader)  # as worker processes get it
    cohort.add_study(1, 2)  # comes first now
    make_store(cohort)
    for reader in (store.reader, pickle.loads(unopened)):
        for study in (0, 1):
            with pytest.raises(ReplacedError, match=r"store.zarr: the store was replaced while it was read"):
                reader.read(study, 1)
    assert np.array_equal(Store(store.path).reader.read(2, 0), shown)


# ---- the disk


def test_old_store_is_given_back_where_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "which").write_text(name)
    final, real, calls = tmp_path / "store.zarr", os.replace, []
    os.replace(tmp_path / "old", final)

    def stopped(*paths: Any) -> None:
        calls.append(paths)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*paths)

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        replace_folder(tmp_path / "new", final)
    assert (final / "which").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["new", "store.zarr"]


@pytest.mark.parametrize("is_pruned", [False, True])
def test_store_that_a_killed_run_had_put_aside_is_given_back(cohort: Cohort, is_pruned: bool) -> None:
    path = make_store(cohort).path
    before = tree_bytes(path)
    path.rename(path.with_name(".store.zarr.123.old"))
    if is_pruned:
        stages.prune.main(argparse.Namespace(data=cohort.data, all=False))
    else:
        config = cohort.config()
        manifest, _, _ = build_manifest(config)
        cohort.dicom.rename(cohort.folder / "away")
        config = cohort.config(preprocess__image_size=16)
        with pytest.raises(SourceError, match="was there when index ran and is gone"):
            preprocess(config, manifest, data=cohort.data)
    assert tree_bytes(path) == before
    assert [name for name in os.listdir(cohort.data) if name.startswith(".store")] == []


def test_work_may_lie_on_another_disk_than_the_store(cohort: Cohort, elsewhere: Path) -> None:
    expected = tree_bytes(make_store(cohort).path)
    (cohort.data / "wip").rename(cohort.folder / "old wip")
    (cohort.data / "wip").symlink_to(elsewhere)
    for _ in range(2):
        assert tree_bytes(make_store(cohort).path) == expected


def test_link_in_the_stores_place_leads_to_where_it_lies(cohort: Cohort, elsewhere: Path) -> None:
    expected = tree_bytes(make_store(cohort).path)
    link = cohort.data / "store.zarr"
    link.rename(cohort.folder / "old store")
    link.symlink_to(elsewhere / "large")
    for _ in range(2):  # at first it leads to nothing yet
        make_store(cohort)
        assert link.is_symlink()
        assert tree_bytes(elsewhere / "large") == expected
        assert os.listdir(elsewhere) == ["large"]
        stages.prune.main(argparse.Namespace(data=cohort.data, all=False))


@pytest.mark.parametrize("is_linked", [True, False])
def test_shards_of_other_code_with_the_same_pixels_are_pruned(
    cohort: Cohort, is_linked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_linked:
        fail_at("link", errno.EPERM, monkeypatch)
    make_store(cohort)
    shards = cohort.data / "wip" / "shards"
    expected = tree_bytes(shards)
    for name, content in expected.items():
        other = shards / ("0" * 8 + name)
        other.write_bytes(content)
        moved_ns = 10**12 if is_linked else -(10**12)  # later, but no name of the store's file; or earlier
        changed_ns = (shards / name).stat().st_mtime_ns + moved_ns
        os.utime(other, ns=(changed_ns, changed_ns))
    stages.prune.main(argparse.Namespace(data=cohort.data, all=False))
    assert tree_bytes(shards) == expected


@pytest.mark.parametrize("number", [errno.EPERM, errno.EXDEV, errno.EMLINK])
def test_disk_without_hard_links_holds_a_copy(cohort: Cohort, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tree_bytes(make_store(cohort).path)
    fail_at("link", number, monkeypatch)
    assert tree_bytes(make_store(cohort).path) == expected


def test_disk_that_syncs_no_folders_is_good_enough(cohort: Cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    def sync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", sync)
    make_store(cohort)

    def sync_nothing(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", sync_nothing)
    with pytest.raises(OSError, match="Input/output error"):
        make_store(cohort, preprocess__image_size=16)


def test_disk_without_locks_is_named(cohort: Cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(
        IchorError, match=r"preprocess.lock: this file system gives no locks \(Function not implemented\)"
    ):
        make_store(cohort)


# ---- --store


def test_two_runs_into_one_folder_are_kept_apart_and_nothing_of_others_goes(cohort: Cohort) -> None:
    target = cohort.folder / "there" / "x.zarr"
    target.parent.mkdir()
    for name in (".x.zarr.backup.old", ".x.zarr.copy.new", ".y.zarr.1.new"):
        (target.parent / name).mkdir()
    publish(cohort, target)
    with (
        pipeline.files.only_one(target.with_name(".x.zarr.lock"), "preprocess"),
        pytest.raises(
            IchorError, match=r"another preprocess is running on .*x.zarr; wait for it or give another --store"
        ),
    ):
        publish(cohort, target, data=cohort.folder / "data of another")
    publish(cohort, target, data=cohort.folder / "data of another")
    there = sorted(set(os.listdir(target.parent)) - {".x.zarr.lock"})
    assert there == [".x.zarr.backup.old", ".x.zarr.copy.new", ".y.zarr.1.new", "x.zarr"]


def test_folder_in_which_one_stands_may_be_the_target(cohort: Cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    (cohort.folder / "here").mkdir()
    monkeypatch.chdir(cohort.folder / "here")
    publish(cohort, ".")
    assert Store(cohort.folder / "here").num_slices.tolist() == [2, 2]


def test_leftovers_of_killed_runs_go(cohort: Cohort) -> None:
    path = make_store(cohort).path
    for kind in ("new", "old"):
        left = aside(path, kind).with_name(f".store.zarr.77.{kind}")
        left.mkdir()
        (left / "half").touch()
    make_store(cohort)
    assert [name for name in os.listdir(cohort.data) if name.startswith(".store")] == []


@pytest.fixture
def storage() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def test_url_is_refused_before_the_work_where_something_else_is(cohort: Cohort, storage: Any) -> None:
    storage.pipe_file("/bucket/labels/train.csv", b"others'")
    storage.pipe_file("/bucket/foreign.zarr/zarr.json", b'{"attributes": {"format": "another"}}')
    before = dict.fromkeys(storage.find("/"))
    for url, said in (
        ("memory://bucket", "a whole bucket; give the name of a store in it, such as memory://bucket/store.zarr"),
        ("memory://bucket/labels", "something that is no store is there, and would be replaced"),
        ("memory://bucket/foreign.zarr", "something that is no store is there, and would be replaced"),
        ("foo://bucket/x.zarr", "cannot be written"),
    ):
        with pytest.raises(StoreError, match=f"--store {url}: {said}"):
            publish(cohort, url)
        assert not list((cohort.data / "wip" / "shards").glob("*.shard")), "before the work"
    assert dict.fromkeys(storage.find("/")) == before


def test_store_that_was_half_sent_is_sent_anew(cohort: Cohort, storage: Any) -> None:
    url = "Memory://bucket/x.zarr"  # a protocol has no case
    publish(cohort, url)
    sent = storage.find("/bucket/x.zarr")
    assert f"/bucket/x.zarr/{SENDING}" not in sent
    storage.rm_file("/bucket/x.zarr/zarr.json")
    with pytest.raises(StoreError, match="something that is no store is there"):
        publish(cohort, url)
    storage.pipe_file(f"/bucket/x.zarr/{SENDING}", b"")  # as a run that is sending leaves it
    publish(cohort, url)
    assert storage.find("/bucket/x.zarr") == sent
