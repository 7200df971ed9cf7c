"""`staticvl compile`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ..compiler.build import Report, build, plan_only
from ..compiler.plan import DTYPES, Buckets, Options, Plan, PlanError, image_buckets, parse_buckets
from ..compiler.ready_made import resolve
from ..runtime.artifact import KINDS
from ..runtime.shown import quoted, shown
from .progress import TerminalProgress

# Keys of a --config file: the command line's options, with underscores.
CONFIG_KEYS = (
    "checkpoint",
    "out",
    "backend",
    "quant",
    "dtype",
    "eager",
    "soc",
    "tp",
    "pp",
    "context",
    "slots",
    "images",
    "speculate",
    "candidates",
    "text_before_image",
    "buckets",
    "vision_tower",
    "lora",
    "calibrate",
    "kv_cache",
    "tune",
    "ignore_config_keys",
)


def run(args: argparse.Namespace) -> int:
    options = read_options(args)
    if args.plan_only:
        notes: list[str] = []
        plan, sizes = plan_only(options, notes)
        _print_plan(plan, sizes, resolve(options)[0])
        _print_notes(notes)
        return 0
    started = time.perf_counter()
    report = build(options, TerminalProgress())
    _print_report(report, options.out, time.perf_counter() - started)
    return 0


def read_options(args: argparse.Namespace) -> Options:
    """Command line over config file over defaults."""
    given = {**_config_file(args.config), **{k: v for k, v in vars(args).items() if k in CONFIG_KEYS and v is not None}}
    if args.plan_only:
        given.setdefault("out", "ARTIFACT")  # nothing is written
    for name in ("checkpoint", "out"):
        if name not in given:
            raise PlanError(
                f"no {name} was given; usage: staticvl compile CHECKPOINT --out ARTIFACT (or both in --config FILE)"
            )
    checkpoint = Path(given["checkpoint"])
    if not checkpoint.is_dir():
        raise PlanError(
            f"checkpoint {shown(checkpoint)} is not a folder; expected a local checkpoint (models are never downloaded)"
        )
    keys = given.get("ignore_config_keys", ())
    options = Options(
        checkpoint=checkpoint,
        out=Path(given["out"]),
        buckets=_buckets(given),
        ignore_config_keys=tuple(keys.split(",") if isinstance(keys, str) else keys),
    )
    simple = {
        name: given[name]
        for name in ("backend", "quant", "dtype", "soc", "tp", "pp", "candidates", "text_before_image", "kv_cache", "tune")
        if name in given
    }
    if "eager" in given:
        kinds = given["eager"]
        simple["eager"] = tuple(kinds.split(",") if isinstance(kinds, str) else kinds)
    paths = {name: Path(given[name]) for name in ("vision_tower", "lora") if name in given}
    if not (tower := paths.get("vision_tower", checkpoint)).is_dir():
        raise PlanError(f"vision tower {shown(tower)} is not a folder; expected a local CLIP checkpoint")
    if not (adapter := paths.get("lora", checkpoint)).is_dir():
        raise PlanError(f"adapter {shown(adapter)} is not a folder; expected a LoRA adapter as PEFT saves it")
    if "calibrate" in given:
        from .calibration_file import read_calibration

        simple["calibration"] = read_calibration(Path(given["calibrate"]))
    return replace(options, **simple, **paths)


def _config_file(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    data = _yaml(path)
    if not isinstance(data, dict):
        raise PlanError(f"{path} holds {type(data).__name__}; expected a mapping of options")
    if unknown := sorted(str(key) for key in set(data) - set(CONFIG_KEYS)):
        raise PlanError(f"{path}: unknown keys {shown(', '.join(unknown))}; expected {', '.join(CONFIG_KEYS)}")
    # Paths in the file are relative to the file.
    paths = {
        k: str(path.parent / data[k])
        for k in ("checkpoint", "out", "vision_tower", "lora", "calibrate")
        if isinstance(data.get(k), str)
    }
    if isinstance(data.get("buckets"), str):
        paths["buckets"] = str(path.parent / data["buckets"])
    return {**data, **paths}


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlanError(f"{shown(path)} does not exist; expected a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} is not valid YAML: {shown(' '.join(str(error).split()))}") from error


def _buckets(given: dict[str, Any]) -> Buckets:
    source = given.get("buckets", {})
    if isinstance(source, str | Path):
        buckets = parse_buckets(_yaml(Path(source)), str(source))
    else:
        buckets = parse_buckets(source, "buckets")
    images = image_buckets(given["images"], "options") if "images" in given else None
    verify = _verify(given["speculate"]) if "speculate" in given else None
    return buckets.merged(Buckets(context=given.get("context"), slots=given.get("slots"), images=images, verify=verify))


def _verify(drafted: Any) -> tuple[int, ...]:
    """Drafts of so many tokens, and the token before them."""
    if not isinstance(drafted, int) or isinstance(drafted, bool) or drafted < 1:
        raise PlanError(f"speculate is {quoted(drafted)}; expected a number of tokens from 1 on")
    return (drafted + 1,)


def _print_plan(plan: Plan, sizes: dict[str, int], options: Options) -> None:
    for kind in KINDS:
        if buckets := plan.buckets(kind):
            print(f"{kind:>8}  {', '.join(map(str, buckets))}")
    cache = plan.cache
    held, bits = "", " (int8)" if cache.text_dtype else ""
    if cross := cache.cross:
        seen = sorted({graph.images for graph in plan.graphs if graph.kind != "vision"})
        print(f"  images  {', '.join(map(str, seen))}; prefill and decode graphs for each")
        held = f" and {cross.images} images of {cross.rows} keys"
    print(f"   cache  {cache.slots} slots of {cache.context} tokens{held}, {sizes['cache_bytes'] / 1e9:.3f} GB{bits}")
    weights = f"{sizes['weight_bytes'] / 1e9:.3f} GB ({_form(options)})"
    print(f" weights  {sizes['parameters'] / 1e9:.3f} billion parameters, {weights}")
    if options.tp * options.pp > 1:
        weights, kept = sizes["rank_weight_bytes"] / 1e9, sizes["rank_cache_bytes"] / 1e9
        print(f"  a rank  of {options.tp * options.pp}: weights {weights:.3f} GB, cache {kept:.3f} GB")
        half = sizes["rank_bfloat16_bytes"] / 1e9, sizes["rank_bfloat16_cache_bytes"] / 1e9
        print(f"          in bfloat16: weights {half[0]:.3f} GB, cache {half[1]:.3f} GB")


def _form(options: Options) -> str:
    floats = "the checkpoint's dtypes" if options.dtype == "auto" else options.dtype or DTYPES[options.backend][0]
    if options.stored_quant == "none":
        return floats
    table = "" if options.dtype or options.backend == "ascend" else ", but the table as the checkpoint has it"
    return f"{options.quant}, the rest in {floats}{table}"


def _print_report(report: Report, out: Path, seconds: float) -> None:
    weights = "converted" if report.converted else "unchanged"
    total = sum(spec.nbytes for spec in report.manifest.files.values())
    print(
        f"{out}: {len(report.traced)} graphs compiled, {len(report.reused)} unchanged, weights {weights}, "
        f"{total / 1e6:.1f} MB, {seconds:.1f} s"
    )
    _print_notes(report.manifest.build.notes or ())


def _print_notes(notes: Iterable[str]) -> None:
    """What a checkpoint says twice and differently, or says and is not used."""
    for note in notes:
        print(f"note: {note}")
