"""A child process of local_processes.py: `python -m megarlhf.cluster.local_worker DESCRIPTOR NAME`.

It makes the worker that the first message names, then answers calls, one after the other. The name is for whoever looks
at the list of processes.
"""

import os
import pickle
import select
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any

from megarlhf.cluster.local_store import LocalStore, Reference


def main(descriptor: int) -> None:
    """Serve until the other end is closed."""
    os.set_inheritable(descriptor, False)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # those who end a run say it to the driver
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_driver, args=(descriptor,), daemon=True).start()
    connection, store = Connection(descriptor), LocalStore()
    worker_class, spec = pickle.loads(connection.recv_bytes())
    worker = worker_class(spec, store)
    kept = None
    try:
        while True:
            message = connection.recv_bytes()
            del kept  # the driver has the last answer, and so its own hold on what that refers to
            reply, kept = _answer(worker, store, message)
            connection.send_bytes(reply)
    except (EOFError, ConnectionError):  # seen here before the thread has
        os.killpg(0, signal.SIGKILL)


def _end_with_driver(descriptor: int) -> None:
    """End this process and what it has started when the driver has ended, whatever is going on here."""
    hangup = select.poll()
    hangup.register(descriptor, 0)
    hangup.poll()
    os.killpg(0, signal.SIGKILL)


def _answer(worker: Any, store: LocalStore, message: bytes) -> tuple[bytes, Any]:
    """The reply to a call, and the result itself."""
    method, args = pickle.loads(message)
    try:
        values = [store.get([arg])[0] if isinstance(arg, Reference) else arg for arg in args]
        result = getattr(worker, method)(*values)
        return pickle.dumps((True, result), protocol=5), result
    except Exception as error:
        traceback.print_exc()
        return pickle.dumps((False, _as_sent(error)), protocol=5), None


def _as_sent(error: Exception) -> Exception:
    """An error, or its text where it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


if __name__ == "__main__":
    main(int(sys.argv[1]))
