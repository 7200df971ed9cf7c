"""The dtypes that the operators of a card take: combinations, one letter for each input and output.

Made by tools/development/ascend_registry.py from the registry of the 910B's AI-Core operators in hicann/ge
(tests/engines/nn_engine/depends/CANN_910b_stub). No such registry of the 310P is public.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

REGISTRY = Path(__file__).parent / "registry_910b.json"
SOURCE = (
    "hicann/ge: tests/engines/nn_engine/depends/CANN_910b_stub/cann/opp/built-in/op_impl/ai_core/tbe/config/ascend910b/"
    "aic-ascend910b-ops-info-*.json"
)
DTYPES = {
    "f": "float32", "h": "float16", "b": "bfloat16", "d": "float64", "c": "int8", "C": "uint8", "s": "int16", "S": "uint16",
    "i": "int32", "I": "uint32", "l": "int64", "L": "uint64", "?": "bool", "q": "int4",
}  # fmt: skip
# Operators that the registry does not list, and what becomes of them on a card.
ELSEWHERE = {
    "Data": "an input",
    "RefData": "an input",
    "Const": "a value",
    "NetOutput": "the end of a graph",
    "ExpandDims": "a view, which the graph engine resolves",
    "StridedSliceV2": "StridedSliceD, by ConstToAttrStridedSliceV2Fusion",
    "FillD": "Fill",
    "ReduceMeanWithCast": "ReduceMean",
    "TopK": "TopKV2",
    "HcomAllReduce": "HCCL's",
    "HcomAllGather": "HCCL's",
}
# Operators that a pass replaces before kernels are chosen.
BECOMES = {"ConcatV2": "ConcatV2D"}


@dataclass(frozen=True, slots=True)
class Operator:
    """An operator's combinations of dtypes: those of the inputs and outputs of a name, at the same place in each text. None
    where the operator chooses its types by code."""

    inputs: Mapping[str, str]
    outputs: Mapping[str, str]

    @property
    def by_code(self) -> bool:
        return not self.inputs and not self.outputs

    def combinations(self, fed: Mapping[str, str | tuple[str, ...]], made: Mapping[str, str]) -> Iterator[int]:
        """The places of all combinations with these dtypes; an input may come with several, any of which will do."""
        expected = [(self.inputs[name], _letters(dtypes)) for name, dtypes in fed.items()]
        expected += [(self.outputs[name], _letters(dtype)) for name, dtype in made.items()]
        count = len(next(iter((*self.inputs.values(), *self.outputs.values()))))
        return (i for i in range(count) if all(column[i] in letters for column, letters in expected))

    def dtypes(self, name: str) -> tuple[str, ...]:
        """All dtypes that an input may have."""
        return tuple(DTYPES[letter] for letter in dict.fromkeys(self.inputs[name]))


def _letters(dtypes: str | tuple[str, ...]) -> str:
    names = (dtypes,) if isinstance(dtypes, str) else dtypes
    return "".join(letter for letter, name in DTYPES.items() if name in names)


@functools.cache
def operators() -> Mapping[str, Operator]:
    """The table of the 910B, by operator."""
    table = json.loads(REGISTRY.read_text(encoding="utf-8"))
    return {name: Operator(ports.get("inputs", {}), ports.get("outputs", {})) for name, ports in table.items()}
