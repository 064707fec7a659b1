"""Slices as series: which one of a study is chosen, where its slices lie, what is missing, and how they are turned."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pydicom
import pytest

from pipeline.index import build_manifest
from pipeline.manifest import EXCLUDED
from pipeline.purpose import kernel_class
from pipeline.series import (
    COLUMN,
    ORIENTATION,
    PLACE,
    ROW,
    choose_series,
    find_turns,
    measure_gaps,
    measure_positions,
    normals,
    turn,
    turn_cosines,
)
from tests.conftest import REAL_DICOM, Cohort

AXIAL = [1.0, 0, 0, 0, 1, 0]


def stack(
    uid: str,
    *,
    study: str = "study",
    count: int = 30,
    spacing_mm: float = 5.0,
    start_mm: float = 0.0,
    orientation: list[float] | None = None,
    **columns: Any,
) -> pd.DataFrame:
    """The rows of one series, lowest slice first; `columns` are values of `pipeline.header.Header`."""
    heights = start_mm + spacing_mm * np.arange(count)
    table = pd.DataFrame({"series_uid": uid, "study_uid": study}, index=range(count))
    table[PLACE] = np.column_stack([np.full(count, -100.0), np.full(count, -90.0), heights])
    table[ORIENTATION] = orientation or AXIAL
    values = {"thickness_mm": spacing_mm, "kernel": "", "window_width": 80.0, "image_type": "ORIGINAL\\PRIMARY\\AXIAL"}
    values |= {"body": "", "contrast": -1, "projection": 0}
    values |= {"rows": 512, "columns": 512, "row_spacing_mm": 0.5, "column_spacing_mm": 0.5}
    return table.assign(**(values | columns))


def chosen_of(*series: pd.DataFrame, rule: str = "soft_tissue", chosen: tuple[str, ...] = ()) -> str:
    """The one series that is chosen, of one study."""
    table = pd.concat(series, ignore_index=True)
    is_chosen, _ = choose_series(table, rule=rule, chosen=list(chosen))
    (uid,) = set(table.loc[is_chosen, "series_uid"])
    return str(uid)


# ---- the choice

THICK_SOFT: dict[str, Any] = {"count": 30, "spacing_mm": 5.0}
THIN_BONE: dict[str, Any] = {"count": 150, "spacing_mm": 1.0}


@pytest.mark.parametrize(
    ("of_soft", "of_bone"),
    [
        ({"kernel": "soft"}, {"kernel": "bone"}),
        ({"kernel": ""}, {"kernel": "bone"}),
        ({"window_width": 80.0}, {"window_width": 2800.0}),
        ({}, {}),  # thickness alone
        ({"kernel": "soft", "window_width": 2800.0}, {"kernel": "bone", "window_width": 80.0}),  # the kernel counts
    ],
    ids=["kernels", "one kernel", "windows", "thickness", "kernel against window"],
)
def test_thick_soft_tissue_is_chosen_before_thin_bone(of_soft: dict[str, Any], of_bone: dict[str, Any]) -> None:
    soft, bone = stack("b soft", **THICK_SOFT, **of_soft), stack("a bone", **THIN_BONE, **of_bone)
    assert chosen_of(soft, bone) == "b soft"
    assert chosen_of(bone, soft) == "b soft"


def test_bone_is_taken_where_there_is_nothing_else() -> None:
    assert chosen_of(stack("bone", kernel="bone")) == "bone"
    assert chosen_of(stack("thin", kernel="bone", **THIN_BONE), stack("thick", kernel="bone")) == "thick"


def test_part_of_the_head_is_no_whole_head() -> None:
    block = stack("a block", count=10, spacing_mm=5)
    whole = stack("b whole", count=60, spacing_mm=2.5)
    assert chosen_of(block, whole) == "b whole"
    nearly = stack("a nearly", count=26, spacing_mm=5)
    assert chosen_of(nearly, whole) == "a nearly"  # 125 of 147.5 mm are 85 %


def test_coverage_is_measured_along_the_normal() -> None:
    """A tilted stack is as long as its slices are apart, not as its z says."""
    cosine, sine = np.cos(np.deg2rad(30)), np.sin(np.deg2rad(30))
    tilted = stack("tilted", count=31, spacing_mm=5, orientation=[1, 0, 0, 0, cosine, sine])
    steps = 5.0 * np.arange(31)
    tilted[PLACE] = np.outer(steps, [0, -sine, cosine])
    straight = stack("straight", count=61, spacing_mm=2.5)
    assert (
        chosen_of(tilted, straight) == "tilted"
    )  # 130 mm of z would be 87 %, the same; but 150 of 150 and nearer to 5 mm


def test_original_is_chosen_before_derived() -> None:
    derived = stack("a derived", image_type="DERIVED\\SECONDARY\\REFORMATTED")
    assert chosen_of(derived, stack("b original")) == "b original"


def test_thickness_that_nobody_wrote_is_the_distance_of_the_slices() -> None:
    thick = stack("b", thickness_mm=np.nan)
    thin = stack("a", thickness_mm=np.nan, count=150, spacing_mm=1.0)
    assert chosen_of(thin, thick) == "b"
    assert chosen_of(stack("a", thickness_mm=0.0, count=150, spacing_mm=1.0), thick) == "b"


def test_slightly_different_thickness_is_no_reason() -> None:
    assert chosen_of(stack("a", count=20, thickness_mm=5.0), stack("b", count=21, thickness_mm=4.8)) == "b"


@pytest.mark.parametrize(
    "other",
    [
        {"contrast": 1},
        {"contrast": 1, "thickness_mm": 5.0, "count": 32},
        {"count": 350, "spacing_mm": 1.0, "contrast": 1},  # an angiography from the arch to the vertex
        {"count": 350, "spacing_mm": 1.0},  # the same, whose header says nothing
        {"count": 110, "spacing_mm": 2.0, "body": "other"},  # a cervical spine
        {"count": 110, "spacing_mm": 2.0},
        {"count": 130, "spacing_mm": 5.0},  # a trunk
        {"count": 30, "spacing_mm": 5.0, "body": "other"},
        {"count": 30, "spacing_mm": 5.0, "projection": 1},
    ],
    ids=lambda columns: " ".join(f"{name}={value}" for name, value in columns.items()),
)
def test_native_head_is_chosen_before_anything_else(other: dict[str, Any]) -> None:
    head = stack("z head", count=32, spacing_mm=4.8, body="head")
    another = stack("a other", **{"kernel": "soft", **other})
    assert chosen_of(head, another) == "z head"
    assert chosen_of(another, head) == "z head"
    assert chosen_of(another) == "a other"  # where there is nothing else


def test_projection_is_the_last_choice_though_it_is_thick() -> None:
    thin = stack("z", count=60, spacing_mm=2.5, image_type="DERIVED\\SECONDARY\\AXIAL")
    assert chosen_of(thin, stack("a", projection=1)) == "z"


def test_perfusion_shows_the_same_places_again_and_again_and_is_left() -> None:
    perfusion = pd.concat([stack("a", count=27)] * 20, ignore_index=True)
    assert chosen_of(perfusion, stack("b", count=29)) == "b"


def test_series_of_two_kernels_is_two() -> None:
    """As older archives keep them: soft and bone at each place, under one uid."""
    mixed = pd.concat([stack("a", count=20, kernel="soft"), stack("a", count=20, kernel="bone")], ignore_index=True)
    for rule, kernel in (("soft_tissue", "soft"), ("bone", "bone")):
        is_chosen, _ = choose_series(mixed, rule=rule, chosen=[])
        assert (is_chosen == (mixed["kernel"] == kernel)).all()
    is_chosen, _ = choose_series(pd.concat([mixed, stack("b", kernel="bone")]), rule="bone", chosen=["a"])
    assert is_chosen.sum() == 20


def test_head_divided_between_two_series_is_told() -> None:
    base = stack("base", count=20, spacing_mm=3.0, kernel="soft")
    cerebrum = stack("cerebrum", count=14, spacing_mm=7.0, start_mm=60.0, kernel="soft")
    table = pd.concat([base, cerebrum, stack("bone", count=200, spacing_mm=1.0, kernel="bone")], ignore_index=True)
    is_chosen, beyond_mm = choose_series(table, rule="soft_tissue", chosen=[])
    assert set(table.loc[is_chosen, "series_uid"]) == {"cerebrum"}
    assert set(beyond_mm) == {60.0}
    whole = stack("whole", count=30, kernel="soft")
    _, beyond_mm = choose_series(
        pd.concat([whole, stack("thin", count=150, spacing_mm=1.0)]), rule="soft_tissue", chosen=[]
    )
    assert set(beyond_mm) == {4.0}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("soft_tissue", "thick soft"), ("bone", "thin bone"), ("thin", "thin soft"), ("most_slices", "thin bone")],
)
def test_rule_decides(rule: str, expected: str) -> None:
    series = [
        stack("thick soft", kernel="soft", **THICK_SOFT),
        stack("thin soft", kernel="soft", count=120, spacing_mm=1.25),
        stack("thin bone", kernel="bone", **THIN_BONE),
        stack("thin part", kernel="soft", count=100, spacing_mm=0.6),
    ]
    assert chosen_of(*series, rule=rule) == expected


def test_person_who_names_a_series_gets_it() -> None:
    soft, bone = stack("soft", kernel="soft"), stack("bone", kernel="bone", **THIN_BONE)
    assert chosen_of(soft, bone, chosen=("bone",)) == "bone"
    assert chosen_of(soft, bone, chosen=("of another study",)) == "soft"


def test_tie_goes_to_the_first_uid_in_whatever_order_the_files_come() -> None:
    series = [stack(uid) for uid in ("c", "a", "b")]
    assert {chosen_of(*(series[i] for i in order)) for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0))} == {"a"}
    table = pd.concat(series).sample(frac=1, random_state=0)
    is_chosen, _ = choose_series(table, rule="soft_tissue", chosen=[])
    assert (is_chosen == (table["series_uid"] == "a")).all()


def test_each_study_is_chosen_for_by_itself() -> None:
    table = pd.concat(
        [
            stack("1 long", study="1", count=40),
            stack("1 short", study="1", count=10),
            stack("2 short", study="2", count=10),
            stack("3 bone", study="3", kernel="bone"),
            stack("3 soft", study="3", count=29),
        ]
    )
    is_chosen, _ = choose_series(table, rule="soft_tissue", chosen=[])
    assert set(table.loc[is_chosen, "series_uid"]) == {"1 long", "2 short", "3 soft"}
    assert is_chosen.sum() == 40 + 10 + 29


def test_parameters_reach_the_choice(cohort: Cohort) -> None:
    cohort.size = 16
    cohort.add_study(1, 5)
    for k in range(4):
        cohort.add_study(1, 1, series_id="ID_other", image_id=f"ID_{k:09x}", position_mm=(0.0, 0.0, 6.0 * k))
        (cohort.dicom / "ID_000010000.dcm").rename(cohort.dicom / f"other{k}.dcm")
    cohort.add_study(1, 1)

    def used(**changes: Any) -> set[str]:
        manifest, _, _ = build_manifest(cohort.config(**changes))
        assert set(manifest.loc[manifest["status"] == EXCLUDED, "reason"]) == {"other_series"}
        return set(manifest.loc[manifest["status"] != EXCLUDED, "series_uid"])

    assert used() == {"ID_0000001001"}
    assert used(index__chosen_series=["ID_other"]) == {"ID_other"}
    assert used(index__series="most_slices") == {"ID_0000001001"}


KERNELS = {
    "soft": [
        *("STANDARD", "STND", "STD+", "SOFT"),  # GE
        *(
            "H31s",
            "H30s",
            "H40s",
            "J40s",
            "J30s\\3",
            "Hr38",
            "Hr40d",
            "Hc44",
            "Br40",
            "Br36f",
            "B30f",
            "Qr40",
            "H48h",
            "Hp38u",
        ),
        *("UA", "UB", "UC", "A", "B", "Brain Standard", "Brain Sharp (UC)"),  # Philips
        *("FC21", "FC26", "FC23", "FC64", "FC68", "FC41", "FC13", "FC08-H"),  # Toshiba, Canon
        *("Brain LCD", "SmoothBrain", "H_SOFT_B", "Body Standard"),
    ],
    "bone": [
        *("BONE", "BONEPLUS", "BONE+", "DETAIL", "EDGE", "LUNG", "ULTRA"),
        *("H60s", "H70h", "U75u", "Hr64", "Hr68h\\2", "B70f", "J70h", "Br64", "Ur77", "Bl57"),
        *("YA", "YB", "YC", "YD", "D", "E"),
        *("FC30", "FC31", "FC35", "FC51", "FC81"),
        *("BONE BRAIN", "Brain Bone", "H_SHARP_C"),
    ],
    "": ["", "C", "22", "X", "MÜLLER^ANNA", "\\", "7"],
}


@pytest.mark.parametrize(
    ("kernel", "kind"), [(kernel, kind) for kind, kernels in KERNELS.items() for kernel in kernels]
)
def test_vendors_kernels_are_known(kernel: str, kind: str) -> None:
    assert kernel_class(kernel, "") == kind


@pytest.mark.parametrize(
    ("kernel", "description", "kind"),
    [
        ("", "STD BRAIN 5MM", "soft"),
        ("", "BONE BRAIN 1MM", "bone"),
        ("", "CCT nativ 0.75 Knochen", "bone"),
        ("", "Hirn 5.0", "soft"),
        ("", "Posterior Fossa", "soft"),
        ("", "crâne os 1mm", "bone"),
        ("", "Head 5.0 MPR", ""),
        ("UB", "BONE", "soft"),  # the kernel is what was done, the description what was said
        ("7", "Brain", "soft"),
    ],
)
def test_description_tells_where_the_kernel_does_not(kernel: str, description: str, kind: str) -> None:
    assert kernel_class(kernel, description) == kind


@pytest.mark.skipif(not REAL_DICOM.is_dir(), reason="the real head CTs are not here")
def test_real_bone_series_is_left_for_the_soft_one(cohort: Cohort) -> None:
    manifest, _, _ = build_manifest(cohort.config(source__dicom=str(REAL_DICOM)))
    left = manifest[manifest["reason"] == "other_series"]
    assert set(left["kernel"]) == {"bone"}
    descriptions = {
        pydicom.dcmread(Path(REAL_DICOM) / path, stop_before_pixels=True).SeriesDescription for path in left["path"]
    }
    assert descriptions == {"BONE BRAIN 1MM"}


# ---- positions


def tilted(degrees: float) -> list[float]:
    radians = np.deg2rad(degrees)
    return [1, 0, 0, 0, float(np.cos(radians)), float(np.sin(radians))]


def plain_positions(slices: pd.DataFrame) -> np.ndarray:
    """One series after the other: the most frequent orientation, its normal to the head's end, and a dot product with each slice's
    centre, 255.5 pixels of 0.5 mm along its rows and columns."""
    found = pd.Series(np.nan, index=slices.index)
    for _, series in slices.groupby("series_uid"):
        rounded = [tuple(row) for row in series[ORIENTATION].to_numpy(float).round(3)]
        most = max(sorted(set(rounded)), key=rounded.count)
        first = series.iloc[rounded.index(most)]
        normal = np.cross(first[ROW].to_numpy(float), first[COLUMN].to_numpy(float))
        normal = normal / np.linalg.norm(normal) * (1 if normal[2] >= 0 else -1)
        for index, one in series.iterrows():
            centre = (
                one[PLACE].to_numpy(float) + 127.75 * one[ROW].to_numpy(float) + 127.75 * one[COLUMN].to_numpy(float)
            )
            found[index] = centre @ normal
    return found.to_numpy()


def test_positions_agree_with_one_series_after_the_other() -> None:
    rng = np.random.default_rng(0)
    series = []
    for number in range(40):
        part = stack(f"{rng.integers(10**9)}", count=int(rng.integers(1, 30)), orientation=tilted(rng.uniform(-30, 30)))
        if number % 4 == 0:
            part.loc[part.index[: len(part) // 3], ORIENTATION] = AXIAL  # some slices of the series lie otherwise
        if number % 5 == 0:
            part[COLUMN] *= -1  # the normal points to the feet
        part[PLACE] = rng.uniform(-300, 300, (len(part), 3))
        series.append(part)
    table = pd.concat(series).sample(frac=1, random_state=0).reset_index(drop=True)
    np.testing.assert_allclose(measure_positions(table), plain_positions(table), atol=1e-3)


def test_positions_grow_towards_the_head_whatever_the_orientation() -> None:
    upright = stack("a", count=5)
    flipped = stack("b", count=5, orientation=[1, 0, 0, 0, -1, 0])
    table = pd.concat([upright, flipped], ignore_index=True)
    assert (np.diff(measure_positions(table).reshape(2, 5)) > 0).all()
    assert (normals(table)[:, 2] > 0).all()


def test_positions_do_not_depend_on_the_order_of_the_files() -> None:
    """Of a tilted stack with two slices at each place, shifted within the plane, and digits that differ from file to file."""
    rng = np.random.default_rng(0)
    table = stack("a", count=40, orientation=tilted(17))
    normal, inside = normals(table)[0], np.array(tilted(17)[3:])
    steps = np.repeat(np.arange(20), 2)
    table[PLACE] = np.outer(5.0 * steps, normal) + np.outer(rng.uniform(-90, 90, 40), inside)
    table[ORIENTATION] += rng.uniform(-1e-7, 1e-7, (40, 6))
    first = measure_positions(table)
    np.testing.assert_allclose(first, 5.0 * steps, atol=1e-3)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(40)
        np.testing.assert_array_equal(measure_positions(table.iloc[order].reset_index(drop=True)), first[order])


@pytest.mark.parametrize("degrees", [-25, -10, 10, 25])
def test_blocks_of_two_gantry_angles_are_not_interleaved(degrees: float) -> None:
    """The skull base with the gantry tilted, the rest upright: the first pixel of a tilted slice lies centimetres off."""
    orientation = tilted(degrees)
    base, rest = stack("a", count=8, orientation=orientation), stack("a", count=20)
    for table, heights_mm in ((base, 5.0 * np.arange(8)), (rest, 45.0 + 5.0 * np.arange(20))):
        centre = np.column_stack([np.zeros_like(heights_mm), np.zeros_like(heights_mm), heights_mm])
        table[PLACE] = centre - 127.75 * table[ROW].to_numpy(float) - 127.75 * table[COLUMN].to_numpy(float)
    position_mm = measure_positions(pd.concat([base, rest], ignore_index=True))
    np.testing.assert_allclose(position_mm, 5.0 * np.r_[0:8, 9:29], atol=1e-6)


def test_no_slice_has_no_position() -> None:
    assert measure_positions(stack("a", count=0)).shape == (0,)


# ---- gaps


def spacing_of(*positions_mm: float) -> list[str]:
    study = np.zeros(len(positions_mm), np.int64)
    return measure_gaps(study, np.array(positions_mm, float))[1].tolist()


@pytest.mark.parametrize(
    ("positions_mm", "expected"),
    [
        ([0, 5, 10, 15], ["", "", "", ""]),
        ([0, 5, 10, 20, 25], ["", "", "", "hole", ""]),
        ([0, 5, 15], ["", "", "hole"]),
        ([0, 10, 15], ["", "hole", ""]),
        ([0, 5, 10, 14, 15, 20, 25], ["", "", "", "", "overlap", "", ""]),
        ([0, 2.5, 5, 7.5, 12.5, 17.5, 22.5], [""] * 7),  # two blocks of different spacing
        ([0, 2.5, 5, 15, 20, 25], ["", "", "", "hole", "", ""]),  # and a hole between them
        ([0, 5, 5, 10], ["", "", "same_position", ""]),
        ([0, 0, 0, 5], ["", "same_position", "same_position", ""]),
        (
            [0, 0, 5, 5, 10, 10, 20, 20, 25],
            ["", "same_position", "", "same_position", "", "same_position", "hole", "same_position", ""],
        ),
        ([0, 5, 10, 10], ["", "", "", "same_position"]),
        ([0, 5, 10, 10, 15], ["", "", "", "same_position", ""]),
        ([0, 30], ["", ""]),  # of two slices nobody can tell
        ([0], [""]),
        ([], []),
    ],
)
def test_holes_overlaps_and_shared_places_are_named(positions_mm: list[float], expected: list[str]) -> None:
    assert spacing_of(*positions_mm) == expected


def test_gaps_are_measured_within_a_study() -> None:
    study = np.array([0, 0, 0, 1, 1, 1, 1, 2])
    position_mm = np.array([0, 5, 10, -400, -390, -380, -350, 7.0])
    gap_mm, spacing = measure_gaps(study, position_mm)
    np.testing.assert_array_equal(gap_mm, [np.nan, 5, 5, np.nan, 10, 10, 30, np.nan])
    assert spacing.tolist() == ["", "", "", "", "", "", "hole", ""]


# ---- turns

DIRECTIONS = [
    [*(first * sign for first in a), *(second * other for second in b)]
    for (a, b), sign, other in product([((1, 0, 0), (0, 1, 0)), ((0, 1, 0), (1, 0, 0))], (1, -1), (1, -1))
]


def test_every_orientation_is_turned_to_the_one_that_radiologists_look_at() -> None:
    table = pd.DataFrame(np.array(DIRECTIONS, float), columns=ORIENTATION)
    turns = find_turns(table)
    assert sorted(turns) == list(range(8))
    np.testing.assert_array_equal(turn_cosines(table.to_numpy(), turns), np.tile(AXIAL, (8, 1)))


@pytest.mark.parametrize("degrees", [-30.0, -3.0, 12.0, 30.0])
def test_tilted_and_rolled_heads_are_turned_to_the_nearest(degrees: float) -> None:
    """About the x axis as a gantry tilts, about z as a head rolls."""
    cosine, sine = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    about_x = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
    about_z = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
    for rotation in (about_x, about_z, about_x @ about_z):
        directions = np.array(DIRECTIONS, float).reshape(8, 2, 3) @ rotation.T
        table = pd.DataFrame(directions.reshape(8, 6), columns=ORIENTATION)
        turned = turn_cosines(table.to_numpy(), find_turns(table))
        np.testing.assert_allclose(turned, np.tile((np.eye(3)[:2] @ rotation.T).ravel(), (8, 1)), atol=1e-12)


@pytest.mark.parametrize("number", range(8))
def test_pixels_are_turned_as_the_cosines_are(number: int) -> None:
    """A pixel's place in the patient is the same before and after (PS3.3 C.7.6.2.1.1)."""
    row, column = np.array(DIRECTIONS[number][:3]), np.array(DIRECTIONS[number][3:])
    r, c = np.mgrid[:3, :4]
    x, y = (c * row[axis] + r * column[axis] for axis in (0, 1))
    turns = find_turns(pd.DataFrame([[*row, *column]], columns=ORIENTATION))
    x, y = turn(x, int(turns[0])), turn(y, int(turns[0]))
    assert (np.diff(x, axis=1) == 1).all()
    assert (np.diff(x, axis=0) == 0).all()
    assert (np.diff(y, axis=0) == 1).all()
    assert (np.diff(y, axis=1) == 0).all()
