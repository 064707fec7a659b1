"""Whatever stops a run, nothing half is left under a final name, the message says what to do, and the next run ends in the same bytes.

Runs that are to be killed are forked from a server that has imported everything, so that a start costs 50 ms.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import itertools
import multiprocessing.forkserver
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import pipeline.files
import pipeline.preprocess
import stages.index
import stages.inspect
import stages.preprocess
from pipeline.files import only_one
from pipeline.store import Store
from stages.common import door
from tests.conftest import Cohort, tree_bytes
from tests.test_cluster import Machines, workers_of

SEED, KILLS = 4, 20

WINDOWS = {"first": {"brain": {"centre": 40, "width": 80}}, "second": {"bone": {"centre": 600, "width": 2800}}}
"""Two forms of one store: going from one to the other makes everything anew, while the old one stands."""

SLOW = {"preprocess__image_size": 512}
"""Slow enough to be caught half-way."""

DOORS = {"index": stages.index, "preprocess": stages.preprocess, "inspect": stages.inspect}

FORKED = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    """A server of these tests' own: in this process others may have started one, which has imported other things."""
    multiprocessing.forkserver._forkserver._stop()
    FORKED.set_forkserver_preload(["tests.test_survival", "tests.warmed"])
    yield
    multiprocessing.forkserver._forkserver._stop()


# ---- running


def stage_in_this_process(name: str, arguments: list[str], patch: Callable[[], None] | None, output: Path) -> None:
    """``python -m stages.NAME``; what it prints goes to files."""
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(output.with_suffix(suffix), os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as at a terminal
    os.fsync = lambda _: None  # a kill is no power cut
    if patch:
        patch()
    module = DOORS[name]
    sys.argv = [name, *arguments]
    try:
        door(module.main, module.__doc__, getattr(module, "add_arguments", None))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        output.with_suffix(".peak").write_text(str(peak_kib * 1024))


class Run:
    """A stage at work on a cohort.

    Args:
        cohort: its parameters are written.
        name: of the stage.
        arguments: further ones.
        patch: called in the stage's process before it starts.
        data: elsewhere than the cohort's.
    """

    def __init__(
        self,
        cohort: Cohort,
        name: str = "preprocess",
        *arguments: str,
        patch: Callable[[], None] | None = None,
        data: Path | None = None,
    ) -> None:
        self.output = cohort.folder / "output"
        paths = ["--params", str(cohort.folder / "params.yaml"), "--data", str(data or cohort.data)]
        self.process = FORKED.Process(
            target=stage_in_this_process, args=(name, [*paths, *arguments], patch, self.output)
        )
        self.started_s = time.monotonic()
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    def wait(self) -> int:
        self.process.join(100)
        assert self.process.exitcode is not None, "it hangs"
        self.seconds = time.monotonic() - self.started_s
        return self.process.exitcode

    def wait_until(self, is_so: Callable[[], Any]) -> None:
        while not is_so():
            assert self.process.is_alive(), f"it ended too early: {self.err}"
            time.sleep(0.002)

    @property
    def out(self) -> str:
        return self.output.with_suffix(".out").read_text()

    @property
    def peak_bytes(self) -> int:
        return int(self.output.with_suffix(".peak").read_text())

    @property
    def err(self) -> str:
        return self.output.with_suffix(".err").read_text()


def run(cohort: Cohort, name: str = "preprocess", *arguments: str, **options: Any) -> Run:
    """A stage that is to end well."""
    done = Run(cohort, name, *arguments, **options)
    assert done.wait() == 0, done.err
    return done


def fail(cohort: Cohort, name: str = "preprocess", *arguments: str, **options: Any) -> str:
    """A stage that is to end with a message; returns it."""
    done = Run(cohort, name, *arguments, **options)
    assert done.wait() == 1, done.err
    assert "Traceback" not in done.err
    return done.err[done.err.rindex("error: ") :]


def make(cohort: Cohort, studies: int, slices: int, **changes: Any) -> dict[str, bytes]:
    """Write studies and their manifest; returns an undisturbed run's store."""
    cohort.size = 32
    for number in range(studies):
        cohort.add_study(number, slices)
    cohort.write_params(**changes)
    run(cohort, "index")
    return undisturbed(cohort)


def undisturbed(cohort: Cohort) -> dict[str, bytes]:
    """The store of a run of its own from the cohort's manifest."""
    data = cohort.folder / "undisturbed"
    shutil.rmtree(data, ignore_errors=True)
    shutil.copytree(cohort.data / "index", data / "index")
    run(cohort, data=data)
    return tree_bytes(data / "store.zarr")


def shards(cohort: Cohort) -> list[Path]:
    return sorted((cohort.data / "wip" / "shards").glob("*.shard"))


def records(cohort: Cohort) -> list[Path]:
    return sorted((cohort.data / "wip" / "shards").glob("*.json"))


def leftovers(cohort: Cohort) -> list[str]:
    """What has a temporary name."""
    names = [str(path.relative_to(cohort.data)) for path in cohort.data.rglob("*")]
    return [name for name in names if name.endswith((".tmp", ".old", ".new"))]


# ---- killed


def test_sigkill_at_20_random_moments_leaves_the_old_store_or_none_and_ends_in_the_same_bytes(cohort: Cohort) -> None:
    expected, seconds = {}, {}
    make(cohort, 16, 4, preprocess__image_size=64)
    for form, windows in WINDOWS.items():
        cohort.write_params(preprocess__image_size=64, preprocess__windows=windows)
        expected[form] = undisturbed(cohort)
        shutil.rmtree(cohort.folder / "undisturbed" / "wip")
        seconds[form] = run(cohort, data=cohort.folder / "undisturbed").seconds
    rng = random.Random(SEED)
    kills, store = 0, cohort.data / "store.zarr"
    whole: list[dict[str, bytes]] = [{}]
    for form in itertools.islice(itertools.cycle(WINDOWS), 40):
        shutil.rmtree(cohort.data / "wip", ignore_errors=True)
        cohort.write_params(preprocess__image_size=64, preprocess__windows=WINDOWS[form])
        for _ in range(KILLS // 4):
            killed = Run(cohort)
            time.sleep(rng.uniform(0.02, seconds[form]))
            killed.process.kill()
            kills += killed.wait() == -signal.SIGKILL  # else it was done
            assert tree_bytes(store) in [*whole, expected[form]]
        run(cohort)
        assert tree_bytes(store) == expected[form]
        assert leftovers(cohort) == []
        whole = [{}, expected[form]]
        if kills >= KILLS:
            return
    raise AssertionError(f"only {kills} runs could be killed")


def die_at(moment: int) -> None:
    """Have this process killed before its nth rename, link or removal of a folder, but for those within the new store."""
    steps = itertools.count()

    def watched(step: Callable[..., Any]) -> Callable[..., Any]:
        def take(*paths: Any, **options: Any) -> Any:
            if ".new/" not in str(paths[-1]) and next(steps) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*paths, **options)

        return take

    for module, name in ((os, "replace"), (os, "link"), (shutil, "rmtree")):
        setattr(module, name, watched(getattr(module, name)))


def test_sigkill_before_each_rename_leaves_nothing_half(cohort: Cohort) -> None:
    old = make(cohort, 1, 2, preprocess__windows=WINDOWS["first"])
    run(cohort)
    shutil.copytree(cohort.data, cohort.folder / "before")
    cohort.write_params(preprocess__windows=WINDOWS["second"])
    new = undisturbed(cohort)
    found = []
    for moment in range(100):
        shutil.rmtree(cohort.data)
        shutil.copytree(cohort.folder / "before", cohort.data)
        code = Run(cohort, patch=partial(die_at, moment)).wait()
        found.append(
            {
                name: store
                for name, store in (("old", old), ("new", new), ("none", {}))
                if store == tree_bytes(cohort.data / "store.zarr")
            }
        )
        if code == 0:
            break
        assert found[-1], f"half a store at step {moment}"
        run(cohort)
        assert tree_bytes(cohort.data / "store.zarr") == new
        assert leftovers(cohort) == []
    named = ["".join(which) for which in found]
    assert "none" in named, "the old store is away and the new one not yet there: the kill between two renames"
    assert named == sorted(named, key=["old", "none", "new"].index)
    assert named.count("old") >= 4
    assert named.count("new") >= 2


def test_sigkill_of_index_leaves_the_old_manifest_or_a_whole_one(cohort: Cohort) -> None:
    make(cohort, 4, 2)
    before = tree_bytes(cohort.data / "index")
    cohort.add_study(9, 2)
    cohort.write_params()
    run(cohort, "index")
    after = tree_bytes(cohort.data / "index")
    for moment in range(100):
        for name, content in before.items():
            (cohort.data / "index" / name).write_bytes(content)
        code = Run(cohort, "index", patch=partial(die_at, moment)).wait()
        for name in before:
            assert (cohort.data / "index" / name).read_bytes() in (before[name], after[name])
        run(cohort, "index")
        assert tree_bytes(cohort.data / "index") == after  # no temporary file either
        if code == 0:
            break
    assert moment == len(before)


def test_ctrl_c_and_sigterm_end_cleanly_and_the_run_goes_on(cohort: Cohort) -> None:
    expected = make(cohort, 24, 8, **SLOW)
    for sign, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        finished = len(records(cohort))
        stopped = Run(cohort)
        stopped.wait_until(lambda finished=finished: len(records(cohort)) >= finished + 2)
        os.kill(stopped.pid, sign)
        assert stopped.wait() == code
        assert stopped.err.splitlines()[-1] == "stopped; finished work is kept, run the same command again to go on"
        assert "Traceback" not in stopped.err
        assert not (cohort.data / "store.zarr").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in shards(cohort)}
    assert 4 <= len(kept) < 24, "the run was to be stopped half-way"
    run(cohort)
    assert tree_bytes(cohort.data / "store.zarr") == expected
    assert {path.name: path.stat().st_mtime_ns for path in shards(cohort) if path.name in kept} == kept


def with_workers() -> None:
    """Even a small run is worth starting processes for."""
    pipeline.preprocess.SLICES_PER_TASK = 8


def test_ctrl_c_at_a_terminal_reaches_the_workers_too_and_ends_cleanly(cohort: Cohort) -> None:
    make(cohort, 24, 8, **SLOW)
    cohort.write_params(**SLOW, preprocess__workers=2)
    stopped = Run(cohort, patch=with_workers)
    stopped.wait_until(lambda: records(cohort))
    os.killpg(stopped.pid, signal.SIGINT)
    assert stopped.wait() == 130
    assert stopped.err.splitlines()[-1] == "stopped; finished work is kept, run the same command again to go on"
    assert "Traceback" not in stopped.out + stopped.err


def test_worker_that_the_kernel_killed_costs_nothing(cohort: Cohort) -> None:
    expected = make(cohort, 24, 8, **SLOW)
    cohort.write_params(**SLOW, preprocess__workers=2)
    running = Run(cohort, patch=with_workers)
    running.wait_until(lambda: records(cohort))
    os.kill(workers_of(running.pid)[0], signal.SIGKILL)
    assert running.wait() == 0, running.err
    assert tree_bytes(cohort.data / "store.zarr") == expected
    assert leftovers(cohort) == []


def limit_memory() -> None:
    """Leave the making of shards 4 MB more than the process has."""
    make_shards = pipeline.preprocess.make_shards

    def make(batch: Any) -> Any:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (4 << 20), resource.RLIM_INFINITY))
        try:
            return make_shards(batch)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    pipeline.preprocess.make_shards = make


def test_run_without_memory_says_so_and_goes_on_with_more(cohort: Cohort) -> None:
    expected = make(cohort, 1, 2, preprocess__image_size=2048)
    assert "out of memory" in fail(cohort, patch=limit_memory)
    run(cohort)
    assert tree_bytes(cohort.data / "store.zarr") == expected


def test_scheduler_that_dies_ends_the_run_with_a_line_and_another_goes_on(cohort: Cohort) -> None:
    expected = make(cohort, 24, 8, **SLOW)
    machines = Machines(cohort.folder)
    try:
        address, scheduler = machines.scheduler()
        worker = machines.worker(address)
        cohort.write_params(**SLOW, preprocess__scheduler=address)
        running = Run(cohort, patch=with_workers)
        running.wait_until(lambda: records(cohort))
        scheduler.kill()
        assert running.wait() == 1
        assert running.err.splitlines()[-1].startswith(
            f"error: the scheduler at {address} went away; finished work is kept"
        )
        assert "Traceback" not in running.err
        worker.kill()
    finally:
        machines.stop()
    assert 0 < len(records(cohort)) < 24
    cohort.write_params(**SLOW)
    run(cohort)
    assert tree_bytes(cohort.data / "store.zarr") == expected
    assert leftovers(cohort) == []


def test_second_run_on_one_output_is_refused_by_name(cohort: Cohort) -> None:
    make(cohort, 1, 2)
    for name in ("index", "preprocess"):
        with only_one(cohort.data / "wip" / f"{name}.lock", name):
            assert f"another {name} is running on {cohort.data}; wait for it or give --data" in fail(cohort, name)
        run(cohort, name)


# ---- a full disk


class SmallDisk:
    """A file system in memory that is as large as the test says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.call("mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs")

    def call(self, *command: str) -> None:
        subprocess.run([*command, str(self.folder)], check=True, capture_output=True)

    def leave_free(self, count: int) -> None:
        status = os.statvfs(self.folder)
        used = (status.f_blocks - status.f_bfree) * status.f_frsize
        self.call("mount", "-o", f"remount,size={used + count}")

    def enlarge(self) -> None:
        self.call("mount", "-o", "remount,size=64m")


@pytest.fixture
def disk(cohort: Cohort) -> Iterator[SmallDisk]:
    try:
        disk = SmallDisk(cohort.data)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a file system can be mounted by root alone")
    yield disk
    disk.call("umount", "--lazy")


def unforeseen() -> None:
    """The disk fills up later than when its space was asked."""
    pipeline.preprocess.require_free_space = lambda *_: None


def unforeseen_with_workers() -> None:
    unforeseen()
    with_workers()


FULL = r"the disk is full; .* needs about [\d.]+ [kMG]?B, [\d.]+ [kMG]?B are free; free some space and run the same command again: what is"


@pytest.mark.parametrize("workers", [0, 1])
def test_full_disk_is_said_with_the_bytes_needed_and_the_run_goes_on(
    cohort: Cohort, disk: SmallDisk, workers: int
) -> None:
    expected = make(cohort, 12, 4, preprocess__image_size=128)
    cohort.write_params(preprocess__image_size=128, preprocess__workers=workers)
    disk.leave_free(sum(len(content) for name, content in expected.items() if "/c." in name) // 2)
    said = fail(cohort, patch=unforeseen_with_workers)
    assert re.search(FULL, said), said
    assert re.search(r"the rest, \d+ slices, needs", said)
    assert 0 < len(records(cohort)) < 12
    assert leftovers(cohort) == []
    disk.enlarge()
    run(cohort)
    assert tree_bytes(cohort.data / "store.zarr") == expected


@pytest.mark.parametrize("free", [0, 8192, 40_960, 102_400])
def test_disk_full_of_the_store_itself_leaves_the_old_one(cohort: Cohort, disk: SmallDisk, free: int) -> None:
    make(cohort, 4, 4)
    run(cohort)
    before = tree_bytes(cohort.data / "store.zarr")
    cohort.labels["ID_000000000"] = [1, 0, 0, 0, 0, 1]
    cohort.write_params()
    run(cohort, "index")
    disk.leave_free(free)
    assert re.search(FULL, fail(cohort))
    assert tree_bytes(cohort.data / "store.zarr") == before
    assert leftovers(cohort) == []
    disk.enlarge()
    run(cohort)
    assert tree_bytes(cohort.data / "store.zarr") == undisturbed(cohort) != before


@pytest.mark.parametrize("free", [0, 4096, 24_576])
def test_disk_full_of_the_manifest_leaves_the_old_one(cohort: Cohort, disk: SmallDisk, free: int) -> None:
    make(cohort, 4, 4)
    before = tree_bytes(cohort.data / "index")
    cohort.add_study(9, 4)
    cohort.write_params()
    disk.leave_free(free)
    said = fail(cohort, "index")
    assert re.search(FULL, said), said
    after = tree_bytes(cohort.data / "index")
    assert after["manifest.parquet"] == before["manifest.parquet"]
    assert after.keys() == before.keys()
    disk.enlarge()
    run(cohort, "index")
    run(cohort)
    assert Store(cohort.data / "store.zarr").num_slices.tolist() == [4] * 5


def full_after_three() -> None:
    """Where nothing can be mounted: the fourth file that is written finds no space."""
    unforeseen()
    write_bytes, written = Path.write_bytes, itertools.count()

    def write(path: Path, content: bytes) -> int:
        if next(written) >= 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write_bytes(path, content)

    Path.write_bytes = write


def test_write_that_finds_no_space_is_no_traceback(cohort: Cohort) -> None:
    expected = make(cohort, 3, 4)
    assert re.search(FULL, fail(cohort, patch=full_after_three))
    run(cohort)
    assert tree_bytes(cohort.data / "store.zarr") == expected


# ---- what may not be read or written


def without_privileges() -> None:
    """Root reads and writes what nobody may; without its capabilities it does not (capabilities(7))."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")


def listing(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names, sizes, modes and times of change, of content and of anything else."""
    found = {path: path.stat() for path in [folder, *sorted(folder.rglob("*"))]}
    return {str(path): (s.st_size, s.st_mode, s.st_mtime_ns, s.st_ctime_ns) for path, s in found.items()}


def test_source_that_may_only_be_read_is_enough_and_stays_as_it_is(cohort: Cohort) -> None:
    expected = make(cohort, 2, 3)
    for path in cohort.dicom.iterdir():
        path.chmod(0o444)
    cohort.dicom.chmod(0o555)
    before = listing(cohort.dicom)
    for name in ("index", "preprocess"):
        run(cohort, name, patch=without_privileges)
    assert listing(cohort.dicom) == before
    assert tree_bytes(cohort.data / "store.zarr") == expected


def test_folder_that_may_not_be_read_is_named(cohort: Cohort) -> None:
    make(cohort, 1, 2)
    (cohort.dicom / "lost+found").mkdir(mode=0)
    said = fail(cohort, "index", patch=without_privileges)
    assert f"the folder {cohort.dicom}/lost+found cannot be read (Permission denied); allow it, move it away" in said


@pytest.mark.parametrize("name", ["index", "preprocess"])
def test_output_that_may_not_be_written_is_named(cohort: Cohort, name: str) -> None:
    make(cohort, 1, 2)
    locked = cohort.folder / "locked"
    shutil.copytree(cohort.data / "index", locked / "index")
    locked.chmod(0o555)
    said = fail(cohort, name, data=locked, patch=without_privileges)
    assert re.match(rf"error: {locked}/\S+: Permission denied", said), said
    locked.chmod(0o755)
    run(cohort, name, data=locked, patch=without_privileges)


def test_output_below_a_file_is_named(cohort: Cohort) -> None:
    make(cohort, 1, 2)
    (cohort.folder / "file").touch()
    said = fail(cohort, "index", data=cohort.folder / "file" / "data")
    assert re.match(rf"error: {cohort.folder}/file/\S+: Not a directory", said), said


# ---- a source that changes between index and preprocess


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 700)


def shorten_in_secret(path: Path) -> None:
    time_ns = path.stat().st_mtime_ns
    shorten(path)
    os.utime(path, ns=(time_ns, time_ns))


def touch_another(path: Path) -> None:
    """The same size, the same pixels but one."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def lock(path: Path) -> None:
    path.chmod(0)


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link_to_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


IN_A_FOLDER = (shorten, shorten_in_secret, touch_another, Path.unlink, lock, make_a_folder, link_to_nowhere)
IN_A_ZIP = (shorten_in_secret, Path.unlink, lock, make_a_folder)


@pytest.mark.parametrize(
    ("change", "packed"), [*((change, False) for change in IN_A_FOLDER), *((change, True) for change in IN_A_ZIP)]
)
def test_file_that_changes_after_index_is_named_and_never_read_wrong(
    cohort: Cohort, change: Callable[[Path], None], packed: bool
) -> None:
    cohort.size = 32
    for number in range(3):
        cohort.add_study(number, 2)
    changing = cohort.dicom / "ID_000010001.dcm"
    if packed:
        changing = pack(cohort)
    cohort.write_params()
    run(cohort, "index")
    content = changing.read_bytes()
    status = changing.stat()
    change(changing)
    said = fail(cohort, patch=without_privileges)
    assert "ID_0000" in said
    assert "vanished or could not be read after index" in said or "is gone" in said
    assert not (cohort.data / "store.zarr").exists()
    if changing.is_dir():
        changing.rmdir()
    changing.unlink(missing_ok=True)
    changing.write_bytes(content)
    os.utime(changing, ns=(status.st_atime_ns, status.st_mtime_ns))
    run(cohort)
    assert tree_bytes(cohort.data / "store.zarr") == undisturbed(cohort)


def pack(cohort: Cohort) -> Path:
    """Put all files into one zip, uncompressed."""
    archive = cohort.dicom / "studies.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for path in sorted(cohort.dicom.glob("*.dcm")):
            packed.write(path, path.name)
            path.unlink()
    return archive


def last_pixel(content: bytes, image_id: str) -> int:
    """Where the last stored value of a slice lies in an uncompressed zip."""
    start = content.index(image_id.encode() + b".dcm")
    return content.index(b"PK", start + 600) - 2


@pytest.mark.parametrize("is_repacked", [False, True])
def test_zip_of_the_same_size_and_time_with_another_pixel_is_seen(cohort: Cohort, is_repacked: bool) -> None:
    cohort.size = 32
    cohort.add_study(1, 3)
    archive = pack(cohort)
    cohort.write_params()
    run(cohort, "index")
    status = archive.stat()
    content = bytearray(archive.read_bytes())
    at = last_pixel(content, "ID_000010001")
    content[at] ^= 1
    if is_repacked:
        with zipfile.ZipFile(archive) as old:
            members = {name: old.read(name) for name in old.namelist()}
        members["ID_000010001.dcm"] = members["ID_000010001.dcm"][:-2] + bytes(content[at : at + 2])
        with zipfile.ZipFile(archive, "w") as new:
            for name, member in members.items():
                new.writestr(zipfile.ZipInfo(name), member)
    else:
        archive.write_bytes(content)
    assert archive.stat().st_size == status.st_size
    os.utime(archive, ns=(status.st_atime_ns, status.st_mtime_ns))
    if is_repacked:
        assert "1 file(s) changed, vanished or could not be read after index, 'ID_000010001.dcm' first" in fail(cohort)
    else:  # the zip still promises what it does not hold: that slice is lost, and named
        run(cohort)
        faults = pd.read_parquet(cohort.data / "preprocess" / "faults.parquet")
        assert faults[["path", "status"]].to_numpy().tolist() == [["ID_000010001.dcm", "excluded"]]
        assert Store(cohort.data / "store.zarr").num_slices.tolist() == [2]


def test_file_of_the_same_size_and_time_is_taken_for_the_same(cohort: Cohort) -> None:
    """What cannot be seen in a folder without reading every byte: the limit that DVC, rsync and make have too."""
    make(cohort, 1, 2)
    run(cohort)
    path = cohort.dicom / "ID_000000001.dcm"
    status = path.stat()
    touch_another(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    before = tree_bytes(cohort.data / "store.zarr")
    run(cohort, "index")
    run(cohort)
    assert tree_bytes(cohort.data / "store.zarr") == before


# ---- damage and power cuts


def cut_to_nothing(path: Path) -> None:
    os.truncate(path, 0)


def tear(path: Path) -> None:
    """As a file system without its journal may leave what was not synced: the length is there, the content is not."""
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        (".shard", cut_to_nothing),
        (".shard", shorten),
        (".shard", Path.unlink),
        (".json", cut_to_nothing),
        (".json", tear),
        (".json", lambda path: os.truncate(path, path.stat().st_size // 2)),
        (".json", lambda path: path.write_text("[]")),
        (".json", lambda path: path.write_text('{"kept": 1}')),
    ],
)
def test_unfinished_work_that_a_power_cut_tore_is_made_anew(
    cohort: Cohort, suffix: str, damage: Callable[[Path], None]
) -> None:
    expected = make(cohort, 2, 3, preprocess__image_size=64)
    run(cohort)
    torn = (shards(cohort) if suffix == ".shard" else records(cohort))[1]
    torn.chmod(0o644)
    damage(torn)  # in place: the store's shard is the same file
    run(cohort)
    assert tree_bytes(cohort.data / "store.zarr") == expected
    run(cohort, "inspect", "--verify")


def test_damaged_shard_is_found_dropped_and_made_anew(cohort: Cohort) -> None:
    expected = make(cohort, 3, 3)
    run(cohort)
    shard = shards(cohort)[1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 4] ^= 8
    shard.write_bytes(content)
    assert "1 of 3 studies are damaged; add --discard" in fail(cohort, "inspect", "--verify")
    assert "dropped; run" in fail(cohort, "inspect", "--verify", "--discard")
    assert len(shards(cohort)) == 2
    run(cohort)
    run(cohort, "inspect", "--verify")
    assert tree_bytes(cohort.data / "store.zarr") == expected


def test_what_is_renamed_was_synced_and_so_is_its_new_name(cohort: Cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power cut could leave a final name with nothing behind it. Records of finished studies alone are not worth a sync."""
    synced: set[int] = set()
    renamed: list[str] = []
    names_to_sync: set[Path] = set()
    real = os.replace

    def sync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        names_to_sync.discard(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

    def replace(old: Any, new: Any) -> None:
        real(old, new)
        new = Path(new)
        is_within_the_new_store = ".new/" in str(new)
        is_record = new.suffix == ".json" and new.parent.name == "shards"
        if not is_within_the_new_store and not is_record:
            inside = [*new.rglob("*")] if new.is_dir() else []
            assert [path for path in (new, *inside) if path.stat().st_ino not in synced] == []
            renamed.append("shard" if new.suffix == ".shard" else new.name)
            names_to_sync.add(new.parent)

    cohort.size = 32
    cohort.add_study(1, 3)
    cohort.add_study(2, 3)
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    arguments = argparse.Namespace(params=cohort.write_params(), data=cohort.data, store=None)
    stages.index.main(arguments)
    stages.preprocess.main(arguments)
    assert renamed == [
        *("headers.parquet", "manifest.parquet", "summary.json"),
        *("shard", "shard", "faults.parquet", "store.zarr"),
    ]
    assert names_to_sync == set()
