"""Collectives between processes over gloo. The only file of this package that imports torch, and only when ranks are used.

The process group is constructed directly, so that the caller's default group stays as it is.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed

from ...shown import quoted
from .control import KeyValueStore
from .failures import CollectiveError, RankError
from .store import POLL_S, StoreServer, send_request
from .world import LOCAL_ADDRESSES, LOOPBACK, STORE_FILE, RankInfo, World

TAG = 0  # arrays that two ranks send each other arrive in order
dist: Any = torch.distributed  # its type stubs leave out what is defined in C++


def file_store(file: str, ranks: int, seconds: float) -> KeyValueStore:
    """A store in a file, for processes of one user: no port, so that no other user can read, change or fill it. `seconds`:
    the time that `get` waits for a key."""
    store = dist.FileStore(file, ranks)
    store.set_timeout(timedelta(seconds=seconds))
    return store


class RankStore(dist.Store):
    """A client of rank 0's store (store.py) with the interface of torch. gloo sets, gets and waits, and nothing else.

    torch keeps no reference to the Python object: the user of the store must keep one.
    """

    def __init__(self, host: str, port: int, seconds: float, server: StoreServer | None = None) -> None:
        """`seconds`: the time that `get` waits for a key. `server`: of rank 0, which lives as long as this object. Raises
        RuntimeError where no store answers in that time."""
        super().__init__()
        self.host, self.port, self.seconds, self.server = host, port, seconds, server
        self.prefix = _prefix()
        self._until(lambda: send_request(host, port, b"G", "") is None, f"nothing answers at {host}, port {port}")

    def set(self, key: str, value: str | bytes) -> None:
        data = value.encode() if isinstance(value, str) else bytes(value)

        def is_set() -> bool:
            if send_request(self.host, self.port, b"S", f"{self.prefix}/{key}", data) is None:
                raise RuntimeError(f"the store refuses the key {quoted(key)}: it has another value, or the store is full")
            return True

        self._until(is_set, f"nothing answers at {self.host}, port {self.port}")

    def get(self, key: str) -> bytes:
        values: list[bytes] = []

        def has_value() -> bool:
            value = send_request(self.host, self.port, b"G", f"{self.prefix}/{key}")
            values.extend([] if value is None else [value])
            return bool(values)

        self._until(has_value, f"the store has no key {quoted(key)}")
        return values[0]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self.get(key)

    def close(self) -> None:
        """End rank 0's server; may be called again."""
        if self.server is not None:
            self.server.close()
            self.server = None

    def _until(self, done: Callable[[], bool], error_text: str) -> None:
        end, cause = time.monotonic() + self.seconds, ""
        while True:
            try:
                if done():
                    return
            except OSError as error:
                cause = f" ({error})"
            if time.monotonic() > end:
                raise RuntimeError(f"{error_text} after {self.seconds:g} s{cause}")
            time.sleep(POLL_S)


def open_store(world: World, seconds: float) -> KeyValueStore:
    """The store of processes that a launcher has started: torchrun's own, or that of rank 0 at MASTER_ADDR and MASTER_PORT.
    Where rank 0 has started the others itself, it is a file.

    Raises RankError when it cannot be opened.
    """
    if file := os.environ.get(STORE_FILE):
        return file_store(file, world.size, seconds)
    address = (
        f"{os.environ.get('MASTER_ADDR', 'MASTER_ADDR (not set)')}:{os.environ.get('MASTER_PORT', '(MASTER_PORT not set)')}"
    )
    try:
        store = _launched_store(world, seconds)
    except (dist.DistError, ValueError, RuntimeError, OSError) as error:
        if "EADDRINUSE" in str(error) or (isinstance(error, OSError) and error.errno == errno.EADDRINUSE):
            raise RankError(
                f"rank 0 cannot listen at {address}, which another program uses; give another MASTER_PORT to all ranks, or "
                "leave the choice to torchrun --standalone"
            ) from error
        cause = str(error).splitlines()[0]
        raise RankError(f"rank {world.rank} has no store at {address}: {cause}; start the ranks with torchrun") from error
    return store


def release(store: KeyValueStore) -> None:
    """End rank 0's own store: after all ranks have connected, or after a failed start."""
    if isinstance(store, RankStore):
        store.close()


def _launched_store(world: World, seconds: float) -> Any:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=seconds))))
        return dist.PrefixStore(_prefix(), store)
    port = os.environ.get("MASTER_PORT", "")
    if not port.isdecimal():
        raise ValueError(f"MASTER_PORT is {quoted(port)}; expected a port")
    host = LOOPBACK if world.address == "localhost" else world.address
    server = None
    if world.rank == 0:
        local = world.on_one_machine and world.address in LOCAL_ADDRESSES
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        server = StoreServer(socket.create_server((host if local else "", int(port)), family=family))
    return RankStore(host, int(port), seconds, server)


def _prefix() -> str:
    """The prefix of this run's keys: other programs use the same store, and torchrun's outlives an attempt."""
    return f"staticvl/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


class GlooGroup:
    """See backends.base.Group: the ranks of this stage, and those in this one's place of the other stages.

    The sum of each element is made on one rank and sent to all, so all get the same bits.

    `in_collective`: whether this rank is in a collective, or has left one with an error. A failure report looks for ranks that
    are not.
    """

    def __init__(self, store: KeyValueStore, rank_info: RankInfo, timeout: float, address: str) -> None:
        """store: that of all ranks; `self.store` has the keys of this stage alone.

        timeout: seconds that a rank waits for others. address: of the network interface that reaches the others; where
        GLOO_SOCKET_IFNAME names one, that is used, unless all ranks are on this machine.
        """
        self.rank, self.size, self.stage, self.stages = rank_info.rank, rank_info.size, rank_info.stage, rank_info.stages
        self._whole_store = store  # keeps it alive, see RankStore
        self.store = dist.PrefixStore(f"stage-{rank_info.stage}", store)
        self.in_collective = False
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=timeout)
        if address == LOOPBACK or "GLOO_SOCKET_IFNAME" not in os.environ:
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        place = dist.PrefixStore(f"place-{rank_info.rank}", store)
        try:
            self._group = dist.ProcessGroupGloo(dist.PrefixStore("gloo", self.store), rank_info.rank, rank_info.size, options)
            self._pipeline_group: Any = (
                dist.ProcessGroupGloo(place, rank_info.stage, rank_info.stages, options) if rank_info.stages > 1 else None
            )
        except RuntimeError as error:
            raise CollectiveError(f"no connection to the other ranks: {_error_text(error)}") from error
        self._gather_buffers: dict[tuple[tuple[int, int, int], str], np.ndarray] = {}

    def all_reduce(self, array: np.ndarray) -> None:
        self._wait(lambda: self._group.allreduce([torch.from_numpy(array)]))

    def all_gather(self, array: np.ndarray, out: np.ndarray) -> None:
        width = array.shape[-1]
        rows = array.size // width
        # One row: the parts one after another are the result. Else they arrive rank by rank and are put row by row.
        parts = out.reshape(self.size, 1, width) if rows == 1 else self._gather_buffer((self.size, rows, width), array.dtype)
        received = list(torch.from_numpy(parts))
        self._wait(lambda: self._group.allgather([received], [torch.from_numpy(array).view(rows, width)]))
        if rows > 1:
            out.reshape(rows, self.size, width)[...] = parts.transpose(1, 0, 2)

    def send(self, array: np.ndarray, stage: int) -> None:
        self._wait(lambda: self._pipeline_group.send([torch.from_numpy(array)], stage, TAG))

    def receive(self, array: np.ndarray, stage: int) -> None:
        self._wait(lambda: self._pipeline_group.recv([torch.from_numpy(array)], stage, TAG))

    def _gather_buffer(self, shape: tuple[int, int, int], dtype: np.dtype) -> np.ndarray:
        """An array to gather in, reused for each shape and dtype."""
        if (shape, dtype.name) not in self._gather_buffers:
            self._gather_buffers[shape, dtype.name] = np.empty(shape, dtype)
        return self._gather_buffers[shape, dtype.name]

    def _wait(self, begin: Callable[[], Any]) -> None:
        self.in_collective = True
        try:
            begin().wait()
        except RuntimeError as error:
            raise CollectiveError(_error_text(error)) from error
        self.in_collective = False


def _error_text(error: RuntimeError) -> str:
    """The first sentence of a gloo error, without the place in its source."""
    line = (str(error).splitlines() or ["no reason given"])[0]
    line = line.partition("] ")[2] if line.startswith("[") else line
    return line.partition(". ")[0]
