"""What ranks on Ascend cards need of the host, with stand-ins for cards: which card, which weights, which process group."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from staticvl.runtime.artifact import ArtifactError, WeightSpec, rank_weights
from staticvl.runtime.backends.ascend import backend as ascend

from .lockstep import ArrayGroup, Lockstep


def test_the_default_group_is_what_such_a_file_finds_on_a_card() -> None:
    found = torch.distributed.distributed_c10d._find_pg_by_ranks_and_tag
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert found("", [0]) is torch.distributed.group.WORLD
    finally:
        torch.distributed.destroy_process_group()
    assert found("", [0]) is None


def test_weights_of_a_rank() -> None:
    def spec(file: str) -> WeightSpec:
        return WeightSpec(file=file, dtype="float16", shape=(2,), offset=64, nbytes=4)

    assert rank_weights({"w": spec("weights/rank-0/a.safetensors")}, 4, 3) == {"w": spec("weights/rank-3/a.safetensors")}
    assert rank_weights({"w": spec("weights/a.safetensors")}, 1, 0) == {"w": spec("weights/a.safetensors")}


@dataclass
class Carded(ArrayGroup):
    """A member of a group with a store."""

    store: Any = None


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """torch_npu with two cards."""
    npu = SimpleNamespace(
        device_count=lambda: 2,
        set_device=lambda index: setattr(npu, "index", index),
        get_device_name=lambda _: "Ascend910B3",
        utils=SimpleNamespace(get_cann_version=lambda: "8.5"),
    )
    monkeypatch.setitem(sys.modules, "torch_npu", SimpleNamespace(npu=npu))
    return npu


def test_a_rank_takes_the_card_of_its_place_on_the_machine(card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    rank_3 = ArrayGroup(Lockstep(4), 3)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ascend._card(ascend._ranks_card("npu", rank_3)) == (ascend.Device("npu:1"), "Ascend910B") and card.index == 1
    assert ascend._ranks_card("npu:0", rank_3) == "npu:0"
    assert ascend._ranks_card("npu", None) == ascend._ranks_card("npu", ArrayGroup(Lockstep(1), 0)) == "npu"
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ArtifactError, match="device is npu:3, but 2 Ascend cards are visible"):
        ascend._card(ascend._ranks_card("npu", rank_3))


def test_what_a_card_compiles_is_kept_by_rank(card: SimpleNamespace, tmp_path: Path) -> None:
    """And by the layout of weights: a graph is compiled for one."""
    rank = ArrayGroup(Lockstep(2), 1)
    given = ((None, "nd"), (rank, "nd"), (None, "nz"), (rank, "nz"))
    names = [ascend.compile_cache_folder(tmp_path, "Ascend910B", group, layout).name for group, layout in given]
    chip = "Ascend910B-8.5"
    assert names == [chip, f"{chip}-rank-1-of-2", f"{chip}-nz", f"{chip}-nz-rank-1-of-2"]


def test_ranks_on_cards_agree_on_a_group_through_their_store(monkeypatch: pytest.MonkeyPatch) -> None:
    group, calls = Carded(Lockstep(2), 1, store=torch.distributed.HashStore()), []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *given, **named: calls.append((given, named)))
    ascend._join(group)
    ((given, named),) = calls
    named.pop("store").set("place", "card")
    assert group.store.check(["hccl/place"]) and not group.store.check(["place"])
    assert (given, named) == (("hccl",), {"rank": 1, "world_size": 2})


def test_another_default_group_is_in_the_way() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(
            ArtifactError, match=r"over gloo as rank 0 of 1, but .* over hccl as rank 1 of 2; run them in a pro"
        ):
            ascend._join(Carded(Lockstep(2), 1))
    finally:
        torch.distributed.destroy_process_group()
