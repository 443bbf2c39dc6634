"""What can be written for the host and the options, and what is refused."""

from __future__ import annotations

import ast
import logging
import re
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
from locust import between, events
from locust.argument_parser import get_parser
from locust.env import Environment
from programs import LOCUST, ROOT, Program, Start, bus_options
from servers import Serve, echo, free_port

import locustfile
from locustfile import (
    ChatClient,
    CrlfFraming,
    LengthPrefixFraming,
    LineFraming,
    NulFraming,
    Pause,
    RawFraming,
    SettingError,
    TCPChatUser,
    parse_address,
    parse_echo,
    parse_framing,
    parse_pause,
    parse_port,
    parse_rate,
    parse_sources,
    parse_timeout,
    settings_of,
)

LABEL = "x" * 64


@pytest.fixture(autouse=True)
def keep_logging() -> Iterator[None]:
    """Turn logging on again, which ``prepare`` turns off for good before it ends Locust."""
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(
    ("host", "port", "address"),
    [
        ("localhost:12345", None, ("localhost", 12345)),
        ("localhost", "12345", ("localhost", 12345)),
        ("localhost:1", "12345", ("localhost", 1)),
        ("tcp://localhost:12345", None, ("localhost", 12345)),
        ("tcp://localhost", "65535", ("localhost", 65535)),
        ("[::1]:12345", None, ("::1", 12345)),
        ("tcp://[::1]:12345", "7", ("::1", 12345)),
        ("[fe80::1%eth0]", "12345", ("fe80::1%eth0", 12345)),
        ("10.0.0.1:80", None, ("10.0.0.1", 80)),
        (" chat_server.example.org:80 ", None, ("chat_server.example.org", 80)),
        ("채팅.example:80", None, ("채팅.example", 80)),
        ("TCP://localhost:80", None, ("localhost", 80)),
        ("chat.example.com.:80", None, ("chat.example.com.", 80)),
        ("[fe80::1%eth-0]:80", None, ("fe80::1%eth-0", 80)),
    ],
)
def test_an_address_is_understood(host: str, port: str | None, address: tuple[str, int]) -> None:
    without_scheme = host.strip().removeprefix("tcp://").removeprefix("TCP://")
    assert parse_address(host, port) == (*address, False)
    assert parse_address(f"tls://{without_scheme}", port) == (*address, True)
    assert parse_address(f"TLS://{without_scheme}", port) == (*address, True)


WRONG_HOSTS = [
    *("", None, " ", ":12345", "localhost", "localhost:", "localhost:0", "localhost:65536"),
    *("localhost:-1", "localhost:12345x", "localhost:٣", "localhost:1e3", "localhost:+1"),
    *("localhost:012345", "localhost: 12345", "http://localhost:12345", "https://localhost"),
    *("tcp:localhost:12345", "localhost:12345/", "a b:12345", "tcp://", "tcp://tcp://a:1"),
    *("tls://tcp://a:1", "TLS:/a:1", "::1", "::1:12345", "[::1]", "[::1]12345", "[]:12345"),
    *("[localhost:12345", "user@localhost:12345", "a..b:12345", f"{LABEL}:12345"),
    *("localhost:123456789", "a:1:2", "ftp://a:1", "a..:1", "[::1%]:1"),
]


@pytest.mark.parametrize("host", WRONG_HOSTS)
def test_a_wrong_address_is_one_line_that_says_what_to_write_instead(host: str | None) -> None:
    with pytest.raises(SettingError, match=r" is not a valid --host: use [^\n]*$"):
        parse_address(host)


@pytest.mark.parametrize(
    ("text", "pause"),
    [("0", (0, 0)), ("2", (2, 2)), ("0.5", (0.5, 0.5)), ("0.5-2", (0.5, 2)), ("3-3", (3, 3))],
)
def test_a_pause_is_one_number_or_two(text: str, pause: tuple[float, float]) -> None:
    assert parse_pause(text) == Pause(*pause)


@pytest.mark.parametrize(
    "text", ["3-1", "-1", "1-", "-", "1-2-3", "1 - 2", "soon", "1e3", "inf", ""]
)
def test_a_pause_that_is_none_or_runs_backwards_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match=r"use seconds, such as 2, 0\.5-2 or 0"):
        parse_pause(text)


@pytest.mark.parametrize(("text", "rate"), [("1", 1), ("0.1", 0.1), ("250", 250), ("1.50", 1.5)])
def test_a_rate_is_a_number_above_0(text: str, rate: float) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("rate", [3, 1 / 3, 0.00001])
def test_the_rate_of_a_class_is_any_number_above_0(rate: float) -> None:
    assert parse_rate(rate) == rate


@pytest.mark.parametrize(
    "rate",
    [
        *("0", "0.0", "-1", "1-2", "1/s", "1e3", "inf", "nan", "٣", "1."),
        *(0, -1, float("inf"), float("nan")),
    ],
)
def test_any_other_rate_is_refused(rate: object) -> None:
    with pytest.raises(SettingError, match=r"use messages a second above 0, such as 2 or 0\.1"):
        parse_rate(rate)


@pytest.mark.parametrize("text", ["0", "-1", "inf", "5s", "1-2"])
def test_a_timeout_that_is_not_above_0_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match="use seconds above 0"):
        parse_timeout(text)


@pytest.mark.parametrize("text", ["fuller", "FULL", "ful", "", None])
def test_a_mode_of_the_echo_that_is_none_is_refused(text: object) -> None:
    with pytest.raises(SettingError, match=r"use full \(default\), tag, any or none"):
        parse_echo(text)


@pytest.mark.parametrize("text", ["0", "65536", "-1", "x", "1.5", ""])
def test_a_port_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match="use a port from 1 to 65535"):
        parse_port(text)


def test_sources_are_addresses_with_commas_between_them() -> None:
    assert parse_sources("127.0.0.1") == ("127.0.0.1",)
    assert parse_sources("127.0.0.1,127.0.0.2,::1") == ("127.0.0.1", "127.0.0.2", "::1")


@pytest.mark.parametrize(
    "text",
    [
        *("localhost", "127.0.0.1,", "127.0.0.1, 127.0.0.2", "127.0.0.256"),
        *("127.0.0.1:80", "127.0.0.1;127.0.0.2"),
    ],
)
def test_sources_that_are_no_addresses_are_refused(text: str) -> None:
    with pytest.raises(SettingError, match=r"such as 127\.0\.0\.1,127\.0\.0\.2"):
        parse_sources(text)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("line", LineFraming),
        ("crlf", CrlfFraming),
        ("nul", NulFraming),
        ("raw", RawFraming),
        (">I", LengthPrefixFraming),
        ("<H", LengthPrefixFraming),
        ("B", LengthPrefixFraming),
    ],
)
def test_a_framing_has_a_name(name: str, kind: type) -> None:
    assert type(parse_framing(name)()) is kind


@pytest.mark.parametrize("name", ["lines", "CRLF", ">i", ">II", "4s", "", None, 3])
def test_another_name_of_a_framing_is_refused(name: object) -> None:
    with pytest.raises(SettingError, match=r"use line \(default\), crlf, nul, raw, or a prefix"):
        parse_framing(name)


# ------------------------------------------------------------------------- what wins over what


def given(*arguments: str) -> Environment:
    """Return an environment as a command line with these arguments makes it."""
    options = get_parser(default_config_files=[]).parse_args(list(arguments))
    return Environment(events=events, host=options.host, parsed_options=options)


class Own(TCPChatUser):
    """A class with settings of its own."""

    abstract = True
    host = "localhost:1"
    framing = ">I"
    echo = "tag"
    timeout = 2
    wait_time = between(7, 7)


def test_without_options_the_class_decides() -> None:
    settings = settings_of(Own, given())
    assert settings.addresses == (("localhost", 1, False),)
    assert settings.framing().encode(b"x") == b"\0\0\0\1x"
    assert (settings.echo, settings.timeout) == ("tag", 2)
    assert (settings.pause, settings.rate, settings.sources) == (None, None, ())
    assert Own(given()).wait_time() == 7


def test_an_option_wins_over_the_class() -> None:
    environment = given(
        "--host=localhost",
        "--tcp-port=2",
        "--chat-framing=<H",
        "--chat-echo=any",
        "--chat-timeout=0.5",
        "--chat-wait=3-4",
        "--chat-source=127.0.0.1,127.0.0.2",
    )
    settings = settings_of(Own, environment)
    assert settings.addresses == (("localhost", 2, False),)
    assert settings.framing().encode(b"x") == b"\1\0x"
    assert (settings.echo, settings.timeout) == ("any", 0.5)
    assert settings.pause == (3, 4)
    assert settings.sources == ("127.0.0.1", "127.0.0.2")
    waits = {Own(environment).wait_time() for _ in range(50)}
    assert 3 <= min(waits) < max(waits) <= 4


def test_either_of_rate_and_wait_wins_over_the_rate_of_the_class() -> None:
    class OpenLoop(Own):
        abstract = True
        rate = 5

    assert settings_of(OpenLoop, given()).rate == 5
    assert settings_of(OpenLoop, given("--chat-rate=0.5")).rate == 0.5
    assert settings_of(OpenLoop, given("--chat-wait=1")).rate is None


def test_a_rate_and_a_wait_together_are_refused() -> None:
    with pytest.raises(SettingError, match="use one of them: a rate is open loop"):
        settings_of(Own, given("--chat-rate=2", "--chat-wait=1"))


def test_the_default_settings() -> None:
    settings = settings_of(ChatClient, Environment(events=events, host="a:1"))
    assert settings.framing is LineFraming
    assert (settings.echo, settings.timeout) == ("full", 5)
    assert (settings.pause, settings.rate, settings.sources) == (None, None, ())


def test_a_wait_of_one_number_is_always_the_same() -> None:
    user = ChatClient(given("--host=a:1", "--chat-wait=0.5"))
    assert {user.wait_time() for _ in range(5)} == {0.5}


def test_a_factory_of_framings_may_be_a_function_in_the_class() -> None:
    class Mine(TCPChatUser):
        abstract = True
        host = "localhost:1"
        framing = lambda: LineFraming()  # noqa: E731

    assert isinstance(settings_of(Mine, given()).framing(), LineFraming)


def test_the_client_of_a_user_has_its_settings() -> None:
    client = Own(given()).client
    assert (client.host, client.port, client.timeout) == ("localhost", 1, 2)


KEYS = [option.key for option in locustfile.OPTIONS]


def test_options_left_empty_in_the_web_form_count_as_not_given() -> None:
    empty = Environment(
        events=events, host="a:1", parsed_options=Namespace(**dict.fromkeys(KEYS, ""))
    )
    assert settings_of(ChatClient, empty) == settings_of(
        ChatClient, Environment(events=events, host="a:1")
    )


@pytest.mark.parametrize("key", KEYS)
def test_a_wrong_option_from_the_web_form_is_refused(key: str) -> None:
    options = Namespace(**{key: "wrong"})
    environment = Environment(events=events, host="a:1", parsed_options=options)
    with pytest.raises(SettingError, match=r"'wrong' is not a valid [a-z-]+: use "):
        settings_of(ChatClient, environment)


# ------------------------------------------------------------------------- the command line


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one line on the standard error with which such a command line ends."""
    with pytest.raises(SystemExit) as end:
        given(*arguments)
    assert end.value.code != 0
    printed = capsys.readouterr()
    assert len((printed.err + printed.out).splitlines()) == 1
    return printed.err


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        (
            "--tcp-port=0",
            "argument --tcp-port: '0' is not a valid port: use a port from 1 to 65535",
        ),
        ("--chat-framing=>i", "argument --chat-framing: '>i' is not a valid framing: use line"),
        ("--chat-echo=yes", "argument --chat-echo: 'yes' is not a valid echo: use full"),
        (
            "--chat-timeout=0",
            "argument --chat-timeout: '0' is not a valid time-out: use seconds above 0",
        ),
        ("--chat-wait=-1", "argument --chat-wait: '-1' is not a valid wait: use seconds"),
        ("--chat-wait=3-1", "argument --chat-wait: '3-1' is not a valid wait: use seconds"),
        ("--chat-rate=0", "argument --chat-rate: '0' is not a valid rate: use messages a second"),
        (
            "--chat-source=me",
            "argument --chat-source: 'me' is not a valid source: use addresses of",
        ),
    ],
)
def test_a_wrong_option_is_refused_by_the_command_line(
    argument: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert line in refused(capsys, "--headless", argument)


@pytest.mark.parametrize("key", KEYS)
def test_a_wrong_environment_variable_is_one_line(
    key: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(key.upper(), "wrong")
    line = refused(capsys, "--headless")
    assert re.search("'wrong'.* is not a valid [a-z-]+: use ", line), line


@pytest.mark.parametrize("name", [option.name for option in locustfile.OPTIONS])
def test_an_empty_value_on_the_command_line_is_refused(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "an empty value is not a valid" in refused(capsys, "--headless", f"--{name}=")


NO_PORT = "'localhost' is not a valid --host: use host:port, such as localhost:12345"
NO_HOST = "an empty value is not a valid --host: use host:port"
NO_ADDRESS = "'192.0.2.1' is not a valid source: use an address that this machine has"


def what_ends_locust(environment: Environment, user_class: type[TCPChatUser]) -> str:
    """Return the one line with which Locust ends when it is about to start."""
    environment.user_classes = [user_class]
    with pytest.raises(SystemExit) as end:
        locustfile.prepare(environment)
    text = str(end.value.code)
    assert text.startswith("locust: error: ")
    assert "\n" not in text
    return text


class Chat(ChatClient):
    """A class that no run has written a host into."""

    abstract = True


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--host=", NO_HOST),
        ("--host=localhost", NO_PORT),
        ("--host=http://localhost:12345", "is not a valid --host: use host:port"),
        ("--host=localhost:65536", "is not a valid --host: use "),
        ("--host=a:1 --chat-source=127.0.0.1,192.0.2.1", NO_ADDRESS),
        ("--host=a:1 --chat-rate=1 --chat-wait=1", "use one of them"),
        ("--host=192.0.2.1:5 --echo-server", "Cannot assign requested address"),
    ],
)
def test_a_wrong_setting_ends_locust_when_it_is_about_to_start(arguments: str, line: str) -> None:
    assert line in what_ends_locust(given("--headless", *arguments.split()), Chat)


def test_a_wait_in_the_environment_and_a_rate_on_the_command_line_end_locust(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CHAT_WAIT", "1")
    text = what_ends_locust(given("--headless", "--host=a:1", "--chat-rate=2"), Chat)
    assert (
        "'--chat-rate=2 with --chat-wait=1' is not a valid pair of options: use one of them" in text
    )


def test_that_the_port_of_the_echo_server_is_taken_ends_locust(serve: Serve) -> None:
    host = f"--host={serve(echo).address}"
    text = what_ends_locust(given("--headless", "--echo-server", host), Chat)
    assert "Address already in use: ('127.0.0.1', " in text


def test_a_wrong_class_attribute_ends_locust_when_it_is_about_to_start() -> None:
    class Mistaken(Own):
        abstract = True
        framing = "lines"

    assert "'lines' is not a valid framing: use line" in what_ends_locust(
        given("--headless"), Mistaken
    )


@pytest.mark.parametrize(("name", "value"), [("rate", 0), ("timeout", 0), ("heartbeat", 0)])
def test_a_number_of_a_class_that_is_not_above_0_is_named_in_the_line(
    name: str, value: float
) -> None:
    mistaken = type("Mistaken", (Own,), {"abstract": True, name: value})
    assert "error: 0 is not a valid " in what_ends_locust(given("--headless"), mistaken)


def test_in_the_web_ui_the_host_may_be_missing_at_the_start() -> None:
    environment = given()
    environment.user_classes = [Chat]
    locustfile.prepare(environment)


def lines_of(running: Program) -> list[str]:
    """Return what Locust printed, less the lines with which every start begins."""
    usual = ("Starting Locust", "Starting web interface")
    return [line for line in running.output.splitlines() if not any(text in line for text in usual)]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--headless --host=localhost", NO_PORT),
        ("--headless --host=localhost --processes=2", NO_PORT),
        ("--headless --host=a:1 --chat-wait=3-1 --processes=2", "argument --chat-wait: '3-1' is"),
        ("--headless --host=a:1 --chat-source=127.0.0.1,192.0.2.1 --processes=2", NO_ADDRESS),
        ("--headless --host=192.0.2.1:5 --echo-server --processes=2", "Cannot assign requested"),
        ("--autostart --processes=2", NO_HOST),
        ("--host=localhost", NO_PORT),
    ],
)
def test_bad_input_ends_locust_and_its_workers_with_one_line_before_any_user_starts(
    start: Start, arguments: str, line: str
) -> None:
    """``ends`` waits until workers have closed the output too: so none is left behind."""
    web = ("--web-host=127.0.0.1", f"--web-port={free_port()}")
    run = ("--users=1", "--run-time=20s")
    running = start(*LOCUST, *web, *run, *bus_options(), *arguments.split())
    assert running.ends() not in (0, None)
    (only,) = lines_of(running)
    assert line in only


def test_the_options_can_stand_in_locust_conf(tmp_path: Path) -> None:
    settings = tmp_path / "locust.conf"
    settings.write_text("chat-timeout = 7\nchat-echo = any\n")
    options = get_parser(default_config_files=[str(settings)]).parse_args([])
    assert (options.chat_timeout, options.chat_echo) == ("7", "any")


# ------------------------------------------------------------------------- standalone


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("localhost 0", "use a port from 1 to 65535"),
        ("localhost x", "use a port from 1 to 65535"),
        ("localhost:99999", "is not a valid --host: use host:port with a port"),
        ("http://localhost 1", "use host:port, such as localhost:12345"),
        ("--echo-server tls://localhost:1", "use tcp://localhost:1: the built-in echo server"),
        ("--chat-timeout=x", "'x' is not a valid time-out: use seconds above 0"),
        ("--chat-rate=1 --chat-wait=1", "use one of them: a rate is open loop"),
        ("localhost 1 2", "unrecognized arguments: 2"),
        ("--nonsense", "unrecognized arguments: --nonsense"),
        ("--echo-server 192.0.2.1 5", "Cannot assign requested address: ('192.0.2.1', 5)"),
    ],
)
def test_wrong_arguments_end_the_standalone_mode_with_code_2_and_one_line(
    arguments: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        locustfile.main(arguments.split())
    assert end.value.code == 2
    printed = capsys.readouterr()
    said = [text for text in (printed.err + printed.out).splitlines() if "Did you mean" not in text]
    (only,) = said
    assert line in only


# ------------------------------------------------------------------------- what it needs


def test_the_file_needs_nothing_that_is_not_locusts_gevents_or_pythons() -> None:
    imported: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / "locustfile.py").read_text())):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module or "")
    packages = {name.partition(".")[0] for name in imported}
    assert packages - sys.stdlib_module_names == {"locust", "gevent"}
