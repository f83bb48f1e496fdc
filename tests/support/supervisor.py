"""The supervisor of a snapshotter, played from its contract. Nothing here knows what a state is.

    supervisor.py SOCKET SECONDS

It is a process of its own, as in life: who holds the descriptor of a mount that nobody serves, and
waits for that mount too, can not be killed. After SECONDS it ends, and with it what it holds.

Commands are lines on standard input; each exchange answers two lines, one when it listens and one
when it is over:

    save              takes descriptor and state from a daemon     saved BYTES DESCRIPTORS
    restore           gives them to a daemon, as often as wanted   restored
    offer HEX         the same with other bytes                    restored
    bare HEX          other bytes and no descriptor                restored

One that is none, and answers one line:

    show              the bytes that it holds                      HEX
"""

import os
import signal
import socket
import sys

path, limit = sys.argv[1], int(sys.argv[2])
signal.alarm(limit)
state, held = b"", []


def listen():
    """The socket file is made anew for each exchange."""
    if os.path.lexists(path):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX)
    listener.settimeout(10)
    listener.bind(path)
    listener.listen(1)
    print("listening", flush=True)
    return listener


def accept():
    listener = listen()
    try:
        stream, _ = listener.accept()
        stream.settimeout(10)
        return stream
    finally:
        listener.close()
        os.unlink(path)


def save():
    global state, held
    with accept() as stream:
        found, descriptors, _, _ = socket.recv_fds(stream, 256 << 10, 64)
        while piece := stream.recv(256 << 10):
            found += piece
    for descriptor in held:
        os.close(descriptor)
    state, held = found, descriptors
    return f"saved {len(state)} {len(held)}"


def give(data, descriptors):
    with accept() as stream:
        try:
            sent = socket.send_fds(stream, [data], descriptors) if descriptors else 0
            stream.sendall(data[sent:])
        except BrokenPipeError:
            pass  # a daemon that has seen enough
    return "restored"


for line in sys.stdin:
    word, _, rest = line.strip().partition(" ")
    try:
        if word == "show":
            answer = state.hex()
        elif word == "save":
            answer = save()
        elif word == "restore":
            answer = give(state, held[:1])
        elif word == "offer":
            answer = give(bytes.fromhex(rest), held[:1])
        else:
            answer = give(bytes.fromhex(rest), [])
    except OSError as error:
        answer = f"failed {error}"
    print(answer, flush=True)
