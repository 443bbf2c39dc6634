"""Users in real Locust runs inside the test, through ``Environment`` and its runner."""

from __future__ import annotations

import importlib.util
import random
import re
import socket
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from conftest import ROOT, Server, echo, free_port, lines, wait_until
from locust import User, constant, events, stats, task
from locust.env import Environment
from locust.event import Events

from locustfile import LONG_TEXTS, SHORT_TEXTS, VERY_LONG_TEXTS, ChatClient, bucket_response_time

Serve = Callable[..., Server]
Run = Callable[..., Environment]


@pytest.fixture
def run() -> Iterator[Run]:
    """Return a function that starts users of a class against a host, with options as the command line gives them."""
    environments: list[Environment] = []

    def start(user_class: type[User], host: str, users: int = 1, **options: str) -> Environment:
        environment = Environment(
            user_classes=[user_class], host=host, events=Events(), parsed_options=Namespace(**options)
        )
        environments.append(environment)
        environment.create_local_runner().start(users, spawn_rate=users)
        return environment

    yield start
    for environment in environments:
        assert environment.runner is not None
        environment.runner.quit()


def row(environment: Environment, name: str) -> Any:
    return environment.stats.get(name, "TCP")


def errors(environment: Environment) -> Counter[str]:
    return Counter({f"{e.name}: {e.error!r}": e.occurrences for e in environment.stats.errors.values()})


def counting(counts: Counter[str]) -> Callable[[socket.socket], None]:
    """Return an echo server that counts lines and bytes."""

    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            counts.update(lines=1, bytes=len(line) + 1)
            connection.sendall(line + b"\n")

    return server


def test_what_the_client_counted_as_sent_is_what_the_server_counted_as_received(serve: Serve, run: Run) -> None:
    received: Counter[str] = Counter()
    server = serve(counting(received))
    environment = run(ChatClient, server.address, users=20, chat_wait="0")
    wait_until(lambda: row(environment, "echo_response").num_requests > 2000)
    environment.runner.stop()  # type: ignore[union-attr]
    wait_until(lambda: server.open == 0)
    sent = row(environment, "send_chat")
    assert (sent.num_requests, sent.total_content_length) == (received["lines"], received["bytes"])
    assert 0 <= sent.num_requests - row(environment, "echo_response").num_requests <= 20  # in flight when stopped
    assert not environment.stats.errors


def test_the_tasks_are_weighted_five_two_one_and_have_the_sizes_that_they_promise(serve: Serve, run: Run) -> None:
    assert Counter(method.__name__ for method in ChatClient.tasks) == {  # type: ignore[union-attr]
        "short_message": 5,
        "long_message": 2,
        "very_long_message": 1,
    }
    for texts, smallest, largest in ((SHORT_TEXTS, 1, 60), (LONG_TEXTS, 100, 400), (VERY_LONG_TEXTS, 513, 1000)):
        for text in texts:
            assert text == text.strip()
            tags = ("", "[3f9a1c20.1] ", "[3f9a1c20.999999999] ")
            assert all(smallest <= len(f"{tag}{text}\n".encode()) <= largest for tag in tags)
            assert smallest <= len(text.encode())
    everything = " ".join((*SHORT_TEXTS, *LONG_TEXTS))
    assert all(re.search(kind, everything) for kind in ("[가-힣]", "[A-Za-z]", "[\U0001f300-\U0001faff]"))


def test_a_scenario_is_one_more_task_method(serve: Serve, run: Run) -> None:
    """The README's example: a command, answered with a text of the server's own."""
    received: list[bytes] = []

    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            received.append(line)
            connection.sendall(b"done: special\n" if line.startswith(b"/command") else line + b"\n")

    class WithCommand(ChatClient):
        @task(3)
        def special_command(self) -> None:
            command = f"/command special_{random.randint(1, 100)}"
            self.client.send_chat(command)

    environment = run(WithCommand, serve(server).address, users=5, chat_wait="0")
    wait_until(lambda: row(environment, "echo_response").num_requests > 500)
    assert not environment.stats.errors
    commands = [line for line in received if line.startswith(b"/")]
    assert all(re.fullmatch(rb"/command special_\d{1,3}", line) for line in commands)
    assert 0.1 < len(commands) / len(received) < 0.5  # 3 of 11


def test_users_carry_on_when_the_server_is_killed_and_load_it_again_within_seconds(serve: Serve, run: Run) -> None:
    server = serve(echo)
    environment = run(ChatClient, server.address, users=10, chat_wait="0.05")
    wait_until(lambda: row(environment, "echo_response").num_requests > 50)
    server.stop()
    wait_until(lambda: any("ConnectionRefused" in text for text in errors(environment)))
    gevent.sleep(1)
    again = serve(echo, server.port)
    wait_until(lambda: again.open == 10, 8)
    before = row(environment, "echo_response").num_requests
    wait_until(lambda: row(environment, "echo_response").num_requests > before + 50)
    assert environment.runner.exceptions == {}  # type: ignore[union-attr]


def test_a_server_that_drops_connections_shows_as_disconnects_and_users_come_back(serve: Serve, run: Run) -> None:
    def server(connection: socket.socket) -> None:
        for number, line in enumerate(lines(connection)):
            connection.sendall(line + b"\n")
            if number == 2:
                break

    dropping = serve(server)
    environment = run(ChatClient, dropping.address, users=5, chat_wait="0.02")
    wait_until(lambda: dropping.opened > 30)
    assert set(errors(environment)) <= {
        "disconnect: ConnectionClosed('The server closed the connection.')",
        "disconnect: ConnectionResetError(104, 'Connection reset by peer')",
        "echo_response: ConnectionClosed('The server closed the connection.')",
    }
    assert row(environment, "disconnect").num_failures > 10


def test_lowering_the_user_count_closes_the_connections_of_those_who_leave(serve: Serve, run: Run) -> None:
    server = serve(lambda connection: [gevent.sleep(0.05) or connection.sendall(x + b"\n") for x in lines(connection)])
    environment = run(ChatClient, server.address, users=8, chat_wait="0")
    wait_until(lambda: server.open == 8 and row(environment, "echo_response").num_requests > 20)
    environment.runner.start(3, spawn_rate=10)  # type: ignore[union-attr]
    wait_until(lambda: server.open == 3)
    environment.runner.stop()  # type: ignore[union-attr]
    wait_until(lambda: server.open == 0)
    assert not environment.stats.errors


def test_messages_in_flight_at_the_stop_are_not_failures(serve: Serve, run: Run) -> None:
    received: list[bytes] = []
    server = serve(lambda connection: received.extend(lines(connection)))
    environment = run(ChatClient, server.address, users=5, chat_wait="0")
    wait_until(lambda: len(received) == 5)
    environment.runner.stop()  # type: ignore[union-attr]
    wait_until(lambda: server.open == 0)
    assert row(environment, "send_chat").num_requests == 5
    assert row(environment, "echo_response").num_requests == 0
    assert not environment.stats.errors


def test_with_a_stop_timeout_messages_in_flight_are_finished(serve: Serve, run: Run) -> None:
    received: Counter[str] = Counter()

    def server(connection: socket.socket) -> None:
        for line in lines(connection):
            received["lines"] += 1
            gevent.sleep(0.1)
            connection.sendall(line + b"\n")

    environment = run(ChatClient, serve(server).address, users=10, chat_wait="0", stop_timeout="5")
    wait_until(lambda: row(environment, "echo_response").num_requests > 30)
    environment.runner.stop()  # type: ignore[union-attr]
    assert row(environment, "echo_response").num_requests == row(environment, "send_chat").num_requests
    assert row(environment, "echo_response").num_requests == received["lines"]


def test_at_no_wait_against_a_dead_port_a_user_makes_few_attempts(run: Run) -> None:
    environment = run(ChatClient, f"127.0.0.1:{free_port()}", users=20, chat_wait="0")
    gevent.sleep(3)
    # 12 in 10 s are about 8 in the first 3 s, since the pauses grow.
    assert 20 * 3 <= row(environment, "connect").num_failures <= 20 * 9
    assert set(errors(environment)) == {"connect: ConnectionRefusedError(111, 'Connection refused')"}


def test_a_hundred_silent_servers_fail_in_one_group_each_at_the_timeout(serve: Serve, run: Run) -> None:
    server = serve(lambda connection: [None for _ in lines(connection)])
    environment = run(ChatClient, server.address, users=100, chat_wait="0", chat_timeout="0.5")
    wait_until(lambda: row(environment, "echo_response").num_requests >= 200)
    assert set(errors(environment)) == {"echo_response: EchoTimeout('No echo came within the time-out.')"}
    assert 500 <= row(environment, "echo_response").min_response_time < 1500
    assert server.opened == 100


def test_a_user_connects_before_it_has_anything_to_say(serve: Serve, run: Run) -> None:
    class Silent(ChatClient):
        tasks = [lambda user: gevent.sleep(10)]  # noqa: RUF012

    server = serve(echo)
    environment = run(Silent, server.address)
    wait_until(lambda: server.open == 1)
    assert row(environment, "connect").num_requests == 1


def test_a_user_whose_own_on_start_forgets_to_connect_still_chats(serve: Serve, run: Run) -> None:
    class Mine(ChatClient):
        def on_start(self) -> None:
            pass

    environment = run(Mine, serve(echo).address, chat_wait="0")
    wait_until(lambda: row(environment, "echo_response").num_requests > 10)
    assert not environment.stats.errors


def test_a_login_is_made_on_every_connection(serve: Serve, run: Run) -> None:
    logins: list[bytes] = []

    def server(connection: socket.socket) -> None:
        for number, line in enumerate(lines(connection)):
            if number == 0:
                logins.append(line)
            connection.sendall(line + b"\n")
            if number == 3:
                break

    class Mine(ChatClient):
        wait_time = constant(0)

        def on_connect(self) -> None:
            self.client.send_chat("/login", echo="any")

    environment = run(Mine, serve(server).address)
    wait_until(lambda: len(logins) > 3)
    assert set(logins) == {b"/login"}
    assert row(environment, "connect").num_requests >= len(logins)


def test_two_significant_digits_below_10_ms_and_locusts_own_buckets_above() -> None:
    times = (0.0123, 0.123, 0.987, 1.234, 9.87, 12.3, 147, 3432, 58760)
    assert [bucket_response_time(t) for t in times] == [0.012, 0.12, 0.99, 1.2, 9.9, 12, 150, 3400, 59000]
    assert stats.bucket_response_time is bucket_response_time


def test_percentiles_of_a_fast_server_are_told_apart(serve: Serve, run: Run) -> None:
    environment = run(ChatClient, serve(echo).address, chat_wait="0")
    wait_until(lambda: row(environment, "echo_response").num_requests > 300)
    percentiles = [row(environment, "echo_response").get_response_time_percentile(p) for p in (0.1, 0.5, 0.9)]
    assert 0 < percentiles[0] < percentiles[2]
    assert any(value % 1 for value in percentiles)


def test_the_file_can_be_loaded_twice_as_with_an_example_beside_it() -> None:
    specification = importlib.util.spec_from_file_location("again", Path(ROOT / "locustfile.py"))
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    handlers = list(events.init_command_line_parser._handlers), list(events.init._handlers)
    try:
        specification.loader.exec_module(module)
        assert module.ChatClient(Environment(events=Events(), host="a:1")).client.fault is None
    finally:
        events.init_command_line_parser._handlers, events.init._handlers = handlers
        stats.bucket_response_time = bucket_response_time  # type: ignore[assignment]
