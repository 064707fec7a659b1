"""Make a cohort of phantom head CTs with the five bleeds, for a run with no data of one's own.

Writes <data>/phantom/dicom (RSNA's form, one flat folder) and <data>/phantom/labels.csv (ID,Label).
"""

import argparse
from pathlib import Path

from pipeline.config import load_config
from pipeline.phantom.cohort import write_cohort
from stages.common import door


def main(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.params)
    if arguments.figure:
        from pipeline.phantom.figure import draw_figure  # matplotlib, which nothing else here needs

        draw_figure(config.phantom, arguments.figure)
        print(f"figure written to {arguments.figure}")
        return
    folder, wip = arguments.data / "phantom", arguments.data / "wip"
    print(write_cohort(config.phantom, folder=folder, wip=wip, workers=config.preprocess.workers))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw a picture instead of writing the cohort")


if __name__ == "__main__":
    door(main, __doc__, add_arguments)
