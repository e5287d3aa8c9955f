"""Bad input is refused with what was given, what is allowed and what to do; properties that hold for all good input."""

import ast
import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import grid
import hypothesis
import nbformat
import notebook
import numpy as np
import pytest
import tensorflow as tf
import test_helpers
from hypothesis import strategies

import helpers

PICTURES = np.full((4, 32, 32, 3), 0.5, np.float32)
SEED = (3, 4)


@pytest.fixture
def run(method, tiny):
    return method.plan("SemiC", "noise", tiny, "shapes")


def settings(method, **changes):
    return notebook.preset_settings(method, "smoke", **changes)


def split(shapes, **changes):
    """A split of the shapes after changes to its arrays or ranges."""
    (images, labels), (test_images, test_labels) = shapes
    arrays = {"images": images, "labels": labels, "test_images": test_images, "test_labels": test_labels}
    arrays |= {name: change(arrays[name]) for name, change in changes.items() if name in arrays}
    ranges = grid.RANGES | {name: bounds for name, bounds in changes.items() if name in grid.RANGES}
    train, test = (arrays["images"], arrays["labels"]), (arrays["test_images"], arrays["test_labels"])
    return helpers.split("shapes", (train, test), ranges)


# Each: what is done, with (method, run, shapes, data); what the message says was given; what it says is allowed.
CASES = {
    # settings
    "unknown preset": (lambda m, run, *_: notebook.preset_settings(m, "huge"), "'huge'", "smoke, quick"),
    "unknown setting": (lambda m, *_: settings(m, learning_speed=1.0), "'learning_speed'", "learning_rate"),
    "unknown recipe": (lambda m, *_: settings(m, recipe="secret"), "'secret'", "reported, released"),
    "unknown precision": (lambda m, *_: settings(m, precision="float8"), "'float8'", "float32"),
    "rate of 0": (lambda m, *_: settings(m, learning_rate=0), "learning_rate is 0", "from 1e-12 to 1"),
    "rate above 1": (lambda m, *_: settings(m, fine_tuning_rate=3.0), "fine_tuning_rate is 3.0", "from 1e-12 to 1"),
    "rate as text": (lambda m, *_: settings(m, learning_rate="fast"), "'fast'", "number from"),
    "rate NaN": (lambda m, *_: settings(m, learning_rate=np.nan), "is nan", "from 1e-12 to 1"),
    "negative weight": (lambda m, *_: settings(m, consistency_weight=-1.0), "is -1.0", "from 0 to 1000"),
    "infinite weight": (lambda m, *_: settings(m, consistency_weight=np.inf), "is inf", "from 0 to 1000"),
    "no transforms": (lambda m, *_: helpers.settings_controls(m.PRESETS, ()), "empty", "at least one"),
    # runs
    "unknown method": (lambda m, run, *_: m.plan("SemiD", "noise", settings(m)), "'SemiD'", "SemiCTE"),
    "path as transform": (lambda m, run, *_: dataclasses.replace(run, transform="../up"), "'../up'", "letters"),
    "no transform": (lambda m, run, *_: dataclasses.replace(run, transform=""), "''", "letters"),
    "path as start": (
        lambda m, run, *_: dataclasses.replace(run, method="SemiCT", starting_run="/etc/x"),
        "'/etc/x'",
        "letters",
    ),
    "SemiCT without a start": (lambda m, run, *_: dataclasses.replace(run, method="SemiCT"), "''", "start from a run"),
    "SemiC with a start": (lambda m, run, *_: dataclasses.replace(run, starting_run="a-b"), "'a-b'", "only SemiCT"),
    "no labels": (lambda m, run, *_: dataclasses.replace(run, labeled=0), "labeled is 0", "at least 1"),
    "negative labels": (lambda m, run, *_: dataclasses.replace(run, labeled=-4), "labeled is -4", "at least 1"),
    "negative unlabelled": (lambda m, run, *_: dataclasses.replace(run, unlabeled=-1), "is -1", "not be negative"),
    "half an epoch": (lambda m, run, *_: dataclasses.replace(run, epochs=0.5), "epochs is 0.5", "type int"),
    "a truth as a number": (lambda m, run, *_: dataclasses.replace(run, width=True), "width is True", "type int"),
    "misspelt switch": (lambda m, run, *_: dataclasses.replace(run, switches="one_angel"), "'one_angel'", "one_angle"),
    "more steps than images": (
        lambda m, run, *_: dataclasses.replace(run, steps=run.steps_per_epoch + 1),
        "steps is",
        "shows every image once has",
    ),
    "odd batches in halves": (
        lambda m, run, *_: dataclasses.replace(run, switches="balanced_batches", batch_size=5),
        "batch_size is 5",
        "an even number",
    ),
    "more labels than data": (
        lambda m, run, s, data: data.pool(dataclasses.replace(run, labeled=401)),
        "401 labeled",
        "lower it",
    ),
    "more test images than data": (
        lambda m, run, s, data: data.pool(dataclasses.replace(run, test=301)),
        "301 test",
        "lower it",
    ),
    "unknown transform": (
        lambda m, run, s, data: helpers.Runner(data, m.build_model, m.TRANSFORMS, [], "smoke").path(
            dataclasses.replace(run, transform="sepia")
        ),
        "'sepia'",
        "noise, shift, rotation",
    ),
    # transforms
    "sigma above 1": (lambda m, *_: m.gaussian_noise(PICTURES, SEED, 25.5), "sigma is 25.5", "from 0 to 1"),
    "negative sigma": (lambda m, *_: m.gaussian_noise(PICTURES, SEED, -0.1), "sigma is -0.1", "from 0 to 1"),
    "sigma as text": (lambda m, *_: m.gaussian_noise(PICTURES, SEED, "0.1"), "sigma is '0.1'", "a number"),
    "shift beyond the picture": (lambda m, *_: m.random_shift(PICTURES, SEED, 33), "pixels is 33", "from 0 to 32"),
    "shift NaN": (lambda m, *_: m.random_shift(PICTURES, SEED, float("nan")), "pixels is nan", "from 0 to 32"),
    "angle beyond half a turn": (
        lambda m, *_: m.random_rotation(PICTURES, SEED, 181.0),
        "degrees is 181.0",
        "from 0 to 180",
    ),
    "angle none": (lambda m, *_: m.random_rotation(PICTURES, SEED, None), "degrees is None", "a number"),
    "one picture": (lambda m, *_: m.random_shift(PICTURES[0], SEED), "(32, 32, 3)", "(n, height, width, channels)"),
    "a list of pictures": (lambda m, *_: m.gaussian_noise([1, 2], SEED), "list", "array or tensor"),
    "bytes": (lambda m, *_: m.random_rotation(PICTURES.astype(np.uint8), SEED), "uint8", "to_unit_range"),
    "0 ... 255": (lambda m, *_: m.gaussian_noise(PICTURES * 255, SEED), "127.5", "to_unit_range"),
    "transform without strength": (lambda m, *_: helpers.at_strength(lambda images, seed: images, 1), "seed", "third"),
    "strength without default": (
        lambda m, *_: helpers.at_strength(lambda images, seed, strength: images, 1),
        "images, seed, strength",
        "as default",
    ),
    "pixels NaN": (lambda m, *_: m.random_shift(PICTURES * np.nan, SEED), "nan", "between 0 and 1"),
    # data
    "slices that are not there": (
        lambda m, *_: helpers.load_segmentation(m.SLICES | {"test": (29, 30)}),
        "30",
        "0 ... 29",
    ),
    "slices in thirds": (lambda m, *_: helpers.load_segmentation(m.SLICES, shrink=3), "shrink is 3", "divide 512"),
    "float images": (lambda m, r, s, d: split(s, images=lambda a: a / 255), "float64", "multiply by 255"),
    "grey images": (lambda m, r, s, d: split(s, images=lambda a: a[..., 0]), "(1200, 32, 32)", "channels"),
    "too few labels": (lambda m, r, s, d: split(s, labels=lambda a: a[1:]), "(1199, 1)", "one for each image"),
    "flat labels": (lambda m, r, s, d: split(s, labels=lambda a: a[:, 0]), "(1200,)", "(1200, 1)"),
    "labels of another set": (lambda m, r, s, d: split(s, test_labels=lambda a: a + 90), "to 99", "0 ... 9"),
    "labels below 0": (lambda m, r, s, d: split(s, labels=lambda a: a.astype(int) - 1), "from -1", "0 ... 9"),
    "real labels": (lambda m, r, s, d: split(s, labels=lambda a: a / 1), "float64", "must be integers"),
    "overlap": (lambda m, r, s, d: split(s, unlabeled=(399, 1000)), "(399, 1000)", "Move one"),
    "range beyond the data": (lambda m, r, s, d: split(s, validation=(1000, 1300)), "1300", "1200 training images"),
    "empty range": (lambda m, r, s, d: split(s, unlabeled=(500, 500)), "500 to 500", "first one before the last"),
    "missing range": (
        lambda m, r, s, d: helpers.split("shapes", s, {"labeled": (0, 4)}),
        "names labeled;",
        "labeled, unlabeled and validation",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_words(case, method, run, shapes, data):
    act, given, remedy = CASES[case]
    with pytest.raises(ValueError) as caught:
        act(method, run, shapes, data)
    assert given in str(caught.value) and remedy in str(caught.value), caught.value


TRAIN, TEST = np.zeros((50000, 32, 32, 3), np.uint8), np.zeros((10000, 32, 32, 3), np.uint8)
TRAIN_LABELS, TEST_LABELS = TRAIN[:, :1, 0, 0], TEST[:, :1, 0, 0]


@pytest.mark.parametrize(
    "swap, given",
    [
        ({"x_train": TEST, "x_test": TRAIN}, r"x_train .* uint8 \(10000, 32, 32, 3\)"),
        ({"y_train": TEST_LABELS, "y_test": TRAIN_LABELS}, r"y_train .* uint8 \(10000, 1\)"),
        ({"x_test": TEST_LABELS, "y_test": TEST}, r"x_test .* uint8 \(10000, 1\)"),
    ],
)
def test_swapped_arrays_are_refused(swap, given, tmp_path, monkeypatch):
    test_helpers.save_cifar(tmp_path / "data.npz", **swap)
    monkeypatch.setenv("CIFAR10_NPZ", str(tmp_path / "data.npz"))
    with pytest.raises(ValueError, match=f"{given}; CIFAR-10 has uint8"):
        helpers.load_cifar10()


def test_a_truncated_or_missing_file_is_named_and_nothing_stands_in_for_it(tmp_path, monkeypatch):
    path = tmp_path / "data.npz"
    test_helpers.save_cifar(path)
    path.write_bytes(path.read_bytes()[:-1000])
    monkeypatch.setenv("CIFAR10_NPZ", str(path))
    with pytest.raises(ValueError, match=r"data\.npz is not a readable \.npz with x_train"):
        helpers.load_data("smoke")  # which would take generated shapes where there is no CIFAR-10 at all
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*data\.npz; CIFAR10_NPZ .* must name"):
        helpers.load_data("smoke")


def test_step_two_without_step_one_says_what_to_train(method, run, tiny, data, tmp_path):
    runner = helpers.Runner(data, method.build_model, method.TRANSFORMS, [], "smoke", tmp_path)
    with pytest.raises(FileNotFoundError, match="SemiCT, noise starts from the run .*train step one first"):
        runner.train([method.plan("SemiCT", "noise", tiny, "shapes")])


@pytest.mark.parametrize(
    "variable, value, message",
    [
        ("REPRODUCTION_PRESET", "Quick", "'Quick'; set it to one of smoke, quick"),
        ("REPRODUCTION_PICTURES", "none", "'none'; set it to 'generated', or unset it"),
        ("TF_CONFIG", "{", "must be JSON"),
        ("TF_CONFIG", '{"cluster": 3}', "must be JSON with a cluster"),
    ],
)
def test_environment_variables_are_checked(variable, value, message, method, data, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        if variable == "REPRODUCTION_PRESET":
            helpers.settings_controls(method.PRESETS, ["noise"])
        elif variable == "REPRODUCTION_PICTURES":
            helpers.sample_pictures(data)
        else:
            helpers.device_strategy()


def test_another_backend_is_refused_and_not_silently_replaced():
    code = "import os; os.environ['KERAS_BACKEND'] = 'jax'; import helpers"
    ended = subprocess.run([sys.executable, "-c", code], cwd=notebook.ROOT, capture_output=True, text=True)
    assert ended.returncode and "KERAS_BACKEND is 'jax'" in ended.stderr and "unset it" in ended.stderr


# -------------------------------------------------------------------------------------- properties

few = hypothesis.settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
bounds = strategies.tuples(strategies.integers(-5, 70), strategies.integers(-5, 70))


@few
@hypothesis.given(labeled=bounds, unlabeled=bounds, validation=bounds)
def test_a_split_is_disjoint_and_as_asked_or_refused(labeled, unlabeled, validation):
    positions = np.arange(64, dtype=np.uint8)
    arrays = (positions[:, None, None, None], positions[:, None] % 10), (positions[:1, None, None, None], [[1]])
    arrays = arrays[0], (arrays[1][0], np.array([[1]]))
    ranges = {"labeled": labeled, "unlabeled": unlabeled, "validation": validation}
    wanted = [set(range(*range_)) for range_ in ranges.values()]
    good = all(0 <= start < stop <= 64 for start, stop in ranges.values())
    good = good and len(set.union(*wanted)) == sum(map(len, wanted))
    try:
        cut = helpers.split("shapes", arrays, ranges)
    except ValueError:
        assert not good
        return
    assert good
    for subset, positions in zip(ranges, wanted, strict=True):
        assert set(getattr(cut, f"{subset}_images").flatten()) == positions
    np.testing.assert_array_equal(cut.labeled_labels, cut.labeled_images.flatten() % 10)
    assert not hasattr(cut, "unlabeled_labels")


strengths = {"noise": 1.0, "shift": 32.0, "rotation": 180.0}


@few
@hypothesis.given(
    name=strategies.sampled_from(sorted(strengths)),
    seed=strategies.tuples(*[strategies.integers(-(2**31), 2**31 - 1)] * 2),
    fraction=strategies.floats(0, 1),
    count=strategies.integers(1, 3),
)
def test_a_transform_keeps_shape_and_type_repeats_and_does_nothing_at_strength_0(name, seed, fraction, count, method):
    images = np.random.default_rng(count).random((count, 32, 32, 3), np.float32)
    transform, strength = method.TRANSFORMS[name], fraction * strengths[name]
    copies = transform(images, seed, strength)
    assert copies.shape == images.shape and copies.dtype == tf.float32
    assert np.isfinite(copies.numpy()).all() and copies.numpy().min() > -0.5 and copies.numpy().max() < 1.5
    np.testing.assert_array_equal(copies, transform(images, seed, strength))
    np.testing.assert_allclose(transform(images, seed, 0), images, atol=1e-5)
    if name == "noise":
        assert images.min() <= copies.numpy().min() and copies.numpy().max() <= images.max()
    if name != "noise":  # of a white picture, some of the white and black where nothing was
        moved = transform(np.ones_like(images), seed, strength).numpy().round(4)
        assert set(np.unique(moved)) <= {0.0, 1.0}


fields = strategies.fixed_dictionaries(
    {
        "method": strategies.sampled_from(["Supervised", "SemiC"]),
        "transform": strategies.from_regex(r"\w[\w-]{0,9}", fullmatch=True),
        "width": strategies.integers(1, 200),
        "learning_rate": strategies.floats(1e-12, 1),
        "consistency_weight": strategies.floats(0, 1000),
        "seed": strategies.integers(0, 10**6),
        "switches": strategies.sets(strategies.sampled_from(helpers.SWITCHES)).map(helpers.joined),
    }
)


@few
@hypothesis.given(first=fields, second=fields)
def test_ids_tell_runs_apart_and_stay_inside_the_folder(first, second):
    sizes = {"labeled": 4, "unlabeled": 0, "epochs": 1, "validation": 1, "test": 1}
    one, other = (helpers.Configuration(**values, **sizes) for values in (first, second))
    assert (one.id == other.id) == (one == other)
    again = helpers.Configuration(**json.loads(json.dumps(dataclasses.asdict(one))))
    assert again.id == one.id
    folder = pathlib.Path("/somewhere/runs")
    assert (folder / one.id).resolve().parent == folder
    changed = dataclasses.replace(one, width=one.width + 1)
    assert changed.id != one.id


# ------------------------------------------------------------------------------------------ safety

FORBIDDEN = {"pickle", "marshal", "shelve", "socket", "urllib", "requests", "http", "ftplib", "joblib", "dill"}


def code_of_the_notebook():
    cells = nbformat.read(notebook.NOTEBOOK, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "code")


@pytest.mark.parametrize("where", ["helpers.py", "reproduction.ipynb"])
def test_no_code_unpickles_evaluates_or_connects(where):
    text = (notebook.ROOT / where).read_text() if where.endswith(".py") else code_of_the_notebook()
    imported, called = set(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
        if isinstance(node, ast.Call):
            called.add(ast.unparse(node.func))
            pickles = {word.arg: word.value for word in node.keywords}.get("allow_pickle")
            assert pickles is None or ast.literal_eval(pickles) is False
    assert not imported & FORBIDDEN
    assert not {name for name in called if re.search(r"(^|\.)(eval|exec|load_model|urlopen)$|^os.system$", name)}
    processes = {name for name in called if "subprocess" in name}
    if where == "helpers.py":
        assert not processes and "keras.datasets.cifar10.load_data" in called
        assert text.count("get_file(") == 1 and "get_file(file, address," in text  # the download of ISBI 2012
    else:  # the clone and the installation that the first cell announces
        assert "get_file" not in text and processes == {"subprocess.run"} and text.count("subprocess.run(") == 2
        assert '["git", "clone", "--depth", "1", REPOSITORY' in text


def test_the_notebook_carries_no_secret_and_no_live_widgets():
    cells = nbformat.read(notebook.NOTEBOOK, as_version=4).cells
    shown = [
        output.get("text", "") + str(output.get("data", {}).get("text/html", ""))
        for cell in cells
        for output in cell.get("outputs", ())
    ]
    text = "\n".join([*(cell.source for cell in cells), *shown])
    assert not re.search(r"(api[_-]?key|password|secret|token)\W{0,4}[=:]\s*\W?\w{8,}", text, re.IGNORECASE)
    assert not re.search(r"(ghp|sk|AKIA)[-_]?[A-Za-z0-9]{20,}", text)
    assert "<script" not in text and "application/javascript" not in notebook.NOTEBOOK.read_text()
