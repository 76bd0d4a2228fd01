"""The benchmark of merge_attn_states, as a whole on NumPy."""

import pytest

from benchmarks import merge_suite, published, tables
from support.benchmark_host import small_runner


@pytest.fixture
def runner(tmp_path, monkeypatch):
    return small_runner(tmp_path, monkeypatch)


def test_merge_suite(runner):
    shape = merge_suite.MergeShape(130, 2, 16)
    assert shape.moved_bytes == 130 * 2 * (16 * 2 + 4) * 3
    merge_suite.run(runner, [], ["ours", "floor"], shapes=[shape])
    read, ours = runner.result.measurements
    assert (read.status, ours.status, ours.op) == ("ok", "ok", "merge_attn_states")
    assert ours.error < 5e-3
    assert ours.efficiency == 1.0
    assert "130x2x16" in tables.markdown(runner.result, "x")


def test_merge_shapes_are_those_published():
    assert [s.name for s in merge_suite.SHAPES] == list(published.MERGE["FlashInfer 0.6.4"])
