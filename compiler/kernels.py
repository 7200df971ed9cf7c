"""`--tune`: the fastest lowering of each text graph on this machine, by a short measurement.

The measured graph is that of a model of few layers over the artifact's own weights, since all layers of a kind are alike: so a
model of 90B takes seconds too. Choices are measured one after another (`_questions`), each with the earlier ones made. The
variants of a choice run in turns: a chunk after a third of the tokens of a full cache (the mean over prompts of all lengths),
any other graph after half of them. The best run of each counts, since other work of the machine only ever adds time. A variant
has to beat the default by MARGIN. Results do not depend on the choice, and certificates are measured with it.

Where other processes take more than BUSY of the cores, nothing is chosen and the manifest says so: beside a process that
occupies a core, one core is the fastest, and the artifact would stay half as fast. A repeated build measures again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from ..runtime.artifact import CacheSpec, GraphKey, GraphSpec, Kernels, ModelInfo, WeightSpec
from ..runtime.backends.cores import usable_cores
from ..runtime.backends.open import open_backend
from .cases import Case, CaseMaker
from .emit_onnx import emit
from .graphs import GraphContext, GraphDef, define_graph
from .onnx_graph.emitter import NARROW
from .other_work import OtherWork

LAYERS = 4  # enough that the head, which is there once, does not dominate
MARGIN = 0.02
TURNS, SECONDS = 3, 2.0  # of each choice: at least so many turns of each variant, and more for so long
BUSY = 0.1
ATTENTION_TOKENS = (64, 128)
WIDENED_KIB = (1024, 2048, 8192)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTuner:
    """Measures graphs of one model. `out`: the folder of the weights, also for temporary files."""

    context: GraphContext
    info: ModelInfo
    weights: dict[str, WeightSpec]
    out: Path

    def choose(self, key: GraphKey) -> Kernels:
        """The fastest lowering of a text graph, with the measured times."""
        context = self._shallow(key)
        graph = define_graph(context, key)
        best = Kernels()
        measured: dict[str, float] = {}
        others = OtherWork()
        for answers in self._questions(graph):
            ways = [best, *(msgspec.structs.replace(best, **answer) for answer in answers)]
            times = self._times(graph, context.cache, ways)
            measured = {way.described: round(ms, 4) for way, ms in zip(ways, times, strict=True)} | measured
            fastest = int(np.argmin(times))
            best = ways[fastest] if times[fastest] < (1 - MARGIN) * times[0] else best
        if measured and (busy := others.part()) > BUSY:
            best = Kernels(busy=round(busy, 3))
        return msgspec.structs.replace(best, measured=measured)

    def _questions(self, graph: GraphDef) -> Iterator[list[dict[str, int]]]:
        """The choices, each with its variants besides the default."""
        tokens = graph.bucket if graph.kind in ("prefill", "verify") else 1
        if pieces := [each for each in ATTENTION_TOKENS if each < tokens]:
            yield [{"attention_tokens": each} for each in pieces]
        if any(spec.dtype in NARROW and len(spec.shape) == 2 for name, spec in self.weights.items() if ".layers." in name):
            yield [{"widened_kib": each} for each in WIDENED_KIB]
        if fewer := _fewer_cores(usable_cores()):
            yield [{"cores": each} for each in fewer]

    def _shallow(self, key: GraphKey) -> GraphContext:
        """A model with a few of the layers, with one that attends to images where the graph has such."""
        config, cache = self.context.config, self.context.cache
        text = config.text
        crossed = text.cross_layers[0] + 1 if key.images else 0
        layers = min(text.layers, max(LAYERS, crossed))
        cross_layers = tuple(layer for layer in text.cross_layers if layer < layers)
        config = replace(config, text=replace(text, layers=layers, cross_layers=cross_layers))
        cross = cache.cross and msgspec.structs.replace(cache.cross, layers=len(cross_layers), images=max(key.images, 1))
        slots = key.bucket if key.kind == "decode" else 1
        cache = msgspec.structs.replace(cache, layers=config.text.self_layers, slots=slots, cross=cross)
        return replace(self.context, config=config, cache=cache)

    def _times(self, graph: GraphDef, cache: CacheSpec, ways: Sequence[Kernels]) -> list[float]:
        """Milliseconds of one run of each variant."""
        maker = CaseMaker(self.info, self.context.config.text.all_embed_rows)
        with contextlib.ExitStack() as stack:
            runs = [stack.enter_context(self._opened(replace(graph, kernels=way), cache, maker)) for way in ways]
            best = [float("inf")] * len(ways)
            started, turns = time.perf_counter(), 0
            while turns < TURNS + 1 or time.perf_counter() - started < SECONDS:
                for i, run in enumerate(runs):
                    seconds = _timed(run)
                    best[i] = min(best[i], seconds) if turns else best[i]  # the first turn binds and allocates
                turns += 1
        return [1e3 * seconds for seconds in best]

    @contextlib.contextmanager
    def _opened(self, graph: GraphDef, cache: CacheSpec, maker: CaseMaker) -> Iterator[partial[object]]:
        """A graph that is ready to run, as a function without arguments."""
        path = self.out / f"{graph.name}.{id(graph)}.tune.partial"
        path.write_bytes(emit(graph, self.weights))
        try:
            spec = graph.spec(path.name)
            backend = open_backend("onnx", self.out, cache)
            maker.restart()
            case = _partly_full(spec)
            feed = maker.feed(spec, case)
            maker.fill(spec, case, feed, [backend])
            yield partial(backend.run, spec, feed)
        finally:
            path.unlink()


def _partly_full(graph: GraphSpec) -> Case:
    """Every row or the whole bucket, after as many tokens as a third or half of the cache holds."""
    rows = next(spec.shape[2] for spec in graph.inputs if "_cache." in spec.name)
    batch, new = (graph.bucket, 1) if graph.kind == "decode" else (1, graph.bucket)
    past = np.full(batch, (rows - new) // (3 if graph.kind == "prefill" else 2), np.int32)
    return Case("partly full", past, np.full(batch, new, np.int32))


def _fewer_cores(cores: int) -> list[int]:
    """A half, a quarter and so on down to one of `cores`."""
    return [cores >> i for i in range(1, cores.bit_length())]


def _timed(run: partial[object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
