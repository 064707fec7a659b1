"""Run tasks in this process, on a local Dask cluster, or on a Dask scheduler somewhere. The one module that knows Dask.

Memory stays bounded at any number of tasks: only a few a worker are submitted ahead. A task may run twice (a worker died);
so a task writes under a name that only it produces, and writing it again writes the same bytes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar
from uuid import uuid4

from pipeline.errors import IchorError

Task = TypeVar("Task")
Result = TypeVar("Result")

CONNECT_TIMEOUT_S, RESULT_TIMEOUT_S = 15, 30
AHEAD = 4
"""Tasks submitted ahead for each thread of a worker: enough that none waits, few enough that the queue stays small."""

LOOK_S, NOTICE_S = 1.0, 5.0
"""How often to ask who is there, and how long nobody may be before it is said: a worker that died is back sooner."""

PACKAGES = (
    "distributed", "numpy", "scipy", "zstandard", "numba", "llvmlite", "opencv-python-headless", "pydicom", "isal", "python-gdcm", "pylibjpeg",
    "pylibjpeg-openjpeg", "pylibjpeg-rle", "pyjpegls", "pillow",
)  # fmt: skip
"""Packages that decide what a task returns or writes."""

ON_THE_WORKER = """
try:
    from pipeline.cluster import run_checked
except ImportError as error:
    from distributed import get_worker
    answer = {"pipeline": str(error)}, get_worker().address, None
else:
    answer = run_checked(call, expected)
"""
"""Sent as text, with the task as bytes: a worker or scheduler without our code could not even receive a function of ours, and
would leave the task waiting for ever. So only the worker that runs it needs our code, and one without it can say so."""

DEAF = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
LOCAL = {"threads_per_worker": 1, "dashboard_address": "127.0.0.1:0", "preload": DEAF}
"""The preload is for a worker that is started anew after one that died. Dask itself gives each worker one thread a library, and its
share of the memory, to which it is held."""

MALLOC = {"distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": 16 << 20}
"""Bytes that glibc may keep of freed memory. Dask's 64 kB are less than a slice needs: each would ask for its memory anew, in 23 page
faults that cost a fifth of its time."""

REMEDY = "finished work is kept; give each worker more memory or start fewer of them, and run the same command again"


def count_workers(workers: int | str) -> int:
    """`auto` is one process for each core that this process may use."""
    return len(os.sched_getaffinity(0)) if workers == "auto" else int(workers)


def run_tasks(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    workers: int | str,
    scheduler: str | None,
    describe: Callable[[Task], str] = lambda task: "a task",
) -> Iterator[Result]:
    """Yield `function(task)` for every task, as they finish, in any order.

    Args:
        function: an importable function; it and its tasks travel to other processes.
        tasks: drawn lazily.
        workers: processes to start; 0 runs in this one.
        scheduler: address of a running Dask scheduler, used instead of starting processes; its workers may come and go.
        describe: names a task where its failure is told.

    Raises:
        IchorError: the scheduler is out of reach, a worker has other code than this process, or a task no memory.
    """
    if scheduler is None and count_workers(workers) == 0:
        for task in tasks:
            try:
                result = function(task)
            except MemoryError as error:
                raise IchorError(f"{describe(task)}: out of memory ({error}); {REMEDY}") from None
            yield result
        return
    with _connect(workers=workers, scheduler=scheduler) as client:
        print(f"  Dask dashboard: {client.dashboard_link}", flush=True)
        yield from _Window(client, function, tasks, describe).results()


def what_must_agree() -> dict[str, str]:
    """The code and the libraries of this process."""
    folder = Path(__file__).parent
    code = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        code.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    found = {"pipeline": code.hexdigest()[:12], "python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    found |= dict.fromkeys(PACKAGES, "not installed")
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


as_imported = cache(what_must_agree)
"""As it was when a worker first asked: it goes on with what it once imported, whatever the files say later."""


def run_checked(call: bytes, expected: dict[str, str]) -> tuple[dict[str, str] | None, str, Any]:
    """Run a pickled (function, task) on a worker that has the driver's code and libraries; another tells what it has."""
    from distributed import get_worker

    if as_imported() != expected:
        return as_imported(), get_worker().address, None
    function, task = pickle.loads(call)
    return None, "", function(task)


class _Window(Generic[Task, Result]):
    """The few tasks that are under way on a cluster; it grows and shrinks with the workers."""

    def __init__(
        self, client: Any, function: Callable[[Task], Result], tasks: Iterable[Task], describe: Callable[[Task], str]
    ) -> None:
        self.client, self.function, self.tasks, self.describe = client, function, iter(tasks), describe
        self.scheduler = f"the scheduler at {client.scheduler.address}"
        self.gone = f"{self.scheduler} went away; finished work is kept; start it again, and run the same command again"
        self.expected = what_must_agree()
        self.running: dict[Any, Task] = {}  # by future, in the order of submission
        self.done: SimpleQueue[Any] = SimpleQueue()
        self.threads, self.looked_s, self.manned_s, self.is_waiting = 0, -LOOK_S, time.monotonic(), False

    def results(self) -> Iterator[Result]:
        self._fill()
        while self.running:
            with suppress(Empty):
                yield from self._gather(self.done.get(timeout=LOOK_S))
            self._fill()

    def _fill(self) -> None:
        """Submit what keeps every worker busy; with no worker, enough for a cluster that grows with its queue to grow."""
        self._look_around()
        for task in islice(self.tasks, max(0, AHEAD * max(1, self.threads) - len(self.running))):
            given = {"code": ON_THE_WORKER, "call": pickle.dumps((self.function, task)), "expected": self.expected}
            key = f"{getattr(self.function, '__name__', 'task')}-{uuid4().hex}"  # the dashboard shows what is before the dash
            future = self.client.submit(eval, "exec(code, globals()) or answer", given, key=key)
            self.running[future] = task
            future.add_done_callback(self.done.put)

    def _look_around(self) -> None:
        """See who is there, now and then: it is a question to the scheduler."""
        if self.client.status != "running":
            raise IchorError(self.gone)
        now_s = time.monotonic()
        if now_s - self.looked_s < LOOK_S:
            return
        self.looked_s = now_s
        self.threads = self.client.scheduler_info(n_workers=0)["total_threads"]
        if self.threads:
            self.manned_s, self.is_waiting = now_s, False
        elif not self.is_waiting and now_s - self.manned_s >= NOTICE_S:
            self.is_waiting = True
            print(f"\n{self.scheduler} has no worker; start some: waiting for one", file=sys.stderr, flush=True)

    def _gather(self, future: Any) -> Iterator[Result]:
        """Yield what a finished task returned; nothing if that was lost with its worker, for then it is made again."""
        from distributed import KilledWorker

        try:
            refusal, worker, result = future.result(timeout=RESULT_TIMEOUT_S)
        except KilledWorker as error:
            # Dask blames all that waited at a dead worker; they run in the order of submission, so the first was at work.
            killer = next(task for blamed, task in self.running.items() if blamed.status == "error")
            raise IchorError(
                f"{self.describe(killer)} ended {error.allowed_failures + 1} workers, one after the other, the last at "
                f"{error.last_worker.address}: most likely they ran out of memory; {REMEDY}"
            ) from None
        except MemoryError as error:
            raise IchorError(f"{self.describe(self.running[future])}: out of memory ({error}); {REMEDY}") from None
        except (CancelledError, OSError) as error:
            if future.status == "error":  # the task's own
                raise
            if not isinstance(error, TimeoutError):
                raise IchorError(self.gone) from None
            future.add_done_callback(self.done.put)
            return
        if refusal is not None:
            pairs = [(name, self.expected[name], there) for name, there in refusal.items()]
            differing = "; ".join(f"{name}: {here} here, {there} there" for name, here, there in pairs if here != there)
            raise IchorError(
                f"the worker at {worker} has other code than this process ({differing}); give the workers the same "
                f"version, restart them, and run the same command again; finished work is kept"
            )
        del self.running[future]
        future.release()
        yield result


@contextmanager
def _connect(*, workers: int | str, scheduler: str | None) -> Iterator[Any]:
    """A client of the scheduler at an address, or of a cluster of processes that lives as long as the block."""
    # Imported late: a run in this process needs none of it, and it takes a second.
    from dask.config import set as configured
    from distributed import Client, LocalCluster

    for name in ("distributed", "distributed.client", "tornado", "tornado.application", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what ends well is not news; what fails is raised here
    with ExitStack() as closing:
        if scheduler is None:
            with _interrupts_ignored(), configured(MALLOC):
                cluster = LocalCluster(n_workers=count_workers(workers), silence_logs=logging.CRITICAL, **LOCAL)
            closing.callback(_close, cluster)
        try:
            client = Client(scheduler or cluster, timeout=CONNECT_TIMEOUT_S)
        except (OSError, ValueError) as error:
            raise IchorError(
                f"preprocess.scheduler = {scheduler!r}: no Dask scheduler answers there ({error}); start one, or set it to null"
            ) from None
        closing.callback(_close, client)
        yield client


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes started in this block ignore Ctrl-C, which a terminal sends to all: only the driver answers it.

    An ignored signal is the one thing that a new program inherits. So the driver is deaf too while they start, a second or two.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _close(closable: Any) -> None:
    with suppress(Exception):  # the work is done, or given up with a message of its own: closing has nothing to add
        closable.close(timeout=5)
