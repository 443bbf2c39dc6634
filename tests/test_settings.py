"""What can be written for the host and the options, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from conftest import LOCUST, ROOT, STANDALONE, Server, echo, environment_variables, free_port
from locust import between, events
from locust.argument_parser import get_parser
from locust.env import Environment

import locustfile
from locustfile import ChatClient, LineFraming, SettingError, TCPChatUser, TCPSocketClient, parse_address

LABEL = "x" * 64


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
    ],
)
def test_an_address_is_understood(host: str, port: str | None, address: tuple[str, int]) -> None:
    assert parse_address(host, port) == (*address, False)
    assert parse_address("tls://" + host.strip().removeprefix("tcp://"), port) == (*address, True)


@pytest.mark.parametrize(
    "host",
    [
        *("", None, " ", ":12345", "localhost", "localhost:", "localhost:0", "localhost:65536", "localhost:-1"),
        *("localhost:12345x", "localhost:٣", "localhost:1e3", "localhost:+1", "localhost:012345", "localhost: 12345"),
        *("http://localhost:12345", "https://localhost", "tcp:localhost:12345", "localhost:12345/", "a b:12345"),
        *(
            "tcp://",
            "tcp://tcp://a:1",
            "tls://tcp://a:1",
            "TLS://a:1",
            "::1",
            "::1:12345",
            "[::1]",
            "[::1]12345",
            "[]:12345",
            "[localhost:12345",
        ),
        *("user@localhost:12345", "a..b:12345", f"{LABEL}:12345", "localhost:123456789", "a:1:2", "ftp://a:1"),
    ],
)
def test_a_wrong_address_is_one_line_that_says_what_to_write_instead(host: str | None) -> None:
    with pytest.raises(SettingError, match=r"will not do: write [^\n]*$"):
        parse_address(host)


def given(*arguments: str) -> Environment:
    """Return an environment as a command line with these arguments makes it."""
    options = get_parser(default_config_files=[]).parse_args(list(arguments))
    return Environment(events=events, host=options.host, parsed_options=options)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one line on the standard error with which a command line with these arguments ends."""
    with pytest.raises(SystemExit) as end:
        given(*arguments)
    assert end.value.code != 0
    printed = capsys.readouterr()
    assert len((printed.err + printed.out).splitlines()) == 1
    return printed.err


def test_without_options_the_class_decides() -> None:
    class Mine(TCPChatUser):
        host = "localhost:1"
        framing = ">I"
        echo = "tag"
        timeout = 2
        wait_time = between(7, 7)

    user = Mine(given())
    assert (user.client.host, user.client.port) == ("localhost", 1)
    assert (user.client.echo, user.client.timeout) == ("tag", 2)
    assert user.client._framing.encode(b"x") == b"\0\0\0\1x"
    assert user.wait_time() == 7


def test_an_option_wins_over_the_class() -> None:
    class Mine(TCPChatUser):
        host = "localhost:1"
        framing = LineFraming
        echo = "tag"
        timeout = 2

    arguments = "--host=localhost --tcp-port=2 --chat-framing=<H --chat-echo=any --chat-timeout=0.5 --chat-wait=3-4"
    user = Mine(given(*arguments.split()))
    assert (user.client.host, user.client.port) == ("localhost", 2)
    assert (user.client.echo, user.client.timeout) == ("any", 0.5)
    assert user.client._framing.encode(b"x") == b"\1\0x"
    waits = {user.wait_time() for _ in range(50)}
    assert 3 <= min(waits) < max(waits) <= 4


@pytest.mark.parametrize(("text", "seconds"), [("0", 0), ("2", 2), ("0.5", 0.5)])
def test_a_wait_of_one_number_is_always_the_same(text: str, seconds: float) -> None:
    assert {ChatClient(given("--host=a:1", f"--chat-wait={text}")).wait_time() for _ in range(5)} == {seconds}


def test_a_factory_of_framings_may_be_a_function_in_the_class() -> None:
    class Mine(TCPChatUser):
        host = "localhost:1"
        framing = lambda: LineFraming()  # noqa: E731

    assert Mine(given()).client.fault is None


def test_an_option_left_empty_in_the_web_form_counts_as_not_given() -> None:
    options = Namespace(chat_echo="", chat_framing="", chat_timeout="", chat_wait="", tcp_port="")
    client = ChatClient(Environment(events=events, host="a:1", parsed_options=options)).client
    assert (client.fault, client.echo, client.timeout) == (None, "full", 5)


@pytest.mark.parametrize("option", ["chat_echo", "chat_framing", "chat_timeout", "chat_wait", "tcp_port"])
def test_a_wrong_option_from_the_web_form_is_the_clients_fault_not_an_exception(option: str) -> None:
    options = Namespace(**{option: "wrong"})
    host = "a" if option == "tcp_port" else "a:1"
    client = ChatClient(Environment(events=events, host=host, parsed_options=options)).client
    assert "'wrong' will not do: write" in str(client.fault)


def test_a_user_without_locusts_command_line_has_defaults() -> None:
    client = ChatClient(Environment(events=events, host="a:1")).client
    assert isinstance(client, TCPSocketClient)
    assert (client.fault, client.echo, client.timeout) == (None, "full", 5)


def run(*arguments: str | Path, **variables: str) -> tuple[int, str]:
    """Run a command to its end; return its exit code and what it printed."""
    done = subprocess.run(
        arguments, cwd=ROOT, env=environment_variables(**variables), capture_output=True, text=True, timeout=60
    )
    return done.returncode, "\n".join(
        line for line in (done.stdout + done.stderr).splitlines() if "Starting Locust" not in line
    )


NO_PORT = "'localhost' will not do: write host:port, such as localhost:12345 or tls://[::1]:12345, or add --tcp-port"
WRONG = [
    ("--host=localhost", NO_PORT),
    ("", "an empty setting will not do: write host:port"),
    ("--host=a:1 --chat-framing=>i", "argument --chat-framing: '>i' will not do: write line"),
    ("--host=192.0.2.1:5 --echo-server", "Cannot assign requested address: ('192.0.2.1', 5)"),
    ("--host=localhost --processes=2", NO_PORT),
]


@pytest.mark.parametrize(("arguments", "line"), WRONG)
def test_bad_input_ends_locust_with_one_line_before_any_user_starts(arguments: str, line: str) -> None:
    bus = str(free_port())  # of its own: on the usual port, workers of another run could join
    variables = {"LOCUST_MASTER_BIND_PORT": bus, "LOCUST_MASTER_NODE_PORT": bus}
    code, output = run(*LOCUST, "--headless", "--users=1", "--run-time=5s", *arguments.split(), **variables)
    assert code != 0
    assert line in output and "Traceback" not in output and "Ramping" not in output
    assert len([text for text in output.splitlines() if "Did you mean" not in text]) == 1


@pytest.mark.parametrize("host", ["", "http://localhost:12345", "localhost:0", "localhost:65536"])
def test_a_wrong_host_ends_locust_when_it_is_about_to_start(host: str) -> None:
    environment = given("--headless", f"--host={host}")
    environment.user_classes = [ChatClient]
    with pytest.raises(SystemExit, match=r"^locust: error: [^\n]* will not do: write [^\n]*$"):
        locustfile.prepare(environment)


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("--tcp-port=0", "argument --tcp-port: '0' will not do: write a port from 1 to 65535"),
        ("--chat-echo=yes", "argument --chat-echo: 'yes' will not do: write full"),
        ("--chat-timeout=0", "argument --chat-timeout: '0' will not do: write seconds above 0"),
        ("--chat-timeout=inf", "argument --chat-timeout: 'inf' will not do: write seconds above 0"),
        ("--chat-wait=-1", "argument --chat-wait: '-1' will not do: write seconds"),
        ("--chat-wait=soon", "argument --chat-wait: 'soon' will not do: write seconds"),
        ("--chat-max-p95=0", "argument --chat-max-p95: '0' will not do: write ms above 0"),
        ("--chat-max-fail-ratio=1.5", "argument --chat-max-fail-ratio: '1.5' will not do: write 0 to 1"),
    ],
)
def test_a_wrong_option_is_refused_by_the_command_line(
    argument: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert line in refused(capsys, "--headless", argument)


@pytest.mark.parametrize(
    "variable", ["TCP_PORT", "CHAT_FRAMING", "CHAT_ECHO", "CHAT_TIMEOUT", "CHAT_WAIT", "CHAT_MAX_P95"]
)
def test_a_wrong_environment_variable_is_one_line(
    variable: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "wrong")
    assert "'wrong' will not do: write" in refused(capsys, "--headless")


def test_the_port_of_the_echo_server_is_taken_is_one_line() -> None:
    server = Server(echo)
    code, output = run(*LOCUST, "--headless", "--echo-server", f"--host={server.address}")
    server.stop()
    assert code != 0
    assert "Address already in use: ('127.0.0.1', " in output
    assert len(output.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("localhost 0", "write a port from 1 to 65535"),
        ("localhost x", "write a port from 1 to 65535"),
        ("localhost:99999", "write a port from 1 to 65535"),
        ("http://localhost 1", "write host:port, such as localhost:12345"),
        ("--echo-server tls://localhost:1", "write tcp://localhost:1: the built-in echo server has no TLS"),
        ("--chat-timeout=x", "'x' will not do: write seconds above 0"),
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
    assert line in printed.err
    assert len([text for text in (printed.err + printed.out).splitlines() if "Did you mean" not in text]) == 1


def test_a_wrong_argument_ends_the_program_with_code_2_and_one_line() -> None:
    code, output = run(*STANDALONE, "localhost", "1", "2")
    assert code == 2
    assert "unrecognized arguments: 2" in output and len(output.splitlines()) == 1


def test_a_wrong_class_attribute_is_one_line() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import locustfile, types; "
        "locustfile.ChatClient.framing = 'lines'; "
        "locustfile.prepare(types.SimpleNamespace(parsed_options=types.SimpleNamespace(echo_server=False, "
        "headless=True, processes=None), runner=None, host='a:1', user_classes=[locustfile.ChatClient], "
        "events=locustfile.events))"
    )
    done, output = run(sys.executable, "-c", code)
    assert (done, output) == (
        1,
        "locust: error: 'lines' will not do: write line (default), raw, or a prefix like >I, <H",
    )


def test_the_options_can_stand_in_locust_conf(tmp_path: Path) -> None:
    (tmp_path / "locust.conf").write_text(f"chat-timeout = never\nlocustfile = {ROOT / 'locustfile.py'}\n")
    done = subprocess.run(
        [*LOCUST, "--headless", f"--host=127.0.0.1:{free_port()}"],
        cwd=tmp_path,
        env=environment_variables(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert "'never' will not do: write seconds above 0" in done.stderr
