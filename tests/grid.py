"""Trains small grids of runs in processes of their own, which break off at a given moment; for test_faults.py.

Started as a program it imports TensorFlow once and then forks a process for every line of JSON that it reads: the
keyword arguments of `train_grid`. It answers with a line when that process starts, {"process": number}, and with one
when it has ended, {"signal": number or 0, "trained": ids of the runs that it trained, "moments": how many went by}.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import notebook

import helpers

SIZES = {"width": 2, "labeled": 96, "unlabeled": 80, "validation": 40, "test": 60}
SIZES |= {"epochs_supervised": 3, "epochs_early": 1, "epochs": 3}
RANGES = {"labeled": (0, 400), "unlabeled": (400, 1000), "validation": (1000, 1200)}


def small_network(width, classes=10, momentum=0.9):
    """A network with what a checkpoint must keep, in a third of the time that the notebook's takes to be compiled."""
    images = outputs = keras.Input((32, 32, 3))
    outputs = keras.layers.Conv2D(width, 3, strides=4, activation="relu")(outputs)
    outputs = helpers.BatchNormalization(momentum=momentum)(outputs)
    outputs = keras.layers.Dropout(0.5)(outputs)
    outputs = keras.layers.GlobalAveragePooling2D()(outputs)
    return keras.Model(images, keras.layers.Dense(classes, dtype="float32")(outputs))


class Grids:
    """The program, seen from a test: a context manager."""

    def __enter__(self):
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *exception):
        self.server.stdin.close()
        self.server.wait()

    def start(self, folder, **arguments):
        """Begin to train the grid in `folder`; returns the number of the process."""
        self.server.stdin.write(json.dumps({"folder": str(folder), **arguments}) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())["process"]

    def wait(self):
        """Wait until the process that was started has ended; returns its answer."""
        return json.loads(self.server.stdout.readline())

    def train(self, folder, **arguments):
        """Do both."""
        self.start(folder, **arguments)
        return self.wait()


def serve(method):
    """Answer the lines of the standard input."""
    for line in sys.stdin:
        arguments = json.loads(line)
        reading, writing = os.pipe()
        process = os.fork()
        if not process:
            os.close(reading)
            train_grid(method, report=writing, **arguments)
            os._exit(0)
        os.close(writing)
        print(json.dumps({"process": process}), flush=True)
        with os.fdopen(reading) as pipe:
            lines = [json.loads(line) for line in pipe]  # to its end, which is the end of the process
        status = os.waitpid(process, 0)[1]
        trained = [line["trained"] for line in lines if "trained" in line]
        moments = max((line["moments"] for line in lines if "moments" in line), default=0)
        ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        print(json.dumps({"signal": ended, "trained": trained, "moments": moments}), flush=True)


def train_grid(method, report, folder, kill_at=0, interrupt_at=(), seed=0):
    """Train Supervised, SemiC and SemiCT for noise.

    A "moment" is a training step, a half-written file, a file before or after it gets its name, and the time between
    two runs.

    Args:
        method: module of the notebook's definitions.
        report: file descriptor to write lines to.
        folder: for the runs.
        kill_at: moment at which the process sends itself SIGKILL.
        interrupt_at: moments at which it sends itself SIGINT; the grid is then started again in the same process.
        seed: of the runs.
    """
    now = 0

    def say(**line):
        os.write(report, (json.dumps(line) + "\n").encode())

    def moment():
        nonlocal now
        now += 1
        if now == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if now in interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)

    watch(moment)
    settings = notebook.preset_settings(method, "smoke", seed=seed, **SIZES)
    data = helpers.split("shapes", helpers.generate_shapes(1200, 300), RANGES)
    plan = [method.plan(name, "noise", settings, "shapes") for name in ("Supervised", "SemiC", "SemiCT")]
    runner = helpers.Runner(data, method.build_model, method.TRANSFORMS, plan, "smoke", folder)
    train = runner._train

    def told(configuration, *arguments):
        record = train(configuration, *arguments)
        say(trained=configuration.id)
        return record

    runner._train = told
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for _ in range(len(interrupt_at) + 1):
        with contextlib.suppress(KeyboardInterrupt):
            for run in plan:
                moment()
                runner.train([run])
            break
    say(moments=now)


def watch(moment):
    """Call `moment` wherever a process may be broken off."""

    class Halves:
        """A file that is written in two halves."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, content):
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            moment()
            self.file.write(content[len(content) // 2 :])

    open_path, replace, step = pathlib.Path.open, os.replace, helpers.LiveStatus.on_train_batch_end

    def in_halves(path, mode="r", *arguments, **keywords):
        file = open_path(path, mode, *arguments, **keywords)
        return Halves(file) if path.name.endswith(".partial") else file

    def watched_replace(*arguments):
        moment()
        replace(*arguments)
        moment()

    def watched_step(self, *arguments, **keywords):
        moment()
        step(self, *arguments, **keywords)

    pathlib.Path.open, os.replace, helpers.LiveStatus.on_train_batch_end = in_halves, watched_replace, watched_step


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as source:
        module = notebook.load_method(source)
        module.build_network = small_network
        serve(module)
