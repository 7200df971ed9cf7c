"""Settings that a tiktoken file lacks: the pattern that splits text into words, and the special tokens after its ranks."""

from __future__ import annotations

from dataclasses import dataclass

# Both patterns differ from GPT-4's (cl100k_base) in how many digits make a word.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TiktokenForm:
    """One model's tiktoken settings; `specials` take the ids after the ranks, in this order."""

    pattern: str
    nfc: bool
    specials: tuple[str, ...]


QWEN = TiktokenForm(
    pattern=_WORDS.format(digits=r"\p{N}"),
    nfc=True,
    specials=(
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        *(f"<|extra_{i}|>" for i in range(205)),
        *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"),
    ),
)

LLAMA3 = TiktokenForm(
    pattern=_WORDS.format(digits=r"\p{N}{1,3}"),
    nfc=False,
    specials=(
        *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
        *("<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
        *(f"<|reserved_special_token_{i}|>" for i in range(2, 247)),
        "<|image|>",
    ),
)
