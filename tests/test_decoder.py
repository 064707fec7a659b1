"""Decoding compressed pixel data: the encoder's own input comes back, and no file and no decoder takes the caller down."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import gdcm
import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import (
    HTJ2K,
    MPEG2MPML,
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from pipeline import decoder
from pipeline.decoder import DecodeError, close, decode
from pipeline.errors import IchorError
from tests.conftest import ROOT

ROWS, COLUMNS = 64, 80  # not square, so that a transposed slice is seen
NAME = "SECRET^NAME"

END = b"\xff\xd9"
"""Ends a codestream of any JPEG. Where it lacks, CharLS looks for it for four seconds."""


@pytest.fixture(scope="module", autouse=True)
def closed() -> Iterator[None]:
    yield
    close()


@pytest.fixture
def child() -> int:
    """The process id of a decoding process that is up and waiting."""
    decode(rle(), rows=ROWS, columns=COLUMNS)
    return child_id()


def child_id() -> int:
    assert decoder._child is not None
    return decoder._child.process.pid


def head(signed: bool, *, seed: int = 0) -> np.ndarray:
    """Stored values of something round with noise: 12 bits unsigned, or HU with padding of −2000."""
    y, x = np.mgrid[:ROWS, :COLUMNS] / ROWS - 0.5
    pixels_hu = np.where(x**2 + y**2 < 0.16, 40 + 30 * np.sin(20 * x), -1000.0)
    pixels_hu += np.random.default_rng(seed).normal(0, 3, pixels_hu.shape)
    if not signed:
        return np.rint(pixels_hu + 1024).clip(0).astype(np.uint16)
    pixels_hu[:3] = -2000
    return np.rint(pixels_hu).astype(np.int16)


def describe(stored: np.ndarray, *, bits: int) -> Dataset:
    """An uncompressed CT slice, or several frames."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, "1.2.3"
    dataset.PatientName = NAME
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = stored.shape[-2:]
    if stored.ndim == 3:
        dataset.NumberOfFrames = len(stored)
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8 * stored.itemsize, bits, bits - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    dataset.PixelData = stored.tobytes()
    dataset["PixelData"].VR = "OW"
    return dataset


def write(dataset: Dataset) -> bytes:
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def native(dataset: Dataset, syntax: UID) -> bytes:
    dataset.file_meta.TransferSyntaxUID = syntax
    if syntax == ExplicitVRBigEndian:
        dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").byteswap().tobytes()
    return write(dataset)


def compress(dataset: Dataset, syntax: UID) -> bytes:
    """RLE, JPEG-LS and JPEG 2000, by the encoders that pydicom calls."""
    dataset.compress(syntax, generate_instance_uid=False)
    return write(dataset)


def change(dataset: Dataset, syntax: UID, tmp_path: Path) -> bytes:
    """Anything that gdcm encodes."""
    paths = tmp_path / "from.dcm", tmp_path / "to.dcm"
    paths[0].write_bytes(write(dataset))
    reader = gdcm.ImageReader()
    reader.SetFileName(str(paths[0]))
    assert reader.Read()
    changer = gdcm.ImageChangeTransferSyntax()
    changer.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str(syntax))))
    changer.SetInput(reader.GetImage())
    assert changer.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(paths[1]))
    writer.SetFile(reader.GetFile())
    writer.SetImage(changer.GetOutput())
    assert writer.Write()
    return paths[1].read_bytes()


def rle() -> bytes:
    return compress(describe(head(False), bits=12), RLELossless)


def with_frame(content: bytes, frame: bytes) -> bytes:
    """The same file around another codestream."""
    dataset = pydicom.dcmread(io.BytesIO(content))
    dataset.PixelData = encapsulate([frame])
    return write(dataset)


def codestream(content: bytes) -> bytes:
    return get_frame(pydicom.dcmread(io.BytesIO(content)).PixelData, 0, number_of_frames=1)


def assert_still_decodes() -> None:
    np.testing.assert_array_equal(decode(rle(), rows=ROWS, columns=COLUMNS), head(False))


# ---- right values

FORMS = [(False, 12), (False, 16), (True, 12), (True, 16)]


def stored_of(signed: bool, bits: int) -> np.ndarray:
    return head(signed).clip(-2048, 2047) if bits == 12 and signed else head(signed)


@pytest.mark.parametrize(("signed", "bits"), FORMS)
@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless], ids=lambda uid: uid.keyword)
def test_what_pydicom_compressed_comes_back(syntax: UID, signed: bool, bits: int) -> None:
    stored = stored_of(signed, bits)
    decoded = decode(compress(describe(stored, bits=bits), syntax), rows=ROWS, columns=COLUMNS)
    np.testing.assert_array_equal(decoded, stored)
    assert decoded.dtype == stored.dtype


@pytest.mark.parametrize(("signed", "bits"), FORMS)
@pytest.mark.parametrize(
    "syntax",
    [JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless, RLELossless],
    ids=lambda uid: uid.keyword,
)
def test_what_gdcm_compressed_comes_back(syntax: UID, signed: bool, bits: int, tmp_path: Path) -> None:
    stored = stored_of(signed, bits)
    decoded = decode(change(describe(stored, bits=bits), syntax, tmp_path), rows=ROWS, columns=COLUMNS)
    np.testing.assert_array_equal(decoded, stored)
    assert decoded.dtype == stored.dtype


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    "syntax", [ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian], ids=lambda uid: uid.keyword
)
def test_big_endian_and_deflated_come_back_in_native_order(syntax: UID, signed: bool) -> None:
    stored = head(signed)
    decoded = decode(native(describe(stored, bits=16), syntax), rows=ROWS, columns=COLUMNS)
    np.testing.assert_array_equal(decoded, stored)
    assert decoded.dtype == stored.dtype
    assert decoded.dtype.isnative


def test_lossy_jpeg_of_12_bits_is_decoded_though_pydicom_refuses_it(tmp_path: Path) -> None:
    stored = head(False)
    content = change(describe(stored, bits=12), JPEGExtended12Bit, tmp_path)
    with pytest.raises(RuntimeError, match="does not support 'JPEG Extended'"):
        pydicom.pixels.pixel_array(io.BytesIO(content), decoding_plugin="gdcm")
    decoded = decode(content, rows=ROWS, columns=COLUMNS)
    assert np.abs(decoded.astype(int) - stored).max() <= 2
    assert decoded.dtype == np.uint16


def test_near_lossless_jpeg_ls_stays_within_its_error() -> None:
    stored = head(True)
    dataset = describe(stored, bits=16)
    dataset.compress(JPEGLSNearLossless, jls_error=2, generate_instance_uid=False)
    error = np.abs(decode(write(dataset), rows=ROWS, columns=COLUMNS).astype(int) - stored)
    assert 0 < error.max() <= 2


def high_throughput(*, signed: bool, syntax: UID) -> tuple[Dataset, np.ndarray]:
    """A slice in HTJ2K, encoded by OpenJPH 0.26.3 (imagecodecs 2026.3.6), and its stored values as they went in."""
    y, x = np.mgrid[:ROWS, :COLUMNS]
    texture = (x * 7919 + y * 104729 + x * y * 31) % 7
    stored = np.where((x - 40) ** 2 + (y - 32) ** 2 < 28**2, 1000 + 3 * x + 5 * y + texture, texture)
    stored[30:34, 20:60], stored[:2] = (3071, -976) if signed else (4095, 0)
    if signed:
        stored -= 1024
    name = f"{'signed' if signed else 'unsigned'}_{'lossy' if syntax == HTJ2K else 'lossless'}.j2c"
    dataset = describe(stored.astype(np.int16 if signed else np.uint16), bits=16 if signed else 12)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([(ROOT / "tests" / "htj2k" / name).read_bytes()])
    return dataset, stored


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("syntax", [HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K], ids=lambda uid: uid.keyword)
def test_high_throughput_jpeg_2000_comes_back(syntax: UID, signed: bool) -> None:
    dataset, stored = high_throughput(signed=signed, syntax=syntax)
    decoded = decode(write(dataset), rows=ROWS, columns=COLUMNS)
    assert decoded.dtype == (np.int16 if signed else np.uint16)
    assert np.abs(decoded.astype(int) - stored).max() <= (2 if syntax == HTJ2K else 0)


@pytest.mark.parametrize(
    "name",
    [
        "MR_small_RLE.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "MR_small_bigendian.dcm",
        "MR_small_implicit.dcm",
        "MR_small_padded.dcm",  # with bytes after the last pixel
    ],
)
def test_other_peoples_files_decode_to_their_uncompressed_twin(name: str) -> None:
    twin = pydicom.dcmread(get_testdata_file("MR_small.dcm", download=False))
    content = Path(get_testdata_file(name, download=False)).read_bytes()
    np.testing.assert_array_equal(decode(content, rows=twin.Rows, columns=twin.Columns), twin.pixel_array)


def test_other_peoples_lossy_jpeg_of_12_bits_has_the_values_that_pydicom_tests_for() -> None:
    content = Path(get_testdata_file("JPGExtended.dcm", download=False)).read_bytes()
    decoded = decode(content, rows=1024, columns=256)
    assert (decoded[420, 140], decoded[230, 120]) == (244, 95)


def test_8_bits_stay_8_bits() -> None:
    path = get_testdata_file("image_dfl.dcm", download=False)
    decoded = decode(Path(path).read_bytes(), rows=512, columns=512)
    np.testing.assert_array_equal(decoded, pydicom.dcmread(path).pixel_array)
    assert decoded.dtype == np.uint8


def test_sign_that_disagrees_with_the_jpeg_2000_header_is_the_data_sets() -> None:
    """13 bits, Pixel Representation 1, in an unsigned codestream: padding of −2000 stands there as 6192."""
    path = get_testdata_file("J2K_pixelrep_mismatch.dcm", download=False)
    decoded = decode(Path(path).read_bytes(), rows=512, columns=512)
    assert (decoded.dtype, decoded.min(), decoded.max()) == (np.int16, -2000, 1896)


def test_signed_codestream_of_16_bits_is_signed_whatever_the_data_set_says() -> None:
    stored = head(True)
    dataset = pydicom.dcmread(io.BytesIO(compress(describe(stored, bits=16), JPEG2000Lossless)))
    dataset.PixelRepresentation = 0
    decoded = decode(write(dataset), rows=ROWS, columns=COLUMNS)
    assert decoded.dtype == np.int16
    np.testing.assert_array_equal(decoded, stored)


def test_bits_above_bits_stored_are_not_seen() -> None:
    stored = head(False)
    content = compress(describe(stored | 0xA000, bits=12), RLELossless)
    np.testing.assert_array_equal(decode(content, rows=ROWS, columns=COLUMNS), stored)


@pytest.mark.parametrize("has_offset_table", [False, True])
@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless], ids=lambda uid: uid.keyword)
def test_frame_k_gives_frame_k(syntax: UID, has_offset_table: bool) -> None:
    volume = np.stack([head(True, seed=k) for k in range(3)])
    dataset = describe(volume, bits=16)
    dataset.compress(syntax, generate_instance_uid=False)
    if not has_offset_table:
        frames = [get_frame(dataset.PixelData, k, number_of_frames=3) for k in range(3)]
        dataset.PixelData = encapsulate(frames, has_bot=False)
    content = write(dataset)
    for k in range(3):
        np.testing.assert_array_equal(decode(content, frame=k, rows=ROWS, columns=COLUMNS), volume[k])
    with pytest.raises(DecodeError, match="undecodable"):
        decode(content, frame=3, rows=ROWS, columns=COLUMNS)


def test_frame_in_several_fragments_is_joined() -> None:
    stored = head(True)
    dataset = describe(stored, bits=16)
    dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
    dataset.PixelData = encapsulate([get_frame(dataset.PixelData, 0, number_of_frames=1)], fragments_per_frame=3)
    np.testing.assert_array_equal(decode(write(dataset), rows=ROWS, columns=COLUMNS), stored)


@pytest.mark.parametrize(
    ("syntax", "first_tag"),
    [
        (ExplicitVRLittleEndian, b"\x08\x00\x16\x00"),
        (ImplicitVRLittleEndian, b"\x08\x00\x16\x00"),
        (ExplicitVRBigEndian, b"\x00\x08\x00\x16"),
    ],
    ids=["explicit", "implicit", "big endian"],
)
def test_file_without_preamble_is_decoded(syntax: UID, first_tag: bytes) -> None:
    stored = head(True)
    content = native(describe(stored, bits=16), syntax)
    bare = content[content.index(first_tag) :]  # from (0008,0016) on: no preamble, no meta group
    np.testing.assert_array_equal(decode(bare, rows=ROWS, columns=COLUMNS), stored)


# ---- refusals


def colour() -> bytes:
    dataset = describe(head(False), bits=12)
    dataset.PhotometricInterpretation = "PALETTE COLOR"
    return write(dataset)


def three_samples() -> bytes:
    dataset = describe(np.zeros((ROWS, COLUMNS * 3), np.uint16), bits=12)
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.Columns = 3, "RGB", COLUMNS
    dataset.PlanarConfiguration = 0
    return write(dataset)


def film() -> bytes:
    dataset = pydicom.dcmread(io.BytesIO(rle()))
    dataset.file_meta.TransferSyntaxUID = MPEG2MPML
    return write(dataset)


def wide() -> bytes:
    return write(describe(np.zeros((ROWS, COLUMNS), np.uint32), bits=32))


def no_pixels() -> bytes:
    dataset = describe(head(False), bits=12)
    del dataset.PixelData
    return write(dataset)


@pytest.mark.parametrize(
    "make", [colour, three_samples, film, wide, no_pixels, bytes, lambda: b"no DICOM", lambda: rle()[:700]]
)
def test_what_is_no_16_bit_grey_slice_is_undecodable(make: Callable[[], bytes]) -> None:
    content = make()
    with pytest.raises(DecodeError, match="undecodable"):
        decode(content, rows=ROWS, columns=COLUMNS)
    assert_still_decodes()


@pytest.mark.parametrize("rows_columns", [(COLUMNS, ROWS), (ROWS // 2, COLUMNS * 2), (ROWS, COLUMNS // 2)])
@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless], ids=lambda uid: uid.keyword)
def test_codestream_of_another_shape_is_not_folded(syntax: UID, rows_columns: tuple[int, int], tmp_path: Path) -> None:
    dataset = pydicom.dcmread(io.BytesIO(change(describe(head(False), bits=12), syntax, tmp_path)))
    dataset.Rows, dataset.Columns = rows_columns
    with pytest.raises(DecodeError, match="undecodable"):
        decode(write(dataset), rows=rows_columns[0], columns=rows_columns[1])


def test_rows_and_columns_that_the_file_does_not_have_are_undecodable() -> None:
    with pytest.raises(DecodeError, match="undecodable"):
        decode(rle(), rows=COLUMNS, columns=ROWS)


def test_slice_that_needs_too_much_memory_is_undecodable(child: int) -> None:
    frame = bytearray(codestream(compress(describe(head(False), bits=12), JPEG2000Lossless)))
    size = (60_000).to_bytes(4, "big")
    for place in (8, 12, 24, 28):  # SIZ: the image, and its one tile
        frame[place : place + 4] = size
    dataset = describe(head(False), bits=12)
    dataset.file_meta.TransferSyntaxUID, dataset.PixelData = JPEG2000Lossless, encapsulate([bytes(frame)])
    dataset.Rows = dataset.Columns = 60_000
    with pytest.raises(DecodeError, match="undecodable"):
        decode(write(dataset), rows=60_000, columns=60_000)
    assert child_id() == child, "the decoding process survives it"
    assert_still_decodes()


def test_file_too_large_to_be_held_twice_is_undecodable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "CONTENT_LIMIT_BYTES", len(rle()) - 1)
    with pytest.raises(DecodeError, match="undecodable"):
        decode(rle(), rows=ROWS, columns=COLUMNS)


# ---- damage


@pytest.mark.parametrize(
    "syntax", [JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless, RLELossless], ids=lambda uid: uid.keyword
)
def test_damaged_codestream_costs_its_slice_alone(syntax: UID, tmp_path: Path) -> None:
    content = change(describe(head(False), bits=12), syntax, tmp_path)
    frame = codestream(content)
    for damaged in (bytes(8) + frame[8:], frame[: len(frame) // 4] + END, b"\xff\xd8" + bytes(100)):
        with pytest.raises(DecodeError) as caught:
            decode(with_frame(content, damaged), rows=ROWS, columns=COLUMNS)
        assert caught.value.code in ("undecodable", "decoder_died")
    np.testing.assert_array_equal(decode(content, rows=ROWS, columns=COLUMNS), head(False))


@pytest.mark.parametrize(
    ("syntax", "is_cut"),
    [(JPEGLosslessSV1, True), (JPEGLosslessSV1, False), (JPEGExtended12Bit, True)],
    ids=["lossless, cut short", "lossless, zeros within", "lossy, cut short"],
)
def test_jpeg_that_libjpeg_makes_up_values_for_is_undecodable(syntax: UID, is_cut: bool, tmp_path: Path) -> None:
    content = change(describe(head(False), bits=12), syntax, tmp_path)
    frame = codestream(content)
    half = len(frame) // 2
    damaged = with_frame(content, frame[:half] + (END if is_cut else bytes(600) + frame[half + 600 :]))
    made_up = decoder._decode_frame(damaged, frame=0, rows=ROWS, columns=COLUMNS)
    assert made_up is not None
    assert np.abs(made_up.astype(int) - head(False)).max() > 500, "gdcm raises nothing"
    with pytest.raises(DecodeError, match="undecodable"):
        decode(damaged, rows=ROWS, columns=COLUMNS)
    decoded = decode(content, rows=ROWS, columns=COLUMNS)  # what was said of one frame is not held against the next
    assert np.abs(decoded.astype(int) - head(False)).max() <= 2


def test_200_mutated_files_give_an_array_or_a_decode_error(tmp_path: Path) -> None:
    syntaxes = [JPEGLosslessSV1, JPEGExtended12Bit, JPEGLSLossless, JPEG2000Lossless, RLELossless]
    contents = [change(describe(head(False), bits=12), syntax, tmp_path) for syntax in syntaxes]
    rng = np.random.default_rng(0)
    outcomes: Counter[str] = Counter()
    for k in range(200):
        mutated = bytearray(contents[k % len(contents)])
        start = rng.choice([132, len(mutated) // 8])  # the headers too, or the codestream's alone
        for place in rng.integers(start, len(mutated), size=rng.integers(1, 20)):
            mutated[place] = rng.integers(256)
        try:
            decoded = decode(bytes(mutated), rows=ROWS, columns=COLUMNS)
        except DecodeError as error:
            outcomes[error.code] += 1
        else:
            assert decoded.shape == (ROWS, COLUMNS)
            assert decoded.dtype.kind in "iu"
            outcomes["decoded"] += 1
    assert set(outcomes) <= {"decoded", "undecodable", "decoder_died"}
    assert 20 < outcomes["decoded"] < 180, "neither harmless nor hopeless mutations would prove much"
    assert_still_decodes()


def test_what_decoders_print_reaches_nobody(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    content = change(describe(head(False), bits=12), JPEGLosslessSV1, tmp_path)
    damaged = with_frame(content, b"\xff\xd8\xff\xc3" + bytes(100))
    capfd.readouterr()
    with pytest.raises(RuntimeError):
        decoder._decode_frame(damaged, frame=0, rows=ROWS, columns=COLUMNS)
    assert capfd.readouterr().err, "in this very process it is heard"
    with pytest.raises(DecodeError, match="undecodable"):
        decode(damaged, rows=ROWS, columns=COLUMNS)
    assert capfd.readouterr() == ("", "")


# ---- the process


def is_gone(process_id: int) -> bool:
    """No such child of ours: it ended, and was waited for."""
    try:
        os.waitpid(process_id, os.WNOHANG)
    except ChildProcessError:
        return True
    return False


def test_process_is_kept_from_call_to_call(child: int) -> None:
    for _ in range(3):
        assert_still_decodes()
    with pytest.raises(DecodeError, match="undecodable"):
        decode(colour(), rows=ROWS, columns=COLUMNS)
    assert child_id() == child


def test_killed_process_costs_the_call_it_was_killed_in(child: int) -> None:
    os.kill(child, signal.SIGSTOP)  # so that the call is certainly waiting
    killer = threading.Timer(0.3, os.kill, (child, signal.SIGKILL))
    killer.start()
    with pytest.raises(DecodeError, match="decoder_died"):
        decode(rle(), rows=ROWS, columns=COLUMNS)
    killer.join()
    assert is_gone(child)
    assert_still_decodes()
    assert child_id() != child


def test_process_that_died_between_calls_costs_none(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert_still_decodes()
    assert is_gone(child)


@pytest.mark.parametrize("padding", [0, 1_000_000], ids=["waiting for the answer", "sending a large file"])
def test_hung_process_is_killed_and_named(child: int, padding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "TIME_LIMIT_S", 0.3)
    os.kill(child, signal.SIGSTOP)
    with pytest.raises(DecodeError, match="decoder_hung"):
        decode(rle() + bytes(padding), rows=ROWS, columns=COLUMNS)
    assert is_gone(child)
    monkeypatch.undo()
    assert_still_decodes()


def test_death_while_a_large_file_is_sent_is_no_broken_pipe(child: int) -> None:
    os.kill(child, signal.SIGSTOP)
    killer = threading.Timer(0.3, os.kill, (child, signal.SIGKILL))
    killer.start()
    with pytest.raises(DecodeError, match="decoder_died"):
        decode(bytes(10_000_000), rows=ROWS, columns=COLUMNS)
    killer.join()
    assert_still_decodes()


@pytest.mark.parametrize("rubbish", ["\\377\\377\\377\\377", "\\004\\000\\000\\000[[[[", "\\002\\000\\000\\00042"])
def test_rubbish_from_the_process_is_its_death(rubbish: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\nprintf '\\004\\000\\000\\000null'\nhead -c 100 > /dev/null\nprintf '{rubbish}'\n")
    program.chmod(0o755)
    close()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", str(program))
        with pytest.raises(DecodeError, match="decoder_died"):
            decode(rle(), rows=ROWS, columns=COLUMNS)
    assert_still_decodes()


def test_interrupted_call_leaves_no_answer_for_the_next(child: int) -> None:
    os.kill(child, signal.SIGSTOP)
    interrupter = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        decode(compress(describe(head(True), bits=16), RLELossless), rows=ROWS, columns=COLUMNS)
    interrupter.join()
    assert_still_decodes()


def test_ctrl_c_is_the_drivers_alone(child: int) -> None:
    assert os.getpgid(child) != os.getpgrp(), "a terminal sends it to the driver's process group"
    os.kill(child, signal.SIGINT)
    assert_still_decodes()
    assert child_id() == child


def test_close_ends_the_process_and_the_next_call_starts_another(child: int) -> None:
    close()
    close()
    assert is_gone(child)
    assert_still_decodes()


def test_decoder_that_is_not_installed_is_no_fault_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gdcm.py").write_text("raise ImportError('no gdcm here')")
    path = f"{tmp_path}{os.pathsep}{decoder._module_path()}"
    close()
    with monkeypatch.context() as patched:
        patched.setattr(decoder, "_module_path", lambda: path)
        with pytest.raises(IchorError, match="did not start"):
            decode(rle(), rows=ROWS, columns=COLUMNS)
    assert "no gdcm here" in capfd.readouterr().err
    assert_still_decodes()


def run_script(script: str, folder: Path) -> str:
    """Run a program that has `content`, a file, and `right(...)`, whether it decodes to what it should; far from this checkout."""
    (folder / "slice.dcm").write_bytes(rle())
    np.save(folder / "stored.npy", head(False))
    start = f"""
        import os, pathlib, signal, sys
        sys.path.insert(0, {str(ROOT)!r})
        import numpy as np
        from pipeline import decoder
        assert "pydicom" not in sys.modules
        content = pathlib.Path("slice.dcm").read_bytes()
        def right():
            return bool((decoder.decode(content, rows={ROWS}, columns={COLUMNS}) == np.load("stored.npy")).all())
    """
    (folder / "program.py").write_text(textwrap.dedent(start) + textwrap.dedent(script))
    command = [sys.executable, "-W", "error", "program.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    return done.stdout


def test_dask_workers_that_may_have_no_children_decode(tmp_path: Path) -> None:
    script = """
        def work(queue):
            queue.put((multiprocessing.current_process().daemon, right()))
        if __name__ == "__main__":
            import multiprocessing
            context = multiprocessing.get_context("fork")
            queue = context.Queue()
            worker = context.Process(target=work, args=(queue,), daemon=True)
            worker.start()
            print(queue.get(timeout=30))
            worker.join()
    """
    assert run_script(script, tmp_path) == "(True, True)\n"


def test_forked_process_starts_its_own_and_leaves_its_parents_alone(tmp_path: Path) -> None:
    script = """
        right()
        first = decoder._child.process.pid
        forked = os.fork()
        if not forked:
            ok = right() and decoder._child.process.pid != first
            decoder.close()
            os._exit(0 if ok else 1)
        print(os.waitpid(forked, 0)[1], right(), decoder._child.process.pid == first)
    """
    assert run_script(script, tmp_path) == "0 True True\n"


@pytest.mark.parametrize("end", ["", "os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_process_ends_with_its_parent_however_that_ends(end: str, tmp_path: Path) -> None:
    process_id = int(run_script(f"right()\nprint(decoder._child.process.pid, flush=True)\n{end}", tmp_path))
    deadline = time.monotonic() + 20
    while (
        Path(f"/proc/{process_id}/cmdline").exists() and b"decoder" in Path(f"/proc/{process_id}/cmdline").read_bytes()
    ):
        assert time.monotonic() < deadline
        time.sleep(0.02)
