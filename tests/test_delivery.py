"""``plugins/delivery.py``: deliveries to the others are timed, and every one is accounted for."""

from __future__ import annotations

from locust import between  # isort: skip  # first: it replaces blocking calls with gevent's

import json
import re
import shlex
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter

import gevent
import pytest
from locust.env import Environment
from programs import LOCUST, ROOT, Program, wait_until
from rows import Rows
from servers import Server, free_port, lines

import locustfile

sys.path.insert(0, str(ROOT / "plugins"))

import delivery

Serve = Callable[..., Server]
Start = Callable[..., Program]
Fault = Callable[[int, bytes], list[bytes]]
Join = Callable[..., delivery.Delivery]


def healthy(_count: int, line: bytes) -> list[bytes]:
    return [line]


class Room:
    """A chat room: a line goes to all others, as the fault makes it, and to its sender.

    :param fault: makes of the count of a line, from 1, and the line what the others get
    :param echoes: whether the sender gets it too
    :param history: whether who comes is told all that was said before
    """

    def __init__(
        self, fault: Fault = healthy, *, echoes: bool = False, history: bool = False
    ) -> None:
        self.members: list[socket.socket] = []
        self.lines: list[bytes] = []
        self._fault = fault
        self._echoes = echoes
        self._history = history

    def __call__(self, connection: socket.socket) -> None:
        if self._history:
            connection.sendall(b"".join(line + b"\n" for line in self.lines))
        self.members.append(connection)
        try:
            for line in lines(connection):
                self.lines.append(line)
                self.broadcast(connection, line)
        finally:
            self.members.remove(connection)

    def broadcast(self, sender: socket.socket, line: bytes) -> None:
        """Send a line to those who get it."""
        if self._echoes:
            sender.sendall(line + b"\n")
        for copy in self._fault(len(self.lines), line):
            for member in list(self.members):
                if member is not sender:
                    member.sendall(copy + b"\n")


class Talker(delivery.Delivery, locustfile.TCPChatUser):
    """A user that a test lets talk; it awaits no echo."""

    echo = "none"
    timeout = 0.5


class Patient(Talker):
    timeout = 60.0


@pytest.fixture
def join(rows: Rows) -> Iterator[Join]:
    """Return a function that lets a user come into a room; it leaves after the test."""
    users: list[delivery.Delivery] = []

    def come(
        server: Server, user_class: type[delivery.Delivery] = Talker, **attributes: object
    ) -> delivery.Delivery:
        environment = Environment(host=server.address)
        environment.events.request.add_listener(lambda **row: rows.append(row))
        variant: type[delivery.Delivery] = type("Variant", (user_class,), attributes)
        user = variant(environment)
        users.append(user)
        opened = server.opened
        assert user.client.connect()
        wait_until(lambda: server.opened > opened)
        return user

    yield come
    for user in users:
        user.client.close()


def say(user: delivery.Delivery, count: int) -> None:
    for _ in range(count):
        user.client.send_chat("hello")


def deliveries(rows: Rows) -> dict[str, int]:
    """Count the rows ``delivery``, under the name of the failure, or "arrived"."""
    counts: dict[str, int] = {}
    for row in rows.named("delivery"):
        error = row["exception"]
        name = "arrived" if error is None else type(error).__name__
        counts[name] = counts.get(name, 0) + 1
    return counts


def hear(rows: Rows, **expected: int) -> None:
    """Wait until there are as many rows ``delivery`` as expected, and see that they are those."""
    wait_until(lambda: sum(deliveries(rows).values()) >= sum(expected.values()))
    gevent.sleep(0.1)  # for more than these
    assert deliveries(rows) == expected


def other_machine(_count: int, line: bytes) -> list[bytes]:
    """Let a line look as if it came from another machine."""
    return [line.replace(b"." + delivery.MACHINE, b".0000000")]


# -- what is a delivery


def test_a_message_is_delivered_to_everybody_but_its_sender(
    serve: Serve, rows: Rows, join: Join
) -> None:
    server = serve(Room(echoes=True))
    users = [join(server, Patient, echo="full") for _ in range(5)]
    for user in users:
        assert str(user.client.send_chat("hello")).endswith("hello")
    hear(rows, arrived=5 * 4)
    assert rows.counts()["echo_response"] == 5


def test_its_time_is_from_the_sending_to_the_arrival(serve: Serve, rows: Rows, join: Join) -> None:
    def slow(_count: int, line: bytes) -> list[bytes]:
        gevent.sleep(0.2)
        return [line]

    server = serve(Room(slow))
    first, _ = join(server), join(server)
    began = perf_counter()
    say(first, 1)
    hear(rows, arrived=1)
    elapsed = perf_counter() - began
    (row,) = rows.named("delivery")
    assert 200 <= row["response_time"] <= elapsed * 1000
    assert row["response_length"] > len("hello")
    assert row["request_type"] == "TCP"


def test_several_messages_in_one_read_are_all_counted(serve: Serve, rows: Rows, join: Join) -> None:
    room = Room(lambda count, line: [])
    server = serve(room)
    first, _ = join(server), join(server)
    say(first, 3)
    wait_until(lambda: len(room.lines) == 3)
    room.members[1].sendall(b"\n".join(room.lines) + b"\n")
    hear(rows, arrived=3)


def test_a_message_of_another_machine_counts_without_a_time(
    serve: Serve, rows: Rows, join: Join
) -> None:
    server = serve(Room(other_machine))
    first, _ = join(server), join(server)
    say(first, 3)
    hear(rows, arrived=3)
    assert {row["response_time"] for row in rows.named("delivery")} == {None}


@pytest.mark.parametrize("fault", [healthy, other_machine])
def test_history_is_no_delivery(fault: Fault, serve: Serve, rows: Rows, join: Join) -> None:
    """Of another machine's history it is known as soon as somebody of this one has heard it."""
    room = Room(fault, history=True)
    server = serve(room)
    first, _ = join(server), join(server)
    say(first, 5)
    hear(rows, arrived=5)
    room.lines = [copy for line in room.lines for copy in fault(0, line)]
    join(server)
    say(first, 1)
    hear(rows, arrived=5 + 2)


def test_what_is_sent_in_on_connect_is_none_also_where_the_class_calls_no_super(
    serve: Serve, rows: Rows, join: Join
) -> None:
    class Joining(Talker):
        def on_connect(self) -> None:
            self.client.send_chat("I am here", name="join")

    room = Room()
    server = serve(room)
    first, _ = join(server, Joining), join(server, Joining)
    wait_until(lambda: len(room.lines) == 2)
    say(first, 2)
    hear(rows, arrived=2)
    first.client.close()
    say(first, 1)
    hear(rows, arrived=3)
    joins = [line for line in room.lines if line.endswith(b"I am here")]
    assert len(joins) == rows.counts()["join"] == 3
    assert all(re.fullmatch(rb"\[[0-9a-f]{8}\.\d+\] I am here", line) for line in joins)


def test_what_a_compose_leaves_out_is_neither_counted_nor_missed(
    serve: Serve, rows: Rows, join: Join
) -> None:
    class Pinging(Talker):
        def compose(self, tag: str, message: str) -> str | bytes:
            if message == "PING":
                return f"PING {tag}"
            return super().compose(tag, message)

    server = serve(Room(lambda count, line: [] if count in (2, 4) else [line]))
    first, _ = join(server, Pinging), join(server)
    for text in ("hello", "PING", "hello", "a message that is lost", "hello"):
        first.client.send_chat(text)
    hear(rows, arrived=3, DeliveryLost=1)


def test_a_protocols_own_compose_and_expected_get_the_stamp(
    serve: Serve, rows: Rows, join: Join
) -> None:
    class Json(locustfile.TCPChatUser):
        def compose(self, tag: str, message: str) -> str | bytes:
            return json.dumps({"say": f"{tag} {message}"})

        def expected(self, tag: str, message: str) -> str | bytes | None:
            return f"{tag} {message}"

    class JsonTalker(delivery.Delivery, Json):
        echo = "full"

    def server(connection: socket.socket) -> None:
        members.append(connection)
        for line in lines(connection):
            told = json.dumps({"said": json.loads(line)["say"], "by": "kim"}).encode()
            for member in members:
                member.sendall(told + b"\n")

    members: list[socket.socket] = []
    instance = serve(server)
    first, _ = join(instance, JsonTalker), join(instance, JsonTalker)
    assert first.client.send_chat("hello")
    hear(rows, arrived=1)
    assert rows.counts()["echo_response"] == 1


def test_what_an_exchange_took_for_its_answer_is_counted_and_not_missed(
    serve: Serve, rows: Rows, join: Join
) -> None:
    """The second user asks something, and the next message is another user's."""
    room = Room(losing)
    server = serve(room)
    first, second = join(server), join(server, timeout=3.0)
    say(first, 1)
    hear(rows, arrived=1)
    asking = gevent.spawn(second.client.send_chat, "/who", echo="any")
    wait_until(lambda: room.lines[-1] == b"/who")
    say(first, 1)
    assert asking.get().endswith("hello")
    say(first, 2)
    lose_this(first)
    hear(rows, arrived=4 + 2, DeliveryLost=1)


# -- the room is accounted for


def test_a_healthy_room_has_nothing_to_report(serve: Serve, rows: Rows, join: Join) -> None:
    server = serve(Room())
    users = [join(server) for _ in range(4)]
    for _ in range(25):
        for user in users:
            say(user, 1)
    hear(rows, arrived=100 * 3)


def test_each_lost_message_is_told_to_each_receiver(serve: Serve, rows: Rows, join: Join) -> None:
    """All but the 20th, as nothing shows yet that it is lost."""
    server = serve(Room(lambda count, line: [] if count % 5 == 0 else [line]))
    first, _, _ = join(server), join(server), join(server)
    say(first, 20)
    hear(rows, arrived=16 * 2, DeliveryLost=3 * 2)
    say(first, 1)
    hear(rows, arrived=17 * 2, DeliveryLost=4 * 2)


def test_each_repeated_message_is_told(serve: Serve, rows: Rows, join: Join) -> None:
    server = serve(Room(lambda count, line: [line, line] if count % 4 == 0 else [line]))
    first, _, _ = join(server), join(server), join(server)
    say(first, 20)
    hear(rows, arrived=20 * 2, DeliveryRepeated=5 * 2)


def test_each_swap_is_told_from_the_first_message_on(serve: Serve, rows: Rows, join: Join) -> None:
    held: list[bytes] = []

    def swap(count: int, line: bytes) -> list[bytes]:
        held.append(line)
        if count % 2:
            return []
        earlier, later = held[-2:]
        return [later, earlier]

    server = serve(Room(swap))
    first, _, _ = join(server, Patient), join(server, Patient), join(server, Patient)
    say(first, 20)
    hear(rows, arrived=10 * 2, DeliveryReordered=10 * 2)


def test_a_gap_that_is_filled_late_is_reordered_and_not_lost(
    serve: Serve, rows: Rows, join: Join
) -> None:
    def hold_second(count: int, line: bytes) -> list[bytes]:
        if count == 2:
            return []
        if count == 10:
            return [line, room.lines[1]]
        return [line]

    room = Room(hold_second)
    server = serve(room)
    first, _ = join(server, Patient), join(server, Patient)
    say(first, 10)
    hear(rows, arrived=9, DeliveryReordered=1)


def test_what_comes_after_it_was_counted_as_lost_counts_no_more(
    serve: Serve, rows: Rows, join: Join
) -> None:
    room = Room(lambda count, line: [] if count == 2 else [line])
    server = serve(room)
    first, _ = join(server), join(server)
    say(first, 3)
    hear(rows, arrived=2, DeliveryLost=1)
    room.members[1].sendall(room.lines[1] + b"\n")
    say(first, 1)
    hear(rows, arrived=3, DeliveryLost=1)


def test_gaps_as_large_as_a_broken_server_likes_stay_bounded(
    serve: Serve, rows: Rows, join: Join
) -> None:
    ticks = int((perf_counter() + 3600) * delivery.TICKS)
    server = serve(Room())
    first, _ = join(server), join(server)
    for number in (1, 999_999_999):
        stamp = f"~0123abcd.1.1.{number}.{ticks:x}.{delivery.MACHINE.decode()}"
        first.client.send_chat(stamp.encode(), echo="none")
    hear(rows, arrived=2)
    wait_until(lambda: deliveries(rows).get("DeliveryLost") == delivery.NUMBERS_KEPT)


def test_who_turns_the_numbering_off_is_timed_and_not_accounted_for(
    serve: Serve, rows: Rows, join: Join
) -> None:
    """The first user's messages go to nobody, twice, or in any order; the second's one is lost."""
    faults = {2: 0, 3: 2, 6: 0}
    server = serve(Room(lambda count, line: [line] * faults.get(count, 1)))
    first, second, _ = join(server, numbered=False), join(server), join(server)
    say(first, 4)
    wait_until(lambda: len(rows.named("delivery")) == 4 * 2)
    say(second, 3)
    hear(rows, arrived=(4 + 2) * 2, DeliveryLost=2)
    assert all(
        row["response_time"] is not None
        for row in rows.named("delivery")
        if row["exception"] is None
    )


# -- no false report


def losing(_count: int, line: bytes) -> list[bytes]:
    """Lose a message that says so."""
    if line.endswith(b"lose this"):
        return []
    return [line]


def lose_this(user: delivery.Delivery) -> None:
    """Let one message be lost; when that is told, what was missed before has been told too."""
    for text in ("hello", "lose this", "hello"):
        user.client.send_chat(text)


def test_users_may_come_and_leave(serve: Serve, rows: Rows, join: Join) -> None:
    server = serve(Room(losing))
    first, second = join(server), join(server)
    say(first, 3)
    hear(rows, arrived=3)
    third = join(server)
    say(first, 3)
    hear(rows, arrived=3 + 6)
    second.client.close()
    wait_until(lambda: server.open == 2)
    say(first, 3)
    say(third, 2)
    hear(rows, arrived=9 + 3 + 2)
    lose_this(first)
    hear(rows, arrived=9 + 5 + 2, DeliveryLost=1)


def test_a_receiver_that_was_away_misses_nothing(serve: Serve, rows: Rows, join: Join) -> None:
    server = serve(Room(losing))
    first, second, third = join(server), join(server), join(server)
    say(first, 3)
    hear(rows, arrived=6)
    second.client.close()
    wait_until(lambda: server.open == 2)
    say(first, 3)
    hear(rows, arrived=6 + 3)
    assert second.client.connect()
    wait_until(lambda: server.open == 3)
    third.client.close()
    wait_until(lambda: server.open == 2)
    lose_this(first)
    hear(rows, arrived=9 + 2, DeliveryLost=1)


def test_a_sender_whose_connection_ends_with_its_message_has_not_lost_it(
    serve: Serve, rows: Rows, join: Join
) -> None:
    """The third message ends the connection before the room has it."""

    class Dropping(Room):
        def broadcast(self, sender: socket.socket, line: bytes) -> None:
            if b"hang up" in line:
                sender.shutdown(socket.SHUT_RDWR)
            else:
                super().broadcast(sender, line)

    server = serve(Dropping(losing))
    first, _ = join(server), join(server)
    say(first, 2)
    first.client.send_chat("hang up")
    wait_until(lambda: first.client.connected_since is None)
    say(first, 2)
    lose_this(first)
    hear(rows, arrived=4 + 2, DeliveryLost=1)


def test_a_message_that_could_not_be_sent_is_not_missed(
    serve: Serve, rows: Rows, join: Join
) -> None:
    server = serve(Room(losing))
    first, _ = join(server), join(server)
    say(first, 1)
    with pytest.raises(ValueError, match="no line break"):
        first.client.send_chat("hello\nworld")
    say(first, 1)
    lose_this(first)
    hear(rows, arrived=2 + 2, DeliveryLost=1)


def test_what_is_missing_when_the_receiver_leaves_is_not_lost(
    serve: Serve, rows: Rows, join: Join
) -> None:
    server = serve(Room(losing))
    first, second, _ = join(server), join(server), join(server)
    lose_this(first)
    wait_until(lambda: deliveries(rows).get("arrived") == 4)
    second.client.close()
    hear(rows, arrived=4, DeliveryLost=1)  # of the third, which stayed


# -- the command


def figures(output: str) -> tuple[int, int, int, int, float]:
    """Return arrived, lost, repeated, out of order and reach of the line that sums up."""
    (line,) = re.findall(
        r"delivery: ([\d,]+) arrived, (\d+) lost, (\d+) repeated, (\d+) out of order; "
        r"reach ([\d.]+) %",
        output,
    )
    arrived, *failures, reach = (float(figure.replace(",", "")) for figure in line)
    lost, repeated, reordered = map(int, failures)
    return int(arrived), lost, repeated, reordered, reach


def entries(output: str) -> dict[str, dict[str, float]]:
    """Return the rows that --json printed, by name."""
    text = "\n" + output
    parsed, _ = json.JSONDecoder().raw_decode(text[text.index("\n[\n") + 1 :])
    return {entry["name"]: entry for entry in parsed}


SHORT = "--headless --users=4 --spawn-rate=4 --run-time=4s --chat-wait=0.2 --stop-timeout=5 --json"


def bus() -> list[str]:
    """Return the options that give a master and its workers a port of their own."""
    port = free_port()
    return [f"--master-bind-port={port}", f"--master-port={port}"]


@pytest.mark.parametrize(
    "command", re.findall(r"^    (locust -f .*)$", str(delivery.__doc__), re.MULTILINE)
)
def test_the_commands_of_its_first_lines(command: str, serve: Serve, start: Start) -> None:
    """The first is of one process, the second of a master and two workers."""
    room = Room(echoes=True)
    server = serve(room)
    given = shlex.split(command)[1:]  # what comes later wins over what the command says
    running = start(*LOCUST, *given, f"--host={server.address}", *SHORT.split(), *bus())
    assert running.ends() == 0
    arrived, *failures, reach = figures(running.output)
    rows = entries(running.output)
    assert arrived == rows["delivery"]["num_requests"] > 0
    # While the users come and leave, not all of them are there.
    assert arrived <= 3 * len(room.lines)
    assert failures == [0, 0, 0]
    assert reach == 100
    assert rows["delivery"]["num_none_requests"] == 0  # all of one machine
    assert set(rows) == {"connect", "send_chat", "echo_response", "delivery"}


def test_a_worker_that_gets_the_files_from_its_master_tells_it_what_was_lost(
    serve: Serve, start: Start, tmp_path: Path
) -> None:
    server = serve(Room(lambda count, line: [] if count % 3 == 0 else [line], echoes=True))
    files = "locustfile.py,plugins/delivery.py"
    port = free_port()
    master = start(
        *LOCUST,
        *("-f", files, "RoomClient", "--master", "--expect-workers=1", f"--host={server.address}"),
        *SHORT.replace("--run-time=4s", "--run-time=8s").split(),
        *("--chat-timeout=2", f"--master-bind-port={port}"),
    )
    worker = start(*LOCUST, "-f", "-", "--worker", f"--master-port={port}", cwd=tmp_path)
    assert master.ends() == 1
    worker.ends()
    arrived, lost, repeated, reordered, reach = figures(master.output)
    rows = entries(master.output)
    assert lost > 0
    assert (repeated, reordered) == (0, 0)
    assert rows["delivery"]["num_requests"] == arrived + lost
    assert rows["delivery"]["num_failures"] == lost
    assert reach == int(10_000 * arrived / (arrived + lost)) / 100
    assert "DeliveryLost" in master.output
    assert "delivery:" not in worker.output


def test_the_line_rounds_the_reach_down() -> None:
    tally = delivery.Tally()
    assert tally.summary() == "delivery: no message of another user arrived"
    tally.add({"arrived": 999_999, "lost": 1, "repeated": 2})
    assert figures(tally.summary()) == (999_999, 1, 2, 0, 99.99)
    assert tally.take()["arrived"] == 999_999
    assert tally.arrived == 0


def test_with_the_stamp_long_texts_keep_their_sizes() -> None:
    class Longest(delivery.RoomClient):
        wait_time = between(1, 2)

    user = Longest(Environment(host="127.0.0.1:1"))
    user.on_connect()
    tag = f"{'f' * 8}.999999"
    for texts, sizes in (
        (locustfile.LONG_TEXTS, range(100, 401)),
        (locustfile.VERY_LONG_TEXTS, range(513, 1001)),
    ):
        for text in texts:
            payload = str(user.compose(tag, text)).encode()
            assert delivery.STAMP.search(payload)
            assert len(payload) in sizes
