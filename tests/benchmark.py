"""Measures speed, `make bench`: medians of interleaved repeats, printed and kept in results/benchmark.json.

The step is compared with a plain loop, as the report's code has it (float32, elasticdeform image by image on the host,
Keras's own normalisation and activation, its own gradient tape), and with Keras's `fit` on Keras's own layers in the
same number type.
"""

import argparse
import functools
import json
import os
import resource
import subprocess
import sys
import time

import notebook

# isort: split
import helpers  # before TensorFlow: it chooses how that computes

# isort: split
import keras
import numpy as np
import tensorflow as tf

WIDTH, WIDE = 32, 96


def median_ms(functions, rounds):
    """Milliseconds of each of some functions, called in turn: dict of medians."""
    times = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if number:  # the first call compiles
                times[name].append(1000 * (time.perf_counter() - began))
    return {name: float(np.median(values)) for name, values in times.items()}


def batch_of(method, transform, count=128):
    """A batch of random images, one of twelve with a label, on the device."""
    random = np.random.default_rng(0)
    labels = np.where(np.arange(count) % 12, -1, random.integers(0, 10, count)).astype("int32")
    x, y = method.Pairs(
        random.integers(0, 256, (count, 32, 32, 3)).astype("uint8"), labels, transform, 0, batch_size=count
    )[0]
    return keras.tree.map_structure(tf.constant, (x, y))


def our_step(method, transform, width, kind=None, count=128, own_layers=False):
    """Function that takes a training step with the notebook's model, as `fit` does."""
    keras.config.set_dtype_policy(helpers.fastest_precision(width))
    model = (kind or method.ConsistencyModel)(network(method, width, own_layers), transform)
    model.compile(optimizer=keras.optimizers.Adam(), jit_compile=helpers.JIT_COMPILE)
    model.make_train_function()
    batch = batch_of(method, transform, count)
    return lambda: model.train_function(iter([batch]))


def network(method, width, own_layers):
    """The network, with Keras's own layers or ours."""
    ours = helpers.BatchNormalization, helpers.LeakyReLU
    if own_layers:
        helpers.BatchNormalization, helpers.LeakyReLU = keras.layers.BatchNormalization, keras.layers.LeakyReLU
    try:
        return method.build_network(width)
    finally:
        helpers.BatchNormalization, helpers.LeakyReLU = ours


def plain_step(method, transform, width):
    """Function that takes the same step in a loop of one's own."""
    keras.config.set_dtype_policy("float32")
    plain, optimizer = network(method, width, own_layers=True), keras.optimizers.Adam()
    optimizer.build(plain.trainable_variables)
    x, y = batch_of(method, transform)

    def warp(images, parameters):
        if transform.name == "noise":
            return np.clip(images + parameters, images.min(), images.max())
        return method.elasticdeform_warp(images, parameters)

    @tf.function
    def step():
        copies = tf.ensure_shape(tf.numpy_function(warp, [x["images"], x["parameters"]], tf.float32), x["images"].shape)
        with tf.GradientTape() as tape:
            log_p = tf.nn.log_softmax(plain(tf.concat([x["images"], copies], axis=0), training=True))
            known = tf.cast(tf.concat([y, y], axis=0) >= 0, "float32")
            supervised = method.symmetric_kl(method.log_labels(tf.concat([y, y], axis=0)), log_p)
            loss = method.mean(supervised, known) + tf.reduce_mean(method.symmetric_kl(*tf.split(log_p, 2)))
        optimizer.apply(tape.gradient(loss, plain.trainable_variables), plain.trainable_variables)
        return loss

    return step


ON_JAX = """
import notebook, helpers, keras, numpy as np, sys, time
method = notebook.load_method()
model = method.ConsistencyModel(method.build_network(int(sys.argv[1])), method.Shift())
model.compile(optimizer=keras.optimizers.Adam(), jit_compile=helpers.JIT_COMPILE)
batch = method.Pairs(np.zeros((128, 32, 32, 3), "uint8"), np.zeros(128, "int32"), method.Shift(), 0)[0]
times = [time.perf_counter()]
for _ in range(1 + int(sys.argv[2])):  # the first call compiles
    model.train_on_batch(*batch)
    times.append(time.perf_counter())
print(1000 * np.median(np.diff(times)[1:]))
"""


def step_on_jax_ms(width, rounds):
    """Milliseconds of a step (shift, float32) in a process of its own with Keras on JAX."""
    command, own = [sys.executable, "-c", ON_JAX, str(width), str(rounds)], {"KERAS_BACKEND": "jax"}
    how = {"cwd": notebook.ROOT / "tests", "env": os.environ | own, "stdout": subprocess.PIPE, "text": True}
    return float(subprocess.run(command, check=True, **how).stdout)


def at_best_ms(method, width):
    """What bounds a step with 128 images and copies: milliseconds of its products, and of its traffic with the memory.

    Products: those of the convolutions and, twice as many, of their gradients, as fast as a large matrix product.
    Traffic: every layer's values, and their gradients, are written once and read twice, as fast as a large copy.
    """
    kind = "bfloat16" if "bfloat16" in helpers.fastest_precision(width) else "float32"
    layers = method.build_network(width).layers
    convolutions = [layer for layer in layers if isinstance(layer, keras.layers.Conv2D)]
    products = sum(np.prod(layer.output.shape[1:]) * np.prod(layer.kernel.shape[:3]) for layer in convolutions)
    values = sum(np.prod(layer.output.shape[1:]) for layer in layers)
    matrix, large = tf.cast(tf.random.normal((4096, 4096)), kind), tf.zeros(2**28, "int8")
    tries = {"product": tf.function(lambda: tf.linalg.matmul(matrix, matrix)), "copy": tf.function(lambda: large + 1)}
    times = median_ms(tries, 5)
    traffic = 256 * 6 * values * (2 if kind == "bfloat16" else 4)
    return {
        "products": 256 * 3 * products / 4096**3 * times["product"],
        "traffic": traffic / (2 * 2**28) * times["copy"],
    }


def main():
    """Measure all and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    rounds = parser.parse_args().rounds
    method, found = notebook.load_method(), helpers.environment()
    began = time.perf_counter()
    our_step(method, method.Shift(), WIDTH)()
    found["first_step_seconds"] = time.perf_counter() - began
    found["step_ms"], found["step_speedup"], found["input_share"] = {}, {}, {}
    for name, transform in method.TRANSFORMS.items():
        ours, plain = our_step(method, transform, WIDTH), plain_step(method, transform, WIDTH)
        steps = {"ours": ours, "plain": plain, "fit": our_step(method, transform, WIDTH, own_layers=True)}
        images, labels = np.zeros((4096, 32, 32, 3), "uint8"), np.zeros(4096, "int32")
        pairs = method.Pairs(images, labels, transform, 0, shuffled=True)
        times = median_ms(steps | {"input": functools.partial(pairs.__getitem__, 3)}, rounds)
        found["step_ms"][name] = times
        found["step_speedup"][name] = times["plain"] / times["ours"]
        found["input_share"][name] = times["input"] / times["ours"]
    found["step_ms"]["shift, on JAX"] = step_on_jax_ms(WIDTH, rounds)
    wide = {"ours": our_step(method, method.Shift(), WIDE), "plain": plain_step(method, method.Shift(), WIDE)}
    times = median_ms(wide, 2)
    found["step_ms"]["shift, width 96"], found["step_speedup"]["shift, width 96"] = (
        times,
        times["plain"] / times["ours"],
    )
    found["at_best_ms"] = {f"width {width}": at_best_ms(method, width) for width in (WIDTH, WIDE)}
    found["peak_fraction"] = found["at_best_ms"][f"width {WIDE}"]["products"] / times["ours"]
    kinds = {
        kind: our_step(method, method.Shift(), WIDTH, getattr(method, kind))
        for kind in ("ReleasedModel", "TrainingMode")
    }
    times = median_ms(kinds, rounds)
    found["inference_ratio"] = times["ReleasedModel"] / times["TrainingMode"]
    counts = {count: our_step(method, method.Shift(), WIDTH, count=count) for count in (64, 128, 256)}
    per_image = {count: ms / count for count, ms in median_ms(counts, rounds).items()}
    found["linear_deviation"] = max(abs(one / per_image[128] - 1) for one in per_image.values())
    images = np.random.default_rng(0).random((128, 32, 32, 3), dtype="float32")
    maps = method.Rotation().draw(np.random.default_rng(0), images.shape)
    warps = {
        "ours": lambda: np.asarray(method.Rotation()(images, maps)),
        "theirs": lambda: method.elasticdeform_warp(images, maps),
    }
    times = median_ms(warps, 3 * rounds)
    found["warp_ms"], found["warp_speedup"] = times, times["theirs"] / times["ours"]
    found["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    target = helpers.RESULTS / "benchmark.json"
    target.write_text(json.dumps(found, indent=1) + "\n")
    print(target.read_text())


if __name__ == "__main__":
    main()
