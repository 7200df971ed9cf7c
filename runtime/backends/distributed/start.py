"""The start of all ranks: workers connect to rank 0, digests of manifests are compared, and every rank loads its shard.

Every rank first connects to rank 0 and only then opens its artifact, so that rank 0 can report any error.
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
from .control import KeyValueStore, WorkerListener, join
from .failures import Peer
from .launch import LocalRanks, threads_each
from .leader import LeaderBackend
from .monitor import RankMonitor
from .protocol import FrameKind, Go, Link, Opened, encode
from .rank_worker import RankWorker, WatchedGroup
from .world import LOOPBACK, World, rank_info_of

JOIN_S = 60.0  # seconds for all ranks to connect
TIMEOUT_S = 300.0  # seconds that ranks wait for one in a collective
UNCHECKED = Checks()


def read_timeout(timeout: float | None) -> float:
    """Seconds that ranks wait for each other: `timeout`, else STATICVL_TIMEOUT, else 300."""
    value = timeout if timeout is not None else os.environ.get("STATICVL_TIMEOUT", TIMEOUT_S)
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        name = "timeout" if timeout is not None else "STATICVL_TIMEOUT"
        raise ArtifactError(f"{name} is {quoted(value)}; expected seconds above 0 that ranks wait for each other")
    return seconds


def spawn(artifact: Artifact, *, device: str, threads: int | None, timeout: float, checks: Checks = UNCHECKED) -> LeaderBackend:
    """Start the other ranks of an artifact on this machine and lead them. Raises RankError when that fails."""
    size = artifact.manifest.ranks
    options: Any = {"device": device, "threads": threads, "timeout": timeout, "checks": checks}
    # The folder is this user's alone. Once all ranks are ready, nothing reads the store any more.
    with tempfile.TemporaryDirectory(prefix="staticvl-ranks-") as folder:
        file = f"{folder}/store"
        store = _group_module().file_store(file, size, JOIN_S)
        children = LocalRanks(artifact.folder, size, file, **options)
        try:
            return lead(artifact, World(0, size, size, LOOPBACK), store, **options, children=children)
        except BaseException:
            children.end()
            raise


def launcher_store(world: World) -> KeyValueStore:
    """The store of ranks that a launcher has started; raises RankError when it cannot be opened."""
    return _group_module().open_store(world, JOIN_S)


def lead(
    artifact: Artifact,
    world: World,
    store: KeyValueStore,
    *,
    device: str,
    threads: int | None,
    timeout: float,
    checks: Checks = UNCHECKED,
    children: LocalRanks | None = None,
) -> LeaderBackend:
    """Rank 0: wait for the workers, compare digests, and load; raises RankError, which names the rank that is at fault."""
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(_group_module().release, store)  # all are ready, or the start has failed: it has no more readers
        listener = WorkerListener(world, timeout)
        try:
            listener.publish(store)
            listener.wait(JOIN_S, children.check if children else _no_check)
        finally:
            listener.close()
        monitor = RankMonitor(Peer(0, os.getpid(), socket.gethostname()), listener.workers, timeout, children)
        try:
            _compare_digests(monitor, artifact)
            go = Go(_address(monitor.links.values()), timeout)
            for link in monitor.links.values():
                link.send([encode(FrameKind.GO, go)])

            def open_all() -> Backend:
                group, backend = _open(artifact, world, store, go.address, timeout, device, threads, checks)
                monitor.in_collective = lambda: group.in_collective
                for graph in artifact.manifest.graphs:
                    backend.load(graph)
                return backend

            local = monitor.run_watched(open_all)
            monitor.collect(FrameKind.READY, None)
            return LeaderBackend(local, monitor, artifact.manifest)
        except BaseException:
            monitor.close()
            raise


def run_worker(
    folder: Path,
    world: World,
    store: KeyValueStore,
    *,
    device: str,
    threads: int | None,
    timeout: float,
    checks: Checks = UNCHECKED,
) -> tuple[int, bool]:
    """A worker rank, until rank 0 ends it: the exit status, and whether a thread is left that may never end.

    An interrupt is ignored: rank 0 gets it too, and decides. Raises RankError when there is no rank 0.
    """
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    leader, link = join(store, world, timeout)
    artifact = _open_artifact(folder, world, link, checks)
    graphs = () if artifact is None else _graphs(artifact, world)
    worker = RankWorker(world.rank, leader, link, graphs, timeout)

    def open_all(go: Go) -> tuple[WatchedGroup, Backend]:
        assert artifact is not None
        own_address = link.socket.getsockname()[0]
        address = go.address if _is_loopback(own_address) else _plain_address(own_address)
        return _open(artifact, world, store, address, go.timeout, device, threads, checks)

    return worker.serve(open_all), worker.stuck


def _open_artifact(folder: Path, world: World, link: Link, checks: Checks) -> Artifact | None:
    """This rank's artifact; None where it cannot be opened. Rank 0 gets its digest, or the error."""
    try:
        artifact = open_checked(folder, checks, rank=world.rank)
        message = Opened(digest=artifact.manifest.digest)
    except (ValueError, OSError) as error:
        artifact, message = None, Opened(error=str(error)[:2000])
    link.send([encode(FrameKind.OPENED, message)])
    return artifact


def _graphs(artifact: Artifact, world: World) -> tuple[GraphSpec | None, ...]:
    """This rank's graphs in the order of rank 0's; None where its stage has no part in one."""
    manifest = artifact.manifest
    stage = min(world.rank // manifest.tp, manifest.pp - 1)  # rank 0 checks that the numbers fit
    own_graphs = {graph.name: graph for graph in manifest.of_stage(stage).graphs}
    return tuple(own_graphs.get(graph.name) for graph in manifest.graphs)


def _open(
    artifact: Artifact,
    world: World,
    store: KeyValueStore,
    address: str,
    timeout: float,
    device: str,
    threads: int | None,
    checks: Checks,
) -> tuple[WatchedGroup, Backend]:
    """This rank's group, and its backend."""
    rank_info = rank_info_of(world.rank, artifact.manifest.tp, artifact.manifest.pp)
    manifest = artifact.manifest.of_stage(rank_info.stage)
    group = _group_module().GlooGroup(store, rank_info, timeout, address)
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


def _compare_digests(monitor: RankMonitor, artifact: Artifact) -> None:
    """Raise RankError unless every rank has opened the artifact that rank 0 has."""
    problems = []
    digest = artifact.manifest.digest
    for rank, opened in monitor.collect(FrameKind.OPENED, JOIN_S).items():
        if opened.error:
            problems.append(f"{monitor.peers[rank]}: {opened.error}")
        elif opened.digest != digest:
            problems.append(
                f"{monitor.peers[rank]} has another artifact: digest {opened.digest[:12]} instead of {digest[:12]}; copy "
                f"{artifact.folder} of {monitor.leader.host} to {monitor.peers[rank].host}, or compile it again"
            )
    if problems:
        raise monitor.stop("; ".join(problems))


def _address(links: Iterable[Link]) -> str:
    """Rank 0's address on the network, as ranks of other machines have reached it; LOOPBACK where there are none."""
    addresses = [link.socket.getsockname()[0] for link in links]
    return next((_plain_address(address) for address in addresses if not _is_loopback(address)), LOOPBACK)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(_plain_address(address)).is_loopback


def _plain_address(address: str) -> str:
    """An address, with an IPv4 one that is written as IPv6 (::ffff:...) as IPv4."""
    return address.removeprefix("::ffff:")


def _no_check(_: Collection[int]) -> None:
    pass


def _group_module():
    """The module that imports torch, which only artifacts of several ranks need."""
    try:
        from . import group
    except ImportError as error:
        raise ArtifactError(f"artifacts of several ranks need torch ({error}); pip install 'staticvl[compile]'") from error
    return group
