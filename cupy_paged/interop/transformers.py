"""Models of Hugging Face transformers that attend by `paged_attention`, from a `PagedCache`.

    import cupy_paged.interop.transformers as paged  # registers attn_implementation="cupy_paged"

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="cupy_paged")
    cache = paged.PagedCache(model.config, num_blocks=1024)
    model.generate(**inputs, past_key_values=cache)

For decoder-only models whose layers all have full causal attention, as Llama's and Qwen's, on the
device of the model, with transformers 5.4 or newer. A `PagedCache` is a `Cache` of transformers:

- A row of the batch is a sequence. It has the tokens that the attention mask shows, and no others:
  padding takes no memory, wherever it stands. What the mask hides later must be the last tokens of
  a row, as the padding after an end-of-text token is; they are taken back.
- Rows begin alike where one is made from another: by `reorder_cache` in beam search, by
  `batch_repeat_interleave` for several samples of a prompt that was computed once, or by
  `copy.deepcopy` of the cache. They share their blocks, and a shared last block is copied where
  rows part. (Rows that `generate` has made from one prompt are computed each for itself.)
- Memory for `num_blocks` blocks is taken with the first tokens, on their device, and kept for as
  long as the cache or one of its copies lives. Blocks are given out as rows grow, and taken back by
  `crop`, `reset` and the end of the cache. Where too few are left, a step raises OutOfBlocks or
  NeverFits; the cache then is as it was.

Costs: the first tokens of a batch attend by torch's scaled_dot_product_attention, to each other;
where some are padding, with a mask of rows * columns * columns bytes.
After that a token is a row of `paged_attention`, which reads all before it from the cache: one in
a step when decoding, but as many as there are in what continues a cache, be it a next turn or a
chunk of a prompt. Each step reads the attention mask on the host, and waits for it.

No gradient flows through the attention: a model in training is refused one, and with model.eval()
and without torch.no_grad(), backward is a RuntimeError. The bookkeeping is on the host: a model in
torch.compile has graph breaks around it, and gives the same tokens. Sliding windows, chunks, soft
caps, sinks, biases, dropout, packed sequences, 4-d masks, attention weights as output and
cross-attention are errors.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any, NamedTuple

import numpy as np

try:
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedConfig
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import causal_mask_function
except ImportError as error:
    raise ImportError(
        "cupy_paged.interop.transformers needs torch, and transformers 5.4 or newer "
        f'({error}): pip install "cupy-paged[transformers]"'
    ) from error

from cupy_paged import checks
from cupy_paged.batches import Batch
from cupy_paged.cache_memory import storage_dtype
from cupy_paged.graph_breaks import breaks_graphs
from cupy_paged.interop.no_gradient import without_gradient
from cupy_paged.kv_cache import PagedKVCache
from cupy_paged.sequences import Sequence

NAME = "cupy_paged"
"""The attn_implementation that models are given."""

# What models of transformers tell an attention function beside its scale, and ours cannot do.
_UNSUPPORTED = (
    "sliding_window", "softcap", "s_aux", "position_bias", "indices", "block_indices",
    "cu_seq_lens_q", "cu_seq_lens_k",
)  # fmt: skip


class _Step(NamedTuple):
    """One forward pass, from its first layer to its last.

    batch          the sequences, and where the new tokens go
    shown          bool [rows, columns], on the host: the columns before, and the new ones
    new_tokens     int64, which of rows * new columns are tokens; None where all are
    prompt_mask    bool [rows, 1, new columns, new columns], who attends to whom; None: causal
    is_prompt      whether nothing was cached before
    layers         those that are done
    """

    batch: Batch
    shown: np.ndarray
    new_tokens: torch.Tensor | None
    prompt_mask: torch.Tensor | None
    is_prompt: bool
    layers: set[int]


@breaks_graphs
class PagedCache(Cache):
    """The keys and values of a batch, in blocks of a `PagedKVCache`; the module says more.

    config        of the model, whose attn_implementation is "cupy_paged"
    num_blocks    blocks of `block_size` tokens; `python -m cupy_paged size` says how many fit
    dtype         of the cache, as in `PagedKVCache`; that of the model if None
    block_size, layout, k_scale, v_scale, poison
                  as in `PagedKVCache`. k_scale and v_scale are for an fp8 cache

    Raises ValueError for a model whose attention is not full and causal in each layer, and for a
    dtype that no cache can hold.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        num_blocks: int,
        *,
        block_size: int = 16,
        layout: str = "HND",
        dtype: str | None = None,
        k_scale: Any = 1.0,
        v_scale: Any = 1.0,
        poison: bool = False,
    ) -> None:
        super().__init__(layers=[])  # what a layer of transformers does is done for all at once
        config = config.get_text_config(decoder=True)
        _check_config(config)
        self._num_layers = config.num_hidden_layers
        self._num_blocks = checks.is_int(num_blocks, "num_blocks", 1)
        if dtype is not None:
            storage_dtype(dtype)
        self._options = {
            "block_size": block_size, "layout": layout, "dtype": dtype, "k_scale": k_scale,
            "v_scale": v_scale, "poison": poison,
        }  # fmt: skip
        self._kv: PagedKVCache | None = None
        self._rows: list[Sequence] = []
        self._shown = np.empty((0, 0), bool)  # of each row, which columns are its tokens
        self._step: _Step | None = None
        self._handed_out: int | None = None  # layer whose keys nobody has attended to yet

    # ---- a step ----

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same keys and values, marked for the attention function, which writes them.

        Raises RuntimeError where a model has attended to the last ones by another function.
        """
        if self._handed_out is not None:
            raise RuntimeError(
                f"attn_implementation: layer {self._take_up()} has not attended to its PagedCache, "
                f'needs to be "{NAME}": model.set_attn_implementation("{NAME}")'
            )
        if layer_idx >= self._num_layers:
            raise ValueError(
                f"config: the cache was made for {self._num_layers} layers, and this is layer "
                f"{layer_idx}: needs the config of the model"
            )
        self._handed_out = layer_idx
        key = key_states.view_as(key_states)  # a tensor of its own, to be marked
        key.paged_cache = self
        return key, value_states

    def _take_up(self) -> int:
        """The layer whose keys are handed out: they are taken up."""
        layer, self._handed_out = self._handed_out, None
        return layer

    def attend(
        self,
        module: torch.nn.Module,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
    ) -> torch.Tensor:
        """Writes the new tokens into a layer, and attends from them; for the attention function.

        query         [rows, num_heads, columns, head_size]
        key, value    [rows, num_kv_heads, columns, head_size]
        mask          bool [rows, columns before and new], on any device; None shows all

        Returns [rows, columns, num_heads, head_size]; zeros or anything finite for padding.
        """
        try:
            if self._step is None or layer in self._step.layers:
                self._begin(query, key, mask)
            step = self._step
            tokens = (_as_tokens(x, step.new_tokens) for x in (key, value))
            self._kv.write(layer, *tokens, step.batch)
            if step.is_prompt:
                out, _ = sdpa_attention_forward(
                    module, query, key, value, step.prompt_mask, scaling=scale
                )
            else:
                rows = _as_tokens(query, step.new_tokens)
                out = _from_tokens(
                    self._kv.attend(layer, rows, step.batch, scale=scale), step.new_tokens, query
                )
        except BaseException:
            self._settle(self._shown)
            raise
        step.layers.add(layer)
        if len(step.layers) == self._num_layers:
            self._shown, self._step = step.shown, None
        return out

    def _begin(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Makes room for the tokens of a new step; one that was broken off is forgotten."""
        num_rows, _, num_new, _ = query.shape
        before = self._shown.shape[1]
        is_prompt = not before
        shown = _on_host(mask, num_rows, before + num_new)
        self._settle(self._shown)
        if self._kv is None:
            self._kv = self._make(key)
        if is_prompt:
            self._rows.extend(self._kv.add() for _ in range(num_rows))
        elif num_rows != len(self._rows):
            raise ValueError(
                f"past_key_values: has {len(self._rows)} rows, the batch {num_rows}; "
                "batch_repeat_interleave makes several of each"
            )
        else:
            self._settle(self._still_shown(shown[:, :before]))
        new = shown[:, before:]
        for row, count in zip(self._rows, new.sum(axis=1).tolist(), strict=True):
            self._kv.append(row, count=count)
        batch = self._kv.batch(self._rows, each_token=not is_prompt)
        new_tokens = prompt_mask = None
        if not new.all():
            new_tokens = torch.from_numpy(np.flatnonzero(new)).to(query.device)
            if is_prompt:
                prompt_mask = _prompt_mask(torch.from_numpy(new).to(query.device))
        self._step = _Step(batch, shown, new_tokens, prompt_mask, is_prompt, set())

    def _make(self, key: torch.Tensor) -> PagedKVCache:
        _, num_kv_heads, _, head_size = key.shape
        kv = PagedKVCache(
            self._num_layers, self._num_blocks, num_kv_heads=num_kv_heads, head_size=head_size,
            like=key, prefix_caching=False, **self._options,
        )  # fmt: skip
        self._free_at_the_end(kv)
        return kv

    def _still_shown(self, shown: np.ndarray) -> np.ndarray:
        """What a mask shows of the cached columns, where that can be had."""
        last = np.cumsum(self._shown, axis=1) > shown.sum(axis=1, keepdims=True)
        wrong = np.argwhere(shown != (self._shown & ~last))
        if len(wrong):
            row, column = wrong[0].tolist()
            raise ValueError(
                f"attention_mask: does not fit the cache from row {row}, column {column} on; it "
                "needs to show what was shown before, but for the last tokens of a row"
            )
        return shown

    def _settle(self, shown: np.ndarray) -> None:
        """Gives each row the tokens that `shown` has, which are its first ones."""
        self._shown, self._step = shown, None
        if not shown.shape[1]:
            self._free()  # the next batch may have more rows, or fewer
        for row, count in zip(self._rows, shown.sum(axis=1).tolist(), strict=bool(self._rows)):
            if len(row) != count:
                self._kv.truncate(row, count)

    # ---- what generate asks of a cache ----

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the batch that were seen, padding included."""
        return self._shown.shape[1]

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns that an attention mask has, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: a row may have as many tokens as there are blocks."""
        return -1

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Puts row beam_idx[i] in place of row i, with the blocks that it has."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Makes several of each row, which share all that there is."""
        self._select(np.repeat(np.arange(len(self._rows)), repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps some rows, by their numbers or a mask; more of one share its blocks."""
        if self._rows:
            self._select(np.arange(len(self._rows))[indices.cpu().numpy()])

    def _select(self, indices: np.ndarray) -> None:
        self._settle(self._shown)
        before = self._rows[:]
        kept: set[Sequence] = set()
        self._rows.clear()
        for row in (before[i] for i in indices):
            self._rows.append(self._kv.fork(row) if row in kept else row)
            kept.add(row)
        for row in before:
            if row not in kept:
                self._kv.free(row)
        self._shown = self._shown[indices]

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last columns: so many if negative, all but so many if positive.

        Nothing for 0, as newer versions of transformers have it.
        """
        if tokens_to_remove:
            self._settle(self._shown[:, :tokens_to_remove])

    def reset(self) -> None:
        """Takes back all; the memory stays for what comes next."""
        self._handed_out = None
        self._settle(self._shown[:, :0])

    def _free(self) -> None:
        while self._rows:
            self._kv.free(self._rows.pop())

    def _free_at_the_end(self, kv: PagedKVCache) -> None:
        # Copies may go on with the same blocks. At the end of the process all goes anyway.
        weakref.finalize(self, kv.free_when_idle, self._rows).atexit = False

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        """A cache that has the same tokens, in the same blocks until one of the two goes on."""
        self._settle(self._shown)
        twin = copy.copy(self)
        twin._rows = [self._kv.fork(row) for row in self._rows]
        if self._kv is not None:
            twin._free_at_the_end(self._kv)
        return twin

    # ---- what there is ----

    @property
    def kv_cache(self) -> PagedKVCache | None:
        """The blocks and who has them; None before the first tokens."""
        return self._kv

    @property
    def sequences(self) -> list[Sequence]:
        """The rows of the batch, as sequences of `kv_cache`."""
        return self._rows[:]

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first tokens."""
        return len(self._rows) or -1

    @property
    def is_initialized(self) -> bool:
        """Whether the memory is taken."""
        return self._kv is not None

    def __len__(self) -> int:
        return self._num_layers

    def __repr__(self) -> str:
        used = self._kv.num_used if self._kv else 0
        rows, columns = self._shown.shape
        return (
            f"<PagedCache of {rows} rows and {columns} columns, "
            f"{used} of {self._num_blocks} blocks used>"
        )


@breaks_graphs
def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    output_attentions: bool | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function "cupy_paged" of transformers, for keys that a `PagedCache` has marked.

    Raises ValueError for what the ops cannot do, TypeError for a cache that is no `PagedCache`. To
    go back through what it returns is a RuntimeError.
    """
    cache = getattr(key, "paged_cache", None)
    if cache is None:
        raise TypeError(f'past_key_values: is no PagedCache, "{NAME}" needs one')
    layer = cache._take_up()
    for name in _UNSUPPORTED:
        if options.get(name) is not None:
            raise ValueError(f'{name}: the model has it, "{NAME}" has not')
    if module.training and query.requires_grad:
        raise ValueError(
            "query: needs a gradient, and none flows through a PagedCache; inference needs "
            "model.eval() and torch.no_grad()"
        )
    if dropout:
        raise ValueError(f"dropout: got {dropout}, needs 0.0: model.eval()")
    if output_attentions:
        raise ValueError(f'output_attentions: "{NAME}" computes no weights, "eager" does')
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(f'is_causal: got False, "{NAME}" attends to what came before alone')
    with torch.no_grad():
        out = cache.attend(module, layer, query, key, value, attention_mask, scaling)
    return without_gradient("a PagedCache", out, (query, key, value)), None


@breaks_graphs
def causal_mask(
    *, mask_function: Any, attention_mask: torch.Tensor | None = None, **options: Any
) -> torch.Tensor | None:
    """The mask function "cupy_paged" of transformers: the 2-d mask of what is no padding.

    Raises ValueError for a mask that does more than to hide what is to come.
    """
    if mask_function is not causal_mask_function:
        raise ValueError(
            f'attention_mask: the model\'s is made by {mask_function.__qualname__}, "{NAME}" has '
            "causal ones alone"
        )
    return attention_mask


def _check_config(config: PreTrainedConfig) -> None:
    if config.is_encoder_decoder:
        raise ValueError("config: is of an encoder and a decoder, needs a decoder alone")
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        for name in ("sliding_window", "attention_chunk_size"):
            if getattr(config, name, None) is not None:
                raise ValueError(f"config: has {name} {getattr(config, name)}, needs None")
    elif others := sorted(set(kinds) - {"full_attention"}):
        raise ValueError(f"config: has layers of {', '.join(others)}, needs full_attention alone")
    if getattr(config, "num_kv_shared_layers", None):
        raise ValueError(f"config: has num_kv_shared_layers {config.num_kv_shared_layers}, needs 0")


def _on_host(mask: torch.Tensor | None, num_rows: int, num_columns: int) -> np.ndarray:
    """bool [num_rows, num_columns], a copy."""
    if mask is None:
        return np.ones((num_rows, num_columns), bool)
    if mask.ndim != 2:
        raise ValueError(
            f"attention_mask: has {mask.ndim} dimensions, needs 2: [rows, columns], where padding "
            "is 0"
        )
    if mask.shape != (num_rows, num_columns):
        raise ValueError(
            f"attention_mask: shape {tuple(mask.shape)}, needs {(num_rows, num_columns)}: all "
            "columns that the cache has, and the new ones"
        )
    return mask.cpu().numpy().astype(bool)


def _prompt_mask(is_token: torch.Tensor) -> torch.Tensor:
    """Who attends to whom in a prompt; padding to itself as well, for its softmax to have a sum."""
    num_columns = is_token.shape[1]
    ones = torch.ones(num_columns, num_columns, dtype=torch.bool, device=is_token.device)
    itself = torch.eye(num_columns, dtype=torch.bool, device=is_token.device)
    return is_token[:, None, None] & ones.tril() | itself


def _as_tokens(x: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
    """[rows, heads, columns, head_size] -> [tokens, heads, head_size], row by row."""
    _, num_heads, _, head_size = x.shape
    flat = x.transpose(1, 2).reshape(-1, num_heads, head_size)
    return flat if tokens is None else flat[tokens]


def _from_tokens(
    out: torch.Tensor, tokens: torch.Tensor | None, query: torch.Tensor
) -> torch.Tensor:
    """[tokens, heads, head_size] -> [rows, columns, heads, head_size], 0 where no token is."""
    num_rows, num_heads, num_columns, head_size = query.shape
    if tokens is not None:
        flat = out.new_zeros(num_rows * num_columns, num_heads, head_size)
        flat[tokens] = out
        out = flat
    return out.view(num_rows, num_columns, num_heads, head_size)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, causal_mask)
