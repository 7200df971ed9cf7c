"""What a new family touches is what docs/adding_a_family.md names: no other module knows a family by its name."""

from __future__ import annotations

import ast
from pathlib import Path

from staticvl.compiler.graphs import VISION_GRAPHS
from staticvl.runtime.processor.families import FAMILIES
from staticvl.weights.names import TABLES

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "adding_a_family.md"
# Where the names of families may stand; each of these is named in the guide.
PLACES = (
    "model_defs/config/",
    "compiler/graphs.py",
    "compiler/image_config.py",
    "compiler/tokenizer_config.py",
    "compiler/model_info.py",
    "compiler/model_card.py",
    "weights/names/",
    "runtime/processor/families/",
)


def names_in(path: Path) -> set[str]:
    """Families that a module compares with or looks up: string constants that are a family's name, docstrings apart."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in FAMILIES}


def test_every_registry_knows_every_family() -> None:
    assert set(VISION_GRAPHS) == set(TABLES) == set(FAMILIES) == {"llava", "llava_next", "mllama", "qwen_vl"}


def test_only_the_named_places_know_families() -> None:
    modules = [p for top in ("compiler", "model_defs", "runtime", "weights") for p in (ROOT / top).rglob("*.py")]
    assert len(modules) > 50
    strangers = {
        str(path.relative_to(ROOT)): found
        for path in modules
        if not str(path.relative_to(ROOT)).startswith(PLACES) and (found := names_in(path))
    }
    assert not strangers


def test_the_guide_names_the_places() -> None:
    guide = GUIDE.read_text(encoding="utf-8")
    assert [place for place in PLACES if place not in guide] == []
    paths = [word for word in guide.replace(",", " ").split("`") if "/" in word and " " not in word and "FAMILY" not in word]
    assert paths and [path for path in paths if not (ROOT / path).exists()] == []
