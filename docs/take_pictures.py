"""Make the pictures of the documentation: real servers, real runs of Locust, a real browser.

    python docs/take_pictures.py            all pictures, in about two minutes
    python docs/take_pictures.py step leak  some of them; "healthy" makes those of the web UI too

It needs Debian's Chromium, and the packages of tests/requirements.txt in the Python that runs it.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / "tests"))

# Locust, and with it gevent, comes first.
from programs import LOCUST, ROOT, Program, wait_until  # noqa: E402
from servers import free_port  # noqa: E402

import gevent  # noqa: E402  # isort: skip
from playwright.sync_api import FloatRect, Page, sync_playwright  # noqa: E402

SECONDS = 90  # of each run: Locust notes a point of the report's charts every 5 s
RISING = "--users=200 --spawn-rate=3"
TEN = "--users=10 --spawn-rate=10"
# What the server does, and the load. All run at once, and none needs a tenth of a processor.
RUNS = {
    "healthy": ("healthy", RISING),
    "step": ("step 100", RISING),
    "limit": ("limit 100", RISING),
    "queue": ("queue 5", "--users=40 --spawn-rate=0.5 --chat-wait=0"),
    "leak": ("leak 40", "--users=100 --spawn-rate=50"),
    "restart": ("healthy", "--users=100 --spawn-rate=50 --chat-timeout=2"),
    "closed": ("stall 2000", f"{TEN} --chat-wait=0.1"),
    "open": ("stall 2000", f"{TEN} --chat-rate=8"),
}
# Seconds into the run "restart" when its server is killed, and when it is started again.
DOWN, UP = 30, 45
LOADING = (*LOCUST, "-f", ROOT / "locustfile.py")
CHARTS = "[_echarts_instance_]:has(canvas)"
WIDE, NARROW = 1280, 900  # pixels


# -------------------------------------------------------------------------------------- the runs


@contextlib.contextmanager
def started(*command: str | Path) -> Iterator[Program]:
    """Run a program in the project's folder; kill it at the end."""
    program = Program(*command)
    try:
        yield program
    finally:
        program.kill()


@contextlib.contextmanager
def serving(port: int, illness: str) -> Iterator[Program]:
    """Run the server of the documentation; it listens when the block begins."""
    script = DOCS / "sick_server.py"
    arguments = [*illness.split(), f"--port={port}"]
    with started(sys.executable, script, *arguments) as server:
        server.prints("Ctrl-C")
        yield server


def web_options(port: int) -> list[str]:
    """Return the options of Locust for a web UI of this machine alone."""
    return [f"--web-port={port}", "--web-host=127.0.0.1"]


def run(name: str, report: Path, web_port: int | None) -> None:
    """Start server and load of that name; return when the report is written."""
    illness, load = RUNS[name]
    mode = ["--headless"]
    if web_port is not None:
        mode = [*web_options(web_port), "--autostart", "--autoquit=0"]
    with contextlib.ExitStack() as stack:
        port = free_port()
        server = stack.enter_context(serving(port, illness))
        locust = started(
            *LOADING,
            *load.split(),
            *mode,
            f"--host=127.0.0.1:{port}",
            f"--run-time={SECONDS}s",
            f"--html={report}",
        )
        running = stack.enter_context(locust)
        running.prints("Ramping to")
        if name == "restart":
            gevent.sleep(DOWN)
            server.kill()
            gevent.sleep(UP - DOWN)
            stack.enter_context(serving(port, illness))
        running.ends(SECONDS + 60)
        end = running.output.index("Shutting down")
        print(f"\n{name}: {illness}\n{running.output[end:]}")


# ----------------------------------------------------------------------------------- the browser


@contextlib.contextmanager
def browser_page(width: int) -> Iterator[Page]:
    """Open a page of Chromium."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        try:
            yield browser.new_page(viewport={"width": width, "height": 900})
        finally:
            browser.close()


def wait_for_charts(page: Page) -> None:
    """Wait until the three charts are on the page."""
    page.locator(CHARTS).nth(2).wait_for()


def area_of_charts(page: Page, *, from_top: bool) -> FloatRect:
    """Return the area of the three charts, as wide as the page, or all from its top to them."""
    first = page.locator(CHARTS).nth(0).bounding_box()
    last = page.locator(CHARTS).nth(2).bounding_box()
    size = page.viewport_size
    assert first is not None
    assert last is not None
    assert size is not None
    top = 0.0 if from_top else max(0.0, first["y"] - 8)
    return {
        "x": 0,
        "y": top,
        "width": size["width"],
        "height": bottom_of(last) - top,
    }


def bottom_of(area: FloatRect) -> float:
    """Return where an area of a page ends, with a small margin."""
    return area["y"] + area["height"] + 8


def save(page: Page, path: Path, area: FloatRect | None = None) -> None:
    """Save the page, or an area of it, as a PNG file.

    It is taken until two pictures in a row are the same: before that, charts are still being drawn.
    """
    before, picture = b"", b"-"
    while before != picture:
        page.wait_for_timeout(300)
        before, picture = picture, page.screenshot(full_page=True, clip=area)
    path.write_bytes(picture)
    print(f"{path.name}: {len(picture) // 1024} KB", flush=True)


def listens(port: int) -> bool:
    """Return whether a program listens on a port of 127.0.0.1."""
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


def take_form(path: Path) -> None:
    """Save the form of the web UI, with a mode chosen in its drop-down."""
    port = free_port()
    locust = started(*LOADING, "--host=localhost:12345", *web_options(port))
    with locust, browser_page(NARROW) as page:
        wait_until(lambda: listens(port))
        page.set_viewport_size({"width": NARROW, "height": 2 * NARROW})  # so that nothing scrolls
        page.goto(f"http://127.0.0.1:{port}/")
        page.get_by_text("Custom parameters").click()
        page.get_by_role("combobox").select_option("tag")
        start = page.get_by_role("button", name="Start")
        start.click(trial=True)  # clicks nothing, but waits until the form has unfolded
        button = start.bounding_box()
        assert button is not None
        area: FloatRect = {"x": 0, "y": 0, "width": NARROW, "height": bottom_of(button)}
        save(page, path, area)


def take_web_ui(port: int, path: Path) -> None:
    """Save the charts of the web UI shortly before the end of the run."""
    deadline = time.monotonic() + SECONDS - 10
    with browser_page(WIDE) as page:
        page.goto(f"http://127.0.0.1:{port}/")
        page.get_by_role("tab", name="Charts").click()
        wait_for_charts(page)
        page.wait_for_function("/Users\\s+200\\b/.test(document.body.innerText)", timeout=0)
        seconds = max(0.0, deadline - time.monotonic())
        page.wait_for_timeout(seconds * 1000)
        save(page, path)


def take_report(report: Path, path: Path, *, from_top: bool = False) -> None:
    """Save the charts of a report, or all of it from its top to them."""
    with browser_page(WIDE if from_top else NARROW) as page:
        page.goto(report.as_uri())
        wait_for_charts(page)
        save(page, path, area_of_charts(page, from_top=from_top))


# --------------------------------------------------------------------------------- command line


def take_pictures(names: list[str], output: Path) -> None:
    """Run what the names say, all at once, and save the pictures in a folder."""
    output.mkdir(parents=True, exist_ok=True)
    web_port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        reports = {name: Path(folder) / f"{name}.html" for name in names}
        runs = []
        for name, report in reports.items():
            port = web_port if name == "healthy" else None
            runs.append(gevent.spawn(run, name, report, port))
        if "healthy" in reports:
            wait_until(lambda: listens(web_port))
            take_web_ui(web_port, output / "web-ui.png")
        gevent.joinall(runs, raise_error=True)
        for name, report in reports.items():
            take_report(report, output / f"{name}.png")
        if "healthy" in reports:
            take_report(reports["healthy"], output / "report.png", from_top=True)
            take_form(output / "form.png")


def main() -> None:
    """Make the pictures that the command line names."""
    parser = argparse.ArgumentParser(description="Make the pictures of the documentation.")
    names = ", ".join(RUNS)
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help=f"of {names} (default: all)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=DOCS / "images",
        help="the folder",
    )
    options = parser.parse_args()
    unknown = sorted(set(options.runs) - set(RUNS))
    if unknown:
        parser.error(f"there is no run {', '.join(unknown)}: write some of {names}")
    if shutil.which("chromium") is None:
        parser.error("chromium is not installed: on Debian, apt-get install chromium")
    take_pictures(options.runs or list(RUNS), options.output)


if __name__ == "__main__":
    main()
