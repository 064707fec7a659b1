"""The same tasks give the same results in this process, on local processes and on a scheduler; what is missing is said."""

from __future__ import annotations

import io
import socket
from collections.abc import Iterator

import pytest
from distributed import LocalCluster

import pipeline.cluster
from pipeline.cluster import AHEAD, count_workers, run_tasks
from pipeline.errors import IchorError
from pipeline.progress import Progress


def square(number: int) -> int:
    return number * number


def fail(number: int) -> int:
    raise ValueError(f"task {number} failed")


EXPECTED = sorted(square(number) for number in range(40))


@pytest.mark.parametrize("workers", [0, 2])
def test_every_task_is_done_once_whatever_the_workers(workers: int) -> None:
    assert sorted(run_tasks(square, range(40), workers=workers, scheduler=None)) == EXPECTED


@pytest.fixture
def scheduler() -> Iterator[LocalCluster]:
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster:
        yield cluster


@pytest.mark.filterwarnings("ignore")
def test_running_scheduler_is_used_by_its_address(scheduler: LocalCluster) -> None:
    assert sorted(run_tasks(square, range(40), workers=0, scheduler=scheduler.scheduler_address)) == EXPECTED


@pytest.mark.filterwarnings("ignore")
def test_tasks_are_drawn_a_few_ahead_of_the_work(scheduler: LocalCluster) -> None:
    drawn: list[int] = []

    def draw() -> Iterator[int]:
        for number in range(1000):
            drawn.append(number)
            yield number

    results = run_tasks(square, draw(), workers=0, scheduler=scheduler.scheduler_address)
    for done, _ in enumerate(results, start=1):
        assert len(drawn) <= done + 2 * AHEAD, "memory would grow with the number of tasks"
        if done == 100:
            break


@pytest.mark.filterwarnings("ignore")
def test_failed_task_is_raised_here(scheduler: LocalCluster) -> None:
    with pytest.raises(ValueError, match="task 0 failed"):
        list(run_tasks(fail, range(1), workers=0, scheduler=scheduler.scheduler_address))


def test_scheduler_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.cluster, "CONNECT_TIMEOUT_S", 1)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(IchorError, match=f"preprocess.scheduler = '{address}': no Dask scheduler answers"):
            list(run_tasks(square, range(3), workers=0, scheduler=address))


@pytest.mark.filterwarnings("ignore")
def test_scheduler_without_workers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.cluster, "WORKER_TIMEOUT_S", 1)
    with (
        LocalCluster(n_workers=0, processes=False, dashboard_address=None) as cluster,
        pytest.raises(IchorError, match="has no worker after 1 s"),
    ):
        list(run_tasks(square, range(3), workers=0, scheduler=cluster.scheduler_address))


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
