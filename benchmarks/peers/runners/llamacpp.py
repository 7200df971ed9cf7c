"""llama.cpp, by its C interface in llama-cpp-python."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np

from ..gguf_file import write_gguf
from ..sizes import Size
from ..text_checkpoint import text_checkpoint
from .base import TextRunner, Tokens

VERSIONS = ("llama_cpp_python", "gguf")
QUANTISED = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}


def prepare(checkpoint: Path, home: Path, kind: str, size: Size) -> None:
    full, quantised = _file(home, "F16"), _file(home, kind)
    if not full.is_file():
        write_gguf(text_checkpoint(checkpoint), full)
    if quantised.is_file():
        return
    partial = quantised.with_name(f"{quantised.name}.{os.getpid()}.partial")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = QUANTISED[kind], 2
    if llama_cpp.llama_model_quantize(str(full).encode(), str(partial).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp could not quantise {full}")
    partial.rename(quantised)


def _file(home: Path, kind: str) -> Path:
    return home.with_name(f"{kind}.gguf")


class LlamaCppRunner(TextRunner):
    """See base.Runner. Prompts are sequences 0, 1, ... of one context."""

    def __init__(self, checkpoint: Path, home: Path, kind: str, size: Size, threads: int) -> None:
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(str(_file(home, kind)).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = size.context * size.batch, size.batch
        params.n_batch = params.n_ubatch = max(512, size.batch * size.short)
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = False
        self.context = llama_cpp.llama_init_from_model(model, params)
        if not self.context:
            raise RuntimeError("llama.cpp made no context")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
        self.limit = params.n_batch
        self.lengths: list[int] = []
        self.rows: list[int] = []  # of the batch, whose logits are those of each prompt

    def prefill(self, prompts: Sequence[Tokens]) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        self.lengths = [0] * len(prompts)
        each = self.limit // len(prompts)
        for first in range(0, len(prompts[0]), each):
            self._run([prompt[first : first + each] for prompt in prompts])

    def step(self) -> None:
        self._run([[int(self._row(i).argmax())] for i in range(len(self.lengths))])

    def last(self) -> np.ndarray:
        return self._row(0).copy()

    def _row(self, prompt: int) -> np.ndarray:
        pointer = llama_cpp.llama_get_logits_ith(self.context, self.rows[prompt])
        return np.ctypeslib.as_array(pointer, (self.vocab,))

    def _run(self, pieces: Sequence[Tokens]) -> None:
        batch, n = self.batch, 0
        self.rows = []
        for i, piece in enumerate(pieces):
            for k, token in enumerate(piece):
                batch.token[n], batch.pos[n] = token, self.lengths[i] + k
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, i
                batch.logits[n] = k == len(piece) - 1
                n += 1
            self.rows.append(n - 1)
            self.lengths[i] += len(piece)
        batch.n_tokens = n
        if llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")


OPEN = LlamaCppRunner
