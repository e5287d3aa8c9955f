"""Runs: batches, training, records, resuming after an interruption, never reusing what has changed."""

import dataclasses
import itertools
import json

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

import helpers


def numbers(record):
    """What must be equal in two records of the same run."""
    return {name: record[name] for name in ("id", "fingerprint", "configuration", "metrics", "history")}


@pytest.fixture
def plan(method, tiny):
    """A small grid: step one, its early-stopped version, and what starts from them."""
    runs = [method.plan(name, "noise", tiny, "shapes") for name in helpers.METHODS]
    return [runs[0], method.plan("Supervised", "noise", tiny, "shapes", early=True), *runs[1:]]


@pytest.fixture
def make_runner(method, data, plan):
    def make(folder, **changes):
        arguments = {"build_model": method.build_model, "transforms": method.TRANSFORMS} | changes
        return helpers.Runner(data, plan=plan, preset="smoke", folder=folder, **arguments)

    return make


# ----------------------------------------------------------------------------------------- batches


def batches(first_epoch, epochs, seed=0):
    elements = helpers.training_batches(range(5, 15), 4, seed, first_epoch, epochs).as_numpy_iterator()
    return [(element["positions"].tolist(), tuple(element["seed"].tolist())) for element in elements]


def test_an_epoch_shows_every_image_once():
    elements = batches(0, 3)
    assert [len(positions) for positions, _ in elements] == [4, 4, 2] * 3
    for epoch in range(3):
        steps = elements[3 * epoch : 3 * epoch + 3]
        assert sorted(position for positions, _ in steps for position in positions) == list(range(5, 15))


def test_orders_and_seeds_differ_by_step_epoch_and_run_and_repeat():
    first = batches(0, 3)
    assert first == batches(0, 3) and first[3:] == batches(1, 3)
    seeds = [seed for run in (0, 1) for _, seed in batches(0, 3, run)]
    assert len(set(seeds)) == len(seeds) == 18
    images = [shown for shown, _ in first]
    assert images[:3] != images[3:6] and images != [shown for shown, _ in batches(0, 3, 1)]


def test_evaluation_batches_are_the_same_every_time():
    once, again = (list(helpers.evaluation_batches(range(3, 303)).as_numpy_iterator()) for _ in range(2))
    assert [len(element["positions"]) for element in once] == [250, 50]
    assert [e["positions"].tolist() + e["seed"].tolist() for e in once] == [
        e["positions"].tolist() + e["seed"].tolist() for e in again
    ]
    assert once[0]["seed"].tolist() != once[1]["seed"].tolist()


# ---------------------------------------------------------------------------------------- training


def test_a_grid_trains_once_and_keeps_its_records(make_runner, data, plan, tmp_path):
    runner = make_runner(tmp_path)
    records = runner.train(plan)
    assert [record["id"] for record in records] == [run.id for run in plan]
    for run, record in zip(plan, records, strict=True):
        assert len(record["history"]) == run.epochs and record["configuration"] == dataclasses.asdict(run)
        assert set(record["metrics"]) == set(helpers.METRICS) and record["seconds"] > 0
        assert {"loss", "val_loss", "val_consistency"} <= record["history"][0].keys()
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("record.json")}
    assert numbers(make_runner(tmp_path).train(plan)[2]) == numbers(records[2])
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("record.json")}
    assert len(runner.records()) == 5
    evaluation = helpers.evaluation_batches(data.pool(plan[2])[1]["test"])
    trained = runner.trained(plan[2])
    trained.pool = data.pool(plan[2])[0]
    assert trained.evaluate(evaluation, return_dict=True, verbose=0) == pytest.approx(records[2]["metrics"], rel=1e-5)
    assert not list(tmp_path.rglob("*partial*"))


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(make_runner, plan, tmp_path):
    once, again = (make_runner(tmp_path / name).train(plan[:1])[0] for name in "ab")
    assert numbers(once) == numbers(again)
    other = dataclasses.replace(plan[0], seed=1)
    assert make_runner(tmp_path / "a").train([other])[0]["history"] != once["history"]


def test_step_two_starts_from_step_one_weights_only(make_runner, plan, tmp_path):
    runner = make_runner(tmp_path)
    with pytest.raises(FileNotFoundError, match="train step one first"):
        runner.model(plan[3])
    runner.train(plan[:2])
    for start, run in ((plan[0], plan[3]), (plan[1], plan[4])):
        model = runner.model(run)
        saved = runner.model(start).network
        saved.load_weights(runner.path(start) / "network.weights.h5")
        for ours, theirs in zip(model.network.get_weights(), saved.get_weights(), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert float(model.optimizer.learning_rate) == pytest.approx(run.learning_rate)
        assert int(model.optimizer.iterations) == 0
        assert all(not np.any(variable) for variable in model.optimizer.variables[2:])
    with h5py.File(runner.path(plan[0]) / "network.weights.h5") as file:
        assert "optimizer" not in file


def test_a_run_may_draw_other_batches_than_what_it_starts_from(make_runner, plan, tmp_path):
    runner = make_runner(tmp_path)
    start = dataclasses.replace(plan[0], epochs=1, switches="balanced_batches")
    run = dataclasses.replace(plan[3], epochs=1, starting_run=start.id)
    with pytest.raises(FileNotFoundError, match="train step one first"):
        runner.model(run)
    runner.train([start])
    assert runner.train([run])[0]["id"] == run.id


def test_mixed_precision_ends_within_noise_of_float32(make_runner, plan, tmp_path):
    def last_losses(precision):
        runs = [dataclasses.replace(plan[2], precision=precision, seed=seed) for seed in (0, 1, 2)]
        runner = make_runner(tmp_path)
        records = runner.train(runs)
        assert keras.mixed_precision.dtype_policy().name == "float32"
        assert runner.model(runs[0]).network.layers[1].compute_dtype == precision.removeprefix("mixed_")
        return np.array([record["history"][-1]["loss"] for record in records])

    exact, low = last_losses("float32"), last_losses("mixed_bfloat16")
    assert not np.array_equal(exact, low)
    # The same seed in either type: nearer to each other than two seeds are.
    assert np.abs(exact - low).mean() < np.abs(exact - np.roll(exact, 1)).mean()


def test_training_takes_the_batches_that_the_switches_name(make_runner, data, plan, tmp_path):
    def drawn(switches):
        run = dataclasses.replace(plan[2], switches=switches)
        batches = make_runner(tmp_path)._training(run, data.pool(run)[1]["training"], 0).as_numpy_iterator()
        return run, [batch["positions"] for batch in itertools.islice(batches, run.steps_per_epoch)]

    run, plain = drawn("")
    images, last = run.labeled + run.unlabeled, (run.labeled + run.unlabeled) % run.batch_size
    assert last and sorted(np.concatenate(plain)) == list(range(images)) and len(plain[-1]) == last
    _, filled = drawn("filled_batches")
    np.testing.assert_array_equal(filled[-1], [*plain[-1], *plain[0]][: run.batch_size])
    _, balanced = drawn("balanced_batches")
    assert all(np.sum(batch < run.labeled) == len(batch) // 2 == run.batch_size // 2 for batch in balanced)


def test_an_edited_transform_gets_new_runs_and_leaves_others_alone(make_runner, method, plan, tmp_path):
    before = make_runner(tmp_path)

    def weaker_noise(images, seed, sigma=0.05):
        return method.gaussian_noise(images, seed, sigma)

    after = make_runner(tmp_path, transforms=method.TRANSFORMS | {"noise": weaker_noise})
    assert before.path(plan[0]) != after.path(plan[0])
    shift = dataclasses.replace(plan[0], transform="shift")
    assert before.path(shift) == after.path(shift)
    with pytest.raises(ValueError, match=r"sepia.*noise, shift, rotation"):
        before.path(dataclasses.replace(plan[0], transform="sepia"))


def test_a_run_follows_the_transform_of_what_it_starts_from(make_runner, method, plan, tmp_path):
    semict = next(run for run in plan if run.method == "SemiCT")
    of_shift = dataclasses.replace(plan[0], transform="shift").id
    both = [dataclasses.replace(semict, transform="shift"), dataclasses.replace(semict, moments_from=of_shift)]

    def other_shift(images, seed, pixels=5.0):
        return method.random_shift(images, seed, pixels)

    before, after = make_runner(tmp_path), make_runner(tmp_path, transforms=method.TRANSFORMS | {"shift": other_shift})
    assert before.path(semict) == after.path(semict)
    assert all(before.path(run) != after.path(run) for run in both)


def test_a_transform_that_was_defined_again_is_not_taken_for_the_former(
    make_runner, method, plan, tmp_path, monkeypatch
):
    runner, shift = make_runner(tmp_path), dataclasses.replace(plan[0], transform="shift")
    assert runner.path(shift)
    monkeypatch.setattr(method, "random_shift", lambda images, seed, pixels=5.0: images)
    with pytest.raises(ValueError, match="random_shift has been defined again"):
        runner.path(shift)
    assert runner.path(plan[0])  # noise is as it was
    monkeypatch.setattr(method, "build_model", lambda *_: None)
    with pytest.raises(ValueError, match="build_model has been defined again"):
        runner.path(plan[0])


def test_a_transform_of_ones_own_trains(make_runner, method, plan, tmp_path):
    def flip(images, seed, probability=0.5):
        drawn = tf.random.stateless_uniform([tf.shape(images)[0], 1, 1, 1], seed)
        return tf.where(drawn < probability, tf.reverse(images, [2]), images)

    run = dataclasses.replace(plan[2], transform="flip")
    runner = make_runner(tmp_path, transforms=method.TRANSFORMS | {"flip": flip})
    assert 0 <= runner.train([run])[0]["metrics"]["consistency"] <= 1


def test_the_reference_warp_trains_to_nearly_the_same_numbers(make_runner, method, plan, tmp_path):
    run = dataclasses.replace(plan[2], transform="rotation", epochs=1)
    results = []
    original = method.warp
    for warp in (helpers.cubic_warp, helpers.elasticdeform_warp):
        method.warp = warp
        try:
            runner = make_runner(tmp_path)
            results.append((runner.path(run), runner.train([run])[0]))
            assert helpers.jit_choice(method.random_rotation) == ("auto" if warp is helpers.cubic_warp else False)
        finally:
            method.warp = original
    assert results[0][0] != results[1][0]
    assert results[0][1]["history"][0]["loss"] == pytest.approx(results[1][1]["history"][0]["loss"], rel=1e-3)


# ------------------------------------------------------------------------------------ interruption


class Interruption(keras.callbacks.Callback):
    """Stops a training in the middle of an epoch, as an interrupted kernel does."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.now == self.epoch:
            raise KeyboardInterrupt


def test_an_interrupted_run_resumes_to_the_same_record(make_runner, plan, tmp_path, monkeypatch):
    run = plan[2]
    unbroken = make_runner(tmp_path / "unbroken").train([run])[0]
    fit = keras.Model.fit
    broken = make_runner(tmp_path / "broken")
    for epoch in (0, 2):  # before anything was kept, then after two epochs
        interruption = Interruption(epoch)

        def interrupted(model, *arguments, callbacks, interruption=interruption, **keywords):
            return fit(model, *arguments, callbacks=[*callbacks, interruption], **keywords)

        monkeypatch.setattr(keras.Model, "fit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            broken.train([run])
        assert broken.record(run) is None
        progress = broken.path(run) / "progress.json"
        assert (len(json.loads(progress.read_text())["history"]) if progress.exists() else 0) == epoch
    monkeypatch.setattr(keras.Model, "fit", fit)
    assert numbers(broken.train([run])[0]) == numbers(unbroken)
