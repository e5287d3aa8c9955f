"""Reads, runs and refreshes reproduction.ipynb; `make run`, `make notebook` and the tests go through here."""

import argparse
import importlib.util
import os
import pathlib
import sys
import tempfile
import time
import types

import nbclient
import nbformat
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "reproduction.ipynb"
README = ROOT / "README.md"
WIDE_SHIFT = {  # of the list `scale`, at the report's width
    "released": "Supervised, shift, released",
    "reported": "Supervised, shift, reported, width {}, as many updates",
    "semic": "SemiC, shift, reported, width {}",
}
HEADLINE = ("<!-- made by `make notebook` from results/runs.csv -->\n", "<!-- until here -->\n")
RUNS = 31  # that the whole notebook trains: 16 in section 8, 2 in 10.1, 9 in 10.3, 4 in 12.4
sys.path.insert(0, str(ROOT))

import helpers  # noqa: E402


def method_source():
    """The cells tagged `method`, as one module's source."""
    imports = "import dataclasses\nimport functools\nimport itertools\nimport types\n\n"
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
        without_widgets(notebook)
        nbformat.write(notebook, target)
    print(f"{time.monotonic() - began:6.0f} s  done")


def without_widgets(notebook):
    """Replace widgets, which need a kernel, in the outputs by a line of text, for pages that only show the file."""
    notebook.metadata.pop("widgets", None)
    for output in (output for cell in notebook.cells for output in cell.get("outputs", ())):
        if "application/vnd.jupyter.widget-view+json" in output.get("data", ()):
            output.data = {"text/plain": "[Controls. They are shown, and work, where this cell has been run.]"}


def first_screen(method):
    """The notebook's first cell: Table 1 beside the records of the preset `standard` in results/.

    Raises:
        ValueError: the records no longer bear out what it says in words.
    """
    grid = helpers.shipped_grid(method.grid_references)
    rows = _rows(grid)
    settings = preset_settings(method, "standard")
    fallen = [f"{key[1]} for {key[0]} ({recipe})" for recipe, found in grid.items() for key in _collapsed(found)]
    shares = helpers.shipped_records(method.share_references)
    ends = {key: helpers.collapsed(record["history"][-1], "val_") for key, record in shares.items()}
    early = [transform for (transform, name), end in ends.items() if name == "8% labelled, early-stopped" and end]
    at_scale = helpers.shipped_records(method.scale_references)
    long = {
        name: helpers.Configuration(**record["configuration"])
        for name, record in at_scale.items()
        if f"width {settings.width}" in name
    }
    reached = {run.method: f"{at_scale[name]['metrics']['accuracy']:.1%}" for name, run in long.items()}
    trained_long = {run.method: at_scale[name] for name, run in long.items()}
    theirs = method.plan("Supervised", "shift", preset_settings(method, "paper"))
    facts = types.SimpleNamespace(
        by_share=_by_share(shares, ends),
        agreements=_agreements(method, grid),
        owed=_owed(method),
        lifted=_lifted(method, trained_long["Supervised"]),
        wide=_at_report_size(method, at_scale, "Supervised, {}, released"),
        begun=_at_report_size(method, at_scale, "SemiCT, {}, released, its beginning"),
        wide_shift={name: at_scale[key.format(theirs.width)] for name, key in WIDE_SHIFT.items()},
    )
    scores = helpers.shipped_records(method.segmentation_references)
    dice = {
        way: [record["metrics"]["dice"] for key, record in scores.items() if key[1:] == (1, way)] for *_, way in scores
    }
    printed = {key: numbers[3] for key, numbers in helpers.REPORT_TABLE.items()}
    facts.dice = [np.mean(values) for values in dice.values()]
    _check_words(method, grid, shares, trained_long, facts)
    machines = sorted({f"{row['device']} ({row['cores']} of its cores)" for row in rows})
    versions = sorted({f"TensorFlow {row['tensorflow']}, Keras {row['keras']}, {row['precision']}" for row in rows})
    return FIRST_SCREEN.format(
        table=helpers.table_1({"ours": grid["released"]})._repr_html_(),
        recipes=helpers.accuracy_table(grid)._repr_html_(),
        collapse=f"in these tables {' and '.join(fallen)} collapsed to one class"
        if fallen
        else "no network in these tables collapsed to one class",
        collapse_shares=" and ".join(facts.by_share["all"]),
        survive_shares=" and ".join(facts.by_share["none"]),
        unsettled_shares=" and ".join(facts.by_share["some"]),
        collapse_early=" and ".join(early) or "none of the three",
        gains="\n".join(f"  - `{recipe}`: {gains}" for recipe, found in grid.items() if (gains := _gains(found))),
        printed_gains=", ".join(
            f"{100 * (printed[transform, 'SemiC'] - printed[transform, 'Supervised']):+.1f} ({transform})"
            for transform in ("noise", "shift", "rotation")
        ),
        apart=f"{max(map(abs, facts.owed)):.1f}",
        agreement=" to ".join(f"{end(facts.agreements):.1f}" for end in (min, max)),
        segmentation=", ".join(f"{helpers.spread(values, '.3f')} ({way})" for way, values in dice.items()),
        segmentation_runs=" to ".join(dict.fromkeys(str(len(values)) for values in dice.values())),
        report_steps=f"{theirs.epochs * theirs.steps_per_epoch:,}",
        **{place: f"{value:.1%}" for place, value in zip(("short", "middle", "end"), facts.lifted, strict=True)},
        wide_width=theirs.width,
        **{f"printed_{name.lower()}": f"{printed['shift', name]:.1%}" for name in ("Supervised", "SemiC")},
        wide_gain=" to ".join(f"{gain:.1f}" for gain in _gain_of_training_as_written(facts.wide_shift)),
        **{f"wide_{name}": f"{record['metrics']['accuracy']:.1%}" for name, record in facts.wide_shift.items()},
        wide=", ".join(_beside_report(facts.wide, "Supervised")),
        begun=", ".join(_beside_report(facts.begun, "SemiCT")),
        long_updates=f"{max(run.epochs * run.steps_per_epoch for run in long.values()):,}",
        long_supervised=reached["Supervised"],
        long_semic=reached["SemiC"],
        **{f"seen_{run.method.lower()}": run.epochs for run in long.values()},
        steps=f"{settings.epochs * method.plan('SemiC', 'shift', settings).steps_per_epoch:,}",
        width=settings.width,
        labeled=f"{settings.labeled:,}",
        unlabeled=f"{settings.unlabeled:,}",
        epochs=f"{settings.epochs_supervised} (Supervised) or {settings.epochs} (the others)",
        count=len(rows),
        hours=_hours(rows),
        machines="; ".join(machines),
        versions="; ".join(versions),
        dates=" to ".join(dict.fromkeys((min(row["date"] for row in rows), max(row["date"] for row in rows)))),
    )


def headline(method):
    """README's table of accuracies, from the same records: Markdown."""
    grid = helpers.shipped_grid(method.grid_references)
    rows = _rows(grid)
    settings = preset_settings(method, "standard")
    table = helpers.accuracy_table({recipe: found for recipe, found in grid.items() if found})
    made = {name: sorted({row[name] for row in rows}) for name in ("device", "cores", "date")}
    caption = (
        "Accuracy on the test images and their transformed copies after the last epoch, the report's beside ours in "
        f"{len(table.header) - 3} recipes: {len(rows)} runs at width {settings.width} on {settings.labeled:,} labelled "
        f"and {settings.unlabeled:,} unlabelled images (`sound`: {settings.unlabeled_pool:,}), {_hours(rows)} hours of "
        "training, "
        f"without a GPU, on {' or '.join(made['cores'])} cores of {' or '.join(made['device'])}, {made['date'][0]} to "
        f"{made['date'][-1]}. One seed (n = 1) unless n says otherwise; then mean ± standard deviation."
    )
    return f"{caption}\n\n{table.markdown()}"


def _rows(grid):
    """Rows of `results/runs.csv` behind a grid of records."""
    return [record["row"] for found in grid.values() for records in found.values() for record in records]


def _hours(rows):
    return f"{sum(float(row['seconds']) for row in rows) / 3600:.1f}"


def _collapsed(found):
    return [key for key, records in found.items() if any(helpers.collapsed(record["metrics"]) for record in records)]


def _gains(found):
    """What `helpers.paired_gains` finds for every transform that has both methods."""
    gains = {transform: helpers.paired_gains(found, transform) for transform in ("noise", "shift", "rotation")}
    told = [
        f"{helpers.spread(paired, '.1f', signed=True)} ({name}, n = {len(paired)})"
        for name, paired in gains.items()
        if paired
    ]
    return ", ".join(told)


def _by_share(shares, ends):
    """Transforms whose SemiCT with few labels in a batch collapsed in all of its trainings, in some, or in none."""
    repeated = {}
    for row in helpers.shipped("repeats.csv"):
        repeated.setdefault(row["id"], set()).add(helpers.collapsed(row))
    by_share = {"all": [], "some": [], "none": []}
    for (transform, name), end in ends.items():
        if name == "8% labelled":
            every = {end} | repeated.get(shares[transform, name]["id"], set())
            by_share["some" if len(every) > 1 else "all" if end else "none"].append(transform)
    return by_share


def _agreements(method, grid):
    """What SemiC gains over Supervised in points of agreement: in every recipe, for every transform and seed."""
    return [
        gain
        for found in grid.values()
        for name in method.TRANSFORMS
        for gain in helpers.paired_gains(found, name, "consistency")
    ]


def _owed(method):
    """Points of accuracy that SemiCT has by its consistency loss, a transform after the other (section 9.4)."""
    runs = helpers.shipped_records(method.continued_references)
    accuracy = {key: 100 * record["metrics"]["accuracy"] for key, record in runs.items()}
    return [accuracy[name, "SemiCT, λ = 1"] - accuracy[name, "SemiCT, λ = 0"] for name in method.TRANSFORMS]


def _at_report_size(method, at_scale, name):
    """Metrics of the test by transform, of those that were trained: `name` with the transform's put in."""
    keys = {transform: name.format(transform) for transform in method.TRANSFORMS}
    return {transform: at_scale[key]["metrics"] for transform, key in keys.items() if key in at_scale}


def _beside_report(found, method_name):
    printed = {transform: helpers.REPORT_TABLE[transform, method_name][3] for transform in found}
    return [f"{metrics['accuracy']:.1%} ({name}; {printed[name]:.1%} there)" for name, metrics in found.items()]


def _gain_of_training_as_written(wide_shift):
    """What Supervised gains from `released` to `reported`, in points of accuracy.

    On the validation images, by means over the last ten epochs, and on the test images, after the last.
    """
    pair = [wide_shift[name] for name in ("released", "reported")]
    validation = [np.mean([epoch["val_accuracy"] for epoch in record["history"][-10:]]) for record in pair]
    test = [record["metrics"]["accuracy"] for record in pair]
    return [100 * (after - before) for before, after in (validation, test)]


def _lifted(method, record):
    """Validation accuracy of a long Supervised after as many steps as `standard`, as the report's, and all of them.

    Means over the ten epochs before.
    """
    presets = (preset_settings(method, preset).epochs_supervised for preset in ("standard", "paper"))
    accuracy = [epoch["val_accuracy"] for epoch in record["history"]]
    return [np.mean(accuracy[end - 10 : end]) for end in (*presets, len(accuracy))]


def _check_words(method, grid, shares, long, facts):
    """Raise ValueError where the records do not bear out what FIRST_SCREEN or README says in words of its own.

    long: dict of method to record of the long trainings; facts: what else FIRST_SCREEN is filled from.
    """
    gains = [
        np.mean(paired)
        for found in grid.values()
        for name in method.TRANSFORMS
        if (paired := helpers.paired_gains(found, name))
    ]
    missed = [
        100 * (helpers.REPORT_TABLE[name, "Supervised"][3] - np.mean([one["metrics"]["accuracy"] for one in records]))
        for name in method.TRANSFORMS
        if (records := grid["released"][name, "Supervised"])
    ]
    beside = {
        name: 100 * (metrics["accuracy"] - helpers.REPORT_TABLE[name, "Supervised"][3])
        for name, metrics in facts.wide.items()
    }
    reached = {name: record["metrics"]["accuracy"] for name, record in long.items()}
    rising = [epoch["val_accuracy"] for epoch in long["SemiC"]["history"]]
    fallen = [
        record
        for (_, name), record in shares.items()
        if name == "8% labelled" and helpers.collapsed(record["history"][-1], "val_")
    ]
    at_width_64 = helpers.shipped_records(method.collapse_references)["as released"]
    attribution = helpers.shipped_records(method.attribution_references)
    accuracies = {key: record["metrics"]["accuracy"] for key, record in attribution.items()}
    released, training = (helpers.attribution_gains(accuracies, name) for name in ("released", "− inference_mode"))
    wide_rising = [epoch["val_accuracy"] for epoch in facts.wide_shift["semic"]["history"]]
    printed_shift = helpers.REPORT_TABLE["shift", "Supervised"][3]
    holds = {
        "Hardly any gain": max(gains) < 3,
        "What SemiCT gains is not due to its consistency loss": max(map(abs, facts.owed)) < 0.5,
        "It does bring agreement": min(facts.agreements) > 0,
        "without unlabelled images missed by three to five points": min(missed) >= 2.5 and max(missed) < 5.5,
        "Step one comes within three points": max(map(abs, beside.values())) < 3,
        "At the report's own width rotation collapses and shift does not; noise does not": {
            name: helpers.collapsed(metrics) for name, metrics in facts.begun.items()
        }
        == {"noise": False, "rotation": True, "shift": False},
        "The report's gains are measured from a weak baseline": min(_gain_of_training_as_written(facts.wide_shift)) > 3
        and 100 * (facts.wide_shift["reported"]["metrics"]["accuracy"] - printed_shift) > 3,
        "In as many updates SemiC is below and still rises": facts.wide_shift["semic"]["metrics"]["accuracy"]
        < facts.wide_shift["reported"]["metrics"]["accuracy"] - 0.05
        and wide_rising == sorted(wide_rising),
        "shift and noise are thrown, too": all(
            facts.begun[name]["accuracy"] < facts.wide[name]["accuracy"] - least
            for name, least in (("shift", 0.2), ("noise", 0.1))
        ),
        "met to one point for noise, missed for shift, exceeded for rotation": abs(beside["noise"]) < 1.5
        and beside["shift"] < -2.5
        and beside["rotation"] > 2.5,
        "SemiC is not ahead after more steps": reached["SemiC"] < reached["Supervised"],
        "Longer training lifts Supervised beyond the report's steps": facts.lifted[0]
        < facts.lifted[1]
        < facts.lifted[2] - 0.01,
        "the gain of `released` is gone": min(released) > 0 >= np.mean(training),
        "SemiC is still rising": np.mean(rising[-5:]) > np.mean(rising[-10:-5]),
        "for one transform always, for one never, for one in one of two trainings": all(facts.by_share.values()),
        "Augmentation gives most of it, the loss a little more, unlabelled images nothing": np.diff(facts.dice)[0]
        > np.diff(facts.dice)[1]
        > 0
        >= np.diff(facts.dice)[2],
        "collapses, within 20 steps": all(
            any(
                helpers.collapsed(epoch, "val_")
                for epoch in record["history"][: 20 // record["configuration"]["steps"]]
            )
            for record in fallen
        ),
        "At width 64 rotation collapses": helpers.collapsed(at_width_64["history"][-1], "val_"),
    }
    wrong = [sentence for sentence, true in holds.items() if not true]
    if wrong:
        raise ValueError(f"The records do not bear out what the first screen says: {'; '.join(wrong)}.")


FIRST_SCREEN = """\
# Learning from unlabelled images by consistency: a reproduction

Few images have labels, many have none. This notebook trains a small network on both: on the labels where there are
some, and everywhere on *consistency*, that it should answer alike for an image and for a noisy, shifted or rotated
copy of it. It reproduces, on CIFAR-10, a [student
report](https://reproducedpapers.org/papers/2PQoEv5T1qDBuoBK50CY#r4JYEkuMnyAKZi4Y6o5eg) of 2021 by Jari
Malfliet and Roemer Bakker (TU Delft) that simplifies Bortsova et al., [*Semi-Supervised Medical Image
Segmentation via Learning Consistency under Transformations*](https://doi.org/10.1007/978-3-030-32226-7_90)
(MICCAI 2019).

**Four ways to train.** *Supervised* uses the labelled images alone; *SemiC* adds the consistency loss, from scratch;
*SemiCT* and *SemiCTE* add it to a network already trained on the labels, fully or stopped early.

**Three recipes.** `reported` trains as the report's text says, `released` as its code was seen to do (section 10), and
`sound` as the text says, with three refinements that the validation images chose, and balanced batches (section 11).

**In short.**

1. *Unlabelled images hardly raise the accuracy here.* The report's gains of 6 to 9 points for shift and rotation are
   not there. What the consistency loss raises, everywhere, is agreement: an image and its copy get the same class more
   often.
2. *The report's gains are measured from a weak baseline.* At its own size, for shift, Supervised gains {wide_gain}
   points (means over the last ten epochs to the last epoch; one seed) by being trained as the report's text says and
   not as its code does, without any unlabelled image.
3. *Why trained weights collapse:* the code goes on from them with Adam's old moments at a rate of 0.001, in a network
   that is never told that it trains, with a loss that is constant where a network is most wrong, on batches of few
   labels. With any one of these taken away, the network did not stay collapsed (section 10; one seed).

**The report's Table 1 beside ours**, trained as its code does it (recipe `released`), at the preset `standard`: width
{width} instead of 96, {labeled} labelled and {unlabeled} instead of 45,000 unlabelled images, {epochs} epochs instead
of 120; no GPU. On the whole test set, after the last epoch; one seed where there is no ±, which is the standard
deviation over n seeds.

{table}

▲ and ▼ mark an accuracy or agreement at least three points above or below the report's. *Agreement* is how often image
and copy get the same class. Where the report prints an accuracy of 0.1% it must mean the fraction 0.1, that is 10%,
chance.

The accuracies again, in all three recipes. (`released` shifts the test copies by whole pixels, too, and turns them all
by one angle.)

{recipes}

These {count} runs took {hours} hours of training on {machines} ({versions}; {dates}). The tables are made from
`results/runs.csv`, which only runs write.

**What came out**, point by point; at `standard`, where no other size is named:

- **Hardly any gain from unlabelled images.** SemiC minus Supervised, in points of accuracy (pairs from one processor,
  section 9):
  - the report: {printed_gains}
{gains}

  Agreement rises in every recipe, with every transform and seed, by {agreement} points. What `released` gains for shift
  is gone once the network is told that it trains, so that it normalises and drops out (three seeds, a direction;
  section 10.5). SemiC takes {steps} steps here, Supervised about as many; in the report SemiC takes 18 times as many,
  twelve times those of its Supervised. `sound` sees all 45,000 unlabelled images, as in the report.
- **Nor is SemiC ahead after six times as many steps** ({long_updates}; one seed, `reported`, shift, width {width};
  section 9.3). Supervised, which has seen each label {seen_supervised} times by then, ends at {long_supervised}, and
  SemiC on all 45,000 unlabelled images, which has seen it {seen_semic} times, at {long_semic}, still rising. Longer
  training alone lifts Supervised from {short} on the validation images after as many steps as here to {middle} after
  the {report_steps} that the report's Supervised had, and to {end} (means over ten epochs). So a part of the report's
  gain may come from its SemiC's many steps.
- **At the report's width the baseline is a weak one** (width {wide_width}, shift; one seed; section 9.3). In the
  report's 120 epochs Supervised ends at {wide_reported} when it is trained as the text says, and at {wide_released} as
  the code trained it. The report has {printed_supervised} for Supervised and {printed_semic} for SemiC. In as many
  updates, ten epochs on all 45,000 unlabelled images, SemiC as the text says is at {wide_semic} and still rises: it has
  seen each label ten times by then, Supervised 120 times. So they are too few to tell what unlabelled images add at
  this width.
- **What SemiCT gains over the weights that it starts from is not due to its consistency loss** (`reported`, one seed;
  section 9.4): without that loss it ends within {apart} points of the same accuracy, for all transforms.
- **At the report's width rotation collapses and shift does not, as in Table 1; noise, which collapses there, does not**
  (first two of 120 epochs, width {wide_width}, `released`; one run each; section 9.3). Step one comes within three
  points of the report's: {wide}. After two epochs of SemiCT from there, with all 45,000 unlabelled images, the accuracy
  is {begun}: shift and noise are thrown, too, but not to one class. How it would go on is not known.
  (Step one for noise jumped in its last epochs, so that its restored moments were not stale.)
- **The collapse needs few labels in a batch, too.** In our `standard` half of every batch has
  labels, and {collapse}. In the report 8% has; with as few, the same SemiCT from the same weights collapses, within 20
  steps, for {collapse_shares}, not for {survive_shares}, and for {unsettled_shares} in one of two trainings (the same
  seed on two processors); from early-stopped weights it does so for {collapse_early}. At width 64 it collapses for
  rotation as well.
- **In segmentation**, which the report simplified to classification, the predictions are transformed, too (section
  12). On the membranes of ISBI 2012, from one labelled slice and {segmentation_runs} seeds each, the Dice coefficient
  of the test slices is {segmentation}: augmentation gives most of it, the consistency loss a little more, and
  unlabelled images add nothing.
"""


def refresh_first_screen(method):
    """Write the first screen into the committed notebook, and the headline into README."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells[0].source = first_screen(method).strip()
    nbformat.write(notebook, NOTEBOOK)
    before, rest = README.read_text().split(HEADLINE[0])
    README.write_text(f"{before}{HEADLINE[0]}\n{headline(method)}{HEADLINE[1]}{rest.split(HEADLINE[1])[1]}")


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
