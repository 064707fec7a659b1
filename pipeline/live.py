"""The figures of a run while it goes on, in DVCLive's files, where `dvc metrics` and `dvc plots` find them.

A run that goes on from a checkpoint repeats the steps after it, and a killed one may leave half a line: DVCLive would double
those points or fail to start. So each start cuts the curves back to the checkpoint's step first, and only then has DVCLive resume.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Literal

import dvclive

from pipeline.files import remove_leftovers, write_bytes

POINT = re.compile(rb"(\d+)\t(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)\n")
"""A whole line of a curve: the step and a finite number. What a kill or a power cut tore doesn't match."""


class _Files(dvclive.Live):
    """DVCLive that writes files and does nothing else: no repository opened, nothing saved to Git, nothing sent anywhere."""

    def __init__(self, folder: Path, name: str) -> None:
        self.curves = folder / "curves" / name
        super().__init__(str(folder / "latest" / name), resume=True, save_dvc_exp=False, dvcyaml=False)

    @property
    def plots_dir(self) -> str:
        """Apart from the metrics: `dvc.yaml` names two folders, and DVC takes every file of one for the same thing."""
        return str(self.curves)

    def make_summary(self) -> None:
        """Write the newest figures; renamed into place, as DVCLive's own way shows an empty file for a moment."""
        self.summary["step"] = self.step
        content = json.dumps(self.summary, indent=2, allow_nan=False) + "\n"
        write_bytes(Path(self.metrics_file), content.encode(), synced=False)

    def _init_dvc(self) -> None:
        """Open no repository: it would cost 0.2 s, and in a folder under Git without DVC, DVCLive would make one."""

    def _init_studio(self) -> None:
        """Post nothing to DVC Studio, even where a token for it stands in the environment."""


class Live:
    """The curves and the newest figures of one fold's run.

    Args:
        folder: the project's live folder; below it ``latest/NAME/metrics.json`` and ``curves/NAME/metrics/**/*.tsv`` are written.
        name: the run's, such as ``fold-0``.
        step: the optimiser's steps that the run has behind it; points after it are dropped, so 0 starts with empty curves.
    """

    def __init__(self, folder: Path, *, name: str, step: int) -> None:
        curves, latest = folder / "curves" / name, folder / "latest" / name
        remove_leftovers(latest, "*")  # the newest figures are to be those of the points that stay
        remove_leftovers(curves, "**/.*.tmp")
        self.files = _Files(folder, name)
        self.last = {"running": 0, "epoch": 0}
        for path in sorted((curves / "metrics").glob("*/*.tsv")):
            if (point := _cut(path, step)) is not None:
                of = path.parent.name
                self.last[of] = max(self.last.get(of, 0), point[0])
                self.files.summary.setdefault(of, {})[path.stem] = point[1]
        self.files.step = max(self.last.values())
        if self.files.summary:
            self.files.make_summary()

    def log(self, step: int, of: Literal["running", "epoch"], **figures: float) -> None:
        """Add one point to each curve; 0.8 ms for four figures.

        A figure that is no number yet is left out, and so is a second point of one step.

        Args:
            step: the optimiser's steps so far.
            of: what the figures stand for: the last few seconds, or an epoch that has ended.
            figures: by name.
        """
        if step <= self.last[of]:
            return
        self.last[of] = self.files.step = step
        for name, value in figures.items():
            if math.isfinite(value):
                self.files.log_metric(f"{of}/{name}", value)
        self.files.make_summary()


def _cut(path: Path, step: int) -> tuple[int, float] | None:
    """Keep a curve's whole points up to a step; the last of them, or None, and then the file is gone."""
    header, *lines = path.read_bytes().splitlines(keepends=True) or [b""]
    found = [(line, match) for line in lines if (match := POINT.fullmatch(line)) and int(match[1]) <= step]
    if not found or not header.endswith(b"\n"):
        path.unlink()
        return None
    write_bytes(path, b"".join([header, *(line for line, _ in found)]), synced=False)
    return int(found[-1][1][1]), json.loads(found[-1][1][2])
