"""A thread that computes while the thread which started it watches the other ranks.

A collective that waits for a dead rank cannot be interrupted, on some devices not even after a time. So everything that
may meet other ranks runs here, and whoever started it stays able to hear news, to be interrupted, and to give up.
"""

from __future__ import annotations

import queue
import selectors
import socket
import threading
from collections.abc import Callable
from typing import Any


class ComputeThread:
    """Runs one call at a time, all in one thread: some devices belong to the thread that opened them.

    `bell` becomes readable when a call has ended, for use in a selector.
    """

    def __init__(self, name: str) -> None:
        self.bell, self._rope = socket.socketpair()
        self.busy = False
        self._calls: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._result: Any = None
        self._error: BaseException | None = None
        # A daemon: a call that never ends must not keep the process.
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def start(self, call: Callable[[], Any]) -> None:
        """Begin a call; `finish` must be called before the next one."""
        assert not self.busy
        self.busy = True
        self._calls.put(call)

    @property
    def ended(self) -> bool:
        """Whether the call that was begun has ended."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.bell, selectors.EVENT_READ)
            return bool(selector.select(0))

    def finish(self) -> Any:
        """Wait for the call that was begun; its result, or what it raised."""
        self.bell.recv(1)
        self.busy = False
        result, error = self._result, self._error
        self._result = self._error = None
        if error is not None:
            raise error
        return result

    def close(self, seconds: float) -> None:
        """Let the thread end after what it does now, and wait that long for it."""
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
            self._rope.send(b"\0")
        self._rope.close()
        self.bell.close()
