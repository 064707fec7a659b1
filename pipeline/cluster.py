"""Run tasks in this process, on a local Dask cluster, or on a Dask scheduler somewhere. The one module that knows Dask.

Memory stays bounded at any number of tasks: only a few a worker are submitted ahead. A task may run twice (a worker died);
so a task writes under a name that only it produces, and writing it again writes the same bytes.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
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

LOOK_S, NOTICE_S, QUIET_S = 1.0, 5.0, 60.0
"""How often to ask who is there; how long nobody may be before it is said: a worker that died is back sooner; and how long nothing may
come back."""

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
    answer = run_checked(call, expected, seen)
"""
"""Sent as text, with the task as bytes: a worker or scheduler without our code could not even receive a function of ours, and
would leave the task waiting for ever. So only the worker that runs it needs our code, and one without it can say so."""

DEAF = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
LOCAL = {"threads_per_worker": 1, "dashboard_address": "127.0.0.1:0", "preload": DEAF}
"""The preload is for a worker that is started anew after one that died. Dask itself gives each worker one thread a library, and its
share of the memory, to which it is held."""

MALLOC = {
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": 16 << 20,
    "distributed.nanny.pre-spawn-environ.MALLOC_MMAP_THRESHOLD_": 32 << 20,
}
"""Bytes of freed memory that glibc may keep, and from which on it asks the kernel for each array by itself. With Dask's 64 kB of the
one, which fixes the other at 128 kB, a slice's arrays are asked for anew each time, page by page: that costs a fifth of the time of
a conversion, and three quarters of a phantom's."""

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
    seen: Sequence[str] = (),
) -> Iterator[Result]:
    """Yield `function(task)` for every task, as they finish, in any order.

    Args:
        function: an importable function; it and its tasks travel to other processes.
        tasks: drawn lazily.
        workers: processes to start; 0 runs in this one.
        scheduler: address of a running Dask scheduler, used instead of starting processes; its workers may come and go.
        describe: names a task where its failure is told.
        seen: files that every worker must see: without its source, one would call all of its files unreadable.

    Raises:
        IchorError: the scheduler is out of reach, a worker has other code than this process or does not see its files, or a task
            has no memory.
    """
    if scheduler is None and count_workers(workers) == 0:
        for task in tasks:
            try:
                result = function(task)
            except MemoryError as error:
                raise IchorError(f"{describe(task)}: out of memory ({error}); {REMEDY}") from None
            except Exception as error:
                error.add_note(f"at work: {describe(task)}")
                raise
            yield result
        return
    with _connect(workers=workers, scheduler=scheduler) as client:
        print(f"  Dask dashboard: {client.dashboard_link}", flush=True)
        yield from _Window(client, function, tasks, describe, seen).results()


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


NOT_SEEN = "sees no "


def run_checked(call: bytes, expected: dict[str, str], seen: Sequence[str]) -> tuple[dict[str, str] | None, str, Any]:
    """Run a pickled (function, task) on a worker that has the driver's code, libraries and files; another tells what it has."""
    from distributed import get_worker

    if as_imported() != expected:
        return as_imported(), get_worker().address, None
    for path in seen:
        if not os.path.exists(path):
            return {NOT_SEEN: path}, get_worker().address, None
    function, task = pickle.loads(call)
    return None, "", function(task)


class _Window(Generic[Task, Result]):
    """The few tasks that are under way on a cluster; it grows and shrinks with the workers."""

    def __init__(
        self,
        client: Any,
        function: Callable[[Task], Result],
        tasks: Iterable[Task],
        describe: Callable[[Task], str],
        seen: Sequence[str],
    ) -> None:
        self.client, self.function, self.tasks, self.describe, self.seen = client, function, iter(tasks), describe, seen
        self.scheduler = f"the scheduler at {client.scheduler.address}"
        self.gone = f"{self.scheduler} went away; finished work is kept; start it again, and run the same command again"
        self.expected = what_must_agree()
        self.running: dict[Any, Task] = {}  # by future, in the order of submission
        self.done: SimpleQueue[Any] = SimpleQueue()
        self.threads, self.looked_s, self.manned_s, self.is_waiting = 0, -LOOK_S, time.monotonic(), False
        self.heard_s, self.is_quiet = time.monotonic(), False

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
            call = pickle.dumps((self.function, task))
            given = {"code": ON_THE_WORKER, "call": call, "expected": self.expected, "seen": self.seen}
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
            self._notice_silence(now_s)
        elif not self.is_waiting and now_s - self.manned_s >= NOTICE_S:
            self.is_waiting = True
            print(f"\n{self.scheduler} has no worker; start some: waiting for one", file=sys.stderr, flush=True)

    def _notice_silence(self, now_s: float) -> None:
        """Say who is at work where nothing comes back: one may hang, at a disk that does not answer, say."""
        if self.is_quiet or now_s - self.heard_s < QUIET_S:
            return
        self.is_quiet = True
        at_work = ", ".join(sorted(address for address, tasks in self.client.processing().items() if tasks))
        print(
            f"\nnothing has come back for {QUIET_S:.0f} s; at work: {at_work or 'nobody'}; if one of them hangs, end it: its tasks are "
            f"then given to others",
            file=sys.stderr,
            flush=True,
        )

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
                error.add_note(f"at work: {self.describe(self.running[future])}")
                raise
            if not isinstance(error, TimeoutError):
                raise IchorError(self.gone) from None
            future.add_done_callback(self.done.put)
            return
        except Exception as error:
            error.add_note(f"at work: {self.describe(self.running[future])}")
            raise
        if refusal is not None and NOT_SEEN in refusal:
            raise IchorError(
                f"the worker at {worker} does not see {refusal[NOT_SEEN]}, which this process sees; have it see the same files under the "
                f"same names, or stop it, and run the same command again; finished work is kept"
            )
        if refusal is not None:
            pairs = [(name, self.expected[name], there) for name, there in refusal.items()]
            differing = "; ".join(f"{name}: {here} here, {there} there" for name, here, there in pairs if here != there)
            raise IchorError(
                f"the worker at {worker} has other code than this process ({differing}); give the workers the same "
                f"version, restart them, and run the same command again; finished work is kept"
            )
        self.heard_s, self.is_quiet = time.monotonic(), False
        del self.running[future]
        future.release()
        yield result


@contextmanager
def _connect(*, workers: int | str, scheduler: str | None) -> Iterator[Any]:
    """A client of the scheduler at an address, or of a cluster of processes that lives as long as the block."""
    # Imported late: a run in this process needs none of it, and it takes a second.
    from dask.config import set as configured
    from distributed import Client

    for name in ("distributed", "distributed.client", "tornado", "tornado.application", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what ends well is not news; what fails is raised here
    with ExitStack() as closing:
        if scheduler is None:
            with _signals_held(), configured(MALLOC):
                cluster = closing.enter_context(_start_workers(count_workers(workers)))
        try:
            if scheduler is not None:
                asyncio.run(asyncio.wait_for(_ask_who_is_there(scheduler), CONNECT_TIMEOUT_S))
            client = Client(cluster if scheduler is None else scheduler, timeout=CONNECT_TIMEOUT_S)
        except (OSError, ValueError, TypeError) as error:
            raise IchorError(
                f"preprocess.scheduler = {scheduler!r}: no Dask scheduler answers there ({error or type(error).__name__}); start one, or set "
                f"it to null"
            ) from None
        closing.callback(_close, client)
        yield client


@contextmanager
def _start_workers(count: int) -> Iterator[Any]:
    """A cluster of processes on this machine. They ignore Ctrl-C, which a terminal sends to all: only the driver answers it.

    An ignored signal is the one thing that a new program inherits. So the driver is deaf too until they are there, some tenths of a
    second; that they import and connect takes longer, and then a Ctrl-C is remembered.
    """
    from distributed import LocalCluster

    others = len(multiprocessing.active_children())
    with ThreadPoolExecutor(1) as starter:
        starting = starter.submit(LocalCluster, n_workers=count, silence_logs=logging.CRITICAL, **LOCAL)
        with _handled(signal.SIG_IGN, signal.SIGINT):
            while not starting.done() and len(multiprocessing.active_children()) < others + count:
                time.sleep(0.01)
        try:
            cluster = starting.result()
        except (OSError, RuntimeError) as error:
            free_bytes = shutil.disk_usage(tempfile.gettempdir()).free
            raise IchorError(
                f"Dask's workers do not start ({error}); they need some space in {tempfile.gettempdir()} (TMPDIR), where "
                f"{free_bytes:,} bytes are free; preprocess.workers: 0 needs none"
            ) from None
    try:
        yield cluster
    finally:
        _close(cluster)


async def _ask_who_is_there(address: str) -> None:
    """A client would wait without end for one who takes the call and says nothing, or is no scheduler: a dashboard, say."""
    from distributed.core import rpc

    async with rpc(address) as scheduler:
        await scheduler.identity()


@contextmanager
def _signals_held() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the block is over: what it starts or ends would be left half-way."""
    came: list[int] = []
    with _handled(lambda number, _frame: came.append(number), signal.SIGINT, signal.SIGTERM):
        yield
    if came:
        signal.raise_signal(came[0])


@contextmanager
def _handled(handler: Any, *signs: signal.Signals) -> Iterator[None]:
    """Signals go to `handler` for the time of the block; a thread other than the main one, which hears none, changes nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {sign: signal.signal(sign, handler) for sign in signs}
    try:
        yield
    finally:
        for sign, handler_before in before.items():
            signal.signal(sign, handler_before)


def _close(closable: Any) -> None:
    with (
        _signals_held(),
        suppress(Exception),
    ):  # given up with a message of its own, or done: closing has nothing to add
        closable.close(timeout=5)
