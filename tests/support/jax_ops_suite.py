"""What holds for `cupy_paged.interop.jax_ops` with arrays on the host and on a GPU alike.

A test module subclasses `JaxOpsSuite` and gives it two fixtures: `arrays`, an adapter of
`support.frameworks` for JAX, and `reference`, the adapter on whose arrays the functions of the
package give what is expected, to the bit.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest

import cupy_paged
from support import bad_calls, compare, merge_suite, ops
from support.data import DTYPES, Case, build
from support.oracle import BlockSparse

NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_SIZE = 6, 16, 2, 64


def jax_ops():
    return importlib.import_module("cupy_paged.interop.jax_ops")


class Call(NamedTuple):
    """One call of an op, with NumPy arrays."""

    op: str
    given: dict[str, Any]  # arrays, and lists of them
    options: dict[str, Any]  # static, once compiled
    written: tuple[str, ...] = ()
    native: Mapping[str, Any] = MappingProxyType(
        {}
    )  # options that differ where arrays may be float8

    def expected(self, reference) -> list[np.ndarray]:
        """What the function of the package writes or returns."""
        given = {name: _each(reference.array, x) for name, x in self.given.items()}
        if self.op == "merge_attn_states":
            given["output"] = None
        made = getattr(cupy_paged, self.op)(**given, **self.options)
        if self.written:
            made = [given[name] for name in self.written]
        return [ops.cache_bytes(reference.numpy(x)) for x in _leaves(made)]

    def arguments(self, arrays) -> dict[str, Any]:
        own = functools.partial(owned, arrays)
        return {name: _each(own, x) for name, x in self.given.items()}

    @property
    def run(self) -> Callable[..., Any]:
        """The op of JAX, with all options."""
        return functools.partial(getattr(jax_ops(), self.op), **{**self.options, **self.native})


def owned(arrays, x):
    """A JAX array whose memory is XLA's, which may be given back to it; not borrowed of NumPy."""
    return arrays.jax.numpy.copy(arrays.array(x))


def _each(convert, x):
    return [convert(one) for one in x] if isinstance(x, list) else convert(x)


def _leaves(made):
    if isinstance(made, list | tuple):
        return [x for one in made for x in _leaves(one)]
    return [made]


def contents(arrays, made) -> list[np.ndarray]:
    return [ops.cache_bytes(arrays.numpy(x)) for x in _leaves(made)]


def addresses(made) -> list[int]:
    return [x.unsafe_buffer_pointer() for x in _leaves(made)]


def check_alike(found, expected):
    assert len(found) == len(expected)
    for i, (got, want) in enumerate(zip(found, expected, strict=True)):
        compare.bitwise(got, want, f"result {i}")


def attention(kv_cache_dtype="auto", *, scales=None, float8=False, **case):
    """A call of paged_attention; `scales` is the shape of scales that are arrays."""
    return_lse = case.pop("return_lse", False)
    problem = build(Case(kv_cache_dtype=kv_cache_dtype, **{"seq_lens": (40, 17, 0), **case}))
    options = ops.arguments(problem, bad_calls.NUMPY)
    names = ("query", "key_cache", "value_cache", "block_tables", "seq_lens")
    given = {name: options.pop(name) for name in names}
    if float8:
        given |= {"key_cache": problem.key_cache, "value_cache": problem.value_cache}
    if options["alibi_slopes"] is not None:
        given["alibi_slopes"] = options.pop("alibi_slopes")
    if scales is not None:
        for name in ("k_scale", "v_scale"):
            given[name] = np.full(scales, options.pop(name), np.float32)
    native = {"kv_cache_dtype": "auto"} if float8 else {}
    return Call("paged_attention", given, {**options, "return_lse": return_lse}, (), native)


def merge(**options):
    states = merge_suite.states(np.random.default_rng(1), "float16")
    names = ("prefix_output", "prefix_lse", "suffix_output", "suffix_lse")
    return Call("merge_attn_states", dict(zip(names, states, strict=True)), options)


def normal(*shape, dtype="float16", seed=2):
    return np.random.default_rng(seed).standard_normal(shape).astype(DTYPES[dtype])


SLOTS = np.array([17, -1, 5, 90, 31])
SCALES = {"k_scale": 0.5, "v_scale": 0.25}


def write(layout, cache_dtype="uint8"):
    key, value = (normal(5, NUM_KV_HEADS, HEAD_SIZE, dtype="float32", seed=s) for s in (3, 4))
    if layout == "vllm":
        op, options, x = "reshape_and_cache", {}, 16
        shapes = (HEAD_SIZE // x, BLOCK_SIZE, x), (HEAD_SIZE, BLOCK_SIZE)
        shapes = [(NUM_BLOCKS, NUM_KV_HEADS, *shape) for shape in shapes]
    else:
        op, options = "reshape_and_cache_flash", {"layout": layout}
        shapes = [(NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE)] * 2
    bits = [np.random.default_rng(s).integers(0, 0x70, shapes[s], np.uint8) for s in range(2)]
    caches = [x.view(DTYPES.get(cache_dtype, np.uint8)) for x in bits]
    given = {"key": key, "value": value, "key_cache": caches[0], "value_cache": caches[1]}
    options |= SCALES | {"kv_cache_dtype": "fp8_e5m2"}
    native = {} if cache_dtype == "uint8" else {"kv_cache_dtype": "auto"}
    return Call(op, {**given, "slot_mapping": SLOTS}, options, ("key_cache", "value_cache"), native)


def write_mla():
    given = {
        "kv_c": normal(5, 32, dtype="bfloat16"),
        "k_pe": normal(5, 8, dtype="bfloat16", seed=3),
        "kv_cache": normal(NUM_BLOCKS, BLOCK_SIZE, 40, dtype="bfloat16", seed=4),
        "slot_mapping": SLOTS,
        "scale": np.ones(1, np.float32),
    }
    return Call("concat_and_cache_mla", given, {"kv_cache_dtype": "auto"}, ("kv_cache",))


def copy(has_values):
    kinds = [[normal(4, 2, 8, seed=2 * kind + i) for i in range(2)] for kind in range(2)]
    given = {
        "key_caches": kinds[0],
        "value_caches": kinds[1] if has_values else [],
        "block_mapping": np.array([[3, 0], [1, 2], [-1, 3]]),
    }
    return Call("copy_blocks", given, {}, ("key_caches", "value_caches"))


def gather(starts=True):
    rows = [normal(9, NUM_KV_HEADS, HEAD_SIZE, seed=s) for s in (5, 6)]
    shape = 2, NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_SIZE
    codes = np.random.default_rng(7).integers(0, 0x70, shape, np.uint8)
    given = {
        "key": rows[0],
        "value": rows[1],
        "key_cache": codes[0],
        "value_cache": codes[1],
        "block_tables": np.array([[2, 0], [1, -1]], np.int32),
        "cu_seq_lens": np.array([0, 3, 8], np.int32),
    }
    if starts:
        given["seq_starts"] = np.array([14, 2], np.int32)
    options = {"layout": "NHD", "kv_cache_dtype": "fp8", **SCALES}
    return Call("gather_cache", given, options, ("key", "value"))


WRITES = {
    "reshape_and_cache": lambda: write("vllm"),
    "reshape_and_cache_flash": lambda: write("HND"),
    "reshape_and_cache_flash-float8": lambda: write("HND", "float8_e5m2"),
    "concat_and_cache_mla": write_mla,
    "copy_blocks": lambda: copy(has_values=True),
    "copy_blocks-keys": lambda: copy(has_values=False),
    "gather_cache": gather,
    "gather_cache-from-start": lambda: gather(starts=False),
}
CALLS = {
    "paged_attention": attention,
    "paged_attention-lse": lambda: attention(dtype="bfloat16", return_lse=True, alibi=True),
    "paged_attention-long": lambda: attention(dtype="bfloat16", seq_lens=(1500, 40, 513)),
    "paged_attention-float32": lambda: attention(dtype="float32", layout="NHD", seq_lens=(700, 3)),
    "paged_attention-sparse": lambda: attention(sparse=BlockSparse(1, 2, 16, 0)),
    "paged_attention-uint8": lambda: attention("fp8", layout="vllm", scales=(1,)),
    "paged_attention-e4m3": lambda: attention("fp8_e4m3", float8=True, scales=()),
    "paged_attention-e5m2": lambda: attention("fp8_e5m2", float8=True),
    "merge_attn_states": merge,
    "merge_attn_states-some": lambda: merge(prefill_tokens_with_context=20),
    "merge_attn_states-fp8": lambda: merge(output_scale=0.5),
    **WRITES,
}
"""Builders of calls, each with the same contents every time."""

EVERY_CALL = pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)
EVERY_WRITE = pytest.mark.parametrize("make", WRITES.values(), ids=WRITES)
EAGER_AND_COMPILED = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


class Steps:
    """Decode steps: each writes the newest token of every sequence, then attends to all of it."""

    NUM_SEQS, NUM_STEPS, PAST = 2, 5, 13  # from the 13th token on, into the second block

    def __init__(self, seed=0):
        shape = self.NUM_STEPS, self.NUM_SEQS, NUM_KV_HEADS, HEAD_SIZE
        cache = NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE
        self.caches = [normal(*cache, dtype="bfloat16", seed=seed + s) for s in (1, 2)]
        self.key, self.value = (normal(*shape, dtype="bfloat16", seed=seed + s) for s in (3, 4))
        query = self.NUM_STEPS, self.NUM_SEQS, 2 * NUM_KV_HEADS, HEAD_SIZE
        self.query = normal(*query, dtype="bfloat16", seed=seed + 5)
        self.tables = np.random.default_rng(seed).permutation(NUM_BLOCKS)[:4].reshape(2, 2)
        self.tables = self.tables.astype(np.int32)
        lens = np.arange(self.PAST + 1, self.PAST + 1 + self.NUM_STEPS)
        self.lens = np.repeat(lens[:, None], self.NUM_SEQS, axis=1).astype(np.int32)
        blocks = self.tables[:, (self.lens[:, 0] - 1) // BLOCK_SIZE].T
        self.slots = blocks.astype(np.int64) * BLOCK_SIZE + (self.lens - 1) % BLOCK_SIZE

    def each(self, arrays):
        """What differs from step to step, with a dimension for the steps in front."""
        given = self.query, self.key, self.value, self.slots, self.lens
        return [arrays.array(x) for x in given]

    def expected(self, reference):
        """(outputs of all steps, key cache, value cache), by the functions of the package."""
        caches, tables = [reference.array(x) for x in self.caches], reference.array(self.tables)
        outputs = []
        for step in range(self.NUM_STEPS):
            query, key, value, slots, lens = (
                reference.array(x[step])
                for x in (self.query, self.key, self.value, self.slots, self.lens)
            )
            cupy_paged.reshape_and_cache_flash(
                key, value, *caches, slots, "auto", 1.0, 1.0, layout="HND"
            )
            out = cupy_paged.paged_attention(query, *caches, tables, lens, layout="HND")
            outputs.append(reference.numpy(out))
        return [np.stack(outputs), *(reference.numpy(x) for x in caches)]


def step(caches, tables, query, key, value, slots, lens):
    """One decode step: (caches, output)."""
    ops_of_jax = jax_ops()
    caches = ops_of_jax.reshape_and_cache_flash(
        key, value, *caches, slots, "auto", 1.0, 1.0, layout="HND"
    )
    return caches, ops_of_jax.paged_attention(query, *caches, tables, lens, layout="HND")


# What is wrong with a call that is else good, and with which arguments.
BAD = [
    ("paged_attention", {"seq_lens": np.ones(3, np.int32)}),
    ("paged_attention", {"seq_lens": np.ones(2, np.float32)}),
    ("paged_attention", {"query": bad_calls.halves(2, 4, 32)}),
    ("paged_attention", {"query": bad_calls.halves(2, 256)}),
    ("paged_attention", {"query": bad_calls.halves(2, 3, 64)}),
    ("paged_attention", {"query": np.ones((2, 4, 64), bool)}),
    ("paged_attention", {"alibi_slopes": np.ones(3, np.float32)}),
    ("paged_attention", {"k_scale": np.ones(2, np.float32)}),
    ("paged_attention", {"k_scale": -1.0}),
    ("paged_attention", {"scale": float("nan")}),
    ("paged_attention", {"max_seq_len": 1.5}),
    ("paged_attention", {"layout": "HDN"}),
    ("paged_attention", {"kv_cache_dtype": "fp8"}),
    ("paged_attention", {"blocksparse_vert_stride": 2, "blocksparse_block_size": 9}),
    ("merge_attn_states", {"suffix_output": bad_calls.halves(6, 4, 32)}),
    ("merge_attn_states", {"prefix_output": bad_calls.halves(6, 4)}),
    ("merge_attn_states", {"prefix_lse": np.ones((6, 4), np.float32)}),
    ("merge_attn_states", {"prefill_tokens_with_context": 7}),
    ("reshape_and_cache", {"key_cache": bad_calls.halves(3, 2, 8, 16, 4)}),
    ("reshape_and_cache_flash", {"value": bad_calls.halves(5, 2, 32)}),
    ("reshape_and_cache_flash", {"slot_mapping": np.arange(6)}),
    ("reshape_and_cache_flash", {"slot_mapping": np.ones(5, np.float32)}),
    ("reshape_and_cache_flash", {"layout": "vllm"}),
    ("concat_and_cache_mla", {"k_pe": bad_calls.halves(5, 9)}),
    ("concat_and_cache_mla", {"kv_cache": np.ones((3, 16, 40), np.float32)}),
    ("copy_blocks", {"key_caches": []}),
    ("copy_blocks", {"key_caches": None}),
    ("copy_blocks", {"value_caches": [bad_calls.halves(6, 2, 16, 64)]}),
    ("copy_blocks", {"value_caches": [bad_calls.halves(5, 2, 16, 64)] * 2}),
    ("copy_blocks", {"block_mapping": np.array([0, 1])}),
    ("gather_cache", {"cu_seq_lens": np.ones(2, np.int32)}),
    ("gather_cache", {"key": bad_calls.halves(7, 2, 32)}),
    ("gather_cache", {"block_tables": np.ones((2, 2), np.float32)}),
]


class JaxOpsSuite:
    @EVERY_CALL
    @EAGER_AND_COMPILED
    def test_repeats_the_function(self, arrays, reference, make, compiled):
        call = make()
        run = arrays.jax.jit(call.run) if compiled else call.run
        made = run(**call.arguments(arrays))
        assert all(arrays.owns(x) for x in _leaves(made))
        check_alike(contents(arrays, made), call.expected(reference))

    @EVERY_CALL
    @EAGER_AND_COMPILED
    def test_checked_mode_changes_nothing(self, arrays, reference, make, compiled):
        call = make()
        run = arrays.jax.jit(call.run) if compiled else call.run
        with cupy_paged.checked():
            made = run(**call.arguments(arrays))
        check_alike(contents(arrays, made), call.expected(reference))

    @EVERY_CALL
    def test_takes_numpy_arrays(self, arrays, reference, make):
        call = make()
        with arrays.jax.default_device(arrays.device):
            made = call.run(**call.given)
        check_alike(contents(arrays, made), call.expected(reference))

    @EVERY_WRITE
    def test_what_is_donated_is_written_in_place(self, arrays, reference, make):
        call = make()
        given = call.arguments(arrays)
        run = arrays.jax.jit(lambda written, rest: call.run(**written, **rest), donate_argnums=0)
        written = {name: given.pop(name) for name in call.written}
        before = addresses([*written.values()])
        made = run(written, given)
        assert addresses(made) == before, "the cache was copied"
        assert all(x.is_deleted() for x in _leaves([*written.values()]))
        check_alike(contents(arrays, made), call.expected(reference))

    @EVERY_WRITE
    @EAGER_AND_COMPILED
    def test_what_is_not_donated_is_left_as_it_is(self, arrays, make, compiled):
        call = make()
        given = call.arguments(arrays)
        run = arrays.jax.jit(call.run) if compiled else call.run
        made = run(**given)
        written = [given[name] for name in call.written]
        assert not set(addresses(made)) & set(addresses(written))
        kept = [call.given[name] for name in call.written]
        check_alike(contents(arrays, written), [ops.cache_bytes(x) for x in _leaves(kept)])

    @pytest.mark.parametrize("donated", [False, True], ids=["kept", "donated"])
    def test_scan_over_decode_steps(self, arrays, reference, donated):
        jax, steps = arrays.jax, Steps()
        caches, tables = tuple(owned(arrays, x) for x in steps.caches), arrays.array(steps.tables)

        def decode(caches, tables, each):
            return jax.lax.scan(lambda caches, one: step(caches, tables, *one), caches, each)

        before = addresses(caches)
        run = jax.jit(decode, donate_argnums=0 if donated else ())
        made, outputs = run(caches, tables, steps.each(arrays))
        check_alike(contents(arrays, [outputs, *made]), steps.expected(reference))
        assert (addresses(made) == before) == donated
        if not donated:
            check_alike(contents(arrays, caches), steps.caches)

    def test_other_contents_need_no_other_trace(self, arrays, reference):
        jax, steps, traced = arrays.jax, Steps(), []
        caches, tables = tuple(owned(arrays, x) for x in steps.caches), arrays.array(steps.tables)

        @functools.partial(jax.jit, donate_argnums=0)
        def decode(*given):
            traced.append(1)
            return step(*given)

        outputs, before, each = [], addresses(caches), steps.each(arrays)
        for i in range(steps.NUM_STEPS):
            caches, out = decode(caches, tables, *(x[i] for x in each))
            outputs.append(out)
        assert len(traced) == 1
        assert addresses(caches) == before
        found = [np.stack(contents(arrays, outputs)), *contents(arrays, caches)]
        check_alike(found, steps.expected(reference))

    def test_reads_around_a_write_are_of_before_and_after(self, arrays, reference):
        jax, steps = arrays.jax, Steps()
        caches, tables = tuple(owned(arrays, x) for x in steps.caches), arrays.array(steps.tables)
        query, key, value, slots, lens = (x[0] for x in steps.each(arrays))

        @functools.partial(jax.jit, donate_argnums=0)
        def both(caches):
            attend = functools.partial(jax_ops().paged_attention, layout="HND")
            new, after = step(caches, tables, query, key, value, slots, lens)
            # Named after the write: XLA has to keep the old contents for it.
            return attend(query, *caches, tables, lens), after, new

        before, after, _ = both(caches)
        given = [reference.array(x) for x in (steps.query[0], *steps.caches)]
        rest = [reference.array(x) for x in (steps.tables, steps.lens[0])]
        want = cupy_paged.paged_attention(*given, *rest, layout="HND")
        outputs, *_ = steps.expected(reference)
        check_alike(contents(arrays, [before, after]), [reference.numpy(want), outputs[0]])
        assert (contents(arrays, before)[0] != contents(arrays, after)[0]).any()

    @pytest.mark.parametrize("size", [0, 3])
    def test_nothing_to_do(self, arrays, size):
        # An empty batch, and no token to write, in a function that does other things, too.
        jax = arrays.jax
        cache = arrays.array(normal(NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE))
        query = arrays.array(normal(size, 4, HEAD_SIZE))
        key = arrays.array(normal(size, NUM_KV_HEADS, HEAD_SIZE))
        tables = arrays.array(np.zeros((size, 0), np.int32))
        lens, slots = (arrays.array(np.zeros(size, np.int32)) for _ in range(2))

        @jax.jit
        def run(cache, query, key):
            made = []
            for _ in range(6):
                caches = cache * 2, cache + 1
                new = jax_ops().reshape_and_cache_flash(
                    key, key, *caches, slots - 1, "auto", 1.0, 1.0, layout="HND"
                )
                out = jax_ops().paged_attention(
                    query, *new, tables, lens, layout="HND", return_lse=True
                )
                made.append((*new, *out))
            return made

        for _ in range(3):
            for key_cache, value_cache, out, lse in run(cache, query, key):
                want = arrays.numpy(cache)
                check_alike(contents(arrays, [key_cache, value_cache]), [want * 2, want + 1])
                assert out.shape == query.shape and lse.shape == query.shape[:2]
                assert not arrays.numpy(out).any() and (arrays.numpy(lse) == -np.inf).all()

    def test_vmap_is_a_call_for_each(self, arrays):
        jax, steps = arrays.jax, Steps()
        tables = arrays.array(steps.tables)
        caches = tuple(arrays.array(np.stack([x, x[::-1]])) for x in steps.caches)
        each = [x[:2] for x in steps.each(arrays)]
        made = jax.jit(jax.vmap(step, in_axes=(0, None, 0, 0, 0, 0, 0)))(caches, tables, *each)
        for i in range(2):
            want = step(tuple(x[i] for x in caches), tables, *(x[i] for x in each))
            found = jax.tree.map(lambda x, i=i: x[i], made)
            check_alike(contents(arrays, found), contents(arrays, want))

    @pytest.mark.parametrize("name", ["paged_attention-float32", "merge_attn_states"])
    @EAGER_AND_COMPILED
    def test_grad_is_refused_by_name(self, arrays, name, compiled):
        jax, call = arrays.jax, CALLS[name]()
        given = call.arguments(arrays)
        first = next(iter(given))

        def total(x, gradient):
            x = x if gradient else jax.lax.stop_gradient(x)
            made = call.run(**{**given, first: x})
            return sum(jax.numpy.nansum(y.astype("float32")) for y in _leaves(made))

        run = jax.jit(total, static_argnums=1) if compiled else total
        with pytest.raises(NotImplementedError, match=f"^{call.op}: has no gradient"):
            jax.grad(run)(given[first], True)
        assert not arrays.numpy(jax.grad(run)(given[first], False)).any()

    @pytest.mark.parametrize(("op", "changes"), BAD, ids=lambda x: str(x) if type(x) is str else "")
    def test_wrong_arguments_are_found_while_tracing(self, arrays, op, changes):
        good = bad_calls.GOOD[op]()
        for name in ("out", "output", "output_lse"):
            good.pop(name, None)
        given = {**good, **changes}
        new = {"output": None} if op == "merge_attn_states" else {}
        with pytest.raises((TypeError, ValueError)) as expected:
            getattr(cupy_paged, op)(**new, **given)
        is_given = {
            name: isinstance(x, np.ndarray) or (isinstance(x, list) and x != [])
            for name, x in given.items()
        }
        options = {name: x for name, x in given.items() if not is_given[name]}
        traced = {name: x for name, x in given.items() if is_given[name]}
        run = functools.partial(getattr(jax_ops(), op), **options)
        with pytest.raises(expected.type) as found:
            arrays.jax.eval_shape(run, **traced)
        assert str(found.value) == str(expected.value)

    @pytest.mark.parametrize("wrong", [None, [1.0], object()], ids=lambda x: type(x).__name__)
    def test_what_is_no_array_is_named(self, arrays, wrong):
        given = {**bad_calls.attention_arguments(), "key_cache": wrong}
        del given["out"]
        with pytest.raises(TypeError, match=r"^key_cache.*needs an array"):
            jax_ops().paged_attention(**given)

    def test_traced_options_are_named(self, arrays):
        call = attention()
        run = functools.partial(call.run, **call.arguments(arrays))
        with pytest.raises(TypeError, match=r"^max_seq_len: got .*Tracer, needs an int"):
            arrays.jax.jit(lambda n: run(max_seq_len=n))(40)

    @EAGER_AND_COMPILED
    def test_slots_of_64_bits(self, arrays, reference, compiled):
        jax, call = arrays.jax, write("HND")
        wide = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
        with wide(True):
            given = call.arguments(arrays)
            assert given["slot_mapping"].dtype == "int64"
            made = (jax.jit(call.run) if compiled else call.run)(**given)
        check_alike(contents(arrays, made), call.expected(reference))
