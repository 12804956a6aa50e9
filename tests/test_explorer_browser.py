"""The explorers in a real browser: JupyterLab opens notebook 08, runs it, and every kind of control moves the picture.

It needs Debian's chromium, or another one on the path. Without one it is skipped, but never under CI=true.
DICLIP_SCREENSHOTS names a folder for the screenshots.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from diclip.settings import ROOT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CI = os.environ.get("CI") == "true"
PATIENCE = 600_000  # ms: a first run draws MiniVOC
SETTINGS = {  # nothing pops up, and outputs that are out of sight stay in the page
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
}

pytestmark = pytest.mark.skipif(not CHROMIUM and not CI, reason="no chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Serve a copy of notebook 08; yield its address."""
    home, token = tmp_path_factory.mktemp("lab"), "explore"
    (home / "work").mkdir()
    shutil.copy(ROOT / "notebooks" / "08_explorer.ipynb", home / "work")
    for name, values in SETTINGS.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name not in ("DICLIP_HEADLESS", "MPLBACKEND")}
    environment |= {"HOME": str(home), "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1"]
    command += [f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"]
    command += [
        f"--ServerApp.root_dir={home / 'work'}",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    with open(home / "lab.log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        _wait_for(f"http://127.0.0.1:{port}/api", server, home / "lab.log")
        yield f"http://127.0.0.1:{port}/lab/tree/08_explorer.ipynb?token={token}&reset"
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:  # a kernel that does not answer would hold it for ever
            server.kill()
            server.wait()


def _wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE / 1000
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urlopen(address, timeout=30).read()
            return
        except (URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def page(lab):
    """Open the notebook, run all of it, and wait for the explorers' pictures; collect what the console complains of."""
    assert CHROMIUM, "CI needs chromium: apt-get install -y chromium"
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-dev-shm-usage"]  # as root, and in small containers
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(PATIENCE)
        page.complaints = []
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("console", lambda said: page.complaints.append(said.text) if said.type == "error" else None)
        page.goto(lab)
        page.locator(".jp-Notebook .jp-Cell").first.wait_for()
        shown = page.locator(".jp-SideBar.jp-mod-left .lm-TabBar-tab.lm-mod-current")
        if shown.count():
            shown.first.click()  # the file browser takes the room
        page.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
        page.locator(".lm-Menu-itemLabel", has_text="Run All Cells").first.click()
        for number in (0, 1):
            _drawn(page, number)
        yield page
        browser.close()


def _explorer(page, number: int):
    return page.locator(".diclip-explorer").nth(number)


def _picture(page, number: int):
    return _explorer(page, number).locator("img.widget-image").first


def _drawn(page, number: int) -> str:
    """Wait until an explorer's picture is there; return its address, which changes with the picture."""
    picture = _picture(page, number)
    picture.wait_for()
    page.wait_for_function("image => image.naturalWidth > 300", arg=picture.element_handle())
    return picture.get_attribute("src")


def _control(page, number: int, label: str):
    """Return the widget with that label."""
    box = _explorer(page, number).locator(".jupyter-widgets", has=page.locator(f"label:text-is('{label}')"))
    return box.last  # the innermost


def _changes(page, number: int, act) -> None:
    """Do something and wait until the picture is another one."""
    before, picture = _drawn(page, number), _picture(page, number)
    picture.scroll_into_view_if_needed()
    act()
    page.wait_for_function(
        "([image, before]) => image.src !== before && image.naturalWidth > 300", arg=[picture.element_handle(), before]
    )


def _slide(page, number: int, label: str, key: str = "ArrowRight") -> None:
    _control(page, number, label).locator(".noUi-handle").press(key)


def test_no_cell_failed(page):
    page.locator(".jp-Notebook .jp-Cell").last.scroll_into_view_if_needed()
    page.wait_for_function(
        "() => [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')]"
        ".every(prompt => /\\[\\d+\\]/.test(prompt.textContent))"
    )
    assert page.locator('[data-mime-type="application/vnd.jupyter.error"]').all_inner_texts() == []


def test_every_kind_of_control_moves_the_cams(page):
    _changes(page, 0, lambda: _slide(page, 0, "number"))
    _changes(page, 0, lambda: _explorer(page, 0).get_by_role("button", name="cat", exact=True).click())
    own = _control(page, 0, "own words").locator("input")
    _changes(page, 0, lambda: (own.fill("little bird"), own.press("Enter")))
    _changes(page, 0, lambda: _slide(page, 0, "opacity", "ArrowLeft"))
    _changes(page, 0, lambda: _control(page, 0, "up to rung").locator("select").select_option("clip"))
    _changes(page, 0, lambda: (own.fill("zebra"), own.press("Enter")))
    _explorer(page, 0).get_by_text("has never heard of zebra").wait_for()


def test_a_wrong_upload_is_a_line_and_a_right_one_a_picture(page):
    upload = _explorer(page, 0).locator("input[type=file]")
    upload.set_input_files({"name": "text.jpg", "mimeType": "image/jpeg", "buffer": b"no picture"})
    _explorer(page, 0).get_by_text("text.jpg: is no readable image").wait_for()
    _changes(page, 0, lambda: upload.set_input_files(ROOT / "figures" / "minivoc.png"))
    _explorer(page, 0).get_by_text("has only ever seen MiniVOC's drawings").wait_for()
    _changes(page, 0, lambda: _slide(page, 0, "number", "ArrowLeft"))


def test_a_click_and_the_keyboard_move_the_patch(page):
    _changes(page, 1, lambda: _picture(page, 1).click(position={"x": 60, "y": 200}))
    _changes(page, 1, lambda: _slide(page, 1, "row"))
    _changes(page, 1, lambda: _slide(page, 1, "block", "ArrowLeft"))


@pytest.mark.parametrize("width", [1280, 800])
def test_it_fits_the_window(page, width, tmp_path):
    folder = Path(os.environ.get("DICLIP_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    page.set_viewport_size({"width": width, "height": 1000})
    for number, name in enumerate(("cams", "patches")):
        box = _explorer(page, number)
        box.scroll_into_view_if_needed()
        box.screenshot(path=folder / f"explorer-{name}-{width}.png")
        inner, outer = _picture(page, number).bounding_box(), box.bounding_box()
        assert inner["x"] >= outer["x"] - 1 and inner["x"] + inner["width"] <= outer["x"] + outer["width"] + 1
        assert inner["x"] + inner["width"] <= width and inner["width"] > 300


def test_the_console_has_no_complaint_of_ours(page):
    ours = ("widget", "ipyevents", "diclip", "comm")
    assert [said for said in page.complaints if any(word in said.lower() for word in ours)] == []
