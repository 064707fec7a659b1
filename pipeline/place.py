"""Reading a file where it lies: on a disk, in a zip, in a store of objects; always the one that `index` saw.

What is read is checked against that: size and time of change, a zip's CRC-32, or S3's ETag. A slice of the 180 GB RSNA zip costs one
read, as the manifest carries each member's place.
"""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from typing import Any, NamedTuple

from isal import isal_zlib

from pipeline.storage import URL, ask, stamp_of

NOT_PACKED, STORED, DEFLATED, UNREADABLE_METHOD = -1, 0, 8, 99
"""How a file lies in a zip (APPNOTE 4.4.5): not in one, as it is, deflated; 99 stands for all that cannot be read, encrypted too."""

HEAD_BYTES = 65_536
"""What is read to parse a header: RSNA's take 1.4 kB, hospitals' 4 to 40; one read of this size costs no more than of one page."""

ENCRYPTED, CHECKSUM_BEHIND = 1 << 0, 1 << 3
"""Flags of a zip's member (APPNOTE 4.4.4)."""

MEMBER_MARK = b"PK\x03\x04"
LOCAL_HEADER = struct.Struct("<4s5H3I2H")
LOCAL_SLACK = 512
"""A member's local header may hold a longer extra field than the directory's (APPNOTE 4.3.7): read this much more."""

BadDeflateError: Any = isal_zlib.error


class Place(NamedTuple):
    """Where one file lies, and what it was when `index` saw it."""

    container: str
    """The file, its URL, or the zip that holds it."""
    size: int
    stamp: int
    method: int = NOT_PACKED
    offset: int = 0
    packed_size: int = 0


class Scratch:
    """Memory to read into, again and again: fresh memory costs more in page faults than the reading itself."""

    def __init__(self) -> None:
        self._memory = bytearray()

    def view(self, length: int) -> memoryview:
        """That many bytes; good until the next call."""
        if len(self._memory) < length:
            self._memory = bytearray(length)  # not resized: an array may still lie in the old one
        return memoryview(self._memory)[:length]


class ChangedError(Exception):
    """A file is gone, cannot be read, or is not the one that `index` saw."""


class DamagedError(ChangedError):
    """A zip's member is the one that `index` saw, and does not unpack to its checksum: reading it again will not help."""


def read_head(place: Place, length: int = HEAD_BYTES) -> bytes:
    """The first bytes of a file, as they are now.

    Raises:
        ChangedError: it cannot be read.
    """
    if place.method == UNREADABLE_METHOD:
        raise ChangedError
    try:
        if place.method == NOT_PACKED:
            return _read_range(place.container, 0, min(length, place.size))
        packed = _read_member(place, min(place.packed_size, length))
        return packed[:length] if place.method == STORED else isal_zlib.decompressobj(-15).decompress(packed, length)
    except (OSError, BadDeflateError):
        raise ChangedError from None


def read_whole(place: Place) -> bytes:
    """A whole file, the one that `index` saw.

    Raises:
        ChangedError: it is gone, cannot be read, or is another one.
    """
    if place.method == UNREADABLE_METHOD:
        raise ChangedError
    try:
        if place.method == NOT_PACKED:
            content = _read_range(place.container, 0, place.size)
            _require_unchanged(place)
        else:
            content = _unpack(place)
    except OSError:
        raise ChangedError from None
    if len(content) != place.size:
        raise ChangedError
    return content


def _unpack(place: Place) -> bytes:
    """A whole member of a zip, checked against its CRC-32."""
    packed = _read_member(place, place.packed_size)
    if len(packed) != place.packed_size:
        raise ChangedError
    content = packed
    if place.method == DEFLATED:
        with suppress(BadDeflateError):
            # one byte more than it should have, to tell; a malicious member would fill the memory
            content = isal_zlib.decompressobj(-15).decompress(packed, place.size + 1)
    if len(content) == place.size and isal_zlib.crc32(content) == place.stamp:
        return content
    raise DamagedError if _read_checksum(place) == place.stamp else ChangedError


def _read_checksum(place: Place) -> int:
    """The CRC-32 that stands before a zip's member, or behind it (APPNOTE 4.3.7, 4.3.9): is it the one in the directory?"""
    header = _read_range(place.container, place.offset, LOCAL_HEADER.size).ljust(LOCAL_HEADER.size, b"\0")
    _, _, flags, _, _, _, checksum, _, _, name_length, extra_length = LOCAL_HEADER.unpack(header)
    if flags & CHECKSUM_BEHIND:
        end = place.offset + LOCAL_HEADER.size + name_length + extra_length + place.packed_size
        checksum = int.from_bytes(_read_range(place.container, end, 8).removeprefix(b"PK\x07\x08")[:4], "little")
    return int(checksum)


def read_part(place: Place, start: int, length: int, scratch: Scratch) -> memoryview:
    """Part of a file, the one that `index` saw; shorter where the file ends.

    Args:
        place: the file.
        start: first byte.
        length: bytes wanted.
        scratch: what is returned may lie in it.

    Raises:
        ChangedError: it is gone, cannot be read, or is another one.
    """
    if place.method != NOT_PACKED:  # the checksum is that of the whole file
        return memoryview(read_whole(place))[start : start + length]
    if URL.match(place.container):
        content = memoryview(read_whole(place))
        return content[start : start + length]
    view = scratch.view(length)
    try:
        descriptor = os.open(place.container, os.O_RDONLY)
        try:
            count = os.preadv(descriptor, [view], start)
            status = os.fstat(descriptor)  # after the reading, so that a change meanwhile is seen too
        finally:
            os.close(descriptor)
    except OSError:
        raise ChangedError from None
    if (status.st_size, status.st_mtime_ns) != (place.size, place.stamp):
        raise ChangedError
    return view[:count]


def _read_range(container: str, start: int, length: int) -> bytes:
    if URL.match(container):
        if not length:
            return b""
        return bytes(ask(container, lambda system, path: system.cat_file(path, start=start, end=start + length)))
    descriptor = os.open(container, os.O_RDONLY)
    try:
        # memory is taken before the reading: a damaged zip may ask for more than there is
        return os.pread(descriptor, min(length, os.fstat(descriptor).st_size), start)
    finally:
        os.close(descriptor)


def _require_unchanged(place: Place) -> None:
    if URL.match(place.container):
        facts = ask(place.container, lambda system, path: system.info(path))
        size, stamp = facts["size"], stamp_of(facts)
    else:
        status = os.stat(place.container)
        size, stamp = status.st_size, status.st_mtime_ns
    if (size, stamp) != (place.size, place.stamp):
        raise ChangedError


def _read_member(place: Place, length: int) -> bytes:
    """The first `length` packed bytes of a zip's member, which lie behind its local header (APPNOTE 4.3.7)."""
    content = _read_range(place.container, place.offset, LOCAL_HEADER.size + LOCAL_SLACK + length)
    if len(content) < LOCAL_HEADER.size:
        raise ChangedError
    signature, *_, name_length, extra_length = LOCAL_HEADER.unpack_from(content)
    if signature != MEMBER_MARK:
        raise ChangedError
    start = LOCAL_HEADER.size + name_length + extra_length
    if start + length > len(content):
        content = _read_range(place.container, place.offset, start + length)
    return content[start : start + length]
