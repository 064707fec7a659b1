"""Run tasks in this process, on a local Dask cluster, or on a Dask scheduler somewhere. The one module that knows Dask.

Memory stays bounded at any number of tasks: only a few a worker are submitted ahead. A task may run twice (a worker died);
so a task writes under a name that only it produces, and writing it again writes the same bytes.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from typing import Any, TypeVar

from pipeline.errors import IchorError

Task = TypeVar("Task")
Result = TypeVar("Result")

AHEAD = 4
"""Tasks submitted ahead for each worker: enough that none waits, few enough that the queue stays small."""


CONNECT_TIMEOUT_S, WORKER_TIMEOUT_S = 15, 30


def count_workers(workers: int | str) -> int:
    """`auto` is one process for each core that this process may use."""
    return len(os.sched_getaffinity(0)) if workers == "auto" else int(workers)


def run_tasks(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    workers: int | str,
    scheduler: str | None,
) -> Iterator[Result]:
    """Yield `function(task)` for every task, as they finish, in any order.

    Args:
        function: an importable function; it and its tasks travel to other processes.
        tasks: drawn lazily.
        workers: processes to start; 0 runs in this one.
        scheduler: address of a running Dask scheduler, used instead of starting processes.

    Raises:
        IchorError: the scheduler cannot be reached.
    """
    if scheduler is None and count_workers(workers) == 0:
        yield from map(function, tasks)
        return
    with _connect(workers=workers, scheduler=scheduler) as client:
        print(f"  Dask dashboard: {client.dashboard_link}", flush=True)
        yield from _submit_in_a_window(client, function, iter(tasks))


@contextmanager
def _connect(*, workers: int | str, scheduler: str | None) -> Iterator[Any]:
    """A client of the scheduler at an address, or of a cluster of processes that lives as long as the block."""
    # Imported late: a run in this process needs none of it, and it takes a second.
    from distributed import Client, LocalCluster

    logger = logging.getLogger("distributed")
    logger.setLevel(logging.ERROR)  # what ends well is not news; what fails is raised here
    with ExitStack() as closing:
        if scheduler is None:
            with _interrupts_ignored():
                cluster = LocalCluster(
                    n_workers=count_workers(workers),
                    threads_per_worker=1,
                    dashboard_address="127.0.0.1:0",
                    silence_logs=logging.ERROR,
                )
            closing.callback(_close, cluster)
        try:
            client = Client(scheduler or cluster, timeout=CONNECT_TIMEOUT_S)
        except (OSError, ValueError) as error:
            raise IchorError(
                f"preprocess.scheduler = {scheduler!r}: no Dask scheduler answers there ({error}); start one, or set it to null"
            ) from None
        closing.callback(_close, client)
        try:
            client.wait_for_workers(1, timeout=WORKER_TIMEOUT_S)
        except TimeoutError:
            raise IchorError(
                f"preprocess.scheduler = {scheduler!r}: the scheduler has no worker after {WORKER_TIMEOUT_S} s; start workers there"
            ) from None
        try:
            yield client
        except BaseException:
            logger.setLevel(logging.CRITICAL)  # the tasks that are cut off would each have their say
            raise


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


def _submit_in_a_window(client: Any, function: Callable[[Task], Result], tasks: Iterator[Task]) -> Iterator[Result]:
    from distributed import as_completed

    def missing() -> int:
        """How many more tasks keep every worker busy; workers may join or leave at any time."""
        return max(1, AHEAD * len(client.scheduler_info(n_workers=-1)["workers"]) - running.count())

    running = as_completed([])
    for task in islice(tasks, missing()):
        running.add(client.submit(function, task, pure=False))
    for future in running:
        result = future.result()
        future.release()
        for task in islice(tasks, missing()):
            running.add(client.submit(function, task, pure=False))
        yield result
