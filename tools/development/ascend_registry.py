"""The dtypes that a card's operators take, from a registry dump, as a small table.

    python -m staticvl.tools.development.ascend_registry DUMP_FOLDER

DUMP_FOLDER holds the files aic-ascend910b-ops-info-*.json: the registry of the chip's AI-Core operators, as CANN installs it
(in opp/built-in/op_impl/ai_core/tbe/config/ascend910b), or as the public repository hicann/ge keeps it for its tests
(tests/engines/nn_engine/depends/CANN_910b_stub). The table has the operators that our graphs can hold, no others: all that
the simulator runs, and those that fusions may bring. It is written to
runtime/backends/ge_simulator/card_rules/registry_910b.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...runtime.backends.ge_simulator.card_rules.registry import DTYPES, REGISTRY
from ...runtime.files import write_atomically
from ..command_errors import Parser

# Operators that the simulator does not run (yet), and that graphs may get.
OTHERS = (
    "AddRmsNormDynamicQuant", "AddRmsNormQuant", "ApplyRotaryPosEmb", "AscendQuant", "AscendQuantV2", "ConcatV2D",
    "DequantSwigluQuant", "IncreFlashAttention", "KvRmsNormRopeCache", "MatMulV3", "MatmulAllReduce", "PromptFlashAttention",
    "QuantUpdateScatter", "Quantize", "TransQuantParamV2",
)  # fmt: skip
# The files of a dump, the newer ones last: an operator in several is that of the last.
PARTS = ("legacy", "cv", "math", "nn", "transformer")
SPELLINGS = {"float": "float32", "double": "float64"}
_LETTERS = {name: letter for letter, name in DTYPES.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(prog="staticvl.tools.development.ascend_registry", description="The table of dtypes of a chip's operators.")
    parser.add_argument("dump", type=Path, metavar="DUMP_FOLDER", help="the folder of aic-ascend910b-ops-info-*.json")
    parser.add_argument("--out", type=Path, default=REGISTRY, metavar="FILE", help="default: the table of the package")
    arguments = parser.parse_args(argv)
    try:
        table = {name: _shortened(operator) for name, operator in _operators(arguments.dump).items()}
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    write_atomically(arguments.out, written(table).encode())
    print(f"{arguments.out}: {len(table)} operators, {arguments.out.stat().st_size} bytes")
    return 0


def _operators(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Entries of the dump for operators of ours, sorted by name."""
    from ...runtime.backends.ge_simulator.ge_ops import OPS

    operators: dict[str, Mapping[str, Any]] = {}
    for part in PARTS:
        operators |= json.loads((folder / f"aic-ascend910b-ops-info-{part}.json").read_text(encoding="utf-8"))
    return {name: operators[name] for name in sorted({*OPS, *OTHERS} & set(operators))}


def _shortened(operator: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Inputs and outputs, each with a letter for each combination; nothing for an operator that chooses its types by code."""
    ports = {key: value for key, value in operator.items() if key.startswith(("input", "output"))}
    if any("dtype" not in port for port in ports.values()):
        return {}
    columns = zip(*(map(_letter, port["dtype"].split(",")) for port in ports.values()), strict=True)
    kept = [column for column in dict.fromkeys(columns) if None not in column]
    letters = {key: "".join(str(column[i]) for column in kept) for i, key in enumerate(ports)}
    return {
        kind: {ports[key]["name"]: text for key, text in letters.items() if key.startswith(kind.removesuffix("s"))}
        for kind in ("inputs", "outputs")
    }


def _letter(dtype: str) -> str | None:
    """None for a type that no graph of ours has: a combination with it is left out."""
    name = dtype.strip()
    return _LETTERS.get(SPELLINGS.get(name, name))


def written(table: Mapping[str, Any]) -> str:
    """JSON with a line for each operator."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(ports, separators=(',', ':'))}" for name, ports in table.items())
    return "{\n" + lines + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
