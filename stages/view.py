"""Walk the store in a browser: studies by label, prediction and error; each a stack of slices to scroll, window and zoom.

python -m stages.view                            opens the page in the browser; Ctrl-C ends it
python -m stages.view --study 16 --slice 22 --heat subdural   at that slice, with a heat map of where the network saw a label
python -m stages.view --no-browser --port 8765   prints the address; from elsewhere: ssh -L 8765:127.0.0.1:8765 HOST

The page is served to this machine alone, under an address that cannot be guessed, and only reads.
"""

import argparse
import os
import sys
import webbrowser

from pipeline.heat import HeatMaps
from pipeline.labels import LABELS
from pipeline.store import Store
from pipeline.viewer import LIKELIEST, Catalogue, ViewerServer, make_fragment, read_findings, read_predictions
from stages.common import door


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=_port, default=0, metavar="N", help="port to serve on (default: any free one)")
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    parser.add_argument("--study", metavar="UID|N", help="open this study")
    parser.add_argument(
        "--slice", type=int, metavar="K", help="with --study: at this slice, from 1, as the page counts"
    )
    parser.add_argument(
        "--heat",
        choices=[LIKELIEST, *LABELS],
        metavar="LABEL",
        help=f"with the heat map of a label, or of the {LIKELIEST}",
    )


def main(arguments: argparse.Namespace) -> None:
    store = Store(arguments.data / "store.zarr")
    fragment = make_fragment(store, study=arguments.study, slice_number=arguments.slice, heat=arguments.heat)
    train = arguments.data / "train"
    catalogue = Catalogue(store, read_predictions(train, store), read_findings(arguments.data), HeatMaps(store, train))
    with ViewerServer(catalogue, port=arguments.port) as server:
        print(f"{len(store.study):,} studies, {store.num_slices.sum():,} slices: {server.url}{fragment}", flush=True)
        print("Ctrl-C ends it.", flush=True)
        if not arguments.no_browser and _has_screen():
            webbrowser.open(server.knock_url + fragment)
        server.serve_forever()


def _has_screen() -> bool:
    """Without one, `webbrowser` would start a text browser in this terminal."""
    return sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def _port(text: str) -> int:
    if not (text.isdecimal() and int(text) < 1 << 16):
        raise argparse.ArgumentTypeError(f"{text!r} is no port; give a number from 0 to {(1 << 16) - 1}")
    return int(text)


if __name__ == "__main__":
    door(main, __doc__, add_arguments, stopped="stopped")
