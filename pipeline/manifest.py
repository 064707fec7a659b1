"""The manifest: one row a file found, each used, repaired or excluded, and why. Also the fixed list of reasons.

Columns: ``source`` (number of the entry of `source.dicom`), ``path`` (relative to it), ``size``, ``mtime_ns``, the header's
values (`pipeline.dicom.Header`), ``position_mm`` (along the slice normal), ``tilt_deg``, ``status``, ``reason``, and the six
labels (1, 0, −1 unknown). Rows are in the order study, position, image id; excluded files follow by path.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.errors import SourceError
from pipeline.files import write_parquet

USED, REPAIRED, EXCLUDED = "used", "repaired", "excluded"

REASONS: dict[str, tuple[str, str]] = {
    # Found by reading the header alone, in the order in which they are asked.
    "unreadable": (EXCLUDED, "the file cannot be read or parsed"),
    "not_dicom": (EXCLUDED, "not a DICOM file"),
    "dicomdir": (EXCLUDED, "a DICOM directory (DICOMDIR), no image"),
    "no_pixels": (EXCLUDED, "no pixel data in it"),
    "not_ct": (EXCLUDED, "its modality is not CT"),
    "localizer": (EXCLUDED, "a localizer"),
    "colour": (EXCLUDED, "a colour or palette capture, not MONOCHROME2"),
    "multi_frame": (EXCLUDED, "several frames in one file"),
    "not_16_bit": (EXCLUDED, "its pixels are not 16 bits wide"),
    "high_bit": (EXCLUDED, "its stored bits are not the lowest ones of a value"),
    "no_identifiers": (EXCLUDED, "its study, series or image identifier is missing"),
    "no_geometry": (EXCLUDED, "its position, orientation or pixel spacing is missing"),
    "not_axial": (EXCLUDED, "its plane is not axial"),
    "no_rescale": (EXCLUDED, "its rescale slope or intercept is missing"),
    "implausible": (EXCLUDED, "its size, spacing, position or rescale is that of no CT"),
    "truncated_pixels": (EXCLUDED, "its pixel data are cut short"),
    # Found by comparing files.
    "other_series": (EXCLUDED, "another series of the study was chosen"),
    "duplicate": (EXCLUDED, "another file holds the same image identifier"),
    # Found when the pixels are read.
    "changed": (EXCLUDED, "the file changed after index read it"),
    "undecodable": (EXCLUDED, "its pixel data cannot be decoded"),
    # Repairs.
    "wrap_12bit": (REPAIRED, "12-bit values had wrapped round; unwrapped"),
}


def read_manifest(path: Path) -> pd.DataFrame:
    """Read a manifest.

    Raises:
        SourceError: there is none.
    """
    if not path.is_file():
        raise SourceError(f"{path}: no manifest; run `python -m stages.index` (or `dvc repro`) first")
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: cannot be read ({error}); run `python -m stages.index` again") from None


def write_manifest(path: Path, manifest: pd.DataFrame) -> None:
    """Write a manifest whole, its totals asserted first."""
    account(manifest)
    write_parquet(path, manifest)


def digest(path: Path) -> str:
    """SHA-256 of the manifest's file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def account(manifest: pd.DataFrame) -> dict[str, Any]:
    """Count every file once: found = used + repaired + excluded, the last two by reason, most frequent first."""
    by_status = manifest["status"].value_counts()
    totals = {status: int(by_status.get(status, 0)) for status in (USED, REPAIRED, EXCLUDED)}
    reasons = manifest.loc[manifest["status"] != USED, "reason"].value_counts()
    named = sorted(reasons.items(), key=lambda item: (-item[1], str(item[0])))
    for status in (REPAIRED, EXCLUDED):
        of_status = sum(count for reason, count in named if REASONS[str(reason)][0] == status)
        assert of_status == totals[status], f"{of_status} files have a reason to be {status}, {totals[status]} are"
    assert sum(totals.values()) == len(manifest), f"{totals} does not add up to {len(manifest)} files"
    return {"files": len(manifest), **totals, "reasons": {str(reason): int(count) for reason, count in named}}


def kept(manifest: pd.DataFrame) -> pd.DataFrame:
    """The slices that go into the store, in the manifest's order: by study, then along the slice normal."""
    return manifest[manifest["status"] != EXCLUDED]


def describe_account(totals: dict[str, Any]) -> str:
    """The accounting for people: one line of totals, one line a reason."""
    lines = [
        f"{totals['files']:,} files found = {totals[USED]:,} used + {totals[REPAIRED]:,} repaired + "
        f"{totals[EXCLUDED]:,} excluded"
    ]
    for reason, count in totals["reasons"].items():
        status, sentence = REASONS[reason]
        lines.append(f"  {status:9s}{count:9,}  {sentence} ({reason})")
    return "\n".join(lines)
