"""Rank 0's hold on the other ranks: it watches them while all compute, finds out what happened when one fails, and ends them.

Rank 0's own part of a step runs in a worker. Meanwhile this side listens: the end of a connection means that a process is
gone, a word of failure that it cannot go on, and each time that the limit passes everyone is asked for a sign of life. So
what happens to any rank is known here whatever the collectives of the device make of it.
"""

from __future__ import annotations

import selectors
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from .compute_thread import ComputeThread
from .failures import BAD, CollectiveError, Peer, RankError, RankStatus, failure_report
from .protocol import Failed, FailureReport, FrameKind, FramePayload, Header, Link, Opened, State, encode

GRACE_S = 2.0  # for ranks to say what they know, and to leave
RECORDS: dict[FrameKind, type[FramePayload]] = {FrameKind.OPENED: Opened, FrameKind.STATE: State, FrameKind.FAILED: Failed}


class Children(Protocol):
    """Processes that this one has started, if it has."""

    def ending(self, rank: int) -> str:
        """How the process of a rank that is gone ended, as far as that is known."""
        ...

    def end(self) -> None:
        """End those that have not left by themselves."""
        ...


class RankMonitor:
    """All ranks, seen from rank 0. `meeting` says whether this rank is in a collective."""

    def __init__(self, me: Peer, members: Mapping[int, tuple[Peer, Link]], timeout: float, children: Children | None) -> None:
        self.me, self.timeout, self.children = me, timeout, children
        self.peers = {rank: peer for rank, (peer, _) in members.items()}
        self.links = {rank: link for rank, (_, link) in members.items()}
        self.meeting: Callable[[], bool] = lambda: False
        self.over = ""  # why nothing runs any more
        self.told: dict[tuple[FrameKind, int], FramePayload | None] = {}  # what ranks have said once and for all
        self.worker = ComputeThread("rank 0")
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.worker.bell, selectors.EVENT_READ, me.rank)
        for rank, link in self.links.items():
            self.selector.register(link, selectors.EVENT_READ, rank)

    # ---- while all is well

    def together(self, call: Callable[[], Any]) -> Any:
        """The result of this rank's part of what all ranks do now.

        Raises RankError when a rank fails, this one included. An interrupt is raised when the part has ended, so that the
        ranks stay in step; a second one at once, and the ranks are given up.
        """
        if self.over:
            raise RankError(self.over)
        self._listen(0)
        self.worker.start(call)
        try:
            self._watch()
        except RankError:
            raise
        except BaseException:
            self._settle()
            raise
        return self._finish()

    def check(self) -> None:
        """Raise RankError if a rank has gone or failed while nothing was to be done."""
        if self.over:
            raise RankError(self.over)
        self._listen(0)

    def send(self, ranks: Sequence[int], header: Header, views: Sequence[memoryview] = ()) -> None:
        """One frame to each of these ranks; raises CollectiveError where one does not take it."""
        head = header.packed()
        for rank in ranks:
            try:
                self.links[rank].send([head, *views])
            except OSError as error:
                raise CollectiveError(f"{self.peers[rank]} did not take a message: {error}") from error

    def collect(self, kind: FrameKind, seconds: float | None) -> dict[int, Any]:
        """What every rank says under `kind`. Within `seconds`, or else as long as they give signs of life."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while missing := [rank for rank in self.links if (kind, rank) not in self.told]:
            left = self.timeout if deadline is None else deadline - time.monotonic()
            if self._listen(max(left, 0)):
                continue
            if deadline is None:
                self._roll_call()
            elif left <= 0:
                raise self.fail({rank: RankStatus(self.peers[rank], "silent") for rank in missing})
        return {rank: self.told[kind, rank] for rank in self.links}

    def _watch(self) -> None:
        """Until this rank's part has ended."""
        while self.me.rank not in (heard := self._listen(self.timeout)):
            if not heard:
                self._roll_call()

    def _settle(self) -> None:
        """After an interrupt: let this part end."""
        try:
            self._watch()
        except RankError:
            raise
        except BaseException:
            self.fail({}, RankStatus(self.me, "failed", "interrupted in the middle of a step"))
            raise
        self._finish()

    def _finish(self) -> Any:
        try:
            return self.worker.finish()
        except BaseException as error:
            raise self.fail({}, self._account(error)) from error

    def _account(self, error: BaseException) -> RankStatus:
        return RankStatus(self.me, "lost" if isinstance(error, CollectiveError) else "failed", describe(error))

    def _listen(self, seconds: float) -> list[int]:
        """Wait that long for anything; the ranks that were heard. Raises RankError for bad news."""
        heard = [key.data for key, _ in self.selector.select(seconds)]
        for rank in heard:
            if rank in self.links and (account := self._hear(rank)) and account.doing in BAD:
                raise self.fail({rank: account})
        return heard

    def _hear(self, rank: int) -> RankStatus | None:
        """Take one message of a rank; what it says of the rank's doings, if anything."""
        peer, link = self.peers[rank], self.links[rank]
        try:
            header = link.header()
            record = link.record(header, RECORDS[header.kind]) if header.kind in RECORDS else None
        except (EOFError, OSError):
            self.selector.unregister(link)
            return RankStatus(peer, "died", self.children.ending(rank) if self.children else "")
        if isinstance(record, Failed):
            return RankStatus(peer, "lost" if record.meeting else "failed", record.text)
        if isinstance(record, State):
            return RankStatus(peer, record.doing)
        self.told[header.kind, rank] = record
        return None

    # ---- when something goes wrong

    def _roll_call(self) -> None:
        """Ask every rank for a sign of life; raises RankError when one gives none."""
        accounts = self._inquire({})
        if any(account.doing in BAD for account in accounts.values()):
            raise self.stop(failure_report([self._mine(), *accounts.values()], self.timeout))

    def fail(self, known: dict[int, RankStatus], mine: RankStatus | None = None) -> RankError:
        """Find out what every rank was doing, tell all whose fault it is, and end them. The error to raise."""
        accounts = self._inquire(known)
        return self.stop(failure_report([mine or self._mine(), *accounts.values()], self.timeout))

    def _mine(self) -> RankStatus:
        """What this rank is doing; an error of its own that nobody has seen yet is found."""
        if self.worker.busy and self.worker.ended:
            try:
                self.worker.finish()
            except BaseException as error:
                return self._account(error)
        if not self.worker.busy:
            return RankStatus(self.me, "idle")
        return RankStatus(self.me, "meeting" if self.meeting() else "computing")

    def _inquire(self, known: dict[int, RankStatus]) -> dict[int, RankStatus]:
        """What each rank was doing; `known` are accounts already given."""
        accounts = dict(known)
        for rank, link in self.links.items():
            if rank not in accounts:
                link.offer(encode(FrameKind.PING))
        deadline = time.monotonic() + GRACE_S
        bell = self.worker.bell
        while (left := deadline - time.monotonic()) > 0 and len(accounts) < len(self.links):
            for key, _ in self.selector.select(left):
                if key.fileobj is bell:  # for later: now it would wake this loop again and again
                    self.selector.unregister(bell)
                elif (account := self._hear(key.data)) and _worse(account, accounts.get(key.data)):
                    accounts[key.data] = account
        if bell not in self.selector.get_map():
            self.selector.register(bell, selectors.EVENT_READ, self.me.rank)
        for rank in self.peers.keys() - accounts.keys():
            accounts[rank] = RankStatus(self.peers[rank], "silent")
            self.selector.unregister(self.links[rank])  # nobody waits for it any more
        return accounts

    def stop(self, told: str) -> RankError:
        """End every rank, because of what is told. The error to raise."""
        for link in self.links.values():
            link.offer(encode(FrameKind.FAILURE_REPORT, FailureReport(told)))
        self._leave(f"the ranks of this model stopped earlier ({told}); load the artifact again")
        return RankError(f"{told}; every rank was stopped")

    def close(self) -> None:
        """End every rank in good order; nothing where that has happened already."""
        if not self.over:
            for link in self.links.values():
                link.offer(encode(FrameKind.STOP))
            self._leave("the model was closed; load the artifact again")

    def _leave(self, why: str) -> None:
        """Wait until the others have left, for a moment, and let go of everything."""
        self.over = why
        try:
            deadline = time.monotonic() + GRACE_S
            self.selector.unregister(self.worker.bell)
            while self.selector.get_map() and (left := deadline - time.monotonic()) > 0:
                for key, _ in self.selector.select(left):
                    self._hear(key.data)
        finally:
            if self.children:
                self.children.end()
            for link in self.links.values():
                link.close()
            self.selector.close()
            # Libraries do not like the end of the interpreter in the middle of a collective, which ends when its ranks have.
            self.worker.close(GRACE_S)


def _worse(new: RankStatus, old: RankStatus | None) -> bool:
    """Whether an account says more than one before: a rank may die after it has failed, or fail after a sign of life."""
    order = ("idle", "computing", "meeting", "lost", "failed")
    return old is None or (new.doing in order and old.doing in order and order.index(new.doing) > order.index(old.doing))


def describe(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, CollectiveError):
        return str(error)
    return f"{type(error).__name__}: {error}".splitlines()[0][:2000]
