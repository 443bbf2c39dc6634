"""A real browser, Debian's Chromium without a window, driven through its DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import gevent
import websocket

# The switches keep it from looking up addresses of its maker, and let it run as root.
SWITCHES = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --remote-debugging-port=0 --remote-allow-origins=* --hide-scrollbars"
)


class Browser:
    """One page of a browser; use it in a ``with`` statement."""

    def __init__(self, program: str, width: int = 1400, height: int = 1000) -> None:
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        switches = [*SWITCHES.split(), f"--user-data-dir={self._folder.name}", f"--window-size={width},{height}"]
        self._process = subprocess.Popen(
            [program, *switches, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        port_file = Path(self._folder.name) / "DevToolsActivePort"
        limit = time.monotonic() + 30
        while not (port_file.exists() and port_file.read_text().count("\n")):
            assert time.monotonic() < limit and self._process.poll() is None, "the browser does not start"
            gevent.sleep(0.05)
        port, path = port_file.read_text().split("\n")[:2]
        self._numbers = itertools.count(1)
        self._socket = websocket.create_connection(f"ws://127.0.0.1:{port}{path}", timeout=30)
        self._session: str | None = None
        target = next(t for t in self._call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self._call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv())
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def open(self, address: str) -> None:
        """Go to a page."""
        self._call("Page.navigate", url=address)

    def evaluate(self, script: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        result = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, script: str, seconds: float = 20.0) -> Any:
        """Return the value of a JavaScript expression as soon as it is true."""
        limit = time.monotonic() + seconds
        while not (value := self.evaluate(script)):
            assert time.monotonic() < limit, f"{script} stays false on the page: {self.text()}"
            gevent.sleep(0.1)
        return value

    def text(self) -> str:
        """Return the text that a person sees."""
        return str(self.evaluate("document.body ? document.body.innerText : ''"))

    def see(self, text: str, seconds: float = 20.0) -> None:
        """Wait until the page shows text."""
        self.wait_for(f"document.body && document.body.innerText.includes({json.dumps(text)})", seconds)

    def fill(self, name: str, value: str) -> None:
        """Type into the form field of that name."""
        field = f"document.querySelector('[name={name}]')"
        self.wait_for(f"{field} !== null")
        self.evaluate(f"{field}.focus(), {field}.select()")
        self._call("Input.insertText", text=value)

    def click(self, text: str) -> None:
        """Click on the button, tab or link that bears the text."""
        candidates = "[...document.querySelectorAll('button, a, [role=tab], [role=button]')]"
        found = f"{candidates}.find(e => e.innerText.trim().toLowerCase() === {json.dumps(text.lower())})"
        self.wait_for(f"{found} !== undefined")
        self.evaluate(f"{found}.click()")

    def screenshot(self, path: Path) -> None:
        """Save what the page looks like as a PNG file."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))
