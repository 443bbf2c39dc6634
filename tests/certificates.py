"""Certificates for the tests, and servers that shake hands with them."""

from __future__ import annotations

import locust  # isort: skip  # noqa: F401  # replaces blocking calls with gevent's

import datetime
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import trustme
from servers import Handler

Context = Callable[[], ssl.SSLContext]  # what the fixture ``trusting`` returns
NAMES = ("localhost", "127.0.0.1", "::1")  # of this machine


def write_certificates(folder: Path) -> None:
    """Write two authorities and what they have signed, each with its key.

    ca.pem has signed good.pem for all names of this machine, other.pem for one alone and
    expired.pem, which is too old; unknown-ca.pem has signed unknown.pem and unknown-expired.pem.
    """
    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    authority, unknown = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    unknown.cert_pem.write_to_path(folder / "unknown-ca.pem")
    issued = {
        "good.pem": authority.issue_cert(*NAMES),
        "other.pem": authority.issue_cert("localhost"),
        "expired.pem": authority.issue_cert(*NAMES, not_after=yesterday),
        "unknown.pem": unknown.issue_cert(*NAMES),
        "unknown-expired.pem": unknown.issue_cert(*NAMES, not_after=yesterday),
    }
    for name, certificate in issued.items():
        certificate.private_key_and_cert_chain_pem.write_to_path(folder / name)


def context_that_trusts(authority: Path) -> ssl.SSLContext:
    """Return the context of a client that trusts an authority, and nobody else."""
    return ssl.create_default_context(cafile=authority)


def server_context(certificate: Path) -> ssl.SSLContext:
    """Return the context of a server with a certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def secure(handler: Callable[[ssl.SSLSocket], object], context: ssl.SSLContext) -> Handler:
    """Return a handler that shakes hands, and then does what the other one does."""

    def handle(connection: socket.socket) -> None:
        with context.wrap_socket(
            connection, server_side=True, suppress_ragged_eofs=False
        ) as wrapped:
            handler(wrapped)

    return handle
