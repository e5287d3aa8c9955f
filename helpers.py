"""The plumbing of reproduction.ipynb: what its method rests on and no reader has to read first.

In the notebook's order: environment and precision, data, the warp, layers and metrics, the names of runs, their store,
tables, figures, controls. The method itself stands in the notebook, in the cells tagged `method`. "The report" is the
student report named in README.md. Images are (n, height, width, channels) throughout.
"""

import ast
import dataclasses
import datetime
import dis
import functools
import hashlib
import importlib.util
import inspect
import io
import json
import linecache
import math
import os
import pathlib
import platform
import re
import subprocess
import sys
import sysconfig
import time
import types

import filelock
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy.ndimage
import seaborn as sns
from IPython import get_ipython
from IPython.display import display

# ----------------------------------------------------------------------------------------- environment and precision

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow's page on processors and absent GPUs
_installed = [name for name in ("tensorflow", "jax") if importlib.util.find_spec(name)]
BACKEND = os.environ.setdefault("KERAS_BACKEND", _installed[0] if _installed else "tensorflow")
if BACKEND not in ("tensorflow", "jax"):
    raise ValueError(f"KERAS_BACKEND is {BACKEND!r}: set it to tensorflow or jax, or unset it, and restart the kernel.")
if _limits := [name for name in ("KERAS_MAX_EPOCHS", "KERAS_MAX_STEPS_PER_EPOCH") if os.environ.get(name)]:
    raise ValueError(f"{' and '.join(_limits)} would cut trainings short: unset it and restart the kernel.")

sys.stderr.flush()
_kept, _nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
os.dup2(_nowhere, 2)  # TensorFlow writes there before it reads how little it is to write
try:
    import keras
    from keras import ops

    if BACKEND == "tensorflow":
        import tensorflow as tf

        ACCELERATORS = tf.config.list_physical_devices("GPU")
    else:
        import jax

        ACCELERATORS = [device for device in jax.devices() if device.platform != "cpu"]
        if len(jax.devices()) > 1:
            keras.distribution.set_distribution(keras.distribution.DataParallel())
finally:
    os.dup2(_kept, 2)
    os.close(_kept)
    os.close(_nowhere)
if keras.backend.backend() != BACKEND:
    raise ValueError(f"Keras already runs on {keras.backend.backend()!r}, not {BACKEND!r}: restart the kernel.")
# A keras.json of the reader's may say otherwise.
keras.config.set_floatx("float32")
keras.config.set_epsilon(1e-7)
keras.config.set_image_data_format("channels_last")


def environment():
    """What can change a number or a time, kept with every run: dict of str."""
    if ACCELERATORS and BACKEND == "tensorflow":
        device = tf.config.experimental.get_device_details(ACCELERATORS[0]).get("device_name", "GPU")
    elif ACCELERATORS:
        device = f"{len(ACCELERATORS)} x {ACCELERATORS[0].device_kind}"
    else:
        names = re.findall(r"model name\s*: (.*)", _processor())
        cores = os.environ.get("TF_NUM_INTRAOP_THREADS") or os.cpu_count()
        device = f"{names[0] if names else platform.machine()}, {cores} threads"
    backend = f"{BACKEND} {tf.__version__ if BACKEND == 'tensorflow' else jax.__version__}"
    git = f"git -C {pathlib.Path(__file__).parent} rev-parse --short=9 HEAD".split()
    return {
        "device": device,
        "backend": f"{backend}, keras {keras.__version__}, python {platform.python_version()}",
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
    }


def fastest_precision(width):
    """The number type in which this device multiplies fastest: name of a Keras policy.

    Weights, statistics and losses are float32 in all of them. On processors, widths under 16 gain nothing by 16 bits.
    """
    if not ACCELERATORS:
        bits = re.search(r"\b(amx_bf16|avx512_bf16)\b", _processor()) and BACKEND == "tensorflow" and width >= 16
        return "mixed_bfloat16" if bits else "float32"
    if BACKEND == "tensorflow":
        capability = tf.config.experimental.get_device_details(ACCELERATORS[0]).get("compute_capability", (0, 0))
    else:  # a TPU has none, and bfloat16
        capability = tuple(map(int, getattr(ACCELERATORS[0], "compute_capability", "9.0").split(".")))
    return "mixed_bfloat16" if capability >= (8, 0) else "mixed_float16" if capability >= (7, 0) else "float32"


def jit_compile():
    """Whether Keras is to compile the whole step with XLA: on processors TensorFlow is three times faster without."""
    return "auto" if ACCELERATORS or BACKEND == "jax" else False


def _processor():
    return pathlib.Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""


# ---------------------------------------------------------------------------------------------------------------- data

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHAPES = ("disc", "square", "triangle", "diamond", "ring", "frame", "plus", "cross", "bars", "columns")
CIFAR10_SHA256 = "f912919bdea371136f1aa4feed6beeca728015a5f08b1899a29c932a7e30be2b"  # training images, then labels


@dataclasses.dataclass(frozen=True)
class Data:
    """Images, uint8 (n, height, width, channels), 0 ... 255, and labels, int32 (n,), 0 ... classes - 1."""

    name: str  # tells these images from others in the names of runs
    classes: tuple
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    @property
    def note(self):
        """What a title has to say where the images are generated ones."""
        return " (generated shapes, not CIFAR-10)" if self.name == "shapes" else ""


def load_data(path=None, generate=False):
    """Load CIFAR-10, or images of one's own.

    Args:
        path: an .npz with images x_train, x_test and labels y_train, y_test as in `Data`, labels also (n, 1), and
            optionally `classes`, their names. Default: the file that CIFAR10_NPZ names, else Keras's download.
        generate: go on with generated shapes where the download fails.

    Raises:
        FileNotFoundError, ValueError: the file is not there, or holds something else.
        OSError: the download failed.
    """
    path = path or os.environ.get("CIFAR10_NPZ")
    if not path:
        print("Keras loads CIFAR-10. The first time it downloads 170 MB from a slow host, which takes minutes.")
        try:
            train, test = keras.datasets.cifar10.load_data()
        except Exception as error:  # Keras raises a bare Exception
            if not generate:
                way = "Connect to the network, or set CIFAR10_NPZ to an .npz with x_train, y_train, x_test and y_test."
                raise OSError(f"CIFAR-10 cannot be downloaded ({error}). {way}") from error
            print(f"{error}\nGoing on with GENERATED SHAPES: nothing below is a result on CIFAR-10.")
            return generate_shapes()
        return _checked("Keras's CIFAR-10", x_train=train[0], y_train=train[1], x_test=test[0], y_test=test[1])
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; CIFAR10_NPZ, or path, must name an .npz.")
    try:
        with np.load(path) as file:
            arrays = dict(file)
    except Exception as error:  # altered bytes raise a dozen kinds
        raise ValueError(f"{path} cannot be read as an .npz of arrays: {error}") from error
    return _checked(path, **arrays)


def _checked(path, **arrays):
    """Data, after a look at everything that would go wrong later."""
    if missing := {"x_train", "y_train", "x_test", "y_test"} - set(arrays):
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}.")
    for part in ("train", "test"):
        images, labels = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            wanted = "uint8 (n, height, width, channels), 0 ... 255, with 1 or 3 channels, last"
            raise ValueError(f"x_{part} in {path} is {images.dtype} {images.shape}; it must be {wanted}.")
        if labels.size != len(images) or labels.dtype.kind not in "ui":
            wanted = f"one integer for each of the {len(images)} images, not one-hot"
            raise ValueError(f"y_{part} in {path} is {labels.dtype} {labels.shape}; it must be {wanted}.")
    images, labels, tests = arrays["x_train"], *(arrays[name].ravel().astype("int32") for name in ("y_train", "y_test"))
    if images.shape[1:] != arrays["x_test"].shape[1:]:
        raise ValueError(f"{path} has training images {images.shape[1:]} and test images {arrays['x_test'].shape[1:]}.")
    known = set(labels.tolist())
    if known != set(range(len(known))) or not known >= set(tests.tolist()):
        raise ValueError(f"Labels in {path} are {sorted(known | set(tests.tolist()))}; they must be 0 ... classes - 1.")
    content = hashlib.sha256(np.ascontiguousarray(images))
    content.update(labels.astype(np.uint8))
    original = content.hexdigest() == CIFAR10_SHA256
    name = "cifar10" if original else f"{pathlib.Path(path).stem}-{content.hexdigest()[:8]}"
    classes = CLASSES if original else map(str, arrays.get("classes", range(len(known))))
    return Data(name, tuple(classes), images, labels, arrays["x_test"], tests)


def generate_shapes(train=25000, test=2000, seed=0):
    """Make a stand-in for CIFAR-10, coloured shapes on noise, of which the shape alone tells the class: `Data`."""
    random, count = np.random.default_rng(seed), train + test
    labels = random.integers(0, len(SHAPES), count, dtype="int32")
    centre, radius = random.uniform(11, 21, (2, count, 1, 1)), random.uniform(6, 10, (count, 1, 1)).astype("float32")
    rows, columns = (np.mgrid[:32, :32][:, None] - centre.astype("float32")) / radius
    far, near = np.maximum(abs(rows), abs(columns)), np.minimum(abs(rows), abs(columns))
    distance = np.hypot(rows, columns)
    drawn = {
        "disc": distance < 1,
        "square": far < 0.9,
        "triangle": (rows < 0.8) & (2 * abs(columns) < rows + 1),
        "diamond": abs(rows) + abs(columns) < 1,
        "ring": (distance < 1) & (distance > 0.6),
        "frame": (far < 0.9) & (far > 0.5),
        "plus": (far < 1) & (near < 0.3),
        "cross": (far < 0.9) & (far - near < 0.35),
        "bars": (far < 0.9) & (np.sin(8 * rows) > 0),
        "columns": (far < 0.9) & (np.sin(8 * columns) > 0),
    }
    mask = np.choose(labels[:, None, None], [drawn[name] for name in SHAPES])[..., None]
    ink, paper = random.uniform(0, 255, (2, count, 1, 1, 3)).astype("float32")
    images = np.where(mask, ink, paper) + 20 * random.standard_normal((count, 32, 32, 3), dtype="float32")
    images = images.clip(0, 255).astype(np.uint8)
    return Data("shapes", SHAPES, images[:train], labels[:train], images[train:], labels[train:])


# ------------------------------------------------------------------------------------------------------------ the warp


def affine_points(maps, height, width):
    """Points that maps send the pixels of a picture to: float32 (n, height, width, 2), (row, column) in pixels.

    maps: float32 (n, 2, 3), from (row, column, 1) of a pixel of the result to (row, column) in the image.
    """
    rows, columns = ops.meshgrid(ops.arange(height, dtype="float32"), ops.arange(width, dtype="float32"), indexing="ij")
    pixels = ops.stack([rows, columns, ops.ones_like(rows)], axis=-1)
    return ops.einsum("hwk,nik->nhwi", pixels, ops.cast(maps, "float32"))


def inside(points, height, width):
    """Whether points (..., 2), (row, column), lie in a picture, up to its border pixels' centres: bool (...)."""
    return ops.all((points >= 0) & (points <= np.array([height - 1, width - 1], "float32")), axis=-1)


def _compiled(function):
    """The function compiled as a whole, which TensorFlow does not do by itself: four to ten times faster."""
    return tf.function(function, jit_compile=True, reduce_retracing=True) if BACKEND == "tensorflow" else function


@_compiled
def cubic_sample(images, points):
    """Read images at points by cubic splines, 0 outside: elasticdeform's order 3 and mode "constant".

    Gradients flow to the images.

    Args:
        images: float (n, height, width, channels).
        points: float32 (n, h, w, 2), (row, column) in pixels.

    Returns:
        float32 (n, h, w, channels).
    """
    count, (height, width, channels) = ops.shape(images)[0], images.shape[1:]
    # Knots of the splines through the pixels: a linear filter along either axis, here as a matrix.
    down, across = (
        scipy.ndimage.spline_filter1d(np.eye(side), axis=0, mode="mirror").astype("float32") for side in (height, width)
    )
    knots = ops.einsum("ij,njwc->niwc", down, ops.cast(images, "float32"))
    knots = ops.einsum("ij,nhjc->nhic", across, knots)
    knots = ops.pad(knots, [[0, 0], [1, 2], [1, 2], [0, 0]], mode="reflect")
    # Four neighbours in a row lie side by side, so that a point takes four reads and not sixteen.
    windows = ops.concatenate([knots[:, :, tap : tap + width] for tap in range(4)], axis=-1)
    windows = ops.reshape(windows, (-1, 4 * channels))
    within = inside(points, height, width)
    points = ops.clip(points, 0.0, np.array([height - 1, width - 1], "float32"))
    corners = ops.floor(points)
    row_weights, column_weights = (_spline_weights(points[..., axis] - corners[..., axis]) for axis in (0, 1))
    rows, columns = (ops.cast(corners[..., axis], "int32") for axis in (0, 1))
    rows += ops.arange(count, dtype="int32")[:, None, None] * (height + 3)
    sampled = 0.0
    for tap in range(4):
        parts = ops.split(ops.take(windows, (rows + tap) * width + columns, axis=0), 4, axis=-1)
        sampled += row_weights[tap] * sum(weight * part for weight, part in zip(column_weights, parts, strict=True))
    return ops.where(within[..., None], sampled, 0.0)


def _spline_weights(t):
    """Weights of the four knots around a point that lies a fraction t (...) past the second: four times (..., 1)."""
    t = t[..., None]
    return (1 - t) ** 3 / 6, (4 - 6 * t**2 + 3 * t**3) / 6, (4 - 6 * (1 - t) ** 2 + 3 * (1 - t) ** 3) / 6, t**3 / 6


# -------------------------------------------------------------------------------------------------- layers and metrics


class BatchNormalization(keras.layers.BatchNormalization):
    """Keras's batch normalisation of images; on TensorFlow by its fused op, in training and in inference."""

    def call(self, inputs, training=None, mask=None):
        if BACKEND != "tensorflow":
            return super().call(inputs, training=training, mask=mask)
        training = bool(training and self.trainable)
        outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=inputs,
            scale=self.gamma.value,
            offset=self.beta.value,
            mean=[] if training else self.moving_mean.value,
            variance=[] if training else self.moving_variance.value,
            epsilon=self.epsilon,
            is_training=training,
        )
        if training:
            samples = tf.cast(tf.size(inputs) / tf.size(mean), "float32")
            variance *= (samples - 1) / samples  # the op returns the unbiased one, Keras keeps the biased one
            for moving, current in ((self.moving_mean, mean), (self.moving_variance, variance)):
                moving.assign(moving * self.momentum + tf.stop_gradient(current) * (1 - self.momentum))
        return outputs


class LeakyReLU(keras.layers.LeakyReLU):
    """Keras's leaky ReLU; on TensorFlow with a gradient from its output, whose sign is that of its input.

    So the input need not be kept, and the convolution before it applies it as it writes. With the gradient compiled,
    a step at width 32 in bfloat16 takes three quarters of the time on one processor core.
    """

    def call(self, inputs):
        if BACKEND != "tensorflow":
            return super().call(inputs)

        @tf.custom_gradient
        def leaky_relu(x):
            y = tf.nn.leaky_relu(x, self.negative_slope)
            return y, lambda gradient: _leaky_relu_gradient(gradient, y, self.negative_slope)

        return leaky_relu(inputs)


@_compiled
def _leaky_relu_gradient(gradient, outputs, slope):
    return ops.where(outputs > 0, gradient, gradient * slope)


class LargestShare(keras.metrics.Metric):
    """Share of the most frequent of all answers so far: 1 after a collapse to one class."""

    def __init__(self, classes, name):
        super().__init__(name=name)
        self.counts = self.add_variable((classes,), "zeros", name="counts")

    def update_state(self, answers, sample_weight=None):
        """answers: int (...), 0 ... classes - 1."""
        hits = ops.one_hot(ops.reshape(answers, (-1,)), self.counts.shape[0], dtype="float32")
        self.counts.assign(self.counts + ops.sum(hits, axis=0))

    def result(self):
        return ops.max(self.counts) / ops.maximum(ops.sum(self.counts), 1.0)


# ------------------------------------------------------------------------------------------------------ a run's name


def fingerprint(*things):
    """Digest of definitions, as syntax without comments and docstrings, and of values: 12 hexadecimal digits.

    Functions and classes are followed to what they use, in this module and in the reader's own; of an installed
    library the name is taken. An object is its class and its attributes.

    Raises:
        ValueError: there is something that cannot be told apart from others of its kind.
    """
    definitions = {}  # by identity, in the order in which they are met
    values = [_described(thing, definitions) for thing in things]
    return hashlib.sha256(json.dumps([values, list(definitions.values())]).encode()).hexdigest()[:12]


def _described(thing, definitions):
    """A value for JSON; the definitions on the way are added."""
    if isinstance(thing, types.ModuleType):
        return thing.__name__
    if thing is None or isinstance(thing, (bool, int, float, complex, str, bytes, slice)):
        return repr(thing)
    if isinstance(thing, (np.ndarray, np.generic)) and thing.dtype != object:
        return [str(thing.dtype), list(thing.shape), hashlib.sha256(np.ascontiguousarray(thing)).hexdigest()]
    if isinstance(thing, (list, tuple)):
        return [_described(one, definitions) for one in thing]
    if isinstance(thing, dict):
        return [[_described(key, definitions), _described(value, definitions)] for key, value in thing.items()]
    if isinstance(thing, functools.partial):
        return _described([thing.func, thing.args, thing.keywords], definitions)
    if isinstance(thing, types.MethodType):
        return _described([thing.__func__, thing.__self__], definitions)
    thing = inspect.unwrap(thing) if callable(thing) else thing
    if hasattr(thing, "__qualname__"):  # a class or a function
        if _is_own(thing) and id(thing) not in definitions:
            definitions[id(thing)] = None
            definitions[id(thing)] = [_source(thing), *(_described(one, definitions) for one in _used(thing))]
        return f"{thing.__qualname__}" if _is_own(thing) else f"{thing.__module__}.{thing.__qualname__}"
    if isinstance(thing, keras.layers.Layer) and not _is_own(type(thing)):
        return _described([type(thing), thing.get_config(), thing.get_weights()], definitions)
    if _is_own(type(thing)):
        return _described([type(thing), vars(thing)], definitions)
    raise ValueError(
        f"{thing!r} is a {type(thing).__name__}, which a run's name cannot tell from another: use numbers."
    )


def _is_own(thing):
    """Whether a class or function is the reader's or this project's, not an installed library's."""
    file = getattr(sys.modules.get(thing.__module__), "__file__", None) or ""
    library = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    return thing.__module__ == "__main__" or (bool(file) and not file.startswith(library) and "-packages" not in file)


def _parsed(text):
    """Syntax tree of a source, without docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


_OWN_SOURCE = _parsed(pathlib.Path(__file__).read_text())  # now: the file may be another one when a run starts


def _functions(thing):
    """The function, or those of the class that were written, not made by a decorator."""
    found = (
        [thing]
        if not inspect.isclass(thing)
        else [
            inspect.unwrap(getattr(one, "fget", None) or getattr(one, "__func__", one))
            for one in vars(thing).values()
            if callable(one) or isinstance(one, (property, staticmethod, classmethod))
        ]
    )
    return [one for one in found if inspect.isfunction(one) and one.__code__.co_filename != "<string>"]


def _source(thing):
    """Text of a definition; of a function without one, as a lambda is, its compiled code."""
    for code in (function.__code__ for function in _functions(thing)):
        own = code.co_filename == __file__
        for node in ast.walk(_OWN_SOURCE if own else _parsed("".join(linecache.getlines(code.co_filename)))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == thing.__name__:
                first = min(part.lineno for part in (node, *node.decorator_list))
                if first <= code.co_firstlineno <= node.end_lineno:
                    return ast.unparse(node)
    if inspect.isclass(thing):  # one without methods: its attributes say all
        return ""
    return [thing.__code__.co_code.hex(), repr([one for one in thing.__code__.co_consts if not inspect.iscode(one)])]


def _used(thing):
    """What a function or class takes from outside of it."""
    if inspect.isclass(thing):
        yield from thing.__bases__
        for name, value in vars(thing).items():
            if not name.startswith(("__", "_abc_")) and not callable(value) and not hasattr(value, "__get__"):
                yield value
    for function in _functions(thing):
        yield from (function.__defaults__ or (), function.__kwdefaults__ or {})
        yield from (cell.cell_contents for cell in function.__closure__ or () if cell.cell_contents is not thing)
        codes = [function.__code__]
        for code in codes:
            codes += filter(inspect.iscode, code.co_consts)
            value = None
            for step in dis.get_instructions(code):
                if isinstance(value, types.ModuleType) and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                    value = getattr(value, step.argval, None)
                elif step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                    value = function.__globals__.get(step.argval)
                else:
                    value = None
                # Of this module its functions and classes: what its constants say is the same for all runs.
                if callable(value) or (value is not None and code.co_filename != __file__):
                    yield value


# --------------------------------------------------------------------------------------------------- the store of runs


def _state(model):
    """All that training changes, in a fixed order: weights, averages, random states, the optimizer's variables."""
    return [*model.variables, *model.optimizer.variables]


def name_of(transform):
    """A transform's name: its attribute `name`, else its class's."""
    return getattr(transform, "name", type(transform).__name__.lower())


def title(run):
    """A run in words."""
    return f"{run.method}, {name_of(run.transform)}, seed {run.seed}"


class Runs:
    """Runs in a folder, a file each: settings, curves, and the state to go on from, replaced after every epoch.

    The file is a zip of arrays (`numpy.savez`) under a temporary name until it is whole, so a kill loses at most the
    epoch under way, and each part has a checksum, which is tested when it is read.
    """

    def __init__(self, folder, train):
        """folder: path; train: the function (run, data, runs) that trains a run by `fit`."""
        self.folder, self.train, self.line = pathlib.Path(folder).expanduser(), train, None
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, run):
        """The file of a run: its name changes with the run's fields and the definitions that they and train use."""
        name = re.sub(r"[^\w-]+", "_", f"{run.method}-{name_of(run.transform)}")
        return self.folder / f"{name}-{fingerprint(run, self.train)}.npz"

    def __contains__(self, run):
        return self.path(run).exists()

    def about(self, run):
        """What the file says of the run without its state: dict with `history`, `test`, `made`, or None."""
        return (self._read(run, state=False) or (None,))[0]

    def _read(self, run, state=True):
        path = self.path(run)
        try:
            with np.load(path) as file:
                about = json.loads(str(file["about"]))
                return about, [file[f"{place:04}"] for place in range(len(file.files) - 1)] if state else None
        except FileNotFoundError:
            return None
        except OSError:  # a disk that does not answer is no damage
            raise
        except Exception as error:  # whatever zip, NumPy and JSON make of altered bytes
            aside = path.with_suffix(f".damaged-{time.time_ns()}")
            os.replace(path, aside)
            print(f"{path} is damaged ({type(error).__name__}: {error}). It is kept as {aside.name} and trained again.")
            return None

    def write(self, run, about, model):
        content = io.BytesIO()
        arrays = {f"{place:04}": np.asarray(value) for place, value in enumerate(_state(model))}
        np.savez(content, about=json.dumps(about), **arrays)
        temporary = self.path(run).with_suffix(".writing")
        try:
            with open(temporary, "wb") as file:
                file.write(content.getbuffer())
                os.fsync(file.fileno())
            os.replace(temporary, self.path(run))
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise OSError(error.errno, f"{error.strerror}; what was saved before is intact", str(temporary)) from error

    def fit(self, run, model, batches, validation, test):
        """Train what of a run is not yet trained, and test it once: dict as of `about`.

        Args:
            run: with `epochs` and `steps_per_epoch`.
            model: compiled; it ends with the state of the trained run.
            batches: function of `first`, the number of the first batch, to an endless `PyDataset` from there on.
            validation, test: data sets for `evaluate`; the latter is used after the last epoch alone.

        Raises:
            FloatingPointError: a loss or metric is not finite; the epochs before are kept.
            OSError: the disk is full or cannot be written; what was written before is intact.
        """
        with _locked(self.path(run).with_suffix(".lock")):
            model.optimizer.build(model.trainable_variables)
            about, state = self._read(run) or ({"history": [], "test": None, "ended": None}, None)
            if state is not None:
                _restore(model, state, self.path(run))
            done = len(about["history"])
            keeper = _Keeper(self, run, about)
            if done < run.epochs and not about["ended"]:
                try_transform(run.transform, batches()[0][0]["images"][:2])
                model.fit(
                    batches(first=done * run.steps_per_epoch),
                    steps_per_epoch=run.steps_per_epoch,
                    initial_epoch=done,
                    epochs=run.epochs,
                    shuffle=False,  # of batches, which have their order already
                    validation_data=validation,
                    callbacks=[keeper],
                    verbose=0,
                )
            if len(about["history"]) < run.epochs and not about["ended"]:
                raise RuntimeError(f"{title(run)} ended after {len(about['history'])} of {run.epochs} epochs.")
            if about["test"] is None:
                about["test"] = _finite(model.evaluate(test, return_dict=True, verbose=0), "the test")
                about["made"] = environment() | {"precision": run.precision}
                self.write(run, about, model)
            verb = about["ended"] or ("kept" if done == run.epochs else "trained")
            keeper.line.say(f"{verb}; accuracy {about['test']['accuracy']:.1%} on the test images", last=True)
        return about

    def table(self, plan):
        """The finished ones of some runs, a row each: DataFrame with the columns of results/runs.csv."""
        rows = []
        for run in plan:
            about = self.about(run)
            if about and about["test"]:
                fields = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
                fields |= {"transform": name_of(run.transform), "training": fields.pop("model").__name__}
                fields["start"] = run.start and self.path(run.start).stem.split("-")[-1]
                updates, seconds = (
                    len(about["history"]) * run.steps_per_epoch,
                    sum(e["seconds"] for e in about["history"]),
                )
                rows.append(
                    {"id": self.path(run).stem.split("-")[-1], **fields, **about["test"]}
                    | {"updates": updates, "seconds": seconds, "ended": about["ended"], **about["made"]}
                )
        return pd.DataFrame(rows)

    def curves(self, plan):
        """Every epoch of some runs so far, a row each: DataFrame with the columns of results/curves.csv."""
        frames = [
            pd.DataFrame(about["history"]).assign(
                id=self.path(run).stem.split("-")[-1], method=run.method, transform=name_of(run.transform)
            )
            for run in plan
            if (about := self.about(run))
        ]
        return pd.concat(frames) if frames else pd.DataFrame()

    def train_each(self, plan, data):
        """Train runs one after the other; one that fails says why, and the others go on."""
        for number, run in enumerate(plan, start=1):
            self.line = _Line(f"run {number} of {len(plan)}, {title(run)}")
            try:
                self.train(run, data, self)
            except FloatingPointError as error:
                self.line.say(f"failed: {error}", last=True)
        self.line = None


def _locked(path):
    """Lock of a run; where another kernel trains it, a line says that this one waits."""
    lock = filelock.FileLock(path)
    try:
        return lock.acquire(timeout=0.1)
    except filelock.Timeout:
        print(f"Another kernel trains {path.stem}: waiting for it.", flush=True)
        return lock.acquire()


def _restore(model, values, path):
    variables = _state(model)
    if [tuple(variable.shape) for variable in variables] != [value.shape for value in values]:
        raise ValueError(f"{path} holds another network than the code builds now: rename or remove it.")
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _finite(metrics, when):
    """Metrics as floats; raises FloatingPointError where one is NaN or infinite."""
    metrics = {name: float(value) for name, value in metrics.items()}
    if bad := [name for name, value in metrics.items() if not math.isfinite(value)]:
        raise FloatingPointError(f"{bad[0]} is {metrics[bad[0]]} in {when}; what was trained before is kept.")
    return metrics


class _Line:
    """A line of output that is replaced until the last one stays; outside of a notebook only that one is printed."""

    def __init__(self, heading):
        self.heading = heading
        self.handle = display({"text/plain": heading}, raw=True, display_id=True) if get_ipython() else None

    def say(self, text, last=False):
        if self.handle:
            self.handle.update({"text/plain": f"{self.heading}: {text}"}, raw=True)
        elif last:
            print(f"{self.heading}: {text}", flush=True)


class _Keeper(keras.callbacks.Callback):
    """Writes a run's file after every epoch, says how far it is, and ends it where it has collapsed for good."""

    def __init__(self, runs, run, about):
        super().__init__()
        self.runs, self.run, self.about = runs, run, about
        self.line = runs.line or _Line(title(run))
        self.now = self.said = time.monotonic()
        self.seconds = self.steps = 0.0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch, self.epoch_began = epoch + 1, self.seconds

    def on_test_batch_end(self, batch, logs=None):
        gap, self.now = time.monotonic() - self.now, time.monotonic()
        self.seconds += gap if gap < 60 else 0  # longer: the machine slept, or somebody stopped the process

    def on_train_batch_end(self, batch, logs=None):
        self.on_test_batch_end(batch)
        self.steps += 1
        if self.now - self.said > 0.5:
            left = (self.run.epochs - self.epoch + 1) * self.run.steps_per_epoch - batch - 1
            losses = ", ".join(f"{name} {float(logs[name]):.3f}" for name in ("loss", "accuracy", "agreement"))
            minutes = self.seconds / self.steps * left / 60
            self.line.say(f"epoch {self.epoch} of {self.run.epochs}, {losses}, {minutes:.1f} minutes left")
            self.said = self.now

    def on_epoch_end(self, epoch, logs=None):
        row = {"epoch": self.epoch, "seconds": self.seconds - self.epoch_began}
        history = self.about["history"]
        history.append(_finite(row | logs, f"epoch {self.epoch}"))
        last = history[-10:]
        if len(last) == 10 and all(one["val_largest_class"] > 0.999 for one in last):
            self.about["ended"] = f"collapsed: one class for all validation images in epochs {last[0]['epoch']:.0f} on"
            self.model.stop_training = True
        self.runs.write(self.run, self.about, self.model)


def try_transform(transform, images):
    """Try a transform on a few images, float32 (n, height, width, channels), 0 ... 1; returns the copies.

    Raises:
        ValueError: it fails or gives something else; says what it gave and what it should.
    """
    wanted = f"draw(random, shape) an array with a row an image, and the call float32 {images.shape}"
    try:
        drawn = transform.draw(np.random.default_rng(0), images.shape)
        rows = np.shape(drawn)[:1]
        copies = ops.convert_to_numpy(transform(ops.convert_to_tensor(images), ops.convert_to_tensor(drawn)))
    except Exception as error:
        raise ValueError(f"The transform {transform!r} fails ({error}); {wanted} must work.") from error
    if rows != (len(images),) or copies.shape != images.shape or copies.dtype != np.float32:
        raise ValueError(
            f"The transform {transform!r} drew {rows} rows and gave {copies.dtype} {copies.shape}, not {wanted}."
        )
    return copies


# -------------------------------------------------------------------------------------------- records, tables, figures

RESULTS = pathlib.Path(__file__).parent / "results"


def read_results(table="runs", folder=RESULTS):
    """A table of records: "runs", a row a run, or "curves", a row an epoch; empty where there is none."""
    path = pathlib.Path(folder) / f"{table}.csv"
    return (
        pd.read_csv(path, dtype={"id": str}, keep_default_na=False, na_values=[""]) if path.exists() else pd.DataFrame()
    )


def publish(runs, run, folder=RESULTS, **which):
    """Put a finished run into the records, in place of an older one of its name; `which` gives study and preset."""
    for table, frame in (("runs", runs.table([run])), ("curves", runs.curves([run]))):
        frame = frame.assign(**which) if table == "runs" else frame
        old = read_results(table, folder)
        if len(old):
            frame = pd.concat([old[old["id"] != frame["id"].iloc[0]], frame])
        temporary = pathlib.Path(folder) / f"{table}.writing"
        frame.to_csv(temporary, index=False, float_format="%.6g")
        os.replace(temporary, temporary.with_suffix(".csv"))


plt.rcParams["figure.dpi"] = 80  # small files
COLOURS = {"Supervised": "#000000", "SemiC": "#0072B2", "SemiCT": "#D55E00", "SemiCTE": "#009E73"}  # Okabe and Ito's
METRICS = ["loss", "loss_supervised", "loss_consistency", "accuracy", "agreement"]
_PRINTED = """noise Supervised - 2.26 - 0.639 -
noise SemiC 1.72 1.69 0.03 0.611 0.934
noise SemiCT 14.5 14.5 0.0 0.1 1.0
noise SemiCTE 1.491 1.455 0.036 0.649 0.931
shift Supervised - 2.11 - 0.683 -
shift SemiC 0.84 0.76 0.08 0.748 0.887
shift SemiCT 0.76 0.70 0.07 0.773 0.890
shift SemiCTE 0.793 0.723 0.07 0.762 0.900
rotation Supervised - 2.84 - 0.667 -
rotation SemiC 1.53 1.44 0.09 0.756 0.932
rotation SemiCT 14.5 14.5 0.0 0.1 1.0
rotation SemiCTE 1.7 1.283 0.417 0.713 0.819"""
# The report's Table 1. It prints 0.1 % twice where its loss of 14.5 shows the fraction 0.1.
REPORT = pd.read_csv(io.StringIO(_PRINTED), sep=" ", names=["transform", "method", *METRICS], na_values=["-"])


def table_1(sources, metrics=("accuracy", "agreement", "loss_supervised", "loss_consistency")):
    """Table 1 with a column a metric and source: DataFrame of text, mean ± standard deviation where n > 1.

    sources: dict of a name to rows with the columns transform, method and metrics, as `REPORT` or of `Runs.table`.
    """
    columns = {}
    for metric in metrics:
        form = "{:.1%}" if metric in ("accuracy", "agreement") else "{:.2f}"
        for name, rows in sources.items():
            for _, row in REPORT.iterrows():
                key = (row["transform"], row["method"])
                found = rows[(rows["transform"] == key[0]) & (rows["method"] == key[1])] if len(rows) else rows
                values = found[metric].dropna() if len(found) else []
                spread = f" ± {form.format(np.std(values, ddof=1))} (n = {len(values)})" if len(values) > 1 else ""
                text = form.format(np.mean(values)) + spread if len(values) else ("-" if len(found) else "not run")
                columns.setdefault((metric.replace("_", " "), name), {})[key] = text
    return pd.DataFrame(columns).rename_axis(["transform", "method"])


def show_accuracy(sources, heading):
    """Draw the accuracy of the four ways, a panel a transform: report beside ours."""
    frame = pd.concat([rows.assign(source=name) for name, rows in sources.items() if len(rows)])
    transforms = [name for name in ("noise", "shift", "rotation") if name in set(frame["transform"])]
    figure, axes = plt.subplots(1, len(transforms), figsize=(3.2 * len(transforms), 3), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], transforms, strict=True):
        part = frame[frame["transform"] == name].assign(accuracy=lambda rows: 100 * rows["accuracy"])
        how = {"order": list(COLOURS), "hue": "source", "errorbar": "sd", "palette": "gray", "ax": axis}
        sns.barplot(part, x="method", y="accuracy", legend=axis is axes[0][0], **how)
        axis.axhline(10, color="0.5", linewidth=0.8, linestyle=":")
        axis.set(title=name, xlabel="", ylabel="test accuracy (%)", ylim=(0, 100))
        for tick in axis.get_xticklabels():
            tick.set(color=COLOURS[tick.get_text()], fontsize=8)
    axes[0][0].legend(title="", fontsize=8)
    figure.suptitle(heading)
    figure.tight_layout()


def show_curves(curves, heading):
    """Draw both losses and the accuracy over the epochs, training dashed and validation solid, as in Figure 6."""
    if not len(curves):
        return print("No epoch has been trained.")
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.8))
    for axis, metric in zip(axes, ("loss_supervised", "loss_consistency", "accuracy"), strict=True):
        for number, (name, part) in enumerate(curves.groupby("transform", sort=False)):
            colour = sns.color_palette("colorblind")[number]
            how = {"color": colour, "marker": "." if len(part) == 1 else ""}
            axis.plot(part["epoch"], part[metric], linestyle="--", linewidth=1, label=f"{name}, training", **how)
            axis.plot(part["epoch"], part[f"val_{metric}"], label=f"{name}, validation", **how)
        unit = "" if metric == "accuracy" else " (nats)"
        axis.set(xlabel="epoch", ylabel=metric.replace("_", " ") + unit)
    axes[0].legend(fontsize=8)
    figure.suptitle(heading)
    figure.tight_layout()


def show_pairs(images, copies, heading):
    """Draw images in a row and their copies below them: float (n, height, width, channels), 0 ... 1."""
    figure, axes = plt.subplots(2, len(images), figsize=(0.9 * len(images), 2.2), squeeze=False)
    for row, pictures in zip(axes, (images, copies), strict=True):
        for axis, picture in zip(row, np.asarray(pictures), strict=True):
            axis.imshow(np.clip(picture, 0, 1).squeeze(), cmap="gray")
            axis.axis("off")
    figure.suptitle(heading, fontsize=10)
    figure.tight_layout(pad=0.3)
