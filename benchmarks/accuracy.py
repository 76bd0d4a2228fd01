"""`python -m benchmarks accuracy`: errors against float64, over length and size of the logits.

Beside the error of `paged_attention` stands that of the same formula computed plainly in the same
precision: scores in float32 and rounded to the query's dtype, weights in float32 and rounded
likewise, outputs rounded once. An error is ||out - exact|| / ||exact|| over all rows, the root mean
square of some problems; exact is float64 over the same inputs, an fp8 cache being what its codes
mean.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import cupy_paged
from benchmarks import environment
from cupy_paged.dtypes import STORAGE, decode, encode

LENGTHS = (16, 100, 1000, 8192, 65536)
LOGITS = (1, 5, 20, 80)
"""The largest absolute one of a row."""
TARGET = 2.0
"""Times the error of the same precision, at most."""

BLOCK_SIZE, NUM_HEADS, HEAD_SIZE = 16, 8, 128
K_SCALE, V_SCALE = 0.25, 0.5
FP8_NAMES = {"float8_e4m3fn": "fp8_e4m3", "float8_e5m2": "fp8_e5m2"}
TOKENS = 1 << 17
"""Of all problems of one length, of which there are 2 at least and 32 at most."""


class Kind(NamedTuple):
    """Dtypes of query and cache."""

    query: str
    cache: str

    @property
    def name(self) -> str:
        return self.query if self.cache == self.query else f"{self.query}, {self.cache} cache"


KINDS = (
    Kind("float16", "float16"),
    Kind("bfloat16", "bfloat16"),
    Kind("float32", "float32"),
    Kind("float16", "float8_e4m3fn"),
    Kind("bfloat16", "float8_e4m3fn"),
    Kind("bfloat16", "float8_e5m2"),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """Errors of some problems of one kind."""

    kind: str
    length: int
    logits: int
    error: float
    reference_error: float

    @property
    def ratio(self) -> float:
        return self.error / self.reference_error


class Tokens(NamedTuple):
    """Keys and values of one sequence and one KV head, [length, HEAD_SIZE]."""

    key_codes: np.ndarray  # as stored in the cache
    value_codes: np.ndarray
    keys: np.ndarray  # what they mean, float64
    values: np.ndarray


def tokens(kind: Kind, length: int, rng: np.random.Generator) -> Tokens:
    scales = (1.0, 1.0) if kind.cache == kind.query else (K_SCALE, V_SCALE)
    codes = [
        encode(rng.standard_normal((length, HEAD_SIZE)) / scale, kind.cache) for scale in scales
    ]
    meant = [decode(c, kind.cache) * s for c, s in zip(codes, scales, strict=True)]
    return Tokens(*codes, *meant)


def queries(kind: Kind, keys: np.ndarray, logits: float, rng: np.random.Generator) -> np.ndarray:
    """Queries [NUM_HEADS, HEAD_SIZE], float64 values of their dtype, with logits of that size."""
    query = rng.standard_normal((NUM_HEADS, HEAD_SIZE))
    scores = query @ keys.T * HEAD_SIZE**-0.5
    query *= logits / np.abs(scores).max(axis=1, keepdims=True)
    return decode(encode(query, kind.query), kind.query)


def exact(query: np.ndarray, sequence: Tokens) -> np.ndarray:
    scores = query @ sequence.keys.T * HEAD_SIZE**-0.5
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights @ sequence.values / weights.sum(axis=1, keepdims=True)


def in_precision(query: np.ndarray, sequence: Tokens, dtype: str) -> np.ndarray:
    """Attention as it is written down, each step rounded to `dtype`."""

    def rounded(x: np.ndarray) -> np.ndarray:
        return decode(encode(x, dtype), dtype, np.float32)

    keys, values = rounded(sequence.keys), rounded(sequence.values)
    scores = rounded(rounded(query) @ keys.T) * np.float32(HEAD_SIZE**-0.5)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights = rounded(weights / weights.sum(axis=1, keepdims=True, dtype=np.float32))
    return rounded(weights @ values)


def ours(query: np.ndarray, sequence: Tokens, kind: Kind, xp: Any) -> np.ndarray:
    """`paged_attention` over the sequence in blocks, with NumPy or CuPy arrays."""
    length = len(sequence.keys)
    num_blocks = -(-length // BLOCK_SIZE)
    order = np.random.default_rng(length).permutation(num_blocks).astype(np.int32)

    def array(bits: np.ndarray, dtype: str) -> Any:
        if dtype == "bfloat16":
            import ml_dtypes

            bits = bits.view(ml_dtypes.bfloat16)
        return xp.asarray(bits)

    def cache(codes: np.ndarray) -> Any:
        padded = np.zeros((num_blocks * BLOCK_SIZE, HEAD_SIZE), codes.dtype)
        padded[:length] = codes
        blocks = np.empty((num_blocks, 1, BLOCK_SIZE, HEAD_SIZE), codes.dtype)
        blocks[order, 0] = padded.reshape(num_blocks, BLOCK_SIZE, HEAD_SIZE)
        return array(blocks, kind.cache)

    options: dict[str, Any] = {"layout": "HND"}
    if kind.cache != kind.query:
        options |= {"kv_cache_dtype": FP8_NAMES[kind.cache], "k_scale": K_SCALE, "v_scale": V_SCALE}
    out = cupy_paged.paged_attention(
        array(encode(query[None], kind.query), kind.query),
        cache(sequence.key_codes),
        cache(sequence.value_codes),
        xp.asarray(order[None]),
        xp.asarray(np.array([length], np.int32)),
        **options,
    )
    bits = out if xp is np else out.get()
    return decode(bits.view(STORAGE[kind.query]), kind.query)[0]


def measure(xp: Any) -> Iterator[Row]:
    for kind in KINDS:
        for length in LENGTHS:
            count = min(max(TOKENS // length, 2), 32)
            rngs = [np.random.default_rng([length, seed]) for seed in range(count)]
            sequences = [tokens(kind, length, rng) for rng in rngs]
            for logits in LOGITS:
                errors = []
                for sequence, rng in zip(sequences, rngs, strict=True):
                    query = queries(kind, sequence.keys, logits, rng)
                    want = exact(query, sequence)
                    found = (
                        ours(query, sequence, kind, xp),
                        in_precision(query, sequence, kind.query),
                    )
                    errors.append([np.linalg.norm(x - want) / np.linalg.norm(want) for x in found])
                error, plain = np.sqrt(np.mean(np.square(errors), axis=0)).tolist()
                yield Row(kind.name, length, logits, error, plain)


def markdown(rows: list[Row], where: str, picture: str) -> str:
    """The worst ratio of each kind, and its errors."""
    lines = [
        "# Accuracy",
        "",
        f"{where}. " + " ".join((__doc__ or "").split("\n\n", 1)[1].split()),
        "",
        f"![Errors over length]({picture})",
        "",
        "| query and cache | largest error | at length, logits | largest ratio to the same "
        "precision | at length, logits |",
        "|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(row.kind for row in rows):
        found = [row for row in rows if row.kind == kind]
        most, worst = max(found, key=lambda r: r.error), max(found, key=lambda r: r.ratio)
        lines.append(
            f"| {kind} | {most.error:.1e} | {most.length}, {most.logits} | {worst.ratio:.2f} "
            f"| {worst.length}, {worst.logits} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: list[Row], where: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(row.kind for row in rows))
    figure, axes = pyplot.subplots(2, -(-len(kinds) // 2), figsize=(14, 8), sharex=True)
    for axis, kind in zip(axes.flat, kinds, strict=True):
        for i, logits in enumerate(LOGITS):
            shown = [row for row in rows if row.kind == kind and row.logits == logits]
            lengths = [row.length for row in shown]
            line, plain = [row.error for row in shown], [row.reference_error for row in shown]
            axis.plot(lengths, line, "o-", color=f"C{i}", label=f"logits up to {logits}")
            axis.plot(lengths, plain, "--", color=f"C{i}", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(kind)
        axis.grid(alpha=0.3)
    axes.flat[0].plot([], [], "--", color="grey", label="the same precision, plainly")
    axes.flat[0].legend(fontsize="small")
    for axis in axes[-1]:
        axis.set_xlabel("tokens")
    for axis in axes[:, 0]:
        axis.set_ylabel("relative error")
    figure.suptitle(f"Error of paged_attention against float64: {where}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "accuracy",
        help="errors against float64; writes NAME.json, NAME.md and NAME.png",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--device", choices=("gpu", "cpu"), default="gpu", help="cpu: the reference, by NumPy"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", default="accuracy")
    parser.set_defaults(command=command)


def command(arguments: argparse.Namespace) -> int:
    """Exits with 1 where an error is above `TARGET` times that of the same precision."""
    found = environment.describe()
    if arguments.device == "cpu":
        xp, where, found["device"] = np, "NumPy reference", None
    else:
        try:
            import cupy as xp

            xp.cuda.Device().use()
        except Exception as error:  # of the import, or of CUDA's own kinds
            print(f"No GPU to measure on: {error}. --device cpu measures the NumPy reference")
            return 2
        where = f"{found['device']}, {found['date'][:10]}"
    rows = []
    for row in measure(xp):
        rows.append(row)
        print(
            f"{row.kind:32} {row.length:6} tokens, logits {row.logits:2}: "
            f"{row.error:.1e}, {row.ratio:.2f} of the same precision",
            flush=True,
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{arguments.name}.json"
    document = {"environment": found, "rows": [dataclasses.asdict(row) for row in rows]}
    path.write_text(json.dumps(document, indent=1) + "\n")
    draw(rows, where, path.with_suffix(".png"))
    text = markdown(rows, where, path.with_suffix(".png").name)
    path.with_suffix(".md").write_text(text)
    worst = max(rows, key=lambda row: (math.isnan(row.ratio), row.ratio))
    print(f"largest ratio {worst.ratio:.2f}: {worst.kind}, {worst.length} tokens, {worst.logits}")
    return int(not worst.ratio <= TARGET)
