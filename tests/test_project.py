"""What holds the project together: imports that only point down, the wall between the halves, pins and files in step."""

from __future__ import annotations

import argparse
import ast
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path, PurePath

import pytest
import yaml

from pipeline.labels import LABELS, SUBTYPES
from stages.common import _run
from tests.conftest import ROOT

LAYERS = [
    ["errors", "labels", "progress", "files", "config", "device", "provenance"],
    [
        "compiled",
        "head",
        "hounsfield",
        "garbage",
        "resample",
        "purpose",
        "series",
        "augment",
        "loss",
        "model",
        "optimise",
    ],
    ["bootstrap", "calibration", "operating", "held_out", "metrics", "curves", "baseline", "charts"],
    [
        "shard",
        "reader",
        "store",
        "folds",
        "storage",
        "place",
        "source",
        "decoder",
        "header",
        "pixels",
        "manifest",
        "checkpoint",
    ],
    ["processes", "live", "cluster", "loader", "sequence", "inference", "parts", "flow"],
    [
        "survey",
        "trained",
        "gradcam",
        "answer",
        "sheet",
        "excluded",
        "gallery",
        "heat",
        "results",
        "shortcut",
        "viewer",
        "phantom",
    ],
    ["index", "convert", "publish", "preprocess"],
    ["trainer", "fold", "report", "card", "evaluate", "predict", "dicom_out"],
]
"""Words → pure functions → data at rest → data in motion → the run. Within a layer, imports go to names further left."""

OWNERS = {
    "pydicom": {"decoder", "dicom_out", "header", "pixels", "phantom.dicom_writer"},
    "highdicom": {"dicom_out"},
    "zarr": {"store"},
    "dask": {"cluster"},
    "distributed": {"cluster"},
    "zstandard": {"shard"},
    "numba": {"compiled"},
    "albumentations": {"augment"},
    "monai": {"model"},
    "dvclive": {"live"},
    "sklearn": {"metrics", "baseline", "curves", "held_out"},
    "jinja2": {"report"},
}
TORCH = {
    "device", "model", "loss", "optimise", "loader", "processes", "checkpoint", "sequence", "inference", "trainer", "fold", "trained",
    "gradcam", "heat", "predict"
}  # fmt: skip

LATER = {"evaluate": {"torch"}, "view": {"torch"}}
"""What a door may import when it works, yet must not when it is loaded: heat maps ask the networks."""


def modules() -> dict[str, Path]:
    root = ROOT / "pipeline"
    paths = [path for path in root.rglob("*.py") if path.name != "__init__.py"]
    return {str(path.relative_to(root).with_suffix("")).replace("/", "."): path for path in paths}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, as written."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            is_package = node.module in ("pipeline", "pipeline.phantom")
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if is_package else {node.module}
    return found


def reached(door: str) -> set[str]:
    """The modules of ours that a door reaches through our own import statements."""
    waiting, seen = [ROOT / "stages" / f"{door}.py"], set()
    while waiting:
        for name in imports(waiting.pop()):
            path = ROOT / Path(*name.split(".")).with_suffix(".py")
            if name.startswith("pipeline.") and path.is_file() and name not in seen:
                seen.add(name)
                waiting.append(path)
    return seen


def test_imports_only_point_down() -> None:
    place = {name: (layer, column) for layer, names in enumerate(LAYERS) for column, name in enumerate(names)}
    for module, path in modules().items():
        top = module.split(".")[0]
        assert top in place, f"{module} has no layer"
        for imported in imports(path):
            if imported.startswith("pipeline."):
                other = imported.split(".")[1]
                assert other == top or place[other] < place[top], f"{module} imports {other}, which is above it"


def test_the_readme_lists_every_module_in_this_order() -> None:
    tree = (ROOT / "README.md").read_text().split("\npipeline/ ")[1].split("\n  phantom/ ")[0]
    listed = re.findall(r"(?:^|  )(\w+)\.py ", tree, re.MULTILINE)
    assert listed == [name for names in LAYERS for name in names if name != "phantom"]


@pytest.mark.parametrize("library", sorted(OWNERS))
def test_each_heavy_library_has_one_owner(library: str) -> None:
    users = {
        module for module, path in modules().items() if any(name.split(".")[0] == library for name in imports(path))
    }
    assert users == OWNERS[library]


def test_torch_is_known_to_the_training_half_alone() -> None:
    users = {
        module for module, path in modules().items() if any(name.split(".")[0] == "torch" for name in imports(path))
    }
    assert users == TORCH


@pytest.mark.parametrize(
    ("door", "never"),
    [
        ("index", {"torch"}),
        ("preprocess", {"torch"}),
        ("folds", {"torch", "pydicom", "dask", "distributed"}),
        ("train", {"pydicom", "dask", "distributed"}),
        ("view", {"torch", "pydicom", "dask", "distributed"}),
        ("evaluate", {"torch", "pydicom", "dask", "distributed"}),
        ("inspect", {"torch", "dask", "distributed"}),
    ],
)
def test_the_wall_between_the_halves(door: str, never: set[str]) -> None:
    for name in reached(door):
        path = ROOT / Path(*name.split(".")).with_suffix(".py")
        written = {imported.split(".")[0] for imported in imports(path)}
        assert not written & (never - LATER.get(door, set())), f"{door} reaches {name}"
    script = f"import sys, stages.{door}\nprint(*{{name.split('.')[0] for name in sys.modules}} & {never!r})"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_looking_at_a_store_loads_no_reader_of_dicom() -> None:
    script = "import sys, stages.inspect\nprint('pydicom' in sys.modules)"  # only pictures of what was excluded need it
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_training_the_default_model_loads_nothing_from_over_the_wall() -> None:
    script = (
        "import sys, stages.train\n"
        "from pipeline.model import build_model\n"
        "from pipeline.augment import build_augment\n"
        "from pipeline.config import load_config\n"
        "build_model('compact', channels=9, dropout=0.1); build_augment(load_config().train.augment)\n"
        "print(*{name.split('.')[0] for name in sys.modules} & {'pydicom', 'dask', 'distributed', 'monai'})"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    "door", sorted(path.stem for path in (ROOT / "stages").glob("[a-z]*.py") if path.stem != "common")
)
def test_every_door_has_help(door: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"stages.{door}", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert f"usage: python -m stages.{door}" in done.stdout
    assert "--params FILE" in done.stdout


def test_ctrl_c_while_a_door_still_imports_ends_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "yaml.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    command = [sys.executable, "-m", "stages.folds"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\nstopped before anything began\n")


def test_wrong_arguments_and_parameters_end_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("train: 3\n")
    for arguments, code, said in (
        (["--nonsense"], 2, "unrecognized arguments"),
        (["--params", str(tmp_path / "params.yaml")], 1, "train = 3: expected"),
        (["--params", str(tmp_path / "none.yaml")], 1, "no such parameter file"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "stages.index", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == code
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def test_environment_takes_the_pins() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge"]
    *others, pip = environment["dependencies"]
    assert [name.split("=")[0] for name in others] == ["python", "pip"]
    assert pip == {"pip": ["-r requirements.txt"]}


def pinned(name: str) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    pins = [
        re.fullmatch(r"([A-Za-z0-9_.-]+)==(\S+)", line) for line in lines if line and not line.startswith(("-c", "-r"))
    ]
    assert all(pins), f"{name} holds a line that is no exact pin"
    return {pin[1].lower().replace("_", "-"): pin[2] for pin in pins if pin}


def test_everything_is_pinned_once_and_installed_so() -> None:
    from importlib.metadata import PackageNotFoundError, version

    direct, indirect = pinned("requirements.txt"), pinned("constraints.txt")
    assert not direct.keys() & indirect.keys()
    for name, expected in direct.items():
        assert version(name).split("+")[0] == expected, name
    for name, expected in indirect.items():
        try:
            assert version(name) == expected, name
        except PackageNotFoundError:
            continue  # needed on other systems only


def test_what_a_pin_needs_is_pinned_too() -> None:
    from importlib.metadata import requires

    pins = pinned("requirements.txt") | pinned("constraints.txt")
    always = [line for name in pinned("requirements.txt") for line in requires(name) or () if ";" not in line]
    needed = {re.split(r"[^A-Za-z0-9_.-]", line)[0].lower().replace("_", "-").replace(".", "-") for line in always}
    assert {"llvmlite", "scipy"} <= needed
    assert needed <= {name.replace(".", "-") for name in pins} | {"setuptools"}, "which comes with every environment"


def test_every_import_is_a_direct_requirement() -> None:
    names = {
        "cv2": "opencv-python-headless",
        "PIL": "pillow",
        "yaml": "pyyaml",
        "sklearn": "scikit-learn",
        "google_crc32c": "google-crc32c",
        "gdcm": "python-gdcm",
        "jpeg_ls": "pyjpegls",
        "_CharLS": "pyjpegls",
        "openjpeg": "pylibjpeg-openjpeg",
        "rle": "pylibjpeg-rle",
    }
    direct = pinned("requirements.txt") | pinned("requirements-bench.txt")
    ours = {"pipeline", "stages", "tests", "benchmarks"}
    files = [path for folder in ("pipeline", "stages", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    used = {name.split(".")[0] for path in files for name in imports(path)} - set(sys.stdlib_module_names) - ours
    assert {names.get(name, name).lower() for name in used} <= direct.keys()


def test_dvc_stages_depend_on_the_code_that_makes_their_outputs() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for name, stage in stages.items():
        assert f"stages/{name}.py" in stage["deps"]
        for dependency in stage["deps"]:
            if dependency.endswith(".py"):
                assert (ROOT / dependency).is_file(), dependency


def test_dvc_lists_every_parameter_that_shapes_the_weights() -> None:
    from pipeline.config import load_config

    listed = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["train"]["params"]
    shaping = load_config(ROOT / "params.yaml").train.shaping()
    assert {key.removeprefix("train.") for key in listed if key.startswith("train.")} == shaping.keys()
    assert "folds" in listed


def test_what_decides_the_weights_is_known_to_dvc_and_to_checkpoints() -> None:
    from pipeline.fold import SHAPING

    listed = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["train"]["deps"]
    code = {name for name in listed if name.startswith("pipeline/")}
    assert code == {f"{module.__name__.replace('.', '/')}.py" for module in SHAPING} | {"pipeline/fold.py"}


def test_ci_runs_what_the_readme_says() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    readme = (ROOT / "README.md").read_text()
    assert "make run" in readme
    assert "make test" in readme
    assert len(readme.splitlines()) < 200


def test_readme_names_every_module() -> None:
    readme = (ROOT / "README.md").read_text()
    for module in modules():
        if not module.startswith("phantom."):
            assert re.search(rf"\b{module}\.py\b", readme), f"README's tree lacks {module}.py"


def test_readme_results_are_those_of_the_committed_run() -> None:
    metrics = json.loads((ROOT / "data" / "report" / "metrics.json").read_text())
    readme = (ROOT / "README.md").read_text()
    for label in LABELS:
        slices, studies = metrics["slice"][label], metrics["study"][label]
        figures = [slices["auc"], slices["average_precision"], studies["auc"]]
        row = f"| {label} | {slices['positives']} ({slices['positive_patients']}) | " + " | ".join(
            f"{x:.3f}" for x in figures
        )
        assert row in readme, row
    assert f"Weighted log loss {metrics['slice']['weighted_log_loss']:.3f}" in readme
    assert f"the skull reaches {metrics['counting']['any_auc']:.3f}" in readme


def test_committed_run_meets_the_bounds_of_the_phantom_cohort() -> None:
    metrics = json.loads((ROOT / "data" / "report" / "metrics.json").read_text())
    assert metrics["slice"]["any"]["auc"] >= 0.90
    assert metrics["counting"]["any_auc_above_counting"] >= 0.10
    for subtype in SUBTYPES:
        assert metrics["slice"][subtype]["auc"] > 0.75, subtype
        assert metrics["slice"][subtype]["positive_patients"] >= 4, subtype


def test_make_clean_leaves_what_is_committed() -> None:
    said = subprocess.run(["make", "--dry-run", "clean"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    patterns = said.replace("\\\n", " ").removeprefix("rm -rf ").split()
    assert "data/store.zarr" in patterns
    committed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    assert len(committed) > 100
    gone = [
        path
        for path in committed
        for pattern in patterns
        if PurePath(path).match(pattern) or path.startswith(f"{pattern}/")
    ]
    assert gone == []


@pytest.mark.parametrize(("file", "where"), [("/out/predictions.csv", "/out"), (None, "data")])
def test_full_disk_that_nobody_foresaw_is_said(
    file: str | None, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(_: argparse.Namespace) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file)

    assert _run(fill, argparse.Namespace(data=Path("data")), "stopped") == 1
    said = capsys.readouterr().err
    assert said == f"error: {where}: the disk is full; free some space there and run the same command again\n"
