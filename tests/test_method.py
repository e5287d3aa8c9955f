"""The notebook's definitions: transforms, network, losses, training step."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import helpers

SEED = [3, 4]


@pytest.fixture
def images(random):
    return tf.constant(random.random((6, 32, 32, 3), dtype=np.float32))


def log_distributions(random, count, classes=10):
    return tf.nn.log_softmax(random.normal(size=(count, classes), scale=3).astype(np.float32))


# ---------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize("name", ["noise", "shift", "rotation"])
def test_transforms_repeat_with_a_seed_and_differ_without(method, images, name):
    transform = method.TRANSFORMS[name]
    once, again, other = (transform(images, seed).numpy() for seed in (SEED, SEED, [3, 5]))
    np.testing.assert_array_equal(once, again)
    assert once.shape == images.shape and once.dtype == np.float32
    assert np.abs(once - other).max() > 0.01


@pytest.mark.parametrize("name", ["noise", "shift", "rotation"])
def test_transforms_of_strength_zero_change_nothing(method, images, name):
    np.testing.assert_allclose(method.TRANSFORMS[name](images, SEED, 0.0), images, atol=1e-5)


@pytest.mark.parametrize("name", ["noise", "shift", "rotation"])
def test_each_image_gets_its_own_transform(method, name):
    same = tf.tile(tf.random.stateless_uniform([1, 32, 32, 3], SEED), [5, 1, 1, 1])
    copies = method.TRANSFORMS[name](same, SEED).numpy()
    assert all(np.abs(copies[0] - copy).max() > 0.01 for copy in copies[1:])


def test_noise_has_its_standard_deviation_and_stays_in_the_batch_extremes(method):
    gray = tf.fill([8, 32, 32, 3], 0.5)
    wide = tf.concat([gray, tf.zeros([1, 32, 32, 3]), tf.ones([1, 32, 32, 3])], axis=0)
    noisy = method.gaussian_noise(wide, SEED, sigma=0.1).numpy()
    assert noisy[:8].std() == pytest.approx(0.1, rel=0.02)
    assert noisy.min() == 0 and noisy.max() == 1
    assert np.ptp(method.gaussian_noise(gray, SEED)) == 0  # the extremes of a gray batch are one value


def test_shift_moves_by_the_drawn_amount_and_fills_with_zeros(method):
    ramp = tf.tile(tf.range(1.0, 33.0)[None, :, None, None], [200, 1, 32, 1]) / 32
    shifted = 32 * method.random_shift(ramp, SEED).numpy()[:, 16, 16, 0]  # row 16 + offset, whose value is offset + 17
    offsets = np.where(shifted > 0, shifted - 17, np.nan)
    assert np.nanmin(offsets) == pytest.approx(-10, abs=0.3) and np.nanmax(offsets) == pytest.approx(10, abs=0.3)
    corner = method.random_shift(tf.ones([200, 32, 32, 1]), SEED).numpy()
    assert set(np.unique(corner.round(3))) == {0.0, 1.0}


def test_rotation_turns_a_corner_by_the_angle(method):
    maps = method.rotation_maps(tf.constant([0.0, np.pi / 6, np.pi / 2], tf.float64), 32, 32).numpy()
    center = np.array([15.5, 15.5, 1])
    np.testing.assert_allclose(maps @ center, np.tile(center[:2], (3, 1)), atol=1e-12)
    np.testing.assert_allclose(maps[2] @ [15.5, 20.5, 1], [10.5, 15.5], atol=1e-12)
    image = np.random.default_rng(0).random((1, 32, 32, 3)).astype(np.float32)
    turned = method.warp(image, maps[2:]).numpy()[0]  # round-off in cos(90 degrees) may push border points out
    np.testing.assert_allclose(turned[1:-1, 1:-1], np.rot90(image[0], axes=(1, 0))[1:-1, 1:-1], atol=2e-5)


def test_rotation_draws_both_ways_up_to_the_limit(method):
    drawn = []
    original = method.rotation_maps
    method.rotation_maps = lambda angles, height, width: drawn.append(angles) or original(angles, height, width)
    try:
        method.random_rotation(tf.zeros([2000, 8, 8, 1]), SEED)
    finally:
        method.rotation_maps = original
    degrees = np.degrees(drawn[0].numpy())
    assert degrees.min() == pytest.approx(-45, abs=0.5) and degrees.max() == pytest.approx(45, abs=0.5)
    assert abs(degrees.mean()) < 2


# ------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("width, parameters", [(96, 1_412_554), (8, None)])
def test_network_has_the_shapes_and_parameters_of_appendix_a(method, width, parameters):
    network = method.build_network(width)
    assert network.output_shape == (None, 10)
    convolutions = [layer for layer in network.layers if isinstance(layer, keras.layers.Conv2D)]
    assert [layer.filters for layer in convolutions] == [width] * 3 + [2 * width] * 6
    assert [layer.kernel_size[0] for layer in convolutions] == [3] * 7 + [1] * 2
    kinds = [type(layer).__name__ for layer in network.layers[1:4]]
    assert kinds == ["Conv2D", "LeakyReLU", "BatchNormalization"]
    assert [layer.rate for layer in network.layers if isinstance(layer, keras.layers.Dropout)] == [0.5, 0.5]
    if parameters:
        assert network.count_params() == parameters


# ---------------------------------------------------------------------------------------- loss


def test_divergence_by_hand(method):
    fair, biased = tf.math.log([0.5, 0.5]), tf.math.log([0.25, 0.75])
    assert float(method.kl_divergence(fair, biased)) == pytest.approx(np.log(4 / 3) / 2, abs=1e-6)
    assert float(method.kl_divergence(biased, fair)) == pytest.approx(0.75 * np.log(1.5) - 0.25 * np.log(2), abs=1e-6)


def test_divergence_is_not_negative_and_zero_for_equal(method, random):
    first, second = log_distributions(random, 50), log_distributions(random, 50)
    assert float(tf.reduce_min(method.kl_divergence(first, second))) > 0
    np.testing.assert_allclose(method.kl_divergence(first, first), 0, atol=1e-6)


def test_symmetric_divergence_is_symmetric(method, random):
    first, second = log_distributions(random, 20), log_distributions(random, 20)
    np.testing.assert_allclose(method.symmetric_kl(first, second), method.symmetric_kl(second, first), rtol=1e-6)


def test_divergence_agrees_with_keras_where_keras_is_exact(method, random):
    first, second = log_distributions(random, 20), log_distributions(random, 20)
    expected = keras.losses.kl_divergence(tf.exp(first), tf.exp(second))
    np.testing.assert_allclose(method.kl_divergence(first, second), expected, rtol=1e-3, atol=1e-4)


def test_labels_become_one_hot_with_a_floor(method):
    distribution = np.exp(method.label_log_probabilities(tf.constant([2, -1]), classes=4).numpy())
    np.testing.assert_allclose(distribution[0], [1e-7, 1e-7, 1, 1e-7], rtol=1e-5)
    np.testing.assert_allclose(distribution[1], 1e-7, rtol=1e-5)


def test_extreme_logits_give_finite_losses_and_gradients(method):
    logits = tf.Variable([[1e4, -1e4, 0.0] + [0.0] * 7])
    with tf.GradientTape() as tape:
        loss = method.symmetric_kl(method.label_log_probabilities([1]), tf.nn.log_softmax(logits))
    assert np.isfinite(loss.numpy()).all() and np.isfinite(tape.gradient(loss, logits).numpy()).all()


# ------------------------------------------------------------------------------- training step


def identity(images, seed):
    """A transform that does nothing."""
    return images


def make_model(method, pool, transform=identity, weight=1.0, rate=1e-3, width=2, switches=()):
    keras.utils.set_random_seed(1)
    model = method.ConsistencyModel(method.build_network(width), transform, weight, pool, switches)
    model.compile(optimizer=keras.optimizers.Adam(rate))
    return model


LABELS = np.array([0, 1, -1, 2, -1, -1, 3, 4])


@pytest.fixture
def pool(random):
    return helpers.ImagePool(random.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8), LABELS)


def batch_of(*positions):
    return {"positions": tf.constant(positions), "seed": tf.constant(SEED)}


BATCH = batch_of(*range(8))


def test_identical_views_give_no_consistency_loss(method, pool):
    _, measures = make_model(method, pool).loss_and_measures(BATCH, training=False)
    np.testing.assert_allclose(measures["loss_consistency"][0], 0, atol=1e-6)
    np.testing.assert_array_equal(measures["consistency"][0], 1)


def test_metrics_by_hand(method, pool):
    model = make_model(method, pool, method.gaussian_noise, weight=0.7)
    result = {name: float(value) for name, value in model.test_step(BATCH).items()}
    images, labels = (values.numpy() for values in pool.fetch(BATCH["positions"]))
    copies = method.gaussian_noise(images, SEED)
    first, second = (np.log(keras.ops.softmax(model(view)).numpy().astype(np.float64)) for view in (images, copies))
    truth = np.log(np.clip(np.eye(10)[labels], 1e-7, 1))

    def symmetric(a, b):
        return ((np.exp(a) - np.exp(b)) * (a - b)).sum(-1) / 2

    known = labels >= 0
    supervised = np.mean([symmetric(truth, first)[known], symmetric(truth, second)[known]])
    consistency = symmetric(first, second).mean()
    shares = np.bincount(np.concatenate([view.argmax(-1) for view in (first, second)]), minlength=10) / 16
    mean = np.exp(np.concatenate([first, second])).mean(0)
    right = np.array([view.argmax(-1)[known] == labels[known] for view in (first, second)])
    assert result == pytest.approx(
        {
            "loss": supervised + 0.7 * consistency,
            "loss_supervised": supervised,
            "loss_consistency": consistency,
            "accuracy": right.mean(),
            "accuracy_clean": right[0].mean(),
            "accuracy_transformed": right[1].mean(),
            "consistency": (first.argmax(-1) == second.argmax(-1)).mean(),
            "largest_class": shares.max(),
            "prediction_entropy": -(mean * np.log(mean)).sum(),
        },
        rel=1e-4,
        abs=1e-6,
    )
    assert set(result) == set(helpers.METRICS)


def test_order_of_the_batch_does_not_matter(method, pool):
    model = make_model(method, pool)
    losses = [model.loss_and_measures(b, training=False)[0] for b in (BATCH, batch_of(3, 1, 7, 0, 2, 6, 5, 4))]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-5)


def gradients(model, batch, training=False):
    with tf.GradientTape() as tape:
        total = model.loss_and_measures(batch, training)[0]
    return tape.gradient(total, model.trainable_variables)


def test_unlabelled_images_do_not_enter_the_supervised_term(method, pool):
    model = make_model(method, pool, weight=0.0)
    alone = batch_of(*np.flatnonzero(LABELS >= 0))
    for whole, part in zip(gradients(model, BATCH), gradients(model, alone), strict=True):
        np.testing.assert_allclose(whole, part, rtol=1e-3, atol=1e-5)


def test_a_batch_without_labels_learns_by_consistency_alone(method, pool):
    unlabelled = batch_of(*np.flatnonzero(LABELS < 0))
    model = make_model(method, pool, method.gaussian_noise, weight=0.0)
    assert all(np.abs(g).max() == 0 for g in gradients(model, unlabelled))
    model.consistency_weight = 1.0
    assert max(np.abs(g).max() for g in gradients(model, unlabelled)) > 0


def test_consistency_reaches_the_network_through_both_predictions(method, pool):
    model = make_model(method, pool, method.gaussian_noise)
    unlabelled = batch_of(*np.flatnonzero(LABELS < 0))
    images, _ = pool.fetch(unlabelled["positions"])
    views = (images, method.gaussian_noise(images, SEED))
    through = []
    for frozen in (0, 1):
        with tf.GradientTape() as tape:
            answers = [tf.nn.log_softmax(model(view, training=False)) for view in views]
            answers[frozen] = tf.stop_gradient(answers[frozen])
            loss = tf.reduce_mean(method.symmetric_kl(*answers))
        through.append(tape.gradient(loss, model.trainable_variables))
    for whole, *parts in zip(gradients(model, unlabelled), *through, strict=True):
        np.testing.assert_allclose(whole, sum(parts), rtol=1e-3, atol=1e-6)
    for parts in through:
        assert max(np.abs(part).max() for part in parts) > 1e-4  # far above the tolerance: neither half is nothing


def test_training_updates_statistics_and_evaluation_does_not(method, pool):
    model = make_model(method, pool)
    normalization = next(layer for layer in model.network.layers if isinstance(layer, keras.layers.BatchNormalization))
    before = normalization.moving_mean.numpy()
    model.test_step(BATCH)
    np.testing.assert_array_equal(before, normalization.moving_mean.numpy())
    model.train_step(BATCH)
    assert np.abs(before - normalization.moving_mean.numpy()).max() > 0


def test_training_learns_a_batch_by_heart(method, pool):
    model = make_model(method, pool, method.gaussian_noise, rate=1e-2, width=8)
    dataset = tf.data.Dataset.from_tensors(BATCH).repeat()
    losses = model.fit(dataset, steps_per_epoch=40, epochs=2, shuffle=False, verbose=0).history["loss_supervised"]
    assert losses[1] < 0.5 * losses[0]


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_scales_the_loss_and_trains(method, pool, policy):
    keras.mixed_precision.set_global_policy(policy)
    try:
        model = make_model(method, pool, method.random_shift)
        before = [weight.numpy() for weight in model.trainable_variables]
        model.fit(tf.data.Dataset.from_tensors(BATCH), shuffle=False, verbose=0)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    after = [weight.numpy() for weight in model.trainable_variables]
    assert all(np.isfinite(weight).all() for weight in after)
    assert max(np.abs(a - b).max() for a, b in zip(before, after, strict=True)) > 0
    assert hasattr(model.optimizer, "dynamic_scale") == (policy == "mixed_float16")


def test_a_plan_for_each_method(method, tiny):
    runs = {name: method.plan(name, "shift", tiny) for name in helpers.METHODS}
    early = method.plan("Supervised", "shift", tiny, early=True)
    assert runs["Supervised"].consistency_weight == 0 and runs["Supervised"].unlabeled == 0
    assert runs["SemiC"].learning_rate == 1e-3 and runs["SemiCT"].learning_rate == runs["SemiCTE"].learning_rate == 1e-5
    assert runs["SemiCT"].starting_run == runs["Supervised"].id and runs["SemiCTE"].starting_run == early.id
    assert early.epochs == 1 and len({run.id for run in [*runs.values(), early]}) == 5
