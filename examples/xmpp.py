"""Load a room of an XMPP server (Prosody, ejabberd), with TLS that begins by STARTTLS.

    locust -f examples/xmpp.py --host=localhost:5222 --headless --users=100 --spawn-rate=10 \\
        --run-time=1m

The room sends every message back with a new envelope and the same body. The certificate is checked:
``SSL_CERT_FILE=ca.pem`` before the command names an authority of your own, and the ``--host`` has
to be a name that is in the certificate.

To change: ``DOMAIN`` and ``ROOM``. To log in with a password, ``AUTH``::

    PLAIN = base64.b64encode(b"\\0kim\\0secret").decode()
    AUTH = f"<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='PLAIN'>{PLAIN}</auth>"

With an account for each user, that belongs into ``on_connect``: see ``login.py``. Where the server
has no TLS, leave out what stands in ``on_connect`` from ``STARTTLS`` to the second ``STREAM``.

Prosody needs, for the login without an account, ``authentication = "anonymous"``;
``Component "rooms.localhost" "muc"`` and under it ``muc_room_locking = false``, else only the first
user gets in; and no ``limits`` for ``c2s``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from xml.sax.saxutils import escape

import locustfile

DOMAIN = "localhost"
ROOM = "load@rooms.localhost"
STREAM = (
    f"<stream:stream to='{DOMAIN}' version='1.0' xmlns='jabber:client' "
    "xmlns:stream='http://etherx.jabber.org/streams'>"
)
STARTTLS = "<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>"
AUTH = "<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='ANONYMOUS'/>"
BIND = "<iq type='set' id='bind'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'/></iq>"
JOIN = (
    "<presence to='{room}/{name}'><x xmlns='http://jabber.org/protocol/muc'>"
    "<history maxstanzas='0'/></x></presence>"
)
TAG = re.compile(rb"<[^<>]+>")
REFUSAL = re.compile(rb"<failure|<stream:error|<[^>]*type=['\"]error['\"]")


class StanzaFraming:
    """A message is a stanza: an element with all that is in it. The tag of a stream is one, too."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.scanned = 0  # bytes of the buffer whose tags are counted
        self.depth = 0  # elements that are open there

    def encode(self, payload: bytes) -> bytes:
        """Return a stanza as it is: it needs no delimiter."""
        return payload

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the stanzas that data completes."""
        self.buffer += data
        while tag := TAG.search(self.buffer, self.scanned):
            self.scanned = tag.end()
            self.depth += change_of_depth(tag[0])
            if self.depth == 0:
                stanza = bytes(self.buffer[: self.scanned])
                del self.buffer[: self.scanned]
                self.scanned = 0
                yield stanza.strip()
        if len(self.buffer) > locustfile.MESSAGE_LIMIT:
            raise locustfile.MessageTooLong


def change_of_depth(tag: bytes) -> int:
    """Return 1 for the start of an element, -1 for its end, 0 for an empty one and a stream."""
    if tag.endswith((b"/>", b"?>")) or tag.startswith((b"<stream:stream", b"</stream:stream")):
        return 0
    return -1 if tag.startswith(b"</") else 1


class XmppUser(locustfile.ChatClient):
    """Joins a room, and chats."""

    framing = StanzaFraming

    def on_connect(self) -> None:
        """Begin TLS, log in, and join the room."""
        self.await_stanza(STREAM, rb"<stream:features")
        self.await_stanza(STARTTLS, rb"<proceed")
        if not self.client.start_tls():
            return  # the row ``starttls`` says why
        self.await_stanza(STREAM, rb"<stream:features")
        self.await_stanza(AUTH, rb"<success")
        self.await_stanza(STREAM, rb"<stream:features")
        self.await_stanza(BIND, rb"<iq[^>]* id=['\"]bind")
        join = JOIN.format(room=ROOM, name=self.client.identity)
        self.await_stanza(join, rb"<presence.* code=['\"]110")  # 110: this is you

    def await_stanza(self, text: str, pattern: bytes) -> None:
        """Send a stanza, and wait for one that matches, or a refusal."""
        answer = re.compile(rb"%b|%b" % (pattern, REFUSAL.pattern), re.DOTALL)

        def is_answer(stanza: bytes) -> bool:
            return answer.match(stanza) is not None

        if self.client.send_chat(text, echo=is_answer) is None:
            raise PermissionError("refused")

    def is_refusal(self, payload: bytes) -> bool:
        """Return whether the server says no: an error has the body of the message, or none."""
        return REFUSAL.match(payload) is not None

    def compose(self, tag: str, message: str) -> str:
        """Return what to send for a text. An error without the body is found by the id."""
        body = self.expected(tag, message)
        return f"<message to='{ROOM}' type='groupchat' id='{tag}'>{body}</message>"

    def expected(self, tag: str, message: str) -> str:
        """Return what comes back unchanged."""
        text = escape(message, {"'": "&apos;", '"': "&quot;"})
        return f"<body>[{tag}] {text}</body>"
