"""Look into the store: a summary, one study as a contact sheet, a check of every chunk; or at what did not get into it.

python -m stages.inspect                              the summary
python -m stages.inspect --study 12 --out sheet.png   a study by number or uid, as a picture
python -m stages.inspect --tree                       the arrays: types, dimensions, chunks, bytes
python -m stages.inspect --histogram                  how often each grey value occurs, window by window (--study: of one study)
python -m stages.inspect --verify                     decode everything against its checksums
python -m stages.inspect --excluded --out out.png     what was excluded and why, and a picture of what can be decoded
"""

import argparse
import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.config import ALL_WINDOWS, load_config
from pipeline.errors import DamageError, IchorError, UsageError
from pipeline.excluded import draw_exclusions, list_exclusions, read_exclusions
from pipeline.files import human_bytes, write_output
from pipeline.manifest import REASONS, describe_account
from pipeline.progress import Progress
from pipeline.sheet import draw_sheet
from pipeline.store import Store
from pipeline.survey import SAMPLE, count_values, describe_arrays, discard_shards, survey, verify
from stages.common import door

SHOWN = 10
"""Files listed of each reason; enough to see what they have in common."""

TAKEN_BY = {
    "window": ("study",),
    "out": ("study", "excluded"),
    "discard": ("verify",),
    "json": ("", "excluded", "histogram", "tree"),
}
"""What each option goes with; "" is the summary."""

PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}

BINS, BAR = 16, 48
"""Lines of a histogram, and characters of its longest bar: a window fits a terminal of 80 columns by 24 lines."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--study", metavar="UID|N", help="draw this study as a contact sheet; with --histogram, count it"
    )
    parser.add_argument("--window", metavar="NAME", help="of the sheet: a window's name, or all (default: the first)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where to draw: a study (default: sheet.png), or what was excluded (default: no picture)",
    )
    parser.add_argument(
        "--excluded",
        action="store_true",
        help="list what was excluded, by reason (--json: every file); with --out, draw what can be decoded: such captures may "
        "show names",
    )
    parser.add_argument(
        "--verify", action="store_true", help="check that every chunk decodes and agrees with its checksum"
    )
    parser.add_argument(
        "--discard",
        action="store_true",
        help="with --verify: drop damaged shards, here and in DVC's cache, so that preprocess makes them anew",
    )
    parser.add_argument("--tree", action="store_true", help="list the store's arrays, without reading any")
    parser.add_argument(
        "--histogram",
        action="store_true",
        help=f"count the stored values of each window, in {SAMPLE} slices of all, evenly spread, or in those of --study",
    )
    parser.add_argument("--json", action="store_true", help="print the summary, or what else was asked for, as JSON")


def main(arguments: argparse.Namespace) -> None:
    _refuse_what_does_not_go_together(arguments)
    if arguments.excluded:  # also where there is no store: perhaps too much was excluded to make one
        _show_exclusions(arguments)
        return
    store = Store(arguments.data / "store.zarr")
    if arguments.histogram:
        _show_histogram(store, arguments)
    elif arguments.tree:
        _show_tree(store, arguments)
    elif arguments.study is not None:
        _draw(store, arguments)
    elif arguments.verify:
        _verify(store, arguments)
    elif arguments.json:
        json.dump(survey(store), sys.stdout, indent=2)
        print()
    else:
        _summarize(store)


def _refuse_what_does_not_go_together(arguments: argparse.Namespace) -> None:
    asked = [name for name in ("excluded", "histogram", "tree", "verify") if getattr(arguments, name)]
    if arguments.study is not None and asked != ["histogram"]:
        asked.append("study")
    if len(asked) > 1:
        raise UsageError(f"--{asked[0]} and --{asked[1]}: give one of them")
    for option, takers in TAKEN_BY.items():
        if getattr(arguments, option) and (asked[0] if asked else "") not in takers:
            named = " or ".join(f"--{name}" if name else "the summary" for name in takers)
            raise UsageError(f"--{option} goes with {named}")
    if arguments.out and arguments.out.suffix.lower() not in PICTURES:
        raise UsageError(f"--out {arguments.out}: expected a name that ends in {', '.join(PICTURES)}")


def _draw(store: Store, arguments: argparse.Namespace) -> None:
    names = list(store.windows)
    wanted = arguments.window or names[0]
    if wanted != ALL_WINDOWS and wanted not in names:
        raise UsageError(f"--window {wanted}: the store has {', '.join(names)}; give one of them, or all")
    study = store.find_study(arguments.study)
    sheet = draw_sheet(store, study, names if wanted == ALL_WINDOWS else [wanted])
    out = arguments.out or Path("sheet.png")
    _save(sheet, out)
    print(f"study {study} of {len(store.study)}: {out}")


def _save(picture: Image.Image, out: Path) -> None:
    content = io.BytesIO()
    picture.save(content, PICTURES[out.suffix.lower()])
    try:
        write_output(out, content.getvalue())
    except OSError as error:
        raise IchorError(f"--out {out}: {error.strerror}") from None


def _show_exclusions(arguments: argparse.Namespace) -> None:
    excluded = read_exclusions(arguments.data)
    files = list_exclusions(excluded)
    if arguments.json:
        json.dump(files, sys.stdout, indent=2)
        print()
    else:
        print(f"{len(excluded):,} excluded")
        for reason, names in files.items():
            print(f"\n{len(names):,} × {REASONS[reason][1]} ({reason})")
            for name in names[:SHOWN]:
                print(f"  {name}")
            if len(names) > SHOWN:
                print(f"  and {len(names) - SHOWN:,} more (--json lists all)")
    if arguments.out:
        picture, count = draw_exclusions(excluded, load_config(arguments.params).source.entries)
        _save(picture, arguments.out)
        print(f"{count} slices drawn: {arguments.out}", file=sys.stderr)


def _show_histogram(store: Store, arguments: argparse.Namespace) -> None:
    counts_WV = count_values(store, None if arguments.study is None else store.find_study(arguments.study))
    if arguments.json:
        json.dump(dict(zip(store.windows, counts_WV.tolist(), strict=True)), sys.stdout)
        print()
        return
    for (name, window), counts_V in zip(store.windows.items(), counts_WV, strict=True):
        print(f"{name} {window.centre:g}/{window.width:g}, {counts_V.sum():,} pixels")
        first_hu, step_hu = window.centre - window.width / 2, window.width / BINS
        shares_V = counts_V / counts_V.sum()
        inside = np.bincount(np.arange(1, 255) * BINS // 255, shares_V[1:255]).tolist()
        longest = max(*inside, 1e-9)  # what is clipped would dwarf the rest
        print(f"  at or below {first_hu:7g} HU  {shares_V[0]:6.1%}")
        for number, share in enumerate(inside):
            bar = "█" * round(BAR * share / longest)
            print(f"  from        {first_hu + number * step_hu:7g} HU  {share:6.1%}  {bar}".rstrip())
        print(f"  at or above {first_hu + window.width:7g} HU  {shares_V[255]:6.1%}")


def _show_tree(store: Store, arguments: argparse.Namespace) -> None:
    arrays = describe_arrays(store)
    if arguments.json:
        json.dump(arrays, sys.stdout, indent=2)
        print()
        return
    print(f"{store.path}   {human_bytes(sum(facts['bytes'] for facts in arrays.values()))}")
    for name, facts in arrays.items():
        shape = " × ".join(f"{dimension} {length:,}" for dimension, length in facts["dimensions"].items())
        print(f"  {name:18s} {facts['type']:8s} {human_bytes(facts['bytes']):>8s}  [{shape}]")
        units = f", in {facts['units']}" if facts["units"] and " mm" not in facts["meaning"] else ""
        print(f"  {'':18s} {facts['meaning']}{units}")
        if facts["shard"]:
            chunk, shard = ("×".join(map(str, facts[kind])) for kind in ("chunk", "shard"))
            print(f"  {'':18s} {facts['files']:,} shards of {shard}, in chunks of {chunk}")


def _verify(store: Store, arguments: argparse.Namespace) -> None:
    damaged: list[int] = []
    with Progress(int(store.num_slices.sum()), what="verify", unit="slices") as progress:
        for study, faults in verify(store):
            progress.advance(int(store.num_slices[study]), f"{len(damaged)} studies damaged")
            for fault in faults:
                print(fault, file=sys.stderr)
            if faults:
                damaged.append(study)
    if not damaged:
        print(
            f"{len(store.study):,} studies, {store.num_slices.sum():,} slices: every chunk decodes and agrees with its checksum"
        )
        return
    if arguments.discard:
        folders = [arguments.data / "wip" / "shards", Path(".dvc/cache")]
        for study in damaged:
            discard_shards(store, study, [folder for folder in folders if folder.is_dir()])
    remedy = (
        "dropped; run `dvc repro` (or `python -m stages.preprocess`) to make them anew"
        if arguments.discard
        else "add --discard to drop them, so that preprocess makes them anew"
    )
    raise DamageError(f"{store.path}: {len(damaged)} of {len(store.study)} studies are damaged; {remedy}")


def _summarize(store: Store) -> None:
    facts = survey(store)
    print(f"{store.path}   format {facts['format_version']}, digest {facts['digest'][:12]}")
    print(
        f"  {facts['studies']:,} studies of {facts['patients']:,} patients, {facts['slices']:,} slices "
        f"({facts['slices_with_labels']:,} with labels), the longest study has {facts['longest_study']}"
    )
    print(
        f"  {facts['image_size']} × {facts['image_size']} × {len(facts['windows'])} windows, {human_bytes(facts['bytes_on_disk'])} on disk, "
        f"{facts['stored_fraction']:.1%} of the raw pixels' {human_bytes(facts['raw_bytes'])}"
    )
    print("\n  label               positive slices  positive studies")
    for name, counts in facts["labels"].items():
        print(
            f"  {name:18s} {counts['slices']:9,} {counts['slices'] / max(1, facts['slices']):6.1%} {counts['studies']:9,} {counts['studies'] / facts['studies']:6.1%}"
        )
    print("\n  window     centre/width (HU)   mean   below   above   (of a sample)")
    for name, window in facts["windows"].items():
        shown = f"{window['centre']:g}/{window['width']:g}"
        print(f"  {name:10s} {shown:>17s} {window['mean']:6.1f}  {window['below']:6.1%}  {window['above']:6.1%}")
    print("\n  " + describe_account(facts["accounting"]).replace("\n", "\n  "))


if __name__ == "__main__":
    door(main, __doc__, add_arguments, stopped="stopped")
