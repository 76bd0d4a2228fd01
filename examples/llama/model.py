"""A Llama-architecture decoder in plain array code: CuPy and NumPy run the same lines."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cupy_paged import PagedKVCache
from cupy_paged.batches import Batch

from .checkpoint import Checkpoint

Array = Any
"""A `numpy.ndarray` or a `cupy.ndarray`, as the model's `xp` makes them."""


class Config(NamedTuple):
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    context_length: int
    norm_epsilon: float

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Config:
        architecture = checkpoint.get("general.architecture")
        if architecture != "llama":
            raise ValueError(f"model: architecture {architecture!r}; this program runs 'llama'")
        num_heads = checkpoint.get("llama.attention.head_count")
        hidden_size = checkpoint.get("llama.embedding_length")
        return cls(
            num_layers=checkpoint.get("llama.block_count"),
            num_heads=num_heads,
            num_kv_heads=checkpoint.get("llama.attention.head_count_kv", num_heads),
            head_size=checkpoint.get("llama.attention.key_length", hidden_size // num_heads),
            hidden_size=hidden_size,
            context_length=checkpoint.get("llama.context_length"),
            norm_epsilon=checkpoint.get("llama.attention.layer_norm_rms_epsilon"),
        )


class Layer(NamedTuple):
    """One decoder layer; matrices are [in_features, out_features]."""

    attn_norm: Array
    qkv: Array
    attn_output: Array
    ffn_norm: Array
    gate_up: Array
    down: Array


class Llama:
    """The weights of a checkpoint on `xp`'s device, and the step that runs them."""

    def __init__(self, checkpoint: Checkpoint, xp: Any = np, dtype: str = "float32") -> None:
        self.xp = xp
        self.dtype = dtype
        self.config = config = Config.of(checkpoint)

        def matrix(*names: str) -> Array:
            # One product instead of several: their rows are stacked.
            stacked = np.concatenate([checkpoint.tensor(name + ".weight") for name in names])
            return xp.asarray(stacked.astype(dtype)).T

        def vector(name: str) -> Array:
            return xp.asarray(checkpoint.tensor(name + ".weight"))

        self.layers = [
            Layer(
                attn_norm=vector(f"blk.{i}.attn_norm"),
                qkv=matrix(f"blk.{i}.attn_q", f"blk.{i}.attn_k", f"blk.{i}.attn_v"),
                attn_output=matrix(f"blk.{i}.attn_output"),
                ffn_norm=vector(f"blk.{i}.ffn_norm"),
                gate_up=matrix(f"blk.{i}.ffn_gate", f"blk.{i}.ffn_up"),
                down=matrix(f"blk.{i}.ffn_down"),
            )
            for i in range(config.num_layers)
        ]
        self.output_norm = vector("output_norm")
        embedding = matrix("token_embd")
        self.embedding = embedding.T
        # Without an output matrix the embedding is tied: it serves at both ends.
        self.output = matrix("output") if checkpoint.has("output.weight") else embedding
        self.inverse_frequencies = xp.asarray(_inverse_frequencies(checkpoint, config.head_size))
        if unread := checkpoint.unread():
            raise ValueError(f"model: tensors that this program knows no use for: {unread[:5]}")

    def new_cache(
        self, num_blocks: int, block_size: int = 16, layout: str = "HND", **options: Any
    ) -> PagedKVCache:
        c = self.config
        return PagedKVCache(
            c.num_layers, num_blocks, num_kv_heads=c.num_kv_heads, head_size=c.head_size,
            block_size=block_size, layout=layout, like=self.xp.empty(0, self.dtype), **options,
        )  # fmt: skip

    def step(self, batch: Batch, cache: PagedKVCache, wanted: np.ndarray) -> Array:
        """Logits of the `wanted` tokens of a batch that has a row for each token.

        float32 [len(wanted), vocab_size]. The keys and values of all join the cache.
        """
        xp, c = self.xp, self.config
        num_rows = len(batch.token_ids)
        angles = batch.positions[:, None, None] * self.inverse_frequencies
        cos, sin = xp.cos(angles).astype(np.float32), xp.sin(angles).astype(np.float32)
        # The residual stream stays float32: it outgrows float16 in some models.
        x = self.embedding[batch.token_ids].astype(np.float32)
        for number, layer in enumerate(self.layers):
            heads = self._norm(x, layer.attn_norm) @ layer.qkv
            heads = heads.reshape(num_rows, -1, c.head_size)
            value = heads[:, c.num_heads + c.num_kv_heads :]
            heads = _rotate(xp, heads[:, : c.num_heads + c.num_kv_heads], cos, sin)
            query, key = heads[:, : c.num_heads], heads[:, c.num_heads :]
            cache.write(number, key, value, batch)
            attended = cache.attend(number, query, batch)
            x = x + attended.reshape(num_rows, -1) @ layer.attn_output
            gate_up = self._norm(x, layer.ffn_norm) @ layer.gate_up
            gate, up = xp.split(gate_up.astype(np.float32, copy=False), 2, axis=-1)
            # gate * sigmoid(gate), in a form whose exponential cannot overflow
            hidden = gate * (0.5 + 0.5 * xp.tanh(0.5 * gate)) * up
            x = x + hidden.astype(self.dtype, copy=False) @ layer.down
        x = self._norm(x[xp.asarray(wanted)], self.output_norm)
        return (x @ self.output).astype(np.float32, copy=False)

    def _norm(self, x: Array, weight: Array) -> Array:
        mean_square = (x * x).mean(axis=-1, keepdims=True)
        normed = x / self.xp.sqrt(mean_square + np.float32(self.config.norm_epsilon)) * weight
        return normed.astype(self.dtype, copy=False)


def _rotate(xp: Any, heads: Array, cos: Array, sin: Array) -> Array:
    # GGUF stores the rows of q and k so that the two coordinates of a rotation are neighbours.
    even, odd = heads[..., 0::2], heads[..., 1::2]
    rotated = xp.empty_like(heads)
    rotated[..., 0::2] = even * cos - odd * sin
    rotated[..., 1::2] = even * sin + odd * cos
    return rotated


def _inverse_frequencies(checkpoint: Checkpoint, head_size: int) -> np.ndarray:
    """Radians a position for each pair of coordinates, float64 [head_size / 2]."""
    scaling = checkpoint.get("llama.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise ValueError(f"model: rope scaling {scaling!r}; this program knows 'linear'")
    rotated = checkpoint.get("llama.rope.dimension_count", head_size)
    base = checkpoint.get("llama.rope.freq_base", 10000.0)
    frequencies = np.zeros(head_size // 2)  # a pair that is not rotated turns by nothing
    frequencies[: rotated // 2] = base ** (-np.arange(0, rotated, 2) / rotated)
    if scaling == "linear":
        frequencies /= checkpoint.get("llama.rope.scaling.factor")
    if checkpoint.has("rope_freqs.weight"):  # Llama 3.1's long-context factors
        frequencies[: rotated // 2] /= checkpoint.tensor("rope_freqs.weight")
    return frequencies
