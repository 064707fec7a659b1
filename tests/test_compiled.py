from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numba
import pytest

from pipeline.compiled import compiled

LOOP = "from pipeline.compiled import compiled\n\n\n@compiled\ndef double(number):\n    return 2 * number\n"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("loops", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kept(folder: Path) -> list[Path]:
    return sorted((folder / "__pycache__").glob("loops.double*.nb?"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "loops.py").write_text(LOOP)
    return tmp_path / "loops.py"


def test_what_was_compiled_is_kept_beside_the_source(path: Path) -> None:
    assert load(path).double(21) == 42
    before = {file: file.stat().st_mtime_ns for file in kept(path.parent)}
    assert len(before) == 2  # the list, and the code
    assert load(path).double(21) == 42
    assert {file: file.stat().st_mtime_ns for file in kept(path.parent)} == before


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("length", [0, 100])
def test_damaged_files_are_passed_over(path: Path, number: int, length: int) -> None:
    load(path).double(21)
    damaged = kept(path.parent)[number]
    damaged.write_bytes(damaged.read_bytes()[:length])
    assert load(path).double(21) == 42


def test_a_full_disk_is_no_fault(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile._dump", refuse)
    with pytest.raises(OSError, match="No space left"):
        numba.njit(cache=True)(load(path).double.__wrapped__)(21)
    assert load(path).double(21) == 42
    assert not kept(path.parent)


def test_a_loop_runs_where_nothing_can_be_kept() -> None:
    space: dict[str, Callable[[int], int]] = {}
    exec(compile("def double(number):\n    return 2 * number", "<nowhere>", "exec"), space)
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(space["double"])
    assert compiled(space["double"])(21) == 42
