"""``TLSLayer`` without a socket: records of a real TLS server, cut anywhere."""

from __future__ import annotations

import locust  # isort: skip  # noqa: F401  # replaces blocking calls with gevent's

import itertools
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path

import gevent
import pytest
from certificates import Context, server_context
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from locustfile import TLSLayer

VERSIONS = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
SHORT_OR_LONGER_THAN_A_RECORD = st.binary(min_size=1, max_size=400) | st.just(b"x" * 20_000)
ENDLESS = 2.0**60  # of ``perf_counter``: a deadline that does not come


class Peer:
    """The other end: the TLS server of OpenSSL, whose bytes are taken out of its memory."""

    def __init__(self, certificate: Path, version: ssl.TLSVersion) -> None:
        context = server_context(certificate)
        context.maximum_version = version
        self._arriving = ssl.MemoryBIO()
        self._leaving = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._arriving, self._leaving, server_side=True)

    def shake_hands_with(self, layer: TLSLayer) -> bytes:
        """Let a layer do its handshake over a pair of sockets; return what comes behind it."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                serving = gevent.spawn(self._shake_hands, theirs)
                layer.handshake(ours, ENDLESS)
                serving.get()
            return ours.recv(65536)

    def _shake_hands(self, connection: socket.socket) -> None:
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                connection.sendall(self._leaving.read())
                self._arriving.write(connection.recv(65536))
            else:
                connection.sendall(self._leaving.read())
                return

    def send(self, texts: Sequence[bytes], is_ended: bool) -> bytes:
        """Return the records of some texts, and with ``is_ended`` a close_notify behind them."""
        for text in texts:
            self._tls.write(text)
        if is_ended:
            with pytest.raises(ssl.SSLWantReadError):  # it waits for the client's
                self._tls.unwrap()
        return self._leaving.read()


def pieces_of(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    """Return data, cut at these places and wherever they are beyond its end."""
    places = [0, len(data)]
    for cut in cuts:
        places.append(min(cut, len(data)))
    places.sort()
    pieces = []
    for start, end in itertools.pairwise(places):
        pieces.append(data[start:end])
    return pieces


def decrypted(layer: TLSLayer, pieces: Sequence[bytes]) -> bytes:
    """Return the plaintext of all pieces."""
    plaintext = b""
    for piece in pieces:
        for part in layer.decrypt(piece):
            plaintext += part
    return plaintext


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    version=st.sampled_from(VERSIONS),
    texts=st.lists(SHORT_OR_LONGER_THAN_A_RECORD, max_size=6),
    cuts=st.lists(st.integers(0, 60_000), max_size=12),
    is_ended=st.booleans(),
)
def test_wherever_the_records_are_cut_the_plaintext_is_the_same(
    certificates: Path,
    trusting: Context,
    version: ssl.TLSVersion,
    texts: list[bytes],
    cuts: list[int],
    is_ended: bool,
) -> None:
    layer = TLSLayer(trusting(), "127.0.0.1")
    peer = Peer(certificates / "good.pem", version)
    records = peer.shake_hands_with(layer) + peer.send(texts, is_ended)
    assert decrypted(layer, pieces_of(records, cuts)) == b"".join(texts)
    assert layer.is_ended == is_ended


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    version=st.sampled_from(VERSIONS),
    damaged=st.integers(1, 16),
    cuts=st.lists(st.integers(0, 400), max_size=5),
)
def test_a_damaged_record_is_an_error_wherever_it_is_cut(
    certificates: Path, trusting: Context, version: ssl.TLSVersion, damaged: int, cuts: list[int]
) -> None:
    layer = TLSLayer(trusting(), "127.0.0.1")
    peer = Peer(certificates / "good.pem", version)
    records = bytearray(peer.shake_hands_with(layer) + peer.send([b"hello"], is_ended=False))
    records[-damaged] ^= 1  # in the last bytes, which authenticate the others
    pieces = pieces_of(bytes(records), cuts)
    with pytest.raises(ssl.SSLError):
        decrypted(layer, pieces)
