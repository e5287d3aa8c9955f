"""Parts II and III: the released code, what is taken out of it, and segmentation."""

import dataclasses

import elasticdeform
import keras
import notebook
import numpy as np
import pytest
from keras import ops
from test_method import gradient

import helpers


@pytest.fixture
def trained(method, data, tmp_path):
    """Function: the released code's step one for a transform, trained, and a model of a class that starts from it."""

    def start(kind, name="noise"):
        settings = method.PRESETS["smoke"] | method.REPORTED | {"precision": "float32"}
        run = method.as_released(notebook.small_ways(method, method.TRANSFORMS[name], settings)["SemiCT"])
        step_one, _ = method.train(run.start, data, helpers.Runs(tmp_path, method.train))
        model = kind(run.network(4, 10, (32, 32, 3)), run.transform)
        model.compile(optimizer=keras.optimizers.Adam(1e-5), jit_compile=helpers.JIT_COMPILE)
        model.optimizer.build(model.trainable_variables)
        model.start_from(step_one)
        return step_one, model

    return start


def test_the_released_code_restores_rate_moments_and_count(method, trained):
    step_one, model = trained(method.ReleasedModel)
    assert float(model.optimizer.learning_rate) == pytest.approx(1e-3)
    assert int(model.optimizer.iterations) == int(step_one.optimizer.iterations) > 0
    for one, other in zip(model.optimizer.variables, step_one.optimizer.variables, strict=True):
        assert (np.asarray(one) == np.asarray(other)).all()


@pytest.mark.parametrize(("kind", "rate", "moments"), [("FreshAdam", 1e-5, False), ("RestoredMoments", 1e-5, True)])
def test_what_is_taken_over_otherwise(method, trained, kind, rate, moments):
    step_one, model = trained(getattr(method, kind))
    assert float(model.optimizer.learning_rate) == pytest.approx(rate)
    assert (int(model.optimizer.iterations) > 0) == moments
    for one, other in zip(model.network.get_weights(), step_one.network.get_weights(), strict=True):
        assert (one == other).all()


def test_the_released_network_is_never_told_that_it_trains(method, data):
    for kind, changed in ((method.ReleasedModel, False), (method.TrainingMode, True)):
        model = kind(method.build_network(4), method.Noise())
        model.compile(optimizer=keras.optimizers.Adam(), jit_compile=helpers.JIT_COMPILE)
        model.fit(method.Pairs(data.train_images[:128], data.train_labels[:128], method.Noise(), 0), verbose=0)
        still = model.network.non_trainable_variables
        means = [np.asarray(variable) for variable in still if "moving_mean" in variable.path]
        assert len(means) == 9 and all(bool(mean.any()) == changed for mean in means)


def test_the_clipped_loss_of_a_constant_answer_has_no_gradient(method):
    scores = np.array([[-20.0] + [0.0] * 8 + [20.0], [-20.1] + [0.0] * 8 + [20.0]], "float32")
    labels = method.log_labels(np.zeros(2, "int32"))
    losses = {}
    for kind in (method.ReleasedModel, method.ExactLogarithms, method.ConsistencyModel):
        model = kind(method.build_network(2), method.Noise())
        losses[kind] = np.asarray(model.supervised_loss(labels, ops.log_softmax(scores)))
    np.testing.assert_allclose(losses[method.ReleasedModel], np.log(1e7), rtol=1e-5)
    assert losses[method.ExactLogarithms][1] - losses[method.ExactLogarithms][0] == pytest.approx(0.1, abs=1e-3)
    assert losses[method.ConsistencyModel][1] > losses[method.ConsistencyModel][0]


def test_the_released_losses_by_hand(method):
    fair, image, copy = np.log(np.full((1, 10), 0.1, "float32")), [[0.0] + [-30.0] * 9], [[-30.0] * 9 + [0.0]]
    labels = method.log_labels(np.zeros(1, "int32"))
    for kind, apart in ((method.ReleasedModel, np.log(1e7)), (method.ExactLogarithms, 30)):
        model = kind(method.build_network(2), method.Noise())
        assert float(model.supervised_loss(labels, fair)[0]) == pytest.approx(np.log(10), abs=1e-4)  # one direction
        assert float(model.consistency_loss(ops.array(image), ops.array(copy))[0]) == pytest.approx(apart, rel=1e-5)


def test_released_batches(method, data):
    labels = np.r_[data.train_labels[:40], np.full(260, -1)].astype("int32")
    angle, shift = method.RELEASED_TRANSFORMS["rotation"], method.RELEASED_TRANSFORMS["shift"]
    pairs = method.ReleasedPairs(data.train_images[:300], labels, angle, 3, shuffled=True)
    batches = [pairs[number][0]["parameters"] for number in range(6)]
    assert all(len(batch) == 128 for batch in batches)  # the third of three is topped up
    assert all((maps == batches[0][0]).all() for batch in batches for maps in batch)
    assert (pairs[2][0]["images"][44:] == pairs[0][0]["images"][:84]).all()  # by the first of the same pass
    other = method.ReleasedPairs(data.train_images[:200], labels[:200], angle, 3)
    assert (other[0][0]["parameters"][0] != batches[0][0]).any() and len(other[1][1]) == 72
    shifts = method.ReleasedPairs(data.train_images[:300], labels, shift, 3, shuffled=True)
    amounts = np.concatenate([shifts[number][0]["parameters"][:, :, 2] for number in range(20)])
    assert (amounts == np.round(amounts)).all() and (amounts.min(), amounts.max()) == (-10, 9)


def test_as_released_changes_model_batches_and_transform_and_keeps_its_strength(method, settings):
    strengths = [method.Noise(0.3), method.Shift(3), method.Rotation(90)]
    runs = [method.as_released(method.four_ways(one, settings)["SemiCT"]) for one in strengths]
    assert [vars(run.transform) for run in runs] == [{"deviation": 0.3}, {"pixels": 3}, {"angle": 0.0, "degrees": 90}]
    assert all(vars(run.start.transform) == vars(run.transform) for run in runs)
    assert {(one.model, one.pairs) for run in runs for one in (run, run.start)} == {
        (method.ReleasedModel, method.ReleasedPairs)
    }

    class Still:
        """Of a reader's own, without a name: its class's is taken."""

    assert isinstance(method.as_released(dataclasses.replace(runs[0], transform=Still())).transform, Still)
    wide = method.Rotation(90)
    wide.name = "wide"
    renamed = method.as_released(method.four_ways(wide, settings)["SemiCT"])
    assert renamed.transform.name == renamed.start.transform.name == "wide" and renamed.transform.degrees == 90


def test_half_labelled(method, data):
    labels = np.r_[data.train_labels[:40], np.full(260, -1)].astype("int32")
    pairs = method.HalfLabelled(data.train_images[:300], labels, method.Noise(), 3, shuffled=True)
    assert [(pairs[number][1] >= 0).sum() for number in range(2)] == [64, 64]
    plain = method.HalfLabelled(data.train_images[:300], labels, method.Noise(), 3)
    assert (plain[0][1] == labels[:128]).all()


def test_the_ways_of_the_collapse_differ_in_one_thing(method):
    ways = method.collapse_ways("rotation")
    released = ways.pop("as released")
    assert (released.model, released.start.model) == (method.ReleasedModel, method.ReleasedModel)
    assert (released.learning_rate, released.start.learning_rate) == (1e-5, 1e-3)  # what is restored is the start's
    assert ways["fresh Adam, 1e-5"].learning_rate == ways["moments, 1e-5"].learning_rate == 1e-5
    assert (ways["fresh Adam, 1e-3"].learning_rate, ways["no consistency loss"].weight) == (1e-3, 0.0)
    for way, run in ways.items():
        changed = {name for name, value in vars(run).items() if value != getattr(released, name)} - {"method"}
        assert changed in ({"model"}, {"model", "learning_rate"}, {"start"}, {"pairs"}, {"weight"}), way


def test_the_bent_view_is_elasticdeforms_with_its_gradient(method):
    random = np.random.default_rng(1)
    images, weights = random.random((2, 3, 40, 40, 1), dtype="float32")
    grid = random.normal(0, 4, (3, 5, 5, 2)).astype("float32")
    still = np.tile(np.eye(2, 3, dtype="float32"), (3, 1, 1))
    drawn = {"second": still, "grid": grid}
    ours = np.asarray(method.TwoViews()(images, drawn))
    backward = gradient(lambda x: ops.sum(method.TwoViews()(x, drawn) * weights), images)
    for number in range(3):
        moves, how = grid[number].transpose(2, 0, 1).astype("float64"), {"order": 3, "axis": (0, 1)}
        theirs = elasticdeform.deform_grid(images[number], moves, **how)
        np.testing.assert_allclose(ours[number], theirs, atol=1e-5)
        back = elasticdeform.deform_grid_gradient(weights[number], moves, **how)
        np.testing.assert_allclose(backward[number], back, rtol=1e-5, atol=1e-5)


def test_the_way_between_the_views_is_exact(method):
    drawn = method.TwoViews().draw(np.random.default_rng(0), (4, 32, 32, 1))
    first, second = (np.asarray(points) for points in method.both_points(drawn, 32, 32))
    between = np.asarray(method.moved(drawn["inverse"], second))
    np.testing.assert_allclose(np.asarray(method.moved(drawn["first"], between)), second, atol=1e-4)
    assert first.shape == second.shape == (4, 32, 32, 2)


def test_labels_move_with_their_image_and_are_unknown_outside(method):
    labels = np.random.default_rng(0).integers(0, 2, (2, 16, 16)).astype("int32")
    drawn = method.TwoViews(0, 0, 0).draw(np.random.default_rng(0), (2, 16, 16, 1))
    still = np.asarray(method.nearest(labels, method.second_points(drawn, 16, 16)))
    assert (still == labels).all()
    drawn["second"][:, 0, 2] = 3  # three rows down
    points = method.second_points(drawn, 16, 16)
    moved = np.asarray(method.nearest(labels, points))
    assert (moved[:, :13] == labels[:, 3:]).all() and (moved[:, 13:] == -1).all()
    image = np.asarray(method.TwoViews()(labels[..., None].astype("float32"), drawn))[..., 0]
    np.testing.assert_allclose(image[:, :13], moved[:, :13], atol=1e-4)


def test_each_view_has_its_own_labels(method):
    blocks = np.random.default_rng(0).integers(0, 2, (4, 4, 4))
    labels = np.kron(blocks, np.ones((1, 16, 16), int)).astype("int32")
    network = keras.Sequential([keras.Input((64, 64, 1)), keras.layers.Conv2D(2, 1)])
    network.set_weights([np.array([0, 9], "float32").reshape(1, 1, 1, 2), np.array([0, -4.5], "float32")])
    model = method.SegmentationModel(network, method.TwoViews())
    drawn = method.TwoViews().draw(np.random.default_rng(1), (4, 64, 64, 1))
    answers = np.asarray(model({"images": labels[..., None].astype("float32"), "parameters": drawn})).argmax(-1)
    moved = np.asarray(model.both_labels(labels, drawn))
    assert (answers == moved)[moved >= 0].mean() > 0.97  # of the pixels: between them the picture is interpolated


def test_an_equivariant_network_is_consistent_where_views_meet(method):
    rows = np.linspace(0, 3, 48, dtype="float32")
    images = (0.5 + 0.4 * np.sin(rows[:, None] + 2 * rows))[None, :, :, None].repeat(2, axis=0)
    transform = method.TwoViews(pixels=5.0)
    drawn = transform.draw(np.random.default_rng(0), images.shape)
    keras.utils.set_random_seed(0)  # a steep network would be blurred more by the interpolation
    network = keras.Sequential([keras.Input((48, 48, 1)), keras.layers.Conv2D(2, 1)])
    model = method.SegmentationModel(network, transform)
    log_p = model({"images": images, "parameters": drawn})
    first, second, valid = model.pairs_to_compare(log_p, drawn)
    assert 0.3 < float(ops.mean(valid)) < 1
    outside = ~np.asarray(helpers.inside(method.second_points(drawn, 48, 48), 48, 48))
    assert outside.any() and not np.asarray(valid)[outside].any()
    np.testing.assert_allclose(ops.sum(ops.exp(first), axis=-1), 1, atol=1e-5)  # a distribution after it moved, too
    assert float(method.mean(model.consistency_loss(first, second), valid)) < 1e-4


def test_dice_and_the_split_by_slice(method, tmp_path):
    images, cells = method.generate_membranes(60, side=64)
    slices = method.as_tiles("membranes", images, cells[:30])
    assert slices.train_images.shape == (4 * 54, 16, 16, 1) and slices.test_labels.shape == (24, 16, 16)
    assert (slices.train_labels[:32] >= 0).all() and (slices.train_labels[32 + 40 : -24] == -1).all()
    tile = images[7].reshape(32, 2, 32, 2).mean(axis=(1, 3)).round().astype("uint8")
    assert (slices.train_images[1, :, :, 0] == tile[:16, 16:]).all()
    run = method.segmentation_ways(1, width=2, epochs=1, dataset="membranes")["Supervised, moved"]
    run = dataclasses.replace(run, steps=1)
    model, about = method.train(run, slices, helpers.Runs(tmp_path, method.train))
    answers = np.asarray(model.network(slices.test_images.astype("float32") / 255)).argmax(-1)
    both = ((answers == 1) & (slices.test_labels == 1)).sum()
    by_hand = 2 * both / ((answers == 1).sum() + (slices.test_labels == 1).sum())
    assert method.dice(about["test"]) == pytest.approx(by_hand, rel=1e-4)


def test_the_six_ways_of_segmentation(method):
    ways = method.segmentation_ways(2)
    seen = {way: (run.labelled, run.unlabelled, run.batch_size, run.weight) for way, run in ways.items()}
    assert seen == {
        "Supervised": (8, 0, 4, 0.0),
        "Supervised, moved": (8, 0, 4, 0.0),
        "SemiC, labelled only": (8, 0, 4, 1.0),
        "SemiC": (8, 160, 8, 1.0),
        "SemiCT": (8, 160, 8, 1.0),
        "Supervised, slow": (8, 0, 4, 0.0),
    }
    assert not any(vars(ways["Supervised"].transform).values())
    moved = ways["Supervised, moved"]
    assert [run.start for run in ways.values()] == [None, None, None, None, moved, moved]
    assert [run.learning_rate for run in ways.values()] == [1e-2, 1e-2, 1e-2, 1e-2, 1e-3, 1e-3]
