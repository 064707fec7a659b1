"""Where the files lie: folders, zips read in place, globs, and S3-compatible storage; found by `index`, read by both stages.

A zip's directory is parsed once, by `index`; the manifest then carries each member's place, so that a slice of the 180 GB RSNA
zip costs one read. Whatever is read is checked against what `index` saw: size and time of change, a zip's CRC-32, or S3's ETag.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from isal import isal_zlib

from pipeline.errors import SourceError

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

SMALLEST_ZIP = 22
"""An end of the directory, of nothing (APPNOTE 4.3.16); zipfile looks for it from the end, and not every storage lets it."""

LARGEST = 2**62
"""A damaged zip may claim sizes that no table holds."""

URL_BLOCK_BYTES = 1 << 20
"""Read at once of a zip in a store of objects, whose own 50 MB would be read for every small one."""

URL = re.compile(r"^[a-z][a-z0-9+.-]+://")

IDENTITY = ["source", "archive", "path", "size", "stamp"]
FILE_COLUMNS = [*IDENTITY, "archive_stamp", "method", "offset", "packed_size"]
"""`source` is the number of the entry of `source.dicom`; `archive` the zip within it; `path` lies within archive or source; `stamp`
changes with the content: mtime in ns, CRC-32, or a hash of S3's ETag; `archive_stamp` with the zip; the last three say where a
zip's member lies. A file is the same as before where its `IDENTITY` is."""

_NUMBERS = ["source", "size", "stamp", "archive_stamp", "method", "offset", "packed_size"]

Listing = list[tuple[Any, ...]]
"""Rows of a table without their source."""

Found = tuple[str, int, int]
"""A file's path in its source, size and stamp."""

_Numbers = dict[str, int]
"""Path → a number: the garbage collector passes these over, and goes through a million tuples again and again."""


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


def find_files(sources: Sequence[str], known: pd.DataFrame | None = None) -> pd.DataFrame:
    """List every file of the sources, in the order of source, archive and path.

    Args:
        sources: folders (searched recursively; zips in them are opened), files, zips, globs, or URLs such as ``s3://bucket/head-ct``.
        known: an earlier listing; the directory of a zip that has not changed since is not parsed again.

    Returns:
        One row a file with `FILE_COLUMNS`.

    Raises:
        SourceError: a source does not exist or cannot be listed, a glob matches nothing, or there is no file at all.
    """
    tables = [_list_source(number, source, known) for number, source in enumerate(sources)]
    files = pd.concat(tables, ignore_index=True)
    if files.empty:
        raise SourceError(f"source.dicom: no file in {', '.join(sources)}")
    return files


def containers(sources: Sequence[str], files: pd.DataFrame) -> list[str]:
    """The file, URL or zip that holds each row of a table with `FILE_COLUMNS`; absolute, as workers may run elsewhere.

    Raises:
        SourceError: the table is of a longer list of sources.
    """
    if len(files) and files["source"].max() >= len(sources):
        raise SourceError(
            f"source.dicom has {len(sources)} entries and had at least {files['source'].max() + 1} when index ran; run index again"
        )
    roots = [source if URL.match(source) else os.path.abspath(_root(source)) for source in sources]
    packed = (files["method"] != NOT_PACKED).to_numpy()
    inside = np.where(packed, files["archive"].to_numpy(object), files["path"].to_numpy(object))
    return [_join(roots[source], path) for source, path in zip(files["source"].tolist(), inside.tolist(), strict=True)]


def is_there(source: str) -> bool:
    """Whether a source is there now.

    Raises:
        SourceError: the storage of a URL does not answer, or refuses.
    """
    if not URL.match(source):
        return os.path.exists(_root(source))
    try:
        return bool(_ask(source, lambda system, path: system.info(path)))
    except FileNotFoundError:
        return False
    except OSError as error:  # no permission, among others
        raise _unreachable(source, error) from None


def _join(root: str, path: str) -> str:
    return f"{root.rstrip('/')}/{path}" if path else root


def _root(source: str) -> str:
    """A source itself, or for a glob the folder above its first wildcard: paths are relative to it."""
    if not _is_glob(source):
        return source
    return os.path.dirname(re.split(r"[*?\[]", source, maxsplit=1)[0]) or "."


def _is_glob(source: str) -> bool:
    return glob.has_magic(source) and not URL.match(source) and not os.path.exists(source)


def _list_source(number: int, source: str, known: pd.DataFrame | None) -> pd.DataFrame:
    if URL.match(source):
        return _open_archives(number, source, _list_url(source), known, _open_object)
    root = _root(source)
    tops = _match(source) if _is_glob(source) else [source]
    if not tops or not os.path.exists(tops[0]):
        what = "matches nothing" if _is_glob(source) else "does not exist"
        raise SourceError(
            f"source.dicom: {source} {what}; set it to a folder of DICOM files, a .zip, a file, a glob, an s3:// URL, or a list of these"
        )
    sizes, stamps = _Numbers(), _Numbers()
    for top in tops:
        relative = "" if os.path.normpath(top) == os.path.normpath(root) else os.path.relpath(top, root)
        prefix = f"{relative}/" if relative and os.path.isdir(top) else relative
        for path, status in _files_of(top):
            shown = _shown(prefix + path)
            sizes[shown], stamps[shown] = status.st_size, status.st_mtime_ns
    paths = _once(root, sizes) if "**" in source else sizes
    files = ((path, sizes[path], stamps[path]) for path in paths)
    return _open_archives(number, root, files, known, lambda name: open(name, "rb"))


def _files_of(top: str) -> Iterable[tuple[str, os.stat_result]]:
    """The files below a folder, or a file itself; nothing of what is neither, such as a pipe."""
    if os.path.isdir(top):
        return _walk(top)
    return [("", os.stat(top))] if os.path.isfile(top) else []


def _match(pattern: str) -> list[str]:
    """What a glob matches and is there, in order."""
    return sorted(top for top in glob.glob(pattern, recursive=True, include_hidden=True) if os.path.exists(top))


def _once(root: str, paths: Iterable[str]) -> Iterable[str]:
    """Each file by its shortest name: `**` follows a link that leads up round and round."""
    by_file: dict[Any, str] = {}
    for path in sorted(paths, key=len, reverse=True):
        try:
            status = os.stat(_join(root, path))
            by_file[status.st_dev, status.st_ino] = path
        except FileNotFoundError:  # its name is no UTF-8, and shown in another way
            by_file[path] = path
    return by_file.values()


def _open_archives(
    number: int, root: str, files: Iterable[Found], known: pd.DataFrame | None, open_file: Callable[[str], Any]
) -> pd.DataFrame:
    """The listing of a source: its files, then the members of its zips, each in order."""
    sizes, stamps = _Numbers(), _Numbers()
    archives: dict[str, pd.DataFrame] = {}
    for path, size, stamp in files:
        if is_zip_name(path or root):
            archive_stamp = _hash(f"{size} {stamp}")
            before = _known_members(known, number, path, archive_stamp)
            if before is not None:
                archives[path] = before
                continue
            name = _join(root, path)
            members = _list_zip(name, partial(open_file, name))
            if members is not None:
                archives[path] = _table(number, [(path, *row[:3], archive_stamp, *row[3:]) for row in members])
                continue
        sizes[path], stamps[path] = size, stamp
    tables = [_plain_table(number, sizes, stamps), *(archives[path] for path in sorted(archives))]
    tables = [table.sort_values("path", kind="stable", ignore_index=True) for table in tables]
    return pd.concat(tables, ignore_index=True) if archives else tables[0]


def _known_members(known: pd.DataFrame | None, number: int, path: str, archive_stamp: int) -> pd.DataFrame | None:
    if known is None or not len(known):
        return None
    same = known[(known["source"] == number) & (known["archive_stamp"] == archive_stamp) & (known["archive"] == path)]
    return same if len(same) else None


def _plain_table(number: int, sizes: _Numbers, stamps: _Numbers) -> pd.DataFrame:
    """The listing of files in no zip; made by columns, as a million of them take seconds by rows."""
    columns: dict[str, Any] = {
        "source": number,
        "archive": "",
        "path": pd.array(np.array(list(sizes), object), dtype="str"),
        "size": np.array(list(sizes.values()), np.int64),
        "stamp": np.array(list(stamps.values()), np.int64),
        "archive_stamp": 0,
        "method": NOT_PACKED,
        "offset": 0,
        "packed_size": 0,
    }
    return pd.DataFrame(columns, columns=FILE_COLUMNS, index=pd.RangeIndex(len(sizes))).astype({"archive": "str"})


def _table(number: int, rows: Listing) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=FILE_COLUMNS[1:])
    table.insert(0, "source", number)
    return table.astype({**dict.fromkeys(_NUMBERS, np.int64), "archive": "str", "path": "str"})


def _shown(path: str) -> str:
    """A name that is no UTF-8 is shown escaped; nothing is found under it, so it is excluded as unreadable."""
    return path if path.isascii() else os.fsencode(path).decode("utf-8", "backslashreplace")


def _walk(folder: str) -> Iterator[tuple[str, os.stat_result]]:
    """Files below `folder` with paths relative to it; links are followed, each folder is entered once."""
    entered: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        relative = waiting.pop()
        status = os.stat(os.path.join(folder, relative))
        if (status.st_dev, status.st_ino) in entered:
            continue
        entered.add((status.st_dev, status.st_ino))
        prefix = f"{relative}/" if relative else ""
        with os.scandir(os.path.join(folder, relative)) as entries:
            for entry in entries:
                if entry.is_symlink() and not os.path.exists(entry.path):  # it leads nowhere, or to itself
                    continue
                if entry.is_dir():
                    waiting.append(prefix + entry.name)
                elif entry.is_file():
                    yield prefix + entry.name, entry.stat()


def is_zip_name(path: str) -> bool:
    """Whether a name is that of a zip."""
    return path[-4:].lower() == ".zip"


def _list_zip(archive: str, open_file: Callable[[], Any]) -> Listing | None:
    """The members of a zip; None where it is none in spite of its name: then it is a file like any other."""
    try:
        with open_file() as file:
            is_cut_short = file.read(len(MEMBER_MARK)) == MEMBER_MARK  # if it has no directory, which stands at the end
            end = file.seek(0, os.SEEK_END)
            is_whole = end >= SMALLEST_ZIP and zipfile.is_zipfile(file)
            if not (is_whole or is_cut_short):
                return None
            with zipfile.ZipFile(file) as directory:
                return [_describe_member(member, end=end) for member in directory.infolist() if not member.is_dir()]
    except FileNotFoundError:  # its name is no UTF-8
        return None
    except Exception as error:  # zipfile raises six kinds, and each storage has its own
        raise SourceError(
            f"source.dicom: the zip {archive} cannot be read ({error}); was it downloaded to its end?"
        ) from None


def _describe_member(member: zipfile.ZipInfo, *, end: int) -> tuple[Any, ...]:
    is_readable = member.compress_type in (STORED, DEFLATED) and not member.flag_bits & ENCRYPTED
    is_inside = member.header_offset + member.compress_size <= end
    method = member.compress_type if is_readable and is_inside else UNREADABLE_METHOD
    numbers = (member.file_size, member.CRC, method, member.header_offset, member.compress_size)
    return member.filename, *(min(number, LARGEST) for number in numbers)


def _list_url(url: str) -> Iterator[Found]:
    try:
        path, found = _ask(url, lambda system, path: (path, system.find(path, detail=True)))
    except OSError as error:
        raise _unreachable(url, error) from None
    files = {name: facts for name, facts in found.items() if not _is_folder_mark(facts)}
    if not files:
        raise SourceError(f"source.dicom: nothing is stored under {url}")
    for name, facts in files.items():
        yield name.removeprefix(f"{path}/") if name != path else "", facts["size"], _stamp_of(facts)


def _open_object(url: str) -> Any:
    system, path = open_storage(url)
    return system.open(path, "rb", block_size=URL_BLOCK_BYTES)


def _is_folder_mark(facts: dict[str, Any]) -> bool:
    """Consoles make an empty object ``folder/`` to show a folder, where storage has none."""
    return facts["type"] == "directory" or str(facts.get("Key", "")).endswith("/")


def _stamp_of(facts: dict[str, Any]) -> int:
    """What stands for the content of a stored object: its ETag, or where there is none its time of change."""
    mark = str(facts.get("ETag") or facts.get("etag") or facts.get("LastModified") or facts.get("mtime") or "")
    return _hash(mark)


def _hash(text: str) -> int:
    """56 bits that stand for a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


@lru_cache(maxsize=8)
def _open_system(protocol: str) -> Any:
    """Nothing of it is cached: what is asked is how things are now.

    Where nobody answers S3's address, that is said after 1 to 3 s; where somebody is silent there, after 90. By itself s3fs takes
    7 s and 6 minutes.
    """
    import fsspec  # only where a URL is given: its S3 part takes a second to import

    options = {"config_kwargs": {"retries": {"mode": "standard", "total_max_attempts": 3}}} if protocol == "s3" else {}
    system = fsspec.filesystem(protocol, use_listings_cache=False, **options)
    if protocol == "s3":
        system.retries = 2  # times those three: for an answer that breaks off
    return system


def open_storage(url: str) -> tuple[Any, str]:
    """The storage of a URL, a file system as fsspec has them, and the URL's path in it."""
    system = _open_system(url.split("://", 1)[0])
    return system, str(system._strip_protocol(url))


def _ask(url: str, question: Callable[[Any, str], Any]) -> Any:
    """The storage's answer about a URL.

    Raises:
        OSError: it is about that one object: not there, not allowed.
        SourceError: the storage itself cannot be reached. Nothing is excluded for that: the run stops and can go on later.
    """
    try:
        return question(*open_storage(url))
    except (OSError, SourceError):
        raise
    except Exception as error:  # each storage has its own family of errors
        raise _unreachable(url, error) from None


def _unreachable(url: str, error: Exception) -> SourceError:
    said = " ".join(str(error).split())[:200]
    return SourceError(
        f"source.dicom: {url} cannot be read ({type(error).__name__}: {said}); check the name, the credentials and the endpoint "
        f"(AWS_ENDPOINT_URL)"
    )


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
        return bytes(_ask(container, lambda system, path: system.cat_file(path, start=start, end=start + length)))
    descriptor = os.open(container, os.O_RDONLY)
    try:
        # memory is taken before the reading: a damaged zip may ask for more than there is
        return os.pread(descriptor, min(length, os.fstat(descriptor).st_size), start)
    finally:
        os.close(descriptor)


def _require_unchanged(place: Place) -> None:
    if URL.match(place.container):
        facts = _ask(place.container, lambda system, path: system.info(path))
        size, stamp = facts["size"], _stamp_of(facts)
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
