"""How many blocks and tokens of a KV cache fit into memory, for the shape of a model."""

from __future__ import annotations

import argparse
import re
from typing import NamedTuple

from cupy_paged.cache_memory import cache_shapes, storage_dtype
from cupy_paged.cache_picture import num_bytes
from cupy_paged.dtypes import FLOATS, FP8, itemsize

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


class Size(NamedTuple):
    """What fits, all layers counted, keys and values."""

    memory: int
    block_size: int
    token_bytes: int

    @property
    def block_bytes(self) -> int:
        return self.block_size * self.token_bytes

    @property
    def num_blocks(self) -> int:
        return self.memory // self.block_bytes

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_size

    def num_seqs(self, seq_len: int) -> int:
        """Sequences of so many tokens that fit side by side, nothing shared."""
        return self.num_blocks // -(-seq_len // self.block_size)


def fit(
    memory: int, *, layers: int, kv_heads: int, head_size: int, block_size: int, dtype: str
) -> Size:
    """What fits into so many bytes.

    >>> fit(2**30, layers=32, kv_heads=8, head_size=128, block_size=16, dtype="float16").num_tokens
    8192

    Raises ValueError for a shape that no cache can have.
    """
    cache_shapes("HND", 0, kv_heads, head_size, block_size, dtype)
    token_bytes = 2 * layers * kv_heads * head_size * itemsize(storage_dtype(dtype))
    return Size(memory, block_size, token_bytes)


def memory_of(words: str) -> int:
    """Bytes in "40GiB", "512 MB", "1000000".

    Raises ValueError for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", words)
    unit = match and match[2].upper()
    if match is None or unit not in UNITS:
        raise ValueError(f"got {words!r}, needs a number and a unit, as in 40GiB or 512MB")
    return int(float(match[1]) * UNITS[unit])


def free_memory(device: int) -> int:
    """Bytes that a CUDA device has free now. Raises where there is no CuPy, driver or device."""
    from cupy_paged import gpu

    with gpu.on(device):
        return gpu.cupy().cuda.runtime.memGetInfo()[0]


def report(size: Size, max_len: int | None, where: str) -> str:
    """The answer, in a few lines; `where` says whose memory it is."""
    rows = [
        ("memory", f"{num_bytes(size.memory)} {where}".rstrip()),
        ("a token", num_bytes(size.token_bytes)),
        ("a block", f"{num_bytes(size.block_bytes)}, {size.block_size} tokens"),
        ("blocks", f"{size.num_blocks:,}"),
        ("tokens", f"{size.num_tokens:,}"),
    ]
    lengths = [max_len] if max_len else [2**power for power in range(11, 21, 2)]
    for seq_len in lengths:
        rows.append((f"sequences of {seq_len:,}", f"{size.num_seqs(seq_len):,}"))
    width = max(len(label) for label, _ in rows) + 2
    return "\n".join(f"{label:<{width}}{value}" for label, value in rows)


def run(arguments: argparse.Namespace) -> int:
    memory, where = arguments.memory, ""
    if memory is None:
        try:
            memory = free_memory(arguments.device)
        except Exception as error:
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            print(
                f"cannot ask the GPU for its memory ({what}): give --memory, as in --memory 40GiB"
            )
            return 1
        where = f"free on cuda:{arguments.device}"
    try:
        size = fit(
            memory,
            layers=arguments.layers,
            kv_heads=arguments.kv_heads,
            head_size=arguments.head_size,
            block_size=arguments.block_size,
            dtype=arguments.dtype,
        )
    except ValueError as error:
        print(error)
        return 1
    if size.num_blocks == 0:
        block = num_bytes(size.block_bytes)
        print(
            f"memory: got {num_bytes(memory)}, and a block takes {block}; --memory 40GiB has a unit"
        )
        return 1
    print(report(size, arguments.max_len, where))
    return 0


def _positive(words: str) -> int:
    number = int(words)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {number}, needs at least 1")
    return number


def _memory(words: str) -> int:
    try:
        return memory_of(words)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "size", help="how many blocks, tokens and sequences fit into memory", description=__doc__
    )
    parser.add_argument("--layers", type=_positive, required=True, help="layers of the model")
    parser.add_argument("--kv-heads", type=_positive, required=True, help="KV heads of a layer")
    parser.add_argument("--head-size", type=_positive, required=True, help="channels of a head")
    parser.add_argument("--block-size", type=_positive, default=16, help="tokens of a block (16)")
    parser.add_argument(
        "--dtype", choices=[*FLOATS, *FP8], default="bfloat16", help="of the cache (bfloat16)"
    )
    parser.add_argument(
        "--memory", type=_memory, help="for the cache, as in 40GiB; what the GPU has free if absent"
    )
    parser.add_argument("--device", type=int, default=0, help="the CUDA device to ask (0)")
    parser.add_argument("--max-len", type=_positive, help="tokens of the longest sequence")
    parser.set_defaults(run=run)
