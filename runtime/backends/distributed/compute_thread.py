"""A thread that computes while the thread which started it watches the other ranks.

A collective that waits for a dead rank cannot be interrupted, on some devices not even after a timeout. So every call that may
wait for other ranks runs here, and the thread that started it can still read messages, be interrupted, and give up.
"""

from __future__ import annotations

import queue
import selectors
import socket
import threading
from collections.abc import Callable
from typing import Any


class ComputeThread:
    """One thread that runs one call at a time: some devices belong to the thread that opened them.

    `done_socket` becomes readable when a call has ended, for use in a selector.
    """

    def __init__(self, name: str) -> None:
        self.done_socket, self._notifier = socket.socketpair()
        self.busy = False
        self._calls: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._result: Any = None
        self._error: BaseException | None = None
        # A daemon: a call that never ends must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def start(self, call: Callable[[], Any]) -> None:
        """Start a call; `finish` must be called before the next one."""
        assert not self.busy
        self.busy = True
        self._calls.put(call)

    @property
    def ended(self) -> bool:
        """Whether the started call has ended."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.done_socket, selectors.EVENT_READ)
            return bool(selector.select(0))

    def finish(self) -> Any:
        """The result of the started call, once it has ended; raises the exception of the call."""
        self.done_socket.recv(1)
        self.busy = False
        result, error = self._result, self._error
        self._result = self._error = None
        if error is not None:
            raise error
        return result

    def close(self, seconds: float) -> None:
        """End the thread after its present call, and wait up to `seconds` for that."""
        self._calls.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(seconds)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                self._result = call()
            except BaseException as error:
                self._error = error
            del call  # it may hold arrays
            self._notifier.send(b"\0")
        self._notifier.close()
        self.done_socket.close()
