"""Reads and runs reproduction.ipynb; `make run`, `make notebook`, the records and the tests go through here."""

import hashlib
import importlib.util
import pathlib
import sys
import tempfile

import nbformat

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
