"""Trains the runs whose records ship in results/: `make records LIST=table1`.

On a processor as many runs go on at once as it has cores, a thread each: two such runs get a quarter more done than one
with two threads. They are kept in REPRODUCTION_RUNS (a folder `runs` beside the project), go on where they were broken
off, and are published in results/ as they end. `--pause` and `--resume` stop and continue a list that is under way.
"""

import argparse
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

import notebook

import helpers

FOLDER = pathlib.Path(os.environ.get("REPRODUCTION_RUNS") or notebook.ROOT.parent / "runs")
LEADER = FOLDER / "records.pid"


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


def train_all(method, name, plan):
    """Start a process for each run that is not in results/ yet, in order, as many at once as there are cores."""
    runs = helpers.Runs(FOLDER, method.train)
    found = helpers.read_results()
    known = set(found["id"]) if len(found) else set()
    paths = [runs.path(run) for _, run in plan]
    to_do = [number for number, path in enumerate(paths) if path.stem.split("-")[-1] not in known]
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
    arguments = parser.parse_args()
    if arguments.pause or arguments.resume:
        send(signal.SIGSTOP if arguments.pause else signal.SIGCONT)
        return
    method = notebook.load_method()
    plan = LISTS[arguments.list](method)
    if arguments.number is not None:
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
