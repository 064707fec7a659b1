"""Read in place: a zip, a glob, a list or a bucket gives the same manifest and pixels as the folder, and no fault a wrong slice.

The authority for zips is zipfile, which packs them here; S3 is a real server process on loopback.
"""

from __future__ import annotations

import gc
import io
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import s3fs
import xarray as xr
from fsspec.implementations.memory import MemoryFileSystem

import pipeline.index
import pipeline.preprocess
import pipeline.storage
from pipeline.errors import IchorError, SourceError, StoreError
from pipeline.folds import deal_folds
from pipeline.index import build_manifest
from pipeline.manifest import EXCLUDED, account, kept, write_manifest
from pipeline.parts import split_slices
from pipeline.place import ChangedError, DamagedError, Place, read_head, read_whole
from pipeline.preprocess import preprocess
from pipeline.publish import send_store
from pipeline.source import FILE_COLUMNS, containers, find_files
from pipeline.store import Store
from tests.conftest import SIGNED_16, Cohort, tree_bytes

WHERE = [name for name in FILE_COLUMNS if name not in ("path", "size")]
"""Columns that say where a file lies: all that may differ between a folder and the same files elsewhere."""


def index(cohort: Cohort, *sources: Path | str, known: pd.DataFrame | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    config = cohort.config(source__dicom=[str(source) for source in sources])
    manifest, headers, _ = build_manifest(config, known)
    if headers is None:
        assert known is not None
        return manifest, known
    return manifest, headers


def convert(
    cohort: Cohort, manifest: pd.DataFrame, *sources: Path | str, data: Path | None = None, **options: Any
) -> pd.DataFrame:
    """Preprocess; returns the files whose status changed."""
    config = cohort.config(source__dicom=[str(source) for source in sources])
    return preprocess(config, manifest, data=data or cohort.data, **options)[1]


def run(cohort: Cohort, *sources: Path | str) -> tuple[pd.DataFrame, xr.Dataset]:
    """The manifest of some sources, less where the files lie, and their store."""
    manifest, _ = index(cohort, *sources)
    convert(cohort, manifest, *sources)
    return manifest.drop(columns=WHERE), load(cohort.data / "store.zarr")


def load(store: Path | str, **options: Any) -> xr.Dataset:
    return xr.open_zarr(store, chunks=None, **options).load()


def reasons(manifest: pd.DataFrame) -> dict[str, str]:
    return dict(zip(manifest["path"], manifest["reason"], strict=True))


def places(*sources: Path | str) -> dict[str, Place]:
    """Where each file lies, by its path."""
    names = [str(source) for source in sources]
    files = find_files(names)
    columns = [files[name].tolist() for name in ("size", "stamp", "method", "offset", "packed_size")]
    return dict(zip(files["path"], map(Place, containers(names, files), *columns), strict=True))


@pytest.fixture
def mixed(cohort: Cohort) -> Cohort:
    """Two studies of both of RSNA's forms, and files that are excluded."""
    cohort.add_study(1, 4, labels=[[0, 0, 0, 0, 1, 1], None, [0] * 6, [0] * 6])
    cohort.add_study(2, 3, form=SIGNED_16)
    (cohort.dicom / "sub").mkdir()
    (cohort.dicom / "ID_000020001.dcm").rename(cohort.dicom / "sub" / "without suffix")
    (cohort.dicom / "notes.txt").write_text("nothing")
    (cohort.dicom / "empty.dcm").touch()
    return cohort


# ---- zips


class Pipe(io.RawIOBase):
    """A file that cannot seek: what zips into it must put sizes and checksums behind each member."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        return self.file.write(content)

    def close(self) -> None:
        self.file.close()
        super().close()


def pack(folder: Path, archive: Path, *, method: int = zipfile.ZIP_STORED, piped: bool = False, **options: Any) -> Path:
    """Pack a folder, its folders too, with zipfile."""
    target: Any = Pipe(archive) if piped else archive
    with zipfile.ZipFile(target, "w", method) as packed:
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            if path.is_dir():
                packed.mkdir(name)
            else:
                info = zipfile.ZipInfo.from_file(path, name)
                info.compress_type = method
                with packed.open(info, "w", **options) as member:
                    member.write(path.read_bytes())
    if piped:
        target.close()
    return archive


def pack_behind_a_prefix(folder: Path, archive: Path) -> Path:
    pack(folder, archive, method=zipfile.ZIP_DEFLATED)
    archive.write_bytes(b"#!/bin/sh\nexit\n" * 100 + archive.read_bytes())
    with zipfile.ZipFile(archive, "a") as packed:
        packed.comment = b"a comment " * 500
    return archive


def pack_with_long_local_headers(folder: Path, archive: Path) -> Path:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    members = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    return write_zip(archive, members, local_extra=struct.pack("<2H", 0xCAFE, 3000) + bytes(3000))


def write_zip(
    archive: Path,
    members: dict[str, bytes],
    *,
    flags: int = 0,
    method: int = 0,
    size: int | None = None,
    local_extra: bytes = b"",
) -> Path:
    """A zip by the letter of APPNOTE 4.3, with what zipfile would not write."""
    content, directory = bytearray(), bytearray()
    for name, data in members.items():
        packed = zlib.compress(data, wbits=-15) if method == zipfile.ZIP_DEFLATED else data
        facts = struct.pack("<5H3I", 20, flags, method, 0, 0, zlib.crc32(data), len(packed), size or len(data))
        lengths = struct.pack("<2H", len(name), len(local_extra))
        directory += b"PK\x01\x02\x14\0" + facts + struct.pack("<5H2I", len(name), 0, 0, 0, 0, 0, len(content))
        directory += name.encode()
        content += b"PK\x03\x04" + facts + lengths + name.encode() + local_extra + packed
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, len(members), len(members), len(directory), len(content), 0)
    archive.write_bytes(content + directory + end)
    return archive


PACKERS: dict[str, Callable[[Path, Path], Path]] = {
    "stored": pack,
    "deflated": lambda folder, archive: pack(folder, archive, method=zipfile.ZIP_DEFLATED),
    "zip64": lambda folder, archive: pack(folder, archive, force_zip64=True),
    "piped": lambda folder, archive: pack(folder, archive, method=zipfile.ZIP_DEFLATED, piped=True),
    "prefix and comment": pack_behind_a_prefix,
    "long local headers": pack_with_long_local_headers,
}


@pytest.mark.parametrize("packer", PACKERS)
def test_zip_gives_the_manifest_and_the_store_of_its_folder(mixed: Cohort, packer: str) -> None:
    manifest, _ = run(mixed, mixed.dicom)
    store = tree_bytes(mixed.data / "store.zarr")
    archive = PACKERS[packer](mixed.dicom, mixed.folder / "RSNA.ZIP")
    packed_manifest, _ = run(mixed, archive)
    pd.testing.assert_frame_equal(packed_manifest, manifest)
    assert tree_bytes(mixed.data / "store.zarr") == store  # training need not run again
    assert account(index(mixed, archive)[0])["reasons"] == {"not_dicom": 2}


def test_touched_or_copied_files_give_the_same_store(mixed: Cohort) -> None:
    run(mixed, mixed.dicom)
    store = tree_bytes(mixed.data / "store.zarr")
    shutil.copytree(mixed.dicom, mixed.folder / "copy", copy_function=shutil.copyfile)
    shutil.rmtree(mixed.dicom)
    (mixed.folder / "copy").rename(mixed.dicom)
    run(mixed, mixed.dicom)
    assert tree_bytes(mixed.data / "store.zarr") == store


def test_zip_of_more_than_65535_files_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "large.zip", "w") as packed:
        for number in range(65_600):
            packed.writestr(zipfile.ZipInfo(f"{number:05d}"), b"")
        packed.writestr("last", b"the last one")
    files = find_files([str(tmp_path / "large.zip")])
    assert len(files) == 65_601
    assert files["path"].is_unique
    assert read_whole(places(tmp_path / "large.zip")["last"]) == b"the last one"


def test_zip_is_parsed_by_index_once_and_not_by_preprocess(mixed: Cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = pack(mixed.dicom, mixed.folder / "all.zip")
    opened: list[Any] = []
    real = zipfile.ZipFile
    monkeypatch.setattr(zipfile, "ZipFile", lambda *given: opened.append(given) or real(*given))
    manifest, _ = index(mixed, archive)
    assert len(opened) == 1
    convert(mixed, manifest, archive)
    assert len(opened) == 1
    assert Store(mixed.data / "store.zarr").num_slices.tolist() == [4, 3]


def test_folder_zip_in_a_folder_and_file_are_taken_together(mixed: Cohort) -> None:
    manifest, store = run(mixed, mixed.dicom)
    parts = [mixed.folder / "a", mixed.folder / "b", mixed.folder / "c.dcm", mixed.folder / "loose"]
    for folder in (*parts[:2], parts[3]):
        folder.mkdir()
    paths = [path for path in sorted(mixed.dicom.rglob("*")) if path.is_file()]
    for number, path in enumerate(paths):
        path.rename(parts[2] if path.name == "ID_000010000.dcm" else parts[0 if number % 2 else 3] / path.name)
    pack(parts[3], parts[1] / "inner.zip", method=zipfile.ZIP_DEFLATED)
    found, taken = run(mixed, *parts[:3])
    xr.testing.assert_identical(taken.drop_attrs(), store.drop_attrs())
    assert account(manifest) == account(found)
    sources, _ = index(mixed, *parts[:3])
    assert set(zip(sources["source"], sources["archive"], strict=True)) == {(0, ""), (1, "inner.zip"), (2, "")}


def test_zips_are_found_by_a_glob(mixed: Cohort) -> None:
    _, store = run(mixed, mixed.dicom)
    for number in (1, 2):
        folder = mixed.folder / f"part{number}"
        folder.mkdir()
        for path in [path for path in mixed.dicom.rglob(f"ID_0000{number}*") if path.is_file()]:
            path.rename(folder / path.name)
        pack(folder, mixed.folder / f"part{number}.zip")
    (mixed.dicom / "sub" / "without suffix").rename(mixed.folder / "loose.dcm")
    manifest, _ = index(mixed, f"{mixed.folder}/*.zip", f"{mixed.folder}/l*e.dcm")
    convert(mixed, manifest, f"{mixed.folder}/*.zip", f"{mixed.folder}/l*e.dcm")
    assert set(manifest["archive"]) == {"part1.zip", "part2.zip", ""}
    xr.testing.assert_identical(load(mixed.data / "store.zarr").drop_attrs(), store.drop_attrs())


def test_what_a_zip_holds_beside_slices_is_accounted_for(cohort: Cohort) -> None:
    cohort.add_study(1, 2)
    content = (cohort.dicom / "ID_000010000.dcm").read_bytes()
    archive = cohort.dicom / "odd.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        packed.mkdir("folder")
        packed.writestr("folder/empty", b"")
        packed.writestr("folder/deflated empty", b"", zipfile.ZIP_DEFLATED)
        packed.writestr("bzip2.dcm", content, zipfile.ZIP_BZIP2)
        packed.writestr("lzma.dcm", content, zipfile.ZIP_LZMA)
        packed.writestr("inner.zip", archive.read_bytes() if archive.exists() else b"PK\x03\x04")
        packed.writestr("../../outside", b"text")
        packed.writestr("n\xe4me".encode("latin-1").decode("cp437"), b"text")
    write_zip(cohort.dicom / "encrypted.zip", {"secret.dcm": content}, flags=1)
    (cohort.dicom / "rubbish.zip").write_bytes(b"not a zip at all" * 10)
    (cohort.dicom / "empty.zip").touch()
    manifest, _ = index(cohort, cohort.dicom)
    found = reasons(manifest)
    assert {name: found.pop(name) for name in ("bzip2.dcm", "lzma.dcm", "secret.dcm")} == dict.fromkeys(
        ("bzip2.dcm", "lzma.dcm", "secret.dcm"), "zip_method"
    )
    assert {name for name, reason in found.items() if reason == "not_dicom"} == {
        "folder/empty", "folder/deflated empty", "inner.zip", "../../outside", "rubbish.zip", "empty.zip",
        "n\xe4me".encode("latin-1").decode("cp437"),
    }  # fmt: skip
    assert account(manifest)["used"] == 2
    assert account(manifest)["files"] == 12


@pytest.mark.parametrize("share", [0.4, 0.999])
def test_zip_that_was_cut_short_is_an_error_that_names_it(mixed: Cohort, share: float) -> None:
    archive = pack(mixed.dicom, mixed.dicom / "cut.zip")
    os.truncate(archive, int(archive.stat().st_size * share))
    with pytest.raises(SourceError, match=r"the zip .*/cut\.zip cannot be read .* was it downloaded to its end"):
        find_files([str(mixed.dicom)])


def test_damaged_directory_of_a_zip_is_an_error_or_excluded(cohort: Cohort) -> None:
    cohort.dicom.mkdir()
    for number in range(3):
        (cohort.dicom / f"é{number}").write_bytes(b"abc" * 100)
    archive = pack(cohort.dicom, cohort.folder / "a.zip", method=zipfile.ZIP_DEFLATED)
    content = archive.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for at in rng.integers(len(content) // 2, len(content), rng.integers(1, 5)).tolist():
            damaged[at] = rng.integers(256)
        archive.write_bytes(damaged)
        try:
            found = places(archive)
        except SourceError:
            refused += 1
            continue
        for place in found.values():
            for read in (read_head, read_whole):
                with suppress(ChangedError):
                    assert b"abcabc".startswith(read(place)[:6])
    assert 0 < refused < 300


def test_of_members_with_one_name_the_last_counts_however_often_it_is_indexed(cohort: Cohort) -> None:
    """As packers leave them that append."""
    names = cohort.add_study(1, 3)
    archive = pack(cohort.dicom, cohort.folder / "all.zip")
    with zipfile.ZipFile(archive, "a") as packed, warnings.catch_warnings(action="ignore"):
        packed.writestr(f"{names[0]}.dcm", b"an older one")
        packed.write(cohort.dicom / f"{names[0]}.dcm", f"{names[0]}.dcm")
        packed.write(cohort.dicom / f"{names[1]}.dcm", f"{names[1]}.dcm")
    known = None
    for run_number in range(4):
        manifest, known = (
            index(cohort, archive, cohort.dicom / "notes", known=known) if run_number else index(cohort, archive)
        )
        assert reasons(manifest)[f"{names[0]}.dcm"] == ""
        assert account(manifest)["files"] == 3 + run_number
        (cohort.dicom / "notes").mkdir(exist_ok=True)
        (cohort.dicom / "notes" / f"{run_number}.txt").write_text("nothing")


def test_end_of_a_directory_within_a_zips_comment_is_an_error(cohort: Cohort) -> None:
    cohort.add_study(1, 2)
    archive = pack(cohort.dicom, cohort.folder / "all.zip")
    with zipfile.ZipFile(archive, "a") as packed:
        packed.comment = b"PK\5\6" + bytes(18)
    with pytest.raises(SourceError, match=r"all.zip cannot be read \(it begins with a member and lists none\)"):
        index(cohort, archive)


def test_member_without_a_name_stops_nothing(cohort: Cohort) -> None:
    cohort.add_study(1, 2)
    archive = pack(cohort.dicom, cohort.folder / "all.zip")
    with zipfile.ZipFile(archive, "a") as packed:
        packed.writestr(zipfile.ZipInfo(""), b"nothing")
    assert account(index(cohort, archive)[0])["used"] == 2


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_rewritten_after_index_is_an_error_and_never_a_wrong_slice(cohort: Cohort, method: int) -> None:
    cohort.add_study(1, 3)
    archive = pack(cohort.dicom, cohort.folder / "all.zip", method=method)
    manifest, headers = index(cohort, archive)
    path = cohort.dicom / "ID_000010001.dcm"
    content = bytearray(path.read_bytes())
    content[-3000:-2000] = content[-2000:-1000]  # another slice of the same size: stored, it lies at the same place
    path.write_bytes(content)
    pack(cohort.dicom, archive, method=method)
    with pytest.raises(
        SourceError, match=r"changed, vanished or could not be read after index, 'ID_000010001\.dcm' first"
    ):
        convert(cohort, manifest, archive)
    assert not (cohort.data / "store.zarr").exists()
    manifest, _ = index(cohort, archive, known=headers)
    convert(cohort, manifest, archive)
    expected, _ = index(cohort, cohort.dicom)
    packed = load(cohort.data / "store.zarr")
    convert(cohort, expected, cohort.dicom)
    xr.testing.assert_identical(packed.drop_attrs(), load(cohort.data / "store.zarr").drop_attrs())


@pytest.mark.parametrize("packer", ["stored", "deflated", "piped"])
def test_member_that_fails_its_checksum_is_excluded_by_name_and_the_rest_goes_on(cohort: Cohort, packer: str) -> None:
    cohort.add_study(1, 3)
    archive = PACKERS[packer](cohort.dicom, cohort.folder / "all.zip")
    place = places(archive)["ID_000010001.dcm"]
    content = bytearray(archive.read_bytes())
    content[place.offset + place.packed_size // 2] ^= 0x55
    archive.write_bytes(content)
    with pytest.raises(DamagedError):
        read_whole(place)
    manifest, headers = index(cohort, archive)
    assert account(manifest)["used"] == 3  # the header is sound
    for _ in range(2):
        faults = convert(cohort, manifest, archive)
        assert reasons(faults) == {"ID_000010001.dcm": "zip_damaged"}
        assert Store(cohort.data / "store.zarr").num_slices.tolist() == [2]
    PACKERS[packer](cohort.dicom, archive)  # fetched anew: it is not remembered
    convert(cohort, index(cohort, archive, known=headers)[0], archive)
    assert Store(cohort.data / "store.zarr").num_slices.tolist() == [3]


def test_damaged_copy_in_a_zip_is_compared_again_when_the_zip_is_mended(cohort: Cohort) -> None:
    cohort.add_study(1, 3)
    shutil.copy(cohort.dicom / "ID_000010001.dcm", cohort.dicom / "copy.dcm")
    archive = pack(cohort.dicom, cohort.folder / "all.zip")
    whole = archive.read_bytes()
    place = places(archive)["ID_000010001.dcm"]
    damaged = bytearray(whole)
    damaged[place.offset + place.packed_size // 2] ^= 0x55
    archive.write_bytes(damaged)
    manifest, headers = index(cohort, archive)
    assert account(manifest)["reasons"] == {"zip_damaged": 1}
    archive.write_bytes(whole)
    manifest, _ = index(cohort, archive, known=headers)
    assert account(manifest)["reasons"] == {"duplicate": 1}


def test_member_that_unpacks_to_more_than_it_says_fills_no_memory(tmp_path: Path) -> None:
    bomb = write_zip(tmp_path / "bomb.zip", {"a": bytes(50_000_000)}, method=zipfile.ZIP_DEFLATED, size=1000)
    place = places(bomb)["a"]
    tracemalloc.start()
    try:
        with pytest.raises(DamagedError):
            read_whole(place)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1_000_000


def test_member_that_says_it_is_larger_than_the_zip_asks_for_no_memory(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "a.zip", {"a": b"abc"})
    place = places(archive)["a"]._replace(packed_size=2**62, size=2**62)
    with pytest.raises(ChangedError):
        read_whole(place)
    with pytest.raises(ChangedError):
        read_whole(place._replace(method=zipfile.ZIP_DEFLATED))


def test_unchanged_zip_is_not_read_again_and_of_a_changed_one_only_what_changed(
    mixed: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = pack(mixed.dicom, mixed.dicom / "all.zip")
    for path in mixed.dicom.glob("*.dcm"):
        path.unlink()
    first, headers = index(mixed, mixed.dicom)
    read: list[int] = []
    real = pipeline.index.read_headers
    monkeypatch.setattr(
        pipeline.index, "read_headers", lambda place, **given: read.append(place.size) or real(place, **given)
    )
    again, same = index(mixed, mixed.dicom, known=headers)
    assert read == []
    pd.testing.assert_frame_equal(again, first)
    with zipfile.ZipFile(archive, "a") as packed:
        packed.writestr("more.txt", b"x" * 77)
    os.utime(mixed.dicom / "notes.txt", ns=(1, 1))
    index(mixed, mixed.dicom, known=same)
    assert sorted(read) == [7, 77]


# ---- folders and globs


def test_globs_find_each_file_once(cohort: Cohort) -> None:
    names = [".hidden", "a.dcm", "sub/.hidden/b", "sub/c.dcm"]
    for name in names:
        (cohort.dicom / name).parent.mkdir(parents=True, exist_ok=True)
        (cohort.dicom / name).write_bytes(b"x")
    (cohort.dicom / "round").symlink_to(cohort.dicom)
    (cohort.dicom / "itself").symlink_to(cohort.dicom / "itself")
    (cohort.dicom / "nowhere").symlink_to(cohort.folder / "nothing")
    os.mkfifo(cohort.dicom / "pipe")
    for pattern in ("", "/", "/**", "/**/", "/**/*"):
        assert find_files([f"{cohort.dicom}{pattern}"])["path"].tolist() == names, pattern
    assert find_files([f"{cohort.dicom}/**/*.dcm"])["path"].tolist() == ["a.dcm", "sub/c.dcm"]
    assert find_files([f"{cohort.folder}/d*/[as]*"])["path"].tolist() == [f"dicom/{name}" for name in names[1:]]
    for place in places(f"{cohort.dicom}/**").values():
        assert read_whole(place) == b"x"


def test_folder_whose_name_looks_like_a_glob_is_a_folder(cohort: Cohort) -> None:
    folder = cohort.folder / "head [CT]*"
    folder.mkdir()
    (folder / "a").write_bytes(b"abc")
    assert read_whole(places(folder)["a"]) == b"abc"


def test_glob_that_matches_nothing_is_an_error(cohort: Cohort) -> None:
    with pytest.raises(SourceError, match=r"\*\.zip matches nothing; set it to a folder"):
        find_files([f"{cohort.folder}/*.zip"])


@pytest.mark.parametrize("source", ["dicom/*.dcm", "all.zip", "dicom"])
def test_source_that_is_gone_at_preprocess_is_an_error(mixed: Cohort, source: str) -> None:
    pack(mixed.dicom, mixed.folder / "all.zip")
    manifest, _ = index(mixed, mixed.folder / source)
    shutil.rmtree(mixed.dicom)
    (mixed.folder / "all.zip").unlink()
    with pytest.raises(SourceError, match="was there when index ran and is gone"):
        convert(mixed, manifest, mixed.folder / source)


def test_shorter_list_of_sources_than_index_had_is_an_error(mixed: Cohort) -> None:
    manifest, _ = index(mixed, mixed.dicom / "notes.txt", mixed.dicom)
    with pytest.raises(SourceError, match="has 1 entries and had at least 2 when index ran; run index again"):
        convert(mixed, manifest, mixed.dicom)


def test_slices_without_labels_are_stored_and_stay_out_of_training(cohort: Cohort) -> None:
    for number in range(1, 9):
        labels = [[0, 0, 0, 0, number % 2, number % 2]] * 3 if number < 7 else [None] * 3
        cohort.add_study(number, 3, labels=labels)
    test = cohort.folder / "stage_2_test"
    test.mkdir()
    for path in [*cohort.dicom.glob("ID_00007*"), *cohort.dicom.glob("ID_00008*")]:
        path.rename(test / path.name)
    archive = pack(test, cohort.folder / "stage_2_test.zip")
    manifest, _ = index(cohort, cohort.dicom, archive)
    assert (manifest["status"] != EXCLUDED).sum() == 24
    convert(cohort, manifest, cohort.dicom, archive)
    store = Store(cohort.data / "store.zarr")
    unlabelled = np.flatnonzero((store.labels < 0).all(axis=(1, 2)))
    assert store.study[unlabelled].tolist() == ["ID_0000000007", "ID_0000000008"]
    config = cohort.config(folds__count=3)
    for fold in range(3):
        parts = split_slices(config, store, fold, deal_folds(config, store))
        learnt = np.concatenate([parts.training, parts.validation])
        assert len(learnt) > 0
        assert not np.isin(learnt[:, 0], unlabelled).any()
        assert set(parts.unlabelled[:, 0]) == set(unlabelled)


# ---- S3


@dataclass(frozen=True)
class Server:
    """An S3 server on loopback, which holds what the tests put there."""

    endpoint: str
    files: s3fs.S3FileSystem

    def put(self, folder: Path, bucket: str) -> str:
        """Put a folder's files below ``bucket/head-ct``; returns the URL."""
        if not self.files.exists(bucket):
            self.files.mkdir(bucket)
        for path in folder.rglob("*"):
            if path.is_file():
                self.files.put_file(str(path), f"{bucket}/head-ct/{path.relative_to(folder)}")
        return f"s3://{bucket}/head-ct"

    def require_credentials(self, is_required: bool) -> None:
        requests_without = b"0" if is_required else b"1000000000"
        headers = {"Content-Type": "application/octet-stream"}
        address = f"{self.endpoint}/moto-api/reset-auth"
        urllib.request.urlopen(urllib.request.Request(address, requests_without, headers), timeout=10).close()


def forget_connections() -> None:
    pipeline.storage._open_system.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # s3fs and zarr leave their sessions to the garbage collector
        gc.collect()


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "reader",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        forget_connections()
        try:
            wait_for(port, process)
            yield Server(settings["AWS_ENDPOINT_URL"], s3fs.S3FileSystem(use_listings_cache=False))
        finally:
            process.kill()
            process.wait()
            forget_connections()


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise AssertionError("the S3 server ended at once")


@pytest.fixture
def nobody(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No one answers where S3 should be."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    forget_connections()
    yield
    monkeypatch.undo()
    forget_connections()


def test_bucket_gives_the_manifest_and_the_store_of_its_folder(mixed: Cohort, server: Server) -> None:
    manifest, store = run(mixed, mixed.dicom)
    url = server.put(mixed.dicom, "folder")
    server.files.pipe("folder/head-ct-of-others/x.dcm", b"x")  # the prefix is a folder's name, not the start of one
    server.files.call_s3("put_object", Bucket="folder", Key="head-ct/sub/", Body=b"")  # consoles mark folders so
    found, remote = run(mixed, url)
    pd.testing.assert_frame_equal(found, manifest)
    xr.testing.assert_identical(remote.drop_attrs(), store.drop_attrs())


def test_zip_in_a_bucket_gives_the_store_of_its_folder_on_dask_workers_too(
    mixed: Cohort, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, store = run(mixed, mixed.dicom)
    (mixed.folder / "packed").mkdir()
    pack(mixed.dicom, mixed.folder / "packed" / "all.zip", method=zipfile.ZIP_DEFLATED)
    (mixed.folder / "packed" / "rubbish.zip").write_bytes(b"no zip")
    url = server.put(mixed.folder / "packed", "zips")
    found, _ = index(mixed, url)
    assert found["archive"].value_counts().to_dict() == {"all.zip": len(manifest), "": 1}
    monkeypatch.setattr(pipeline.preprocess, "SLICES_PER_TASK", 2)
    config = mixed.config(source__dicom=url, preprocess__workers=2)
    preprocess(config, found, data=mixed.data)
    xr.testing.assert_identical(load(mixed.data / "store.zarr").drop_attrs(), store.drop_attrs())


@pytest.mark.parametrize("is_deleted", [False, True])
def test_object_changed_after_index_is_an_error_that_names_it(cohort: Cohort, server: Server, is_deleted: bool) -> None:
    cohort.add_study(1, 2)
    url = server.put(cohort.dicom, f"changing-{is_deleted}".lower())
    manifest, headers = index(cohort, url)
    name = f"{url}/ID_000010001.dcm"
    content = bytearray(server.files.cat_file(name))
    content[-1000:-500] = content[-500:]  # of the same size, with another ETag
    server.files.rm_file(name)
    if not is_deleted:
        server.files.pipe_file(name, bytes(content))
    with pytest.raises(
        SourceError, match=r"changed, vanished or could not be read after index, 'ID_000010001\.dcm' first"
    ):
        convert(cohort, manifest, url)
    assert not (cohort.data / "store.zarr").exists()
    again, _ = index(cohort, url, known=headers)
    convert(cohort, again, url)
    assert Store(cohort.data / "store.zarr").num_slices.tolist() == [2 - is_deleted]


def test_unchanged_objects_are_not_read_again(cohort: Cohort, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    cohort.add_study(1, 3)
    url = server.put(cohort.dicom, "rescan")
    first, headers = index(cohort, url)
    monkeypatch.setattr(pipeline.index, "read_headers", lambda *_, **__: pytest.fail("an object was read"))
    again, _ = index(cohort, url, known=headers)
    pd.testing.assert_frame_equal(again, first)


def test_storage_that_nobody_answers_for_is_said_by_the_stage(
    cohort: Cohort, run_stage: Callable[..., Any], nobody: None
) -> None:
    cohort.write_params(source__dicom="s3://bucket/head-ct")
    ran = run_stage("index")
    assert ran.code == 1
    assert ran.err.startswith("error: source.dicom: s3://bucket/head-ct cannot be read (EndpointConnectionError: ")
    assert "check the name, the credentials and the endpoint (AWS_ENDPOINT_URL)" in ran.err
    assert "Traceback" not in ran.err
    assert ran.err.count("\n") == 1


def test_absent_bucket_empty_prefix_and_wrong_credentials_are_errors(cohort: Cohort, server: Server) -> None:
    cohort.add_study(1, 1)
    url = server.put(cohort.dicom, "locked")
    with pytest.raises(SourceError, match=r"s3://absent/x cannot be read \(FileNotFoundError: .*bucket does not exist"):
        find_files(["s3://absent/x"])
    with pytest.raises(SourceError, match="nothing is stored under s3://locked/other"):
        find_files(["s3://locked/other"])
    manifest, _ = index(cohort, url)
    server.require_credentials(True)
    try:
        with pytest.raises(
            SourceError, match=r"s3://locked/head-ct cannot be read \(PermissionError: .*AWS Access Key"
        ):
            find_files([url])
        with pytest.raises(SourceError, match=r"s3://locked/head-ct cannot be read \(PermissionError"):
            convert(cohort, manifest, url)
    finally:
        server.require_credentials(False)
    server.files.rm(f"{url}/", recursive=True)
    with pytest.raises(SourceError, match="was there when index ran and is gone"):
        convert(cohort, manifest, url)


def test_storage_that_goes_away_stops_the_run_and_excludes_nothing(
    cohort: Cohort, server: Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    cohort.add_study(1, 2)
    url = server.put(cohort.dicom, "leaving")
    manifest, _ = index(cohort, url)
    listed = find_files([url])
    request.getfixturevalue("nobody")
    monkeypatch.setattr(pipeline.preprocess, "is_there", lambda _: True)  # it was, a moment ago
    with pytest.raises(SourceError, match=r"ID_000010000\.dcm cannot be read \(EndpointConnectionError"):
        convert(cohort, manifest, url)
    monkeypatch.setattr(pipeline.index, "find_files", lambda *_: listed)
    with pytest.raises(SourceError, match=r"ID_000010000\.dcm cannot be read \(EndpointConnectionError"):
        index(cohort, url)


# ---- where the store goes


def test_store_sent_to_a_bucket_is_read_back_by_xarray(
    mixed: Cohort, server: Server, run_stage: Callable[..., Any]
) -> None:
    _, local = run(mixed, mixed.dicom)
    server.files.mkdir("stores")
    write_manifest(mixed.data / "index" / "manifest.parquet", index(mixed, mixed.dicom)[0])
    ran = run_stage("preprocess", "--store", "s3://stores/x.zarr")
    assert ran.code == 0, ran.err
    assert "store: s3://stores/x.zarr" in ran.out
    assert "Unclosed" not in ran.err
    options = {"storage_options": {"use_listings_cache": False}}
    xr.testing.assert_identical(load("s3://stores/x.zarr", **options).drop_attrs(), local.drop_attrs())
    server.files.pipe("stores/x.zarr/notes.txt", b"not ours")
    server.files.pipe("stores/x.zarr/labels/train.csv", b"not ours, in a folder of ours")
    for path in mixed.dicom.rglob("*"):
        if path.is_file() and path.name != "notes.txt" and not path.name.startswith("ID_00001"):
            path.unlink()
    _, fewer = run(mixed, mixed.dicom)
    convert(mixed, index(mixed, mixed.dicom)[0], mixed.dicom, store="s3://stores/x.zarr")
    xr.testing.assert_identical(load("s3://stores/x.zarr", **options).drop_attrs(), fewer.drop_attrs())
    there = {name.removeprefix("stores/x.zarr/") for name in server.files.find("stores/x.zarr")}
    assert there == {*tree_bytes(mixed.data / "store.zarr"), "notes.txt", "labels/train.csv"}


class Recorded(MemoryFileSystem):
    """Storage that remembers what was done to it, in order."""

    cachable = False
    store: dict[str, Any] = {}  # noqa: RUF012  fsspec has it so
    pseudo_dirs = [""]  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[str, str]] = []

    def put_file(self, lpath: str, rpath: str, **given: Any) -> None:
        given.pop("batch_size", None)
        self.done.append(("put", rpath.removeprefix("/x/")))
        super().put_file(lpath, rpath, **given)

    def rm_file(self, path: str) -> None:
        self.done.append(("remove", path.removeprefix("/x/")))
        super().rm_file(path)


def test_root_of_a_sent_store_goes_first_and_comes_last(cohort: Cohort) -> None:
    cohort.add_study(1, 2)
    run(cohort, cohort.dicom)
    storage = Recorded()
    for _ in range(2):
        storage.done.clear()
        send_store(cohort.data / "store.zarr", "memory://x", system=storage, target="/x")
        assert storage.done[-1] == ("put", "zarr.json")
        assert ("put", "zarr.json") not in storage.done[:-1]
    assert storage.done[0] == ("remove", "zarr.json")  # so that what is half sent cannot be opened


def test_store_is_put_into_a_folder_on_another_disk(mixed: Cohort) -> None:
    manifest, store = run(mixed, mixed.dicom)
    manifest, _ = index(mixed, mixed.dicom)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else mixed.folder) as elsewhere:
        target = Path(elsewhere) / "deep" / "x.zarr"
        for _ in range(2):  # the second replaces the first
            convert(mixed, manifest, mixed.dicom, store=str(target))
            xr.testing.assert_identical(load(target).drop_attrs(), store.drop_attrs())
            assert os.listdir(target.parent) == ["x.zarr"]


def test_store_takes_the_place_of_nothing_else(mixed: Cohort) -> None:
    manifest, _ = index(mixed, mixed.dicom)
    before = tree_bytes(mixed.dicom)
    for target in (mixed.dicom, mixed.dicom / "notes.txt"):
        with pytest.raises(StoreError, match="something that is no store is there, and would be replaced"):
            convert(mixed, manifest, mixed.dicom, store=str(target))
    assert tree_bytes(mixed.dicom) == before
    (mixed.folder / "new").mkdir()
    convert(mixed, manifest, mixed.dicom, store=str(mixed.folder / "new"))
    assert Store(mixed.folder / "new").num_slices.tolist() == [4, 3]


def test_target_that_cannot_be_written_is_an_error(
    cohort: Cohort, server: Server, run_stage: Callable[..., Any]
) -> None:
    cohort.add_study(1, 2)
    manifest, _ = index(cohort, cohort.dicom)
    write_manifest(cohort.data / "index" / "manifest.parquet", manifest)
    ran = run_stage("preprocess", "--store", str(cohort.dicom / "ID_000010000.dcm" / "x.zarr"))
    assert ran.code == 1
    assert "ID_000010000.dcm: " in ran.err
    assert "Traceback" not in ran.err
    with pytest.raises(
        IchorError, match=r"--store s3://absent/x\.zarr: cannot be written .*check the name, the credentials"
    ):
        convert(cohort, manifest, cohort.dicom, store="s3://absent/x.zarr")
    assert kept(manifest)["image_id"].tolist() == ["ID_000010000", "ID_000010001"]
