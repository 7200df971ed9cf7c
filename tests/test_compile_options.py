"""Options of a build are named once: the command line, --config, Options, digests and the manifest's record agree on them."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from staticvl.compiler.buckets import KEYS, Buckets
from staticvl.compiler.build_record import recorded_options
from staticvl.compiler.calibration import Calibration
from staticvl.compiler.choices import DTYPES, PlanError
from staticvl.compiler.fingerprint import fingerprint, weights_key
from staticvl.compiler.inputs import BuildInputs, plan_only, prepare
from staticvl.compiler.option_table import COMPILE_OPTIONS, GROUPS, CompileOption
from staticvl.compiler.options import Options
from staticvl.compiler.progress import Progress
from staticvl.compiler.source_files import reachable
from staticvl.compiler.stored_graphs import graph_keys
from staticvl.runtime.backends.ascend.torchair_host import SOCS
from staticvl.tools.calibration_file import read_calibration
from staticvl.tools.cli import build_parser, main
from staticvl.tools.compile_options import CONFIG_KEYS, FOLDERS, read_options

from .conftest import EMBEDDED, REPO

MLLAMA = REPO / "tools" / "assets" / "tiny_mllama"
PROMPTS = '{"prompt": "Hello"}\n'


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """A value of one option that is not its default, and what has to come of it."""

    given: Any  # in YAML; the command line takes the same text
    recorded: str | None  # in the manifest
    beside: dict[str, Any] = dataclasses.field(default_factory=dict)  # options that it needs
    checkpoint: Path = EMBEDDED


ASCEND = {"backend": "ascend"}
CALIBRATED = {"calibrate": "prompts.jsonl", "quant": "w8a8"}
EXAMPLES = {
    "checkpoint": Example(str(MLLAMA), None),
    "out": Example("other", None),
    "vision_tower": Example("folder", "FOLDER"),
    "lora": Example("folder", "FOLDER"),
    "ignore_config_keys": Example("torch_dtype,dtype", None),
    "text_before_image": Example("meta", "meta", CALIBRATED, MLLAMA),
    "quant": Example("w8a16", "w8a16"),
    "dtype": Example("float16", "float16"),
    "calibrate": Example("prompts.jsonl", "FILE", {"quant": "w8a8"}),
    "context": Example(128, "128"),
    "slots": Example(3, "3"),
    "images": Example(2, "2", checkpoint=MLLAMA),
    "speculate": Example(4, "4"),
    "buckets": Example("buckets.yaml", None),
    "kv_cache": Example("int8", "int8", CALIBRATED),
    "kv": Example("pages", "pages", ASCEND),
    "pages": Example(20, "20", {**ASCEND, "kv": "pages"}),
    "backend": Example("ascend", "ascend"),
    "soc": Example("Ascend310P", "Ascend310P", {**ASCEND, "eager": "vision,prefill,decode"}),
    "fuse_all_reduce": Example(True, "", {**ASCEND, "tp": 2}),
    "eager": Example("vision,prefill", "vision,prefill", ASCEND),
    "candidates": Example(8, "8"),
    "tune": Example(True, ""),
    "tp": Example(2, "2"),
    "pp": Example(2, "2"),
}


def each_option() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("option", COMPILE_OPTIONS, ids=lambda option: option.name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that examples name."""
    folder = tmp_path_factory.mktemp("options")
    (folder / "folder").mkdir()
    (folder / "folder" / "config.json").write_text("{}")
    (folder / "prompts.jsonl").write_text(PROMPTS)
    (folder / "buckets.yaml").write_text("prefill: [16]\nspeculate: 2\n")
    return folder


def from_command_line(folder: Path, values: dict[str, Any]) -> Options:
    command = ["compile", str(folder / str(values["checkpoint"]))]
    for option in COMPILE_OPTIONS:
        if option.name in values and not option.positional:
            value = values[option.name]
            path = option.type in ("folder", "file")
            command.append(f"--{option.name.replace('_', '-')}")
            command += [] if value is True else [str(folder / value) if path else str(value)]
    return read_options(build_parser().parse_args(command))


def from_file(folder: Path, values: dict[str, Any]) -> Options:
    (folder / "options.yaml").write_text(yaml.safe_dump(values))
    return read_options(build_parser().parse_args(["compile", "--config", str(folder / "options.yaml")]))


def values_of(name: str, *, without: bool = False) -> dict[str, Any]:
    """Options of a command with the example of one, or without it."""
    example = EXAMPLES[name]
    values = {"checkpoint": str(example.checkpoint), "out": "artifact", **example.beside}
    return values if without else {**values, name: example.given}


# ---- one list


def test_names_and_groups() -> None:
    names = [option.name for option in COMPILE_OPTIONS]
    assert len(set(names)) == len(names)
    assert set(names) == set(EXAMPLES) == set(CONFIG_KEYS)
    assert {option.group for option in COMPILE_OPTIONS} == set(GROUPS)
    assert {option.name for option in COMPILE_OPTIONS if option.type == "folder"} - {"out"} == set(FOLDERS)


def test_every_field_of_options_is_set_by_one() -> None:
    fields = {field.name: field for field in dataclasses.fields(Options)}
    assert {option.field for option in COMPILE_OPTIONS} == set(fields)
    for option in COMPILE_OPTIONS:
        if option.field != "buckets" and option.name not in ("checkpoint", "out"):
            assert fields[option.field].default == option.default, option.name
    sizes = {option.name for option in COMPILE_OPTIONS if option.field == "buckets"}
    assert sizes - {"buckets"} <= set(KEYS)


def test_choices() -> None:
    by_name = {option.name: option for option in COMPILE_OPTIONS}
    assert by_name["soc"].choices == SOCS
    assert set(by_name["dtype"].choices) == {name for names in DTYPES.values() for name in names}
    for option in COMPILE_OPTIONS:
        assert (option.type == "text") == bool(option.choices), option.name
        assert not option.choices or option.default in ("", *option.choices), option.name


@each_option()
def test_command_line_and_file_mean_the_same(option: CompileOption, folder: Path) -> None:
    values = values_of(option.name)
    options = from_command_line(folder, values)
    assert replace(from_file(folder, values), out=options.out) == options
    plain = from_file(folder, values_of(option.name, without=True))
    if option.name != "out":
        assert getattr(options, option.field) != getattr(plain, option.field)
    assert from_command_line(folder, {"checkpoint": EMBEDDED, "out": "a"}) == Options(checkpoint=EMBEDDED, out=folder / "a")


@each_option()
def test_help_says_the_default(option: CompileOption) -> None:
    actions = {action.dest: action for action in commands()["compile"]._actions}
    action = actions[option.name]
    assert option.help in (action.help or "") and f"; default: {option.shown_default}" in (action.help or "")
    assert option.shown_default not in ("", "None")
    assert list(action.choices or ()) == list(option.choices)


def test_no_other_option_of_the_command() -> None:
    dests = {action.dest for action in commands()["compile"]._actions}
    assert dests - set(CONFIG_KEYS) == {"help", "config", "plan_only", "card", "memory_gb"}


# ---- what digests and the manifest have of them


def inputs_of(options: Options) -> BuildInputs:
    return prepare(replace(options, vision_tower=None, lora=None), Progress())


def keys_of(inputs: BuildInputs) -> tuple[str, dict[Any, str]]:
    key = weights_key({}, inputs.config, inputs.options, inputs.packing)
    return key, graph_keys(inputs, key)


@each_option()
def test_digests_depend_on_what_enters_them(option: CompileOption, folder: Path) -> None:
    changed, plain = (from_file(folder, values_of(option.name, without=without)) for without in (False, True))
    if option.enters == "files":
        sources = [fingerprint(options, {}, Progress()) for options in (changed, plain)]
        assert sources[0] != sources[1] or changed.calibration != plain.calibration
        if option.name != "calibrate":
            return
    (changed_key, changed_graphs), (key, graphs) = keys_of(inputs_of(changed)), keys_of(inputs_of(plain))
    weights = option.enters in ("files", "config", "weights", "calibration")
    assert (changed_key != key) == weights
    assert (changed_graphs != graphs) == (weights or option.enters in ("graphs", "plan"))


def test_what_enters_no_digest() -> None:
    """Where an artifact lies, and keys of a config that are read over."""
    assert {option.name for option in COMPILE_OPTIONS if not option.enters} == {"out", "ignore_config_keys"}


@each_option()
def test_the_manifest_keeps_what_compiles_the_same_again(option: CompileOption, folder: Path) -> None:
    options = from_file(folder, values_of(option.name))
    plan = plan_only(replace(options, vision_tower=None, lora=None)).plan
    recorded = recorded_options(options, plan)
    assert recorded.get(option.name) == EXAMPLES[option.name].recorded
    assert (option.recorded != "") == (EXAMPLES[option.name].recorded is not None)
    if option.recorded == "changed":
        assert option.name not in recorded_options(from_file(folder, values_of(option.name, without=True)), plan)


def test_another_help_text_makes_nothing_again() -> None:
    for module in ("compiler.make", "weights.convert", "compiler.calibrate"):
        assert "compiler/option_table.py" not in reachable((module,))
    assert "compiler/options.py" in reachable(("compiler.make",))


# ---- values of a file


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tp": "2"}, "tp is '2'; expected a whole number"),
        ({"pp": True}, "pp is True; expected a whole number"),
        ({"tune": "yes"}, "tune is 'yes'; expected true or false"),
        ({"lora": 5}, "lora is 5; expected the path of a folder"),
        ({"calibrate": ["a"]}, r"calibrate is \['a'\]; expected the path of a file"),
        ({"eager": 5}, "eager is 5; expected a list of names"),
        ({"ignore_config_keys": [5]}, r"ignore_config_keys is \[5\]; expected a list of names"),
        ({"checkpoint": 5}, "checkpoint is 5; expected the path of a folder"),
        ({"backend": 5}, "backend 5 is unknown; expected one of onnx, ascend"),
        ({"buckets": 5}, "buckets holds int; expected a mapping"),
        ({"speculate": 0}, "speculate is 0; expected a number of tokens from 1 on"),
    ],
)
def test_values_of_another_type(folder: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        from_file(folder, {"checkpoint": str(EMBEDDED), "out": "a", **values})


def test_lists_and_empty_keys_of_a_file(folder: Path) -> None:
    plain = {"checkpoint": str(EMBEDDED), "out": "a"}
    listed = from_file(folder, {**plain, **ASCEND, "eager": ["vision", "prefill"], "speculate": [4, 2], "images": [2, 3]})
    assert listed.eager == ("vision", "prefill")
    assert (listed.buckets.verify, listed.buckets.images) == ((5, 3), (2, 3))
    assert from_file(folder, {**plain, "quant": None, "tune": None, "buckets": None, "context": None}) == from_file(
        folder, plain
    )


def test_the_command_line_wins_over_speculate_of_a_bucket_file(folder: Path) -> None:
    for spelling in ("speculate: 2", "verify: [3]"):
        (folder / "drafts.yaml").write_text(spelling)
        values = {"checkpoint": EMBEDDED, "out": "a", "buckets": "drafts.yaml"}
        assert from_command_line(folder, values).buckets == Buckets(verify=(3,))
        assert from_command_line(folder, {**values, "speculate": 6}).buckets == Buckets(verify=(7,))


def test_a_calibration_is_read_from_the_file_that_is_named(folder: Path) -> None:
    calibration = from_file(folder, values_of("calibrate")).calibration
    assert isinstance(calibration, Calibration) and calibration == read_calibration(folder / "prompts.jsonl")


def test_a_conflict_in_a_bucket_file_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "both.yaml").write_text("speculate: 4\nverify: [4]\n")
    assert main(["compile", str(EMBEDDED), "--plan-only", "--buckets", str(folder / "both.yaml")]) == 1
    assert "speculate is [4] and verify is [4], but [4] drafted tokens are [5] verified ones" in capsys.readouterr().err


# ---- help of every command


def commands() -> dict[str, argparse.ArgumentParser]:
    actions = build_parser()._actions
    return next(dict(action.choices) for action in actions if isinstance(action, argparse._SubParsersAction))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(commands()))
def test_help_has_examples_and_every_default(name: str) -> None:
    parser = commands()[name]
    text = parser.format_help()
    assert f"examples:\n  staticvl {name}" in text
    formatter = parser._get_formatter()
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
            continue
        shown = formatter._get_help_string(action) or ""
        assert shown, f"{action.dest} has no help"
        assert not action.option_strings or action.required or "default: " in shown, f"{action.dest}: {shown}"
        assert "default: None" not in shown and "==SUPPRESS==" not in shown
