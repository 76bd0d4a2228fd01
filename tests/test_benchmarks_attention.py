"""The benchmark of attention, as a whole on NumPy."""

import dataclasses

import numpy as np
import pytest

import cupy_paged
from benchmarks import attention_suite, data, results, tables
from benchmarks.prepared import Like, Prepared, Unsupported
from benchmarks.runner import DeviceLost
from benchmarks.shapes import DTYPES, LAYOUTS, Case, Shape
from support.benchmark_host import HostArrays, attend, small_case, small_runner


@pytest.fixture
def runner(tmp_path, monkeypatch):
    return small_runner(tmp_path, monkeypatch)


class HeadsFirst:
    """A peer in the arrangement of JAX's kernel, whose cache is read by plain indexing."""

    VARIANTS, ARRANGEMENT = ("plain",), "heads first"

    def version():
        return "1"

    def prepare(variant, sets, device):
        arrays, shape, results = HostArrays(), sets.shape, {}
        pages = shape.num_kv_heads, sets.num_blocks, shape.block_size, shape.head_size
        half = sets.pool.size // 2
        caches = [arrays.view(sets.pool, sets.kv_dtype, pages, offset=n * half) for n in (0, 1)]
        keys, values = (arrays.floats(cache, sets.kv_dtype) for cache in caches)
        queries = arrays.floats(sets.query_views(arrays), sets.dtype)

        def call(i):
            out = []
            for seq, n in enumerate(shape.seq_lens):
                blocks = sets.tables[i, seq, : shape.blocks_per_seq[seq]]
                k, v = (a[:, blocks].reshape(len(a), -1, a.shape[3])[:, :n] for a in (keys, values))
                out.append(attend(queries[i, seq], k, v, 1.0))
            results[i] = np.array(out)

        calls = [lambda i=i: call(i) for i in range(sets.num_sets)]
        return Prepared(arrays, calls, lambda: results[1], Like("heads first", sets.tables, 1.0))


class Dense:
    """A peer without paging."""

    VARIANTS, ARRANGEMENT = ("",), "dense"

    def version():
        return "2"

    def prepare(variant, sets, device):
        arrays, shape = HostArrays(), sets.shape
        whole = (2 * shape.batch, shape.num_kv_heads, shape.max_seq_len, shape.head_size)
        half = sets.pool.size // 2
        caches = [arrays.view(sets.pool, sets.kv_dtype, whole, offset=n * half) for n in (0, 1)]
        keys, values = (arrays.floats(cache, sets.kv_dtype) for cache in caches)
        queries = arrays.floats(sets.query_views(arrays)[1], sets.dtype)
        scale, last = shape.default_scale, range(shape.batch, 2 * shape.batch)

        def output():
            return np.array(
                [attend(q, keys[s], values[s], scale) for q, s in zip(queries, last, strict=True)]
            )

        like = Like("dense", data.dense_tables(shape, 2), scale)
        return Prepared(arrays, [lambda: None] * 2, output, like)


class Misread(Dense):
    """Fast, and wrong: it takes its cache for another layout."""

    def prepare(variant, sets, device):
        return dataclasses.replace(
            Dense.prepare(variant, sets, device),
            like=Like("NHD", sets.tables, sets.shape.default_scale),
        )


class Refusing(Dense):
    VARIANTS = ("too new", "broken")

    def prepare(variant, sets, device):
        if variant == "too new":
            raise Unsupported("head_size 16")
        raise RuntimeError("first line\nsecond line")


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("scatter", ["pool", "set"])
def test_attention_suite(runner, dtypes, scatter):
    attention_suite.run(runner, [small_case(dtypes)], ["ours", "floor"], scatter=scatter)
    found = runner.result.measurements
    assert [(m.system, m.layout, m.op) for m in found] == [
        ("floor", "", "streaming read"),
        *(("ours", layout, op) for layout in LAYOUTS for op in ("paged_attention", "v1", "v2")),
    ]
    assert {m.status for m in found} == {"ok"}
    kv_bytes = (40 + 7 + 33) * 2 * 2 * 16 * (1 if dtypes == "fp8" else 2)
    for m in found:
        assert (m.moved_bytes, m.num_sets, m.time) == (kv_bytes, 2, 50.0)
        assert m.system == "floor" or (m.efficiency == 1.0 and 0 < m.error < 5e-3)
    assert results.read(runner.path).measurements == found
    assert len(runner.shown) == len(found)


def test_a_wrong_result_of_ours_shows(runner, monkeypatch):
    right = cupy_paged.paged_attention

    def wrong(*arguments, layout, **keywords):
        right(*arguments, layout="NHD" if layout == "HND" else "HND", **keywords)

    monkeypatch.setattr(cupy_paged, "paged_attention", wrong)
    # As many tokens in a block as heads: the layouts cannot be told apart.
    case = Case("anchors", Shape("square", (40, 7, 33), 6, 2, 16, 2), "bf16", ("HND", "NHD"))
    attention_suite.run(runner, [case], ["ours"], ["paged_attention"])
    assert [m.status for m in runner.result.measurements] == ["wrong"] * 2
    assert "WRONG" in tables.markdown(runner.result, "x")


def test_results_that_nobody_wrote_are_wrong(runner, monkeypatch):
    monkeypatch.setattr(cupy_paged, "paged_attention", lambda *a, **k: None)
    attention_suite.run(runner, [small_case()], ["ours"], ["paged_attention"])
    assert {(m.status, m.note) for m in runner.result.measurements} == {
        ("wrong", "the result is not finite")
    }


@pytest.mark.parametrize("dtypes", ["bf16", "fp8"])
@pytest.mark.parametrize(
    ("peer", "status"), [(HeadsFirst, "ok"), (Dense, "ok"), (Misread, "wrong")]
)
def test_peers_are_checked_in_their_own_arrangement(runner, peer, status, dtypes):
    runner.result.systems["jax"] = peer.version()
    case = small_case(dtypes, seq_lens=(48,) * 3 if issubclass(peer, Dense) else (40, 7, 33))
    attention_suite.run(runner, [case], ["floor", "jax"], load_peer=lambda name: peer)
    (found,) = [m for m in runner.result.measurements if m.system == "jax"]
    assert found.status == status, found
    assert (found.error < 5e-3) == (status == "ok")
    assert found.layout == peer.ARRANGEMENT


def test_what_a_peer_cannot_do_is_a_result(runner):
    runner.result.systems["sdpa"] = "1"
    attention_suite.run(runner, [small_case()], ["sdpa"], load_peer=lambda name: Refusing)
    assert [(m.status, m.note) for m in runner.result.measurements] == [
        ("unsupported", "head_size 16"),
        ("failed", "RuntimeError: first line"),
    ]
    words = tables.markdown(runner.result, "x")
    assert "head_size 16" in words
    assert "first line" in words


def test_a_lost_device_ends_the_run(runner):
    runner.device.lost = "illegal address"
    with pytest.raises(DeviceLost, match="illegal address"):
        attention_suite.run(runner, [small_case()], ["sdpa"], load_peer=lambda name: Refusing)
    assert [m.status for m in results.read(runner.path).measurements] == ["unsupported", "failed"]


def test_nothing_begins_when_the_budget_is_spent(runner):
    runner._budget = 0.0
    attention_suite.run(runner, [small_case()], ["ours", "floor"])
    assert {m.status for m in runner.result.measurements} == {"skipped"}
    assert len(runner.result.measurements) == 10
