"""Every rank but the first: it runs what rank 0 sends until rank 0 says stop, gives a verdict, or is gone.

Graphs run in a worker, so that this side always hears: it answers when it is asked for a sign of life, and a verdict or the
end of rank 0 finds it even while a collective waits for somebody who will not come.
"""

from __future__ import annotations

import logging
import selectors
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol

from ...artifact import GraphSpec
from ...backends.base import Feed, new_feed
from ..base import Backend, Group
from .compute_thread import ComputeThread
from .failures import CollectiveError, Peer
from .monitor import GRACE_S, describe
from .protocol import Copy, Failed, FailureReport, FrameError, FrameKind, Go, Header, Link, State, encode

log = logging.getLogger(__name__)
GONE = (EOFError, OSError)


class Watched(Group, Protocol):
    """A group that says whether this rank is in a collective."""

    @property
    def meeting(self) -> bool: ...


class RankWorker:
    """One rank from the moment its artifact is open."""

    def __init__(self, rank: int, leader: Peer, link: Link, graphs: tuple[GraphSpec | None, ...], timeout: float) -> None:
        """graphs: in the order of rank 0's, None where this rank has no part in one.

        timeout: seconds that this rank may need to end a step after rank 0 has.
        """
        self.rank, self.leader, self.link, self.graphs, self.timeout = rank, leader, link, graphs, timeout
        self.worker = ComputeThread(f"rank {rank}")
        self.group: Watched | None = None
        self.backend: Backend | None = None
        self.feeds: dict[int, tuple[Feed, list[memoryview]]] = {}  # by graph: arrays, and the bytes of them
        self.failed = ""  # why this rank cannot go on
        self.at_fault = False  # and not because a collective failed, which is perhaps rank 0's doing
        self.report_deadline: float | None = None  # until when it waits for the verdict

    def follow(self, open_backend: Callable[[Go], tuple[Watched, Backend]]) -> int:
        """Take part until the end; the exit status. `open_backend` is called when rank 0 has compared all ranks' artifacts."""
        try:
            return self._listen(open_backend)
        finally:
            self.worker.close(0)

    def _listen(self, open_backend: Callable[[Go], tuple[Watched, Backend]]) -> int:
        with selectors.DefaultSelector() as selector:
            selector.register(self.link, selectors.EVENT_READ)
            selector.register(self.worker.bell, selectors.EVENT_READ)
            while True:
                left = None if self.report_deadline is None else max(self.report_deadline - time.monotonic(), 0)
                events = selector.select(left)
                if not events and left is not None:
                    return self._stop(f"{self.failed}; {self.leader} gave no verdict: it is stopped, stuck, or out of reach")
                ready = {key.fileobj for key, _ in events}
                if self.worker.bell in ready:
                    self._finish()
                if self.link in ready and (status := self._hear(open_backend)) is not None:
                    return status

    @property
    def stuck(self) -> bool:
        """Whether something still runs that may never end."""
        return self.worker.busy

    def _hear(self, open_backend: Callable[[Go], tuple[Watched, Backend]]) -> int | None:
        """Take one message of rank 0; an exit status when that is the end."""
        try:
            return self._obey(self.link.header(), open_backend)
        except FrameError as error:
            return self._stop(f"{self.leader} sent something else than a step: {error}")
        except GONE:
            return self._stop(f"{self.failed}; {self.leader} died" if self.at_fault else f"{self.leader} died")

    def _obey(self, header: Header, open_backend: Callable[[Go], tuple[Watched, Backend]]) -> int | None:
        """Do what rank 0 says; an exit status when that is the end."""
        match header.kind:
            case FrameKind.STOP:
                self._wait()
                return 0
            case FrameKind.FAILURE_REPORT:
                return self._stop(self.link.record(header, FailureReport).text)
            case FrameKind.PING:
                self.link.send([encode(FrameKind.STATE, State(self._doing()))])
            case FrameKind.GO:
                go = self.link.record(header, Go)
                self.worker.start(partial(self._open, partial(open_backend, go)))
            case FrameKind.RUN | FrameKind.LOAD | FrameKind.UNLOAD | FrameKind.COPY:
                if not self._wait():
                    return self._stop(f"rank {self.rank}, this one, has not ended its last step for {self.timeout:g} s")
                self._begin(header)
            case _:
                raise FrameError(f"{header.kind.name} is not for this rank")
        return None

    def _open(self, open_backend: Callable[[], tuple[Watched, Backend]]) -> None:
        self.group, self.backend = open_backend()
        for graph in filter(None, self.graphs):
            self.backend.load(graph)
        self.link.send([encode(FrameKind.READY)])

    def _begin(self, header: Header) -> None:
        """Receive what a call takes, and start it."""
        graph, backend = self.graphs[header.graph], self.backend
        assert backend is not None, "rank 0 waits until all are ready"
        call: Callable[[], Any]
        if header.kind is FrameKind.COPY:
            copy = self.link.record(header, Copy)
            call = partial(backend.copy_slot, copy.source, copy.target, copy.rows, copy.images)
        elif graph is None:
            raise FrameError(f"graph {header.graph} is none of this rank's")
        elif header.kind is FrameKind.RUN:
            call = partial(backend.run, graph, self._receive(header, graph), header.slot, header.image)
        else:
            call = partial(backend.load if header.kind is FrameKind.LOAD else backend.unload, graph)
        if not self.failed:
            self.worker.start(call)

    def _receive(self, header: Header, graph: GraphSpec) -> Feed:
        """The feed of a step, in the arrays that the backend has bound."""
        if header.graph not in self.feeds:
            feed = new_feed(graph)
            self.feeds[header.graph] = feed, [array.data.cast("B") for array in feed.values() if array.nbytes]
        feed, views = self.feeds[header.graph]
        if header.nbytes != (expected := sum(view.nbytes for view in views)):
            raise FrameError(f"a step of {graph.name} has {header.nbytes} bytes; expected {expected}")
        for view in views:
            self.link.receive(view)
        return feed

    def _wait(self) -> bool:
        """Let what runs end: rank 0 is sometimes a little ahead. Whether it did."""
        if self.worker.busy:
            with selectors.DefaultSelector() as selector:
                selector.register(self.worker.bell, selectors.EVENT_READ)
                if not selector.select(self.timeout):
                    return False
            self._finish()
        return True

    def _finish(self) -> None:
        """What has run has ended; tell rank 0 if it failed, and wait for the verdict."""
        if not self.worker.busy:
            return
        try:
            self.worker.finish()
        except BaseException as error:
            log.debug("rank %d failed", self.rank, exc_info=True)
            self.failed, self.report_deadline = describe(error), time.monotonic() + 5 * GRACE_S
            self.at_fault = not isinstance(error, CollectiveError)
            self.link.offer(encode(FrameKind.FAILED, Failed(self.failed, not self.at_fault)))

    def _doing(self) -> Literal["idle", "computing", "meeting"]:
        if not self.worker.busy:
            return "idle"
        return "meeting" if self.group is not None and self.group.meeting else "computing"

    def _stop(self, why: str) -> int:
        sys.stderr.write(f"staticvl: rank {self.rank} stops: {why}\n")
        sys.stderr.flush()
        return 1
