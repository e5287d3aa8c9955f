"""Names of runs, their store, and what is left after a fault. Runs on TensorFlow and, by test_jax.py, on JAX."""

import dataclasses
import errno
import functools
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time

import keras
import notebook
import numpy as np
import pytest
import records

import helpers

METHOD = notebook.load_method()  # here, so that processes that are forked have it


def numbers(about):
    """What must not depend on interruptions."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in about["history"]], about["test"]


@pytest.fixture
def semic(method, settings):
    """A small semi-supervised run of three epochs."""
    return notebook.small_ways(method, method.Shift(), settings)["SemiC"]


class Break(Exception):
    """Stands for a kill after an epoch was written."""


def broken_off(monkeypatch, method, run, data, runs, after=1):
    """Train until `after` epochs are on disk."""
    write, count = helpers.Runs.write, []

    def interrupt(self, *arguments):
        write(self, *arguments)
        count.append(1)
        if len(count) == after:
            raise Break

    with monkeypatch.context() as patch, pytest.raises(Break):
        patch.setattr(helpers.Runs, "write", interrupt)
        method.train(run, data, runs)


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_a_run_that_was_broken_off_ends_with_the_same_numbers(method, semic, data, tmp_path, monkeypatch, precision):
    run = dataclasses.replace(semic, precision=precision)
    unbroken, broken = helpers.Runs(tmp_path / "a", method.train), helpers.Runs(tmp_path / "b", method.train)
    model, about = method.train(run, data, unbroken)
    broken_off(monkeypatch, method, run, data, broken)
    assert len(broken.about(run)["history"]) == 1
    again, resumed = method.train(run, data, broken)
    assert numbers(about) == numbers(resumed)
    assert all((a == b).all() for a, b in zip(model.get_weights(), again.get_weights(), strict=True))
    keras.config.set_dtype_policy("float32")


def test_a_finished_run_is_kept(method, semic, data, tmp_path, monkeypatch):
    runs = helpers.Runs(tmp_path, method.train)
    _, about = method.train(semic, data, runs)
    monkeypatch.setattr(keras.Model, "fit", lambda *_, **__: pytest.fail("trained again"))
    assert method.train(semic, data, runs)[1] == about


def test_all_runs_are_judged_by_the_same_copies(method, semic, data, tmp_path, monkeypatch):
    seen = []

    def fit(runs, run, model, batches, validation, test):
        seen.append((batches(), validation, test))

    monkeypatch.setattr(helpers.Runs, "fit", fit)
    for seed in (3, 4):
        method.train(dataclasses.replace(semic, seed=seed), data, helpers.Runs(tmp_path, method.train))
    for name, (one, other) in zip(("training", "validation", "test"), zip(*seen, strict=True), strict=True):
        same = (one[0][0]["parameters"] == other[0][0]["parameters"]).all()
        assert (one.shuffled, same) == ((True, False) if name == "training" else (False, True)), name


def test_a_run_of_other_images_is_refused(method, semic, data, tmp_path):
    with pytest.raises(ValueError, match="run is of 'other'"):
        method.train(dataclasses.replace(semic, dataset="other"), data, helpers.Runs(tmp_path, method.train))


@pytest.mark.parametrize("name", ["ConsistencyModel", "PairedModel", "Pairs", "Shift", "Spatial", "train"])
def test_a_definition_that_was_edited_after_the_run_was_made_is_refused(
    method, semic, data, tmp_path, monkeypatch, name
):
    # Its cell was run again, and not the cells below.
    edited = (lambda *_: 0) if name == "train" else type(name, (getattr(method, name),), {"more": 1})
    monkeypatch.setattr(sys.modules["__main__"], name, edited, raising=False)
    with pytest.raises(ValueError, match=f"{name} was edited"):
        method.train(semic, data, helpers.Runs(tmp_path, method.train))


@pytest.mark.parametrize(
    "name, value",
    [
        *(("epochs", 0), ("epochs", "2"), ("epochs", 1.5), ("width", None), ("unlabelled", -5), ("steps", 0)),
        *(("batch_size", 0), ("learning_rate", -1.0), ("learning_rate", "0.1"), ("weight", math.nan)),
    ],
)
def test_numbers_that_no_run_can_have_are_refused(method, semic, data, tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}; it must be"):
        method.train(dataclasses.replace(semic, **{name: value}), data, helpers.Runs(tmp_path, method.train))


def test_semict_starts_from_the_weights_alone(method, settings, data, tmp_path):
    runs = helpers.Runs(tmp_path, method.train)
    run = dataclasses.replace(
        notebook.small_ways(method, method.Noise(), settings)["SemiCT"], learning_rate=1e-12, epochs=1
    )
    model, _ = method.train(run, data, runs)
    start, _ = method.train(run.start, data, runs)
    for one, other in zip(model.trainable_variables, start.trainable_variables, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=1e-6)
    assert int(model.optimizer.iterations) == run.steps_per_epoch


@pytest.mark.parametrize("damage", ["cut", "emptied", "altered", "altered end", "another version"])
def test_a_damaged_file_is_named_set_aside_and_trained_again(method, settings, data, tmp_path, capsys, damage):
    runs = helpers.Runs(tmp_path, method.train)
    ways = notebook.small_ways(method, method.Shift(), settings | {"epochs": 1, "epochs_supervised": 1})
    run = ways["SemiCT" if damage == "altered" else "SemiC"]  # the former must start from its trained weights again
    _, about = method.train(run, data, runs)
    path = runs.path(run)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = bytes(byte ^ 255 for byte in content[middle : middle + 400])
    end = path.read_bytes()[:-4] + b"????"
    damaged = {"cut": content[:middle], "emptied": b"", "altered": content, "altered end": end}
    path.write_bytes(bytes(damaged.get(damage, b"{}")))
    capsys.readouterr()
    _, again = method.train(run, data, runs)
    assert numbers(again) == numbers(about)
    assert "damaged" in capsys.readouterr().out and len(list(tmp_path.glob("*.damaged-*"))) == 1


@pytest.mark.parametrize("call, number", [("fsync", errno.ENOSPC), ("replace", errno.EROFS)])
def test_a_full_or_read_only_disk_is_said_and_harms_nothing(method, semic, data, tmp_path, monkeypatch, call, number):
    runs = helpers.Runs(tmp_path, method.train)
    broken_off(monkeypatch, method, semic, data, runs)
    before = runs.path(semic).read_bytes()

    def fail(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch, pytest.raises(OSError, match=f"{os.strerror(number)}; .* intact"):
        patch.setattr(os, call, fail)
        method.train(semic, data, runs)
    assert runs.path(semic).read_bytes() == before and not list(tmp_path.glob("*.writing"))
    assert len(method.train(semic, data, runs)[1]["history"]) == 3


@pytest.mark.parametrize(
    "size, where", [(128, "nan in epoch 1"), (72, "val_.* nan in epoch 1"), (100, "nan in the test")]
)
def test_nan_stops_the_run_with_its_reason_and_the_others_go_on(method, settings, data, tmp_path, capsys, size, where):
    class Breaking(method.Noise):  # in a step, in the last batch of validation, in the test
        def draw(self, random, shape):
            return super().draw(random, shape) * (math.nan if shape[0] == size else 1)

    runs = helpers.Runs(tmp_path, method.train)
    bad, good = (notebook.small_ways(method, kind, settings)["Supervised"] for kind in (Breaking(), method.Noise()))
    runs.train_each([bad, good], data)
    said = capsys.readouterr().out
    assert "failed: " in said and re.search(where, said) and "trained" in said
    assert not (runs.about(bad) or {}).get("test") and runs.about(good)["test"]


def test_a_collapsed_run_stops_and_says_so(method, settings, data, tmp_path):
    class Constant(method.ConsistencyModel):
        def call(self, inputs, training=False):
            log_p = super().call(inputs, training)
            return keras.ops.log_softmax(log_p * 0.0 + 9.0 * keras.ops.one_hot(4, 10))

    run = notebook.small_ways(method, method.Noise(), settings)["Supervised"]
    run = dataclasses.replace(run, model=Constant, epochs=12, steps=1)
    for _ in range(2):  # it is not trained on when it is asked for again
        about = method.train(run, data, helpers.Runs(tmp_path, method.train))[1]
        assert len(about["history"]) == 10 and "collapsed" in about["ended"]


def test_two_processes_do_not_train_the_same_run_and_a_dead_one_holds_no_lock(tmp_path):
    lock = helpers._locked(tmp_path / "a.lock")
    code = f"import helpers, pathlib, time; lock = helpers._locked(pathlib.Path({str(tmp_path / 'a.lock')!r}))"
    code += "; print('got it', flush=True); time.sleep(600)"
    how = {"stdout": subprocess.PIPE, "text": True, "cwd": helpers.RESULTS.parent}
    with subprocess.Popen([sys.executable, "-c", code], **how) as other:
        assert "waiting" in other.stdout.readline()
        lock.lock.release()
        assert "got it" in other.stdout.readline()
        other.kill()
    assert (tmp_path / "a.lock").exists()
    began = time.monotonic()
    helpers._locked(tmp_path / "a.lock")
    assert time.monotonic() - began < 5


def grid(method):
    """Three small runs, the third of which starts from the first."""
    settings = method.PRESETS["smoke"] | method.REPORTED | {"precision": "float32", "epochs": 4, "epochs_supervised": 3}
    ways = notebook.small_ways(method, method.Shift(), settings)
    return [ways["Supervised"], ways["SemiC"], ways["SemiCT"]]


def train_grid(folder, begins):
    """Train the grid, in a process of its own; the event `begins` is set when all is imported."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # an interrupted one says where it was
    data = notebook.small_data()
    begins.set()
    helpers.Runs(folder, METHOD.train).train_each(grid(METHOD), data)


def test_killed_at_random_moments_it_ends_with_the_same_numbers(method, data, tmp_path, monkeypatch):
    plan, random = grid(method), np.random.default_rng()
    undisturbed = helpers.Runs(tmp_path / "undisturbed", method.train)
    began = time.monotonic()
    undisturbed.train_each(plan, data)
    seconds, kills, struck, finished = time.monotonic() - began, int(os.environ.get("KILLS", 20)), 0, True
    # What is imported once need not be imported for each kill; JAX computes in threads, which a fork would lose.
    fork = multiprocessing.get_context("forkserver" if helpers.BACKEND == "tensorflow" else "spawn")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # where the server looks for what it loads
    fork.set_forkserver_preload(["test_runs"])
    while struck < kills or not finished:
        if finished:
            killed = helpers.Runs(tmp_path / f"after {struck} kills", method.train)
        begins = fork.Event()
        process = fork.Process(target=train_grid, args=[killed.folder, begins])
        process.start()
        assert begins.wait(120)
        process.join(random.uniform(0, 0.25 * seconds) if struck < kills else None)
        finished = not process.is_alive()
        if finished:
            # Threads of another process may sum in another order on some machines; on one they did not.
            assert all(numbers(killed.about(run)) == numbers(undisturbed.about(run)) for run in plan)
        else:
            struck += 1
            os.kill(process.pid, random.choice([signal.SIGKILL, signal.SIGINT]))
            process.join()


def test_what_is_in_a_name(method, settings, tmp_path):
    class Dim:
        name = "dim"

        def __init__(self, factor):
            self.factor = factor

        def draw(self, random, shape):
            return np.ones(shape[0], "float32")

        def __call__(self, images, drawn):
            return images * self.factor

    def name(**changes):
        return helpers.fingerprint(
            dataclasses.replace(notebook.small_ways(method, Dim(1.0), settings)["SemiC"], **changes)
        )

    assert name() == name(transform=Dim(1.0))
    others = [name(), name(transform=Dim(0.0)), name(seed=1), name(weight=2.0), name(transform=Dim(np.ones(3)))]
    others += [name(transform=Dim(functools.partial(np.clip, a_min=0))), name(transform=Dim(Dim(1.0).draw))]
    others += [name(transform=Dim(keras.layers.RandomFlip())), name(transform=Dim(keras.layers.RandomFlip("vertical")))]
    others += [name(transform=Dim(lambda x: np.sin(x))), name(transform=Dim(lambda x: np.cos(x)))]
    assert len(set(others)) == len(others)
    with pytest.raises(ValueError, match="cannot tell"):
        name(transform=Dim(threading.Lock()))


def test_a_comment_changes_no_name_and_code_does(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)

    def fingerprint(module, source):
        (tmp_path / f"{module}.py").write_text(source)
        return helpers.fingerprint(__import__(module).dim)

    plain = fingerprint("one", "FACTOR = 2\ndef dim(x):\n    return x * FACTOR\n")
    assert plain == fingerprint("two", 'FACTOR = 2\n\n\ndef dim(x):\n    """Dim."""\n    return x * FACTOR  # here\n')
    assert plain != fingerprint("three", "FACTOR = 3\ndef dim(x):\n    return x * FACTOR\n")
    assert plain != fingerprint("four", "FACTOR = 2\ndef dim(x):\n    return x + FACTOR\n")
    inside = "class Dim:\n    def draw(self):\n{comment}        return 1\n\n\ndim = Dim\n"
    assert fingerprint("seven", inside.format(comment="")) == fingerprint("eight", inside.format(comment="# here\n"))
    # A global that only happens to be called like an attribute is not used.
    same = [
        fingerprint(name, f"shape = {name == 'fifth'}\ndef dim(x):\n    return x.shape\n")
        for name in ("fifth", "sixth")
    ]
    assert same[0] == same[1]


@pytest.mark.parametrize(
    "call",
    [
        lambda images, drawn: images[:, :16],
        lambda images, drawn: keras.ops.cast(images, "float16"),
        lambda images, drawn: None,
        lambda images: images,
        lambda images, drawn: np.flip(np.asarray(images), axis=2),  # has no values to flip in training
        lambda images, drawn: images if keras.ops.sum(images) > 0 else -images,
        lambda images, drawn: images * np.random.normal(),  # would be one number in all of training
        lambda images, drawn: images / 0,
    ],
)
def test_a_transform_of_ones_own_is_tried_first(method, settings, data, tmp_path, call):
    class Own:
        draw = staticmethod(lambda random, shape: np.zeros(shape[0], "float32"))
        __call__ = staticmethod(call)

    run = notebook.small_ways(method, Own(), settings)["Supervised"]
    with pytest.raises(ValueError, match=r"The transform .*Own.* drew float32 \(2,\)"):
        method.train(run, data, helpers.Runs(tmp_path, method.train))


def test_records_are_written_and_read_back(method, settings, data, tmp_path):
    runs = helpers.Runs(tmp_path, method.train)
    run = notebook.small_ways(method, method.Shift(), settings)["Supervised"]
    _, about = method.train(run, data, runs)
    for _ in range(2):  # a run that is published again takes its own place
        records.publish(runs, run, tmp_path, study="table1", preset="smoke")
    rows, curves = (helpers.read_results(table, tmp_path) for table in ("runs", "curves"))
    assert len(rows) == 1 and len(curves) == run.epochs
    row = rows.iloc[0]
    assert row["accuracy"] == pytest.approx(about["test"]["accuracy"], rel=1e-5) and row["study"] == "table1"
    wanted = (
        "id study preset training method transform seed width labelled unlabelled epochs updates learning_rate weight"
    )
    wanted += " loss loss_supervised loss_consistency accuracy accuracy_plain accuracy_transformed agreement"
    assert set(f"{wanted} largest_class seconds device backend precision date commit".split()) <= set(rows)
    table = helpers.table_1({"report": helpers.REPORT, "ours": rows})
    assert table.loc[("shift", "Supervised"), ("accuracy", "report")] == "68.3%"
    assert table.loc[("shift", "Supervised"), ("accuracy", "ours")] == f"{row['accuracy']:.1%}"
    assert table.loc[("noise", "SemiC"), ("accuracy", "ours")] == "not run"


def test_a_list_goes_on_with_what_is_missing(method, settings, data, tmp_path):
    runs = helpers.Runs(tmp_path / "runs", method.train)
    ways = notebook.small_ways(method, method.Shift(), settings | {"epochs_supervised": 1, "epochs": 1})
    supervised, semict = ways["Supervised"], ways["SemiCT"]
    control = dataclasses.replace(supervised, steps=5)
    plan = [("table1", supervised), ("control", control), ("table1", semict)]
    method.train(supervised, data, runs)
    records.publish(runs, supervised, tmp_path, study="table1", preset="smoke")
    found = helpers.read_results(folder=tmp_path)
    assert records.missing(plan, found[:0]) == [0, 1, 2] and records.missing(plan, found) == [1, 2]
    records.carry(plan, runs, found, tmp_path / "carried")
    assert [path.name for path in (tmp_path / "carried").iterdir()] == [runs.path(supervised).name]  # SemiCT's start
    other = [(study, dataclasses.replace(run, precision="mixed_bfloat16")) for study, run in plan]
    assert records.missing(other, found) == [1, 2]
    records.carry(plan[:1], runs, found, tmp_path / "carried")
    assert not (tmp_path / "carried").exists()
