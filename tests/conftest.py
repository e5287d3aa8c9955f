"""Hands the notebook's own definitions to the tests."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import notebook
import numpy as np
import pytest

import helpers


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
    sizes = {"width": 2, "labeled": 96, "unlabeled": 80, "validation": 40, "test": 60}
    return notebook.preset_settings(method, "smoke", epochs_supervised=3, epochs_early=1, epochs=3, **sizes)


@pytest.fixture
def data(shapes, tiny):
    """Split of the generated set."""
    ranges = {"labeled": (0, 400), "unlabeled": (400, 1000), "validation": (1000, 1200)}
    return helpers.split("shapes", shapes, ranges, tiny)


@pytest.fixture
def random():
    """A seeded NumPy generator."""
    return np.random.default_rng(0)
