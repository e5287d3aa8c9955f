"""Trains the runs whose records ship in results/: `make records LIST=table1`.

On a processor as many runs go on at once as it has cores, a thread each: two such runs get a quarter more done than one
with two threads. They are kept in REPRODUCTION_RUNS (a folder `runs` beside the project), go on where they were broken
off, and are published in results/ as they end. `--pause` and `--resume` stop and continue a list that is under way;
`--carry` copies the files that it still needs to results/unfinished/, from where another machine goes on.
"""

import argparse
import dataclasses
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import filelock
import notebook
import numpy as np
import pandas as pd

import helpers

FOLDER = pathlib.Path(os.environ.get("REPRODUCTION_RUNS") or notebook.ROOT.parent / "runs")
LEADER = FOLDER / "records.pid"
UNFINISHED = helpers.RESULTS / "unfinished"


def table1(method, preset="standard", seed=0, **sizes):
    """The twelve cells of Table 1 with what they start from, and controls on labels alone: list of (study, Run)."""
    sizes = method.PRESETS[preset] | sizes
    settings = sizes | method.REPORTED | {"precision": helpers.fastest_precision(sizes["width"]), "seed": seed}
    ways = {name: method.four_ways(transform, settings) for name, transform in method.TRANSFORMS.items()}
    plan = []
    for name in ("shift", "rotation", "noise"):
        plan += [("table1", ways[name]["Supervised"]), ("start", ways[name]["SemiCTE"].start)]
    plan += [("table1", ways[name]["SemiC"]) for name in ("shift", "rotation")]
    plan += [("control", long(ways[name])) for name in ("shift", "rotation")]
    plan += [("table1", ways[name][way]) for name in ("shift", "rotation") for way in ("SemiCT", "SemiCTE")]
    plan += [("table1", ways["noise"][way]) for way in ("SemiC", "SemiCT", "SemiCTE")]
    plan.append(("control", long(ways["noise"])))
    plan += [("control", slow(ways[name])) for name in ("shift", "rotation", "noise")]
    return plan + [("control", without_consistency(ways[name])) for name in ("shift", "rotation", "noise")]


def long(ways):
    """Supervised with as many steps as SemiC: `Run`."""
    semic = ways["SemiC"]
    return dataclasses.replace(ways["Supervised"], epochs=semic.epochs, steps=semic.steps_per_epoch)


def without_consistency(ways):
    """SemiC in the same batches without its consistency loss: `Run`."""
    return dataclasses.replace(ways["SemiC"], method="SemiC, weight 0", weight=0.0)


def slow(ways):
    """On from Supervised as SemiCT goes, but on labels alone: `Run`."""
    semict = ways["SemiCT"]
    same = {"unlabelled": 0, "weight": 0.0, "steps": semict.steps_per_epoch}
    return dataclasses.replace(semict, method="Supervised, slow", **same)


def narrow(method):
    """The same with half the channels of `standard`, for processors without 16-bit products: list of (study, Run).

    A third of the time; first what decides whether unlabelled images pay, transform by transform.
    """
    order = ["shift", "rotation", "noise"]
    plan = table1(method, width=16)

    def place(one):
        study, run = one
        late = study == "start" or run.start is not None
        return late, study == "control" and late, order.index(run.transform.name)

    return sorted(plan, key=place)


def controls(method):
    """Seeds 1 and 2 of what decides whether unlabelled images pay: list of (study, Run)."""
    plan = [one for seed in (1, 2) for one in table1(method, seed=seed)]
    plan = [(study, run) for study, run in plan if run.transform.name != "noise" and study != "start"]
    return [(study, run) for study, run in plan if run.method in ("Supervised", "SemiC")]


def quick(method):
    """The same as Table 1's at the preset `quick`, three seeds, the controls of each last: list of (study, Run)."""
    plan = [one for seed in range(3) for one in table1(method, "quick", seed)]
    return sorted(plan, key=lambda one: (one[1].seed, one[0] == "control"))


def paper(method):
    """Supervised at the report's own width: list of (study, Run)."""
    return [(study, run) for study, run in table1(method, "paper") if study == "table1" and run.method == "Supervised"]


def released(method, preset="standard"):
    """Table 1 as the released code trains it: list of (study, Run)."""
    plan = [(study, method.as_released(run)) for study, run in table1(method, preset) if study != "control"]
    order = ["Supervised", "SemiCT", "SemiC", "start", "SemiCTE"]
    plan = sorted(plan, key=lambda one: order.index(one[1].method if one[0] == "table1" else "start"))
    return [("released" if study == "table1" else "released start", run) for study, run in plan]


def released_quick(method):
    """The same at the preset `quick`: list of (study, Run)."""
    return released(method, "quick")


def released_short(method):
    """SemiCT for shift after a sixth of its epochs, as long as the whole of it is not there: list of (study, Run)."""
    [semict] = [run for _, run in released(method) if (run.method, run.transform.name) == ("SemiCT", "shift")]
    return [("released", dataclasses.replace(semict, method="SemiCT, 20 epochs", epochs=20))]


def collapse(method, study="collapse", **sizes):
    """What the collapse needs (rotation), and who collapses (noise and shift): list of (study, Run)."""
    plan = []
    for seed in range(3):
        ways = list(method.collapse_ways("rotation", seed, **sizes).values())
        others = [method.collapse_ways(name, seed, **sizes) for name in ("noise", "shift")]
        ways += [other[way] for other in others for way in ("as released", "no consistency loss")]
        starts = dict.fromkeys(run.start for run in ways)
        plan += [(f"{study} start", run) for run in starts] + [(study, run) for run in ways]
    return plan


def collapse_long(method):
    """The same for rotation and shift after as many updates of step one as in the report: list of (study, Run)."""
    kept = {"as released", "fresh Adam, 1e-5", "moments, 1e-5", "fresh Adam, 1e-3", "exact logarithms"}
    plan = [one for one in collapse(method, "collapse long", epochs_start=64) if one[1].transform.name != "noise"]
    return [(study, run) for study, run in plan if run.method in kept or run.epochs == 64]


def collapse_more(method):
    """Which rates throw a network, and what of SemiCT's batches does: list of (study, Run)."""
    ReleasedPairs = method.ReleasedPairs

    class SemictsAngle(ReleasedPairs):
        """The angle that so many images bring with them in SemiCT."""

        count = 12 * 128

        def __init__(self, images, labels, transform, seed, shuffled=False, **how):
            super().__init__(images, labels, transform, seed, shuffled, **how)
            if shuffled:
                self.transform = ReleasedPairs(images, np.zeros(self.count), transform, seed).transform

    class StepOnesAngle(SemictsAngle):
        count = 128

    class FewLabels(ReleasedPairs):
        """As many labelled images as a batch of SemiCT has, and nothing else; at step one's angle."""

        def choose(self, *which):
            return super().choose(*which)[: 5 if self.shuffled else None]

    plan = []
    for seed in range(3):
        rotation, noise, shift = (method.collapse_ways(name, seed) for name in ("rotation", "noise", "shift"))
        released = {"rotation": rotation["as released"], "noise": noise["as released"]}
        step_one = {name: dataclasses.replace(run, unlabelled=0, weight=0.0) for name, run in released.items()}
        for way, run, change in (
            ("moments, 1e-5, 3,000 steps", rotation["moments, 1e-5"], {"epochs": 20, "steps": 150}),
            ("moments, 1e-4", rotation["moments, 1e-5"], {"learning_rate": 1e-4}),
            ("moments, 1e-4", noise["moments, 1e-5"], {"learning_rate": 1e-4}),
            ("step one's angle", released["rotation"], {"pairs": StepOnesAngle}),
            ("labelled images only", step_one["rotation"], {}),
            ("labelled images only", step_one["noise"], {}),
            ("labelled only, SemiCT's angle", step_one["rotation"], {"pairs": SemictsAngle}),
            ("labelled only, 5 a batch", step_one["rotation"], {"pairs": FewLabels}),
            ("labelled only, 5 a batch", step_one["noise"], {"pairs": FewLabels}),
        ):
            plan.append(dataclasses.replace(run, method=way, **change))
        plan += [ways[way] for ways in (noise, shift) for way in ("fresh Adam, 1e-5", "moments, 1e-5")]

    # With the 4,000 labels of `standard`, from step ones of another seed than section 14's.
    class SemictsOwn(SemictsAngle):
        count = 49_000

    class StepOnesOwn(SemictsAngle):
        count = 4_000

    class HalfAtStepOnes(method.HalfLabelled, StepOnesOwn):
        pass

    class TenLabels(ReleasedPairs):
        def choose(self, *which):
            return super().choose(*which)[: 10 if self.shuffled else None]

    for semict in [method.as_released(run) for _, run in table1(method, seed=1) if run.method == "SemiCT"]:
        released = dataclasses.replace(semict, method="as released", epochs=10, steps=15)
        unweighted = dataclasses.replace(released, weight=0.0)
        step_one = dataclasses.replace(unweighted, unlabelled=0)
        ways = [
            ("as released", released, ReleasedPairs),
            ("half labelled", released, method.ReleasedHalfLabelled),
            ("labelled images only", step_one, ReleasedPairs),
            ("labelled only, 10 a batch", step_one, TenLabels),
            ("step one's angle", released, StepOnesOwn),  # from here on for rotation alone
            ("half labelled, step one's angle", released, HalfAtStepOnes),
            ("labelled only, SemiCT's angle", step_one, SemictsOwn),
            ("half labelled, step one's angle, weight 0", unweighted, HalfAtStepOnes),
        ]
        ways = ways[: {"noise": 4, "rotation": 8}.get(semict.transform.name, 0)]
        plan += [dataclasses.replace(run, method=way, pairs=pairs) for way, run, pairs in ways]
    starts = dict.fromkeys(run.start for run in plan)
    return [("collapse more start", run) for run in starts] + [("collapse more", run) for run in plan]


def collapse_wide(method):
    """The same at width 64, from all 4,000 labels known by heart: list of (study, Run)."""
    return collapse(method, "collapse wide", width=64, labelled=4000, epochs_start=64, epochs=20, batch_size=128)


def collapse_standard(method):
    """The same at `standard`: 150 steps from step one of Table 1 as released: list of (study, Run)."""
    plan = []
    for semict in [run for _, run in released(method) if run.method == "SemiCT"]:
        ways = method.collapse_ways(semict.transform.name)
        for way in ("training mode", "early-stopped start"):
            del ways[way]
        for run in ways.values():
            if semict.transform.name == "rotation" or run.method in ("as released", "no consistency loss"):
                names = ("method", "model", "pairs", "learning_rate", "weight")
                change = {name: getattr(run, name) for name in names}
                plan.append(("collapse standard", dataclasses.replace(semict, epochs=10, steps=15, **change)))
    return plan


def tried(method):
    """What may make unlabelled images pay (section 9.2), for as long as there was time: list of (study, Run)."""
    log_labels = method.log_labels

    class PseudoLabels(method.ConsistencyModel):
        """What the network is sure of for an image is a label for its copy (FixMatch, arXiv:2001.07685)."""

        def consistency_loss(self, log_p_image, log_p_copy):
            from keras import ops  # after helpers, which chooses its backend

            log_p = ops.stop_gradient(log_p_image)
            labels = log_labels(ops.argmax(log_p, axis=-1), log_p.shape[-1])
            sure = ops.max(log_p, axis=-1) > math.log(0.95)
            return ops.where(sure, self.supervised_loss(labels, log_p_copy), 0.0)

    [semic] = [run for _, run in narrow(method) if (run.method, run.transform.name) == ("SemiC", "shift")]
    semic = dataclasses.replace(semic, epochs=16, steps=383)
    half = {"pairs": method.HalfLabelled}
    changes = {
        "SemiC, half labelled": half,
        "pseudo-labels, half labelled": half | {"model": PseudoLabels, "epochs": 20},
        "pseudo-labels": {"model": PseudoLabels, "epochs": 5},
    }
    return [("tried", dataclasses.replace(semic, method=way, **change)) for way, change in changes.items()]


def segmentation(method):
    """Six ways, 1, 2, 4 and 8 labelled slices, three seeds: list of (study, Run)."""
    sizes = [(seed, slices) for seed in range(3) for slices in (1, 2, 4, 8)]
    return [("segmentation", run) for seed, n in sizes for run in method.segmentation_ways(n, seed=seed).values()]


_LISTS = (
    table1,
    narrow,
    controls,
    quick,
    paper,
    released,
    released_quick,
    released_short,
    collapse,
    collapse_long,
    collapse_more,
    collapse_wide,
    collapse_standard,
    tried,
    segmentation,
)
LISTS = {one.__name__: one for one in _LISTS}


def train_one(method, plan, number):
    """Train a run of a list in this process and publish it."""
    study, run = plan[number]
    runs = helpers.Runs(FOLDER, method.train)
    data = method.load_slices() if run.dataset == "isbi2012" else helpers.load_data()
    assert data.name == run.dataset, f"{run.dataset} is not there"
    if study.startswith(("collapse", "tried")):  # judged by the validation images
        data = dataclasses.replace(data, test_images=data.test_images[:256], test_labels=data.test_labels[:256])
    method.train(run, data, runs)
    publish(runs, run, study=study, preset=preset_of(method, run))


def preset_of(method, run):
    """The preset that a run has the sizes of, with its width where that is another, or "": str."""
    for preset, sizes in method.PRESETS.items():
        same = run.unlabelled == sizes["unlabelled"] if run.unlabelled else run.epochs in sizes.values()
        if run.width == sizes["width"] and same:
            return preset
    return f"standard, width {run.width}" if run.epochs in method.PRESETS["standard"].values() else ""


def publish(runs, run, folder=helpers.RESULTS, **which):
    """Put a finished run into the records, in place of an older one of its name; `which` gives study and preset."""
    with filelock.FileLock(pathlib.Path(folder) / "records.lock"):
        for table, frame in (("curves", runs.curves([run])), ("runs", runs.table([run]).assign(**which))):
            old = helpers.read_results(table, folder)
            frame = pd.concat([old[old["id"] != frame["id"].iloc[0]], frame]) if len(old) else frame
            if "steps" in frame:
                frame["steps"] = frame["steps"].astype("Int64")  # or all rows would change between 15 and 15.0
            temporary = pathlib.Path(folder) / f"{table}.writing"
            frame.to_csv(temporary, index=False, float_format="%.6g")
            os.replace(temporary, temporary.with_suffix(".csv"))


def missing(plan, found):
    """Numbers of the runs that the records do not have, in whichever number type they were trained: list of int."""
    fields = ["study", "training", "method", "transform", "width", "labelled", "epochs", "steps", "seed"]
    known = set(found.fillna({"steps": 0})[fields].itertuples(index=False, name=None)) if len(found) else set()

    def key(study, run):
        kind = study, run.model.__name__, run.method, run.transform.name
        return *kind, run.width, run.labelled, run.epochs, run.steps or 0, run.seed

    return [number for number, (study, run) in enumerate(plan) if key(study, run) not in known]


def carry(plan, runs, found, target=UNFINISHED):
    """Leave in `target` the files of runs that are not finished, and of those that such ones have yet to start from."""
    to_do = [plan[number][1] for number in missing(plan, found)]
    begins = [run.start for run in to_do if run.start and not runs.path(run).exists()]
    needed = {runs.path(run) for run in (*to_do, *begins)}
    target.mkdir(exist_ok=True)
    for path in {runs.path(run) for _, run in plan} | needed:
        if path in needed and path.exists():
            shutil.copy2(path, target)
        elif path not in needed:
            (target / path.name).unlink(missing_ok=True)
    if not any(target.iterdir()):
        target.rmdir()


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
        waiting = {paths[other] for other in (*busy, *to_do)}
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
        try:
            train_all(method, arguments.list, plan)
        finally:
            LEADER.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
