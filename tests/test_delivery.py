"""``plugins/delivery.py``: deliveries to the others are timed, and every one is accounted for."""

from __future__ import annotations

import json
import random
import re
import shlex
import signal
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from time import perf_counter
from typing import NamedTuple

import delivery
import gevent
import psutil
import pytest
from gevent.event import Event
from hypothesis import given, settings
from hypothesis import strategies as st
from locust.env import Environment
from programs import (
    QUICK_LOCUST,
    Program,
    Start,
    WebUI,
    bus_options,
    documented_commands,
    latest_counts,
    programs,
    wait_until,
)
from rows import Rows
from servers import Handler, Serve, Server, lines, servers

import locustfile

Fault = Callable[[int, bytes], list[bytes]]
Meet = Callable[..., "Meeting"]
END = b"that was all"  # no fault of a room touches it, and it carries no stamp
FOREIGN = "0000000"  # a machine that is not this one


def told_of(error: locustfile.ChatError | None) -> str:
    """Return "lost" for ``DeliveryLost``, and so on, and "arrived" where there is no error."""
    if error is None:
        return "arrived"
    name = type(error).__name__
    return name.removeprefix("Delivery").lower()


def check_counts(counts: Counter[str], **expected: int) -> None:
    """See that these of the counts are as expected."""
    shown = {name: counts[name] for name in expected}
    assert shown == expected


# -- the account: what was said and heard at given times, without a connection

TIMEOUT = 5.0
DUE = TIMEOUT + delivery.GRACE  # seconds after which a message is judged


class Member(delivery.Delivery):
    """A user without a connection; it notes what it reports last, and counts what it has lost."""

    abstract = True
    timeout = TIMEOUT

    def __init__(self) -> None:
        super().__init__(Environment(host="127.0.0.1:1"))
        self.told = ""
        self.lost = 0

    def report_delivery(
        self,
        milliseconds: float | None,
        size: int,
        error: locustfile.ChatError | None,
    ) -> None:
        self.told = told_of(error)
        if self.told == "lost":
            self.lost += 1


class Book:
    """An account, with users that have names; ``"ann ben"`` are two of them.

    ``hears…`` let a copy of a message arrive, and see what is told of it.
    """

    def __init__(self) -> None:
        self.account = delivery.Account()
        self.members: dict[str, Member] = {}
        self.sessions: dict[str, delivery.Session] = {}  # the latest of each
        self._said: Counter[str] = Counter()

    def join(self, names: str, at: float, *, room: str = "") -> None:
        """Let users log in, for the first time or again."""
        for name in names.split():
            member = self.members.setdefault(name, Member())
            member.room = room
            self.sessions[name] = self.account.join(member, at)

    def leave(self, names: str, at: float) -> None:
        """Let the connections of users end."""
        for name in names.split():
            self.sessions[name].left_at = at

    def settle(self, names: str) -> None:
        """Let users log in whom the server is seen to have in the room, and count from there."""
        self.join(names, 0.0)
        for name in names.split():
            self.say(name, 0.1, heard_by=names)
        self.judge(0.2 + DUE)
        self.account.counts.clear()

    def say(self, name: str, at: float, *, heard_by: str = "", wait: float = 0.0) -> bytes:
        """Let a user say something that some users hear: an echo is what it hears itself.

        Return it as it comes to the others.
        """
        self._said[name] += 1
        sender = self.sessions[name]
        tag = tag_of(sender, self._said[name])
        self.account.stamp(sender, tag.encode(), sender.connection, at)
        stamp = stamp_of(tag, at, connection=sender.connection)
        for receiver in heard_by.split():
            self.hear(receiver, stamp, at + wait)
        return stamp

    def hear(self, name: str, payload: bytes, at: float, *, is_in_order: bool = True) -> str:
        """Let a payload arrive; return what is told of it, "" where nothing is."""
        member = self.members[name]
        member.told = ""
        self.account.take(self.sessions[name], payload, at, is_in_order)
        return member.told

    def hears(self, name: str, payload: bytes, at: float, *, is_in_order: bool = True) -> None:
        """Let a payload arrive that is a delivery."""
        assert self.hear(name, payload, at, is_in_order=is_in_order) == "arrived"

    def hears_again(self, name: str, payload: bytes, at: float) -> None:
        """Let a payload arrive that is a repetition."""
        assert self.hear(name, payload, at) == "repeated"

    def hears_out_of_order(self, name: str, payload: bytes, at: float) -> None:
        """Let a payload arrive that is behind a later one."""
        assert self.hear(name, payload, at) == "reordered"

    def hears_nothing_new(self, name: str, payload: bytes, at: float) -> None:
        """Let a payload arrive of which nothing is told."""
        assert self.hear(name, payload, at) == ""

    def judge(self, now: float) -> None:
        """Judge what is due."""
        self.account.judge_due(now)

    def check_counts(self, **expected: int) -> None:
        """See that these counts are as expected."""
        check_counts(self.account.counts, **expected)

    def check_lost(self, **expected: int) -> None:
        """See that these users have lost so many, and nobody else has lost anything."""
        lost = {}
        for name, member in self.members.items():
            if member.lost:
                lost[name] = member.lost
        assert lost == expected


def tag_of(sender: delivery.Session, number: int) -> str:
    """Return the tag of a message of a user."""
    return f"{sender.identity.decode()}.{number}"


def stamp_of(
    tag: str,
    made_at: float,
    machine: str = delivery.MACHINE,
    connection: int = 1,
) -> bytes:
    """Return the stamp of a message."""
    ticks = int(made_at * delivery.TICKS)
    stamp = f"~{tag}.{connection}.{ticks:x}.{machine}"
    return stamp.encode()


def foreign_stamp(number: int, made_at: float, machine: str = delivery.MACHINE) -> bytes:
    """Return a stamp of a user in another process."""
    return stamp_of(f"0123abcd.{number}", made_at, machine)


@pytest.fixture
def book() -> Book:
    """Return a book in which nobody is."""
    return Book()


@pytest.fixture
def pair(book: Book) -> Book:
    """Return a book in which ann and ben have settled."""
    book.settle("ann ben")
    return book


@pytest.fixture
def trio(book: Book) -> Book:
    """Return a book in which ann, ben and cem have settled."""
    book.settle("ann ben cem")
    return book


def test_what_was_said_and_did_not_come_is_lost_when_its_time_is_over(trio: Book) -> None:
    trio.say("ann", 1.0, heard_by="ann ben")  # an echo, and a copy
    trio.judge(1.0 + DUE)
    trio.check_lost()
    trio.judge(1.01 + DUE)
    trio.check_lost(cem=1)
    trio.check_counts(lost=1, reached=1)


def test_a_message_counts_as_said_once_its_sender_has_heard_it(trio: Book) -> None:
    trio.say("ann", 1.0, heard_by="ann")
    trio.judge(9.0)
    trio.check_lost(ben=1, cem=1)
    trio.check_counts(unheard=1)


def test_a_message_counts_as_said_once_another_user_has_heard_it(trio: Book) -> None:
    trio.say("ann", 1.0, heard_by="ben")
    trio.judge(9.0)
    trio.check_lost(cem=1)
    trio.check_counts(unheard=0)


def test_what_nobody_was_seen_to_hear_is_unheard_and_not_lost(trio: Book) -> None:
    trio.say("ann", 1.0)
    trio.judge(9.0)
    trio.check_counts(unheard=1, lost=0)


def test_what_may_have_ended_with_its_senders_connection_is_not_judged(trio: Book) -> None:
    trio.say("ann", 1.0)
    trio.leave("ann", 1.1)
    trio.judge(9.0)
    trio.check_counts(unheard=0, lost=0, missing=2)


def test_what_a_sender_said_before_it_left_is_judged_where_it_was_said(trio: Book) -> None:
    trio.say("ann", 1.0, heard_by="ben")
    trio.leave("ann", 1.1)
    trio.judge(9.0)
    trio.check_lost(cem=1)


def test_where_nobody_else_is_there_nothing_is_missed(book: Book) -> None:
    book.settle("ann")
    book.say("ann", 1.0, heard_by="ann")
    book.judge(9.0)
    book.check_counts(unheard=0, missing=0)


def test_who_came_later_left_before_or_came_back_misses_nothing(trio: Book) -> None:
    trio.leave("ben", 0.5)
    trio.say("ann", 1.0, heard_by="ann")
    trio.join("dan", 1.1)
    trio.join("ben", 1.2)
    trio.say("dan", 1.3, heard_by="dan")
    trio.say("ben", 1.3, heard_by="ben")
    trio.judge(6.7)  # the message of 1.0 alone
    trio.check_lost(cem=1)
    trio.check_counts(missing=0)


def test_who_leaves_before_the_time_is_over_is_not_judged(trio: Book) -> None:
    trio.say("ann", 7.0, heard_by="cem")
    trio.leave("ben cem", 8.0)
    trio.judge(14.0)
    trio.check_counts(
        arrived=1,
        reached=0,
        missing=1,
        lost=0,
    )
    room = trio.account.rooms[""]
    assert room.sessions == {trio.sessions["ann"]}  # nothing pending concerns who is gone


def test_what_comes_between_login_and_the_first_sign_of_the_server_is_not_judged(
    pair: Book,
) -> None:
    """A login that awaits no answer ends before the server knows of it."""
    pair.join("cem", 1.0)
    pair.say("ann", 1.1, heard_by="ben")
    pair.say("ann", 1.2, heard_by="ben cem", wait=0.1)
    pair.say("ann", 1.25, heard_by="ben")
    pair.say("ann", 1.4, heard_by="ben")
    pair.judge(9.0)
    pair.check_lost(cem=1)
    pair.check_counts(missing=2)


def test_that_somebody_hears_a_user_is_a_sign_that_the_server_has_it_in_the_room(
    pair: Book,
) -> None:
    pair.join("cem", 1.0)
    pair.say("cem", 1.1, heard_by="ann ben")
    pair.say("ann", 1.2, heard_by="ben")
    pair.say("ann", 1.3, heard_by="ben cem")
    pair.judge(9.0)
    pair.check_lost(cem=1)


def test_who_hears_nobody_has_lost_everything(pair: Book) -> None:
    pair.join("deaf echoed", 1.0)
    pair.say("echoed", 1.1, heard_by="echoed ann ben")
    for at in (2.0, 3.0, 4.0):
        pair.say("ann", at, heard_by="ben")
    pair.judge(20.0)
    pair.check_lost(deaf=4, echoed=3)
    hearing = pair.account.hearing_users
    for name in ("deaf", "echoed"):
        session = pair.sessions[name]
        assert session.identity not in hearing


def test_ones_own_message_may_come_back_once(pair: Book) -> None:
    message = pair.say("ann", 1.0, heard_by="ben")
    pair.hears_nothing_new("ann", message, 1.1)
    pair.hears_again("ann", message, 1.2)
    pair.check_counts(repeated=1, arrived=1)


def test_a_repetition_is_told_also_after_the_message_was_judged(trio: Book) -> None:
    message = trio.say("ann", 1.0, heard_by="ann ben")
    trio.hears_again("ben", message, 1.1)
    trio.judge(9.0)
    trio.hears_again("ben", message, 9.1)
    trio.hears_again("ann", message, 9.2)
    trio.hears_nothing_new("cem", message, 9.3)  # it is lost
    trio.check_counts(repeated=3)


def test_a_swap_is_told_once(pair: Book) -> None:
    one = pair.say("ann", 1.0)
    two = pair.say("ann", 2.0)
    three = pair.say("ann", 3.0)
    pair.hears("ben", two, 5.0)
    pair.hears_out_of_order("ben", one, 5.1)
    pair.hears("ben", three, 5.2)
    pair.check_counts(arrived=3, reordered=1)


def test_there_is_no_order_between_two_connections_of_a_sender(pair: Book) -> None:
    one = pair.say("ann", 1.0)
    two = pair.say("ann", 1.1)
    pair.leave("ann", 1.2)
    pair.join("ann", 1.3)
    three = pair.say("ann", 1.4)
    for message in (three, two, one):
        pair.hears("ben", message, 2.0)


def test_history_is_no_delivery_and_shows_that_it_was_said(pair: Book) -> None:
    message = pair.say("ann", 1.0)
    pair.join("cem", 1.5)
    pair.hears_nothing_new("cem", message, 1.6)
    pair.check_counts(arrived=0)
    pair.judge(9.0)
    pair.check_lost(ben=1)


def test_who_hears_its_own_history_after_a_reconnect_hears_nothing_twice(pair: Book) -> None:
    message = pair.say("ann", 1.0, heard_by="ann ben")
    pair.leave("ann", 1.1)
    pair.join("ann", 1.2)
    pair.hears_nothing_new("ann", message, 1.3)


def test_what_may_wait_behind_a_handler_at_work_is_not_judged(book: Book) -> None:
    book.settle("ann blocked current")
    book.say("ann", 1.0, heard_by="ann")
    is_over_at = 1.0 + TIMEOUT
    book.sessions["blocked"].handled_until = is_over_at - 0.1
    book.sessions["current"].handled_until = is_over_at  # what had come by then was handled before
    book.judge(9.0)
    book.check_lost(current=1)
    book.check_counts(missing=1)


def test_what_this_process_is_behind_with_is_waited_for_and_then_no_more(pair: Book) -> None:
    pair.say("ann", 10.0, heard_by="ann")
    pair.account.note_lag(3.0)
    for waited in (0.1, 0.2, 0.3, 2.9):
        pair.judge(10.0 + DUE + waited)
    pair.check_lost()
    pair.judge(10.0 + DUE + 3.1)
    pair.check_lost(ben=1)
    pair.say("ann", 20.0, heard_by="ann")
    for _ in range(delivery.LAGS_KEPT):
        pair.judge(18.7)
    pair.judge(20.1 + DUE)
    pair.check_lost(ben=2)


def test_what_an_untagged_exchange_took_tells_no_order(pair: Book) -> None:
    """It is taken in another greenlet than what came before it."""
    one = pair.say("ann", 1.0)
    two = pair.say("ann", 2.0)
    three = pair.say("ann", 3.0)
    pair.hears("ben", two, 5.0, is_in_order=False)
    pair.hears("ben", one, 4.9)
    pair.hears("ben", three, 5.1)
    pair.hears_again("ben", two, 5.2)
    pair.judge(9.0)
    pair.check_lost()


def test_who_judges_much_lets_others_go_on(pair: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "LONGEST_SLICE", 0.0)
    pair.say("ann", 1.0, heard_by="ben")
    other = gevent.spawn(lambda: None)
    pair.judge(9.0)
    assert other.dead


def test_the_end_of_a_run_loses_nothing(trio: Book) -> None:
    trio.say("ann", 10.0, heard_by="ann ben")
    trio.say("ann", 10.1)
    trio.account.end()
    trio.check_counts(
        lost=0,
        unheard=0,
        reached=0,
        arrived=1,
        missing=1 + 2,
    )


def test_rooms_are_accounted_for_one_by_one(book: Book) -> None:
    book.join("rea rob", 0.0, room="red")
    book.join("bea bob", 0.0, room="blue")
    book.say("rea", 1.0, heard_by="rea rob")
    message = book.say("bea", 1.0, heard_by="bea")
    book.hears("rea", message, 1.1)  # from a room that is not its own
    book.judge(9.0)
    book.check_lost(bob=1)
    book.check_counts(unheard=1)


@pytest.mark.parametrize("machine", [delivery.MACHINE, FOREIGN])
def test_what_another_process_says_is_never_lost_and_told_once_and_in_order(
    machine: str, pair: Book
) -> None:
    one = foreign_stamp(1, 1.0, machine)
    two = foreign_stamp(2, 2.0, machine)
    three = foreign_stamp(3, 3.0, machine)
    pair.hears("ann", one, 4.0)
    pair.hears("ann", three, 4.0)
    pair.hears_out_of_order("ann", two, 4.0)
    pair.hears_again("ann", three, 4.0)
    pair.judge(4.1 + DUE)
    pair.check_lost()
    pair.check_counts(elsewhere=3)
    pair.hears_again("ann", one, 10.0)


def test_history_of_another_process_is_told_by_the_clock_of_the_machine(pair: Book) -> None:
    pair.join("cem", 10.0)
    old = foreign_stamp(1, 9.0)
    pair.hears_nothing_new("cem", old, 10.1)


def test_history_of_another_machine_is_what_somebody_of_this_one_has_heard(pair: Book) -> None:
    old = foreign_stamp(1, 0.1, FOREIGN)
    new = foreign_stamp(2, 0.2, FOREIGN)
    pair.hears("ann", old, 9.0)
    pair.join("cem", 10.0)
    pair.hears_nothing_new("cem", old, 10.1)
    pair.hears("cem", new, 10.2)


def test_what_goes_to_some_only_is_counted_and_not_judged(pair: Book) -> None:
    ann = pair.sessions["ann"]
    tag = tag_of(ann, 77)
    pair.account.stamp(ann, tag.encode(), 0, 10.0)
    message = stamp_of(tag, 10.0, connection=0)
    pair.hears("ben", message, 10.1)
    pair.hears("ben", message, 10.1)
    pair.hears_nothing_new("ann", message, 10.1)
    earlier = stamp_of(tag_of(ann, 76), 10.0, connection=0)
    pair.hears("ben", earlier, 10.2)
    pair.judge(20.0)
    pair.check_counts(
        stamped=1,
        arrived=3,
        elsewhere=0,
        lost=0,
    )


def test_what_was_judged_long_ago_is_forgotten_and_tells_nothing(pair: Book) -> None:
    old = pair.say("ann", 1.0, heard_by="ann ben")
    for now in (1.1 + DUE, 0.9 + 2 * DUE):
        pair.judge(now)
        pair.hears_again("ben", old, now)
    pair.judge(1.1 + 2 * DUE)
    pair.hears_nothing_new("ben", old, 20.0)
    assert pair.account.messages == {}


def test_stamps_that_a_server_makes_up_stay_bounded(
    pair: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "MESSAGES_KEPT", 100)
    monkeypatch.setattr(delivery, "SENDERS_KEPT", 50)
    for number in range(1000, 1500):
        made_up = stamp_of(f"{number:08x}.1", 100.0)
        pair.hears("ben", made_up, 1.0)
    assert len(pair.account.messages) <= 100
    pair.say("ann", 2.0, heard_by="ann")
    pair.judge(20.0)
    pair.check_lost(ben=1)


class Said(NamedTuple):
    """A message in a room."""

    sender: str
    connection: int
    number: int
    payload: bytes


class Copy(NamedTuple):
    """A copy of a message, on its way to a user."""

    due_at: float
    receiver: str
    message: Said


class RandomRoom:
    """Eight users talk, leave and come back; the room loses, repeats and delays at random.

    ``truth`` counts what it does, as it has to be reported.
    """

    NAMES = "ann ben cem dan eve fay gus hal"
    COPIES = (0, 1, 1, 1, 1, 1, 1, 1, 2)  # how many of a message come to a user

    def __init__(self, book: Book, seed: int) -> None:
        self.truth: Counter[str] = Counter()
        self._book = book
        self._chance = random.Random(seed)
        self._connections: Counter[str] = Counter()
        self._said: Counter[str] = Counter()
        self._under_way: list[Copy] = []
        self._heard: set[tuple[str, Said]] = set()
        self._latest: dict[tuple[str, str], Said] = {}  # by receiver and sender
        book.settle(self.NAMES)

    def step(self, now: float) -> None:
        """Let what is due arrive, and somebody say something."""
        self._let_arrive(now)
        name = self._chance.choice(self.NAMES.split())
        if self._chance.random() < 0.02:
            self._reconnect(name, now)
        self._say(name, now + 0.001)

    def _reconnect(self, name: str, now: float) -> None:
        """Let a user leave, whom nothing reaches that is under way, and come back."""
        self._book.leave(name, now)
        self._book.join(name, now)
        self._connections[name] += 1
        self._under_way = [copy for copy in self._under_way if copy.receiver != name]

    def _say(self, name: str, now: float) -> None:
        """Let a user say something, which comes to the others never, once or twice."""
        payload = self._book.say(name, now, heard_by=name)
        self._said[name] += 1
        message = Said(
            sender=name,
            connection=self._connections[name],
            number=self._said[name],
            payload=payload,
        )
        for receiver in self.NAMES.split():
            if receiver != name:
                self._send(message, receiver, now)

    def _send(self, message: Said, receiver: str, now: float) -> None:
        """Put a message on its way to a user, or lose it."""
        copies = self._chance.choice(self.COPIES)
        if copies == 0:
            self.truth["lost"] += 1
        for _ in range(copies):
            due_at = now + self._chance.uniform(0.001, 0.1)
            copy = Copy(due_at, receiver, message)
            self._under_way.append(copy)

    def _let_arrive(self, now: float) -> None:
        """Let what is due arrive, the earliest first."""
        self._under_way.sort()
        while self._under_way:
            copy = self._under_way[0]
            if copy.due_at > now:
                return
            del self._under_way[0]
            message = copy.message
            self._book.hear(copy.receiver, message.payload, copy.due_at)
            self._note(copy.receiver, message)

    def _note(self, receiver: str, message: Said) -> None:
        """Count what has come to a user as what it is."""
        if (receiver, message) in self._heard:
            self.truth["repeated"] += 1
            return
        self._heard.add((receiver, message))
        self.truth["arrived"] += 1
        latest = self._latest.get((receiver, message.sender), message)
        if message.number >= latest.number:
            self._latest[receiver, message.sender] = message
        elif message.connection == latest.connection:
            self.truth["reordered"] += 1


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
    truth = room.truth
    book.check_counts(
        arrived=truth["arrived"],
        repeated=truth["repeated"],
        reordered=truth["reordered"],
    )
    assert truth["repeated"] > 0
    assert truth["reordered"] > 0
    counts = book.account.counts
    lost = counts["lost"]
    assert lost > 0
    assert lost <= truth["lost"] <= lost + counts["missing"]
    members = book.members.values()
    assert lost == sum(member.lost for member in members)


def test_over_a_million_deliveries_of_a_healthy_room_nothing_is_reported(book: Book) -> None:
    """101 users say 10,000 messages, while each of them now and then leaves and comes back."""
    names = [f"user{number}" for number in range(101)]
    book.settle(" ".join(names))
    for number in range(10_000):
        now = 1.0 + number / 100
        sender = names[number % 101]
        others = [name for name in names if name != sender]
        payload = book.say(sender, now, heard_by=sender)
        for name in others:
            book.hear(name, payload, now + 0.004)
        if number % 50 == 0:
            book.leave(sender, now + 0.005)
            book.join(sender, now + 0.006)
            book.judge(now + 0.007)
    book.check_counts(
        arrived=10_000 * 100,
        lost=0,
        repeated=0,
        reordered=0,
        unheard=0,
        missing=0,
    )
    assert book.account.counts["reached"] > 800_000


# -- users in a room


def as_it_says(_count: int, line: bytes) -> list[bytes]:
    """Lose or repeat a message that says so."""
    if line.endswith(b"lose this"):
        return []
    if line.endswith(b"repeat this"):
        return [line, line]
    return [line]


def swallowed(_count: int, _line: bytes) -> list[bytes]:
    return []


def other_machine(_count: int, line: bytes) -> list[bytes]:
    """Let a line look as if it came from another machine, and another user."""
    foreign = re.sub(
        rb"~[0-9a-f]{8}(.*)\.[0-9a-f]{7}",
        rb"~0123abcd\1.0000000",
        line,
    )
    return [foreign]


class Room:
    """A chat room: a line goes to all others, as the fault makes it, and to its sender.

    It counts what it does: ``lost`` are the deliveries that it has not made to those present.

    :param fault: makes of the count of a line, from 1, and the line what the others get
    :param echoes: how often the sender gets it
    :param history: whether who comes is told all that was said before
    :param deaf: how many of those who come first are told nothing by others
    """

    def __init__(
        self,
        fault: Fault = as_it_says,
        *,
        echoes: int = 0,
        history: bool = False,
        deaf: int = 0,
    ) -> None:
        self.members: list[socket.socket] = []
        self.lines: list[bytes] = []
        self.lost = 0
        self.deaf: set[socket.socket] = set()
        self._fault = fault
        self._echoes = echoes
        self._history = history
        self._deaf_left = deaf

    def __call__(self, connection: socket.socket) -> None:
        if self._history:
            for line in self.lines:
                send_line(connection, line)
        self.members.append(connection)
        if self._deaf_left:
            self._deaf_left -= 1
            self.deaf.add(connection)
        try:
            for line in lines(connection):
                self.take(connection, line)
        finally:
            self.members.remove(connection)

    def take(self, sender: socket.socket, line: bytes) -> None:
        """Take a line."""
        if line == END:
            self.tell_others(sender, line)
        else:
            self.lines.append(line)
            self.broadcast(sender, line)

    def broadcast(self, sender: socket.socket, line: bytes) -> None:
        """Send a line to those who get it."""
        for _ in range(self._echoes):
            send_line(sender, line)
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
                send_line(member, line)

    def wait_for_lines(self, count: int) -> None:
        """Wait until so many lines have come."""
        wait_until(lambda: len(self.lines) >= count)


def send_line(connection: socket.socket, line: bytes) -> None:
    """Send a line to a client."""
    connection.sendall(line + b"\n")


class Talker(delivery.Delivery, locustfile.TCPChatUser):
    """A user that a test lets talk; it awaits no echo, and counts the ends that it hears."""

    echo: locustfile.EchoMode = "none"
    timeout = 60.0  # the test says when it is over
    ends = 0

    def on_message(self, payload: bytes, arrived: float) -> None:
        super().on_message(payload, arrived)
        if payload == END:
            self.ends += 1

    def wait_for_ends(self, count: int) -> None:
        """Wait until so many ends have come."""
        wait_until(lambda: self.ends >= count)


class Gate:
    """A place where a handler stops until the test lets it go on."""

    def __init__(self) -> None:
        self._reached = Event()
        self._open = Event()

    def go_through(self) -> None:
        """Wait, as a handler, until the gate is open."""
        self._reached.set()
        assert self._open.wait(60)

    def wait_for_somebody(self) -> None:
        """Wait until a handler is there."""
        assert self._reached.wait(60)

    def open(self) -> None:
        """Let the handler go on."""
        self._open.set()


class Stopping(locustfile.TCPChatUser):
    """A user that stops at a gate when it is told "wait"."""

    abstract = True
    gate: Gate

    def on_message(self, payload: bytes, arrived: float) -> None:
        if payload.endswith(b"wait"):
            self.gate.go_through()
        super().on_message(payload, arrived)


class StopsBefore(Stopping, Talker):
    """It stops before the plugin has the message."""


class StopsAfter(Talker, Stopping):
    """It stops when the plugin has the message."""


class Meeting:
    """A room, those who come, who have names, and what they report; ``"ann ben"`` are two."""

    def __init__(self, server: Server, rows: Rows) -> None:
        self.server = server
        self.rows = rows
        self.users: dict[str, Talker] = {}

    def join(
        self,
        names: str,
        user_class: type[Talker] = Talker,
        **attributes: object,
    ) -> None:
        """Let users come who have these attributes, one after the other."""
        for name in names.split():
            user = self.add(name, user_class, **attributes)
            assert user.client.connect()
            self.wait_for_server()

    def add(self, name: str, user_class: type[Talker], **attributes: object) -> Talker:
        """Make a user, who does not come yet."""
        environment = Environment(host=self.server.address)
        environment.events.request.add_listener(lambda **row: self.rows.append(row))
        variant: type[Talker] = type("Variant", (user_class,), attributes)
        self.users[name] = variant(environment)
        return self.users[name]

    def leave(self, name: str) -> None:
        """Let a user leave."""
        self.users[name].client.close()
        self.wait_for_server()

    def come_back(self, name: str) -> None:
        """Let a user come that had left."""
        assert self.users[name].client.connect()
        self.wait_for_server()

    def wait_for_server(self) -> None:
        """Wait until the server has those who are there, and the plugin too."""
        wait_until(lambda: self.server.open == len(self.present))
        delivery.update_sessions()

    @property
    def present(self) -> list[Talker]:
        """Those who are there."""
        users = self.users.values()
        return [user for user in users if user.client.connected_since is not None]

    def say(self, name: str, *texts: str, times: int = 1) -> None:
        """Let a user say something."""
        client = self.users[name].client
        for text in texts * times:
            client.send_chat(text)

    def settle(self) -> None:
        """Let everybody say something that all others hear: so the server has all in the room."""
        for name in self.users:
            self.say(name, "hello")
        count = len(self.users)
        self.check_deliveries(arrived=count * (count - 1))
        self.rows.clear()
        delivery.ACCOUNT.counts.clear()

    @property
    def deliveries(self) -> dict[str, int]:
        """How many rows ``delivery`` there are, by what they tell."""
        errors = [row["exception"] for row in self.rows.named("delivery")]
        return dict(Counter(map(told_of, errors)))

    def wait_for_deliveries(self, **expected: int) -> None:
        """Wait until there are these rows ``delivery``."""
        wait_until(lambda: self.deliveries == expected)

    def wait_for_echoes(self, count: int) -> None:
        """Wait until there are so many rows ``echo_response``."""
        wait_until(lambda: len(self.rows.named("echo_response")) == count)

    def check_deliveries(self, **expected: int) -> None:
        """See that there are these rows ``delivery`` when all is judged.

        Everybody says an end after what they have said. When it has come to all others, so has
        what was on its way; what has not come by then is lost.
        """
        present = self.present
        for user in present:
            user.ends = 0
        for user in present:
            user.client.send_chat(END, echo="none")
        for user in present:
            user.wait_for_ends(len(present) - 1)
        delivery.update_sessions()
        judge_all()
        assert self.deliveries == expected

    def check_echoes(self, count: int) -> None:
        """See that there are so many rows ``echo_response`` without an error."""
        assert self.rows.counts()["echo_response"] == count

    def check_counts(self, **expected: int) -> None:
        """See that the plugin has counted so."""
        check_counts(delivery.ACCOUNT.counts, **expected)


def judge_all(seconds: float = 1000.0) -> None:
    """Let the plugin judge as if so much time had gone by."""
    delivery.ACCOUNT.judge_due(perf_counter() + seconds)


@pytest.fixture
def meet(serve: Serve, rows: Rows) -> Iterator[Meet]:
    """Return a function that opens a room, to which users come; all leave after the test."""
    meetings: list[Meeting] = []

    def open_room(handler: Handler, names: str = "") -> Meeting:
        delivery.ACCOUNT.begin()
        meeting = Meeting(serve(handler), rows)
        meetings.append(meeting)
        meeting.join(names)
        return meeting

    yield open_room
    for meeting in meetings:
        for user in meeting.users.values():
            user.client.close()


def test_a_message_is_delivered_to_everybody_but_its_sender(meet: Meet) -> None:
    meeting = meet(Room(echoes=1))
    meeting.join("ann ben cem dan eve", echo="full")
    for user in meeting.users.values():
        echo = user.client.send_chat("hello")
        assert str(echo).endswith("hello")
    meeting.check_deliveries(arrived=5 * 4)
    meeting.check_counts(reached=5 * 4)
    meeting.check_echoes(5)


def test_its_time_is_from_the_sending_to_the_arrival(meet: Meet) -> None:
    def slow(_count: int, line: bytes) -> list[bytes]:
        gevent.sleep(0.2)
        return [line]

    meeting = meet(Room(slow), "ann ben")
    began = perf_counter()
    meeting.say("ann", "hello")
    meeting.check_deliveries(arrived=1)
    elapsed = perf_counter() - began
    (row,) = meeting.rows.named("delivery")
    assert 150 <= row["response_time"] <= elapsed * 1000
    assert row["response_length"] > len("hello")
    assert row["request_type"] == "TCP"


SECONDS = st.one_of(
    st.just(0.0),
    st.floats(-1.0, 1.0),
    st.floats(-1e9, 1e9),
)


def test_no_clock_makes_the_time_of_a_delivery_negative(meet: Meet) -> None:
    meeting = meet(Room(), "ann")
    logged_in_at = perf_counter()
    numbers = iter(range(1, 1000))

    @settings(deadline=None, derandomize=True, database=None)
    @given(stamped=SECONDS, arrived=SECONDS)
    def hear(stamped: float, arrived: float) -> None:
        made_at = max(0.0, logged_in_at + stamped)
        payload = foreign_stamp(next(numbers), made_at)
        meeting.rows.clear()
        meeting.users["ann"].on_message(payload, logged_in_at + arrived)
        rows = meeting.rows.named("delivery")
        assert rows or stamped < 1.0  # what was said before the login is no delivery
        for row in rows:
            assert row["response_time"] >= 0

    hear()


def test_the_row_carries_the_context_of_the_user_that_hears(meet: Meet) -> None:
    class Named(Talker):
        def context(self) -> dict[str, object]:
            return {"user": "kim"}

    meeting = meet(Room(), "ann")
    meeting.join("kim", Named)
    meeting.say("ann", "hello")
    meeting.check_deliveries(arrived=1)
    (row,) = meeting.rows.named("delivery")
    assert row["context"] == {"user": "kim"}


def test_several_messages_in_one_read_are_all_counted(meet: Meet) -> None:
    room = Room(swallowed)
    meeting = meet(room, "ann ben")
    meeting.say("ann", "hello", times=3)
    room.wait_for_lines(3)
    _, to_ben = room.members
    send_line(to_ben, b"\n".join(room.lines))
    meeting.check_deliveries(arrived=3)


def test_a_message_of_another_machine_counts_without_a_time(meet: Meet) -> None:
    meeting = meet(Room(other_machine), "ann ben")
    meeting.say("ann", "hello", times=3)
    meeting.wait_for_deliveries(arrived=3)
    for row in meeting.rows.named("delivery"):
        assert row["response_time"] is None


@pytest.mark.parametrize("fault", [as_it_says, other_machine])
def test_history_is_no_delivery(fault: Fault, meet: Meet) -> None:
    room = Room(fault, history=True)
    meeting = meet(room, "ann ben")
    meeting.say("ann", "hello", times=5)
    meeting.wait_for_deliveries(arrived=5)
    for number, line in enumerate(room.lines):
        (room.lines[number],) = fault(0, line)
    meeting.leave("ben")
    meeting.join("cem")
    meeting.come_back("ben")
    meeting.say("ann", "hello")
    meeting.wait_for_deliveries(arrived=5 + 2)


def test_what_is_sent_in_on_connect_is_none_also_where_the_class_calls_no_super(meet: Meet) -> None:
    class Joining(Talker):
        def on_connect(self) -> None:
            self.client.send_chat("I am here", name="join")

    room = Room()
    meeting = meet(room)
    meeting.join("ann ben", Joining)
    room.wait_for_lines(2)
    meeting.say("ann", "hello", "hello")
    meeting.check_deliveries(arrived=2)
    meeting.leave("ann")
    meeting.say("ann", "hello")
    meeting.check_deliveries(arrived=3)
    joins = [line for line in room.lines if line.endswith(b"I am here")]
    assert len(joins) == 3
    assert meeting.rows.counts()["join"] == 3
    for line in joins:
        assert re.fullmatch(rb"\[[0-9a-f]{8}\.\d+\] I am here", line)


def test_what_a_compose_leaves_out_is_neither_counted_nor_missed(meet: Meet) -> None:
    class Pinging(Talker):
        def compose(self, tag: str, message: str) -> str | bytes:
            if message.startswith("PING"):
                return f"{tag} {message}"
            return super().compose(tag, message)

    meeting = meet(Room())
    meeting.join("ann", Pinging)
    meeting.join("ben")
    meeting.say("ann", "hello", "PING, lose this", "hello")
    meeting.check_deliveries(arrived=2)
    meeting.check_counts(stamped=2)


class Json(locustfile.TCPChatUser):
    """A user whose messages are JSON objects, with the tag twice."""

    abstract = True

    def compose(self, tag: str, message: str) -> str | bytes:
        fields = {"id": tag, "say": f"{tag} {message}"}
        return json.dumps(fields)

    def expected(self, tag: str, message: str) -> str | bytes | None:
        return f"{tag} {message}"


class JsonTalker(Talker, Json):
    echo = "full"


class JsonRoom(Room):
    """A room that puts what was said into an object of its own, for its sender too."""

    def broadcast(self, sender: socket.socket, line: bytes) -> None:
        said = json.loads(line)
        told = {
            "by": "kim",
            "id": said["id"],
            "said": said["say"],
        }
        super().broadcast(sender, json.dumps(told).encode())


def test_a_tag_that_stands_twice_in_a_message_is_one_message(meet: Meet) -> None:
    """A protocol's own ``compose`` and ``expected`` get the stamp in place of the tag."""
    meeting = meet(JsonRoom(echoes=1))
    meeting.join("ann ben", JsonTalker)
    meeting.say("ann", "hello", times=3)
    meeting.check_deliveries(arrived=3)
    meeting.check_echoes(3)


def test_ones_own_message_that_comes_back_twice_is_repeated(meet: Meet) -> None:
    meeting = meet(Room(echoes=2))
    meeting.join("ann", echo="full")
    meeting.join("ben", echo="none")
    meeting.say("ann", "hello", times=3)
    meeting.say("ben", "hello", times=2)
    meeting.wait_for_deliveries(arrived=5, repeated=5)
    meeting.check_counts(repeated=5)
    meeting.check_echoes(3)


def test_what_a_client_in_mode_any_takes_for_its_echo_has_come(meet: Meet) -> None:
    """The first copy of each message of another is the answer, the second one is unawaited."""
    room = Room()
    meeting = meet(room, "ann cem")
    meeting.join("ben", echo="any")
    ben = meeting.users["ben"]
    meeting.say("cem", "hello")
    meeting.check_deliveries(arrived=2)
    for number, text in enumerate(("hello", "repeat this"), start=1):
        ben.client.send_chat("a question", wait=False)
        wait_until(lambda: room.lines[-1] == b"a question")
        meeting.say("ann", text)
        meeting.wait_for_echoes(number)
    meeting.check_deliveries(arrived=2 + 2 * 2, repeated=2)
    meeting.check_counts(reached=6)


class PairsRoom(Room):
    """Rooms of two, who come one after the other."""

    def tell_others(self, sender: socket.socket, line: bytes) -> None:
        if line == END:
            super().tell_others(sender, line)
            return
        index = self.members.index(sender)
        other = self.members[index ^ 1]
        send_line(other, line)


def test_the_room_of_a_user_is_the_one_that_it_names(meet: Meet) -> None:
    meeting = meet(PairsRoom())
    meeting.join("rea rob", room="red")
    meeting.join("bea bob", room="blue")
    for name in meeting.users:
        meeting.say(name, "hello", "hello")
    meeting.check_deliveries(arrived=4 * 2)
    meeting.say("rea", "lose this")
    meeting.check_deliveries(arrived=4 * 2)
    meeting.check_counts(unheard=1)


def test_who_turns_the_numbering_off_is_timed_and_not_accounted_for(meet: Meet) -> None:
    """The first user's messages go to nobody, twice, or in any order."""
    meeting = meet(Room())
    meeting.join("ann", numbered=False)
    meeting.join("ben cem")
    meeting.say("ann", "hello", "lose this", "repeat this", "hello")
    meeting.check_deliveries(arrived=4 * 2)
    meeting.check_counts(stamped=4, unheard=0)
    for row in meeting.rows.named("delivery"):
        assert row["response_time"] is not None


def test_each_lost_message_is_told_to_each_receiver(meet: Meet) -> None:
    """The senders' echoes show that the lost ones were said."""
    room = Room(echoes=1)
    meeting = meet(room)
    meeting.join("ann", echo="full")
    meeting.join("ben cem")
    meeting.settle()
    meeting.say("ann", "hello", "lose this", "hello", times=4)
    meeting.check_deliveries(arrived=8 * 2, lost=4 * 2)
    meeting.check_counts(unheard=4)
    assert room.lost == 4 * 2


def test_what_an_others_only_room_swallows_is_unheard(meet: Meet) -> None:
    """Nothing shows that it was said."""
    meeting = meet(Room(), "ann ben cem")
    meeting.settle()
    meeting.say("ann", "hello", "lose this", "hello", times=4)
    meeting.check_deliveries(arrived=8 * 2)
    meeting.check_counts(unheard=4)


def test_who_is_told_nothing_loses_everything(meet: Meet) -> None:
    room = Room(deaf=1)
    meeting = meet(room, "deaf ann ben")
    meeting.say("ann", "hello", times=10)
    meeting.say("ben", "hello", times=10)
    meeting.check_deliveries(arrived=20, lost=20)
    assert room.lost == 20


def test_each_repeated_message_is_told(meet: Meet) -> None:
    meeting = meet(Room(), "ann ben cem")
    meeting.say("ann", "hello", "repeat this", "hello", times=5)
    meeting.check_deliveries(arrived=15 * 2, repeated=5 * 2)


def test_each_swap_is_told_from_the_first_message_on(meet: Meet) -> None:
    held: list[bytes] = []

    def swap(count: int, line: bytes) -> list[bytes]:
        held.append(line)
        if count % 2:
            return []
        earlier, later = held[-2:]
        return [later, earlier]

    meeting = meet(Room(swap), "ann ben cem")
    meeting.say("ann", "hello", times=20)
    meeting.check_deliveries(arrived=10 * 2, reordered=10 * 2)
    meeting.check_counts(arrived=40)


# -- no false report


def test_users_may_come_and_leave(meet: Meet) -> None:
    meeting = meet(Room(echoes=1))
    meeting.join("ann", echo="full")
    meeting.join("ben")
    meeting.say("ann", "hello", times=3)
    meeting.check_deliveries(arrived=3)
    meeting.join("cem")
    meeting.say("ann", "hello", times=3)
    meeting.check_deliveries(arrived=3 + 6)
    meeting.leave("ben")
    meeting.say("ann", "hello", times=3)
    meeting.say("cem", "hello", times=2)
    meeting.check_deliveries(arrived=9 + 3 + 2)
    meeting.say("ann", "lose this")
    meeting.check_deliveries(arrived=9 + 5, lost=1)


def test_a_receiver_that_was_away_misses_nothing(meet: Meet) -> None:
    meeting = meet(Room(), "ann ben cem")
    meeting.say("ann", "hello", times=3)
    meeting.check_deliveries(arrived=6)
    meeting.leave("ben")
    meeting.say("ann", "hello", times=3)
    meeting.check_deliveries(arrived=6 + 3)
    meeting.come_back("ben")
    meeting.say("ann", "hello")
    meeting.check_deliveries(arrived=9 + 2)


class DroppingRoom(Room):
    """A room that ends the connection of who says so."""

    def broadcast(self, sender: socket.socket, line: bytes) -> None:
        if b"hang up" in line:
            sender.shutdown(socket.SHUT_RDWR)
        else:
            super().broadcast(sender, line)


def test_a_sender_whose_connection_ends_with_its_message_has_not_lost_it(meet: Meet) -> None:
    """The third message ends the connection before the room has it."""
    meeting = meet(DroppingRoom(), "ann ben")
    ann = meeting.users["ann"]
    meeting.say("ann", "hello", "hello", "hang up")
    wait_until(lambda: ann.client.connected_since is None)
    meeting.say("ann", "hello", "hello")
    meeting.check_deliveries(arrived=4)
    meeting.check_counts(unheard=0)


def test_what_was_said_while_a_login_lasted_is_history_to_it(meet: Meet) -> None:
    class LogsInSlowly(Talker):
        def on_connect(self) -> None:
            gate.go_through()

    gate = Gate()
    meeting = meet(Room(echoes=1), "ann")
    slow = meeting.add("slow", LogsInSlowly)
    connecting = gevent.spawn(slow.client.connect)
    gate.wait_for_somebody()
    meeting.wait_for_server()
    meeting.say("ann", "hello", times=3)
    gevent.sleep(0)
    gate.open()
    assert connecting.get(timeout=60)
    meeting.check_deliveries()


def test_what_waits_behind_a_blocked_handler_is_not_lost(meet: Meet) -> None:
    gate = Gate()
    meeting = meet(Room(echoes=1), "ann")
    meeting.join("slow", StopsAfter, gate=gate)
    meeting.settle()
    meeting.say("ann", "wait", "hello")
    gate.wait_for_somebody()
    meeting.wait_for_deliveries(arrived=1)
    judge_all()
    gate.open()
    meeting.check_counts(lost=0, missing=1, reached=1)


def test_what_is_handled_late_lets_the_judgement_wait(meet: Meet) -> None:
    meeting = meet(Room(echoes=1), "ann ben")
    meeting.settle()
    meeting.say("ann", "lose this")
    message = list(delivery.ACCOUNT.messages.values())[-1]
    wait_until(lambda: message.is_said)
    ben = meeting.users["ben"]
    ben.on_message(b"something", perf_counter() - 1000)
    judge_all()
    meeting.check_counts(lost=0)
    judge_all(2000.0)
    meeting.check_counts(lost=1)


def test_what_an_untagged_exchange_takes_before_earlier_messages_are_handled_is_in_order(
    meet: Meet,
) -> None:
    gate = Gate()
    meeting = meet(Room(), "ann")
    meeting.join("slow", StopsBefore, gate=gate)
    slow = meeting.users["slow"]
    meeting.say("ann", "wait")
    gate.wait_for_somebody()
    slow.client.send_chat("a question", echo="any", wait=False)
    meeting.say("ann", "hello")
    meeting.wait_for_deliveries(arrived=1)
    gate.open()
    meeting.check_deliveries(arrived=2)


def test_what_came_before_the_end_of_a_connection_counts_however_late_it_is_handled(
    meet: Meet,
) -> None:
    gate = Gate()
    room = Room()
    meeting = meet(room, "ann")
    meeting.join("slow", StopsBefore, gate=gate)
    slow = meeting.users["slow"]
    meeting.say("ann", "wait", "hello", "hello")
    room.wait_for_lines(3)
    _, to_slow = room.members
    to_slow.shutdown(socket.SHUT_WR)
    wait_until(lambda: slow.client.connected_since is None)
    gate.open()
    meeting.wait_for_deliveries(arrived=3)


# -- what is reported at the end


def report(
    room: str = "",
    elsewhere: float = 0.0,
    said: float = 1.0,
    since: float = 9.0,
    until: float = 0.0,
    **counts: int,
) -> delivery.Report:
    """Return a report of one room; times are seconds before the report."""
    usual = {"arrived": 9, "reached": 9, "users": 3, "deaf_users": 1}
    return delivery.Report(
        counts=usual | counts,
        rooms={room: [elsewhere, said, since, until]},
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


HEARD_NOBODY = "processes heard nobody of the others"


def test_a_process_that_hears_nothing_of_what_others_said_is_found(total: Total) -> None:
    """Both are of a run of ten seconds."""
    deaf = report(said=8.9)
    hearing = report(said=1.0, elsewhere=5)
    counts = total(deaf, hearing)
    check_counts(counts, deaf_workers=1)
    assert delivery.has_failed(counts)
    assert f"1 of 2 {HEARD_NOBODY}" in delivery.result_line(counts)


@pytest.mark.parametrize(
    "other",
    [
        report(elsewhere=5, said=8.5),  # it may have been said before this one was there
        report(elsewhere=5, said=float("inf")),  # nothing was said there
        report(elsewhere=5, said=1.0, room="other"),
    ],
)
def test_a_process_that_had_nothing_of_others_to_hear_is_not_deaf(
    other: delivery.Report, total: Total
) -> None:
    here = report(said=8.9)
    counts = total(here, other)
    check_counts(counts, deaf_workers=0)
    assert not delivery.has_failed(counts)
    assert HEARD_NOBODY not in delivery.result_line(counts)


def test_what_was_said_when_nobody_of_a_process_was_there_any_more_is_not_missed_by_it(
    total: Total,
) -> None:
    gone = report(said=8.9, until=2.0)
    other = report(said=1.0, elsewhere=5)
    counts = total(gone, other)
    assert not delivery.has_failed(counts)


def test_a_process_that_hears_others_has_not_failed(total: Total) -> None:
    one = report(elsewhere=1)
    other = report(elsewhere=1)
    counts = total(one, other)
    assert not delivery.has_failed(counts)


@pytest.mark.parametrize("reports", [[report(unheard=1)], [report(arrived=0)], []])
def test_what_nobody_else_heard_fails_a_run_and_so_does_a_run_without_deliveries(
    reports: list[delivery.Report], total: Total
) -> None:
    counts = total(*reports)
    assert delivery.has_failed(counts)


def test_the_line_adds_up_the_processes_and_rounds_the_reach_down(total: Total) -> None:
    first = report(
        room="red",
        arrived=999_999,
        reached=999_990,
        lost=1,
        repeated=2,
        stamped=77,
        missing=4,
    )
    second = report(
        room="blue",
        arrived=5,
        reached=0,
        unheard=3,
    )
    second["counts"]["elsewhere"] = 5
    counts = total(first, second)
    assert delivery.result_line(counts) == (
        "delivery: 1,000,004 arrived, 1 lost, 2 repeated, 0 out of order; reach 99.99 % of 999,991;"
        " 77 messages stamped, 3 that nobody else heard; 2 of 6 users heard nobody;"
        " not judged: 9 that arrived, 4 that did not, 5 from other processes"
    )


# -- the command

LINE = re.compile(
    r"^delivery: (?P<arrived>[\d,]+) arrived, (?P<lost>[\d,]+) lost, (?P<repeated>[\d,]+) repeated,"
    r" (?P<reordered>[\d,]+) out of order;"
    r" reach (unknown|(?P<reach>[\d.]+) % of (?P<judged>[\d,]+));"
    r" (?P<stamped>[\d,]+) messages stamped, (?P<unheard>[\d,]+) that nobody else heard;"
    r" (?P<deaf>\d+) of (?P<users>\d+) users heard nobody; not judged: (?P<young>[\d,]+) that"
    r" arrived, (?P<missing>[\d,]+) that did not, (?P<elsewhere>[\d,]+) from other processes"
    r"(; .*)?$",
    re.MULTILINE,
)


def number(text: str) -> int:
    """Return the number that a text with commas is."""
    return int(text.replace(",", ""))


def figures(output: str) -> Counter[str]:
    """Return the figures of the one line that sums up, which is the last that Locust prints.

    ``reached`` is what the others leave of ``arrived``; the share is looked at here.
    """
    (match,) = LINE.finditer(output)
    assert output.rstrip().endswith(match[0])
    texts = match.groupdict(default="0")
    share = float(texts.pop("reach"))
    counts: Counter[str] = Counter()
    for name, text in texts.items():
        counts[name] = number(text)
    unjudged = counts["young"] + counts["elsewhere"]
    reached = counts["arrived"] - unjudged
    judged = reached + counts["lost"]
    assert reached >= 0
    assert counts["judged"] == judged
    if judged:
        assert share == reached * 10_000 // judged / 100
    counts["reached"] = reached
    return counts


def entries(output: str) -> dict[str, dict[str, float]]:
    """Return the rows that --json printed, by name."""
    decoder = json.JSONDecoder()
    text = f"\n{output}"
    start = text.index("\n[\n") + 1
    parsed, _ = decoder.raw_decode(text, start)
    return {entry["name"]: entry for entry in parsed}


QUICK = "--headless --users=4 --spawn-rate=4 --run-time=10m --chat-wait=0.1 --chat-timeout=1 --json"
FILES = ("-f", "locustfile.py,plugins/delivery.py", "RoomClient")
SILENT = ("--chat-echo=none",)
COMMANDS = documented_commands(delivery.__doc__)


def losing_every_seventh(count: int, line: bytes) -> list[bytes]:
    """Lose messages, but none while the users come."""
    if count > 20 and count % 7 == 0:
        return []
    return [line]


def process_of(connection: socket.socket) -> int:
    """Return the process at the other end of a connection, on this machine."""
    here, there = connection.getsockname(), connection.getpeername()
    for each in psutil.net_connections("tcp4"):
        if each.laddr == there and each.raddr == here:
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
        process = self._processes[sender]
        for member in list(self.members):
            if member is not sender and self._processes[member] == process:
                send_line(member, line)


def wait_for(running: Program, arrived: int = 0, failed: int = 0) -> None:
    """Wait until a run has had so many deliveries that arrived, and so many that failed."""

    def has_come() -> bool:
        counts = latest_counts(running, "delivery")
        return counts.successes >= arrived and counts.failures >= failed

    wait_until(has_come)


class Case(NamedTuple):
    """A run against a room, which ends as soon as it has shown what the room does."""

    room: Room
    options: tuple[str, ...] = ()
    command: Iterable[str] = FILES  # the options win over what it says
    arrived: int = 0  # it goes on until so many deliveries have arrived,
    failed: int = 0  # so many are failures,
    said: int = 0  # and so many messages were said


class Ended(NamedTuple):
    """What is left of a run."""

    room: Room
    exit_code: int
    output: str

    @property
    def counts(self) -> Counter[str]:
        """The figures of its last line."""
        return figures(self.output)


CASES = {
    "losing": Case(Room(losing_every_seventh, echoes=1), failed=20),
    "deaf": Case(Room(echoes=1, deaf=1), failed=20),
    "deaf, others only": Case(Room(deaf=1), SILENT, failed=20),
    "nobody hears": Case(Room(swallowed, echoes=1), said=150),  # in about four seconds
    "nobody hears, others only": Case(Room(swallowed), SILENT, said=150),
    "divided": Case(DividedRoom(), ("--processes=2",), said=150),
    "too short": Case(Room(echoes=1), ("--chat-timeout=60",), arrived=1),
}
for command in COMMANDS:
    CASES[command] = Case(
        room=Room(echoes=1),
        options=("--stop-timeout=60",),
        command=shlex.split(command)[1:],
        arrived=100,
    )


@pytest.fixture(scope="module")
def ended() -> Iterator[dict[str, Ended]]:
    """Return the runs of all cases, which were made at the same time, as they wait a lot."""
    with servers() as serve, programs() as start:
        running: dict[str, Program] = {}
        for name, case in CASES.items():
            server = serve(case.room)
            running[name] = start(
                *QUICK_LOCUST,
                *case.command,
                f"--host={server.address}",
                *QUICK.split(),
                *bus_options(),
                *case.options,
            )
        for name, case in CASES.items():
            wait_for(running[name], case.arrived, case.failed)
            case.room.wait_for_lines(case.said)
        runs = {}
        for name, case in CASES.items():
            program = running[name]
            runs[name] = Ended(case.room, program.stop(), program.output)
        yield runs


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_its_first_lines(command: str, ended: dict[str, Ended]) -> None:
    """The first is of one process, the second of a master and two workers."""
    run = ended[command]
    assert run.exit_code == 0
    counts = run.counts
    check_counts(
        counts,
        users=4,
        lost=0,
        repeated=0,
        reordered=0,
        deaf=0,
        unheard=0,
    )
    assert counts["reached"] > 0
    assert (counts["elsewhere"] > 0) == ("--processes" in command)
    said = len(run.room.lines)
    # A user that ends between making a message and sending it gives it up.
    assert said <= counts["stamped"] <= said + 4
    rows = entries(run.output)
    assert rows.keys() == {"connect", "send_chat", "echo_response", "delivery"}
    echoes = rows["echo_response"]
    assert echoes["num_requests"] == said
    row = rows["delivery"]
    assert row["num_requests"] == counts["arrived"]
    assert counts["arrived"] <= 3 * said
    assert row["num_none_requests"] == 0  # all of one machine


@pytest.mark.parametrize("name", ["losing", "deaf", "deaf, others only"])
def test_what_is_reported_is_what_the_room_did_but_for_what_is_said_to_be_unjudged(
    name: str, ended: dict[str, Ended]
) -> None:
    run = ended[name]
    assert run.exit_code == 1
    assert "DeliveryLost" in run.output
    counts = run.counts
    row = entries(run.output)["delivery"]
    room = run.room
    lost = counts["lost"]
    missing = counts["missing"]
    assert lost == row["num_failures"]
    # What the first to come did not hear of each other before their logins had ended.
    history = 3 if room.deaf else 0
    assert lost <= room.lost <= lost + missing + history
    assert missing < room.lost
    check_counts(counts, repeated=0, reordered=0, deaf=len(room.deaf))


def test_a_room_in_which_nothing_arrives_loses_what_came_back_to_its_sender(
    ended: dict[str, Ended],
) -> None:
    run = ended["nobody hears"]
    assert run.exit_code == 1
    counts = run.counts
    check_counts(counts, arrived=0, deaf=counts["users"])
    assert counts["unheard"] > 0
    assert counts["lost"] > 0


def test_a_room_in_which_nothing_arrives_or_comes_back_fails(ended: dict[str, Ended]) -> None:
    run = ended["nobody hears, others only"]
    assert run.exit_code == 1
    counts = run.counts
    check_counts(counts, arrived=0, lost=0, deaf=counts["users"])
    assert counts["unheard"] > 0


def test_processes_that_hear_nothing_of_each_other_fail(ended: dict[str, Ended]) -> None:
    run = ended["divided"]
    assert run.exit_code == 1
    check_counts(run.counts, elsewhere=0, lost=0, unheard=0)
    assert f"; 2 of 2 {HEARD_NOBODY}" in run.output


def test_a_run_that_is_too_short_to_judge_says_so(ended: dict[str, Ended]) -> None:
    run = ended["too short"]
    assert run.exit_code == 0
    counts = run.counts
    check_counts(counts, reached=0, young=counts["arrived"])
    assert "reach unknown" in run.output


def start_one(start: Start, server: Server, *options: str) -> Program:
    """Start a Locust of one process."""
    host = f"--host={server.address}"
    return start(*QUICK_LOCUST, "-f", "plugins/delivery.py", host, *options)


@pytest.mark.together
def test_a_generator_that_is_stopped_for_longer_than_the_timeout_loses_nothing(
    serve: Serve, start: Start
) -> None:
    room = Room(echoes=1)
    options = (*QUICK.split(), "--chat-wait=0", "--users=20")
    running = start_one(start, serve(room), *options)
    wait_for(running, arrived=1000)
    running.process.send_signal(signal.SIGSTOP)
    gevent.sleep(2.5)
    running.process.send_signal(signal.SIGCONT)
    room.wait_for_lines(len(room.lines) + 2000)
    running.stop()
    counts = figures(running.output)
    check_counts(counts, lost=0, unheard=0, reordered=0)
    assert counts["reached"] > 0


def start_two(start: Start, server: Server) -> tuple[Program, Program]:
    """Start a master, and a worker that gets the files from it."""
    bus = bus_options()
    host = f"--host={server.address}"
    options = ("--master", "--expect-workers=1", host, *QUICK.split())
    master = start(*QUICK_LOCUST, *FILES, *options, *bus)
    worker = start(*QUICK_LOCUST, "-f", "-", "--worker", *bus)
    return master, worker


@pytest.mark.together
def test_a_worker_that_gets_the_files_from_its_master_tells_it_what_was_lost(
    serve: Serve, start: Start
) -> None:
    room = Room(losing_every_seventh, echoes=1)
    master, worker = start_two(start, serve(room))
    wait_for(master, failed=1)
    assert master.stop() == 1
    worker.ends()
    assert "DeliveryLost" in master.output
    assert "delivery: " not in worker.output
    counts = figures(master.output)
    row = entries(master.output)["delivery"]
    lost = counts["lost"]
    missing = counts["missing"]
    assert row["num_requests"] == counts["arrived"] + lost
    assert row["num_failures"] == lost
    assert lost > 0
    assert lost <= room.lost <= lost + missing


@pytest.mark.together
def test_the_figures_of_a_worker_that_dies_are_kept(serve: Serve, start: Start) -> None:
    room = Room(echoes=1)
    master, worker = start_two(start, serve(room))
    wait_for(master, arrived=100)
    worker.kill()
    master.stop()
    counts = figures(master.output)
    assert counts["arrived"] >= 100


@pytest.mark.together
def test_each_run_in_the_web_ui_is_summed_up_by_itself(serve: Serve, start: Start) -> None:
    def arrived() -> list[int]:
        counts = re.findall(r"delivery: ([\d,]+) arrived", running.output)
        return [number(count) for count in counts]

    def shown() -> int:
        for row in web_ui.statistics().get("stats", ()):
            if row["name"] == "delivery":
                return int(row["num_requests"])
        return 0

    web_ui = WebUI()
    server = serve(Room(echoes=1))
    running = start_one(start, server, "--chat-wait=0.1", *web_ui.options)
    for runs in (1, 2):
        web_ui.swarm(user_count="3")
        wait_until(lambda: shown() not in (0, *arrived()))  # at first it shows the last run
        web_ui.stop()
        wait_until(lambda: len(arrived()) == runs)  # noqa: B023  # waited for within the loop
        wait_until(lambda: shown() == arrived()[-1])
    assert running.stop() == 0
    assert len(arrived()) == 2


@pytest.mark.together
def test_a_web_ui_in_which_nobody_starts_a_run_has_not_failed(serve: Serve, start: Start) -> None:
    web_ui = WebUI()
    server = serve(Room())
    running = start_one(start, server, *web_ui.options)
    running.prints("Starting web interface")
    wait_until(web_ui.statistics)
    assert running.stop() == 0
    assert "delivery: " not in running.output


@pytest.mark.parametrize(
    ("texts", "sizes"),
    [
        (locustfile.LONG_TEXTS, range(100, 401)),
        (locustfile.VERY_LONG_TEXTS, range(513, 1001)),
    ],
)
def test_with_the_stamp_long_texts_keep_their_sizes(
    texts: Iterable[str], sizes: range, meet: Meet
) -> None:
    meeting = meet(Room(), "ann")
    ann = meeting.users["ann"]
    tag = f"{'f' * 8}.999999"
    for text in texts:
        composed = ann.compose(tag, text)
        payload = str(composed).encode()
        assert delivery.STAMP.search(payload)
        assert len(payload) in sizes
