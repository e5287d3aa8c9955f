"""The notebook as a whole: what is committed, and that it runs."""

import ast
import builtins
import os
import re
import shutil
import subprocess
import sys

import benchmark
import nbformat
import notebook
import numpy as np
import pytest
import records

import helpers


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(notebook.NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def code(committed):
    return [cell for cell in committed.cells if cell.cell_type == "code"]


def test_the_committed_notebook_was_executed_in_order_without_an_error(code):
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 9
    assert all(output.metadata["image/png"]["alt"].endswith(".") for output in pictures)


def test_the_committed_notebook_is_small_portable_and_shows_no_cifar10(committed, code):
    assert notebook.NOTEBOOK.stat().st_size < 5 * 2**20
    assert "widgets" not in committed.metadata
    text = notebook.NOTEBOOK.read_text()
    assert "widget-view" not in text and "[Controls." in text
    assert not re.search(r"/(home|root|work|Users|tmp)/", text)
    shown = next(cell for cell in code if "helpers.sample_pictures" in cell.source)
    assert "generated" in shown.outputs[0].text


def test_cells_are_short(code):
    long = [cell.source.splitlines()[0] for cell in code if len(cell.source.splitlines()) > 40]
    assert not long


def test_method_cells_only_define(code):
    for cell in code:
        if "method" in cell.metadata.get("tags", []):
            assert not cell.outputs, cell.source


def test_the_first_screen_is_made_from_the_shipped_records(committed, method):
    assert committed.cells[0].source == notebook.first_screen(method).strip()
    assert notebook.headline(method) in notebook.README.read_text()
    rows = {row["id"]: row for row in helpers.read_csv(notebook.ROOT / "results" / "runs.csv")}
    runs = method.grid_references("mixed_bfloat16")
    for (transform, name), printed in helpers.REPORT_TABLE.items():
        seeds = [rows.get(runs[key].id) for key in runs if key[:3] == ("released", transform, name)]
        seeds = [row for row in seeds if row]
        line = next(
            line
            for line in committed.cells[0].source.splitlines()
            if f">{transform}</td>" in line and f">{name}</td>" in line
        )
        assert seeds, "an entry of Table 1 has no number of ours beside it"
        accuracy, loss = (np.mean([float(row[metric]) for row in seeds]) for metric in ("accuracy", "loss_supervised"))
        assert f" | {accuracy:.1%}" in line and f">{printed[3]:.1%} |" in line.replace("0.1% (10%)", "10.0%")
        assert f"{printed[1]:.3g} | {loss:.3g}" in line


def test_the_first_screen_refuses_words_that_the_records_contradict(method, monkeypatch):
    grid = helpers.shipped_grid(method.grid_references)
    for record in grid["reported"]["shift", "SemiC"]:
        record["metrics"]["accuracy"] = 0.9
    monkeypatch.setattr(helpers, "shipped_grid", lambda *_: grid)
    with pytest.raises(ValueError, match="do not bear out .* Hardly any gain"):
        notebook.first_screen(method)


def test_tables_of_shipped_records_are_those_of_the_committed_results(committed, method):
    known, from_records, compared = dict(vars(method)), set(), 0
    for cell in committed.cells:
        if cell.cell_type != "code" or "method" in cell.metadata.get("tags", []):
            continue
        tree = ast.parse(cell.source)
        if not re.search(r"helpers\.shipped\w*\(", cell.source) and not names_in(tree, ast.Load) & from_records:
            continue
        for statement in tree.body:
            made = names_in(statement, ast.Store)
            if names_in(statement, ast.Load) - made - known.keys() - vars(builtins).keys():
                continue  # it shows the reader's own runs as well
            if not isinstance(statement, ast.Expr):
                exec(compile(ast.Module([statement], []), cell.id, "exec"), known)
                from_records |= made
                continue
            shown = eval(compile(ast.Expression(statement.value), cell.id, "eval"), known)
            if isinstance(shown, helpers.Table):
                compared += 1
                assert cell.outputs[0].data["text/plain"] == repr(shown), cell.source
    assert compared == 16


def names_in(tree, context):
    """Names that a piece of code reads (ast.Load), or makes (ast.Store), arguments of functions among them."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, context)}
    return names | {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg) and context is ast.Store}


def test_shipped_rows_have_their_curves_and_the_id_of_their_settings():
    rows = helpers.read_csv(notebook.ROOT / "results" / "runs.csv")
    curves = helpers.read_csv(notebook.ROOT / "results" / "curves.csv")
    assert rows and len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        fields = helpers.Configuration.__dataclass_fields__
        told = {name: field.type(row[name]) for name, field in fields.items()}
        assert helpers.Configuration(**told).id == row["id"]
        own = [curve for curve in curves if (curve["id"], curve["fingerprint"]) == (row["id"], row["fingerprint"])]
        assert max(int(curve["epoch"]) for curve in own) == int(row["epochs"])


def test_what_was_trained_again_is_in_the_shipped_rows():
    names = ("runs", "repeats", "repeats_curves")
    rows, repeats, curves = (helpers.read_csv(notebook.ROOT / "results" / f"{name}.csv") for name in names)
    first = {row["id"]: row for row in rows}
    assert repeats and curves
    assert {(row["id"], row["device"]) for row in curves} <= {(row["id"], row["device"]) for row in repeats}
    for row in repeats:
        assert all(row[name] == first[row["id"]][name] for name in helpers.Configuration.__dataclass_fields__)


def test_what_a_shipped_run_started_from_is_there_on_its_device():
    rows, repeats = (helpers.read_csv(notebook.ROOT / "results" / f"{name}.csv") for name in ("runs", "repeats"))
    there = {(row["id"], row["device"]) for row in (*rows, *repeats)}
    started = [(row[column], row["device"]) for row in rows for column in ("starting_run", "moments_from")]
    assert not {start for start in started if start[0]} - there


def test_lists_go_on_in_the_number_type_of_their_records(method, monkeypatch):
    monkeypatch.setattr(helpers, "automatic_precision", lambda *_, **__: "float32")
    runs = records.missing(method, "survival")
    assert not [run.id for run in runs if run.precision == "float32"]
    monkeypatch.setattr(helpers, "shipped", lambda _: [])
    assert {run.precision for run in records.missing(method, "survival")} == {"float32"}


def test_readme_gives_the_presets_sizes(method):
    lines = notebook.README.read_text().splitlines()
    for name, sizes in method.PRESETS.items():
        line = next(line for line in lines if line.startswith(f"| `{name}` |"))
        epochs = ", ".join(str(sizes[key]) for key in ("epochs_supervised", "epochs_early", "epochs"))
        told = f"| {sizes['width']} | {sizes['labeled']:,} | {sizes['unlabeled']:,} | {epochs} |"
        assert told in line


def test_readme_names_the_lists_of_records(method):
    told = set(re.findall(r"`(\w+)_references`", notebook.README.read_text()))
    assert told == set(records.LISTS) and all(hasattr(method, f"{name}_references") for name in told)


def test_readme_shows_the_shipped_benchmark():
    results = helpers.shipped("benchmark.json")
    assert benchmark.markdown(results) in notebook.README.read_text()
    assert results["step_speedup"].keys() == {"noise", "shift", "rotation"}


def test_the_notebook_runs_and_its_checked_outputs_hold(tmp_path):
    for name in ("reproduction.ipynb", "helpers.py"):
        shutil.copy(notebook.ROOT / name, tmp_path)
    environment = os.environ | {"REPRODUCTION_PRESET": "smoke"}
    if "CIFAR10_NPZ" not in environment:
        random = np.random.default_rng(0)
        arrays = {
            f"{kind}_{part}": random.integers(0, 256 if kind == "x" else 10, (count, *shape), dtype=np.uint8)
            for part, count in (("train", 50000), ("test", 10000))
            for kind, shape in (("x", (32, 32, 3)), ("y", (1,)))
        }
        np.savez(tmp_path / "random.npz", **arrays)
        environment["CIFAR10_NPZ"] = str(tmp_path / "random.npz")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--nbval-lax",
        "--nbval-cell-timeout=900",
    ]
    finished = subprocess.run(
        [*command, "--nbval-current-env", "reproduction.ipynb"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout[-5000:]
    assert len(list(tmp_path.glob("runs/*/*/record.json"))) == notebook.RUNS
