"""Opens the notebook in JupyterLab in a headless Chromium, runs all cells and uses the widgets as a reader does.

At the preset `smoke`, on copies in a temporary folder. Screenshots show what no check can judge.
"""

import argparse
import contextlib
import functools
import json
import os
import pathlib
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
INSTALL = "Install what is missing: apt-get install chromium chromium-driver; pip install -r tests/browser.txt"
SWITCHES = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)
LAB_SETTINGS = {
    # Every cell in the page, also those out of sight: the checks look at them all.
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": '{"windowingMode": "none"}',
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": '{"fetchNews": "false"}',
}
HANDLE = ":is(.noUi-handle, .ui-slider-handle)"  # of a slider, in ipywidgets 8 and 7
WIDE, NARROW = (1280, 1600), (420, 1600)  # pixels: a computer's window, a phone's

try:
    from selenium import webdriver
    from selenium.common.exceptions import StaleElementReferenceException, WebDriverException
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select
except ImportError:
    sys.exit(f"There is no Python package selenium here. {INSTALL}")


def find_program(*names):
    """Path of the first of these programs that is installed; ends with a message where none is."""
    found = next(filter(None, map(shutil.which, names)), None)
    return found or sys.exit(f"There is no {names[0]} here. {INSTALL}")


def wait(what, condition, seconds):
    """Value of `condition()` once it is true; ends the test after `seconds`, saying what was waited for."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(StaleElementReferenceException):
            value = condition()
            if value:
                return value
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds} s in vain: {what}")


@contextlib.contextmanager
def jupyter(program, folder):
    """Serve `folder` by JupyterLab on a free port of this machine; gives a function of a path to its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token, own = secrets.token_hex(16), folder / ".jupyter"
    for name, content in LAB_SETTINGS.items():
        (own / "settings" / name).parent.mkdir(parents=True)
        (own / "settings" / name).write_text(content)
    environment = os.environ | {
        "JUPYTER_TOKEN": token,
        "JUPYTER_CONFIG_DIR": str(own / "config"),
        "JUPYTERLAB_SETTINGS_DIR": str(own / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(own / "workspaces"),
        "REPRODUCTION_PRESET": "smoke",
    }
    command = [program.absolute(), "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--ServerApp.port_retries=0"]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdates"]
    with (own / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    base = f"http://127.0.0.1:{port}"

    def answers():
        if server.poll() is not None:
            raise AssertionError(f"JupyterLab ended:\n{(own / 'log').read_text()[-3000:]}")
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            return urllib.request.urlopen(f"{base}/api?token={token}").status == 200

    try:
        wait("JupyterLab answers", answers, 120)
        yield lambda path: f"{base}/{path}?token={token}"
    finally:
        server.terminate()
        server.wait(30)


@contextlib.contextmanager
def chromium(folder):
    """A headless Chromium with a profile of its own in `folder`."""
    options = webdriver.ChromeOptions()
    options.binary_location = find_program("chromium", "chromium-browser", "google-chrome")
    for switch in (*SWITCHES, f"--user-data-dir={folder / '.chromium'}"):
        options.add_argument(switch)
    driver = webdriver.Chrome(options, webdriver.ChromeService(find_program("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def _differs(element, text):
    return element.text != text


class Page:
    """The notebook in the browser.

    Args:
        driver: of selenium.
        folder: for screenshots.
    """

    def __init__(self, driver, folder):
        self.driver, self.folder, self.shots = driver, folder, 0

    def resize(self, width, height):
        """Make the window so large, in pixels; below 500 Chromium does it only by pretending to be a phone."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def shoot(self, name, element=None):
        """Save a screenshot, with `element` at the top."""
        if element is not None:
            self.driver.execute_script("arguments[0].scrollIntoView({block: 'start'})", element)
            time.sleep(0.5)  # until it is drawn
        self.shots += 1
        path = self.folder / f"{self.shots:02}-{name}.png"
        self.driver.save_screenshot(str(path))
        print(f"  {path}", flush=True)

    def run_all(self, sessions_address, seconds):
        """Run all cells by the menu and wait for the last one; says what a cell that failed shows."""

        def kernels():  # what the page itself says of its kernel before there is one is "idle", too
            sessions = json.load(urllib.request.urlopen(sessions_address))
            return [session for session in sessions if session["kernel"]["execution_state"] == "idle"]

        wait("the notebook's kernel", kernels, 120)
        menu = "//*[contains(@class, 'lm-MenuBar-itemLabel') and text()='Run']"
        self.driver.find_element(By.XPATH, menu).click()
        item = '.lm-Menu-item[data-command="runmenu:run-all"]'
        wait("the menu Run", lambda: self.driver.find_elements(By.CSS_SELECTOR, item), 10)[0].click()
        script = """
            const cells = document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt');
            return [...cells].filter(cell => !/\\d/.test(cell.textContent)).length;
        """

        def finished():
            wrong = self.texts("error")
            assert not wrong, "cells show errors:\n" + "\n".join(wrong)
            return not self.driver.execute_script(script)

        wait("all cells ran", finished, seconds)
        for text in self.texts("stderr"):
            print(f"a cell shows a warning: {text}", flush=True)

    def texts(self, kind):
        """What the outputs of a kind, "error" or "stderr", say."""
        outputs = self.driver.find_elements(By.CSS_SELECTOR, f'[data-mime-type$="jupyter.{kind}"]')
        return [output.text[:1000] for output in outputs]

    def pictures(self):
        """All pictures in the outputs; every one must have loaded."""
        images = self.driver.find_elements(By.CSS_SELECTOR, ".jp-OutputArea-output img")
        shown = [image for image in images if image.is_displayed()]
        broken = self.driver.execute_script("return arguments[0].filter(image => !image.naturalWidth).length", shown)
        assert not broken, f"{broken} pictures did not load"
        return shown

    def panel(self, label):
        """The widgets in whose output a label or button says `label`."""
        path = f"//*[self::label or self::button][normalize-space()='{label}']"
        return self.driver.find_element(By.XPATH, f"{path}/ancestor::*[contains(@class, 'jp-OutputArea-output')][1]")

    def move_sliders(self, panel):
        """Move every slider of a panel by the keyboard, one step down and up; each must show another value between."""
        sliders = panel.find_elements(By.CSS_SELECTOR, f".widget-inline-hbox:has({HANDLE})")
        for slider in sliders:
            handle = slider.find_element(By.CSS_SELECTOR, HANDLE)
            label, readout = (slider.find_element(By.CSS_SELECTOR, f".widget-{part}") for part in ("label", "readout"))
            shown = [readout.text]
            for key in (Keys.ARROW_LEFT, Keys.ARROW_RIGHT):
                handle.send_keys(key)
                wait(f"{label.text} moves from {shown[-1]}", functools.partial(_differs, readout, shown[-1]), 10)
                shown.append(readout.text)
            assert shown[0] == shown[2], f"{label.text} moved {' to '.join(shown)}"
        return len(sliders)

    def set_slider(self, panel, label, *keys):
        """Press keys on the slider of this label."""
        path = f".//label[normalize-space()='{label}']/.."
        slider = panel.find_element(By.XPATH, path)
        slider.find_element(By.CSS_SELECTOR, HANDLE).send_keys(*keys)

    def fits(self, panel, what):
        """Nothing in a panel may stick out of its cell to the right, but for tables, which scroll."""
        script = """
            const limit = arguments[0].closest('.jp-OutputArea').getBoundingClientRect().right + 1;
            return [...arguments[0].querySelectorAll('.widget-hbox, .widget-inline-hbox, button, img, label')]
                .filter(part => part.offsetWidth && part.getBoundingClientRect().right > limit)
                .map(part => part.className + ' ' + part.textContent.slice(0, 40));
        """
        outside = self.driver.execute_script(script, panel)
        assert not outside, f"{what}: cut off at the right: {outside}"


def use_preview(page):
    """Every control of the transform preview draws another picture."""
    panel = page.panel("draw")
    assert page.move_sliders(panel) == 1
    image = panel.find_element(By.TAG_NAME, "img")
    for name in ("rotation", "shift"):
        before = image.get_attribute("src")
        Select(panel.find_element(By.TAG_NAME, "select")).select_by_visible_text(name)
        wait(f"the preview shows {name}", lambda before=before: image.get_attribute("src") != before, 30)
    before = image.get_attribute("src")
    page.set_slider(panel, "strength", Keys.END)
    wait("the preview shows another strength", lambda: image.get_attribute("src") != before, 30)
    page.shoot("preview", panel)
    page.resize(*NARROW)
    page.shoot("preview-narrow", panel)
    page.fits(panel, "the preview in a narrow window")
    page.resize(*WIDE)


def use_playground(page):
    """One try to its end, another one stopped."""
    panel = page.panel("Train")
    train, stop = (panel.find_element(By.XPATH, f".//button[normalize-space()='{name}']") for name in ("Train", "Stop"))
    assert train.is_enabled() and not stop.is_enabled()
    assert page.move_sliders(panel) == 5
    page.set_slider(panel, "strength", *[Keys.ARROW_LEFT] * 6)
    page.set_slider(panel, "epochs", Keys.HOME, Keys.ARROW_RIGHT)
    page.shoot("playground-untouched", panel)

    def shown():
        return [image for image in panel.find_elements(By.TAG_NAME, "img") if image.is_displayed()]

    def row_count():
        return len(panel.find_elements(By.CSS_SELECTOR, "tbody tr"))

    train.click()
    wait("Stop can be pressed and Train cannot", lambda: stop.is_enabled() and not train.is_enabled(), 5)
    wait("the curves appear", shown, 60)
    first = shown()[0].get_attribute("src")
    wait("the curves move", lambda: shown()[0].get_attribute("src") != first, 120)
    page.shoot("playground-training", panel)
    wait("the first try is done", lambda: "Done in" in panel.text, 300)
    wait("the pictures are there", lambda: len(shown()) == 2, 10)
    assert row_count() == 1 and "2 | 2 of 2" in panel.text, panel.text
    page.shoot("playground-done", panel)

    Select(panel.find_element(By.TAG_NAME, "select")).select_by_visible_text("rotation")
    page.set_slider(panel, "epochs", Keys.END)
    wait("Train can be pressed again", train.is_enabled, 5)
    train.click()
    wait("the second try has finished an epoch", lambda: "epoch 2 of 20" in panel.text, 120)
    pressed = time.monotonic()
    stop.click()
    wait("Stop stops", lambda: "Stopped." in panel.text, 5)
    print(f"  stopped {time.monotonic() - pressed:.1f} s after the click", flush=True)
    wait("Train can be pressed after Stop", train.is_enabled, 30)
    assert len(shown()) == 2 and row_count() == 2 and "| 0 of 20" in panel.text, panel.text
    page.shoot("playground-stopped", panel)
    page.resize(*NARROW)
    page.shoot("playground-narrow", panel)
    page.shoot("playground-narrow-below", stop)
    page.fits(panel, "the playground in a narrow window")
    page.resize(*WIDE)


def main():
    """Command line; see the Makefile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("screenshots", nargs="?", type=pathlib.Path, default=ROOT / "runs" / "browser")
    parser.add_argument("--notebook", type=pathlib.Path, default=ROOT / "reproduction.ipynb")
    beside = pathlib.Path(sys.executable).parent / "jupyter"
    parser.add_argument("--jupyter", type=pathlib.Path, default=beside, help="the jupyter that serves the notebook")
    parser.add_argument("--seconds", type=float, default=1800, help="that all cells may take")
    arguments = parser.parse_args()
    arguments.screenshots.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = pathlib.Path(name)
        notebook = json.loads(arguments.notebook.read_text())
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":  # what is shown after all ran must not be from before
                cell |= {"outputs": [], "execution_count": None}
        (folder / "reproduction.ipynb").write_text(json.dumps(notebook))
        shutil.copy(ROOT / "helpers.py", folder)
        with chromium(folder) as driver, jupyter(arguments.jupyter, folder) as address:
            page = Page(driver, arguments.screenshots)
            page.resize(*WIDE)
            driver.get(address("doc/tree/reproduction.ipynb"))
            try:
                began = time.monotonic()
                page.run_all(address("api/sessions"), arguments.seconds)
                print(f"all cells ran in {time.monotonic() - began:.0f} s, {len(page.pictures())} pictures", flush=True)
                page.shoot("top")
                use_preview(page)
                print("the preview follows its controls", flush=True)
                use_playground(page)
                print("the playground trains, draws, stops and lists the tries", flush=True)
                page.pictures()
            except BaseException:
                with contextlib.suppress(WebDriverException):  # where the browser itself has ended
                    page.shoot("failure")
                raise


if __name__ == "__main__":
    main()
