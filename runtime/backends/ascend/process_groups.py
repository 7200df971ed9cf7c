"""torchair's process groups without a device, torch_npu or another process: names are enough to convert and to load a graph.

A graph says of a collective which ranks meet: `tag=;rank_list=0,1,...`, whoever compiled it. On a card the code in a torchair
cache asks torch.distributed for the group of these ranks and writes the name of its communicator into the graph, each time
that it is loaded; the empty tag finds any group of them, so the default group of a process will do. Elsewhere torchair's
converters and the generated code are given the stand-ins below in place of `torch` and `torch_npu`, and nobody else sees them:
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
    """What a traced collective among all of `ranks` calls its group."""
    return f"{ranks} ranks"


def ranks_of(group: str) -> list[int] | None:
    """The ranks of a group by its name in a graph; None where it names none."""
    found = re.search(r"(?:^|;)rank_list=(\d+(?:,\d+)*)$", group)
    return [int(rank) for rank in found[1].split(",")] if found else None


@dataclass(frozen=True, slots=True)
class _Group:
    """What torchair asks of a torch.distributed.ProcessGroup."""

    ranks: tuple[int, ...]

    def _get_backend(self, _device: Any) -> _Group:
        return self

    def get_hccl_comm_name(self, _rank: int, *, init_comm: bool) -> str:
        """A simulated communicator is called what the group is called in the graph, so that its ranks are known."""
        return f"tag=;rank_list={','.join(map(str, self.ranks))}"


class _Instead(types.ModuleType):
    """A module with some members replaced."""

    def __init__(self, module: types.ModuleType, **members: Any) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(members, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _torch() -> types.ModuleType:
    import torch
    import torch.distributed.distributed_c10d as c10d

    def resolved(name: str) -> _Group:
        count, _, word = name.partition(" ")
        assert word == "ranks", name
        return _Group(tuple(range(int(count))))

    def found(_tag: str, ranks: Sequence[int], _size: int = 0) -> _Group:
        return _Group(tuple(ranks))

    groups = _Instead(
        c10d,
        _resolve_process_group=resolved,
        _find_or_create_pg_by_ranks_and_tag=found,
        _find_pg_by_ranks_and_tag=found,
        _get_group_tag=lambda _group: "",
        _get_pg_default_device=lambda _group: torch.device("cpu"),
    )
    distributed = _Instead(
        torch.distributed,
        distributed_c10d=groups,
        get_process_group_ranks=lambda group: list(group.ranks),
        get_rank=lambda: 0,
        is_initialized=lambda: False,
    )
    # A device that torch does not know without torch_npu.
    return _Instead(torch, distributed=distributed, device=lambda *name: None if name == ("npu",) else torch.device(*name))


def install(torchair: dict[str, types.ModuleType]) -> None:
    """Give the modules of torchair, by their names, the stand-ins."""
    torch = _torch()
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
