"""The web UI as a person uses it, in a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from programs import QUICK_LOCUST, Program, Start, WebUI, program, wait_until
from servers import Serve, Server, echo, silent

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

OpenWebUI = Callable[..., Program]

# The switches let it run as root, and keep it from looking up addresses of its maker.
SWITCHES = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--no-first-run",
)
PATIENCE = 60_000  # ms that the browser waits for what a test looks for


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Return Chromium; skip the tests where it or Playwright is not installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = program("chromium")
    playwright.expect.set_options(timeout=PATIENCE)
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=chromium, args=list(SWITCHES))
        yield running
        running.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """Return an empty page of the browser."""
    opened = browser.new_page()
    opened.set_default_timeout(PATIENCE)
    yield opened
    opened.close()


@pytest.fixture
def open_web_ui(start: Start, page: Page) -> OpenWebUI:
    """Return a function that starts Locust and opens its start page, options unfolded."""

    def open_it(*arguments: str, **variables: str) -> Program:
        web_ui = WebUI()
        running = start(*QUICK_LOCUST, *web_ui.options, *arguments, **variables)
        running.prints("Starting web interface")
        wait_until(lambda: listens(page, web_ui.address))
        click(page, "Custom parameters")
        return running

    return open_it


def listens(page: Page, address: str) -> bool:
    """Open the start page; return whether there is one already."""
    from playwright.sync_api import Error

    try:
        page.goto(address)
    except Error:
        return False
    return True


def fill(page: Page, **fields: str) -> None:
    """Type texts into the form fields of these names."""
    for name, text in fields.items():
        page.locator(f"[name={name}]").fill(text)


def click(page: Page, name: str) -> None:
    """Click on the button of that name."""
    page.get_by_role("button", name=name, exact=True).click()


def see(page: Page, text: str) -> None:
    """Wait until the page shows a text."""
    page.get_by_text(text).first.wait_for()


def show(page: Page, tab: str) -> None:
    """Turn to a tab of a run."""
    page.get_by_role("tab", name=tab, exact=True).click()


def stop(page: Page, server: Server) -> None:
    """Stop the run, and wait until no user is connected."""
    click(page, "Stop")
    see(page, "STOPPED")
    wait_until(lambda: server.open == 0)


def statistics(page: Page, name: str) -> dict[str, str]:
    """Return what the table of statistics says of a row, by the heading of the column."""
    headings = page.locator("thead tr").first.locator("th").all_inner_texts()
    for row in page.locator("tbody tr").all():
        cells = row.locator("td").all_inner_texts()
        if name in cells:
            return dict(zip(headings, cells, strict=True))
    return {}


def requests(page: Page, name: str) -> int:
    """Return the number of requests that the table of statistics says of a row."""
    return int(statistics(page, name).get("# Requests", "0"))


def is_quiet(running: Program) -> bool:
    """Return whether Locust has logged no error."""
    return not re.search("Traceback|ERROR|CRITICAL", running.output)


def test_an_untouched_form_starts_a_run_that_can_be_edited_stopped_and_started_again(
    page: Page, open_web_ui: OpenWebUI, serve: Serve
) -> None:
    server = serve(echo)
    running = open_web_ui(f"--host={server.address}")
    click(page, "Start")
    see(page, "RUNNING")
    wait_until(lambda: requests(page, "echo_response") > 1)

    click(page, "Edit")
    fill(page, userCount="6", spawnRate="10")
    click(page, "Update")
    wait_until(lambda: server.open == 6)
    assert statistics(page, "Aggregated")["# Fails"] == "0"
    stop(page, server)

    click(page, "New")
    fill(page, userCount="2", spawnRate="10")
    click(page, "Start")
    see(page, "RUNNING")
    wait_until(lambda: server.open == 2)
    stop(page, server)
    assert is_quiet(running)


def test_an_echo_mode_chosen_from_the_list_and_a_typed_pause_apply(
    page: Page, open_web_ui: OpenWebUI, serve: Serve, tmp_path: Path
) -> None:
    server = serve(silent)
    files = "locustfile.py,tests/locustfiles/fixed_rows.py"
    open_web_ui("-f", files, f"--host={server.address}")
    choices = page.locator("select[name=chatEcho]")
    assert choices.input_value() == ""
    offered = choices.locator("option").all()
    values = [choice.get_attribute("value") for choice in offered]
    assert values == ["", "full", "tag", "any", "none"]

    choices.select_option("none")
    fill(page, chatWait="0.1")
    click(page, "Start")
    wait_until(lambda: requests(page, "send_chat") > 10)
    assert requests(page, "echo_response") == 0
    assert statistics(page, "Aggregated")["# Fails"] == "0"
    assert statistics(page, "fixed")["Median (ms)"] == "0.46"  # not cut to whole ms
    # The charts are drawings without text: this is the list that the page draws them from.
    # Half of all requests are a ``send_chat``, so their median would say nothing of the echoes.
    assert page.evaluate("window.templateArgs.percentiles_to_chart") == [0.75, 0.95, 0.99]


def test_what_is_wrong_in_the_form_is_a_failed_connect_that_says_what_to_write(
    page: Page, open_web_ui: OpenWebUI, serve: Serve
) -> None:
    server = serve(echo)
    running = open_web_ui()
    fill(page, host="http://somewhere.example")
    start_and_see_failure(page, "is not a valid --host: use host:port, such as localhost:12345")
    fill(page, host=server.address, chatTimeout="soon")
    start_and_see_failure(page, "'soon' is not a valid time-out: use seconds above 0")
    assert server.opened == 0

    fill(page, host=f"tcp://{server.address}", chatTimeout="60")
    click(page, "Start")
    wait_until(lambda: server.open == 1)
    assert "Traceback" not in running.output


def start_and_see_failure(page: Page, text: str) -> None:
    """Start a run, see a text among its failures, and go back to the form."""
    click(page, "Start")
    show(page, "Failures")
    see(page, text)
    click(page, "Stop")
    see(page, "STOPPED")
    click(page, "New")
    click(page, "Custom parameters")
