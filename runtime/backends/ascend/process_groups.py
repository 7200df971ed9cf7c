"""Stand-ins for the process groups of torchair, which needs no more than their names to convert and to load a graph.

A collective in a graph names its ranks: `tag=;rank_list=0,1,...`, wherever it was compiled. On a card the code in a torchair
cache asks torch.distributed for the group of these ranks and writes the name of its communicator into the graph, each time
that it is loaded; the empty tag finds any group of them, so the default group of a process will do. Elsewhere torchair's
converters and the generated code get the stand-ins below in place of `torch` and `torch_npu`, and no other code sees them:
no default group is made or needed, and threads of one process may be different ranks.
"""

from __future__ import annotations

import builtins
import re
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Modules of torchair that ask for groups while a graph is converted.
_CONVERTERS = ("hcom_utils", "ge_converter.c10d_functional.c10d_functional")


def group_of_all(ranks: int) -> str:
    """The name of the group of a traced collective among all of `ranks`."""
    return f"{ranks} ranks"


def name_of_all(ranks: int) -> str:
    """The name in a graph of the group of all of `ranks`, for an operator whose converter takes a name as it is."""
    return f"tag=;rank_list={','.join(map(str, range(ranks)))}"


def ranks_of(group: str) -> list[int] | None:
    """The ranks of a group by its name in a graph; None where it names none."""
    match = re.search(r"(?:^|;)rank_list=(\d+(?:,\d+)*)$", group)
    return [int(rank) for rank in match[1].split(",")] if match else None


@dataclass(frozen=True, slots=True)
class _NamedGroup:
    """The methods that torchair uses of a torch.distributed.ProcessGroup."""

    ranks: tuple[int, ...]

    def _get_backend(self, _device: Any) -> _NamedGroup:
        return self

    def get_hccl_comm_name(self, _rank: int, *, init_comm: bool) -> str:
        """The name of a simulated communicator: that of the group in the graph, so that it names the ranks."""
        return f"tag=;rank_list={','.join(map(str, self.ranks))}"


class _PatchedModule(types.ModuleType):
    """A module with some members replaced."""

    def __init__(self, module: types.ModuleType, **members: Any) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(members, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _torch_stand_in() -> types.ModuleType:
    import torch
    import torch.distributed.distributed_c10d as c10d

    def resolve(name: str) -> _NamedGroup:
        count, _, word = name.partition(" ")
        assert word == "ranks", name
        return _NamedGroup(tuple(range(int(count))))

    def find(_tag: str, ranks: Sequence[int], _size: int = 0) -> _NamedGroup:
        return _NamedGroup(tuple(ranks))

    groups = _PatchedModule(
        c10d,
        _resolve_process_group=resolve,
        _find_or_create_pg_by_ranks_and_tag=find,
        _find_pg_by_ranks_and_tag=find,
        _get_group_tag=lambda _group: "",
        _get_pg_default_device=lambda _group: torch.device("cpu"),
    )
    distributed = _PatchedModule(
        torch.distributed,
        distributed_c10d=groups,
        get_process_group_ranks=lambda group: list(group.ranks),
        get_rank=lambda: 0,
        is_initialized=lambda: False,
    )
    # A device that torch does not know without torch_npu.
    return _PatchedModule(
        torch, distributed=distributed, device=lambda *name: None if name == ("npu",) else torch.device(*name)
    )


def install(torchair: dict[str, types.ModuleType]) -> None:
    """Replace torch and torch_npu in the modules of torchair, which are given by name."""
    torch = _torch_stand_in()
    npu = types.ModuleType("torch_npu")
    npu.__dict__["distributed"] = types.SimpleNamespace(_is_support_hccl_comm_name=lambda: True)
    imported = {"torch": torch, "torch_npu": npu}

    def import_(name: str, scope: Any = None, names: Any = None, members: Sequence[str] = (), level: int = 0) -> Any:
        return imported[name] if name in imported and not members else builtins.__import__(name, scope, names, members, level)

    def run_generated(code: str) -> types.ModuleType:
        module = types.ModuleType("ge_mod")
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": import_}
        exec(compile(code, "<string>", "exec"), module.__dict__)
        return module

    for name in _CONVERTERS:
        torchair[f"torchair._ge_concrete_graph.{name}"].__dict__["torch"] = torch
    torchair["torchair.npu_fx_compiler"].__dict__["_compile_py_code"] = run_generated
