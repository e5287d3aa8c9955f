"""The method's definitions, by values known without them. Runs on TensorFlow and, by test_jax.py, on JAX."""

import keras
import numpy as np
import pytest
from keras import ops

import helpers


def test_noise_is_normal_and_clipped_to_the_batch(method, images):
    drawn = method.Noise(0.1).draw(np.random.default_rng(0), (500, 8, 8, 3))
    assert drawn.dtype == np.float32 and abs(drawn.mean()) < 1e-3 and abs(drawn.std() - 0.1) < 1e-3
    images = 0.2 + 0.5 * images
    noisy = np.asarray(method.Noise()(images, np.full(images.shape, 9.0, "float32")))
    np.testing.assert_allclose(noisy, images.max())


def test_a_shift_by_whole_pixels_moves_the_picture_and_lets_zeros_in(method, images):
    maps = np.tile(np.eye(2, 3, dtype="float32"), (6, 1, 1))
    maps[:, :, 2] = (3, -5)
    moved = np.asarray(method.Shift()(images, maps))
    np.testing.assert_allclose(moved[:, :29, 5:], images[:, 3:, :27], atol=1e-5)
    assert not moved[:, 29:].any() and not moved[:, :, :5].any()
    amounts = method.Shift(4).draw(np.random.default_rng(0), (1000, 32, 32, 3))[:, :, 2]
    assert (amounts.min(axis=0) >= -4).all() and (amounts.min(axis=0) < -3.9).all()
    assert (amounts.max(axis=0) <= 4).all() and (amounts.max(axis=0) > 3.9).all()


def test_a_quarter_turn_and_the_range_of_angles(method, images):
    quarter = np.array([[0, -1, 31], [1, 0, 0]], "float32")
    turned = np.asarray(method.Rotation()(images, np.tile(quarter, (6, 1, 1))))
    np.testing.assert_allclose(turned, np.rot90(images, -1, axes=(1, 2)), atol=1e-4)
    maps = method.Rotation(30).draw(np.random.default_rng(0), (1000, 32, 32, 3))
    angles = np.degrees(np.arctan2(maps[:, 1, 0], maps[:, 0, 0]))
    assert -30 <= angles.min() < -29 and 29 < angles.max() <= 30
    np.testing.assert_allclose(maps[:, :, :2] @ [15.5, 15.5] + maps[:, :, 2], 15.5, atol=1e-5)  # the centre stays


@pytest.mark.parametrize("name", ["shift", "rotation"])
def test_the_warp_is_elasticdeforms(method, images, name):
    transform = method.TRANSFORMS[name]
    maps = transform.draw(np.random.default_rng(1), images.shape)
    maps[:2, :, 2] = np.round(maps[:2, :, 2])
    expected = method.elasticdeform_warp(images, maps)
    np.testing.assert_allclose(np.asarray(transform(images, maps)), expected, atol=1e-5)


def gradient(function, values):
    """Gradient of a scalar function at values, float32 of any shape: the same shape."""
    if helpers.BACKEND == "tensorflow":
        import tensorflow as tf

        values = tf.constant(values)
        with tf.GradientTape() as tape:
            tape.watch(values)
            total = function(values)
        return np.asarray(tape.gradient(total, values))
    import jax

    return np.asarray(jax.grad(function)(values))


def test_the_gradient_of_the_warp_is_its_transpose(method, images):
    points = helpers.affine_points(method.Rotation().draw(np.random.default_rng(0), images.shape), 32, 32)
    weights = np.random.default_rng(2).standard_normal(images.shape).astype("float32")
    back = gradient(lambda x: ops.sum(helpers.cubic_sample(x, points) * weights), images)
    # The warp is linear: <weights, warp(other)> = <gradient, other> for any other images.
    other = np.random.default_rng(3).random(images.shape, dtype="float32")
    moved = np.asarray(helpers.cubic_sample(other, points))
    assert np.vdot(weights, moved) == pytest.approx(np.vdot(back, other), rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "value"), [("Noise", 2), ("Noise", -1), ("Shift", -1), ("Rotation", 200), ("Rotation", float("nan"))]
)
def test_strengths_out_of_range_are_refused(method, kind, value):
    with pytest.raises(ValueError, match="must be"):
        getattr(method, kind)(value)


def test_subsets_keep_images_with_their_labels_and_hide_those_of_the_unlabelled(method, data):
    sets = method.subsets(data, labelled=400, unlabelled=100)
    expected = {
        "training": (data.train_images[:500], np.r_[data.train_labels[:400], np.full(100, -1)]),
        "validation": (data.train_images[600:], data.train_labels[600:]),
        "test": (data.test_images, data.test_labels),
    }
    assert np.shares_memory(sets["validation"][0], data.train_images[600:])  # not copied
    for name, arrays in expected.items():
        assert all(np.array_equal(one, other) for one, other in zip(sets[name], arrays, strict=True)), name
    for labelled, unlabelled, said in ((400, 201, "has 800, the last 200"), (10, -5, "-5"), (5, 5, "have no label")):
        with pytest.raises(ValueError, match=said):
            method.subsets(data, labelled, unlabelled)


def test_batches_follow_from_seed_and_number(method, data):
    labels = np.arange(600, dtype="int32")
    pairs = method.Pairs(data.train_images[:600], labels, method.Shift(), 7, shuffled=True)
    passes = [np.concatenate([pairs[5 * p + step][1] for step in range(5)]) for p in range(2)]
    assert all(sorted(order) == list(range(600)) for order in passes) and (passes[0] != passes[1]).any()
    x, y = pairs[2]
    np.testing.assert_allclose(x["images"], data.train_images[y] / 255, atol=1e-6)
    other = method.Pairs(data.train_images[:600], labels, method.Shift(), 8, shuffled=True)
    for again in (pairs[7], pairs[3], other[2]):  # the same step of the next pass, another step, another seed
        assert (again[1] != y).any() and (again[0]["parameters"] != x["parameters"]).any()
    later = method.Pairs(data.train_images[:600], labels, method.Shift(), 7, shuffled=True, first=7)
    for (x, y), (x_later, y_later) in zip((pairs[8], pairs[9]), (later[1], later[2]), strict=True):
        assert (y == y_later).all() and all((x[name] == x_later[name]).all() for name in x)


def test_fit_sees_the_batches_in_order_without_end(method, data):
    """Keras begins a finite PyDataset anew after every epoch where steps_per_epoch is set."""
    seen = []

    class Spy(method.ConsistencyModel):
        def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
            if training:
                seen.append(int(np.asarray(y).sum()))
            return super().compute_loss(x, y, y_pred, sample_weight, training)

    labels = np.arange(600, dtype="int32") % 10
    pairs = method.Pairs(data.train_images[:600], labels, method.Noise(), 0, shuffled=True, batch_size=50)
    check = method.Pairs(data.train_images[:100], labels[:100], method.Noise(), 0)
    model = Spy(method.build_network(2), method.Noise())
    model.compile(optimizer=keras.optimizers.Adam(), run_eagerly=True)
    model.fit(pairs, steps_per_epoch=7, epochs=4, shuffle=False, validation_data=check, verbose=0)
    assert seen == [int(pairs[number][1].sum()) for number in range(28)]


def test_losses_by_hand(method):
    fair, biased = np.log([0.5, 0.5]), np.log([0.25, 0.75])
    assert float(method.kl_divergence(fair, biased)) == pytest.approx(np.log(4 / 3) / 2, abs=1e-6)
    assert float(method.symmetric_kl(fair, biased)) == pytest.approx(np.log(3) / 8, abs=1e-6)
    sure = method.log_labels(np.array([3, 5]))
    assert float(method.symmetric_kl(sure[0], sure[1])) == pytest.approx(np.log(1e7), abs=1e-3)
    assert float(method.mean(np.array([1.0, 9.0]), np.array([1.0, 0.0]))) == 1.0
    assert float(method.mean(np.array([1.0]), np.array([0.0]))) == 0.0


def test_the_step_is_equation_1(method, data):
    """By hand, for a batch of 32 images, 8 of them labelled, and for one of 8, half of them labelled."""

    def divergence(p, q):
        return (np.exp(p) * (p - q)).sum(-1)

    random = np.random.default_rng(1)
    model = method.ConsistencyModel(method.build_network(4), method.Rotation(), weight=0.5)
    model.compile(optimizer=keras.optimizers.Adam())
    labelled, pairwise, shares = [], [], []
    for count, known in ((32, 8), (8, 4)):
        answers = random.normal(size=(2 * count, 10))
        log_p = answers - np.log(np.exp(answers).sum(-1, keepdims=True))
        of_images, of_copies = log_p[:count], log_p[count:]
        # Most images are right, so images and copies differ in how many are.
        y = np.r_[np.where(np.arange(known) < known - 1, of_images[:known].argmax(-1), 0), [-1] * (count - known)]
        x, y = method.Pairs(data.train_images[:count], y.astype("int32"), method.Rotation(), 0)[0]
        assert model(x).shape == log_p.shape
        loss = float(model.compute_loss(x, ops.convert_to_tensor(y), ops.convert_to_tensor(log_p.astype("float32"))))
        labels = np.log(np.maximum(np.eye(10)[y[:known]], 1e-7))
        both = [(divergence(labels, one[:known]), divergence(one[:known], labels)) for one in (of_images, of_copies)]
        right = [one[:known].argmax(-1) == y[:known] for one in (of_images, of_copies)]
        labelled.append(np.stack([np.mean(both, axis=1), [one for one, _ in both], right], axis=1))
        apart = (divergence(of_images, of_copies) + divergence(of_copies, of_images)) / 2
        pairwise.append([apart, of_images.argmax(-1) == of_copies.argmax(-1)])
        shares.append(np.bincount(log_p.argmax(-1), minlength=10).max() / (2 * count))
        assert loss == pytest.approx(labelled[-1][:, 0].mean() + 0.5 * apart.mean(), rel=1e-4)
    plain, transformed = np.concatenate(labelled, axis=-1)[:, 2]
    supervised, cross_entropy, accuracy = np.concatenate(labelled, axis=-1).mean(axis=(0, 2))
    consistency, agreement = np.concatenate(pairwise, axis=-1).mean(axis=-1)
    assert plain.mean() != transformed.mean() and shares[0] != shares[1]
    losses = {"loss_supervised": supervised, "loss_consistency": consistency, "cross_entropy": cross_entropy}
    counts = {"accuracy": accuracy, "accuracy_plain": plain.mean(), "accuracy_transformed": transformed.mean()}
    counts |= {"agreement": agreement, "largest_class": np.average(shares, weights=[32, 8])}
    measured = {name: float(metric.result()) for name, metric in model.means.items()}
    assert {name: measured.pop(name) for name in losses} == pytest.approx(losses, rel=1e-4)
    assert measured == pytest.approx(counts, rel=1e-6)


def test_a_transform_sees_float32_under_a_16_bit_policy(method, data):
    kinds = []

    class Spy(method.Shift):
        def __call__(self, images, maps):
            kinds.extend((keras.backend.standardize_dtype(images.dtype), keras.backend.standardize_dtype(maps.dtype)))
            return super().__call__(images, maps)

    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = method.ConsistencyModel(method.build_network(4), Spy())
    finally:
        keras.config.set_dtype_policy("float32")
    x, _ = method.Pairs(data.train_images[:4], data.train_labels[:4], Spy(), 0)[0]
    assert keras.backend.standardize_dtype(model(x).dtype) == "float32" and set(kinds) == {"float32"}


@pytest.mark.skipif(helpers.BACKEND != "tensorflow", reason="asks TensorFlow what the card can do")
@pytest.mark.parametrize(
    ("card", "precision"), [((6, 0), "float32"), ((7, 5), "mixed_float16"), ((8, 0), "mixed_bfloat16")]
)
def test_the_number_type_follows_from_the_card(monkeypatch, card, precision):
    monkeypatch.setattr(helpers, "ACCELERATORS", ["GPU"])
    details = {"compute_capability": card}  # P100, T4, A100
    monkeypatch.setattr(helpers.tf.config.experimental, "get_device_details", lambda _: details)
    assert helpers.fastest_precision(width=32) == precision


def test_batch_normalisation_and_leaky_relu_are_keras_own(images):
    ours, theirs = helpers.BatchNormalization(momentum=0.9), keras.layers.BatchNormalization(momentum=0.9)
    for training in (True, False):  # training first: else there are no averages to use
        for _ in range(2):
            results = [np.asarray(layer(images, training=training)) for layer in (ours, theirs)]
        np.testing.assert_allclose(*results, atol=1e-5)
        for one, other in zip(ours.get_weights(), theirs.get_weights(), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
    x = images - 0.5
    np.testing.assert_allclose(helpers.LeakyReLU(negative_slope=0.1)(x), np.where(x > 0, x, 0.1 * x), atol=1e-7)
    slope = gradient(lambda values: ops.sum(helpers.LeakyReLU(negative_slope=0.1)(values)), x)
    np.testing.assert_allclose(slope, np.where(x > 0, 1.0, 0.1), atol=1e-7)


def test_the_network_is_that_of_appendix_a(method):
    layers = method.build_network(96).layers
    kinds = [type(layer).__name__ for layer in layers]
    group, reduced = ["Conv2D", "LeakyReLU", "BatchNormalization"] * 3, ["MaxPooling2D", "Dropout"]
    assert kinds == ["InputLayer", *2 * (group + reduced), *group, "GlobalAveragePooling2D", "Dense"]
    convolutions = [layer for layer in layers if isinstance(layer, keras.layers.Conv2D)]
    assert [layer.filters for layer in convolutions] == [96] * 3 + [192] * 6
    assert [layer.kernel_size for layer in convolutions] == [(3, 3)] * 7 + [(1, 1)] * 2
    assert {layer.rate for layer in layers if isinstance(layer, keras.layers.Dropout)} == {0.5}
    assert {layer.negative_slope for layer in layers if isinstance(layer, helpers.LeakyReLU)} == {0.1}
    assert {layer.momentum for layer in layers if isinstance(layer, helpers.BatchNormalization)} == {0.9}


def test_the_four_ways_differ_as_the_report_says(method, settings):
    ways = method.four_ways(method.Shift(), settings | {"epochs_tuned": 5})
    supervised, semic, semict, semicte = ways.values()
    assert [run.epochs for run in ways.values()] == [settings["epochs_supervised"], settings["epochs"], 5, 5]
    assert all((run.unlabelled, run.weight) == (256, 1.0) for run in (semic, semict, semicte))
    assert (supervised.unlabelled, supervised.weight, supervised.start) == (0, 0.0, None)
    assert (semic.learning_rate, semic.start, semict.start) == (1e-3, None, supervised)
    assert semict.learning_rate == semicte.learning_rate == 1e-5
    assert semicte.start.epochs == settings["epochs_early"] and semicte.start.method == "Supervised"
    paper = method.four_ways(method.Shift(), method.PRESETS["paper"] | method.REPORTED | {"precision": "float32"})
    assert paper["Supervised"].steps_per_epoch == 32 and 120 * paper["SemiC"].steps_per_epoch == 45_960
