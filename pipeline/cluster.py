"""Run tasks in this process, on a local Dask cluster, or on a Dask scheduler somewhere. The one module that knows Dask.

Memory stays bounded at any number of tasks: only a few a worker are submitted ahead. A task may run twice (a worker died);
so a task writes under a name that only it produces, and writing it again writes the same bytes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from pipeline.errors import IchorError

Task = TypeVar("Task")
Result = TypeVar("Result")

AHEAD = 4
"""Tasks submitted ahead for each worker: enough that none waits, few enough that the queue stays small."""


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
    # Imported late: a run in this process needs none of it, and it takes a second.
    from distributed import Client, LocalCluster, as_completed

    logging.getLogger("distributed").setLevel(logging.ERROR)  # what ends well is not news; what fails is raised here
    if scheduler is None:
        cluster = LocalCluster(
            n_workers=count_workers(workers),
            threads_per_worker=1,
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.ERROR,
        )
    else:
        cluster = None
    try:
        client = Client(cluster if cluster is not None else scheduler, timeout="15s")
    except (OSError, ValueError) as error:
        raise IchorError(
            f"preprocess.scheduler = {scheduler!r}: no Dask scheduler answers there ({error}); start one, or set it to null"
        ) from None
    try:
        print(f"  Dask dashboard: {client.dashboard_link}", flush=True)
        yield from _submit_in_a_window(client, as_completed, function, iter(tasks))
    finally:
        client.close(timeout=5)
        if cluster is not None:
            cluster.close(timeout=5)


def _submit_in_a_window(
    client: Any, as_completed: Any, function: Callable[[Task], Result], tasks: Iterator[Task]
) -> Iterator[Result]:
    ahead = AHEAD * max(1, len(client.scheduler_info()["workers"]))
    running = as_completed([client.submit(function, task, pure=False) for task in islice(tasks, ahead)])
    for future in running:
        result = future.result()
        future.release()
        for task in islice(tasks, 1):
            running.add(client.submit(function, task, pure=False))
        yield result
