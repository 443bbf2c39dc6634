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
from gevent.event import Event
from locust.env import Environment
from programs import (
    FREQUENT_REPORTS,
    LOCUST,
    ROOT,
    Program,
    WebUI,
    bus_options,
    latest_counts,
    wait_until,
)
from rows import Rows
from servers import Handler, Server, lines

import locustfile

sys.path.insert(0, str(ROOT / "plugins"))

import delivery

Serve = Callable[..., Server]
Start = Callable[..., Program]
Fault = Callable[[int, bytes], list[bytes]]
Meet = Callable[[Handler], "Meeting"]
END = b"that was all"  # no fault of a room touches it, and it carries no stamp


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
                if line == END:
                    self.tell_others(connection, line)
                else:
                    self.lines.append(line)
                    self.broadcast(connection, line)
        finally:
            self.members.remove(connection)

    def broadcast(self, sender: socket.socket, line: bytes) -> None:
        """Send a line to those who get it."""
        if self._echoes:
            sender.sendall(line + b"\n")
        for copy in self._fault(len(self.lines), line):
            self.tell_others(sender, copy)

    def tell_others(self, sender: socket.socket, line: bytes) -> None:
        """Send a line to all but its sender."""
        for member in list(self.members):
            if member is not sender:
                member.sendall(line + b"\n")


class Talker(delivery.Delivery, locustfile.TCPChatUser):
    """A user that a test lets talk; it awaits no echo, and counts the ends that it hears."""

    echo: locustfile.EchoMode = "none"
    timeout = 0.5
    ends = 0

    def on_message(self, payload: bytes, arrived: float) -> None:
        super().on_message(payload, arrived)
        if payload == END:
            self.ends += 1


class Patient(Talker):
    timeout = 60.0


class Meeting:
    """A room, those who come, and what they report."""

    def __init__(self, server: Server, rows: Rows) -> None:
        self.server = server
        self.rows = rows
        self.users: list[Talker] = []

    def join(self, user_class: type[Talker] = Talker, **attributes: object) -> Talker:
        """Let a user come; return it when the server has it."""
        environment = Environment(host=self.server.address)
        environment.events.request.add_listener(lambda **row: self.rows.append(row))
        variant: type[Talker] = type("Variant", (user_class,), attributes)
        user = variant(environment)
        self.users.append(user)
        opened = self.server.opened
        assert user.client.connect()
        wait_until(lambda: self.server.opened > opened)
        return user

    def join_many(self, count: int, user_class: type[Talker] = Talker) -> list[Talker]:
        """Let some users come."""
        return [self.join(user_class) for _ in range(count)]

    @property
    def deliveries(self) -> dict[str, int]:
        """How many rows ``delivery`` there are, by the name of the failure, or "arrived"."""
        counts: dict[str, int] = {}
        for row in self.rows.named("delivery"):
            error = row["exception"]
            name = "arrived" if error is None else type(error).__name__
            counts[name] = counts.get(name, 0) + 1
        return counts

    def hear(self, **expected: int) -> None:
        """Wait until there are as many rows ``delivery`` as expected, and see that they are those.

        Everybody says an end after what they have said. When it has come to all others, so has
        what was on its way.
        """
        wait_until(lambda: sum(self.deliveries.values()) >= sum(expected.values()))
        present = [user for user in self.users if user.client.connected_since is not None]
        heard = {user: user.ends for user in present}
        for user in present:
            user.client.send_chat(END, echo="none")
        others = len(present) - 1
        wait_until(lambda: all(user.ends >= heard[user] + others for user in present))
        assert self.deliveries == expected

    def wait_for_open(self, count: int) -> None:
        """Wait until the server has so many connections."""
        wait_until(lambda: self.server.open == count)


@pytest.fixture
def meet(serve: Serve, rows: Rows) -> Iterator[Meet]:
    """Return a function that opens a room; all leave after the test."""
    meetings: list[Meeting] = []

    def open_room(handler: Handler) -> Meeting:
        meetings.append(Meeting(serve(handler), rows))
        return meetings[-1]

    yield open_room
    for meeting in meetings:
        for user in meeting.users:
            user.client.close()


def say(user: delivery.Delivery, count: int) -> None:
    for _ in range(count):
        user.client.send_chat("hello")


def other_machine(_count: int, line: bytes) -> list[bytes]:
    """Let a line look as if it came from another machine."""
    return [line.replace(b"." + delivery.MACHINE, b".0000000")]


# -- what is a delivery


def test_a_message_is_delivered_to_everybody_but_its_sender(meet: Meet) -> None:
    meeting = meet(Room(echoes=True))
    users = [meeting.join(Patient, echo="full") for _ in range(5)]
    for user in users:
        assert str(user.client.send_chat("hello")).endswith("hello")
    meeting.hear(arrived=5 * 4)
    assert meeting.rows.counts()["echo_response"] == 5


def test_its_time_is_from_the_sending_to_the_arrival(meet: Meet) -> None:
    def slow(_count: int, line: bytes) -> list[bytes]:
        gevent.sleep(0.2)
        return [line]

    meeting = meet(Room(slow))
    first, _ = meeting.join_many(2)
    began = perf_counter()
    say(first, 1)
    meeting.hear(arrived=1)
    elapsed = perf_counter() - began
    (row,) = meeting.rows.named("delivery")
    assert 150 <= row["response_time"] <= elapsed * 1000
    assert row["response_length"] > len("hello")
    assert row["request_type"] == "TCP"


def test_several_messages_in_one_read_are_all_counted(meet: Meet) -> None:
    room = Room(lambda count, line: [])
    meeting = meet(room)
    first, _ = meeting.join_many(2)
    say(first, 3)
    wait_until(lambda: len(room.lines) == 3)
    room.members[1].sendall(b"\n".join(room.lines) + b"\n")
    meeting.hear(arrived=3)


def test_a_message_of_another_machine_counts_without_a_time(meet: Meet) -> None:
    meeting = meet(Room(other_machine))
    first, _ = meeting.join_many(2)
    say(first, 3)
    meeting.hear(arrived=3)
    assert {row["response_time"] for row in meeting.rows.named("delivery")} == {None}


@pytest.mark.parametrize("fault", [healthy, other_machine])
def test_history_is_no_delivery(fault: Fault, meet: Meet) -> None:
    """Of another machine's history it is known as soon as somebody of this one has heard it."""
    room = Room(fault, history=True)
    meeting = meet(room)
    first, _ = meeting.join_many(2)
    say(first, 5)
    meeting.hear(arrived=5)
    room.lines = [copy for line in room.lines for copy in fault(0, line)]
    meeting.join()
    say(first, 1)
    meeting.hear(arrived=5 + 2)


def test_what_is_sent_in_on_connect_is_none_also_where_the_class_calls_no_super(meet: Meet) -> None:
    class Joining(Talker):
        def on_connect(self) -> None:
            self.client.send_chat("I am here", name="join")

    room = Room()
    meeting = meet(room)
    first, _ = meeting.join_many(2, Joining)
    wait_until(lambda: len(room.lines) == 2)
    say(first, 2)
    meeting.hear(arrived=2)
    first.client.close()
    say(first, 1)
    meeting.hear(arrived=3)
    joins = [line for line in room.lines if line.endswith(b"I am here")]
    assert len(joins) == meeting.rows.counts()["join"] == 3
    assert all(re.fullmatch(rb"\[[0-9a-f]{8}\.\d+\] I am here", line) for line in joins)


def test_what_a_compose_leaves_out_is_neither_counted_nor_missed(meet: Meet) -> None:
    class Pinging(Talker):
        def compose(self, tag: str, message: str) -> str | bytes:
            if message == "PING":
                return f"PING {tag}"
            return super().compose(tag, message)

    meeting = meet(Room(lambda count, line: [] if count in (2, 4) else [line]))
    first, _ = meeting.join(Pinging), meeting.join()
    for text in ("hello", "PING", "hello", "a message that is lost", "hello"):
        first.client.send_chat(text)
    meeting.hear(arrived=3, DeliveryLost=1)


class Json(locustfile.TCPChatUser):
    """A user whose messages are JSON objects."""

    abstract = True

    def compose(self, tag: str, message: str) -> str | bytes:
        return json.dumps({"say": f"{tag} {message}"})

    def expected(self, tag: str, message: str) -> str | bytes | None:
        return f"{tag} {message}"


class JsonTalker(Talker, Json):
    echo = "full"
    timeout = 60.0


class JsonRoom(Room):
    """A room that puts what was said into an object of its own, for its sender too."""

    def broadcast(self, sender: socket.socket, line: bytes) -> None:
        told = json.dumps({"said": json.loads(line)["say"], "by": "kim"}).encode()
        super().broadcast(sender, told)


def test_a_protocols_own_compose_and_expected_get_the_stamp(meet: Meet) -> None:
    meeting = meet(JsonRoom(echoes=True))
    first, _ = meeting.join_many(2, JsonTalker)
    assert first.client.send_chat("hello")
    meeting.hear(arrived=1)
    assert meeting.rows.counts()["echo_response"] == 1


def test_what_an_exchange_took_for_its_answer_is_counted_and_not_missed(meet: Meet) -> None:
    """The second user asks something, and the next message is another user's."""
    room = Room(losing)
    meeting = meet(room)
    first, second = meeting.join(), meeting.join(timeout=3.0)
    say(first, 1)
    meeting.hear(arrived=1)
    asking = gevent.spawn(second.client.send_chat, "/who", echo="any")
    wait_until(lambda: room.lines[-1] == b"/who")
    say(first, 1)
    assert asking.get().endswith("hello")
    say(first, 2)
    lose_this(first)
    meeting.hear(arrived=4 + 2, DeliveryLost=1)


def test_what_came_on_the_connection_before_is_none_however_late_it_is_handled(meet: Meet) -> None:
    """The clock of another machine does not say that it is history."""

    class Slow(Talker):
        def on_message(self, payload: bytes, arrived: float) -> None:
            if payload.endswith(b"wait"):
                goes_on.wait()
            super().on_message(payload, arrived)
            handled.append(payload)

    goes_on = Event()
    handled: list[bytes] = []
    room = Room(other_machine)
    meeting = meet(room)
    first, slow = meeting.join(), meeting.join(Slow)
    for text in ("wait", "hello"):
        first.client.send_chat(text)
    wait_until(lambda: len(room.lines) == 2)
    room.members[1].shutdown(socket.SHUT_WR)
    wait_until(lambda: slow.client.connected_since is None)
    assert slow.client.connect()
    goes_on.set()
    wait_until(lambda: len(handled) == 2)
    assert meeting.deliveries == {}


# -- the room is accounted for


def test_a_healthy_room_has_nothing_to_report(meet: Meet) -> None:
    meeting = meet(Room())
    users = meeting.join_many(4)
    for _ in range(25):
        for user in users:
            say(user, 1)
    meeting.hear(arrived=100 * 3)


def test_each_lost_message_is_told_to_each_receiver(meet: Meet) -> None:
    """All but the 20th, as nothing shows yet that it is lost."""
    meeting = meet(Room(lambda count, line: [] if count % 5 == 0 else [line]))
    first, _, _ = meeting.join_many(3)
    say(first, 20)
    meeting.hear(arrived=16 * 2, DeliveryLost=3 * 2)
    say(first, 1)
    meeting.hear(arrived=17 * 2, DeliveryLost=4 * 2)


def test_each_repeated_message_is_told(meet: Meet) -> None:
    meeting = meet(Room(lambda count, line: [line, line] if count % 4 == 0 else [line]))
    first, _, _ = meeting.join_many(3)
    say(first, 20)
    meeting.hear(arrived=20 * 2, DeliveryRepeated=5 * 2)


def test_each_swap_is_told_from_the_first_message_on(meet: Meet) -> None:
    held: list[bytes] = []

    def swap(count: int, line: bytes) -> list[bytes]:
        held.append(line)
        if count % 2:
            return []
        earlier, later = held[-2:]
        return [later, earlier]

    meeting = meet(Room(swap))
    first, _, _ = meeting.join_many(3, Patient)
    delivery.TALLY.reset()
    say(first, 20)
    meeting.hear(arrived=10 * 2, DeliveryReordered=10 * 2)
    assert delivery.TALLY.take() == {"arrived": 40, "lost": 0, "repeated": 0, "reordered": 20}


def test_a_gap_that_is_filled_late_is_reordered_and_not_lost(meet: Meet) -> None:
    def hold_second(count: int, line: bytes) -> list[bytes]:
        if count == 2:
            return []
        if count == 10:
            return [line, room.lines[1]]
        return [line]

    room = Room(hold_second)
    meeting = meet(room)
    first, _ = meeting.join_many(2, Patient)
    say(first, 10)
    meeting.hear(arrived=9, DeliveryReordered=1)


def test_what_comes_after_it_was_counted_as_lost_counts_no_more(meet: Meet) -> None:
    room = Room(lambda count, line: [] if count == 2 else [line])
    meeting = meet(room)
    first, _ = meeting.join_many(2)
    say(first, 3)
    meeting.hear(arrived=2, DeliveryLost=1)
    room.members[1].sendall(room.lines[1] + b"\n")
    say(first, 1)
    meeting.hear(arrived=3, DeliveryLost=1)


def test_gaps_as_large_as_a_broken_server_likes_stay_bounded(meet: Meet) -> None:
    ticks = int((perf_counter() + 3600) * delivery.TICKS)
    meeting = meet(Room())
    first, _ = meeting.join_many(2)
    for number in (1, 999_999_999):
        stamp = f"~0123abcd.1.1.{number}.{ticks:x}.{delivery.MACHINE.decode()}"
        first.client.send_chat(stamp.encode(), echo="none")
    meeting.hear(arrived=2, DeliveryLost=delivery.NUMBERS_KEPT)


def test_who_turns_the_numbering_off_is_timed_and_not_accounted_for(meet: Meet) -> None:
    """The first user's messages go to nobody, twice, or in any order; the second's one is lost."""
    faults = {2: 0, 3: 2, 6: 0}
    meeting = meet(Room(lambda count, line: [line] * faults.get(count, 1)))
    first, second, _ = meeting.join(numbered=False), meeting.join(), meeting.join()
    say(first, 4)
    wait_until(lambda: len(meeting.rows.named("delivery")) == 4 * 2)
    say(second, 3)
    meeting.hear(arrived=(4 + 2) * 2, DeliveryLost=2)
    assert all(
        row["response_time"] is not None
        for row in meeting.rows.named("delivery")
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


def test_users_may_come_and_leave(meet: Meet) -> None:
    meeting = meet(Room(losing))
    first, second = meeting.join_many(2)
    say(first, 3)
    meeting.hear(arrived=3)
    third = meeting.join()
    say(first, 3)
    meeting.hear(arrived=3 + 6)
    second.client.close()
    meeting.wait_for_open(2)
    say(first, 3)
    say(third, 2)
    meeting.hear(arrived=9 + 3 + 2)
    lose_this(first)
    meeting.hear(arrived=9 + 5 + 2, DeliveryLost=1)


def test_a_receiver_that_was_away_misses_nothing(meet: Meet) -> None:
    meeting = meet(Room(losing))
    first, second, third = meeting.join_many(3)
    say(first, 3)
    meeting.hear(arrived=6)
    second.client.close()
    meeting.wait_for_open(2)
    say(first, 3)
    meeting.hear(arrived=6 + 3)
    assert second.client.connect()
    meeting.wait_for_open(3)
    third.client.close()
    meeting.wait_for_open(2)
    lose_this(first)
    meeting.hear(arrived=9 + 2, DeliveryLost=1)


def test_a_sender_whose_connection_ends_with_its_message_has_not_lost_it(meet: Meet) -> None:
    """The third message ends the connection before the room has it."""

    class Dropping(Room):
        def broadcast(self, sender: socket.socket, line: bytes) -> None:
            if b"hang up" in line:
                sender.shutdown(socket.SHUT_RDWR)
            else:
                super().broadcast(sender, line)

    meeting = meet(Dropping(losing))
    first, _ = meeting.join_many(2)
    say(first, 2)
    first.client.send_chat("hang up")
    wait_until(lambda: first.client.connected_since is None)
    say(first, 2)
    lose_this(first)
    meeting.hear(arrived=4 + 2, DeliveryLost=1)


def test_a_message_that_could_not_be_sent_is_not_missed(meet: Meet) -> None:
    meeting = meet(Room(losing))
    first, _ = meeting.join_many(2)
    say(first, 1)
    with pytest.raises(ValueError, match="no line break"):
        first.client.send_chat("hello\nworld")
    say(first, 1)
    lose_this(first)
    meeting.hear(arrived=2 + 2, DeliveryLost=1)


@pytest.mark.parametrize("comes_back", [False, True])
def test_what_is_missing_when_the_receiver_leaves_is_not_lost(meet: Meet, comes_back: bool) -> None:
    meeting = meet(Room(losing))
    first, second = meeting.join(), meeting.join(timeout=1.0)
    third = meeting.join(timeout=1.5)  # when it misses the message, the second would have too
    rows_of_third = Rows()
    third.environment.events.request.add_listener(lambda **row: rows_of_third.append(row))
    lose_this(first)
    wait_until(lambda: meeting.deliveries.get("arrived") == 4)
    second.client.close()
    if comes_back:
        assert second.client.connect()
    wait_until(lambda: rows_of_third.counts()["delivery: DeliveryLost"])
    meeting.hear(arrived=4, DeliveryLost=1)


# -- the ledger


class Account(delivery.Ledger):
    """An account of one sender, of another machine or of this one."""

    def hear(
        self, number: int, at: float = 0.0, *, sender: bytes = b"", may_be_history: bool = False
    ) -> str:
        """Enter a message; return the name of what it is."""
        return self.enter(sender, number, at, may_be_history=may_be_history).name


def test_what_is_missing_is_given_up_when_its_own_time_is_over() -> None:
    account = Account()
    account.hear(1)
    account.hear(3, at=1.0)
    account.hear(6, at=2.0)
    assert account.give_up(0.9) == 0
    assert account.give_up(1.5) == 1
    assert account.give_up(2.0) == 2
    assert account.give_up(9.0) == 0


def test_what_another_machine_said_before_the_first_that_was_heard_may_be_history() -> None:
    account = Account()
    account.hear(5)
    assert account.hear(4, may_be_history=True) == "IGNORED"
    assert account.hear(4) == "REORDERED"


def test_what_lies_between_a_late_message_and_the_first_that_was_heard_is_missing() -> None:
    account = Account()
    account.hear(5)
    assert account.hear(2) == "REORDERED"
    assert account.give_up(0.0) == 2


def test_several_large_gaps_together_are_bounded_too() -> None:
    account = Account()
    account.hear(1)
    account.hear(2 + delivery.NUMBERS_KEPT)
    account.hear(3 + 2 * delivery.NUMBERS_KEPT)
    assert len(account.missing) == delivery.NUMBERS_KEPT


def test_of_more_lost_messages_than_are_kept_the_first_is_forgotten() -> None:
    account = Account()
    account.hear(1)
    account.hear(3)
    account.give_up(0.0)
    assert account.hear(2) == "IGNORED"
    account.hear(3 + delivery.NUMBERS_KEPT + 1)
    account.give_up(0.0)
    assert account.hear(2) == "REPEATED"
    assert account.hear(4 + delivery.NUMBERS_KEPT - 1) == "IGNORED"


def test_of_more_senders_than_are_kept_the_longest_silent_one_is_forgotten() -> None:
    account = Account()
    account.hear(1, sender=b"steady")
    account.hear(1, sender=b"silent")
    account.hear(2, sender=b"steady")
    for sender in range(delivery.SENDERS_KEPT - 1):
        account.hear(1, sender=b"%d" % sender)
    assert account.hear(2, sender=b"steady") == "REPEATED"
    assert account.hear(1, sender=b"silent") == "ARRIVED"  # as if it were new


def test_of_more_machines_than_are_kept_the_last_are_not_followed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard: dict[bytes, int] = {}
    monkeypatch.setattr(delivery, "LATEST_HEARD", heard)
    ledger = delivery.Ledger()
    for machine in range(delivery.MACHINES_KEPT + 5):
        ledger.is_history(b"%07x" % machine, 1)
    assert len(heard) == delivery.MACHINES_KEPT
    ledger.is_history(b"%07x" % 0, 7)
    assert heard[b"%07x" % 0] == 7


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


QUICK = (
    "--headless --users=4 --spawn-rate=4 --run-time=10m --chat-wait=0.1 --stop-timeout=60 --json"
)


@pytest.mark.parametrize(
    "command", re.findall(r"^    (locust -f .*)$", str(delivery.__doc__), re.MULTILINE)
)
def test_the_commands_of_its_first_lines(command: str, serve: Serve, start: Start) -> None:
    """The first is of one process, the second of a master and two workers."""
    room = Room(echoes=True)
    server = serve(room)
    given = shlex.split(command)[1:]  # what comes later wins over what the command says
    running = start(*LOCUST, *given, f"--host={server.address}", *QUICK.split(), *bus_options())
    wait_until(lambda: latest_counts(running, "delivery").successes > 0)
    assert running.stop() == 0
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
    often = tmp_path / "often.py"
    often.write_text(FREQUENT_REPORTS)
    files = ("-f", f"locustfile.py,plugins/delivery.py,{often}", "RoomClient")
    bus = bus_options()
    options = (f"--host={server.address}", *QUICK.split(), "--chat-timeout=1")
    master = start(*LOCUST, *files, "--master", "--expect-workers=1", *options, *bus)
    worker = start(*LOCUST, "-f", "-", "--worker", *bus)
    wait_until(lambda: latest_counts(master, "delivery").failures > 0)
    assert master.stop() == 1
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


def test_each_run_in_the_web_ui_is_summed_up_by_itself(serve: Serve, start: Start) -> None:
    web_ui = WebUI()
    options = (f"--host={serve(Room(echoes=True)).address}", "--chat-wait=0.1", *web_ui.options)
    running = start(*LOCUST, "-f", "plugins/delivery.py", *options, cwd=ROOT)

    def arrived() -> list[int]:
        counts = re.findall(r"delivery: ([\d,]+) arrived", running.output)
        return [int(count.replace(",", "")) for count in counts]

    def deliveries() -> int:
        rows = web_ui.statistics().get("stats", ())
        return sum(row["num_requests"] for row in rows if row["name"] == "delivery")

    for runs in (1, 2):
        web_ui.swarm(user_count="3")
        wait_until(lambda: deliveries() not in (0, *arrived()))  # at first it shows the last run
        web_ui.stop()
        wait_until(lambda: len(arrived()) == runs)  # noqa: B023  # waited for within the loop
        wait_until(lambda: deliveries() == arrived()[-1])


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
