"""Loading images: what is accepted, and what is said of the rest."""

import numpy as np
import pytest

import helpers


def arrays(**changes):
    """A file of 28 x 28 grey images in three classes, with changes."""
    random = np.random.default_rng(0)
    labels = np.arange(60) % 3
    good = {f"x_{part}": random.integers(0, 256, (60, 28, 28, 1)).astype("uint8") for part in ("train", "test")}
    return good | {"y_train": labels, "y_test": labels[:, None]} | changes


def saved(folder, **changes):
    np.savez(folder / "mine.npz", **{name: value for name, value in arrays(**changes).items() if value is not None})
    return folder / "mine.npz"


def test_images_of_ones_own_are_taken_and_named_after_their_content(tmp_path, monkeypatch):
    data = helpers.load_data(saved(tmp_path))
    assert data.classes == ("0", "1", "2") and data.test_labels.shape == (60,) and data.name.startswith("mine-")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert helpers.load_data("~/mine.npz").name == data.name  # a home folder is expanded
    assert helpers.load_data(saved(tmp_path, x_train=arrays()["x_test"])).name != data.name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"y_test": None}, "lacks y_test"),
        ({"x_train": arrays()["x_train"] / 255}, "must be uint8"),
        ({"x_train": arrays()["x_train"].transpose(0, 3, 1, 2)}, "channels, last|1 or 3 channels"),
        ({"y_train": np.eye(3, dtype=int)[np.arange(60) % 3]}, "not one-hot"),
        ({"y_train": np.arange(60) % 3 + 1}, "0 ... classes - 1"),
        ({"y_test": np.full(60, 7)}, "0 ... classes - 1"),
        ({"x_test": np.zeros((60, 64, 64, 1), "uint8")}, "test images"),
    ],
)
def test_other_layouts_are_refused(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        helpers.load_data(saved(tmp_path, **changes))


def test_a_file_that_is_not_there_or_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.npz"):
        helpers.load_data(tmp_path / "nothing.npz")
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="cannot be read"):
        helpers.load_data(path)


def test_generated_rings_have_all_classes():
    data = helpers.generate_rings(train=500, test=50)
    assert data.train_images.shape == (500, 32, 32, 3) and set(data.train_labels) == set(range(10)) and data.note
