"""The options of a build."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..model_defs.config import KV_CACHES, READY_MADE, ModelConfig
from ..runtime.artifact import KINDS, Kind
from ..runtime.backends.ascend.torchair_host import SOCS
from ..runtime.shown import quoted, shown
from ..weights.storage import FLOAT32, TABLE, Floats, uniform
from .buckets import Buckets
from .calibration import METHODS, Calibration
from .choices import (
    BACKENDS,
    DTYPES,
    EAGER_ONLY,
    FIA_DEFINITION,
    INT8_CACHE_LACKS,
    KV_FORMS,
    MOST_CANDIDATES,
    READY_QUANTS,
    TEXT_BEFORE_IMAGE,
    PlanError,
)

MOST_PAGES = 1 << 24  # slots of all pages are int32
FUSED_RANKS = (2, 4, 8)  # of one domain, that MatmulAllReduce takes (op-plugin, npu_mm_all_reduce_base)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of a build: the checkpoint, the output folder, and settings. option_table.py has their form for users."""

    checkpoint: Path
    out: Path
    backend: str = "onnx"
    quant: str = ""  # of the decoder's layers; "": that of the checkpoint, see ready_made.py
    tp: int = 1
    pp: int = 1
    buckets: Buckets = field(default_factory=Buckets)
    vision_tower: Path | None = None
    lora: Path | None = None
    ignore_config_keys: tuple[str, ...] = ()
    text_before_image: Literal["transformers", "meta"] = "transformers"  # see ModelInfo
    # The dtype of stored floats; "": the backend's default. On Ascend it is that of the cache and arithmetic too, which on ONNX
    # are always float32. "auto", ONNX: each matrix as the checkpoint has it.
    dtype: str = ""
    eager: tuple[Kind, ...] = ()  # Ascend: graph kinds that run op by op
    soc: str = SOCS[0]  # Ascend: family of chips
    fuse_all_reduce: bool = False  # Ascend: whether one operator makes products and sums them over the ranks
    candidates: int | None = None  # top-k tokens that text graphs output, 0: none; None: the backend's default
    calibration: Calibration | None = None  # the prompts that calibrate quantised weights and a cache in 8 bits
    kv_cache: str = KV_CACHES[0]
    kv: str = ""  # how the cache of text is stored, one of KV_FORMS; "": the default of backend and model, see plan.py
    pages: int | None = None  # of the cache; None: what all slots take together
    tune: bool = False  # ONNX: whether the fastest lowering of text graphs is measured, see kernels.py

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise PlanError(f"backend {quoted(self.backend)} is unknown; expected one of {', '.join(BACKENDS)}")
        if self.quant not in ("", *READY_QUANTS[self.backend], *READY_MADE):
            raise PlanError(
                f"quantisation {quoted(self.quant)} is not available for {self.backend}; available: "
                f"{', '.join(READY_QUANTS[self.backend])}"
            )
        if self.dtype not in ("", *DTYPES[self.backend]):
            raise PlanError(
                f"dtype {quoted(self.dtype)} is not available for {self.backend}; available: {', '.join(DTYPES[self.backend])}"
            )
        if self.soc not in SOCS:
            raise PlanError(f"soc {quoted(self.soc)} is unknown; expected one of {', '.join(SOCS)}")
        if unknown := set(self.eager) - set(KINDS):
            raise PlanError(f"eager names {shown(', '.join(sorted(unknown)))}; expected some of {', '.join(KINDS)}")
        if self.eager and self.backend != "ascend":
            raise PlanError(f"eager is given, but {self.backend} has only compiled graphs; leave --eager out")
        if self.candidates is not None and not _whole_number(self.candidates, MOST_CANDIDATES):
            raise PlanError(
                f"candidates is {quoted(self.candidates)}; expected a number of tokens from 1 to "
                f"{MOST_CANDIDATES}, or 0 for none"
            )
        if self.candidates and self.pp > 1:
            raise PlanError(
                f"candidates is {self.candidates} and pp is {self.pp}, but pipeline stages send whole logits; leave out "
                "one of the two"
            )
        self._check_calibration()
        self._check_pages()
        if self.fuse_all_reduce and (self.backend != "ascend" or self.soc != SOCS[0] or self.tp not in FUSED_RANKS):
            raise PlanError(
                f"fuse_all_reduce is given with backend {self.backend}, soc {self.soc} and {self.tp} ranks, but it is "
                f"for ascend, {SOCS[0]} and {', '.join(map(str, FUSED_RANKS))} ranks; leave --fuse-all-reduce out"
            )
        if self.backend == "ascend" and self.soc == EAGER_ONLY:
            self._check_eager_only()
        if self.tune and (self.backend != "onnx" or self.tp * self.pp > 1):
            what = f"backend {self.backend}" if self.backend != "onnx" else f"{self.tp * self.pp} ranks"
            raise PlanError(f"tune is given with {what}, but it measures ONNX graphs of one process; leave --tune out")
        if self.text_before_image not in TEXT_BEFORE_IMAGE:
            raise PlanError(
                f"text before image is {quoted(self.text_before_image)}; expected one of {', '.join(TEXT_BEFORE_IMAGE)}"
            )

    def _check_eager_only(self) -> None:
        """Raise PlanError for a family of chips that takes no compiled graph of ours, unless all run op by op."""
        kinds = [kind for kind in KINDS if kind != "verify" or self.buckets.verify]
        if missing := [kind for kind in kinds if kind not in self.eager]:
            raise PlanError(
                f"{self.soc} takes no compiled {', '.join(missing)} graphs: their attention, FusedInferAttentionScore, is "
                f"registered for the chips 910B and 910_93 alone (hicann/ops-transformer: {FIA_DEFINITION}); "
                f"run them op by op with --eager {','.join(kinds)}"
            )
        if self.dtype == "bfloat16":
            raise PlanError(f"{self.soc} computes in float16 alone, and dtype is bfloat16; leave --dtype out")

    def _check_pages(self) -> None:
        """Raise PlanError for a form of the cache that the backend has not, and for pages of a cache without them."""
        if self.kv not in ("", *KV_FORMS):
            raise PlanError(f"kv is {quoted(self.kv)}; expected one of {', '.join(KV_FORMS)}")
        if self.backend != "ascend" and (self.kv == "pages" or self.pages is not None):
            raise PlanError(f"pages of the cache are for ascend, and the backend is {self.backend}; leave out --kv and --pages")
        if self.pages is not None and self.kv == "slots":
            raise PlanError(f"pages is {quoted(self.pages)}, but --kv slots has none; leave out one of the two")
        if self.pages is not None and not (_whole_number(self.pages, MOST_PAGES) and self.pages):
            raise PlanError(f"pages is {quoted(self.pages)}; expected a number from 1 to {MOST_PAGES}")

    def _check_calibration(self) -> None:
        """Raise PlanError for a calibration that is missing, or that has nothing to calibrate."""
        if self.kv_cache not in KV_CACHES:
            raise PlanError(f"kv cache {quoted(self.kv_cache)} is unknown; expected one of {', '.join(KV_CACHES)}")
        if self.int8_cache and self.calibration is None:
            raise PlanError(
                "a cache in 8 bits needs to know how large keys and values become; give --calibrate FILE with prompts like "
                "those that the model is for"
            )
        if self.int8_cache and self.soc == INT8_CACHE_LACKS and self.backend == "ascend":
            raise PlanError(f"{self.soc} has no attention over a cache in 8 bits; leave out --kv-cache int8")
        if self.int8_cache and self.eager:
            raise PlanError("eager graphs have no cache in 8 bits; leave out --kv-cache int8 or --eager")
        if self.calibration and self.quant not in METHODS and not self.int8_cache:
            raise PlanError(
                f"quantisation {quoted(self.quant)} has nothing to calibrate; calibrated are {', '.join(METHODS)}, and with "
                "--kv-cache int8 the cache"
            )

    @property
    def stored_quant(self) -> str:
        """The quantisation of an artifact."""
        return self.quant or "none"

    @property
    def int8_cache(self) -> bool:
        return self.kv_cache == "int8"

    def defined(self, config: ModelConfig) -> ModelConfig:
        """The config of a checkpoint, with the changes that the options make."""
        return replace(config, text=replace(config.text, int8_cache=self.int8_cache))

    @property
    def cache_dtype(self) -> str:
        """dtype of cache and arithmetic."""
        return "float32" if self.backend == "onnx" else self.dtype or DTYPES[self.backend][0]

    def floats(self, kept: Mapping[str, str]) -> Floats:
        """The dtypes of stored floats; `kept` are the dtypes in which parameters lose nothing (weights/weight_map.py).

        ONNX graphs upcast matrices where they multiply, which costs time, and rows of a table at lookup, which costs none:
        so beside quantised layers the table is as the checkpoint has it. Narrow vectors would save nothing, and kernels take
        scales in one dtype only.
        """
        if self.backend == "ascend":
            # MatMul of bfloat16 takes a bias in float32; one in bfloat16 would be cast at every step.
            return replace(uniform(self.cache_dtype), biases="float32" if self.cache_dtype == "bfloat16" else "", tp=self.tp)
        if self.dtype == "auto":
            return replace(FLOAT32, own=kept)
        if not self.dtype and self.stored_quant != "none":
            return replace(FLOAT32, own={name: dtype for name, dtype in kept.items() if name == TABLE})
        return replace(FLOAT32, matrices=self.dtype or "float32")


def _whole_number(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most
