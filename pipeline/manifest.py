"""The manifest: one row a slice found, each used, repaired or excluded, and why. Also the fixed list of reasons.

A multi-frame file has a row for each frame. Columns: where the file lies (`pipeline.source.FILE_COLUMNS`), the header's values
(`pipeline.header.Header`), ``position_mm`` (along the slice normal), ``tilt_deg``, ``gap_mm`` (to the slice below), ``spacing``
(empty, ``hole``, ``overlap``, ``same_position``), ``field_mm`` (longest side of the study's largest field of view), ``turn``,
``status``, ``reason``, and the six labels (1, 0, −1 unknown). Rows are in the order study, position, image id; excluded files
follow by path.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.errors import SourceError
from pipeline.files import write_parquet
from pipeline.source import FILE_COLUMNS

USED, REPAIRED, EXCLUDED = "used", "repaired", "excluded"

REASONS: dict[str, tuple[str, str]] = {
    # Found by reading the header alone, in the order in which they are asked.
    "unreadable": (EXCLUDED, "the file cannot be read or parsed"),
    "zip_method": (
        EXCLUDED,
        "its zip holds it in a way that cannot be read (encrypted, neither stored nor deflated, or beyond the zip's end)",
    ),
    "not_dicom": (EXCLUDED, "not a DICOM file"),
    "dicomdir": (EXCLUDED, "a DICOM directory (DICOMDIR), no image"),
    "not_ct": (EXCLUDED, "its modality is not CT"),
    "no_pixels": (EXCLUDED, "no pixel data in it"),
    "localizer": (EXCLUDED, "a localizer"),
    "colour": (EXCLUDED, "a colour or palette capture, or it does not say that it is grey"),
    "multi_frame": (EXCLUDED, "several frames in one file, without a geometry for each"),
    "not_16_bit": (EXCLUDED, "its pixels are not 16 bits wide"),
    "high_bit": (EXCLUDED, "its stored bits are not the lowest ones of a value"),
    "no_identifiers": (EXCLUDED, "its modality, or its study, series or image identifier, is missing"),
    "no_geometry": (EXCLUDED, "its position, orientation or pixel spacing is missing"),
    "not_axial": (EXCLUDED, "its plane is not axial"),
    "no_rescale": (EXCLUDED, "its rescale slope or intercept is missing"),
    "not_hu": (EXCLUDED, "its values are no HU: a map of something else"),
    "implausible": (EXCLUDED, "its size, spacing, position or rescale is that of no CT"),
    "truncated_pixels": (EXCLUDED, "its pixel data are cut short"),
    # Found by comparing files.
    "foreign_patient": (EXCLUDED, "most slices of its study are another patient's"),
    "duplicate": (EXCLUDED, "the same slice as in another file"),
    "conflict": (
        EXCLUDED,
        "another file has the same image identifier and other pixels, or another place: neither can be trusted",
    ),
    "other_series": (EXCLUDED, "another series was chosen"),
    # Found when the pixels are read.
    "changed": (EXCLUDED, "the file changed after index read it"),
    "zip_damaged": (EXCLUDED, "its zip holds it damaged: it does not agree with its checksum"),
    "undecodable": (EXCLUDED, "its pixel data cannot be decoded"),
    "decoder_died": (EXCLUDED, "its pixel data crashed the decoder"),
    "decoder_hung": (EXCLUDED, "its pixel data kept the decoder busy without end"),
    "garbage": (EXCLUDED, "its values are noise, or out of any scanner's range"),
    # Repairs; where a slice has several, the first of these is named.
    "wrap_12bit": (REPAIRED, "12-bit values had wrapped round; unwrapped"),
    "inverted": (REPAIRED, "stored as its own negative (MONOCHROME1); turned positive"),
    "surplus_pixels": (REPAIRED, "more pixel data than rows × columns; the first ones are used"),
    "turned": (
        REPAIRED,
        "its rows or columns ran another way; turned so that the nose is up and the patient's left is right",
    ),
    "padding": (REPAIRED, "padding that would be tissue; set to air"),
}

BY_CHOICE = ("other_series", "duplicate")
BY_KIND = ("dicomdir", "not_ct", "localizer", "colour", "multi_frame", "not_16_bit", "not_axial", "not_hu")
NO_DEFECTS = (*BY_CHOICE, *BY_KIND)
"""Exclusions of what was chosen against, or is no axial slice and does not claim to be: a whole study of a hospital holds scouts,
reports, reformats and captures. They do not count towards `index.max_excluded_fraction`."""

PERHAPS_MENDED = ("changed", "zip_damaged", "decoder_died", "decoder_hung")
"""Faults of where a file lies, or of the machine, and perhaps not of the file: they are not remembered, so that a disk that was away, a
zip that is fetched anew, or a decoder that had no memory, is asked again."""

SPACINGS = ("hole", "overlap", "same_position")
"""What `spacing` says of the distance to the slice below, where it is not as it should be."""


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


WHERE = [*FILE_COLUMNS, "transfer_syntax", "pixel_offset", "pixel_length"]
"""Columns that say where a slice lies and how it is packed: the same slices may be copied, zipped or compressed."""


def digest_manifest(manifest: pd.DataFrame) -> str:
    """SHA-256 of what a manifest says of its slices, wherever their files lie and whenever they were last touched."""
    digest = hashlib.sha256()
    for name in manifest.columns.drop(WHERE):  # one by one: 25,000 studies have 400 MB of them
        digest.update(name.encode() + pd.util.hash_pandas_object(manifest[name], index=False).to_numpy().tobytes())
    return digest.hexdigest()


def write_manifest(path: Path, manifest: pd.DataFrame) -> None:
    """Write a manifest whole, its totals asserted first."""
    account(manifest)
    write_parquet(path, manifest)


def account(manifest: pd.DataFrame) -> dict[str, Any]:
    """Count everything once: found = used + repaired + excluded, the last two by reason, most frequent first.

    Returns:
        ``files``; ``slices_found``, which is more where files have several frames; each status; ``reasons``.
    """
    by_status = manifest["status"].value_counts()
    totals = {status: int(by_status.get(status, 0)) for status in (USED, REPAIRED, EXCLUDED)}
    reasons = manifest.loc[manifest["status"] != USED, "reason"].value_counts()
    named = sorted(reasons.items(), key=lambda item: (-item[1], str(item[0])))
    for status in (REPAIRED, EXCLUDED):
        of_status = sum(count for reason, count in named if REASONS[str(reason)][0] == status)
        assert of_status == totals[status], f"{of_status} files have a reason to be {status}, {totals[status]} are"
    assert sum(totals.values()) == len(manifest), f"{totals} does not add up to {len(manifest)} files"
    return {
        "files": int((manifest["frame"] <= 0).sum()),
        "slices_found": len(manifest),
        **totals,
        "reasons": {str(reason): int(count) for reason, count in named},
    }


def examples(manifest: pd.DataFrame, *, each: int = 5) -> dict[str, Any]:
    """What a person would look at first: a few files of each reason, and the studies with most exclusions by defect."""
    shown = manifest.loc[manifest["status"] != USED, ["reason", "archive", "path"]].groupby("reason").head(each)
    by_reason: dict[str, list[str]] = {}
    for reason, archive, path in shown.itertuples(index=False):
        by_reason.setdefault(reason, []).append(f"{archive}/{path}" if archive else path)
    defects = manifest[(manifest["status"] == EXCLUDED) & ~manifest["reason"].isin(NO_DEFECTS)]
    worst = defects.loc[defects["study_uid"] != "", "study_uid"].value_counts().sort_index().nlargest(each)
    return {"examples": by_reason, "worst_studies": {str(uid): int(count) for uid, count in worst.items()}}


def refuse_too_many_exclusions(totals: dict[str, Any], *, most: float) -> None:
    """Stop where more was excluded by defect than can be an accident.

    Raises:
        SourceError: more than the share `most` of what should have been slices.
    """
    excluded = {reason: n for reason, n in totals["reasons"].items() if REASONS[reason][0] == EXCLUDED}
    defects = {reason: n for reason, n in excluded.items() if reason not in NO_DEFECTS}
    count = sum(defects.values())
    slices = totals["slices_found"] - sum(excluded.values()) + count
    share = count / max(1, slices)
    if share > most:
        listed = "; ".join(f"{n:,} × {REASONS[reason][1]}" for reason, n in list(defects.items())[:4])
        raise SourceError(
            f"{count:,} of {slices:,} slices are excluded by defect ({share:.1%}), more than index.max_excluded_fraction = {most:g} "
            f"allows: {listed}; look with `python -m stages.inspect --excluded`, mend source.dicom or raise the fraction"
        )


def kept(manifest: pd.DataFrame) -> pd.DataFrame:
    """The slices that go into the store, in the manifest's order: by study, then along the slice normal."""
    return manifest[manifest["status"] != EXCLUDED]


def describe_account(totals: dict[str, Any]) -> str:
    """The accounting for people: one line of totals, one line a reason."""
    frames = f", which hold {totals['slices_found']:,}" if totals["slices_found"] != totals["files"] else ""
    lines = [
        f"{totals['files']:,} files found{frames} = {totals[USED]:,} used + {totals[REPAIRED]:,} repaired + "
        f"{totals[EXCLUDED]:,} excluded"
    ]
    for reason, count in totals["reasons"].items():
        status, sentence = REASONS[reason]
        lines.append(f"  {status:9s}{count:9,}  {sentence} ({reason})")
    return "\n".join(lines)
