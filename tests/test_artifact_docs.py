"""docs/artifact.md against the code: the fields of every record, and the inputs and outputs of every graph."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

import msgspec
import pytest

from staticvl.compiler.graphs import GraphContext, define_graph, fed_inputs
from staticvl.compiler.pipeline import joined
from staticvl.model_defs.config import (
    ClipConfig,
    ModelConfig,
    ResampledConfig,
    RopeConfig,
    Stage,
    TextConfig,
    TiledConfig,
)
from staticvl.runtime.artifact import (
    CROSS_HIDDEN,
    KINDS,
    SCHEMA_VERSION,
    CacheSpec,
    CrossSpec,
    GraphKey,
    GraphSpec,
    ImageProcessorConfig,
    Kind,
    Manifest,
    Record,
    TensorSpec,
)
from staticvl.runtime.manifest.record import Dtype

from .artifact_docs import DOC, FIELD, TENSOR, Row, entries, field_rows, items, names, rows, sections
from .conftest import REPO

SECTIONS = sections(DOC.read_text(encoding="utf-8"))
DTYPE = msgspec.json.schema(Dtype)["pattern"]
RECORDS: dict[str, Any] = msgspec.json.schema(Manifest)["$defs"]


# ---- records


@pytest.mark.parametrize("name", RECORDS)
def test_every_field_of_a_record_is_described(name: str) -> None:
    table = entries(SECTIONS[name], FIELD)
    stated = [(*names(row["field"]), row["type"], row["default"]) for row in table]
    assert stated == list(field_rows(RECORDS[name], DTYPE))
    assert all(row["meaning"] for row in table)


def test_no_record_is_described_that_there_is_not() -> None:
    described = {title for title, lines in SECTIONS.items() if any(map(FIELD.fullmatch, items(lines)))}
    assert described == set(RECORDS)
    own = {record.__name__ for record in Record.__subclasses__() if record.__module__.startswith("staticvl.runtime.manifest.")}
    assert own == set(RECORDS)


def test_every_link_leads_to_a_section() -> None:
    text = DOC.read_text(encoding="utf-8")
    anchors = {title.lower().replace(" ", "-") for title in SECTIONS}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors
    assert all((DOC.parent / file).is_file() for file in re.findall(r"\]\(([^)#]+\.md)", text))


def test_it_describes_this_version() -> None:
    assert f"this page describes version {SCHEMA_VERSION}." in "\n".join(SECTIONS["Compatibility"])


def test_dtypes() -> None:
    stated = next(line for line in SECTIONS["Records"] if line.startswith("A dtype is one of"))
    assert names(stated.partition(".")[0]) == re.findall(r"[a-z]+\d+", DTYPE)


# ---- graphs


@dataclass(frozen=True, slots=True)
class Case:
    """One graph of a model whose sizes all differ; `config` is that of a stage."""

    config: ModelConfig
    cache: CacheSpec
    image: ImageProcessorConfig
    kind: Kind
    bucket: int
    images: int = 0
    ranks: int = 1
    candidates: int = 0

    @property
    def stage(self) -> Stage:
        return self.config.text.stage

    def graph(self) -> GraphSpec:
        """The graph as a manifest lists it."""
        key = GraphKey(self.kind, self.bucket, self.images)
        context = GraphContext(
            config=self.config, image=self.image, cache=self.cache, ranks=self.ranks, candidates=self.candidates
        )
        graph, fed = define_graph(context, key), fed_inputs(context, key)
        return joined(graph.spec(), self.stage, fed, self.config.text.vocab_size)


VOCABULARY, WIDTH, HEADS, KV_HEADS, HEAD_DIM = 97, 66, 6, 3, 22
CLIP = ClipConfig(
    hidden_size=18, layers=2, used_layers=1, heads=3, intermediate_size=24, image_size=28, patch_size=7, layer_norm_eps=1e-5,
    activation="gelu", keep_class_token=False,
)  # fmt: skip
TILED = TiledConfig(
    hidden_size=18, layers=2, global_layers=1, heads=3, intermediate_size=24, image_size=28, patch_size=14, norm_eps=1e-5,
    tiles=4, ratios=((1, 1), (1, 2), (2, 2)), taps=(0,),
)  # fmt: skip
RESAMPLED = ResampledConfig(
    hidden_size=18, layers=1, heads=3, intermediate_size=24, image_size=28, patch_size=7, output_size=WIDTH, queries=9,
    layer_norm_eps=1e-6, stored_positions=16, resampler_head_dim=11,
)  # fmt: skip
TOWERS = {"llava": CLIP, "llava_next": CLIP, "mllama": TILED, "qwen_vl": RESAMPLED}
MODES = {"llava": "pad", "llava_next": "anyres", "mllama": "tiles", "qwen_vl": "stretch"}


def config_of(family: str, *, int8_cache: bool = False, stage: Stage | None = None) -> ModelConfig:
    text = TextConfig(
        hidden_size=WIDTH,
        layers=6,
        heads=HEADS,
        kv_heads=HEADS if family == "qwen_vl" else KV_HEADS,
        head_dim=HEAD_DIM,
        intermediate_size=30,
        vocab_size=VOCABULARY,
        embed_rows=VOCABULARY,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=10000.0, logn_positions=64 if family == "qwen_vl" else None),
        max_positions=512,
        cross_layers=(1, 4) if family == "mllama" else (),
        int8_cache=int8_cache,
        stage=stage or Stage(),
    )
    return ModelConfig(
        family=family,
        layout="hf",
        text=text,
        vision=TOWERS[family],
        image_token_id=90,
        bos_token_id=1,
        eos_token_ids=(2,),
        image_mode=MODES[family],
    )


def cache_of(config: ModelConfig, ranks: int, dtype: str, pages: bool) -> CacheSpec:
    text, vision = config.text, config.vision
    cross = None
    if isinstance(vision, TiledConfig):
        cross = CrossSpec(layers=len(text.stage_cross), images=2, rows=vision.rows_per_image, tiles=vision.tiles)
    cache = CacheSpec(
        layers=text.self_layers,
        kv_heads=text.rank_kv_heads(ranks),
        head_dim=text.head_dim,
        slots=7,
        context=41,
        rows=46,
        dtype=dtype,
        cross=cross,
    )
    if pages:
        cache = msgspec.structs.replace(cache, pages=11, rows=800)
    return msgspec.structs.replace(cache, text_dtype="int8") if text.int8_cache else cache


def image_of(config: ModelConfig) -> ImageProcessorConfig:
    mean = std = (0.5, 0.5, 0.5)
    mode: Any = config.image_mode
    return ImageProcessorConfig(mode=mode, size=28, mean=mean, std=std, rows=config.vision.rows_per_tile)


def cases() -> Iterator[Case]:
    """Every kind of graph of every family; with and without ranks, stages, images, candidates and a cache in 8 bits."""
    whole = [Stage()]
    for family, int8_cache, ranks, count, pages in itertools.product(TOWERS, (False, True), (1, 3), (1, 3), (False, True)):
        for stage in whole if count == 1 else [Stage(i, count) for i in range(count)]:
            config = config_of(family, int8_cache=int8_cache, stage=stage)
            cache = cache_of(config, ranks, "bfloat16" if ranks > 1 else "float32", pages)
            image = image_of(config)
            if stage.first or cache.cross:
                yield Case(config, cache, image, "vision", 1 if cache.cross is None else TILED.tiles, ranks=ranks)
            for kind, bucket in (("prefill", 12), ("decode", 8), ("verify", 13)):
                for images in (0, 1, 2) if cache.cross else (0,):
                    case = Case(config, cache, image, kind, bucket, images, ranks)
                    yield case
                    if count == 1:
                        yield replace(case, candidates=10)


def label(case: Case) -> str:
    cache = f"{case.cache.dtype}{'-int8' if case.cache.text_dtype else ''}{'-pages' if case.cache.pages else ''}"
    options = f"stage{case.stage.index}of{case.stage.count}-images{case.images}-candidates{case.candidates}"
    return f"{case.config.family}-{case.kind}-{cache}-{options}"


CONDITIONS = {
    "always": lambda case: True,
    "prefill": lambda case: case.kind == "prefill",
    "vision": lambda case: case.kind == "vision",
    "text": lambda case: case.kind != "vision",
    "fused images": lambda case: case.cache.cross is None,
    "cross-attention": lambda case: case.cache.cross is not None,
    "images": lambda case: case.images > 0,
    "slots": lambda case: not case.cache.pages,
    "pages": lambda case: bool(case.cache.pages),
    "logn": lambda case: case.config.text.rope.logn_positions is not None,
    "candidates": lambda case: case.candidates > 0,
    "first or last stage": lambda case: case.stage.first or case.stage.last,
    "middle stage": lambda case: not (case.stage.first or case.stage.last),
    "before the last stage": lambda case: not case.stage.last,
    "after the first stage": lambda case: not case.stage.first,
    "first of several stages": lambda case: case.stage.first and not case.stage.last,
}


def graph_tables() -> list[list[Row]]:
    """The tables of the section Graphs: buckets, sizes, conditions."""
    text = "\n".join(SECTIONS["Graphs"])
    return [rows(block.splitlines()) for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)]


BUCKETS, SIZES, STATED_CONDITIONS = graph_tables()


def sizes_of(case: Case) -> dict[str, int]:
    """The value of every size, by the document's own tables."""
    bucket = next(row for row in BUCKETS if names(row["kind"]) == [case.kind])
    sizes = {"bucket": case.bucket, "images": case.images, "candidates": case.candidates}
    for head, cell in bucket.items():
        if (symbol := names(head)) and cell != "-":
            sizes[symbol[0]] = case.bucket if cell == "bucket" else int(cell)
    fields = {"cache": case.cache, "model": {"hidden_size": WIDTH, "vocab_size": VOCABULARY, "image": case.image}}
    for row in SIZES:
        (symbol,), path = names(row["size"]), names(row["field of the manifest"])[0]
        if symbol not in sizes and (value := look_up(fields, path)) not in (None, msgspec.UNSET):
            sizes[symbol] = value
    return sizes


def look_up(fields: Any, path: str) -> Any:
    """A field of nested records; None where a record on the way is null."""
    for part in path.split("."):
        fields = fields[part] if isinstance(fields, dict) else None if fields is None else getattr(fields, part)
    return fields


def stated(section: str, case: Case) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What a table says of a graph: name -> dtype and shape."""
    tensors = {}
    for row in entries(SECTIONS[section], TENSOR):
        conditions = row["condition"].split(", ")
        if all(CONDITIONS[condition](case) for condition in conditions):
            for name in names(row["name"]):
                for numbered in numbered_names(name, case):
                    tensors[numbered] = dtype_of(row["dtype"], case), shape_of(row["shape"], case)
    return tensors


def numbered_names(name: str, case: Case) -> Iterator[str]:
    """`k_cache.N` for every layer N, `cross_k.N.J` for every image J too."""
    cross = case.cache.cross.layers if case.cache.cross else 0
    layers = range(cross if name.startswith("cross_") else case.cache.layers)
    for layer in layers if ".N" in name else (0,):
        for image in range(case.images) if ".J" in name else (0,):
            yield name.replace(".N", f".{layer}").replace(".J", f".{image}")


def dtype_of(words: str, case: Case) -> str:
    return {"cache": case.cache.dtype, "text cache": case.cache.text_dtype or case.cache.dtype}.get(words, words)


def shape_of(words: str, case: Case) -> tuple[int, ...]:
    """Products of sizes and numbers in brackets."""
    sizes = sizes_of(case)
    shape = []
    for product in words.strip("[]").split(", "):
        size = 1
        for factor in product.split(" * "):
            size *= int(factor) if factor.isdecimal() else sizes[factor]
        shape.append(size)
    return tuple(shape)


def defined(specs: tuple[TensorSpec, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {spec.name: (spec.dtype, spec.shape) for spec in specs}


@pytest.mark.parametrize("case", list(cases()), ids=label)
def test_inputs_and_outputs_are_those_of_the_definitions(case: Case) -> None:
    graph = case.graph()
    which = "Vision" if case.kind == "vision" else "Text"
    assert stated(f"{which} inputs", case) == defined(graph.inputs)
    assert stated(f"{which} outputs", case) == defined(graph.outputs)
    assert stated("Pipeline stages", case) == defined(graph.buffers or ())


@pytest.mark.parametrize("section", ["Vision inputs", "Vision outputs", "Text inputs", "Text outputs", "Pipeline stages"])
def test_every_entry_of_a_list_is_of_some_graph(section: str) -> None:
    """So that an entry that no graph has is found too."""
    for row in entries(SECTIONS[section], TENSOR):
        conditions = row["condition"].split(", ")
        assert any(all(CONDITIONS[condition](case) for condition in conditions) for case in cases()), row
        assert row["meaning"]


def test_the_sizes_differ() -> None:
    """Otherwise a wrong letter in a shape could go unseen."""
    for case in cases():
        letters = {name: size for name, size in sizes_of(case).items() if len(name) == 1 and size > 1}
        letters.pop("T" if case.kind == "verify" else "", None)  # as many rows of logits as tokens
        letters.pop("B" if case.kind == "decode" else "", None)
        assert len(set(letters.values())) == len(letters), (label(case), letters)


def test_kinds_and_conditions_are_all_explained() -> None:
    assert [names(row["kind"])[0] for row in BUCKETS] == list(KINDS)
    assert [row["condition"] for row in STATED_CONDITIONS] == list(CONDITIONS)


def test_the_first_text_output_is_logits() -> None:
    graphs = [case.graph() for case in cases() if case.kind != "vision" and (case.stage.first or case.stage.last)]
    assert {graph.outputs[0].name for graph in graphs} == {"logits"}


def test_the_score_of_what_is_not_seen() -> None:
    (row,) = (row for row in entries(SECTIONS["Text inputs"], TENSOR) if names(row["name"]) == ["cross_mask"])
    assert f"{CROSS_HIDDEN:g}".replace("e+", "e") in row["meaning"]


# ---- files


def test_every_file_of_an_artifact_is_described(embedded_artifact: PurePath, two_ranks: PurePath) -> None:
    patterns = [pattern for item in items(SECTIONS["Files"]) for pattern in names(item.partition(": ")[0])]
    words = {"KIND": f"(?:{'|'.join(KINDS)})", "BUCKET": r"\d+", "KEY": "[0-9a-f]{12}", "R": r"\d+", "*": "[^/]+"}
    expressions = [
        "".join(words.get(part, re.escape(part)) for part in re.split(r"([A-Z]+|\*)", pattern)) for pattern in patterns
    ]
    for artifact in (REPO / embedded_artifact, REPO / two_ranks):
        files = [str(path.relative_to(artifact)) for path in artifact.rglob("*") if path.is_file()]
        visible = [file for file in files if not file.startswith(".")]
        assert len(visible) > 5
        unknown = [
            file
            for file in visible
            if not any(re.match(f"{each}{'' if each.endswith('/') else '$'}", file) for each in expressions)
        ]
        assert not unknown
