"""Whether an artifact has room for a request, and what to do where it has not."""

from __future__ import annotations

from ..artifact import Manifest
from ..processor.prompt import Prompt
from .block_budget import GB, BlockBudget
from .blocks import blocks_for, tokens_in


class ContextError(ValueError):
    """A prompt and its answer do not fit the cache."""


def check_fit(manifest: Manifest, prompt: Prompt, max_new_tokens: int) -> None:
    """Raises ContextError for a prompt that does not fit the cache together with so many new tokens."""
    cross = manifest.cache.cross
    if cross and len(prompt.frames) > cross.images:
        raise ContextError(
            f"the prompt has {len(prompt.frames)} images, but the artifact holds {cross.images} for each sequence; give "
            f"fewer, or compile a larger one: {manifest.recompilation(images=len(prompt.frames))}"
        )
    context = manifest.cache.context
    total = prompt.length + max_new_tokens
    if total > context:
        raise ContextError(
            f"the prompt has {prompt.text_tokens} text tokens and {prompt.image_tokens} image tokens, and max_new_tokens "
            f"is {max_new_tokens}: {total} in all, but the artifact holds {context}; " + _advice(manifest, prompt.length, total)
        )


def check_blocks(budget: BlockBudget, prompt: Prompt, max_new_tokens: int) -> None:
    """Raises ContextError for a prompt that needs more blocks, together with so many new tokens, than there are in all."""
    needed = blocks_for(prompt.length + max_new_tokens - 1)  # the last token has no row
    if needed <= budget.blocks:
        return
    most = budget.tokens + 1 - prompt.length
    less = f"give at most {most} new tokens" if most > 0 else "give a shorter prompt"
    block, limit, remedy = "blocks", "cache_gb allows", "load with a larger cache_gb"
    if budget.paged:
        block, limit, remedy = "pages", "the artifact has", "compile one with more pages"
    raise ContextError(
        f"the prompt has {prompt.length} tokens and max_new_tokens is {max_new_tokens}, which takes {needed} {block} of "
        f"{tokens_in(1)} tokens ({needed * budget.block_bytes / GB:.3g} GB), but {limit} {budget.blocks} "
        f"({budget.gigabytes:.3g} GB); {less}, or {remedy}"
    )


def check_draft(manifest: Manifest, speculate: int) -> int:
    """`speculate`, the tokens of a draft; raises ValueError where no graph can verify so many."""
    most = max(manifest.buckets("verify"), default=1) - 1
    if not 0 <= speculate <= most:
        possible = 0 < speculate < manifest.cache.context  # a draft and the token before it have to fit
        more = f", or compile one for more: {manifest.recompilation(speculate=speculate)}" if possible else ""
        raise ValueError(
            f"speculate is {speculate}, but the artifact verifies at most {most} drafted tokens; give 0 to {most}{more}"
        )
    return speculate


def _advice(manifest: Manifest, prompt: int, total: int) -> str:
    """The remedies for a prompt of `prompt` tokens that needs a context of `total`."""
    model, context = manifest.model, manifest.cache.context
    less = f"give at most {context - prompt} new tokens" if prompt < context else "give a shorter prompt"
    if model.can_hold(total):
        return f"{less}, or compile a larger one: {manifest.recompilation(context=total)}"
    most = model.max_positions
    assert isinstance(most, int)
    if context < most and prompt < most:
        larger = manifest.recompilation(context=most)
        return f"{less}, or compile all {most} positions of the model, for at most {most - prompt} new tokens: {larger}"
    return f"{less}: the model has {most} positions"
