"""Slices as series: which series of a study is wanted, where its slices lie, and what is missing between them.

All of it works on tables with the columns of `pipeline.header.Header`, one row a slice.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

PLACE = ["position_x_mm", "position_y_mm", "position_z_mm"]
ROW, COLUMN = ["row_x", "row_y", "row_z"], ["column_x", "column_y", "column_z"]
ORIENTATION = [*ROW, *COLUMN]

BONE_WIDTH_HU = 1000.0
"""A series whose own window is wider than this was made to look at bone."""

WHOLE_COVERAGE, HEAD_MM, LONGEST_HEAD_MM = 0.8, 150.0, 300.0
"""A series that covers less of the study's longest is a part: a block of an acquisition, or a repeat of some slices. A head asks for
150 mm and no more, and what covers 300 shows a neck, a spine or a trunk."""

FURTHER_MM = 20.0
"""Two or more slices of the usual thickness: where another series reaches so far beyond the chosen one, a part of the head is left out."""

REPEATED = 1.5
"""Slices to a place in a series that shows the same places again and again: perfusion, or two acquisitions."""

USUAL_THICKNESS_MM = 5.0
"""Of soft-tissue head series, RSNA's among them (3 to 5 mm, a few 2.5): thin ones are for bone and for reformatting."""

HOLE, OVERLAP, SAME_MM = 1.5, 0.5, 0.01
"""A gap of 1.5 times both its neighbours is a hole; below half of the study's median slices overlap; at 0.01 mm they share a place."""

TRANSPOSED, ROWS_FLIPPED, COLUMNS_FLIPPED = 4, 2, 1
"""Bits of a turn, in the order in which they are done."""

Floats = npt.NDArray[np.floating]


def normals(files: pd.DataFrame) -> Floats:
    """Slice normals (PS3.3 C.7.6.2.1.1): float64 [slice, 3], unit length, pointing to the head's end (larger z)."""
    (a, b, c), (d, e, f) = files[ROW].to_numpy(float).T, files[COLUMN].to_numpy(float).T
    normal = np.column_stack([b * f - c * e, c * d - a * f, a * e - b * d])  # np.cross takes three times as long
    length = np.linalg.norm(normal, axis=1, keepdims=True)
    normal = np.divide(normal, length, out=np.full_like(normal, np.nan), where=length > 0)
    return np.where(normal[:, 2:] < 0, -normal, normal)


def centres(files: pd.DataFrame) -> Floats:
    """Where the centres of slices lie: float64 [slice, 3] in mm. (0020,0032) is that of the first pixel (PS3.3 C.7.6.2.1.1), which
    moves when the gantry is tilted about the head."""
    across_mm = (files["columns"].to_numpy(float) - 1) / 2 * files["column_spacing_mm"].to_numpy(float)
    down_mm = (files["rows"].to_numpy(float) - 1) / 2 * files["row_spacing_mm"].to_numpy(float)
    row, column = files[ROW].to_numpy(float), files[COLUMN].to_numpy(float)
    return files[PLACE].to_numpy(float) + across_mm[:, None] * row + down_mm[:, None] * column


WISHES = {
    "soft_tissue": [
        "is_elsewhere",
        "is_projection",
        "is_contrast",
        "is_repeated",
        "is_bone",
        "is_part",
        "off_thickness",
    ],
    "bone": ["is_elsewhere", "is_projection", "is_soft", "is_contrast", "is_repeated", "is_part", "off_thickness"],
    "thin": ["is_elsewhere", "is_projection", "is_contrast", "is_repeated", "is_bone", "is_part", "thickness_mm"],
    "most_slices": ["fewer_slices"],
}
"""What is asked of a study's series by each rule of `index.series`, in this order; then: original, not derived; most places; uid."""


def choose_series(axial: pd.DataFrame, *, rule: str, chosen: list[str]) -> tuple[npt.NDArray[np.bool_], Floats]:
    """Choose one series of each study from its usable axial slices, by the `WISHES`.

    A series that holds slices of a bone kernel and of a soft one is two.

    Args:
        axial: the usable slices.
        rule: one of `pipeline.config.SERIES_RULES`.
        chosen: uids of series that are taken whatever the rule says.

    Returns:
        bool [slice], whether its series was chosen; and float64 [slice], by how many mm other series like it, of the same study, reach
        beyond the chosen one: a head may be divided between two.
    """
    unit = _units(axial)
    pairs = pd.DataFrame({"study_uid": axial["study_uid"], "unit": unit}).drop_duplicates()
    several = pairs["study_uid"].duplicated(keep=False)
    is_chosen, beyond_mm = np.ones(len(axial), bool), np.zeros(len(axial))
    if not several.any():
        return is_chosen, beyond_mm
    contested = axial["study_uid"].isin(pairs.loc[several, "study_uid"]).to_numpy()
    slices, unit = axial[contested], unit[contested]
    described = _describe_series(slices, unit)
    described["not_chosen"] = ~described["unit"].str.partition(BETWEEN)[0].isin(chosen)
    described = described.sort_values(["study_uid", "not_chosen", *WISHES[rule], "is_derived", "fewer", "unit"])
    best = described.drop_duplicates("study_uid").set_index("study_uid")
    is_chosen[contested] = unit.to_numpy() == slices["study_uid"].map(best["unit"]).to_numpy()
    beyond_mm[contested] = slices["study_uid"].map(_reach_beyond(described, best)).to_numpy()
    return is_chosen, beyond_mm


BETWEEN = "\\"
"""Stands between a series' uid and a kernel: no uid holds it."""


def _units(axial: pd.DataFrame) -> pd.Series:
    """What is chosen between: a series, or of one that mixes kernels the slices of one of them."""
    unit, kernel = axial["series_uid"], axial["kernel"]
    if not ((kernel == "bone").any() and (kernel == "soft").any()):
        return unit
    kinds = kernel[kernel != ""].groupby(unit).nunique()
    return unit.where(~unit.isin(kinds.index[kinds > 1]), unit + BETWEEN + kernel)


def _describe_series(slices: pd.DataFrame, unit: pd.Series) -> pd.DataFrame:
    """One row a unit, with what the rules ask of it; smaller is better."""
    height_mm = (normals(slices) * centres(slices)).sum(axis=1)
    facts = pd.DataFrame(
        {
            "study_uid": slices["study_uid"],
            "unit": unit,
            "height_mm": height_mm,
            "place": height_mm.round(1),
            "thickness_mm": slices["thickness_mm"],
            "bone": (slices["kernel"] == "bone")
            | ((slices["kernel"] == "") & (slices["window_width"] > BONE_WIDTH_HU)),
            "derived": slices["image_type"].str.startswith("DERIVED"),
            "elsewhere": slices["body"] == "other",
            "projection": slices["projection"] == 1,
            "contrast": slices["contrast"] == 1,
        }
    )
    table = (
        facts.groupby(["study_uid", "unit"], sort=True)
        .agg(
            lowest_mm=("height_mm", "min"),
            highest_mm=("height_mm", "max"),
            slices=("height_mm", "size"),
            places=("place", "nunique"),
            thickness_mm=("thickness_mm", "median"),
            **{name: (name, "mean") for name in ("bone", "derived", "elsewhere", "projection", "contrast")},
        )
        .reset_index()
    )
    coverage_mm = table["highest_mm"] - table["lowest_mm"]
    spacing_mm = coverage_mm / (table["places"] - 1).clip(lower=1)
    table["thickness_mm"] = table["thickness_mm"].where(table["thickness_mm"] > 0, spacing_mm)
    table["is_elsewhere"] = (table["elsewhere"] > 0.5) | (coverage_mm > LONGEST_HEAD_MM)
    longest_mm = coverage_mm.where(~table["is_elsewhere"], 0).groupby(table["study_uid"]).transform("max")
    table["is_part"] = coverage_mm < WHOLE_COVERAGE * longest_mm.clip(upper=HEAD_MM)
    for name in ("bone", "derived", "projection", "contrast"):
        table[f"is_{name}"] = table[name] > 0.5
    table["is_soft"] = ~table["is_bone"]
    table["is_repeated"] = table["slices"] >= REPEATED * table["places"]
    ratio = np.log2(table["thickness_mm"].clip(0.1, 100.0) / USUAL_THICKNESS_MM).abs()
    table["off_thickness"] = (ratio * 4).round()  # in steps of a fifth: 4.8 and 5 mm are one
    table["fewer"], table["fewer_slices"] = -table["places"], -table["slices"]
    return table


ALIKE = ["is_elsewhere", "is_projection", "is_contrast", "is_bone"]


def _reach_beyond(described: pd.DataFrame, best: pd.DataFrame) -> pd.Series:
    """Study uid → mm that other series like the chosen one reach beyond it, above and below."""
    own = best.loc[described["study_uid"]]
    alike = described[(described[ALIKE].to_numpy() == own[ALIKE].to_numpy()).all(axis=1)].groupby("study_uid")
    below_mm, above_mm = best["lowest_mm"] - alike["lowest_mm"].min(), alike["highest_mm"].max() - best["highest_mm"]
    return below_mm + above_mm


def measure_positions(slices: pd.DataFrame) -> npt.NDArray[np.float64]:
    """Position in mm along the normal that most slices of the series share, float64 [slice].

    Slices of one series may have several orientations (3 of 2,214 RSNA series), and only along one direction is there an order.
    """
    cosines = slices[ORIENTATION].to_numpy(float)
    rounded = cosines.round(3) + 0.0  # −0 is 0
    # a number for each orientation of a series: cheaper than grouping by seven columns
    series = pd.factorize(slices["series_uid"])[0]
    group = series
    for cosine in rounded.T:
        codes, values = pd.factorize(cosine)
        group = pd.factorize(group * len(values) + codes)[0]
    first = np.flatnonzero(~pd.Series(group).duplicated())
    counts = np.bincount(group)
    table = pd.DataFrame(rounded[first], columns=ORIENTATION).assign(
        series=series[first], fewer=-counts, group=np.arange(len(first))
    )
    shared = table.sort_values(["series", "fewer", *ORIENTATION]).drop_duplicates("series").set_index("series")["group"]
    # the mean, and no digit that is but its rounding error: slices at one place must not be told apart by the order of files
    mean = np.column_stack([np.bincount(group, cosines[:, axis]) for axis in range(6)]) / counts[:, None]
    normal = normals(pd.DataFrame(mean, columns=ORIENTATION))[shared.reindex(series).to_numpy()]
    return (normal * centres(slices)).sum(axis=1).round(6)


def measure_tilts(normal: Floats) -> npt.NDArray[np.float64]:
    """Angle between slice normals, [slice, 3], and the body's axis in degrees: float64 [slice]."""
    return np.rad2deg(np.arccos(np.clip(np.abs(normal[:, 2]), 0, 1)))


def measure_gaps(
    study: npt.NDArray[np.int64], position_mm: Floats
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.object_]]:
    """Distance of each slice to the one below, and where it is not as it should be.

    Two blocks of different spacing have no hole where they meet: a hole is wider than 1.5 times the gaps on both its sides.

    Args:
        study: number of each slice's study, ascending.
        position_mm: ascending within a study.

    Returns:
        float64 [slice], NaN for the lowest slice of a study; and ``hole``, ``overlap``, ``same_position`` or an empty text.
    """
    gap_mm = np.full(len(study), np.nan)
    inside = np.flatnonzero(study[1:] == study[:-1]) + 1
    gap_mm[inside] = position_mm[inside] - position_mm[inside - 1]
    median_mm = pd.Series(gap_mm).groupby(study).transform("median").to_numpy() if len(study) else gap_mm
    is_same = gap_mm < SAME_MM
    is_overlap = gap_mm < OVERLAP * median_mm
    places = np.flatnonzero(~is_same)  # several slices at one place are one here
    wide_mm = np.pad(gap_mm[places], 1, constant_values=np.nan)
    is_hole = np.zeros(len(study), bool)
    # fmax: at the ends there is a neighbour on one side alone; of two slices nobody can tell
    is_hole[places] = wide_mm[1:-1] > HOLE * np.fmax(wide_mm[:-2], wide_mm[2:])
    names = np.array(["", "same_position", "overlap", "hole"], object)
    return gap_mm, names[np.select([is_same, is_overlap, is_hole], [1, 2, 3], 0)]


def find_turns(slices: pd.DataFrame) -> npt.NDArray[np.int64]:
    """How each slice is to be turned so that rows run to the patient's left and columns to the back: bits, int64 [slice].

    In that form (1 0 0, 0 1 0) heads lie as radiologists look at them. Prone patients and some vendors have others.
    """
    row, column = slices[ROW].to_numpy(float), slices[COLUMN].to_numpy(float)
    transposed = np.abs(row[:, 0]) < np.abs(row[:, 1])
    to_left = np.where(transposed, column[:, 0], row[:, 0])
    to_back = np.where(transposed, row[:, 1], column[:, 1])
    return TRANSPOSED * transposed + ROWS_FLIPPED * (to_back < 0) + COLUMNS_FLIPPED * (to_left < 0)


def turn(stored: npt.NDArray[np.integer], turn: int) -> npt.NDArray[np.integer]:
    """A slice turned: a view of [row, column]."""
    if turn & TRANSPOSED:
        stored = stored.T
    if turn & ROWS_FLIPPED:
        stored = stored[::-1]
    return stored[:, ::-1] if turn & COLUMNS_FLIPPED else stored


def turn_cosines(cosines: Floats, turns: npt.NDArray[np.integer]) -> Floats:
    """Direction cosines of rows and columns after the turn: float64 [slice, 6]."""
    row, column = cosines[:, :3].copy(), cosines[:, 3:].copy()
    swap = (turns & TRANSPOSED) > 0
    row[swap], column[swap] = column[swap], row[swap].copy()
    row[(turns & COLUMNS_FLIPPED) > 0] *= -1
    column[(turns & ROWS_FLIPPED) > 0] *= -1
    return np.concatenate([row, column], axis=1)
