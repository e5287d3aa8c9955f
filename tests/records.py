"""Trains the runs whose records ship in results/: `make records LIST=table1`.

On a processor as many runs go on at once as it has cores, a thread each: two such runs get a quarter more done than one
with two threads. They are kept in REPRODUCTION_RUNS (a folder `runs` beside the project), go on where they were broken
off, and are published in results/ as they end. `--pause` and `--resume` stop and continue a list that is under way;
`--carry` copies the files that it still needs to results/unfinished/, from where another machine goes on.
"""

import argparse
import dataclasses
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import notebook

import helpers

FOLDER = pathlib.Path(os.environ.get("REPRODUCTION_RUNS") or notebook.ROOT.parent / "runs")
LEADER = FOLDER / "records.pid"
UNFINISHED = helpers.RESULTS / "unfinished"


def table1(method, preset="standard"):
    """The twelve cells of Table 1 with what they start from, and the long controls: list of (study, Run)."""
    sizes = method.PRESETS[preset]
    settings = sizes | method.REPORTED | {"precision": helpers.fastest_precision(sizes["width"])}
    ways = {name: method.four_ways(transform, settings) for name, transform in method.TRANSFORMS.items()}
    plan = []
    for name in ("shift", "rotation", "noise"):
        plan += [("table1", ways[name]["Supervised"]), ("start", ways[name]["SemiCTE"].start)]
    plan += [("table1", ways[name]["SemiC"]) for name in ("shift", "rotation")]
    for name in ("shift", "rotation"):
        semic, supervised = ways[name]["SemiC"], ways[name]["Supervised"]
        long = dataclasses.replace(supervised, epochs=semic.epochs, steps=semic.steps_per_epoch)
        plan.append(("control", long))
    plan += [("table1", ways[name][way]) for name in ("shift", "rotation") for way in ("SemiCT", "SemiCTE")]
    return plan + [("table1", ways["noise"][way]) for way in ("SemiC", "SemiCT", "SemiCTE")]


LISTS = {"table1": table1}


def train_one(method, plan, number):
    """Train a run of a list in this process and publish it."""
    study, run = plan[number]
    runs = helpers.Runs(FOLDER, method.train)
    method.train(run, helpers.load_data(), runs)
    helpers.publish(runs, run, study=study, preset="standard")


def missing(plan, found):
    """Numbers of the runs that the records do not have, in whichever number type they were trained: list of int."""
    fields = ["method", "transform", "width", "epochs", "steps", "seed"]
    known = set(found.fillna({"steps": 0})[fields].itertuples(index=False, name=None)) if len(found) else set()

    def key(run):
        return run.method, run.transform.name, run.width, run.epochs, run.steps or 0, run.seed

    return [number for number, (_, run) in enumerate(plan) if key(run) not in known]


def carry(plan, runs, found, target=UNFINISHED):
    """Leave in `target` the files of runs that are not finished, and of those that such ones are to start from."""
    shutil.rmtree(target, ignore_errors=True)
    to_do = [plan[number][1] for number in missing(plan, found)]
    needed = {runs.path(run) for run in to_do} | {runs.path(run.start) for run in to_do if run.start}
    for path in sorted(needed):
        if path.exists():
            target.mkdir(exist_ok=True)
            shutil.copy2(path, target)


def train_all(method, name, plan):
    """Start a process for each run that is not in results/ yet, in order, as many at once as there are cores."""
    runs = helpers.Runs(FOLDER, method.train)
    for path in UNFINISHED.glob("*.npz"):
        if not (FOLDER / path.name).exists():
            shutil.copy2(path, FOLDER)
    paths = [runs.path(run) for _, run in plan]
    to_do = missing(plan, helpers.read_results())
    at_once = 1 if helpers.ACCELERATORS else os.cpu_count()
    threads = {} if helpers.ACCELERATORS else {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
    busy = {}
    while to_do or busy:
        for number, process in list(busy.items()):
            if process.poll() is not None:
                del busy[number]
                print(f"{time.strftime('%H:%M')} {paths[number].stem}: exit {process.returncode}", flush=True)
        waiting = {path for other in (*busy, *to_do) if (path := paths[other])}
        for number in list(to_do):
            start = plan[number][1].start
            if len(busy) < at_once and not (start and runs.path(start) in waiting):
                to_do.remove(number)
                command = [sys.executable, __file__, name, "--number", str(number)]
                busy[number] = subprocess.Popen(command, env=os.environ | threads)
        time.sleep(1)


def send(number):
    """Send a signal to the list that is under way and to all of its processes."""
    if LEADER.exists():
        try:
            os.killpg(int(LEADER.read_text()), number)
        except ProcessLookupError:
            LEADER.unlink()


def main():
    """Command line; see the Makefile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("list", nargs="?", choices=LISTS, default="table1")
    parser.add_argument("--number", type=int, help="train this run of the list in this process")
    parser.add_argument("--pause", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--carry", action="store_true")
    arguments = parser.parse_args()
    if arguments.pause or arguments.resume:
        send(signal.SIGSTOP if arguments.pause else signal.SIGCONT)
        return
    method = notebook.load_method()
    plan = LISTS[arguments.list](method)
    if arguments.carry:
        carry(plan, helpers.Runs(FOLDER, method.train), helpers.read_results())
    elif arguments.number is not None:
        train_one(method, plan, arguments.number)
    else:
        FOLDER.mkdir(exist_ok=True)
        if os.getpgrp() != os.getpid():
            os.setpgrp()
        LEADER.write_text(str(os.getpgrp()))
        train_all(method, arguments.list, plan)
        LEADER.unlink()


if __name__ == "__main__":
    main()
