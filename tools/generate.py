"""`staticvl generate`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from .. import runtime
from ..runtime.engine.request import Output
from ..runtime.processor.boxes import Box
from ..runtime.processor.tokenizer import Tokenizer
from ..runtime.sampling.sampler import TokenLogprob
from .draw import draw
from .ready import require
from .sampling_options import read_sampling


def run(args: argparse.Namespace) -> int:
    sampling = read_sampling(args)
    _check(args, sampling)
    settings = {"device": args.device, "threads": args.threads, "cache_gb": args.cache_gb, "request_log": args.request_log}
    checks = {"verify": args.verify, "verify_key": args.verify_key}
    with runtime.load(args.artifact, **settings, **checks) as model:
        out = model.generate(args.prompt, args.image, sampling=sampling, raw=args.raw)
        text = json.dumps(as_json(out), ensure_ascii=False) if args.json else answer_lines(out, model.processor.tokenizer)
    print(text)
    if args.draw is not None:
        draw(args.image, out.boxes, args.draw)
    return 0


def _check(args: argparse.Namespace, sampling: runtime.SamplingParams) -> None:
    """Raise for a command line that cannot work, before the model is loaded."""
    if sampling.constrained:
        require("llguidance")
    if args.draw is not None:
        if not args.image:
            raise ValueError("--draw was given without --image; give the image to draw on")
        if args.draw.is_dir() or not args.draw.parent.is_dir():
            raise ValueError(f"--draw {args.draw} cannot be written; expected a file in a folder that is there")


def as_json(out: Output) -> dict:
    """An output as plain data, without the logits."""
    return dataclasses.asdict(dataclasses.replace(out, logits=None), dict_factory=_without_logits)


def _without_logits(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in pairs if name != "logits"}


def answer_lines(out: Output, tokenizer: Tokenizer) -> str:
    """The answer, its boxes in pixels, its tokens where log-probabilities are among them, and timings; then other answers."""
    tokens = [logprob_line(each, tokenizer) for each in out.logprobs or ()]
    lines = "\n".join([out.text, *map(box_line, out.boxes), *tokens, timing_line(out)])
    return "\n\n".join([lines, *(answer_lines(other, tokenizer) for other in out.others)])


def logprob_line(token: TokenLogprob, tokenizer: Tokenizer) -> str:
    """A token with its log-probability, and the top-k tokens with theirs."""

    def line(token_id: int, logprob: float) -> str:
        return f"{token_id} {tokenizer.vocabulary.token(token_id)!r} {logprob:.4f}"

    top_k_ids = ", ".join(line(*each) for each in token.top)
    return f"token  {line(token.token_id, token.logprob)}" + (f"; top-k: {top_k_ids}" if top_k_ids else "")


def box_line(box: Box) -> str:
    label = f"{box.label}: " if box.label else ""
    return f"box  {label}pixels {box.pixels} of image {box.image + 1}"


def timing_line(out: Output) -> str:
    timings = out.timings
    return (
        f"[{out.prompt_tokens} prompt tokens, {out.image_tokens} of them from images; "
        f"first token after {timings.first_token_s * 1e3:.1f} ms, "
        f"then {timings.per_token_s * 1e3:.2f} ms each; {len(out.token_ids)} tokens in {timings.total_s * 1e3:.1f} ms]"
    )
