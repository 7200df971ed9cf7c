"""How ranks come together: rank 0 and the others meet, compare what they opened, and load their parts.

Every rank first connects to rank 0 and only then opens its artifact, so that whatever it finds there reaches the one who
tells the user.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import socket
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from ...artifact import Artifact, ArtifactError, GraphSpec
from ...opening import Checks, open_checked
from ...shown import quoted
from ..base import Backend
from ..open import open_backend
from .control import Members, Store, join
from .failures import Peer
from .launch import LocalRanks, threads_each
from .leader import LeaderBackend
from .monitor import RankMonitor
from .protocol import FrameKind, Go, Link, Opened, encode
from .rank_worker import RankWorker, Watched
from .world import LOOPBACK, World, rank_info_of

JOIN_S = 60.0  # for all ranks to come
TIMEOUT_S = 300.0  # for a rank to come to a collective
UNCHECKED = Checks()


def read_timeout(given: float | None) -> float:
    """Seconds that ranks wait for each other: as given, as STATICVL_TIMEOUT says, or 300."""
    value = given if given is not None else os.environ.get("STATICVL_TIMEOUT", TIMEOUT_S)
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        name = "timeout" if given is not None else "STATICVL_TIMEOUT"
        raise ArtifactError(f"{name} is {quoted(value)}; expected seconds above 0 that ranks wait for each other")
    return seconds


def spawn(artifact: Artifact, *, device: str, threads: int | None, timeout: float, checks: Checks = UNCHECKED) -> LeaderBackend:
    """Start the other ranks of an artifact on this machine and lead them. Raises RankError when that fails."""
    size = artifact.manifest.ranks
    same: Any = {"device": device, "threads": threads, "timeout": timeout, "checks": checks}
    # The folder is this user's alone. Once all ranks are ready, nothing reads the store any more.
    with tempfile.TemporaryDirectory(prefix="staticvl-ranks-") as folder:
        file = f"{folder}/store"
        store = _groups().file_store(file, size, JOIN_S)
        children = LocalRanks(artifact.folder, size, file, **same)
        try:
            return lead(artifact, World(0, size, size, LOOPBACK), store, **same, children=children)
        except BaseException:
            children.end()
            raise


def meet(world: World) -> Store:
    """The store of ranks that a launcher has started."""
    return _groups().meet_store(world, JOIN_S)


def lead(
    artifact: Artifact,
    world: World,
    store: Store,
    *,
    device: str,
    threads: int | None,
    timeout: float,
    checks: Checks = UNCHECKED,
    children: LocalRanks | None = None,
) -> LeaderBackend:
    """Rank 0: wait for the others, compare, and load; raises RankError, which names the rank that is at fault."""
    with contextlib.ExitStack() as after:
        after.callback(_groups().release, store)  # all are ready, or the start has failed: it has no more readers
        members = Members(world, timeout)
        try:
            members.publish(store)
            members.wait(JOIN_S, children.check if children else _nothing)
        finally:
            members.close()
        monitor = RankMonitor(Peer(0, os.getpid(), socket.gethostname()), members.joined, timeout, children)
        try:
            _compare(monitor, artifact)
            go = Go(_address(monitor.links.values()), timeout)
            for link in monitor.links.values():
                link.send([encode(FrameKind.GO, go)])

            def open_all() -> Backend:
                group, backend = _open(artifact, world, store, go.address, timeout, device, threads, checks)
                monitor.meeting = lambda: group.meeting
                for graph in artifact.manifest.graphs:
                    backend.load(graph)
                return backend

            local = monitor.together(open_all)
            monitor.collect(FrameKind.READY, None)
            return LeaderBackend(local, monitor, artifact.manifest)
        except BaseException:
            monitor.close()
            raise


def follow(
    folder: Path,
    world: World,
    store: Store,
    *,
    device: str,
    threads: int | None,
    timeout: float,
    checks: Checks = UNCHECKED,
) -> tuple[int, bool]:
    """Any other rank: take part until the end. The exit status, and whether a thread is left that may never end.

    An interrupt is ignored: rank 0 gets it too, and decides. Raises RankError when there is no rank 0.
    """
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    leader, link = join(store, world, timeout)
    opened = _opened(folder, world, link, checks)
    graphs = () if isinstance(opened, str) else _graphs(opened, world)
    follower = RankWorker(world.rank, leader, link, graphs, timeout)

    def open_all(go: Go) -> tuple[Watched, Backend]:
        assert isinstance(opened, Artifact)
        own = link.socket.getsockname()[0]
        address = go.address if _is_loopback(own) else _plain(own)
        return _open(opened, world, store, address, go.timeout, device, threads, checks)

    return follower.follow(open_all), follower.stuck


def _opened(folder: Path, world: World, link: Link, checks: Checks) -> Artifact | str:
    """This rank's artifact, or why there is none; rank 0 is told."""
    try:
        opened = open_checked(folder, checks, rank=world.rank)
        told = Opened(digest=opened.manifest.digest)
    except (ValueError, OSError) as error:
        opened, told = str(error), Opened(error=str(error)[:2000])
    link.send([encode(FrameKind.OPENED, told)])
    return opened


def _graphs(artifact: Artifact, world: World) -> tuple[GraphSpec | None, ...]:
    """This rank's graphs in the order of rank 0's; None where its stage has no part in one."""
    manifest = artifact.manifest
    stage = min(world.rank // manifest.tp, manifest.pp - 1)  # rank 0 sees to it that the numbers fit
    own = {graph.name: graph for graph in manifest.of_stage(stage).graphs}
    return tuple(own.get(graph.name) for graph in manifest.graphs)


def _open(
    artifact: Artifact,
    world: World,
    store: Store,
    address: str,
    timeout: float,
    device: str,
    threads: int | None,
    checks: Checks,
) -> tuple[Watched, Backend]:
    """This rank's way to the others, and its backend."""
    rank_info = rank_info_of(world.rank, artifact.manifest.tp, artifact.manifest.pp)
    manifest = artifact.manifest.of_stage(rank_info.stage)
    group = _groups().GlooGroup(store, rank_info, timeout, address)
    threads = threads_each(threads, world.local_size)
    backend = open_backend(
        manifest.backend,
        artifact.folder,
        manifest.cache,
        device=device,
        threads=threads,
        manifest=manifest,
        group=group,
        verify=checks.all_files,
    )
    return group, backend


def _compare(monitor: RankMonitor, artifact: Artifact) -> None:
    """Every rank must have opened what rank 0 has."""
    told = []
    mine = artifact.manifest.digest
    for rank, opened in monitor.collect(FrameKind.OPENED, JOIN_S).items():
        if opened.error:
            told.append(f"{monitor.peers[rank]}: {opened.error}")
        elif opened.digest != mine:
            told.append(
                f"{monitor.peers[rank]} has another artifact: digest {opened.digest[:12]} instead of {mine[:12]}; copy "
                f"{artifact.folder} of {monitor.me.host} to {monitor.peers[rank].host}, or compile it again"
            )
    if told:
        raise monitor.stop("; ".join(told))


def _address(links: Iterable[Link]) -> str:
    """Rank 0's address on the network by which ranks of other machines have reached it."""
    found = [link.socket.getsockname()[0] for link in links]
    return next((_plain(address) for address in found if not _is_loopback(address)), LOOPBACK)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(_plain(address)).is_loopback


def _plain(address: str) -> str:
    """An IPv4 address that came in IPv6's clothes as itself."""
    return address.removeprefix("::ffff:")


def _nothing(_: Collection[int]) -> None:
    pass


def _groups():
    """The file that imports torch, which only ranks need."""
    try:
        from . import group
    except ImportError as error:
        raise ArtifactError(f"artifacts of several ranks need torch ({error}); pip install 'staticvl[compile]'") from error
    return group
