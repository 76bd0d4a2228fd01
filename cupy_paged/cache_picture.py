"""Pictures of a cache: text for a terminal, an SVG block map for a notebook."""

from __future__ import annotations

import html as markup
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cupy_paged.kv_cache import PagedKVCache
    from cupy_paged.sequences import Sequence

BAR_WIDTH = 64
BAR = {"shared": "█", "used": "▓", "kept": "░", "free": "·"}

MAX_CELLS = 4096
"""More blocks than this share cells, so that a picture stays small."""
COLUMNS = 64
CELL = 10
FREE, KEPT, SHARED = "#ececec", "#b9b9b9", "#111"
NUM_HUES = 12


def num_bytes(count: int) -> str:
    """A number of bytes, as in "1.5 GiB"."""
    if count < 1024:
        return f"{count} B"
    power = min((count.bit_length() - 1) // 10, 5)
    return f"{count / 1024**power:.1f} {' KMGTP'[power]}iB"


def _counts(cache: PagedKVCache) -> dict[str, int]:
    allocator = cache.pool.allocator
    return {
        "shared": allocator.num_shared,
        "used": allocator.num_used - allocator.num_shared,
        "kept": allocator.num_kept,
        "free": allocator.num_free,
    }


def _bar(counts: dict[str, int]) -> str:
    """Blocks by kind; a kind that there is gets a character at least, the largest gives it."""
    total = sum(counts.values())
    widths = {kind: max(n * BAR_WIDTH // total, n > 0) for kind, n in counts.items()}
    widths[max(counts, key=lambda kind: counts[kind])] += BAR_WIDTH - sum(widths.values())
    return "".join(BAR[kind] * width for kind, width in widths.items())


def _title(cache: PagedKVCache) -> str:
    return (
        f"PagedKVCache: {cache.num_layers} layers of {cache.num_kv_heads} x {cache.head_size}, "
        f'{cache.dtype}, "{cache.layout}", {cache.place}'
    )


def _rows(cache: PagedKVCache) -> list[tuple[str, str]]:
    counts, pool = _counts(cache), cache.pool
    used = cache.num_blocks - counts["free"] - counts["kept"]
    tokens = sum(map(len, pool.sequences))
    offloaded = [sequence for sequence in pool.sequences if sequence.is_offloaded]
    slots = tokens - sum(map(len, offloaded)) + pool.unused_slots
    found = pool.statistics
    rows = [
        (
            "blocks",
            f"{cache.num_blocks} of {cache.block_size} tokens: {used} used "
            f"({counts['shared']} shared), {counts['kept']} kept, {counts['free']} free",
        ),
        ("sequences", f"{len(pool.sequences)}, {tokens} tokens"),
        ("memory", f"{num_bytes(used * cache.block_bytes)} used of {num_bytes(cache.num_bytes)}"),
        (
            "unused",
            f"{pool.unused_slots} slots of last blocks, "
            f"{pool.unused_slots / max(slots, 1):.1%} of all slots that sequences have",
        ),
        (
            "prefixes",
            f"{found.hits} blocks found, {found.misses} not ({found.hit_rate:.0%}); "
            f"{found.evictions} evicted, {found.copies} copied",
        ),
    ]
    if pool.host is not None:
        held = pool.host.allocator.num_used
        rows.append(
            (
                "host",
                f"{cache.num_host_blocks} blocks: {held} used, {len(offloaded)} sequences; "
                f"{found.offloaded} offloaded, {found.restored} restored",
            )
        )
    return rows


def text(cache: PagedKVCache) -> str:
    """What `print(cache)` shows: a dozen lines at most."""
    legend = "  ".join(f"{BAR[kind]} {kind}" for kind in BAR)
    lines = [_title(cache)]
    lines += [f"  {label:<10}{words}" for label, words in _rows(cache)]
    lines += [f"  |{_bar(_counts(cache))}|", f"   {legend}"]
    return "\n".join(lines)


def html(cache: PagedKVCache) -> str:
    """What a notebook shows: the numbers, and a map with one cell for each block.

    A block has the colour of its sequence, a dot where others hold it, too. Beyond MAX_CELLS
    blocks, a cell stands for several, and shows the first of them that is used.
    """
    per_cell = -(-cache.num_blocks // MAX_CELLS)
    num_cells = -(-cache.num_blocks // per_cell)
    owner, shared = _cells(cache, per_cell)
    allocator = cache.pool.allocator
    kept = {b // per_cell for b in range(cache.num_blocks) if allocator.is_kept(b)} - owner.keys()
    free = set(range(num_cells)) - owner.keys() - kept

    by_sequence: dict[Sequence, list[int]] = {}
    for cell, sequence in owner.items():
        by_sequence.setdefault(sequence, []).append(cell)
    shapes = [_shape(sorted(free), FREE, "free"), _shape(sorted(kept), KEPT, "kept")]
    for number, sequence in enumerate(cache.pool.sequences):
        words = f"sequence {number}: {len(sequence)} tokens, {len(sequence.blocks)} blocks"
        shapes.append(_shape(sorted(by_sequence.get(sequence, [])), _hue(number), words))
    shapes.append(_shape(sorted(shared), SHARED, "shared", size=3))

    columns = min(COLUMNS, num_cells)
    width, height = columns * CELL, math.ceil(num_cells / columns) * CELL
    numbers = "".join(
        f"<tr><td style='text-align:left'>{label}</td>"
        f"<td style='text-align:left'>{markup.escape(words)}</td></tr>"
        for label, words in _rows(cache)
    )
    each = "one block" if per_cell == 1 else f"{per_cell} blocks"
    return (
        f"<div><b>{markup.escape(_title(cache))}</b><table>{numbers}</table>"
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' "
        f"viewBox='0 0 {width} {height}'>{''.join(shapes)}</svg>"
        f"<div>A cell is {each}, in its sequence's colour; a dot: shared; "
        f"<span style='background:{KEPT}'>&nbsp;kept&nbsp;</span> "
        f"<span style='background:{FREE}'>&nbsp;free&nbsp;</span></div></div>"
    )


def _cells(cache: PagedKVCache, per_cell: int) -> tuple[dict[int, Sequence], set[int]]:
    """The sequence that each used cell shows, and the cells with shared blocks."""
    owner: dict[int, Sequence] = {}
    shared = set()
    allocator = cache.pool.allocator
    for sequence in cache.pool.sequences:
        for block in sequence.blocks:
            owner.setdefault(block // per_cell, sequence)
            if allocator.ref_count(block) > 1:
                shared.add(block // per_cell)
    return owner, shared


def _hue(number: int) -> str:
    # Steps of 5 in 12 put neighbours far apart; each round is a little darker.
    lightness = max(68 - 8 * (number // NUM_HUES % 4), 40)
    return f"hsl({number * 5 % NUM_HUES * 360 // NUM_HUES},65%,{lightness}%)"


def _shape(cells: list[int], colour: str, words: str, size: int = CELL - 1) -> str:
    """One path of a square in each of the cells."""
    if not cells:
        return ""
    square = f"h{size}v{size}h-{size}z"
    inset = (CELL - 1 - size) // 2
    path = "".join(
        f"M{cell % COLUMNS * CELL + inset} {cell // COLUMNS * CELL + inset}{square}"
        for cell in cells
    )
    return f"<path fill='{colour}' d='{path}'><title>{markup.escape(words)}</title></path>"
