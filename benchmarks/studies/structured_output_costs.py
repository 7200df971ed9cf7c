"""Cost of structured outputs: processor time to compile a constraint and for each token, and the wait of other requests.

    python -m benchmarks.studies.structured_output_costs [--vocabulary 32000] [--tokens 200] [--limit-s 20]

Tokens are drawn from those that the constraint allows, so answers are hostile too. Each constraint has its own process, which
ends after --limit-s seconds of processor time. The wait of other requests is the longest step beside an answer of that form, on
a device that takes no time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from staticvl.runtime.sampling.constraints import ConstraintFactory
from staticvl.runtime.sampling.params import SamplingParams

WORDS = [f"word{i}x{i * 7919 % 10007}" for i in range(1500)]
TEXT = "the quick brown fox jumps over the lazy dog "


def chain(count: int) -> dict[str, Any]:
    """Lists in lists, by references."""
    links = {str(i): {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(count)}
    return {"$defs": links | {str(count): {"type": "string"}}, "$ref": "#/$defs/0"}


def crossed(count: int) -> dict[str, Any]:
    return {
        "allOf": [
            {"anyOf": [{"type": "object", "properties": {f"{word}{k}": {"type": "string"}}} for word in WORDS[:count]]}
            for k in range(3)
        ]
    }


PATTERN = {"type": "string", "pattern": "(a|b)*c{1,50}"}
FORMS: dict[str, dict[str, Any]] = {
    "regex, 1,000 equal characters": {"regex": "a" * 1000},
    "regex, 10,000 equal characters": {"regex": "a" * 10_000},
    "regex, 10,000 characters of text": {"regex": (TEXT * 300)[:10_000]},
    "regex a{1000}{1000}": {"regex": "(a{1000}){1000}"},
    "regex (a|b)*a(a|b){20}": {"regex": "(a|b)*a(a|b){20}"},
    "regex .*a.{30}": {"regex": "(.|\n)*a(.|\n){30}"},
    "regex (a?){500}a{500}": {"regex": "(a?){500}a{500}"},
    "regex, 1,000 optional letters": {"regex": "".join(f"({c}?)" for c in "abcdefghij" * 100)},
    "regex of Unicode classes": {"regex": r"(\p{L}\p{Lu}?\p{N}){50,1000}"},
    "regex, 700 words": {"regex": "|".join(WORDS[:700])},
    "choice of 1,000 equal characters": {"choice": ["a" * 1000]},
    "choice, 1 to 250 equal characters": {"choice": ["a" * n for n in range(1, 251)]},
    "choice of 1,000 words": {"choice": WORDS[:1000]},
    "const of 30,000 characters": {"json_schema": {"const": "a" * 30_000}},
    "enum of 1,500 words": {"json_schema": {"enum": WORDS}},
    "property name of 10,000 characters": {"json_schema": {"type": "object", "required": ["a" * 10_000]}},
    "500 properties with patterns": {"json_schema": {"properties": dict.fromkeys(WORDS[:500], PATTERN), "type": "object"}},
    "200 patternProperties": {
        "json_schema": {"type": "object", "patternProperties": {f"^{word}.*$": {"type": "string"} for word in WORDS[:200]}}
    },
    "12 crossed patterns": {"json_schema": {"allOf": [{"type": "string", "pattern": f".*{w}.*"} for w in WORDS[:12]]}},
    "40 crossed patterns": {"json_schema": {"allOf": [{"type": "string", "pattern": f".*{w}.*"} for w in WORDS[:40]]}},
    "12 x 12 x 12 crossed objects": {"json_schema": {"type": "array", "items": crossed(12)}},
    "multipleOf 9,973": {"json_schema": {"type": "integer", "multipleOf": 9973}},
    "multipleOf 99,999,989": {"json_schema": {"type": "integer", "multipleOf": 99_999_989}},
    "minLength 1,000,000,000": {"json_schema": {"type": "string", "minLength": 10**9}},
    "minItems 1,000,000": {"json_schema": {"type": "array", "items": {"type": "integer"}, "minItems": 10**6}},
    "50 references in a chain": {"json_schema": chain(50)},
    "750 references in a chain": {"json_schema": chain(750)},
    "a tree by reference to itself": {"json_schema": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}},
    "any JSON": {"json_schema": {}},
}
WATCHED = ("regex, 1,000 equal characters", "regex, 10,000 equal characters", "const of 30,000 characters", "any JSON")


def vocabulary(size: int) -> Any:
    """Bytes, runs of one letter, and words that begin with a blank or not; see token_bytes.TokenBytes."""
    draw = random.Random(1)
    tokens = [
        b"",
        b"",
        *(bytes([i]) for i in range(256)),
        *(b"a" * n for n in (2, 4, 8, 16)),
        *(w.encode() for w in TEXT.split()),
    ]
    words = set(tokens)
    while len(tokens) < size:
        word = draw.choice(["", " "]) + "".join(draw.choices("etaoinshrdlucmfw", k=draw.randint(2, 9)))
        if word.encode() not in words:
            words.add(word.encode())
            tokens.append(word.encode())
    return SimpleNamespace(tokens=tokens, hidden=[0, 1])


def cost(name: str, args: argparse.Namespace) -> None:
    """Print the costs of one form of answer."""
    table, draw, clock = vocabulary(args.vocabulary), random.Random(0), time.process_time
    factory = ConstraintFactory(table, (1,))
    resource.setrlimit(resource.RLIMIT_CPU, (int(clock()) + args.limit_s, resource.RLIM_INFINITY))
    start = clock()
    try:
        constraint = factory.make(SamplingParams(**FORMS[name]))
    except ValueError as error:
        print(f"{name:36s} refused: {' '.join(str(error).split())[:150]}", flush=True)
        return
    print(f"{name:36s} compiled in {clock() - start:.2f} s", end="", flush=True)
    times: list[float] = []
    while len(times) < args.tokens and not constraint.done:
        row = np.zeros(len(table.tokens), np.float32)
        start = clock()
        constraint.forbid(row)
        allowed = np.flatnonzero(np.isfinite(row))
        if len(allowed):
            constraint.accept(int(draw.choice(allowed)))
        times.append(clock() - start)
        if not len(allowed):
            print(", ends early", end="")
            break
    print(f", {len(times)} tokens: {1e3 * sum(times) / len(times):.2f} ms each, at most {1e3 * max(times):.1f} ms", flush=True)


def wait(name: str, args: argparse.Namespace) -> None:
    """Print how long other requests wait beside an answer of a form: the longest step that includes it."""
    from tests.servers import far_model

    print(f"longest step beside {name}: ", end="", flush=True)
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + args.limit_s, resource.RLIM_INFINITY))
    with tempfile.TemporaryDirectory() as folder:
        model = far_model(Path(folder) / "artifact")
        prompt = model.processor.prompt("Hello!")
        free = SamplingParams(max_new_tokens=10_000, ignore_eos=True)
        sequences = [
            model.new_sequence(prompt, params) for params in (free, SamplingParams(max_new_tokens=2000, **FORMS[name]))
        ]
        for sequence in sequences:
            model.start(sequence)
        longest = 0.0
        while not sequences[1].finish_reason:
            start = time.perf_counter()
            model.advance()
            longest = max(longest, time.perf_counter() - start)
        print(f"{1e3 * longest:.1f} ms; {len(sequences[1].generated)} tokens, {sequences[1].finish_reason}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=32_000, help="entries of the vocabulary; default: 32000")
    parser.add_argument("--tokens", type=int, default=200, help="tokens drawn for each constraint; default: 200")
    parser.add_argument("--limit-s", type=int, default=20, help="seconds of processor time for each constraint; default: 20")
    args = parser.parse_args()
    for target, names in ((cost, tuple(FORMS)), (wait, WATCHED)):
        for name in names:
            process = multiprocessing.get_context("fork").Process(target=target, args=(name, args))
            process.start()
            process.join()
            if process.exitcode:
                print(f"{name:36s} ended the process: {process.exitcode}", flush=True)


if __name__ == "__main__":
    main()
