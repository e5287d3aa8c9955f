"""Opens the notebook in JupyterLab in a headless Chromium, runs all cells and uses the controls as a reader does.

At the preset `smoke`, on a copy in a temporary folder; screenshots, in runs/browser/, show what no check can judge. It
takes Debian's chromium and chromium-driver, and selenium from PyPI. `--jupyter` names another JupyterLab's program.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request

import notebook
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

SWITCHES = "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
PORT, TOKEN = 8899, "reproduction"
LAB = f"http://127.0.0.1:{PORT}"
WHOLE_PAGE = ("@jupyterlab/notebook-extension", "tracker.jupyterlab-settings", '{"windowingMode": "none"}')
PROMPTS = "return [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(prompt => prompt.textContent)"
HIDDEN = ""  # prompt of a cell whose source is folded


def wait(what, condition, seconds):
    """Value of `condition()` once it is true, and the seconds that it took; fails after `seconds`."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        with contextlib.suppress(StaleElementReferenceException):
            if value := condition():
                return value, time.monotonic() - began
        time.sleep(0.02)
    raise AssertionError(f"waited {seconds} s in vain: {what}")


@contextlib.contextmanager
def jupyterlab(program, folder):
    """Serve a folder by JupyterLab."""
    settings = folder / ".settings" / WHOLE_PAGE[0]
    settings.mkdir(parents=True)
    (settings / WHOLE_PAGE[1]).write_text(WHOLE_PAGE[2])
    own = {"JUPYTER_TOKEN": TOKEN, "JUPYTERLAB_SETTINGS_DIR": str(folder / ".settings"), "REPRODUCTION_PRESET": "smoke"}
    own |= {"JUPYTERLAB_WORKSPACES_DIR": str(folder / ".workspaces"), "REPRODUCTION_PICTURES": "public"}
    command = [program, "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={PORT}"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=os.environ | own, stdout=log, stderr=log)

    def answers():
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{LAB}/api?token={TOKEN}").status == 200

    try:
        wait("JupyterLab answers", answers, 120)
        yield
    finally:
        server.terminate()
        server.wait(30)


class Page:
    """The notebook in the browser, with screenshots in a folder."""

    def __init__(self, driver, folder):
        self.driver, self.folder = driver, folder

    def all(self, selector, inside=None):
        """Elements that are shown."""
        found = (inside or self.driver).find_elements(By.CSS_SELECTOR, selector)
        return [element for element in found if element.is_displayed()]

    def shoot(self, name, element=None):
        """Save a screenshot, with an element in sight."""
        if element is not None:
            self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
            time.sleep(0.5)
        self.driver.save_screenshot(str(self.folder / f"{name}.png"))

    def menu(self, name, command):
        """Choose from the menu bar."""
        bar = f"//*[contains(@class, 'MenuBar-itemLabel') and text()='{name}']"
        self.driver.find_element(By.XPATH, bar).click()
        wait(command, lambda: self.all(f'.lm-Menu [data-command="{command}"]'), 10)[0][0].click()

    def run_all(self):
        """Run all cells; returns the seconds."""

        def kernels():
            sessions = json.load(urllib.request.urlopen(f"{LAB}/api/sessions?token={TOKEN}"))
            return [one for one in sessions if one["kernel"]["execution_state"] == "idle"]

        def done():
            wrong = [one.text for one in self.all('[data-mime-type="application/vnd.jupyter.error"]')]
            assert not wrong, wrong
            prompts = self.driver.execute_script(PROMPTS)
            return all(re.search(r"\d", prompt) for prompt in prompts if prompt != HIDDEN)

        wait("the kernel", kernels, 120)
        self.menu("Run", "runmenu:run-all")
        return wait("all cells ran", done, 2400)[1]

    def panel(self, label):
        """The output that holds a label or button of a name."""
        path = f"//*[self::label or self::button][normalize-space()='{label}']"
        above = f"{path}/ancestor::*[contains(@class, 'jp-OutputArea-output')][1]"
        return self.driver.find_element(By.XPATH, above)

    def slide(self, panel, label, *keys):
        """Press keys on the slider of a label."""
        row = panel.find_element(By.XPATH, f".//label[normalize-space()='{label}']/..")
        row.find_element(By.CSS_SELECTOR, ".noUi-handle, .ui-slider-handle").send_keys(*keys)


def use_preview(page):
    """Every control draws another picture; returns the seconds that each took."""
    panel, seconds = page.panel("strength"), {}
    last = page.all("img", panel)[0].get_attribute("src")
    changes = {
        "transform": lambda: Select(panel.find_element(By.TAG_NAME, "select")).select_by_visible_text("shift"),
        "strength": lambda: page.slide(panel, "strength", Keys.ARROW_RIGHT),
        "seed": lambda: page.slide(panel, "seed", Keys.ARROW_RIGHT),
    }
    for name, change in changes.items():
        change()

        def other(last=last):
            return [one.get_attribute("src") for one in page.all("img", panel) if one.get_attribute("src") != last]

        (last, *_), seconds[name] = wait(f"the preview follows {name}", other, 20)
    page.shoot("preview", panel)
    return seconds


def use_try_it(page):
    """One try to its end, one stopped; returns the seconds until it stopped."""
    panel = page.panel("Run Interact")
    press = panel.find_element(By.XPATH, ".//button[normalize-space()='Run Interact']").click
    page.slide(panel, "epochs", Keys.HOME, Keys.ARROW_RIGHT)
    press()
    wait("the table of tries", lambda: page.all("tbody tr", panel), 300)
    assert page.all("img", panel)
    page.shoot("try", panel)
    page.slide(panel, "epochs", Keys.END)
    press()
    wait("it starts", lambda: "left" in panel.text, 120)
    wait("the first epoch is drawn", lambda: page.all("img", panel), 120)
    page.menu("Kernel", "kernelmenu:interrupt")
    seconds = wait("it stops", lambda: "Stopped." in panel.text, 30)[1]
    page.shoot("stopped", panel)
    return seconds


def main():
    """Command line; see the Makefile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jupyter", default=str(pathlib.Path(sys.executable).parent / "jupyter"))
    arguments = parser.parse_args()
    shots = notebook.ROOT / "runs" / "browser"
    shots.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = pathlib.Path(name)
        for part in ("reproduction.ipynb", "helpers.py", "results"):
            copy = shutil.copytree if (notebook.ROOT / part).is_dir() else shutil.copy
            copy(notebook.ROOT / part, folder / part)
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for switch in (*SWITCHES.split(), "--window-size=1280,800", f"--user-data-dir={folder / '.chromium'}"):
            options.add_argument(switch)
        with jupyterlab(arguments.jupyter, folder):
            driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
            page = Page(driver, shots)
            try:
                driver.get(f"{LAB}/doc/tree/reproduction.ipynb?token={TOKEN}")
                for name, selector in (("first-screen", "h1"), ("second-screen", "table.dataframe")):
                    page.shoot(name, wait(name, lambda selector=selector: page.all(selector), 60)[0][0])
                print(f"all cells ran in {page.run_all():.0f} s")
                print("the preview follows its controls:", use_preview(page))
                print(f"a try trains, draws and is listed; another stopped in {use_try_it(page):.1f} s")
            finally:
                page.shoot("last")
                driver.quit()


if __name__ == "__main__":
    main()
