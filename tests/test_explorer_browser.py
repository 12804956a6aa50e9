"""The explorers in a real browser: JupyterLab and Voila run notebook 08, and every kind of control moves the picture.

It needs Debian's chromium, or another one on the path. Without one it is skipped, but never under CI=true.
DICLIP_SCREENSHOTS names a folder for the screenshots.
"""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest

from diclip.settings import ROOT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TOKEN = "explore"
CI = os.environ.get("CI") == "true"
PATIENCE = 300_000  # ms, for each step: a machine may be busy, and a first run draws MiniVOC
EXPLORERS = ("cams", "patches", "diffusion", "scenes", "runs")  # in the order of the notebook
DRAWN = """([number, before]) => {
    const image = document.querySelectorAll('.diclip-explorer')[number]?.querySelector('img.widget-image');
    return image && image.naturalWidth > 300 && image.src !== before;
}"""
SETTINGS = {  # nothing pops up, and outputs that are out of sight stay in the page
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
}

pytestmark = pytest.mark.skipif(not CHROMIUM and not CI, reason="no chromium: apt-get install chromium")


@contextmanager
def serving(home: Path, *command: str) -> Iterator[str]:
    """Run a server on a copy of notebook 08; yield its address. It ends with its kernels, whatever happens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (home / "work").mkdir()
    shutil.copy(ROOT / "notebooks" / "08_explorer.ipynb", home / "work")
    environment = {name: value for name, value in os.environ.items() if name not in ("DICLIP_HEADLESS", "MPLBACKEND")}
    environment |= {"HOME": str(home), "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *command, f"--port={port}"]
    with open(home / "log", "w") as log:
        server = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, cwd=home / "work", start_new_session=True
        )
    try:
        _wait_for(f"http://127.0.0.1:{port}/api", server, home / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        _end(server)


def _end(server: subprocess.Popen) -> None:
    """Let a server end its kernels; then end whatever is left of its session."""
    server.terminate()
    try:
        server.wait(30)
    except subprocess.TimeoutExpired:  # a kernel that does not answer would hold it for ever
        server.kill()
        server.wait()
    own = [int(stat.parent.name) for stat in Path("/proc").glob("[0-9]*/stat") if _session(stat) == server.pid]
    for process in own:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _session(stat: Path) -> int | None:
    """Return the session of a process on Linux, none if it has ended meanwhile."""
    try:
        return int(stat.read_text().rpartition(")")[2].split()[3])
    except OSError:
        return None


def _wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE / 1000
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urlopen(address, timeout=30).read()
            return
        except (URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"no server at {address}:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def browser():
    """Start chromium once."""
    assert CHROMIUM, "CI needs chromium: apt-get install -y chromium"
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-dev-shm-usage"]  # as root, and in small containers
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


def _open(browser, address: str):
    """Open a page that collects what the console complains of."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(PATIENCE)
    page.complaints = []
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("console", lambda said: page.complaints.append(said.text) if said.type == "error" else None)
    page.goto(address)
    return page


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory):
    """Open the notebook in JupyterLab, run all of it, and wait for the explorers' pictures."""
    home = tmp_path_factory.mktemp("lab")
    for name, values in SETTINGS.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    command = ["jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--ServerApp.port_retries=0"]
    command += [f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={home / 'work'}"]
    with serving(home, *command) as address:
        _start_kernel(address)
        page = _open(browser, f"{address}/lab/tree/08_explorer.ipynb?token={TOKEN}&reset")
        page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").first.wait_for()  # else it asks for a kernel
        shown = page.locator(".jp-SideBar.jp-mod-left .lm-TabBar-tab.lm-mod-current")
        if shown.count():
            shown.first.click()  # the file browser takes the room
        page.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
        page.locator(".lm-Menu-itemLabel", has_text="Run All Cells").first.click()
        _all_drawn(page, tmp_path_factory.mktemp("seen"))
        yield page
        page.close()


def _start_kernel(address: str) -> None:
    """Start the notebook's kernel before the page does: on a busy machine JupyterLab starts two, and ends the first."""
    session = {"path": "08_explorer.ipynb", "name": "", "type": "notebook", "kernel": {"name": "python3"}}
    headers = {"Authorization": f"token {TOKEN}", "Content-Type": "application/json"}
    with urlopen(Request(f"{address}/api/sessions", json.dumps(session).encode(), headers), timeout=300) as answer:
        assert answer.status == 201


def _explorer(page, number: int):
    return page.locator(".diclip-explorer").nth(number)


def _picture(page, number: int):
    return _explorer(page, number).locator("img.widget-image").first


def _drawn(page, number: int) -> str:
    """Wait until an explorer's picture is there; return its address, which changes with the picture."""
    page.wait_for_function(DRAWN, arg=[number, ""])
    return _picture(page, number).get_attribute("src")


def _all_drawn(page, folder: Path) -> None:
    """Wait for all explorers; where one does not come, keep a screenshot and say what the page says."""
    try:
        for number in range(len(EXPLORERS)):
            _drawn(page, number)
    except Exception as error:
        _keep(page, "failed", folder)
        errors = page.locator('[data-mime-type="application/vnd.jupyter.error"]').all_inner_texts()
        prompts = page.locator(".jp-CodeCell .jp-InputPrompt").all_text_contents()
        lines = page.locator(".diclip-explorer .widget-html-content").all_inner_texts()
        raise AssertionError(f"no explorer {number}: {errors}, {prompts}, {page.complaints}, {lines}") from error


def _control(page, number: int, label: str):
    """Return the widget with that label."""
    box = _explorer(page, number).locator(".jupyter-widgets", has=page.locator(f"label:text-is('{label}')"))
    return box.last  # the innermost


def _changes(page, number: int, act) -> None:
    """Do something and wait until the picture is another one."""
    before, picture = _drawn(page, number), _picture(page, number)
    picture.scroll_into_view_if_needed()
    act()
    page.wait_for_function(DRAWN, arg=[number, before])


def _slide(page, number: int, label: str, key: str = "ArrowRight") -> None:
    _control(page, number, label).locator(".noUi-handle").press(key)


def test_no_cell_failed(page):
    page.locator(".jp-Notebook .jp-Cell").last.scroll_into_view_if_needed()
    page.wait_for_function(  # a prompt without a number or star is a hidden cell's
        "() => [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')]"
        ".every(prompt => !prompt.textContent.includes('*'))"
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
    _upload(page, {"name": "text.jpg", "mimeType": "image/jpeg", "buffer": b"no picture"})
    _explorer(page, 0).get_by_text("text.jpg: is no readable image").wait_for()
    _changes(page, 0, lambda: _upload(page, ROOT / "figures" / "minivoc.png"))
    _explorer(page, 0).get_by_text("has only ever seen MiniVOC's drawings").wait_for()
    _changes(page, 0, lambda: _slide(page, 0, "number", "ArrowLeft"))


def _upload(page, file) -> None:
    with page.expect_file_chooser() as chooser:
        _explorer(page, 0).get_by_role("button", name="upload").click()
    chooser.value.set_files(file)


def test_a_click_and_the_keyboard_move_the_patch(page):
    _changes(page, 1, lambda: _picture(page, 1).click(position={"x": 60, "y": 200}))
    _changes(page, 1, lambda: _slide(page, 1, "row"))
    _changes(page, 1, lambda: _slide(page, 1, "block", "ArrowLeft"))


def test_the_noise_of_the_diffusion_moves(page):
    _changes(page, 2, lambda: _slide(page, 2, "noise seed"))
    _changes(page, 2, lambda: _slide(page, 2, "timestep"))
    _changes(page, 2, lambda: _picture(page, 2).click(position={"x": 60, "y": 100}))


def test_a_scene_is_composed(page):
    _changes(page, 3, lambda: _control(page, 3, "place").locator("select").select_option("snow"))
    _changes(page, 3, lambda: _control(page, 3, "part wears").first.locator("select").select_option("hidden"))
    _changes(page, 3, lambda: _slide(page, 3, "distractors"))


def test_runs_are_compared(page):
    _changes(page, 4, lambda: _slide(page, 4, "image"))
    _changes(page, 4, lambda: _control(page, 4, "B").locator("select").select_option("excel-val"))
    _changes(page, 4, lambda: _control(page, 4, "look at").locator("select").select_option("numbers"))


def test_a_ladder_stands_side_by_side(page, tmp_path):
    """What the README shows."""
    own = _control(page, 0, "own words").locator("input")
    _changes(page, 0, lambda: (own.fill(""), own.press("Enter")))
    for label, option in (("method", "diclip"), ("side by side", "rungs"), ("up to rung", "rar")):
        _control(page, 0, label).locator("select").select_option(option)
    _explorer(page, 0).get_by_text("diclip, rar").wait_for()
    page.set_viewport_size({"width": 1280, "height": 2400})
    _keep(_explorer(page, 0), "explorer", tmp_path)


@pytest.mark.parametrize("width", [1280, 800])
def test_it_fits_the_window(page, width, tmp_path):
    page.set_viewport_size({"width": width, "height": 2400})  # high enough for each: a screenshot shows what is seen
    for number, name in enumerate(EXPLORERS):
        box = _explorer(page, number)
        box.scroll_into_view_if_needed()
        _keep(box, f"explorer-{name}-{width}", tmp_path)
        inner, outer = _picture(page, number).bounding_box(), box.bounding_box()
        assert inner["x"] >= outer["x"] - 1 and inner["x"] + inner["width"] <= outer["x"] + outer["width"] + 1
        assert inner["x"] + inner["width"] <= width and inner["width"] > 300


def _keep(shown, name: str, tmp_path: Path) -> None:
    folder = Path(os.environ.get("DICLIP_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    shown.screenshot(path=folder / f"{name}.png")


def test_the_console_has_no_complaint_of_ours(page):
    assert _ours(page) == []


def _ours(page) -> list[str]:
    words = ("widget", "ipyevents", "diclip", "comm")
    return [said for said in page.complaints if any(word in said.lower() for word in words)]


def test_voila_shows_it_to_who_has_the_token(browser, tmp_path):
    make = (ROOT / "Makefile").read_text().split("\nexplore:")[1].split("\n\n")[0]
    flags = shlex.split(make.partition("voila")[2].replace("\\\n", " "))
    options = [flag for flag in flags if flag.startswith("--")]
    with serving(tmp_path, "voila", "08_explorer.ipynb", "--no-browser", *options, f"--token={TOKEN}") as address:
        with urlopen(address, timeout=60) as answer:
            assert "/login" in answer.url
        page = _open(browser, f"{address}/?token={TOKEN}")
        _all_drawn(page, tmp_path)
        _changes(page, 0, lambda: _slide(page, 0, "number"))
        _changes(page, 1, lambda: _picture(page, 1).click(position={"x": 60, "y": 200}))
        _keep(_explorer(page, 0), "voila-cams-1280", tmp_path)
        assert _ours(page) == [] and page.locator(".voila-spinner-text, .jp-OutputArea-error").all_inner_texts() == []
        page.close()
