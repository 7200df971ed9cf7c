"""The table of compile options.

The command line, the keys of a --config file and their checks, the options in digests, and the record in the manifest are made
from it. It needs the standard library alone. No step of a build imports it, so another help text compiles nothing again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..model_defs.config import KV_CACHES, QUANTS
from .choices import BACKENDS, DTYPES, KV_FORMS, TEXT_BEFORE_IMAGE

# text: one of `choices`. count: a whole number. names: several, as a list or with commas between. folder, file: a path; those
# in a --config file are relative to it. flag: no value on the command line.
OptionType = Literal["text", "count", "flag", "names", "folder", "file"]

# How an option enters the digests that decide what is made again (fingerprint.py).
# files: the digests of the files that it names. config: the definition of the model. weights: its value, in the key of the
# weights, which is a part of every other. plan: the cache and the list of graphs. graphs: keys of graphs.
# calibration: the key of the weights where a calibration runs prompts. "": no file depends on it.
Enters = Literal["files", "config", "weights", "plan", "graphs", "calibration", ""]

# Whether the manifest records an option, for the command that compiles the same again (build_record.py).
# changed: where it is not the default. planned: as the plan has it, so that it is there where it was not given. "": never.
Recorded = Literal["changed", "planned", ""]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileOption:
    """One option of `staticvl compile`.

    `name` is its key in a --config file; the command line has dashes in it. `field` is the field of Options that it sets, and
    `default` its value where the option is not given; --help says `default_text` instead where the value alone says too little.
    `keyed_by` is the attribute of Options whose value stands in digests.
    """

    name: str
    type: OptionType
    help: str
    group: str
    enters: Enters
    recorded: Recorded
    default: Any = None
    default_text: str = ""
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    field: str = ""
    keyed_by: str = ""
    positional: bool = False
    or_list: bool = False  # in a --config file it may be a list too

    def __post_init__(self) -> None:
        object.__setattr__(self, "field", self.field or self.name)
        object.__setattr__(self, "keyed_by", self.keyed_by or self.field)

    @property
    def shown_default(self) -> str:
        """The default as --help says it."""
        return self.default_text or str(self.default)


GROUPS = ("checkpoint", "weights", "cache and buckets", "graphs", "ranks")

COMPILE_OPTIONS = (
    CompileOption(
        name="checkpoint",
        type="folder",
        positional=True,
        help="folder with config.json, weights and tokenizer",
        default_text="that of --config",
        group="checkpoint",
        enters="files",
        recorded="",
    ),
    CompileOption(
        name="out",
        type="folder",
        metavar="ARTIFACT",
        help="folder to write; an earlier artifact there is updated",
        default_text="that of --config",
        group="checkpoint",
        enters="",
        recorded="",
    ),
    CompileOption(
        name="vision_tower",
        type="folder",
        metavar="DIR",
        help="the CLIP folder, for checkpoints that store it apart",
        default_text="none",
        group="checkpoint",
        enters="files",
        recorded="changed",
    ),
    CompileOption(
        name="lora",
        type="folder",
        metavar="DIR",
        help="LoRA adapter, as PEFT saves it, to merge into the weights",
        default_text="none",
        group="checkpoint",
        enters="files",
        recorded="changed",
    ),
    CompileOption(
        name="ignore_config_keys",
        type="names",
        metavar="A,B",
        help="config.json keys to ignore, known not to matter",
        default=(),
        default_text="none",
        group="checkpoint",
        enters="",
        recorded="",
    ),
    CompileOption(
        name="text_before_image",
        type="text",
        choices=TEXT_BEFORE_IMAGE,
        help="Llama-3.2-Vision: whether text before the first image sees all images, as in transformers, or none, as in Meta's "
        "code",
        default=TEXT_BEFORE_IMAGE[0],
        group="checkpoint",
        enters="calibration",
        recorded="planned",
    ),
    CompileOption(
        name="quant",
        type="text",
        choices=QUANTS,
        help="what the decoder's layers are quantised to",
        default="",
        default_text="what the checkpoint has",
        group="weights",
        enters="weights",
        recorded="changed",
        keyed_by="stored_quant",
    ),
    CompileOption(
        name="dtype",
        type="text",
        choices=tuple(dict.fromkeys(name for names in DTYPES.values() for name in names)),
        help="what floats are stored in; ascend: cache and arithmetic too; onnx: matrices alone; auto: those of the checkpoint",
        default="",
        default_text="float16 for ascend; float32 for onnx, and beside quantised layers auto for the embedding table",
        group="weights",
        enters="weights",
        recorded="changed",
    ),
    CompileOption(
        name="calibrate",
        type="file",
        metavar="FILE",
        help="w4a16, w8a8, --kv-cache int8: quantise by the activations of these prompts with images, JSON lines as compare "
        "--data reads them",
        default_text="none",
        group="weights",
        enters="files",
        recorded="changed",
        field="calibration",
    ),
    CompileOption(
        name="context",
        type="count",
        metavar="N",
        help="tokens that a prompt and its answer may take together",
        default_text="2048, LLaVA-1.6: 4096; at most the model's positions",
        group="cache and buckets",
        enters="plan",
        recorded="planned",
        field="buckets",
    ),
    CompileOption(
        name="slots",
        type="count",
        metavar="N",
        help="sequences that the cache holds at once",
        default_text="the largest decode bucket, or 4",
        group="cache and buckets",
        enters="plan",
        recorded="planned",
        field="buckets",
    ),
    CompileOption(
        name="images",
        type="count",
        metavar="N",
        or_list=True,
        help="Llama-3.2-Vision: images that a sequence may hold",
        default_text="4",
        group="cache and buckets",
        enters="plan",
        recorded="planned",
        field="buckets",
    ),
    CompileOption(
        name="speculate",
        type="count",
        metavar="K",
        or_list=True,
        help="also compile graphs that verify up to K drafted tokens at once, for --speculate of generate",
        default_text="none",
        group="cache and buckets",
        enters="plan",
        recorded="planned",
        field="buckets",
    ),
    CompileOption(
        name="buckets",
        type="file",
        metavar="FILE",
        help="YAML with prefill, decode, vision, speculate, images, context, slots",
        default_text="derived from the model",
        group="cache and buckets",
        enters="plan",
        recorded="",
    ),
    CompileOption(
        name="kv_cache",
        type="text",
        choices=KV_CACHES,
        help="int8: keys and values in 8 bits, a quarter of the cache (ascend: half); needs --calibrate",
        default=KV_CACHES[0],
        group="cache and buckets",
        enters="config",
        recorded="changed",
    ),
    CompileOption(
        name="kv",
        type="text",
        choices=KV_FORMS,
        help="ascend: whether sequences take pages of 128 tokens of the cache as they grow, or a slot of the whole context"
        " each; Llama-3.2-Vision has slots",
        default="",
        default_text="slots",
        group="cache and buckets",
        enters="plan",
        recorded="planned",
    ),
    CompileOption(
        name="pages",
        type="count",
        metavar="N",
        help="ascend, --kv pages: pages of the cache; fewer take less memory than all slots with the whole context",
        default_text="those of all slots, and one for padding",
        group="cache and buckets",
        enters="plan",
        recorded="planned",
    ),
    CompileOption(
        name="backend",
        type="text",
        choices=BACKENDS,
        help="what runs the graphs: ONNX Runtime on a CPU, or an Ascend card",
        default=BACKENDS[0],
        group="graphs",
        enters="weights",
        recorded="changed",
    ),
    CompileOption(
        name="soc",
        type="text",
        choices=("Ascend910B", "Ascend310P"),
        help="ascend: family of chips",
        default="Ascend910B",
        group="graphs",
        enters="graphs",
        recorded="changed",
    ),
    CompileOption(
        name="fuse_all_reduce",
        type="flag",
        help="ascend: with --tp, sum products over ranks in the operator that makes them, but for single tokens",
        default=False,
        group="graphs",
        enters="graphs",
        recorded="changed",
    ),
    CompileOption(
        name="eager",
        type="names",
        metavar="KINDS",
        help="ascend: graph kinds to run op by op, e.g. prefill or vision,prefill",
        default=(),
        default_text="none",
        group="graphs",
        enters="graphs",
        recorded="changed",
    ),
    CompileOption(
        name="candidates",
        type="count",
        metavar="N",
        help="top-k tokens that text graphs output, so that logits need not be read whole; 0: none",
        default_text="64 for ascend, 0 for onnx",
        group="graphs",
        enters="plan",
        recorded="changed",
    ),
    CompileOption(
        name="tune",
        type="flag",
        help="onnx: choose the fastest lowering of each text graph on this machine, by measuring some seconds a graph",
        default=False,
        default_text="off",
        group="graphs",
        enters="graphs",
        recorded="changed",
    ),
    CompileOption(
        name="tp",
        type="count",
        metavar="N",
        help="ranks that every layer is sharded over (tensor parallelism)",
        default=1,
        group="ranks",
        enters="weights",
        recorded="changed",
    ),
    CompileOption(
        name="pp",
        type="count",
        metavar="M",
        help="pipeline stages that share the layers, of N ranks each",
        default=1,
        group="ranks",
        enters="weights",
        recorded="changed",
    ),
)


def entering(options: Any, enters: Enters) -> dict[str, Any]:
    """The values of an Options that stand in digests, by name."""
    return {each.name: getattr(options, each.keyed_by) for each in COMPILE_OPTIONS if each.enters == enters}
