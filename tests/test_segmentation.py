"""Section 12: deformations, their composition, labels that move with their images, and the runs."""

import dataclasses
import functools
import http.server
import threading

import elasticdeform
import keras
import numpy as np
import pytest
import scipy.ndimage
import tensorflow as tf

import helpers

SEED = [5, 1]
SIZE = 64
BATCH = {"positions": tf.range(3), "seed": tf.constant(SEED)}


@pytest.fixture(scope="module")
def pictures():
    """Smooth generated images, float32 (3, 96, 96, 1), 0 ... 1, and their labels, int32 (3, 96, 96)."""
    images, labels = helpers.generate_phantoms(3, size=96)
    smooth = tf.nn.avg_pool2d(helpers.to_unit_range(images[..., None]), 9, 1, "SAME")
    return smooth, tf.constant(labels, tf.int32)


@pytest.fixture(scope="module")
def phantoms(method):
    """Split of generated chest phantoms, 64 pixels high and wide, as without data or network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(helpers, "load_membranes", lambda path: (_ for _ in ()).throw(OSError("no network")))
        return helpers.load_segmentation(method.SLICES, shrink=8)


def pixel_grids(count, size=SIZE):
    return tf.tile(helpers.pixel_grid(size, size)[None], [count, 1, 1, 1])


def two_deformations(method, count=3, corner=16.0):
    corners = tf.fill([count, 2], tf.constant(corner, tf.float64))
    return [method.random_deformation(corners, [7, number], SIZE) for number in (0, 1)]


def pointwise(pictures):
    """Logits (..., 3) by a network that looks at each pixel alone, and so is equivariant."""
    return tf.concat([6 * pictures, 3 * pictures**2, 1 - pictures], axis=-1)


# ---------------------------------------------------------------------------------- deformations


def test_a_deformation_is_that_of_elasticdeform_and_so_is_its_gradient(method, random):
    images, upstream = (random.normal(size=(2, SIZE, SIZE, 2)).astype(np.float32) for _ in range(2))
    deformation = method.random_deformation(tf.zeros([2, 2], tf.float64), SEED, SIZE)
    points, variable = deformation.source(pixel_grids(2)), tf.Variable(images)
    with tf.GradientTape() as tape:
        moved, valid = method.output_transform(tf.convert_to_tensor(variable), points)
        product = tf.reduce_sum(moved * valid[..., None] * upstream)
    gradient = tape.gradient(product, variable)
    for index in range(2):
        forward = np.linalg.inv(np.vstack([deformation.maps[index], [0, 0, 1]]))
        options = {"order": 3, "mode": "constant", "axis": (0, 1), "affine": forward}
        grid = deformation.grids[index].numpy().astype(np.float64)
        expected = elasticdeform.deform_grid(images[index], grid, **options)
        np.testing.assert_allclose((moved * valid[..., None])[index], expected, atol=1e-4)
        expected = elasticdeform.deform_grid_gradient(upstream[index], grid, **options)
        np.testing.assert_allclose(gradient[index], expected, atol=1e-4)


def test_the_gradient_of_the_layer_is_that_of_finite_differences(method, random):
    logits = tf.constant(random.normal(size=(1, 12, 12, 2)).astype(np.float32))
    points = tf.constant(random.uniform(0, 11, (1, 12, 12, 2)))
    upstream = tf.constant(random.normal(size=(1, 12, 12, 2)).astype(np.float32))

    def product(values):
        return tf.reduce_sum(method.output_transform(values, points)[0] * upstream)

    with tf.GradientTape() as tape:
        tape.watch(logits)
        value = product(logits)
    gradient = tape.gradient(value, logits).numpy()
    for place in [(0, 0, 0, 0), (0, 5, 7, 1), (0, 11, 11, 0)]:
        step = np.zeros(logits.shape, np.float32)
        step[place] = 0.5  # the layer is linear, so that a large step costs no accuracy
        difference = float(product(logits + step) - product(logits - step))
        assert gradient[place] == pytest.approx(difference, abs=1e-4)


def test_the_inverse_inverts(method):
    one, other = two_deformations(method)
    sources = other.source(pixel_grids(3))
    np.testing.assert_allclose(one.source(one.place(sources)), sources, atol=5e-3)
    assert np.abs(one.source(pixel_grids(3)) - sources).max() > 5


def test_an_equivariant_network_is_consistent_and_only_by_the_right_composition(method, pictures):
    one, other = two_deformations(method)
    sources = [deformation.source(pixel_grids(3)) for deformation in (one, other)]
    first, second = (pointwise(helpers.cubic_sample(pictures[0], source)) for source in sources)
    losses = []
    for points in (one.place(sources[1]), other.place(sources[0]), pixel_grids(3)):
        moved, valid = method.output_transform(first, points)
        assert 0.2 < float(tf.reduce_mean(valid)) <= 1
        loss = method.consistency_loss(tf.nn.log_softmax(moved), tf.nn.log_softmax(second))
        losses.append(float(helpers.share_of_mean(loss, valid)))
    assert losses[0] < 1e-5 and min(losses[1:]) > 100 * losses[0]


# --------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("both", [True, False])
def test_views_are_consistent_for_an_equivariant_network(method, pictures, both, training):
    first, second, *_, points = method.deformed_views(*pictures, SEED, training, crop=SIZE, both=both)
    moved, valid = method.output_transform(pointwise(first), points)
    loss = method.consistency_loss(tf.nn.log_softmax(moved), tf.nn.log_softmax(pointwise(second)))
    # Beside the border of the image the splines mix in the first view's zeros from beyond it.
    away = np.stack([scipy.ndimage.binary_erosion(there, iterations=5) for there in valid.numpy() > 0])
    assert 0.1 < away.mean() < float(tf.reduce_mean(valid)) < 1
    still = method.consistency_loss(*(tf.nn.log_softmax(pointwise(view)) for view in (first, second))).numpy()
    assert loss.numpy()[away].max() < 1e-3 < 0.1 * still[away].max()
    assert loss.numpy()[away].mean() < 0.01 * still[away].mean()


@pytest.mark.parametrize("training", [True, False])
def test_the_model_moves_the_first_prediction_to_the_second(method, pictures, training):
    inputs = keras.Input((None, None, 1))
    network = keras.Model(inputs, keras.layers.Conv2D(3, 1, kernel_initializer="he_uniform")(inputs))
    pool = helpers.ImagePool((255 * pictures[0].numpy()).astype(np.uint8), pictures[1].numpy())
    losses = {}
    for name in ("moved", "not moved"):

        def views(*arguments, name=name):
            *rest, points = method.deformed_views(*arguments, crop=SIZE)
            still = tf.where(points < 0, points, tf.tile(helpers.pixel_grid(*points.shape[1:3])[None], [3, 1, 1, 1]))
            return *rest, points if name == "moved" else still

        model = method.ConsistencyModel(network, None, pool=pool, make_views=views)
        model.compile(optimizer=keras.optimizers.Adam())
        values, valid = model.loss_and_measures(BATCH, training)[1]["loss_consistency"]
        away = np.stack([scipy.ndimage.binary_erosion(there, iterations=5) for there in valid.numpy() > 0])
        losses[name] = values.numpy()[away].mean()
    assert losses["moved"] < 1e-5 and losses["not moved"] > 100 * losses["moved"]


def test_labels_move_with_their_image(method, pictures):
    labels = pictures[1]
    as_image = tf.cast(labels > 0, tf.float32)[..., None]
    for crop in (SIZE, 96):
        first, second, *moved, _ = method.deformed_views(as_image, labels, SEED, training=True, crop=crop)
        for view, label in zip((first, second), moved, strict=True):
            known = label.numpy() >= 0
            sure = known & ((view.numpy()[..., 0] < 0.1) | (view.numpy()[..., 0] > 0.9))  # not on an edge
            right = (view.numpy()[..., 0] > 0.5) == (label.numpy() > 0)
            assert right[sure].mean() > 0.999 and sure.mean() > 0.5
            assert not view.numpy()[~known].any()


def test_without_a_label_no_pixel_has_one(method, pictures):
    *_, first, second, _ = method.deformed_views(pictures[0], tf.fill([3, 96, 96], -1), SEED, training=True, crop=SIZE)
    assert (first.numpy() == -1).all() and (second.numpy() == -1).all()


def test_evaluation_sees_the_image_itself_first(method, pictures):
    for make_views in method.SEGMENTATION_VIEWS.values():
        first, second, labels, *_ = make_views(*pictures, SEED, training=False)
        np.testing.assert_allclose(first, pictures[0], atol=1e-5)
        np.testing.assert_array_equal(labels, pictures[1])
        assert np.abs(second - first).max() > 0.1


def test_the_variants_are_what_they_say(method, pictures):
    views = {name: make(*pictures, SEED, True, crop=SIZE) for name, make in method.SEGMENTATION_VIEWS.items()}
    np.testing.assert_array_equal(views["crops"][0], views["crops"][1])
    np.testing.assert_allclose(views["simplified"][0], views["crops"][0], atol=1e-6)
    np.testing.assert_allclose(views["simplified"][1], views["deformations"][1], atol=1e-6)
    np.testing.assert_allclose(views["noise"][-1], pixel_grids(3), atol=1e-6)
    assert 0.05 < np.std(views["noise"][0] - views["crops"][0]) < 0.11
    assert np.abs(views["noise"][0] - views["noise"][1]).max() > 0.1
    assert np.abs(views["deformations"][0] - views["crops"][0]).max() > 0.1


# --------------------------------------------------------------------------------------- model


def model_of(method, images, labels, views, weight=1.0):
    keras.utils.set_random_seed(1)
    pool = helpers.ImagePool((images.numpy() * 255).astype(np.uint8), labels.numpy())
    model = method.ConsistencyModel(method.build_unet(2, 4), None, weight, pool, ("one_sided_loss",), make_views=views)
    model.compile(optimizer=keras.optimizers.Adam(1e-3))
    return model


def test_what_left_the_picture_counts_in_neither_term(method, pictures, random):
    *_, first_labels, second_labels, points = method.deformed_views(*pictures, SEED, training=True, crop=SIZE)
    logits = [tf.Variable(random.normal(size=(3, SIZE, SIZE, 4)).astype(np.float32)) for _ in range(2)]
    with tf.GradientTape(persistent=True) as tape:
        moved, valid = method.output_transform(tf.convert_to_tensor(logits[0]), points)
        views = [tf.nn.log_softmax(view) for view in (*logits, moved)]
        measures = method.measure(*views, (first_labels, second_labels), valid)
        losses = [helpers.share_of_mean(*measures[name]) for name in ("loss_supervised", "loss_consistency")]
    for variable, labels in zip(logits, (first_labels, second_labels), strict=True):
        pull = np.abs(tape.gradient(losses[0], variable)).max(-1)
        np.testing.assert_array_equal(pull > 0, labels.numpy() >= 0)
    pull = np.abs(tape.gradient(losses[1], logits[1])).max(-1)
    np.testing.assert_array_equal(pull > 0, valid.numpy() > 0)
    for part in (first_labels.numpy() >= 0, second_labels.numpy() >= 0, valid.numpy() > 0):
        assert 0.2 < part.mean() < 1
    np.testing.assert_array_equal(valid.numpy() > 0, (second_labels.numpy() >= 0) & helpers.inside(points, SIZE, SIZE))


def test_overlaps_by_hand(method, pictures):
    model = model_of(method, *pictures, method.deformed_views)
    result = model.test_step(BATCH)
    images, labels = model.pool.fetch(BATCH["positions"])
    answers = model(images).numpy().argmax(-1)
    both = [np.sum((answers == k) & (labels.numpy() == k)) for k in (1, 2, 3)]
    sums = [np.sum(answers == k) + np.sum(labels.numpy() == k) for k in (1, 2, 3)]
    assert float(result["dice"]) == pytest.approx(np.mean(2 * np.divide(both, sums)), rel=1e-5)
    assert float(result["iou"]) == pytest.approx(np.mean(np.divide(both, np.subtract(sums, both))), rel=1e-5)
    assert float(result["accuracy_clean"]) == pytest.approx(np.mean(answers == labels.numpy()), rel=1e-5)


def test_a_network_for_every_pixel_learns(method, pictures):
    model = model_of(method, *pictures, method.SEGMENTATION_VIEWS["crops"])
    model.optimizer.learning_rate = 1e-2
    model.make_views = lambda *arguments: method.deformed_views(*arguments, crop=SIZE, strength=0.0)
    dataset = tf.data.Dataset.from_tensors(BATCH).repeat()
    history = model.fit(dataset, steps_per_epoch=30, epochs=2, shuffle=False, verbose=0).history
    assert history["loss_supervised"][1] < 0.7 * history["loss_supervised"][0]


# ---------------------------------------------------------------------------------------- data


def test_slices_are_halved_with_their_labels_and_split_by_number(method, monkeypatch, random):
    arrays = {name: random.integers(0, 256, (30, 8, 8)).astype(np.uint8) for name in ("images", "unlabeled")}
    arrays["cells"] = random.integers(0, 2, (30, 8, 8)).astype(np.uint8)
    monkeypatch.setattr(helpers, "load_membranes", lambda path: arrays)
    data = helpers.load_segmentation(method.SLICES)
    assert data.name == "isbi2012" and data.caption == ""

    def fourths(picture):
        return [picture[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] for row in range(4) for column in range(4)]

    for subset, place, number in (("labeled", 1, 9), ("validation", 0, 18), ("test", 5, 29)):
        image, labels = getattr(data, f"{subset}_images")[place], getattr(data, f"{subset}_labels")[place]
        expected = [round(part.mean()) for part in fourths(arrays["images"][number])]
        assert image.shape == (4, 4, 1) and image.ravel().tolist() == expected
        assert labels.ravel().tolist() == [int(np.sum(part == 0) >= 2) for part in fourths(arrays["cells"][number])]
    others = [1, 3, 5, 7, 8, 10, 12, 14, 16, 17]
    expected = np.concatenate([arrays["images"][others], arrays["unlabeled"]])
    assert len(data.unlabeled_images) == 40
    for image, full in zip(data.unlabeled_images, expected, strict=True):
        assert image.ravel().tolist() == [round(part.mean()) for part in fourths(full)]


def test_the_split_is_by_image_and_the_phantom_says_so(method, phantoms):
    assert phantoms.name == "phantom" and "phantom" in phantoms.caption
    shapes = {
        name: getattr(phantoms, f"{name}_images").shape for name in ("labeled", "unlabeled", "validation", "test")
    }
    assert shapes == {name: (n, 64, 64, 1) for name, n in zip(shapes, (8, 40, 6, 6), strict=True)}
    subsets = [getattr(phantoms, f"{name}_images") for name in shapes]
    everything = {picture.tobytes() for subset in subsets for picture in subset}
    assert len(everything) == 60  # all different, so that none is in two subsets
    with pytest.raises(ValueError, match="twice"):
        helpers.load_segmentation(method.SLICES | {"test": (0, 24)})


def test_only_the_images_of_isbi_2012_pass_for_them(tmp_path):
    arrays = {name: np.zeros((30, 512, 512), np.uint8) for name in helpers.MEMBRANE_FOLDERS}
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(ValueError, match="digest"):
        helpers.load_membranes(tmp_path / "other.npz")
    (tmp_path / "broken.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="not a readable"):
        helpers.load_membranes(tmp_path / "broken.npz")
    with pytest.raises(FileNotFoundError):
        helpers.load_membranes(tmp_path / "absent.npz")


@pytest.fixture
def public_copy(tmp_path, monkeypatch):
    """A web server with pictures in the folders of the public copy, in place of it; what the pictures show."""
    random, shown = np.random.default_rng(0), {}
    for name, folder in helpers.MEMBRANE_FOLDERS.items():
        (tmp_path / "web" / folder).mkdir(parents=True)
        shown[name] = random.integers(0, 2, (30, 16, 16), dtype=np.uint8)
        for number, picture in enumerate(shown[name]):
            encoded = tf.io.encode_png(255 * picture[..., None]).numpy()
            (tmp_path / "web" / folder / f"{number}.png").write_bytes(encoded)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=tmp_path / "web")

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(helpers, "MEMBRANES", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(keras.utils, "get_file", functools.partial(keras.utils.get_file, cache_dir=tmp_path))
    monkeypatch.delenv("ISBI2012_NPZ", raising=False)
    yield shown
    server.shutdown()


def test_a_download_is_checked_and_kept(public_copy, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="digest"):
        helpers.load_membranes()
    expected = {name: 255 * shown if name != "cells" else shown for name, shown in public_copy.items()}
    digests = {name: helpers._checksum(shown.tobytes()) for name, shown in expected.items()}
    monkeypatch.setattr(helpers, "MEMBRANE_DIGESTS", digests)
    for arrays in (helpers.load_membranes(), helpers.load_membranes()):
        for name, shown in expected.items():
            np.testing.assert_array_equal(arrays[name], shown)
        monkeypatch.setattr(helpers, "MEMBRANES", "http://127.0.0.1:9")  # the second time nothing is asked for
    next(tmp_path.glob("datasets/isbi2012/cells-7.png")).unlink()
    with pytest.raises(OSError, match="could not download"):
        helpers.load_membranes()
    (tmp_path / "datasets/isbi2012/cells-7.png").write_bytes(b"half of a picture")
    with pytest.raises(ValueError, match=r"cells-7\.png is no picture: delete it"):
        helpers.load_membranes()


# ---------------------------------------------------------------------------------------- runs


@pytest.fixture
def small_views(method):
    """The variants with crops as small as may be."""
    return {name: functools.partial(make, crop=SIZE) for name, make in method.SEGMENTATION_VIEWS.items()}


def test_each_way_has_one_thing_more_than_the_one_before(method, tiny):
    runs = method.segmentation_runs(method.SEGMENTATION_SIZES["standard"], tiny)
    assert len(runs) == 16
    assert {run.batch_size // (2 if run.unlabeled else 1) for run in runs.values()} == {4}  # labelled crops a step
    changes = [{"transform"}, {"method", "consistency_weight", "switches"}, {"unlabeled", "batch_size"}]
    for labels in (1, 2, 4, 8):
        ways = [dataclasses.asdict(run) for key, run in runs.items() if key[0] == labels]
        for before, after, changed in zip(ways, ways[1:], changes, strict=False):
            assert {name for name in before if before[name] != after[name]} == changed


def test_four_ways_train_and_their_records_ship(method, phantoms, tiny, small_views, tmp_path):
    runs = method.segmentation_runs(method.SEGMENTATION_SIZES["smoke"], tiny, "phantom")
    runner = helpers.Runner(phantoms, method.build_segmenter, small_views, [], "test", tmp_path / "runs")
    records = runner.train(list(runs.values()))
    helpers.publish(records, tmp_path)
    rows = helpers.read_csv(tmp_path / "runs.csv")
    assert [float(row["iou"]) for row in rows] == [record["metrics"]["iou"] for record in records]
    assert all(row["val_dice"] for row in helpers.read_csv(tmp_path / "curves.csv"))
    named = {(0, *key): record for key, record in zip(runs, records, strict=True)}
    table = helpers.overlap_table(named)
    assert [row[2] for row in table.rows] == [f"{record['metrics']['dice']:.3f}" for record in records]
    gains = helpers.overlap_gains(named | {(1, *key[1:]): record for key, record in named.items()})
    dice = [record["metrics"]["dice"] for record in records]
    assert gains.rows[0][1:] == tuple(f"{100 * step:+.1f} ± 0.0 (n = 2)" for step in np.diff(dice))
    figure = helpers.show_overlaps(named, "Overlaps of a test")
    drawn = {line.get_ydata()[0] for line in figure.axes[0].lines if len(line.get_ydata()) == 1}
    assert {record["metrics"]["dice"] for record in records} <= drawn


def test_a_run_on_two_devices_ends_as_on_one(method, phantoms, tiny, small_views, tmp_path):
    runs = method.segmentation_runs(method.SEGMENTATION_SIZES["smoke"] | {"labels": (1,)}, tiny, "phantom")
    records = []
    for strategy in (tf.distribute.get_strategy(), helpers.mirrored(("CPU:0", "CPU:1"))):
        folder = tmp_path / str(strategy.num_replicas_in_sync)
        runner = helpers.Runner(phantoms, method.build_segmenter, small_views, [], "test", folder)
        runner.strategy = strategy
        records += runner.train([runs[1, "consistency, all images"]])
    one, two = records
    assert two["metrics"] == pytest.approx(one["metrics"], rel=2e-3, abs=2e-3)


def test_the_study_has_three_seeds_of_everything(method):
    runs = method.segmentation_references("float32")
    assert len(runs) == 48 and len({run.id for run in runs.values()}) == 48
    assert {key[0] for key in runs} == {0, 1, 2} and {key[1] for key in runs} == {1, 2, 4, 8}
