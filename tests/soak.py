"""Decode steps without end, through `PagedKVCache`: `python tests/soak.py --steps 1000000`.

Requests arrive, share prefixes, fork, are cut back, moved to the host, and end, as blocks allow. A
token's key and value follow from its id, so that a sequence can be computed anew at any time: now
and then a row is compared with the same sequence alone in a cache of its own, bit by bit, and with
float64. Dead blocks hold NaN, which no row may show. The memory of the process and of the pools
must stay what it is.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cupy_paged
from cupy_paged import OutOfBlocks
from cupy_paged.layouts import LAYOUTS
from support import device, receipt

BLOCK_SIZE, KV_HEADS, GROUP, HEAD_SIZE = 16, 2, 4, 64
NUM_BLOCKS, NUM_HOST_BLOCKS, MOST_ROWS, LONGEST = 160, 48, 24, 400
VOCABULARY, NUM_PREFIXES, PREFIX = 512, 4, 50
CHECK_EVERY = 97  # steps: a row of one is compared
LOOK_EVERY = 10  # steps: all rows of one are looked through, which nobody waits for
PROGRESS = 30  # seconds between two lines of it
TOLERANCE = 1e-3
GROWN = "grown_bytes", "grown_pool_bytes"  # of the process, and of CuPy's pool
WARM_UP = 0.2  # of the steps, after which memory is to stay
SLACK = 16 << 20  # bytes by which either may grow nevertheless: allocators keep pieces of all sizes


def split(states: Any) -> tuple[Any, Any, Any]:
    """Keys, values and queries of tokens."""
    return states[:, :KV_HEADS], states[:, KV_HEADS : 2 * KV_HEADS], states[:, 2 * KV_HEADS :]


class Worker:
    def __init__(self, seed: int, on_gpu: bool) -> None:
        if on_gpu:
            import cupy

            cupy.cuda.Device(seed % cupy.cuda.runtime.getDeviceCount()).use()
            self.xp = cupy
        else:
            self.xp = np
        self.on_gpu = on_gpu
        self.rng = np.random.default_rng(seed)
        # Of each token its key, value and query: one look-up finds them all.
        shape = VOCABULARY, 2 * KV_HEADS + KV_HEADS * GROUP, HEAD_SIZE
        self.host_states = self.rng.standard_normal(shape).astype(np.float16)
        self.states = self.xp.asarray(self.host_states)
        self.prefixes = self.rng.integers(0, VOCABULARY, (NUM_PREFIXES, PREFIX)).tolist()
        self.spoiled = self.xp.zeros((), bool)  # a row has shown a NaN
        self.layout = LAYOUTS[seed % len(LAYOUTS)]
        self.cache = self.new_cache(NUM_BLOCKS, num_host_blocks=NUM_HOST_BLOCKS, poison=True)
        self.alone = self.new_cache(-(-LONGEST // BLOCK_SIZE) + 1, prefix_caching=False)
        self.live: list[Any] = []
        self.counts = dict.fromkeys(
            ("added", "forked", "cut", "moved", "ended", "refused", "compared"), 0
        )

    def new_cache(self, num_blocks: int, **options: Any) -> cupy_paged.PagedKVCache:
        return cupy_paged.PagedKVCache(
            1, num_blocks, num_kv_heads=KV_HEADS, head_size=HEAD_SIZE, block_size=BLOCK_SIZE,
            layout=self.layout, like=self.states, **options,
        )  # fmt: skip

    # ---- what happens between steps ----

    def tokens(self, count: int) -> list[int]:
        return self.rng.integers(0, VOCABULARY, count).tolist()

    def pick(self) -> Any:
        return self.live[self.rng.integers(len(self.live))]

    def end(self, sequence: Any) -> None:
        self.cache.free(sequence)
        self.live.remove(sequence)
        self.counts["ended"] += 1

    def change(self) -> None:
        """One event at most: an arrival, a fork, a cut, a move to the host or back, an end."""
        event = self.rng.random()
        if not self.live or (event < 0.12 and len(self.live) < MOST_ROWS):
            prompt = self.tokens(int(self.rng.integers(1, 120)))
            if self.rng.random() < 0.6:
                prompt = self.prefixes[self.rng.integers(NUM_PREFIXES)] + prompt
            self.live.append(self.cache.add(prompt))
            self.counts["added"] += 1
        elif event < 0.16 and len(self.live) < MOST_ROWS:
            sequence = self.pick()
            if not sequence.is_offloaded:
                self.live.append(self.cache.fork(sequence))
                self.counts["forked"] += 1
        elif event < 0.19:
            sequence = self.pick()
            self.cache.truncate(sequence, int(self.rng.integers(1, len(sequence) + 1)))
            self.counts["cut"] += 1
        elif event < 0.24:
            sequence = self.pick()
            move = self.cache.restore if sequence.is_offloaded else self.cache.offload
            move(sequence)
            self.counts["moved"] += 1
        elif event < 0.30:
            self.end(self.pick())

    def grow(self) -> list[Any]:
        """Gives each running sequence its next token, and ends those that have no room."""
        running = []
        for sequence in list(self.live):
            if sequence.is_offloaded:
                continue
            if len(sequence) >= LONGEST:
                self.end(sequence)
                continue
            try:
                self.cache.append(sequence, self.tokens(1))
            except OutOfBlocks:
                self.counts["refused"] += 1
                self.end(sequence)
                continue
            running.append(sequence)
        return running

    # ---- steps ----

    def attend(self, cache: cupy_paged.PagedKVCache, sequences: list[Any]) -> Any:
        batch = cache.batch(sequences)
        keys, values, queries = split(self.states[batch.token_ids])
        cache.write(0, keys, values, batch)
        if len(queries) > len(sequences):  # a prompt is among them
            queries = queries[self.xp.asarray(batch.last_tokens)]
        return cache.attend(0, queries, batch)

    def step(self) -> tuple[list[Any], Any]:
        """The sequences of a decode step, at least one, and what it gives."""
        while True:
            try:
                self.change()
            except OutOfBlocks:
                self.counts["refused"] += 1
                if self.live:
                    self.end(self.pick())
            running = self.grow()
            if running:
                return running, self.attend(self.cache, running)

    def look(self, out: Any) -> None:
        self.spoiled |= self.xp.isnan(out).any()

    def check_looks(self) -> None:
        """Raises AssertionError if a row of a step that was looked through held a NaN."""
        if self.spoiled:
            raise AssertionError("a row has read what no sequence has written")

    def compare(self, running: list[Any], out: Any) -> None:
        """A row against the same sequence alone, and against float64."""
        self.check_looks()
        row = int(self.rng.integers(len(running)))
        tokens = running[row].tokens
        got = self.on_host(out[row])
        twin = self.alone.add(tokens)
        again = self.on_host(self.attend(self.alone, [twin])[0])
        self.alone.free(twin)
        if got.tobytes() != again.tobytes():
            raise AssertionError(f"a sequence of {len(tokens)} tokens has other bits alone")
        keys, values, queries = split(self.host_states[tokens].astype(np.float64))
        keys, values = keys.repeat(GROUP, axis=1), values.repeat(GROUP, axis=1)
        query = queries[-1]
        scores = np.einsum("hd,thd->ht", query, keys) * HEAD_SIZE**-0.5
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        want = np.einsum("ht,thd->hd", weights / weights.sum(axis=1, keepdims=True), values)
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        if not error < TOLERANCE:
            raise AssertionError(f"a sequence of {len(tokens)} tokens is off by {error:.1e}")
        self.counts["compared"] += 1

    def on_host(self, x: Any) -> np.ndarray:
        return x.get() if self.on_gpu else x

    def memory(self) -> tuple[int, int]:
        """Bytes of this process, and of CuPy's pool."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        pool = self.xp.get_default_memory_pool().total_bytes() if self.on_gpu else 0
        return pages * os.sysconf("SC_PAGE_SIZE"), pool


def soak(seed: int, steps: int, on_gpu: bool, seconds: float = math.inf) -> dict[str, Any]:
    """Runs one worker, for so many steps or seconds; raises AssertionError for what is wrong."""
    worker = Worker(seed, on_gpu)
    start = said = time.monotonic()
    warm = None
    number = rows = 0
    while number < steps and time.monotonic() < start + seconds:
        running, out = worker.step()
        number, rows = number + 1, rows + len(running)
        if number % LOOK_EVERY == 0:
            worker.look(out)
        if number % CHECK_EVERY == 0:
            worker.compare(running, out)
        passed = time.monotonic() - start
        if warm is None and max(number / steps, passed / seconds) >= WARM_UP:
            warm = worker.memory()
        if time.monotonic() > said + PROGRESS:
            said = time.monotonic()
            print(f"seed {seed}: {number} of {steps} steps, {passed:.0f} s", flush=True)
    now = worker.memory()
    worker.check_looks()
    assert warm is not None
    growth = [after - before for before, after in zip(warm, now, strict=True)]
    if max(growth) > SLACK:
        raise AssertionError(f"grew by {growth[0]} bytes, and CuPy's pool by {growth[1]}")
    for sequence in list(worker.live):
        worker.end(sequence)
    if worker.cache.num_used:
        raise AssertionError(f"{worker.cache.num_used} blocks are used by nobody")
    grown = dict(zip(GROWN, growth, strict=True))
    return worker.counts | {"steps": number, "tokens": rows} | grown


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000, help="of all workers together")
    parser.add_argument("--seconds", type=float, default=math.inf, help="at most, of each worker")
    parser.add_argument("--workers", type=int, default=4, help="processes, on all devices")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--seed", type=int, default=0, help="of the first worker")
    arguments = parser.parse_args(argv)
    if arguments.device == "gpu" and (why := device.missing()):
        print(f"No GPU to run on: {why}. --device cpu runs on the NumPy reference")
        return 2
    start = time.perf_counter()
    seeds = range(arguments.seed, arguments.seed + arguments.workers)
    each = -(-arguments.steps // arguments.workers)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.workers, context) as pool:
        on_gpu = arguments.device == "gpu"
        futures = {pool.submit(soak, s, each, on_gpu, arguments.seconds): s for s in seeds}
        totals: dict[str, int] = {}
        failures = []
        for future in concurrent.futures.as_completed(futures):
            try:
                counts = future.result()
            except AssertionError as error:
                failures.append(f"--seed {futures[future]} --workers 1: {error}")
                print(failures[-1], flush=True)
                continue
            print(f"seed {futures[future]}: {counts}", flush=True)
            for name, count in counts.items():
                # One worker's memory must not make up for another one's.
                totals[name] = (
                    max(totals.get(name, count), count)
                    if name in GROWN
                    else totals.get(name, 0) + count
                )
    seconds = round(time.perf_counter() - start, 1)
    where = "CPU" if arguments.device == "cpu" else device.name()
    log = {"soak": totals, "failures": failures, "seconds": seconds}
    print(json.dumps({**log, **receipt.stamp("soak", where)}))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
