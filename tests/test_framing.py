"""Bytes in, messages out, without a socket.

What hypothesis tries is the same in every run, so that a failure elsewhere can be repeated.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from locustfile import (
    MESSAGE_LIMIT,
    Framing,
    LengthPrefixFraming,
    LineFraming,
    MessageTooLong,
    RawFraming,
    parse_framing,
)

ORDERS = ("", "@", "=", "<", ">", "!")
SIZES = "BHILQ"
FORMATS = [order + size for order in ORDERS for size in SIZES]
LONG_FORMATS = [name for name in FORMATS if name.endswith(("I", "L", "Q"))]
LINES = ["line", "crlf"]
FRAMINGS = [*LINES, *FORMATS]
LARGEST = b"x" * MESSAGE_LIMIT

any_case = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60,
)

# Bytes that mean something to a framing come often.
payloads = st.one_of(
    st.binary(max_size=40),
    st.text(max_size=20).map(str.encode),
    st.lists(st.sampled_from([b"\r", b"\n", b"\0", b"\1", b"\xff", b"a"])).map(b"".join),
    st.integers(200, 300).map(lambda size: b"x" * size),  # about what one byte of length can say
)


def new_framing(name: str) -> Framing:
    return parse_framing(name)()


def carried(framing: Framing, candidates: Iterable[bytes]) -> tuple[list[bytes], bytes]:
    """Return the payloads that a framing takes, and the stream that it makes of them."""
    taken = []
    stream = b""
    for payload in candidates:
        try:
            stream += framing.encode(payload)
        except ValueError:
            continue
        taken.append(payload)
    return taken, stream


def pieces(stream: bytes, cuts: Iterable[int]) -> list[bytes]:
    """Return a stream, cut at these places; an empty piece is no read, and left out."""
    parts = []
    start = 0
    for end in [*sorted(cuts), len(stream)]:
        part = stream[start:end]
        if part:
            parts.append(part)
            start = end
    return parts


def fed(framing: Framing, parts: Iterable[bytes]) -> list[bytes]:
    """Return the payloads that come out where these parts go in."""
    messages: list[bytes] = []
    for part in parts:
        messages += framing.feed(part)
    return messages


# ------------------------------------------------------------------------- any messages, any cuts


@pytest.mark.parametrize("name", FRAMINGS)
@any_case
@given(candidates=st.lists(payloads, max_size=8), cuts=st.lists(st.integers(0, 400), max_size=12))
def test_what_encode_takes_comes_out_of_feed_wherever_the_stream_is_cut(
    name: str, candidates: list[bytes], cuts: list[int]
) -> None:
    taken, stream = carried(new_framing(name), candidates)
    reads = pieces(stream, cuts)
    assert fed(new_framing(name), reads) == taken


@pytest.mark.parametrize("name", FRAMINGS)
def test_a_small_stream_gives_the_same_messages_for_every_two_cuts(name: str) -> None:
    messages = [b"hello", b"", "안녕".encode(), b"a\rb", b"\0"]
    taken, stream = carried(new_framing(name), messages)
    assert taken == messages
    end = len(stream) + 1
    for first in range(end):
        for second in range(first, end):
            reads = pieces(stream, [first, second])
            assert fed(new_framing(name), reads) == taken


@any_case
@given(reads=st.lists(st.binary(min_size=1), max_size=8))
def test_raw_takes_each_read_for_a_message(reads: list[bytes]) -> None:
    framing = RawFraming()
    for read in reads:
        assert framing.encode(read) == read
    assert fed(framing, reads) == reads


@pytest.mark.parametrize("name", FRAMINGS)
@any_case
@given(first=payloads, second=payloads)
def test_a_message_is_given_as_soon_as_its_last_byte_is_there(
    name: str, first: bytes, second: bytes
) -> None:
    framing = new_framing(name)
    taken, _ = carried(framing, [first, second])
    for payload in taken:
        encoded = framing.encode(payload)
        all_but_one, last = encoded[:-1], encoded[-1:]
        assert fed(framing, [all_but_one]) == []
        assert fed(framing, [last]) == [payload]


# -------------------------------------------------------------------------------------- any garbage


@pytest.mark.parametrize("name", FRAMINGS)
@any_case
@given(reads=st.lists(st.one_of(payloads, st.binary(max_size=200)), max_size=20))
def test_garbage_gives_messages_that_are_in_it_or_is_too_long_and_nothing_else(
    name: str, reads: list[bytes]
) -> None:
    framing = new_framing(name)
    messages: list[bytes] = []
    try:
        for read in reads:
            messages += framing.feed(read)
    except MessageTooLong:
        pass
    garbage = b"".join(reads)
    position = 0
    for message in messages:
        position = garbage.find(message, position) + len(message)
        assert position >= len(message)


@any_case
@given(reads=st.lists(payloads))
def test_lines_are_what_splitting_at_line_feeds_gives(reads: list[bytes]) -> None:
    stream = b"".join(reads)
    *complete, _ = stream.split(b"\n")
    expected = [line.removesuffix(b"\r") for line in complete]
    assert fed(LineFraming(), reads) == expected


@pytest.mark.parametrize("name", ["line", "crlf", "B", "<H", ">I", "!Q"])
@settings(any_case, max_examples=10)
@given(noise=st.binary(min_size=1, max_size=65536))
@example(noise=b"\xff")  # no line feed, and a length over the limit
def test_however_long_garbage_goes_on_no_more_than_a_message_is_kept(
    name: str, noise: bytes
) -> None:
    framing = new_framing(name)
    times = 65536 // len(noise)
    block = noise * times
    kept = 0
    try:
        while kept < 2 * MESSAGE_LIMIT and framing_has_room(framing, block):
            kept += len(block)
    except MessageTooLong:
        pass
    assert kept <= MESSAGE_LIMIT + 1


def framing_has_room(framing: Framing, block: bytes) -> bool:
    """Feed a block; return whether all of it is kept, as no message came out."""
    return not fed(framing, [block])


# -------------------------------------------------------------------------------------- the limits


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("size", [4096, 65536, 2 * MESSAGE_LIMIT])
def test_a_line_of_the_limit_passes_and_two_bytes_more_do_not(
    name: str, ending: bytes, size: int
) -> None:
    too_long = LARGEST + b"xx" + ending
    cuts = range(0, len(too_long), size)
    reads = pieces(LARGEST + ending, cuts)
    assert fed(new_framing(name), reads) == [LARGEST]
    reads = pieces(too_long, cuts)
    with pytest.raises(MessageTooLong):
        fed(new_framing(name), reads)


@pytest.mark.parametrize("name", LONG_FORMATS)
def test_a_length_of_the_limit_passes_and_one_more_fails_before_its_payload_comes(
    name: str,
) -> None:
    framing = LengthPrefixFraming(name)
    encoded = framing.encode(LARGEST)
    assert fed(framing, [encoded]) == [LARGEST]
    prefix = struct.pack(name, MESSAGE_LIMIT + 1)
    with pytest.raises(MessageTooLong):
        fed(framing, [prefix])


@pytest.mark.parametrize(
    ("name", "too_long"),
    [
        ("line", LARGEST + b"xx"),
        (">I", b"\xff\xff\xff\xff"),
    ],
)
def test_messages_before_one_that_is_too_long_are_still_given(name: str, too_long: bytes) -> None:
    framing = new_framing(name)
    good = framing.encode(b"good")
    messages = iter(framing.feed(good + too_long))
    assert next(messages) == b"good"
    with pytest.raises(MessageTooLong):
        next(messages)


@pytest.mark.parametrize("name", ["line", ">I"])
def test_many_messages_of_the_limit_can_follow_each_other(name: str) -> None:
    framing = new_framing(name)
    stream = framing.encode(LARGEST) * 3
    cuts = range(0, len(stream), 65536)
    reads = pieces(stream, cuts)
    assert fed(framing, reads) == [LARGEST] * 3


# ---------------------------------------------------------------------------------------- encode


@pytest.mark.parametrize("payload", [b"two\nlines", b"\n", b"end\r"])
@pytest.mark.parametrize("name", LINES)
def test_a_line_break_cannot_be_sent_in_a_line(name: str, payload: bytes) -> None:
    framing = new_framing(name)
    with pytest.raises(ValueError, match="line framing carries no line break"):
        framing.encode(payload)


@pytest.mark.parametrize(("name", "longest"), [("B", 255), ("<H", 65535)])
def test_a_payload_longer_than_its_prefix_can_say_cannot_be_sent(name: str, longest: int) -> None:
    framing = LengthPrefixFraming(name)
    payload = b"x" * longest
    encoded = framing.encode(payload)
    assert encoded.endswith(payload)
    with pytest.raises(ValueError, match="longer than its length prefix"):
        framing.encode(payload + b"x")


@pytest.mark.parametrize(
    ("name", "encoded"),
    [
        ("line", b"ab\n"),
        ("crlf", b"ab\r\n"),
        ("raw", b"ab"),
        ("B", b"\2ab"),
        (">H", b"\0\2ab"),
        ("<H", b"\2\0ab"),
        (">I", b"\0\0\0\2ab"),
        ("<I", b"\2\0\0\0ab"),
        ("!Q", b"\0\0\0\0\0\0\0\2ab"),
    ],
)
def test_this_is_what_goes_over_the_wire(name: str, encoded: bytes) -> None:
    assert new_framing(name).encode(b"ab") == encoded
