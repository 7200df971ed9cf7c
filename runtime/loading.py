"""Opening an artifact for use: `load`, in one process or as one of several ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .artifact import Artifact, ArtifactError, Manifest
from .backends.base import Backend
from .backends.distributed.start import launcher_store, lead, read_timeout, run_worker, spawn
from .backends.distributed.world import World, started_world
from .backends.open import check_device, open_backend
from .engine.block_budget import block_budget
from .engine.engine import Engine
from .engine.options import NGRAMS, EngineOptions
from .engine.request_log import RequestLog
from .model import Model
from .opening import Checks, open_checked


def load(
    artifact: str | Path,
    *,
    device: str = "cpu",
    tp: int | None = None,
    threads: int | None = None,
    timeout: float | None = None,
    prefill_budget: int | None = None,
    reuse: bool = True,
    image_cache_mb: int = 256,
    cache_gb: float | None = None,
    speculate: int = 0,
    ngrams: tuple[int, int] = NGRAMS,
    request_log: str | Path | None = None,
    system_in_user: bool = False,
    verify: bool = False,
    verify_key: str | Path | None = None,
) -> Model:
    """Open an artifact and return its Model.

    device: "cpu" for ONNX artifacts; for Ascend ones "npu", "npu:1" (the second card), or "sim", which runs their graphs with
    torch on a CPU ("sim:float32": without rounding to 16 bits). tp: the number of ranks that each layer is sharded over, which
    must be what the artifact was compiled for (default).
    threads: cores that ONNX Runtime computes with, in each rank; default every core that this process may use, split among
    the ranks of this machine, or one for a model of less than 16 MiB. timeout: seconds that ranks wait for each other; default
    STATICVL_TIMEOUT, or 300.
    prefill_budget: tokens of the largest chunk that may run while other requests are answered; default: any chunk.
    reuse: use cache rows of a common prefix, and image features (image_cache_mb megabytes), of earlier requests.
    cache_gb: gigabytes of keys and values that slots may hold at once, in each process, on a CPU; default: every slot full.
    speculate: draft up to so many tokens of every answer by prompt lookup, where the artifact has graphs that verify them
    (compile with --speculate); ngrams: the fewest and the most tokens of an n-gram that it matches.
    request_log: a file to which the sizes and times of every request are appended (request_log.py).
    system_in_user: where the checkpoint's template refuses a system message, as Llama-3.2-Vision's does beside images, put its
    text into the first user turn; default: an error.
    verify: check the digest of every file, weights too, before anything is used; without it those of weights are only checked
    on Ascend. verify_key: a file with a public key; an artifact that is not signed with its private key is refused before
    anything of it is used. It includes `verify`.

    The files stay until the model is closed: a build that replaces the artifact meanwhile leaves them where they are.

    An artifact of several ranks runs as so many processes. Called by itself, `load` starts the others on this machine; they
    end with the model. Called in processes that torchrun has started, one for each rank, it returns the model in rank 0; in
    all others it takes part until rank 0's model is closed or gone, and then raises SystemExit, with status 1 if a rank failed.
    A whole model can be loaded in every process of such a run with tp=1.

    Raises ArtifactError for a missing, damaged or unsuitable artifact, RankError when ranks do not come together.
    """
    options = EngineOptions(
        prefill_budget=prefill_budget,
        reuse=reuse,
        image_cache_mb=image_cache_mb,
        speculate=speculate,
        ngrams=ngrams,
        cache_gb=cache_gb,
    )
    checks = Checks(verify, Path(verify_key) if verify_key is not None else None)
    world = started_world() if tp != 1 else None
    if world is not None and world.rank > 0:
        raise SystemExit(_take_part(Path(artifact), world, device, threads, timeout, checks))
    opened = open_checked(Path(artifact), checks, rank=0)
    try:
        _check(opened, artifact, tp, world, device)
        block_budget(opened.manifest, cache_gb)  # refused before a rank is started
        log = RequestLog(Path(request_log)) if request_log is not None else None
        if opened.manifest.ranks == 1:
            backend = _open_alone(opened, device, threads, checks)
            return Model(opened, Engine(opened.manifest, backend, options), log, system_in_user=system_in_user)
        start: Any = {"device": device, "threads": threads, "timeout": read_timeout(timeout), "checks": checks}
        leader = lead(opened, world, launcher_store(world), **start) if world else spawn(opened, **start)
        try:
            return Model(opened, Engine(opened.manifest, leader, options), log, leader.monitor, system_in_user=system_in_user)
        except BaseException:
            leader.close()
            raise
    except BaseException:
        opened.close()
        raise


def _check(opened: Artifact, name: str | Path, tp: int | None, world: World | None, device: str) -> None:
    """Raise ArtifactError for what can be seen to be wrong before a graph is opened or a rank started."""
    manifest = opened.manifest
    if tp is not None and tp != manifest.tp:
        raise ArtifactError(
            f"{name} was compiled for tp={manifest.tp}, not tp={tp}; compile it again with --tp {tp} or load it with "
            f"tp={manifest.tp}"
        )
    if world is not None and world.size != manifest.ranks:
        raise ArtifactError(_wrong_number(name, manifest, world.size))
    check_device(manifest.backend, opened.folder, device)


def _open_alone(opened: Artifact, device: str, threads: int | None, checks: Checks) -> Backend:
    """The backend of a model of one rank."""
    manifest, verify = opened.manifest, checks.all_files
    return open_backend(
        manifest.backend, opened.folder, manifest.cache, device=device, threads=threads, manifest=manifest, verify=verify
    )


def _take_part(folder: Path, world: World, device: str, threads: int | None, timeout: float | None, checks: Checks) -> int:
    """Run as a rank that a launcher has started, to the end. Returns the exit status."""
    seconds = read_timeout(timeout)
    status, stuck = run_worker(
        folder, world, launcher_store(world), device=device, threads=threads, timeout=seconds, checks=checks
    )
    if stuck:  # in a collective that does not end, and that the interpreter would wait for
        os._exit(status)
    return status


def _wrong_number(artifact: str | Path, manifest: Manifest, processes: int) -> str:
    ranks = manifest.ranks
    layout = f"{ranks} rank{'s' * (ranks > 1)} (tp={manifest.tp}, pp={manifest.pp})"
    right = f"torchrun --nproc-per-node {ranks} -m staticvl.tools.cli generate {artifact} ..."
    if ranks == 1:
        right = "no launcher, or load it with tp=1 for a whole model in every process"
    return f"{artifact} was compiled for {layout}, but WORLD_SIZE says that {processes} were started; start it with {right}"
