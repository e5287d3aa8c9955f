"""Runs the notebook as Colab would: its Python and package versions, and a folder that holds the notebook alone.

Without a repository it must stop and say what to set; with one it must run to its end, keep its runs on the stand-in
for Google Drive, and leave the packages that Colab brings as they are. `--jax` runs it on that backend.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import nbformat
import notebook

ENVIRONMENT = notebook.ROOT / ".venv-colab"
PYTHON = ENVIRONMENT / "bin" / "python"
PRELOADED = "tensorflow jax keras pandas scipy seaborn tqdm filelock ipywidgets ipykernel notebook nbclient nbconvert"
DRIVE = '"""Stands in for Colab\'s own module."""\n\n\nclass drive:\n    mount = staticmethod(print)\n'


def pip(*arguments):
    """Run pip in that environment; returns what it prints."""
    command = [PYTHON, "-m", "pip", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def make_environment():
    """Create the environment once; elasticdeform is left for the notebook to install."""
    if not (ENVIRONMENT / "ready").exists():
        python = os.environ.get("COLAB_PYTHON") or shutil.which("python3.13")
        if not python:
            sys.exit("Colab has Python 3.13, and there is none here: install it or set COLAB_PYTHON.")
        subprocess.run([python, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        pip("install", "--quiet", "-c", str(notebook.ROOT / "tests" / "colab.txt"), *PRELOADED.split())
        module = next((ENVIRONMENT / "lib").glob("python*/site-packages")) / "google" / "colab"
        module.mkdir(parents=True)
        (module / "__init__.py").write_text(DRIVE)
        (ENVIRONMENT / "ready").touch()
    pip("uninstall", "--quiet", "--yes", "elasticdeform")


def run(folder, repository, backend):
    """Execute the notebook, alone in a folder; returns the finished process."""
    book = nbformat.read(notebook.NOTEBOOK, as_version=4)
    for cell in book.cells:
        cell.source = cell.source.replace('REPOSITORY = ""', f'REPOSITORY = "{repository}"')
        cell.source = cell.source.replace("KEEP_ON_GOOGLE_DRIVE = False", "KEEP_ON_GOOGLE_DRIVE = True")
        cell.source = cell.source.replace("/content/drive", f"{folder}/drive")
    nbformat.write(book, folder / "reproduction.ipynb")
    command = f"{PYTHON} -m jupyter nbconvert --to notebook --execute --output executed reproduction.ipynb".split()
    environment = os.environ | {"REPRODUCTION_PRESET": "smoke", "KERAS_BACKEND": backend}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def main():
    """Command line; see the Makefile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jax", action="store_true")
    backend = "jax" if parser.parse_args().jax else "tensorflow"
    make_environment()
    before = pip("freeze")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        finished = run(folder, "", backend)
        assert finished.returncode and "set REPOSITORY" in finished.stderr, finished.stderr[-2000:]
        subprocess.run(["git", "clone", "--quiet", notebook.ROOT, folder / "published"], check=True)
        finished = run(folder, folder / "published", backend)
        assert finished.returncode == 0, finished.stderr[-5000:]
        assert len(list((folder / "drive" / "MyDrive" / "consistency-runs").glob("*.npz"))) >= 7
    changed = {line for line in set(pip("freeze").split("\n")) ^ set(before.split("\n")) if "elasticdeform" not in line}
    assert not changed, f"packages changed: {changed}"
    print(f"Colab's versions, {backend}: the notebook alone in a folder ran to its end; no package of Colab's changed")


if __name__ == "__main__":
    main()
