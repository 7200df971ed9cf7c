"""The one decoder of every family: Llama blocks over a cache of fixed size, and the prefill and decode graphs around it.

B rows, T tokens, C hidden size, S cache rows, H query heads, K kv heads, D head dim, V vocabulary, R image rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from . import ops
from .config import TextConfig
from .layers import Linear, RMSNorm, Table


class Attention(nn.Module):
    """Causal attention with grouped kv heads, over tokens seen before (in the cache) and now."""

    def __init__(self, config: TextConfig, quant: str) -> None:
        super().__init__()
        c, d = config.hidden_size, config.head_dim
        self.heads = config.heads
        self.q = Linear(c, config.heads * d, bias=False, quant=quant)
        self.k = Linear(c, config.kv_heads * d, bias=False, quant=quant)
        self.v = Linear(c, config.kv_heads * d, bias=False, quant=quant)
        self.o = Linear(config.heads * d, c, bias=False, quant=quant)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: tuple[Tensor, Tensor], lengths: Tensor):
        q = ops.rope(self.q(x), *rope)  # [B, T, H*D]
        k = ops.rope(self.k(x), *rope)  # [B, T, K*D]
        out, k_cache, v_cache = ops.cached_attention(q, k, self.v(x), *cache, lengths, self.heads)
        return self.o(out), (k_cache, v_cache)


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: TextConfig, quant: str) -> None:
        super().__init__()
        c, i = config.hidden_size, config.intermediate_size
        self.gate = Linear(c, i, bias=False, quant=quant)
        self.up = Linear(c, i, bias=False, quant=quant)
        self.down = Linear(i, c, bias=False, quant=quant)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(ops.silu_mul(self.gate(x), self.up(x)))


class Block(nn.Module):
    """One decoder layer, pre-norm."""

    def __init__(self, config: TextConfig, quant: str) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, quant)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Mlp(config, quant)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: tuple[Tensor, Tensor], lengths: Tensor):
        out, cache = self.attn(self.attn_norm(x), rope, cache, lengths)
        x = x + out
        return x + self.mlp(self.mlp_norm(x)), cache


class Decoder(nn.Module):
    """Embedding, blocks, final norm and head."""

    def __init__(self, config: TextConfig, quant: str) -> None:
        super().__init__()
        self.embed = Table(config.embed_rows, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, quant) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, quant=quant)

    def blocks(self, x: Tensor, rope: tuple[Tensor, Tensor], caches: Sequence[Tensor], lengths: Tensor):
        """x [B, T, C]; caches k_0, v_0, k_1, ... -> (x, updated caches in the same order)."""
        updated: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            x, cache = layer(x, rope, (caches[2 * i], caches[2 * i + 1]), lengths)
            updated += cache
        return x, updated

    def logits(self, x: Tensor) -> Tensor:
        """x [B, C] -> [B, V]."""
        return self.lm_head(self.norm(x))


class PrefillGraph(nn.Module):
    """A chunk of one sequence: token ids and image rows in, logits of its last real token out."""

    def __init__(self, config: TextConfig, quant: str) -> None:
        super().__init__()
        self.text = Decoder(config, quant)

    def forward(
        self,
        token_ids: Tensor,  # [1, T]
        row_index: Tensor,  # [1, T]
        image_rows: Tensor,  # [R, C]
        lengths: Tensor,  # [1]
        last_index: Tensor,  # [1]
        rope_cos: Tensor,  # [1, T, D]
        rope_sin: Tensor,
        *caches: Tensor,  # [1, K, S, D]
    ):
        x = ops.merge_rows(ops.embed(token_ids, self.text.embed.weight), image_rows, row_index)
        x, updated = self.text.blocks(x, (rope_cos, rope_sin), caches, lengths)
        return self.text.logits(ops.take_token(x, last_index)), *updated


class DecodeGraph(nn.Module):
    """One new token for each of B sequences."""

    def __init__(self, config: TextConfig, quant: str) -> None:
        super().__init__()
        self.text = Decoder(config, quant)

    def forward(
        self,
        token_ids: Tensor,  # [B, 1]
        lengths: Tensor,  # [B]
        rope_cos: Tensor,  # [B, 1, D]
        rope_sin: Tensor,
        *caches: Tensor,  # [B, K, S, D]
    ):
        x = ops.embed(token_ids, self.text.embed.weight)
        x, updated = self.text.blocks(x, (rope_cos, rope_sin), caches, lengths)
        return self.text.logits(x.flatten(0, 1)), *updated
