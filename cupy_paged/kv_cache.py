"""`PagedKVCache`: the key and value arrays of every layer, and the sequences that live in them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Hashable, Iterable
from typing import Any, NoReturn

import numpy as np

from cupy_paged import cache_picture, checks, gpu
from cupy_paged.arrays import HOST, array
from cupy_paged.attention import paged_attention
from cupy_paged.batches import Batch, Buffers, on_host
from cupy_paged.block_ops import copy_blocks
from cupy_paged.cache_memory import CacheMemory
from cupy_paged.cache_ops import reshape_and_cache, reshape_and_cache_flash
from cupy_paged.cache_options import dtype_of, leader_of, scales_of
from cupy_paged.dtypes import FLOATS
from cupy_paged.graph_breaks import breaks_graphs
from cupy_paged.host_copies import HostCopies
from cupy_paged.one_thread import Turn, one_thread, two_threads
from cupy_paged.sequences import Sequence, SequencePool, Statistics
from cupy_paged.streams import held_stream

_SMALLEST_BUFFERS = 16
_NONE = np.empty(0, np.int64)
_GIVEN_BY_ATTEND = {
    "key_cache": "cache", "value_cache": "cache", "layout": "cache", "kv_cache_dtype": "cache",
    "k_scale": "cache", "v_scale": "cache", "block_tables": "batch", "seq_lens": "batch",
}  # fmt: skip
"""Arguments of `paged_attention`, and whose they are."""


@breaks_graphs
class PagedKVCache:
    """A paged cache of keys and values: arrays of all layers, one pool of blocks, its sequences.

    >>> import numpy as np
    >>> cache = PagedKVCache(1, 64, num_kv_heads=2, head_size=8, dtype="float32", framework="numpy")
    >>> prompt = cache.add(range(20))
    >>> batch = cache.batch([prompt])
    >>> key = value = np.ones((20, 2, 8), np.float32)
    >>> cache.write(0, key, value, batch)
    >>> cache.attend(0, np.ones((1, 4, 8), np.float32), batch).shape
    (1, 4, 8)

    num_layers       layers of the model; block 7 is block 7 in each of them
    num_blocks       blocks of `block_size` tokens; `python -m cupy_paged size` says how many fit
    dtype            "float16", "bfloat16", "float32", or NumPy's or torch's dtype of that name, or
                     "fp8" = "fp8_e4m3", "fp8_e5m2", in uint8 arrays; that of `like` if None
    layout           "vllm", "HND" or "NHD" (see cupy_paged.layouts)
    like             an array: the cache is in its framework and on its device
    framework        "numpy", "cupy" or "torch", on `device`, where `like` is not given
    device           device number for CuPy, anything torch.device takes for torch
    k_scale,         what a cached 1.0 stands for in fp8: a number or one-element float32 array, or
    v_scale          a list with one for each layer
    max_num_seqs,    most rows of a batch (with `each_token` each token has one), most tokens of a
    max_num_tokens,  batch, and most tokens of a sequence (rounded up to whole blocks). With all
    max_seq_len      three, the arrays of batches keep their addresses, as CUDA graphs need it;
                     otherwise they move when they are outgrown
    prefix_caching   whether full blocks are found again by their tokens, see `add`
    num_host_blocks  blocks on the host, to which sequences can be moved, see `offload`. They take
                     `block_bytes` each, of pinned memory where the cache is on a GPU. To give that
                     back, when the cache is no more, CUDA waits for the device
    poison           a means of testing: what is dead is NaN, so that reading it shows

    A step: `append` what is to be computed, take a `batch`, `write` and `attend` in each layer.
    JAX arrays are immutable and cannot hold a cache, but keys, values and queries may be JAX's over
    a cache of CuPy's, or torch's: `write` and `attend` run on their framework's stream.

    One thread at a time: calls that overlap are a RuntimeError. Threads that take turns need a lock
    of yours, held from `batch` to `commit`, or to the last `attend`. A cache can be neither copied
    nor pickled.

    Raises ValueError or TypeError for what does not fit together.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        *,
        num_kv_heads: int,
        head_size: int,
        block_size: int = 16,
        dtype: Any = None,
        layout: str = "HND",
        like: Any = None,
        framework: str | None = None,
        device: Any = None,
        k_scale: Any = 1.0,
        v_scale: Any = 1.0,
        max_num_seqs: int | None = None,
        max_num_tokens: int | None = None,
        max_seq_len: int | None = None,
        prefix_caching: bool = True,
        num_host_blocks: int = 0,
        poison: bool = False,
    ) -> None:
        sizes = {
            "num_layers": num_layers, "num_blocks": num_blocks, "num_kv_heads": num_kv_heads,
            "head_size": head_size, "block_size": block_size,
        }  # fmt: skip
        for name, size in sizes.items():
            checks.is_int(size, name, 1)
        bounds = {
            "max_num_seqs": max_num_seqs, "max_num_tokens": max_num_tokens,
            "max_seq_len": max_seq_len,
        }  # fmt: skip
        for name, bound in bounds.items():
            if bound is not None:
                checks.is_int(bound, name, 1)
        checks.is_int(num_host_blocks, "num_host_blocks", 0)
        self._turn = Turn()
        self._leader = leader_of(like, framework, device)
        self.dtype = dtype_of(dtype, self._leader, framework)
        self.layout = layout
        self.num_layers, self.num_blocks = num_layers, num_blocks
        self.num_kv_heads, self.head_size, self.block_size = num_kv_heads, head_size, block_size
        self.num_host_blocks = num_host_blocks
        self._scales = list(
            zip(
                scales_of(k_scale, "k_scale", num_layers, self._leader),
                scales_of(v_scale, "v_scale", num_layers, self._leader),
                strict=True,
            )
        )
        self._memory = CacheMemory(
            self._leader, num_layers, layout, num_blocks, self.dtype, num_kv_heads=num_kv_heads,
            head_size=head_size, block_size=block_size,
        )  # fmt: skip
        self.key_caches = self._memory.key_caches
        self.value_caches = self._memory.value_caches
        if poison:
            self._memory.fill_with_nan(..., self._stream())
        self._host: HostCopies | None = None
        if num_host_blocks:
            self._host = HostCopies(self._memory.whole, num_host_blocks)

        max_blocks = None if max_seq_len is None else -(-max_seq_len // block_size)
        self.pool = SequencePool(
            num_blocks, block_size, max_blocks=max_blocks, copy=_weakly(self._copy_later),
            copy_out=_weakly(self._copy_out), copy_in=_weakly(self._copy_in),
            dead=_weakly(self._poison) if poison else _nothing, prefix_caching=prefix_caching,
            num_host_blocks=num_host_blocks,
        )  # fmt: skip
        self._max_num_seqs, self._max_num_tokens = max_num_seqs, max_num_tokens
        self._max_seq_len = None if max_blocks is None else self.pool.max_blocks * block_size
        self._buffers: Buffers | None = None
        self._batch: Batch | None = None
        self._num_taken_back = 0  # by the pool, when the batch was taken
        self._layers_written: set[int] = set()
        self._is_committed = False
        self._copies: dict[int, int] = {}  # destination -> source
        self._copied: set[int] = set()
        self._last: tuple[int, Any] | None = None  # stream of a batch or a write, and its owner

    # ---- sequences ----

    @one_thread
    def add(self, tokens: Iterable[int] = (), *, count: int = 0, salt: Hashable = None) -> Sequence:
        """A new sequence, with room for its tokens.

        tokens    token ids; the full blocks with which they begin are shared where a written
                  sequence began with the same (`Sequence.num_cached` tokens need no computing)
        count     so many tokens more, of ids that are not known: they are never shared
        salt      any hashable value; sequences share only where it is the same. Give it what
                  changes keys and values beside the tokens: an adapter's name, say

        Raises OutOfBlocks where the blocks are not there now, NeverFits where they never will be;
        then nothing has changed.
        """
        return self.pool.add(tokens, count=count, salt=salt)

    @one_thread
    def append(self, sequence: Sequence, tokens: Iterable[int] = (), *, count: int = 0) -> None:
        """Room for more tokens at the end of a sequence; arguments and errors as of `add`."""
        self.pool.append(sequence, tokens, count=count)

    @one_thread
    def fork(self, sequence: Sequence) -> Sequence:
        """A second sequence with the same tokens, in the same blocks until one of the two goes on.

        Raises ValueError where tokens of the sequence are still to be written.
        """
        return self.pool.fork(sequence)

    @one_thread
    def truncate(self, sequence: Sequence, num_tokens: int) -> None:
        """Takes back all but the first `num_tokens` tokens."""
        self.pool.truncate(sequence, num_tokens)

    @one_thread
    def free(self, sequence: Sequence) -> None:
        """Ends a sequence. Its full blocks are kept to be found again while there is room.

        Raises ValueError for a sequence that was freed, or is another cache's.
        """
        self.pool.free(sequence)

    def free_when_idle(self, sequences: Collection[Sequence]) -> None:
        """As `free`, for finalizers, which any thread may run in the middle of anything.

        At once; or, where a method of the cache is running, before the next one begins that is
        neither `write` nor `attend`. What has been freed by then is left out.
        """
        pool = self.pool  # what is left to be done must not keep the cache

        def free_all() -> None:
            for sequence in sequences:
                if sequence in pool.sequences:
                    pool.free(sequence)

        self._turn.when_idle(free_all)

    @one_thread
    def offload(self, sequence: Sequence) -> None:
        """Moves a sequence to the host, and frees its blocks: it waits there for `restore`.

        What is written of it is copied, and what is pending stays so, with no room held for it.
        Sequences that begin alike share their full blocks on the host, too; blocks that others use
        on the device stay there for them. Until it is restored the sequence can be truncated and
        freed, and nothing else; a step that it is part of must be written, or given up.

        Nobody waits: the copies run on a stream of their own, after all that was queued on the
        stream of the last batch or write, and beside what is queued later. Only work that goes into
        one of the blocks that are being copied is queued behind them.

        Raises OutOfBlocks (of kind "host") where the host has no room now, NeverFits where it never
        will have; then nothing has changed. ValueError for a sequence that is offloaded already, or
        a cache without `num_host_blocks`; RuntimeError while a CUDA graph is being captured.
        """
        self._check_outside_of_capture("offload", *self._streams())
        self.pool.offload(sequence)

    @one_thread
    def restore(self, sequence: Sequence) -> None:
        """Brings an offloaded sequence back, into new blocks.

        Its full blocks that are in the cache still, or again, are shared; the others are copied,
        beside the steps, as in `offload`. Batches that use one of these blocks wait for the copies
        on their stream, others do not: restore a sequence some steps before it goes on, and nothing
        waits. The batch taken before is over then, so restore first, and take the batch after.

        Raises OutOfBlocks where the blocks are not there now; then nothing has changed. ValueError
        for a sequence that was not offloaded, RuntimeError while a CUDA graph is being captured.
        """
        self._check_outside_of_capture("restore", *self._streams())
        self.pool.restore(sequence)

    # ---- steps ----

    @one_thread
    def batch(
        self,
        sequences: Iterable[Sequence],
        *,
        each_token: bool = False,
        max_tokens: int | None = None,
        num_seqs: int | None = None,
        num_tokens: int | None = None,
        stream: Any = None,
    ) -> Batch:
        """The pending tokens of some sequences, and what attention has to know of them.

        each_token    a row for each token, which attends to all up to itself, as in a prompt;
                      otherwise a row for each sequence, which attends from its last token. Each
                      row is sent a block table of its own: compute long prompts in parts, by
                      `max_tokens`
        max_tokens    takes no more tokens than that, in order; the others stay pending
        num_seqs,     pads rows and tokens to so many, for a CUDA graph of a fixed size: padded
        num_tokens    rows have length 0, and padded tokens go nowhere
        stream        CUDA stream to send them on; by default the current one of the cache's
                      framework

        The arrays are the cache's own: each batch takes the place of the one before.
        Raises ValueError for a batch beyond `max_num_seqs` or `max_num_tokens` and for a sequence
        that is offloaded, RuntimeError while a CUDA graph is being captured.
        """
        if not isinstance(sequences, Iterable):
            got = type(sequences).__name__
            raise TypeError(f"sequences: got one {got}, needs a list of them, even of one")
        sequences = list(sequences)
        for sequence in sequences:
            self.pool.check_on_device(sequence)
        host = on_host(sequences, self.block_size, each_token, max_tokens, num_seqs, num_tokens)
        for name, got, most in (
            ("max_num_seqs", len(host.seq_lens), self._max_num_seqs),
            ("max_num_tokens", host.tokens.shape[1], self._max_num_tokens),
        ):
            if most is not None and got > most:
                raise ValueError(
                    f"{name}: the batch has {got}, the cache was made for {most}; needs fewer "
                    "sequences, or max_tokens"
                )
        held = held_stream(self.key_caches[0], stream)
        stream, _ = held
        self._check_outside_of_capture("batch", stream)
        self._copy_now(stream)
        written = host.tokens[0][host.tokens[0] >= 0] // self.block_size
        self._await_host_copies(stream, reads=host.blocks, writes=written)
        self._last = held
        if self._buffers is None or not self._buffers.fits(host):
            self._buffers = self._new_buffers(len(host.seq_lens), host.tokens.shape[1], stream)
        longest = self._max_seq_len or int(host.seq_lens.max(initial=1))
        self._batch = self._buffers.fill(host, longest, stream)
        self._layers_written.clear()
        self._is_committed = False
        self._num_taken_back = self.pool.num_taken_back
        return self._batch

    def write(self, layer: int, key: Any, value: Any, batch: Batch, *, stream: Any = None) -> None:
        """Puts the keys and values of a batch's tokens into one layer.

        key, value    [num_tokens, num_kv_heads, head_size], float16, bfloat16 or float32
        stream        CUDA stream to run on; by default the current one of key's framework

        After the last of the layers the batch counts as written, see `commit`. In a CUDA graph's
        capture it does not: nothing has run then. A sequence may be freed, truncated or offloaded
        before that: the others are written, and what goes into its slots is never found. A written
        batch may be written again, but not once that has happened to a sequence of it: ValueError.
        """
        turn = self._turn
        lock = turn.lock
        if not lock.acquire(False) and not turn.outlasts_finalizers():
            raise two_threads("write")
        try:
            turn.is_inside = True
            self._write(layer, key, value, batch, stream)
        finally:
            turn.is_inside = False
            lock.release()

    # Every layer calls `write` and `attend`: to decorate them would take three times as long.

    def _write(self, layer: int, key: Any, value: Any, batch: Batch, stream: Any) -> None:
        self._check_batch(layer, batch)
        if self._is_committed and self._num_taken_back != self.pool.num_taken_back:
            self._check_unchanged(batch)
        for name, rows in (("key", key), ("value", value)):
            _check_rows(name, rows, len(batch.slot_mapping), "tokens")
        key_cache, value_cache = self.key_caches[layer], self.value_caches[layer]
        arguments = (key, value, key_cache, value_cache, batch.slot_mapping, *self._storage(layer))
        try:
            if self.layout == "vllm":
                reshape_and_cache(*arguments, stream=stream)
            else:
                reshape_and_cache_flash(*arguments, layout=self.layout, stream=stream)
        except (TypeError, ValueError):
            self._check_beside_cache("key", key, "num_tokens")
            raise
        self._last = held_stream(key, stream)
        if not self._is_capturing(self._last[0]):
            self._layers_written.add(layer)
            if len(self._layers_written) == self.num_layers:
                self.commit(batch)

    def attend(self, layer: int, query: Any, batch: Batch, **options: Any) -> Any:
        """Attention of a batch's rows over one layer: `paged_attention`, and its options.

        query      [num_rows, num_heads, head_size]
        options    all but the cache's scales and layout, and the batch's tables and lengths

        `write` the layer first, or fill it by a writer of your own: what lies there is attended to.
        """
        turn = self._turn
        lock = turn.lock
        if not lock.acquire(False) and not turn.outlasts_finalizers():
            raise two_threads("attend")
        try:
            turn.is_inside = True
            return self._attend(layer, query, batch, options)
        finally:
            turn.is_inside = False
            lock.release()

    def _attend(self, layer: int, query: Any, batch: Batch, options: dict[str, Any]) -> Any:
        self._check_batch(layer, batch)
        for name in options:
            if name in _GIVEN_BY_ATTEND:
                whose = _GIVEN_BY_ATTEND[name]
                raise TypeError(f"{name}: is the {whose}'s own, needs to be left out")
        _check_rows("query", query, len(batch.seq_lens), "rows: each_token has one for each token")
        dtype, k_scale, v_scale = self._storage(layer)
        try:
            return paged_attention(
                query, self.key_caches[layer], self.value_caches[layer], batch.block_tables,
                batch.seq_lens, layout=self.layout, kv_cache_dtype=dtype, k_scale=k_scale,
                v_scale=v_scale, **{"max_seq_len": batch.max_seq_len, **options},
            )  # fmt: skip
        except (TypeError, ValueError):
            self._check_beside_cache("query", query, "num_rows")
            raise

    @one_thread
    def commit(self, batch: Batch) -> None:
        """Says that a batch is written in all layers: its tokens are pending no more.

        Only then can other sequences find its full blocks. `write` does this by itself; after the
        replay of a CUDA graph, or with writers of your own, call it: it believes that all layers
        were written, and what was not is found and read as if it were. A sequence that was freed,
        truncated or offloaded since is left out.

        Raises ValueError for a batch of another cache.
        """
        if batch is self._batch and batch is not None:
            self._is_committed = True
        else:
            self._check_is_ours(batch)
        for sequence, end, version in batch.ends:
            if sequence.pool is self.pool and sequence.version == version:
                self.pool.commit(sequence, end)

    # ---- what there is ----

    @property
    def sequences(self) -> list[Sequence]:
        """The live sequences, in the order of their adding."""
        return list(self.pool.sequences)

    @property
    def num_used(self) -> int:
        """Blocks that live sequences hold; a shared one counts once."""
        return self.pool.allocator.num_used

    @property
    def num_available(self) -> int:
        """Blocks that new tokens can have, those kept for later prefixes included."""
        return self.pool.allocator.num_available

    @property
    def num_host_available(self) -> int:
        """Blocks that the host has room for."""
        return self.pool.host.allocator.num_available if self.pool.host else 0

    @property
    def statistics(self) -> Statistics:
        """What prefix caching and offloading have done so far."""
        return self.pool.statistics

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers, keys and values."""
        return self._memory.block_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays of keys and values, without those on the host."""
        return self.num_blocks * self.block_bytes

    @property
    def place(self) -> str:
        """Framework and device, such as "torch on cuda:0"."""
        return f"{self._leader.framework} on {self._leader.place}"

    def __reduce__(self) -> NoReturn:
        raise TypeError("cache: can be neither copied nor pickled: it alone knows its blocks")

    def __repr__(self) -> str:
        return cache_picture.text(self)

    def _repr_html_(self) -> str:
        return cache_picture.html(self)

    # ---- arrays ----

    def _stream(self) -> int:
        return held_stream(self.key_caches[0], None)[0]

    def _is_capturing(self, stream: int) -> bool:
        device = self._leader.device
        return device is not HOST and gpu.is_capturing(device, stream)

    def _check_outside_of_capture(self, what: str, *streams: int) -> None:
        if any(map(self._is_capturing, streams)):
            raise RuntimeError(f"{what}: is done from the host, needs to be outside of the capture")

    def _storage(self, layer: int) -> tuple[str, Any, Any]:
        return (self.dtype, *self._scales[layer])

    def _new_buffers(self, num_rows: int, num_tokens: int, stream: int) -> Buffers:
        old = self._buffers
        grown = [
            max(_SMALLEST_BUFFERS, 1 << (needed - 1).bit_length(), before)
            for needed, before in (
                (num_rows, old.num_rows if old else 0),
                (num_tokens, old.num_tokens if old else 0),
                (max((len(s.blocks) for s in self.pool.sequences), default=0),
                 old.max_blocks if old else 0),
            )
        ]  # fmt: skip
        max_blocks = self.pool.max_blocks
        if self._max_seq_len is None:
            max_blocks = min(grown[2], max_blocks)
        return Buffers(
            self._leader,
            self._max_num_seqs or grown[0],
            self._max_num_tokens or grown[1],
            max_blocks,
            stream,
        )

    def _check_batch(self, layer: int, batch: Batch) -> None:
        if type(layer) is not int or not 0 <= layer < self.num_layers:  # is_int takes longer
            checks.is_int(layer, "layer", 0, self.num_layers - 1)
        if batch is not self._batch or batch is None:
            self._check_is_ours(batch)
            raise ValueError(
                "batch: is over; another one was taken since, or append, offload or restore had "
                "blocks copied; needs to be taken anew"
            )

    def _check_is_ours(self, batch: Any) -> None:
        if not isinstance(batch, Batch):
            raise TypeError(f"batch: got {type(batch).__name__}, needs what batch() has returned")
        for sequence, _, _ in batch.ends:
            if sequence.pool not in (self.pool, None):  # None: freed, and nobody's
                raise ValueError("batch: is another cache's, needs to be of this one's batch()")

    def _check_beside_cache(self, name: str, x: Any, of_what: str) -> None:
        """Raises where an op would name `key_cache`, which is no argument of the caller's."""
        given = array(x, name)
        checks.same_place([given], self._leader)
        if self.dtype in FLOATS and given.dtype in FLOATS and given.dtype != self.dtype:
            raise TypeError(f"{name}: dtype {given.dtype}, needs {self.dtype}, as the cache holds")
        _, num_heads, head_size = given.shape if len(given.shape) == 3 else (0, 0, 0)
        wanted, fits = str(self.num_kv_heads), num_heads == self.num_kv_heads
        if name == "query":
            wanted, fits = f"a multiple of {wanted}", num_heads % self.num_kv_heads == 0
        if not fits or head_size != self.head_size:
            raise ValueError(
                f"{name}: shape {given.shape}, needs [{of_what}, {wanted}, {self.head_size}], as "
                "the cache holds"
            )

    def _check_unchanged(self, batch: Batch) -> None:
        """Once written, its slots may be what others find by its tokens."""
        for sequence, _, version in batch.ends:
            if sequence.version != version:
                raise ValueError(
                    "batch: is written, and a sequence of it was freed, truncated or offloaded "
                    "since; needs to be taken anew"
                )

    # A step's copies are done together, before its batch; blocks are written by batches alone.

    def _copy_later(self, source: int, destination: int) -> None:
        # Copies run side by side: what one of them writes, no other of them may touch.
        if source in self._copies or destination in self._copies or destination in self._copied:
            self._copy_early()
        self._copies[destination] = source
        self._copied.add(source)

    def _copy_early(self) -> None:
        if self._copies:
            # The present batch may write into a block that was freed, and is copied into now.
            self._batch = None
            self._copy_now(self._last[0] if self._last else self._stream())

    def _copy_now(self, stream: int) -> None:
        if not self._copies:
            return
        block_mapping = np.array([*zip(self._copies.values(), self._copies, strict=True)], np.int64)
        self._await_host_copies(stream, reads=block_mapping[:, 0], writes=block_mapping[:, 1])
        copy_blocks(
            self.key_caches, self.value_caches, block_mapping, layout=self.layout, stream=stream
        )  # fmt: skip
        self._copies.clear()
        self._copied.clear()

    def _poison(self, block: int) -> None:
        self._copy_early()  # may be from this block
        stream = self._stream()
        self._await_host_copies(stream, reads=_NONE, writes=np.array([block]))
        self._memory.fill_with_nan(block, stream)

    # Copies to the host and back are queued at once, after what the steps were given before.

    def _copy_out(self, pairs: list[tuple[int, int]]) -> None:
        self._copy_early()  # may be into one of these blocks
        self._host.copy_out(pairs, self._streams())

    def _copy_in(self, pairs: list[tuple[int, int]]) -> None:
        self._copy_early()  # may be from or into one of these blocks
        self._batch = None  # may write into one of them, which was freed since
        self._host.copy_in(pairs, self._streams())

    def _streams(self) -> set[int]:
        current = self._stream()
        return {current, self._last[0] if self._last else current}

    def _await_host_copies(self, stream: int, *, reads: np.ndarray, writes: np.ndarray) -> None:
        if self._host is not None:
            self._host.be_awaited(stream, reads=reads, writes=writes)


def _check_rows(name: str, x: Any, num_rows: int, of_what: str) -> None:
    got = getattr(x, "shape", (num_rows,))[:1]  # what is no array is for the op to refuse
    if got != (num_rows,):
        raise ValueError(f"{name}: shape {tuple(x.shape)}, but the batch has {num_rows} {of_what}")


def _nothing(block: int) -> None:
    pass


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    """The method, without keeping its object: a cache must go with its last reference."""
    ref = weakref.WeakMethod(method)
    return lambda *arguments: ref()(*arguments)
