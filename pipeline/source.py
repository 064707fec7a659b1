"""Finding the files: in folders, zips, globs and S3-compatible storage. A zip's directory is parsed once, here."""

from __future__ import annotations

import glob
import os
import re
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from pipeline.errors import SourceError
from pipeline.place import DEFLATED, ENCRYPTED, MEMBER_MARK, NOT_PACKED, STORED, UNREADABLE_METHOD
from pipeline.storage import URL, ask, open_storage, stamp_of, stand_in, unreachable

SMALLEST_ZIP = 22
"""An end of the directory, of nothing (APPNOTE 4.3.16); zipfile looks for it from the end, and not every storage lets it."""

LARGEST = 2**62
"""A damaged zip may claim sizes that no table holds."""

URL_BLOCK_BYTES = 1 << 20
"""Read at once of a zip in a store of objects, whose own 50 MB would be read for every small one."""

IDENTITY = ["source", "archive", "path", "size", "stamp"]
FILE_COLUMNS = [*IDENTITY, "archive_stamp", "method", "offset", "packed_size"]
"""`source` is the number of the entry of `source.dicom`; `archive` the zip within it; `path` lies within archive or source; `stamp`
changes with the content: mtime in ns, CRC-32, or a hash of S3's ETag; `archive_stamp` with the zip; the last three say where a
zip's member lies. A file is the same as before where its `IDENTITY` is."""

_NUMBERS = ["source", "size", "stamp", "archive_stamp", "method", "offset", "packed_size"]

Listing = list[tuple[Any, ...]]
"""Rows of a table without their source."""


class Found(NamedTuple):
    """Files of a source, column by column: a tuple a file would cost more than asking the disk, a million times."""

    paths: list[str]
    sizes: list[int]
    stamps: list[int]

    def add(self, path: str, size: int, stamp: int) -> None:
        self.paths.append(path)
        self.sizes.append(size)
        self.stamps.append(stamp)


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


def one_of_each_source(sources: Sequence[str], files: pd.DataFrame) -> list[str]:
    """A file, or the zip that holds it, of each source on a disk: who sees it, sees that source."""
    first = containers(sources, files.drop_duplicates("source"))
    return [container for container in first if not URL.match(container) and os.path.exists(container)]


def is_there(source: str) -> bool:
    """Whether a source is there now.

    Raises:
        SourceError: the storage of a URL does not answer, or refuses.
    """
    if not URL.match(source):
        return os.path.exists(_root(source))
    try:
        return bool(ask(source, lambda system, path: system.info(path)))
    except FileNotFoundError:
        return False
    except OSError as error:  # no permission, among others
        raise unreachable(source, error) from None


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
        return _open_archives(number, source, _list_url(number, source), known, _open_object)
    root = _root(source)
    tops = _match(source) if _is_glob(source) else [source]
    if not tops or not os.path.exists(tops[0]):
        what = "matches nothing" if _is_glob(source) else "does not exist"
        raise SourceError(
            f"source.dicom: {source} {what}; set it to a folder of DICOM files, a .zip, a file, a glob, an s3:// URL, or a list of these"
        )
    found = Found([], [], [])
    for top in tops:
        relative = "" if os.path.normpath(top) == os.path.normpath(root) else os.path.relpath(top, root)
        if os.path.isdir(top):
            _walk(top, relative, found)
        elif os.path.isfile(top):  # not a pipe, say
            status = os.stat(top)
            found.add(relative, status.st_size, status.st_mtime_ns)
    table = _plain_table(number, found)
    if len(tops) > 1:  # they may lie in one another
        table = _once(root, table) if "**" in source else table.drop_duplicates("path")
    return _open_archives(number, root, table, known, lambda name: open(name, "rb"))


def _match(pattern: str) -> list[str]:
    """What a glob matches and is there, in order."""
    return sorted(top for top in glob.glob(pattern, recursive=True, include_hidden=True) if os.path.exists(top))


def _once(root: str, files: pd.DataFrame) -> pd.DataFrame:
    """Each file by its shortest name: `**` follows a link that leads up round and round."""

    def which(path: str) -> Any:
        try:
            status = os.stat(_join(root, path))
        except FileNotFoundError:  # its name is no UTF-8, and shown in another way
            return path
        return status.st_dev, status.st_ino

    files = files.iloc[files["path"].str.len().argsort(kind="stable")]
    return files[~files["path"].map(which).duplicated()]


def _open_archives(
    number: int, root: str, files: pd.DataFrame, known: pd.DataFrame | None, open_file: Callable[[str], Any]
) -> pd.DataFrame:
    """The listing of a source: its files, then the members of its zips, each in order."""
    is_archive = np.zeros(len(files), bool)
    archives: dict[str, pd.DataFrame] = {}
    names = files["path"].where(files["path"] != "", root)
    for row in np.flatnonzero(names.str.lower().str.endswith(".zip")):
        path, size, stamp = files["path"].iloc[row], files["size"].iloc[row], files["stamp"].iloc[row]
        archive_stamp = stand_in(f"{size} {stamp}")
        table = _known_members(known, number, path, archive_stamp)
        if table is None:
            name = _join(root, path)
            members = _list_zip(name, partial(open_file, name))
            if members is None:
                continue
            table = _table(number, [(path, *member[:3], archive_stamp, *member[3:]) for member in members])
        archives[path], is_archive[row] = table, True
    tables = [files[~is_archive], *(archives[path] for path in sorted(archives))]
    tables = [table.sort_values("path", kind="stable", ignore_index=True) for table in tables]
    return pd.concat(tables, ignore_index=True) if archives else tables[0]


def _known_members(known: pd.DataFrame | None, number: int, path: str, archive_stamp: int) -> pd.DataFrame | None:
    if known is None or not len(known):
        return None
    same = known[(known["source"] == number) & (known["archive_stamp"] == archive_stamp) & (known["archive"] == path)]
    return same if len(same) else None


def _plain_table(number: int, found: Found) -> pd.DataFrame:
    """The listing of files in no zip."""
    shown = [path if path.isascii() else _shown(path) for path in found.paths]
    columns: dict[str, Any] = {
        "source": number,
        "archive": "",
        "path": pd.array(np.array(shown, object), dtype="str"),
        "size": np.array(found.sizes, np.int64),
        "stamp": np.array(found.stamps, np.int64),
        "archive_stamp": 0,
        "method": NOT_PACKED,
        "offset": 0,
        "packed_size": 0,
    }
    return pd.DataFrame(columns, columns=FILE_COLUMNS, index=pd.RangeIndex(len(shown))).astype({"archive": "str"})


def _table(number: int, rows: Listing) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=FILE_COLUMNS[1:])
    table.insert(0, "source", number)
    return table.astype({**dict.fromkeys(_NUMBERS, np.int64), "archive": "str", "path": "str"})


def _shown(path: str) -> str:
    """A name that is no UTF-8 is shown escaped; nothing is found under it, so it is excluded as unreadable."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _walk(top: str, relative: str, found: Found) -> None:
    """Add the files below `top`, which is `relative` in its source; links are followed, each folder is entered once."""
    entered: set[tuple[int, int]] = set()
    waiting = [(top, f"{relative}/" if relative else "")]
    while waiting:
        folder, prefix = waiting.pop()
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # removed just now
            continue
        except OSError as error:
            raise SourceError(
                f"source.dicom: the folder {folder} cannot be read ({error.strerror}); allow it, move it away, or list the folders beside it"
            ) from None
        try:
            status = os.fstat(descriptor)
            if (status.st_dev, status.st_ino) not in entered:
                entered.add((status.st_dev, status.st_ino))
                inner = _add_files(folder, descriptor, prefix, found)
                waiting += [(f"{folder}/{name}", f"{prefix}{name}/") for name in inner]
        finally:
            os.close(descriptor)


def _add_files(folder: str, descriptor: int, prefix: str, found: Found) -> list[str]:
    """Add the files of one folder; its own folders are returned."""
    inner = []
    with os.scandir(descriptor) as entries:  # of what is open: by its path each file would cost a fifth more
        for entry in entries:
            if entry.is_symlink() and not os.path.exists(f"{folder}/{entry.name}"):  # it leads nowhere, or to itself
                continue
            if entry.is_file():
                try:
                    status = entry.stat()
                except FileNotFoundError:  # removed just now
                    continue
                found.add(prefix + entry.name, status.st_size, status.st_mtime_ns)
            elif entry.is_dir():
                inner.append(entry.name)
    return inner


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
                # of members with one name the last counts, as it does where a zip is unpacked
                members = {member.filename: member for member in directory.infolist()}
            if is_cut_short and not members:
                raise zipfile.BadZipFile("it begins with a member and lists none")
            return [_describe_member(one, end=end) for name, one in members.items() if not name.endswith("/")]
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


def _list_url(number: int, url: str) -> pd.DataFrame:
    try:
        path, listed = ask(url, lambda system, path: (path, system.find(path, detail=True)))
    except OSError as error:
        raise unreachable(url, error) from None
    files = {name: facts for name, facts in listed.items() if not _is_folder_mark(facts)}
    if not files:
        raise SourceError(f"source.dicom: nothing is stored under {url}")
    paths = [name.removeprefix(f"{path}/") if name != path else "" for name in files]
    found = Found(paths, [facts["size"] for facts in files.values()], [stamp_of(facts) for facts in files.values()])
    return _plain_table(number, found)


def _open_object(url: str) -> Any:
    system, path = open_storage(url)
    return system.open(path, "rb", block_size=URL_BLOCK_BYTES)


def _is_folder_mark(facts: dict[str, Any]) -> bool:
    """Consoles make an empty object ``folder/`` to show a folder, where storage has none."""
    return facts["type"] == "directory" or str(facts.get("Key", "")).endswith("/")
