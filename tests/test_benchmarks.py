"""The benchmarks, without a GPU: shapes, data sets, timing, results, and whole suites on NumPy."""

import argparse
import dataclasses
import functools
import importlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import cupy_paged
from benchmarks import (
    __main__,
    attention_suite,
    chart,
    check,
    compare,
    compile_suite,
    data,
    device,
    environment,
    first_call,
    floor,
    frameworks,
    host_suite,
    merge_suite,
    moves_suite,
    peers,
    published,
    results,
    run,
    shapes,
    summary,
    tables,
    timing,
)
from benchmarks.peers import flashinfer_decode, pallas, sdpa, xqa
from benchmarks.prepared import Like, Prepared, Unsupported
from benchmarks.results import Measurement, Result
from benchmarks.runner import DeviceLost, Runner
from benchmarks.shapes import DTYPES, LAYOUTS, Case, Shape
from cupy_paged.dtypes import STORAGE, decode, itemsize
from support import nvrtc

MIB = 2**20

# ---- stand-ins for the GPU ----


class HostDevice:
    """Memory of the host. `lost` is what a broken device says from then on."""

    num_multiprocessors, sm = 4, 90

    def __init__(self):
        self.lost, self.reads = None, []

    def memory(self, num_bytes):
        # Aligned as CuPy's is.
        whole = np.zeros(num_bytes + 512, np.uint8)
        start = -whole.ctypes.data % 512
        return whole[start : start + num_bytes]

    def fill(self, memory, dtype, seed):
        rng = np.random.default_rng(seed)
        memory.view(STORAGE[dtype])[:] = rng.choice(
            device.normal_table(dtype), memory.size // itemsize(dtype)
        )

    def pinned(self, num_bytes):
        return self.memory(num_bytes)

    def copy(self, target, source):
        assert target.nbytes == source.nbytes
        target[:] = source

    def spoil(self, memory):
        memory[:] = 255

    def read(self, variant, memory, start, num_bytes):
        self.reads.append((start, memory[start : start + num_bytes].size))

    def synchronize(self):
        if self.lost:
            raise RuntimeError(self.lost)

    def release(self):
        pass


class FakeClock:
    """Says that each launch took `microseconds`, but for the one after a wait, which took more."""

    def __init__(self, microseconds):
        self.now, self.waits, self.microseconds_of_launch = 0.0, 0, microseconds
        self.idle = True

    def stamp(self):
        return self.now

    def microseconds(self, first, second):
        return second - first

    def wait(self):
        self.waits += 1
        self.idle = True

    def pass_launch(self):
        self.now += self.microseconds_of_launch + (1000 if self.idle else 0)
        self.idle = False


class FakeReplay:
    def __init__(self, calls, microseconds=100.0):
        self.count, self.calls, self.clock = len(calls), calls, FakeClock(microseconds)
        self.launches = 0

    def launch(self):
        self.launches += 1
        if self.launches == 1:
            for call in self.calls:
                call()
        self.clock.pass_launch()


class HostArrays:
    name = "numpy"

    def view(self, memory, dtype, shape, strides=None, offset=0):
        kind = frameworks.numpy_dtype(dtype)
        in_bytes = None if strides is None else [s * kind.itemsize for s in strides]
        return np.ndarray(shape, kind, memory, offset, in_bytes)

    def array(self, host):
        return host

    def floats(self, array, dtype, rows=None):
        bits = array.view(STORAGE[dtype])
        return decode(bits if rows is None else bits[rows], dtype, np.float32)

    def capture(self, calls):
        calls[0]()
        return FakeReplay(calls)


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """A runner on the host, whose data sets are two and small."""
    monkeypatch.setattr(data, "MIN_BYTES", 1)
    result = Result({"device": "none"}, {}, {}, [])
    arrays = HostArrays()
    shown = []
    made = Runner(HostDevice(), arrays, arrays, result, tmp_path / "r.json", show=shown.append)
    made.shown = shown
    return made


def small_case(dtypes="bf16", layouts=LAYOUTS, seq_lens=(40, 7, 33)):
    return Case("anchors", Shape("small", seq_lens, 6, 2, 16), dtypes, layouts)


# ---- shapes ----


def test_anchors_hold_the_published_bytes():
    expected = {
        "b1_8k": 32, "b1_128k": 512, "b8_4k": 128, "b64_2k": 512, "b128_1k": 512, "b32_mha": 2048,
        "b32_g8": 1024, "b64_d64": 512, "b32_d256": 512,
    }  # fmt: skip
    found = {s.name: s.kv_bytes("bf16") for s in shapes.ANCHORS}
    assert found.pop("b256_rag") == pytest.approx(2.05 * 1024 * MIB, rel=0.005)
    assert found == {name: mib * MIB for name, mib in expected.items()}
    for s in shapes.ANCHORS:
        assert 2 * s.kv_bytes("fp8") == s.kv_bytes("fp16") == s.kv_bytes("bf16")


def test_anchors_are_those_of_the_published_tables():
    cases = {(c.shape.name, c.dtypes) for c in shapes.anchors()}
    assert cases == set(published.FLOORS)
    for times in published.ATTENTION.values():
        assert set(times) <= cases
    assert all(c.layouts == LAYOUTS for c in shapes.anchors())
    assert len(shapes.anchors(["fp16"], ["HND"])) == len(shapes.ANCHORS)


def test_wide_covers_what_it_says():
    cases = shapes.wide()
    found = {c.shape for c in cases}
    assert len({(c.shape.name, c.dtypes) for c in cases}) == len(cases)
    assert {s.num_heads // s.num_kv_heads for s in found} == {1, 3, 4, 7, 8, 16}
    assert {s.head_size for s in found} == {64, 80, 128, 256}
    assert {s.block_size for s in found} == {8, 16, 32, 64, 128}
    assert {s.batch for s in found} >= {1, 512}
    assert {c.dtypes for c in cases} == set(DTYPES)
    assert {layout for c in cases for layout in c.layouts} == set(LAYOUTS)
    assert max(s.max_seq_len for s in found) == 2**20
    long_tail = next(s for s in found if s.name == "long_tail")
    assert long_tail.max_seq_len > 20 * np.median(long_tail.seq_lens)
    # Two data sets of the largest fit a device of 80 GB many times over.
    assert max(s.kv_bytes("bf16") for s in found) <= 4 * 2**30


def test_given_dtypes_and_layouts_hold_for_every_shape():
    cases = shapes.wide(["fp8", "fp16"], ["vllm"])
    assert len(cases) == 2 * len(shapes.WIDE)
    assert {c.layouts for c in cases} == {("vllm",)}


def test_shape_says_what_it_is():
    assert str(shapes.ANCHORS[3]) == "64x2048, 32/8, 128"
    assert str(Shape("x", (5, 9), block_size=32)) == "2x(5..9), 32/8, 128, block 32"


# ---- data sets ----


@pytest.mark.parametrize(("mib", "sets"), [(1, 573), (16, 36), (32, 18), (512, 2), (2048, 2)])
def test_data_sets_outgrow_the_cache(mib, sets):
    assert data.num_sets(mib * MIB) == sets
    assert sets * mib * MIB >= 600e6


@pytest.mark.parametrize("scatter", ["pool", "set"])
def test_block_tables_use_each_block_once(scatter):
    shape = Shape("x", (40, 7, 33, 16))
    found = data.block_tables(shape, 5, scatter, 0)
    assert (found.shape, found.dtype) == ((5, 4, 3), np.int32)
    live = np.arange(3) < np.array([3, 1, 3, 1])[:, None]
    used = found[:, live]
    assert sorted(used.ravel()) == list(range(5 * 8))
    assert not found[:, ~live].any()
    own = np.arange(5)[:, None] == used // 8
    assert own.all() == (scatter == "set")


def attend(query, keys, values, scale):
    """float64 attention of query [num_heads, d] over keys and values [num_kv_heads, n, d]."""
    group = len(query) // len(keys)
    out = []
    for head, q in enumerate(query.astype(np.float64)):
        k, v = keys[head // group].astype(np.float64), values[head // group]
        scores = k @ q * scale
        weights = np.exp(scores - scores.max())
        out.append(weights @ v / weights.sum())
    return np.array(out)


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


# ---- timing ----


def test_time_is_the_median_without_the_first_replay():
    replay = FakeReplay([lambda: None] * 4, microseconds=100.0)
    found = timing.time_replays(replay, 7)
    assert found == timing.Timing(25.0, 25.0, 25.0, 25.0, 25.0, 7)


def test_replays_follow_the_length():
    assert timing.replays_for(400) == 100
    assert timing.replays_for(1400) == 29
    assert timing.replays_for(1e5) == timing.FEWEST
    assert timing.replays_for(0) == timing.MOST
    assert timing.time_replays(FakeReplay([print], 2000.0)).replays == 20


def test_summary_has_quartiles():
    found = timing.summarise([4, 1, 3, 2, 5])
    assert found == timing.Timing(3, 2, 4, 1, 5, 5)


def test_wall_clock_waits_for_each_stamp():
    waits = []
    clock = timing.WallClock(lambda: waits.append(1))
    first, second = clock.stamp(), clock.stamp()
    assert len(waits) == 2
    assert clock.microseconds(first, second) >= 0
    assert clock.microseconds(1.0, 1.5) == 5e5


def test_chain_waits_for_its_last_call():
    waited = []
    chain = frameworks.Chain([lambda: "first", lambda: "last"], waited.append)
    chain.launch()
    chain.clock.wait()
    assert (chain.count, waited) == (2 * frameworks.CHAIN, ["last"])


# ---- the floor ----


def test_floor_reads_each_set_once_and_keeps_the_fastest(monkeypatch):
    host = HostDevice()
    arrays = HostArrays()
    variants = iter(floor.VARIANTS)

    def capture(calls):
        calls[0]()
        # The third candidate is the fastest.
        number = next(variants, None)
        return FakeReplay(calls, 50.0 if number in (floor.VARIANTS[2], None) else 80.0)

    monkeypatch.setattr(arrays, "capture", capture)
    floors = floor.Floors(host, arrays, 5)
    found = floors.time(host.memory(3 * 64), 64, 3)
    assert found.variant == floor.VARIANTS[2]
    assert found.timing.median == pytest.approx(50 / 3)
    assert set(host.reads) == {(0, 64), (64, 64), (128, 64)}
    assert floors.time(None, 64, 3) is found


def test_grids_fit_the_work():
    persistent, one_piece = floor.Variant(512, 4, 4), floor.Variant(256, 4, 0)
    assert persistent.grid(2**27, 132) == 4 * 132
    assert persistent.grid(2048 * 3 + 1, 132) == 4
    assert one_piece.grid(2**27, 132) == 2**17
    assert one_piece.grid(0, 132) == 1


@pytest.mark.parametrize("sm", [75, 80, 90])
def test_kernels_compile_and_keep_their_loads_in_flight(sm):
    pytest.importorskip("cupy", reason="CuPy brings NVRTC: the cuda12 and cuda13 extras have it")
    names = {v.kernel: v for v in floor.variants(sm)}
    assert sm >= 80 or not any(v.far_prefetch for v in names.values())
    source = device.source("streaming_read.cu")
    compiled = nvrtc.compile(source, list(names), sm, device.OPTIONS)
    for name, used in compiled.kernels.items():
        assert not (used.spill_stores or used.spill_loads or used.stack), name
        assert used.registers > 4 * names[name].loads, name
    for v in floor.variants(sm):
        registers = compiled.kernels[v.kernel].registers
        assert sm < 80 or registers * v.threads * max(v.blocks_per_sm, 1) <= 64 * 1024, v
    fills = [f"fill<unsigned {bits}>" for bits in ("char", "short", "int")]
    filled = nvrtc.compile(device.source("fill.cu"), fills, sm, device.OPTIONS)
    assert set(filled.kernels) == set(fills)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float32"])
def test_random_data_is_ordinary(dtype):
    values = decode(device.normal_table(dtype), dtype)
    assert len(values) == device.TABLE_SIZE
    assert np.isfinite(values).all()
    assert abs(values.mean()) < 0.05
    assert values.std() == pytest.approx(1, abs=0.05)


# ---- whole suites ----


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


def test_merge_suite(runner):
    shape = merge_suite.MergeShape(130, 2, 16)
    assert shape.moved_bytes == 130 * 2 * (16 * 2 + 4) * 3
    merge_suite.run(runner, [], ["ours", "floor"], shapes=[shape])
    read, ours = runner.result.measurements
    assert (read.status, ours.status, ours.op) == ("ok", "ok", "merge_attn_states")
    assert ours.error < 5e-3
    assert ours.efficiency == 1.0
    assert "130x2x16" in tables.markdown(runner.result, "x")


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


def test_merge_shapes_are_those_published():
    assert [s.name for s in merge_suite.SHAPES] == list(published.MERGE["FlashInfer 0.6.4"])


def test_host_calls_are_valid():
    calls = host_suite.our_calls(HostDevice(), HostArrays())
    assert len(calls) == 6
    for call in calls.values():
        call()


def test_host_time_is_of_blocks_that_take_turns():
    order, clock = [], iter(range(1000))

    def function(name):
        return lambda: order.append(name)

    found = host_suite.time_calls(
        {name: function(name) for name in "ab"}, lambda: None, 2, 3, lambda: next(clock)
    )
    assert "".join(order) == "aaabbb" * 3
    assert found["a"] == timing.summarise([1e6 / 3] * 2)


def test_host_suite_says_what_is_missing(runner, monkeypatch):
    def no_torch():
        raise ImportError("no torch")

    no_torch.name = "torch"
    monkeypatch.setattr(host_suite, "CuPy", HostArrays)
    monkeypatch.setattr(host_suite, "Torch", no_torch)
    monkeypatch.setattr(cupy_paged, "merge_attn_states", lambda *a: 1 / 0)
    host_suite.run(runner, rounds=2, calls=1)
    *found, merge = runner.result.measurements
    assert [(m.system, m.arrays, m.status) for m in found] == [("ours", "numpy", "ok")] * 5
    assert merge.note == "ZeroDivisionError: division by zero"
    assert runner.result.systems == {"torch": "not installed: no torch"}
    assert "| v1 | numpy |" in tables.markdown(runner.result, "x")


def test_compile_suite(runner):
    def call(layout, dtypes, cache):
        cold = not any(cache.iterdir())
        (cache / "kernel").touch()
        if dtypes == "fp8" and not cold:
            (cache / "again").touch()
        return 1.5 if cold else 0.05

    compile_suite.run(runner, (("HND", "bf16"), ("HND", "fp8")), 2, call)
    cold, warm, _, again = runner.result.measurements
    assert (cold.op, cold.time) == ("cold", 1.5e6)
    assert (warm.op, warm.time) == ("from disk", pytest.approx(5e4))
    assert again.status == "wrong"
    assert "1.500" in tables.markdown(runner.result, "x")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_first_call_is_valid(layout, dtypes):
    dtype, kv_dtype = (frameworks.numpy_dtype(name) for name in DTYPES[dtypes])
    caches = [np.zeros(s, kv_dtype) for s in first_call.cache_shapes(layout, kv_dtype.itemsize)]
    cupy_paged.paged_attention(
        np.zeros((1, 32, 128), dtype),
        *caches,
        np.zeros((1, 1), np.int32),
        np.ones(1, np.int32),
        layout=layout,
        kv_cache_dtype=check.kv_cache_dtype(DTYPES[dtypes][1]),
    )


def test_first_call_says_why_it_failed(tmp_path):
    with pytest.raises(RuntimeError, match="KeyError"):
        compile_suite.first_call("HND", "fp99", tmp_path)


# ---- peers ----


def test_every_peer_has_the_same_face():
    for name in peers.MODULES:
        module = peers.load(name)
        assert module.VARIANTS
        assert module.ARRANGEMENT in (*LAYOUTS, "heads first", "dense")
        assert callable(module.version)
        assert callable(module.prepare)


def test_peers_decline_what_they_do_not_do():
    def sets(dtypes="bf16", **fields):
        return data.DataSets(
            Shape("x", **{"seq_lens": (32,)} | fields), dtypes, 2, None, None, None
        )

    for module, given in (
        (sdpa, sets("fp8")),
        (sdpa, sets(seq_lens=(3, 5))),
        (pallas, sets("fp8")),
        (xqa, sets(block_size=8)),
    ):
        with pytest.raises(Unsupported):
            module.prepare("", given, None)


def test_page_indices_are_the_live_entries():
    table = np.array([[3, 0, 0], [4, 5, 6]], np.int32)
    assert flashinfer_decode.page_indices(table, (1, 3)).tolist() == [3, 4, 5, 6]


def test_tables_are_padded_for_pallas():
    assert pallas.padded(np.zeros((2, 3, 17), np.int32)).shape == (2, 3, 32)
    assert [pallas.pages_per_compute_block(w) for w in (16, 32, 48, 64, 512)] == [1, 2, 1, 4, 8]


def test_a_peer_that_is_missing_is_named():
    def load(name):
        if name == "xqa":
            return SimpleNamespace(version=lambda: "0.6.4")
        raise ImportError("No module named 'x'")

    ready, found = run.find_systems(["ours", "floor", "xqa", "jax"], load)
    assert ready == ["ours", "floor", "xqa"]
    assert found == {"xqa": "0.6.4", "jax": "not installed: No module named 'x'"}


# ---- peers, on the host ----


class HostTorch(frameworks.Torch):
    def __init__(self):
        self.torch = pytest.importorskip("torch", reason="this peer takes torch tensors")
        self.device = "cpu"

    def capture(self, calls):
        calls[0]()
        return FakeReplay(calls)


class HostJax(frameworks.Jax):
    def __init__(self):
        self.jax = pytest.importorskip("jax", reason="this peer takes JAX arrays")

    def view(self, memory, dtype, shape, offset=0):
        return self.jax.numpy.asarray(HostArrays().view(memory, dtype, shape, offset=offset))

    def capture(self, calls):
        calls[0]()
        return FakeReplay(calls)


def gathered(cache, blocks, seq_len):
    """[num_kv_heads, seq_len, head_size] of a cache [num_blocks, block_size, heads, head_size]."""
    return cache[blocks].flatten(0, 1)[:seq_len].float().numpy().swapaxes(0, 1)


class FlashInfer:
    """What is used of the library, in plain indexing, with its own signatures."""

    class BatchDecodeWithPagedKVCacheWrapper:
        def __init__(self, float_workspace_buffer, kv_layout="NHD", use_tensor_cores=False):
            assert float_workspace_buffer.any() == 0
            self.swap = kv_layout == "HND"

        def plan(
            self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
            *, q_data_type, kv_data_type,
        ):  # fmt: skip
            pages = np.diff(indptr.numpy())
            self.lens = (pages - 1) * page_size + last_page_len.numpy()
            self.blocks = np.split(indices.numpy(), indptr.numpy()[1:-1])
            self.types = q_data_type, kv_data_type

        def run(self, q, paged_kv_cache, *, out):
            assert (q.dtype, paged_kv_cache[0].dtype) == self.types
            caches = [a.transpose(1, 2) if self.swap else a for a in paged_kv_cache]
            scale = q.shape[-1] ** -0.5
            for i, (blocks, n) in enumerate(zip(self.blocks, self.lens, strict=True)):
                k, v = (gathered(cache, blocks, n) for cache in caches)
                found = attend(q[i].float().numpy(), k, v, scale)
                out[i] = out.new_tensor(found)

    @staticmethod
    def xqa(
        q, k_cache, v_cache, page_table, seq_lens, output, workspace_buffer, semaphores,
        num_kv_heads, page_size, *, kv_layout="NHD",
    ):  # fmt: skip
        assert str(seq_lens.dtype) == "torch.uint32"
        assert seq_lens.shape == (len(q), 1)
        assert (k_cache.shape[1:3], kv_layout) == ((page_size, num_kv_heads), "NHD")
        for i, n in enumerate(seq_lens[:, 0].tolist()):
            blocks = page_table[i, : -(-n // page_size)]
            k, v = (gathered(cache, blocks, n) for cache in (k_cache, v_cache))
            found = attend(q[i, 0].float().numpy(), k, v, q.shape[-1] ** -0.5)
            output[i, 0] = output.new_tensor(found)

    @staticmethod
    def merge_state(v_a, s_a, v_b, s_b):
        assert s_a.shape == v_a.shape[:2]
        a, b = (s.exp2()[..., None] for s in (s_a, s_b))
        return ((v_a * a + v_b * b) / (a + b)).to(v_a.dtype), None


@pytest.fixture
def flashinfer(monkeypatch):
    stand_in = SimpleNamespace(
        BatchDecodeWithPagedKVCacheWrapper=FlashInfer.BatchDecodeWithPagedKVCacheWrapper,
        merge_state=FlashInfer.merge_state,
        __version__="0.6.4",
    )
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in)
    monkeypatch.setitem(sys.modules, "flashinfer.xqa", SimpleNamespace(xqa=FlashInfer.xqa))
    for module in (flashinfer_decode, xqa, sdpa, merge_suite):
        monkeypatch.setattr(module, "Torch", HostTorch)
    monkeypatch.setattr(flashinfer_decode, "WORKSPACE_BYTES", 16)
    monkeypatch.setattr(xqa, "WORKSPACE_BYTES", 16)


@pytest.mark.parametrize(
    ("name", "dtypes", "seq_lens"),
    [
        ("flashinfer", "bf16", (40, 7, 33)),
        ("flashinfer", "fp8", (40, 7, 33)),
        ("xqa", "bf16", (40, 7, 32)),
        ("xqa", "fp8", (40, 7, 32)),
        ("sdpa", "bf16", (48, 48)),
        ("sdpa", "fp16", (48, 48)),
    ],
)
def test_torch_peers_are_called_for_the_same_result(runner, flashinfer, name, dtypes, seq_lens):
    attention_suite.run(runner, [small_case(dtypes, seq_lens=seq_lens)], ["floor", name])
    _, *found = runner.result.measurements
    assert len(found) == len(peers.load(name).VARIANTS)
    for m in found:
        assert (m.status, m.system, m.efficiency) == ("ok", name, 1.0), m
        assert m.error < 1e-2


def test_pallas_is_called_for_the_same_result(runner, monkeypatch):
    monkeypatch.setattr(pallas, "Jax", HostJax)
    HostJax()
    kernel = importlib.import_module("jax.experimental.pallas.ops.gpu.paged_attention")
    monkeypatch.setattr(
        kernel, "paged_attention", functools.partial(kernel.paged_attention, interpret=True)
    )
    attention_suite.run(runner, [small_case(seq_lens=(40, 7))], ["floor", "jax"])
    _, found = runner.result.measurements
    assert found.status == "ok", found
    assert found.error < 1e-2


def test_merge_suite_calls_flashinfer_for_the_same_result(runner, flashinfer):
    merge_suite.run(runner, [], ["flashinfer"], shapes=[merge_suite.MergeShape(130, 2, 16)])
    (found,) = runner.result.measurements
    assert found.status == "ok", found
    assert found.error < 1e-2


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("arrangement", [*LAYOUTS, "heads first"])
def test_torch_sees_the_memory_that_cupy_sees(runner, arrangement, dtypes):
    sets = data.build(runner.device, small_case(dtypes))
    torch, plain = HostTorch(), HostArrays()
    for ours, theirs in zip(
        sets.caches(plain, arrangement)[:2], sets.caches(torch, arrangement)[:2], strict=True
    ):
        expected = plain.floats(ours, sets.kv_dtype)
        np.testing.assert_array_equal(torch.floats(theirs, sets.kv_dtype), expected)


# ---- the command ----


def parse(*words):
    return __main__.build_parser().parse_args(["run", *words])


def test_options():
    plain = parse()
    assert (plain.suite, plain.systems, plain.replays) == (["anchors"], ["ours", "floor"], None)
    given = parse(
        "--shapes", "b1_*", "b64*", "--systems", "ours,xqa", "--layouts", "HND,NHD", "--dtypes",
        "fp8", "--suite", "all", "--replays", "9", "--out", "x", "--time-budget", "120",
    )  # fmt: skip
    assert (given.systems, given.layouts, given.dtypes) == (
        ["ours", "xqa"],
        ["HND", "NHD"],
        ["fp8"],
    )
    assert (given.replays, given.out, given.time_budget) == (9, Path("x"), 120.0)
    assert run.chosen_suites(given.suite) == list(run.SUITES)
    names = [s.name for s in shapes.ANCHORS if shapes.matches(s.name, given.shapes)]
    assert names == ["b1_8k", "b1_128k", "b64_2k", "b64_d64"]
    recorded = run.recorded_options(given)
    assert "out" not in recorded
    json.dumps(recorded)


@pytest.mark.parametrize(
    "words",
    [
        ("--systems", "ours,other"),
        ("--layouts", ""),
        ("--dtypes", "fp4"),
        ("--replays", "1"),
        ("--time-budget", "0"),
        ("--suite", "other"),
    ],
)
def test_wrong_options_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        parse(*words)
    assert words[0] in capsys.readouterr().err


def test_measure_runs_the_suites_that_were_asked_for(runner, monkeypatch):
    ran = []
    monkeypatch.setattr(attention_suite, "run", lambda s, cases, *rest: ran.append(cases))
    monkeypatch.setattr(merge_suite, "run", lambda *a: ran.append("merge"))
    monkeypatch.setattr(moves_suite, "run", lambda *a: ran.append("moves"))
    monkeypatch.setattr(host_suite, "run", lambda s: ran.append("host"))
    monkeypatch.setattr(compile_suite, "run", lambda s: ran.append("compile"))
    run.measure(runner, parse("--suite", "all", "--shapes", "b1_8k", "base"), ["ours"])
    anchors, wide, *rest = ran
    assert [(c.shape.name, c.dtypes) for c in anchors] == [("b1_8k", "bf16"), ("b1_8k", "fp8")]
    assert [c.shape.name for c in wide] == ["base"] * 3
    assert rest == ["merge", "moves", "host", "compile"]


def test_run_leaves_a_document_tables_and_a_chart(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="the test extra has it")
    monkeypatch.setattr(device, "Device", HostDevice)
    monkeypatch.setattr(frameworks, "CuPy", HostArrays)
    monkeypatch.setattr(data, "MIN_BYTES", 1)
    monkeypatch.setattr(shapes, "ANCHORS", (small_case().shape,))
    monkeypatch.setattr(run.signal, "signal", lambda *a: None)
    words = ["--dtypes", "bf16", "--layouts", "HND", "--replays", "3", "--name", "x", "--out"]
    command = ["run", *words, str(tmp_path / "new"), "--ops"]
    assert __main__.main([*command, "v1"]) == 0
    result = results.read(tmp_path / "new" / "x.json")
    assert result.finished
    assert [m.op for m in result.measurements] == ["streaming read", "v1"]
    assert result.options["replays"] == 3
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"x.json", "x.md"}  # v1 is no line
    assert "ours v1" in capsys.readouterr().out

    assert __main__.main([*command, "v1", "--time-budget", "1e-9"]) == 0
    assert not results.read(tmp_path / "new" / "x.json").finished
    assert __main__.main([*command, "paged_attention"]) == 0
    assert (tmp_path / "new" / "x.png").exists()


def test_run_without_a_gpu_says_so(tmp_path, monkeypatch, capsys):
    def no_device():
        raise ImportError("No module named 'cupy'")

    monkeypatch.setattr(device, "Device", no_device)
    assert __main__.main(["run", "--out", str(tmp_path)]) == 2
    assert "No module named 'cupy'" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())


def test_environment_can_be_recorded():
    found = environment.describe()
    assert found["cupy_paged"] == cupy_paged.__version__
    assert {"device", "driver", "nvrtc", "commit", "date", "versions"} <= set(found)
    json.dumps(found)


# ---- results, tables, chart, comparison ----


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


def test_result_survives_the_disk(tmp_path):
    result = made_up()
    result.write(tmp_path / "new" / "r.json")
    assert results.read(tmp_path / "new" / "r.json") == result
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["r.json"]


def test_other_documents_are_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 1"):
        results.read(path)


def test_an_error_that_is_no_number_can_be_written(tmp_path):
    blank = Measurement(suite="anchors", shape="x", system="xqa", op="")
    checked = blank.timed(timing.summarise([1.0, 1.0])).checked(math.nan)
    Result({}, {}, {}, [checked]).write(tmp_path / "r.json")
    assert results.read(tmp_path / "r.json").measurements[0].status == "wrong"


def test_markdown():
    words = tables.markdown(made_up(as_published), "a title", "a.png")
    assert words.startswith("# a title\n")
    assert "![" in words
    row = next(line for line in words.splitlines() if line.startswith("| b64_2k: 64x2048"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:3] == ["512 MiB", "177.7"]
    assert cells[3:7] == ["188.6 (0.94)"] * 3 + ["198.3 (0.90)"]
    assert "FlashInfer 0.6.4, published" in words
    assert "not measured in this run" in words
    assert "jax: not installed: no module" in words
    assert "RuntimeError: no kernel" in words
    assert "b1_8k vllm 0.670 (0.88)" in words
    assert "1.0% of the time in the middle case" in words
    assert "cut short" not in words
    assert "cut short" in tables.markdown(dataclasses.replace(made_up(), finished=False), "x")


def test_against_published_times_and_peers():
    found = made_up(as_published).measurements
    flashinfer = summary.against_published(found)[0]
    assert (flashinfer.other, flashinfer.layout) == ("FlashInfer 0.6.4, published", "vllm")
    assert flashinfer.geometric_mean == pytest.approx(1)
    here = summary.against_measured(found)
    assert [a.layout for a in here] == list(LAYOUTS)
    assert here[0].ratios["b64_2k"] == pytest.approx(198.3 / 188.6)
    assert here[0].worst == "b1_8k"


def test_the_faster_variant_of_a_peer_counts():
    blank = Measurement(suite="anchors", shape="x", system="flashinfer", op="a", moved_bytes=1)
    slow, fast = (
        dataclasses.replace(blank, op=op).timed(timing.summarise([t, t]))
        for op, t in zip("ab", (3, 2), strict=True)
    )
    ours = dataclasses.replace(blank, system="ours", op="paged_attention", layout="HND")
    (found,) = summary.against_measured([slow, fast, ours.timed(timing.summarise([1.0, 1.0]))])
    assert found.ratios == {"x": pytest.approx(2)}


def test_targets_follow_the_bytes():
    targets = [published.target_efficiency(mib * MIB) for mib in (8, 16, 32, 64, 128, 256, 2048)]
    assert targets == [None, 0.75, 0.88, 0.88, 0.92, 0.95, 0.95]


def test_chart(tmp_path):
    pytest.importorskip("matplotlib", reason="the test extra has it")
    assert chart.draw(made_up(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert not chart.draw(Result({}, {}, {}, []), tmp_path / "b.png")


def test_chart_has_a_line_for_each_system():
    found = made_up(as_published).measurements
    lines = chart.lines(found)
    assert list(lines) == ["ours, vllm", "ours, HND", "ours, NHD", "xqa"]
    assert lines["ours, HND"][0] == (32.0, pytest.approx(13.6 / 20.3))
    assert len(chart.through(lines["ours, HND"])) == 6
    assert [len(points) for points in chart.published_lines(found, "bf16").values()] == [10]


def test_render_needs_no_matplotlib(tmp_path, monkeypatch, capsys):
    def no_matplotlib(*arguments):
        raise ImportError("matplotlib")

    monkeypatch.setattr(chart, "draw", no_matplotlib)
    path = tmp_path / "r.json"
    made_up().write(path)
    assert __main__.main(["render", str(path)]) == 0
    assert "![" not in (tmp_path / "r.md").read_text()
    assert "bench extra" in capsys.readouterr().out


def compared(tmp_path, old, new, *words):
    for name, result in (("old", old), ("new", new)):
        result.write(tmp_path / name)
    return __main__.main(["compare", str(tmp_path / "old"), str(tmp_path / "new"), *words])


def test_compare_without_a_regression(tmp_path, capsys):
    assert compared(tmp_path, made_up(), made_up(lambda *_: 205.0)) == 0
    out = capsys.readouterr().out
    assert "No regression." in out
    assert "1.025  anchors ours" in out


def test_compare_with_a_regression(tmp_path, capsys):
    def slower(shape, layout):
        return 230.0 if (shape, layout) == ("b64_2k", "HND") else 200.0

    assert compared(tmp_path, made_up(), made_up(slower)) == 1
    out = capsys.readouterr().out
    assert "3 regressions" in out
    assert "1.150  anchors b64_2k bf16 HND ours v2 cupy: 200.0 -> 230.0 us" in out
    assert compared(tmp_path, made_up(), made_up(slower), "--tolerance", "0.2") == 0


def test_compare_knows_noise():
    old, new = made_up(), made_up(lambda *_: 220.0)
    wide = [
        dataclasses.replace(m, low=0.8 * m.time) if m.system == "ours" else m
        for m in new.measurements
    ]
    found = compare.compare(old, dataclasses.replace(new, measurements=wide))
    assert not found.is_worse
    assert len(found.noise) == 90
    assert "Within the noise" in compare.report(old, new, found, 0.05)


def test_compare_sees_what_broke_and_what_is_missing(tmp_path, capsys):
    old, new = made_up(), made_up()
    ours = [i for i, m in enumerate(new.measurements) if m.system == "ours"]
    new.measurements[ours[0]] = new.measurements[ours[0]].without_time("failed", "why")
    new.measurements[ours[1]] = new.measurements[ours[1]].checked(1.4)
    del new.measurements[ours[2]]
    assert compared(tmp_path, old, new) == 1
    out = capsys.readouterr().out
    assert "2 regressions" in out
    assert "1 measurements only in the old result" in out


def test_compare_does_not_blame_us_for_the_machine(tmp_path, capsys):
    old, new = made_up(), made_up(device="another")
    for i, m in enumerate(new.measurements):
        if m.system == "floor":
            new.measurements[i] = m.timed(timing.summarise([1.5 * m.time] * 3))
    assert compared(tmp_path, old, new) == 0
    out = capsys.readouterr().out
    assert "another" in out
    assert "was it the same machine?" in out


def test_compare_of_strangers_is_no_success(tmp_path):
    assert compared(tmp_path, made_up(), made_up(dtypes="fp8")) == 1


def test_parser_needs_a_command(capsys):
    with pytest.raises(SystemExit):
        __main__.main([])
    assert isinstance(__main__.build_parser(), argparse.ArgumentParser)
