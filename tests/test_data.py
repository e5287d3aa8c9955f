"""Loading images: what is accepted, and what is said of the rest."""

import dataclasses

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
    some = np.where(np.arange(60) < 30, np.arange(60) % 3, -1)  # the others have none
    assert helpers.load_data(saved(tmp_path, y_train=some)).classes == data.classes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"y_test": None}, "lacks y_test"),
        ({"x_train": arrays()["x_train"] / 255}, "must be uint8"),
        ({"x_train": arrays()["x_train"].transpose(0, 3, 1, 2)}, "with 1 or 3 channels, last"),
        ({"y_train": np.eye(3, dtype=int)[np.arange(60) % 3]}, "not one-hot"),
        ({"y_train": np.arange(60) % 3 / 1}, "must be integers"),
        ({"y_train": np.arange(59) % 3}, "one an image"),
        ({"y_train": np.arange(60) % 3 + 1}, "0 ... classes - 1"),
        ({"y_test": np.full(60, 7)}, "0 ... classes - 1"),
        ({"classes": np.array(["one", "two"])}, "all of the 2"),
        ({"x_test": np.zeros((60, 64, 64, 1), "uint8")}, "of one size"),
        ({"x_test": np.zeros((0, 28, 28, 1), "uint8"), "y_test": np.zeros(0, int)}, "of one size"),
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


def test_data_made_by_hand_are_looked_at_too():
    rings = helpers.generate_rings(train=500, test=50)
    with pytest.raises(ValueError, match="labels must be integers, one an image"):
        dataclasses.replace(rings, test_images=rings.test_images[:20])
    with pytest.raises(ValueError, match="signed"):  # -1 stands for none
        dataclasses.replace(rings, train_labels=rings.train_labels.astype("uint8"))
    with pytest.raises(ValueError, match="all of one size"):
        dataclasses.replace(rings, validation=0)


def test_other_test_images_have_another_name(tmp_path, monkeypatch):
    same, labels = arrays(), (np.arange(60) % 3).astype("int32")
    monkeypatch.setattr(helpers, "CIFAR10_SHA256", helpers.digest(same["x_train"], labels, same["x_test"], labels))
    monkeypatch.setattr(helpers, "CLASSES", ("zero", "one", "two"))
    assert helpers.load_data(saved(tmp_path)).name == "cifar10"
    assert helpers.load_data(saved(tmp_path, x_test=same["x_train"])).name.startswith("mine-")
