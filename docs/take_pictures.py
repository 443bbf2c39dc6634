"""Make the pictures of the documentation: real servers, real runs of Locust, a real browser; two minutes.

    python docs/take_pictures.py            all pictures
    python docs/take_pictures.py step leak  some of them

It needs Chromium, and the packages of requirements.txt in the Python that runs it.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / "tests"))

from browser import Browser  # noqa: E402
from conftest import LOCUST, Program, free_port, wait_until  # noqa: E402  # Locust, and with it gevent, comes first

import gevent  # noqa: E402  # isort: skip

SECONDS = 90  # of each run: long enough for curves, as Locust notes a point of the report's charts every 5 s
RISING = ("--users=200", "--spawn-rate=3")
RUNS = {  # what the server does, and the load; all run at once, and none needs a tenth of a processor
    "healthy": (("healthy",), RISING),
    "step": (("step", "100"), RISING),
    "limit": (("limit", "100"), RISING),
    "queue": (("queue", "5"), ("--users=40", "--spawn-rate=0.5", "--chat-wait=0")),
    "leak": (("leak", "40"), ("--users=100", "--spawn-rate=50")),
    "restart": (("healthy",), ("--users=100", "--spawn-rate=50", "--chat-timeout=2")),
}
DOWN, UP = 30, 45  # seconds into the run "restart" when its server is killed, and when it is started again
CHARTS = "[...document.querySelectorAll('[_echarts_instance_]')]"


class Page(Browser):
    """A page of the browser that can save a part of what it shows."""

    def save(self, path: Path, first: str = "document.body", last: str = "document.body") -> None:
        """Save the page from the element ``first`` to the element ``last``, JavaScript expressions, as a PNG file, as
        soon as two pictures in a row are the same: before that, charts are still being drawn."""
        script = f"""(() => {{ const [a, b] = [{first}, {last}].map(e => e.getBoundingClientRect());
            return JSON.stringify({{x: 0, y: Math.max(0, a.top + scrollY - 8), width: innerWidth, scale: 1,
                                    height: b.bottom - a.top + 16}}); }})()"""
        before, picture = "", "-"
        while before != picture:
            clip = json.loads(self.evaluate(script))
            gevent.sleep(0.3)
            before, picture = (
                picture,
                self._call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)["data"],
            )
        path.write_bytes(base64.b64decode(picture))
        print(f"{path.name}: {path.stat().st_size // 1024} KB", flush=True)

    def wait_for_charts(self) -> None:
        """Wait until the three charts are on the page, with their canvases."""
        self.wait_for(f"{CHARTS}.filter(e => e.querySelector('canvas')).length >= 3")


@contextlib.contextmanager
def started(*command: str | Path) -> Iterator[Program]:
    """Run a program in the repository's folder; kill it at the end."""
    program = Program(*command)
    try:
        yield program
    finally:
        program.kill()


def server(stack: contextlib.ExitStack, port: int, *arguments: str) -> Program:
    """Start the server of the documentation; return once it listens."""
    running = stack.enter_context(started(sys.executable, DOCS / "sick_server.py", *arguments, f"--port={port}"))
    running.prints("Ctrl-C")
    return running


def run(name: str, report: Path, web_port: int | None) -> None:
    """Start server and load of that name; return when the report is written."""
    arguments, load = RUNS[name]
    port, bus = free_port(), free_port()
    web = (f"--web-port={web_port}", "--web-host=127.0.0.1", "--autostart", "--autoquit=0")
    mode = ("--headless",) if web_port is None else web
    with contextlib.ExitStack() as stack:
        serving = server(stack, port, *arguments)
        line = [f"--host=127.0.0.1:{port}", *load, f"--run-time={SECONDS}s", f"--html={report}", *mode]
        running = stack.enter_context(started(*LOCUST, "-f", "locustfile.py", f"--master-bind-port={bus}", *line))
        running.prints("Ramping to")
        if name == "restart":
            gevent.sleep(DOWN)
            serving.kill()
            gevent.sleep(UP - DOWN)
            server(stack, port, *arguments)
        running.ends(SECONDS + 60)
        print(
            "\n".join(["", f"{name}: {' '.join(arguments)}", running.output[running.output.index("Shutting down") :]])
        )


def main() -> None:
    """Make the pictures that the command line names."""
    parser = argparse.ArgumentParser(description="Make the pictures of the documentation, in about two minutes.")
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"of {', '.join(RUNS)} (default: all of them)")
    parser.add_argument("--output", type=Path, default=DOCS / "images", help="the folder (default docs/images)")
    options = parser.parse_args()
    chromium = shutil.which("chromium")
    if unknown := set(options.runs) - set(RUNS):
        parser.error(f"there is no run {', '.join(sorted(unknown))}: write some of {', '.join(RUNS)}")
    if chromium is None:
        parser.error("chromium is not installed: on Debian, apt-get install chromium")
    names, web_port = options.runs or list(RUNS), free_port()
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        reports = {name: Path(folder) / f"{name}.html" for name in names}
        runs = [gevent.spawn(run, n, reports[n], web_port if n == "healthy" else None) for n in names]
        if "healthy" in names:
            with Page(chromium, 1280, 900) as page:
                take_web_ui(page, web_port, options.output / "web-ui.png")
        gevent.joinall(runs, raise_error=True)
        for name, report in reports.items():
            with Page(chromium, 900, 900) as page:
                page.open(report.as_uri())
                page.wait_for_charts()
                page.save(options.output / f"{name}.png", f"{CHARTS}[0]", f"{CHARTS}[2]")
        if "healthy" in names:
            with Page(chromium, 1280, 900) as page:
                page.open(reports["healthy"].as_uri())
                page.wait_for_charts()
                page.save(options.output / "report.png", last=f"{CHARTS}[2]")


def take_web_ui(page: Page, port: int, path: Path) -> None:
    """Save the charts of the web UI shortly before the end of the run."""

    def ready() -> bool:
        page.open(f"http://127.0.0.1:{port}/")
        gevent.sleep(0.5)
        return "STATISTICS" in page.text().upper()

    wait_until(ready, 60)
    page.click("Charts")
    page.wait_for_charts()
    page.wait_for("/Users\\s+200\\b/.test(document.body.innerText)", SECONDS)
    gevent.sleep(SECONDS - 75)  # some more of the curve after all users have come
    page.save(path)


if __name__ == "__main__":
    main()
