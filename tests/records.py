"""Trains the runs whose records ship in results/: `make records LIST=collapse`.

Every list is made by the notebook's own functions. A record is published as soon as its run is finished, and a run
that was broken off goes on where it was, so that the command can be stopped and started at will.
"""

import argparse
import tempfile

import notebook

import helpers


def settings_of(method, preset, seed=0, **changes):
    """Settings of a preset with the number type that this machine computes fastest in."""
    settings = notebook.preset_settings(method, preset, seed=seed, **changes)
    settings.precision = helpers.automatic_precision(preset, settings.width)
    return settings


def collapse(method):
    """Section 10: step one in the released recipe, and the ways to go on from it."""
    settings = settings_of(method, "standard")
    for transform in ("rotation", "noise", "shift"):
        yield from method.collapse_runs(transform, settings, unlabeled=45000).values()


LISTS = {"collapse": collapse}


def main():
    """Train one list, in its order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("list", choices=LISTS)
    parser.add_argument("--dry-run", action="store_true", help="only say what there is to train")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        method = notebook.load_method(folder)
        runs = list(dict.fromkeys(LISTS[arguments.list](method)))
        data = notebook.load_split(method)
        runner = helpers.Runner(
            data, method.build_model, method.TRANSFORMS, runs, arguments.list, notebook.ROOT / "runs"
        )
        for number, run in enumerate(runs, start=1):
            done = runner.record(run)
            print(
                f"{number} of {len(runs)}: {run.id}, {run.recipe}, {run.pairs:,} pairs: {'kept' if done else 'to do'}"
            )
            if not arguments.dry_run:
                (record,) = runner.train([run])
                helpers.publish([record], notebook.ROOT / "results")
                print(f"    {record['metrics']['accuracy']:.1%} in {helpers.duration(record['seconds'])}", flush=True)


if __name__ == "__main__":
    main()
