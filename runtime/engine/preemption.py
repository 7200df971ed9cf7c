"""Preemption by recomputation: what a sequence runs again after it has lost its slot.

The tokens of its answer but the last one become a continuation of its prompt, whose rows are computed again by chunks. The last
token then goes on in a decode step. Whatever chooses tokens (draws, logits processors, constraints, text) stays as it is.

L positions of the prompt, m tokens of the answer.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ..processor.prompt import CrossAttentionMask, Prompt
from .cache_keys import CacheKeys
from .request import Sequence


def begin_again(sequence: Sequence) -> None:
    """Let a sequence that has lost its slot begin again, with the tokens of its answer so far."""
    sequence.slot, sequence.room, sequence.computed, sequence.prepared = None, 0, 0, False
    if sequence.cross_tiles:
        sequence.tiles_done = 0  # the images' keys were in the slot
    sequence.preemptions += 1
    tokens = np.array(sequence.generated[:-1], np.int32)
    sequence.set_context(_continued(sequence.prompt, tokens), _continued_keys(sequence.cache_keys, tokens))


def restored(sequence: Sequence) -> None:
    """The rows of a sequence that was preempted are in its slot again."""
    sequence.set_context(sequence.prompt, sequence.cache_keys)
    sequence.computed = sequence.prompt_length


def _continued(prompt: Prompt, tokens: np.ndarray) -> Prompt:
    """The prompt with tokens after it, which see what its last position sees: arrays of L + m."""
    if not len(tokens):
        return prompt
    return dataclasses.replace(
        prompt,
        token_ids=np.concatenate([prompt.token_ids, tokens]),
        rows=np.concatenate([prompt.rows, np.full(len(tokens), -1, np.int32)]),
        state=_prolonged(prompt.state, len(tokens)),
        cross_attention=_continued_mask(prompt.cross_attention, len(tokens)),
    )


def _continued_mask(mask: CrossAttentionMask | None, count: int) -> CrossAttentionMask | None:
    return mask and CrossAttentionMask(visible=_prolonged(mask.visible, count), gates=_prolonged(mask.gates, count))


def _continued_keys(cache_keys: CacheKeys, tokens: np.ndarray) -> CacheKeys:
    """The keys that the rows of a prompt and of so many tokens of its answer have (SlotCache.append)."""
    if not len(tokens):
        return cache_keys
    answer = np.repeat(cache_keys.answer[None], len(tokens), axis=0)
    answer[:, 0] = tokens
    return dataclasses.replace(cache_keys, keys=np.concatenate([cache_keys.keys, answer]))


def _prolonged(array: np.ndarray, count: int) -> np.ndarray:
    """An array with its last row `count` times more."""
    return np.concatenate([array, np.repeat(array[-1:], count, axis=0)])
