"""Reads and runs reproduction.ipynb; `make run`, `make notebook`, the records and the tests go through here."""

import argparse
import base64
import dataclasses
import hashlib
import importlib.util
import io
import os
import pathlib
import subprocess
import sys
import tempfile

import nbclient
import nbformat
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "reproduction.ipynb"
sys.path.insert(0, str(ROOT))


def method_source(path=NOTEBOOK):
    """The cells tagged `method`, and the imports that they rest on, as one module's source."""
    cells = nbformat.read(path, as_version=4).cells
    wanted = {"imports", "method"}
    return "\n\n\n".join(cell.source for cell in cells if wanted & set(cell.metadata.get("tags", ())))


def load_method(path=NOTEBOOK):
    """Import the notebook's definitions, from a file, so that their source can be inspected."""
    source = method_source(path)
    name = f"method_{hashlib.sha256(source.encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        file = pathlib.Path(tempfile.mkdtemp()) / f"{name}.py"
        file.write_text(source)
        spec = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def small_data():
    """Generated images for tests, named as runs have it: 800 for training, 200 of them for validation, 100 for test."""
    import helpers

    return dataclasses.replace(helpers.generate_rings(train=800, test=100), name="cifar10", validation=200)


def small_network(width, classes, shape):
    """One convolution in place of nine, with all that has a state: it compiles in a fraction of the time."""
    import keras

    import helpers

    images = keras.Input(shape)
    outputs = helpers.LeakyReLU(negative_slope=0.1)(keras.layers.Conv2D(width, 3, strides=4)(images))
    outputs = keras.layers.Dropout(0.5)(helpers.BatchNormalization(momentum=0.9)(outputs))
    outputs = keras.layers.GlobalAveragePooling2D()(outputs)
    return keras.Model(images, keras.layers.Dense(classes, dtype="float32")(outputs))


def small_ways(method, transform, settings):
    """The four ways with the small network, by method: dict of `Run`."""

    def small(run):
        return dataclasses.replace(run, network=small_network, start=run.start and small(run.start))

    return {way: small(run) for way, run in method.four_ways(transform, settings).items()}


def pytest_passes(*arguments, **environment):
    """Run pytest in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def with_few_colours(png):
    """A figure, PNG in base64, in 256 colours: the eye sees no difference, and it takes a third of the room."""
    small = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def execute(target, **environment):
    """Run every cell in order and write the executed notebook to `target`, also after an error."""
    book = nbformat.read(NOTEBOOK, as_version=4)
    os.environ.update(environment)
    how = {"timeout": None, "record_timing": False, "coalesce_streams": True}  # one output for a line that is replaced
    client = nbclient.NotebookClient(book, resources={"metadata": {"path": str(ROOT)}}, **how)
    try:
        client.execute()
    finally:
        book.metadata.pop("widgets", None)
        for output in (output for cell in book.cells for output in cell.get("outputs", ())):
            if "image/png" in output.get("data", ()):
                output.data["image/png"] = with_few_colours(output.data["image/png"])
            if "application/vnd.jupyter.widget-view+json" in output.get("data", ()):  # needs a kernel to be shown
                output.data = {"text/plain": "[Controls: they are shown, and work, where this cell has been run.]"}
        nbformat.write(book, target)


def main():
    """Execute into a copy, or, without --output, the committed notebook in place."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=pathlib.Path)
    target = parser.parse_args().output or NOTEBOOK
    pictures = {"REPRODUCTION_PICTURES": "public"} if target == NOTEBOOK else {}
    execute(target, **pictures)
    print(f"The executed notebook is {target}. Open it with: .venv/bin/jupyter lab {target}")


if __name__ == "__main__":
    main()
