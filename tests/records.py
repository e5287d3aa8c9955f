"""Trains the runs whose records ship in results/: `make records LIST=collapse`.

Every list is made by the notebook's own functions. A record is published as soon as its run is finished, and a run
that was broken off goes on where it was, so that the command can be stopped and started at will. What is in results/
already is not trained again, also not after a change of the code (its row names the state of the code that made it),
unless another run starts from it, and then what comes out is added to repeats.csv; to renew a record, delete its row.
A list goes on in the number type in which most of it was made; a new one takes the one that is fastest here.
"""

import argparse
import tempfile

import notebook

import helpers

# Shown in the sections 9, 9.3, 9.4, 10.3, 10.4, 10.5, 11.1, 11.2 and 12.
LISTS = (
    "grid",
    "scale",
    "continued",
    "collapse",
    "share",
    "survival",
    "attribution",
    "refinement",
    "labels",
    "segmentation",
)


def train(method, name):
    """Train what is missing of a list, in its order."""
    to_do, shipped = missing(method, name), shipped_rows()
    if name == "segmentation":
        data, parts = helpers.load_segmentation(method.SLICES), (method.build_segmenter, method.SEGMENTATION_VIEWS)
    else:
        data, parts = notebook.load_split(method), (method.build_model, method.TRANSFORMS)
    if {run.dataset for run in to_do} - {data.name}:
        raise SystemExit(f"These runs need another data set than {data.name}; nothing was trained.")
    runner = helpers.Runner(data, *parts, to_do, name, notebook.ROOT / "runs")
    for number, run in enumerate(to_do, start=1):
        records = runner.train([run])
        if run.id not in shipped:
            helpers.publish(records, notebook.ROOT / "results")
        else:  # what is still here of the first training is no second one
            again = [one for one in records if one["seconds"] != float(shipped[run.id]["seconds"])]
            helpers.publish_repeats(again, notebook.ROOT / "results")
        done = (
            ", ".join(f"{record['metrics']['accuracy']:.1%}" for record in records) or f"failed: {runner.failure(run)}"
        )
        print(f"{number} of {len(to_do)}: {run.id}, {run.title}: {done}", flush=True)


def shipped_rows():
    """Rows of results/runs.csv by their run's id."""
    return {row["id"]: row for row in helpers.shipped("runs.csv") or ()}


def missing(method, name):
    """The runs of a list that results/ has not, with those that they start from."""
    make_runs, shipped = getattr(method, f"{name}_references"), shipped_rows()
    plan = helpers.plans_by_records(make_runs)[0]
    if not any(run.id in shipped for run in plan.values()):
        plan = make_runs(helpers.automatic_precision("standard", width=64))
    runs = list(dict.fromkeys(plan.values()))
    starts = {start for run in runs if run.id not in shipped for start in (run.starting_run, run.moments_from)}
    return [run for run in runs if run.id not in shipped or run.id in starts]


def main():
    """Command line; see the Makefile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("list", choices=LISTS)
    parser.add_argument("--dry-run", action="store_true", help="only say what there is to train")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:  # it must be there as long as the source of the method is asked for
        method = notebook.load_method(folder)
        if arguments.dry_run:
            rows = [(run.id, run.title, f"{run.pairs:,}") for run in missing(method, arguments.list)]
            print(helpers.Table(("id", "run", "image pairs"), rows))
        else:
            train(method, arguments.list)


if __name__ == "__main__":
    main()
