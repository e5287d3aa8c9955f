"""The same tests on JAX, and several devices. A file of its own, so that it runs beside the notebook's."""

import json
import os
import subprocess
import sys

import notebook
import pytest


def pytest_passes_on_jax(cache, *arguments, **environment):
    """Run pytest with JAX, which keeps what it has compiled: a third of the time of tests this small."""
    own = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    notebook.pytest_passes(*arguments, KERAS_BACKEND="jax", **own, **environment)


def test_the_method_on_jax(tmp_path):
    wanted = "(test_method and not without_end) or (broken_off and float32) or bent_view or equivariant or restores"
    files = (f"tests/test_{name}.py" for name in ("method", "runs", "parts"))
    pytest_passes_on_jax(tmp_path, *files, "-k", wanted)


EPOCH = """
import notebook, helpers, json, keras, tempfile
method, data = notebook.load_method(), notebook.small_data()
settings = method.PRESETS["smoke"] | method.REPORTED | {"precision": "float32", "labelled": 100, "unlabelled": 156}
run = notebook.small_ways(method, method.Shift(), settings)["SemiC"]
row = method.train(run, data, helpers.Runs(tempfile.mkdtemp(), method.train))[1]["history"][0]
print(json.dumps(row | {"seconds": 0, "distributed": keras.distribution.distribution() is not None}))
"""


def test_two_devices_give_the_numbers_of_one():
    histories = []
    for count in (1, 2):
        own = {"KERAS_BACKEND": "jax", "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
        how = {"cwd": notebook.ROOT / "tests", "env": os.environ | own, "capture_output": True, "text": True}
        done = subprocess.run([sys.executable, "-c", EPOCH], **how)
        assert done.returncode == 0, done.stderr[-3000:]
        histories.append(json.loads(done.stdout.splitlines()[-1]))
    assert [history.pop("distributed") for history in histories] == [False, True]
    assert histories[0] == pytest.approx(histories[1], rel=1e-5, abs=1e-5)
