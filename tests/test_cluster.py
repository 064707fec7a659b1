"""The same tasks give the same results in this process, on local processes and on a scheduler; what dies or is missing is said.

Schedulers and workers are real processes on loopback, and what kills them is SIGKILL.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest

import pipeline.cluster
from pipeline.cluster import AHEAD, count_workers, run_tasks
from pipeline.errors import IchorError
from pipeline.progress import Progress

ROOT = Path(__file__).parents[1]


def square(number: int) -> int:
    return number * number


def square_slowly(number: int) -> tuple[int, int]:
    time.sleep(0.05)
    return square(number), os.getpid()


def fail(kind: type[Exception]) -> int:
    raise kind("the task failed")


def need_too_much(number: int) -> int:
    raise MemoryError(f"Unable to allocate {number} TiB")


def kill_the_worker_at_5(number: int) -> int:
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return square_slowly(number)[0]


def kill_the_worker_once(task: tuple[int, Path]) -> tuple[int, int]:
    number, mark = task
    if number == 5 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return square_slowly(number)


def environment_and_memory_limit(_: int) -> tuple[str, int]:
    from distributed import get_worker

    return Path("/proc/self/environ").read_text(), get_worker().memory_manager.memory_limit


def hear_ctrl_c() -> None:
    """As at a terminal: what a shell runs in the background ignores Ctrl-C, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def workers_of(pid: int) -> list[int]:
    """Dask's worker processes below a driver."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            is_worker = b"spawn_main" in (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == pid and is_worker:
            found.append(int(folder.name))
    return found


EXPECTED = sorted(square(number) for number in range(40))


class Machines:
    """Processes that are killed in the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, module: str, *arguments: str, cwd: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.{module}", *arguments]
        with open(self.folder / f"{module}.log", "ab") as log:
            # the functions above are found there, whatever the folder
            environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
            self.processes.append(subprocess.Popen(command, cwd=cwd, stdout=log, stderr=log, env=environment))
        return self.processes[-1]

    def scheduler(self) -> tuple[str, subprocess.Popen[bytes]]:
        """Started where our code is not: a scheduler needs none of it."""
        where = self.folder / f"scheduler-{len(self.processes)}.json"
        listen = ["--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0", "--no-show"]
        process = self.start("dask_scheduler", *listen, "--scheduler-file", str(where), cwd=self.folder)
        while process.poll() is None:
            try:
                return json.loads(where.read_text())["address"], process
            except (OSError, ValueError):
                time.sleep(0.02)
        raise AssertionError((self.folder / "dask_scheduler.log").read_text())

    def worker(self, scheduler: str, *, cwd: Path = ROOT, port: int = 0) -> subprocess.Popen[bytes]:
        options = ["--host", "127.0.0.1", "--worker-port", str(port), "--nthreads", "1", "--no-dashboard", "--no-nanny"]
        return self.start("dask_worker", scheduler, *options, "--local-directory", str(self.folder), cwd=cwd)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.processes.clear()


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a scheduler, to which each test brings its own workers."""
    machines = Machines(tmp_path_factory.mktemp("scheduler"))
    yield machines.scheduler()[0]
    machines.stop()


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    machines = Machines(tmp_path)
    yield machines
    machines.stop()


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_every_task_is_done_once_whatever_the_workers(workers: int) -> None:
    assert sorted(run_tasks(square, range(40), workers=workers, scheduler=None)) == EXPECTED


def test_running_scheduler_is_used_by_its_address(scheduler: str, machines: Machines) -> None:
    machines.worker(scheduler)
    assert sorted(run_tasks(square, range(40), workers=0, scheduler=scheduler)) == EXPECTED
    for kind in (ValueError, IchorError, OSError, TimeoutError):
        with pytest.raises(kind, match=r"^the task failed\nat work: a task$"):
            list(run_tasks(fail, [kind], workers=0, scheduler=scheduler))


def test_tasks_are_drawn_a_few_ahead_of_the_work_and_more_when_a_worker_joins(
    scheduler: str, machines: Machines
) -> None:
    drawn: list[int] = []

    def draw() -> Iterator[int]:
        for number in range(1000):
            drawn.append(number)
            yield number

    machines.worker(scheduler)
    ahead, pids = [], set()
    for done, (_, pid) in enumerate(run_tasks(square_slowly, draw(), workers=0, scheduler=scheduler)):
        pids.add(pid)
        ahead.append(len(drawn) - done)
        if done == 10:
            machines.worker(scheduler)
        if ahead[-1] == 2 * AHEAD and len(pids) == 2:
            break
        assert done < 500, "the second worker gets no work"
    assert set(ahead[:10]) == {AHEAD}
    assert max(ahead) == 2 * AHEAD


def test_killed_worker_loses_no_task(scheduler: str, machines: Machines) -> None:
    workers = {process.pid: process for process in (machines.worker(scheduler), machines.worker(scheduler))}
    results = []
    for result, pid in run_tasks(square_slowly, range(40), workers=0, scheduler=scheduler):
        results.append((result, pid))
        if len(results) == 5:
            workers[pid].kill()
            workers[pid].wait()
    assert sorted(result for result, _ in results) == EXPECTED
    assert len({pid for _, pid in results}) == 2


def test_killed_local_worker_is_started_again(tmp_path: Path) -> None:
    tasks = [(number, tmp_path / "killed") for number in range(40)]
    results = list(run_tasks(kill_the_worker_once, tasks, workers=1, scheduler=None))
    assert sorted(result for result, _ in results) == EXPECTED
    assert len({pid for _, pid in results}) == 2


def test_task_that_kills_every_worker_is_named() -> None:
    tasks = run_tasks(
        kill_the_worker_at_5, range(40), workers=2, scheduler=None, describe=lambda number: f"study {number}"
    )
    with pytest.raises(
        IchorError, match=r"study 5 ended 4 workers, .* ran out of memory; finished work is kept; give each"
    ):
        list(tasks)


@pytest.mark.parametrize("remote", [False, True])
def test_task_that_needs_too_much_memory_is_named(scheduler: str, machines: Machines, remote: bool) -> None:
    if remote:
        machines.worker(scheduler)
    address = scheduler if remote else None
    tasks = run_tasks(need_too_much, [9], workers=0, scheduler=address, describe=lambda number: f"study {number}")
    with pytest.raises(IchorError, match=r"study 9: out of memory \(Unable to allocate 9 TiB\); finished work is kept"):
        list(tasks)


def test_late_worker_with_other_code_refuses_and_is_named(scheduler: str, machines: Machines, tmp_path: Path) -> None:
    other, port = tmp_path / "other", free_port()
    shutil.copytree(ROOT / "pipeline", other / "pipeline")
    with open(other / "pipeline" / "hounsfield.py", "a") as module:
        module.write("# changed\n")
    (other / "zstandard-0.0.1.dist-info").mkdir()
    (other / "zstandard-0.0.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: zstandard\nVersion: 0.0.1\n"
    )
    machines.worker(scheduler)
    results = run_tasks(square_slowly, range(1000), workers=0, scheduler=scheduler)
    next(results)
    machines.worker(scheduler, cwd=other, port=port)
    differing = rf"\(pipeline: \w{{12}} here, \w{{12}} there; zstandard: {version('zstandard')} here, 0.0.1 there\)"
    with pytest.raises(
        IchorError, match=rf"the worker at tcp://127.0.0.1:{port} has other code .*{differing}; give the"
    ):
        list(results)


def test_worker_without_the_code_is_named(scheduler: str, machines: Machines, tmp_path: Path) -> None:
    port = free_port()
    machines.worker(scheduler, cwd=tmp_path, port=port)
    with pytest.raises(IchorError, match=rf"127.0.0.1:{port} has other code .*No module named 'pipeline' there"):
        list(run_tasks(square, range(3), workers=0, scheduler=scheduler))


def test_missing_workers_are_waited_for_and_it_is_said(
    scheduler: str, machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reader(io.StringIO):
        """The person who reads that a worker is missing, and starts one."""

        def write(self, text: str) -> int:
            if "has no worker" in text:
                machines.worker(scheduler)
            return super().write(text)

    monkeypatch.setattr(pipeline.cluster, "NOTICE_S", 1.0)
    monkeypatch.setattr(sys, "stderr", Reader())
    results = []
    for result, _ in run_tasks(square_slowly, range(40), workers=0, scheduler=scheduler):
        results.append(result)
        if len(results) == 30:  # a second and a half, so that it was seen
            machines.processes[0].kill()
    assert sorted(results) == EXPECTED
    assert sys.stderr.getvalue() == 2 * f"\nthe scheduler at {scheduler} has no worker; start some: waiting for one\n"


def start_python(code: str) -> subprocess.Popen[str]:
    """A Python of its own, which hears Ctrl-C as at a terminal."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_ctrl_c,
    )


def run_as_a_person_would(call: str) -> subprocess.Popen[str]:
    """A command of its own that prints each result."""
    process = start_python(
        "import tests.test_cluster as t; from pathlib import Path; from stages.common import door\n"
        f"door(lambda _: [print('result', r, flush=True) for r in t.run_tasks({call})], '')"
    )
    assert process.stdout
    while not process.stdout.readline().startswith("result"):
        assert process.poll() is None, process.communicate()[1]
    return process


def test_scheduler_that_dies_ends_the_run_with_one_line(machines: Machines) -> None:
    address, scheduler = machines.scheduler()
    machines.worker(address)
    process = run_as_a_person_would(f"t.square_slowly, range(1000), workers=0, scheduler={address!r}")
    scheduler.kill()
    _, err = process.communicate(timeout=60)
    assert err == (
        f"error: the scheduler at {address} went away; finished work is kept; start it again, and run the same command again\n"
    )
    assert process.returncode == 1


@pytest.mark.parametrize("address", ["tls://127.0.0.1:1", "", "silent", "http"])
def test_what_is_no_scheduler_is_named_and_not_waited_for(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.cluster, "CONNECT_TIMEOUT_S", 2)
    with socket.socket() as listening:
        if address == "silent":  # takes the call and says nothing
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            address = f"tcp://127.0.0.1:{listening.getsockname()[1]}"
        if address == "http":  # a dashboard, say
            web = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
            threading.Thread(target=web.serve_forever, daemon=True).start()
            address = f"tcp://127.0.0.1:{web.server_port}"
        with pytest.raises(IchorError, match="no Dask scheduler answers there"):
            list(run_tasks(square, range(3), workers=0, scheduler=address))


def test_worker_that_does_not_see_the_source_is_named(scheduler: str, machines: Machines, tmp_path: Path) -> None:
    machines.worker(scheduler)
    (tmp_path / "here").touch()
    assert list(run_tasks(square, [2], workers=0, scheduler=scheduler, seen=[str(tmp_path / "here")])) == [4]
    missing = str(tmp_path / "not mounted")
    with pytest.raises(IchorError, match=rf"the worker at tcp://\S+ does not see {missing}, which this process sees"):
        list(run_tasks(square, [2], workers=0, scheduler=scheduler, seen=[missing]))


def test_worker_that_hangs_is_told_of(
    scheduler: str, machines: Machines, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = machines.worker(scheduler)
    monkeypatch.setattr(pipeline.cluster, "QUIET_S", 0.2)
    monkeypatch.setattr(pipeline.cluster, "LOOK_S", 0.1)
    results = []
    for result, _ in run_tasks(square_slowly, range(12), workers=0, scheduler=scheduler):
        results.append(result)
        if len(results) == 4:
            os.kill(worker.pid, signal.SIGSTOP)
            threading.Timer(2, os.kill, (worker.pid, signal.SIGCONT)).start()
    assert sorted(results) == EXPECTED[:12]
    assert re.search(
        r"nothing has come back for 0 s; at work: tcp://127.0.0.1:\d+; if one of them hangs", capsys.readouterr().err
    )


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after_s", [0.2, 1.0])
def test_stopping_while_workers_start_is_heard_and_clean(sign: signal.Signals, after_s: float) -> None:
    process = start_python(
        "import tests.test_cluster as t; from stages.common import door; import distributed\n"
        "def main(_):\n"
        "    print('begins', flush=True)\n"
        "    for result in t.run_tasks(t.square_slowly, range(1000), workers=2, scheduler=None): pass\n"
        "door(main, '')"
    )
    assert process.stdout
    assert process.stdout.readline() == "begins\n"
    while len(workers_of(process.pid)) < 2:  # till then they, and the driver, ignore Ctrl-C
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(after_s)
    for _ in range(2):  # once more, a moment later, changes nothing
        os.killpg(process.pid, sign) if sign == signal.SIGINT else process.terminate()
        time.sleep(0.05)
    _, err = process.communicate(timeout=60)
    assert err == "\nstopped; finished work is kept, run the same command again to go on\n"
    assert process.returncode == (130 if sign == signal.SIGINT else 143)


def test_ctrl_c_is_clean_after_a_local_worker_was_started_again(tmp_path: Path) -> None:
    mark = tmp_path / "killed"
    tasks = f"[(number, Path({str(mark)!r})) for number in range(1000)]"
    process = run_as_a_person_would(f"t.kill_the_worker_once, {tasks}, workers=1, scheduler=None")
    assert process.stdout
    while not mark.exists():
        time.sleep(0.01)
    for _ in range(8):  # the last four of them by the new one
        process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert err == "\nstopped; finished work is kept, run the same command again to go on\n"
    assert process.returncode == 130


def test_local_worker_gives_memory_back_and_has_one_thread_a_library() -> None:
    ((environment, memory_limit),) = run_tasks(environment_and_memory_limit, [0], workers=2, scheduler=None)
    at_start = environment.split("\0")
    assert f"MALLOC_TRIM_THRESHOLD_={16 << 20}" in at_start
    assert {"OMP_NUM_THREADS=1", "OPENBLAS_NUM_THREADS=1", "MKL_NUM_THREADS=1"} <= set(at_start)
    assert 0 < memory_limit <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_scheduler_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.cluster, "CONNECT_TIMEOUT_S", 1)
    address = f"tcp://127.0.0.1:{free_port()}"
    with pytest.raises(IchorError, match=f"preprocess.scheduler = '{address}': no Dask scheduler answers"):
        list(run_tasks(square, range(3), workers=0, scheduler=address))


def test_auto_takes_the_cores_of_this_process() -> None:
    assert count_workers("auto") >= 1
    assert count_workers(3) == 3


def test_progress_in_a_log_is_a_plain_line_with_rate_and_amount() -> None:
    stream = io.StringIO()
    with Progress(10, what="headers", unit="files", done=4, stream=stream) as progress:
        progress.advance(6, "2 excluded")
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("headers: 100% 10/10")
    assert "files/s" in line
    assert "2 excluded" in line
    assert "\r" not in line
