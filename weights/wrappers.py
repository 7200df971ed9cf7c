"""Prefixes that training tools put before tensor names when a wrapped module is saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

# DistributedDataParallel and DeepSpeed, then peft: before the whole name, one around the other in any order.
LEADING = ("module.", "base_model.model.")
# torch.compile, FSDP, checkpointed activations: before any module within a name. No module has such a name of its own.
ANYWHERE = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))


def unwrapped(name: str, leading: Collection[str] = LEADING) -> str:
    """A tensor's name in the module that was wrapped."""
    name = ".".join(part for part in name.split(".") if part not in ANYWHERE)
    while prefix := next((each for each in leading if name.startswith(each)), ""):
        name = name.removeprefix(prefix)
    return name


def foreign_prefix(names: Iterable[str], model_names: Collection[str]) -> tuple[str, int]:
    """The prefix without which most of `names` are among `model_names`, and how many; ("", 0): there is none."""
    counts: Counter[str] = Counter()
    for name in names:
        places = (i + 1 for i, letter in enumerate(name) if letter == ".")
        counts.update(name[:i] for i in places if name[i:] in model_names)
    return max(counts.items(), key=lambda item: (item[1], -len(item[0])), default=("", 0))
