"""Traces, emits and certifies one graph of a stage after another.

A model that is sharded over ranks has one set of graphs, which its ranks run together: they are checked in lockstep, all ranks'
compiled graphs against all ranks' definitions.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ..model_defs.config import ModelConfig, text_quant, tower_quant
from ..model_defs.decoder import over_stored_caches
from ..model_defs.layers import without_rounding
from ..runtime.artifact import FileSpec, GraphKey, GraphSpec, ModelInfo, WeightSpec, rank_weights
from ..runtime.backends.base import Backend, Group
from ..runtime.backends.cores import usable_cores
from ..runtime.backends.open import open_backend
from ..runtime.files import write_atomically
from ..weights.weight_map import targets
from .check import Certifier
from .cost import graph_cost
from .digests import digest
from .eager import EagerBackend
from .graphs import GraphContext, GraphDef, define_graph, fed_inputs
from .lockstep import ArrayGroup, LockstepBackend, with_all_heads
from .options import Options
from .pipeline import joined
from .plan import EAGER_SUFFIX, SUFFIXES, Plan

if TYPE_CHECKING:
    from .kernels import KernelTuner

SMALL = 50_000_000  # parameters


class GraphMaker:
    """Makes the graphs of one stage of a build, that of `config`, `plan` and `weights`."""

    def __init__(
        self, options: Options, config: ModelConfig, info: ModelInfo, plan: Plan, weights: dict[str, WeightSpec]
    ) -> None:
        self.options, self.config, self.info, self.plan = options, config, info, plan
        self.out, self.tp, self.stage = options.out, options.tp, config.text.stage
        self.context = GraphContext(
            config=config,
            image=info.image,
            cache=plan.cache,
            quant=options.stored_quant,
            ranks=options.tp,
            candidates=plan.candidates,
        )
        first, ranks = self.stage.index * self.tp, self.stage.count * self.tp
        self.weights = [rank_weights(weights, ranks, first + rank) for rank in range(self.tp)]
        self.files: dict[str, FileSpec] = {}
        self.tuner = self._tuner() if options.tune else None
        self.small = sum(map(math.prod, targets(config).values())) < SMALL
        reference, candidate = self._of_all_ranks(self._reference), self._of_all_ranks(self._candidate)
        exact = self._of_all_ranks(self._exact) if options.backend == "ascend" else None
        self.certifier = Certifier(reference, candidate, info, vocab=config.text.all_embed_rows, exact=exact)

    def make(self, key: GraphKey, made_of: str) -> tuple[GraphSpec, dict[str, FileSpec]]:
        """A certified graph, and the files that it was written into; raises CertificateError, UnsupportedOpError and CardError.

        `made_of`: digest of everything that the graph is made from (fingerprint.py).
        """
        definition = define_graph(self.context, key)
        if self.tuner and key.kind != "vision":
            definition = replace(definition, kernels=self.tuner.choose(key))
        spec, files = self._emit(definition, made_of)
        for name, data in files.items():
            (self.out / name).parent.mkdir(exist_ok=True)
            write_atomically(self.out / name, data)
            self.files[name] = FileSpec(nbytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        previous = max((bucket for bucket in self.plan.buckets(key.kind) if bucket < key.bucket), default=0)
        with self._exact_graph(definition, spec) as exact_graph:
            certificate, cost = self.certifier.certify(
                with_all_heads(spec, self.tp), previous, exact_graph and with_all_heads(exact_graph, self.tp)
            )
        spec = msgspec.structs.replace(spec, certificate=certificate, cost_ms=cost)
        inputs = fed_inputs(self.context, key)
        return joined(spec, self.stage, inputs, self.config.text.vocab_size), {name: self.files[name] for name in files}

    def _tuner(self) -> KernelTuner:
        from .kernels import KernelTuner

        return KernelTuner(context=self.context, info=self.info, weights=self.weights[0], out=self.out)

    @property
    def _whole(self) -> bool:
        """Whether one process runs the model."""
        return self.tp * self.stage.count == 1

    # ---- what graphs are checked on

    def _of_all_ranks(self, open_rank: Callable[[Group | None, int], Backend]) -> Backend:
        """One backend, of all ranks where there are several."""
        if self._whole:
            return open_rank(None, 0)
        stage = self.stage
        return LockstepBackend(
            self.tp,
            lambda group: open_rank(group, group.rank),
            lambda lockstep, rank: ArrayGroup(lockstep, rank, stage.index, stage.count),
            paged=bool(self.plan.cache.pages),
        )

    def _reference(self, group: Group | None, rank: int) -> Backend:
        # Below SMALL, handing work to threads takes longer than the work.
        threads = 1 if self.small else self._cores(group)
        # Weights in 8 bits are expanded in pieces too small to be worth handing over.
        text_threads = None if self.options.stored_quant == "none" else 1
        cache, weights = self.plan.cache, self.weights[rank]
        return EagerBackend(self.out, weights, cache, self._unrounded, threads=threads, text_threads=text_threads)

    def _unrounded(self, key: GraphKey) -> GraphDef:
        """The definition, activations left as they are: what compiled graphs add by rounding them is stated apart. Roundings
        in caches are those of the compiled graph (check.py)."""
        definition = define_graph(self.context, key)
        without_rounding(definition.module)
        over_stored_caches(definition.module)
        return definition

    @staticmethod
    def _cores(group: Group | None) -> int | None:
        """A rank's share of the cores; None: all of them."""
        return None if group is None else max(1, usable_cores() // group.size)

    def _candidate(self, group: Group | None, rank: int) -> Backend:
        """What graphs run on in use."""
        if self.options.backend == "onnx":
            return open_backend("onnx", self.out, self.plan.cache, threads=self._cores(group), group=group)
        return self._simulator(group, rank, wide=False)

    def _exact(self, group: Group | None, rank: int) -> Backend:
        """What runs the same graphs without rounding."""
        return self._simulator(group, rank, wide=True)

    def _simulator(self, group: Group | None, rank: int, *, wide: bool) -> Backend:
        from ..runtime.backends.ascend.backend import AscendBackend, simulated

        cache, weights, device = self.plan.cache, self.weights[rank], simulated(wide=wide)
        return AscendBackend(self.out, cache, weights, self.files, device, group=group)

    # ---- what graphs are written as

    def _emit(self, definition: GraphDef, made_of: str) -> tuple[GraphSpec, dict[str, bytes]]:
        """A graph and its files' contents, not certified yet."""
        backend, dtype = self.options.backend, self.plan.cache.dtype
        cost, eager = graph_cost(definition, dtype, self.weights[0]), definition.kind in self.options.eager
        stem = f"{definition.name}-{self._stem(definition, made_of)[:12]}"
        spec = msgspec.structs.replace(
            definition.spec(f"{stem}{EAGER_SUFFIX if eager else SUFFIXES[backend]}", made_of),
            eager=eager,
            flops=cost.flops,
            nbytes=cost.nbytes,
            collectives=cost.collectives,
            collective_bytes=cost.collective_bytes,
        )
        if backend == "onnx":
            return self._emit_onnx(definition, spec if self._whole else msgspec.structs.replace(spec, file=stem))
        return self._emit_ascend(definition, spec)

    def _emit_ascend(self, definition: GraphDef, spec: GraphSpec) -> tuple[GraphSpec, dict[str, bytes]]:
        from ..runtime.backends.ge_simulator import ge_graph
        from . import card_check, emit_ascend, emit_eager
        from .ge_cost import lowered_cost

        if spec.eager:
            emitted = emit_eager.emit(definition, self.plan.cache.dtype)
        else:
            emitted = emit_ascend.emit(definition, self.plan.cache.dtype, fused_all_reduce=self.options.fuse_all_reduce)
            graph = ge_graph.parse(emitted.graph)
            warnings = card_check.check_card(definition.name, graph, self.options.soc)
            spec = msgspec.structs.replace(spec, lowered=lowered_cost(graph), card_warnings=warnings or msgspec.UNSET)
        constants = {name: tuple(definition.constants[name].tolist()) for name in emitted.constants}
        spec = msgspec.structs.replace(spec, weights=emitted.weights, constants=constants)
        return spec, {spec.file: emitted.data}

    @staticmethod
    def _stem(definition: GraphDef, made_of: str) -> str:
        """What a graph's file is named by. Another measurement may choose other kernels: then it is another file."""
        if not (chosen := definition.kernels):
            return made_of
        return digest(made_of, msgspec.structs.replace(chosen, measured={}, busy=0.0))

    def _emit_onnx(self, definition: GraphDef, spec: GraphSpec, *, exact: bool = False) -> tuple[GraphSpec, dict[str, bytes]]:
        from .emit_onnx import emit, emit_steps

        if self._whole:
            return spec, {spec.file: emit(definition, self.weights[0], exact=exact)}
        emitted = emit_steps(definition, self.weights[0], spec.file, exact=exact)
        return msgspec.structs.replace(spec, steps=emitted.steps, buffers=emitted.buffers), emitted.files

    @contextlib.contextmanager
    def _exact_graph(self, definition: GraphDef, spec: GraphSpec) -> Iterator[GraphSpec | None]:
        """The exact reference graph of an ONNX graph with quantised weights, for as long as it is checked."""
        quant = (tower_quant if spec.kind == "vision" else text_quant)(self.options.stored_quant)
        if self.options.backend != "onnx" or quant == "none":
            yield None
            return
        name = f"{spec.name}.twin.partial"
        exact_graph, files = self._emit_onnx(definition, msgspec.structs.replace(spec, file=name), exact=True)
        try:
            for file, data in files.items():
                (self.out / file).parent.mkdir(exist_ok=True)
                (self.out / file).write_bytes(data)
            yield exact_graph
        finally:
            _remove(self.out / name)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
