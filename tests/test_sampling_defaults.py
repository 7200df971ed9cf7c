"""generation_config.json: what it says holds for every request, as transformers reads it; what is not used is listed."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from staticvl import runtime
from staticvl.compiler.build import build
from staticvl.compiler.model_info import read_model_info
from staticvl.compiler.plan import Options
from staticvl.model_defs.config import ConfigError, read_config
from staticvl.runtime.artifact import SamplingDefaults, encode_manifest, open_artifact, read_manifest
from staticvl.runtime.sampling.bans import Bans
from staticvl.runtime.sampling.params import SamplingParams
from staticvl.tools.cli import main
from staticvl.tools.show import sampling_line

from .checkpoints import Tiny, tiny_llava
from .conftest import SMALL_BUCKETS
from .servers import serving

QUESTION = "What is in the picture?"
TOKENS = 12


@dataclass(frozen=True, slots=True)
class Restricted:
    """A checkpoint whose generation_config.json restricts greedy answers, compiled; and the answer that transformers gives."""

    tiny: Tiny
    artifact: Path
    plain: list[int]  # without the file
    expected: list[int]


def reference(tiny: Tiny, ids: np.ndarray, config: GenerationConfig) -> list[int]:
    """transformers' answer under a generation config, over the prompt's token ids."""
    inputs = torch.from_numpy(ids.astype(np.int64))[None]
    model: Any = tiny.model
    out = model.generate(
        input_ids=inputs, attention_mask=torch.ones_like(inputs), generation_config=config,
        max_new_tokens=TOKENS, pad_token_id=0,
    )  # fmt: skip
    return out[0, inputs.shape[1] :].tolist()


@pytest.fixture(scope="module")
def restricted(tmp_path_factory: pytest.TempPathFactory) -> Restricted:
    folder = tmp_path_factory.mktemp("defaults")
    tiny = tiny_llava(folder / "checkpoint", seed=5)
    build(Options(checkpoint=tiny.folder, out=folder / "a", buckets=SMALL_BUCKETS))
    with runtime.load(folder / "a", threads=1) as model:
        ids = model.processor.prompt(QUESTION).token_ids
    plain = reference(tiny, ids, GenerationConfig(eos_token_id=2))
    assert len(set(plain[:6])) > 3
    settings = {
        "eos_token_id": 2,
        "repetition_penalty": 1.3,
        "begin_suppress_tokens": [plain[0]],
        "suppress_tokens": [plain[1]],
        "bad_words_ids": [[plain[2]], [int(ids[-1]), plain[3]], [2]],
        "no_repeat_ngram_size": 3,
        "max_length": 99,
    }
    (tiny.folder / "generation_config.json").write_text(json.dumps(settings))
    del settings["no_repeat_ngram_size"]
    expected = reference(tiny, ids, GenerationConfig(**settings))
    assert main(["compile", str(tiny.folder), "--out", str(folder / "a")]) == 0
    return Restricted(tiny, folder / "a", plain, expected)


def test_python_command_line_and_server_answer_as_transformers(
    restricted: Restricted, capsys: pytest.CaptureFixture[str]
) -> None:
    assert restricted.expected != restricted.plain
    with runtime.load(restricted.artifact, threads=1) as model:
        out = model.generate(QUESTION, max_new_tokens=TOKENS)
        assert out.token_ids == restricted.expected
        loose = model.generate(QUESTION, max_new_tokens=TOKENS, repetition_penalty=1.0)
        assert loose.token_ids != restricted.expected
        with serving(model) as server:
            assert server.chat(QUESTION, max_tokens=TOKENS).choices[0].message.content == out.text
    capsys.readouterr()
    command = ["generate", str(restricted.artifact), "--prompt", QUESTION, "--max-new-tokens", str(TOKENS), "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == restricted.expected


def test_build_and_show_list_what_is_not_used(restricted: Restricted, capsys: pytest.CaptureFixture[str]) -> None:
    notes = read_manifest(restricted.artifact).build.notes
    assert notes == (
        "generation_config.json: not used, so answers may differ from those of transformers: no_repeat_ngram_size 3",
        "generation_config.json: not used, a request says how long its answer may be: max_length 99",
    )
    capsys.readouterr()
    assert main(["show", str(restricted.artifact)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "no_repeat_ngram_size 3" in shown and "max_length 99" in shown
    assert "greedy by default; where sampling is requested: temperature 1, top_k 50, top_p 1; repetition_penalty 1.3" in shown
    assert "2 of bad_words_ids, 1 of suppress_tokens, 1 of begin_suppress_tokens" in shown


def test_compile_prints_the_notes(restricted: Restricted, capsys: pytest.CaptureFixture[str]) -> None:
    """Also when nothing is made anew."""
    capsys.readouterr()
    assert main(["compile", str(restricted.tiny.folder), "--out", str(restricted.artifact)]) == 0
    assert "note: generation_config.json: not used, so answers may differ" in capsys.readouterr().out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = tiny_llava(tmp_path_factory.mktemp("facts") / "checkpoint")
    for weights in tiny.folder.glob("*.safetensors"):
        weights.unlink()
    return tiny.folder


def defaults(folder: Path, tmp_path: Path, notes: list[str] | None = None, **settings: Any) -> SamplingDefaults:
    copy = Path(shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True))
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **settings}))
    return read_model_info(copy, read_config(copy), vision_tower=None, notes=notes)[0].sampling


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True},
        {"do_sample": True, "top_k": None, "temperature": 0.6, "top_p": 0.9},
        {"do_sample": True, "top_k": 0},
        {"do_sample": True, "top_k": 7, "min_p": 0.05, "repetition_penalty": 1.05},
        {"top_p": 0.5},
    ],
    ids=str,
)
def test_what_a_silent_file_means(folder: Path, tmp_path: Path, restricted: Restricted, settings: dict[str, Any]) -> None:
    """As transformers' generate fills it in."""
    model: Any = restricted.tiny.model
    kept, model.generation_config = model.generation_config, GenerationConfig(**settings)
    try:
        theirs, _ = model._prepare_generation_config(None)
    finally:
        model.generation_config = kept
    ours = defaults(folder, tmp_path, **settings)
    assert (ours.do_sample, ours.temperature, ours.top_p) == (theirs.do_sample, theirs.temperature, theirs.top_p)
    assert ours.top_k == theirs.top_k
    assert (ours.min_p or None, ours.repetition_penalty or 1.0) == (theirs.min_p, theirs.repetition_penalty)
    resolved = SamplingParams().resolved(ours)
    assert (resolved.temperature > 0) == bool(settings.get("do_sample"))
    assert resolved.min_p == settings.get("min_p", 0.0)
    assert ("greedy" in sampling_line(ours)) != bool(settings.get("do_sample"))


def test_settings_that_change_nothing_are_not_listed(folder: Path, tmp_path: Path) -> None:
    """Every default of transformers, and what its files always have."""
    notes: list[str] = []
    silent = {name: value for name, value in GenerationConfig._get_default_generation_params().items() if name != "max_length"}
    kept = {
        "_from_model_config": True,
        "transformers_version": "5",
        "bos_token_id": 1,
        "pad_token_id": 0,
        "length_penalty": 2.0,
    }
    defaults(folder, tmp_path, notes, **(silent | kept))
    assert notes == []
    defaults(folder, tmp_path, notes, num_beams=4, stop_strings=["x"], mystery={"a": 1}, max_new_tokens=512)
    assert notes[0].endswith(
        "not used, so answers may differ from those of transformers: mystery {'a': 1}, num_beams 4, stop_strings ['x']"
    )
    assert notes[1].endswith("max_new_tokens 512")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_p": 2}, "min_p is 2.0; expected at most 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; expected a number above 0"),
        ({"suppress_tokens": 3}, "suppress_tokens has 3; expected a list of token ids"),
        ({"bad_words_ids": [3]}, "bad_words_ids has 3; expected a list of token ids"),
        ({"bad_words_ids": "x"}, "bad_words_ids is 'x'; expected a list of lists of token ids"),
        ({"begin_suppress_tokens": [-1]}, r"begin_suppress_tokens has \[-1\]"),
    ],
)
def test_refused(folder: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        defaults(folder, tmp_path, **settings)


def test_artifacts_of_before_read_and_seal_alike(restricted: Restricted) -> None:
    """A manifest without the new fields has the bytes that it had."""
    manifest = open_artifact(restricted.artifact).manifest
    plain = SamplingDefaults(do_sample=True, temperature=0.6, top_p=0.9, top_k=5)
    model = msgspec.structs.replace(manifest.model, sampling=plain)
    old = msgspec.structs.replace(manifest, model=model, build=msgspec.structs.replace(manifest.build, notes=msgspec.UNSET))
    data = json.loads(encode_manifest(old))
    assert data["model"]["sampling"] == {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 5}
    assert "notes" not in data["build"]


def test_bans_end_where_the_logits_end() -> None:
    """Ids after the rows of lm_head, such as that of an image, have no logit; a start in the prompt counts."""
    given = SamplingDefaults(
        suppress_tokens=(3, 9), bad_words_ids=((9,), (4, 5), (1, 4, 6), (9, 2)), begin_suppress_tokens=(0, 9)
    )
    constraint, row = Bans(given, [7, 1, 4], vocab=8), np.zeros(8, np.float32)
    constraint.forbid(row)
    assert np.flatnonzero(np.isneginf(row)).tolist() == [0, 3, 5, 6]
    constraint.accept(4)
    row = np.zeros(8, np.float32)
    constraint.forbid(row)
    assert np.flatnonzero(np.isneginf(row)).tolist() == [3, 5]
