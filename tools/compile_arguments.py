"""The command line of `staticvl compile`, from the table of its options; light, so that help comes at once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..compiler.option_table import COMPILE_OPTIONS, GROUPS, CompileOption
from .card_options import add_card_options

EXAMPLES = (
    "staticvl compile llava-1.5-7b-hf --out llava-7b\n"
    "staticvl compile llava-v1.5-7b --vision-tower clip-vit-large-patch14-336 --out llava-7b --quant w8a16\n"
    "staticvl compile llava-v1.6-vicuna-7b-hf --out llava-next-7b --context 4096 --buckets buckets.yaml --plan-only\n"
    "staticvl compile Llama-3.2-11B-Vision-Instruct --out llama-vision --images 2 --quant w8a16\n"
    "staticvl compile Qwen-VL-Chat --out qwen-vl --context 8192 --lora my-adapter\n"
    "staticvl compile llava-1.5-7b-hf --out llava-7b --quant w8a8 --tune\n"
    "staticvl compile llava-1.5-7b-hf --out llava-7b-kv8 --kv-cache int8 --calibrate prompts.jsonl\n"
    "staticvl compile llava-1.5-7b-hf --out llava-7b-npu --backend ascend --dtype bfloat16"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """An argument for every option, None by default, and those of the command itself."""
    for name in GROUPS:
        group = parser.add_argument_group(name)
        for option in COMPILE_OPTIONS:
            if option.group == name:
                _add(group, option)
    group = parser.add_argument_group("the command")
    group.add_argument("--config", type=Path, metavar="FILE", help="the same options in YAML; the command line wins")
    group.add_argument("--plan-only", action="store_true", help="print graphs, memory and capacity, compile nothing")
    add_card_options(group)


def _add(group: argparse._ArgumentGroup, option: CompileOption) -> None:
    help_text = f"{option.help}; default: {option.shown_default}"
    if option.positional:
        group.add_argument(option.name, nargs="?", help=help_text)
        return
    how: dict[str, Any] = {"choices": option.choices or None, "metavar": option.metavar}
    if option.type == "flag":
        how = {"action": "store_true"}
    elif option.type == "count":
        how["type"] = int
    group.add_argument(f"--{option.name.replace('_', '-')}", default=None, help=help_text, **how)
