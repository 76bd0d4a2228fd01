"""A result as a picture: efficiency against the bytes of keys and values."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks import published, shapes, summary
from benchmarks.results import OK, Measurement, Result
from benchmarks.summary import in_order

Points = list[tuple[float, float]]  # MiB, efficiency


def lines(measurements: list[Measurement]) -> dict[str, Points]:
    """The points of each system, from left to right: of a peer's kernels the better for a shape."""
    found: dict[str, dict[tuple[str, str], tuple[float, float]]] = {}
    for m in measurements:
        if m.system == "floor" or m.status != OK or m.efficiency is None or not m.moved_bytes:
            continue
        if m.system == "ours" and m.op != summary.OP:
            continue
        name = f"ours, {m.layout}" if m.system == "ours" else m.system
        points, point = found.setdefault(name, {}), (m.moved_bytes / 2**20, m.efficiency)
        points[m.shape, m.dtypes] = max(points.get((m.shape, m.dtypes), point), point)
    return {name: sorted(points.values()) for name, points in found.items()}


def published_lines(measurements: list[Measurement], dtypes: str) -> dict[str, Points]:
    """FlashInfer's published points, for those shapes that were measured, and not with it."""
    if any(m.system == "flashinfer" and m.status == OK for m in measurements):
        return {}
    sizes = {m.shape: m.moved_bytes for m in measurements if m.moved_bytes}
    name = "FlashInfer 0.6.4"
    points = [
        (sizes[key[0]] / 2**20, published.FLOORS[key] / time)
        for key, time in published.ATTENTION[name].items()
        if key[1] == dtypes and key[0] in sizes
    ]
    return {f"{name}, published, not measured here": sorted(points)} if points else {}


def through(points: Points) -> Points:
    """One point for each size: the geometric mean of those that share it."""
    by_size: dict[float, list[float]] = {}
    for x, y in points:
        by_size.setdefault(x, []).append(y)
    return [(x, statistics.geometric_mean(values)) for x, values in by_size.items()]


def draw(result: Result, path: Path) -> bool:
    """Draws a panel for each suite and dtype of attention. False if there is nothing to draw."""
    found = [m for m in result.measurements if m.suite in shapes.SUITES]
    panels = in_order(f"{m.suite}, {m.dtypes}" for m in found if lines([m]))
    if not panels:
        return False

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(7 * len(panels), 5), sharey=True, squeeze=False
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        shown = [m for m in found if f"{m.suite}, {m.dtypes}" == panel]
        for name, points in lines(shown).items():
            (line,) = axis.plot(*zip(*through(points), strict=True), linewidth=1, label=name)
            axis.plot(*zip(*points, strict=True), "o", markersize=4, color=line.get_color())
        if shown[0].suite == "anchors":
            for name, points in published_lines(shown, shown[0].dtypes).items():
                xy = zip(*through(points), strict=True)
                axis.plot(*xy, "--", color="grey", linewidth=1, label=name)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("keys and values, MiB")
        axis.set_title(panel)
        axis.set_ylim(0, 1.05)
        axis.grid(alpha=0.3)
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12)}
        axis.legend(**below, ncols=3, fontsize="small", frameon=False)
    axes[0][0].set_ylabel("efficiency: time of a streaming read / time")
    figure.suptitle(str(result.environment.get("device")))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
