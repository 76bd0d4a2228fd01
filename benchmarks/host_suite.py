"""What one eager call costs the host, beside torch's `x.add_(1)` in the same process.

The problem is so small that the device is done before the next call comes: the queue never fills,
and the time is the host's alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import cupy_paged
from benchmarks.frameworks import CuPy, Torch
from benchmarks.ours import empty
from benchmarks.results import Measurement
from benchmarks.runner import Runner
from benchmarks.timing import Timing, summarise

ROUNDS = 40
CALLS = 100  # in a block; far fewer launches than the device's queue holds

NUM_SEQS, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE, NUM_BLOCKS = 2, 32, 8, 128, 16, 4
SEQ_LEN = 16
LONG_TABLE = 512  # blocks: a table for 8192 tokens, so that sequences may have to be split
LAYOUT = "HND"
PROBLEM = f"{NUM_SEQS}x{SEQ_LEN}, {NUM_HEADS}/{NUM_KV_HEADS}, {HEAD_SIZE}"

Functions = Mapping[Any, Callable[[], Any]]


def time_calls(
    functions: Functions,
    wait: Callable[[], None],
    rounds: int = ROUNDS,
    calls: int = CALLS,
    now: Callable[[], float] = time.perf_counter,
) -> dict[Any, Timing]:
    """Microseconds of a call of each function, in blocks that take turns, so that drift is shared.

    The device is waited for between the blocks, never inside of one.
    """
    samples: dict[Any, list[float]] = {name: [] for name in functions}
    for round_number in range(rounds + 1):
        for name, function in functions.items():
            wait()
            start = now()
            for _ in range(calls):
                function()
            span = now() - start
            if round_number:  # the first one compiles
                samples[name].append(span / calls * 1e6)
    wait()
    return {name: summarise(found) for name, found in samples.items()}


def our_calls(device: Any, arrays: Any) -> Functions:
    def normal(*shape: int) -> Any:
        memory = device.memory(2 * int(np.prod(shape)))
        device.fill(memory, "bfloat16", 0)
        return arrays.view(memory, "bfloat16", shape)

    def zeros(dtype: type, *shape: int) -> Any:
        return arrays.array(np.zeros(shape, dtype))

    query = normal(NUM_SEQS, NUM_HEADS, HEAD_SIZE)
    key, value = (normal(NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE) for _ in range(2))
    table, long_table = zeros(np.int32, NUM_SEQS, 1), zeros(np.int32, NUM_SEQS, LONG_TABLE)
    seq_lens = arrays.array(np.full(NUM_SEQS, SEQ_LEN, np.int32))
    out = empty(device, arrays, "bfloat16", (NUM_SEQS, NUM_HEADS, HEAD_SIZE))
    prefix, suffix = (normal(NUM_SEQS, NUM_HEADS, HEAD_SIZE) for _ in range(2))
    prefix_lse, suffix_lse, output_lse = (zeros(np.float32, NUM_HEADS, NUM_SEQS) for _ in range(3))
    new_key, new_value = (normal(NUM_SEQS, NUM_KV_HEADS, HEAD_SIZE) for _ in range(2))
    slots = arrays.array(np.arange(NUM_SEQS))
    caches, scale = (key, value), HEAD_SIZE**-0.5
    attend = cupy_paged.paged_attention
    return {
        "paged_attention, out=": lambda: attend(
            query, *caches, table, seq_lens, layout=LAYOUT, out=out
        ),
        "paged_attention": lambda: attend(query, *caches, table, seq_lens, layout=LAYOUT),
        "paged_attention, out=, long table": lambda: attend(
            query, *caches, long_table, seq_lens, layout=LAYOUT, out=out
        ),
        "v1": lambda: cupy_paged.paged_attention_v1(
            out, query, *caches, NUM_KV_HEADS, scale, table, seq_lens, BLOCK_SIZE, SEQ_LEN,
            None, "auto", 1.0, 1.0, layout=LAYOUT,
        ),
        "reshape_and_cache_flash": lambda: cupy_paged.reshape_and_cache_flash(
            new_key, new_value, *caches, slots, "auto", 1.0, 1.0, layout=LAYOUT
        ),
        "merge_attn_states": lambda: cupy_paged.merge_attn_states(
            out, prefix, prefix_lse, suffix, suffix_lse, output_lse
        ),
    }  # fmt: skip


def _works(function: Callable[[], Any]) -> bool:
    try:
        function()
    except Exception:
        return False
    return True


def run(runner: Runner, rounds: int = ROUNDS, calls: int = CALLS) -> None:
    """From CuPy arrays and, where torch is installed, from its tensors."""
    functions: dict[tuple[str, str, str], Callable[[], Any]] = {}
    for make in (CuPy, Torch):
        try:
            arrays = make()
        except ImportError as error:
            runner.result.systems[make.name] = f"not installed: {error}"
            continue
        for op, call in our_calls(runner.device, arrays).items():
            functions["ours", op, arrays.name] = call
        if make is Torch:
            x = arrays.torch.zeros(16, device=arrays.device)
            functions["torch", "x.add_(1)", arrays.name] = lambda x=x: x.add_(1)

    blanks = {
        key: Measurement(
            suite="host",
            shape="tiny",
            system=key[0],
            op=key[1],
            arrays=key[2],
            dtypes="bf16",
            problem=PROBLEM,
        )
        for key in functions
    }
    timings: dict[tuple[str, str, str], Timing] = {}
    if not runner.is_over:
        working = {key: function for key, function in functions.items() if _works(function)}
        timings = time_calls(working, runner.device.synchronize, rounds, calls)

    def take(blank: Measurement, key: tuple[str, str, str]) -> Measurement:
        if key not in timings:
            functions[key]()  # raises what is to be reported
        return blank.timed(timings[key])

    for key, blank in blanks.items():
        runner.measure(blank, lambda b, key=key: take(b, key))
