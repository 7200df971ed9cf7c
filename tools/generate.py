"""`staticvl generate`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from .. import runtime
from ..runtime.boxes import Box
from ..runtime.request import Output, SamplingParams
from .draw import draw


def run(args: argparse.Namespace) -> int:
    with runtime.load(args.artifact, device=args.device, threads=args.threads, request_log=args.request_log) as model:
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
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        min_new_tokens=args.min_new_tokens,
        bad_words=tuple(args.bad_word),
        json_schema=args.json_schema,
        regex=args.regex,
        choice=tuple(args.choice),
    )


def as_json(out: Output) -> dict:
    """Everything but the logits."""
    return dataclasses.asdict(dataclasses.replace(out, logits=None), dict_factory=_without_logits)


def _without_logits(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in pairs if name != "logits"}


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
