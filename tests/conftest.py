"""Hands the notebook's own definitions to the tests."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import grid
import notebook
import numpy as np
import pytest
import tensorflow as tf

import helpers

# Two devices on one processor, for test_devices.py; everything else uses the first.
processor = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(processor, [tf.config.LogicalDeviceConfiguration()] * 2)


@pytest.fixture(scope="session")
def method(tmp_path_factory):
    """Module of the cells tagged `method`."""
    return notebook.load_method(tmp_path_factory.mktemp("method"))


@pytest.fixture(scope="session")
def shapes():
    """Generated stand-in for CIFAR-10, as ((x_train, y_train), (x_test, y_test))."""
    return helpers.generate_shapes(train=1200, test=300)


@pytest.fixture
def tiny(method):
    """Settings small enough to train in a second or two."""
    return notebook.preset_settings(method, "smoke", **grid.SIZES)


@pytest.fixture
def data(shapes):
    """Split of the generated set."""
    return helpers.split("shapes", shapes, grid.RANGES)


@pytest.fixture
def random():
    """A seeded NumPy generator."""
    return np.random.default_rng(0)
