"""Hands the notebook's own definitions to the tests."""

import notebook
import numpy as np
import pytest

import helpers  # noqa: F401  # before the tests import Keras, as in the notebook: it chooses how TensorFlow computes

LONG = [
    "test_killed_at_random_moments_it_ends_with_the_same_numbers",
    "test_the_notebook_runs_twice_from_top_to_bottom_at_smoke",
    "test_the_method_on_jax",
]


def pytest_collection_modifyitems(items):
    """Begin with the longest: one process is busy with them while another does the rest."""
    items.sort(key=lambda item: item.name not in LONG)


@pytest.fixture(scope="session")
def method():
    """Module of the cells tagged `method`."""
    return notebook.load_method()


@pytest.fixture(scope="session")
def data():
    """A small generated set: 800 training images, of which 200 for validation, and 100 for the test."""
    return notebook.small_data()


@pytest.fixture
def settings(method):
    """Sizes that train in seconds."""
    return method.PRESETS["smoke"] | method.REPORTED | {"precision": "float32", "epochs": 3}


@pytest.fixture
def images():
    """A few random images, float32 (6, 32, 32, 3)."""
    return np.random.default_rng(0).random((6, 32, 32, 3), dtype="float32")
