"""Bytes in, messages out, without a socket."""

from __future__ import annotations

import pytest

from locustfile import MESSAGE_LIMIT, Framing, LengthPrefixFraming, LineFraming, MessageTooLong

TEXTS = ["hello", "", "안녕하세요 👋", "x" * 600, "last"]
PAYLOADS = [text.encode() for text in TEXTS]
FORMATS = ["line", ">I", "<H", "!Q", ">H", "<L"]


def new_framing(name: str) -> Framing:
    return LineFraming() if name == "line" else LengthPrefixFraming(name)


def stream(name: str) -> bytes:
    framing = new_framing(name)
    return b"".join(framing.encode(payload) for payload in PAYLOADS)


@pytest.mark.parametrize("name", FORMATS)
def test_a_stream_in_one_piece_gives_all_messages(name: str) -> None:
    assert list(new_framing(name).feed(stream(name))) == PAYLOADS


@pytest.mark.parametrize("name", FORMATS)
def test_a_stream_byte_by_byte_gives_all_messages(name: str) -> None:
    framing = new_framing(name)
    data = stream(name)
    assert [p for i in range(len(data)) for p in framing.feed(data[i : i + 1])] == PAYLOADS


@pytest.mark.parametrize("name", FORMATS)
def test_a_stream_cut_anywhere_gives_all_messages(name: str) -> None:
    data = stream(name)
    for cut in range(len(data) + 1):
        framing = new_framing(name)
        assert [*framing.feed(data[:cut]), *framing.feed(data[cut:])] == PAYLOADS


def test_a_message_is_given_as_soon_as_its_last_byte_is_there() -> None:
    line, prefix = LineFraming(), LengthPrefixFraming(">H")
    assert list(line.feed(b"a\nb")) == [b"a"]
    assert list(line.feed(b"c\n")) == [b"bc"]
    assert list(prefix.feed(b"\0\1a\0\2b")) == [b"a"]
    assert list(prefix.feed(b"c")) == [b"bc"]


def test_a_carriage_return_before_the_delimiter_is_dropped_also_when_cut_from_it() -> None:
    framing = LineFraming()
    assert list(framing.feed(b"a\r\nb\rc\r")) == [b"a"]
    assert list(framing.feed(b"\n\r\n")) == [b"b\rc", b""]


@pytest.mark.parametrize("size", [1, 65536])
def test_a_line_of_the_limit_passes_and_one_byte_more_does_not(size: int) -> None:
    data = b"x" * MESSAGE_LIMIT + b"\r\n"
    framing = LineFraming()
    assert [len(p) for i in range(0, len(data), 65536) for p in framing.feed(data[i : i + 65536])] == [MESSAGE_LIMIT]
    framing = LineFraming()
    flood = b"x" * (MESSAGE_LIMIT + 2)
    with pytest.raises(MessageTooLong):
        [framing.feed(flood[i : i + size]) for i in range(0, len(flood), size)]


def test_a_line_over_the_limit_that_ends_in_the_same_read_does_not_pass() -> None:
    framing = LineFraming()
    assert list(framing.feed(b"x" * MESSAGE_LIMIT)) == []
    with pytest.raises(MessageTooLong):
        list(framing.feed(b"xxx\n"))
    with pytest.raises(MessageTooLong):
        LineFraming().feed(b"x" * (MESSAGE_LIMIT + 2) + b"\n")
    for end in (b"\n", b"\r\n"):
        assert [len(p) for p in LineFraming().feed(b"x" * MESSAGE_LIMIT + end)] == [MESSAGE_LIMIT]


def test_a_length_of_the_limit_passes_and_one_more_fails_before_its_payload_comes() -> None:
    framing = LengthPrefixFraming(">I")
    assert [len(p) for p in framing.feed(framing.encode(b"x" * MESSAGE_LIMIT))] == [MESSAGE_LIMIT]
    with pytest.raises(MessageTooLong):
        list(framing.feed((MESSAGE_LIMIT + 1).to_bytes(4, "big")))


def test_messages_before_a_length_over_the_limit_are_still_given() -> None:
    framing = LengthPrefixFraming(">I")
    payloads = iter(framing.feed(framing.encode(b"good") + b"\xff\xff\xff\xff"))
    assert next(payloads) == b"good"
    with pytest.raises(MessageTooLong):
        next(payloads)


@pytest.mark.parametrize("payload", [b"two\nlines", b"\n", b"end\r"])
def test_a_line_break_cannot_be_sent_in_a_line(payload: bytes) -> None:
    with pytest.raises(ValueError, match="line framing carries no line break"):
        LineFraming().encode(payload)


def test_a_payload_longer_than_its_prefix_can_say_cannot_be_sent() -> None:
    framing = LengthPrefixFraming("<H")
    assert len(framing.encode(b"x" * 65535)) == 65537
    with pytest.raises(ValueError, match="longer than its length prefix"):
        framing.encode(b"x" * 65536)


def test_byte_orders_differ() -> None:
    assert LengthPrefixFraming(">I").encode(b"ab") == b"\0\0\0\2ab"
    assert LengthPrefixFraming("<I").encode(b"ab") == b"\2\0\0\0ab"


def test_raw_takes_each_read_for_a_message() -> None:
    assert Framing().encode(b"a\nb") == b"a\nb"
    assert list(Framing().feed(b"a\nb")) == [b"a\nb"]
