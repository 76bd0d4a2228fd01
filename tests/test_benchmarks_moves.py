"""The benchmark of moves, as a whole on NumPy."""

import pytest

import cupy_paged
from benchmarks import moves_suite, tables
from support.benchmark_host import small_runner


@pytest.fixture
def runner(tmp_path, monkeypatch):
    return small_runner(tmp_path, monkeypatch)


@pytest.mark.parametrize("move", list(moves_suite.moves([1 << 20])), ids=lambda move: move.name)
def test_moves_suite(runner, move):
    moves_suite.run(runner, [], ["ours", "floor"], chosen=[move])
    copy, ours = runner.result.measurements
    assert (copy.status, ours.status, ours.op) == ("ok", "ok", move.op)
    assert (ours.error, ours.efficiency, ours.moved_bytes) == (0.0, 1.0, 2 << 20)
    assert move.words in tables.markdown(runner.result, "x")


def test_a_move_that_moves_nothing_is_wrong(runner, monkeypatch):
    move = moves_suite.Move("gather_cache", 1 << 20)
    monkeypatch.setattr(cupy_paged, "gather_cache", lambda *a, **k: None)
    moves_suite.run(runner, [], ["ours"], chosen=[move])
    assert runner.result.measurements[0].status == "wrong"
