"""One thin door for each command: parse, load the parameters, call one function, write the result."""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType

# Threads that wait by spinning fight over shared cores: with two busy neighbours a training step took ten times as long.
# OpenMP reads this when torch is imported, so it stands here, before any door imports anything.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _leave(_number: int, _frame: FrameType | None) -> None:
    with suppress(OSError):  # nobody may be listening
        os.write(2, b"\nstopped before anything began\n")
    os._exit(130)


# A door imports for a second or two, and nothing has begun yet: Ctrl-C ends that without a traceback. `door` takes over from here.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)
