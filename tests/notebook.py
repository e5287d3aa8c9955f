"""Reads, runs and refreshes reproduction.ipynb; `make run`, `make notebook` and the tests go through here."""

import argparse
import importlib.util
import os
import pathlib
import sys
import tempfile
import time

import nbclient
import nbformat

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "reproduction.ipynb"
RUNS = 27  # that the whole notebook trains: 16 in section 8, 2 in 10.1, 9 in 10.3
sys.path.insert(0, str(ROOT))

import helpers  # noqa: E402


def method_source():
    """The cells tagged `method`, as one module's source."""
    imports = "import dataclasses\nimport functools\nimport types\n\n"
    imports += "import keras\nimport numpy as np\nimport tensorflow as tf\n\nimport helpers\n"
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    return "\n\n".join([imports, *(cell.source for cell in cells if "method" in cell.metadata.get("tags", []))])


def load_method(folder):
    """Import the notebook's definitions from a file in `folder`, so that their source can be inspected."""
    path = pathlib.Path(folder) / "method.py"
    path.write_text(method_source())
    spec = importlib.util.spec_from_file_location("method", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["method"] = module
    spec.loader.exec_module(module)
    return module


def preset_settings(method, preset, **changes):
    """The settings that the notebook's untouched controls give at a preset."""
    return helpers.default_settings(method.PRESETS, preset, transforms=tuple(method.TRANSFORMS), **changes)


def load_split(method):
    """CIFAR-10 cut as the notebook cuts it, all of it."""
    return helpers.split("cifar10", helpers.load_cifar10(), method.subset_ranges())


def execute(target, folder, **environment):
    """Run every cell in order in `folder` and write the executed notebook to `target`, also after an error."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [index for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    began = time.monotonic()

    def announce(cell, cell_index):
        title = cell.source.splitlines()[0][:60]
        print(
            f"{time.monotonic() - began:6.0f} s  cell {code.index(cell_index) + 1:2} of {len(code)}  {title}",
            flush=True,
        )

    client = nbclient.NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        on_cell_execute=announce,
        record_timing=False,
    )
    previous = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        client.execute()
    finally:
        for name, value in previous.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
        notebook.metadata.pop("widgets", None)  # a page that shows the saved file has no kernel to serve them
        nbformat.write(notebook, target)
    print(f"{time.monotonic() - began:6.0f} s  done")


def shipped_rows(method, preset):
    """The rows of results/runs.csv for Table 1 at a preset: dict of (transform, method) to row."""

    def runs(precision):
        settings = preset_settings(method, preset, precision=precision)
        return {key: method.plan(key[1], key[0], settings) for key in helpers.REPORT_TABLE}

    records = helpers.shipped_records(runs)
    if len(records) < len(helpers.REPORT_TABLE):
        raise LookupError(f"results/runs.csv does not hold all twelve runs of {preset}: run `make notebook` first.")
    return {key: record["row"] for key, record in records.items()}


def first_screen(method):
    """The notebook's first cell: Table 1 beside the `quick` records in results/."""
    settings = preset_settings(method, "quick")
    rows = shipped_rows(method, "quick")
    some = next(iter(rows.values()))
    minutes = sum(float(row["seconds"]) for row in rows.values()) / 60
    return FIRST_SCREEN.format(
        table=helpers.table_1(rows)._repr_html_(),
        width=some["width"],
        labeled=f"{int(some['labeled']):,}",
        unlabeled=f"{settings.unlabeled:,}",
        epochs=f"{settings.epochs_supervised} (Supervised) or {settings.epochs} (the others)",
        count=len(rows),
        minutes=f"{minutes:.0f}",
        device=f"{some['device']}, {some['cores']} cores",
        versions=f"TensorFlow {some['tensorflow']}, Keras {some['keras']}, Python {some['python']}",
        precision=some["precision"],
        dates=" and ".join(sorted({row["date"] for row in rows.values()})),
    )


FIRST_SCREEN = """\
# Learning from unlabelled images by consistency: a reproduction

Few images have labels, many have none. This notebook trains a small network on both: on the labels where there are
some, and everywhere on *consistency*, that it should answer alike for an image and for a noisy, shifted or rotated
copy of it. It reproduces, on CIFAR-10, a student report of 2021 by Jari Malfliet and Roemer Bakker (TU Delft) that
simplifies Bortsova et al., [*Semi-Supervised Medical Image Segmentation via Learning Consistency under
Transformations*](https://doi.org/10.1007/978-3-030-32226-7_90) (MICCAI 2019).

**The report's Table 1 beside ours.** Ours is the preset `quick`, a first look that is much smaller than the report's
experiments: width {width} instead of 96, {labeled} labelled and {unlabeled} instead of 45,000 unlabelled images,
{epochs} epochs instead of 120, one seed (n = 1), but the whole test set. Expect networks that have learned far less
than the report's. Ours follow the report's text, not its code (recipe `reported`); the collapse behind its two
accuracies of 10% comes from the code (section 10), so that ▲ is no improvement there. `standard` and `paper`
go further with the same code.

{table}

▲ and ▼ mark an accuracy or agreement at least three points above or below the report's. *Supervised* uses the labelled
images alone; *SemiC* adds the consistency loss, from scratch; *SemiCT* and *SemiCTE* add it to a network already
trained on the labels, fully or stopped early. *Agreement* is how often image and copy get the same class. Where the
report prints an accuracy of 0.1% it must mean the fraction 0.1, that is 10%, chance. Its supervised losses are
one-sided by its code, ours symmetric by its text, which makes ours several times as large: compare consistency loss,
accuracy and agreement alone. These {count} runs took {minutes} minutes of training on
{device} ({versions}, {precision}; {dates}). The table is made from `results/runs.csv`, which only runs write.
"""


def refresh_first_screen(method):
    """Write the first screen into the committed notebook."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells[0].source = first_screen(method).strip()
    nbformat.write(notebook, NOTEBOOK)


def main():
    """Command line; see the Makefile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=pathlib.Path, help="execute into this copy; without it, into the notebook itself"
    )
    arguments = parser.parse_args()
    os.environ.setdefault("REPRODUCTION_PRESET", "quick")
    if arguments.output:
        execute(arguments.output, ROOT)
        print(f"The executed notebook is {arguments.output}. Open it with: .venv/bin/jupyter lab {arguments.output}")
    else:
        execute(NOTEBOOK, ROOT, REPRODUCTION_PICTURES="generated", REPRODUCTION_EXPORT=str(ROOT / "results"))
        with tempfile.TemporaryDirectory() as folder:
            refresh_first_screen(load_method(folder))


if __name__ == "__main__":
    main()
