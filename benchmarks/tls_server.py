"""An echo server over TLS, for pairs.py.

    python tls_server.py CERTIFICATE

The file holds a certificate and its key. The port, on 127.0.0.1, is the first line on the standard
output; the end of the standard input ends the server.
"""

from __future__ import annotations

import selectors
import socket
import ssl
import sys

READ_SIZE = 16 * 1024  # bytes: the most that a TLS record holds


def echo(selector: selectors.BaseSelector, connection: ssl.SSLSocket) -> None:
    """Send back what a connection has sent; close it where it has ended."""
    try:
        data = connection.recv(READ_SIZE)
        while connection.pending():
            data += connection.recv(READ_SIZE)
        connection.sendall(data)
    except OSError:
        data = b""
    if not data:
        selector.unregister(connection)
        connection.close()


def accept(
    selector: selectors.BaseSelector, listener: socket.socket, context: ssl.SSLContext
) -> None:
    """Accept a connection; its handshake holds up all others."""
    plain, _ = listener.accept()
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        connection = context.wrap_socket(plain, server_side=True)
    except OSError:
        plain.close()
        return
    selector.register(connection, selectors.EVENT_READ, connection)


def serve(listener: socket.socket, context: ssl.SSLContext) -> None:
    """Serve until the standard input ends."""
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.data is not None:
                    echo(selector, key.data)
                elif key.fileobj is listener:
                    accept(selector, listener, context)
                else:
                    return


if __name__ == "__main__":
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(sys.argv[1])
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        print(listener.getsockname()[1], flush=True)
        serve(listener, context)
