"""Operators captured once in a CUDA graph and replayed with other lengths, tables and data."""

from dataclasses import replace

import cupy
import numpy as np
import pytest

import cupy_paged
from cupy_paged import compiler, prepared
from support import cache_suite, compare, frameworks, merge_suite, ops, oracle
from support.data import Case, build, empty_caches
from support.framework_suite import OnlyCudaArrayInterface, OnlyDLPack

LENGTHS = 1030, 17, 512, 300, 5, 0, 64, 513


ALL = frameworks.device()
WRITABLE = frameworks.writable(ALL)
MODES = ("global", "thread_local", "relaxed")
by_name = {"ids": lambda arrays: arrays.name}


def capture_cupy(call, mode="global"):
    modes = dict(zip(MODES, ("Global", "ThreadLocal", "Relaxed"), strict=True))
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        call(stream)
        stream.synchronize()
        stream.begin_capture(getattr(cupy.cuda.runtime, f"streamCaptureMode{modes[mode]}"))
        call(stream)
        graph = stream.end_capture()

    def replay():
        graph.launch(stream)
        stream.synchronize()

    return replay, stream.ptr, stream


def capture_torch(call, mode="global"):
    import torch

    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        call(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
        call(stream)

    def replay():
        graph.replay()
        torch.cuda.synchronize()

    return replay, stream.cuda_stream, stream


CAPTURES = {"cupy": capture_cupy, "torch": capture_torch}
EVERY_WAY = pytest.mark.parametrize(
    ("arrays", "by"),
    [(arrays, by.name) for arrays in WRITABLE for by in WRITABLE],
    ids=lambda value: getattr(value, "name", f"by_{value}"),
)


@pytest.fixture(params=WRITABLE, **by_name)
def arrays(request):
    return request.param


class Captured:
    """A call in a graph.

    by    the framework that captures, whose stream the call is given; if None, that of the arrays,
          whose stream the call finds by itself
    """

    def __init__(self, call, arrays, by=None, mode="global"):
        self._arrays = arrays
        run = (lambda stream: call()) if by is None else (lambda stream: call(stream=stream))
        self._replay, self._address, *kept = CAPTURES[by or arrays.name](run, mode)
        # A graph knows addresses, not arrays: what the call holds must live as long.
        self._kept = call, kept

    def replay(self, filled=()):
        """Replays the graph, after filling arrays with new contents."""
        for array, contents in filled:
            self._arrays.fill(array, contents)
        self._arrays.synchronize()
        self._replay()

    def on_its_stream(self):
        """Makes the stream that was captured the current one of the arrays' framework.

        Pools keep the memory of each stream apart: here they lend what the call gave back.
        """
        if self._arrays.name == "torch":
            cuda = self._arrays.torch.cuda
            return cuda.stream(cuda.ExternalStream(self._address))
        return cupy.cuda.ExternalStream(self._address)


def scenes(problem):
    """The problem with other lengths and tables of the same shape."""
    rng = np.random.default_rng(11)
    full = problem.seq_lens
    for seq_lens in (
        full,
        np.zeros_like(full),
        np.minimum(full, 1),
        full // 2,
        np.where(np.arange(len(full)) < 3, full, 0),
        np.where(np.arange(len(full)) < 3, full, -1),
    ):
        yield replace(problem, seq_lens=seq_lens.astype(np.int32))
    for _ in range(3):
        order = rng.permutation(len(full))
        yield replace(
            problem, seq_lens=full[order], block_tables=problem.block_tables[order].copy()
        )


def attention_call(op, problem, arrays):
    """A call of `op` on fixed arrays, those arrays by name, and the output."""
    shape = num_seqs, num_heads, head_size = problem.query.shape
    out = ops.empty(shape, problem.case.dtype, arrays)
    if op == "paged_attention":
        given = ops.arguments(problem, arrays)
        return lambda **on: cupy_paged.paged_attention(**given, out=out, **on), given, out
    tail, keywords = ops.positional(problem, arrays)
    given = dict(zip(ops.POSITIONAL, tail, strict=True))
    written = [out]
    if op == "paged_attention_v2":
        shape = num_seqs, num_heads, ops.partitions_needed(problem)
        written += [ops.empty(shape, "float32", arrays) for _ in range(2)]
        written += [ops.empty((*shape, head_size), "float32", arrays)]
    run = getattr(cupy_paged, op)
    return lambda **on: run(*written, *tail, **keywords, **on), given, out


@pytest.mark.parametrize("op", ["paged_attention", "paged_attention_v1", "paged_attention_v2"])
@pytest.mark.parametrize(
    "case",
    [
        Case("float16", "auto", "vllm", seq_lens=LENGTHS),
        Case("bfloat16", "fp8", "HND", seq_lens=LENGTHS, alibi=True),
        Case("float32", "auto", "NHD", seq_lens=LENGTHS),
    ],
    ids=str,
)
def test_attention(op, case, arrays):
    check_scenes(op, case, arrays)


@EVERY_WAY
@pytest.mark.parametrize("op", ["paged_attention", "paged_attention_v1", "paged_attention_v2"])
def test_attention_captured_by_another_framework(op, arrays, by):
    check_scenes(op, Case(seq_lens=LENGTHS), arrays, by)


def check_scenes(op, case, arrays, by=None):
    problem = build(case)
    call, given, out = attention_call(op, problem, arrays)
    replay = Captured(call, arrays, by).replay
    dirt = np.full(problem.query.shape, np.nan).astype(problem.query.dtype)
    for scene in scenes(problem):
        tables, lens = (
            (given["block_tables"], scene.block_tables),
            (given["seq_lens"], scene.seq_lens),
        )
        replay([tables, lens, (out, dirt)])
        found = arrays.numpy(out)
        compare.close(found, scene.expected[0], case.dtype)
        eager, _ = ops.paged_attention(scene, arrays)
        compare.bitwise(found, eager, "replayed against eager")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_ten_thousand_replays(dtype, rng, tally):
    """Rows come, grow, move and go, and scratch holds anything: the bits are an eager call's."""
    replays, num_scenes, arrays = 10_000, 32, ALL[0]
    problem = build(Case(dtype, seq_lens=(2100, *LENGTHS)))
    full = problem.seq_lens
    out, *scratch = (arrays.array(made) for made in ops.paged_attention_v2(problem, arrays))
    tail, keywords = ops.positional(problem, arrays)
    seq_lens, block_tables = (
        tail[ops.POSITIONAL.index(name)] for name in ("seq_lens", "block_tables")
    )

    def call(stream):
        cupy_paged.paged_attention_v2(out, *scratch, *tail, **keywords, stream=stream)

    eager, lengths, tables = [], [], []
    for share in np.linspace(0, 1, num_scenes):
        order = rng.permutation(len(full))
        live = rng.random(len(full)) < share
        lens = np.where(live, rng.integers(0, full[order] + 1), 0).astype(np.int32)
        scene = replace(problem, seq_lens=lens, block_tables=problem.block_tables[order].copy())
        found, *_ = ops.paged_attention_v2(scene, arrays)
        compare.close(found, scene.expected[0], dtype)
        eager.append(found)
        lengths.append(scene.seq_lens)
        tables.append(scene.block_tables)

    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    call(stream)
    with stream:
        stream.begin_capture()
        call(stream)
        graph = stream.end_capture()
    unsigned = np.dtype(f"u{out.dtype.itemsize}")
    bits = out.view(unsigned)
    with stream:
        lengths, tables = cupy.asarray(np.stack(lengths)), cupy.asarray(np.stack(tables))
        eager = cupy.asarray(np.stack(eager).view(unsigned))
        wrong = cupy.zeros(replays, bool)
        for replay, scene in enumerate(rng.integers(0, num_scenes, replays).tolist()):
            seq_lens[...], block_tables[...] = lengths[scene], tables[scene]
            bits.fill(np.iinfo(unsigned).max)
            for array in scratch:
                array.fill((np.nan, np.inf, -np.inf, 3e38, 0.0)[replay % 5])
            graph.launch(stream)
            wrong[replay] = (bits != eager[scene]).any()
        assert not wrong.any(), f"replay {int(wrong.argmax())}, and {int(wrong.sum()) - 1} others"
    tally("graph replays", replays)


@pytest.mark.parametrize("op", ["paged_attention", "paged_attention_v1"])
def test_rows_that_outgrow_their_estimate_in_a_replay(op, arrays):
    """Their partitions would lie where those of the rows beside them are."""
    estimate, before, grown = (
        1024,
        np.array([600, 1024, 513, 17, 900], np.int32),
        np.array([600, 3000, 513, 2000, 900], np.int32),
    )
    problem = build(Case(seq_lens=(3000,) * len(grown)))
    problem = replace(problem, max_seq_len=estimate, seq_lens=before)
    call, given, out = attention_call(op, problem, arrays)
    captured, dirt = Captured(call, arrays), (out, np.full(problem.query.shape, 7, np.float16))
    captured.replay([dirt])
    expected = arrays.numpy(out)
    captured.replay([(given["seq_lens"], grown), dirt])
    found = arrays.numpy(out)
    too_long = grown > estimate
    assert np.isnan(found[too_long]).all()
    compare.bitwise(found[~too_long], expected[~too_long])


def test_a_kernel_that_was_never_loaded_leaves_a_capture_whole(monkeypatch):
    problem, arrays = build(Case(seq_lens=(1030, 17))), ALL[0]
    call, _, out = attention_call("paged_attention", problem, arrays)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        call(stream=stream)
        stream.begin_capture()
        with monkeypatch.context() as nothing_loaded:
            nothing_loaded.setattr(compiler, "_loaded", {})
            nothing_loaded.setattr(prepared, "_kept", prepared._Kept())
            with pytest.raises(RuntimeError, match="for the first time inside a CUDA graph"):
                call(stream=stream)
        call(stream=stream)
        graph = stream.end_capture()
        arrays.fill(out, np.full(problem.query.shape, np.nan, np.float16))
        graph.launch(stream)
        stream.synchronize()
    compare.close(arrays.numpy(out), problem.expected[0], "float16")


@EVERY_WAY
@pytest.mark.parametrize("op", ["paged_attention", "paged_attention_v1"])
def test_replays_touch_no_memory_that_was_handed_out_since(op, arrays, by):
    problem = build(Case(seq_lens=(5000, 1030, 17)))
    call, _, out = attention_call(op, problem, arrays)
    captured = Captured(call, arrays, by)

    def others():
        # Sizes from a page to several times any scratch: whatever the op gave back is in here.
        return [
            ops.empty((size,), "float32", arrays, ops.SENTINEL)
            for size in (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20)
            for _ in range(16)
        ]

    taken = others()
    with captured.on_its_stream():
        taken += others()
    for _ in range(3):
        captured.replay([(out, np.full(problem.query.shape, np.nan, np.float16))])
        compare.close(arrays.numpy(out), problem.expected[0], "float16")
    for other in taken:
        assert (arrays.numpy(other) == np.float32(ops.SENTINEL)).all()


@EVERY_WAY
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_capture(mode, arrays, by):
    problem = build(Case(seq_lens=(1030, 17)))
    call, _, out = attention_call("paged_attention", problem, arrays)
    captured = Captured(call, arrays, by, mode)
    for _ in range(2):
        captured.replay([(out, np.full(problem.query.shape, np.nan, np.float16))])
        compare.close(arrays.numpy(out), problem.expected[0], "float16")


@pytest.mark.parametrize(
    ("other", "wrap"),
    [
        *((other, wrap) for other in WRITABLE for wrap in (OnlyDLPack, OnlyCudaArrayInterface)),
        *((other, None) for other in ALL if other.name == "jax"),
    ],
    ids=lambda value: getattr(value, "name", getattr(value, "__name__", "itself")),
)
def test_arrays_known_by_protocol_alone(arrays, other, wrap):
    # Their producers would order the graph after work outside of it, which a capture refuses.
    problem = build(Case(seq_lens=(1030, 17)))
    call, given, out = attention_call("paged_attention", problem, arrays)
    theirs = ops.arguments(problem, other)
    for name in ("key_cache", "value_cache", "block_tables"):
        given[name] = wrap(theirs[name]) if wrap else theirs[name]
    captured = Captured(call, arrays)
    for _ in range(2):
        captured.replay([(out, np.full(problem.query.shape, np.nan, np.float16))])
        compare.close(arrays.numpy(out), problem.expected[0], "float16")


def test_two_graphs_and_eager_calls_take_turns(arrays):
    problems = [build(Case(seq_lens=lens)) for lens in ((3000, 17, 5), (513, 2000))]
    captured = []
    for problem in problems:
        call, _, out = attention_call("paged_attention", problem, arrays)
        captured.append((problem, out, Captured(call, arrays).replay))
    for _ in range(3):
        for problem, out, replay in captured:
            replay([(out, np.full(problem.query.shape, np.nan, np.float16))])
            compare.close(arrays.numpy(out), problem.expected[0], "float16")
        eager, _ = ops.paged_attention(problems[0], arrays)
        compare.close(eager, problems[0].expected[0], "float16")


def test_merge(arrays, rng):
    given = merge_suite.states(rng, "float16")
    made = [arrays.array(array) for array in given]
    output = ops.empty(given[0].shape, "float16", arrays)
    output_lse = ops.empty(given[1].shape, "float32", arrays)
    replay = Captured(
        lambda: cupy_paged.merge_attn_states(output, *made, output_lse=output_lse), arrays
    ).replay
    for _ in range(3):
        given = merge_suite.empty_some(rng, merge_suite.states(rng, "float16"))
        replay(zip(made, given, strict=True))
        expected, expected_lse = oracle.merge_attn_states(*given)
        compare.close(arrays.numpy(output), expected, "float16")
        compare.close_lse(arrays.numpy(output_lse), expected_lse)


@pytest.mark.parametrize("layout", ["vllm", "HND", "NHD"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_cache_writers(layout, kv_cache_dtype, arrays, rng):
    case = Case("float16", kv_cache_dtype, layout)
    caches = empty_caches(case, 4, rng)
    made = [arrays.array(ops.cache_bytes(cache)) for cache in caches]
    key, value = (arrays.array(array) for array in cache_suite.tokens(rng, case, 30))
    slot_mapping = arrays.array(np.full(30, -1, np.int64))
    tail = key, value, *made, slot_mapping, kv_cache_dtype, *case.scales
    if layout == "vllm":
        replay = Captured(lambda: cupy_paged.reshape_and_cache(*tail), arrays).replay
    else:
        replay = Captured(
            lambda: cupy_paged.reshape_and_cache_flash(*tail, layout=layout), arrays
        ).replay
    k_scale, v_scale = case.scales
    for _ in range(3):
        new_key, new_value = cache_suite.tokens(rng, case, 30)
        slots = cache_suite.slots(rng, case, 30, 4)
        # A padded batch: the last tokens are skipped.
        slots[20:] = -1
        replay([(key, new_key), (value, new_value), (slot_mapping, slots)])
        caches = oracle.reshape_and_cache(
            new_key, new_value, *caches, slots, layout=layout, block_size=case.block_size,
            kv_cache_dtype=kv_cache_dtype, k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip
        for array, cache in zip(made, caches, strict=True):
            compare.bitwise(arrays.numpy(array).view(cache.dtype), cache)


def test_convert(arrays):
    codes = np.arange(120, dtype=np.uint8).reshape(2, 60)
    made = arrays.array(codes)
    output = ops.empty(codes.shape, "float16", arrays)
    replay = Captured(lambda: cupy_paged.convert_fp8(output, made, 0.5), arrays).replay
    for step in range(3):
        replay([(made, codes ^ np.uint8(step))])
        expected = (codes ^ np.uint8(step)).view(oracle.FP8["fp8"]).astype(np.float32) * 0.5
        compare.bitwise(arrays.numpy(output), expected.astype(np.float16))
