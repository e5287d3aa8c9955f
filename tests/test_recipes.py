"""The recipe `released`: each switch changes what it names alone; without any the model is the reported one."""

import dataclasses
import functools
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import helpers

LOSSES = {"loss", "loss_supervised", "loss_consistency"}
ANSWERS = {"accuracy", "accuracy_clean", "accuracy_transformed", "consistency", "largest_class", "prediction_entropy"}
COPIES = LOSSES | ANSWERS - {"accuracy_clean"}  # what other copies may change, but for training's batch statistics
BATCH = {"positions": tf.range(40), "seed": tf.constant([7, 8])}


@pytest.fixture
def make_model(method, data, tiny):
    """A model for a transform and some switches whose predictions are as sure as after long training."""

    def make(transform, *switches):
        run = dataclasses.replace(method.plan("SemiC", transform, tiny, "shapes"), switches=helpers.joined(switches))
        keras.utils.set_random_seed(3)
        model = method.build_model(run, method.TRANSFORMS[transform], data.pool(run)[0])
        model.network.layers[-1].kernel.assign(model.network.layers[-1].kernel * 300)
        return model

    return make


def numbers(model, training):
    """All metrics of one batch."""
    model.reset_metrics()
    return {name: float(v) for name, v in model.update_metrics(*model.loss_and_measures(BATCH, training)).items()}


def differing(model, other, training):
    one, two = numbers(model, training), numbers(other, training)
    return {name for name in one if one[name] != pytest.approx(two[name], rel=1e-6, abs=1e-9)}


# For each switch: the transforms it concerns, what it may change while training and what in evaluation.
EFFECTS = {
    "inference_mode": ({"noise", "shift", "rotation"}, LOSSES | ANSWERS, set()),
    "one_angle": ({"rotation"}, LOSSES | ANSWERS, COPIES),
    "restored_moments": (set(), set(), set()),
    "restored_rate": (set(), set(), set()),
    "clipped_probabilities": ({"noise", "shift", "rotation"}, LOSSES, LOSSES),
    "one_sided_loss": ({"noise", "shift", "rotation"}, {"loss", "loss_supervised"}, {"loss", "loss_supervised"}),
    "filled_batches": (set(), set(), set()),
    "whole_shifts": ({"shift"}, LOSSES | ANSWERS, COPIES),
    "ramp_up": ({"noise", "shift", "rotation"}, {"loss"}, set()),
    "stopped_gradient": (set(), set(), set()),
    "decaying_rate": (set(), set(), set()),
    "averaged_weights": (set(), set(), set()),
    "balanced_batches": (set(), set(), set()),
}


@pytest.mark.parametrize("transform", ["noise", "shift", "rotation"])
@pytest.mark.parametrize("switch", helpers.SWITCHES)
def test_a_switch_changes_what_it_names_in_a_step_and_nothing_else(make_model, switch, transform):
    concerned, while_training, in_evaluation = EFFECTS[switch]
    for training, allowed in ((True, while_training), (False, in_evaluation)):
        # Dropout and the moving averages move on with every training step, so each one has fresh models.
        changed = differing(make_model(transform), make_model(transform, switch), training)
        assert changed <= (allowed if transform in concerned else set())
        assert bool(changed) == (transform in concerned and bool(allowed))


def test_without_switches_the_model_is_the_reported_one(method, data, tiny):
    run = method.plan("SemiC", "rotation", tiny, "shapes")
    assert run.switches == "" and run.recipe == "reported"
    model = method.build_model(run, method.random_rotation, data.pool(run)[0])
    assert model.transform is method.random_rotation and model.draw is None and not model.switches
    named = dataclasses.replace(run, switches="clipped_probabilities")
    assert named.id != run.id and named.recipe == "reported + clipped_probabilities"


def test_inference_mode_leaves_the_statistics_alone(make_model):
    for switches, moves in (((), True), (("inference_mode",), False)):
        model = make_model("noise", *switches)
        layer = next(layer for layer in model.network.layers if isinstance(layer, keras.layers.BatchNormalization))
        model.train_step(BATCH)
        assert np.any(layer.moving_mean.numpy() != 0) == np.any(layer.moving_variance.numpy() != 1) == moves


def test_one_angle_turns_all_images_of_all_steps_alike(method, make_model):
    drawn = []
    original = method.rotation_maps
    method.rotation_maps = lambda angles, height, width: drawn.append(angles.numpy()) or original(angles, height, width)
    try:
        model = make_model("rotation", "one_angle")
        for seed in ([1, 2], [3, 4]):
            for training in (True, False):
                model.loss_and_measures(BATCH | {"seed": tf.constant(seed)}, training)
    finally:
        method.rotation_maps = original
    trained, evaluated, *again = drawn
    assert np.ptp(trained) == np.ptp(evaluated) == 0 and trained[0] != evaluated[0]
    np.testing.assert_array_equal(again, [trained, evaluated])
    assert abs(np.degrees(trained[0])) < 45


def test_another_angle_goes_on_from_step_one_with_other_copies_alone(method, data, tiny, tmp_path):
    tiny.recipe, tiny.epochs_supervised = "released", 1
    start, semict = (method.plan(name, "rotation", tiny, "shapes") for name in ("Supervised", "SemiCT"))
    runner = helpers.Runner(data, method.build_model, method.TRANSFORMS, [start, semict], "smoke", tmp_path)
    runner.train([start])
    models = [runner.model(dataclasses.replace(semict, angle=angle)) for angle in range(3)]
    for variables in zip(*(model.weights + model.optimizer.variables for model in models), strict=True):
        assert all(np.array_equal(variables[0].numpy(), other.numpy()) for other in variables[1:])
    images = tf.constant(data.test_images[:2] / 255, tf.float32)
    copies = [model.copies(images, [1, 2], training).numpy() for model in models for training in (True, False)]
    assert not any(np.allclose(one, other, atol=1e-3) for one, other in itertools.combinations(copies, 2))


def test_a_switch_reaches_a_transform_of_another_strength(method, data, tiny):
    for transform, strength, switch, argument in (
        ("rotation", {"degrees": 9.0}, "one_angle", "together"),
        ("shift", {"pixels": 5.0}, "whole_shifts", "whole"),
    ):
        run = dataclasses.replace(method.plan("SemiC", transform, tiny, "shapes"), switches=switch)
        weaker = functools.partial(method.TRANSFORMS[transform], **strength)
        model = method.build_model(run, weaker, data.pool(run)[0])
        assert model.transform.keywords == strength | {argument: True}


def test_whole_shifts_go_from_minus_ten_to_nine(method):
    ramp = tf.tile(tf.range(1.0, 65.0)[None, :, None, None] / 64, [2000, 1, 64, 1])
    rows = 64 * method.random_shift(ramp, [1, 2], whole=True).numpy()[:, 32, 32, 0] - 33
    np.testing.assert_allclose(rows, rows.round(), atol=1e-3)
    assert set(rows.round()) == set(range(-10, 10))


def test_clipped_divergence_is_keras_own_and_has_no_gradient_below_the_floor(method):
    logits = tf.Variable([[0.0, 3.0, -20.0, 1.0], [30.0, 0.0, 1.0, 2.0], [0.5, 0.1, 0.2, 0.3]])
    labels, switches = tf.constant([2, 1, 0]), {"clipped_probabilities", "one_sided_loss"}
    truth = tf.one_hot(labels, 4)
    with tf.GradientTape() as tape:
        log_p = tf.nn.log_softmax(logits)
        supervised = method.supervised_loss(log_p, labels, switches)
    np.testing.assert_allclose(supervised, keras.losses.kl_divergence(truth, tf.nn.softmax(logits)), rtol=1e-4)
    np.testing.assert_allclose(method.consistency_loss(log_p, log_p, switches), 0, atol=1e-6)
    gradient = tape.gradient(supervised, logits).numpy()
    assert np.abs(gradient[:2]).max() < 1e-4 and np.abs(gradient[2]).max() > 0.1  # the label's p: < 1e-7, < 1e-7, 0.3


def test_a_constant_prediction_scores_what_table_1_shows(method):
    labels = tf.constant(list(range(10)) * 10)
    constant = tf.nn.log_softmax(tf.tile([[100.0] + [0.0] * 9], [100, 1]))
    supervised = method.supervised_loss(constant, labels, {"clipped_probabilities", "one_sided_loss"})
    assert float(tf.reduce_mean(supervised)) == pytest.approx(0.9 * np.log(1e7), rel=1e-5)


def test_filled_batches_repeat_the_epochs_first_images():
    def positions(fill):
        elements = helpers.training_batches(range(10), 4, 0, 0, 2, fill=fill).as_numpy_iterator()
        return [element["positions"].tolist() for element in elements]

    short, full = positions(False), positions(True)
    assert [len(batch) for batch in short] == [4, 4, 2] * 2 and [len(batch) for batch in full] == [4] * 6
    for epoch in (0, 3):
        assert full[epoch : epoch + 2] == short[epoch : epoch + 2]
        assert full[epoch + 2] == short[epoch + 2] + short[epoch][:2]


def test_an_epoch_of_a_few_steps_begins_like_a_whole_one():
    def seeds(steps):
        elements = helpers.training_batches(range(10), 4, 0, 0, 2, steps).as_numpy_iterator()
        return [(element["positions"].tolist(), element["seed"].tolist()) for element in elements]

    assert seeds(2) == [*seeds(None)[:2], *seeds(None)[3:5]]


@pytest.mark.parametrize("recipe", ["reported", "released"])
@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
def test_what_step_two_takes_over_from_step_one(method, data, tiny, tmp_path, recipe, precision):
    tiny.recipe, tiny.precision, tiny.epochs_supervised = recipe, precision, 1
    start, run = (method.plan(name, "noise", tiny, "shapes") for name in ("Supervised", "SemiCT"))
    runner = helpers.Runner(data, method.build_model, method.TRANSFORMS, [start, run], "smoke", tmp_path)
    runner.train([start])
    optimizers = {}
    for switches in (run.active, run.active - {"restored_rate"}, run.active - {"restored_moments"}, frozenset()):
        optimizer = runner.model(dataclasses.replace(run, switches=helpers.joined(switches))).optimizer
        moments = [variable for variable in optimizer.variables if variable.path.endswith(("momentum", "velocity"))]
        optimizers[switches] = (
            float(optimizer.learning_rate.value),
            int(optimizer.iterations.value),
            any(np.any(variable.numpy()) for variable in moments),
        )
        assert moments
    for switches, (rate, iterations, moved) in optimizers.items():
        assert rate == pytest.approx(1e-3 if "restored_rate" in switches else 1e-5)
        assert (iterations == 1, moved) == (("restored_moments" in switches,) * 2)
    weights = runner.model(run).network.get_weights()
    start_model = runner.model(start)
    start_model.network.load_weights(runner.path(start) / "network.weights.h5")
    for ours, theirs in zip(weights, start_model.network.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_weights_and_moments_of_different_transforms_are_put_together(method, data, tiny, tmp_path):
    tiny.recipe, tiny.epochs_supervised = "released", 1
    starts = {name: method.plan("Supervised", name, tiny, "shapes") for name in ("noise", "shift")}
    run = method.plan("SemiCT", "noise", tiny, "shapes")
    runner = helpers.Runner(data, method.build_model, method.TRANSFORMS, [*starts.values(), run], "smoke", tmp_path)
    runner.train(list(starts.values()))
    own = {name: runner.model(dataclasses.replace(run, starting_run=start.id)) for name, start in starts.items()}
    mixed = runner.model(dataclasses.replace(run, moments_from=starts["shift"].id))
    sharper = runner.model(dataclasses.replace(run, logit_scale=3.0))

    def equal(first, second):
        return [np.array_equal(one.numpy(), two.numpy()) for one, two in zip(first, second, strict=True)]

    states = {name: model.optimizer.variables for name, model in (own | {"mixed": mixed}).items()}
    assert all(equal(mixed.network.weights, own["noise"].network.weights))
    assert all(equal(states["mixed"], states["shift"]))
    assert not all(equal(states["noise"], states["shift"]))
    assert not all(equal(own["noise"].network.weights, own["shift"].network.weights))
    images = tf.constant(data.test_images[:20], tf.float32) / 255
    np.testing.assert_allclose(sharper(images), 3 * own["noise"](images), rtol=1e-5, atol=1e-5)
    assert all(equal(sharper.optimizer.variables, states["noise"]))


def test_the_weight_of_the_consistency_loss_is_ramped_up(make_model):
    constant, ramped = make_model("shift"), make_model("shift", "ramp_up")
    factors = []
    for step in (0, 1, 10):  # the tiny run takes six steps, so its ramp 1.62
        ramped.optimizer.iterations.assign(step)
        losses = [numbers(model, training=False) for model in (constant, ramped)]
        assert losses[0] == losses[1]  # evaluation takes the whole weight
        total = float(ramped.loss_and_measures(BATCH, training=True)[0])
        constant_total, measures = constant.loss_and_measures(BATCH, training=True)
        supervised = float(helpers.share_of_mean(*measures["loss_supervised"]))
        factors.append((total - supervised) / (float(constant_total) - supervised))
    ramp = 0.27 * 6
    np.testing.assert_allclose(factors, [np.exp(-5), np.exp(-5 * (1 - 1 / ramp) ** 2), 1], rtol=1e-3)


def test_a_stopped_gradient_leaves_the_pictures_own_prediction_alone(method):
    logits = [tf.Variable([[0.1, 0.5, -0.3]]), tf.Variable([[1.0, 0.0, 0.2]])]
    gradients = {}
    for switches in ((), ("stopped_gradient",)):
        with tf.GradientTape() as tape:
            consistency = method.consistency_loss(*map(tf.nn.log_softmax, logits), switches)
        gradients[switches] = tape.gradient(consistency, logits)
    (first, second), (stopped, copy) = gradients.values()
    assert np.abs(first).max() > 0.01 and stopped is None
    np.testing.assert_array_equal(second, copy)


def test_the_rate_decays_to_nothing_and_the_averages_are_what_is_kept(method, data, tiny, tmp_path):
    tiny.epochs_supervised = 2
    run = method.plan("Supervised", "noise", tiny, "shapes")
    decaying = dataclasses.replace(run, switches="decaying_rate")
    averaged = dataclasses.replace(run, switches="averaged_weights")
    runner = helpers.Runner(data, method.build_model, method.TRANSFORMS, [run], "smoke", tmp_path)
    model = runner.model(decaying)
    rates = []
    for step in range(3):
        model.optimizer.iterations.assign(step)
        rates.append(float(keras.ops.convert_to_numpy(model.optimizer.learning_rate)))
    np.testing.assert_allclose(rates, [1e-3, 0.5e-3, 0], atol=1e-9)  # one step an epoch

    runner.train([run, averaged])
    plain, mean = (runner.trained(each).network.trainable_variables for each in (run, averaged))
    raw = runner.model(averaged)
    raw.load_weights(helpers.last_checkpoint(runner.path(averaged)))
    averages = raw.optimizer._model_variables_moving_average
    for one, two, kept, average in zip(plain, raw.trainable_variables, mean, averages, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)  # averaging does not change the training
        np.testing.assert_allclose(kept, average, atol=1e-6)
    assert any(np.abs(one.numpy() - kept.numpy()).max() > 1e-4 for one, kept in zip(plain, mean, strict=True))
    raw, averaged = (
        {layer.momentum for layer in model.network.layers if isinstance(layer, helpers.BatchNormalization)}
        for model in map(runner.model, (run, averaged))
    )
    assert raw == {0.9} and averaged == {0.99}  # statistics of as many steps as the averages hold


@pytest.mark.parametrize("labeled, unlabeled", [(range(6), range(6, 50)), (range(30), range(30, 34)), (range(6), ())])
def test_balanced_batches_go_on_where_the_last_epoch_ended(labeled, unlabeled):
    def drawn(first, last):
        batches = helpers.balanced_batches(labeled, unlabeled, 8, 5, first, last, steps=3)
        return [(batch["positions"].tolist(), batch["seed"].tolist()) for batch in batches.as_numpy_iterator()]

    batches = drawn(0, 9)
    assert batches[6:] == drawn(2, 9) and len(batches) == 27
    share = 4 if len(unlabeled) else 8
    for part, chosen in ((labeled, slice(share)), (unlabeled, slice(share, 8))):
        order = [position for positions, _ in batches for position in positions[chosen]]
        for begin in range(0, len(order) - len(part) + 1, max(len(part), 1)):
            assert sorted(order[begin : begin + len(part)]) == list(part)  # every image once before any comes again
    assert len({tuple(seed) for _, seed in batches}) == 27


def test_balanced_runs_take_the_steps_of_the_others_and_all_unlabelled_images(method, tiny, data, monkeypatch):
    usual = [method.plan(name, "shift", tiny, "shapes") for name in ("Supervised", "SemiC")]
    monkeypatch.setitem(helpers.RECIPES, "reported", frozenset({"balanced_batches"}))
    tiny.unlabeled_pool = 300
    runs = [method.plan(name, "shift", tiny, "shapes") for name in ("Supervised", "SemiC")]
    assert [run.steps_per_epoch for run in runs] == [run.steps_per_epoch for run in usual] == [1, 2]
    assert [run.unlabeled for run in runs] == [0, 300] and [run.pairs for run in runs] == [3 * 128, 3 * 2 * 128]


@pytest.mark.parametrize("switch", ["ramp_up", "decaying_rate", "averaged_weights", "balanced_batches"])
def test_a_refined_run_resumes_as_if_nothing_had_happened(method, data, tiny, tmp_path, switch):
    run = dataclasses.replace(method.plan("SemiC", "noise", tiny, "shapes"), switches=switch, steps=2)
    whole, broken = (
        helpers.Runner(data, method.build_model, method.TRANSFORMS, [run], "smoke", tmp_path / name)
        for name in ("whole", "broken")
    )
    expected = whole.train([run])[0]

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    original = helpers.averaging
    try:
        helpers.averaging = lambda model: [*original(model), Stop()]
        with pytest.raises(KeyboardInterrupt):
            broken.train([run])
    finally:
        helpers.averaging = original
    assert broken.train([run])[0]["history"] == expected["history"]
    assert broken.record(run)["metrics"] == expected["metrics"]


def test_unknown_or_unsorted_switches_are_refused(method, tiny):
    run = method.plan("SemiC", "noise", tiny)
    for switches in ("sepia", "whole_shifts+one_angle", "one_angle+one_angle"):
        with pytest.raises(ValueError, match="it must be some of averaged_weights"):
            dataclasses.replace(run, switches=switches)


def test_recipes_are_named(method, tiny):
    run = method.plan("SemiC", "noise", tiny)
    released = helpers.joined(helpers.RELEASED_SWITCHES)
    less = helpers.joined(set(helpers.RELEASED_SWITCHES) - {"one_angle"})
    names = {switches: dataclasses.replace(run, switches=switches).recipe for switches in ("", released, less)}
    assert list(names.values()) == ["reported", "released", "released - one_angle"]


def test_the_attribution_goes_from_one_recipe_to_the_other(method, tiny):
    for transform in ("shift", "rotation"):
        runs = method.attribution_runs(transform, tiny)
        for name in ("Supervised", "SemiC"):
            ladder = [run for (_, method_name), run in runs.items() if method_name == name]
            assert [ladder[0].recipe, ladder[-1].recipe] == ["released", "reported"]
            assert all(later.active < earlier.active for earlier, later in itertools.pairwise(ladder))
            same = {dataclasses.replace(run, switches="") for run in ladder}
            assert same == {method.plan(name, transform, tiny)}
        shown = {state.removeprefix("− ") for state, _ in runs} & set(helpers.SWITCHES)
        assert ("one_angle" in shown) == (transform == "rotation")


def test_survival_exchanges_only_what_it_names(method, tiny):
    runs = method.survival_runs(tiny, 512)
    fields = {
        "state of rotation, goes on with shift": ("rotation", {"transform"}),
        "rotation, at a third angle": ("rotation", {"angle"}),
        "rotation, early-stopped, at another angle": ("rotation, early-stopped", {"angle"}),
        "rotation with the moments of shift": ("rotation", {"moments_from"}),
        "shift with the moments of rotation": ("shift", {"moments_from"}),
        "rotation, early-stopped, with the full moments": ("rotation, early-stopped", {"moments_from"}),
        "shift, logits times 3/2": ("shift", {"logit_scale"}),
        "shift, twice the rate": ("shift", {"learning_rate", "switches"}),
    }
    for name, (other, changed) in fields.items():
        one, two = dataclasses.asdict(runs[name]), dataclasses.asdict(runs[other])
        assert {field for field in one if one[field] != two[field]} == changed
    assert runs["shift"].active - runs["shift, twice the rate"].active == {"restored_rate"}
    assert len({run.id for run in runs.values()}) == len(runs)


def test_every_refinement_is_tried_alone_and_the_recipe_sound_with_them(method):
    runs, grid = method.refinement_references("float32"), method.grid_references("float32")
    assert runs["reported", "SemiC"].active == runs["reported", "Supervised"].active == set()
    alone = {"one_sided_loss", *helpers.REFINEMENTS}
    assert {name for name, _ in runs} == alone | {"reported", "sound"}
    for name in alone:
        assert runs[name, "SemiC"].active == {name}
        assert ((name, "Supervised") in runs) == (name not in ("ramp_up", "stopped_gradient"))
    for method_name in ("Supervised", "SemiC"):
        assert runs["sound", method_name] == grid["sound", "shift", method_name, 0]
        steps = {run.epochs * run.steps_per_epoch for (_, name), run in runs.items() if name == method_name}
        assert len(steps) == 1


def test_the_grid_has_every_experiment_of_table_1_in_every_recipe(method):
    runs = method.grid_references("float32")
    for recipe in helpers.RECIPES:
        expected = set(helpers.REPORT_TABLE)
        if recipe == "sound":
            expected -= set(itertools.product(("noise", "rotation"), ("SemiCT", "SemiCTE")))
        assert {key[1:3] for key in runs if key[0] == recipe and key[2] != "early-stopped"} == expected
        for transform, name in expected:
            if name == "SemiCTE":
                start = runs[recipe, transform, "early-stopped", 0].id
                assert runs[recipe, transform, "SemiCTE", 0].starting_run == start
        for name in ("Supervised", "SemiC"):
            assert {key[3] for key in runs if key[:3] == (recipe, "shift", name)} == {0, 1, 2}
    assert all(run.recipe == key[0] for key, run in runs.items())


def test_the_study_of_labels_changes_only_what_there_is_to_learn_from(method):
    runs, grid = method.labels_references("float32"), method.grid_references("float32")
    assert len(runs) == len(set(runs.values())) == 12
    assert {(run.method, run.epochs * run.steps_per_epoch) for run in runs.values()} == {
        ("Supervised", 2560),
        ("SemiC", 2520),
    }
    for (labeled, name), run in runs.items():
        shared = {"labeled": 4000, "unlabeled": 45000 if run.method == "SemiC" else 0}
        assert run.labeled == labeled and (f"{run.unlabeled:,} unlabelled" in name) == (run.method == "SemiC")
        assert dataclasses.replace(run, **shared) == grid["sound", "shift", run.method, 0]


def test_what_semict_owes_to_its_loss_is_asked_with_nothing_else_changed(method):
    runs, grid = method.continued_references("float32"), method.grid_references("float32")
    for transform in ("noise", "shift", "rotation"):
        full, without = (runs[transform, f"SemiCT, λ = {weight}"] for weight in (1, 0))
        assert full == grid["reported", transform, "SemiCT", 0] and full.consistency_weight == 1
        assert without == dataclasses.replace(full, consistency_weight=0.0)
        assert without.starting_run == full.starting_run == runs[transform, "step one"].id


def test_labels_are_shown_by_their_number_with_gaps_where_there_is_no_run():
    def record(accuracy, agreement):
        return {"metrics": {"accuracy": accuracy, "consistency": agreement}}

    records = {
        (250, "Supervised"): record(0.25, 0.5),
        (250, "SemiC, more"): None,
        (4000, "Supervised"): record(0.5, 0.75),
        (4000, "SemiC, more"): record(0.75, 1.0),
    }
    table = helpers.labels_table(records)
    assert table.header == ("labels", "Supervised: accuracy | agreement", "SemiC, more: accuracy | agreement")
    assert [tuple(row) for row in table.rows] == [
        ("250", "25.0% | 50.0%", "not run"),
        ("4,000", "50.0% | 75.0%", "75.0% | 100.0%"),
    ]
    left, right = helpers.show_labels(records, "by labels").axes
    for axis, alone, more in ((left, [0, 0], 25), (right, [0.5, 0.75], 1)):
        assert [line.get_label() for line in axis.lines] == ["Supervised", "SemiC, more"]
        assert list(axis.lines[0].get_ydata()) == alone
        assert np.isnan(axis.lines[1].get_ydata()[0]) and axis.lines[1].get_ydata()[1] == more
        assert [line.get_color() for line in axis.lines] == [helpers.COLORS[name] for name in ("Supervised", "SemiC")]
    assert "no record" in helpers.show_labels(dict.fromkeys(records), "by labels").caption
