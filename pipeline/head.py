"""Where the head lies in a study's field of view, so that a slice's pixels go to the head and not to the air around it.

A head fills less than half of a field of view of 250 mm, and a sixth of one of 400. The box is found on a coarse copy of
the whole study, in HU, and is one for the study: neighbouring slices stay comparable, and the vertex is not blown up to
the size of the skull.

Head holders are thin shells, tables are shells around foam, and foam is nearly air; a head is thick. So what is thin goes
(an opening), the largest piece over all slices stays, and what the opening took from ears and nose comes back in short
pieces only: a shell that touches the scalp is a long one. 40 slices take 13 ms of one core.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

TISSUE_HU = -300.0
"""Fat is −100, foam and pillows lie below −700; a pixel that skin fills by two thirds still counts."""

BONE_HU = 300.0
"""A skull averaged over coarse pixels stays a closed ring; of holders and tables, little lies above."""

THIN_MM = 10.0
"""What is thinner goes. Holders are 2 to 5 mm thick, and coarse pixels make up to 8 of them; what is left of a head at the
vertex is far thicker."""

EAR_MM = 40.0
"""The longest piece that comes back after the opening: an ear or the tip of a nose in one slice; holders are longer."""

LEAST_MM2 = 1000.0
"""The largest slice of a head covers more: a disk of 36 mm. A new-born's head covers 7,000, an adult's 25,000."""

WIDEST_MM = 220.0
LONGEST_MM = 260.0
"""A slice that is wider (along its rows) or longer shows shoulders: with both ears a head is up to 200 wide, and a tilted
slice from the nose to the neck up to 240 long."""

MARGIN_MM = 6.0
"""Air around the head: what the opening may round off (5 mm, half of THIN_MM) and half a coarse pixel. More would cost:
every mm takes 1 % of the scale. What is lost of the ears is in the box: heads are 30 to 40 mm longer than wide."""

LEAST_SIDE_MM = 120.0
"""A new-born's head. What is smaller is a piece of a head (the vertex alone), and must not be blown up to a head's size."""

Mask = npt.NDArray[np.uint8]
"""0 or 1."""


@dataclass(frozen=True, slots=True)
class Box:
    """A square in the plane of the slices, in mm from the centre of the field of view: rows run down, columns to the right."""

    top_mm: float
    left_mm: float
    side_mm: float


def find_head(coarse_hu: npt.NDArray[np.floating], *, side_mm: float) -> Box | None:
    """Find the square that holds the head in every slice of a study.

    Args:
        coarse_hu: float32 [slice, row, column] in HU: all slices of one study in their order, each the same square field
            of view; air (−1024) where nothing was measured. Meant for 128 rows: with fewer, holders and scalp merge.
        side_mm: side of that field of view.

    Returns:
        A square that holds the head and a margin, never reaching out of the field of view: it is shifted where the head
        lies at the border, and it is the whole field where the head fills that. None if there is no head: only air, or
        nothing large and thick enough.
    """
    head = find_mask(coarse_hu, side_mm=side_mm)
    if head is None:
        return None
    pitch_mm = side_mm / coarse_hu.shape[1]
    rows, columns = (_extent(np.flatnonzero(head.any(axis=across))) for across in ((0, 2), (0, 1)))
    longest_mm = pitch_mm * max(last - first for first, last in (rows, columns))
    box_mm = min(max(longest_mm + 2 * MARGIN_MM, LEAST_SIDE_MM), side_mm)

    def start_mm(extent: tuple[int, int]) -> float:
        centred = (sum(extent) * pitch_mm - side_mm - box_mm) / 2
        return float(np.clip(centred, -side_mm / 2, side_mm / 2 - box_mm))

    return Box(start_mm(rows), start_mm(columns), float(box_mm))


def find_mask(coarse_hu: npt.NDArray[np.floating], *, side_mm: float) -> npt.NDArray[np.bool_] | None:
    """The head's pixels, bool [slice, row, column]; none in slices that are blank or show shoulders.

    Arguments as for `find_head`. None if there is no head.
    """
    pitch_mm = side_mm / coarse_hu.shape[1]
    least = LEAST_MM2 / pitch_mm**2
    tissue = coarse_hu > TISSUE_HU
    shown = np.count_nonzero(tissue, axis=(1, 2)) >= least  # blank slices would cut a head in two
    if not shown.any():
        return None
    thin = max(3, round(THIN_MM / pitch_mm) | 1)  # odd, so that the kernel has a centre
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (thin, thin))
    # With a frame of air around each, the slices make one tall picture, and one call does for all.
    frame = thin // 2 + 1
    inner = (slice(None), slice(frame, -frame), slice(frame, -frame))
    framed, bone = (_framed(mask[shown], frame) for mask in (tissue, coarse_hu > BONE_HU))
    tall = (-1, framed.shape[2])
    solid: Mask = np.asarray(cv2.medianBlur(framed.reshape(tall) | _enclosed(bone.reshape(tall)), 3), np.uint8)
    opened: Mask = np.asarray(cv2.morphologyEx(solid, cv2.MORPH_OPEN, kernel), np.uint8).reshape(framed.shape)
    core = _framed(largest_piece(_outvoted(opened[inner])), frame).reshape(tall)
    lost = _short_pieces(solid & ~core, core, longest=EAR_MM / pitch_mm)
    near: Mask = np.asarray(cv2.dilate(core, kernel, iterations=2), np.uint8)
    head = (core | lost & near).reshape(framed.shape)[inner]
    head = head * _is_head(head, pitch_mm)[:, None, None]
    if np.count_nonzero(head, axis=(1, 2)).max() < least:
        return None
    found = np.zeros(coarse_hu.shape, bool)
    found[shown] = head
    return found


def _framed(mask: npt.NDArray[np.generic], width: int) -> Mask:
    return np.pad(mask.view(np.uint8), ((0, 0), (width, width), (width, width)))


def _enclosed(bone: Mask) -> Mask:
    """What bone encloses in each slice, without the bone: the cranial cavity, sinuses, air cells.

    Tissue is no such wall: a head that touches its holder in two places encloses air with it.
    """
    outside = bone.copy()
    cv2.floodFill(outside, None, (0, 0), 1)  # the frame is outside, and is one piece
    return 1 - outside


def _outvoted(mask: Mask) -> Mask:
    """What at least two of three neighbouring slices hold: one slice of garbage, streaks or air is outvoted."""
    if len(mask) < 3:
        return mask
    beyond = np.zeros_like(mask[:1])
    below, above = np.concatenate([beyond, mask[:-1]]), np.concatenate([mask[1:], beyond])
    return (below & mask) | (mask & above) | (below & above)


def largest_piece(mask: Mask) -> Mask:
    """The largest 3-D piece of a mask [slice, row, column]; pixels touch at their sides, and face to face across slices."""
    from scipy import ndimage  # only where a head is looked for: it takes a fifth of a second to import

    seen = mask.max(axis=0)
    if not seen.any():
        return mask
    rows, columns = (slice(*_extent(np.flatnonzero(seen.any(axis=across)))) for across in (1, 0))
    labels, _ = ndimage.label(mask[:, rows, columns])  # a third of all the time, and it goes with the pixels
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    largest = np.zeros_like(mask)
    largest[:, rows, columns] = labels == sizes.argmax()
    return largest


def _short_pieces(rest: Mask, core: Mask, *, longest: float) -> Mask:
    """The pieces of `rest` that touch the core, at a side or a corner, and are no longer than `longest` pixels."""
    count, labels = cv2.connectedComponents(rest, connectivity=8)
    touching = cv2.dilate(core, np.ones((3, 3), np.uint8)) > 0
    rows, columns = np.divmod(np.flatnonzero(rest.view(bool)), rest.shape[1])  # three times as fast as np.nonzero
    piece = np.asarray(labels[rows, columns], np.intp)
    chosen = np.zeros(count, bool)
    chosen[piece[touching[rows, columns]]] = True
    for place in (rows, columns):
        first, last = np.full(count, rest.size), np.zeros(count, np.intp)
        np.minimum.at(first, piece, place)
        np.maximum.at(last, piece, place)
        chosen &= last - first < longest
    found = np.zeros_like(rest)
    found[rows, columns] = chosen[piece]
    return found


def _is_head(mask: Mask, pitch_mm: float) -> npt.NDArray[np.bool_]:
    """Which slices are no larger than a head; all of them if none is."""
    long, wide = (pitch_mm * _lengths(mask.max(axis=axis).astype(bool)) for axis in (2, 1))
    fits = (long <= LONGEST_MM) & (wide <= WIDEST_MM)
    return fits if (fits & (long > 0)).any() else np.ones(len(mask), bool)


def _lengths(lines: npt.NDArray[np.bool_]) -> npt.NDArray[np.intp]:
    """From the first to the last true of each row."""
    lengths = lines.shape[1] - lines.argmax(axis=1) - lines[:, ::-1].argmax(axis=1)
    return np.where(lines.any(axis=1), lengths, 0)


def _extent(lines: npt.NDArray[np.intp]) -> tuple[int, int]:
    """The first, and the one after the last."""
    return int(lines[0]), int(lines[-1]) + 1
