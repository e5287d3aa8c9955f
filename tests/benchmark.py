"""`make bench`: what our training costs beside a plain loop, and where its time goes, in one run on one machine.

The plain loop works as the report's released code does: elasticdeform through a TensorFlow callback, image by
image, batches from a Python generator, Keras's own batch normalisation, float32. Repeats alternate, so that a machine
that gets slower for a while does so for both; medians are shown, with the lowest and the highest.
"""

import argparse
import collections
import contextlib
import datetime
import pathlib
import re
import resource
import tempfile
import time
import types

import elasticdeform.tf
import keras
import notebook
import numpy as np
import tensorflow as tf
from tensorflow.python.framework import config as tf_config  # the public module cannot switch it off again
from tensorflow.tsl.profiler.protobuf import xplane_pb2

import helpers

BATCH = 128
WIDTH = 96


def interleave(repeats, **jobs):
    """Seconds of each job, in turn, the first round left out: dict of name to array (repeats,)."""
    seconds = {name: [] for name in jobs}
    for _ in range(repeats + 1):
        for name, job in jobs.items():
            began = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - began)
    return {name: np.array(values[1:]) for name, values in seconds.items()}


def spread(values, form="{:.3g}"):
    """Median with the lowest and the highest value."""
    return f"{form} ({form} ... {form})".format(np.median(values), np.min(values), np.max(values))


@contextlib.contextmanager
def keras_normalization():
    """Networks built in here have Keras's own batch normalisation."""
    ours = helpers.BatchNormalization
    helpers.BatchNormalization = keras.layers.BatchNormalization
    try:
        yield
    finally:
        helpers.BatchNormalization = ours


def callback_transform(name):
    """A transform as the released code calls it: elasticdeform through a callback, image by image."""
    if name == "noise":
        return lambda images, seed: tf.clip_by_value(images + tf.random.normal(tf.shape(images), stddev=0.1), 0.0, 1.0)
    random = np.random.default_rng(0)
    angle = random.uniform(-45, 45) if name == "rotation" else None

    def transform_one(image):
        shifts = tf.random.uniform([2, 1, 1], -10, 10) if name == "shift" else tf.zeros([2, 1, 1])
        grid = tf.tile(shifts, [1, 3, 3])
        return tf.ensure_shape(
            elasticdeform.tf.deform_grid(image, grid, order=3, axis=(0, 1), rotate=angle), image.shape
        )

    return lambda images, seed: tf.map_fn(transform_one, images)


class PlainLoop:
    """A training step fed with NumPy arrays by a Python generator."""

    def __init__(self, method, name, images, labels):
        pool = types.SimpleNamespace(fetch=lambda batch: batch)  # the batch itself holds images and labels
        with keras_normalization():
            self.model = method.ConsistencyModel(method.build_network(WIDTH), callback_transform(name), pool=pool)
        self.optimizer = keras.optimizers.Adam(1e-3)
        self.optimizer.build(self.model.trainable_variables)
        self.batches = self.generate(images, labels)
        self.train = tf.function(self.train_batch)

    def generate(self, images, labels):
        random = np.random.default_rng(0)
        while True:
            chosen = random.integers(0, len(images), BATCH)
            yield images[chosen].astype(np.float32) / 255, labels[chosen].astype(np.int32)

    def train_batch(self, images, labels):
        batch = {"positions": (images, labels), "seed": tf.constant([0, 0])}
        with tf.GradientTape() as tape:
            total, measures = self.model.loss_and_measures(batch, training=True)
        self.optimizer.apply(tape.gradient(total, self.model.trainable_variables), self.model.trainable_variables)
        return self.model.update_metrics(total, measures)

    def step(self):
        images, labels = next(self.batches)
        return {name: float(value) for name, value in self.train(tf.constant(images), tf.constant(labels)).items()}


class OurStep:
    """A training step of the notebook's model, as `fit` runs it."""

    def __init__(self, method, name, images, labels, precision):
        keras.mixed_precision.set_dtype_policy(precision)
        pool = helpers.ImagePool(images, labels)
        self.model = method.ConsistencyModel(method.build_network(WIDTH), method.TRANSFORMS[name], pool=pool)
        self.model.compile(optimizer=keras.optimizers.Adam(1e-3))
        keras.mixed_precision.set_dtype_policy("float32")
        self.model.make_train_function()
        self.batches = iter(helpers.training_batches(range(len(images)), BATCH, 0, 0, 1000))

    def step(self):
        return {name: float(value) for name, value in self.model.train_function(self.batches).items()}


def network_operations(network):
    """Floating-point operations of all products, an image forward and backward.

    The backward pass takes twice the forward one, but for the first layer, whose input needs no gradient.
    """
    forward = []
    for layer in network.layers:
        if isinstance(layer, keras.layers.Conv2D):
            height, width = layer.output.shape[1:3]
            forward.append(2 * height * width * int(np.prod(layer.kernel.shape)))
        elif isinstance(layer, keras.layers.Dense):
            forward.append(2 * int(np.prod(layer.kernel.shape)))
    return 3 * sum(forward) - forward[0]


def bench_warp(method, rows, results, repeats=7):
    """(a) Milliseconds an image, batch 128; returns the seconds that each of our transforms takes for a batch."""
    images, ours = tf.random.stateless_uniform([BATCH, 32, 32, 3], [0, 0]), {}
    results["warp_speedup"] = {}
    for name, transform in method.TRANSFORMS.items():
        jobs = {"ours": tf.function(transform), "plain": tf.function(callback_transform(name))}
        seconds = interleave(
            repeats, **{kind: lambda job=job: job(images, tf.constant([0, 0])).numpy() for kind, job in jobs.items()}
        )
        ours[name] = float(np.median(seconds["ours"]))
        for kind, values in seconds.items():
            rows.append((f"(a) {name}, {kind}", "ms an image", spread(values * 1e3 / BATCH)))
        if name != "noise":  # which has no callback
            results["warp_speedup"][name] = float(np.median(seconds["plain"]) / ours[name])
    return ours


def bench_step(method, rows, results, precision, transform_seconds, repeats=5):
    """(b) Image pairs a second, ours and the plain loop; (d) seconds to the first step."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (2048, 32, 32, 3), dtype=np.uint8)
    labels = np.where(np.arange(2048) % 12 == 0, random.integers(0, 10, 2048), -1)
    results["step_speedup"], results["transform_share"] = {}, {}
    for name in method.TRANSFORMS:
        began = time.perf_counter()
        ours = OurStep(method, name, images, labels, precision)
        ours.step()
        first = time.perf_counter() - began
        plain = PlainLoop(method, name, images, labels)
        seconds = interleave(repeats, ours=ours.step, plain=plain.step)
        for kind, values in seconds.items():
            rows.append((f"(b) {name}, {kind}", "image pairs a second", spread(BATCH / values)))
        results["step_speedup"][name] = float(np.median(seconds["plain"]) / np.median(seconds["ours"]))
        results["transform_share"][name] = transform_seconds[name] / float(np.median(seconds["ours"]))
    results["first_step_seconds"] = first
    rows.append(("(d) rotation, ours", "seconds to the first step", f"{first:.1f}"))
    return ours


def bench_peak(rows, results, ours, precision, repeats=7):
    """(c) Share of a large matrix product's speed that the step reaches, measured in turn with the step."""
    low = tf.as_dtype(precision.removeprefix("mixed_"))
    jobs = {"step": ours.step}
    for kind in dict.fromkeys((low, tf.float32)):
        left, right = (tf.cast(tf.random.stateless_normal([4096, 4096], [0, k]), kind) for k in range(2))
        jobs[kind.name] = lambda left=left, right=right: tf.linalg.matmul(left, right)[0, 0].numpy()
    seconds = interleave(repeats, **jobs)
    operations = network_operations(ours.model.network)
    step = operations * 2 * BATCH / seconds.pop("step")
    products = {name: 2 * 4096**3 / values for name, values in seconds.items()}
    for name, values in products.items():
        rows.append((f"(c) matrix product 4096, {name}", "GFLOP/s", spread(values / 1e9, "{:.0f}")))
    rows.append(("(c) step", "GFLOP/s", spread(step / 1e9, "{:.0f}")))
    results["peak_fraction"] = float(np.median(step) / np.median(products[low.name]))
    results["product_gflops"] = {name: float(np.median(values) / 1e9) for name, values in products.items()}
    results["operations_per_image"] = operations


KINDS = {
    "convolutions, forward": r"Conv2D$",
    "convolutions, gradient of weights": r"Conv2DBackpropFilter",
    "convolutions, gradient of inputs": r"Conv2DBackpropInput",
    "batch normalisation": r"BatchNorm",
    "leaky ReLU": r"LeakyRelu",
    "pooling": r"MaxPool",
    "transform (compiled by XLA)": r"^(Execute|Xla)",
    "dropout": r"StatelessRandom|SelectV2|GreaterEqual",
}


def bench_profile(rows, results, ours, steps=4):
    """(g) Where a step's time goes: share of the operations' summed times by kind, from TensorFlow's profiler."""
    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        for _ in range(steps):
            ours.step()
        tf.profiler.experimental.stop()
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        space = xplane_pb2.XSpace.FromString(path.read_bytes())
    spent = collections.Counter()
    for plane in space.planes:
        if plane.name == "/host:CPU":
            for line in plane.lines:
                for event in line.events:
                    name = plane.event_metadata[event.metadata_id].name
                    operation = re.search(r"/[^:]*:_?([A-Za-z0-9]+)$", name)  # "path/of/the/operation:Type"
                    if operation:
                        found = (kind for kind, form in KINDS.items() if re.search(form, operation[1]))
                        spent[next(found, "everything else")] += event.duration_ps
    results["profile"] = {kind: value / spent.total() for kind, value in spent.most_common()}
    for kind, share in results["profile"].items():
        rows.append((f"(g) {kind}", "share of the step", f"{share:.1%}"))


def bench_growth(method, rows, results, repeats=5):
    """(f) Seconds an epoch of 10, 20 and 40 thousand images, width 4."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (40000, 32, 32, 3), dtype=np.uint8)
    pool = helpers.ImagePool(images, np.full(40000, -1))
    model = method.ConsistencyModel(method.build_network(4), method.random_rotation, pool=pool)
    model.compile(optimizer=keras.optimizers.Adam(1e-3))

    def epoch(count):
        batches = helpers.training_batches(range(count), BATCH, 0, 0, 1)
        model.fit(batches, steps_per_epoch=-(-count // BATCH), shuffle=False, verbose=0)

    counts = (10000, 20000, 40000)
    seconds = interleave(repeats, **{str(count): lambda count=count: epoch(count) for count in counts})
    rate = {count: np.median(seconds[str(count)]) / count for count in counts}
    results["linear_deviation"] = float(max(abs(value / rate[40000] - 1) for value in rate.values()))
    for count in counts:
        rows.append((f"(f) epoch of {count:,} images", "seconds", spread(seconds[str(count)])))


def bench_exact_repeats(rows, results, ours, repeats=9):
    """(h) What TensorFlow's deterministic operations cost, in turn with the others."""

    def step(exact):
        (tf_config.enable_op_determinism if exact else tf_config.disable_op_determinism)()
        ours.step()

    seconds = interleave(repeats, free=lambda: step(False), exact=lambda: step(True))
    tf_config.disable_op_determinism()
    for kind, values in seconds.items():
        rows.append((f"(h) step, {kind}", "image pairs a second", spread(BATCH / values)))
    results["exact_repeats_cost"] = float(np.median(seconds["exact"]) / np.median(seconds["free"]) - 1)


def markdown(results):
    """The measurements as README shows them."""
    found = results["environment"]
    lines = [
        f"{found['device']}, {found['cores']} cores; TensorFlow {found['tensorflow']}, Keras {found['keras']}, "
        f"Python {found['python']}; {results['precision']}; {results['date']}.",
        "",
        "| what | unit | median (lowest ... highest) |",
        "| --- | --- | --- |",
        *("| " + " | ".join(row) + " |" for row in results["rows"]),
    ]
    return "\n".join(lines)


def main():
    """Run everything, print one table, write it down."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = notebook.ROOT / "runs" / "benchmark.json"
    parser.add_argument("--output", type=pathlib.Path, default=default, help="where to write the figures")
    output = parser.parse_args().output
    method = notebook.load_method(tempfile.mkdtemp())
    precision = helpers.automatic_precision("quick", WIDTH)
    today = datetime.date.today().isoformat()
    rows, results = [], {"environment": helpers.environment(), "precision": precision, "date": today}
    transform_seconds = bench_warp(method, rows, results)
    ours = bench_step(method, rows, results, precision, transform_seconds)
    bench_peak(rows, results, ours, precision)
    bench_profile(rows, results, ours)
    bench_exact_repeats(rows, results, ours)
    bench_growth(method, rows, results)
    results["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rows.append(("(e) peak memory", "MiB", f"{results['peak_memory_mib']:.0f}"))
    results["rows"] = sorted(rows, key=lambda row: row[0][:3])
    print(markdown(results))
    for name in (
        "warp_speedup",
        "step_speedup",
        "transform_share",
        "peak_fraction",
        "linear_deviation",
        "exact_repeats_cost",
    ):
        print(name, results[name])
    output.parent.mkdir(exist_ok=True)
    helpers.write_json(output, results)


if __name__ == "__main__":
    main()
