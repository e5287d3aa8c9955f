"""The playground: what a try is, and the panel, driven by its buttons as a reader does."""

import dataclasses
import functools
import json
import sys
import time
import types

import ipywidgets
import notebook
import numpy as np
import pytest
import tensorflow as tf

import helpers


@pytest.fixture
def runner(method, data, tmp_path):
    return helpers.Runner(data, method.build_model, dict(method.TRANSFORMS), [], "smoke", tmp_path)


@pytest.fixture
def make_runs(method, tiny):
    return functools.partial(method.try_runs, settings=tiny, dataset="shapes")


@pytest.fixture
def playground(runner, make_runs, tiny):
    panel = helpers.Playground(runner, make_runs, [48, 96], tiny)
    panel.controls.transform.value, panel.controls.epochs.value = "shift", 1
    return panel


@pytest.fixture
def choice():
    return types.SimpleNamespace(
        transform="shift", strength=1.0, learning_rate=1e-3, consistency_weight=1.0, labeled=96, epochs=2
    )


def finish(playground):
    playground.thread.join(120)
    assert not playground.thread.is_alive()


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_picture(image):
    return image.value[:4] == b"\x89PNG" and image.layout.display != "none"


# ------------------------------------------------------------------------------------ what a try is


@pytest.mark.parametrize("preset", ["smoke", "quick", "standard", "paper"])
@pytest.mark.parametrize("share", [16, 8, 4, 2, 1])
def test_try_and_baseline_have_the_same_labels_and_as_many_updates(method, choice, preset, share):
    settings = notebook.preset_settings(method, preset, seed=3, precision="mixed_bfloat16", recipe="released")
    choice.labeled = settings.labeled // share
    run, baseline = method.try_runs(choice, settings)
    assert run.labeled == baseline.labeled == choice.labeled and baseline.unlabeled == 0 < run.unlabeled <= 2000
    assert run.epochs * run.steps_per_epoch == baseline.epochs * baseline.steps_per_epoch
    for one in (run, baseline):
        assert one.steps <= -(-(one.labeled + one.unlabeled) // one.batch_size)  # an epoch has no more
        assert one.width <= 16 and one.seed == 3 and one.precision == "mixed_bfloat16"
        assert one.active == helpers.RECIPES["released"]
    everything = -(-(run.labeled + run.unlabeled) // run.batch_size)
    assert run.epochs == choice.epochs and run.steps > everything / 2


def test_strength_1_gives_the_numbers_of_the_transform_itself(method, runner, data, make_runs, choice, tmp_path):
    run, _ = make_runs(choice)
    itself = helpers.Runner(data, method.build_model, method.TRANSFORMS, [], "smoke", tmp_path)
    expected = itself.train([dataclasses.replace(run, transform="shift")])[0]
    results = {}
    for strength in (1, 0.5):
        choice.strength = strength
        run, _ = make_runs(choice)
        runner.transforms[run.transform] = helpers.at_strength(method.random_shift, strength)
        results[strength] = runner.train([run])[0]
    assert results[1]["history"] == expected["history"] and results[1]["metrics"] == expected["metrics"]
    assert results[0.5]["history"] != expected["history"]
    assert len({results[1]["id"], results[0.5]["id"], expected["id"]}) == 3
    assert results[1]["fingerprint"] != results[0.5]["fingerprint"]


@pytest.mark.parametrize("name", ["rotation", "shift"])
def test_the_recipe_released_holds_at_any_strength(method, runner, tiny, choice, name):
    choice.transform, choice.strength = name, 0.5
    tiny.recipe = "released"
    run, _ = method.try_runs(choice, tiny, "shapes")
    runner.transforms[run.transform] = helpers.at_strength(method.TRANSFORMS[name], 0.5)
    model = runner.model(run)
    images = helpers.to_unit_range(runner.data.test_images[:8])
    copies = model.copies(images, [0, 1], training=True)
    if name == "rotation":
        expected = method.random_rotation(images, tf.constant([run.seed, 1]), 22.5, together=True)
    else:
        expected = method.random_shift(images, [0, 1], 5.0, whole=True)
    np.testing.assert_array_equal(copies, expected)


# --------------------------------------------------------------------------------------- the panel


def test_nothing_trains_before_train_is_pressed(playground, tmp_path):
    assert playground.thread is None and not list(tmp_path.iterdir())
    assert not playground.train_button.disabled and playground.stop_button.disabled
    assert playground.curves.layout.display == playground.pictures.layout.display == "none"


def test_no_output_widget_is_in_the_panel(playground):
    pending = [playground.panel]
    for widget in pending:
        assert not isinstance(widget, ipywidgets.Output)
        pending += getattr(widget, "children", ())
    assert playground.train_button in pending and playground.table in pending


def test_train_makes_both_records_and_a_row(playground, capsys):
    playground.controls.strength.value = 0.5
    playground.train_button.click()
    assert playground.train_button.disabled and not playground.stop_button.disabled
    first = playground.thread
    playground.train_button.click()  # while one trains, it does nothing
    assert playground.thread is first
    finish(playground)
    assert "Done in" in playground.status.value
    assert not playground.train_button.disabled and playground.stop_button.disabled
    records = [playground.runner.record(run) for run in playground.runs]
    assert [record["configuration"]["method"] for record in records] == ["SemiC", "Supervised"]
    assert is_picture(playground.curves) and is_picture(playground.pictures)
    assert len(playground.watches[playground.runs[0].id].points) == playground.runs[0].steps
    row = playground.table.value.split("<tbody>")[1]
    for text in ("shift", "0.5", "1 | 1 of 1"):
        assert f">{text}</td>" in row
    for name in ("val_accuracy_clean", "val_accuracy_transformed"):
        assert " | ".join(f"{record['history'][-1][name]:.1%}" for record in records) in row
    assert "accuracy on the validation images" in playground.table.value
    assert capsys.readouterr().out == ""  # it would be put under some other cell


def test_a_finished_try_is_kept_and_another_gets_a_row_of_its_own(playground):
    playground.train_button.click()
    finish(playground)
    written = [playground.runner.path(run) / "record.json" for run in playground.runs]
    times = [path.stat().st_mtime_ns for path in written]
    playground.train_button.click()
    finish(playground)
    assert [path.stat().st_mtime_ns for path in written] == times and is_picture(playground.pictures)
    assert playground.table.value.count("<tr>") == 2
    playground.controls.consistency_weight.value = 3.0
    playground.train_button.click()
    finish(playground)
    assert playground.table.value.count("<tr>") == 3
    assert [path.stat().st_mtime_ns for path in written] == times  # the baseline is the same and kept


def test_stop_ends_within_a_second_and_train_goes_on_from_the_last_epoch(playground):
    playground.controls.epochs.value = 8
    playground.train_button.click()
    run = playground.make_runs(playground.choice())[0]
    wait_until(lambda: run.id in playground.watches and len(playground.watches[run.id].points) > 1.5 * run.steps)
    pressed = time.monotonic()
    playground.stop_button.click()
    assert playground.stop_button.disabled
    wait_until(lambda: not helpers._training.locked())
    assert time.monotonic() - pressed < 1
    finish(playground)
    assert "Stopped" in playground.status.value and not playground.train_button.disabled
    folder = playground.runner.path(run)
    assert not (folder / "record.json").exists() and not (folder / "lock.json").exists()
    kept = json.loads((folder / "progress.json").read_text())["history"]
    assert 1 <= len(kept) < 8
    assert is_picture(playground.curves) and is_picture(playground.pictures)
    assert f">{len(kept)} | 0 of 8</td>" in playground.table.value

    playground.train_button.click()
    finish(playground)
    record = playground.runner.record(run)
    assert record["history"][: len(kept)] == kept and len(record["history"]) == 8
    assert playground.watches[run.id].points[0][0] == len(kept) * run.steps + 1  # began after the last finished epoch
    assert ">8 | 8 of 8</td>" in playground.table.value


def test_in_colab_it_trains_in_the_foreground_until_it_is_interrupted(runner, make_runs, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    playground = helpers.Playground(runner, make_runs, [48, 96], tiny)
    buttons = playground.panel.children[1].children
    assert playground.stop_button not in buttons and "Interrupt execution" in buttons[1].value
    playground.controls.epochs.value = 8
    report, steps = playground._report, []

    def interrupted(watch, note):
        report(watch, note)
        steps.append(note)
        if len(watch.points) > 1.5 * watch.configurations[0].steps:
            raise KeyboardInterrupt  # as the kernel does it, in the midst of training

    monkeypatch.setattr(playground, "_report", interrupted)
    playground.train_button.click()  # comes back when it has ended
    assert "Stopped" in playground.status.value and not playground.train_button.disabled and steps
    run = playground.runs[0]
    assert 1 <= len(runner.history(run)) < 8 and runner.record(run) is None and is_picture(playground.pictures)
    monkeypatch.setattr(playground, "_report", report)
    playground.train_button.click()
    assert "Done in" in playground.status.value and len(runner.record(run)["history"]) == 8


def test_stop_while_it_waits_for_another_training(playground):
    with helpers._one_training():
        playground.train_button.click()
        wait_until(lambda: "another training of this notebook" in playground.status.value)
        playground.stop_button.click()
        finish(playground)
    assert "Stopped" in playground.status.value and playground.runner.record(playground.runs[0]) is None


def test_an_error_is_shown_in_the_panel(playground, monkeypatch):
    playground.controls.labeled.options = [5000]
    playground.train_button.click()
    finish(playground)
    assert "ValueError: The run asks for 5000 labeled images" in playground.status.value
    assert not playground.train_button.disabled and playground.stop_button.disabled

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(helpers, "write_bytes", full)
    playground.controls.labeled.options = [48]
    playground.train_button.click()
    finish(playground)
    assert "No space left on device" in playground.status.value


def test_a_loss_that_is_not_finite_is_told(playground):
    def broken(images, seed, strength=1.0):
        return images * float("nan") * strength

    playground.transforms["shift"] = broken
    playground.train_button.click()
    finish(playground)
    assert "NotFinite" in playground.status.value and "loss" in playground.status.value
    assert playground.pictures.layout.display == "none"


def test_the_ten_are_the_most_unsure(runner, make_runs, choice, method):
    choice.strength = 0.5
    run, _ = make_runs(choice)
    runner.transforms[run.transform] = helpers.at_strength(method.random_shift, 0.5)
    model, images = runner.model(run), runner.data.test_images[:270]  # more than one batch
    found = helpers.most_unsure(model, images)

    seeds = [tf.random.fold_in(helpers.EVALUATION_SEED, tf.constant(step, tf.int64)) for step in (0, 1)]
    pictures = images.astype(np.float32) / 255
    copies = [
        method.random_shift(tf.constant(part), seed, 5.0)
        for part, seed in zip((pictures[:250], pictures[250:]), seeds, strict=True)
    ]
    copies = np.concatenate(copies)
    first, second = (tf.nn.softmax(model.network(view)).numpy().astype(np.float64) for view in (pictures, copies))
    mean = (first + second) / 2
    unsure = -(mean * np.log(mean)).sum(axis=1)
    assert unsure[found.places].min() >= np.delete(unsure, found.places).max() - 1e-5
    assert np.all(np.diff(unsure[found.places]) <= 1e-5) and len(set(found.places)) == 10
    np.testing.assert_allclose(found.images, pictures[found.places])
    np.testing.assert_allclose(found.copies, copies[found.places], atol=1e-6)
    expected = np.stack([first.argmax(axis=1), second.argmax(axis=1)], axis=1)[found.places]
    np.testing.assert_array_equal(found.answers, expected)
