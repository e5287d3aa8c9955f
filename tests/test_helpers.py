"""The plumbing: data, splits, warps, layers, identity of runs, tables, figures, widgets."""

import dataclasses
import functools
import importlib.util
import threading
import types

import elasticdeform
import grid
import keras
import matplotlib.pyplot as plt
import notebook
import numpy as np
import pytest
import tensorflow as tf

import helpers

# ---------------------------------------------------------------------------- environment, settings


def test_environment_names_device_and_versions(capsys):
    found = helpers.environment()
    assert found["tensorflow"] == tf.__version__ and found["device"] and all(found.values())
    helpers.print_environment()
    printed = capsys.readouterr().out
    assert found["keras"] in printed and ("Change runtime type" in printed) == (found["gpu"] == "no")


def test_untouched_controls_give_the_settings_of_the_report(method, monkeypatch):
    monkeypatch.delenv("REPRODUCTION_PRESET", raising=False)
    monkeypatch.delenv("REPRODUCTION_RECIPE", raising=False)
    controls = helpers.settings_controls(method.PRESETS, list(method.TRANSFORMS))
    controls.precision.value = "float32"
    settings = helpers.read_settings(controls, method.PRESETS)
    assert vars(settings) == vars(notebook.preset_settings(method, "quick"))


def test_a_moved_control_is_read(method, monkeypatch):
    monkeypatch.setenv("REPRODUCTION_PRESET", "smoke")
    controls = helpers.settings_controls(method.PRESETS, list(method.TRANSFORMS))
    controls.preset.value, controls.learning_rate.value, controls.transforms.value = "paper", 1e-2, ("shift",)
    settings = helpers.read_settings(controls, method.PRESETS)
    assert (settings.width, settings.learning_rate, settings.transforms) == (96, 1e-2, ("shift",))
    controls.transforms.value = ()
    with pytest.raises(ValueError, match="at least one"):
        helpers.read_settings(controls, method.PRESETS)


def test_environment_variables_choose_preset_and_recipe(method, monkeypatch):
    monkeypatch.setenv("REPRODUCTION_PRESET", "smoke")
    monkeypatch.setenv("REPRODUCTION_RECIPE", "released")
    controls = helpers.settings_controls(method.PRESETS, ["noise"])
    settings = helpers.read_settings(controls, method.PRESETS)
    assert (settings.preset, settings.recipe) == ("smoke", "released")
    for name, message in (("PRESET", "huge.*smoke"), ("RECIPE", "huge.*reported")):
        monkeypatch.setenv(f"REPRODUCTION_{name}", "huge")
        with pytest.raises(ValueError, match=message):
            helpers.settings_controls(method.PRESETS, ["noise"])
        monkeypatch.delenv(f"REPRODUCTION_{name}")


# -------------------------------------------------------------------------------------------- data


def save_cifar(path, **changes):
    """A file of CIFAR-10's shape, of zeros."""
    arrays = {
        "x_train": np.zeros((50000, 32, 32, 3), np.uint8),
        "y_train": np.zeros((50000, 1), np.uint8),
        "x_test": np.zeros((10000, 32, 32, 3), np.uint8),
        "y_test": np.zeros((10000, 1), np.uint8),
    }
    np.savez_compressed(path, **{name: array for name, array in (arrays | changes).items() if array is not None})


def test_cifar10_from_a_file(tmp_path, monkeypatch):
    path = tmp_path / "cifar.npz"
    save_cifar(path, y_test=np.full((10000, 1), 7, np.uint8))
    monkeypatch.setenv("CIFAR10_NPZ", str(path))
    (images, labels), (test_images, test_labels) = helpers.load_cifar10()
    assert images.shape == (50000, 32, 32, 3) and labels.shape == (50000, 1)
    assert test_images.shape == (10000, 32, 32, 3) and test_labels.max() == 7
    assert helpers.load_data("paper")[0] == "cifar10"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x_train": None}, "x_train"),
        ({"x_train": np.zeros((5, 32, 32, 3), np.uint8)}, "x_train"),
        ({"x_test": np.zeros((10000, 32, 32, 3), np.float32)}, "x_test.*float32"),
        ({"y_train": np.full((50000, 1), 10, np.uint8)}, "label 10"),
        ({"y_test": np.array([{"a": 1}], dtype=object)}, "readable"),
    ],
)
def test_another_file_is_refused(tmp_path, changes, message):
    save_cifar(tmp_path / "bad.npz", **changes)
    with pytest.raises(ValueError, match=message):
        helpers.load_cifar10(tmp_path / "bad.npz")


def test_a_missing_file_and_a_damaged_one_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz"):
        helpers.load_cifar10(tmp_path / "nowhere.npz")
    (tmp_path / "half.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match=r"half\.npz"):
        helpers.load_cifar10(tmp_path / "half.npz")


def test_without_cifar10_small_presets_use_shapes_and_large_ones_stop(monkeypatch, capsys):
    def no_network():
        raise Exception("URL fetch failure")

    monkeypatch.delenv("CIFAR10_NPZ", raising=False)
    monkeypatch.setattr(keras.datasets.cifar10, "load_data", no_network)
    name, ((images, labels), _) = helpers.load_data("quick")
    assert name == "shapes" and images.dtype == np.uint8 and set(labels[:, 0]) == set(range(10))
    assert "GENERATED SHAPES" in capsys.readouterr().out
    with pytest.raises(OSError, match=r"three ways.*CIFAR10_NPZ.*load_data"):
        helpers.load_data("paper")


def test_generated_shapes_repeat_and_can_be_told_apart(shapes):
    (images, labels), _ = shapes
    np.testing.assert_array_equal(images, helpers.generate_shapes(train=1200, test=300)[0][0])
    assert images.shape == (1200, 32, 32, 3) and images.min() == 0 and images.max() == 255
    # With the colours taken away, the average picture of a class still says which one it is.
    edges = np.abs(images.astype(float).mean(-1) - images.astype(float).mean((1, 2, 3))[:, None, None])
    centers = np.stack([edges[labels[:, 0] == k].mean(0) for k in range(10)])
    assert min(np.abs(a - b).max() for i, a in enumerate(centers) for b in centers[i + 1 :]) > 5


def test_split_takes_the_ranges_of_the_report(method):
    positions = np.arange(50000)
    images = np.stack([positions // 256 % 256, positions % 256], -1).astype(np.uint8)[:, None, None]
    arrays = (images, (positions % 10).astype(np.uint8)[:, None]), (images[:10000], np.zeros((10000, 1), np.uint8))
    ranges = method.subset_ranges()
    assert ranges == {"labeled": (0, 4000), "unlabeled": (4000, 49000), "validation": (49000, 50000)}
    cut = helpers.split("cifar10", arrays, ranges)
    np.testing.assert_array_equal(cut.labeled_images, images[:4000])
    np.testing.assert_array_equal(cut.unlabeled_images, images[4000:49000])
    np.testing.assert_array_equal(cut.validation_images, images[49000:])
    np.testing.assert_array_equal(cut.labeled_labels, positions[:4000] % 10)
    assert [field.name for field in dataclasses.fields(cut) if "labels" in field.name] == [
        "labeled_labels",
        "validation_labels",
        "test_labels",
    ]
    assert "45,000" in repr(helpers.split_table(cut, ranges))


def test_other_data_have_another_digest(shapes, data):
    (images, labels), test = shapes
    edited = images.copy()
    edited[700, 0, 0, 0] ^= 1
    assert helpers.split("shapes", shapes, grid.RANGES).digest == data.digest
    assert helpers.split("shapes", ((edited, labels), test), grid.RANGES).digest != data.digest
    assert helpers.split("shapes", shapes, grid.RANGES | {"unlabeled": (401, 1000)}).digest != data.digest


@pytest.mark.parametrize("preset", ["smoke", "quick"])
def test_the_generated_set_is_large_enough_for_the_small_presets(method, preset):
    arrays = helpers.generate_shapes()
    sizes = notebook.preset_settings(method, preset)
    cut = helpers.split("shapes", arrays, method.subset_ranges(len(arrays[0][0])))
    for subset, values in cut.class_counts.items():
        assert values.sum() >= getattr(sizes, subset)


def test_overlapping_ranges_are_refused(shapes):
    with pytest.raises(ValueError, match="overlap"):
        helpers.split("shapes", shapes, grid.RANGES | {"unlabeled": (399, 1000)})


def test_the_pool_hides_labels_and_says_what_is_where(method, data, tiny):
    run = method.plan("SemiC", "noise", tiny, "shapes")
    pool, places = data.pool(run)
    assert places == {"training": range(176), "validation": range(176, 216), "test": range(216, 276)}
    images, labels = pool.fetch(tf.range(276))
    np.testing.assert_array_equal(labels[:96], data.labeled_labels[:96])
    assert (labels.numpy()[96:176] == -1).all()
    np.testing.assert_array_equal(labels[216:], data.test_labels[:60])
    np.testing.assert_allclose(images[96:176], data.unlabeled_images[:80] / np.float32(255))
    with pytest.raises(ValueError, match="401 labeled.*400"):
        data.pool(dataclasses.replace(run, labeled=401))


@pytest.mark.parametrize(
    "gpus, capability, flags, expected",
    [
        ([], None, "avx512f amx_bf16", "mixed_bfloat16"),
        ([], None, "avx512f", "float32"),
        (["T4"], (7, 5), "", "mixed_float16"),
        (["L4"], (8, 9), "", "mixed_bfloat16"),
        (["K80"], (3, 7), "", "float32"),
    ],
)
def test_automatic_precision_is_what_the_device_has(monkeypatch, gpus, capability, flags, expected):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: gpus)
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda gpu: {"compute_capability": capability})
    monkeypatch.setattr(helpers.pathlib.Path, "exists", lambda path: True)
    monkeypatch.setattr(helpers.pathlib.Path, "read_text", lambda path: f"flags : {flags}")
    assert helpers.automatic_precision("quick", 16) == expected
    assert helpers.automatic_precision("smoke", 4) == (expected if gpus else "float32")
    assert helpers.automatic_precision("paper", 96) == "float32"


# -------------------------------------------------------------------------------------- transforms


def random_maps(random, count, spread):
    """Affine maps near the identity: (count, 2, 3)."""
    return np.eye(2, 3) + random.normal(size=(count, 2, 3)) * np.array([spread, spread, 40 * spread])


@pytest.mark.parametrize("shape", [(32, 32, 3), (20, 31, 1), (5, 40, 2)])
@pytest.mark.parametrize("spread", [0.0, 0.02, 0.3])
def test_cubic_warp_is_elasticdeform(random, shape, spread):
    images = tf.constant(random.random((7, *shape), dtype=np.float32))
    maps = tf.constant(random_maps(random, 7, spread))
    np.testing.assert_allclose(helpers.cubic_warp(images, maps), helpers.elasticdeform_warp(images, maps), atol=1e-5)


def test_whole_pixel_shifts_keep_the_border(random):
    images = tf.constant(random.random((3, 32, 32, 3), dtype=np.float32))
    maps = np.tile(np.eye(2, 3), (3, 1, 1))
    maps[:, :, 2] = [[4, -3], [-10, 0], [31, 31]]
    warped = helpers.cubic_warp(images, tf.constant(maps)).numpy()
    np.testing.assert_allclose(warped[0, :28, 3:], images[0, 4:, :29], atol=1e-5)
    np.testing.assert_allclose(warped[1, 10:], images[1, :22], atol=1e-5)
    np.testing.assert_allclose(warped[2, 0, 0], images[2, 31, 31], atol=1e-5)
    assert np.count_nonzero(warped[2].any(-1)) == 1 and not warped[1, :10].any()


def test_gradient_of_cubic_warp_is_that_of_elasticdeform(random):
    images = tf.constant(random.random((3, 16, 16, 2), dtype=np.float32))
    maps = random_maps(random, 3, 0.1)
    upstream = random.normal(size=(3, 16, 16, 2)).astype(np.float32)
    with tf.GradientTape() as tape:
        tape.watch(images)
        product = tf.reduce_sum(helpers.cubic_warp(images, tf.constant(maps)) * upstream)
    gradient = tape.gradient(product, images).numpy()
    for index in range(3):
        forward = np.linalg.inv(np.vstack([maps[index], [0, 0, 1]]))
        expected = elasticdeform.deform_grid_gradient(
            upstream[index], np.zeros((2, 2, 2)), order=3, mode="constant", axis=(0, 1), affine=forward
        )
        np.testing.assert_allclose(gradient[index], expected, atol=1e-5)


@pytest.mark.parametrize("shape, points", [((32, 32, 3), (3, 3)), ((40, 17, 1), (3, 5)), ((9, 24, 2), (4, 3))])
@pytest.mark.parametrize("sigma", [0.5, 3.0])
def test_smooth_displacements_and_their_gradient_are_those_of_elasticdeform(random, shape, points, sigma):
    images, upstream = (random.normal(size=(5, *shape)).astype(np.float32) for _ in range(2))
    maps, grids = random_maps(random, 5, 0.05), random.normal(0, sigma, (5, 2, *points))
    pixels = tf.tile(helpers.pixel_grid(*shape[:2])[None], [5, 1, 1, 1])
    field = helpers.smooth_displacements(tf.constant(grids), pixels, *shape[:2])
    variable, points = tf.Variable(images), helpers.affine_points(maps, pixels) + field
    with tf.GradientTape() as tape:
        sampled = helpers.cubic_sample(tf.convert_to_tensor(variable), points)
        warped = tf.where(helpers.inside(points, *shape[:2])[..., None], sampled, 0.0)
        product = tf.reduce_sum(warped * upstream)
    gradient = tf.convert_to_tensor(tape.gradient(product, variable)).numpy()
    for index in range(5):
        forward = np.linalg.inv(np.vstack([maps[index], [0, 0, 1]]))
        options = {"order": 3, "mode": "constant", "axis": (0, 1), "affine": forward}
        expected = elasticdeform.deform_grid(images[index], grids[index], **options)
        np.testing.assert_allclose(warped[index], expected, atol=1e-5)
        expected = elasticdeform.deform_grid_gradient(upstream[index], grids[index], **options)
        np.testing.assert_allclose(gradient[index], expected, atol=1e-5)


@pytest.mark.parametrize("compiled", [True, False])
def test_cubic_warp_inside_a_function_compiled_or_not(random, compiled):
    images = tf.constant(random.random((3, 16, 16, 3), dtype=np.float32))
    maps = tf.constant(random_maps(random, 3, 0.1))
    plain = helpers.cubic_warp.python_function
    inside = tf.function(lambda pictures: plain(pictures, maps), jit_compile=compiled)(images)
    np.testing.assert_allclose(inside, helpers.elasticdeform_warp(images, maps), atol=1e-5)


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
def test_cubic_warp_keeps_the_type(random, dtype):
    images = tf.constant(random.random((2, 16, 16, 3), dtype=np.float32))
    maps = tf.constant(random_maps(random, 2, 0.1))
    low = helpers.cubic_warp(tf.cast(images, dtype), maps)
    assert low.dtype == dtype
    np.testing.assert_allclose(tf.cast(low, tf.float32), helpers.cubic_warp(images, maps), atol=0.05)


def test_the_comparison_of_warps_counts_both(method, random):
    images = tf.constant(random.random((4, 32, 32, 3), dtype=np.float32))
    table = helpers.compare_warps(images, method.rotation_maps(tf.zeros([4], tf.float64), 32, 32), repeats=2)
    assert float(table.rows[1][2]) < 1e-5 and float(table.rows[0][1]) > 0


# ----------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_fused_normalization_does_what_keras_does(random, policy):
    inputs = tf.constant(random.normal(2.0, 3.0, (6, 8, 8, 5)).astype(np.float32))
    results = []
    for kind in (keras.layers.BatchNormalization, helpers.BatchNormalization):
        layer = kind(dtype=keras.DTypePolicy(policy))
        layer.build(inputs.shape)
        layer.set_weights([random.__class__(random.bit_generator.__class__(k)).normal(1, 0.1, 5) for k in range(4)])
        values = tf.cast(inputs, layer.compute_dtype)
        with tf.GradientTape() as tape:
            tape.watch(values)
            outputs = layer(values, training=True)
            loss = tf.reduce_sum(tf.cast(outputs, tf.float32) ** 3)
        gradients = tape.gradient(loss, [values, *layer.trainable_variables])
        results.append([outputs, layer(values, training=False), *gradients, *layer.get_weights()])
    for ours, theirs in zip(results[1], results[0], strict=True):
        ours, theirs = (np.asarray(tf.cast(value, tf.float32)) for value in (ours, theirs))
        scale = max(1.0, np.abs(theirs).max())
        np.testing.assert_allclose(ours / scale, theirs / scale, atol=1e-5 if policy == "float32" else 2e-2)


def test_fused_normalization_loads_what_keras_saved(tmp_path, random):
    def network(kind):
        inputs = keras.Input((4, 4, 3))
        return keras.Model(inputs, kind(name="normalization")(inputs))

    saved, loaded = network(keras.layers.BatchNormalization), network(helpers.BatchNormalization)
    saved.set_weights([random.normal(1, 0.1, 3) for _ in range(4)])
    saved.save_weights(tmp_path / "a.weights.h5")
    loaded.load_weights(tmp_path / "a.weights.h5")
    for ours, theirs in zip(loaded.get_weights(), saved.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


# -------------------------------------------------------------------------------- identity of runs


@pytest.fixture
def run(method, tiny):
    return method.plan("SemiC", "shift", tiny)


def test_every_field_that_determines_a_result_is_in_the_id(run):
    changes = {"transform": "noise", "width": 3, "labeled": 95, "unlabeled": 81, "epochs": 4, "learning_rate": 2e-3}
    changes |= {
        "validation": 39,
        "test": 59,
        "consistency_weight": 0.5,
        "batch_size": 64,
        "seed": 1,
        "dataset": "shapes",
        "precision": "mixed_bfloat16",
        "switches": "one_angle",
        "steps": 1,
    }
    others = [dataclasses.replace(run, **{name: value}) for name, value in changes.items()]
    others.append(dataclasses.replace(run, method="SemiCT", starting_run="some-run"))
    starting = {"moments_from": "other-run", "logit_scale": 0.5}
    others += [dataclasses.replace(others[-1], **{name: value}) for name, value in starting.items()]
    others.append(dataclasses.replace(run, transform="rotation", switches="one_angle"))
    others.append(dataclasses.replace(others[-1], angle=1))
    assert {field.name for field in dataclasses.fields(run)} == {*changes, *starting, "method", "starting_run", "angle"}
    assert len({run.id, *(other.id for other in others)}) == len(others) + 1


def test_a_default_stays_out_of_the_id(run):
    assert dataclasses.replace(run, consistency_weight=1, seed=0).id == run.id
    later = dataclasses.make_dataclass("Later", [("added", int, 5)], bases=(helpers.Configuration,), frozen=True)
    assert later(**dataclasses.asdict(run)).id == run.id
    assert later(**dataclasses.asdict(run), added=6).id != run.id


def test_the_id_is_a_file_name(run):
    assert run.id.startswith("shift-semic-") and run.id.replace("-", "").isalnum()


@pytest.mark.parametrize(
    "change",
    [
        {"method": "SemiX"},
        {"width": 0},
        {"width": 1.5},
        {"labeled": 0},
        {"unlabeled": -1},
        {"epochs": 0},
        {"epochs": True},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"learning_rate": "fast"},
        {"consistency_weight": -1.0},
        {"consistency_weight": float("inf")},
        {"seed": -1},
        {"batch_size": 0},
        {"precision": "float8"},
        {"starting_run": "some-run"},
        {"moments_from": "some-run"},
        {"logit_scale": 2.0},
        {"logit_scale": 0.0},
        {"angle": -1},
        {"angle": 1, "switches": "one_angle"},
        {"angle": 1, "transform": "rotation"},
        {"method": "SemiCT"},
    ],
)
def test_impossible_configurations_are_refused(run, change):
    with pytest.raises(ValueError, match=next(iter(change)) if "method" not in change else "Semi"):
        dataclasses.replace(run, **change)


def write_module(tmp_path, name, source):
    """Import `source` as a module whose functions can be inspected."""
    path = tmp_path / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SOURCE = '''
import functools
import helpers
import numpy as np
import tensorflow as tf
import types
FACTOR = 2
SIGMA = 0.1
SCALES = [1, 2]
WEIGHTS = np.ones(3)
width = 5

KINDS = {1}
PLACE = tf.constant(1)
SMALL = np.float32(1)
NAMES = types.SimpleNamespace(x=1)
total = 7

def used(x, sigma=SIGMA):
    total = x * FACTOR
    return total + SCALES[0] + WEIGHTS[0] + len(KINDS) + PLACE + SMALL + NAMES.x

def unused(x):
    return x

def make(number):
    def inner(x):
        return x + number
    return inner

table = {"first": lambda x: x + 1,
         "second": lambda x: x}

class Base:
    kind = "a"

    @staticmethod
    def helper(x):
        return x

class Model(Base):
    def step(self, x):
        """Docstring."""
        return helpers.duration(used(self.width)) + closure(x) + table["first"](x) + part(x)  # comment

closure = make(1)
part = functools.partial(used, sigma=0.3)

def build():
    return Model()
'''


@pytest.mark.parametrize(
    "old, new, same",
    [
        ("# comment", "# another", True),
        ("Docstring.", "Another.", True),
        ("x * FACTOR", "(x*FACTOR)", True),
        ("def unused(x):\n    return x", "def unused(x):\n    return 2 * x", True),
        ("total = 7", "total = 8", True),  # the code has a variable of its own of that name
        ("width = 5", "width = 6", True),  # the code uses an attribute of that name only
        ("x * FACTOR", "x + FACTOR", False),
        ("FACTOR = 2", "FACTOR = 3", False),
        ("SIGMA = 0.1", "SIGMA = 0.2", False),
        ("SCALES = [1, 2]", "SCALES = [2, 2]", False),
        ("KINDS = {1}", "KINDS = {1, 2}", False),
        ("PLACE = tf.constant(1)", "PLACE = tf.constant(2)", False),
        ("SMALL = np.float32(1)", "SMALL = np.float32(2)", False),
        ("types.SimpleNamespace(x=1)", "types.SimpleNamespace(x=2)", False),
        ("np.ones(3)", "np.zeros(3)", False),
        ("make(1)", "make(2)", False),
        ("lambda x: x + 1", "lambda x: x + 2", False),
        ('kind = "a"', 'kind = "b"', False),
        ("def helper(x):\n        return x", "def helper(x):\n        return -x", False),
        ("sigma=0.3", "sigma=0.4", False),
        ("helpers.duration(used(self.width))", "used(self.width)", False),
    ],
)
def test_the_fingerprint_follows_the_code_that_runs(tmp_path, old, new, same):
    before = write_module(tmp_path, "code", SOURCE)
    first = helpers.fingerprint(before.build)
    assert old in SOURCE and first == helpers.fingerprint(before.build)
    (tmp_path / "edited").mkdir()
    after = write_module(tmp_path / "edited", "code", SOURCE.replace(old, new))
    assert (helpers.fingerprint(after.build) == first) == same


def test_code_without_source_is_told_by_what_it_does(method):
    def compiled(names):
        return eval(f"lambda images, seed: tf.map_fn(lambda image: image.{names}, images)", {"tf": tf})

    one, again, another = (helpers.fingerprint(compiled(name)) for name in ("shape", "shape", "dtype"))
    assert one == again != another


def test_a_partial_transform_has_a_fingerprint_of_its_own(method):
    weak, strong = (functools.partial(method.gaussian_noise, sigma=sigma) for sigma in (0.1, 0.2))
    assert helpers.fingerprint(weak) != helpers.fingerprint(strong)


def test_the_fingerprint_reaches_the_whole_method(method):
    names = {name.rsplit(".", 1)[1] for name in helpers.reachable(method.build_model, method.random_rotation)}
    expected = {"ConsistencyModel", "build_network", "symmetric_kl", "kl_divergence", "label_log_probabilities"}
    assert expected | {"rotation_maps", "cubic_warp", "BatchNormalization"} <= names
    assert "gaussian_noise" not in names


def test_xla_is_chosen_for_a_transform_that_uses_arrays():
    tints, strengths = np.linspace(-0.1, 0.1, 3), tf.constant([0.5, 1.0])

    def tint(images, seed):
        return images + strengths[seed[0] % 2] * tints

    assert helpers.jit_choice(tint) == "auto"


# --------------------------------------------------------------------------------- tables, figures


EPOCH = ("loss", "val_loss", "accuracy", "val_accuracy", "val_consistency")


@pytest.fixture
def record(run):
    epochs = [{name: 0.5 + 0.01 * k for name in EPOCH} for k in range(3)]
    return {
        "id": run.id,
        "fingerprint": "0123abcd",
        "preset": "smoke",
        "configuration": dataclasses.asdict(run),
        "metrics": dict.fromkeys(helpers.METRICS, 0.5),
        "history": epochs,
        "seconds": 3.0,
        "environment": helpers.environment(),
        "date": "2026-11-23",
    }


def with_metrics(record, seed=0, **metrics):
    """The record of another seed with other metrics."""
    configuration = record["configuration"] | {"seed": seed, "test": 10000}
    return record | {"configuration": configuration, "metrics": record["metrics"] | metrics}


def test_table_1_shows_every_number_of_the_report_beside_ours(record):
    seeds = [with_metrics(record, seed, accuracy=0.7 + 0.1 * seed, loss=0.5 + seed) for seed in (0, 1)]
    key = ("shift", "SemiC")
    table = helpers.table_1({"shipped": {key: seeds}, "yours": {key: [record]}})
    cells = {row[:2]: row[2:] for row in table.rows}
    assert len(cells) == 12 and "Accuracy: report | shipped | yours" in table.header
    assert cells[key] == (
        "reported (n = 2) | reported",
        "0.84 | 1 ± 0.707 | 0.5",
        "0.76 | 0.5 ± 0 | 0.5",
        "0.08 | 0.5 ± 0 | 0.5",
        "74.8% | 75.0% ± 7.1% | 50.0% ▼",
        "88.7% | 50.0% ± 0.0% ▼ | 50.0% ▼",
    )
    assert cells["noise", "Supervised"][1] == "– | not run | not run"
    assert cells["noise", "SemiCT"][4] == "0.1% (10%) | not run | not run"
    by_recipe = {row[:2]: row[2:] for row in helpers.accuracy_table({"shipped": {key: seeds}, "yours": {}}).rows}
    assert by_recipe[key] == ("74.8%", "75.0% ± 7.1% (n = 2)", "not run")


def test_gains_are_those_of_pairs_with_the_same_seed(record):
    def one(method, seed, accuracy, agreement):
        configuration = record["configuration"] | {"method": method, "seed": seed}
        return {"configuration": configuration, "metrics": {"accuracy": accuracy, "consistency": agreement}}

    found = {
        ("shift", "Supervised"): [one("Supervised", 2, 0.6, 0.7), one("Supervised", 0, 0.5, 0.75)],
        ("shift", "SemiC"): [one("SemiC", seed, 0.55, 0.8) for seed in (0, 1, 2)],
        ("noise", "SemiC"): [one("SemiC", 0, 0.4, 0.9)],
    }
    np.testing.assert_allclose(helpers.paired_gains(found, "shift"), [5, -5])
    assert helpers.gains_table({"ours": found, "none": {}}).rows == [
        ("ours", "shift", 0, "50.0%", "55.0%", "+5.0", "+5.0"),
        ("ours", "shift", 2, "60.0%", "55.0%", "-5.0", "+10.0"),
    ]


def test_a_pair_is_two_trainings_on_one_device(record):
    def trained(method, device, accuracy, repeats=()):
        one = with_metrics(record, accuracy=accuracy) | {"row": {"device": device}, "repeats": list(repeats)}
        return one | {"configuration": one["configuration"] | {"method": method}}

    again = [trained("Supervised", "two", 0.6), trained("Supervised", "three", 0.7)]
    supervised = trained("Supervised", "one", 0.5, again)
    for device, gain in (("one", 15), ("two", 5), ("three", -5), ("four", 15)):
        semic = trained("SemiC", device, 0.65)
        found = {("shift", "SemiC"): [semic], ("shift", "Supervised"): [supervised]}
        assert helpers.paired_gains(found, "shift") == pytest.approx([gain])
        assert helpers.gains_table({"": found}).rows[0][5] == f"{gain:+.1f}"
        evidence = helpers.Evidence(found)
        assert evidence.beats("shift", "SemiC", "Supervised") == (gain > 0)


def test_tables_escape_what_they_show():
    table = helpers.Table(("<a>",), [("1 < 2",)], caption="a & b")
    assert "&lt;a&gt;" in table._repr_html_() and "a &amp; b" in table._repr_html_()
    assert repr(table).splitlines() == ["a & b", "<a>", "1 < 2"]


def test_published_records_keep_one_row_a_run(tmp_path, record):
    another = record | {"id": "another"}
    helpers.publish([record, another], tmp_path)
    helpers.publish([record | {"fingerprint": "other", "seconds": 4.0}], tmp_path)
    rows = helpers.read_csv(tmp_path / "runs.csv")
    assert [(row["id"], row["fingerprint"]) for row in rows] == [("another", "0123abcd"), (record["id"], "other")]
    assert [row["seconds"] for row in rows] == ["3.0", "4.0"] and rows[0]["recipe"] == "reported"
    wanted = "id recipe preset transform method seed width epochs labeled unlabeled loss loss_supervised".split()
    wanted += "loss_consistency accuracy accuracy_clean accuracy_transformed consistency seconds device date".split()
    assert set(wanted) <= rows[0].keys() and all(rows[0][name] for name in wanted)
    curves = helpers.read_csv(tmp_path / "curves.csv")
    assert [(curve["fingerprint"], curve["epoch"]) for curve in curves] == [
        (fingerprint, epoch) for fingerprint in ("0123abcd", "other") for epoch in "123"
    ]
    assert [float(curve["val_loss"]) for curve in curves[3:]] == [epoch["val_loss"] for epoch in record["history"]]


def test_a_row_from_before_a_field_was_added_gets_its_default(tmp_path, record):
    helpers.publish([record], tmp_path)
    path, columns = tmp_path / "runs.csv", [name for name in helpers.RUN_COLUMNS if name != "angle"]
    rows = [{name: row[name] for name in columns} for row in helpers.read_csv(path)]
    path.write_text("\n".join([",".join(columns), *(",".join(row.values()) for row in rows)]) + "\n")
    older = {name: value for name, value in record["configuration"].items() if name != "angle"}
    helpers.publish([record | {"id": "another", "configuration": older}], tmp_path)
    assert [row["angle"] for row in helpers.read_csv(path)] == ["0", "0"]


def test_repeats_are_told_beside_the_first_and_do_not_replace_it(tmp_path, record):
    helpers.publish([record], tmp_path)
    elsewhere = {"environment": record["environment"] | {"device": "another processor"}}
    for accuracy, where in ((0.1, {}), (0.2, elsewhere), (0.3, elsewhere)):
        helpers.publish_repeats([with_metrics(record, accuracy=accuracy) | where], tmp_path)
    rows, repeats = (helpers.read_csv(tmp_path / f"{name}.csv") for name in ("runs", "repeats"))
    assert [float(row["accuracy"]) for row in rows] == [record["metrics"]["accuracy"]]
    assert [(float(row["accuracy"]), row["device"]) for row in repeats][1:] == [(0.3, "another processor")]
    table = helpers.repeats_table(repeats, [rows[0] | {"accuracy": "0.2"}], "Twice")
    assert [row[-3:] for row in table.rows] == [
        (repeats[0]["device"], "10.0%", "-10.0"),
        ("another processor", "30.0%", "+10.0"),
    ]
    assert "2 runs, half of them at most 10.0 points apart, all at most 10.0" in repr(table)


def test_a_run_of_another_device_does_not_replace_one_that_others_may_have_started_from(tmp_path, record):
    environment = record["environment"]
    for accuracy, device in ((0.1, "one"), (0.2, "two"), (0.3, "two"), (0.4, "one")):
        here = {"environment": environment | {"device": device}}
        helpers.publish([with_metrics(record, accuracy=accuracy) | here], tmp_path)
    rows, repeats, curves, repeated = (
        helpers.read_csv(tmp_path / f"{name}.csv") for name in ("runs", "repeats", "curves", "repeats_curves")
    )
    assert [(row["device"], row["accuracy"]) for row in rows] == [("one", "0.4")]
    assert [(row["device"], row["accuracy"]) for row in repeats] == [("two", "0.3")]
    assert [(row["device"], row["epoch"]) for row in repeated] == [("two", epoch) for epoch in "123"]
    assert [row["val_loss"] for row in repeated] == [row["val_loss"] for row in curves] and len(curves) == 3


def test_a_continuation_is_shown_from_the_training_that_it_started_from():
    def record(name, device, losses, **more):
        history = [{"loss_supervised": loss, "val_loss_supervised": loss} for loss in losses]
        history = [
            epoch | {"val_accuracy": 0, "val_largest_class": 0, "val_prediction_entropy": 0} for epoch in history
        ]
        configuration = {"starting_run": "", "steps": 5} | more
        return {"id": name, "row": {"device": device}, "history": history, "configuration": configuration}

    start = record("start", "here", [1])
    for repeats, told, steps in (
        ([], "–", [5]),
        ([record("start", "there", [])], "–", [5]),
        ([record("start", "there", [2])], "2.00", [0, 5]),
    ):
        records = {
            ("shift", "start"): start | {"repeats": repeats},
            ("shift", "way"): record("way", "there", [3], starting_run="start"),
        }
        ((name, before, *_),) = helpers.survival_table(records).rows
        assert (name, before) == ("way", told)
        (line,) = helpers.show_shares(records, "title").axes[0].lines
        assert line.get_xdata().tolist() == steps and line.get_ydata()[-1] == 3


def test_what_goes_on_is_told_beside_the_step_one_that_it_started_from(record):
    start, without, full = (
        with_metrics(record, accuracy=accuracy, consistency=0.5) | {"id": name, "row": {"device": "here"}}
        for name, accuracy in (("one", 0.1), ("two", 0.2), ("three", 0.25))
    )
    names = ("step one", "without", "full")
    elsewhere = full | {"row": {"device": "there"}}
    found = {"shift": (start, without, full), "rotation": (start, without, elsewhere), "noise": (start, None, None)}
    records = {(key, name): one for key, three in found.items() for name, one in zip(names, three, strict=True)}
    again = [
        with_metrics(record, accuracy=accuracy, consistency=0.75) | {"row": {"device": device}}
        for accuracy, device in ((0, "nowhere"), (0.15, "there"))
    ]
    records["rotation", "step one"] = start | {"repeats": again}
    table = helpers.continuation_table(records)
    assert table.rows == [
        ("shift", "10.0% | 50.0%", "20.0% | 50.0%", "25.0% | 50.0%", "+5.0"),
        ("rotation", "15.0% | 75.0%", "20.0% | 50.0%", "25.0% | 50.0%", "–"),
        ("noise", "10.0% | 50.0%", "not run", "not run", "–"),
    ]
    records["rotation", "step one"] = start  # which is not the one that the last way started from
    assert helpers.continuation_table(records).rows[1][1] == "–"
    assert "no record" in repr(helpers.continuation_table(dict.fromkeys(records), "Going on"))


def test_records_published_at_once_are_all_kept(tmp_path, record):
    names = [f"run-{number}" for number in range(8)]
    threads = [
        threading.Thread(target=helpers.publish, args=([record | {"id": name}], tmp_path), daemon=True)
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    rows, curves = (helpers.read_csv(tmp_path / name) for name in ("runs.csv", "curves.csv"))
    assert {row["id"] for row in rows} == {curve["id"] for curve in curves} == set(names)
    assert {path.name for path in tmp_path.iterdir()} == {"runs.csv", "curves.csv"}


def test_claims_are_judged_by_the_records(method, record):
    def claim(accuracies, largest=0.3, entropy=0.0):
        other = {"largest_class": largest, "prediction_entropy": entropy}
        records = {key: [with_metrics(record, accuracy=value, **other)] for key, value in accuracies.items()}
        return {row[0]: row[1].split()[0] for row in helpers.check_claims(method.claims, {"us": records}, "").rows}

    report = {key: printed[3] for key, printed in helpers.REPORT_TABLE.items()}
    assert claim(report)["SemiC beats Supervised for shift"] == "✓"
    best = "SemiCT is the best method for shift"
    assert claim(report)[best] == "?"  # 1.1 points better than SemiCTE
    assert claim(report | {("shift", "SemiCT"): 0.78})[best] == "✓"
    assert claim(report | {("shift", "SemiCTE"): 0.79})[best] == "✗"
    assert claim(report)["SemiCT collapses for noise"] == "✗"  # not all answers are one class
    assert claim(report, 1.0)["SemiCT collapses for noise"] == "✓"
    assert claim(report, 1.0, 2.0)["SemiCT collapses for noise"] == "✗"  # one class, but not surely
    assert claim(report)["SemiCTE beats Supervised for noise (by 1.0 there)"] == "?"  # within the margin
    slow = "SemiC does not converge at the low learning rate (here: ends below)"
    assert claim(report)[slow] == "·"
    assert claim(report | {("shift", "SemiC, slow"): 0.2})[slow] == "✓"
    assert claim(report | {("shift", "SemiC"): 0.69})["SemiC beats Supervised for shift"] == "?"
    assert claim(report | {("shift", "SemiC"): 0.6})["SemiC beats Supervised for shift"] == "✗"
    assert claim({}) and all(verdict == "·" for verdict in claim({}).values())


def test_a_difference_over_seeds_is_taken_seed_by_seed(record):
    def beats(one, other):
        sides = {
            ("shift", name): [with_metrics(record, seed, accuracy=value) for seed, value in enumerate(values)]
            for name, values in (("SemiC", one), ("Supervised", other))
        }
        return helpers.Evidence(sides).beats("shift", "SemiC", "Supervised")

    def unsure(one, other):
        with pytest.raises(helpers.Undecided, match="SemiC and Supervised for shift"):
            beats(one, other)
        return True

    assert beats([0.60, 0.50, 0.70], [0.58, 0.48, 0.68])  # the seeds differ much, their differences do not
    assert unsure([0.60, 0.50, 0.70], [0.55, 0.52, 0.64])  # a mean of 3 points that the seeds do not agree on
    assert unsure([0.51, 0.51, 0.51], [0.50, 0.50, 0.50])  # within the error of the test set, which all seeds share
    assert unsure([0.55, 0.57], [0.53, 0.53])  # two seeds say little: 2 and 4 points may be none
    assert beats([0.55, 0.551], [0.53, 0.53]) and not beats([0.53, 0.53], [0.55, 0.551])
    # Two standard errors of one seed are 1.4 points.
    assert unsure([0.513], [0.50]) and unsure([0.50], [0.513]) and beats([0.515], [0.50])
    with pytest.raises(helpers.NotRun, match="SemiC for shift"):
        beats([], [0.5])
    sides = {("shift", name): [with_metrics(record, seed)] for seed, name in enumerate(("SemiC", "Supervised"))}
    with pytest.raises(helpers.NotRun, match="same seed"):
        helpers.Evidence(sides).beats("shift", "SemiC", "Supervised")


def test_stagnation_is_where_accuracy_stops_rising():
    rising = [{"val_accuracy": min(0.6, 0.05 * epoch)} for epoch in range(40)]
    assert 12 <= helpers.stagnation_epoch(rising) <= 15
    assert helpers.stagnation_epoch(rising[:1]) == 1


def test_figures_say_what_they_show(data, record, method):
    images = data.labeled_images[:10] / 255
    figures = [
        helpers.show_classes(data),
        helpers.show_transform(images, images, "a title" + data.caption),
        helpers.show_curves([record], "curves" + data.caption, mark_stagnation=True),
        helpers.show_accuracy(
            {"us": {("shift", "SemiC"): [record, with_metrics(record, 1)]}}, "accuracy" + data.caption
        ),
    ]
    for figure in figures:
        assert "not CIFAR-10" in figure.get_suptitle()
        figure.canvas.draw()
    assert not plt.get_fignums()
    assert figures[2].axes[0].get_xlabel() == "epoch" and "nats" in figures[2].axes[0].get_ylabel()


def test_figures_have_alternative_texts(record, monkeypatch):
    registered = {}
    shell = types.SimpleNamespace(for_type=registered.__setitem__)
    formatters = types.SimpleNamespace(formatters={"image/png": shell})
    monkeypatch.setattr(helpers, "get_ipython", lambda: types.SimpleNamespace(display_formatter=formatters))
    figure = helpers.show_curves([record], "Some curves")
    picture, told = registered[type(figure)](figure)
    assert picture.startswith(b"\x89PNG")
    assert told["alt"] == (
        "Some curves. Panels: SemiC, shift loss (nats) by epoch; accuracy by epoch. Lines: training; validation."
    )


def test_curves_that_differ_in_their_rate_are_told_apart(record):
    slow = record | {"configuration": record["configuration"] | {"learning_rate": 1e-5}}
    axes = helpers.show_curves([record, slow], "Two rates").axes
    assert [axis.get_title() for axis in axes[:2]] == ["SemiC, shift, rate 0.001", "SemiC, shift, rate 1e-05"]


def test_the_curve_table_reads_the_curves(record):
    losses = [1.0, 0.4, 0.7]
    epochs = [dict.fromkeys(EPOCH, 0.5) | {"val_loss": loss} for loss in losses]
    row = helpers.curve_table([record | {"history": epochs}]).rows[0]
    assert row[0] == "SemiC, shift, rate 0.001" and row[2:4] == ("0.40 (epoch 2)", "0.70") and row[4] == "50.0%"


ACCURACIES = {
    (seed, state, method): value
    for state, values in {"released": (0.50, 0.60, 0.52, 0.58), "reported": (0.60, 0.64, 0.62)}.items()
    for (seed, method), value in zip(
        ((0, "Supervised"), (0, "SemiC"), (1, "Supervised"), (1, "SemiC")), values, strict=False
    )
}


def test_the_attribution_compares_seed_by_seed():
    rows = helpers.attribution_table(ACCURACIES | {(0, "not yet", "SemiC"): None}).rows
    assert rows[2] == ("not yet", "not run", "not run", "not run", 0)
    assert rows[0] == ("released", "51.0% ± 1.4%", "59.0% ± 1.4%", "+8.0% ± 2.8%", 2)
    assert rows[1] == ("reported", "61.0% ± 1.4%", "64.0%", "+4.0%", 1)
    _, right = helpers.show_attribution(ACCURACIES, "title").axes
    means = [line.get_ydata() for line in right.lines if line.get_label() == "SemiC − Supervised"]
    np.testing.assert_allclose(means[0], [0.08, 0.04])
    assert helpers.spread([]) == "not run"
    assert "no record" in repr(helpers.show_attribution(dict.fromkeys(ACCURACIES), "title"))
    assert helpers.spread([-0.0004], signed=True) == "+0.0%"


def test_the_survival_table_counts_collapses():
    def ended(largest, entropy):
        last = {"val_largest_class": largest, "val_prediction_entropy": entropy}
        last |= {"val_loss_supervised": 14.04, "val_accuracy": 0.25}
        configuration = {"starting_run": "start", "steps": 5}
        return {"id": "way", "history": [last | {"loss_supervised": 0}], "configuration": configuration}

    start = {"id": "start", "history": [{"loss_supervised": 0.125}], "configuration": {"starting_run": "", "steps": 0}}
    records = {(1, "a"): ended(1.0, 0.0), (0, "a"): ended(0.5, 0.0), (0, "b"): ended(1.0, 2.0), (0, "one"): start}
    assert helpers.survival_table(records).rows == [
        ("a", "0.12, 0.12", "1 of 2", "14.0, 14.0", "25%, 25%"),
        ("b", "0.12", "0 of 1", "14.0", "25%"),
    ]
    panels = {"first": ("a",), "second": ("b",), "third": ("a", "b"), "fourth": ("b",)}
    axes = helpers.show_survival(records, panels, "title").axes
    assert [axis.get_title() for axis in axes] == list(panels)
    assert [len(axis.lines) for axis in axes] == [3, 2, 4, 2]  # and the loss of a constant prediction
    looks = [(line.get_color(), line.get_linestyle()) for line in axes[2].lines[:3]]
    assert looks == [(helpers.WAY_COLORS[0], style) for style in ("-", "-", "--")]  # one state, a style a way


def test_continuations_are_shown_from_where_they_start():
    def record(name, losses, start=""):
        history = [{"val_loss_supervised": loss, "val_accuracy": loss / 10} for loss in losses]
        return {"id": name, "history": history, "configuration": {"starting_run": start, "steps": 5}}

    records = {(transform, "step one"): record(f"one-{transform}", (9, 2)) for transform in ("noise", "shift")}
    records["noise", "half"] = record("a", (3, 4), "one-noise")
    records["shift", "few"] = record("b", (5,), "one-shift")
    axes = helpers.show_shares(records, "title").axes
    lines = [
        [(line.get_label(), line.get_xdata().tolist(), list(line.get_ydata())) for line in axis.lines] for axis in axes
    ]
    assert lines[0] == [("half", [0, 5, 10], [2, 3, 4])] and lines[1] == [("few", [0, 5], [2, 5])]
    records |= {("shift", f"way {number}"): record("c", (5,), "one-shift") for number in range(8)}
    with pytest.raises(ValueError, match="There are 10 ways, and a figure can tell 9 apart"):
        helpers.show_shares(records, "title")
    for known in ({}, {"few": record("b", (5,), "one-shift")}):  # nothing, or nothing of what it starts from
        keyed = {("shift", name): found for name, found in known.items()}
        shown = [helpers.show_ways(known, "title"), helpers.show_shares(keyed, "title")]
        shown += [helpers.survival_table(keyed, "title"), helpers.show_survival(keyed, {}, "title")]
        assert all("title: no record" in repr(one) for one in shown)
    assert lines[2][0][2] == [0.2, 0.3, 0.4] and [axis.get_title() for axis in axes[:2]] == ["noise", "shift"]


def test_methods_are_compared_after_as_many_updates(record):
    def run(method, steps, accuracies):
        configuration = record["configuration"] | {"method": method, "steps": steps, "labeled": 4000}
        history = [{"val_accuracy": accuracy} for accuracy in accuracies]
        return {"configuration": configuration, "history": history}

    records = {"a": run("SemiC", 30, (0.2, 0.6)), "b": run("Supervised", 10, (0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.9))}
    (axis,) = helpers.show_by_updates(records, "title", {15: "here"}).axes
    lines = {line.get_label(): line.get_data() for line in axis.lines}
    np.testing.assert_allclose(lines["SemiC"], [[30, 60], [0.2, 0.6]])
    np.testing.assert_allclose(lines["Supervised"], [[30, 60], [0.2, 0.6]])  # the seventh epoch begins another part
    assert list(lines["here"][0]) == [15, 15]
    assert "no record" in repr(helpers.show_by_updates({}, "title", {}))


def test_refinements_are_judged_by_the_last_epochs(record):
    epochs = [{"val_accuracy": value, "val_consistency": 0.8} for value in (0.1, *[0.5] * 9, 0.6)]
    records = {("reported", "Supervised"): None, ("reported", "SemiC"): {"history": epochs}, ("ramp_up", "SemiC"): None}
    assert helpers.refinement_table(records).rows == [
        ("reported", "not run", "not run", "60.0%", "51.0% ± 3.2%", "80.0%"),
        ("ramp_up", "–", "–", "not run", "not run", "not run"),  # it does not apply to Supervised
    ]


def test_runs_that_differ_in_rate_or_epochs_are_told_apart(record):
    fast = helpers.Configuration(**record["configuration"])
    slow, other = dataclasses.replace(fast, learning_rate=1e-5), dataclasses.replace(fast, transform="noise")
    assert helpers.told_apart([fast, other]) == ["SemiC, shift", "SemiC, noise"]
    assert helpers.told_apart([fast, slow]) == ["SemiC, shift, rate 0.001", "SemiC, shift, rate 1e-05"]
    long = dataclasses.replace(fast, epochs=90)
    assert helpers.told_apart([fast, long]) == [f"SemiC, shift, {fast.epochs} epochs", "SemiC, shift, 90 epochs"]


def test_the_time_left_leaves_out_what_needs_no_training(record):
    run = helpers.Configuration(**record["configuration"])
    status = helpers.LiveStatus([1, 2], 2, [run, dataclasses.replace(run, seed=1)])
    status.start(0, run.epochs)
    status.trained_pairs, status.spent, status.compiling = run.pairs, 60.0, [2.0]
    assert status.time_left() == "62 s left"
    status.settled = {1}
    assert status.time_left() == "0 s left"


def test_durations_are_said_as_people_do():
    assert [helpers.duration(s) for s in (3, 89, 600, 9000)] == ["3 s", "89 s", "10 min", "2.5 h"]


def test_the_preview_draws_for_every_value(data, method):
    preview = helpers.transform_preview(helpers.sample_pictures(data), method.TRANSFORMS)
    (choice, strength, draw), shown = preview.children[0].children, preview.children[1]
    seen = {bytes(shown.value)}
    for name, factor, number in (("shift", 1.0, 0), ("rotation", 1.0, 0), ("rotation", 0.5, 0), ("rotation", 0.5, 3)):
        choice.value, strength.value, draw.value = name, factor, number
        assert bytes(shown.value).startswith(b"\x89PNG")
        seen.add(bytes(shown.value))
    assert len(seen) == 5


def test_pictures_can_be_generated_instead(data, monkeypatch):
    own = helpers.sample_pictures(data)
    np.testing.assert_array_equal(own.images, data.labeled_images[:10])
    monkeypatch.setenv("REPRODUCTION_PICTURES", "generated")
    real = types.SimpleNamespace(**vars(data) | {"name": "cifar10", "caption": ""})
    replaced = helpers.sample_pictures(real)
    assert replaced.images.shape == (10, 32, 32, 3) and "generated" in replaced.caption


# ---------------------------------------------------------------------------------------- results/


def test_the_mean_of_distributions_is_summed_up(method, random):
    probabilities = random.dirichlet(np.ones(10), size=(3, 40)).astype(np.float32)
    measured = helpers.MeasuredModel(method.build_network(2)).measured
    largest, entropy = (measured[name] for name in ("largest_class", "prediction_entropy"))
    for batch in probabilities:
        largest.update_state(batch)
        entropy.update_state(batch)
    mean = probabilities.reshape(-1, 10).mean(axis=0)
    assert float(largest.result()) == pytest.approx(mean.max(), rel=1e-5)
    assert float(entropy.result()) == pytest.approx(-(mean * np.log(mean)).sum(), rel=1e-5)
    collapsed = tf.one_hot(tf.zeros(5, tf.int32), 10)
    largest.reset_state()
    entropy.reset_state()
    largest.update_state(collapsed)
    entropy.update_state(collapsed)
    assert float(largest.result()) == 1 and float(entropy.result()) == 0


def test_shipped_records_are_found_in_whatever_number_type_they_were_made(method, tiny, tmp_path, monkeypatch):
    def runs(precision):
        tiny.precision = precision
        return {name: method.plan(name, "shift", tiny) for name in ("Supervised", "SemiC")}

    made = runs("mixed_bfloat16")["SemiC"]
    history = [{"val_accuracy": 0.1}, {"val_accuracy": 0.25}]
    record = {
        "id": made.id,
        "fingerprint": "abc",
        "preset": "smoke",
        "configuration": dataclasses.asdict(made),
        "metrics": dict.fromkeys(helpers.METRICS, 0.5),
        "history": history,
        "seconds": 1.0,
        "environment": helpers.environment(),
        "date": "2026-11-23",
    }
    helpers.publish([record], tmp_path)
    monkeypatch.setattr(helpers, "shipped", lambda name: helpers.read_csv(tmp_path / name))
    found = helpers.shipped_records(runs)
    assert found.keys() == {"SemiC"}
    for key in ("id", "configuration", "metrics", "history"):
        assert found["SemiC"][key] == record[key]
    assert found["SemiC"]["row"]["recipe"] == "reported"


def test_the_grid_is_sorted_by_recipe_and_experiment(monkeypatch):
    names = [("reported", "shift", "SemiC", seed) for seed in (2, 0)] + [("released", "noise", "SemiCT", 0)]
    monkeypatch.setattr(helpers, "shipped_records", lambda runs: {name: str(name) for name in runs})
    grid = helpers.shipped_grid(names)
    assert grid["reported"] == {("shift", "SemiC"): [str(names[1]), str(names[0])]}
    assert grid["released"] == {("noise", "SemiCT"): [str(names[2])]}


def test_estimated_times_follow_from_the_benchmark(monkeypatch):
    measured = {"operations_per_image": 1e9, "peak_fraction": 0.5, "date": "2026-11-23"}
    measured["environment"] = {"device": "a processor", "cores": "2"}
    monkeypatch.setattr(helpers, "shipped", lambda name: measured)
    table = helpers.estimate_times({"a run": 1_800_000}, {"X": 2.0})  # 3.6e15 operations at 1 and a third TFLOP/s
    assert [row[0] for row in table.rows] == ["X", "X"] and [row[-1] for row in table.rows] == ["60 min", "3.0 h"]
    assert "ESTIMATE" in table.caption and "a processor" in table.caption
    monkeypatch.setattr(helpers, "shipped", lambda name: None)
    assert "needs the folder results/" in helpers.estimate_times({"a run": 1}, {"X": 2.0}).caption


def test_a_table_is_written_as_csv_markdown_and_latex():
    table = helpers.Table(("a", "b | c"), [("1,5", "10 % ▲"), (2, "x_1")], "Caption & more")
    assert table.csv() == 'a,b | c\n"1,5",10 % ▲\n2,x_1\n'
    assert table.markdown() == "Caption & more\n\n| a | b \\| c |\n| --- | --- |\n| 1,5 | 10 % ▲ |\n| 2 | x_1 |\n"
    latex = table.latex()
    assert r"1,5 & 10 \% $\blacktriangle$ \\" in latex and r"\caption{Caption \& more}" in latex
    assert r"2 & x\_1 \\" in latex and r"a & b \textbar{} c \\" in latex


def test_the_export_holds_the_tables_and_every_figure_that_was_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(helpers, "FIGURES", {})
    helpers.show_throw(np.arange(1, 5), np.ones(4))
    title = "A constant gradient after restored moments that are almost 0"
    written = helpers.export({"table-1": helpers.Table(("a",), [(1,)])}, tmp_path / "export")
    name = title.lower().replace(" ", "-")
    files = {path.name: path.read_bytes() for path in (tmp_path / "export").iterdir()}
    assert files.keys() == {"table-1.csv", "table-1.md", "table-1.tex", f"{name}.png", f"{name}.pdf"}
    assert files[f"{name}.png"].startswith(b"\x89PNG") and files[f"{name}.pdf"].startswith(b"%PDF")
    assert title in repr(written) and "2 tables and figures" in written.caption
    for transform in ("noise", "shift"):  # titles that differ at their ends
        helpers.show_path([0], {"SemiC": [1.0]}, "pixels", f"{title}, {transform}")
    files = [row[0] for row in helpers.export({}, tmp_path / "export").rows]
    assert len(set(files)) == 3


def test_a_confusion_matrix_shows_shares_of_the_true_class():
    labels, answers = np.array([0, 0, 0, 1]), {"SemiC": np.array([0, 0, 1, 1])}
    figure = helpers.show_confusion(answers, labels, ("a", "b"), "Confusions")
    axis = figure.axes[0]
    np.testing.assert_allclose(axis.images[0].get_array(), [[2 / 3, 1 / 3], [0, 1]], atol=1e-6)
    assert "none of these networks" in repr(helpers.show_confusion({}, labels, ("a", "b"), "Confusions"))
    assert [text.get_text() for text in axis.texts] == ["67%", "100%"] and axis.get_title() == "SemiC"


def test_a_path_shows_every_method_and_every_step():
    figure = helpers.show_path(range(3), {"Supervised": [1, 0.5, 0.2], "SemiC": [1, 1, 0.9]}, "pixels", "Path")
    assert [line.get_ydata().tolist() for line in figure.axes[0].lines] == [[1, 0.5, 0.2], [1, 1, 0.9]]
    probabilities = {"Supervised": np.eye(8)[:3], "SemiC": np.eye(8)[[0, 0, 0]]}
    one = helpers.show_path_of_one(range(3), np.zeros((3, 4, 4, 3)), probabilities, "abcdefgh", "degrees", "One")
    assert len(one.axes) == 5 and [len(axis.lines) for axis in one.axes[3:]] == [6, 6]
    assert [text.get_text() for text in one.legends[0].get_texts()][:3] == ["a", "b", "c"]
