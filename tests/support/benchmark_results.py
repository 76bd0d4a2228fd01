"""Results of benchmarks as a run would leave them, made up."""

import dataclasses

from benchmarks import published, shapes, timing
from benchmarks.results import Measurement, Result


def made_up(time_of=lambda shape, layout: 200.0, dtypes="bf16", **environment):
    """A result of all anchors, as a run would leave it."""
    found = []
    for case in shapes.anchors([dtypes]):
        key = case.shape.name, dtypes
        blank = Measurement(
            suite="anchors", shape=key[0], dtypes=dtypes, problem=str(case.shape), system="floor",
            op="streaming read", moved_bytes=case.shape.kv_bytes(dtypes), num_sets=2,
        )  # fmt: skip
        read = published.FLOORS[key]
        found.append(blank.timed(timing.summarise([read] * 5)))
        for layout in case.layouts:
            for op in ("paged_attention", "v1", "v2"):
                ours = dataclasses.replace(
                    blank, system="ours", op=op, layout=layout, arrays="cupy"
                )
                time = time_of(key[0], layout)
                timed = ours.timed(timing.summarise([0.99 * time, time, 1.01 * time]), read)
                found.append(timed.checked(2e-3))
        peer = dataclasses.replace(blank, system="xqa", layout="NHD", op="")
        time = published.ATTENTION["XQA"].get(key)
        found.append(
            peer.timed(timing.summarise([time] * 5), read).checked(3e-3)
            if time
            else peer.without_time("failed", "RuntimeError: no kernel")
        )
    systems = {"xqa": "0.6.4", "jax": "not installed: no module"}
    return Result(
        {"device": "a device", **environment}, {"suite": ["anchors"]}, systems, found, True
    )


def as_published(shape, layout):
    return published.ATTENTION["FlashInfer 0.6.4"][shape, "bf16"]
