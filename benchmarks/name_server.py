"""A name server that takes its time: each name has the address 127.0.0.1, and no IPv6 address.

    unshare --net --mount sh benchmarks/slow_names.sh FOLDER MILLISECONDS PYTHON

starts it, as it needs a network of its own. Each question is answered MILLISECONDS after it came.
"ready" on its standard output says that it can be asked. Each line on its standard input is
answered with the number of questions so far, and the end of the input ends it.
"""

from __future__ import annotations

import socket
import sys
import threading

ADDRESS = ("127.0.0.53", 53)
HEADER_SIZE = 12
TYPE_A = b"\x00\x01"


def answer_to(question: bytes) -> bytes:
    """Return the answer to a question of one name (RFC 1035, section 4)."""
    end = question.index(0, HEADER_SIZE) + 5  # behind the name: a zero, its type and its class
    is_a = question[end - 4 : end - 2] == TYPE_A
    number = question[:2]
    flags = b"\x81\x80"  # an answer, without an error
    counts = b"\x00\x01" + (b"\x00\x01" if is_a else b"\x00\x00") + bytes(4)
    answer = number + flags + counts + question[HEADER_SIZE:end]
    if is_a:
        name = b"\xc0\x0c"  # that of the question
        lifetime = (60).to_bytes(4, "big")
        answer += name + TYPE_A + b"\x00\x01" + lifetime + b"\x00\x04" + bytes([127, 0, 0, 1])
    return answer


def serve(sock: socket.socket, seconds: float, asked: list[bytes]) -> None:
    """Answer each question, so many seconds later, and note it."""
    while True:
        question, asker = sock.recvfrom(512)
        asked.append(question)
        later = threading.Timer(seconds, sock.sendto, (answer_to(question), asker))
        later.daemon = True
        later.start()


def main() -> None:
    """Serve as the arguments say."""
    sock = socket.socket(type=socket.SOCK_DGRAM)
    sock.bind(ADDRESS)
    asked: list[bytes] = []
    seconds = float(sys.argv[1]) / 1000
    threading.Thread(target=serve, args=(sock, seconds, asked), daemon=True).start()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(len(asked), flush=True)


if __name__ == "__main__":
    main()
