"""Processes that are killed at any moment: a compilation, a server, a rank."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from staticvl.compiler.build import build
from staticvl.compiler.plan import Buckets, Options
from staticvl.runtime.artifact import verify

from .case import REPO, Attempt, Kind
from .models import EMBEDDED, answer, known
from .server import Target, request, serving

TIMEOUT_S = 60.0
SMALL = Buckets(prefill=(64,), decode=(1,), vision=(1,), context=256, slots=1)
TWO = Buckets(prefill=(64,), decode=(1, 2), vision=(1,), context=256, slots=2)


@dataclass(frozen=True, slots=True)
class Ground:
    folder: Path
    whole_s: float  # that a compilation takes
    answer: str


@contextlib.contextmanager
def ground(folder: Path) -> Iterator[Ground]:
    model = known(folder, "onnx")
    started = time.monotonic()
    _compile(folder / "killed").wait()
    yield Ground(folder, time.monotonic() - started, model.answer)


def make(ground: Ground, rng: random.Random, index: int) -> Attempt:
    name = list(VICTIMS)[index % len(VICTIMS)]
    moment = rng.random()
    return Attempt(f"{name}, at {moment:.3f} of its time", lambda: VICTIMS[name](ground, moment))


def _compile(out: Path) -> subprocess.Popen[bytes]:
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.attack.kills import SMALL, Options, build, EMBEDDED\n"
        "build(Options(checkpoint=EMBEDDED, out=Path(sys.argv[1]), buckets=SMALL))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(out)], cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def _compilation(ground: Ground, moment: float) -> str:
    """Killed while it writes a new artifact; the next one in the same folder is sound."""
    out = ground.folder / "killed"
    shutil.rmtree(out, ignore_errors=True)
    return _killed_and_built(ground, out, moment)


def _recompilation(ground: Ground, moment: float) -> str:
    """Killed while it changes an artifact; what was there is still whole, until it is replaced."""
    out = ground.folder / "killed"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(ground.folder / "onnx", out)
    return _killed_and_built(ground, out, moment)


def _killed_and_built(ground: Ground, out: Path, moment: float) -> str:
    old = (out / "manifest.json").exists()
    process = _compile(out)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(moment * ground.whole_s)
    process.kill()
    process.wait()
    if old and answer(out, "onnx") != ground.answer:
        return "the artifact before is damaged"
    build(Options(checkpoint=EMBEDDED, out=out, buckets=SMALL))
    verify(out)
    if left := [path.name for path in out.rglob("*.partial")]:
        return f"leaves files: {left}"
    return "right answer" if answer(out, "onnx") == ground.answer else "wrong answer"


def _server(ground: Ground, moment: float) -> str:
    """Killed while it answers; another one at once answers as before."""
    with serving(ground.folder, "killed-server") as target:
        before = target.answer
        with _asking(target):
            time.sleep(moment * 0.3)
            target.process.kill()
        target.process.wait()
    with serving(ground.folder, "killed-server") as again:
        return "right answer" if again.answer == before and not again.log.complaint() else f"wrong answer: {again.answer!r}"


def _rank(ground: Ground, moment: float) -> str:
    """Killed while it takes part in an answer: the server ends with an error that names it, and no process is left."""
    with serving(_two_ranks(ground.folder), "killed-rank") as target:
        [rank] = [each for each in psutil.Process(target.process.pid).children() if "staticvl" in " ".join(each.cmdline())]
        family = psutil.Process(target.process.pid).children(recursive=True)
        with _asking(target):
            time.sleep(moment * 0.3)
            rank.kill()
            status = target.process.wait(TIMEOUT_S)
        _, left = psutil.wait_procs(family, timeout=5)
        said = target.log.path.read_text()
    if left:
        return f"leaves processes: {left}"
    if "Traceback" in said:
        return f"traceback on stderr: {said[-1500:]}"
    return "an error that names the rank" if status == 1 and "rank 1" in said else f"status {status}: {said[-300:]}"


def _two_ranks(folder: Path) -> Path:
    """A folder whose artifact is cut in two."""
    out = folder / "two" / "onnx"
    if not (out / "manifest.json").exists():
        build(Options(checkpoint=EMBEDDED, out=out, tp=2, buckets=TWO))
    return out.parent


@contextlib.contextmanager
def _asking(target: Target) -> Iterator[None]:
    """While a request runs whose connection may break."""
    body = json.dumps(request(max_tokens=150, ignore_eos=True)).encode()

    def ask() -> None:
        with contextlib.suppress(Exception):  # whatever becomes of it: its server is killed
            target.ask(body, TIMEOUT_S)

    thread = threading.Thread(target=ask)
    thread.start()
    yield
    thread.join()


VICTIMS: dict[str, Callable[[Ground, float], str]] = {
    "a compilation": _compilation,
    "a server": _server,
    "a rank": _rank,
    "a compilation over an artifact": _recompilation,
}

KIND = Kind(
    name="kills",
    what="SIGKILL of a compilation, a server and a rank at any moment",
    endings=("right answer", "an error that names the rank"),
    limit_s=120,
    count=12,
    ground=ground,
    make=make,
    inside=False,
)
