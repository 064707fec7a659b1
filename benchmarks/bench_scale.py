"""What 25,000 studies cost: time and peak memory of `index` and `preprocess` on one zip of 750,000 slices, and of the label CSV.

The slices are small, so that what is left is what grows with their number: listing, headers, tables, tasks and files. They are
copies of two written in the RSNA form, one explicit and one implicit, with identifiers, position and pixels of their own; every
other one is deflated. Their order in the zip is that of their image ids, so that a study lies all over it, as in the real one. The
stages run as a user runs them; beside the whole stands a tenth of it, which tells growth faster than linear. Prints a card; the last
line is JSON. 25,000 studies need 6 GB of disk.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import yaml

from pipeline.files import human_bytes, remove_folder
from pipeline.labels import LABELS, read_labels
from pipeline.phantom.dicom_writer import StoredForm, stored_values, write_rsna_slice
from pipeline.progress import Progress

ROOT = Path(__file__).resolve().parents[1]
SIZE = 32
"""Rows and columns, of the slices and of the store: reading and resampling pixels is for `bench_preprocess.py`."""

SLICES = 30
"""Slices a study; the RSNA set has 34.6."""

ADDED = 10
FORMS = (StoredForm(bits=12, signed=False, explicit=True), StoredForm(bits=16, signed=True, explicit=False))
PLACEHOLDERS = ("ID_111111111", "ID_2222222222", "ID_3333333333", "ID_44444444", "555.000000")
"""Stand in a template for what `identity` gives, which is as long."""

STRIDE = 0x9E3779B1
"""An odd number scatters consecutive numbers over the identifiers without meeting one twice."""

NOISE = np.random.default_rng(0).integers(0, 16, 1 << 20, dtype=np.uint8)
SAMPLE_S = 0.2


@dataclass(frozen=True)
class Template:
    """A written slice, where `PLACEHOLDERS` stand in it, and its stored values, with which it ends."""

    content: bytes
    places: tuple[int, ...]
    stored: np.ndarray

    def fill(self, number: int) -> bytes:
        """The file of slice `number`."""
        content = bytearray(self.content)
        for place, value in zip(self.places, identity(number), strict=True):
            content[place : place + len(value)] = value.encode()
        content[-self.stored.nbytes :] = self.noisy(number).tobytes()
        return bytes(content)

    def noisy(self, number: int) -> np.ndarray:
        """The stored values of slice `number`."""
        start = number * 7919 % (len(NOISE) - self.stored.size)
        return self.stored + NOISE[start : start + self.stored.size].reshape(self.stored.shape)


@dataclass(frozen=True)
class Stage:
    """What a stage took; peaks are None where the system does not tell."""

    seconds: float
    driver_mib: float | None
    worker_mib: float | None


def image_id(number: int) -> str:
    return f"ID_{number * STRIDE % 16**9:09x}"


def identity(number: int) -> tuple[str, str, str, str, str]:
    """SOPInstanceUID, StudyInstanceUID, SeriesInstanceUID, PatientID and z in mm of slice `number`."""
    study, place = divmod(number, SLICES)
    scattered = study * STRIDE
    uid = f"{scattered % 16**10:010x}"
    return image_id(number), f"ID_{uid}", f"ID_{uid[::-1]}", f"ID_{scattered % 16**8:08x}", f"{100 + 5 * place:.6f}"


def make_template(form: StoredForm, folder: Path) -> Template:
    rows, columns = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    radius = np.hypot(rows, columns) / SIZE
    stored = stored_values(np.select([radius < 0.4, radius < 0.45], [30.0, 900.0], -1000.0), form=form)
    image, study, series, patient, z_mm = PLACEHOLDERS
    path = folder / "template.dcm"
    write_rsna_slice(
        path, stored=stored, form=form, image_id=image, study_id=study, series_id=series, patient_id=patient,
        position_mm=(-120.0, -120.0, float(z_mm)), orientation=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0), spacing_mm=7.5,
    )  # fmt: skip
    content = path.read_bytes()
    path.unlink()
    assert all(content.count(value.encode()) == 1 for value in PLACEHOLDERS)
    return Template(content, tuple(content.index(value.encode()) for value in PLACEHOLDERS), stored)


def check(template: Template, form: StoredForm, number: int) -> None:
    """pydicom reads from a filled template what was meant."""
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE  # RSNA's identifiers are no UIDs
    dataset = pydicom.dcmread(BytesIO(template.fill(number)))
    *uids, z_mm = identity(number)
    read = [dataset.SOPInstanceUID, dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.PatientID]
    assert read == uids
    assert dataset.ImagePositionPatient == [-120, -120, float(z_mm)]
    assert (dataset.BitsStored, dataset.PixelRepresentation) == (form.bits, int(form.signed))
    assert np.array_equal(dataset.pixel_array, template.noisy(number))


def add_studies(path: Path, templates: list[Template], studies: range) -> None:
    """Append studies to the zip at `path`, or begin it."""
    numbers = sorted(range(studies.start * SLICES, studies.stop * SLICES), key=image_id)
    with zipfile.ZipFile(path, "a") as archive, Progress(len(numbers), what="making", unit="slices") as progress:
        for place, number in enumerate(numbers):
            member = zipfile.ZipInfo(f"stage_2_train/{image_id(number)}.dcm", (2019, 9, 1, 0, 0, 0))
            member.compress_type = zipfile.ZIP_DEFLATED if place % 2 else zipfile.ZIP_STORED
            archive.writestr(member, templates[number // SLICES % len(templates)].fill(number), compresslevel=1)
            progress.advance()


def write_labels(path: Path, images: int) -> None:
    """The label CSV; four images stand in it twice, as in RSNA's."""
    negative, positive = (
        "".join(f"{{0}}_{name},{int(value and name in ('subdural', 'any'))}\n" for name in LABELS) for value in (0, 1)
    )
    with path.open("w") as file:
        file.write("ID,Label\n")
        for number in [*range(images), *range(min(4, images))]:
            file.write((negative if number % 7 else positive).format(image_id(number)))


def write_params(path: Path, source: Path, labels: Path) -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["source"] |= {"dicom": str(source), "labels": str(labels)}
    params["preprocess"]["image_size"] = SIZE
    path.write_text(yaml.safe_dump(params, sort_keys=False))


def run_stage(name: str, params: Path, data: Path) -> Stage:
    """Run a stage in a process of its own, and watch it and its workers."""
    peaks: dict[int, float] = {}
    log = params.with_name("stages.log")
    started_s = time.perf_counter()
    with log.open("w") as output:
        command = [sys.executable, "-m", f"stages.{name}", "--params", str(params), "--data", str(data)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=output)
        while process.returncode is None:
            peaks |= peaks_mib(process.pid)  # a peak only grows, but for a child that is its parent until it starts
            with suppress(subprocess.TimeoutExpired):
                process.wait(SAMPLE_S)
    seconds = time.perf_counter() - started_s
    if process.returncode:
        sys.exit(f"error: stages.{name} ended with {process.returncode}: {log.read_text()[-1000:]}")
    driver = peaks.pop(process.pid, None)
    return Stage(seconds, driver, max(peaks.values(), default=None))


def peaks_mib(root: int) -> dict[int, float]:
    """Peak resident memory of a process and of all below it, so far: VmHWM of proc(5), which only Linux has."""
    parent_of: dict[int, int] = {}
    peak_of: dict[int, float] = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):  # it has just ended
            facts = dict(line.split(":", 1) for line in status.read_text().splitlines())
            pid = int(facts["Pid"])
            parent_of[pid] = int(facts["PPid"])
            peak_of[pid] = int(facts.get("VmHWM", "0 kB").split()[0]) / 1024
    family = {root}
    while more := {pid for pid, parent in parent_of.items() if parent in family} - family:
        family |= more
    return {pid: peak_of[pid] for pid in family if peak_of.get(pid)}


def run_both(params: Path, data: Path, slices: int) -> tuple[Stage, Stage]:
    index = run_stage("index", params, data)
    found = json.loads((data / "index" / "summary.json").read_bytes())["slices"]
    assert found == slices, f"{found} slices found, {slices} made"
    return index, run_stage("preprocess", params, data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=25_000)
    parser.add_argument("--label-images", type=int, default=752_803, help="images in the label CSV, six rows each")
    parser.add_argument(
        "--work", type=Path, help="make everything in a new folder in this one (default: a temporary one)"
    )
    parser.add_argument("--keep", action="store_true", help="leave the zip, the label CSV and the store there")
    arguments = parser.parse_args()
    if arguments.work:
        arguments.work.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="ichor-scale-", dir=arguments.work)).resolve()
    try:
        measure(folder, studies=arguments.studies, label_images=arguments.label_images)
    finally:
        if arguments.keep:
            print(f"kept: {folder}", file=sys.stderr)
        else:
            remove_folder(folder)


def measure(folder: Path, *, studies: int, label_images: int) -> None:
    templates = [make_template(form, folder) for form in FORMS]
    for number, (template, form) in enumerate(zip(templates, FORMS, strict=True)):
        check(template, form, 7 + number * SLICES)
    source, labels, params, data = (folder / name for name in ("ct.zip", "labels.csv", "params.yaml", "data"))
    write_params(params, source, labels)
    tenth = max(1, studies // 10)

    write_labels(labels, label_images // 10)
    add_studies(source, templates, range(tenth))
    runs = {"a tenth": run_both(params, data, tenth * SLICES)}
    remove_folder(data)

    write_labels(labels, label_images)
    started_s = time.perf_counter()
    add_studies(source, templates, range(tenth, studies))
    making_us = (time.perf_counter() - started_s) / ((studies - tenth) * SLICES) * 1e6
    runs["all"] = run_both(params, data, studies * SLICES)
    store_bytes = sum(path.stat().st_size for path in (data / "store.zarr").rglob("*") if path.is_file())
    runs["all again"] = run_both(params, data, studies * SLICES)
    zip_bytes = source.stat().st_size
    add_studies(source, templates, range(studies, studies + ADDED))
    runs["ten added"] = run_both(params, data, (studies + ADDED) * SLICES)

    started_s = time.perf_counter()
    assert len(read_labels(labels)) == label_images
    labels_s = time.perf_counter() - started_s

    slices = {"a tenth": tenth * SLICES, "ten added": (studies + ADDED) * SLICES}
    print(f"{studies:,} studies, {studies * SLICES:,} slices of {SIZE}² in a zip of {human_bytes(zip_bytes)}")
    print(f"{'':24s}{'s':>9s}{'µs a slice':>12s}{'driver MiB':>12s}{'worker MiB':>12s}  (peaks; largest worker)")
    us = {}
    for run, stages in runs.items():
        for name, stage in zip(("index", "preprocess"), stages, strict=True):
            us[name, run] = stage.seconds / slices.get(run, studies * SLICES) * 1e6
            driver, worker = (f"{mib:.0f}" if mib else "–" for mib in (stage.driver_mib, stage.worker_mib))
            print(f"  {name:11s}{run:11s}{stage.seconds:9.2f}{us[name, run]:12.1f}{driver:>12s}{worker:>12s}")
    print(f"  labels of {label_images:,} images {labels_s:.2f} s; making a slice {making_us:.1f} µs")
    index, preprocess = runs["all"]
    figures = {
        "studies": studies,
        "slices": studies * SLICES,
        "index_s": round(index.seconds, 2),
        "preprocess_s": round(preprocess.seconds, 2),
        "index_us_a_slice": round(us["index", "all"], 1),
        "preprocess_us_a_slice": round(us["preprocess", "all"], 1),
        "time_ratio_to_tenth": round(
            (us["index", "all"] + us["preprocess", "all"]) / (us["index", "a tenth"] + us["preprocess", "a tenth"]), 3
        ),
        "driver_peak_mib": max((round(stage.driver_mib) for stage in runs["all"] if stage.driver_mib), default=None),
        "worker_peak_mib": max((round(stage.worker_mib) for stage in runs["all"] if stage.worker_mib), default=None),
        "rerun_s": round(sum(stage.seconds for stage in runs["all again"]), 2),
        "ten_added_s": round(sum(stage.seconds for stage in runs["ten added"]), 2),
        "labels_s": round(labels_s, 3),
        "store_bytes_a_slice": round(store_bytes / (studies * SLICES), 1),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
