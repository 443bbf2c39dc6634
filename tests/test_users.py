"""Users in real Locust runs inside the test, through ``Environment`` and its runner."""

from __future__ import annotations

import importlib.util
import random
import re
import socket
from collections import Counter

import gevent
import pytest
from gevent.event import Event
from locust import constant, events, stats, task
from locust.env import Environment
from locust.event import Events
from programs import ROOT, wait_until
from rows import RunUsers
from servers import Serve, echo, echo_after, free_port, lines, silent

from locustfile import LONG_TEXTS, SHORT_TEXTS, VERY_LONG_TEXTS, ChatClient, bucket_response_time


def test_what_the_client_counted_as_sent_is_what_the_server_counted_as_received(
    serve: Serve, run_users: RunUsers
) -> None:
    received: Counter[str] = Counter()

    def counting(connection: socket.socket) -> None:
        for line in lines(connection):
            received.update(lines=1, bytes=len(line) + 1)
            connection.sendall(line + b"\n")

    server = serve(counting)
    chat = run_users(ChatClient, server.address, users=20, chat_wait="0")
    wait_until(lambda: chat.count("echo_response") > 300)
    chat.runner.stop()
    wait_until(lambda: server.open == 0)
    # Rows of messages that were in flight come a moment after the stop.
    wait_until(lambda: chat.count("send_chat") == received["lines"])
    assert chat.row("send_chat").total_content_length == received["bytes"]
    in_flight_when_stopped = chat.count("send_chat") - chat.count("echo_response")
    assert 0 <= in_flight_when_stopped <= 20
    assert not chat.errors


def test_the_tasks_are_weighted_five_two_one() -> None:
    class Plain(ChatClient):
        pass

    weights = Counter(getattr(chosen, "__name__", "") for chosen in Plain.tasks)
    assert weights == {
        "short_message": 5,
        "long_message": 2,
        "very_long_message": 1,
    }


@pytest.mark.parametrize(
    ("texts", "smallest", "largest"),
    [
        (SHORT_TEXTS, 1, 60),
        (LONG_TEXTS, 100, 400),
        (VERY_LONG_TEXTS, 513, 1000),
    ],
    ids=["short", "long", "very long"],
)
@pytest.mark.parametrize("tag", ["", "[3f9a1c20.1] ", "[3f9a1c20.999999999] "])
def test_messages_have_the_sizes_that_their_tasks_promise(
    texts: tuple[str, ...], smallest: int, largest: int, tag: str
) -> None:
    for text in texts:
        message = f"{tag}{text}".encode()
        assert smallest <= len(message) <= largest
        assert text == text.strip()


def test_the_messages_are_korean_and_latin_and_hold_emoji() -> None:
    everything = " ".join((*SHORT_TEXTS, *LONG_TEXTS))
    assert re.search("[가-힣]", everything)
    assert re.search("[A-Za-z]", everything)
    assert re.search("[\U0001f300-\U0001faff]", everything)


def test_a_scenario_is_one_more_task_method(serve: Serve, run_users: RunUsers) -> None:
    """The README's example: a command, answered with a text of the server's own."""
    received: list[bytes] = []

    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            received.append(line)
            answer = b"done: special" if line.startswith(b"/command") else line
            connection.sendall(answer + b"\n")

    class WithCommand(ChatClient):
        @task(3)
        def special_command(self) -> None:
            number = random.randint(1, 100)
            self.client.send_chat(f"/command special_{number}")

    chat = run_users(WithCommand, serve(server).address, users=5, chat_wait="0")
    wait_until(lambda: chat.count("echo_response") > 200)
    assert not chat.errors
    commands = [line for line in received if line.startswith(b"/")]
    assert 0 < len(commands) < len(received)
    for command in commands:
        assert re.fullmatch(rb"/command special_\d{1,3}", command)


def test_users_carry_on_when_the_server_is_killed_and_started_again(
    serve: Serve, run_users: RunUsers
) -> None:
    server = serve(echo)
    chat = run_users(ChatClient, server.address, users=10, chat_wait="0.05")
    wait_until(lambda: chat.count("echo_response") > 50)
    server.stop()
    wait_until(lambda: any("ConnectionRefused" in error for error in chat.errors))
    again = serve(echo, server.port)
    wait_until(lambda: again.open == 10)
    before = chat.count("echo_response")
    wait_until(lambda: chat.count("echo_response") > before + 50)
    assert chat.runner.exceptions == {}


def test_a_server_that_drops_connections_shows_as_disconnects_and_users_come_back(
    serve: Serve, run_users: RunUsers
) -> None:
    def server(connection: socket.socket) -> None:
        for number, line in enumerate(lines(connection)):
            connection.sendall(line + b"\n")
            if number == 2:
                break

    dropping = serve(server)
    chat = run_users(ChatClient, dropping.address, users=5, chat_wait="0.02")
    wait_until(lambda: dropping.opened > 30)
    wait_until(lambda: chat.row("disconnect").num_failures > 10)
    assert chat.errors <= {
        "disconnect: ConnectionClosed('The server closed the connection.')",
        "disconnect: ConnectionResetError(104, 'Connection reset by peer')",
        "echo_response: ConnectionClosed('The server closed the connection.')",
    }


def test_lowering_the_user_count_closes_the_connections_of_those_who_leave(
    serve: Serve, run_users: RunUsers
) -> None:
    server = serve(echo_after(0.05))
    chat = run_users(ChatClient, server.address, users=8, chat_wait="0")
    wait_until(lambda: server.open == 8)
    wait_until(lambda: chat.count("echo_response") > 20)
    chat.runner.start(3, spawn_rate=10)
    wait_until(lambda: server.open == 3)
    chat.runner.stop()
    wait_until(lambda: server.open == 0)
    assert not chat.errors


def test_messages_in_flight_at_the_stop_are_not_failures(serve: Serve, run_users: RunUsers) -> None:
    received: list[bytes] = []
    server = serve(lambda connection: received.extend(lines(connection)))
    chat = run_users(ChatClient, server.address, users=5, chat_wait="0", chat_timeout="60")
    wait_until(lambda: len(received) == 5)
    chat.runner.stop()
    wait_until(lambda: server.open == 0)
    assert chat.count("send_chat") == 5
    assert chat.count("echo_response") == 0
    assert not chat.errors


def test_with_a_stop_timeout_messages_in_flight_are_finished(
    serve: Serve, run_users: RunUsers
) -> None:
    received: list[bytes] = []
    stopping = Event()

    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            received.append(line)
            stopping.wait()
            connection.sendall(line + b"\n")

    chat = run_users(
        ChatClient,
        serve(server).address,
        users=10,
        chat_wait="0",
        stop_timeout=60,
    )
    chat.environment.events.test_stopping.add_listener(lambda **_: stopping.set())
    wait_until(lambda: len(received) == 10)
    chat.runner.stop()
    assert chat.count("send_chat") == len(received)
    assert chat.count("echo_response") == len(received)
    assert not chat.errors


@pytest.mark.parametrize(
    "loop", [{"chat_wait": "0"}, {"chat_rate": "1000"}], ids=["closed", "open"]
)
def test_against_a_dead_port_a_user_makes_few_attempts_and_sends_nothing(
    run_users: RunUsers, loop: dict[str, str]
) -> None:
    chat = run_users(ChatClient, f"127.0.0.1:{free_port()}", users=20, **loop)
    wait_until(lambda: chat.row("connect").num_failures >= 20)
    gevent.sleep(0.5)
    # About 5 each in this time, as the pauses grow; hundreds without pauses.
    assert chat.row("connect").num_failures <= 20 * 20
    assert chat.count("send_chat") == 0
    assert chat.errors == {"connect: ConnectionRefusedError(111, 'Connection refused')"}


def test_users_of_a_silent_server_fail_in_one_group_at_the_timeout(
    serve: Serve, run_users: RunUsers
) -> None:
    server = serve(silent)
    chat = run_users(ChatClient, server.address, users=20, chat_wait="0", chat_timeout="1")
    wait_until(lambda: chat.count("echo_response") >= 20)
    assert chat.errors == {"echo_response: EchoTimeout('No echo came within the time-out.')"}
    assert min(chat.rows.times("echo_response")) >= 1000
    assert server.opened == 20


def test_a_user_connects_before_it_has_anything_to_say(serve: Serve, run_users: RunUsers) -> None:
    class Silent(ChatClient):
        tasks = [lambda user: gevent.sleep(60)]  # noqa: RUF012  # as Locust documents it

    server = serve(echo)
    chat = run_users(Silent, server.address)
    wait_until(lambda: server.open == 1)
    wait_until(lambda: chat.count("connect") == 1)


def test_a_user_whose_own_on_start_forgets_to_connect_still_chats(
    serve: Serve, run_users: RunUsers
) -> None:
    class Forgetful(ChatClient):
        def on_start(self) -> None:
            pass

    chat = run_users(Forgetful, serve(echo).address, chat_wait="0")
    wait_until(lambda: chat.count("echo_response") > 10)
    assert not chat.errors


def test_a_login_is_made_on_every_connection_and_has_a_row_of_its_own(
    serve: Serve, run_users: RunUsers
) -> None:
    first_lines: list[bytes] = []

    def server(connection: socket.socket) -> None:
        for number, line in enumerate(lines(connection)):
            if number == 0:
                first_lines.append(line)
            connection.sendall(line + b"\n")
            if number == 3:
                break

    class Member(ChatClient):
        wait_time = constant(0)

        def on_connect(self) -> None:
            self.client.send_chat("/login", echo="any")

    chat = run_users(Member, serve(server).address)
    wait_until(lambda: len(first_lines) > 3)
    wait_until(lambda: chat.count("login") > 3)
    assert set(first_lines) == {b"/login"}
    assert chat.count("connect") >= len(first_lines)


@pytest.mark.parametrize(
    ("host", "options", "instead"),
    [
        ("http://a", {}, "use host:port, such as localhost:12345"),
        (
            "127.0.0.1",
            {"tcp_port": "wrong"},
            "'wrong' is not a valid port: use a port from 1 to 65535",
        ),
        ("a:1", {"chat_rate": "1", "chat_wait": "1"}, "use one of them: a rate is open loop"),
    ],
)
def test_a_wrong_setting_typed_into_the_web_ui_is_a_failed_connect_that_says_it(
    run_users: RunUsers, host: str, options: dict[str, str], instead: str
) -> None:
    chat = run_users(ChatClient, host, **options)
    wait_until(lambda: chat.row("connect").num_failures > 1)
    (error,) = chat.errors
    assert error.startswith("connect: SettingError(")
    assert instead in error
    assert chat.runner.exceptions == {}


def test_two_significant_digits_below_10_ms_and_locusts_own_buckets_above() -> None:
    buckets = {
        0.0123: 0.012,
        0.123: 0.12,
        0.987: 0.99,
        1.234: 1.2,
        9.87: 9.9,
        12.3: 12,
        147: 150,
        3432: 3400,
        58760: 59000,
    }
    for milliseconds, bucket in buckets.items():
        assert bucket_response_time(milliseconds) == bucket
    assert stats.bucket_response_time is bucket_response_time


def test_percentiles_below_a_millisecond_are_told_apart() -> None:
    seen = stats.RequestStats()
    for response_time in (0.0512, 0.131, 0.272):
        # It takes a float as well, as Locust's own clients give it.
        seen.log_request("TCP", "echo_response", response_time, 0)  # type: ignore[arg-type]
    row = seen.get("echo_response", "TCP")
    assert row.get_response_time_percentile(0.1) == 0.051
    assert row.get_response_time_percentile(0.5) == 0.13
    assert row.get_response_time_percentile(0.9) == 0.27


def test_the_charts_show_percentiles_above_the_median() -> None:
    """Half of all requests are a ``send_chat``: their median would say nothing of the echoes."""
    assert stats.PERCENTILES_TO_CHART == [0.75, 0.95, 0.99]


def test_the_file_can_be_loaded_twice_as_with_a_plugin_beside_it() -> None:
    hooks = (events.init_command_line_parser, events.init, events.test_start)
    listeners = [list(hook._handlers) for hook in hooks]  # Locust has no public way to take one off
    specification = importlib.util.spec_from_file_location("again", ROOT / "locustfile.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
        user = module.ChatClient(Environment(events=Events(), host="a:1"))
        assert user.client.host == "a"
        assert user.client.port == 1
    finally:
        for hook, before in zip(hooks, listeners, strict=True):
            hook._handlers = before
        stats.bucket_response_time = bucket_response_time  # type: ignore[assignment]
