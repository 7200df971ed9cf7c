"""The one decoder of every family: Llama blocks over a cache of fixed size, with cross-attention blocks between them where
a family has some, and the graph around it.

B rows, T tokens, C hidden size, S cache rows, H query heads, K kv heads, D head dim, V vocabulary, X keys of an image,
n images of t tiles. Where the model is sharded, H, K and the MLP are those of one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from . import ops
from .config import TextConfig, head_quant, text_quant
from .layers import GatheredColumnLinear, Linear, RMSNorm, RowParallelLinear, Table, empty_parameter, shard_size

Feed = Mapping[str, Tensor]  # graph inputs by name; see docs/artifact.md
Attended = tuple[Tensor, Tensor, Tensor]  # the output of attention, and the updated caches


class Attention(nn.Module):
    """Causal attention with grouped kv heads, over tokens seen before (in the cache) and now."""

    def __init__(self, config: TextConfig, quant: str, ranks: int) -> None:
        super().__init__()
        c, d, bias, kv_heads = config.hidden_size, config.head_dim, config.qkv_bias, config.rank_kv_heads(ranks)
        self.heads = shard_size(config.heads, ranks)
        self.q = Linear(c, self.heads * d, bias=bias, quant=quant)
        self.k = Linear(c, kv_heads * d, bias=bias, quant=quant)
        self.v = Linear(c, kv_heads * d, bias=bias, quant=quant)
        self.o = RowParallelLinear(config.heads * d, c, bias=False, quant=quant, ranks=ranks)
        self.over_rows: Callable[..., Attended] = ops.int8_cached_attention if config.int8_cache else ops.cached_attention
        self.over_pages: Callable[..., Attended] = ops.int8_paged_attention if config.int8_cache else ops.paged_attention
        self.int8_cache = config.int8_cache
        if config.int8_cache:
            self.k_scale, self.v_scale = empty_parameter(kv_heads * d), empty_parameter(kv_heads * d)

    def forward(
        self, x: Tensor, feed: Feed, cache: tuple[Tensor, Tensor], only: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        rope = feed["rope_cos"], feed["rope_sin"]
        q = ops.rope(self.q(x), *rope)  # [B, T, H*D]
        k = ops.rope(self.k(x), *rope)  # [B, T, K*D]
        if "query_scale" in feed:
            q = q * feed["query_scale"]
        out, k_cache, v_cache = self._attend(q, k, self.v(x), cache, feed)
        return self.o(out if only is None else ops.take_token(out, only)), (k_cache, v_cache)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, cache: tuple[Tensor, Tensor], feed: Feed) -> Attended:
        attention = self.over_pages if "block_table" in feed else self.over_rows
        scales = [scale.view(-1, 1, cache[0].shape[-1]) for scale in self._scales]  # [K, 1, D]
        places = [feed[name] for name in ("lengths", "block_table", "slot_mapping") if name in feed]
        return attention(q, k, v, *cache, *scales, *places, self.heads)

    @property
    def _scales(self) -> tuple[Tensor, ...]:
        return (self.k_scale, self.v_scale) if self.int8_cache else ()


def over_stored_caches(module: nn.Module) -> None:
    """Let attention take rounded keys and values as they lie in its caches (ops.attention_over_stored)."""
    for each in module.modules():
        if isinstance(each, Attention) and each.int8_cache:
            each.over_rows, each.over_pages = ops.attention_over_stored, ops.attention_over_stored_pages


class CrossAttention(nn.Module):
    """Attention to the images that a token sees. No rotary embedding; the keys come normalised from the vision graph."""

    def __init__(self, config: TextConfig, quant: str, ranks: int) -> None:
        super().__init__()
        c, d = config.hidden_size, config.head_dim
        self.heads, self.head_dim = shard_size(config.heads, ranks), d
        self.q = Linear(c, self.heads * d, bias=False, quant=quant)
        self.q_norm = RMSNorm(d, config.rms_norm_eps)
        self.o = RowParallelLinear(config.heads * d, c, bias=False, quant=quant, ranks=ranks)

    def forward(self, x: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], mask: Tensor) -> Tensor:
        q = self.q(x)
        q = self.q_norm(q.reshape(*q.shape[:2], self.heads, self.head_dim)).reshape(q.shape)
        return self.o(ops.cross_attention(q, keys, values, mask, self.heads))


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: TextConfig, quant: str, ranks: int) -> None:
        super().__init__()
        c, i = config.hidden_size, config.intermediate_size
        self.gate = Linear(c, shard_size(i, ranks), bias=False, quant=quant)
        self.up = Linear(c, shard_size(i, ranks), bias=False, quant=quant)
        self.down = RowParallelLinear(i, c, bias=False, quant=quant, ranks=ranks)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(ops.silu_mul(self.gate(x), self.up(x)))


class Block(nn.Module):
    """One decoder layer, pre-norm."""

    def __init__(self, config: TextConfig, quant: str, ranks: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, quant, ranks)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Mlp(config, quant, ranks)

    def forward(
        self, x: Tensor, feed: Feed, cache: tuple[Tensor, Tensor], only: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [B, T, C] -> the same after this layer. With `only` [B] just that token of each row is computed, [B, C]: from all
        others a last layer needs only keys and values."""
        out, cache = self.attn(self.attn_norm(x), feed, cache, only)
        x = (x if only is None else ops.take_token(x, only)) + out
        return x + self.mlp(self.mlp_norm(x)), cache


class CrossBlock(nn.Module):
    """One layer that attends to images. `cross_gate` switches it off for tokens that see none; the learned gates are
    stored as the numbers that they multiply with (tanh taken)."""

    def __init__(self, config: TextConfig, quant: str, ranks: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = CrossAttention(config, quant, ranks)
        self.attn_gate = empty_parameter(1)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Mlp(config, quant, ranks)
        self.mlp_gate = empty_parameter(1)

    def forward(self, x: Tensor, feed: Feed, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
        gate = feed["cross_gate"]  # [B, T, 2]
        out = self.attn(self.attn_norm(x), keys, values, feed["cross_mask"])
        x = x + out * (gate[:, :, :1] * self.attn_gate)
        return x + self.mlp(self.mlp_norm(x)) * (gate[:, :, 1:] * self.mlp_gate)


class Decoder(nn.Module):
    """Embedding, blocks, final norm and head, or one stage's part of them. With `images` = 0 there are no cross-attention
    layers."""

    def __init__(self, config: TextConfig, quant: str, images: int, ranks: int = 1) -> None:
        super().__init__()
        self.images, stage = images, config.stage
        if stage.first:
            self.embed = Table(config.all_embed_rows, config.hidden_size, ranks=ranks)
        layers = text_quant(quant)
        # A dictionary, so that a layer keeps its number where others are left out.
        self.layers = nn.ModuleDict()
        for i in config.stage_layers:
            if i not in config.cross_layers:
                self.layers[str(i)] = Block(config, layers, ranks)
            elif images:
                self.layers[str(i)] = CrossBlock(config, layers, ranks)
        if stage.last:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            head = head_quant(quant)
            self.lm_head = GatheredColumnLinear(config.hidden_size, config.vocab_size, bias=False, quant=head, ranks=ranks)

    def blocks(self, x: Tensor, feed: Feed) -> tuple[Tensor, list[Tensor]]:
        """x [B, T, C] -> (x, updated caches k_0, v_0, k_1, ...).

        Where one token of each row needs logits (`last_index`), a last layer that attends to no images computes all but its
        keys and values for that token alone, and x is [B, C].
        """
        updated: list[Tensor] = []
        cross = 0
        last = [*self.layers.values()][-1]
        for layer in self.layers.values():
            if isinstance(layer, CrossBlock):
                keys, values = ([feed[f"cross_{which}.{cross}.{j}"] for j in range(self.images)] for which in "kv")
                x = layer(x, feed, keys, values)
                cross += 1
            else:
                i = len(updated) // 2
                only = feed.get("last_index") if layer is last else None
                x, cache = layer(x, feed, (feed[f"k_cache.{i}"], feed[f"v_cache.{i}"]), only)
                updated += cache
        return x, updated

    def logits(self, x: Tensor) -> Tensor:
        """x [B, C] -> [B, V]."""
        return self.lm_head(self.norm(x))


class TextGraph(nn.Module):
    """Tokens in, logits [B, V] and updated caches out: a chunk of one sequence (prefill), or one token of each of B (decode).
    For T drafted tokens of one sequence (verify) there are logits [T, V], one row for each. With
    `candidates` top-k tokens of each row follow the logits (ops.top_tokens).
    The stages of a pipeline pass on hidden states, `hidden` [B, T, C].

    `inputs` names the tensors that forward takes, in order; they depend on the graph (see docs/artifact.md).
    For a model sharded over `ranks` it is the graph of one rank, the same for all: caches of its kv heads, logits of all rows.
    """

    def __init__(
        self, config: TextConfig, quant: str, inputs: Sequence[str], images: int, ranks: int = 1, candidates: int = 0
    ) -> None:
        super().__init__()
        self.inputs, self.stage, self.candidates = tuple(inputs), config.stage, candidates
        self.text = Decoder(config, quant, images, ranks)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        feed = dict(zip(self.inputs, tensors, strict=True))
        x = self.text.embed(feed["token_ids"]) if self.stage.first else feed["hidden"]
        if "row_index" in feed:
            x = ops.merge_rows(x, feed["image_rows"], feed["row_index"])
        x, updated = self.text.blocks(x, feed)
        if not self.stage.last:
            return x, *updated
        if x.dim() == 3:  # else the last layer has left one token of each row
            x = ops.take_token(x, feed["last_index"]) if "last_index" in feed else x.flatten(0, 1)
        logits = self.text.logits(x)
        if not self.candidates:
            return logits, *updated
        return logits, *ops.top_tokens(logits, feed["inverse_temperature"], self.candidates), *updated
