"""Checkpoints that real versions of transformers saved, compiled, against today's transformers reading the same files.

Each version has an environment of its own, made once under ~/.cache/staticvl; torch is that of the running environment.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor

from staticvl import runtime
from staticvl.compiler.build import build
from staticvl.compiler.plan import Buckets, Options

from .checkpoints import tiny_llava
from .checkpoints_llava_next import tiny_llava_next
from .checkpoints_mllama import tiny_mllama
from .parity import Case, check, generated, noise_image, ours

pytestmark = pytest.mark.slow

HOME = Path.home() / ".cache" / "staticvl"
SCRIPT = Path(__file__).with_name("save_with_this_version.py")
BUCKETS = Buckets(prefill=(32,), decode=(1,), context=256, slots=1)
WRITERS: dict[str, Callable[[Path], Any]] = {"llava": tiny_llava, "llava_next": tiny_llava_next, "mllama": tiny_mllama}
# Families that a version knows. Versions before 4.45 read no tokenizer.json of today, so their processors save nothing.
VERSIONS = {
    "4.37.2": ("llava",),
    "4.41.2": ("llava", "llava_next"),
    "4.44.2": ("llava", "llava_next"),
    "4.46.3": ("llava", "llava_next", "mllama"),
    "4.49.0": ("llava", "llava_next", "mllama"),
    "4.53.3": ("llava", "llava_next", "mllama"),
    "4.57.1": ("llava", "llava_next", "mllama"),
    "5.0.0": ("llava", "llava_next", "mllama"),
    transformers.__version__: ("llava", "llava_next", "mllama"),
}
WITHOUT_PROCESSOR = ("4.37.2", "4.41.2", "4.44.2")
OLD_NUMPY = WITHOUT_PROCESSOR
TOKENS = 16


def python_of(version: str) -> Path:
    """The interpreter of an environment with this version of transformers; made where it is not there yet."""
    if version == transformers.__version__:
        return Path(sys.executable)
    folder = HOME / f"transformers-{version}"
    python, done = folder / "bin" / "python", folder / "done"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        run(sys.executable, "-m", "venv", folder)
        numpy = "numpy<2" if version in OLD_NUMPY else "numpy"
        run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", f"transformers=={version}", numpy, "pillow")
        [site] = folder.glob("lib/python3*/site-packages")
        (site / "zz_torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")  # behind the environment's own packages
        done.touch()
    return python


def run(*command: object) -> str:
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words, env = [str(word) for word in command], os.environ | settings
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def saved(version: str, family: str, folder: Path) -> Path:
    """A checkpoint of this family with random weights, as this version saves it beside the files that it does not write."""
    hub, out = folder / "hub", folder / "checkpoint"
    WRITERS[family](hub)
    shutil.copytree(hub, out, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "generation_config.json"))
    processor = [] if version in WITHOUT_PROCESSOR else ["processor"]
    run(python_of(version), SCRIPT, family, hub, out, *processor)
    return out


@pytest.mark.parametrize(("version", "family"), [(v, family) for v, families in VERSIONS.items() for family in families])
def test_saved_by(version: str, family: str, tmp_path: Path) -> None:
    assert run(python_of(version), "-c", "import transformers; print(transformers.__version__)").strip() == version
    checkpoint = saved(version, family, tmp_path)
    build(Options(checkpoint=checkpoint, out=tmp_path / "artifact", buckets=BUCKETS))
    model: Any = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor: Any = AutoProcessor.from_pretrained(checkpoint)
    if family != "mllama":
        processor.num_additional_image_tokens = 1  # as published; versions before 4.47 leave it out, and then today's counts 0
    mark = "<|image|>" if family == "mllama" else "<image>"
    case = Case(f"{mark}What colour is the circle?", [noise_image((60, 40))])
    given = processor(images=case.images, text=case.prompt, return_tensors="pt", add_special_tokens=family != "mllama")
    with runtime.load(tmp_path / "artifact", threads=1) as compiled:
        check(ours(compiled, case, TOKENS), generated(model, dict(given), TOKENS), f"{family} saved by {version}")
