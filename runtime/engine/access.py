"""Access to the engine from several threads: one at a time, between two steps, while a step of any thread serves all.

Threads that wait for answers elect one of them, which runs steps for all; the others sleep until theirs have something new.
Other work (a new request, a cancellation) waits for the step that runs, and goes before the next one. What the garbage
collector does, in any thread and at any point, is left to the thread that has the engine.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TypeVar

AWAKE_S = 1.0  # seconds after which a thread that sleeps looks for news by itself
T = TypeVar("T")
log = logging.getLogger(__name__)


class InterruptedStepError(RuntimeError):
    """A step ended in the middle, and with it every request; each can be made again."""

    @classmethod
    def by(cls, error: BaseException) -> InterruptedStepError:
        """The error of the requests, where `error` is that of the thread that ran the step."""
        name = type(error).__name__
        own = cls(f"{name} ended a step in the middle, and every request with it; make the request again")
        own.__cause__ = error
        return own


class EngineAccess:
    """The lock of one engine.

    An interrupt (KeyboardInterrupt) leaves no lock held: signals are handled between calls, and `with` acquires and releases a
    lock of the interpreter without one between.
    """

    def __init__(self, interrupted: Callable[[BaseException], object]) -> None:
        """`interrupted`: called with an exception that is no Exception, before it leaves the engine."""
        self._door, self._lock = threading.RLock(), threading.RLock()
        self._thread: int | None = None  # the thread that works at the engine
        self._later: deque[Callable[[], object]] = deque()
        self._news = threading.Condition()
        self._leader: object = None  # who runs steps for all
        self._sleepers = 0  # threads that wait for news; each counts itself before it looks for the last time
        self._interrupted = interrupted

    @property
    def inside(self) -> bool:
        """Whether this very thread has the engine already: in a signal handler or a finalizer, in the middle of a step."""
        return self._thread == threading.get_ident()

    def exclusively(self, work: Callable[..., T], *args: object) -> T:
        """work(*args) between two steps. Raises RuntimeError in the middle of one of this thread."""
        try:
            with self._door, self._lock:
                return self._work(work, *args)
        finally:
            self._left()

    def step(self, work: Callable[..., T], *args: object) -> T:
        """As `exclusively`, but after all that wait there: a thread that runs steps in a loop lets them in."""
        try:
            with self._door:
                pass
            with self._lock:
                return self._work(work, *args)
        finally:
            self._left()

    def soon(self, work: Callable[..., object], *args: object) -> None:
        """Leave work to the thread that has the engine, or do it now where none has. Never waits; errors are logged."""
        self._later.append(partial(work, *args))
        self._left()

    def at_last(self, work: Callable[..., object], *args: object) -> None:
        """As `exclusively`; in the middle of a step of this thread, as `soon`."""
        if self.inside:
            self.soon(work, *args)
        else:
            self.exclusively(work, *args)

    def until(self, done: Callable[[], bool], step: Callable[[], object]) -> None:
        """Return when done(): this thread runs steps, or sleeps while another one does.

        `done` must hold on, once true, and be cheap; it is called at any time, also during a step.
        """
        while not done():
            me = object()
            try:
                self._sleep(done, me)
                while self._leader is me and not done():
                    self.step(step)
            finally:
                if self._leader is me:
                    self._leader = None
                    self._left()

    def _sleep(self, done: Callable[[], bool], me: object) -> None:
        """Sleep until done(), or until no thread runs steps: then this thread will."""
        with self._news:
            try:
                self._sleepers += 1
                # An interrupt of another thread may swallow a notification, hence the limit.
                if self._news.wait_for(lambda: done() or self._leader is None, timeout=AWAKE_S):
                    self._leader = self._leader or me
            finally:
                self._sleepers -= 1

    def _work(self, work: Callable[..., T], *args: object) -> T:
        """The lock is held."""
        if self._thread is not None:  # it is this one
            raise RuntimeError("the model was called in the middle of its own step, by a signal handler; call it later")
        try:
            self._thread = threading.get_ident()
            return work(*args)
        except BaseException as error:
            if not isinstance(error, Exception):
                self._interrupted(error)
            raise
        finally:
            self._thread = None

    def _left(self) -> None:
        """After the engine is free, if this thread had it: do postponed work, and wake sleeping threads."""
        if self._later:
            self._clear_up()
        if self._sleepers:
            with self._news:
                self._news.notify_all()

    def _clear_up(self) -> None:
        while self._later and not self.inside:
            try:
                if not self._lock.acquire(blocking=False):
                    return  # its holder looks here after it has released it
                self._work(self._do_later)
            finally:
                with contextlib.suppress(RuntimeError):  # it was not acquired
                    self._lock.release()

    def _do_later(self) -> None:
        while self._later:
            try:
                self._later.popleft()()
            except Exception as error:
                log.error("%s", error)
