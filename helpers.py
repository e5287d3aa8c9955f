"""The plumbing of reproduction.ipynb, in its order; the method itself stands there, in the cells tagged `method`.

"The report" is the student report named in README.md. Images are (n, height, width, channels) throughout.
"""

import ast
import dataclasses
import dis
import gc
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import linecache
import os
import pathlib
import pickle
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time

import filelock
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy.ndimage
import seaborn as sns
import tqdm
from IPython import get_ipython

# ----------------------------------------------------------------------------------------- environment and precision

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow's page on processors and absent GPUs
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # 1.3 to 2.8 times as fast on AMD's processors
_installed = [name for name in ("tensorflow", "jax") if importlib.util.find_spec(name)]
BACKEND = os.environ.setdefault("KERAS_BACKEND", _installed[0] if _installed else "tensorflow")
if BACKEND not in ("tensorflow", "jax"):
    raise ValueError(f"KERAS_BACKEND is {BACKEND!r}: set it to tensorflow or jax, or unset it, and restart the kernel.")
if _limits := [name for name in ("KERAS_MAX_EPOCHS", "KERAS_MAX_STEPS_PER_EPOCH") if os.environ.get(name)]:
    raise ValueError(f"{' and '.join(_limits)} would cut trainings short: unset it and restart the kernel.")

_kept = os.dup(2)
with open(os.devnull, "w") as _nowhere:
    os.dup2(_nowhere.fileno(), 2)  # TensorFlow writes there before it reads how little it is to write
try:
    import keras
    from keras import ops

    if BACKEND == "tensorflow":
        import tensorflow as tf

        tf.get_logger().setLevel("ERROR")  # it warns of each new size of pictures
        tf.config.experimental.enable_tensor_float_32_execution(False)  # 10 bits are too few for points
        ACCELERATORS = tf.config.list_physical_devices("GPU")
    else:
        import jax

        ACCELERATORS = [device for device in jax.devices() if device.platform != "cpu"]
        jax.config.update("jax_default_matmul_precision", "float32")
        if (count := len(jax.devices())) > 1:  # as many as divide all batches
            devices = keras.distribution.list_devices()[: 4 if count >= 4 else 2]
            keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
finally:
    os.dup2(_kept, 2)
    os.close(_kept)
if keras.backend.backend() != BACKEND:
    raise ValueError(f"Keras already runs on {keras.backend.backend()!r}, not {BACKEND!r}: restart the kernel.")
keras.config.set_floatx("float32")  # a keras.json of the reader's may say otherwise
keras.config.set_epsilon(1e-7)
keras.config.set_image_data_format("channels_last")
PROCESSOR = pathlib.Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
gc.freeze()  # what is loaded stays: else Python looks through it at every seventh picture of a preview, for a second


def environment():
    """What can change a number or a time, kept with every run: dict of str."""
    names = re.findall(r"model name\s*: (.*)", PROCESSOR) or [platform.machine()]
    device = f"{names[0]}, {os.environ.get('TF_NUM_INTRAOP_THREADS') or os.cpu_count()} threads"
    if ACCELERATORS:
        details = {} if BACKEND == "jax" else tf.config.experimental.get_device_details(ACCELERATORS[0])
        kind = details.get("device_name") or getattr(ACCELERATORS[0], "device_kind", "GPU")
        device = f"{len(ACCELERATORS) if BACKEND == 'jax' else 1} x {kind}"  # TensorFlow uses the first alone
    git = ["git", "-C", str(pathlib.Path(__file__).parent), "rev-parse", "--short=9", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    used = f"{BACKEND} {sys.modules[BACKEND].__version__}, keras {keras.__version__}, python {sys.version.split()[0]}"
    return {"device": device, "backend": used, "date": time.strftime("%Y-%m-%d"), "commit": commit}


def fastest_precision(width):
    """The number type in which this device multiplies fastest: name of a Keras policy; all but products is float32."""
    if not ACCELERATORS:
        bits = re.search(r"\b(amx_bf16|avx512_bf16)\b", PROCESSOR) and BACKEND == "tensorflow" and width >= 16
        return "mixed_bfloat16" if bits else "float32"
    if BACKEND == "tensorflow":
        capability = tf.config.experimental.get_device_details(ACCELERATORS[0]).get("compute_capability", (0, 0))
    else:  # a TPU has none, and bfloat16
        capability = tuple(map(int, getattr(ACCELERATORS[0], "compute_capability", "9.0").split(".")))
    return "mixed_bfloat16" if capability >= (8, 0) else "mixed_float16" if capability >= (7, 0) else "float32"


# XLA for the whole step? On processors TensorFlow is three times faster without.
JIT_COMPILE = "auto" if ACCELERATORS or BACKEND == "jax" else False

# ---------------------------------------------------------------------------------------------------------------- data

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_SHA256 = "e315bd6f94c3482b2554feac2527d82c9d681329526c5753457de1bab30e0a21"  # four arrays, labels int32


@dataclasses.dataclass(frozen=True)
class Data:
    """Images, uint8 (n, height, width, channels), 0 ... 255, and labels, integers (n,) or of pixels, -1 for none."""

    name: str  # tells these images from others in the names of runs
    classes: tuple
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    note: str = ""  # what a title has to say where the images are generated ones
    validation: int = 1000  # so many of the training images, the last, are for validation

    def __post_init__(self):
        classes = set(range(len(self.classes)))
        for part in ("train", "test"):
            images, labels = getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")
            has = f"{self.name}: {part} images {images.dtype} {images.shape}, labels {labels.dtype} {labels.shape}"
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
                wanted = "uint8 (n, height, width, channels), 0 ... 255, with 1 or 3 channels, last"
                raise ValueError(f"{has}: images must be {wanted}.")
            if labels.dtype.kind != "i" or labels.shape not in (images.shape[:1], images.shape[:3]):
                raise ValueError(f"{has}: labels must be integers, one an image or pixel, signed, not one-hot.")
            if images.shape[1:] != self.train_images.shape[1:] or not len(images) or self.validation < 1:
                raise ValueError(f"{has}: there must be images for training, validation and test, all of one size.")
            known = set(np.unique(labels).tolist()) - {-1}
            if known - classes or (part == "train" and classes - known):
                wanted = f"0 ... classes - 1, all of the {len(classes)} in training"
                raise ValueError(f"{self.name} has {part} labels {sorted(known)}; they must be {wanted}.")


def load_data(path=None, generate=False):
    """Load CIFAR-10, or images of one's own: `Data`.

    path: an .npz with x_train, x_test, y_train, y_test as in `Data`, labels also (n, 1), and perhaps `classes`, names;
    by default what CIFAR10_NPZ names, else Keras's download, and where that fails rings, if they are to be generated.
    Raises FileNotFoundError, ValueError (it holds something else), OSError (no download).
    """
    names = "x_train", "y_train", "x_test", "y_test"
    if path := path or os.environ.get("CIFAR10_NPZ"):
        arrays = read_arrays(path, "CIFAR10_NPZ")
    else:
        print("Keras loads CIFAR-10. The first time it downloads 170 MB from a slow host, which takes minutes.")
        try:
            arrays = dict(zip(names, keras.tree.flatten(keras.datasets.cifar10.load_data()), strict=True))
        except Exception as error:  # Keras raises a bare Exception
            if not generate:
                way = f"Connect to the network, or set CIFAR10_NPZ to an .npz with {', '.join(names)}."
                raise OSError(f"CIFAR-10 cannot be downloaded ({error}). {way}") from error
            print(f"{error}\nGoing on with GENERATED RINGS: nothing below is a result on CIFAR-10.")
            return generate_rings()
    if missing := set(names) - set(arrays):
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}.")
    labels = (one.ravel() if one.shape[1:] == (1,) else one for one in (arrays["y_train"], arrays["y_test"]))
    train, test = (one.astype("int32") if one.dtype.kind in "ui" else one for one in labels)
    found = digest(arrays["x_train"], train, arrays["x_test"], test)
    name = "cifar10" if found == CIFAR10_SHA256 else f"{pathlib.Path(path or 'CIFAR-10').stem}-{found[:8]}"
    classes = CLASSES if name == "cifar10" else map(str, arrays.get("classes", np.unique(train[train >= 0])))
    return Data(name, tuple(classes), arrays["x_train"], train, arrays["x_test"], test)


def read_arrays(path, variable):
    """The arrays of an .npz."""
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; {variable}, or path, must name an .npz.")
    try:
        with np.load(path) as file:
            return dict(file)
    except Exception as error:  # altered bytes raise a dozen kinds
        raise ValueError(f"{path} cannot be read as an .npz of arrays: {error}") from error


def digest(*arrays):
    """SHA-256 of the contents of arrays."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


def generate_rings(train=25000, test=2000, seed=0):
    """Make a stand-in for CIFAR-10, rings on noise about a random centre, whose width alone tells the class: `Data`."""
    random, count = np.random.default_rng(seed), train + test
    labels = random.integers(0, 10, count, dtype="int32")
    rows, columns = np.mgrid[:32, :32][:, None] - random.uniform(8, 24, (2, count, 1, 1)).astype("float32")
    waves = np.sin(np.hypot(rows, columns) * (0.4 + 0.16 * labels.astype("float32"))[:, None, None])[..., None]
    colours = random.uniform(20, 100, (count, 1, 1, 3)).astype("float32")
    images = 128 + colours * waves + 20 * random.standard_normal((count, 32, 32, 3), dtype="float32")
    images, note = images.clip(0, 255).astype(np.uint8), " (generated rings, not CIFAR-10)"
    return Data("rings", CLASSES, images[:train], labels[:train], images[train:], labels[train:], note)


# ------------------------------------------------------------------------------------------------------------ the warp


def affine_points(maps, height, width):
    """Points (row, column) that maps, float32 (n, 2, 3), send a picture's pixels to: float32 (n, height, width, 2)."""
    pixels = np.stack([*np.indices((height, width)), np.ones((height, width))], axis=-1).astype("float32")
    return ops.einsum("hwk,nik->nhwi", pixels, ops.cast(maps, "float32"))


def inside(points, height, width):
    """Whether points (..., 2), (row, column), lie in a picture, up to its border pixels' centres: bool (...)."""
    return ops.all((points >= 0) & (points <= np.array([height - 1, width - 1], "float32")), axis=-1)


def _compiled(function):
    """The function compiled as a whole, which TensorFlow does not do by itself: four to ten times faster."""
    return tf.function(function, jit_compile=True) if BACKEND == "tensorflow" else function


@_compiled
def cubic_sample(images, points):
    """Read images (n, height, width, channels) at points by cubic splines, 0 outside: float32 (n, h, w, channels).

    points: float32 (n, h, w, 2), (row, column) in pixels. It is elasticdeform's order 3 and mode "constant"; gradients
    flow to the images.
    """
    count, (height, width, channels) = ops.shape(images)[0], images.shape[1:]
    # Knots of the splines through the pixels: a linear filter along either axis, here as a matrix.
    sides = [np.eye(side, dtype="float32") for side in (height, width)]
    down, across = (scipy.ndimage.spline_filter1d(side, axis=0, output="float32", mode="mirror") for side in sides)
    knots = ops.tensordot(ops.cast(images, "float32"), down, axes=[[1], [1]])  # faster than einsum here
    knots = ops.transpose(ops.tensordot(knots, across, axes=[[1], [1]]), (0, 2, 3, 1))
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
        mean, variance = ([], []) if training else (self.moving_mean.value, self.moving_variance.value)
        values = {"scale": self.gamma.value, "offset": self.beta.value, "mean": mean, "variance": variance}
        how = {"epsilon": self.epsilon, "is_training": training}
        outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(x=inputs, **values, **how)
        if training:
            samples = tf.cast(tf.size(inputs) / tf.size(mean), "float32")
            variance *= (samples - 1) / samples  # the op returns the unbiased one, Keras keeps the biased one
            for moving, current in ((self.moving_mean, mean), (self.moving_variance, variance)):
                moving.assign(moving * self.momentum + tf.stop_gradient(current) * (1 - self.momentum))
        return outputs


class LeakyReLU(keras.layers.LeakyReLU):
    """Keras's leaky ReLU; on TensorFlow with a gradient from its output, so that its input need not be kept."""

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


# ------------------------------------------------------------------------------------------------------ a run's name


def fingerprint(*things):
    """Digest of values and of the definitions that they rest on, followed to what they use: 12 hexadecimal digits.

    Own definitions count by their syntax, a library's by name. Raises ValueError where things cannot be told apart.
    """
    content = io.BytesIO()
    try:
        _Namer(content).dump(things)
    except (TypeError, AttributeError, pickle.PicklingError, RecursionError) as error:
        raise ValueError(f"A run's name cannot tell {things!r} from others ({error}): use numbers.") from error
    return hashlib.sha256(content.getvalue()).hexdigest()[:12]


class _Namer(pickle.Pickler):
    """Pickles definitions by their source, with all that they use, when they are met for the first time."""

    def __init__(self, file):
        super().__init__(file, protocol=4)
        self.fast = True  # equal values give equal bytes, be they one object or two
        self.met = {}  # numbers of definitions, by identity

    def reducer_override(self, thing):
        if isinstance(thing, keras.layers.Layer):
            config = {name: value for name, value in thing.get_config().items() if name != "name"}
            return list, ([type(thing), config, thing.get_weights()],)
        if isinstance(thing, (property, staticmethod, classmethod)):
            thing = getattr(thing, "fget", None) or thing.__func__
        while hasattr(thing, "__wrapped__") and not (inspect.isfunction(thing) and _is_own(thing)):
            thing = thing.__wrapped__  # what a library's decorator made
        if not (inspect.isclass(thing) or inspect.isfunction(thing)) or thing in (str, list):
            return NotImplemented
        if not _is_own(thing):
            return str, (f"{thing.__module__}.{thing.__qualname__}",)
        parts = [thing.__qualname__, self.met.get(id(thing), len(self.met))]
        if id(thing) not in self.met:
            self.met[id(thing)] = len(self.met)
            parts += _class_parts(thing) if isinstance(thing, type) else _function_parts(thing)
        return list, (parts,)


def _is_own(thing):
    """Whether a module, class or function is the reader's or this project's, not an installed library's."""
    module = thing if inspect.ismodule(thing) else sys.modules.get(thing.__module__)
    file = getattr(module, "__file__", None) or sysconfig.__file__
    if inspect.isfunction(thing) and os.path.exists(thing.__code__.co_filename):
        file = thing.__code__.co_filename
    elif module is sys.modules["__main__"]:
        return True
    return not ("-packages" in file or file.startswith(sysconfig.get_path("stdlib")))


def _class_parts(thing):
    """Bases, and attributes but for those that Python or a decorator made."""
    parts = {}
    for name, value in vars(thing).items():
        code = getattr(inspect.unwrap(value) if callable(value) else value, "__code__", None)
        made = getattr(code, "co_filename", "") == "<string>" or getattr(value, "__module__", "") == "dataclasses"
        if not made and (callable(value) or not name.startswith(("__", "_abc_"))):
            parts[name] = value
    return [thing.__bases__, parts]


_OWN_LINES = pathlib.Path(__file__).read_text().splitlines(True)  # now: the file may be another one when a run starts


def _function_parts(thing):
    """Syntax, defaults, and the values of the names that are used."""
    code, own = thing.__code__, thing.__code__.co_filename == __file__
    lines = _OWN_LINES if own else linecache.getlines(code.co_filename)
    codes = [code]
    for one in codes:
        codes += filter(inspect.iscode, one.co_consts)
    if code.co_name == "<lambda>" or not lines:  # there may be two in a line
        source = [[c.co_code, c.co_names, [v for v in c.co_consts if not inspect.iscode(v)]] for c in codes]
    else:
        block = "".join(inspect.getblock(lines[code.co_firstlineno - 1 :]))
        tree = ast.parse("if True:\n" + block if block[0].isspace() else block)
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        source = ast.unparse(tree)
    steps = [step for one in codes for step in dis.get_instructions(one)]
    names = sorted({step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")})
    attributes = sorted({name for one in codes for name in one.co_names})
    cells = {name: cell.cell_contents for name, cell in zip(code.co_freevars, thing.__closure__ or (), strict=True)}
    found = [thing.__globals__[name] for name in names if name in thing.__globals__]
    modules = [value for value in found if inspect.ismodule(value) and _is_own(value)]
    found += [vars(module)[name] for module in modules for name in attributes if name in vars(module)]
    # Of this module its functions and classes: what its constants say is the same for all runs.
    used = [value for value in found if callable(value) or not (own or value is None or inspect.ismodule(value))]
    return [source, thing.__defaults__, thing.__kwdefaults__, used, {k: v for k, v in cells.items() if v is not thing}]


# --------------------------------------------------------------------------------------------------- the store of runs


def state(model):
    """All that training changes, in a fixed order: weights, averages, random states, the optimizer's variables."""
    return [*model.variables, *model.optimizer.variables]


def name_of(transform):
    """A transform's name: its attribute `name`, else its class's."""
    return getattr(transform, "name", type(transform).__name__.lower())


def title(run):
    """A run in words."""
    return f"{run.method}, {name_of(run.transform)}, seed {run.seed}"


class Runs:
    """Runs in a folder, a file each: curves, and the state to go on from, replaced as a whole after every epoch.

    The file is a zip of arrays (`numpy.savez`), each with a checksum that is tested when it is read.
    """

    def __init__(self, folder, train):
        """folder: path; train: the function (run, data, runs) that trains a run by `fit`."""
        self.folder, self.train, self.heading = pathlib.Path(folder).expanduser(), train, ""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"No runs can be kept in {folder} ({error}): choose another in section 1.") from error

    def path(self, run):
        """The file of a run: its name changes with the run's fields and the definitions that they and train use."""
        name = re.sub(r"[^\w-]+", "_", f"{run.method}-{name_of(run.transform)}")
        return self.folder / f"{name}-{fingerprint(run, self.train)}.npz"

    def id(self, run):
        return self.path(run).stem[-12:]

    def __contains__(self, run):
        return self._read(run) is not None  # finished or not; a damaged file is none

    def about(self, run):
        """What the file says of the run without its state: dict with `history`, `test`, `made`, or None."""
        return (self._read(run, state=False) or (None,))[0]

    def _read(self, run, state=True):
        path = self.path(run)
        try:
            with np.load(io.BytesIO(path.read_bytes())) as file:  # in memory no damage looks like an error of the disk
                about = json.loads(str(file["about"]))
                return about, [file[f"{place:04}"] for place in range(len(file.files) - 1)] if state else None
        except FileNotFoundError:
            return None
        except (OSError, MemoryError):  # a disk that does not answer is no damage
            raise
        except Exception as error:  # whatever zip, NumPy and JSON make of altered bytes
            aside = path.with_suffix(f".damaged-{time.time_ns()}")
            os.replace(path, aside)
            print(f"{path} is damaged ({type(error).__name__}: {error}). It is kept as {aside.name} and trained again.")
            return None

    def write(self, run, about, model):
        content, temporary = io.BytesIO(), self.path(run).with_suffix(".writing")
        arrays = {f"{place:04}": np.asarray(value) for place, value in enumerate(state(model))}
        np.savez(content, about=json.dumps(about), **arrays)
        try:
            with open(temporary, "wb") as file:
                file.write(content.getbuffer())
                os.fsync(file.fileno())
            os.replace(temporary, temporary.with_suffix(".npz"))
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise OSError(error.errno, f"{error.strerror}; what was saved before is intact", str(temporary)) from error

    def check(self, run):
        """Raise ValueError for numbers that no run can have, and for a definition that is not the notebook's latest."""
        whole = {"epochs": 1, "labelled": 1, "unlabelled": 0, "width": 1, "batch_size": 1, "steps": 1, "seed": 0}
        for name, low in (whole | {"learning_rate": 0, "weight": 0}).items():
            value, kind = getattr(run, name), (int, np.integer) if name in whole else (int, float, np.number)
            if (name, value) != ("steps", None) and not (isinstance(value, kind) and low <= value < float("inf")):
                raise ValueError(f"{name} is {value!r}; it must be a{' whole' * (name in whole)} number from {low}.")
        kinds = run.model, run.pairs, run.network, type(run.transform), self.train
        for one in filter(_is_own, itertools.chain(*(getattr(kind, "__mro__", [kind]) for kind in kinds))):
            now = getattr(sys.modules["__main__"], one.__name__, one)
            if now is not one and fingerprint(now) != fingerprint(one):
                raise ValueError(f"{one.__name__} was edited after this run was made: run the cells below it as well.")

    def fit(self, run, model, batches, validation, test):
        """Train what of a run is not yet trained, and test it once: dict as of `about`.

        model: compiled; it ends in the state of the trained run. batches: function of `first`, a batch's number, to
        endless `Pairs` from there. validation, test: `Pairs`, the latter for after the last epoch. Raises OSError where
        the disk is full (what was written is intact), FloatingPointError as `_finite`.
        """
        with _locked(self.path(run).with_suffix(".lock")):
            if not model.optimizer.built:
                model.optimizer.build(model.trainable_variables)
            about, values = self._read(run) or ({"history": [], "test": None, "ended": None}, None)
            variables = state(model)
            if values and [tuple(variable.shape) for variable in variables] != [value.shape for value in values]:
                raise ValueError(f"{self.path(run)} holds another network than the code builds now: rename it.")
            for variable, value in zip(variables, values or (), strict=False):
                variable.assign(value)
            done = len(about["history"])
            keeper = _Keeper(self, run, about)
            with keeper.bar:
                if done < run.epochs and not about["ended"]:
                    try_transform(run.transform, batches().images[:2].astype("float32") / 255)
                    how = {"initial_epoch": done, "epochs": run.epochs, "steps_per_epoch": run.steps_per_epoch}
                    how |= {"shuffle": False, "validation_data": validation}  # the batches have their order already
                    model.fit(batches(first=done * run.steps_per_epoch), callbacks=[keeper], verbose=0, **how)
                if about["test"] is None:
                    about["test"] = _finite(model.evaluate(test, return_dict=True, verbose=0), "the test")
                    about["made"] = environment() | {"precision": run.precision}
                    self.write(run, about, model)
            verb = about["ended"] or ("kept" if done == run.epochs else "trained")
            accuracy = f"accuracy {about['history'][-1]['val_accuracy']:.1%} on the validation images"
            print(f"{keeper.heading}: {verb}; {accuracy}", flush=True)
        return about

    def table(self, plan):
        """The finished ones of some runs, a row each: DataFrame with the columns of results/runs.csv."""
        rows = []
        for run, about in [(run, about) for run in plan if (about := self.about(run))]:
            plain = {name: value for name, value in vars(run).items() if isinstance(value, (str, int, float))}
            names = {"training": run.model.__name__, "transform": name_of(run.transform), "steps": run.steps}
            start = {"id": self.id(run), "start": run.start and self.id(run.start), "ended": about["ended"]}
            epochs = about["history"]
            sums = {"updates": len(epochs) * run.steps_per_epoch, "seconds": sum(row["seconds"] for row in epochs)}
            rows += [start | plain | names | about["test"] | sums | about["made"]] if about["test"] else []
        return pd.DataFrame(rows, columns=None if rows else KEYS)

    def curves(self, plan):
        """Every epoch of some runs so far, a row each: DataFrame with the columns of results/curves.csv."""
        frames = [pd.DataFrame()]
        for run, about in [(run, about) for run in plan if (about := self.about(run))]:
            names = {"id": self.id(run), "method": run.method, "transform": name_of(run.transform)}
            frames.append(pd.DataFrame(about["history"]).assign(**names))
        return pd.concat(frames)

    def train_each(self, plan, data):
        """Train runs one after the other; one that fails says why, and the others go on."""
        for number, run in enumerate(plan, start=1):
            self.heading = f"run {number} of {len(plan)}, "
            try:
                self.train(run, data, self)
            except FloatingPointError as error:
                print(f"\n{self.heading}{title(run)} failed: {error}")
            finally:
                self.heading = ""


def _locked(path):
    """Lock of a run; where another kernel trains it, a line says that this one waits."""
    lock = filelock.FileLock(path)
    try:
        return lock.acquire(timeout=0.1)
    except filelock.Timeout:
        print(f"Another kernel trains {path.stem}: waiting for it.", flush=True)
        return lock.acquire()


def _finite(metrics, when):
    """Metrics as floats; raises FloatingPointError where one is NaN or infinite."""
    for name, value in metrics.items():
        if not np.isfinite(value):
            raise FloatingPointError(f"{name} is {value} in {when}; what was trained before is kept.")
    return {name: float(value) for name, value in metrics.items()}


class _Keeper(keras.callbacks.Callback):
    """Writes a run's file after every epoch, says how far it is, and ends it where it has collapsed for good."""

    def __init__(self, runs, run, about):
        super().__init__()
        self.runs, self.run, self.about, self.seconds, self.began = runs, run, about, 0.0, 0.0
        steps, done = run.steps_per_epoch * run.epochs, run.steps_per_epoch * len(about["history"])
        self.now, self.heading = time.monotonic(), runs.heading + title(run)
        how = {"desc": self.heading, "file": sys.stdout, "disable": not get_ipython(), "leave": False}
        form = "{desc}: {percentage:.0f} %, {remaining} left{postfix}"
        self.bar = tqdm.tqdm(total=steps, initial=done, bar_format=form, **how)

    def on_test_batch_end(self, batch, logs=None):
        gap, self.now = time.monotonic() - self.now, time.monotonic()
        self.seconds += gap if gap < 60 else 0  # longer: the machine slept, or somebody stopped the process

    def on_train_batch_end(self, batch, logs=None):
        self.on_test_batch_end(batch)
        self.bar.set_postfix({name: float(logs[name]) for name in ("loss", "accuracy", "agreement")}, refresh=False)
        self.bar.update()

    def on_epoch_end(self, epoch, logs=None):
        history = self.about["history"]
        row, self.began = {"epoch": epoch + 1, "seconds": self.seconds - self.began}, self.seconds
        history.append(_finite(row | logs, f"epoch {epoch + 1}"))
        last = history[-10:]
        if len(last) == 10 and all(one["val_largest_class"] > 0.999 for one in last):
            self.about["ended"] = f"collapsed: one class for all validation images in epochs {last[0]['epoch']:.0f} on"
            self.model.stop_training = True
        self.runs.write(self.run, self.about, self.model)


def try_transform(transform, images):
    """Raise ValueError, which says what is wrong, unless a transform makes copies of images, float32 (n, h, w, c).

    It is drawn and called twice, which must give the same, then compiled as in training, where it sees no values.
    """
    wanted = "draw must give float32 (.astype('float32')) or integers, a row an image, from its first argument alone; "
    wanted += "the call float32 as the images, finite, by keras.ops"
    drew, copies, parts = "nothing", [], []
    try:
        for _ in range(2):
            drawn = transform.draw(np.random.default_rng(0), images.shape)
            parts = [np.asarray(part) for part in keras.tree.flatten(drawn)]
            drew = ", ".join(f"{part.dtype} {part.shape}" for part in parts)
            given = ops.array(images), keras.tree.map_structure(ops.array, drawn)
            copies.append(np.asarray(transform(*given)))
        call = transform.__call__
        (tf.function(call, autograph=False) if BACKEND == "tensorflow" else jax.jit(call))(*given)
    except Exception as error:
        raise ValueError(f"The transform {transform!r} drew {drew} and fails ({error}); {wanted}.") from error
    gave = copies[0].shape, copies[0].dtype.name
    as_wanted = {part.shape[:1] for part in parts} == {images.shape[:1]} and gave == (images.shape, "float32")
    if not as_wanted or not np.allclose(*copies, atol=1e-5):  # nor is NaN close to NaN
        raise ValueError(f"The transform {transform!r} drew {drew} and gave {gave[1]} {gave[0]}; {wanted}.")


# -------------------------------------------------------------------------------------------- records, tables, figures

RESULTS = pathlib.Path(__file__).parent / "results"
KEYS = ["id", "study", "preset", "training", "transform", "method", "width", "seed"]  # what rows are chosen by


def read_results(table="runs", folder=RESULTS):
    """A table of records: "runs", a row a run, or "curves", a row an epoch; empty where there is none."""
    path = pathlib.Path(folder) / f"{table}.csv"
    return pd.read_csv(path, dtype={"id": str, "start": str}) if path.exists() else pd.DataFrame(columns=KEYS)


plt.rcParams.update({"figure.dpi": 77, "xtick.labelsize": 8})  # small files, room for names
COLOURS = {"Supervised": "#000000", "Supervised, long": "#777777", "Supervised, slow": "#BBBBBB"}
COLOURS |= {"SemiC": "#0072B2", "SemiC, weight 0": "#99C7E0", "SemiCT": "#D55E00", "SemiCTE": "#009E73"}  # Okabe, Ito
COLOURS |= {"noise": "#56B4E9", "shift": "#E69F00", "rotation": "#CC79A7"}
REPORT = read_results("report")  # Table 1. It prints 0.1 % twice where its loss of 14.5 shows the fraction 0.1.


def table_1(sources, metrics=("accuracy", "agreement", "cross_entropy", "loss_consistency")):
    """Table 1 with a column a metric and source: DataFrame of text, mean ± standard deviation where n > 1.

    sources: dict of a name to rows with the columns transform, method and metrics, as `REPORT` or of `Runs.table`.
    """
    columns = {}
    rows = pd.concat([rows[["transform", "method"]] for rows in sources.values() if len(rows)]).drop_duplicates()
    keys = rows.iloc[np.argsort(pd.factorize(rows["transform"])[0], kind="stable")].itertuples(index=False, name=None)
    for metric, name, (transform, method) in itertools.product(metrics, sources, keys):
        form = "{:.1%}" if metric.startswith(("accuracy", "agreement")) else "{:.2f}"
        found = sources[name].query("transform == @transform and method == @method")
        values = found[metric].dropna() if len(found) else []
        spread = f" ± {form.format(np.std(values, ddof=1))} (n = {len(values)})" if len(values) > 1 else ""
        text = form.format(round(np.mean(values), 6)) + spread if len(values) else ("-" if len(found) else "not run")
        columns.setdefault((metric.replace("_", " "), name), {})[transform, method] = text
    return pd.DataFrame(columns).rename_axis(["transform", "method"])


def show_accuracy(sources, heading):
    """Draw the accuracy of the four ways, a panel a transform, for each source of `table_1`; error bars: over seeds."""
    parts = {name.replace(", ", ",\n"): rows for name, rows in sources.items() if len(rows)}
    frame = pd.concat(parts, names=["source"]).eval("accuracy = 100 * accuracy").reset_index("source")
    ways = sorted(set(frame["method"]), key=[*COLOURS, *frame["method"]].index)
    how = {"hue": "method", "hue_order": ways, "palette": [COLOURS.get(way, "0.6") for way in ways], "errorbar": "sd"}
    how |= {"col_order": dict.fromkeys([*REPORT["transform"], *frame["transform"]]), "err_kws": {"linewidth": 1}}
    grid = sns.catplot(frame, kind="bar", x="source", y="accuracy", col="transform", height=2.4, aspect=1.4, **how)
    grid.set(xlabel="", ylabel="test accuracy (%)", ylim=(0, 100)).set_titles("{col_name}").refline(y=10, linestyle=":")
    grid.figure.suptitle(heading, y=1.05)


def show_curves(curves, heading):
    """Draw both losses and the accuracy over the epochs, training dashed and validation solid, as in Figure 6."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.8), layout="tight")
    labels = ("supervised loss (nats)", "consistency loss (nats)", "accuracy")
    for axis, metric, label in zip(axes, ("loss_supervised", "loss_consistency", "accuracy"), labels, strict=True):
        for prefix, line in (("val_", "-"), ("", "--")) if len(curves) else ():
            names = enumerate(dict.fromkeys(curves["transform"]))
            how = {"hue": "transform", "palette": {name: COLOURS.get(name, f"C{place}") for place, name in names}}
            how |= {"linestyle": line, "marker": "." * (set(curves["epoch"]) == {1}), "ax": axis}
            sns.lineplot(curves, x="epoch", y=prefix + metric, legend=prefix == "val_" and axis is axes[2], **how)
        axis.set(xlabel="epoch", ylabel=label, xlim=(0, None), ylim=(0, 1.05 * axis.dataLim.y1 if len(curves) else 1))
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(f"{heading}: training dashed, validation solid")


def show_pairs(images, copies, heading):
    """Draw images in a row and their copies below them: float (n, height, width, channels), 0 ... 1."""
    edges = [(0, 0), (0, 2), (0, 2), (0, 0)]  # white, below and to the right; one axis is drawn faster than twenty
    rows = [np.hstack(np.pad(np.clip(row, 0, 1), edges, constant_values=1)) for row in (images, copies)]
    _, axis = plt.subplots(figsize=(0.75 * len(images), 1.9))
    axis.imshow(np.vstack(rows).squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.axis("off")
    axis.set_title(heading, fontsize=10)
    plt.tight_layout(pad=0.3)
