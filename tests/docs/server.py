"""``shiftgrad`` for the commands of a page, without waiting for its imports: one loaded process that forks for each.

    python -m tests.docs.server SOCKET      in the project; writes "ready" to standard output when it can be called

It answers ``client.py``, which sends its arguments, folder, width and standard streams. What a command does is the real
command line, but for the trainings: see ``tests/docs/substitute.py``.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import traceback


def serve(path: str) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children; the system reaps them
    tests = os.getppid()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        listening.settimeout(5)
        print("ready", flush=True)
        while os.getppid() == tests:  # it does not outlive them, however they end
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                continue
            if os.fork() == 0:
                listening.close()
                _answer(connection)
            connection.close()


def _answer(connection: socket.socket) -> None:
    """Be the command that is asked for, then end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, streams, _, _ = socket.recv_fds(connection, 1 << 16, 3)
    request = json.loads(message)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    sys.argv = request["arguments"]
    status = _run()
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(str(status).encode())
    os._exit(status)  # nothing that was open in the server is closed by its child


def _run() -> int:
    """The exit status of the command, as an interpreter would end."""
    import engine.cli

    try:
        engine.cli.main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except Exception:  # noqa: BLE001 (an interpreter prints whatever it is and ends with 1)
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    from engine.machine import read_machine
    from engine.prepare import prepare
    from tests.docs.substitute import no_training

    no_training()
    prepare("configs/sweeps/quickstart.yaml", (), read_machine())  # brings what is imported at first use
    serve(sys.argv[1])
