"""A module -> its trace: the ops that one run of it calls, as a graph of torch.fx.

The module runs once on tensors without data, and each op is noted as the module calls it, before torch decomposes it or
dispatches it to autograd: torch.export notes the same ops in the same order (tests/test_traces.py). It is for modules of fixed
shapes that change no tensor in place. They need no symbolic shapes, functionalisation or guards, which take most of the time
of torch.export.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode

MODULE = "module"  # key in the meta of a node: the path of the module that calls the op, "" for the whole


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Trace:
    """The ops of one run of a module.

    Placeholders are all parameters and buffers, then the inputs. `parameters` are the former, with their names. The meta of a
    node contains its value without data ("val"), and that of a call the path of its module (MODULE).
    """

    graph: fx.Graph
    parameters: dict[fx.Node, str]
    inputs: tuple[fx.Node, ...]

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        results: Any = self.graph.output_node().args[0]
        return results


def module_path(node: fx.Node) -> str:
    """The path of the module that calls an op of a trace, such as text.layers.3.attn; "graph" for the whole."""
    return node.meta.get(MODULE) or "graph"


def record(module: nn.Module, names: Sequence[str], inputs: Sequence[Tensor]) -> Trace:
    """Run `module` on `inputs`, tensors without data that are called `names`; returns its ops.

    Raises ValueError where it changes a tensor in place or uses one that is neither a parameter, a buffer nor made by its ops.
    """
    recorder = _Recorder()
    tensors = [*module.named_parameters(), *module.named_buffers()]
    parameters = {recorder.placeholder(f"p_{name}", value): name for name, value in tensors}
    placeholders = tuple(map(recorder.placeholder, names, inputs))
    with torch.no_grad(), enable_python_dispatcher(), recorder, recorder.paths_of(module):
        results = module(*inputs)
    recorder.graph.output(tuple(recorder.node_of(each) for each in (results if isinstance(results, tuple) else (results,))))
    recorder.graph.eliminate_dead_code()
    return Trace(recorder.graph, parameters, placeholders)


class _Recorder(ProxyTorchDispatchMode):
    """Adds every op that is called while it is entered to a graph.

    torch lets only modes of this base see ops before they are decomposed; nothing else of the base is used.
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self, torch._C.DispatchKey.PreDispatch)  # pyright: ignore[reportArgumentType]
        self.graph = fx.Graph()
        self.path = ""  # of the module that runs
        self._nodes: dict[int, fx.Node] = {}  # by the identity of a value, which the meta of its node keeps alive

    def __enter__(self) -> Any:
        return TorchDispatchMode.__enter__(self)

    def __exit__(self, *error: Any) -> Any:
        return TorchDispatchMode.__exit__(self, *error)

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            raise ValueError(f"{func} (in {self.path or 'graph'}) changes a tensor in place, which a definition may not")
        result = func(*args, **(kwargs or {}))
        if id(result) in self._nodes:  # an op that returns its operand computes nothing
            return result
        name = func.overloadpacket.__name__
        call = self.graph.create_node("call_function", func, self._operands(args), self._operands(kwargs or {}), name)
        self._note(call, result)
        if isinstance(result, tuple | list):
            for i, each in enumerate(result):
                self._note(self.graph.create_node("call_function", operator.getitem, (call, i), {}, "getitem"), each)
        return result

    def placeholder(self, name: str, value: Tensor) -> fx.Node:
        node = self.graph.placeholder(name.replace(".", "_"))
        self._note(node, value)
        return node

    def node_of(self, value: Tensor) -> fx.Node:
        if id(value) not in self._nodes:
            raise ValueError(
                f"a tensor {list(value.shape)} (in {self.path or 'graph'}) is neither a parameter, a buffer, an input nor the "
                "result of an op of the definition; make it one of them"
            )
        return self._nodes[id(value)]

    @contextlib.contextmanager
    def paths_of(self, root: nn.Module) -> Iterator[None]:
        """Keep `path` at the module that runs."""
        paths = {module: path for path, module in root.named_modules()}
        above: list[str] = []

        def enter(module: nn.Module, _: Any) -> None:
            above.append(self.path)
            self.path = paths[module]

        def leave(*_: Any) -> None:
            self.path = above.pop()

        hooks = [
            hook for module in paths for hook in (module.register_forward_pre_hook(enter), module.register_forward_hook(leave))
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _operands(self, arguments: Any) -> Any:
        return map_aggregate(arguments, lambda each: self.node_of(each) if isinstance(each, Tensor) else each)

    def _note(self, node: fx.Node, value: Any) -> None:
        node.meta["val"] = value
        if node.op == "call_function":
            node.meta[MODULE] = self.path
        self._nodes[id(value)] = node
