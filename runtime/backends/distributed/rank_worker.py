"""A worker rank, which is every rank but the first: it runs what rank 0 sends until rank 0 stops it or is gone.

Graphs run in a ComputeThread, so that this side can always read messages: it answers status requests, and a failure report or
the end of rank 0 reaches it even while a collective waits for a rank that will not come.
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
from ..base import Backend, Feed, Group, new_feed
from .compute_thread import ComputeThread
from .failures import CollectiveError, Peer
from .monitor import GRACE_S, describe
from .protocol import Copy, CopyPage, Failed, FailureReport, FrameError, FrameKind, GiveBack, Go, Header, Link, State, encode

log = logging.getLogger(__name__)
DISCONNECTED = (EOFError, OSError)
# Frames that are calls of the backend.
CALLS = {
    FrameKind.RUN,
    FrameKind.LOAD,
    FrameKind.UNLOAD,
    FrameKind.COPY,
    FrameKind.COPY_PAGE,
    FrameKind.GIVE_BACK,
    FrameKind.SMALL_PAGES,
}


class WatchedGroup(Group, Protocol):
    """A group that says whether this rank is in a collective."""

    @property
    def in_collective(self) -> bool: ...


class RankWorker:
    """One worker rank from the moment its artifact is open."""

    def __init__(self, rank: int, leader: Peer, link: Link, graphs: tuple[GraphSpec | None, ...], timeout: float) -> None:
        """graphs: in the order of rank 0's, None where this rank has no part in one.

        timeout: seconds that this rank may need to end a run after rank 0 has.
        """
        self.rank, self.leader, self.link, self.graphs, self.timeout = rank, leader, link, graphs, timeout
        self.compute_thread = ComputeThread(f"rank {rank}")
        self.group: WatchedGroup | None = None
        self.backend: Backend | None = None
        self.feeds: dict[int, tuple[Feed, list[memoryview]]] = {}  # by graph: arrays, and the bytes of them
        self.error = ""  # why this rank cannot go on
        self.at_fault = False  # whether the error is its own; a failed collective is perhaps rank 0's doing
        self.report_deadline: float | None = None  # until when it waits for the failure report

    def serve(self, open_backend: Callable[[Go], tuple[WatchedGroup, Backend]]) -> int:
        """Do what rank 0 says until it ends this rank; the exit status.

        `open_backend` is called when rank 0 has compared all ranks' artifacts.
        """
        try:
            return self._read_messages(open_backend)
        finally:
            self.compute_thread.close(0)

    def _read_messages(self, open_backend: Callable[[Go], tuple[WatchedGroup, Backend]]) -> int:
        with selectors.DefaultSelector() as selector:
            selector.register(self.link, selectors.EVENT_READ)
            selector.register(self.compute_thread.done_socket, selectors.EVENT_READ)
            while True:
                left = None if self.report_deadline is None else max(self.report_deadline - time.monotonic(), 0)
                events = selector.select(left)
                if not events and left is not None:
                    silence = f"{self.leader} sent no failure report: it is stopped, stuck, or out of reach"
                    return self._stop(f"{self.error}; {silence}")
                ready = {key.fileobj for key, _ in events}
                if self.compute_thread.done_socket in ready:
                    self._finish()
                if self.link in ready and (status := self._read_message(open_backend)) is not None:
                    return status

    @property
    def stuck(self) -> bool:
        """Whether a call still runs that may never end."""
        return self.compute_thread.busy

    def _read_message(self, open_backend: Callable[[Go], tuple[WatchedGroup, Backend]]) -> int | None:
        """Read and handle one message of rank 0; an exit status when it ends this rank."""
        try:
            return self._handle(self.link.receive_header(), open_backend)
        except FrameError as error:
            return self._stop(f"{self.leader} sent an invalid message: {error}")
        except DISCONNECTED:
            return self._stop(f"{self.error}; {self.leader} died" if self.at_fault else f"{self.leader} died")

    def _handle(self, header: Header, open_backend: Callable[[Go], tuple[WatchedGroup, Backend]]) -> int | None:
        """Handle a message; an exit status when it ends this rank."""
        match header.kind:
            case FrameKind.STOP:
                self._wait_for_call()
                return 0
            case FrameKind.FAILURE_REPORT:
                return self._stop(self.link.receive_payload(header, FailureReport).text)
            case FrameKind.PING:
                self.link.send([encode(FrameKind.STATE, State(self._activity()))])
            case FrameKind.GO:
                go = self.link.receive_payload(header, Go)
                self.compute_thread.start(partial(self._open, partial(open_backend, go)))
            case kind if kind in CALLS:
                if not self._wait_for_call():
                    return self._stop(f"rank {self.rank}, this one, has not ended its last step for {self.timeout:g} s")
                self._start_call(header)
            case _:
                raise FrameError(f"{header.kind.name} is not for this rank")
        return None

    def _open(self, open_backend: Callable[[], tuple[WatchedGroup, Backend]]) -> None:
        self.group, self.backend = open_backend()
        for graph in filter(None, self.graphs):
            self.backend.load(graph)
        self.link.send([encode(FrameKind.READY)])

    def _start_call(self, header: Header) -> None:
        """Receive the arguments of a call, and start it."""
        graph, backend = self.graphs[header.graph], self.backend
        assert backend is not None, "rank 0 waits until all are ready"
        call: Callable[[], Any]
        if header.kind is FrameKind.COPY:
            copy = self.link.receive_payload(header, Copy)
            call = partial(backend.copy_slot, copy.source, copy.target, copy.rows, copy.images)
        elif header.kind is FrameKind.COPY_PAGE:
            page = self.link.receive_payload(header, CopyPage)
            call = partial(backend.copy_page, page.source, page.target)
        elif header.kind is FrameKind.GIVE_BACK:
            given = self.link.receive_payload(header, GiveBack)
            call = partial(backend.give_back, given.slot, given.rows)
        elif header.kind is FrameKind.SMALL_PAGES:
            call = backend.use_small_pages
        elif graph is None:
            raise FrameError(f"graph {header.graph} does not belong to this rank")
        elif header.kind is FrameKind.RUN:
            call = partial(backend.run, graph, self._receive_feed(header, graph), header.slot, header.image)
        else:
            call = partial(backend.load if header.kind is FrameKind.LOAD else backend.unload, graph)
        if not self.error:
            self.compute_thread.start(call)

    def _receive_feed(self, header: Header, graph: GraphSpec) -> Feed:
        """The feed of a run, in the arrays that the backend has bound."""
        if header.graph not in self.feeds:
            feed = new_feed(graph)
            self.feeds[header.graph] = feed, [array.data.cast("B") for array in feed.values() if array.nbytes]
        feed, views = self.feeds[header.graph]
        if header.nbytes != (expected := sum(view.nbytes for view in views)):
            raise FrameError(f"a step of {graph.name} has {header.nbytes} bytes; expected {expected}")
        for view in views:
            self.link.receive_into(view)
        return feed

    def _wait_for_call(self) -> bool:
        """Let the present call end, as rank 0 is sometimes a little ahead; whether it did within the timeout."""
        if self.compute_thread.busy:
            with selectors.DefaultSelector() as selector:
                selector.register(self.compute_thread.done_socket, selectors.EVENT_READ)
                if not selector.select(self.timeout):
                    return False
            self._finish()
        return True

    def _finish(self) -> None:
        """After a call has ended: tell rank 0 if it failed, and wait for the failure report."""
        if not self.compute_thread.busy:
            return
        try:
            self.compute_thread.finish()
        except BaseException as error:
            log.debug("rank %d failed", self.rank, exc_info=True)
            self.error, self.report_deadline = describe(error), time.monotonic() + 5 * GRACE_S
            self.at_fault = not isinstance(error, CollectiveError)
            self.link.try_send(encode(FrameKind.FAILED, Failed(self.error, not self.at_fault)))

    def _activity(self) -> Literal["idle", "computing", "meeting"]:
        if not self.compute_thread.busy:
            return "idle"
        return "meeting" if self.group is not None and self.group.in_collective else "computing"

    def _stop(self, reason: str) -> int:
        sys.stderr.write(f"staticvl: rank {self.rank} stops: {reason}\n")
        sys.stderr.flush()
        return 1
