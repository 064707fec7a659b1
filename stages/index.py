"""Read the headers of every file of source.dicom; write the manifest, in which each file is used, repaired or excluded.

Writes <data>/index/manifest.parquet, headers.parquet (so that unchanged files are not read again) and summary.json.
"""

import argparse

from pipeline.config import Config, load_config
from pipeline.files import only_one, remove_leftovers, write_json, write_parquet
from pipeline.index import build_manifest, read_known_headers
from pipeline.manifest import account, describe_account, examples, refuse_too_many_exclusions, write_manifest
from stages.common import door


def main(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.params)
    with only_one(arguments.data / "wip" / "index.lock", "index"):
        remove_leftovers(arguments.data / "index", ".*.tmp")
        _index(config, arguments)


def _index(config: Config, arguments: argparse.Namespace) -> None:
    folder = arguments.data / "index"
    headers_path = folder / "headers.parquet"
    manifest, headers, found = build_manifest(config, read_known_headers(headers_path))
    if headers is not None:
        write_parquet(headers_path, headers)
    write_manifest(folder / "manifest.parquet", manifest)
    totals = account(manifest)
    write_json(folder / "summary.json", {**totals, **found, **examples(manifest)})
    print(describe_account(totals))
    print(
        f"{found['studies']:,} studies of {found['patients']:,} patients, {found['slices']:,} slices: "
        f"{found['slices_with_labels']:,} with labels, {found['slices_without_labels']:,} without; "
        f"labels for {found['labelled_images_excluded']:,} excluded and {found['labelled_images_not_found']:,} absent images"
    )
    for name, counts in found["spacing"].items():
        if counts["slices"]:
            print(f"  {name.replace('_', ' '):14s}{counts['slices']:9,} slices in {counts['studies']:,} studies")
    if count := found["studies_with_more_in_another_series"]:
        print(f"  {count:,} studies have more of the head in another series than in the one that was chosen")
    refuse_too_many_exclusions(totals, most=config.index.max_excluded_fraction)


if __name__ == "__main__":
    door(main, __doc__)
