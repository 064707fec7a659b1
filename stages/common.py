"""What every door shares: its arguments, and an exit that people can read.

Exit codes: 0 done; 1 a fault that the message names; 2 wrong arguments; 130 and 143 stopped by Ctrl-C or SIGTERM, with all
finished work kept.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from pipeline.errors import IchorError, UsageError
from pipeline.files import is_disk_full


class _Terminated(KeyboardInterrupt):
    """SIGTERM, treated as Ctrl-C so that both take the same clean way out."""


def door(
    main: Callable[[argparse.Namespace], None],
    description: str | None,
    add_arguments: Callable[[argparse.ArgumentParser], object] | None = None,
    *,
    stopped: str = "stopped; finished work is kept, run the same command again to go on",
) -> NoReturn:
    """Parse the arguments, run `main`, and leave with an exit code.

    Args:
        main: does the stage's work; gets ``params`` and ``data`` (paths) and whatever `add_arguments` added.
        description: the help text, usually the door's module docstring.
        add_arguments: adds the door's own arguments.
        stopped: what Ctrl-C leaves, in words.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {_module_name()}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--params", type=Path, default=Path("params.yaml"), metavar="FILE", help="parameter file (default: %(default)s)"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("data"),
        metavar="FOLDER",
        help="where inputs and outputs of the stages lie (default: %(default)s)",
    )
    if add_arguments:
        add_arguments(parser)
    arguments = parser.parse_args()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal of few letters shows ? for the others
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _stop)  # instead of the one of the imports
    sys.exit(_run(main, arguments, stopped))


def _run(main: Callable[[argparse.Namespace], None], arguments: argparse.Namespace, stopped: str) -> int:
    try:
        main(arguments)
        sys.stdout.flush()
    except IchorError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except OSError as error:
        if error.errno is None:
            raise
        if isinstance(error, BrokenPipeError):  # the reader, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        where, fault = error.filename or "a file", error.strerror
        if is_disk_full(error):
            where = Path(error.filename).parent if error.filename else arguments.data
            fault = "the disk is full; free some space there and run the same command again"
        print(f"error: {where}: {fault}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"\n{stopped}", file=sys.stderr)
        return 143 if isinstance(stop, _Terminated) else 130
    return 0


_stopped_s: float | None = None
PATIENCE_S = 10.0
"""A second Ctrl-C within this time is not heard, as cleaning up must not be stopped half-way; after it, the process ends at once."""


def _stop(number: int, _frame: FrameType | None) -> None:
    global _stopped_s
    if _stopped_s is None:
        _stopped_s = time.monotonic()
        raise _Terminated if number == signal.SIGTERM else KeyboardInterrupt
    if time.monotonic() - _stopped_s > PATIENCE_S:
        os._exit(128 + number)


def _module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).stem
