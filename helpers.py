"""The plumbing of reproduction.ipynb.

The method itself (transforms, network, losses, training step) stands in the notebook, in the
cells tagged `method`. Here is what it rests on, in this order: environment, devices, settings, data,
warps, layers, runs and how they are resumed, tables, claims, the records in results/, figures, what section 12
shows, and the playground.

"The report" is the student report named in README.md; "section" means a section of the notebook.
"""

import ast
import collections
import contextlib
import csv
import dataclasses
import datetime
import dis
import errno
import functools
import gc
import hashlib
import html
import importlib.metadata
import inspect
import io
import itertools
import json
import math
import numbers
import os
import pathlib
import platform
import re
import shutil
import sys
import tempfile
import textwrap
import threading
import time
import types
import uuid
import zlib

import elasticdeform
import ipywidgets as widgets
import matplotlib.figure
import matplotlib.lines
import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy as np
import PIL.Image
import psutil
import scipy.ndimage
import scipy.stats
from IPython import get_ipython
from IPython.display import display


@contextlib.contextmanager
def _start_up_messages_hidden():
    """Keep TensorFlow's page on processors and absent GPUs out of the notebook.

    It goes straight to file descriptor 2, as do later remarks of the graph optimizer, of which level
    3 leaves what is fatal. Set TF_CPP_MIN_LOG_LEVEL=0 to see it all.
    """
    if os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3") == "0":
        yield
        return
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


if os.environ.setdefault("KERAS_BACKEND", "tensorflow") != "tensorflow":
    raise ValueError(
        f"KERAS_BACKEND is {os.environ['KERAS_BACKEND']!r}, and the method is written with TensorFlow's operations: "
        "unset it, or set it to 'tensorflow', and start the kernel again."
    )
with _start_up_messages_hidden():
    import keras
    import tensorflow as tf

    tf.config.list_physical_devices()
if keras.backend.backend() != "tensorflow":
    raise ValueError(
        f"Keras runs on {keras.backend.backend()!r}, and the method is written with TensorFlow's operations: start the "
        "kernel again and run the notebook from its first cell."
    )
tf.get_logger().setLevel("ERROR")  # its warnings on retracing mean nothing where every run has a model of its own

METHODS = ("Supervised", "SemiC", "SemiCT", "SemiCTE")

# What the released code does and the report does not say, by name. What each changes, and where that code does it, is
# told in section 10 of the notebook.
RELEASED_SWITCHES = (
    "inference_mode",
    "one_angle",
    "restored_moments",
    "restored_rate",
    "clipped_probabilities",
    "one_sided_loss",
    "filled_batches",
    "whole_shifts",
)

# What may make the method work better, tried one by one in section 11.
REFINEMENTS = ("ramp_up", "stopped_gradient", "decaying_rate", "averaged_weights", "balanced_batches")
SWITCHES = RELEASED_SWITCHES + REFINEMENTS
RECIPES = {
    "reported": frozenset(),
    "released": frozenset(RELEASED_SWITCHES),
    # Three that the validation images chose, and balanced batches for their unlabelled images; section 11.
    "sound": frozenset({"averaged_weights", "balanced_batches", "ramp_up", "stopped_gradient"}),
}
PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
METRICS = (
    "loss",
    "loss_supervised",
    "loss_consistency",
    "accuracy",
    "consistency",
    "accuracy_clean",
    "accuracy_transformed",
    "largest_class",
    "prediction_entropy",
)
OVERLAPS = ("dice", "iou")  # of networks that predict a class for every pixel

# Okabe and Ito's palette, which stays apart for colour-blind readers: one colour a method, throughout.
COLORS = {
    "Supervised": "#000000",
    "SemiC": "#0072B2",
    "SemiCT": "#D55E00",
    "SemiCTE": "#009E73",
}

# For lines that are not methods: seven of the same palette, and two more that differ from them.
WAY_COLORS = ("#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "#999999", "#882255")

# ------------------------------------------------------------------------------ environment


def environment():
    """Describe the machine and the versions, as kept in every run's record.

    Returns:
        dict of str: `device` (the GPU's or the processor's name), `gpu` ("yes" or "no"), `cores`
        (those that this process may use), and the versions of Python and of the packages that can change a number.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        device = tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU")
    else:
        lines = pathlib.Path("/proc/cpuinfo")
        names = (
            [line for line in lines.read_text().splitlines() if line.startswith("model name")] if lines.exists() else []
        )
        device = names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()
    versions = {"tensorflow": tf.__version__, "keras": keras.__version__, "numpy": np.__version__}
    versions["elasticdeform"] = importlib.metadata.version("elasticdeform")
    return {
        "device": device,
        "gpu": "yes" if gpus else "no",
        "cores": str(_cores()),
        "python": platform.python_version(),
        **versions,
    }


def _cores():
    """Processor cores that this process may use: less than the machine has where it was bound to some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def print_environment():
    """Print what `environment` found, and what to click where no GPU was."""
    found = environment()
    print(", ".join(f"{name} {found[name]}" for name in ("python", "tensorflow", "keras", "numpy", "elasticdeform")))
    print(f"ipywidgets {widgets.__version__}")
    print(f"device: {found['device']}, {found['cores']} cores, GPU: {found['gpu']}")
    if found["gpu"] == "no":
        print(
            "No GPU was found. The presets smoke, quick and standard are sized for a CPU.\n"
            "In Colab: Runtime > Change runtime type > T4 GPU, then Runtime > Run all."
        )


# ---------------------------------------------------------------------------------- devices


def device_strategy():
    """How the training is spread: over all GPUs of this machine where there are several.

    Returns:
        tf.distribute.Strategy.

    Raises:
        ValueError: TF_CONFIG is not JSON with a cluster.
        NotImplementedError: TF_CONFIG names several machines. Keras 3 cannot train on them: its `fit` fails
            on what `MultiWorkerMirroredStrategy` hands it (Keras's issue 20585; tests/test_devices.py shows it).
    """
    try:
        cluster = json.loads(os.environ.get("TF_CONFIG") or "{}").get("cluster", {})
        machines = sum(map(len, cluster.values()))
    except (ValueError, AttributeError, TypeError):
        raise ValueError(
            f"TF_CONFIG is {os.environ['TF_CONFIG']!r}; it must be JSON with a cluster. On one machine, unset it."
        ) from None
    if machines > 1:
        raise NotImplementedError(
            "TF_CONFIG names several machines, and Keras 3 cannot train on more than one (its issue 20585). "
            "Unset TF_CONFIG; several GPUs of one machine are used without it."
        )
    gpus = tuple(device.name for device in tf.config.list_logical_devices("GPU"))
    return mirrored(gpus) if len(gpus) > 1 else tf.distribute.get_strategy()


@functools.cache  # two strategies over the same devices get in each other's way
def mirrored(devices):
    """MirroredStrategy over these devices, a tuple of their names."""
    return tf.distribute.MirroredStrategy(devices)


def give_to_all(strategy, batches):
    """Hand every batch, whole, to each device; each then takes its `own_share`.

    Args:
        strategy: tf.distribute.Strategy.
        batches: tf.data.Dataset.

    Returns:
        dataset for `fit` and `evaluate`, without an end: they need to be told the number of steps. (On several
        devices Keras looks at one batch more than it uses, and fails at the end of a set that ends.)
    """

    def copies(batch):
        return tf.data.Dataset.from_tensors(batch).repeat(strategy.num_replicas_in_sync)

    return strategy.distribute_datasets_from_function(lambda context: batches.flat_map(copies).repeat().prefetch(2))


def own_share(*tensors):
    """This device's part of a batch: with k devices every k-th image, with one all of them; None stays None.

    To be called in a training or test step. Images are fetched and transformed before, whole batches on every
    device, which costs next to nothing and makes the result the same for any number of devices.
    """
    context = tf.distribute.get_replica_context()
    first, step = context.replica_id_in_sync_group, context.num_replicas_in_sync
    return [tensor if tensor is None else tensor[first::step] for tensor in tensors]


def sum_over_devices(value):
    """Sum of a scalar that each device has one of; with one device the value itself."""
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, value)


def share_of_mean(values, weights):
    """What this device adds to the weighted mean over the whole batch; 0 where all weights are 0.

    Optimizers add up the gradients of all devices, so these shares must add up to the mean. A mean of the devices'
    own means would be wrong wherever labelled images are spread unevenly.

    Args:
        values: float (n,), or for every pixel (n, h, w), of the device's own images.
        weights: of the same shape.
    """
    return tf.math.divide_no_nan(tf.reduce_sum(values * weights), sum_over_devices(tf.reduce_sum(weights)))


# --------------------------------------------------------------------------------- settings


DEFAULTS = {
    "learning_rate": 1e-3,
    "fine_tuning_rate": 1e-5,
    "precision": "automatic",
    "recipe": "reported",
    "consistency_weight": 1.0,
    "seed": 0,
    "exact_repeats": False,
}


def default_settings(presets, preset, **changes):
    """Settings that the untouched controls give at a preset, in float32: a namespace as of `read_settings`.

    `transforms` is empty, unless `changes` names some.

    Raises:
        ValueError: an unknown preset, an unknown name in `changes`, or a value out of its range.
    """
    _check_choice("preset", preset, presets)
    values = DEFAULTS | {"preset": preset, "precision": "float32", "transforms": ()} | presets[preset]
    for name in changes:
        _check_choice("a setting", name, values)
    return _checked(values | changes)


def _checked(settings):
    """A namespace of settings, dict of name to value, after a look at those that are not sizes."""
    check_number("learning_rate", settings["learning_rate"], *RATES)
    check_number("fine_tuning_rate", settings["fine_tuning_rate"], *RATES)
    check_number("consistency_weight", settings["consistency_weight"], 0, 1000)
    _check_choice("recipe", settings["recipe"], RECIPES)
    _check_choice("precision", settings["precision"], PRECISIONS)
    return types.SimpleNamespace(**settings)


RATES = (1e-12, 1.0)  # what a learning rate may be


def check_number(name, value, lowest, highest):
    """Raise ValueError unless `value` is a real number, and no bool, with lowest <= value <= highest."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real) or not lowest <= value <= highest:
        raise ValueError(f"{name} is {value!r}; it must be a number from {lowest:g} to {highest:g}.")


def _check_choice(name, value, choices):
    if value not in tuple(choices):
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}.")


def settings_controls(presets, transforms):
    """Build the widgets of the settings section; nothing happens until `read_settings`.

    Args:
        presets: dict of preset name to dict of sizes.
        transforms: names of the transforms.

    Returns:
        namespace of widgets: `preset`, `transforms`, `learning_rate`, `fine_tuning_rate`,
        `precision`, `recipe`, `consistency_weight`, `seed`, `exact_repeats`, and `panel`, the box that shows them all.

    Raises:
        ValueError: REPRODUCTION_PRESET names no preset, or REPRODUCTION_RECIPE no recipe.
    """
    preset = _from_environment("REPRODUCTION_PRESET", presets, "quick")
    recipe = _from_environment("REPRODUCTION_RECIPE", RECIPES, DEFAULTS["recipe"])
    if not transforms:
        raise ValueError("transforms is empty; name at least one transform.")
    wide = {"style": {"description_width": "145px"}, "layout": {"width": "420px", "max_width": "96%"}}
    rate = {"min": -6, "max": -1, "step": 0.25, "readout_format": ".1e", **wide}  # .1e fits where 0.00000562 does not
    controls = types.SimpleNamespace(
        preset=widgets.Dropdown(options=list(presets), value=preset, description="preset", **wide),
        transforms=widgets.SelectMultiple(
            options=list(transforms), value=tuple(transforms), rows=len(transforms), description="transforms", **wide
        ),
        learning_rate=widgets.FloatLogSlider(value=DEFAULTS["learning_rate"], description="learning rate", **rate),
        fine_tuning_rate=widgets.FloatLogSlider(
            value=DEFAULTS["fine_tuning_rate"], description="SemiCT, SemiCTE rate", **rate
        ),
        precision=widgets.Dropdown(
            options=["automatic", *PRECISIONS], value=DEFAULTS["precision"], description="precision", **wide
        ),
        recipe=widgets.Dropdown(options=list(RECIPES), value=recipe, description="recipe", **wide),
        consistency_weight=widgets.FloatSlider(
            value=DEFAULTS["consistency_weight"], min=0.0, max=10.0, step=0.1, description="consistency weight", **wide
        ),
        seed=widgets.BoundedIntText(value=DEFAULTS["seed"], min=0, max=9999, description="seed", **wide),
        exact_repeats=widgets.Checkbox(value=DEFAULTS["exact_repeats"], description="exact repeats", **wide),
    )
    controls.panel = widgets.VBox(list(vars(controls).values()))
    return controls


def _from_environment(name, choices, default):
    chosen = os.environ.get(name) or default
    if chosen not in choices:
        raise ValueError(f"{name} is {chosen!r}; set it to one of {', '.join(choices)}, or unset it.")
    return chosen


def read_settings(controls, presets):
    """Read the controls' values once, together with the sizes of the chosen preset.

    With `exact_repeats`, TensorFlow computes in one fixed order from here on, until the kernel is started again. On a
    GPU that takes time that could not be measured here, hence the choice; a processor repeats itself without it, but
    for segmentation with unlabelled images.

    Args:
        controls: what `settings_controls` returned.
        presets: the same presets.

    Returns:
        namespace with `preset`, `transforms` (tuple of str), `learning_rate`, `fine_tuning_rate`,
        `consistency_weight` (floats), `precision` (one of PRECISIONS), `recipe` (one of RECIPES), `seed` (int),
        `exact_repeats` (bool) and the preset's sizes.

    Raises:
        ValueError: no transform is selected, or a value is out of its range.
    """
    values = {name: widget.value for name, widget in vars(controls).items() if name != "panel"}
    if not values["transforms"]:
        raise ValueError("No transform is selected: choose at least one in the settings above.")
    for name in ("learning_rate", "fine_tuning_rate", "consistency_weight"):
        values[name] = float(f"{values[name]:.6g}")  # a slider moved there and back returns 0.00099999...
    if values["precision"] == "automatic":
        values["precision"] = automatic_precision(values["preset"], presets[values["preset"]]["width"])
    if values["exact_repeats"]:
        tf.config.experimental.enable_op_determinism()
    return _checked(values | presets[values["preset"]])


def automatic_precision(preset, width):
    """Fastest type for the network's products that the device has; float32 for `paper`, as in the report.

    In the mixed types, weights, losses and statistics stay float32. On processors, networks narrower than 16 are
    slower in bfloat16 than in float32 (here, widths 4 and 8 took 150 ms a step instead of 50 and 70).

    Args:
        preset: name of the preset.
        width: of the network.

    Returns:
        str, one of PRECISIONS.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if preset == "paper":
        return "float32"
    if gpus:
        capability = tf.config.experimental.get_device_details(gpus[0]).get("compute_capability", (0, 0))
        return "mixed_bfloat16" if capability >= (8, 0) else "mixed_float16" if capability >= (7, 0) else "float32"
    processor = pathlib.Path("/proc/cpuinfo")
    flags = processor.read_text().split() if processor.exists() else ()
    return "mixed_bfloat16" if width >= 16 and {"avx512_bf16", "amx_bf16"} & set(flags) else "float32"


# ------------------------------------------------------------------------------------- data

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHAPES = ("disc", "square", "triangle", "diamond", "ring", "frame", "plus", "cross", "bars", "columns")


def load_cifar10(path=None):
    """Load CIFAR-10: from `path`, else from the file named by CIFAR10_NPZ, else by Keras's download.

    Args:
        path: an .npz file with the arrays x_train, y_train, x_test, y_test.

    Returns:
        ((x_train, y_train), (x_test, y_test)) as `keras.datasets.cifar10.load_data()` gives them:
        uint8 images (50000, 32, 32, 3) and (10000, 32, 32, 3), values 0 ... 255, and uint8 labels
        (50000, 1) and (10000, 1), values 0 ... 9.

    Raises:
        FileNotFoundError: the named file does not exist.
        ValueError: the file is not such an .npz, or holds other arrays.
        OSError: nothing was named and the download failed.
    """
    source = path or os.environ.get("CIFAR10_NPZ")
    if not source:
        print("Loading CIFAR-10 through Keras. The first time this downloads 170 MB from a slow host: minutes.")
        try:
            return keras.datasets.cifar10.load_data()
        except Exception as error:  # Keras raises a bare Exception on a failed download
            raise OSError(f"Keras could not download CIFAR-10: {error}") from error
    arrays = _read_npz(source, ("x_train", "y_train", "x_test", "y_test"), "CIFAR10_NPZ", "CIFAR-10")
    for name, array in arrays.items():
        count = 50000 if name.endswith("train") else 10000
        shape = (count, 32, 32, 3) if name.startswith("x") else (count, 1)
        if array.shape != shape or array.dtype != np.uint8:
            raise ValueError(f"{name} in {source} is {array.dtype} {array.shape}; CIFAR-10 has uint8 {shape}.")
        if name.startswith("y") and array.max() > 9:
            raise ValueError(f"{name} in {source} has a label {array.max()}; CIFAR-10's labels are 0 ... 9.")
    return (arrays["x_train"], arrays["y_train"]), (arrays["x_test"], arrays["y_test"])


def _read_npz(source, names, variable, what):
    """Arrays of these names from an .npz, dict; an error names the environment variable and what it must hold."""
    if not pathlib.Path(source).is_file():
        raise FileNotFoundError(f"There is no file {source}; {variable} (or path) must name an .npz with {what}.")
    try:
        with np.load(source, allow_pickle=False) as archive:
            return {name: archive[name] for name in names}
    except Exception as error:  # np.load raises half a dozen types on a damaged file
        raise ValueError(
            f"{source} is not a readable .npz with {', '.join(names[:-1])} and {names[-1]}: {error}"
        ) from error


def generate_shapes(train=12000, test=10000, seed=0):
    """Generate a stand-in for CIFAR-10: ten classes of coloured shapes on noisy backgrounds.

    Position, size, both colours and the noise vary; only the shape tells the class.

    Args:
        train: number of training images.
        test: number of test images.
        seed: of the generator.

    Returns:
        arrays as of `load_cifar10`, with these counts.
    """
    random = np.random.default_rng(seed)
    count = train + test
    labels = random.integers(0, len(SHAPES), count)
    center = random.uniform(11, 21, (2, count, 1, 1)).astype(np.float32)
    radius = random.uniform(6, 10, (count, 1, 1)).astype(np.float32)
    rows, columns = (np.mgrid[:32, :32][:, None].astype(np.float32) - center) / radius
    far, near = np.maximum(abs(rows), abs(columns)), np.minimum(abs(rows), abs(columns))
    distance = np.hypot(rows, columns)
    masks = (
        distance < 1,
        far < 0.9,
        (rows < 0.8) & (2 * abs(columns) < rows + 1),
        abs(rows) + abs(columns) < 1,
        (distance < 1) & (distance > 0.6),
        (far < 0.9) & (far > 0.5),
        (far < 1) & (near < 0.3),
        (far < 0.9) & (far - near < 0.35),
        (far < 0.9) & (np.sin(8 * rows) > 0),
        (far < 0.9) & (np.sin(8 * columns) > 0),
    )
    mask = np.select([labels[:, None, None] == k for k in range(len(masks))], masks)[..., None]
    ink, paper = random.uniform(0, 255, (2, count, 1, 1, 3)).astype(np.float32)
    images = np.where(mask, ink, paper) + 20 * random.standard_normal((count, 32, 32, 3), dtype=np.float32)
    images = images.clip(0, 255).astype(np.uint8)
    labels = labels.astype(np.uint8)[:, None]
    return (images[:train], labels[:train]), (images[train:], labels[train:])


def load_data(preset, path=None):
    """Load CIFAR-10, or, for the two small presets only, fall back to generated shapes.

    Args:
        preset: name of the preset in force.
        path: as for `load_cifar10`.

    Returns:
        (name, arrays): "cifar10" or "shapes", and the arrays of that set.

    Raises:
        OSError: a large preset, and CIFAR-10 cannot be downloaded.
        ValueError, FileNotFoundError: CIFAR10_NPZ is set to something unusable.
    """
    try:
        return "cifar10", load_cifar10(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        if preset not in ("smoke", "quick"):
            raise OSError(
                f"The preset {preset!r} needs CIFAR-10, and there are three ways to give it: let Keras download it "
                "(a network connection), set the environment variable CIFAR10_NPZ to an .npz with x_train, y_train, "
                f"x_test and y_test, or give that file as path to helpers.load_data. What was tried: {error}"
            ) from error
        print(f"{error}\nGoing on with GENERATED SHAPES. Nothing below is a result on CIFAR-10.")
        return "shapes", generate_shapes()


# What the classes of a data set are called, and what a title must say where the data are generated ones.
DATASETS = {
    "cifar10": (CLASSES, ""),
    "shapes": (SHAPES, " — generated shapes, not CIFAR-10"),
    "isbi2012": (("cell", "membrane"), ""),
    "phantom": (("background", "lungs", "heart", "clavicles"), " — generated chest phantom, not ISBI 2012"),
}


@dataclasses.dataclass(frozen=True)
class Split:
    """The four subsets of the report's section 2; the ranges are those of its code.

    Images are uint8 (n, height, width, channels), labels int32 (n,), or of every pixel (n, height, width). The
    unlabelled images come without labels.
    """

    name: str
    labeled_images: np.ndarray
    labeled_labels: np.ndarray
    unlabeled_images: np.ndarray
    validation_images: np.ndarray
    validation_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_counts: dict
    digest: str  # of the whole data set and the ranges; other data make other runs

    @property
    def caption(self):
        """What a title must say where the images are generated ones."""
        return DATASETS[self.name][1]

    @property
    def classes(self):
        """Names of the classes, by label."""
        return DATASETS[self.name][0]

    def pool(self, configuration):
        """All images that a run needs, on the device, and which of them are for what.

        A run that wants fewer images than a subset has gets the first ones.

        Returns:
            (ImagePool, dict): the positions of "training", "validation" and "test" as ranges.

        Raises:
            ValueError: the run wants more images than the split has.
        """
        images, labels, places, begin = [], [], {}, 0
        for use, subset, wanted in (
            ("training", "labeled", configuration.labeled),
            ("training", "unlabeled", configuration.unlabeled),
            ("validation", "validation", configuration.validation),
            ("test", "test", configuration.test),
        ):
            there = len(getattr(self, f"{subset}_images"))
            if wanted > there:
                raise ValueError(
                    f"The run asks for {wanted} {subset} images and the split has {there}: lower it, or load more."
                )
            images.append(getattr(self, f"{subset}_images")[:wanted])
            nothing = np.full((wanted, *self.labeled_labels.shape[1:]), -1)
            labels.append(nothing if subset == "unlabeled" else getattr(self, f"{subset}_labels")[:wanted])
            places[use] = range(places[use].start if use in places else begin, begin + wanted)
            begin += wanted
        return ImagePool(np.concatenate(images), np.concatenate(labels)), places


class ImagePool:
    """Images and labels, or maps of labels, that stay on the device, to be fetched there by position.

    As variables: of those TensorFlow can gather single bytes on a GPU, of constants it cannot.

    Args:
        images: uint8 (n, height, width, channels), 0 ... 255.
        labels: int (n,) or (n, height, width), -1 for an unlabelled image, at most 127.
    """

    def __init__(self, images, labels):
        self.images = tf.Variable(images, trainable=False)
        self.labels = tf.Variable(labels.astype(np.int8), trainable=False)

    def fetch(self, positions):
        """Images, float32 (k, height, width, channels), 0 ... 1, and labels, int32 (k, ...), at `positions` (k,)."""
        return to_unit_range(tf.gather(self.images, positions)), tf.cast(tf.gather(self.labels, positions), tf.int32)


def to_unit_range(images):
    """Turn uint8 pixels 0 ... 255 into float32 in 0 ... 1, the report's only preprocessing."""
    return tf.cast(images, tf.float32) / 255


def split(name, arrays, ranges):
    """Cut the data as the report did.

    The split depends on the order of the data alone, never on a seed. What is unlabelled loses its
    labels here; only their histogram survives, for the figure.

    Args:
        name: of the data set.
        arrays: ((x_train, y_train), (x_test, y_test)).
        ranges: dict of "labeled", "unlabeled", "validation" to (start, stop) in the training images.

    Returns:
        Split.

    Raises:
        ValueError: the arrays are not pictures with labels, or the ranges overlap or leave the data.
    """
    (images, labels), (test_images, test_labels) = arrays
    _check_data("training", images, labels)
    _check_data("test", test_images, test_labels)
    if set(ranges) != {"labeled", "unlabeled", "validation"}:
        raise ValueError(f"ranges names {', '.join(ranges)}; it must name labeled, unlabeled and validation.")
    for subset, (start, stop) in ranges.items():
        if not 0 <= start < stop <= len(images):
            raise ValueError(
                f"The range of {subset} is {start} to {stop}; it must be some of the {len(images)} training images, "
                "the first one before the last."
            )
    indices = {subset: np.arange(*bounds) for subset, bounds in ranges.items()}
    everything = np.concatenate(list(indices.values()))
    if len(np.unique(everything)) != len(everything):
        raise ValueError(f"The ranges {ranges} overlap: an image would be in two subsets. Move one of them.")
    digest = zlib.crc32(repr(ranges).encode())
    for array in (images, labels, test_images, test_labels):
        digest = zlib.crc32(np.ascontiguousarray(array), digest)
    labels, test_labels = labels.astype(np.int32)[:, 0], test_labels.astype(np.int32)[:, 0]
    subsets = {subset: labels[chosen] for subset, chosen in indices.items()} | {"test": test_labels}
    return Split(
        name=name,
        labeled_images=images[indices["labeled"]],
        labeled_labels=subsets["labeled"],
        unlabeled_images=images[indices["unlabeled"]],
        validation_images=images[indices["validation"]],
        validation_labels=subsets["validation"],
        test_images=test_images,
        test_labels=test_labels,
        class_counts={subset: np.bincount(values, minlength=10) for subset, values in subsets.items()},
        digest=f"{digest:08x}",
    )


def _check_data(name, images, labels):
    """Raise ValueError unless these are uint8 pictures (n, height, width, channels) and labels 0 ... 9 (n, 1)."""
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(
            f"The {name} images are {images.dtype} {images.shape}; they must be uint8 (n, height, width, channels), "
            "with pixels of 0 ... 255: multiply by 255 what lies between 0 and 1."
        )
    if labels.shape != (len(images), 1) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"The {name} labels are {labels.dtype} {labels.shape}; they must be integers {(len(images), 1)}, one for "
            "each image: are images and labels of the same set?"
        )
    if labels.size and not 0 <= labels.min() <= labels.max() <= 9:
        raise ValueError(f"The {name} labels go from {labels.min()} to {labels.max()}; they must be 0 ... 9.")


def split_table(data, ranges):
    """Sizes of the subsets in the report's two splits, and where in the files they lie.

    Args:
        data: Split.
        ranges: as for `split`.

    Returns:
        Table.
    """
    rows = []
    for subset, counts in data.class_counts.items():
        place = (
            f"training images {ranges[subset][0]:,} ... {ranges[subset][1] - 1:,}"
            if subset in ranges
            else "test images"
        )
        rows.append((subset, place, "–" if subset == "unlabeled" else f"{counts.sum():,}", f"{counts.sum():,}"))
    return Table(
        ("subset", "taken from", "cifar10_default", "cifar10_ssl_default"), rows, f"Images of each subset{data.caption}"
    )


# ----------------------------------------------------------------------- data of section 12

MEMBRANES = "https://raw.githubusercontent.com/zhixuhao/unet/b45af4d458437d8281cc218a07fd4380818ece4a/data/membrane"
MEMBRANE_FOLDERS = {"images": "train/image", "cells": "train/label", "unlabeled": "test"}
MEMBRANE_DIGESTS = {
    "images": "200da3d452d726e6c9ca1ce04b869d4edb727320d23b516d01cce707dc8c4760",
    "cells": "89f2ecfaeb1dbd44a0d910585f3daf032de9f385138cfbac851c68a1162fd57f",
    "unlabeled": "1b58fa7ec1d0ff9d39a855622db3ff66a97863036339b0d04be51b2f5a99b0e9",
}


def load_membranes(path=None):
    """Load the electron-microscopy images of ISBI 2012: from `path`, else ISBI2012_NPZ, else by Keras's download.

    Downloaded are 90 pictures of the public copy in zhixuhao/unet, 15 MB, which Keras keeps.

    Args:
        path: an .npz file with the arrays below.

    Returns:
        dict of uint8 arrays (30, 512, 512): `images`, `cells` (1 inside of a cell, 0 on a membrane), `unlabeled`.

    Raises:
        FileNotFoundError: the named file does not exist.
        ValueError: the file is not such an .npz, or these are not the arrays of that set.
        OSError: nothing was named and the download failed.
    """
    source = path or os.environ.get("ISBI2012_NPZ")
    if not source:
        arrays, source = _download_membranes(), f"{MEMBRANES} (kept in Keras's folder datasets/isbi2012, to be deleted)"
    else:
        arrays = _read_npz(source, tuple(MEMBRANE_FOLDERS), "ISBI2012_NPZ", "ISBI 2012")
    for name, array in arrays.items():
        if _checksum(np.ascontiguousarray(array).tobytes()) != MEMBRANE_DIGESTS[name]:
            raise ValueError(f"{name} in {source} is not that of ISBI 2012 as used here: its digest is another one.")
    return arrays


def _download_membranes():
    print(
        "Loading the images of ISBI 2012 through Keras. The first time this downloads 90 files, 15 MB: a minute or two."
    )
    arrays = {}
    for name, folder in MEMBRANE_FOLDERS.items():
        pictures = [_picture(f"{name}-{number}.png", f"{MEMBRANES}/{folder}/{number}.png") for number in range(30)]
        arrays[name] = np.stack(pictures)
    arrays["cells"] = (arrays["cells"] > 127).astype(np.uint8)
    return arrays


def _picture(file, address):
    """A gray picture, uint8 (h, w), downloaded unless Keras has kept it."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # a progress bar for each
            kept = keras.utils.get_file(file, address, cache_subdir="datasets/isbi2012")
    except Exception as error:  # Keras raises a bare Exception on a failed download
        raise OSError(f"Keras could not download ISBI 2012: {error}") from error
    try:
        return tf.io.decode_png(tf.io.read_file(kept), channels=1).numpy()[..., 0]
    except tf.errors.InvalidArgumentError:
        raise ValueError(f"{kept} is no picture: delete it, and run again.") from None


def generate_phantoms(count, size=256, seed=0):
    """Generate chest X-rays, very roughly: lungs, heart and clavicles as deformed ellipses, with noise.

    Args:
        count: how many.
        size: height and width in pixels.
        seed: of the generator.

    Returns:
        uint8 images (count, size, size), and labels (count, size, size): 0 background, 1 lungs, 2 heart, 3 clavicles.
    """
    random = np.random.default_rng(seed)
    grid = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    organs = (  # class, brightness, centre (down, across), half axes, turned by (radians)
        *((1, 60, (0.0, side * 0.42), (0.62, 0.28), side * 0.1) for side in (-1, 1)),
        (2, 190, (0.3, 0.1), (0.3, 0.26), 0.6),
        *((3, 215, (-0.66, side * 0.4), (0.045, 0.36), side * 0.2) for side in (-1, 1)),
    )
    images, labels = [], []
    for _ in range(count):
        bend = scipy.ndimage.gaussian_filter(random.standard_normal((2, size, size)), (0, size / 8, size / 8))
        places = grid + 0.06 * bend / bend.std()
        picture, label = np.full((size, size), 140.0), np.zeros((size, size), np.uint8)
        for number, brightness, center, axes, turned in organs:
            down, across = places - (np.array(center) + random.normal(0, 0.03, 2))[:, None, None]
            turned += random.normal(0, 0.08)
            along = np.stack(
                [down * np.cos(turned) - across * np.sin(turned), down * np.sin(turned) + across * np.cos(turned)]
            )
            within = np.sum((along / (np.array(axes) * random.normal(1, 0.08, 2))[:, None, None]) ** 2, axis=0) < 1
            picture[within], label[within] = brightness + random.normal(0, 12), number
        picture = scipy.ndimage.gaussian_filter(picture, size / 128) + random.normal(0, 28, (size, size))
        images.append(picture.clip(0, 255).astype(np.uint8))
        labels.append(label)
    return np.stack(images), np.stack(labels)


def load_segmentation(order, path=None, shrink=2):
    """Images with a class for every pixel, in four subsets: ISBI 2012, or where it cannot be had, chest phantoms.

    Split by image: of the 30 images with labels, `order` names the ones whose labels may be used and the ones for
    validation and test; the others lose their labels and join the unlabelled ones.

    Args:
        order: dict of "labeled", "validation" and "test" to numbers of images, the most wanted first.
        path: as for `load_membranes`.
        shrink: height and width are divided by it, by the mean of the pixels and the class of most of them; membrane
            where it is half and half.

    Returns:
        Split.

    Raises:
        ValueError: an image is named twice or is not among the 30, `shrink` does not divide 512, or as for
            `load_membranes`.
        FileNotFoundError: as for `load_membranes`.
    """
    named = [number for numbers in order.values() for number in numbers]
    if len(set(named)) != len(named):
        raise ValueError(f"order is {order}; it must name no image twice.")
    if not set(named) <= set(range(30)):
        raise ValueError(f"order is {order}; the images with labels are 0 ... 29.")
    if shrink < 1 or 512 % shrink:
        raise ValueError(f"shrink is {shrink}; it must divide 512, as 1, 2 and 4 do.")
    try:
        arrays, name = load_membranes(path), "isbi2012"
        images = _shrunk(np.concatenate([arrays["images"], arrays["unlabeled"]]), shrink).round().astype(np.uint8)
        labels = (_shrunk(arrays["cells"], shrink) <= 0.5).astype(np.int32)
    except FileNotFoundError:
        raise
    except OSError as error:
        print(f"{error}\nGoing on with a GENERATED CHEST PHANTOM. Nothing below is a result on ISBI 2012.")
        name, (images, labels) = "phantom", generate_phantoms(60, 512 // shrink)
        labels = labels[:30].astype(np.int32)
    subsets = {subset: np.array(numbers) for subset, numbers in order.items()}
    others = np.setdiff1d(np.arange(len(images)), named)
    kept = {
        f"{subset}_{kind}": values[numbers]
        for subset, numbers in subsets.items()
        for kind, values in (("images", images[..., None]), ("labels", labels))
    }
    counts = {subset: np.bincount(labels[numbers].ravel()) for subset, numbers in subsets.items()}
    digest = f"{zlib.crc32(labels.tobytes(), zlib.crc32(images.tobytes(), zlib.crc32(repr(order).encode()))):08x}"
    return Split(name=name, unlabeled_images=images[others][..., None], class_counts=counts, digest=digest, **kept)


def _shrunk(pictures, factor):
    count, height, width = pictures.shape
    return pictures.reshape(count, height // factor, factor, width // factor, factor).mean(axis=(2, 4))


# ------------------------------------------------------------------------------- transforms


def check_images(images):
    """Raise ValueError unless these are pictures as the transforms take them.

    That is floating point (n, height, width, channels) with values 0 ... 1, give or take the half that splines may
    overshoot by. Within a compiled function the values cannot be seen and are not looked at.
    """
    shape, dtype = getattr(images, "shape", None), getattr(images, "dtype", None)
    if shape is None or len(shape) != 4 or not tf.as_dtype(dtype).is_floating:
        raise ValueError(
            f"images is {type(images).__name__} {dtype} {shape}; it must be a floating-point array or tensor "
            "(n, height, width, channels): `helpers.to_unit_range` makes one of uint8 images."
        )
    if tf.executing_eagerly() and len(images):
        lowest, highest = float(tf.reduce_min(images)), float(tf.reduce_max(images))
        if not -0.5 <= lowest <= highest <= 1.5:
            raise ValueError(
                f"The pixels of images go from {lowest:g} to {highest:g}; they must lie between 0 and 1: "
                "`helpers.to_unit_range` makes that of uint8 images."
            )


def _spline_weights(fraction):
    """Cubic B-spline weights of the four taps at -1, 0, 1, 2 around a position 0 <= fraction < 1."""
    rest = 1 - fraction
    return (
        rest**3 / 6,
        (4 - 6 * fraction**2 + 3 * fraction**3) / 6,
        (4 - 6 * rest**2 + 3 * rest**3) / 6,
        fraction**3 / 6,
    )


def _spline_prefilter(length):
    """Matrix (length, length) float64 that turns samples along an axis into B-spline coefficients."""
    return scipy.ndimage.spline_filter1d(np.eye(length), axis=0, order=3, mode="mirror")


def pixel_grid(height, width):
    """Centres of a picture's pixels, (row, column) in pixels: float64 (height, width, 2)."""
    return tf.constant(np.stack(np.mgrid[:height, :width], axis=-1), tf.float64)


def affine_points(maps, points):
    """Points after an affine map each: (n, 2, 3) and (n or 1, h, w, 2) to float64 (n, h, w, 2)."""
    maps, points = tf.cast(maps, tf.float64)[:, None, None], tf.cast(points, tf.float64)
    return tf.reduce_sum(maps[..., :2] * points[..., None, :], axis=-1) + maps[..., 2]


def smooth_displacements(grids, points, height, width):
    """Displacements at any points, spread smoothly from those of a few control points, as elasticdeform does.

    Args:
        grids: (n, 2, rows, columns), displacements (down, across) in pixels at control points that span a picture
            from corner to corner, at least three along either side.
        points: (n, h, w, 2), (row, column) in this picture, in pixels; those outside get what the border has.
        height: of the picture.
        width: of the picture.

    Returns:
        float64 (n, h, w, 2).
    """
    scale = [(grids.shape[2] - 1) / (height - 1), (grids.shape[3] - 1) / (width - 1)]
    places = tf.cast(points, tf.float64) * tf.constant(scale, tf.float64)
    return cubic_sample(tf.cast(tf.transpose(grids, [0, 2, 3, 1]), tf.float64), places)


def inside(points, height, width):
    """Whether points (..., 2), (row, column), lie in a picture or on its border pixels' centres: bool (...)."""
    return tf.reduce_all((points >= 0) & (points <= tf.constant([height - 1, width - 1], points.dtype)), axis=-1)


def nearest_sample(labels, points, outside=-1):
    """Labels of the pixels that are nearest to some points.

    Args:
        labels: int (n, height, width).
        points: (n, h, w, 2), (row, column) in pixels.
        outside: what a point outside of the picture gets.

    Returns:
        int (n, h, w).
    """
    height, width = labels.shape[1:]
    last = tf.constant([height - 1, width - 1], points.dtype)
    nearest = tf.cast(tf.round(tf.clip_by_value(points, tf.zeros_like(last), last)), tf.int32)
    found = tf.gather_nd(labels, nearest, batch_dims=1)
    return tf.where(inside(points, height, width), found, tf.cast(outside, labels.dtype))


COMPILED = platform.system() == "Linux"  # elsewhere XLA is missing for some devices


@tf.function(jit_compile=COMPILED)
def cubic_sample(images, points):
    """Values of each image at points between its pixels, by cubic splines.

    The spline prefilter along an axis is a linear map, so it is one matrix product; then come 16 weighted taps a
    point. Differentiable with respect to the images.

    Args:
        images: (n, height, width, channels), floating point, each side at least 3 pixels.
        points: (n, h, w, 2), (row, column) in pixels, (0, 0) being the centre of the first pixel. A point outside
            gets the value of the nearest one on the border.

    Returns:
        (n, h, w, channels), of the type of `images`; computed in float64 where they are, else in float32.
    """
    computed = tf.float64 if images.dtype == tf.float64 else tf.float32
    _, height, width, channels = images.shape
    last = tf.constant([height - 1, width - 1], tf.float64)
    points = tf.clip_by_value(tf.cast(points, tf.float64), tf.zeros_like(last), last)
    corner = tf.floor(points)
    fraction = tf.cast(points - corner, computed)
    row, column = tf.unstack(tf.cast(corner, tf.int32), axis=-1)

    down, across = (tf.constant(_spline_prefilter(side), computed) for side in (height, width))
    coefficients = tf.einsum("ij,njwc->niwc", down, tf.cast(images, computed))
    coefficients = tf.einsum("ij,nhjc->nhic", across, coefficients)
    coefficients = tf.pad(coefficients, [[0, 0], [1, 2], [1, 2], [0, 0]], mode="REFLECT")
    # Four neighbours in a row side by side, so that one gather fetches them together.
    windows = tf.concat([coefficients[:, :, k : k + width] for k in range(4)], axis=-1)
    windows = tf.reshape(windows, [-1, 4 * channels])
    first = tf.range(tf.shape(images)[0])[:, None, None] * (height + 3)
    weights_down, weights_across = (_spline_weights(fraction[..., axis, None]) for axis in (0, 1))
    sampled = tf.zeros([], computed)
    for tap in range(4):
        taps = tf.gather(windows, (first + row + tap) * width + column)
        in_row = sum(weights_across[k] * taps[..., k * channels : (k + 1) * channels] for k in range(4))
        sampled += weights_down[tap] * in_row
    return tf.cast(sampled, images.dtype)


@tf.function(jit_compile=COMPILED)
def cubic_warp(images, maps):
    """Warp each image by its own map, by cubic splines, 0 where the map leaves the picture.

    The same as `elasticdeform.deform_grid(order=3, mode="constant")` (the report's section 2, Transformations),
    for a whole batch, on the device, and differentiable: see `cubic_sample`.

    Args:
        images: (n, height, width, channels), floating point, each side at least 3 pixels.
        maps: (n, 2, 3), from output to input: input = map[:, :2] @ (row, column) + map[:, 2], in
            pixels, (0, 0) being the centre of the first pixel. Taken in float64, so that round-off
            does not push a point on the border out of the picture.

    Returns:
        the warped images, of the shape and type of `images`.
    """
    images = tf.convert_to_tensor(images)  # of a variable, the function that is called below would keep hold
    _, height, width, _ = images.shape
    points = affine_points(maps, pixel_grid(height, width)[None])
    warped = cubic_sample(images, points)
    return tf.where(inside(points, height, width)[..., None], warped, tf.zeros([], images.dtype))


def elasticdeform_warp(images, maps):
    """Do what `cubic_warp` does by the library that the report used, image by image, in Python.

    The reference that the tests hold `cubic_warp` to. No gradient flows through it and XLA cannot
    compile it.

    Args:
        images: as for `cubic_warp`.
        maps: as for `cubic_warp`.

    Returns:
        as `cubic_warp`.
    """

    def warp(batch, inverse):
        # The library takes the forward map and inverts it. The shift is part of the map and not of
        # the displacement grid, whose interpolation rounds: an integer shift would lose a border row.
        forward = np.linalg.inv(np.concatenate([inverse, np.tile([[[0.0, 0.0, 1.0]]], (len(inverse), 1, 1))], axis=1))
        still = np.zeros((2, 2, 2))
        return np.stack(
            [
                elasticdeform.deform_grid(image, still, order=3, mode="constant", axis=(0, 1), affine=affine)
                for image, affine in zip(batch, forward, strict=True)
            ]
        )

    warped = tf.numpy_function(warp, [tf.cast(images, tf.float32), tf.cast(maps, tf.float64)], tf.float32)
    return tf.cast(tf.ensure_shape(warped, images.shape), images.dtype)


def compare_warps(images, maps, caption="", repeats=5):
    """Run `cubic_warp` and `elasticdeform_warp` on the same batch, in turn.

    Args:
        images: as for `cubic_warp`.
        maps: as for `cubic_warp`.
        caption: what the title must say of the data.
        repeats: how often; the medians of the times are shown.

    Returns:
        Table with the milliseconds an image and the largest difference of a pixel's value.
    """
    results, times = {}, {}
    for repeat in range(repeats + 1):  # the first one compiles and is not timed
        for warp in (cubic_warp, elasticdeform_warp):
            begin = time.perf_counter()
            results[warp] = warp(images, maps).numpy()
            if repeat:
                times.setdefault(warp, []).append((time.perf_counter() - begin) * 1e3 / len(images))
    fast, slow = (float(np.median(times[warp])) for warp in (cubic_warp, elasticdeform_warp))
    difference = np.abs(results[cubic_warp] - results[elasticdeform_warp]).max()
    rows = [
        ("elasticdeform, image by image", f"{slow:.3f}", "–"),
        (f"cubic_warp, {len(images)} at once", f"{fast:.3f}", f"{difference:.1e}"),
    ]
    return Table(
        ("warp", "ms an image", "largest difference"),
        rows,
        f"The same rotations two ways; cubic_warp is {slow / fast:.0f} times as fast here{caption}",
    )


# ---------------------------------------------------------------------------------- network


class BatchNormalization(keras.layers.BatchNormalization):
    """Keras's batch normalisation, with TensorFlow's fused op while it trains.

    Keras 3 takes several passes over memory for what this op does in one. Variables, moving
    averages, saved weights (in which the name of the class stands, so it has the parent's) and
    everything at inference are those of the parent class. On several devices, where statistics must be
    taken over all of them, the parent does all the work.
    """

    def __init__(self, **arguments):
        devices = tf.distribute.get_strategy().num_replicas_in_sync
        super().__init__(**({"synchronized": devices > 1} | arguments))

    def call(self, inputs, training=None, mask=None):
        """Normalise images (n, height, width, channels); in training, by the batch's own statistics."""
        if self.synchronized or not (training and self.trainable):
            return super().call(inputs, training=training, mask=mask)
        outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=inputs, scale=self.gamma, offset=self.beta, mean=[], variance=[], epsilon=self.epsilon, is_training=True
        )
        samples = tf.cast(tf.reduce_prod(tf.shape(inputs)[:-1]), tf.float32)
        variance *= (samples - 1) / samples  # the op returns the unbiased one, Keras keeps the biased one
        for moving, current in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(moving * self.momentum + tf.stop_gradient(current) * (1 - self.momentum))
        return outputs


class DistributionMean(keras.metrics.Metric):
    """Mean over all images of a distribution over the classes, summed up in one number.

    Args:
        summary: function of the mean (classes,) to a scalar.
        classes: number of classes.
        name: of the metric.
    """

    def __init__(self, summary, classes, name=None):
        super().__init__(name=name)
        self.summary = summary
        self.total = self.add_weight(shape=(classes,), initializer="zeros", name="total")

    def update_state(self, distributions):
        """Add distributions, float (..., classes)."""
        self.total.assign_add(tf.reduce_sum(tf.reshape(distributions, [-1, self.total.shape[0]]), axis=0))

    def result(self):
        return self.summary(tf.math.divide_no_nan(self.total.value, tf.reduce_sum(self.total.value)))


class Dice(keras.metrics.IoU):
    """The Dice coefficient by the counts of all pixels so far (arguments as of IoU).

    It is the mean over those target classes that are in the labels or in the answers.
    """

    def result(self):
        counts = keras.ops.cast(self.total_cm, "float32")
        sizes = keras.ops.sum(counts, axis=0) + keras.ops.sum(counts, axis=1)
        chosen = list(self.target_class_ids)
        overlaps, sizes = keras.ops.take(2 * keras.ops.diagonal(counts), chosen), keras.ops.take(sizes, chosen)
        there = keras.ops.sum(keras.ops.cast(sizes > 0, sizes.dtype))
        return keras.ops.sum(overlaps / keras.ops.maximum(sizes, 1)) / keras.ops.maximum(there, 1)


class MeasuredModel(keras.Model):
    """A Keras model that reports METRICS, whatever its loss, and OVERLAPS where it predicts a class for every pixel.

    `measured` is a dict of each name to its `keras.metrics.Metric`.

    Args:
        network: of images to logits, (n, classes) or (n, h, w, classes), the first class being the background.
    """

    def __init__(self, network):
        super().__init__()
        classes, summaries = network.output_shape[-1], {"largest_class": tf.reduce_max, "prediction_entropy": entropy}
        self.network = network
        self.measured = {
            name: DistributionMean(summaries[name], classes, name)
            if name in summaries
            else keras.metrics.Mean(name=name)
            for name in METRICS
        }
        if len(network.output_shape) > 2:
            self.measured |= {
                name: kind(num_classes=classes, target_class_ids=range(1, classes), name=name)
                for name, kind in zip(OVERLAPS, (Dice, keras.metrics.IoU), strict=True)
            }
        self.built = True  # the network is; there is nothing else to build

    def update_metrics(self, total, measures):
        """Take up a step's measures.

        Args:
            total: float (), this device's share of the total loss; the shares of all devices add up to it.
            measures: dict of the name of every metric but `loss` to what its `update_state` takes: values and weights
                (n,) or, for every pixel, (n, h, w); of a DistributionMean, distributions (..., classes).

        Returns:
            dict of each metric's name to its value so far.
        """
        everything = tf.ones(tf.shape(measures["loss_consistency"][0]))
        total_loss = everything * sum_over_devices(total)
        for name, arguments in {**measures, "loss": (total_loss, everything)}.items():
            self.measured[name].update_state(*arguments)
        return {name: metric.result() for name, metric in self.measured.items()}


def entropy(distribution):
    """Entropy in nats of a distribution (classes,): ln 10 for ten equally likely classes, 0 for a sure one."""
    return -tf.reduce_sum(tf.math.xlogy(distribution, distribution))


# ------------------------------------------------------------------------------------- runs

EVALUATION_BATCH = 250
# The same test copies for every run; with one angle, that follows from the run's seed and `angle`.
EVALUATION_SEED = (20210416, 0)


def joined(switches):
    """Names of switches as `Configuration` takes them."""
    return "+".join(sorted(switches))


@dataclasses.dataclass(frozen=True)
class Configuration:
    """Everything that determines a run's result; its `id` is made from it.

    A field that has a default stays out of the id while it holds that default, so that a field
    added later changes no existing id.

    Raises:
        ValueError: a value is of the wrong type or out of its range.
    """

    method: str
    transform: str
    width: int
    labeled: int
    unlabeled: int
    epochs: int
    learning_rate: float
    validation: int
    test: int
    starting_run: str = ""  # id of the run whose final weights it starts from; "" is from scratch
    consistency_weight: float = 1.0
    batch_size: int = 128
    seed: int = 0
    dataset: str = "cifar10"
    precision: str = "float32"
    switches: str = ""  # names of SWITCHES in the alphabet's order, with + between them
    steps: int = 0  # steps of an epoch; 0 is as many as show every image once
    moments_from: str = ""  # id of the run whose optimizer it restores, where that is not the starting run
    logit_scale: float = 1.0  # factor on the starting weights of the output layer, and so on the logits
    angle: int = 0  # which of its seed's angles it turns by, where one is drawn for all images

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kinds = (int, float) if field.type is float else field.type
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise ValueError(f"{field.name} is {value!r}; it must be of type {field.type.__name__}.")
            object.__setattr__(self, field.name, field.type(value))
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; choose one of {', '.join(METHODS)}.")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; choose one of {', '.join(PRECISIONS)}.")
        for name in ("width", "labeled", "epochs", "batch_size", "test", "validation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not self.balanced and self.steps > self.steps_for_all:
            raise ValueError(f"steps is {self.steps}; an epoch that shows every image once has {self.steps_for_all}.")
        if self.balanced and self.unlabeled and self.batch_size % 2:
            raise ValueError(f"batch_size is {self.batch_size}; balanced batches have two halves: give an even number.")
        if self.active - set(SWITCHES) or self.switches != joined(self.active):
            raise ValueError(
                f"switches is {self.switches!r}; it must be some of {joined(SWITCHES)}, in this order, joined by +."
            )
        for name in ("unlabeled", "seed", "steps", "angle"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative.")
        check_number("learning_rate", self.learning_rate, *RATES)
        check_number("consistency_weight", self.consistency_weight, 0, 1000)
        check_number("logit_scale", self.logit_scale, 1e-6, 1e6)
        runs = [name for name in ("starting_run", "moments_from") if getattr(self, name)]
        for name in ("transform", "dataset", *runs):  # parts of paths
            if not re.fullmatch(r"\w[\w-]{0,99}", getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be a name of letters, digits, _ and -.")
        if (self.method in ("SemiCT", "SemiCTE")) != bool(self.starting_run):
            raise ValueError(
                f"{self.method} with starting_run={self.starting_run!r}: only SemiCT and SemiCTE start from a run."
            )
        if not self.starting_run and (self.moments_from or self.logit_scale != 1):
            raise ValueError("moments_from and logit_scale change what a run starts from: starting_run must be set.")
        if self.angle and not (self.transform == "rotation" and "one_angle" in self.active):
            raise ValueError(f"angle is {self.angle}: only a rotation with one_angle has one that is drawn once.")

    @property
    def id(self):
        """Name of the run: transform, method, and ten digits of a hash over all that is not default."""
        told = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        return f"{self.transform}-{self.method.lower()}-{digest[:10]}"

    @property
    def title(self):
        """Short name for people, such as "SemiC, shift", with the recipe where it is another than `reported`."""
        images = f", {self.labeled} + {self.unlabeled} images" if self.balanced else ""
        return f"{self.method}, {self.transform}{images}" + (f" ({self.recipe})" if self.active else "")

    @property
    def active(self):
        """Set of the names in `switches`."""
        return frozenset(filter(None, self.switches.split("+")))

    @property
    def steps_per_epoch(self):
        """Batches of an epoch."""
        return self.steps or self.steps_for_all

    @property
    def steps_for_all(self):
        """Batches that show every image once."""
        return math.ceil((self.labeled + self.unlabeled) / self.batch_size)

    @property
    def pairs(self):
        """Image pairs (an image and its transformed copy) that training passes through the network."""
        drawn = self.steps_per_epoch * self.batch_size
        return self.epochs * (drawn if self.full_batches else min(drawn, self.labeled + self.unlabeled))

    @property
    def balanced(self):
        """Whether its batches are those of `balanced_batches`."""
        return "balanced_batches" in self.active

    @property
    def full_batches(self):
        """Whether an epoch's last batch, too, holds `batch_size` images."""
        return self.balanced or "filled_batches" in self.active

    @property
    def recipe(self):
        """Name of the recipe: one of RECIPES, or the nearest of them with what is added or left out."""
        name = min(RECIPES, key=lambda name: len(self.active ^ RECIPES[name]))
        added, left_out = sorted(self.active - RECIPES[name]), sorted(RECIPES[name] - self.active)
        return " ".join([name, *(f"+ {switch}" for switch in added), *(f"- {switch}" for switch in left_out)])


def reachable(*roots):
    """Find the functions, classes and constants that some functions' code leads to.

    Follows the names that the code uses as far as they are defined beside it (in the notebook) or in
    this module; libraries are not entered.

    Args:
        *roots: functions or classes, or partial applications of functions.

    Returns:
        dict of qualified name to object.
    """
    found, pending = {}, [(None, root) for root in roots]
    while pending:
        name, thing = pending.pop()
        if isinstance(thing, functools.partial):
            pending += [(name, thing.func), (f"{name} with", (thing.args, thing.keywords))]
            continue
        thing = getattr(thing, "python_function", thing)  # of a tf.function
        thing = vars(thing) if isinstance(thing, types.SimpleNamespace) else thing
        thing = thing.numpy() if isinstance(thing, (tf.Tensor, tf.Variable)) and tf.executing_eagerly() else thing
        if isinstance(thing, (set, frozenset)):
            thing = sorted(thing, key=repr)
        if isinstance(thing, (tuple, list, dict)):
            items = thing.items() if isinstance(thing, dict) else enumerate(thing)
            pending += [(f"{name}[{key!r}]", item) for key, item in items]
        elif inspect.isclass(thing) or inspect.isfunction(thing):
            inner = (
                f" as {name}" if "<" in thing.__qualname__ else ""
            )  # lambdas and functions made by functions share names
            name = f"{thing.__module__}.{thing.__qualname__}{inner}"
            if name not in found:
                found[name] = thing
                pending += _used_by_class(name, thing) if inspect.isclass(thing) else _used_by_function(name, thing)
        elif isinstance(thing, (int, float, str, bytes, np.ndarray, np.generic, type(None))):
            found[name] = thing
    return found


def _used_by_class(name, cls):
    used = [(None, base) for base in cls.__bases__ if base.__module__ in (cls.__module__, __name__)]
    for attribute, value in vars(cls).items():
        value = getattr(value, "__func__", getattr(value, "fget", value))  # of a static method or a property
        if inspect.isfunction(value) or not attribute.startswith("_"):
            used.append((f"{name}.{attribute}", value))
    return used


def _used_by_function(name, function):
    tree, scope, used = _syntax_tree(function), function.__globals__, []
    if function.__closure__:
        cells = zip(function.__code__.co_freevars, function.__closure__, strict=True)
        used += [(f"{name}.{free}", cell.cell_contents) for free, cell in cells if free != "__class__"]
    used.append((f"{name} defaults", (function.__defaults__, function.__kwdefaults__)))
    codes, names = [function.__code__], set()
    for code in codes:  # grows by the functions within
        codes += [constant for constant in code.co_consts if inspect.iscode(constant)]
        names |= {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    values = {f"{function.__module__}.{key}": scope[key] for key in names & scope.keys()}
    for node in ast.walk(tree) if tree else ():
        owner = scope.get(getattr(getattr(node, "value", None), "id", None))  # of the attribute, where this is one
        if isinstance(node, ast.Attribute) and owner is sys.modules[__name__]:
            values[f"{__name__}.{node.attr}"] = globals()[node.attr]
    for key, value in values.items():
        value = getattr(value, "python_function", value)
        plain = not (inspect.isfunction(value) or inspect.isclass(value))
        if plain or value.__module__ in (function.__module__, __name__):
            used.append((key, value))
    return used


def fingerprint(*roots):
    """Digest of the method's code: of all that `reachable` finds, comments, docstrings and layout aside.

    Args:
        *roots: functions, classes, partial applications or strings that together make a run.

    Returns:
        str, eight hexadecimal digits.
    """
    digest = hashlib.sha256(repr([root for root in roots if isinstance(root, str)]).encode())
    for name, thing in sorted(reachable(*(root for root in roots if not isinstance(root, str))).items()):
        if inspect.isfunction(thing):
            tree = _syntax_tree(thing)
            content = ast.unparse(tree) if tree else repr(_compiled_content(thing.__code__))
        else:
            content = (
                "" if inspect.isclass(thing) else thing.tobytes() if isinstance(thing, np.ndarray) else repr(thing)
            )
        digest.update(f"{name.split('.', 1)[-1]}\n{content}\n".encode())
    return digest.hexdigest()[:8]


def _compiled_content(code):
    """What a compiled function does, by itself: nested code by its content, not by its address in memory."""
    constants = [_compiled_content(one) if inspect.iscode(one) else one for one in code.co_consts]
    return code.co_code, code.co_names, constants


@functools.cache  # the file on disk may change while its functions run
def _syntax_tree(function):
    """Syntax of a function without docstrings, or None where its source cannot be had by itself."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def jit_choice(*roots):
    """What to give to `compile` as jit_compile: Keras's choice where XLA can compile the step, else False.

    It cannot where `elasticdeform_warp` is used, nor the sums over several devices.
    """
    several = tf.distribute.get_strategy().num_replicas_in_sync > 1
    return False if several or any(thing is elasticdeform_warp for thing in reachable(*roots).values()) else "auto"


def training_batches(positions, batch_size, seed, first_epoch, epochs, steps=None, fill=False):
    """Batches of the epochs `first_epoch` ... `epochs` - 1, each in an order of its own.

    Order and transforms' seeds follow from (seed, epoch, step) alone, so a resumed run sees what an
    unbroken one would have seen.

    Args:
        positions: range of the images in the pool.
        batch_size: images a step; an epoch's last batch holds what is left.
        seed: of the run.
        first_epoch: where to begin, from 0.
        epochs: where to end.
        steps: batches of an epoch, at most as many as show every image once, which is also the default.
        fill: fill up an epoch's last batch with the epoch's first images.

    Returns:
        tf.data.Dataset of {"positions": int32 (batch_size,), "seed": int32 (2,)}.
    """

    def one_epoch(epoch):
        epoch_seed = tf.random.fold_in([seed, 0], epoch)
        order = tf.random.experimental.stateless_shuffle(tf.range(positions.start, positions.stop), seed=epoch_seed)
        if fill:
            order = tf.concat([order, order[: -len(positions) % batch_size]], axis=0)
        batches = tf.data.Dataset.from_tensor_slices(order).batch(batch_size).take(-1 if steps is None else steps)
        return batches.enumerate().map(functools.partial(_batch, epoch_seed))

    return _as_it_is(tf.data.Dataset.range(first_epoch, epochs).flat_map(one_epoch).prefetch(2))


def balanced_batches(labeled, unlabeled, batch_size, seed, first_epoch, epochs, steps):
    """Batches of which half is labelled and half is not, however many there are of either.

    Labelled and unlabelled images each come in shuffles of their own, one after the other without an end, from which
    an epoch takes the next ones. Without unlabelled images all of a batch is labelled.

    Args:
        labeled: range of the labelled images in the pool.
        unlabeled: range of the others; may be empty.
        batch_size: images a step, an even number.
        seed: of the run.
        first_epoch: where to begin, from 0.
        epochs: where to end.
        steps: batches of an epoch.

    Returns:
        tf.data.Dataset, elements as of `training_batches`.
    """
    parts = [part for part in (labeled, unlabeled) if len(part)]
    share = batch_size // len(parts)

    def next_ones(part, number, epoch):
        first, count = epoch * steps * share, steps * share
        shuffles = [
            tf.random.experimental.stateless_shuffle(
                tf.range(part.start, part.stop), seed=tf.random.fold_in([seed, 2 + number], first // len(part) + ahead)
            )
            for ahead in range(math.ceil(count / len(part)) + 1)
        ]
        return tf.reshape(tf.concat(shuffles, axis=0)[first % len(part) :][:count], [steps, share])

    def one_epoch(epoch):
        positions = tf.concat([next_ones(part, number, epoch) for number, part in enumerate(parts)], axis=1)
        epoch_seed = tf.random.fold_in([seed, 0], epoch)
        batches = tf.data.Dataset.from_tensor_slices(positions)
        return batches.enumerate().map(functools.partial(_batch, epoch_seed))

    return _as_it_is(tf.data.Dataset.range(first_epoch, epochs).flat_map(one_epoch).prefetch(2))


def evaluation_batches(positions):
    """Batches for validation and test, with transforms that are the same at every call.

    Args:
        positions: range of the images in the pool.

    Returns:
        tf.data.Dataset, elements as of `training_batches`.
    """
    order = tf.range(positions.start, positions.stop)
    batches = tf.data.Dataset.from_tensor_slices(order).batch(EVALUATION_BATCH).enumerate()
    return _as_it_is(batches.map(functools.partial(_batch, EVALUATION_SEED)).prefetch(2))


def _as_it_is(dataset):
    """Leave nothing in the pipeline to be tuned while it runs.

    The thread that does it sleeps twice as long each time, up to a minute, and who drops the dataset waits until it
    wakes: a training of 1.4 s took 2.6 s, one of 3.6 s took 5.1 s.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def _batch(seed, step, positions):
    return {"positions": positions, "seed": tf.random.fold_in(seed, step)}


# ----------------------------------------------------------------------------- what is kept

FORMAT = 1  # of a run's files; raised whenever their meaning changes


class Damaged(Exception):
    """A file of a run cannot be trusted; `path` is which, the message says why."""

    def __init__(self, path, what):
        super().__init__(f"{path} {what}")
        self.path = path


@contextlib.contextmanager
def _writing_to(folder):
    """Say which folder it was, and what to do, where writing fails."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror}: cannot write to the folder {folder}. Make room or give the right to write there, or "
            "set runs_folder to another folder; then run the cell again. What was finished before is kept",
        ) from error


def write_bytes(path, content):
    """Write a file whole or not at all.

    Raises:
        OSError: of the kind that the system names (no space, read-only, ...), with the folder in the message.
    """
    partial = path.with_name(f"{path.name}.partial")
    with _writing_to(path.parent):
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def _checksum(content):
    """SHA-256 of bytes or of what JSON can hold, in hexadecimal digits."""
    if not isinstance(content, bytes):
        content = json.dumps(content, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def write_json(path, content):
    """Write a dict as JSON, whole or not at all, with its format and a checksum that `read_json` looks at."""
    content = {"format": FORMAT, **content}
    write_bytes(path, json.dumps({"sha256": _checksum(content), **content}, indent=1).encode())


def read_json(path):
    """Read what `write_json` wrote.

    Returns:
        dict, or None where there is no such file.

    Raises:
        Damaged: the file is not as it was written, or another version of this module wrote it.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        raise Damaged(path, "is cut off or overwritten") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise Damaged(path, f"is not of this version, whose format is {FORMAT}")
    if content.pop("sha256", None) != _checksum(content):
        raise Damaged(path, "does not fit its checksum")
    del content["format"]
    return content


def save_weights(model, path):
    """Write a Keras model's weights whole or not at all; of a compiled model, the optimizer's state too.

    Returns:
        str, the file's checksum.
    """
    # HDF5 ends the process where the disk is full. So it writes to the system's temporary folder, after a look at the
    # room there, and the bytes go on from there.
    with tempfile.TemporaryDirectory() as folder:
        optimizer = getattr(model, "optimizer", None)
        values = [*model.variables, *(optimizer.variables if optimizer else ())]
        needed = 2**20 + 2 * sum(math.prod(value.shape) * 4 for value in values)
        if shutil.disk_usage(folder).free < needed:
            raise OSError(errno.ENOSPC, f"The temporary folder {folder} has no room for {needed:,} bytes of weights")
        local = pathlib.Path(folder) / path.name
        model.save_weights(local)
        content = local.read_bytes()
    write_bytes(path, content)
    return _checksum(content)


def check_file(path, checksum):
    """Raise `Damaged` unless a file is there and as it was written."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise Damaged(path, "is missing") from None
    if _checksum(content) != checksum:
        raise Damaged(path, "does not fit its checksum")


def intact(path):
    """Read a JSON file of a run, and see that the files whose checksums it holds are whole.

    Returns:
        dict, or None where there is no such file.

    Raises:
        Damaged: it, or one of the files.
    """
    content = read_json(path)
    for name, checksum in (content or {}).get("files", {}).items():
        check_file(path.parent / name, checksum)
    return content


def intact_or_set_aside(path):
    """Do as `intact`, but rename what is damaged to `....damaged-1` (2, 3, ...), say so, and return None."""
    try:
        return intact(path)
    except Damaged as damage:
        print(f"{damage}. It is set aside, and what is lost with it is trained again.")
        for broken in {path, damage.path}:
            numbers = (
                number for number in range(1, 1000) if not broken.with_name(f"{broken.name}.damaged-{number}").exists()
            )
            if broken.exists():
                os.replace(broken, broken.with_name(f"{broken.name}.damaged-{next(numbers)}"))
        return None


def load_start(model, folder, moments_folder, configuration):
    """Give a fresh model the weights of a finished run, and of its optimizer only what the switches name.

    Args:
        model: compiled, its optimizer built; the last layer of its network computes the logits, linearly.
        folder: of the finished run that the weights are from.
        moments_folder: of the finished run that the optimizer's state is from.
        configuration: of the run that starts from them.
    """
    fresh = [variable.numpy() for variable in model.optimizer.variables]
    restored = fresh
    if configuration.active & {"restored_moments", "restored_rate"}:
        model.load_weights(last_checkpoint(moments_folder))
        restored = [variable.numpy() for variable in model.optimizer.variables]
    model.network.load_weights(folder / "network.weights.h5")
    for variable, old, new in zip(model.optimizer.variables, restored, fresh, strict=True):
        switch = "restored_rate" if variable.path.endswith("/learning_rate") else "restored_moments"
        variable.assign(old if switch in configuration.active else new)
    for weights in model.network.layers[-1].trainable_variables:
        weights.assign(weights.numpy() * configuration.logit_scale)


def last_checkpoint(folder):
    """File of a finished run's weights and its optimizer's state."""
    return checkpoint_path(folder, len(read_json(folder / "record.json")["history"]))


def checkpoint_path(folder, epoch):
    """File of the weights and the optimizer's state after `epoch` epochs."""
    return folder / f"epoch-{epoch:04d}.weights.h5"


class Locked(Exception):
    """Another kernel is training this run; the message says which."""


_locks_held = set()  # by this process; a lock of its own that is not in here was left by an interrupt


class Lock:
    """Keeps a run to one kernel at a time: a file that names the owner, who renews it every few seconds.

    The lock of a dead owner is taken over. On this machine an owner is dead when its process is gone; on another, as
    with two Colab machines on one Drive, when it has not renewed the lock for `STALE` seconds.

    Args:
        path: of the lock's file.

    Raises:
        Locked: on entering, a living owner has it.
        OSError: on entering, the folder cannot be written to.
    """

    BEAT, STALE = 10.0, 120.0  # seconds

    def __init__(self, path):
        self.path, self.token = path, uuid.uuid4().hex
        process = psutil.Process()
        self.owner = {
            "machine": _machine(),
            "process": process.pid,
            "started": process.create_time(),
            "token": self.token,
            "renewed": 0.0,
        }

    def __enter__(self):
        with _writing_to(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        _locks_held.add(self.token)
        try:
            while not self._create():
                self._remove_unless_alive()
            for draft in self.path.parent.glob("lock.*"):  # left by who was killed while asking for the lock
                with contextlib.suppress(FileNotFoundError):
                    if draft != self.path and time.time() - draft.stat().st_mtime > self.STALE:
                        draft.unlink()
            self._stop, self._renewing = threading.Event(), threading.Thread(target=self._renew, daemon=True)
            self._renewing.start()
        except BaseException:  # then the file, if it was made, is nobody's, and is taken over
            _locks_held.discard(self.token)
            raise
        return self

    def __exit__(self, *exception):
        try:
            self._stop.set()
            self._renewing.join()  # or it might write the file again after it was removed
            if self.held():
                self.path.unlink(missing_ok=True)
        finally:  # also after a second interrupt: then the file is nobody's, and is taken over
            _locks_held.discard(self.token)

    def held(self):
        """Whether the lock is this object's."""
        return (self._read() or {}).get("token") == self.token

    def check(self):
        """Raise Locked where another kernel took the lock over, as after a long sleep of this machine."""
        if not self.held():
            raise Locked(f"another kernel took over {self.path.parent}")

    def _read(self):
        """The owner, {} where the file does not name one (it may just be written), or None without a file."""
        try:
            owner = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return owner if isinstance(owner, dict) and self.owner.keys() <= owner.keys() else {}

    def _create(self):
        """Make the file with its content in one step, so that nobody sees half of it; False where there is one."""
        content, draft = json.dumps(self.owner | {"renewed": time.time()}), self.path.with_name(f"lock.{self.token}")
        with _writing_to(self.path.parent):
            try:
                draft.write_text(content)
                try:
                    os.link(draft, self.path)
                except FileExistsError:
                    return False
                except OSError:  # no hard links here, as on Google Drive
                    with self.path.open("x") as file:
                        file.write(content)
                return True
            except FileExistsError:
                return False
            finally:
                with contextlib.suppress(OSError):
                    draft.unlink(missing_ok=True)

    def _remove_unless_alive(self):
        owner = self._read()
        if owner is None:
            return
        if not owner:
            try:
                age = time.time() - self.path.stat().st_mtime
            except FileNotFoundError:
                return
            alive, where = age < self.STALE, "which has not yet said who it is"
        elif owner["machine"] != self.owner["machine"]:
            alive, where = time.time() - owner["renewed"] < self.STALE, "on another machine"
        elif owner["process"] == self.owner["process"]:
            alive, where = owner["token"] in _locks_held, "in this process"
        else:
            alive, where = _started_at(owner["process"], owner["started"]), f"in process {owner['process']}"
        if alive:
            raise Locked(f"another kernel, {where}, trains it")
        self.path.unlink(missing_ok=True)
        time.sleep(0.2)  # so that whoever found the same dead owner is done with removing before there is a new lock

    def _renew(self):
        while not self._stop.wait(self.BEAT):
            with contextlib.suppress(OSError):  # a full disk stops the training at its next checkpoint, not here
                if self.held():
                    write_bytes(self.path, json.dumps(self.owner | {"renewed": time.time()}).encode())


_training = threading.Lock()
_building = threading.RLock()  # starting weights are drawn from random numbers that all threads share


@contextlib.contextmanager
def _one_training():
    """Keep this process to one training at a time; raises Locked where another thread is at it for over a second."""
    if not _training.acquire(timeout=1):
        raise Locked("another training of this notebook is under way")
    try:
        yield
    finally:
        _training.release()


def _started_at(process, started):
    """Whether a process of this number is alive and is the one that started then (numbers are used again)."""
    try:
        return abs(psutil.Process(process).create_time() - started) < 2
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _machine():
    """Name for this machine since its last start, and for the container within which process numbers count."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{platform.node()} {uuid.getnode()}"


class Checkpoint(keras.callbacks.Callback):
    """Keep, after every epoch, what is needed to go on from there as if nothing had happened.

    Dropout draws from a state that Keras does not save with the weights, so it is set anew, from
    seed and epoch, at the beginning of each epoch.

    Args:
        folder: of the run.
        seed: of the run.
        lock: Lock on the run.
    """

    def __init__(self, folder, seed, lock):
        super().__init__()
        self.folder, self.seed, self.lock = folder, seed, lock
        self.history, self.seconds, self.files = [], 0.0, {}

    def restore(self, model):
        """Load the last finished epoch into `model`, if there is one, and remove what a broken write left.

        Returns:
            int, number of finished epochs.
        """
        self.set_model(model)
        progress = intact_or_set_aside(self.folder / "progress.json")
        if progress:
            self.history, self.seconds, self.files = progress["history"], progress["seconds"], progress["files"]
            model.load_weights(checkpoint_path(self.folder, len(self.history)))
        for left in (*self.folder.glob("*.partial"), *self.folder.glob("epoch-*.weights.h5")):
            if left.name not in self.files and not left.name.startswith("lock."):  # which is renewed meanwhile
                left.unlink(missing_ok=True)
        return len(self.history)

    def on_epoch_begin(self, epoch, logs=None):
        self.started = time.perf_counter()
        generators = [layer.seed_generator for layer in self.model.network.layers if hasattr(layer, "seed_generator")]
        for number, generator in enumerate(generators):
            seed = tf.random.fold_in(tf.random.fold_in([self.seed, 1], epoch), number)
            copies = self.model.distribute_strategy.experimental_local_results(generator.state.value)
            for device, state in enumerate(copies):
                state.assign(tf.cast(tf.random.fold_in(seed, device), state.dtype))

    def on_epoch_end(self, epoch, logs=None):
        self.history.append({name: float(value) for name, value in logs.items()})
        self.seconds += time.perf_counter() - self.started
        self.lock.check()
        path = checkpoint_path(self.folder, epoch + 1)
        self.files = {path.name: save_weights(self.model, path)}
        progress = {"history": self.history, "seconds": self.seconds, "files": self.files}
        write_json(self.folder / "progress.json", progress)
        old = checkpoint_path(self.folder, epoch)
        if old.exists():
            old.write_bytes(b"")  # Google Drive moves what is removed to its trash, which counts as used
            old.unlink()


def averaging(model):
    """Callbacks that put the averaged weights in place while a model is evaluated; none where it averages none."""
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)  # of one that scales the loss
    return [keras.callbacks.SwapEMAWeights()] if optimizer.use_ema else []


class NotFinite(ArithmeticError):
    """A loss became NaN or infinite; the message says which and when."""


class FiniteLoss(keras.callbacks.Callback):
    """Stop a training at the step in which a loss is no longer a finite number, by raising NotFinite."""

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch + 1

    def on_train_batch_end(self, batch, logs=None):
        check_finite(logs, f"step {batch + 1} of epoch {self.epoch}")

    def on_epoch_end(self, epoch, logs=None):
        check_finite(logs, f"the validation after epoch {self.epoch}")


def check_finite(metrics, when):
    """Raise NotFinite where a loss among some metrics, dict of name to value, is NaN or infinite."""
    wrong = [
        f"{name} is {float(value)}" for name, value in metrics.items() if "loss" in name and not math.isfinite(value)
    ]
    if wrong:
        raise NotFinite(f"{' and '.join(wrong)} in {when}")


class LiveStatus(keras.callbacks.Callback):
    """One table that is redrawn in place while a list of runs trains; silent outside a notebook.

    Args:
        numbers: for each run its number in the whole plan.
        total: number of runs in the whole plan.
        configurations: the runs.
        caption: what every title must say of the data.
    """

    def __init__(self, numbers, total, configurations, caption=""):
        super().__init__()
        self.caption = caption
        self.numbers, self.total, self.configurations = numbers, total, configurations
        self.titles = told_apart(configurations)
        self.rows = [
            (f"{number} of {total}", title, f"0 of {run.epochs}", "", "", "waiting")
            for number, title, run in zip(numbers, self.titles, configurations, strict=True)
        ]
        self.current, self.shown_at, self.trained_pairs, self.spent, self.compiling = 0, 0.0, 0, 0.0, []
        self.settled = set()  # places in the list of runs that need no training
        self.handle = self.open()

    def open(self):
        """Begin to show the table; returns the handle that redraws it, or None where nothing is shown."""
        return display(self.table(), display_id=True) if get_ipython() else None

    def table(self):
        """The present state as a `Table`."""
        header = ("experiment", "run", "epoch", "loss (supervised, consistency)", "accuracy (validation)", "")
        return Table(header, self.rows, self.caption.removeprefix(" — "))

    def start(self, index, finished_epochs):
        """Run number `index` of the list begins, or goes on after `finished_epochs`."""
        self.current, self.finished_epochs = index, finished_epochs
        self.began, self.stepping_since, self.done, self.logs = time.perf_counter(), None, 0, {}

    def on_train_begin(self, logs=None):
        left = f"; {self.time_left()}" if self.trained_pairs else ", which takes longest"
        self.say(f"compiles the first step{left}")

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch, self.warning = epoch, ""

    def on_train_batch_end(self, batch, logs=None):
        run = self.configurations[self.current]
        if self.stepping_since is None:  # the first step compiles, and is no measure of the others
            self.stepping_since = time.perf_counter()
            self.compiling.append(self.stepping_since - self.began)
        else:
            self.done += run.batch_size
        if 2 * (batch + 1) >= run.steps_per_epoch:  # the metrics are means over the epoch so far
            self.warning = collapse_notice(logs)
        if time.perf_counter() - self.shown_at > 1:
            self.show(logs, self.warning + self.time_left())

    def on_epoch_end(self, epoch, logs=None):
        self.logs = logs
        self.show(logs, self.warning + self.time_left())

    def time_left(self):
        """Estimate for this list of runs from the steps taken so far, such as "3 min left"."""
        pairs = self.trained_pairs + self.done
        if not pairs:
            return "the first steps are timed"
        run = self.configurations[self.current]
        to_come = set(range(self.current + 1, len(self.configurations))) - self.settled
        later = [self.configurations[index] for index in to_come]
        rest = run.pairs * (1 - self.finished_epochs / run.epochs) - self.done + sum(run.pairs for run in later)
        seconds = max(rest, 0) * (self.spent + self.stepping()) / pairs + len(later) * np.mean(self.compiling)
        return f"{duration(seconds)} left"

    def stepping(self):
        """Seconds since the current run's first step, which compiles; 0 before it."""
        return time.perf_counter() - self.stepping_since if self.stepping_since else 0.0

    def finish(self, record, note):
        """The current run has ended with this record."""
        self.trained_pairs += self.done
        self.spent += self.stepping()
        self.epoch = record["configuration"]["epochs"] - 1
        self.show(record["history"][-1], collapse_notice(record["metrics"]) + note)

    def say(self, note):
        """Redraw, with the current run's numbers as they are and another note: it failed, or it waits."""
        self.rows[self.current] = (*self.rows[self.current][:-1], note)
        if self.handle:
            self.handle.update(self.table())

    def show(self, logs, note):
        """Redraw, with the current run's numbers."""
        run, accuracy = (
            self.configurations[self.current],
            (logs or {}).get("val_accuracy", self.logs.get("val_accuracy")),
        )
        self.rows[self.current] = (
            f"{self.numbers[self.current]} of {self.total}",
            self.titles[self.current],
            f"{self.epoch + 1} of {run.epochs}",
            "{loss:.3f} ({loss_supervised:.3f}, {loss_consistency:.3f})".format(**logs),
            "" if accuracy is None else f"{accuracy:.1%}",
            "",
        )
        self.shown_at = time.perf_counter()
        self.say(note)


def told_apart(configurations):
    """The titles of some runs, with learning rate or epochs where two that differ in these would read alike."""
    titles = [run.title for run in configurations]
    for say in ("rate {0.learning_rate:g}".format, "{0.epochs} epochs".format):
        said = collections.defaultdict(set)
        for run in configurations:
            said[run.title].add(say(run))
        titles = [
            title + f", {say(run)}" * (len(said[run.title]) > 1)
            for title, run in zip(titles, configurations, strict=True)
        ]
    return titles


def collapsed(metrics, prefix=""):
    """Whether predictions name one class, and surely: more than 99 % of them, with an entropy below 0.1 nats.

    Args:
        metrics: dict with `largest_class` and `prediction_entropy`, numbers or their text.
        prefix: of both names, such as "val_".
    """
    share, entropy_ = (float(metrics[f"{prefix}{name}"]) for name in ("largest_class", "prediction_entropy"))
    return share > 0.99 and entropy_ < 0.1


def collapse_notice(metrics):
    """What a status says of collapsed predictions, with both numbers; nothing where they are not collapsed."""
    if not collapsed(metrics):
        return ""
    share, spread_ = metrics["largest_class"], abs(metrics["prediction_entropy"])  # rounding makes a negative 0
    return f"COLLAPSED: {share:.1%} one class, entropy {spread_:.2f}; "


def duration(seconds):
    """Say seconds as people do: "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _transform_of(run):
    """Name of the transform in a run's id."""
    return run.rsplit("-", 2)[0]


def _check_current(function):
    """Raise ValueError where the name of a function, a transform or `build_model`, stands for another one by now.

    The former would be trained with and not the one that can be read. And `build_model` knows a transform by its name,
    so it would take the former for a stranger and leave out its switches.
    """
    function = getattr(function, "func", function)  # of a partial application
    name = getattr(function, "__name__", "")
    current = vars(sys.modules.get(getattr(function, "__module__", ""), object)).get(name, function)
    if current is not function:
        raise ValueError(
            f"{name} has been defined again since it was put among the transforms or given to the Runner: run the "
            "cells that do so, and those below them, again."
        )


class Runner:
    """Trains the planned runs, each once, and keeps their records in a folder.

    A run lives in `folder/<id>/<fingerprint>/`: a changed setting changes the first, changed code
    of the method the second. `record.json` appears when the run is finished, `network.weights.h5`
    shortly before, or `failure.json` when a loss was not finite. What is damaged is set aside and trained
    again; what another kernel trains is waited for.

    Args:
        data: Split.
        build_model: function of (Configuration, transform, ImagePool) that returns the compiled model.
        transforms: dict of name to transform.
        plan: list of all the Configurations of the notebook, for "experiment k of n"; others that
            are trained are added to it.
        preset: name of the preset, noted in the records.
        folder: where the runs live.
    """

    def __init__(self, data, build_model, transforms, plan, preset, folder="runs"):
        self.data, self.build_model, self.transforms = data, build_model, transforms
        self.plan, self.preset, self.folder = plan, preset, pathlib.Path(folder)
        self.strategy = device_strategy()

    def fingerprint(self, configuration):
        """Digest of the data and of the code that builds the model, its step, its batches and what it starts from.

        The loop around these (`Runner.train`) is not in it: after a change there, delete the runs.

        Raises:
            ValueError: the run's transform is unknown, or its function, or `build_model`, has been defined again since.
        """
        starts = [run for run in (configuration.starting_run, configuration.moments_from) if run]
        return self._fingerprint(configuration.transform, configuration.balanced, starts)

    def _fingerprint(self, transform, balanced, starts=()):
        names = dict.fromkeys((transform, *map(_transform_of, starts)))
        _check_current(self.build_model)
        for name in names:
            if name not in self.transforms:
                raise ValueError(f"The transform {name!r} is unknown; known are {', '.join(self.transforms)}.")
            _check_current(self.transforms[name])
        batches = balanced_batches if balanced else training_batches
        plumbing = [Split.pool, batches, evaluation_batches, Checkpoint.on_epoch_begin, averaging]
        plumbing += [load_start] if starts else []
        transforms = [self.transforms[name] for name in names]
        return fingerprint(self.build_model, *transforms, *plumbing, self.data.digest)

    def path(self, configuration):
        """Folder of a run."""
        return self.folder / configuration.id / self.fingerprint(configuration)

    def record(self, configuration):
        """Record of a finished run, or None where there is none, or a damaged one."""
        try:
            return read_json(self.path(configuration) / "record.json")
        except Damaged:
            return None

    def failure(self, configuration):
        """Why a run failed, or the one that it starts from: a sentence; "" for a run that did not fail."""
        try:
            failed = read_json(self.path(configuration) / "failure.json")
        except Damaged:
            return ""
        if failed:
            return failed["reason"]
        for start in filter(None, (configuration.starting_run, configuration.moments_from)):
            if (self._folder(configuration, start) / "failure.json").exists():
                return f"not trained: the run that it starts from, {start}, failed"
        return ""

    def history(self, configuration):
        """Metrics of the epochs that a run has finished so far, a dict an epoch; of an unfinished run, too."""
        for name in ("record.json", "progress.json"):
            with contextlib.suppress(Damaged):
                content = read_json(self.path(configuration) / name)
                if content:
                    return content["history"]
        return []

    def records(self):
        """Records of those planned runs that are finished."""
        return [record for record in map(self.record, self.plan) if record]

    def model(self, configuration, pool=None):
        """A freshly initialised model, compiled, with the starting weights where the run has such.

        Args:
            configuration: of the run.
            pool: ImagePool to train and evaluate on; without it the model can only predict.

        Raises:
            FileNotFoundError: the run it starts from is not finished.
        """
        model = self._fresh_model(configuration, pool)
        if configuration.starting_run:
            start = self._finished(configuration, configuration.starting_run)
            moments = self._finished(configuration, configuration.moments_from or configuration.starting_run)
            load_start(model, start, moments, configuration)
        return model

    def _fresh_model(self, configuration, pool=None):
        transform = self.transforms[configuration.transform]
        policy = keras.mixed_precision.dtype_policy()
        with _building:
            keras.utils.set_random_seed(configuration.seed)
            keras.mixed_precision.set_dtype_policy(configuration.precision)
            try:
                with self.strategy.scope():
                    model = self.build_model(configuration, transform, pool)
                    model.optimizer.build(model.trainable_variables)
            finally:
                keras.mixed_precision.set_dtype_policy(policy)
        return model

    def _folder(self, configuration, run):
        """Folder of the run, given by its id, that another starts from; its transform and batches may differ."""
        kinds = (configuration.balanced, not configuration.balanced)
        folders = [self.folder / run / self._fingerprint(_transform_of(run), balanced) for balanced in kinds]
        return next((folder for folder in folders if folder.exists()), folders[0])

    def _finished(self, configuration, run):
        folder, what = self._folder(configuration, run), "is not finished"
        try:
            if intact(folder / "record.json"):
                return folder
        except Damaged as damage:
            what = f"is damaged ({damage})"
        raise FileNotFoundError(
            f"{configuration.title} starts from the run {folder}, which {what}: train step one first."
        )

    def trained(self, configuration):
        """The model of a finished run, to predict with.

        Raises:
            FileNotFoundError: the run is not finished, or failed.
            Damaged: its files are not as they were written; training it again mends that.
        """
        if not intact(self.path(configuration) / "record.json"):
            why = self.failure(configuration) or "it is not finished"
            raise FileNotFoundError(f"There is no trained network of {configuration.title}: {why}.")
        model = self._fresh_model(configuration)
        model.network.load_weights(self.path(configuration) / "network.weights.h5")
        return model

    def train(self, configurations, make_status=LiveStatus):
        """Train those of these runs that are neither finished nor failed, one after the other.

        Args:
            configurations: list of Configuration.
            make_status: LiveStatus, or what makes one of another kind from the same arguments. What it raises ends
                the training, which goes on from the last finished epoch when it is asked for again.

        Returns:
            list of records, in the same order, without the runs that failed; `failure` says why they did.

        Raises:
            FileNotFoundError: a run starts from another one that is neither finished nor failed.
            OSError: the disk is full, or the folder read-only.
            ValueError: a run's transform is unknown, or its function, or `build_model`, has been defined again since.
        """
        self.plan += [run for run in configurations if run not in self.plan]
        status = make_status(
            [self.plan.index(run) + 1 for run in configurations], len(self.plan), configurations, self.data.caption
        )
        status.settled = {index for index, run in enumerate(configurations) if self.record(run) or self.failure(run)}
        records = []
        for index, configuration in enumerate(configurations):
            status.start(index, configuration.epochs)
            record, note = self._kept(configuration), "kept, "
            if record is None and not self.failure(configuration):
                record, note = self._train_alone(configuration, status, index), ""
            if record is None:
                mend = f"; to try again, delete {self.path(configuration)}"
                own = (self.path(configuration) / "failure.json").exists()
                status.say(f"FAILED: {self.failure(configuration)}{mend if own else ''}")
            else:
                status.finish(record, f"{note}trained in {duration(record['seconds'])}")
                records.append(record)
        return records

    def _kept(self, configuration):
        """Record of a finished run of which every file is whole, or None."""
        try:
            return intact(self.path(configuration) / "record.json")
        except Damaged:
            return None

    def _train_alone(self, configuration, status, index):
        """Record of a run once this kernel, or another that is at it, has trained it; None if it failed."""
        folder = self.path(configuration)
        while True:
            try:
                with _one_training(), Lock(folder / "lock.json") as lock:
                    record = intact_or_set_aside(folder / "record.json")
                    failed = intact_or_set_aside(folder / "failure.json")
                    return record or (None if failed else self._train(configuration, status, index, lock))
            except NotFinite:
                return None
            except Locked as other:
                status.say(f"waits: {other}")
                time.sleep(1)

    def _train(self, configuration, status, index, lock):
        folder = self.path(configuration)
        if threading.current_thread() is threading.main_thread():
            keras.utils.clear_session()  # another thread's has nothing to clear yet, and this one may be in use
        gc.collect()  # models hold reference cycles, and each holds its images
        with self.strategy.scope():
            pool, places = self.data.pool(configuration)
        model = self.model(configuration, pool)
        for use, positions in places.items():
            size = configuration.batch_size if use == "training" else EVALUATION_BATCH
            full = use == "training" and configuration.full_batches
            last = size if full else len(positions) % size or size
            if last < self.strategy.num_replicas_in_sync:
                raise ValueError(
                    f"The last batch of {len(positions)} {use} images holds {last}, fewer than there are devices "
                    f"({self.strategy.num_replicas_in_sync}): choose another number of images."
                )
        validation, test = (evaluation_batches(places[use]) for use in ("validation", "test"))
        checkpoint = Checkpoint(folder, configuration.seed, lock)
        finished_epochs = checkpoint.restore(model)
        status.start(index, finished_epochs)
        known = {
            "id": configuration.id,
            "fingerprint": folder.name,
            "preset": self.preset,
            "configuration": dataclasses.asdict(configuration),
            "environment": environment(),
            "date": datetime.date.today().isoformat(),
        }
        try:
            if finished_epochs < configuration.epochs:
                training = self._training(configuration, places["training"], finished_epochs)
                model.fit(
                    give_to_all(self.strategy, training),
                    initial_epoch=finished_epochs,
                    epochs=configuration.epochs,
                    steps_per_epoch=configuration.steps_per_epoch,
                    validation_data=give_to_all(self.strategy, validation),
                    validation_steps=len(validation),
                    callbacks=[FiniteLoss(), checkpoint, status, *averaging(model)],
                    shuffle=False,  # the batches come in the epoch's own order
                    verbose=0,
                )
            model.optimizer.finalize_variable_values(model.trainable_variables)  # the averages, where it takes such
            metrics = model.evaluate(give_to_all(self.strategy, test), steps=len(test), return_dict=True, verbose=0)
            check_finite(metrics, "the test")
        except NotFinite as error:
            lock.check()
            write_json(folder / "failure.json", known | {"reason": str(error), "history": checkpoint.history})
            raise
        lock.check()
        weights = save_weights(model.network, folder / "network.weights.h5")
        record = known | {
            "metrics": {name: float(value) for name, value in metrics.items()},
            "history": checkpoint.history,
            "seconds": checkpoint.seconds,
            "files": checkpoint.files | {"network.weights.h5": weights},
        }
        write_json(folder / "record.json", record)
        return record

    def _training(self, run, positions, first_epoch):
        if run.balanced:
            labeled, unlabeled = positions[: run.labeled], positions[run.labeled :]
            return balanced_batches(
                labeled, unlabeled, run.batch_size, run.seed, first_epoch, run.epochs, run.steps_per_epoch
            )
        fill = "filled_batches" in run.active
        return training_batches(positions, run.batch_size, run.seed, first_epoch, run.epochs, run.steps_per_epoch, fill)


# ----------------------------------------------------------------------------------- tables

# Table 1 of the report, as printed: total, supervised and consistency loss, then the accuracy
# ("Sup") and how often both predictions agree ("Cons"). Its last method is called SemiTCE there.
# Where it prints an accuracy of 0.1% it means the fraction 0.1, chance: a constant prediction's loss is
# 0.9 x ln(1e7) = 14.5, the loss printed beside it.
MISPRINT = 0.1
REPORT_TABLE = {
    ("noise", "Supervised"): (None, 2.26, None, 0.639, None),
    ("noise", "SemiC"): (1.72, 1.69, 0.03, 0.611, 0.934),
    ("noise", "SemiCT"): (14.5, 14.5, 0.0, MISPRINT, 1.0),
    ("noise", "SemiCTE"): (1.491, 1.455, 0.036, 0.649, 0.931),
    ("shift", "Supervised"): (None, 2.11, None, 0.683, None),
    ("shift", "SemiC"): (0.84, 0.76, 0.08, 0.748, 0.887),
    ("shift", "SemiCT"): (0.76, 0.70, 0.07, 0.773, 0.890),
    ("shift", "SemiCTE"): (0.793, 0.723, 0.07, 0.762, 0.900),
    ("rotation", "Supervised"): (None, 2.84, None, 0.667, None),
    ("rotation", "SemiC"): (1.53, 1.44, 0.09, 0.756, 0.932),
    ("rotation", "SemiCT"): (14.5, 14.5, 0.0, MISPRINT, 1.0),
    ("rotation", "SemiCTE"): (1.7, 1.283, 0.417, 0.713, 0.819),
}
COLUMNS = ("Total loss", "Supervised loss", "Consistency loss", "Accuracy", "Agreement")
RUN_COLUMNS = (
    *("id", "fingerprint", "recipe", "preset"),
    *(field.name for field in dataclasses.fields(Configuration)),
    *METRICS,
    *OVERLAPS,
    *("seconds", "device", "cores", "python", "tensorflow", "keras", "numpy", "elasticdeform", "date"),
)
CURVE_METRICS = (*METRICS, *OVERLAPS)
CURVE_COLUMNS = ("id", "fingerprint", "epoch", *CURVE_METRICS, *(f"val_{name}" for name in CURVE_METRICS))
REPEAT_CURVE_COLUMNS = ("device", *CURVE_COLUMNS)


class Table:
    """A small table that notebooks show as HTML and everything else as text.

    Args:
        header: column titles.
        rows: sequences of cells, turned into text as they are.
        caption: one line above the table.
    """

    def __init__(self, header, rows, caption=""):
        self.header, self.rows, self.caption = tuple(header), rows, caption

    def _repr_html_(self):
        def line(cells, tag):
            return (
                "<tr>"
                + "".join(f'<{tag} style="text-align:left">{html.escape(str(cell))}</{tag}>' for cell in cells)
                + "</tr>"
            )

        caption = f'<caption style="text-align:left">{html.escape(self.caption)}</caption>' if self.caption else ""
        body = "\n".join(line(row, "td") for row in self.rows)
        return f"<table>{caption}<thead>{line(self.header, 'th')}</thead>\n<tbody>\n{body}\n</tbody></table>"

    def __repr__(self):
        rows = [[str(cell) for cell in row] for row in (self.header, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(filter(None, [self.caption, *lines]))

    def csv(self):
        """The header and the rows as comma-separated values."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.header, *self.rows])
        return text.getvalue()

    def markdown(self):
        """The table in GitHub's Markdown, the caption above it."""
        header, *rows = ([str(cell).replace("|", "\\|") for cell in row] for row in (self.header, *self.rows))
        lines = [header, ["---"] * len(header), *rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join(filter(None, [self.caption, table])) + "\n"

    def latex(self):
        """The table as a LaTeX `table`; the document needs the package amssymb."""

        def line(cells):
            return " & ".join(str(cell).translate(LATEX) for cell in cells) + r" \\"

        body = [rf"\begin{{tabular}}{{{'l' * len(self.header)}}}", r"\hline", line(self.header), r"\hline"]
        body += [*map(line, self.rows), r"\hline", r"\end{tabular}"]
        caption = [rf"\caption{{{self.caption.translate(LATEX)}}}"] if self.caption else []
        return "\n".join([r"\begin{table}", r"\centering", *caption, *body, r"\end{table}", ""])


LATEX = str.maketrans(
    {letter: f"\\{letter}" for letter in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}"}
    | {"▲": r"$\blacktriangle$", "▼": r"$\blacktriangledown$", "±": r"$\pm$", "−": "$-$", "–": "--", "—": "---"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "λ": r"$\lambda$", "·": r"$\cdot$", "…": r"\ldots{}"}
)


def export(tables, folder):
    """Write tables as CSV, Markdown and LaTeX, and every figure that was shown so far as PNG and PDF.

    Args:
        tables: dict of file name, without its ending, to Table.
        folder: where to.

    Returns:
        Table of what was written.
    """
    folder = pathlib.Path(folder)
    with _writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, table in tables.items():
        for ending, content in (("csv", table.csv()), ("md", table.markdown()), ("tex", table.latex())):
            write_bytes(folder / f"{name}.{ending}", content.encode())
        rows.append((f"{name}.csv, .md, .tex", table.caption))
    for title, figure in FIGURES.items():
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        if len(name) > 60:  # the whole title tells apart those that begin alike
            name = f"{name[:51]}-{hashlib.sha256(title.encode()).hexdigest()[:8]}"
        for ending in ("png", "pdf"):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=ending, dpi=150)
            write_bytes(folder / f"{name}.{ending}", buffer.getvalue())
        rows.append((f"{name}.png, .pdf", title))
    return Table(("files", "what"), rows, f"{len(rows)} tables and figures written to {folder.name}/")


def spread(values, form=".1%", signed=False):
    """Mean ± standard deviation of at least two values, or the one value there is; "not run" of none."""
    if not len(values):
        return "not run"
    mean = format(np.mean(values), f"+z{form}" if signed else form)  # z: no "-0.0"
    return f"{mean} ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else mean


def table_1(sources, caption="", failures=None):
    """Table 1 of the report, each of its numbers beside ours.

    Args:
        sources: dict of name to dict of (transform, method) to a list of records, one a seed.
        caption: of the table.
        failures: dict of (transform, method) to why the run failed, for the last source.

    Returns:
        Table; a cell reads "report | first source | second source ...", mean ± standard deviation where there are
        several records. ▲ and ▼ mark an accuracy or agreement of ours that is at least three points above or below the
        report's; a run that failed or collapsed is marked as such.
    """
    lines, failures, last = [], failures or {}, list(sources)[-1]
    for key, printed in REPORT_TABLE.items():
        found = {name: records.get(key, ()) for name, records in sources.items()}
        failed = failures.get(key) if not found[last] else None
        cells = []
        for column, (theirs, metric) in enumerate(zip(printed, METRICS, strict=False)):
            form = ".1%" if column > 2 else ".3g"
            cell = ["–" if theirs is None else "0.1% (10%)" if theirs == MISPRINT else format(theirs, form)]
            for name, records in found.items():
                values = [record["metrics"][metric] for record in records]
                marked = values and column > 2 and theirs is not None and abs(np.mean(values) - theirs) >= 0.03
                mark = "" if not marked else " ▲" if np.mean(values) > theirs else " ▼"
                cell.append("failed" if failed and name == last else spread(values, form) + mark)
            cells.append(" | ".join(cell))
        recipes = [failed if failed and name == last else _recipes(records) for name, records in found.items()]
        lines.append((*key, " | ".join(filter(None, dict.fromkeys(recipes))), *cells))
    columns = (f"{name}: {' | '.join(['report', *sources])}" for name in COLUMNS)
    return Table(("Transform", "Method", "Our recipe", *columns), lines, caption)


def _recipes(records):
    """Names of the recipes of some records, how many seeds, and whether any of these collapsed."""
    names = dict.fromkeys(Configuration(**record["configuration"]).recipe for record in records)
    fallen = any(collapsed(record["metrics"]) for record in records)
    return ", ".join(names) + f" (n = {len(records)})" * (len(records) > 1) + " (collapsed)" * fallen


def accuracy_table(sources, caption=""):
    """Accuracy by transform and method, the report's beside that of several sources (as of `table_1`)."""
    rows = [
        (*key, f"{printed[3]:.1%}", *(_accuracy(records.get(key, ())) for records in sources.values()))
        for key, printed in REPORT_TABLE.items()
    ]
    return Table(("Transform", "Method", "report", *sources), rows, caption)


def gains_table(sources, caption=""):
    """SemiC beside Supervised, a row a pair (of `pairs`), from several sources (as of `table_1`)."""
    rows = []
    for source, found in sources.items():
        for transform in dict.fromkeys(transform for transform, _ in REPORT_TABLE):
            for semic, supervised in _with_and_without(found, transform):
                ends = [f"{record['metrics']['accuracy']:.1%}" for record in (supervised, semic)]
                gains = [_points(semic, supervised, metric) for metric in ("accuracy", "consistency")]
                seed = semic["configuration"]["seed"]
                rows.append((source, transform, seed, *ends, *(f"{gain:+z.1f}" for gain in gains)))
    header = ("trained as", "transform", "seed", "Supervised", "SemiC", "points of accuracy", "points of agreement")
    return Table(header, rows, caption)


def _accuracy(records):
    shown = spread([record["metrics"]["accuracy"] for record in records])
    return shown + f" (n = {len(records)})" * (len(records) > 1)


def scale_table(planned, records, caption=""):
    """How some runs ended, beside the report's accuracy for their transform and method.

    Args:
        planned: dict of name to Configuration.
        records: dict of name to record, of those that were trained.
        caption: of the table.

    Returns:
        Table, a row a run.
    """
    rows = []
    for name, run in planned.items():
        printed, cells = REPORT_TABLE[run.transform, run.method][3], ["not run", "–", "–", "–"]
        if name in records:
            metrics, row = records[name]["metrics"], records[name]["row"]
            cells = [f"{metrics[key]:.1%}" for key in ("accuracy", "consistency", "largest_class")]
            cells += [f"{float(row['seconds']) / 60:.0f} ({row['cores']})"]
        updates = f"{run.epochs * run.steps_per_epoch:,}"
        rows.append((name, run.width, run.epochs, updates, f"{printed:.1%}", *cells))
    header = ("run", "width", "epochs", "updates", "report: accuracy", "accuracy", "agreement", "largest class")
    return Table((*header, "minutes (cores)"), rows, caption)


def repeats_table(repeats, rows, caption=""):
    """The same runs trained twice, on the device of either.

    Args:
        repeats: rows of `repeats.csv`, dicts of str.
        rows: rows of `runs.csv`.
        caption: of the table; how many there are and how far apart is added to it.

    Returns:
        Table, a row a repeat, sorted by width and run.
    """
    if not repeats:
        return _no_record(caption)
    first, cells, distances = {row["id"]: row for row in rows}, [], []

    def order(row):  # not that of the file, in which a row that is renewed comes last
        return int(row["width"]), row["method"], row["transform"], int(row["seed"]), row["id"], row["device"]

    for row in sorted(repeats, key=order):
        before, after = (float(one["accuracy"]) for one in (first[row["id"]], row))
        distances.append(abs(after - before))
        name = f"{row['method']}, {row['transform']} ({row['recipe']})"
        shown = [f"{value:.1%}" for value in (before, after)] + [f"{100 * (after - before):+z.1f}"]
        devices = first[row["id"]]["device"], row["device"]
        sizes = (row["width"], f"{int(row['unlabeled']):,}", row["epochs"], row["seed"])
        cells.append((name, *sizes, devices[0], shown[0], devices[1], *shown[1:]))
    header = ("run", "width", "unlabelled", "epochs", "seed", "first on", "accuracy", "then on", "accuracy", "points")
    half, most = 100 * np.median(distances), 100 * max(distances)
    apart = f"{len(cells)} runs, half of them at most {half:.1f} points apart, all at most {most:.1f}"
    return Table(header, cells, f"{caption}: {apart}")


def continuation_table(records, caption=""):
    """Step one and what it becomes when the training goes on in several ways.

    Args:
        records: dict of (transform, name) to record, None where there is none; the name of step one is "step one". Of
            a step one that was trained on several devices, the training on the device of the ways is shown.
        caption: of the table.

    Returns:
        Table, a row a transform: test accuracy and agreement of step one and of each way, and the gain in accuracy of
        the last way over the one before it, where both were trained on one device.
    """
    if not any(records.values()):
        return _no_record(caption)
    rows, names = [], list(dict.fromkeys(name for _, name in records))
    for transform in dict.fromkeys(transform for transform, _ in records):
        start, *ways = (records[transform, name] for name in names)
        last = next((way for way in reversed(ways) if way), None)
        if start and last:
            start = _start_of(last, start)
        shown = [_accuracy_and_agreement(one) for one in (start, *ways)]
        without, full = ways[-2:]
        alike = without and full and _device(without) == _device(full)
        rows.append((transform, *shown, f"{_points(full, without, 'accuracy'):+z.1f}" if alike else "–"))
    columns = (f"{name}: accuracy | agreement" for name in names)
    return Table(("transform", *columns, "points of the last over the one before"), rows, caption)


def curve_table(records, caption=""):
    """What the curves of some runs say in numbers: a Table, a row a record; None stands for no run."""
    rows = []
    for record in filter(None, records):
        history, configuration = record["history"], record["configuration"]
        losses, last = [epoch["val_loss"] for epoch in history], history[-1]
        lowest = int(np.argmin(losses))
        rows.append(
            (
                f"{configuration['method']}, {configuration['transform']}, rate {configuration['learning_rate']:g}",
                f"{last['loss']:.2f}",
                f"{losses[lowest]:.2f} (epoch {lowest + 1})",
                f"{losses[-1]:.2f}",
                f"{last['val_accuracy']:.1%}",
                f"{last['val_consistency']:.1%}",
                stagnation_epoch(history),
            )
        )
    header = (
        "run",
        "last training loss",
        "lowest validation loss",
        "last",
        "last accuracy",
        "last agreement",
        "stagnates in epoch",
    )
    return Table(header, rows, f"Read from the curves; loss and accuracy on the validation images{caption}")


def stagnation_epoch(history):
    """Epoch (from 1) from which on the validation accuracy gains less than a point, smoothed over five epochs."""
    accuracy = np.array([epoch["val_accuracy"] for epoch in history])
    smooth = np.array([accuracy[max(0, k - 2) : k + 3].mean() for k in range(len(accuracy))])
    return int(np.argmax(smooth >= smooth.max() - 0.01)) + 1


def _accuracy_and_agreement(record):
    if record is None:
        return "not run"
    metrics = record["metrics"]
    return f"{metrics['accuracy']:.1%} | {metrics['consistency']:.1%}" if metrics else "–"


def survival_table(records, caption=""):
    """How short continuations ended, over several seeds.

    Args:
        records: dict of (seed, name) to record, of the continuations and of what they start from.
        caption: of the table.

    Returns:
        Table, a row a name of a continuation, its losses in the order of the seeds.
    """
    ways = _continuations(records)
    if not ways:
        return _no_record(caption)
    rows = []
    for name in dict.fromkeys(name for _, name in ways):
        runs = [ways[key] for key in sorted(ways) if key[1] == name]
        before = [f"{start['history'][-1]['loss_supervised']:.2f}" if start["history"] else "–" for start, _ in runs]
        ends = [record["history"][-1] for _, record in runs]
        rows.append(
            (
                name,
                ", ".join(before),
                f"{sum(collapsed(end, 'val_') for end in ends)} of {len(ends)}",
                ", ".join(f"{end['val_loss_supervised']:.1f}" for end in ends),
                ", ".join(f"{end['val_accuracy']:.0%}" for end in ends),
            )
        )
    header = (
        "SemiCT",
        "training loss of its step one",
        "collapsed",
        "supervised loss at the end",
        "accuracy at the end",
    )
    return Table(header, rows, caption)


def attribution_table(accuracies, caption=""):
    """What every state does to two methods and to the gain of the second over the first.

    Args:
        accuracies: dict of (seed, state, method) to test accuracy, or to None where there is none; the methods are
            Supervised and SemiC.
        caption: of the table.

    Returns:
        Table, a row a state; the gain is taken seed by seed, over those seeds that have both methods.
    """
    rows = []
    for state in dict.fromkeys(state for _, state, _ in accuracies):
        both = [_of_state(accuracies, state, method) for method in ("Supervised", "SemiC")]
        gains = attribution_gains(accuracies, state)
        rows.append(
            (state, *(spread(list(values.values())) for values in both), spread(gains, signed=True), len(gains))
        )
    header = ("recipe", "Supervised", "SemiC", "gain of SemiC", "pairs of runs")
    return Table(header, rows, caption)


def attribution_gains(accuracies, state):
    """SemiC minus Supervised at a state, seed by seed; accuracies as for `attribution_table`."""
    return seed_by_seed(*(_of_state(accuracies, state, method) for method in ("SemiC", "Supervised")))


def _of_state(accuracies, state, method):
    return {key[0]: value for key, value in accuracies.items() if key[1:] == (state, method) and value is not None}


def refinement_table(records, caption=""):
    """What each refinement does on the validation images.

    Args:
        records: dict of (name, method) to record, or to None where there is none; the methods are Supervised and
            SemiC. A refinement that has no key with a method does not apply to it.
        caption: of the table.

    Returns:
        Table, a row a name: accuracy after the last epoch and its spread over the last ten, and SemiC's agreement.
    """
    rows = []
    for name in dict.fromkeys(name for name, _ in records):
        cells = []
        for method in ("Supervised", "SemiC"):
            history = (records.get((name, method)) or {"history": []})["history"][-10:]
            accuracies = [epoch["val_accuracy"] for epoch in history]
            cells += [spread(accuracies[-1:]), spread(accuracies)] if (name, method) in records else ["–", "–"]
        agreement = [epoch["val_consistency"] for epoch in history[-1:]]
        rows.append((name, *cells, spread(agreement)))
    header = ("added to reported", "Supervised", "its last ten epochs", "SemiC", "its last ten epochs", "agreement")
    return Table(header, rows, caption)


def labels_table(records, caption=""):
    """Test accuracy and agreement by the number of labels and what there is to learn from besides.

    Args:
        records: dict of (labels, name of the rest) to record, or to None where there is none.
        caption: of the table.

    Returns:
        Table, a row a number of labels.
    """
    counts, rest = (list(dict.fromkeys(names)) for names in zip(*records, strict=True))
    rows = [(f"{count:,}", *(_accuracy_and_agreement(records[count, name]) for name in rest)) for count in counts]
    return Table(("labels", *(f"{name}: accuracy | agreement" for name in rest)), rows, caption)


def estimate_times(pairs, peaks):
    """Estimate how long trainings take on some GPUs, from the measurements in results/benchmark.json.

    Args:
        pairs: dict of name to image pairs, at the network's full width.
        peaks: dict of GPU to its peak speed, in TFLOP/s.

    Returns:
        Table of times.
    """
    measured = shipped("benchmark.json")
    if measured is None:
        return Table((), [], "This table needs the folder results/ of the repository beside helpers.py.")
    operations, rows = measured["operations_per_image"], []
    for gpu, peak in peaks.items():
        for fraction in (measured["peak_fraction"], measured["peak_fraction"] / 3):
            times = (duration(2 * count * operations / (fraction * peak * 1e12)) for count in pairs.values())
            rows.append((gpu, f"{peak:g} TFLOP/s", f"{fraction:.2f}", *times))
    machine = f"{measured['environment']['device']}, {measured['environment']['cores']} cores"
    caption = (
        f"ESTIMATE for the preset paper: {operations / 1e9:.2f} GFLOP an image, and the fraction "
        f"{measured['peak_fraction']:.2f} as measured on {machine} ({measured['date']}), and a third of it"
    )
    names = (f"{name} ({count / 1e6:.2f} million pairs)" for name, count in pairs.items())
    return Table(("GPU", "peak", "fraction", *names), rows, caption)


# ----------------------------------------------------------------------------------- claims


def seed_by_seed(one, other):
    """One minus the other, two dicts of seed to number, for the seeds that both have: list, in their order."""
    return [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]


def pairs(records, others):
    """The records of two runs side by side, seed by seed, for the seeds that both have.

    Where one was trained again on other devices (`repeats`), the pair is two trainings on the same device, if there are
    such: devices round differently, which moves an accuracy by a point or so.

    Returns:
        list of tuples of two records, in the order of the seeds.
    """
    ones, twos = ({record["configuration"]["seed"]: record for record in some} for some in (records, others))
    return [_on_one_device(ones[seed], twos[seed]) for seed in sorted(ones.keys() & twos.keys())]


def _on_one_device(one, other):
    both = itertools.product(_trainings(one), _trainings(other))
    return next((pair for pair in both if _device(pair[0]) == _device(pair[1])), (one, other))


def _trainings(record):
    return record, *record.get("repeats", ())


def _device(record):
    return record.get("row", {}).get("device")  # None of a record of this machine


def paired_gains(found, transform, metric="accuracy"):
    """SemiC minus Supervised in points of a metric of the test, by `pairs`.

    Args:
        found: dict of (transform, method) to a list of records, one a seed.
        transform: whose records.
        metric: name of a fraction.

    Returns:
        list of float, in the order of the seeds that both have.
    """
    return [_points(*pair, metric) for pair in _with_and_without(found, transform)]


def _with_and_without(found, transform):
    return pairs(*(found.get((transform, method), ()) for method in ("SemiC", "Supervised")))


def _points(one, other, metric):
    return 100 * (one["metrics"][metric] - other["metrics"][metric])


class Evidence:
    """Looks numbers up in records for the claims, and remembers which it was asked for.

    Args:
        records: dict of (transform, method) to a list of records, one a seed.
    """

    def __init__(self, records):
        self.records, self.seen = records, {}

    def _records(self, transform, method):
        records = self.records.get((transform, method))
        if not records:
            raise NotRun(f"{method} for {transform}")
        return records

    def _mean(self, transform, method, metric, name):
        values = [record["metrics"][metric] for record in self._records(transform, method)]
        self.seen[transform, method, metric] = f"{name}{spread(values)}"
        return float(np.mean(values))

    def accuracy(self, transform, method):
        """Test accuracy over images and copies, a fraction, mean over the seeds; raises NotRun."""
        return self._mean(transform, method, "accuracy", f"{method}, {transform}: ")

    def collapsed(self, transform, method):
        """Whether any seed's network calls nearly everything one class and is sure of it; raises NotRun."""
        self.accuracy(transform, method)
        self._mean(transform, method, "largest_class", "largest class ")
        return any(collapsed(record["metrics"]) for record in self._records(transform, method))

    def beats(self, transform, method, other):
        """Whether one method is more accurate than another, or less, by more than chance explains.

        The mean difference, over `pairs`, must be above two standard errors of the difference of two proportions near
        0.5 on as many test images (all seeds have the same, so further seeds do not make it smaller) and, with several
        seeds, above half the width of Student's 95% interval for the mean of that many differences.

        Raises:
            Undecided: it is neither more nor less by that.
            NotRun: there are no records of both with the same seed.
        """
        for name in (method, other):
            self.accuracy(transform, name)  # to be told beside the verdict
        records = self._records(transform, method)
        gains = [_points(*pair, "accuracy") for pair in pairs(records, self._records(transform, other))]
        count = len(gains)
        if not count:
            raise NotRun(f"{method} and {other} for {transform} with the same seed")
        needed = 100 * 2 * math.sqrt(2 * 0.25 / records[0]["configuration"]["test"])
        if count > 1:
            error = np.std(gains, ddof=1) / math.sqrt(count)
            needed = max(needed, error * scipy.stats.t.ppf(0.975, count - 1))
        gain, rule = np.mean(gains), f"n = {count}, counts above {needed:.1f}"
        self.seen[transform, method, other] = f"{method} − {other}: {gain:+z.1f} points ({rule})"
        if abs(gain) <= needed:
            raise Undecided(f"{method} and {other} for {transform}")
        return gain > 0

    def best(self, transform, method):
        """Whether a method is more accurate than each of the others, by what `beats` finds, and raises."""
        undecided = None
        for other in METHODS:
            try:
                if other != method and not self.beats(transform, method, other):
                    return False
            except Undecided as difference:
                undecided = difference
        if undecided:
            raise undecided
        return True

    def curve(self, transform, method, metric):
        """A metric's values by epoch, of the first seed; raises NotRun."""
        values = [epoch[metric] for epoch in self._records(transform, method)[0]["history"]]
        self.seen[transform, method, metric] = f"{metric}, {transform}: lowest {min(values):.2f}, last {values[-1]:.2f}"
        return values


class NotRun(LookupError):
    """A claim needs a run that was not made."""


class Undecided(Exception):
    """A difference that a claim speaks of may be chance."""


def check_claims(claims, sources, caption):
    """Tick or cross each claim by the records of each source.

    Args:
        claims: function of an Evidence to dict of claim to a function that judges it.
        sources: as for `table_1`.
        caption: of the table.

    Returns:
        Table of claim and, for each source, the verdict (✓, ✗, ? where a difference is within chance, or · where a run
        is missing) and the numbers behind it.
    """
    verdicts = {}
    for records in sources.values():
        found = Evidence(records)
        for claim, judge in claims(found).items():
            found.seen = {}
            try:
                verdict = "✓" if judge() else "✗"
            except Undecided:
                verdict = "?"
            except NotRun as missing:
                verdict = f"· (not run: {missing})"
            verdicts.setdefault(claim, []).append(f"{verdict} {'; '.join(found.seen.values())}".strip())
    rows = [(claim, *cells) for claim, cells in verdicts.items()]
    caption = f"{caption} (✓ holds, ✗ does not, ? the difference may be chance, · not run)"
    return Table(("the report says", *(f"by {name}" for name in sources)), rows, caption)


# --------------------------------------------------------------------------------- results/


def run_row(record):
    """One row of `results/runs.csv` from a run's record: dict of column to value.

    `seconds` is the training's time by the clock, with all that the machine did beside it and pauses of the process.
    `preset` is the notebook's, or the list of `make records` that the run was on.
    """
    configuration = Configuration(**record["configuration"])  # with the defaults of fields that the record has not
    everything = {**record["environment"], **record["metrics"], **dataclasses.asdict(configuration), **record}
    everything["recipe"] = configuration.recipe
    return {column: everything[column] for column in RUN_COLUMNS if column in everything}


def publish(records, folder="results"):
    """Add finished runs to the records that ship: `runs.csv`, a row a run, and `curves.csv`, a row an epoch.

    A run that is there already (the same id) is replaced, also one of earlier code (another fingerprint), but not one
    that was trained on another device: other runs may have started from it. Then the new one is a repeat. Two
    processes that publish at once do so one after the other.

    Args:
        records: of finished runs.
        folder: where the two files are.

    Raises:
        OSError: the disk is full, or the folder read-only.
    """
    devices = {row["id"]: row["device"] for row in read_csv(pathlib.Path(folder) / "runs.csv")}
    here, elsewhere = [], []
    for record in records:
        device = record["environment"]["device"]
        (here if devices.get(record["id"], device) == device else elsewhere).append(record)
    _put_records(here, folder, "curves.csv", CURVE_COLUMNS, "runs.csv", key=("id",))
    if elsewhere:
        publish_repeats(elsewhere, folder)


def publish_repeats(records, folder="results"):
    """Add finished runs that `runs.csv` has already, trained once more, to `repeats.csv`: a row a run and device.

    Args:
        records: of finished runs.
        folder: where that file is, and `repeats_curves.csv`, with a row an epoch.

    Raises:
        OSError: the disk is full, or the folder read-only.
    """
    _put_records(records, folder, "repeats_curves.csv", REPEAT_CURVE_COLUMNS, "repeats.csv", key=("id", "device"))


def _put_records(records, folder, curves, columns, runs, key):
    # The curves first: what is in the file of the runs counts as there.
    files = {curves: (columns, _curve_rows(records, columns)), runs: (RUN_COLUMNS, list(map(run_row, records)))}
    _put_rows(pathlib.Path(folder), files, key)


def _curve_rows(records, columns):
    """The histories of records, a row an epoch: list of dict of column to value."""
    rows = []
    for record in records:
        known = {"id": record["id"], "fingerprint": record["fingerprint"], "device": record["environment"]["device"]}
        for epoch, values in enumerate(record["history"], start=1):
            row = known | {"epoch": epoch} | {name: f"{value:.4g}" for name, value in values.items()}
            rows.append({column: row[column] for column in columns if column in row})
    return rows


def _put_rows(folder, files, key):
    """Add rows to CSV files in place of those of the same key, as soon as no other process does so.

    A row from before a field of Configuration was added gets its default.

    files: dict of a file's name to its columns and the rows, dicts; key: columns.
    """
    fields = dataclasses.fields(Configuration)
    while True:
        try:
            with Lock(folder / "lock.json"):
                for name, (columns, rows) in files.items():
                    new = {tuple(row[column] for column in key) for row in rows}
                    kept = [row for row in read_csv(folder / name) if tuple(row[column] for column in key) not in new]
                    text = io.StringIO()
                    writer = csv.DictWriter(text, columns, lineterminator="\n")
                    writer.writeheader()
                    defaults = {field.name: field.default for field in fields if field.name in columns}
                    writer.writerows([*(defaults | row for row in kept), *rows])
                    write_bytes(folder / name, text.getvalue().encode())
                return
        except Locked:
            time.sleep(0.1)


def read_csv(path):
    """Rows of a CSV file as dicts of str; none where there is no such file."""
    path = pathlib.Path(path)
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def shipped(name):
    """Content of a file in results/, beside this module: rows of a .csv, what a .json holds; None if it is missing."""
    path = pathlib.Path(__file__).resolve().parent / "results" / name
    if name.endswith(".csv"):
        return read_csv(path) or None
    return json.loads(path.read_text()) if path.exists() else None


def plans_by_records(make_runs):
    """The plans of `make_runs`, one for each of PRECISIONS, that of which results/ has most runs first."""
    ids = {row["id"] for row in shipped("runs.csv") or ()}
    plans = [make_runs(precision) for precision in PRECISIONS]
    return sorted(plans, key=lambda plan: -sum(run.id in ids for run in plan.values()))


def shipped_records(make_runs):
    """The records in results/ of some runs.

    A run of which there are several, in different number types, is taken in the one in which most of these were made.

    Args:
        make_runs: function of a number type, one of PRECISIONS, to a dict of name to Configuration.

    Returns:
        dict of name to record, for those that are there: `id`, `configuration`, `metrics` and `history` as in
        a run's own record, `row`, as in runs.csv, and `repeats`: list of records of the same run trained again, on
        other devices or on this one. The `history` of a repeat is empty where its curve was not kept.
    """
    rows = {row["id"]: row for row in shipped("runs.csv") or ()}
    repeats, curves = collections.defaultdict(list), collections.defaultdict(list)
    for row in shipped("repeats.csv") or ():
        repeats[row["id"]].append(row)
    for curve in (*(shipped("curves.csv") or ()), *(shipped("repeats_curves.csv") or ())):
        values = {name: float(curve[name]) for name in CURVE_COLUMNS[3:] if curve.get(name)}
        curves[curve["id"], curve.get("device")].append(values)  # in the order of the epochs
    plans = plans_by_records(make_runs)
    records = {}
    for name in plans[0]:
        run = next((plan[name] for plan in plans if plan[name].id in rows), None)
        if run:
            again = [_shipped_record(run, row, curves[run.id, row["device"]]) for row in repeats[run.id]]
            records[name] = _shipped_record(run, rows[run.id], curves[run.id, None]) | {"repeats": again}
    return records


def _shipped_record(run, row, history):
    metrics = {metric: float(row[metric]) for metric in CURVE_METRICS if row.get(metric)}
    configuration = dataclasses.asdict(run)
    return {"id": run.id, "configuration": configuration, "metrics": metrics, "history": history, "row": row}


def shipped_or_none(make_runs):
    """As `shipped_records`, with None for the runs that are not there: the tables and figures say so then."""
    records = shipped_records(make_runs)
    return {name: records.get(name) for name in make_runs(PRECISIONS[0])}


def shipped_grid(make_runs):
    """The records in results/ of Table 1 in every recipe.

    Args:
        make_runs: as for `shipped_records`, its names being (recipe, transform, method, seed).

    Returns:
        dict of recipe to dict of (transform, method) to a list of records, one a seed, in their order.
    """
    found = {recipe: {} for recipe in RECIPES}
    for (recipe, transform, method, _), record in sorted(shipped_records(make_runs).items()):
        found[recipe].setdefault((transform, method), []).append(record)
    return found


def _no_record(title):
    """What stands in the place of a figure or table of which results/ has nothing."""
    return Table((), [], f"{title}: no record of these runs is in results/")


def _no_network(title):
    """What stands in the place of a figure of trained networks where all of them failed."""
    return Table((), [], f"{title}: none of these networks was trained to its end")


def _continuations(records):
    """Dict of name to (record of what a run starts from, its record), for those runs of which there are both."""
    by_id = {record["id"]: record for record in records.values()}
    started = {name: record["configuration"]["starting_run"] for name, record in records.items()}
    return {
        name: (_start_of(records[name], by_id[start]), records[name])
        for name, start in started.items()
        if start in by_id
    }


def _start_of(record, start):
    """The training of step one that a run went on from: of several, in results/, the one on the run's device.

    Where that one is not there, nothing is known of it: `metrics` is None and `history` empty.
    """
    same = (training for training in _trainings(start) if _device(training) == _device(record))
    return next(same, start | {"metrics": None, "history": []})


def _from_start(start, record, metric):
    """A metric of a continuation on the validation images, from the end of step one on, where that is known.

    Returns:
        tuple of the training steps since then and the values, an array and a list.
    """
    before = start["history"][-1:]
    steps = record["configuration"]["steps"] * np.arange(1 - len(before), len(record["history"]) + 1)
    return steps, [epoch[metric] for epoch in (*before, *record["history"])]


# ---------------------------------------------------------------------------------- figures

plt.rcParams.update({"figure.dpi": 100, "font.size": 11, "axes.spines.top": False, "axes.spines.right": False})


def show_classes(data):
    """Bar chart of the ten classes in each subset (section 3)."""
    figure, axes = plt.subplots(1, 4, figsize=(12, 3), layout="constrained", sharey=True)
    for axis, (subset, counts) in zip(axes, data.class_counts.items(), strict=True):
        axis.barh(data.classes, counts / max(counts.sum(), 1), color="#0072B2")
        axis.set(title=f"{subset}: {counts.sum():,} images", xlabel="share of the subset")
        axis.axvline(0.1, color="black", linewidth=0.8, linestyle=":")
    axes[0].invert_yaxis()
    figure.suptitle(f"Classes in each subset; dotted: a tenth{data.caption}")
    return _shown(figure)


def show_transform(images, transformed, title):
    """Ten images over their transformed copies (Figures 3, 4 and 5): float (10, h, w, 3), 0 ... 1."""
    return _shown(_pairs(images, transformed, title))


def _pairs(images, transformed, title):
    figure, axes = plt.subplots(2, 10, figsize=(12, 2.9), layout="constrained")
    for row, (pictures, name) in enumerate(((images, "image"), (transformed, "copy"))):
        for column, picture in enumerate(np.clip(pictures, 0, 1)):
            axes[row, column].imshow(picture)
            axes[row, column].set(xticks=[], yticks=[])
        axes[row, 0].set_ylabel(name)
    figure.suptitle(title)
    return figure


def sample_pictures(data):
    """Ten pictures for the figures that show pictures: the first labelled ones.

    With REPRODUCTION_PICTURES=generated they are generated shapes instead, and say so: thus the
    notebook can be saved without an image of CIFAR-10 in it.

    Returns:
        namespace of `images`, uint8 (10, h, w, 3), `caption`, to be added to titles, and `note`, what they are.
    """
    if _generated_pictures() and data.name == "cifar10":
        (images, _), _ = generate_shapes(train=10, test=1)
        note = "The figures below show ten generated pictures; the saved notebook holds no image of CIFAR-10."
        return types.SimpleNamespace(images=images, caption=" — generated pictures", note=note)
    note = "The figures below show the first ten labelled images."
    return types.SimpleNamespace(images=data.labeled_images[:10], caption=data.caption, note=note)


def _generated_pictures():
    """Whether figures are to show generated pictures."""
    wanted = os.environ.get("REPRODUCTION_PICTURES") or "data"
    if wanted not in ("data", "generated"):
        raise ValueError(f"REPRODUCTION_PICTURES is {wanted!r}; set it to 'generated', or unset it.")
    return wanted == "generated"


FLOWING = {"flex_flow": "row wrap"}  # beside each other where there is room, else below
FITTING = {"width": "0", "min_width": "100%"}  # as wide as the cell, however wide what is in it would like to be


def at_strength(transform, strength):
    """A transform with its third parameter, the strength, at a multiple of its default: a functools.partial.

    Raises:
        ValueError: it has no third parameter, or that has no number as default.
    """
    signature = inspect.signature(transform)
    parameter = next(itertools.islice(signature.parameters.values(), 2, None), None)
    if parameter is None or not isinstance(parameter.default, numbers.Real):
        raise ValueError(
            f"A transform's parameters are {signature}; the third must be its strength, with a number as default, as "
            "in (images, seed, strength=1.0)."
        )
    return functools.partial(transform, **{parameter.name: strength * parameter.default})


def png(figure):
    """A figure as the bytes of a PNG of 256 colours, a third of the size that it has in all colours."""
    drawn, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    picture = PIL.Image.open(drawn).convert("RGB")
    coverage = PIL.Image.Quantize.MAXCOVERAGE  # so that small things, such as a coloured title, keep their colour
    picture.quantize(256, coverage, dither=PIL.Image.Dither.NONE).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def transform_preview(pictures, transforms):
    """Controls that show a transform at a strength of one's choice, live.

    Args:
        pictures: as of `sample_pictures`.
        transforms: dict of name to transform, whose third parameter is its strength, with the report's as default.

    Returns:
        a widget.
    """
    choice = widgets.Dropdown(options=list(transforms), description="transform")
    strength = widgets.FloatSlider(
        value=1.0, min=0.0, max=2.0, step=0.05, description="strength", readout_format=".2f", continuous_update=False
    )
    draw = widgets.BoundedIntText(value=0, min=0, max=9999, description="draw")

    # A picture that is replaced, not an Output widget: at one of those nbclient can lose a reply and wait for ever
    # (its issue 312), and a notebook must get past this cell when nobody is looking.
    shown = widgets.Image(format="png")

    def show(change=None):
        transform = at_strength(transforms[choice.value], strength.value)
        copies = transform(to_unit_range(pictures.images), [draw.value, 0])
        ((name, value),) = transform.keywords.items()
        figure = _pairs(pictures.images / 255, copies.numpy(), f"{choice.value}, {name} {value:.3g}{pictures.caption}")
        plt.close(figure)
        shown.value = png(figure)

    for control in (choice, strength, draw):
        control.observe(show, names="value")
    show()
    return widgets.VBox([widgets.HBox([choice, strength, draw], layout=FLOWING), shown], layout=FITTING)


def show_curves(records, title, mark_stagnation=False):
    """Losses and accuracies by epoch, training and validation, a column a record (Figure 6); None stands for no run."""
    records = [record for record in records if record]
    if not records:
        return Table((), [], f"{title}: none of these runs was finished")
    figure, axes = plt.subplots(
        2, len(records), figsize=(4.2 * len(records), 5.5), layout="constrained", squeeze=False, sharey="row"
    )
    names = ["{method}, {transform}".format(**record["configuration"]) for record in records]
    if len(set(names)) < len(names):
        rates = (f"rate {record['configuration']['learning_rate']:g}" for record in records)
        names = list(map(", ".join, zip(names, rates, strict=True)))
    for column, record in enumerate(records):
        history, configuration = record["history"], record["configuration"]
        epochs = np.arange(1, len(history) + 1)
        for row, (metric, unit) in enumerate((("loss", "loss (nats)"), ("accuracy", "accuracy"))):
            axis = axes[row, column]
            for prefix, style, name in (("", "--", "training"), ("val_", "-", "validation")):
                values = [epoch[prefix + metric] for epoch in history]
                axis.plot(
                    epochs,
                    values,
                    style,
                    color=COLORS[configuration["method"]],
                    label=name,
                    marker="." if len(epochs) < 3 else None,
                )
            if mark_stagnation:
                axis.axvline(
                    stagnation_epoch(history),
                    color="gray",
                    linestyle=":",
                    label=f"stagnates: epoch {stagnation_epoch(history)}",
                )
            axis.set(xlabel="epoch", ylabel=unit if column == 0 else "")
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[0, column].set_title(names[column])
        axes[1, column].legend(frameon=False, fontsize=9)
    figure.suptitle(title)
    return _shown(figure)


def show_accuracy(sources, title):
    """Accuracy by transform and method, the report's (hatched) beside that of some sources (as for `table_1`).

    Each source is paler than the one before it; error bars are the standard deviation over the seeds.
    """
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained", sharey=True)
    width = 0.86 / (1 + len(sources))
    for axis, transform in zip(axes, ("noise", "shift", "rotation"), strict=True):
        for place, method in enumerate(METHODS):
            bars = [[REPORT_TABLE[transform, method][3]]]
            for records in sources.values():
                bars.append([record["metrics"]["accuracy"] for record in records.get((transform, method), ())])
            for number, values in enumerate(bars):
                if not values:
                    continue
                left, mean = place - 0.43 + (number + 0.5) * width, np.mean(values)
                look = (
                    {"color": COLORS[method], "alpha": 1 - 0.35 * (number - 1)}
                    if number
                    else {"facecolor": "white", "edgecolor": COLORS[method], "hatch": "//"}
                )
                axis.bar(left, mean, 0.9 * width, **look)
                error = np.std(values, ddof=1) if len(values) > 1 else 0
                if error:
                    axis.errorbar(left, mean, error, color="gray", capsize=2)
                axis.text(
                    left, mean + error + 0.015, f"{100 * mean:.1f}", ha="center", va="bottom", rotation=90, size=8
                )
        axis.axhline(0.1, color="gray", linestyle=":", linewidth=1)
        axis.set(title=transform, ylim=(0, 1))
        axis.set_xticks(range(4), METHODS, fontsize=9)
    axes[0].set_ylabel("test accuracy, image and copy (%)")
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
    axes[0].annotate(
        "chance", (1, 0.1), (4, -3), xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=8
    )
    figure.suptitle(title)
    return _shown(figure)


def show_confusion(answers, labels, classes, title):
    """Which class is taken for which, a panel a method.

    Args:
        answers: dict of method to predicted classes, int (n,).
        labels: int (n,).
        classes: names, by label.
        title: of the figure.
    """
    if not answers:
        return _no_network(title)
    figure, axes = plt.subplots(
        1, len(answers), figsize=(3.6 * len(answers), 5), layout="constrained", sharey=True, squeeze=False
    )
    for axis, (method, answer) in zip(axes[0], answers.items(), strict=True):
        counts = tf.math.confusion_matrix(labels, answer, num_classes=len(classes), dtype=tf.float32).numpy()
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        drawn = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues")
        for place, share in enumerate(np.diag(shares)):
            color = "white" if share > 0.6 else "black"
            axis.text(place, place, f"{share:.0%}", ha="center", va="center", fontsize=6, color=color)
        axis.set_title(method, color=COLORS[method])
        axis.set_xticks(range(len(classes)), classes, rotation=90, fontsize=8)
        axis.set_xlabel("predicted")
    axes[0, 0].set_yticks(range(len(classes)), classes, fontsize=8)
    axes[0, 0].set_ylabel("true class")
    figure.colorbar(drawn, ax=axes, label="share of the true class", shrink=0.7)
    figure.suptitle(title)
    return _shown(figure)


def show_path(steps, kept, unit, title):
    """How many answers stay the same while images are moved further and further.

    Args:
        steps: how far, (k,).
        kept: dict of method to the share of images, (k,), whose predicted class is still that of the unmoved image.
        unit: of the steps.
        title: of the figure.
    """
    if not kept:
        return _no_network(title)
    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for method, shares in kept.items():
        axis.plot(steps, shares, color=COLORS[method], marker=".", label=method)
    axis.set(xlabel=unit, ylabel="same answer as unmoved", ylim=(0, 1.02))
    axis.yaxis.set_major_formatter("{x:.0%}")
    axis.legend(frameon=False)
    figure.suptitle(title)
    return _shown(figure)


def show_path_of_one(steps, moved, probabilities, classes, unit, title):
    """One picture on its way, and above every step what the networks make of it.

    Args:
        steps: how far, (k,).
        moved: the picture at every step, float (k, h, w, 3), 0 ... 1.
        probabilities: dict of method to the predicted probabilities, (k, classes).
        classes: names, by label.
        unit: of the steps.
        title: of the figure.
    """
    if not probabilities:
        return _no_network(title)
    figure = plt.figure(figsize=(9, 1.6 + 2 * len(probabilities)), layout="constrained")
    grid = figure.add_gridspec(len(probabilities) + 1, len(steps), height_ratios=[1] + [2] * len(probabilities))
    for column, (step, picture) in enumerate(zip(steps, np.clip(moved, 0, 1), strict=True)):
        axis = figure.add_subplot(grid[0, column])
        axis.imshow(picture)
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"{step:g}", fontsize=9)
    most = np.argsort(-np.max([values.max(axis=0) for values in probabilities.values()], axis=0))[:6]
    for row, (method, values) in enumerate(probabilities.items(), start=1):
        axis = figure.add_subplot(grid[row, :])
        for label, color, style in zip(most, WAY_COLORS, ("-", "--", ":") * 2, strict=False):
            axis.plot(steps, values[:, label], style, color=color, label=classes[label])
        axis.set(ylabel=f"{method}:\nprobability", ylim=(0, 1.02))
    axis.set_xlabel(unit)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.suptitle(title)
    return _shown(figure)


def show_by_updates(records, title, mark):
    """Validation accuracy by the number of updates, a panel a width, a line a method.

    Args:
        records: dict of name to record.
        title: of the figure.
        mark: dict of one number of updates, where a dotted line is drawn, to what it says.

    Returns:
        The figure. A point is a mean over as many updates as the longest epoch in its panel has, so that a method with
        shorter epochs, which is validated more often, does not look more restless.
    """
    if not records:
        return _no_record(title)
    runs = [(Configuration(**record["configuration"]), record["history"]) for record in records.values()]
    widths = sorted({run.width for run, _ in runs})
    figure, axes = plt.subplots(
        1, len(widths), figsize=(max(8, 6 * len(widths)), 4), layout="constrained", sharey=True, squeeze=False
    )
    for axis, width in zip(axes.flat, widths, strict=True):
        shown = [(run, history) for run, history in runs if run.width == width]
        longest = max(run.steps_per_epoch for run, _ in shown)
        for run, history in shown:
            updates = run.steps_per_epoch * np.arange(1, len(history) + 1)
            accuracy = np.array([epoch["val_accuracy"] for epoch in history])
            parts = [accuracy[np.ceil(updates / longest) == part] for part in range(1, updates[-1] // longest + 1)]
            ends = longest * np.arange(1, len(parts) + 1)
            axis.plot(ends, [np.mean(part) for part in parts], color=COLORS[run.method], label=run.method)
        for updates, label in mark.items():
            axis.axvline(updates, color="gray", linestyle=":", linewidth=1, label=label)
        axis.set(title=f"Width {width}", xlabel="updates", ylabel="validation accuracy", xlim=(0, None))
        axis.yaxis.set_major_formatter("{x:.0%}")
        axis.legend(frameon=False, loc="lower right")
    figure.suptitle(title)
    return _shown(figure)


def show_strips(strips, title):
    """Pictures step by step: dict of row title to dict of step to float (n, h, w, 3), 0 ... 1."""
    figure, axes = plt.subplots(len(strips), 1, figsize=(12, 1.2 * len(strips) + 0.6), layout="constrained")
    for axis, (name, steps) in zip(axes, strips.items(), strict=True):
        count, height, width = next(iter(steps.values())).shape[:3]
        gap = np.ones((height, 8, 3))
        blocks = [np.concatenate([*np.clip(pictures, 0, 1), gap], axis=1) for pictures in steps.values()]
        axis.imshow(np.concatenate(blocks, axis=1))
        axis.set_xticks([(count * width + 8) * k + count * width / 2 for k in range(len(steps))], steps)
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
        axis.set_ylabel(name)
    figure.suptitle(title)
    return _shown(figure)


def show_gradients(probability, gradients, title):
    """Gradients by the predicted probability of the label: arrays (n,), and dict of name to array (n,)."""
    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for (name, values), style in zip(gradients.items(), ("-", "--"), strict=True):
        axis.plot(probability, values, style, linewidth=2, label=name)
    axis.axvline(1e-7, color="gray", linestyle=":", linewidth=1)
    axis.set(xscale="log", xlabel="predicted probability of the label", ylabel="gradient (nats)", title=title)
    axis.legend(frameon=False)
    return _shown(figure)


def show_throw(count, throw):
    """Length of Adam's step with stale moments: arrays (n,) of steps since then, and of lengths in learning rates."""
    figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
    axis.plot(count, throw, color="#D55E00", label="moments restored, almost 0")
    axis.axhline(1, color="black", linestyle="--", linewidth=1, label="fresh Adam")
    axis.set(xlabel="steps since gradients came back", ylabel="step (learning rates)", ylim=(0, None))
    axis.set_title("A constant gradient after restored moments that are almost 0")
    axis.legend(frameon=False)
    return _shown(figure)


def _way_colors(names):
    """Dict of name to its colour; ValueError for more names than there are colours."""
    names = list(dict.fromkeys(names))
    if len(names) > len(WAY_COLORS):
        raise ValueError(f"There are {len(names)} ways, and a figure can tell {len(WAY_COLORS)} apart: show fewer.")
    return dict(zip(names, WAY_COLORS, strict=False))


def show_ways(records, title):
    """Several continuations of some trainings, step by step, on the validation images.

    Args:
        records: dict of name to record, of the continuations and of what they start from, whose last
            epoch, where it is known, is shown as step 0.
        title: of the figure.
    """
    ways = _continuations(records)
    if not ways:
        return _no_record(title)
    panels = {
        "val_loss_supervised": "supervised loss (nats)",
        "val_loss_consistency": "consistency loss (nats)",
        "val_accuracy": "accuracy",
        "val_consistency": "agreement",
        "val_largest_class": "share of the largest class",
        "val_prediction_entropy": "entropy (nats)",
    }
    figure, axes = plt.subplots(3, 2, figsize=(12, 9.5), layout="constrained", sharex=True)
    colors = _way_colors(ways)
    for axis, (metric, label) in zip(axes.flat, panels.items(), strict=True):
        for name, (start, record) in ways.items():
            axis.plot(*_from_start(start, record, metric), color=colors[name], label=name)
        axis.set(ylabel=label)
    for axis in axes[-1]:
        axis.set_xlabel("training steps")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title)
    return _shown(figure)


def show_shares(records, title):
    """Short continuations on the validation images, a column a transform, a line a way to go on.

    Args:
        records: dict of (transform, name) to record, of the continuations and of what they start from, whose last
            epoch, where it is known, is shown as step 0.
        title: of the figure.
    """
    ways = _continuations(records)
    if not ways:
        return _no_record(title)
    panels = {"val_loss_supervised": "supervised loss (nats)", "val_accuracy": "accuracy"}
    colors = _way_colors(name for _, name in ways)
    order = [transform for transform, _ in REPORT_TABLE]
    transforms = sorted({transform for transform, _ in ways}, key=order.index)
    figure, axes = plt.subplots(
        2, len(transforms), figsize=(12, 5.5), layout="constrained", sharex=True, sharey="row", squeeze=False
    )
    for (transform, name), (start, record) in ways.items():
        for axis, metric in zip(axes[:, transforms.index(transform)], panels, strict=True):
            axis.plot(*_from_start(start, record, metric), color=colors[name], label=name)
    for axis, label in zip(axes[:, 0], panels.values(), strict=True):
        axis.set_ylabel(label)
    for transform, axis in zip(transforms, axes.T, strict=True):
        axis[0].set_title(transform)
        axis[1].set_xlabel("training steps")
    handles = {line.get_label(): line for axis in axes[0] for line in axis.lines}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title)
    return _shown(figure)


def show_survival(records, panels, title):
    """The validation loss of short continuations, step by step: a thin line a seed, a colour a state to start from.

    Args:
        records: dict of (seed, name) to record, of the continuations and of what they start from.
        panels: dict of the titles of four panels to the names that each shows.
        title: of the figure.
    """
    ways = _continuations(records)
    if not ways:
        return _no_record(title)
    figure, axes = plt.subplots(2, 2, figsize=(12, 7), layout="constrained", sharex=True, sharey=True)
    starts = {record["id"]: name for (_, name), record in records.items()}
    states = [name for (_, name), record in records.items() if not record["configuration"]["starting_run"]]
    colors = _way_colors(states)
    for axis, (heading, names) in zip(axes.flat, panels.items(), strict=True):
        shown = collections.Counter()  # of the ways from a state, to tell them apart by their dashes
        for name in names:
            lines = [record for key, (_, record) in ways.items() if key[1] == name]
            for label, record in zip([name, *[None] * len(lines)], lines, strict=False):
                state = starts[record["configuration"]["starting_run"]]
                shown[state] += label is not None
                look = {"color": colors[state], "linestyle": ("-", "--", ":")[shown[state] - 1]}
                losses = [epoch["val_loss_supervised"] for epoch in record["history"]]
                steps = record["configuration"]["steps"] * np.arange(1, len(losses) + 1)
                axis.plot(steps, losses, **look, linewidth=1.2, alpha=0.8, label=label)
        axis.axhline(0.9 * math.log(1e7), color="gray", linestyle=":", linewidth=1)
        axis.set(title=heading, ylim=(0, 16))
        if axis.lines[:-1]:  # without one there is nothing to name, and Matplotlib would warn
            axis.legend(frameon=False, fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("supervised loss (nats)")
    for axis in axes[1]:
        axis.set_xlabel("training steps")
    figure.suptitle(title)
    return _shown(figure)


def show_attribution(accuracies, title):
    """The states of `attribution_table` as a figure: every run a dot, the means connected."""
    if not any(accuracies.values()):
        return _no_record(title)
    states = list(dict.fromkeys(state for _, state, _ in accuracies))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    for method in ("Supervised", "SemiC"):
        runs = [list(_of_state(accuracies, state, method).values()) for state in states]
        _dots_and_means(left, runs, COLORS[method], method)
    _dots_and_means(right, [attribution_gains(accuracies, state) for state in states], "dimgray", "SemiC − Supervised")
    right.axhline(0, color="gray", linestyle=":", linewidth=1)
    for axis, label in ((left, "test accuracy, image and copy"), (right, "gain in test accuracy")):
        axis.set(ylabel=label, xlim=(-0.4, len(states) - 0.6))
        axis.set_xticks(range(len(states)), [state.replace("_", "_\n") for state in states], fontsize=9)
        axis.yaxis.set_major_formatter("{x:.1%}")
        axis.legend(frameon=False)
    right.yaxis.set_major_formatter(lambda value, _: f"{100 * value:+.1f} points")
    figure.suptitle(title)
    return _shown(figure)


def _dots_and_means(axis, runs, color, label):
    for place, values in enumerate(runs):
        axis.plot([place] * len(values), values, "o", color=color, alpha=0.4, markersize=5)
    means = [np.mean(values) if len(values) else np.nan for values in runs]
    axis.plot(range(len(runs)), means, "-_", color=color, markersize=18, label=label)


def show_labels(records, title):
    """The runs of `labels_table` as a figure: a line, of its method's colour, for each of what is besides labels.

    On the left the points of accuracy by which each is above the first one, Supervised; on the right the agreement.
    """
    if not any(records.values()):
        return _no_record(title)
    figure, axes = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    counts, names = sorted({count for count, _ in records}), list(dict.fromkeys(name for _, name in records))

    def by_labels(name, metric):
        found = (records[count, name] for count in counts)
        return np.array([record["metrics"][metric] if record else np.nan for record in found])

    for name, style, marker in zip(names, ("-", ":", "--", "-"), "osv^", strict=False):
        look = {"color": COLORS[name.split(",")[0]], "marker": marker, "linestyle": style, "alpha": 0.8, "label": name}
        axes[0].plot(counts, 100 * (by_labels(name, "accuracy") - by_labels(names[0], "accuracy")), **look)
        axes[1].plot(counts, by_labels(name, "consistency"), **look)
    for axis, label in zip(axes, (f"points of accuracy above {names[0]}", "agreement"), strict=True):
        axis.set(xscale="log", xlabel="labelled images", ylabel=label)
        axis.set_xticks(counts, [f"{count:,}" for count in counts])
        axis.set_xticks([], minor=True)
    axes[1].yaxis.set_major_formatter("{x:.0%}")
    axes[1].legend(frameon=False)
    figure.suptitle(title)
    return _shown(figure)


FIGURES = {}  # every figure that a cell showed, by its title, for `export`


def _shown(figure):
    plt.close(figure)  # the cell shows what it returns; an open figure would be shown a second time
    FIGURES[_title(figure)] = figure
    shell = get_ipython()
    if shell:  # anew each time: Matplotlib's own way to show figures is set with the first of them
        shell.display_formatter.formatters["image/png"].for_type(matplotlib.figure.Figure, _described)
    return figure


def _title(figure):
    return figure.get_suptitle() or figure.axes[0].get_title()


def _described(figure):
    return png(figure), {"alt": alternative_text(figure)}


def alternative_text(figure):
    """What a figure shows, for who cannot see it: its title, and what its panels and lines are."""
    panels, lines = {}, {}
    for axis in figure.axes:
        names = (axis.get_title(), axis.get_ylabel(), axis.get_xlabel() and f"by {axis.get_xlabel()}")
        panels |= dict.fromkeys(filter(None, [" ".join(filter(None, names))]))
        lines |= dict.fromkeys(name for name in axis.get_legend_handles_labels()[1])
    parts = [_title(figure), panels and f"Panels: {'; '.join(panels)}", lines and f"Lines: {'; '.join(lines)}"]
    return ". ".join(filter(None, parts)).replace("\n", " ") + "."


# --------------------------------------------------------- tables and figures of section 12


def overlap_table(records, caption=""):
    """How well networks find the pixels of each class on the test images.

    Args:
        records: dict of (seed, labelled images, way) to record, or to None where there is none.
        caption: of the table.

    Returns:
        Table, a row a number of labelled images and way: mean ± standard deviation over the seeds.
    """
    if not records:
        return _no_record(caption)
    rows = []
    for labels, way in dict.fromkeys(key[1:] for key in records):
        metrics = [record["metrics"] for record in _of_way(records, labels, way)]
        shown = ("dice", "iou", "accuracy_clean", "consistency")
        cells = [spread([values[name] for values in metrics], ".3f" if name in OVERLAPS else ".1%") for name in shown]
        rows.append((labels, way, *cells, len(metrics)))
    return Table(("labelled images", "way", "Dice", "IoU", "pixels right", "agreement", "runs"), rows, caption)


def overlap_gains(records, caption=""):
    """What each way adds to the Dice coefficient of the one before it, seed by seed.

    Args:
        records: as for `overlap_table`.
        caption: of the table.

    Returns:
        Table, a row a number of labelled images: mean ± standard deviation of the differences, in hundredths.
    """
    if not records:
        return _no_record(caption)
    ways = list(dict.fromkeys(way for *_, way in records))
    records = {key: record for key, record in records.items() if record}
    rows = []
    for labels in dict.fromkeys(labels for _, labels, _ in records):
        cells = []
        for before, after in itertools.pairwise(ways):
            dice = [
                {seed: 100 * run["metrics"]["dice"] for (seed, *key), run in records.items() if key == [labels, way]}
                for way in (after, before)
            ]
            gains = seed_by_seed(*dice)
            cells.append(spread(gains, ".1f", signed=True) + (f" (n = {len(gains)})" if gains else ""))
        rows.append((labels, *cells))
    header = (f"{after}, over {before}" for before, after in itertools.pairwise(ways))
    return Table(("labelled images", *header), rows, caption)


def _of_way(records, labels, way):
    return [record for key, record in records.items() if key[1:] == (labels, way) and record]


def show_overlaps(records, title):
    """Dice and IoU by number of labelled images, a line a way, with the standard deviation over the seeds.

    Args:
        records: as for `overlap_table`.
        title: of the figure.
    """
    if not records:
        return _no_record(title)
    numbers = sorted({labels for _, labels, _ in records})
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
    for axis, (metric, label) in zip(axes, zip(OVERLAPS, ("Dice coefficient", "IoU"), strict=True), strict=True):
        for place, way in enumerate(dict.fromkeys(way for *_, way in records)):
            found = {
                labels: [record["metrics"][metric] for record in _of_way(records, labels, way)] for labels in numbers
            }
            found = {labels: values for labels, values in found.items() if values}
            axis.errorbar(
                [labels * (1 + 0.03 * (place - 1.5)) for labels in found],  # beside each other, not on top
                [np.mean(values) for values in found.values()],
                [np.std(values, ddof=1) if len(values) > 1 else 0 for values in found.values()],
                color=WAY_COLORS[place],
                marker="o",
                capsize=3,
                label=way,
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(numbers, numbers)
        axis.set(xlabel="labelled images", ylabel=f"{label}, test images")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title)
    return _shown(figure)


def segmentation_pictures(data):
    """Four pictures and their classes for the figures that show pictures, as `sample_pictures`.

    Returns:
        namespace of `images`, float32 tensor (4, h, w, 1), 0 ... 1, `labels`, int32 (4, h, w), `caption` and `note`.
    """
    images, labels, caption = data.labeled_images[:4], data.labeled_labels[:4], data.caption
    note = "The figures below show the first labelled images."
    if _generated_pictures() and data.name == "isbi2012":
        images, labels = generate_phantoms(4, images.shape[1])
        images, caption = images[..., None], DATASETS["phantom"][1]
        note = "The figures below show a generated chest phantom; the saved notebook holds no image of ISBI 2012."
    images, labels = to_unit_range(images), tf.constant(labels, tf.int32)
    return types.SimpleNamespace(images=images, labels=labels, caption=caption, note=note)


def show_slices(pictures, title):
    """Two pictures, and beside each what class its pixels have: as of `segmentation_pictures`."""
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained")
    for place, axis in enumerate(axes):
        if place % 2:
            _draw_labels(axis, pictures.labels[place // 2])
        else:
            _draw_picture(axis, pictures.images[place // 2])
        axis.set_title(("image", "classes")[place % 2])
    figure.suptitle(title)
    return _shown(figure)


def _draw_picture(axis, picture):
    axis.imshow(np.squeeze(picture), cmap="gray", vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[])


def _draw_labels(axis, labels):
    axis.imshow(np.ma.masked_less(labels, 0), cmap="viridis", vmin=0, vmax=3, interpolation="nearest")
    axis.set(xticks=[], yticks=[])


def show_views(pictures, views, title):
    """Two views of two pictures with their labels, and the first view moved to where the second one is.

    Args:
        pictures: as of `segmentation_pictures`.
        views: of these pictures: first and second view, the labels of both, and where in the first each pixel of the
            second is to be found.
        title: of the figure.
    """
    first, second, first_labels, second_labels, points = views
    there = inside(points, *first.shape[1:3])
    moved = np.where(there[..., None], cubic_sample(first, points), np.nan)
    columns = (
        ("first view", first),
        ("its labels", first_labels),
        ("second view", second),
        ("its labels", second_labels),
        ("first view, moved", moved),
        ("their difference", np.abs(moved - second)),
    )
    figure, axes = plt.subplots(2, len(columns), figsize=(12, 4.6), layout="constrained")
    for row in range(2):
        for axis, (name, values) in zip(axes[row], columns, strict=True):
            (_draw_labels if "labels" in name else _draw_picture)(axis, values[row])
            axis.set_title(name if row == 0 else "")
    figure.suptitle(title)
    return _shown(figure)


def show_network(network, side, title):
    """The shape of a U-Net: a bar for each convolution, as high as its picture and labelled with its channels.

    Args:
        network: Keras model of Conv2D, MaxPooling2D, UpSampling2D and Concatenate layers, among others.
        side: height and width of the pictures that it gets.
        title: of the figure.
    """
    figure, axis = plt.subplots(figsize=(10, 3.6), layout="constrained")
    level, place, last = 0, 0.0, {}
    for layer in network.layers:
        if isinstance(layer, (keras.layers.MaxPooling2D, keras.layers.UpSampling2D)):
            level += 1 if isinstance(layer, keras.layers.MaxPooling2D) else -1
            place += 0.6
        elif isinstance(layer, keras.layers.Concatenate):
            axis.annotate(
                "", (place + 0.4, -level), (last[level] + 0.3, -level), arrowprops={"arrowstyle": "->", "color": "gray"}
            )
        elif isinstance(layer, keras.layers.Conv2D):
            place, height = place + 1, 0.8 / 2**level
            color = "#D55E00" if layer is network.layers[-1] else "#0072B2"
            axis.bar(place, height, 0.5, bottom=-level - height / 2, color=color)
            axis.text(place, -level - height / 2 - 0.06, layer.filters, ha="center", va="top", fontsize=9)
            last[level] = place
    levels = range(max(last) + 1)
    axis.set_yticks([-number for number in levels], [f"{side // 2**number} × {side // 2**number}" for number in levels])
    axis.set(xticks=[], ylim=(-max(levels) - 0.7, 0.6), xlabel="convolutions from input to output, with their channels")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    axis.set_title(title)
    return _shown(figure)


def show_segmentations(models, data, title, count=2):
    """What some models make of the middle of some test images, beside the images and their classes.

    With REPRODUCTION_PICTURES=generated the images and classes of a data set that is not generated stay out.

    Args:
        models: dict of name to model of images to logits.
        data: Split.
        title: of the figure.
        count: of images.
    """
    if not models:
        return _no_network(title)
    middle = slice(data.test_images.shape[1] // 4, -data.test_images.shape[1] // 4)
    images = to_unit_range(data.test_images[:count])
    columns = {name: 1 - tf.nn.softmax(model(images)).numpy()[..., 0] for name, model in models.items()}
    if data.name != "isbi2012" or not _generated_pictures():
        columns = {"image": images.numpy(), "classes": data.test_labels[:count], **columns}
    figure, axes = plt.subplots(
        count, len(columns), figsize=(3 * len(columns), 3.1 * count), layout="constrained", squeeze=False
    )
    for row in range(count):
        for axis, (name, values) in zip(axes[row], columns.items(), strict=True):
            (_draw_labels if name == "classes" else _draw_picture)(axis, values[row][middle, middle])
            axis.set_title(name if row == 0 else "")
    figure.suptitle(title)
    return _shown(figure)


# ------------------------------------------------------------------------------- playground


class Stopped(Exception):
    """The reader pressed Stop; what raises it ends a training."""


class Watch(LiveStatus):
    """A status that displays nothing: it tells a panel what happens, and ends the training when asked to.

    Args:
        report: function of (Watch, note), called about once a second while a run trains, and when it ends or waits.
        stop: threading.Event; once it is set, the next step raises Stopped.
        *arguments: as of LiveStatus.
    """

    def __init__(self, report, stop, *arguments):
        self.report, self.stop, self.points = report, stop, []
        super().__init__(*arguments)

    def open(self):
        return None

    def start(self, index, finished_epochs):
        super().start(index, finished_epochs)
        self.points = []  # (updates taken, metrics so far in their epoch), a step each

    def on_train_batch_end(self, batch, logs=None):
        self.points.append((self.epoch * self.configurations[self.current].steps_per_epoch + batch + 1, logs))
        self.end_if_asked()
        super().on_train_batch_end(batch, logs)

    def on_test_batch_end(self, batch, logs=None):
        self.end_if_asked()

    def say(self, note):
        super().say(note)
        self.report(self, note)
        self.end_if_asked()

    def end_if_asked(self):
        """Raise Stopped where Stop was pressed."""
        if self.stop.is_set():
            raise Stopped


def most_unsure(model, images, count=10):
    """The images that a model is most unsure of: the entropy of the mean of both its predictions is highest.

    Args:
        model: with `network` and `copies`, such as `Runner.model` makes.
        images: uint8 (n, height, width, channels), of which copies are made as in every evaluation.
        count: how many to find.

    Returns:
        namespace of `places`, int (count,), the most unsure first, `images` and `copies`, float (count, height,
        width, channels), and `answers`, int (count, 2): the classes predicted for the image and for its copy.
    """
    copies, means, answers = [], [], []
    for batch in evaluation_batches(range(len(images))):
        originals = to_unit_range(tf.gather(images, batch["positions"]))
        copies.append(model.copies(originals, batch["seed"], training=False))
        views = [tf.nn.softmax(model(view, training=False)) for view in (originals, copies[-1])]
        means.append((views[0] + views[1]) / 2)
        answers.append(tf.stack([tf.argmax(view, axis=-1) for view in views], axis=-1))
    places = np.argsort(-tf.map_fn(entropy, tf.concat(means, axis=0)).numpy(), kind="stable")[:count]
    return types.SimpleNamespace(
        places=places,
        images=images[places] / np.float32(255),
        copies=tf.concat(copies, axis=0).numpy()[places],
        answers=tf.concat(answers, axis=0).numpy()[places],
    )


def draw_unsure(unsure, labels, classes, title):
    """Figure of what `most_unsure` found, five to a row, each image over its copy with what each is taken for.

    Args:
        unsure: as of `most_unsure`.
        labels: int (count,), of these images.
        classes: names, by label.
        title: of the figure.
    """
    rows = math.ceil(len(labels) / 5)
    figure = matplotlib.figure.Figure(figsize=(6, 3 * rows + 0.6), layout="constrained")
    axes = figure.subplots(2 * rows, 5, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for place, label in enumerate(labels):
        row, column = divmod(place, 5)
        for view, pictures in enumerate((unsure.images, unsure.copies)):
            axis, answer = axes[2 * row + view, column], unsure.answers[place, view]
            axis.imshow(np.clip(pictures[place], 0, 1))
            axis.set_title(classes[answer], fontsize=12, color="black" if answer == label else COLORS["SemiCT"])
        axis.set_xlabel(f"is: {classes[label]}", fontsize=11)
    figure.suptitle(title, fontsize=12)
    return figure


def draw_try(lines, updates, title):
    """Figure of losses and accuracies by training step.

    Args:
        lines: list of (name, color, history, steps of an epoch, points): the metrics by epoch, and those within the
            epochs as of `Watch.points`.
        updates: steps of the whole training.
        title: of the figure.
    """
    figure = matplotlib.figure.Figure(figsize=(6, 5.8), layout="constrained")
    panels = {
        "loss_supervised": "supervised loss (nats)",
        "loss_consistency": "consistency loss (nats)",
        "accuracy_clean": "accuracy, images",
        "accuracy_transformed": "accuracy, copies",
    }
    for axis, (metric, label) in zip(figure.subplots(2, 2, sharex=True).flat, panels.items(), strict=True):
        for name, color, history, steps, points in lines:
            so_far = [logs[metric] for _, logs in points]
            mark = "." if len(points) == 1 else None
            axis.plot([step for step, _ in points], so_far, color=color, alpha=0.35, marker=mark)
            taken = steps * np.arange(1, len(history) + 1)
            values = [epoch[f"val_{metric}"] for epoch in history]
            axis.plot(taken, values, color=color, marker=".", label=f"{name}, validation images")
        axis.set_title(label, fontsize=12)
        axis.set_xlim(0, updates)
        if metric != "loss_supervised":  # which stays far from 0
            axis.set_ylim(0)
        if metric.startswith("accuracy"):
            axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
            axis.set_xlabel("training steps")
    handles, names = axis.get_legend_handles_labels()
    handles.append(matplotlib.lines.Line2D([], [], color="gray", alpha=0.5))
    names.append("training images, mean of the epoch so far")
    figure.legend(handles, names, loc="outside lower center", frameon=False)
    figure.suptitle(title, fontsize=12)
    return figure


class Playground:
    """A panel in which the reader trains small networks with settings of their own.

    A try is two runs: one with the consistency loss and its supervised baseline. They train in a thread, so that the
    kernel is free to hear of Stop, and are kept like all other runs. Nothing trains before Train is pressed. Colab does
    not show what a thread does to widgets (googlecolab/colabtools issue 3373): there they train in the foreground, and
    to stop them takes an interrupt of the kernel.

    Args:
        runner: Runner, best one of its own: the transforms at the chosen strengths are added to it.
        make_runs: function of a choice (namespace of transform, strength, learning_rate, consistency_weight, labeled
            and epochs) to two Configurations, the try's and the baseline's, with the same name of a transform.
        labeled: numbers of labels to choose from.
        settings: as of `read_settings`; where the controls stand at first.
    """

    PAUSE = 2.0  # seconds at least between two drawings of the curves

    def __init__(self, runner, make_runs, labeled, settings):
        self.runner, self.make_runs = runner, make_runs
        self.foreground = "google.colab" in sys.modules
        self.transforms = dict(runner.transforms)
        self.tries, self.stop, self.thread = {}, threading.Event(), None
        wide = {
            "style": {"description_width": "125px"},
            "layout": {"width": "370px", "max_width": "94%", "margin": "2px 14px 2px 2px"},
        }
        calm = {"continuous_update": False, **wide}
        self.controls = types.SimpleNamespace(
            transform=widgets.Dropdown(options=list(self.transforms), description="transform", **wide),
            strength=widgets.FloatSlider(value=1.0, min=0.0, max=2.0, step=0.05, description="strength", **calm),
            learning_rate=widgets.FloatLogSlider(
                value=settings.learning_rate,
                min=-6,
                max=-1,
                step=0.25,
                readout_format=".1e",
                description="learning rate",
                **calm,
            ),
            consistency_weight=widgets.FloatSlider(
                value=settings.consistency_weight, max=10.0, step=0.1, description="consistency weight", **calm
            ),
            labeled=widgets.SelectionSlider(
                options=list(labeled), value=labeled[-1], description="number of labels", **calm
            ),
            epochs=widgets.IntSlider(value=3, min=1, max=20, description="epochs", **calm),
        )
        self.train_button = widgets.Button(description="Train", button_style="primary", icon="play")
        self.stop_button = widgets.Button(description="Stop", icon="stop", disabled=True)
        self.train_button.on_click(self._pressed_train)
        self.stop_button.on_click(self._pressed_stop)
        stop = widgets.HTML("To stop: <i>Runtime → Interrupt execution</i>.") if self.foreground else self.stop_button
        self.status, self.table = widgets.HTML(), widgets.HTML(layout={"overflow": "auto", "max_width": "100%"})
        fitting = {
            "flex": "1 1 300px",
            "min_width": "0",
            "max_width": "600px",
            "margin": "0",
            "align_self": "flex-start",
        }
        fitting["display"] = "none"  # a picture without content looks broken
        self.curves, self.pictures = (widgets.Image(format="png", layout=fitting) for _ in range(2))
        self.panel = widgets.VBox(
            [
                widgets.HBox(list(vars(self.controls).values()), layout=FLOWING),
                widgets.HBox([self.train_button, stop], layout=FLOWING),
                self.status,
                widgets.HBox([self.curves, self.pictures], layout=FLOWING),
                self.table,
            ],
            layout=FITTING,
        )

    def choice(self):
        """What the controls say now, a namespace."""
        values = {name: control.value for name, control in vars(self.controls).items()}
        for name in ("strength", "learning_rate", "consistency_weight"):
            values[name] = float(f"{values[name]:.6g}")  # as in `read_settings`
        return types.SimpleNamespace(**values)

    def _pressed_train(self, button):
        if self.train_button.disabled:  # a second press that came before the button was grey in the browser
            return
        self.train_button.disabled, self.stop_button.disabled = True, False
        self.stop.clear()
        if self.foreground:
            self._work(self.choice())
            return
        self.thread = threading.Thread(target=self._work, args=(self.choice(),), daemon=True)
        self.thread.start()

    def _pressed_stop(self, button):
        self.stop.set()
        self.stop_button.disabled = True
        self._tell("Stopping: the step under way is the last.")

    def _tell(self, text, wrong=False):
        color = "#B00020" if wrong else "inherit"
        self.status.value = f'<div style="color:{color}; line-height:1.4">{html.escape(text)}</div>'

    def _work(self, choice):
        """Train a try. Whatever goes wrong is told in the panel: nobody else would hear of it."""
        try:
            self._tell("Building the network; the first step takes longest.")
            self._tell(self._train(choice))
        except Exception as error:
            self._tell(f"{type(error).__name__}: {error}", wrong=True)
        finally:
            self.train_button.disabled, self.stop_button.disabled = False, True

    def _train(self, choice):
        """Train a try and its baseline and show both; returns what is to be told at the end."""
        began = time.perf_counter()
        self.runs = run, baseline = self.make_runs(choice)
        self.runner.transforms[run.transform] = at_strength(self.transforms[choice.transform], choice.strength)
        self.tries[run.id] = choice, self.runs
        self.watches = {}  # by the run's id
        self.pictures.layout.display = "none"
        self._show_state()
        try:
            self.runner.train([run], self._make_watch)
            self._show_unsure(run)
            self._show_state()
            self.runner.train([baseline], self._make_watch)
            end = f"Done in {duration(time.perf_counter() - began)}."
        except (Stopped, KeyboardInterrupt):  # the second in the foreground
            end = "Stopped. With the same settings Train goes on from the last finished epoch."
            self._tell(end)  # at once: the pictures take a second or two
            if baseline.id not in self.watches:
                self._show_unsure(run)
        self._show_state()
        failed = list(filter(None, map(self.runner.failure, self.runs)))
        if failed:
            raise NotFinite("; ".join(failed))
        return end

    def _make_watch(self, *arguments):
        watch = Watch(self._report, self.stop, *arguments)
        self.watches[watch.configurations[0].id] = watch
        return watch

    def _report(self, watch, note):
        _, title, epoch, losses, *_ = watch.rows[0]
        numbers = f", loss {losses}" if losses else ""
        self._tell(f"{title}: epoch {epoch}{numbers}, {note}" if watch.model else f"{title} {note}")
        if time.perf_counter() - self.drawn_at > self.PAUSE:
            self._show_curves()

    def _show_state(self):
        self._show_curves()
        self._show_table()

    def _show_curves(self):
        lines = []
        for name, run in zip(("this try", "supervised baseline"), self.runs, strict=True):
            points = self.watches[run.id].points if run.id in self.watches else ()
            lines.append((name, COLORS[run.method], self.runner.history(run), run.steps_per_epoch, points))
        total = run.epochs * run.steps_per_epoch
        choice, _ = self.tries[self.runs[0].id]
        title = (
            "{transform} at {strength:g}, rate {learning_rate:.2g}, weight {consistency_weight:g}, {labeled:,} labels"
        )
        self._show(self.curves, draw_try(lines, total, title.format(**vars(choice)) + self.runner.data.caption))
        self.drawn_at = time.perf_counter()

    def _show_unsure(self, run):
        """Show what the try's network is least sure of: the finished one, or the one that was just stopped."""
        if self.runner.record(run):
            model, steps = self.runner.trained(run), run.epochs * run.steps_per_epoch
        elif self.watches[run.id].points and not self.runner.failure(run):
            model, steps = self.watches[run.id].model, self.watches[run.id].points[-1][0]
        else:  # no step was taken, or the weights are no longer numbers
            return
        data = self.runner.data
        unsure = most_unsure(model, data.test_images[: run.test])
        title = f"Least sure of these after {steps:,} steps, image over copy\n(wrong answers in colour){data.caption}"
        self._show(self.pictures, draw_unsure(unsure, data.test_labels[unsure.places], data.classes, title))

    def _show(self, image, figure):
        image.value = png(figure)
        image.layout.display = ""

    def _show_table(self):
        rows = []
        for choice, runs in self.tries.values():
            run = runs[0]
            histories = [self.runner.history(one) for one in runs]
            ends = [history[-1] if history else {} for history in histories]
            done = [
                len(history) * one.steps_per_epoch / run.steps_per_epoch
                for history, one in zip(histories, runs, strict=True)
            ]
            cells = [
                " | ".join(f"{end[name]:.1%}" if end else "–" for end in ends)
                for name in ("val_accuracy_clean", "val_accuracy_transformed")
            ]
            rows.append(
                (
                    choice.transform,
                    f"{choice.strength:g}",
                    f"{choice.learning_rate:.2g}",
                    f"{choice.consistency_weight:g}",
                    f"{choice.labeled:,}",
                    " | ".join(f"{epochs:.3g}" for epochs in done) + f" of {run.epochs}",
                    *cells,
                )
            )
        header = ("transform", "strength", "rate", "weight", "labels", "epochs done", "images", "copies")
        caption = f"Your tries: try | baseline, accuracy on the validation images{self.runner.data.caption}"
        self.table.value = (
            "<style>.tries {line-height: 1.6} .tries :is(td, th) {padding-right: 14px; white-space: nowrap}</style>"
            f'<div class="tries">{html.escape(caption)}{Table(header, rows)._repr_html_()}</div>'
        )
