"""`staticvl generate`."""

from __future__ import annotations

import argparse
import dataclasses
import json

from .. import runtime
from ..runtime.boxes import Box
from ..runtime.request import Output, SamplingParams
from .draw import draw


def run(args: argparse.Namespace) -> int:
    with runtime.load(args.artifact, device=args.device, threads=args.threads) as model:
        out = model.generate(args.prompt, args.image, sampling=read_sampling(args), raw=args.raw)
    print(json.dumps(as_json(out), ensure_ascii=False) if args.json else answer_lines(out))
    if args.draw is not None:
        draw(args.image, out.boxes, args.draw)
    return 0


def read_sampling(args: argparse.Namespace) -> SamplingParams:
    """The sampling options of the command line."""
    return SamplingParams(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=tuple(args.stop),
        ignore_eos=args.ignore_eos,
    )


def as_json(out: Output) -> dict:
    """Everything but the logits."""
    fields = {field.name: getattr(out, field.name) for field in dataclasses.fields(out) if field.name != "logits"}
    return {**fields, "boxes": [dataclasses.asdict(box) for box in out.boxes], "timings": dataclasses.asdict(out.timings)}


def answer_lines(out: Output) -> str:
    """The answer, its boxes in pixels, and how long it took."""
    return "\n".join([out.text, *map(box_line, out.boxes), timing_line(out)])


def box_line(box: Box) -> str:
    label = f"{box.label}: " if box.label else ""
    return f"box  {label}pixels {box.pixels} of picture {box.image + 1}"


def timing_line(out: Output) -> str:
    t = out.timings
    return (
        f"[{out.prompt_tokens} prompt tokens, {out.image_tokens} of them from pictures; "
        f"first token after {t.first_token_s * 1e3:.1f} ms, "
        f"then {t.per_token_s * 1e3:.2f} ms each; {len(out.token_ids)} tokens in {t.total_s * 1e3:.1f} ms]"
    )
