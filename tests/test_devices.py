"""Several devices: the same step, evaluation and run as on one.

The two devices are logical ones on one processor; conftest.py makes them.
"""

import dataclasses
import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import helpers

DEVICES = ("CPU:0", "CPU:1")
LABELS = np.array([4, -1, 1, -1, 3, -1, 9, 2, 0])  # every second image: all but one labelled, or only one
BATCH = {"positions": list(range(9)), "seed": [5, 6]}


def make_model(method, transform, strategy):
    """A model whose step is the same every time: no dropout, and SGD, whose update is the gradient."""
    images = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    keras.utils.set_random_seed(1)
    with strategy.scope():
        model = method.ConsistencyModel(method.build_network(4), transform, 0.7, helpers.ImagePool(images, LABELS))
        for layer in model.network.layers:
            if isinstance(layer, keras.layers.Dropout):
                layer.rate = 0.0
        model.compile(optimizer=keras.optimizers.SGD(1.0), jit_compile=helpers.jit_choice(transform))
    return model


@pytest.mark.parametrize("name", ["noise", "shift", "rotation"])
@pytest.mark.parametrize("count", [9, 2])
def test_two_devices_take_the_same_step_as_one(method, name, count):
    def transform(images, seed):
        # In what a warp leaves black, all values of a pooling window are equal but for rounding, which decides where
        # the gradient goes. A little noise makes that certain.
        copies = method.TRANSFORMS[name](images, seed)
        return copies + 0.01 * tf.random.stateless_normal(tf.shape(images), seed)

    results = []
    for strategy in (tf.distribute.get_strategy(), helpers.mirrored(DEVICES)):
        model = make_model(method, transform, strategy)
        before = [weight.numpy() for weight in model.weights]
        positions = tf.constant(BATCH["positions"][:count])
        batches = tf.data.Dataset.from_tensors({"positions": positions, "seed": tf.constant(BATCH["seed"])})
        batches = helpers.give_to_all(strategy, batches)
        history = model.fit(batches, steps_per_epoch=1, shuffle=False, verbose=0).history
        evaluation = model.evaluate(batches, steps=1, return_dict=True, verbose=0)
        changes = [weight.numpy() - old for weight, old in zip(model.weights, before, strict=True)]
        results.append(({metric: values[0] for metric, values in history.items()}, evaluation, changes))
    (history, evaluation, changes), (history_2, evaluation_2, changes_2) = results
    assert set(history) == set(helpers.METRICS)
    assert history_2 == pytest.approx(history, rel=1e-4, abs=1e-5)
    assert evaluation_2 == pytest.approx(evaluation, rel=1e-3, abs=1e-4)
    assert max(np.abs(change).max() for change in changes) > 1e-3
    for one, two in zip(changes, changes_2, strict=True):
        assert np.linalg.norm(one - two) < 1e-4 * np.linalg.norm(one) + 1e-6


def test_a_run_on_two_devices_resumes_and_ends_as_on_one(method, data, tiny, tmp_path):
    run = method.plan("SemiC", "shift", tiny, "shapes")
    run = dataclasses.replace(run, switches="inference_mode", epochs=2)  # dropout differs between devices
    records = []
    for strategy in (tf.distribute.get_strategy(), helpers.mirrored(DEVICES)):
        folder = tmp_path / str(strategy.num_replicas_in_sync)
        runner = helpers.Runner(data, method.build_model, method.TRANSFORMS, [run], "smoke", folder)
        runner.strategy = strategy
        records += runner.train([run])
        kept = [path.unlink() for path in folder.rglob("record.json")]
        assert kept and runner.train([run])[0]["metrics"] == pytest.approx(records[-1]["metrics"], rel=1e-5, abs=1e-6)
    one, two = records
    assert two["metrics"] == pytest.approx(one["metrics"], rel=2e-3, abs=2e-3)
    assert two["history"][1] == pytest.approx(one["history"][1], rel=2e-3, abs=2e-3)


def test_dropout_draws_differ_between_devices_and_repeat(method, data, tiny, tmp_path):
    run = method.plan("SemiC", "shift", tiny, "shapes")
    runner = helpers.Runner(data, method.build_model, method.TRANSFORMS, [run], "smoke", tmp_path)
    runner.strategy = helpers.mirrored(DEVICES)
    model = runner.model(run)
    checkpoint = helpers.Checkpoint(tmp_path, run.seed, lock=None)
    checkpoint.set_model(model)
    drawn = []
    for epoch in (0, 1, 0):
        checkpoint.on_epoch_begin(epoch)
        layers = [layer for layer in model.network.layers if isinstance(layer, keras.layers.Dropout)]
        states = [runner.strategy.experimental_local_results(layer.seed_generator.state.value) for layer in layers]
        drawn.append([tuple(state.numpy()) for pair in states for state in pair])
    assert drawn[0] == drawn[2] and len({*drawn[0], *drawn[1]}) == 8


def test_several_machines_are_refused_with_the_reason(monkeypatch):
    task = {"type": "worker", "index": 0}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": {"worker": ["a:1", "b:2"]}, "task": task}))
    with pytest.raises(NotImplementedError, match="Keras 3 cannot train"):
        helpers.device_strategy()
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": {"worker": ["a:1"]}, "task": task}))
    assert helpers.device_strategy().num_replicas_in_sync == 1
    monkeypatch.delenv("TF_CONFIG")
    assert helpers.device_strategy().num_replicas_in_sync == 1


def test_a_batch_smaller_than_the_devices_is_refused(method, data, tiny, tmp_path):
    run = dataclasses.replace(method.plan("Supervised", "shift", tiny, "shapes"), labeled=65, batch_size=64)
    runner = helpers.Runner(data, method.build_model, method.TRANSFORMS, [run], "smoke", tmp_path)
    runner.strategy = helpers.mirrored(DEVICES)
    with pytest.raises(ValueError, match=r"65 training images holds 1, fewer than there are devices \(2\)"):
        runner.train([run])
