"""Runs the notebook as Colab would: its Python and package versions, and a folder that holds the notebook alone.

What this cannot show: a GPU, Colab's own front end, and its disconnections.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import nbformat
import notebook

ROOT = notebook.ROOT
ENVIRONMENT = ROOT / ".venv-colab"
PRELOADED = "tensorflow keras numpy scipy matplotlib ipywidgets ipython ipykernel notebook nbclient nbconvert".split()
STAND_IN = '''"""Stands in for Colab's own module."""

import pathlib


class drive:
    @staticmethod
    def mount(path):
        pathlib.Path(path, "MyDrive").mkdir(parents=True, exist_ok=True)
'''


def find_python():
    """A Python 3.13 that runs: COLAB_PYTHON, python3.13 on the path, or one of pyenv's."""
    pyenv = sorted(pathlib.Path.home().glob(".pyenv/versions/3.13*/bin/python"))
    for candidate in filter(None, [os.environ.get("COLAB_PYTHON"), shutil.which("python3.13"), *pyenv]):
        asked = subprocess.run([candidate, "--version"], capture_output=True, text=True)
        if asked.returncode == 0 and asked.stdout.startswith("Python 3.13"):
            return candidate
    sys.exit("Colab has Python 3.13, and there is none here: install python3.13 or set COLAB_PYTHON to one.")


def make_environment():
    """Create `.venv-colab` once; elasticdeform is left for the notebook to install."""
    if (ENVIRONMENT / "ready").exists():
        subprocess.run(
            [ENVIRONMENT / "bin/python", "-m", "pip", "uninstall", "--quiet", "--yes", "elasticdeform"], check=True
        )
        return
    subprocess.run([find_python(), "-m", "venv", "--clear", ENVIRONMENT], check=True)
    constraints = ROOT / "tests" / "colab-constraints.txt"
    install = [ENVIRONMENT / "bin/python", "-m", "pip", "install", "--quiet", "-c", constraints, *PRELOADED]
    subprocess.run(install, check=True)
    site = next((ENVIRONMENT / "lib").glob("python*/site-packages"))
    (site / "google" / "colab").mkdir(parents=True, exist_ok=True)
    (site / "google" / "colab" / "__init__.py").write_text(STAND_IN)
    (ENVIRONMENT / "ready").touch()


def versions():
    """What pip has in the environment, without what the notebook may add."""
    freeze = subprocess.run(
        [ENVIRONMENT / "bin/python", "-m", "pip", "freeze"], check=True, capture_output=True, text=True
    )
    return {line for line in freeze.stdout.splitlines() if not line.startswith("elasticdeform")}


def run(folder, repository):
    """Execute the notebook alone in `folder`; returns the finished process and the executed notebook's path."""
    book = nbformat.read(notebook.NOTEBOOK, as_version=4)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.source = cell.source.replace('REPOSITORY = ""', f'REPOSITORY = "{repository}"')
            cell.source = cell.source.replace("KEEP_ON_GOOGLE_DRIVE = False", "KEEP_ON_GOOGLE_DRIVE = True")
            cell.source = cell.source.replace("/content/drive", f"{folder}/drive")
    nbformat.write(book, folder / "reproduction.ipynb")
    command = [ENVIRONMENT / "bin/jupyter", "nbconvert", "--to", "notebook", "--execute", "--output", "executed.ipynb"]
    environment = os.environ | {"REPRODUCTION_PRESET": "smoke"}
    environment.pop("PYTHONPATH", None)
    finished = subprocess.run(
        [*command, "reproduction.ipynb"], cwd=folder, env=environment, capture_output=True, text=True
    )
    return finished, folder / "executed.ipynb"


def main():
    """Without REPOSITORY the notebook must stop with a clear message, with it run to its end."""
    make_environment()
    before = versions()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        finished, _ = run(folder, "")
        if finished.returncode == 0 or "Set REPOSITORY" not in finished.stderr:
            sys.exit(
                f"Without REPOSITORY the notebook should have stopped and said so. It said:\n{finished.stderr[-3000:]}"
            )
        print("without REPOSITORY: stops and says what to do")

        subprocess.run(["git", "clone", "--quiet", ROOT, folder / "published"], check=True)
        finished, executed = run(folder, folder / "published")
        if finished.returncode:
            sys.exit(f"The notebook failed in Colab's environment:\n{finished.stderr[-5000:]}")
        records = list((folder / "drive" / "MyDrive").glob("*/*/*/record.json"))
        if len(records) != notebook.RUNS:
            sys.exit(f"{notebook.RUNS} runs should be on the stand-in for Google Drive, and there are {len(records)}.")
        if versions() != before:
            sys.exit(f"The notebook changed the preloaded packages: {versions() ^ before}")
        cells = nbformat.read(executed, as_version=4).cells
        print(
            next(
                output.text
                for cell in cells
                for output in cell.get("outputs", [])
                if "ipywidgets" in output.get("text", "")
            )
        )
    print("Colab's versions, the notebook alone in a folder: ran to its end; no preloaded package was changed")


if __name__ == "__main__":
    main()
