"""Breaks kernels on purpose and checks that the GPU tests notice: `python tests/mutants.py`.

Each mutant is one change of a source text. The tree is copied and changed, and the tests named for
the mutant are run on it; they must fail, and must pass on an unchanged copy. Exits with 1 if a
mutant survives.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

WORKERS = max(4, (os.cpu_count() or 1) // 3)  # mutants that share the GPU
ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    fault: str
    file: str
    old: str
    new: str
    tests: str = "tests/gpu/test_attention.py::TestAttention"


OLDER_CHIPS = "tests/gpu/test_attention.py::TestAttentionOnOlderChips"
MOVES = "tests/gpu/test_block_ops.py"
MERGE = "tests/gpu/test_merge.py"
WRITES = "tests/gpu/test_cache_ops.py"

MUTANTS = (
    Mutant(
        "v_scale in place of k_scale, tensor cores",
        "kernels/workers.cuh",
        "(p.k_scale_array ? *p.k_scale_array : p.k_scale)",
        "(p.v_scale_array ? *p.v_scale_array : p.v_scale)",
    ),
    Mutant(
        "v_scale in place of k_scale, CUDA cores",
        "kernels/paged_attention.cu",
        "(p.k_scale_array ? *p.k_scale_array : p.k_scale)",
        "(p.v_scale_array ? *p.v_scale_array : p.v_scale)",
        OLDER_CHIPS,
    ),
    Mutant(
        "the newest token is dropped, tensor cores",
        "kernels/pieces.cuh",
        "group_end = min((piece.node + 1) * tokens, piece.seq_len);",
        "group_end = min((piece.node + 1) * tokens, piece.seq_len - 1);",
    ),
    Mutant(
        "the newest token is dropped, CUDA cores",
        "kernels/paged_attention.cu",
        "const int end = min(begin + partition_size, seq_len);",
        "const int end = min(begin + partition_size, seq_len - 1);",
        OLDER_CHIPS,
    ),
    Mutant(
        "32-bit block offset",
        "kernels/layouts.cuh",
        "return block * stride.block + head * stride.head + offset * stride.token + channel;",
        "return int(block * stride.block) + head * stride.head + offset * stride.token + channel;",
        "tests/gpu/test_large_pool.py",
    ),
    Mutant(
        "ALiBi distance off by one",
        "kernels/masks.cuh",
        "float(token - seq_len + 1)",
        "float(token - seq_len)",
    ),
    Mutant(
        "dead slots of a channel are fetched, tensor cores",
        "kernels/warp_tiles.cuh",
        "min(max(live_tokens - column * CHUNK, 0), CHUNK) * int(sizeof(T))",
        "CHUNK * int(sizeof(T))",
    ),
    Mutant(
        "dead slots of a block that came as a whole are not cleared, tensor cores",
        "kernels/warp_tiles.cuh",
        "if (i % TILE_TOKENS >= token) elements[i] = {};",
        "if (i % TILE_TOKENS > token) elements[i] = {};",
    ),
    Mutant(
        "dead slots are fetched, CUDA cores",
        "kernels/tiles.cuh",
        "const int live = min(count, from.end - token);",
        "const int live = from.end > token - BLOCK_SIZE ? count : 0;",
        OLDER_CHIPS,
    ),
    Mutant(
        "counters of a launch are left to the next",
        "kernels/pieces.cuh",
        "p.work->arrivals[i] = 0",
        "p.work->arrivals[i] += 0",
    ),
    Mutant(
        "nodes are counted before they are stored",
        "kernels/clerk.cuh",
        "if (counts) order.stored.wait(parity);",
        "",
        "tests/gpu/test_bitwise.py",
    ),
    Mutant(
        "the last partition of a group is left out, where thread blocks did one each",
        "kernels/head_sum.cuh",
        "if (i < count) group[k].take(node[i]);",
        "if (i < count - 1) group[k].take(node[i]);",
    ),
    Mutant(
        "a group is what its last partition comes to, where a thread block did all of it",
        "kernels/workers.cuh",
        "if (!piece.is_first) state = group[k].joined();",
        "",
        "tests/gpu/test_bitwise.py",
    ),
    Mutant(
        "an empty side is merged by its weight",
        "kernels/merge_attn_states.cu",
        "const bool suffix_only = !prefix_only && is_empty(prefix_lse[k]);",
        "const bool suffix_only = false;",
        MERGE,
    ),
    Mutant(
        "the lse of a tile's tokens are those of its first",
        "kernels/merge_attn_states.cu",
        "(int64(tile) << p.tile_bits) + (in_tile & (1u << p.tile_bits) - 1)",
        "(int64(tile) << p.tile_bits)",
        MERGE,
    ),
    Mutant(
        "the slots of a batch are not awaited",
        "kernels/fetcher.cuh",
        "shared.empty[mine % SLOTS].wait(mine / SLOTS % 2 ^ 1);",
        "",
    ),
    Mutant(
        "the first token without a prefix is merged",
        "kernels/merge_attn_states.cu",
        "token[k] < p.num_merged_tokens",
        "token[k] <= p.num_merged_tokens",
        MERGE,
    ),
    Mutant(
        "skipped slots are written",
        "kernels/reshape_and_cache.cu",
        "if (slot < 0 || slot >= p.num_slots) return;",
        "if (slot < -1 || slot >= p.num_slots) return;",
        WRITES,
    ),
    Mutant(
        "k_scale in place of v_scale, written values",
        "kernels/reshape_and_cache.cu",
        "p.v_scale_array ? *p.v_scale_array : p.v_scale",
        "p.k_scale_array ? *p.k_scale_array : p.k_scale",
        WRITES,
    ),
    Mutant(
        "the last bytes of a block are not copied",
        "kernels/copy_blocks.cu",
        "(p.block_bytes + COPY_UNIT<WIDTH> - 1) / COPY_UNIT<WIDTH>",
        "p.block_bytes / COPY_UNIT<WIDTH>",
        MOVES,
    ),
    Mutant(
        "pairs from the host are read past their layer",
        "kernels/copy_blocks.cu",
        "p.pairs[copy / p.num_pools]",
        "p.pairs[copy % p.num_pairs]",
        MOVES,
    ),
    Mutant(
        "32-bit offset of a copied block",
        "kernels/copy_blocks.cu",
        "pool.blocks + source * pool.stride",
        "pool.blocks + int(source * pool.stride)",
        MOVES,
    ),
    Mutant(
        "a launch's first blocks go to and from the host again and again",
        "cupy_paged/block_runs.py",
        "short[start : start + MAX_PAIRS]",
        "short[:MAX_PAIRS]",
        "tests/gpu/test_block_ops.py::TestSwapBlocks",
    ),
    Mutant(
        "a swapped block goes by the other side's step",
        "kernels/swap_blocks.cu",
        "pair.source * p.source_stride",
        "pair.source * p.destination_stride",
        "tests/gpu/test_block_ops.py::TestSwapBlocks",
    ),
    Mutant(
        "a sequence is gathered from its table's first token",
        "kernels/gather_cache.cu",
        "(p.seq_starts ? p.seq_starts[seq] : 0)",
        "0",
        MOVES,
    ),
    Mutant(
        "a token on a sequence's edge goes to its neighbour",
        "kernels/gather_cache.cu",
        "if (p.cu_seq_lens[middle] <= token) seq = middle;",
        "if (p.cu_seq_lens[middle] < token) seq = middle;",
        MOVES,
    ),
    Mutant(
        "k_scale in place of v_scale, gathered values",
        "kernels/gather_cache.cu",
        "p.v_scale_array ? *p.v_scale_array : p.v_scale",
        "p.k_scale_array ? *p.k_scale_array : p.k_scale",
        MOVES,
    ),
    Mutant(
        "rows past the end are gathered",
        "kernels/gather_cache.cu",
        "token >= p.num_tokens || ",
        "",
        MOVES,
    ),
    Mutant(
        "tiles after the first of a block are not converted",
        "kernels/convert_layout.cu",
        "return first_token + token < BLOCK_SIZE;",
        "return first_token + token < TOKENS;",
        MOVES,
    ),
    Mutant(
        "the values' last channels are not turned",
        "kernels/token_moves.cuh",
        "begin + channel >= HEAD_SIZE",
        "begin + channel >= HEAD_SIZE / 64 * 64",
        MOVES,
    ),
    Mutant(
        "the rotary key is read from its second element",
        "kernels/concat_and_cache_mla.cu",
        "rotary + (i - p.kv_lora_rank)",
        "rotary + (i - p.kv_lora_rank + 1)",
        MOVES,
    ),
)


def copy_tree(folder: str, name: str) -> Path:
    tree = Path(folder) / name
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    shutil.copy(ROOT / ".gitignore", tree)
    return tree


def run_tests(tree: Path, tests: str) -> tuple[bool, str]:
    """Whether the tests pass on a tree, and the first line that says why not."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests]
    environment = os.environ | {"CUPY_PAGED_RECEIPT": os.devnull}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 0, failed[0] if failed else done.stdout[-300:]


def check_original(folder: str, tests: str) -> str | None:
    """What is wrong with the tests on the unchanged tree. None if nothing is."""
    passed, why = run_tests(copy_tree(folder, f"original {tests.replace('/', '.')}"), tests)
    return None if passed else f"{tests} fails without any mutant: {why}"


def survives(folder: str, mutant: Mutant) -> bool:
    path = copy_tree(folder, mutant.fault) / mutant.file
    text = path.read_text()
    if mutant.old not in text:
        print(f"STALE     {mutant.fault}: {mutant.file} has no {mutant.old!r}", flush=True)
        return True
    path.write_text(text.replace(mutant.old, mutant.new))
    start = time.perf_counter()
    passed, why = run_tests(Path(folder) / mutant.fault, mutant.tests)
    verdict = "SURVIVED" if passed else "killed  "
    print(f"{verdict}  {mutant.fault}, {time.perf_counter() - start:.0f} s: {why}", flush=True)
    return passed


def main() -> int:
    tests = sorted({mutant.tests for mutant in MUTANTS})
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ThreadPoolExecutor(WORKERS) as workers,
    ):
        broken = list(filter(None, workers.map(check_original, itertools.repeat(folder), tests)))
        if broken:
            print("\n".join(broken))
            return 1
        survivors = sum(workers.map(survives, itertools.repeat(folder), MUTANTS))
    print(f"{len(MUTANTS) - survivors} of {len(MUTANTS)} mutants killed")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
