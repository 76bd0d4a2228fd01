"""A result as Markdown."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence

from benchmarks import published, shapes, summary
from benchmarks.results import OK, WRONG_RESULT, Measurement, Result
from benchmarks.summary import in_order

Measurements = Sequence[Measurement]


def markdown(result: Result, title: str, picture: str | None = None) -> str:
    parts = [f"# {title}", *_heading(result)]
    if picture:
        parts.append(f"![Efficiency against the bytes of keys and values]({picture})")
    for suite in in_order(m.suite for m in result.measurements):
        found = [m for m in result.measurements if m.suite == suite]
        if suite in shapes.SUITES:
            for dtypes in in_order(m.dtypes for m in found):
                parts += _attention(suite, dtypes, [m for m in found if m.dtypes == dtypes])
        else:
            parts += {"merge": _merge, "moves": _moves, "host": _host, "compile": _compile}[suite](
                found
            )
    parts += _spread(result.measurements)
    parts += _accuracy(result.measurements)
    parts += _without_time(result.measurements)
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def size(num_bytes: int) -> str:
    """Binary units, three digits."""
    value = num_bytes / 2**20
    return f"{value / 1024:.3g} GiB" if value >= 1024 else f"{value:.3g} MiB"


def cell(m: Measurement | None) -> str:
    if m is None or m.time is None:
        return "-"
    words = f"{m.time:.1f}" if m.efficiency is None else f"{m.time:.1f} ({m.efficiency:.2f})"
    return f"WRONG {words}" if m.status == WRONG_RESULT else words


def _heading(result: Result) -> list[str]:
    env = result.environment
    versions = env.get("versions", {})
    installed = ", ".join(f"{name} {v}" for name, v in versions.items() if v)
    changed = ", with changes" if env.get("changed_since_commit") else ""
    parts = [
        f"{env.get('device')}, driver {env.get('driver')}, CUDA {env.get('cuda_runtime')}, "
        f"NVRTC {env.get('nvrtc')}, {installed}. cupy-paged {env.get('cupy_paged')}, commit "
        f"{env.get('commit')}{changed}. {env.get('date')}.",
        "Microseconds of one call, and in brackets the efficiency: the time of a streaming read of "
        "the same bytes in the same process (the floor), divided by the time. Median over replays "
        "of a CUDA graph that rotates over data sets of 600 MB and more; JAX by the host's clock.",
    ]
    if result.systems:
        parts.append("\n".join(f"- {name}: {v}" for name, v in result.systems.items()))
    if not result.finished:
        parts.append("**This run was cut short.**")
    return parts


# ---- attention ----


def _attention(suite: str, dtypes: str, found: Measurements) -> list[str]:
    parts = [f"## {suite}, {dtypes}", _systems_table(dtypes, found, suite == "anchors")]
    if suite == "anchors":
        parts.append(
            'Columns marked "published" come from earlier runs on an H100 80GB HBM3. '
            "They were not measured in this run."
        )
    if any(m.op == "v2" for m in found):
        parts.append(_ops_table(found))
    against = summary.against_measured(found)
    if suite == "anchors":
        against += summary.against_published(found)
        missed = summary.below_target(found)
        listed = [f"{m.shape} {m.layout} {m.efficiency:.3f} ({t})" for m, t in missed]
        if summary.ours(found):
            parts.append("Below the efficiency target: " + (", ".join(listed) or "none") + ".")
    if against:
        parts.append(_against_table(against))
    return parts


def _systems_table(dtypes: str, found: Measurements, with_published: bool) -> str:
    columns: list[tuple[str, Callable[[str], str]]] = []

    def measured(title: str, chosen: Measurements) -> None:
        by_shape = {m.shape: m for m in chosen}
        columns.append((title, lambda shape: cell(by_shape.get(shape))))

    measured("floor", [m for m in found if m.system == "floor"])
    ours = [m for m in found if m.system == "ours" and m.op == summary.OP]
    for layout in in_order(m.layout for m in ours):
        measured(f'ours, "{layout}"', [m for m in ours if m.layout == layout])
    others = [m for m in found if m.system not in ("ours", "floor")]
    for name in in_order(f"{m.system} {m.op}".strip() for m in others):
        measured(name, [m for m in others if f"{m.system} {m.op}".strip() == name])
    if with_published:
        floors = published.FLOORS
        columns.append(("floor, published", lambda s: f"{floors.get((s, dtypes), '-')}"))
        for name, times in published.ATTENTION.items():
            if any(key[1] == dtypes for key in times):
                columns.append(
                    (f"{name}, published", lambda s, t=times: _published(t, (s, dtypes)))
                )
    first = {m.shape: m for m in reversed(found)}
    rows = [
        [
            f"{shape}: {first[shape].problem}",
            size(first[shape].moved_bytes or 0),
            *(value(shape) for _, value in columns),
        ]
        for shape in in_order(m.shape for m in found)
    ]
    return table(["shape", "KV", *(title for title, _ in columns)], rows)


def _published(times: dict[published.Key, float], key: published.Key) -> str:
    if key not in times:
        return "-"
    return f"{times[key]} ({published.FLOORS[key] / times[key]:.2f})"


def _ops_table(found: Measurements) -> str:
    ours = {(m.shape, m.layout, m.op): m for m in found if m.system == "ours"}
    rows = []
    for shape, layout in dict.fromkeys(key[:2] for key in ours):
        ops = [ours.get((shape, layout, op)) for op in (summary.OP, "v1", "v2")]
        times = [m.time if m else None for m in ops]
        ratio = f"{times[1] / times[2]:.3f}" if times[1] and times[2] else "-"
        rows.append([shape, layout, *map(cell, ops), ratio])
    return table(["shape", "layout", summary.OP, "v1", "v2", "v1 / v2"], rows)


def _against_table(against: Sequence[summary.Against]) -> str:
    rows = [
        [
            a.other,
            a.layout,
            str(len(a.ratios)),
            f"{a.ratios[a.worst]:.2f} ({a.worst})",
            f"{a.geometric_mean:.2f}",
        ]
        for a in against
    ]
    return table(
        ["efficiency of ours over that of", "layout", "shapes", "least", "geometric mean"], rows
    )


# ---- the other suites ----


def _merge(found: Measurements) -> list[str]:
    names = in_order(m.system for m in found)
    rows = []
    for shape in in_order(m.shape for m in found):
        by_system = {m.system: m for m in found if m.shape == shape}
        cells = [cell(by_system.get(name)) for name in names]
        old = [f"{times.get(shape, '-')}" for times in published.MERGE.values()]
        moved = next(iter(by_system.values())).moved_bytes or 0
        rows.append([shape, size(moved), *cells, *old])
    header = ["shape", "moved", *names, *(f"{name}, published" for name in published.MERGE)]
    return ["## merge_attn_states, bf16", table(header, rows)]


def _moves(found: Measurements) -> list[str]:
    rows = []
    for shape in in_order(m.shape for m in found):
        by_system = {m.system: m for m in found if m.shape == shape}
        one = next(iter(by_system.values()))
        cells = [cell(by_system.get(name)) for name in ("floor", "ours")]
        rows.append([one.problem, size(one.moved_bytes or 0), *cells])
    header = ["move", "read and written", "the driver's copy", "ours"]
    return ["## Moves, bf16", table(header, rows)]


def _host(found: Measurements) -> list[str]:
    add = next((m.time for m in found if m.system == "torch"), None)
    rows = [
        [
            f"torch {m.op}" if m.system == "torch" else m.op,
            m.arrays,
            f"{m.time:.1f} ({m.low:.1f} to {m.high:.1f})" if m.time else "-",
            f"{m.time / add:.2f}" if m.time and add else "-",
        ]
        for m in found
    ]
    return [
        "## host",
        "Microseconds that one eager call keeps the host busy, and the quartiles.",
        table(["call", "arrays", "time", "of torch's add_"], rows),
    ]


def _compile(found: Measurements) -> list[str]:
    def seconds(m: Measurement) -> str:
        if m.time is None or m.least is None or m.most is None:
            return m.status
        return f"{m.time / 1e6:.3f} ({m.least / 1e6:.3f} to {m.most / 1e6:.3f})"

    rows = [[m.layout, m.dtypes, m.op, seconds(m)] for m in found]
    return ["## first call", table(["layout", "dtypes", "kernel", "seconds"], rows)]


# ---- all together ----


def _spread(found: Measurements) -> list[str]:
    spreads = [((m.high - m.low) / m.time, m.name) for m in found if m.time and m.low and m.high]
    if not spreads:
        return []
    widest, name = max(spreads)
    middle = statistics.median(spread for spread, _ in spreads)
    return [
        "## Spread",
        f"Between the quartiles of one measurement's replays: {middle:.1%} of the time in the "
        f"middle case, {widest:.1%} in the worst ({name}). Runs differ by more than that.",
    ]


def _accuracy(found: Measurements) -> list[str]:
    largest: dict[tuple[str, str, str], Measurement] = {}
    for m in found:
        key = m.suite, m.system, m.dtypes
        if m.error is not None and m.error >= (largest[key].error if key in largest else 0):
            largest[key] = m
    rows = [[*key, f"{m.error:.1e}", m.shape] for key, m in largest.items()]
    if not rows:
        return []
    words = "Largest relative error: of ours against NumPy, of a peer against ours."
    header = ["suite", "system", "dtypes", "error", "shape"]
    return ["## Accuracy", words, table(header, rows)]


def _without_time(found: Measurements) -> list[str]:
    reasons = Counter((m.suite, m.system, m.status, m.note) for m in found if m.status != OK)
    if not reasons:
        return []
    rows = [[*reason, str(count)] for reason, count in reasons.items()]
    return ["## Not measured, or wrong", table(["suite", "system", "what", "why", "times"], rows)]
