"""Convert the slices of the manifest into the store: HU, repairs, resampling, windows; one study is one shard.

Reads <data>/index/manifest.parquet; writes <data>/store.zarr and <data>/preprocess/faults.parquet (slices whose pixels could
not be read, or needed a repair). Finished shards are kept in <data>/wip, so that a stopped run goes on where it was.
"""

import argparse

from pipeline.config import load_config
from pipeline.manifest import describe_account, read_manifest
from pipeline.preprocess import preprocess
from stages.common import door


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store",
        metavar="FOLDER|URL",
        help="put the store there instead of <data>/store.zarr: a folder, or S3-compatible storage such as s3://bucket/store.zarr "
        "(credentials and AWS_ENDPOINT_URL from the environment); DVC does not track it",
    )


def main(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.params)
    manifest = read_manifest(arguments.data / "index" / "manifest.parquet")
    totals, _ = preprocess(config, manifest, data=arguments.data, store=arguments.store)
    print(describe_account(totals))
    print(f"store: {arguments.store or arguments.data / 'store.zarr'}")


if __name__ == "__main__":
    door(main, __doc__, add_arguments)
