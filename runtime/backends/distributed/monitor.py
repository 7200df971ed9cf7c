"""Rank 0's watch over the other ranks: it notices when one fails, finds out what every rank was doing, and ends them all.

Rank 0's own part of a run is computed in a ComputeThread. Meanwhile this side reads messages: the end of a connection means
that a process is gone, a Failed message that it cannot go on, and each time that the timeout passes every rank gets a status
request. So rank 0 knows of the failure of any rank, even where the collectives of the device do not end.
"""

from __future__ import annotations

import selectors
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from .compute_thread import ComputeThread
from .failures import FAILURES, CollectiveError, Peer, RankError, RankStatus, failure_report
from .protocol import Failed, FailureReport, FrameKind, FramePayload, Header, Link, Opened, State, encode

GRACE_S = 2.0  # seconds for ranks to answer a status request, and to leave
PAYLOADS: dict[FrameKind, type[FramePayload]] = {FrameKind.OPENED: Opened, FrameKind.STATE: State, FrameKind.FAILED: Failed}


class Children(Protocol):
    """Processes of ranks that this one has started."""

    def exit_text(self, rank: int) -> str:
        """The exit status of a rank's ended process, as text; empty where it is not known."""
        ...

    def end(self) -> None:
        """End those that have not left by themselves."""
        ...


class RankMonitor:
    """All ranks, seen from rank 0. `in_collective` says whether rank 0 itself is in a collective."""

    def __init__(
        self, leader: Peer, workers: Mapping[int, tuple[Peer, Link]], timeout: float, children: Children | None
    ) -> None:
        """timeout: seconds without a message after which every rank gets a status request."""
        self.leader, self.timeout, self.children = leader, timeout, children
        self.peers = {rank: peer for rank, (peer, _) in workers.items()}
        self.links = {rank: link for rank, (_, link) in workers.items()}
        self.in_collective: Callable[[], bool] = lambda: False
        self.stop_reason = ""  # why nothing runs any more
        self.answers: dict[tuple[FrameKind, int], FramePayload | None] = {}  # payloads of messages that ranks send once
        self.compute_thread = ComputeThread("rank 0")
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.compute_thread.done_socket, selectors.EVENT_READ, leader.rank)
        for rank, link in self.links.items():
            self.selector.register(link, selectors.EVENT_READ, rank)

    # ---- while all is well

    def run_watched(self, call: Callable[[], Any]) -> Any:
        """The result of `call`, rank 0's part of what all ranks do now; the other ranks are watched while it runs.

        Raises RankError when a rank fails, this one included. An interrupt is raised when the call has ended, so that all ranks
        have done the same runs; a second interrupt is raised at once, and the ranks are given up.
        """
        if self.stop_reason:
            raise RankError(self.stop_reason)
        self._read_messages(0)
        self.compute_thread.start(call)
        try:
            self._wait_for_call()
        except RankError:
            raise
        except BaseException:
            self._finish_interrupted()
            raise
        return self._finish()

    def check(self) -> None:
        """Raise RankError if a rank has gone or failed since the last run."""
        if self.stop_reason:
            raise RankError(self.stop_reason)
        self._read_messages(0)

    def send(self, ranks: Sequence[int], header: Header, views: Sequence[memoryview] = ()) -> None:
        """Send one frame to each of these ranks; raises CollectiveError where one does not take it."""
        head = header.packed()
        for rank in ranks:
            try:
                self.links[rank].send([head, *views])
            except OSError as error:
                raise CollectiveError(f"{self.peers[rank]} did not take a message: {error}") from error

    def collect(self, kind: FrameKind, seconds: float | None) -> dict[int, Any]:
        """The payload of every rank's message of this kind, by rank; raises RankError for ranks that do not send one.

        They have `seconds` for it; None: as long as they answer status requests.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        while missing := [rank for rank in self.links if (kind, rank) not in self.answers]:
            left = self.timeout if deadline is None else deadline - time.monotonic()
            if self._read_messages(max(left, 0)):
                continue
            if deadline is None:
                self._check_alive()
            elif left <= 0:
                raise self.fail({rank: RankStatus(self.peers[rank], "silent") for rank in missing})
        return {rank: self.answers[kind, rank] for rank in self.links}

    def _wait_for_call(self) -> None:
        """Read messages until this rank's call has ended."""
        while self.leader.rank not in (ranks := self._read_messages(self.timeout)):
            if not ranks:
                self._check_alive()

    def _finish_interrupted(self) -> None:
        """Let this rank's call end after an interrupt."""
        try:
            self._wait_for_call()
        except RankError:
            raise
        except BaseException:
            self.fail({}, RankStatus(self.leader, "failed", "interrupted in the middle of a step"))
            raise
        self._finish()

    def _finish(self) -> Any:
        try:
            return self.compute_thread.finish()
        except BaseException as error:
            raise self.fail({}, self._error_status(error)) from error

    def _error_status(self, error: BaseException) -> RankStatus:
        return RankStatus(self.leader, "lost" if isinstance(error, CollectiveError) else "failed", describe(error))

    def _read_messages(self, seconds: float) -> list[int]:
        """Wait that long for messages; the ranks that sent one. Raises RankError where one reports a failure."""
        ranks = [key.data for key, _ in self.selector.select(seconds)]
        for rank in ranks:
            if rank in self.links and (status := self._read_message(rank)) and status.activity in FAILURES:
                raise self.fail({rank: status})
        return ranks

    def _read_message(self, rank: int) -> RankStatus | None:
        """Read one message of a rank; its status, where the message says something about it."""
        peer, link = self.peers[rank], self.links[rank]
        try:
            header = link.receive_header()
            payload = link.receive_payload(header, PAYLOADS[header.kind]) if header.kind in PAYLOADS else None
        except (EOFError, OSError):
            self.selector.unregister(link)
            return RankStatus(peer, "died", self.children.exit_text(rank) if self.children else "")
        if isinstance(payload, Failed):
            return RankStatus(peer, "lost" if payload.in_collective else "failed", payload.text)
        if isinstance(payload, State):
            return RankStatus(peer, payload.activity)
        self.answers[header.kind, rank] = payload
        return None

    # ---- when something goes wrong

    def _check_alive(self) -> None:
        """Send every rank a status request; raises RankError when one does not answer or has failed."""
        statuses = self._request_statuses({})
        if any(status.activity in FAILURES for status in statuses.values()):
            raise self.stop(failure_report([self._own_status(), *statuses.values()], self.timeout))

    def fail(self, reported: dict[int, RankStatus], own: RankStatus | None = None) -> RankError:
        """Find out what every rank was doing, send all the failure report, and end them. The error to raise.

        `reported`: statuses that are known already, by rank; `own`: rank 0's.
        """
        statuses = self._request_statuses(reported)
        return self.stop(failure_report([own or self._own_status(), *statuses.values()], self.timeout))

    def _own_status(self) -> RankStatus:
        """The status of this rank; an error of its call that was not raised yet counts as a failure."""
        if self.compute_thread.busy and self.compute_thread.ended:
            try:
                self.compute_thread.finish()
            except BaseException as error:
                return self._error_status(error)
        if not self.compute_thread.busy:
            return RankStatus(self.leader, "idle")
        return RankStatus(self.leader, "meeting" if self.in_collective() else "computing")

    def _request_statuses(self, reported: dict[int, RankStatus]) -> dict[int, RankStatus]:
        """The status of every rank; those in `reported` get no request."""
        statuses = dict(reported)
        for rank, link in self.links.items():
            if rank not in statuses:
                link.try_send(encode(FrameKind.PING))
        deadline = time.monotonic() + GRACE_S
        done_socket = self.compute_thread.done_socket
        while (left := deadline - time.monotonic()) > 0 and len(statuses) < len(self.links):
            for key, _ in self.selector.select(left):
                if key.fileobj is done_socket:  # for later: now it would wake this loop again and again
                    self.selector.unregister(done_socket)
                elif (status := self._read_message(key.data)) and _is_worse(status, statuses.get(key.data)):
                    statuses[key.data] = status
        if done_socket not in self.selector.get_map():
            self.selector.register(done_socket, selectors.EVENT_READ, self.leader.rank)
        for rank in self.peers.keys() - statuses.keys():
            statuses[rank] = RankStatus(self.peers[rank], "silent")
            self.selector.unregister(self.links[rank])  # no answer is expected from it any more
        return statuses

    def stop(self, report: str) -> RankError:
        """End every rank because of a failure report. The error to raise."""
        for link in self.links.values():
            link.try_send(encode(FrameKind.FAILURE_REPORT, FailureReport(report)))
        self._shut_down(f"the ranks of this model stopped earlier ({report}); load the artifact again")
        return RankError(f"{report}; every rank was stopped")

    def close(self) -> None:
        """End every rank in good order; nothing where that has happened already."""
        if not self.stop_reason:
            for link in self.links.values():
                link.try_send(encode(FrameKind.STOP))
            self._shut_down("the model was closed; load the artifact again")

    def _shut_down(self, reason: str) -> None:
        """Wait up to GRACE_S seconds until the others have left, and free everything."""
        self.stop_reason = reason
        try:
            deadline = time.monotonic() + GRACE_S
            self.selector.unregister(self.compute_thread.done_socket)
            while self.selector.get_map() and (left := deadline - time.monotonic()) > 0:
                for key, _ in self.selector.select(left):
                    self._read_message(key.data)
        finally:
            if self.children:
                self.children.end()
            for link in self.links.values():
                link.close()
            self.selector.close()
            # Libraries may crash at an exit in the middle of a collective, which ends when the other ranks have.
            self.compute_thread.close(GRACE_S)


def _is_worse(new: RankStatus, old: RankStatus | None) -> bool:
    """Whether a status says more than an earlier one: a rank may die after it has failed, or fail after it has answered."""
    order = ("idle", "computing", "meeting", "lost", "failed")
    return old is None or (
        new.activity in order and old.activity in order and order.index(new.activity) > order.index(old.activity)
    )


def describe(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, CollectiveError):
        return str(error)
    return f"{type(error).__name__}: {error}".splitlines()[0][:2000]
