"""Decode compressed pixel data in a process of its own, so that no file can take the run down.

The decoders are C. Fed a damaged file, one may crash, hang or eat all memory; here that costs the slice, and the process is
started again for the next one. The process is a plain program, not a `multiprocessing` child: Dask's workers are
daemonic and may not have those. It speaks JSON and raw bytes over two pipes: what a crashed decoder writes is never unpickled.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from pipeline.errors import IchorError

# pydicom and the decoders are imported in the decoding process alone: importing this module stays cheap.

UNDECODABLE, DIED, HUNG = "undecodable", "decoder_died", "decoder_hung"

TIME_LIMIT_S = 30.0
"""No answer for so long is a hang: a slice takes 1 to 40 ms, one of 2048 × 2048 in JPEG 2000 0.6 s, and a busy machine is slower."""

START_LIMIT_S = 120.0
"""Imports take 0.3 s from a warm disk, but many workers may start at once from a network disk."""

WAIT_STEP_S = 0.1
"""Time is counted in waits of this length, so that a run stopped with Ctrl-Z, or a laptop asleep, is not taken for a hang."""

MEMORY_LIMIT_BYTES = 4 << 30
"""Address space of the decoding process: 0.2 GB for itself, the rest for a 1 GB multi-frame file, its pixel data and a frame."""

CONTENT_LIMIT_BYTES = MEMORY_LIMIT_BYTES // 3
"""A file is held about twice, as it came and as pixel data; a larger one is not even sent."""

HEADER_LIMIT_BYTES = 256
"""A header of the protocol has below 100 bytes; more is rubbish from a crashed decoder."""

LENGTH = struct.Struct("<I")

DAMAGE_SAID = (b"premature end of data segment", b"bad Huffman code", b"extraneous bytes", b"instead of RST")
"""What libjpeg, inside gdcm, prints where the data make no sense and it goes on with made-up values. Nothing else tells."""

SAID_LIMIT_BYTES = 1 << 20
"""What decoders print is kept in memory until the frame is done, no more than this."""

DTYPES = ("uint8", "int8", "uint16", "int16")

PLUGINS = {
    "1.2.840.10008.1.2": "",  # native: implicit VR, explicit VR, deflated, big endian
    "1.2.840.10008.1.2.1": "",
    "1.2.840.10008.1.2.1.99": "",
    "1.2.840.10008.1.2.2": "",
    "1.2.840.10008.1.2.4.50": "gdcm",  # JPEG baseline, extended, lossless, lossless of first order
    "1.2.840.10008.1.2.4.51": "gdcm",
    "1.2.840.10008.1.2.4.57": "gdcm",
    "1.2.840.10008.1.2.4.70": "gdcm",
    "1.2.840.10008.1.2.4.80": "pyjpegls",  # JPEG-LS, lossless and near
    "1.2.840.10008.1.2.4.81": "pyjpegls",
    "1.2.840.10008.1.2.4.90": "pylibjpeg",  # JPEG 2000 and high-throughput JPEG 2000, by openjpeg
    "1.2.840.10008.1.2.4.91": "pylibjpeg",
    "1.2.840.10008.1.2.4.201": "pylibjpeg",
    "1.2.840.10008.1.2.4.202": "pylibjpeg",
    "1.2.840.10008.1.2.4.203": "pylibjpeg",
    "1.2.840.10008.1.2.5": "pylibjpeg",  # RLE
}
"""pydicom's plugin for each transfer syntax (PS3.5 A.4). Left to itself pydicom takes the first that is installed and works, so
that the same file could come out differently elsewhere."""


class DecodeError(Exception):
    """One frame cannot be had. `code` is a reason of the manifest.

    ``undecodable``: the decoder said no, needed too much memory, or made something else than [rows, columns] of 8 or 16 bits.
    ``decoder_died``: the decoding process crashed. ``decoder_hung``: it gave no answer within `TIME_LIMIT_S`.
    """

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


def decode(content: bytes, *, frame: int = 0, rows: int, columns: int) -> npt.NDArray[np.integer]:
    """Decode one frame of a DICOM file.

    Args:
        content: the whole file, with or without preamble.
        frame: counted from 0.
        rows: (0028,0010), as `index` read it.
        columns: (0028,0011).

    Returns:
        Stored values [row, column] in native byte order: int16 or uint16, or int8 or uint8 where 8 bits are allocated. The sign
        and the unused bits are as pydicom has them; nothing is rescaled.

    Raises:
        DecodeError: the frame cannot be had.
        IchorError: the decoding process does not start, which is no fault of the file.
    """
    global _child
    if len(content) > CONTENT_LIMIT_BYTES:
        raise DecodeError(UNDECODABLE)
    with _lock:
        if _child is None or not _child.is_alive():  # dead since the last answer: not this file's fault
            _discard()
            _child = _Child()
        try:
            answer = _child.ask(content, frame=frame, rows=rows, columns=columns)
        except BaseException:  # Ctrl-C among them: an answer left in the pipe would be taken for the next file's
            _discard()
            raise
    if answer is None:
        raise DecodeError(UNDECODABLE)
    return answer


def close() -> None:
    """End the decoding process, if there is one; the next `decode` starts another."""
    with _lock:
        _discard()


# ---- the asking side


class _Child:
    """The decoding process, seen from the one that asks."""

    def __init__(self) -> None:
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "pipeline.decoder"],  # -P: not from whatever the current folder holds
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                env=os.environ | {"PYTHONPATH": _module_path(), "OPENBLAS_NUM_THREADS": "1"},
                process_group=0,  # a terminal's Ctrl-C goes to a process group: only the driver answers it
            )
        except OSError as error:
            raise IchorError(f"the decoding process cannot be started: {error}") from error
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests, self.answers = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.requests, False)
        os.set_blocking(self.answers, False)
        try:
            self.left_s = START_LIMIT_S
            self._read_header()
        except BaseException as error:
            self.kill()
            if not isinstance(error, OSError | EOFError | ValueError):
                raise
            raise IchorError(
                f"the decoding process ended at once, or did not start within {START_LIMIT_S:.0f} s; what it said stands above: "
                "is all of requirements.txt installed? `python -m pipeline.decoder < /dev/null` tries it alone"
            ) from None

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def ask(self, content: bytes, *, frame: int, rows: int, columns: int) -> npt.NDArray[np.integer] | None:
        """The frame, or None where the decoder said no."""
        self.left_s = TIME_LIMIT_S
        try:
            self._write(_pack({"size": len(content), "frame": frame, "rows": rows, "columns": columns}))
            self._write(content)
            name = self._read_header()
            if name is None:
                return None
            if name not in DTYPES:
                raise ValueError(f"no dtype: {name!r}")
            dtype = np.dtype(name)
            return np.frombuffer(self._read(rows * columns * dtype.itemsize), dtype).reshape(rows, columns)
        except TimeoutError:
            raise DecodeError(HUNG) from None
        except (OSError, EOFError, ValueError):  # the pipe broke or ended, or rubbish came out of it
            raise DecodeError(DIED) from None

    def kill(self) -> None:
        with self.process:  # closes the pipes and waits, so that no zombie stays
            self.process.kill()

    def leave_to_parent(self) -> None:
        """After a fork: the process belongs to the other side, and an open pipe here would keep it alive."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self.process.returncode = 0  # there is nothing to wait for

    def _write(self, content: bytes) -> None:
        rest = memoryview(content)
        while rest:
            self._wait(self.requests, select.POLLOUT)
            rest = rest[os.write(self.requests, rest) :]

    def _read(self, size: int) -> bytearray:
        content = bytearray(size)
        rest = memoryview(content)
        while rest:
            self._wait(self.answers, select.POLLIN)
            count = os.readv(self.answers, [rest])
            if not count:
                raise EOFError
            rest = rest[count:]
        return content

    def _read_header(self) -> Any:
        (size,) = LENGTH.unpack(self._read(LENGTH.size))
        if size > HEADER_LIMIT_BYTES:
            raise ValueError(f"a header of {size} bytes")
        return json.loads(self._read(size))

    def _wait(self, pipe: int, event: int) -> None:
        poll = select.poll()
        poll.register(pipe, event)
        while not poll.poll(WAIT_STEP_S * 1000):
            self.left_s -= WAIT_STEP_S
            if self.left_s <= 0:
                raise TimeoutError


_child: _Child | None = None
_lock = threading.Lock()


def _discard() -> None:
    global _child
    if _child is not None:
        _child.kill()
        _child = None


def _forget() -> None:
    """In a forked process: two processes on one pipe would get each other's answers."""
    global _child, _lock
    _lock = threading.Lock()  # another thread may have held it
    if _child is not None:
        _child.leave_to_parent()
        _child = None


def _module_path() -> str:
    """What this process can import, the decoding one can, wherever either stands."""
    root = Path(__file__).resolve().parent.parent
    return os.pathsep.join([str(root), *(os.path.abspath(entry) for entry in sys.path)])


def _pack(header: Any) -> bytes:
    text = json.dumps(header).encode()
    return LENGTH.pack(len(text)) + text


os.register_at_fork(after_in_child=_forget)
atexit.register(close)


# ---- the decoding side


def _serve() -> None:
    """Answer requests until the asking process closes its end or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _limit(resource.RLIMIT_AS, MEMORY_LIMIT_BYTES)
    _limit(resource.RLIMIT_CORE, 0)  # a core dump holds a patient's header
    warnings.simplefilter("ignore")
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)  # decoders print; the protocol goes over pipes that they do not know
    os.dup2(nowhere, 1)
    _import_decoders()
    os.dup2(os.memfd_create("said"), 2)  # from here on a message may hold a name
    _limit(resource.RLIMIT_FSIZE, SAID_LIMIT_BYTES)
    logging.disable()  # pydicom's own tracebacks
    answers.write(_pack(None))
    answers.flush()
    while prefix := requests.read(LENGTH.size):
        request = json.loads(requests.read(*LENGTH.unpack(prefix)))
        _answer(answers, requests.read(request.pop("size")), **request)


def _limit(what: int, value: int) -> None:
    _, hard = resource.getrlimit(what)
    resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _import_decoders() -> None:
    """All of them at once: one that is not installed is said at the start, not taken for a thousand damaged files."""
    import gdcm  # noqa: F401
    import jpeg_ls  # noqa: F401
    import openjpeg  # noqa: F401
    import pydicom
    import rle  # noqa: F401

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE  # as in `pipeline.header`


def _answer(answers: BinaryIO, content: bytes, *, frame: int, rows: int, columns: int) -> None:
    # If the asking process is gone and the decoder hangs, nobody is left to kill this one: the default of SIGALRM does.
    signal.alarm(int(TIME_LIMIT_S) + 10)
    try:
        stored = _decode_frame(content, frame=frame, rows=rows, columns=columns)
    except BaseException:  # decoders raise what they like, memory ends, and a panic in Rust is no Exception
        stored = None
    signal.alarm(0)
    said = os.pread(2, SAID_LIMIT_BYTES, 0)
    os.ftruncate(2, 0)
    os.lseek(2, 0, os.SEEK_SET)
    is_damaged = any(words in said for words in DAMAGE_SAID)
    if stored is None or is_damaged or stored.shape != (rows, columns) or stored.dtype.name not in DTYPES:
        answers.write(_pack(None))
    else:
        answers.write(_pack(stored.dtype.name))
        answers.write(np.ascontiguousarray(stored, stored.dtype.newbyteorder("=")).data)
    answers.flush()


def _decode_frame(content: bytes, *, frame: int, rows: int, columns: int) -> npt.NDArray[Any] | None:
    import pydicom
    from pydicom.pixels import get_decoder
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, JPEGExtended12Bit, JPEGLosslessSV1

    dataset = pydicom.dcmread(BytesIO(content), force=True)
    if dataset.SamplesPerPixel != 1 or dataset.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"):
        return None
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if not syntax:  # a file without meta group: pydicom found out by looking
        syntax = ExplicitVRLittleEndian if dataset.original_encoding[1] else ExplicitVRBigEndian
    plugin = PLUGINS[syntax]
    if plugin and _check_codestream(_encoded_frame(dataset, frame), syntax=syntax, rows=rows, columns=columns):
        dataset.PixelRepresentation = 1
    if syntax == JPEGExtended12Bit:
        # pydicom 3.0 refuses to give gdcm more than 8 bits under this name. gdcm tells the process (lossy or not) from the
        # codestream, not from the name, and decodes 12 bits rightly.
        syntax = dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    stored, _ = get_decoder(syntax).as_array(dataset, index=frame, raw=True, decoding_plugin=plugin)
    return stored


def _encoded_frame(dataset: Any, frame: int) -> bytes:
    from pydicom.encaps import get_frame

    tables = (dataset.get("ExtendedOffsetTable"), dataset.get("ExtendedOffsetTableLengths"))
    return get_frame(
        dataset.PixelData,
        frame,
        number_of_frames=int(dataset.get("NumberOfFrames") or 1),
        extended_offsets=tables if all(tables) else None,
    )


def _check_codestream(codestream: bytes, *, syntax: str, rows: int, columns: int) -> bool:
    """Refuse what pydicom would fold into the wrong shape or cut to 16 bits without a word: it compares numbers of bytes alone.

    gdcm compares for itself, and RLE holds no shape.

    Returns:
        Whether the codestream is one of signed 16-bit values. Where the data set says unsigned, pydicom would make 64536 of −1000, and
        no CT has values beyond 32767; with fewer bits the data set's own sign is right.
    """
    import _CharLS  # of pyjpegls, whose own functions would decode the frame to tell its shape
    import openjpeg
    from pydicom.uid import JPEG2000TransferSyntaxes, JPEGLSTransferSyntaxes

    if syntax in JPEGLSTransferSyntaxes:
        facts = _CharLS.read_header(codestream)
        found = (facts["height"], facts["width"], facts["components"], facts["bits_per_sample"])
    elif syntax in JPEG2000TransferSyntaxes:
        facts = openjpeg.get_parameters(codestream)
        found = (facts["rows"], facts["columns"], facts["samples_per_pixel"], facts["precision"])
    else:
        return False
    if found[:3] != (rows, columns, 1) or found[3] > 16:
        raise ValueError(f"expected {rows} × {columns} of up to 16 bits, found {found}")
    return found[3] == 16 and bool(facts.get("is_signed"))


if __name__ == "__main__":
    _serve()
    os._exit(0)  # no C++ destructors: there is nothing to keep
