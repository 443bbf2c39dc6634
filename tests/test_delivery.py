"""``plugins/delivery.py``: deliveries to the others are timed, and every one is accounted for."""

from __future__ import annotations

from locust import between  # isort: skip  # first: it replaces blocking calls with gevent's

import json
import random
import re
import shlex
import signal
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import NamedTuple

import delivery
import gevent
import psutil
import pytest
from gevent.event import Event
from locust.env import Environment
from programs import (
    QUICK_LOCUST,
    ROOT,
    Program,
    Start,
    WebUI,
    bus_options,
    latest_counts,
    wait_until,
)
from rows import Rows
from servers import Handler, Serve, Server, lines

import locustfile

Fault = Callable[[int, bytes], list[bytes]]
Meet = Callable[[Handler], "Meeting"]
END = b"that was all"  # no fault of a room touches it, and it carries no stamp


# -- the account: what was said and heard at given times, without a connection

TIMEOUT = 5.0
DUE = TIMEOUT + delivery.GRACE  # seconds after which a message is judged


class Member(delivery.Delivery):
    """A user without a connection; it notes what it reports last."""

    abstract = True
    timeout = TIMEOUT

    def __init__(self, book: Book) -> None:
        super().__init__(Environment(host="127.0.0.1:1"))
        self.outcome = ""
        self._book = book

    def report_delivery(
        self, milliseconds: float | None, size: int, error: locustfile.ChatError | None
    ) -> None:
        self.outcome = "ARRIVED" if error is None else error_name(error)
        if self.outcome == "LOST":
            self._book.lost[self._book.sessions[self]] += 1


def error_name(error: locustfile.ChatError) -> str:
    """Return "LOST" for ``DeliveryLost``, and so on."""
    return type(error).__name__.removeprefix("Delivery").upper()


class Book:
    """An account, with what it reports of each thing in words."""

    def __init__(self) -> None:
        self.account = delivery.Account()
        self.lost: Counter[delivery.Session] = Counter()
        self.sessions: dict[delivery.Delivery, delivery.Session] = {}  # the latest of each
        self._members: dict[int, Member] = {}
        self._numbers: Counter[bytes] = Counter()

    @property
    def counts(self) -> Counter[str]:
        return self.account.counts

    def join(self, number: int, at: float, *, room: str = "") -> delivery.Session:
        """Let a user log in."""
        member = self._members.setdefault(number, Member(self))
        member.room = room
        self.sessions[member] = self.account.join(member, at)
        return self.sessions[member]

    def leave(self, session: delivery.Session, at: float) -> None:
        """Let the connection of a user end."""
        session.left_at = at

    def join_many(self, count: int) -> list[delivery.Session]:
        """Let some users log in whom the server is known to have in the room."""
        sessions = [self.join(user, 0.0) for user in range(1, count + 1)]
        for session in sessions:
            self.say(session, 0.1, *sessions)
        return sessions

    def say(
        self, sender: delivery.Session, at: float, *receivers: delivery.Session, wait: float = 0.0
    ) -> delivery.Message:
        """Let a user say something that some users hear: an echo is what it hears itself."""
        self._numbers[sender.identity] += 1
        tag = b"%s.%d" % (sender.identity, self._numbers[sender.identity])
        self.account.stamp(sender, tag, sender.connection, at)
        message = self.account.messages[tag]
        for receiver in receivers:
            self.hear(receiver, message, at + wait)
        return message

    def hear(self, session: delivery.Session, message: delivery.Message, at: float) -> str:
        """Let a copy arrive; return what it is."""
        return self.take(session, stamp_of_message(message), at)

    def take(
        self, session: delivery.Session, payload: bytes, at: float, *, is_in_order: bool = True
    ) -> str:
        """Let a payload arrive; return what is reported of it, ``IGNORED`` where nothing is."""
        member = session.user
        assert isinstance(member, Member)
        member.outcome = "IGNORED"
        self.account.take(session, payload, at, is_in_order)
        return member.outcome

    def judge(self, now: float) -> None:
        """Judge what is due."""
        self.account.judge_due(now)


def stamp_of_message(message: delivery.Message) -> bytes:
    """Return the stamp that a message of this process has."""
    return stamp_of(message.tag.decode(), int(message.made_at * delivery.TICKS), delivery.MACHINE)


def stamp_of(tag: str, ticks: int, machine: str, connection: int = 1) -> bytes:
    return f"~{tag}.{connection}.{ticks:x}.{machine}".encode()


@pytest.fixture
def book() -> Book:
    return Book()


def test_what_was_said_and_did_not_come_is_lost_when_its_time_is_over(book: Book) -> None:
    first, second, third = book.join_many(3)
    book.say(first, 1.0, first, second)  # an echo, and a copy
    book.judge(1.0 + DUE)
    assert book.lost == {}
    book.judge(1.01 + DUE)
    assert book.lost == {third: 1}
    assert book.counts["lost"] == 1
    assert book.counts["reached"] == 3 * 2 + 1


@pytest.mark.parametrize("hears_it", ["the sender", "another user"])
def test_a_message_counts_as_said_once_anybody_has_heard_it(hears_it: str, book: Book) -> None:
    first, second, third = book.join_many(3)
    book.say(first, 1.0, first if hears_it == "the sender" else second)
    book.judge(9.0)
    unheard = hears_it == "the sender"
    assert book.lost == ({second: 1, third: 1} if unheard else {third: 1})
    assert book.counts["unheard"] == unheard


def test_what_nobody_was_seen_to_hear_is_unheard_and_not_lost(book: Book) -> None:
    first, *_ = book.join_many(3)
    book.say(first, 1.0)
    book.judge(9.0)
    assert (book.counts["unheard"], book.counts["lost"]) == (1, 0)


def test_what_may_have_ended_with_its_senders_connection_is_not_judged(book: Book) -> None:
    first, *_ = book.join_many(3)
    book.say(first, 1.0)
    book.leave(first, 1.1)
    book.judge(9.0)
    assert (book.counts["unheard"], book.counts["lost"], book.counts["missing"]) == (0, 0, 2)


def test_what_a_sender_said_before_it_left_is_judged_where_it_was_said(book: Book) -> None:
    first, second, third = book.join_many(3)
    book.say(first, 1.0, second)
    book.leave(first, 1.1)
    book.judge(9.0)
    assert book.lost == {third: 1}


def test_where_nobody_else_is_there_nothing_is_missed(book: Book) -> None:
    (alone,) = book.join_many(1)
    book.say(alone, 1.0, alone)
    book.judge(9.0)
    assert book.counts["unheard"] == book.counts["missing"] == 0


def test_who_came_later_left_before_or_came_back_misses_nothing(book: Book) -> None:
    first, second, _third = book.join_many(3)
    book.leave(second, 0.5)
    book.say(first, 1.0, first)
    later = book.join(4, 1.1)
    back = book.join(2, 1.2)
    for session in (later, back):
        book.say(session, 1.3, session)
    book.judge(6.7)  # the message of 1.0 alone
    assert set(book.lost) == {_third}
    assert book.counts["missing"] == 0


def test_who_leaves_before_the_time_is_over_is_not_judged(book: Book) -> None:
    first, second, third = book.join_many(3)
    book.judge(1.0 + DUE)
    before = book.counts["reached"]
    book.say(first, 7.0, third)
    book.leave(second, 8.0)
    book.leave(third, 8.0)
    book.judge(14.0)
    assert book.counts["arrived"] == before + 1
    assert (book.counts["reached"], book.counts["missing"], book.counts["lost"]) == (before, 1, 0)
    assert book.account.rooms[""].sessions == {first}  # nothing pending concerns who is gone


def test_what_comes_between_login_and_the_first_sign_of_the_server_is_not_judged(
    book: Book,
) -> None:
    """A login that awaits no answer ends before the server knows of it."""
    first, second = book.join_many(2)
    third = book.join(3, 1.0)
    book.say(first, 1.1, second)
    book.say(first, 1.2, second, third, wait=0.1)
    book.say(first, 1.25, second)
    book.say(first, 1.4, second)
    book.judge(9.0)
    assert book.lost == {third: 1}
    assert book.counts["missing"] == 2


def test_that_somebody_hears_a_user_is_a_sign_that_the_server_has_it_in_the_room(
    book: Book,
) -> None:
    first, second = book.join_many(2)
    third = book.join(3, 1.0)
    book.say(third, 1.1, first, second)
    book.say(first, 1.2, second)
    book.say(first, 1.3, second, third)
    book.judge(9.0)
    assert book.lost == {third: 1}


def test_who_hears_nobody_has_lost_everything(book: Book) -> None:
    first, second = book.join_many(2)
    deaf, deaf_with_echo = book.join(3, 1.0), book.join(4, 1.0)
    book.say(deaf_with_echo, 1.1, deaf_with_echo, first, second)
    for at in (2.0, 3.0, 4.0):
        book.say(first, at, second)
    book.judge(20.0)
    assert book.lost == {deaf: 4, deaf_with_echo: 3}
    account = book.account
    assert account.losing_users - account.hearing_users == {deaf.identity, deaf_with_echo.identity}


def test_ones_own_message_may_come_back_once(book: Book) -> None:
    first, second = book.join_many(2)
    message = book.say(first, 1.0, second)
    assert book.hear(first, message, 1.1) == "IGNORED"
    assert book.hear(first, message, 1.2) == "REPEATED"
    assert book.counts["repeated"] == 1
    assert book.counts["arrived"] == 2 + 1


def test_a_repetition_is_told_also_after_the_message_was_judged(book: Book) -> None:
    first, second, third = book.join_many(3)
    message = book.say(first, 1.0, first, second)
    assert book.hear(second, message, 1.1) == "REPEATED"
    book.judge(9.0)
    assert book.hear(second, message, 9.1) == "REPEATED"
    assert book.hear(first, message, 9.2) == "REPEATED"
    assert book.hear(third, message, 9.3) == "IGNORED"  # it is lost
    assert book.counts["repeated"] == 3


def test_a_swap_is_told_once(book: Book) -> None:
    first, second = book.join_many(2)
    one, two, three = (book.say(first, 1.0 + number) for number in range(3))
    assert book.hear(second, two, 5.0) == "ARRIVED"
    assert book.hear(second, one, 5.1) == "REORDERED"
    assert book.hear(second, three, 5.2) == "ARRIVED"
    assert book.counts["arrived"] == 2 + 3
    assert book.counts["reordered"] == 1


def test_there_is_no_order_between_two_connections_of_a_sender(book: Book) -> None:
    first, second = book.join_many(2)
    one, two = book.say(first, 1.0), book.say(first, 1.1)
    book.leave(first, 1.2)
    three = book.say(book.join(1, 1.3), 1.4)
    heard = [book.hear(second, message, 2.0) for message in (three, two, one)]
    assert heard == ["ARRIVED", "ARRIVED", "ARRIVED"]


def test_history_is_no_delivery_and_shows_that_it_was_said(book: Book) -> None:
    first, second = book.join_many(2)
    message = book.say(first, 1.0)
    newcomer = book.join(3, 1.5)
    assert book.hear(newcomer, message, 1.6) == "IGNORED"
    assert book.counts["arrived"] == 2
    book.judge(9.0)
    assert book.lost == {second: 1}


def test_who_hears_its_own_history_after_a_reconnect_hears_nothing_twice(book: Book) -> None:
    first, second = book.join_many(2)
    message = book.say(first, 1.0, first, second)
    book.leave(first, 1.1)
    assert book.hear(book.join(1, 1.2), message, 1.3) == "IGNORED"


def test_what_may_wait_behind_a_handler_at_work_is_not_judged(book: Book) -> None:
    first, blocked, current = book.join_many(3)
    book.say(first, 1.0, first)
    blocked.handled_until = 1.0 + TIMEOUT - 0.1
    current.handled_until = 1.0 + TIMEOUT  # what had come by then was handled before
    book.judge(9.0)
    assert book.lost == {current: 1}
    assert book.counts["missing"] == 1


def test_what_this_process_is_behind_with_is_waited_for_and_then_no_more(book: Book) -> None:
    first, second = book.join_many(2)
    book.judge(9.0)
    book.say(first, 10.0, first)
    book.account.note_lag(3.0)
    for waited in (0.1, 0.2, 0.3, 2.9):
        book.judge(10.0 + DUE + waited)
    assert book.lost == {}
    book.judge(10.0 + DUE + 3.1)
    assert book.lost == {second: 1}
    book.say(first, 20.0, first)
    for now in (*[18.7] * delivery.LAGS_KEPT, 20.1 + DUE):
        book.judge(now)
    assert book.lost == {second: 2}


def test_what_an_untagged_exchange_took_tells_no_order(book: Book) -> None:
    """It is taken in another greenlet than what came before it."""
    first, second = book.join_many(2)
    one, two, three = (book.say(first, 1.0 + number) for number in range(3))
    taken = stamp_of_message(two)
    assert book.take(second, taken, 5.0, is_in_order=False) == "ARRIVED"
    assert book.hear(second, one, 4.9) == "ARRIVED"
    assert book.hear(second, three, 5.1) == "ARRIVED"
    assert book.hear(second, two, 5.2) == "REPEATED"
    book.judge(9.0)
    assert book.lost == {}


def test_who_judges_much_lets_others_go_on(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "LONGEST_SLICE", 0.0)
    book.join_many(2)
    other = gevent.spawn(lambda: None)
    book.judge(9.0)
    assert other.dead


def test_the_end_of_a_run_loses_nothing(book: Book) -> None:
    first, second, _ = book.join_many(3)
    book.judge(9.0)
    book.say(first, 10.0, first, second)
    book.say(first, 10.1)
    reached = book.counts["reached"]
    book.account.end()
    assert book.counts["lost"] == book.counts["unheard"] == 0
    assert book.counts["reached"] == reached
    assert book.counts["arrived"] == reached + 1
    assert book.counts["missing"] == 1 + 2


def test_rooms_are_accounted_for_one_by_one(book: Book) -> None:
    red = [book.join(user, 0.0, room="red") for user in (1, 2)]
    blue = [book.join(user, 0.0, room="blue") for user in (3, 4)]
    book.say(red[0], 1.0, *red)
    message = book.say(blue[0], 1.0, blue[0])
    assert book.hear(red[0], message, 1.1) == "ARRIVED"  # from a room that is not its own
    book.judge(9.0)
    assert book.lost == {blue[1]: 1}
    assert book.counts["unheard"] == 1


def foreign_stamp(number: int, ticks: int, machine: str) -> bytes:
    """Return a stamp of a user in another process."""
    return stamp_of(f"0123abcd.{number}", ticks, machine)


@pytest.mark.parametrize("machine", [delivery.MACHINE, "0000000"])
def test_what_another_process_says_is_never_lost_and_told_once_and_in_order(
    machine: str, book: Book
) -> None:
    first, _second = book.join_many(2)
    ticks = delivery.TICKS
    copies = [foreign_stamp(number, number * ticks, machine) for number in (1, 3, 2, 3)]
    assert [book.take(first, copy, 4.0) for copy in copies] == [
        "ARRIVED",
        "ARRIVED",
        "REORDERED",
        "REPEATED",
    ]
    book.judge(4.1 + DUE)
    assert book.lost == {}
    assert book.counts["elsewhere"] == 3
    assert book.take(first, copies[0], 10.0) == "REPEATED"


def test_history_of_another_process_is_told_by_the_clock_of_the_machine(book: Book) -> None:
    book.join_many(2)
    newcomer = book.join(3, 10.0)
    old = foreign_stamp(1, 9 * delivery.TICKS, delivery.MACHINE)
    assert book.take(newcomer, old, 10.1) == "IGNORED"


def test_history_of_another_machine_is_what_somebody_of_this_one_has_heard(book: Book) -> None:
    first, _ = book.join_many(2)
    assert book.take(first, foreign_stamp(1, 77, "0000000"), 9.0) == "ARRIVED"
    newcomer = book.join(3, 10.0)
    assert book.take(newcomer, foreign_stamp(1, 77, "0000000"), 10.1) == "IGNORED"
    assert book.take(newcomer, foreign_stamp(2, 78, "0000000"), 10.2) == "ARRIVED"


def test_what_goes_to_some_only_is_counted_and_not_judged(book: Book) -> None:
    _, second = book.join_many(2)
    first = book.join(3, 8.0)
    book.judge(9.0)
    before = book.counts["arrived"]
    book.account.stamp(first, first.identity + b".77", 0, 10.0)
    tag = f"{first.identity.decode()}.77"
    copy = stamp_of(tag, 10 * delivery.TICKS, delivery.MACHINE, connection=0)
    assert [book.take(second, copy, 10.1) for _ in range(2)] == ["ARRIVED", "ARRIVED"]
    assert book.take(first, copy, 10.1) == "IGNORED"
    earlier = f"{first.identity.decode()}.76"
    copy = stamp_of(earlier, 10 * delivery.TICKS, delivery.MACHINE, connection=0)
    assert book.take(second, copy, 10.2) == "ARRIVED"
    book.judge(20.0)
    assert book.counts["arrived"] == before + 3
    assert book.counts["elsewhere"] == book.counts["lost"] == 0
    assert book.counts["stamped"] == 2 + 1


def test_what_was_judged_long_ago_is_forgotten_and_tells_nothing(book: Book) -> None:
    first, second = book.join_many(2)
    old = book.say(first, 1.0, first, second)
    for now in (1.1 + DUE, 0.9 + 2 * DUE):
        book.judge(now)
        assert book.hear(second, old, now) == "REPEATED"
    book.judge(1.1 + 2 * DUE)
    assert book.hear(second, old, 20.0) == "IGNORED"
    assert book.account.messages == {}


def test_stamps_that_a_server_makes_up_stay_bounded(
    book: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "MESSAGES_KEPT", 100)
    monkeypatch.setattr(delivery, "SENDERS_KEPT", 50)
    first, second = book.join_many(2)
    for number in range(1000, 1500):
        stamp = stamp_of(f"{number:08x}.1", 0xFFFFFF, delivery.MACHINE)
        assert book.take(second, stamp, 1.0) == "ARRIVED"
    assert len(book.account.messages) <= 100
    book.say(first, 2.0, first)
    book.judge(20.0)
    assert book.lost == {second: 1}


class RandomRoom:
    """Eight users talk, leave and come back; the room loses, repeats and delays at random.

    ``truth`` counts what it does, as it has to be reported.
    """

    def __init__(self, book: Book, seed: int) -> None:
        self.truth: Counter[str] = Counter(arrived=8 * 7)
        self._book = book
        self._chance = random.Random(seed)
        self._present = book.join_many(8)
        self._under_way: list[tuple[float, delivery.Session, delivery.Message]] = []
        self._heard: set[tuple[delivery.Session, delivery.Message]] = set()
        self._latest: dict[tuple[delivery.Session, bytes], tuple[int, int]] = {}

    def step(self, now: float) -> None:
        """Let what is due arrive, and somebody say something."""
        due = [copy for copy in self._under_way if copy[0] <= now]
        self._under_way = [copy for copy in self._under_way if copy[0] > now]
        for at, session, message in sorted(due, key=lambda copy: copy[0]):
            if session.is_present:
                self._arrive(session, message, at)
        index = self._chance.randrange(8)
        if self._chance.random() < 0.02:
            self._book.leave(self._present[index], now)
            self._present[index] = self._book.join(index + 1, now)
        self._say(index, now + 0.001)

    def _say(self, index: int, now: float) -> None:
        """Let a user say something, which comes to the others never, once or twice."""
        sender = self._present[index]
        message = self._book.say(sender, now, sender)
        self._heard.add((sender, message))
        for session in self._present:
            if session is sender:
                continue
            copies = self._chance.choice((0, 1, 1, 1, 1, 1, 1, 1, 2))
            self.truth["lost"] += copies == 0
            for _ in range(copies):
                at = now + self._chance.uniform(0.001, 0.1)
                self._under_way.append((at, session, message))

    def _arrive(self, session: delivery.Session, message: delivery.Message, at: float) -> None:
        self._book.hear(session, message, at)
        if (session, message) in self._heard:
            self.truth["repeated"] += 1
            return
        self._heard.add((session, message))
        self.truth["arrived"] += 1
        key = (session, message.identity)
        latest = self._latest.get(key, (0, 0))
        if latest > message.position and latest[0] == message.position[0]:
            self.truth["reordered"] += 1
        self._latest[key] = max(latest, message.position)


@pytest.mark.parametrize("seed", range(8))
def test_any_room_is_accounted_for_to_within_what_is_said_to_be_unjudged(
    seed: int, book: Book
) -> None:
    room = RandomRoom(book, seed)
    for number in range(1, 2000):
        now = 0.2 + number / 100
        room.step(now)
        if number % 25 == 0:
            book.judge(now)
    book.account.end()
    counts, truth = book.counts, room.truth
    assert counts["arrived"] == truth["arrived"]
    assert counts["repeated"] == truth["repeated"] > 0
    assert counts["reordered"] == truth["reordered"] > 0
    assert 0 < counts["lost"] <= truth["lost"] <= counts["lost"] + counts["missing"]
    assert book.lost.total() == counts["lost"]


def test_over_a_million_deliveries_of_a_healthy_room_nothing_is_reported(book: Book) -> None:
    """101 users say 10,000 messages, while each of them now and then leaves and comes back."""
    present = book.join_many(101)
    for number in range(10_000):
        now = 1.0 + number / 100
        index = number % len(present)
        message = book.say(present[index], now, present[index])
        payload = stamp_of_message(message)
        for session in present:
            if session is not present[index]:
                book.account.take(session, payload, now + 0.004)
        if number % 50 == 0:
            book.leave(present[index], now + 0.005)
            present[index] = book.join(index + 1, now + 0.006)
            book.judge(now + 0.007)
    counts = book.counts
    assert counts["arrived"] == 10_000 * 100 + 101 * 100
    assert counts["reached"] > 800_000
    assert counts["lost"] == counts["repeated"] == counts["reordered"] == counts["unheard"] == 0
    assert counts["missing"] == 0


# -- users in a room


def healthy(_count: int, line: bytes) -> list[bytes]:
    return [line]


def twice(_count: int, line: bytes) -> list[bytes]:
    return [line, line]


def losing(_count: int, line: bytes) -> list[bytes]:
    """Lose a message that says so."""
    return [] if line.endswith(b"lose this") else [line]


class Room:
    """A chat room: a line goes to all others, as the fault makes it, and to its sender.

    It counts what it does: ``lost`` are the deliveries that it has not made to those present.

    :param fault: makes of the count of a line, from 1, and the line what the others get
    :param echoes: how often the sender gets it
    :param history: whether who comes is told all that was said before
    :param deaf: how many of those who come first are told nothing by others
    """

    def __init__(
        self, fault: Fault = healthy, *, echoes: int = 0, history: bool = False, deaf: int = 0
    ) -> None:
        self.members: list[socket.socket] = []
        self.lines: list[bytes] = []
        self.lost = 0
        self._fault = fault
        self._echoes = echoes
        self._history = history
        self._deaf_left = deaf
        self.deaf: set[socket.socket] = set()

    def __call__(self, connection: socket.socket) -> None:
        if self._history:
            connection.sendall(b"".join(line + b"\n" for line in self.lines))
        self.members.append(connection)
        if self._deaf_left:
            self._deaf_left -= 1
            self.deaf.add(connection)
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
        connection_lines = (line + b"\n") * self._echoes
        if connection_lines:
            sender.sendall(connection_lines)
        copies = self._fault(len(self.lines), line)
        if not copies:
            self.lost += len(self.members) - 1
        for copy in copies:
            self.tell_others(sender, copy)

    def tell_others(self, sender: socket.socket, line: bytes) -> None:
        """Send a line to all but its sender."""
        for member in list(self.members):
            if member is sender:
                continue
            if member in self.deaf and line != END:
                self.lost += 1
            else:
                member.sendall(line + b"\n")


class Talker(delivery.Delivery, locustfile.TCPChatUser):
    """A user that a test lets talk; it awaits no echo, and counts the ends that it hears."""

    echo: locustfile.EchoMode = "none"
    timeout = 60.0  # the test says when it is over
    ends = 0

    def on_message(self, payload: bytes, arrived: float) -> None:
        super().on_message(payload, arrived)
        if payload == END:
            self.ends += 1


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
        delivery.update_sessions()
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
        """See that there are as many rows ``delivery`` as expected, when all is judged.

        Everybody says an end after what they have said. When it has come to all others, so has
        what was on its way; what has not come by then is lost.
        """
        present = [user for user in self.users if user.client.connected_since is not None]
        heard = {user: user.ends for user in present}
        for user in present:
            user.client.send_chat(END, echo="none")
        others = len(present) - 1
        wait_until(lambda: all(user.ends >= heard[user] + others for user in present))
        delivery.update_sessions()
        delivery.ACCOUNT.judge_due(perf_counter() + 1000)
        assert self.deliveries == expected

    def settle(self) -> None:
        """Let everybody say something that all others hear: so the server has all in the room."""
        for user in self.users:
            user.client.send_chat("hello")
        self.hear(arrived=len(self.users) * (len(self.users) - 1))
        self.rows.clear()
        delivery.ACCOUNT.counts.clear()

    def wait_for_open(self, count: int) -> None:
        """Wait until the server has so many connections."""
        wait_until(lambda: self.server.open == count)


@pytest.fixture
def meet(serve: Serve, rows: Rows) -> Iterator[Meet]:
    """Return a function that opens a room; all leave after the test."""
    meetings: list[Meeting] = []

    def open_room(handler: Handler) -> Meeting:
        delivery.ACCOUNT.begin()
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
    """Let a line look as if it came from another machine, and another user."""
    return [re.sub(rb"~[0-9a-f]{8}(.*)\.[0-9a-f]{7}", rb"~0123abcd\1.0000000", line)]


def test_a_message_is_delivered_to_everybody_but_its_sender(meet: Meet) -> None:
    meeting = meet(Room(echoes=1))
    users = [meeting.join(echo="full") for _ in range(5)]
    for user in users:
        assert str(user.client.send_chat("hello")).endswith("hello")
    meeting.hear(arrived=5 * 4)
    assert meeting.rows.counts()["echo_response"] == 5
    assert delivery.ACCOUNT.counts["reached"] == 5 * 4


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


def test_the_row_carries_the_context_of_the_user_that_hears(meet: Meet) -> None:
    class Named(Talker):
        def context(self) -> dict[str, object]:
            return {"user": "kim"}

    meeting = meet(Room())
    first, _ = meeting.join(), meeting.join(Named)
    say(first, 1)
    meeting.hear(arrived=1)
    assert [row["context"] for row in meeting.rows.named("delivery")] == [{"user": "kim"}]


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
    wait_until(lambda: meeting.deliveries == {"arrived": 3})
    assert {row["response_time"] for row in meeting.rows.named("delivery")} == {None}


@pytest.mark.parametrize("fault", [healthy, other_machine])
def test_history_is_no_delivery(fault: Fault, meet: Meet) -> None:
    room = Room(fault, history=True)
    meeting = meet(room)
    first, second = meeting.join_many(2)
    say(first, 5)
    wait_until(lambda: meeting.deliveries == {"arrived": 5})
    room.lines = [copy for line in room.lines for copy in fault(0, line)]
    second.client.close()
    meeting.wait_for_open(1)
    meeting.join()
    assert second.client.connect()
    meeting.wait_for_open(3)
    say(first, 1)
    wait_until(lambda: meeting.deliveries == {"arrived": 5 + 2})


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

    meeting = meet(Room(lambda count, line: [] if count == 2 else [line]))
    first, _ = meeting.join(Pinging), meeting.join()
    for text in ("hello", "PING", "hello"):
        first.client.send_chat(text)
    meeting.hear(arrived=2)
    assert delivery.ACCOUNT.counts["stamped"] == 2


class Json(locustfile.TCPChatUser):
    """A user whose messages are JSON objects, with the tag twice."""

    abstract = True

    def compose(self, tag: str, message: str) -> str | bytes:
        return json.dumps({"id": tag, "say": f"{tag} {message}"})

    def expected(self, tag: str, message: str) -> str | bytes | None:
        return f"{tag} {message}"


class JsonTalker(Talker, Json):
    echo = "full"


class JsonRoom(Room):
    """A room that puts what was said into an object of its own, for its sender too."""

    def broadcast(self, sender: socket.socket, line: bytes) -> None:
        said = json.loads(line)
        told = json.dumps({"by": "kim", "id": said["id"], "said": said["say"]}).encode()
        super().broadcast(sender, told)


def test_a_tag_that_stands_twice_in_a_message_is_one_message(meet: Meet) -> None:
    """A protocol's own ``compose`` and ``expected`` get the stamp in place of the tag."""
    meeting = meet(JsonRoom(echoes=1))
    first, _ = meeting.join_many(2, JsonTalker)
    for _ in range(3):
        assert first.client.send_chat("hello")
    meeting.hear(arrived=3)
    assert meeting.rows.counts()["echo_response"] == 3


def test_ones_own_message_that_comes_back_twice_is_repeated(meet: Meet) -> None:
    meeting = meet(Room(echoes=2))
    first, second = meeting.join(echo="full"), meeting.join(echo="none")
    for _ in range(3):
        assert first.client.send_chat("hello")
    say(second, 2)
    wait_until(lambda: meeting.deliveries == {"arrived": 5, "DeliveryRepeated": 5})
    assert delivery.ACCOUNT.counts["repeated"] == 5


def test_what_a_client_in_mode_any_takes_for_its_echo_has_come(meet: Meet) -> None:
    """The first copy of each message of another is the answer, the second one is unawaited."""
    room = Room(lambda count, line: [line, line] if line.endswith(b"twice") else [line])
    meeting = meet(room)
    first, second, third = meeting.join(), meeting.join(echo="any"), meeting.join()
    say(third, 1)
    meeting.hear(arrived=2)
    for number, text in enumerate(("hello", "twice")):
        second.client.send_chat("a question", wait=False)
        wait_until(lambda: room.lines[-1] == b"a question")
        first.client.send_chat(text)
        wait_until(lambda: meeting.rows.counts()["echo_response"] == number + 1)  # noqa: B023
    meeting.hear(arrived=2 + 2 * 2, DeliveryRepeated=2)
    assert delivery.ACCOUNT.counts["reached"] == 6


def test_the_room_of_a_user_is_the_one_that_it_names(meet: Meet) -> None:
    class Rooms(Room):
        """Two rooms: who says ``red`` is told what is red."""

        def tell_others(self, sender: socket.socket, line: bytes) -> None:
            index = self.members.index(sender)
            if line == END:
                super().tell_others(sender, line)
            else:
                self.members[index ^ 1].sendall(line + b"\n")

    meeting = meet(Rooms(losing))
    pairs = [meeting.join(room=room) for room in ("red", "red", "blue", "blue")]
    for user in pairs:
        say(user, 2)
    meeting.hear(arrived=4 * 2)
    pairs[0].client.send_chat("lose this")
    meeting.hear(arrived=4 * 2)
    assert delivery.ACCOUNT.counts["unheard"] == 1


def test_who_turns_the_numbering_off_is_timed_and_not_accounted_for(meet: Meet) -> None:
    """The first user's messages go to nobody, twice, or in any order."""
    faults = {2: 0, 3: 2}
    meeting = meet(Room(lambda count, line: [line] * faults.get(count, 1)))
    first, *_ = meeting.join(numbered=False), meeting.join(), meeting.join()
    say(first, 4)
    meeting.hear(arrived=4 * 2)
    assert all(row["response_time"] is not None for row in meeting.rows.named("delivery"))
    assert delivery.ACCOUNT.counts["stamped"] == 4
    assert delivery.ACCOUNT.counts["unheard"] == 0


def test_each_lost_message_is_told_to_each_receiver(meet: Meet) -> None:
    """The senders' echoes show that the lost ones were said."""
    room = Room(lambda count, line: [] if count % 5 == 0 else [line], echoes=1)
    meeting = meet(room)
    first, *_ = meeting.join(echo="full"), meeting.join(), meeting.join()
    meeting.settle()
    say(first, 20)
    meeting.hear(arrived=16 * 2, DeliveryLost=4 * 2)
    assert room.lost == 4 * 2
    assert delivery.ACCOUNT.counts["unheard"] == 4


def test_what_an_others_only_room_swallows_is_unheard(meet: Meet) -> None:
    """Nothing shows that it was said."""
    meeting = meet(Room(lambda count, line: [] if count % 5 == 0 else [line]))
    first, *_ = meeting.join_many(3)
    meeting.settle()
    say(first, 20)
    meeting.hear(arrived=16 * 2)
    assert delivery.ACCOUNT.counts["unheard"] == 4


def test_who_is_told_nothing_loses_everything(meet: Meet) -> None:
    room = Room(deaf=1)
    meeting = meet(room)
    _deaf, second, third = meeting.join_many(3)
    say(second, 10)
    say(third, 10)
    meeting.hear(arrived=20, DeliveryLost=20)
    assert room.lost == 20


def test_each_repeated_message_is_told(meet: Meet) -> None:
    meeting = meet(Room(lambda count, line: [line, line] if count % 4 == 0 else [line]))
    first, *_ = meeting.join_many(3)
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
    first, *_ = meeting.join_many(3)
    say(first, 20)
    meeting.hear(arrived=10 * 2, DeliveryReordered=10 * 2)
    assert delivery.ACCOUNT.counts["arrived"] == 40


# -- no false report


def test_users_may_come_and_leave(meet: Meet) -> None:
    meeting = meet(Room(losing, echoes=1))
    first, second = meeting.join(echo="full"), meeting.join()
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
    first.client.send_chat("lose this")
    meeting.hear(arrived=9 + 5, DeliveryLost=1)


def test_a_receiver_that_was_away_misses_nothing(meet: Meet) -> None:
    meeting = meet(Room(losing))
    first, second, _third = meeting.join_many(3)
    say(first, 3)
    meeting.hear(arrived=6)
    second.client.close()
    meeting.wait_for_open(2)
    say(first, 3)
    meeting.hear(arrived=6 + 3)
    assert second.client.connect()
    meeting.wait_for_open(3)
    say(first, 1)
    meeting.hear(arrived=9 + 2)


def test_a_sender_whose_connection_ends_with_its_message_has_not_lost_it(meet: Meet) -> None:
    """The third message ends the connection before the room has it."""

    class Dropping(Room):
        def broadcast(self, sender: socket.socket, line: bytes) -> None:
            if b"hang up" in line:
                sender.shutdown(socket.SHUT_RDWR)
            else:
                super().broadcast(sender, line)

    meeting = meet(Dropping())
    first, _ = meeting.join_many(2)
    say(first, 2)
    first.client.send_chat("hang up")
    wait_until(lambda: first.client.connected_since is None)
    say(first, 2)
    meeting.hear(arrived=4)
    assert delivery.ACCOUNT.counts["unheard"] == 0


def test_what_was_said_while_a_login_lasted_is_history_to_it(meet: Meet) -> None:
    class Slow(Talker):
        def on_connect(self) -> None:
            logging_in.set()
            assert goes_on.wait(60)

    logging_in, goes_on = Event(), Event()
    meeting = meet(Room(echoes=1))
    first = meeting.join()
    slow = Slow(first.environment)
    meeting.users.append(slow)
    connecting = gevent.spawn(slow.client.connect)
    assert logging_in.wait(60)
    meeting.wait_for_open(2)
    say(first, 3)
    gevent.sleep(0)
    goes_on.set()
    assert connecting.get(timeout=60)
    meeting.hear()


def test_what_waits_behind_a_blocked_handler_is_not_lost(meet: Meet) -> None:
    class Slow(locustfile.TCPChatUser):
        abstract = True

        def on_message(self, payload: bytes, arrived: float) -> None:
            if payload.endswith(b"wait"):
                waiting.set()
                goes_on.wait(60)
            super().on_message(payload, arrived)

    class SlowTalker(Talker, Slow):
        pass

    waiting, goes_on = Event(), Event()
    meeting = meet(Room(echoes=1))
    first, _slow = meeting.join(), meeting.join(SlowTalker)
    meeting.settle()
    for text in ("wait", "hello"):
        first.client.send_chat(text)
    assert waiting.wait(60)
    wait_until(lambda: meeting.server.open == 2 and delivery.ACCOUNT.counts["arrived"] == 1)
    delivery.ACCOUNT.judge_due(perf_counter() + 1000)
    goes_on.set()
    wait_until(lambda: _slow.client.connected_since is not None)
    counts = delivery.ACCOUNT.counts
    assert (counts["lost"], counts["missing"], counts["reached"]) == (0, 1, 1)


def test_what_is_handled_late_lets_the_judgement_wait(meet: Meet) -> None:
    meeting = meet(Room(losing, echoes=1))
    first, second = meeting.join_many(2)
    meeting.settle()
    first.client.send_chat("lose this")
    (message,) = [each for each in delivery.ACCOUNT.messages.values() if not each.is_judged]
    wait_until(lambda: message.is_said)
    second.on_message(b"something", perf_counter() - 1000)
    delivery.ACCOUNT.judge_due(perf_counter() + 1000)
    assert delivery.ACCOUNT.counts["lost"] == 0
    delivery.ACCOUNT.judge_due(perf_counter() + 2000)
    assert delivery.ACCOUNT.counts["lost"] == 1


def test_what_an_untagged_exchange_takes_before_earlier_messages_are_handled_is_in_order(
    meet: Meet,
) -> None:
    class Slow(Talker):
        def on_message(self, payload: bytes, arrived: float) -> None:
            if payload.endswith(b"wait"):
                waiting.set()
                goes_on.wait(60)
            super().on_message(payload, arrived)

    waiting, goes_on = Event(), Event()
    meeting = meet(Room())
    first, slow = meeting.join(), meeting.join(Slow)
    first.client.send_chat("wait")
    assert waiting.wait(60)
    slow.client.send_chat("a question", echo="any", wait=False)
    first.client.send_chat("hello")
    wait_until(lambda: meeting.deliveries == {"arrived": 1})
    goes_on.set()
    meeting.hear(arrived=2)


def test_what_came_before_the_end_of_a_connection_counts_however_late_it_is_handled(
    meet: Meet,
) -> None:
    class Slow(Talker):
        def on_message(self, payload: bytes, arrived: float) -> None:
            if payload.endswith(b"wait"):
                goes_on.wait(60)
            super().on_message(payload, arrived)

    goes_on = Event()
    room = Room()
    meeting = meet(room)
    first, slow = meeting.join(), meeting.join(Slow)
    for text in ("wait", "hello", "hello"):
        first.client.send_chat(text)
    wait_until(lambda: len(room.lines) == 3)
    room.members[1].shutdown(socket.SHUT_WR)
    wait_until(lambda: slow.client.connected_since is None)
    goes_on.set()
    wait_until(lambda: meeting.deliveries == {"arrived": 3})


# -- what is reported at the end


def report(
    elsewhere: int = 0, said: float = 1.0, since: float = 9.0, until: float = 0.0, **counts: int
) -> delivery.Report:
    """Return a report of one room; times are seconds before the report."""
    return delivery.Report(
        counts={"arrived": 9, "reached": 9, "users": 3, "deaf_users": 1, **counts},
        rooms={"": [elsewhere, said, since, until]},
    )


Total = Callable[..., Counter[str]]


@pytest.fixture
def total() -> Iterator[Total]:
    """Return a function that takes the reports of some workers and returns the counts of all."""

    def take_all(*reports: delivery.Report) -> Counter[str]:
        for number, each in enumerate(reports):
            delivery.take_report(f"worker {number}", {"delivery": each})
        return delivery.total_counts()

    delivery.ACCOUNT.begin()
    yield take_all
    delivery.COUNTS_OF_WORKERS.clear()
    delivery.ROOMS_OF_WORKERS.clear()


@pytest.mark.parametrize(
    ("others", "deaf"),
    [
        (report(said=1.0), 1),  # both are of a run of ten seconds, and hear nothing
        (report(said=8.5), 0),  # it may have been said before this one was there
        (report(said=float("inf")), 0),  # nothing was said there
        ({**report(said=1.0), "rooms": {"other": [0, 1.0, 9.0, 0.0]}}, 0),
    ],
)
def test_a_process_that_hears_nothing_of_what_others_said_is_found(
    others: delivery.Report, deaf: int, total: Total
) -> None:
    here = report(said=8.9)
    others["rooms"] = {name: [5.0, *rest] for name, (_, *rest) in others["rooms"].items()}
    counts = total(here, others)
    assert counts["deaf_workers"] == deaf
    assert delivery.has_failed(counts) == bool(deaf)
    line = delivery.result_line(counts)
    assert ("1 of 2 processes heard nobody of the others" in line) == bool(deaf)


def test_what_was_said_when_nobody_of_a_process_was_there_any_more_is_not_missed_by_it(
    total: Total,
) -> None:
    counts = total(report(said=8.9, until=2.0), report(elsewhere=5, said=1.0))
    assert not delivery.has_failed(counts)


def test_a_process_that_hears_others_has_not_failed(total: Total) -> None:
    assert not delivery.has_failed(total(report(elsewhere=1), report(elsewhere=1)))


@pytest.mark.parametrize("reports", [(report(unheard=1),), (report(arrived=0),), ()])
def test_what_nobody_else_heard_fails_a_run_and_so_does_a_run_without_deliveries(
    reports: tuple[delivery.Report, ...], total: Total
) -> None:
    assert delivery.has_failed(total(*reports))


def test_the_line_adds_up_the_processes_and_rounds_the_reach_down(total: Total) -> None:
    first = report(arrived=999_999, reached=999_990, lost=1, repeated=2, stamped=77, missing=4)
    second = report(arrived=5, reached=0, unheard=3)
    first["rooms"] = second["rooms"] = {}
    second["counts"]["elsewhere"] = 5
    line = delivery.result_line(total(first, second))
    assert line == (
        "delivery: 1,000,004 arrived, 1 lost, 2 repeated, 0 out of order; reach 99.99 % of 999,991;"
        " 77 messages stamped, 3 that nobody else heard; 2 of 6 users heard nobody;"
        " not judged: 9 that arrived, 4 that did not, 5 from other processes"
    )


# -- the command

LINE = re.compile(
    r"^delivery: (?P<arrived>[\d,]+) arrived, (?P<lost>[\d,]+) lost, (?P<repeated>[\d,]+) repeated,"
    r" (?P<reordered>[\d,]+) out of order; reach (?P<reach>unknown|[\d.]+ % of [\d,]+);"
    r" (?P<stamped>[\d,]+) messages stamped, (?P<unheard>[\d,]+) that nobody else heard;"
    r" (?P<deaf>\d+) of (?P<users>\d+) users heard nobody; not judged: (?P<young>[\d,]+) that"
    r" arrived, (?P<missing>[\d,]+) that did not, (?P<elsewhere>[\d,]+) from other processes"
    r"(; .*)?$",
    re.MULTILINE,
)


def figures(output: str) -> dict[str, int]:
    """Return the figures of the one line that sums up, which is the last that Locust prints."""
    (match,) = LINE.finditer(output)
    assert output.rstrip().endswith(match[0])
    counts = {name: text.replace(",", "") for name, text in match.groupdict().items()}
    reach, _, judged = counts.pop("reach").partition(" % of ")
    numbers = {name: int(text) for name, text in counts.items()}
    assert 0 <= numbers["young"] + numbers["elsewhere"] <= numbers["arrived"]
    reached = numbers["arrived"] - numbers["young"] - numbers["elsewhere"]
    if judged:
        assert int(judged) == reached + numbers["lost"]
        assert float(reach) == reached * 10_000 // int(judged) / 100
    return {**numbers, "reached": reached}


def entries(output: str) -> dict[str, dict[str, float]]:
    """Return the rows that --json printed, by name."""
    text = "\n" + output
    parsed, _ = json.JSONDecoder().raw_decode(text[text.index("\n[\n") + 1 :])
    return {entry["name"]: entry for entry in parsed}


QUICK = "--headless --users=4 --spawn-rate=4 --run-time=10m --chat-wait=0.1 --chat-timeout=1 --json"
ONE_PROCESS = ("-f", "plugins/delivery.py")
FILES = ("-f", "locustfile.py,plugins/delivery.py", "RoomClient")


def losing_every_seventh(count: int, line: bytes) -> list[bytes]:
    """Lose messages, but none while the users come."""
    return [] if count > 20 and count % 7 == 0 else [line]


def process_of(connection: socket.socket) -> int:
    """Return the process at the other end of a connection, on this machine."""
    for each in psutil.net_connections("tcp4"):
        if each.laddr == connection.getpeername() and each.raddr == connection.getsockname():
            return int(each.pid or 0)
    return 0


class DividedRoom(Room):
    """A room in which the users of a process hear only each other."""

    def __init__(self) -> None:
        super().__init__(echoes=1)
        self._processes: dict[socket.socket, int] = {}

    def __call__(self, connection: socket.socket) -> None:
        self._processes[connection] = process_of(connection)
        super().__call__(connection)

    def tell_others(self, sender: socket.socket, line: bytes) -> None:
        for member in list(self.members):
            if member is not sender and self._processes[member] == self._processes[sender]:
                member.sendall(line + b"\n")


class Case(NamedTuple):
    """A run against a room, which ends as soon as it has shown what the room does."""

    room: Room
    is_shown: Callable[[Program, Room], bool]
    options: tuple[str, ...] = ()
    command: str = ""  # where it is not that of FILES; what comes later wins over it


class Ended(NamedTuple):
    """What is left of a run."""

    room: Room
    exit_code: int
    output: str


def has_failures(running: Program, _room: Room) -> bool:
    return latest_counts(running, "delivery").failures > 20


def has_deliveries(running: Program, _room: Room) -> bool:
    return latest_counts(running, "delivery").successes > 0


def has_many_deliveries(running: Program, _room: Room) -> bool:
    return latest_counts(running, "delivery").successes > 100


def has_heard_much(_running: Program, room: Room) -> bool:
    return len(room.lines) > 150  # in about four seconds


SILENT = ("--chat-echo=none",)
COMMANDS = re.findall(r"^    (locust -f .*)$", str(delivery.__doc__), re.MULTILINE)
CASES = {
    "losing": Case(Room(losing_every_seventh, echoes=1), has_failures),
    "deaf": Case(Room(echoes=1, deaf=1), has_failures),
    "deaf, others only": Case(Room(deaf=1), has_failures, SILENT),
    "nobody hears": Case(Room(lambda count, line: [], echoes=1), has_heard_much),
    "nobody hears, others only": Case(Room(lambda count, line: []), has_heard_much, SILENT),
    "divided": Case(DividedRoom(), has_heard_much, ("--processes=2",)),
    **{
        each: Case(Room(echoes=1), has_many_deliveries, ("--stop-timeout=60",), each)
        for each in COMMANDS
    },
    "too short": Case(Room(echoes=1), has_deliveries, ("--chat-timeout=60",)),
}


@pytest.fixture(scope="module")
def ended() -> Iterator[dict[str, Ended]]:
    """Return the runs of all cases, which were made at the same time, as they wait a lot."""
    servers = {name: Server(case.room) for name, case in CASES.items()}
    running: dict[str, Program] = {}
    try:
        for name, case in CASES.items():
            options = (*QUICK.split(), *bus_options(), *case.options)
            host = f"--host={servers[name].address}"
            given = shlex.split(case.command)[1:] or FILES
            running[name] = Program(*QUICK_LOCUST, *given, host, *options)
        for name, case in CASES.items():
            wait_until(lambda: case.is_shown(running[name], case.room))  # noqa: B023  # at once
        codes = {name: program.stop() for name, program in running.items()}
        yield {
            name: Ended(case.room, codes[name], running[name].output)
            for name, case in CASES.items()
        }
    finally:
        for program in running.values():
            program.kill()
        for server in servers.values():
            server.stop()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_its_first_lines(command: str, ended: dict[str, Ended]) -> None:
    """The first is of one process, the second of a master and two workers."""
    room, exit_code, output = ended[command]
    assert exit_code == 0
    counts = figures(output)
    rows = entries(output)
    assert counts["arrived"] == rows["delivery"]["num_requests"] <= 3 * len(room.lines)
    assert counts["lost"] == counts["repeated"] == counts["reordered"] == counts["deaf"] == 0
    assert counts["unheard"] == 0
    assert rows["echo_response"]["num_requests"] == len(room.lines)
    # A user that ends between making a message and sending it gives it up.
    assert 0 <= counts["stamped"] - len(room.lines) <= counts["users"]
    assert counts["users"] == 4
    assert counts["reached"] > 0
    assert (counts["elsewhere"] > 0) == ("--processes" in command)
    assert rows["delivery"]["num_none_requests"] == 0  # all of one machine
    assert set(rows) == {"connect", "send_chat", "echo_response", "delivery"}


@pytest.mark.parametrize("name", ["losing", "deaf", "deaf, others only"])
def test_what_is_reported_is_what_the_room_did_but_for_what_is_said_to_be_unjudged(
    name: str, ended: dict[str, Ended]
) -> None:
    room, exit_code, output = ended[name]
    assert exit_code == 1
    counts = figures(output)
    assert counts["lost"] == entries(output)["delivery"]["num_failures"]
    # What the first to come did not hear of each other before their logins had ended.
    history = 3 if room.deaf else 0
    assert counts["lost"] <= room.lost <= counts["lost"] + counts["missing"] + history
    assert counts["missing"] < room.lost
    assert counts["repeated"] == counts["reordered"] == 0
    assert counts["deaf"] == len(room.deaf)
    assert "DeliveryLost" in output


@pytest.mark.parametrize(
    ("name", "lost"), [("nobody hears", True), ("nobody hears, others only", False)]
)
def test_a_room_in_which_nothing_arrives_fails(
    name: str, lost: bool, ended: dict[str, Ended]
) -> None:
    _, exit_code, output = ended[name]
    assert exit_code == 1
    counts = figures(output)
    assert counts["arrived"] == 0
    assert counts["unheard"] > 0
    assert (counts["lost"] > 0) == lost


def test_processes_that_hear_nothing_of_each_other_fail(ended: dict[str, Ended]) -> None:
    _, exit_code, output = ended["divided"]
    assert exit_code == 1
    counts = figures(output)
    assert counts["elsewhere"] == counts["lost"] == counts["unheard"] == 0
    assert "; 2 of 2 processes heard nobody of the others" in output


def test_a_run_that_is_too_short_to_judge_says_so(ended: dict[str, Ended]) -> None:
    _, exit_code, output = ended["too short"]
    assert exit_code == 0
    counts = figures(output)
    assert counts["reached"] == 0
    assert counts["young"] == counts["arrived"]
    assert "reach unknown" in output


@pytest.mark.together
def test_a_generator_that_is_stopped_for_longer_than_the_timeout_loses_nothing(
    serve: Serve, start: Start
) -> None:
    room = Room(echoes=1)
    host = f"--host={serve(room).address}"
    running = start(
        *QUICK_LOCUST, *ONE_PROCESS, host, *QUICK.split(), "--chat-wait=0", "--users=20"
    )
    wait_until(lambda: latest_counts(running, "delivery").successes > 1000)
    running.process.send_signal(signal.SIGSTOP)
    gevent.sleep(2.5)
    running.process.send_signal(signal.SIGCONT)
    said = len(room.lines)
    wait_until(lambda: len(room.lines) > said + 2000)
    running.stop()
    counts = figures(running.output)
    assert counts["lost"] == counts["unheard"] == counts["reordered"] == 0
    assert counts["reached"] > 0


@pytest.mark.together
def test_a_worker_that_gets_the_files_from_its_master_tells_it_what_was_lost(
    serve: Serve, start: Start
) -> None:
    room = Room(losing_every_seventh, echoes=1)
    bus = bus_options()
    options = (f"--host={serve(room).address}", *QUICK.split())
    master = start(*QUICK_LOCUST, *FILES, "--master", "--expect-workers=1", *options, *bus)
    worker = start(*QUICK_LOCUST, "-f", "-", "--worker", *bus)
    wait_until(lambda: latest_counts(master, "delivery").failures > 0)
    assert master.stop() == 1
    worker.ends()
    counts = figures(master.output)
    rows = entries(master.output)
    assert rows["delivery"]["num_requests"] == counts["arrived"] + counts["lost"]
    assert rows["delivery"]["num_failures"] == counts["lost"]
    assert 0 < counts["lost"] <= room.lost <= counts["lost"] + counts["missing"]
    assert "DeliveryLost" in master.output
    assert "delivery: " not in worker.output


@pytest.mark.together
def test_the_figures_of_a_worker_that_dies_are_kept(serve: Serve, start: Start) -> None:
    room = Room(echoes=1)
    bus = bus_options()
    options = (f"--host={serve(room).address}", *QUICK.split())
    master = start(*QUICK_LOCUST, *FILES, "--master", "--expect-workers=1", *options, *bus)
    worker = start(*QUICK_LOCUST, "-f", "-", "--worker", *bus)
    wait_until(lambda: latest_counts(master, "delivery").successes > 100)
    worker.kill()
    master.stop()
    assert figures(master.output)["arrived"] > 100


@pytest.mark.together
def test_each_run_in_the_web_ui_is_summed_up_by_itself(serve: Serve, start: Start) -> None:
    web_ui = WebUI()
    options = (f"--host={serve(Room(echoes=1)).address}", "--chat-wait=0.1", *web_ui.options)
    running = start(*QUICK_LOCUST, *ONE_PROCESS, *options, cwd=ROOT)

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
    assert running.stop() == 0
    assert len(arrived()) == 2


@pytest.mark.together
def test_a_web_ui_in_which_nobody_starts_a_run_has_not_failed(serve: Serve, start: Start) -> None:
    web_ui = WebUI()
    host = f"--host={serve(Room()).address}"
    running = start(*QUICK_LOCUST, *ONE_PROCESS, host, *web_ui.options, cwd=ROOT)
    running.prints("Starting web interface")
    wait_until(web_ui.statistics)
    assert running.stop() == 0
    assert "delivery: " not in running.output


def test_with_the_stamp_long_texts_keep_their_sizes(meet: Meet) -> None:
    class Longest(Talker):
        wait_time = between(1, 2)

    user = meet(Room()).join(Longest)
    tag = f"{'f' * 8}.999999"
    for texts, sizes in (
        (locustfile.LONG_TEXTS, range(100, 401)),
        (locustfile.VERY_LONG_TEXTS, range(513, 1001)),
    ):
        for text in texts:
            payload = str(user.compose(tag, text)).encode()
            assert delivery.STAMP.search(payload)
            assert len(payload) in sizes
