"""How a run was made: the code's revision, parameters that were turned, versions, and the machine; never who or where.

Training and evaluation each record their own: they may run apart.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config import Config, differences, without_folders

ROOT = Path(__file__).resolve().parent.parent

PACKAGES = (
    "torch", "monai", "numpy", "scipy", "pandas", "scikit-learn", "zarr", "zstandard", "numba", "opencv-python-headless", "albumentations",
    "pydicom", "dvc",
)  # fmt: skip
"""Those that can change a figure; one that is not installed is left out."""

CODE = ("pipeline", "stages", "dvc.yaml", "params.yaml", "requirements.txt", "constraints.txt")
"""What decides a run. Outputs of the run itself (dvc.lock, data/report) would make every tree look changed."""

MOST_NAMED = 5

GPUS = Path("/proc/driver/nvidia/gpus")
"""A folder a GPU, where NVIDIA's driver is."""


@dataclass(frozen=True)
class Provenance:
    """How a run was made, in plain values."""

    revision: str
    parameters: list[tuple[str, str]]
    """Dotted key and value, of all that shaped the result."""
    turned: list[tuple[str, str, str]] | None
    """Dotted key, committed value, value of this run; None where the committed ones cannot be had."""
    packages: dict[str, str]
    machine: list[tuple[str, str]]


def describe_making(config: Config) -> Provenance:
    """All of it, as far as it can be known here; git and a GPU may be absent."""
    return Provenance(
        revision=find_revision(ROOT),
        parameters=_flat(shaping(config)),
        turned=find_turned(config, ROOT),
        packages=find_packages(),
        machine=find_machine(),
    )


def shaping(config: Config) -> dict[str, Any]:
    """The parameters that shaped the result; where the studies lie, and the patients' salt, stay out."""
    return {
        "index": config.index.model_dump(include={"series"}),
        "preprocess": config.preprocess.model_dump(include={"image_size", "crop", "windows"}),
        "folds": config.folds.model_dump(),
        "train": {"folds": config.train.folds, **without_folders(config.train.shaping())},
        "evaluate": config.evaluate.model_dump(),
    }


def find_turned(config: Config, root: Path) -> list[tuple[str, str, str]] | None:
    """Where the parameters differ from the params.yaml that is committed: there, and nowhere else, defaults stand."""
    committed = _git(root, "show", "HEAD:params.yaml")
    try:
        before = shaping(Config.model_validate(yaml.safe_load(committed or "")))
    except (ValidationError, yaml.YAMLError):
        return None
    return [
        (key, _shown(then), _shown(now)) for key, (then, now) in sorted(differences(before, shaping(config)).items())
    ]


def find_revision(root: Path) -> str:
    """The commit and its date, and whether the code differs from it; or why that is not known."""
    if _git(root, "--version") is None:
        return "not known: git is not installed"
    top = _git(root, "rev-parse", "--show-toplevel")
    commit = _git(root, "log", "-1", "--format=%h of %cs")
    if top is None or commit is None or Path(top.strip()).resolve() != root.resolve():
        return "not known: not a git checkout of its own"
    changed = (_git(root, "status", "--porcelain", "--", *CODE) or "").splitlines()
    if not changed:
        return f"commit {commit.strip()}, and no change since"
    names = ", ".join(line[3:] for line in changed[:MOST_NAMED])
    more = f" and {len(changed) - MOST_NAMED} more" if len(changed) > MOST_NAMED else ""
    return f"commit {commit.strip()}, with changes that are not committed: {names}{more}"


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError, UnicodeDecodeError):
        return None
    return done.stdout


def find_packages() -> dict[str, str]:
    """Python and the packages that can change a figure, with their versions."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def find_machine() -> list[tuple[str, str]]:
    """Processor, cores, memory, GPU and system; no host name, which may tell a person or an institution."""
    return [
        ("processor", _processor()),
        ("cores", str(_cores())),
        ("memory", _memory()),
        ("GPU", ", ".join(_gpus()) or "none"),
        ("system", f"{platform.system()} {platform.machine()}"),
    ]


def _processor() -> str:
    lines = _read(Path("/proc/cpuinfo")).splitlines()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or "not known"


def _cores() -> int:
    """Those that this process may use: a container often has fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (AttributeError, ValueError, OSError):
        return "not known"


def _gpus() -> list[str]:
    """NVIDIA's, as the driver names them: torch would take seconds to ask."""
    models = []
    for path in sorted(GPUS.glob("*/information")):
        models += [line.partition(":")[2].strip() for line in _read(path).splitlines() if line.startswith("Model:")]
    return models


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", _shown(value))]
    return rows


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_shown, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(inner)}" for key, inner in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)
