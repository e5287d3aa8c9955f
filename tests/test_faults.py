"""What must not go wrong when something does: kills, damage, full disks, two kernels, losses that are no numbers.

`make faults KILLS=100` is the longer campaign; its seed is the day's number, and is printed.
"""

import contextlib
import dataclasses
import datetime
import errno
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import threading
import time

import grid
import numpy as np
import pytest
import tensorflow as tf

import helpers

KILLS = int(os.environ.get("KILLS", 20))
SEED = datetime.date.today().toordinal() if "KILLS" in os.environ else 0
RUNS = 3  # of the grid


@pytest.fixture(scope="module", autouse=True)
def small_networks(method):
    """The notebook's method over the grid's network."""
    original, method.build_network = method.build_network, grid.small_network
    yield original
    method.build_network = original


@pytest.fixture
def whole_network(method, small_networks, monkeypatch):
    """The notebook's own network again."""
    monkeypatch.setattr(method, "build_network", small_networks)


@pytest.fixture(scope="module")
def grids():
    with grid.Grids() as running:
        yield running


def numbers(folder):
    """What must be equal in two folders of runs: id to the record's own numbers."""
    records = map(helpers.read_json, folder.glob("*/*/record.json"))
    return {record["id"]: (record["configuration"], record["metrics"], record["history"]) for record in records}


@pytest.fixture(scope="module")
def undisturbed(grids, tmp_path_factory):
    """The folder of a grid to which nothing happened, and how many moments it took."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = grids.train(folder)
    assert ended["signal"] == 0 and len(ended["trained"]) == RUNS
    return folder, ended["moments"]


@pytest.fixture
def make_runner(method, data):
    def make(folder, plan=(), **changes):
        arguments = {"build_model": method.build_model, "transforms": method.TRANSFORMS} | changes
        return helpers.Runner(data, plan=list(plan), preset="smoke", folder=folder, **arguments)

    return make


@pytest.fixture
def run(method, tiny):
    """A short SemiC run."""
    return method.plan("SemiC", "noise", tiny, "shapes")


# ------------------------------------------------------------------------------------------- kills


def test_killed_grids_end_with_the_numbers_of_an_undisturbed_one(grids, undisturbed, tmp_path):
    reference, moments = undisturbed
    draw, folder, kills, finished = random.Random(SEED), tmp_path / "0", 0, set()
    print(f"{KILLS} kills, seed {SEED}")
    while kills < KILLS or finished:
        kill_at = draw.randint(1, moments // 2) if kills < KILLS else 0  # a run takes about a third
        ended = grids.train(folder, kill_at=kill_at)
        assert ended["signal"] in (0, signal.SIGKILL), f"seed {SEED}, kill {kills}: the grid failed"
        assert not finished & set(ended["trained"]), "a finished run was trained again"
        kills += ended["signal"] == signal.SIGKILL
        finished = set(numbers(folder))
        if ended["signal"] == 0:
            assert numbers(folder) == numbers(reference)
            assert not [path for path in folder.rglob("*") if path.suffix == ".partial" or "damaged" in path.name]
            folder, finished = tmp_path / str(kills), set()


def test_an_interrupted_kernel_goes_on_where_it_was(grids, undisturbed, tmp_path):
    reference, moments = undisturbed
    draw = random.Random(SEED)
    interruptions = sorted(draw.sample(range(1, moments), 5))
    ended = grids.train(tmp_path, interrupt_at=interruptions)
    assert ended["signal"] == 0 and ended["moments"] >= moments
    assert numbers(tmp_path) == numbers(reference)


# ------------------------------------------------------------------------------------------ damage


def cut_off(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def from_another_version(path):
    content = json.loads(path.read_bytes())
    path.write_text(json.dumps(content | {"format": helpers.FORMAT + 1}))


def without_checksum(path):
    content = json.loads(path.read_bytes())
    del content["sha256"]
    path.write_text(json.dumps(content))


ANY = (cut_off, empty, flip_a_byte)
JSON = (*ANY, from_another_version, without_checksum)
DAMAGES = [("record.json", harm) for harm in JSON] + [("progress.json", harm) for harm in JSON]
DAMAGES += [("epoch-0003.weights.h5", harm) for harm in ANY] + [("network.weights.h5", harm) for harm in ANY]


@pytest.mark.parametrize("name, harm", DAMAGES, ids=lambda value: getattr(value, "__name__", value))
def test_what_is_damaged_is_named_set_aside_and_trained_again(
    name, harm, undisturbed, make_runner, method, tiny, tmp_path, capsys
):
    reference, _ = undisturbed
    run = method.plan("SemiC", "noise", tiny, "shapes")
    shutil.copytree(reference / run.id, tmp_path / run.id)
    runner = make_runner(tmp_path)
    folder = runner.path(run)
    if name == "progress.json":  # of a run that is not finished
        (folder / "record.json").unlink()
    harm(folder / name)
    if name == "record.json":
        assert runner.record(run) is None
    (record,) = runner.train([run])
    told = capsys.readouterr().out
    assert str(folder / name) in told and "set aside" in told
    assert (folder / f"{name}.damaged-1").exists()
    assert numbers(tmp_path)[run.id] == numbers(reference)[run.id]
    assert runner.train([run])[0] == record and not capsys.readouterr().out  # whole again


def test_a_damaged_start_is_not_started_from(undisturbed, make_runner, method, tiny, tmp_path):
    reference, _ = undisturbed
    run = method.plan("SemiCT", "noise", tiny, "shapes")
    shutil.copytree(reference / run.starting_run, tmp_path / run.starting_run)
    runner = make_runner(tmp_path)
    flip_a_byte(next((tmp_path / run.starting_run).glob("*/epoch-*.weights.h5")))
    with pytest.raises(FileNotFoundError, match=r"weights\.h5 does not fit its checksum.*train step one first"):
        runner.model(run)
    with pytest.raises(helpers.Damaged, match="does not fit its checksum"):
        runner.trained(method.plan("Supervised", "noise", tiny, "shapes"))


# ------------------------------------------------------------------------- full and read-only disks


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, and a function that mounts it anew with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode

    if not shutil.which("mount") or mount("size=1m"):
        pytest.skip("mounting a small file system takes root on Linux; the next test simulates a full disk")
    yield folder, lambda options: mount(f"remount,{options}")
    subprocess.run(["umount", folder], check=True)


def test_a_full_and_a_read_only_disk_are_named_and_lose_nothing(small_disk, undisturbed, make_runner, method, tiny):
    reference, _ = undisturbed
    disk, remount = small_disk
    plan = [method.plan(name, "noise", tiny, "shapes") for name in ("Supervised", "SemiC", "SemiCT")]
    runner = make_runner(disk)
    size = 1.6 * sum(path.stat().st_size for path in (reference / plan[0].id).rglob("*.*"))  # of a run and a half
    remount(f"size={size // 1024:.0f}k")
    with pytest.raises(OSError, match="cannot write to the folder .*disk.*Make room") as caught:
        runner.train(plan)
    assert caught.value.errno == errno.ENOSPC
    kept = numbers(disk)
    assert 0 < len(kept) < 3 and not list(disk.rglob("*.partial"))
    remount("ro")
    assert runner.train(plan[:1])[0]["id"] in kept  # what is finished can still be read
    with pytest.raises(OSError, match="Read-only file system: cannot write to the folder .*disk"):
        runner.train(plan)
    remount("rw,size=10m")
    runner.train(plan)
    assert numbers(disk) == {run.id: numbers(reference)[run.id] for run in plan}


@pytest.mark.parametrize("write", [1, 2, 7, 8])  # an epoch's weights and progress; network and record
def test_a_disk_that_fills_at_any_write_loses_nothing(
    write, undisturbed, make_runner, method, tiny, tmp_path, monkeypatch
):
    reference, _ = undisturbed
    run, fsync, count = method.plan("SemiC", "noise", tiny, "shapes"), os.fsync, 0

    def full(descriptor):
        nonlocal count
        count += 1
        if count == write:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    runner = make_runner(tmp_path)
    with pytest.raises(OSError, match="No space left on device: cannot write to the folder"):
        runner.train([run])
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob("lock.json*"))
    runner.train([run])
    assert numbers(tmp_path)[run.id] == numbers(reference)[run.id]


def test_weights_are_not_begun_where_the_temporary_folder_is_full(make_runner, run, tmp_path, monkeypatch):
    model = make_runner(tmp_path).model(run)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(OSError, match="temporary folder .* has no room") as caught:
        helpers.save_weights(model, tmp_path / "a.weights.h5")
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------- two kernels


def test_two_kernels_share_the_work(grids, undisturbed, tmp_path):
    reference, _ = undisturbed
    with grid.Grids() as others:
        grids.start(tmp_path)
        others.start(tmp_path)
        first, second = grids.wait(), others.wait()
    assert first["signal"] == second["signal"] == 0
    assert sorted(first["trained"] + second["trained"]) == sorted(numbers(reference))  # each run once
    assert numbers(tmp_path) == numbers(reference)


def hold(path, **changes):
    """A lock's file, as another kernel leaves it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = helpers.Lock(path).owner | {"token": "other", "renewed": time.time()} | changes
    path.write_text(json.dumps(owner))


@pytest.mark.parametrize(
    "changes, alive",
    [
        ({"machine": "another"}, True),
        ({"machine": "another", "renewed": time.time() - 200}, False),
        ({"process": 1}, False),  # another process by that number, started at another time
        ({"process": 2**22 + 1}, False),
        ({}, False),  # left by an interrupt of this process
    ],
)
def test_the_lock_of_the_dead_is_taken_over_and_that_of_the_living_is_not(changes, alive, tmp_path):
    path = tmp_path / "run" / "lock.json"
    hold(path, **changes)
    with pytest.raises(helpers.Locked) if alive else contextlib.nullcontext(), helpers.Lock(path) as lock:
        assert lock.held()
        with pytest.raises(helpers.Locked, match="in this process"), helpers.Lock(path):
            pass
        hold(path, machine="another")
        with pytest.raises(helpers.Locked, match="took over"):
            lock.check()
    assert path.exists()  # the other one's
    with pytest.raises(helpers.Locked, match="on another machine"), helpers.Lock(path):
        pass


@pytest.mark.parametrize("age, alive", [(0, True), (200, False)])
def test_half_a_lock_counts_while_it_is_young(age, alive, tmp_path):
    path = tmp_path / "lock.json"
    path.write_text('{"machine"')
    os.utime(path, (time.time() - age,) * 2)
    with pytest.raises(helpers.Locked) if alive else contextlib.nullcontext(), helpers.Lock(path) as lock:
        assert lock.held()


def test_an_interrupt_while_the_lock_is_taken_leaves_it_to_the_next(tmp_path, monkeypatch):
    def interrupted(thread):
        raise KeyboardInterrupt

    path = tmp_path / "lock.json"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(threading.Thread, "start", interrupted)
        with helpers.Lock(path):
            pass
    assert path.exists()
    with helpers.Lock(path) as lock:
        assert lock.held()


def test_a_lock_needs_no_hard_links_and_is_renewed(tmp_path, monkeypatch):
    def no_links(*arguments):
        raise OSError(errno.ENOTSUP, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(helpers.Lock, "BEAT", 0.05)
    path = tmp_path / "lock.json"
    with helpers.Lock(path):
        before = json.loads(path.read_bytes())["renewed"]
        with pytest.raises(helpers.Locked), helpers.Lock(path):
            pass
        time.sleep(0.5)
        assert json.loads(path.read_bytes())["renewed"] > before
    assert not list(tmp_path.iterdir())


def test_a_kernel_waits_for_the_run_that_another_trains(make_runner, run, tmp_path):
    runner = make_runner(tmp_path)
    path = runner.path(run) / "lock.json"
    hold(path, machine="another")
    threading.Timer(3, path.unlink).start()
    began = time.monotonic()
    (record,) = runner.train([run])
    assert time.monotonic() - began > 3 and record["id"] == run.id


def test_who_lost_the_lock_writes_nothing_more(make_runner, run, tmp_path, monkeypatch):
    runner = make_runner(tmp_path)
    path = runner.path(run) / "lock.json"
    end, saved = helpers.Checkpoint.on_epoch_end, []

    def overtaken(self, epoch, logs=None):
        if epoch == 1 and not saved:
            hold(path, machine="another")
            saved.extend(path.parent.glob("epoch-*"))
            threading.Timer(2, path.unlink).start()
        end(self, epoch, logs)

    monkeypatch.setattr(helpers.Checkpoint, "on_epoch_end", overtaken)
    save, names = helpers.save_weights, []
    monkeypatch.setattr(helpers, "save_weights", lambda model, path: names.append(path.name) or save(model, path))
    assert runner.train([run])[0]["id"] == run.id
    assert [path.name for path in saved] == ["epoch-0001.weights.h5"]
    # The second epoch was thrown away and, once the lock was free, trained again.
    assert names == [f"epoch-{epoch:04d}.weights.h5" for epoch in (1, 2, 3)] + ["network.weights.h5"]


# --------------------------------------------------------------------------- training that goes wrong


def breaking(method, seed, value):
    """Noise that turns into `value` for the batch with this seed."""

    def noise_that_breaks(images, batch_seed):
        broken = tf.reduce_all(tf.cast(batch_seed, tf.int32) == tf.constant(seed, tf.int32))
        return method.gaussian_noise(images, batch_seed) * tf.where(broken, tf.constant(value), 1.0)

    return noise_that_breaks


@pytest.mark.parametrize("value, name", [(np.nan, "nan"), (np.inf, "inf|nan")])
def test_a_loss_that_is_no_number_fails_that_run_alone(value, name, whole_network, make_runner, method, tiny, tmp_path):
    step_one, semict = (
        dataclasses.replace(method.plan(kind, "noise", tiny, "shapes"), transform="breaks", batch_size=40)
        for kind in ("Supervised", "SemiCT")
    )
    semict = dataclasses.replace(semict, starting_run=step_one.id)
    whole = method.plan("Supervised", "noise", tiny, "shapes")
    batches = helpers.training_batches(range(96), 40, 0, 1, 2).as_numpy_iterator()
    seed = list(batches)[1]["seed"].tolist()  # of the second step of the second epoch
    transforms = method.TRANSFORMS | {"breaks": breaking(method, seed, value)}
    runner = make_runner(tmp_path, transforms=transforms)
    records = runner.train([step_one, semict, whole])
    assert [record["id"] for record in records] == [whole.id]
    assert runner.record(step_one) is None
    reason = runner.failure(step_one)
    assert re.search(rf"loss is ({name}).* in step 2 of epoch 2$", reason), reason
    assert f"{step_one.id}, failed" in runner.failure(semict) and not runner.failure(whole)
    failed = helpers.read_json(runner.path(step_one) / "failure.json")
    assert len(failed["history"]) == 1  # the epoch before
    with pytest.raises(FileNotFoundError, match="step 2 of epoch 2"):
        runner.trained(step_one)
    stamp = (runner.path(step_one) / "failure.json").stat().st_mtime_ns
    assert len(make_runner(tmp_path, transforms=transforms).train([step_one, whole])) == 1  # nor is it tried again
    assert (runner.path(step_one) / "failure.json").stat().st_mtime_ns == stamp
    key = ("noise", "Supervised")
    assert reason in repr(helpers.table_1({"yours": {}}, failures={key: reason})).splitlines()[1]
    assert "none of these runs" in repr(helpers.show_curves([], "Curves"))


def test_a_loss_that_is_no_number_in_validation_alone_fails_the_run(whole_network, make_runner, method, tiny, tmp_path):
    run = dataclasses.replace(method.plan("Supervised", "noise", tiny, "shapes"), transform="breaks")
    seed = next(helpers.evaluation_batches(range(10)).as_numpy_iterator())["seed"].tolist()
    runner = make_runner(tmp_path, transforms={"breaks": breaking(method, seed, np.nan)})
    assert runner.train([run]) == []
    assert runner.failure(run).endswith("in the validation after epoch 1")
    assert not list(runner.path(run).glob("*.h5"))


def test_a_collapse_is_told_while_it_happens_and_marked(
    whole_network, make_runner, method, tiny, tmp_path, monkeypatch
):
    notes = []
    monkeypatch.setattr(helpers.LiveStatus, "say", lambda self, note: notes.append(note))
    sane = method.plan("Supervised", "noise", tiny, "shapes")
    # Steps as long as they may be, and nothing that normalises: a network thrown far at once.
    thrown = dataclasses.replace(sane, learning_rate=1.0, epochs=3, switches="clipped_probabilities+inference_mode")
    (record,) = make_runner(tmp_path).train([thrown])
    told = [note for note in notes if note.startswith("COLLAPSED: 100.0% one class, entropy 0.0")]
    assert len(told) >= 2 and told[-1] == notes[-1] and "left" in told[0]
    assert "(collapsed)" in repr(helpers.table_1({"yours": {("noise", "Supervised"): [record]}}))
    notes.clear()
    (record,) = make_runner(tmp_path).train([sane])
    assert "COLLAPSED" not in "".join(notes)
    assert "(collapsed)" not in repr(helpers.table_1({"yours": {("noise", "Supervised"): [record]}}))


# ------------------------------------------------------------------------------------------ safety


class Touch:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_nothing_unpickles_a_file(make_runner, run, tmp_path):
    trap = tmp_path / "sprung"
    zeros = {name: np.zeros(1, np.uint8) for name in ("y_train", "x_test", "y_test")}
    np.savez(tmp_path / "trap.npz", x_train=np.array([Touch(trap)], dtype=object), **zeros)
    with pytest.raises(ValueError, match="trap.npz is not a readable"):
        helpers.load_cifar10(tmp_path / "trap.npz")
    with np.load(tmp_path / "trap.npz", allow_pickle=True) as archive:  # it would have worked
        archive["x_train"]
    assert trap.exists()
    trap.unlink()
    runner = make_runner(tmp_path / "runs")
    (record,) = runner.train([run])
    path = runner.path(run) / "record.json"
    shutil.copy(tmp_path / "trap.npz", path)
    assert runner.record(run) is None and runner.train([run])[0]["metrics"] == record["metrics"]
    assert not trap.exists()
