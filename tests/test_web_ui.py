"""The web UI as a person uses it, in a real browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import gevent
import pytest
from browser import Browser
from conftest import LOCUST, Program, Server, echo, free_port, program, wait_until

Start = Callable[..., Program]


@pytest.fixture
def browser() -> Iterator[Browser]:
    """Return a page of Chromium; skip the test where it is not installed."""
    with Browser(program("chromium")) as page:
        yield page


def open_web_ui(start: Start, browser: Browser, *arguments: str, **variables: str) -> Program:
    port = free_port()
    running = start(*LOCUST, "--web-host", "127.0.0.1", "--web-port", str(port), *arguments, **variables)
    running.prints("Starting web interface")
    wait_until(lambda: can_open(browser, port))
    return running


def can_open(browser: Browser, port: int) -> bool:
    browser.open(f"http://127.0.0.1:{port}/")
    gevent.sleep(0.2)
    return "Start new load test" in browser.text()


def requests(browser: Browser, name: str) -> list[str]:
    """Return the cells of the statistics row of that name: type, name, requests, fails, …"""
    script = f"""[...document.querySelectorAll('tr')].map(r => [...r.cells].map(c => c.innerText))
        .find(cells => cells[1] === '{name}') || []"""
    return list(browser.evaluate(script))


def test_start_edit_stop_and_start_again(
    start: Start, browser: Browser, serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve(echo)
    running = open_web_ui(start, browser, f"--host={server.address}")
    browser.fill("userCount", "3")
    browser.fill("spawnRate", "10")
    browser.click("Custom parameters")
    browser.fill("chatWait", "0.1")
    browser.click("Start")
    browser.see("RUNNING")
    wait_until(lambda: server.open == 3)
    browser.wait_for("document.body.innerText.includes('echo_response')")
    wait_until(lambda: int((requests(browser, "echo_response") or ["", "", "0"])[2]) > 20)  # 0.1 s is used, not 1 to 3
    assert requests(browser, "echo_response")[3] == "0"
    # Sub-millisecond round trips are told apart in the table.
    assert any(float(cell) % 1 for cell in requests(browser, "echo_response")[4:10])

    browser.click("Edit")
    browser.fill("userCount", "6")
    browser.click("Update")
    wait_until(lambda: server.open == 6)

    browser.click("Stop")
    browser.see("STOPPED")
    wait_until(lambda: server.open == 0)

    browser.click("New")
    browser.fill("userCount", "2")
    browser.fill("spawnRate", "10")
    browser.click("Start")
    browser.see("RUNNING")
    wait_until(lambda: server.open == 2)
    browser.click("Stop")
    browser.see("STOPPED")
    wait_until(lambda: server.open == 0)
    assert "Traceback" not in running.output and "ERROR" not in running.output


def test_a_host_typed_into_the_form_is_used_and_a_wrong_one_says_what_to_write(
    start: Start, browser: Browser, serve: Callable[..., Server]
) -> None:
    server = serve(echo)
    running = open_web_ui(start, browser)
    browser.fill("userCount", "1")
    browser.fill("spawnRate", "1")
    browser.fill("host", "http://somewhere.example")
    browser.click("Start")
    browser.see("RUNNING")
    wait_until(lambda: requests(browser, "connect") != [])
    browser.click("Failures")
    browser.see("will not do: write host:port, such as localhost:12345")
    browser.click("Stop")
    browser.see("STOPPED")

    browser.click("New")
    browser.fill("host", f"tcp://{server.address}")
    browser.click("Start")
    wait_until(lambda: server.open == 1)
    browser.click("Stop")
    wait_until(lambda: server.open == 0)
    assert "Traceback" not in running.output


def test_a_wrong_option_typed_into_the_form_is_a_failed_connect_that_says_so(
    start: Start, browser: Browser, serve: Callable[..., Server]
) -> None:
    server = serve(echo)
    running = open_web_ui(start, browser, "--host=127.0.0.1", TCP_PORT=str(server.port))
    browser.click("Custom parameters")
    browser.fill("chatTimeout", "soon")
    browser.fill("userCount", "1")
    browser.click("Start")
    browser.see("RUNNING")
    browser.click("Failures")
    browser.see("'soon' will not do: write seconds above 0")
    assert server.opened == 0
    assert "Traceback" not in running.output
