"""What holds for `torch.ops.cupy_paged` with tensors on the host and on a GPU alike.

A test module subclasses `TorchOpsSuite` and gives it a fixture `arrays`, an adapter of
`support.frameworks` for torch.
"""

import functools
import importlib
import re
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import cupy_paged
from support import compare, merge_suite, ops
from support.data import DTYPES, Case, build

NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_SIZE = 6, 16, 2, 64


def registered(arrays):
    """torch.ops.cupy_paged."""
    importlib.import_module("cupy_paged.interop.torch_ops")
    return arrays.torch.ops.cupy_paged


class Call(NamedTuple):
    """One call of an op, and the function that it is to repeat, given the same."""

    op: str
    args: list[Any]
    keywords: dict[str, Any]
    function: Callable[..., Any]

    def run(self, run: Callable[..., Any], arrays) -> list[np.ndarray]:
        """What `run` returns for the arguments, then all of these: some have been written."""
        made = run(*self.args, **self.keywords)
        made = [] if made is None else made if isinstance(made, tuple) else [made]
        return [arrays.numpy(x) for x in (*made, *self.tensors(arrays))]

    def tensors(self, arrays) -> list[Any]:
        given = [*self.args, *self.keywords.values()]
        flat = [x for group in given for x in (group if isinstance(group, list) else [group])]
        return [x for x in flat if isinstance(x, arrays.torch.Tensor)]

    def floats(self, arrays) -> list[Any]:
        """The tensors that a derivative may be asked of."""
        return [x for x in self.tensors(arrays) if x.is_floating_point()]

    def replacing(self, old, new) -> "Call":
        """The same call, with another tensor in the place of one."""

        def replaced(x):
            return [replaced(y) for y in x] if isinstance(x, list) else new if x is old else x

        keywords = {name: replaced(x) for name, x in self.keywords.items()}
        return self._replace(args=replaced(self.args), keywords=keywords)


def scale_of(arrays, value):
    return arrays.array(np.array([value], np.float32))


def attention_problem(kv_cache_dtype="auto", **options):
    # Comparisons of whole arguments want no NaN in them.
    return build(Case(kv_cache_dtype=kv_cache_dtype, seq_lens=(40, 17, 0), **options)).unpoisoned()


def attention_arguments(problem, arrays):
    given = ops.arguments(problem, arrays)
    names = "query", "key_cache", "value_cache", "block_tables", "seq_lens"
    for name in ("k_scale", "v_scale"):
        given[name] = scale_of(arrays, given[name])
    return [given.pop(name) for name in names], given


def attention(arrays, kv_cache_dtype="auto", **options):
    problem = attention_problem(kv_cache_dtype, **options)
    args, keywords = attention_arguments(problem, arrays)
    return Call("paged_attention", args, keywords, cupy_paged.paged_attention)


def attention_with_lse(arrays):
    args, keywords = attention_arguments(attention_problem(alibi=True), arrays)
    function = functools.partial(cupy_paged.paged_attention, return_lse=True)
    return Call("paged_attention_with_lse", args, keywords, function)


def attention_out(arrays):
    def function(out, *args, **keywords):
        cupy_paged.paged_attention(*args, out=out, **keywords)

    problem = attention_problem()
    args, keywords = attention_arguments(problem, arrays)
    out = ops.empty(problem.query.shape, "float16", arrays, 1.0)
    return Call("paged_attention_out", [out, *args], keywords, function)


def vllm_attention(arrays, op):
    problem = attention_problem("fp8")
    num_seqs, num_heads, head_size = problem.query.shape
    k_scale, v_scale = (scale_of(arrays, s) for s in problem.case.scales)
    tail, keywords = ops.positional(problem, arrays, k_scale=k_scale, v_scale=v_scale)
    written = [ops.empty(problem.query.shape, "float16", arrays, 1.0)]
    if op == "paged_attention_v2":
        shape = num_seqs, num_heads, 1
        written += [ops.empty(shape, "float32", arrays, 1.0) for _ in range(2)]
        written += [ops.empty((*shape, head_size), "float32", arrays, 1.0)]
    return Call(op, [*written, *tail], keywords, getattr(cupy_paged, op))


def states(arrays):
    return [arrays.array(x) for x in merge_suite.states(np.random.default_rng(1), "float16")]


def merge(arrays, **keywords):
    function = functools.partial(cupy_paged.merge_attn_states, None)
    return Call("merge_attn_states", states(arrays), keywords, function)


def merge_out(arrays, with_lse):
    given = states(arrays)
    args = [arrays.array(np.ones((37, 5, 64), np.float16)), *given]
    if with_lse:
        args += [arrays.array(np.ones((5, 37), np.float32)), 20]
    return Call("merge_attn_states_out", args, {}, cupy_paged.merge_attn_states)


def normal(arrays, *shape, dtype="float16", seed=2):
    contents = np.random.default_rng(seed).standard_normal(shape)
    return arrays.array(contents.astype(DTYPES[dtype]))


def write(arrays, layout):
    key, value = (
        normal(arrays, 5, NUM_KV_HEADS, HEAD_SIZE, dtype="float32", seed=s) for s in (3, 4)
    )
    slots = arrays.array(np.array([17, -1, 5, 90, 31]))
    if layout == "vllm":
        op, keywords, x = "reshape_and_cache", {}, 16
        shapes = (HEAD_SIZE // x, BLOCK_SIZE, x), (HEAD_SIZE, BLOCK_SIZE)
        shapes = [(NUM_BLOCKS, NUM_KV_HEADS, *shape) for shape in shapes]
    else:
        op, keywords = "reshape_and_cache_flash", {"layout": layout}
        shapes = [(NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE)] * 2
    caches = [arrays.array(np.ones(shape, np.uint8)) for shape in shapes]
    scales = [scale_of(arrays, s) for s in (0.5, 0.25)]
    args = [key, value, *caches, slots, "fp8", *scales]
    return Call(op, args, keywords, getattr(cupy_paged, op))


def write_mla(arrays):
    latent, rotary = normal(arrays, 4, 32), normal(arrays, 4, 8)
    cache = normal(arrays, NUM_BLOCKS, BLOCK_SIZE, 40)
    slots = arrays.array(np.array([17, -1, 5, 90]))
    args = [latent, rotary, cache, slots, "auto", scale_of(arrays, 1.0)]
    return Call("concat_and_cache_mla", args, {}, cupy_paged.concat_and_cache_mla)


def copy(arrays, has_values):
    kinds = [[normal(arrays, 4, 2, 8, seed=2 * kind + i) for i in range(2)] for kind in range(2)]
    if not has_values:
        kinds[1] = []
    pairs = arrays.array(np.array([[3, 0], [1, 2]]))
    return Call("copy_blocks", [*kinds, pairs], {}, cupy_paged.copy_blocks)


def gather(arrays):
    rows = [normal(arrays, 9, NUM_KV_HEADS, HEAD_SIZE, seed=s) for s in (5, 6)]
    codes = np.random.default_rng(7).integers(0, 0x70, (2, NUM_BLOCKS, 16, NUM_KV_HEADS, HEAD_SIZE))
    caches = [arrays.array(cache.astype(np.uint8)) for cache in codes]
    tables, ends, starts = (
        arrays.array(np.array(x, np.int32)) for x in ([[2, 0], [1, -1]], [0, 3, 8], [14, 2])
    )
    keywords = {
        "layout": "NHD",
        "kv_cache_dtype": "fp8",
        "k_scale": scale_of(arrays, 0.5),
        "v_scale": scale_of(arrays, 0.25),
    }
    args = [*rows, *caches, tables, ends, starts]
    return Call("gather_cache", args, keywords, cupy_paged.gather_cache)


CALLS = {
    "paged_attention": attention,
    "paged_attention-fp8": lambda arrays: attention(arrays, "fp8", layout="vllm"),
    "paged_attention-interleaved": lambda arrays: attention(arrays, strides="interleaved"),
    "paged_attention_with_lse": attention_with_lse,
    "paged_attention_out": attention_out,
    "paged_attention_v1": lambda arrays: vllm_attention(arrays, "paged_attention_v1"),
    "paged_attention_v2": lambda arrays: vllm_attention(arrays, "paged_attention_v2"),
    "merge_attn_states": merge,
    "merge_attn_states-some": lambda arrays: merge(arrays, prefill_tokens_with_context=20),
    "merge_attn_states-fp8": lambda arrays: merge(arrays, output_scale=scale_of(arrays, 0.5)),
    "merge_attn_states_out": lambda arrays: merge_out(arrays, with_lse=False),
    "merge_attn_states_out-lse": lambda arrays: merge_out(arrays, with_lse=True),
    "reshape_and_cache": lambda arrays: write(arrays, "vllm"),
    "reshape_and_cache_flash": lambda arrays: write(arrays, "HND"),
    "concat_and_cache_mla": write_mla,
    "copy_blocks": lambda arrays: copy(arrays, has_values=True),
    "copy_blocks-keys": lambda arrays: copy(arrays, has_values=False),
    "gather_cache": gather,
}
"""Builders of calls, each with new tensors of the same contents."""

RETURNING = "paged_attention", "paged_attention_with_lse", "merge_attn_states-fp8"
"""Those of ops that return what others write into a tensor of the caller's."""

WRITING = [
    name for name in CALLS
    if name.partition("-")[0] not in {call.partition("-")[0] for call in RETURNING}
]  # fmt: skip
"""Those of ops that write into tensors of the caller's."""

EVERY_CALL = pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)
BACKENDS = pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
EAGER_AND_COMPILED = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


def check_alike(found, expected):
    assert len(found) == len(expected)
    for i, (got, want) in enumerate(zip(found, expected, strict=True)):
        compare.bitwise(got, want, f"tensor {i}")


class Step:
    """A decode step: attention before and after the newest token is written into the caches.

    It has no arithmetic of torch's own, for which inductor would want a compiler.
    """

    def __init__(self, arrays, num_seqs=2, seed=0):
        self.ops, self.arrays = registered(arrays), arrays
        sizes = NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE
        self.pair = normal(arrays, NUM_BLOCKS, 2, *sizes, seed=seed + 1)
        self.query = normal(arrays, num_seqs, 2 * NUM_KV_HEADS, HEAD_SIZE, seed=seed + 2)
        self.key, self.value = (
            normal(arrays, num_seqs, NUM_KV_HEADS, HEAD_SIZE, seed=seed + s) for s in (3, 4)
        )
        blocks = np.random.default_rng(seed).permutation(NUM_BLOCKS)[:num_seqs]
        self.tables = arrays.array(blocks.astype(np.int32)[:, None])
        self.lens = arrays.array(np.full(num_seqs, 8, np.int32))
        self.slots = arrays.array(blocks * BLOCK_SIZE + 7)
        self.scale = scale_of(arrays, 1.0)

    @property
    def inputs(self):
        """What may change from step to step."""
        return self.pair, self.query, self.key, self.value, self.tables, self.slots

    @property
    def caches(self):
        return self.pair[:, 0], self.pair[:, 1]

    def attend(self, key_cache, value_cache, max_seq_len=None):
        return self.ops.paged_attention(
            self.query, key_cache, value_cache, self.tables, self.lens, layout="HND",
            max_seq_len=max_seq_len,
        )  # fmt: skip

    def write(self, key_cache, value_cache):
        self.ops.reshape_and_cache_flash(
            self.key, self.value, key_cache, value_cache, self.slots, "auto", self.scale,
            self.scale, layout="HND",
        )  # fmt: skip

    def __call__(self, key_cache, value_cache):
        before = self.attend(key_cache, value_cache)
        self.write(key_cache, value_cache)
        return before, self.attend(key_cache, value_cache)

    def results(self, made):
        """(before, after, caches) as NumPy arrays."""
        return [self.arrays.numpy(x) for x in (*made, self.pair)]

    def become(self, other):
        """Fills all inputs with those of another step."""
        for mine, theirs in zip(self.inputs, other.inputs, strict=True):
            mine.copy_(theirs)

    def compiled(self, run, **options):
        return self.arrays.torch.compile(run, fullgraph=True, **options)

    def on_views(self, pair):
        """The same, with caches that are taken from one array on the way."""
        return self(pair[:, 0], pair[:, 1])


def layers_of_a_cache(step):
    """(keys, values) of each layer of a new PagedKVCache, with other contents in each layer."""
    cache = cupy_paged.PagedKVCache(
        2, NUM_BLOCKS, num_kv_heads=NUM_KV_HEADS, head_size=HEAD_SIZE, block_size=BLOCK_SIZE,
        like=step.query, layout="HND",
    )  # fmt: skip
    layers = list(zip(cache.key_caches, cache.value_caches, strict=True))
    for layer, pair in enumerate(layers):
        for mine, contents in zip(pair, step.caches, strict=True):
            mine.copy_(contents.roll(layer, 0))
    return layers


def check_copies_nothing(code):
    """Check that what inductor compiled writes into the arrays that it was given."""
    assert "reshape_and_cache_flash" in code
    assert not re.search(r"= empty_strided\w*\(", code)


class TorchOpsSuite:
    @pytest.fixture(autouse=True)
    def nothing_is_compiled_yet(self, arrays):
        # What torch keeps on disk, it finds again without asking what an op writes or returns.
        config = importlib.import_module("torch._inductor.config")
        arrays.torch.compiler.reset()
        with config.patch(force_disable_caches=True):
            yield

    @EVERY_CALL
    def test_repeats_the_function(self, arrays, make):
        call, again = make(arrays), make(arrays)
        found = call.run(getattr(registered(arrays), call.op), arrays)
        check_alike(found, again.run(again.function, arrays))

    @EVERY_CALL
    def test_opcheck(self, arrays, make):
        call = make(arrays)
        op = getattr(registered(arrays), call.op).default
        arrays.torch.library.opcheck(op, tuple(call.args), call.keywords)

    @EVERY_CALL
    @BACKENDS
    def test_compiled_as_eager(self, arrays, make, backend):
        call, again = make(arrays), make(arrays)
        op = getattr(registered(arrays), call.op)

        def run(*args, **keywords):
            return op(*args, **keywords)

        compiled = arrays.torch.compile(run, fullgraph=True, backend=backend)
        check_alike(call.run(compiled, arrays), again.run(op, arrays))

    @EVERY_CALL
    def test_inference_mode(self, arrays, make):
        torch = arrays.torch
        again = make(arrays)
        expected = again.run(again.function, arrays)
        for made_inside in (False, True):
            call = None if made_inside else make(arrays)
            with torch.inference_mode():
                call = call or make(arrays)
                op = getattr(registered(arrays), call.op)
                run = torch.compile(
                    lambda *args, op=op, **keywords: op(*args, **keywords),
                    fullgraph=True,
                    backend="aot_eager",
                )
                check_alike(call.run(run, arrays), expected)
                call = make(arrays)
                check_alike(call.run(op, arrays), expected)

    @BACKENDS
    @pytest.mark.parametrize("form", ["caches", "views"])
    def test_reads_after_a_write_are_not_those_before(self, arrays, backend, form):
        # A compiler that saw no write would compute the attention once.
        found, expected = Step(arrays), Step(arrays)
        if form == "caches":
            run, given = found.compiled(found.__call__, backend=backend), found.caches
        else:
            run, given = found.compiled(found.on_views, backend=backend), [found.pair]
        got, want = found.results(run(*given)), expected.results(expected(*expected.caches))
        check_alike(got, want)
        before, after, _ = got
        assert (before != after).any()

    @pytest.mark.parametrize("form", ["caches", "views"])
    def test_inductor_copies_no_cache(self, arrays, form):
        utils = importlib.import_module("torch._inductor.utils")
        step = Step(arrays)
        if form == "caches":
            run, given = step.__call__, [cache.contiguous() for cache in step.caches]
        else:
            run, given = step.on_views, [step.pair]
        _, (code,) = utils.run_and_get_code(step.compiled(run), *given)
        check_copies_nothing(code)

    def test_inductor_copies_no_layer_of_a_cache(self, arrays):
        utils = importlib.import_module("torch._inductor.utils")
        step = Step(arrays)

        def run(layers):
            return [made for layer in layers for made in step(*layer)]

        found, expected = layers_of_a_cache(step), layers_of_a_cache(step)
        made, (code,) = utils.run_and_get_code(step.compiled(run), found)
        check_copies_nothing(code)
        want = run(expected)
        for got, right in (made, want), (sum(found, ()), sum(expected, ())):
            check_alike([arrays.numpy(x) for x in got], [arrays.numpy(x) for x in right])

    @BACKENDS
    def test_other_sizes_need_no_other_graph(self, arrays, backend):
        torch = arrays.torch

        op = registered(arrays).paged_attention

        def attend(query, key_cache, value_cache, tables, lens, max_seq_len):
            return op(
                query, key_cache, value_cache, tables, lens, layout="HND", max_seq_len=max_seq_len
            )

        compiled = torch.compile(attend, fullgraph=True, backend=backend, dynamic=True)

        def check(num_seqs, max_seq_len):
            step = Step(arrays, num_seqs)
            out = compiled(step.query, *step.caches, step.tables, step.lens, max_seq_len)
            want = step.attend(*step.caches, max_seq_len)
            compare.bitwise(arrays.numpy(out), arrays.numpy(want))

        check(3, 8)
        with torch.compiler.set_stance("fail_on_recompile"):
            check(5, 11)
            check(2, 100)

    @pytest.mark.parametrize("name", RETURNING)
    @pytest.mark.filterwarnings("ignore:There is a performance drop")
    def test_vmap_calls_an_op_for_each_example(self, arrays, name):
        torch = arrays.torch
        call = CALLS[name](arrays)
        op, (first, *others) = getattr(registered(arrays), call.op), call.args
        examples = torch.stack([first, first * 2, first / 4])

        def run(x):
            return op(x, *others, **call.keywords)

        made, want = torch.func.vmap(run)(examples), [run(x) for x in examples]
        for i in range(len(examples)):
            found = [x[i] for x in made] if isinstance(made, tuple) else made[i]
            for got, right in zip(found, want[i], strict=True):
                compare.bitwise(arrays.numpy(got), arrays.numpy(right), f"example {i}")
        with pytest.raises(RuntimeError, match=rf"\.{call.op}: no gradient flows"):
            torch.func.grad(lambda x: sum(y.float().sum() for y in torch.func.vmap(run)(x)))(
                examples
            )

    @pytest.mark.parametrize("name", ["paged_attention_out", "reshape_and_cache_flash"])
    def test_vmap_refuses_ops_that_write(self, arrays, name):
        call = CALLS[name](arrays)
        op, (first, *others) = getattr(registered(arrays), call.op), call.args
        before = arrays.numpy(first).copy()

        def run(x):
            return op(x, *others, **call.keywords)

        with pytest.raises(RuntimeError, match=rf"Batching rule not implemented for .*{call.op}"):
            arrays.torch.func.vmap(run)(first[None])
        compare.bitwise(arrays.numpy(first), before)

    @pytest.mark.parametrize("transform", ["grad", "vmap"])
    def test_functions_refuse_what_transforms_wrap(self, arrays, transform):
        call = CALLS["paged_attention"](arrays)
        query, *others = call.args

        def run(x):
            return call.function(x, *others, **call.keywords).sum()

        given = query[None] if transform == "vmap" else query
        for _ in range(2):  # what is kept of the call in between is for others
            with pytest.raises(TypeError, match=r"^query: .*torch"):
                getattr(arrays.torch.func, transform)(run)(given)
            run(query)

    def test_scales_are_tensors(self, arrays):
        step = Step(arrays)
        given = step.query, *step.caches, step.tables, step.lens
        with pytest.raises(RuntimeError, match=r"argument 'k_scale' .* type 'float'"):
            step.ops.paged_attention(*given, layout="HND", k_scale=0.5)
        out = step.ops.paged_attention(*given, layout="HND", k_scale=None, v_scale=step.scale)
        compare.bitwise(arrays.numpy(out), arrays.numpy(step.attend(*step.caches)))

    @EAGER_AND_COMPILED
    def test_errors_are_those_of_the_function(self, arrays, compiled):
        step = Step(arrays)
        key_cache, value_cache = step.caches
        run = step.compiled(step.attend) if compiled else step.attend
        with pytest.raises(ValueError, match=r"^value_cache: block_size 8 does not match"):
            run(key_cache, value_cache[:, :, :8])

    def test_meta_tensors_give_shapes(self, arrays):
        step = Step(arrays)
        given = (x.to("meta") for x in (step.query, *step.caches, step.tables, step.lens))
        out, lse = step.ops.paged_attention_with_lse(*given, layout="HND")
        assert (out.shape, lse.shape) == (step.query.shape, step.query.shape[:2])
        assert (out.dtype, lse.dtype) == (step.query.dtype, arrays.torch.float32)

    def test_several_threads(self, arrays):
        check_threads(arrays, lambda run: run())


class GraphBreaksSuite:
    """What holds for the functions themselves, in code that torch compiles."""

    @pytest.fixture(autouse=True)
    def nothing_is_compiled_yet(self, arrays):
        arrays.torch.compiler.reset()

    @pytest.fixture(autouse=True)
    def no_warnings(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            yield

    @EVERY_CALL
    def test_functions_are_called_as_they_are(self, arrays, make):
        call, again, counter = make(arrays), make(arrays), graph_counter()

        def run(*args, **keywords):
            return call.function(*args, **keywords)

        compiled = arrays.torch.compile(run, backend=counter)
        check_alike(call.run(compiled, arrays), again.run(again.function, arrays))
        assert counter.op_count == 0, "torch has compiled what is inside"

    @pytest.mark.parametrize("name", ["paged_attention", "gather_cache", "copy_blocks"])
    def test_a_function_may_itself_be_compiled(self, arrays, name):
        call, again, counter = CALLS[name](arrays), CALLS[name](arrays), graph_counter()
        compiled = arrays.torch.compile(call.function, backend=counter)
        check_alike(call.run(compiled, arrays), again.run(again.function, arrays))
        assert counter.op_count == 0, "torch has compiled what is inside"

    @EVERY_CALL
    def test_a_full_graph_is_refused_with_what_to_do(self, arrays, make):
        call, exceptions = make(arrays), importlib.import_module("torch._dynamo.exc")

        def run(*args, **keywords):
            return call.function(*args, **keywords)

        compiled = arrays.torch.compile(run, backend="eager", fullgraph=True)
        says_why = tuple(map(int, arrays.torch.__version__.split(".")[:2])) >= (2, 8)
        message = r"it needs the ops .* torch\.ops\.cupy_paged" if says_why else "disable"
        with pytest.raises(exceptions.Unsupported, match=message):
            compiled(*call.args, **call.keywords)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    def test_steps_of_a_cache(self, arrays, dtype):
        found, expected = (CacheSteps(arrays, dtype) for _ in range(2))
        counter = graph_counter()
        compiled = arrays.torch.compile(found.step, backend=counter)
        for seed in range(3):
            want = expected.step(*expected.tokens(seed))
            got = compiled(*found.tokens(seed))
            check_alike([arrays.numpy(got.float())], [arrays.numpy(want.float())])
        assert counter.op_count == 2, "needs what is before the cache, and what is after it"

    def test_checked_mode(self, arrays):
        step = Step(arrays)

        def run(tables):
            with cupy_paged.checked():
                return cupy_paged.paged_attention(
                    step.query, *step.caches, tables, step.lens, layout="HND"
                )

        compiled = arrays.torch.compile(run, backend="eager")
        compare.bitwise(arrays.numpy(compiled(step.tables)), arrays.numpy(run(step.tables)))
        with pytest.raises(IndexError, match=r"^block_tables: sequence 0 has block"):
            compiled(step.tables + NUM_BLOCKS)
        cupy_paged.paged_attention(  # is not checked: the mode has ended
            step.query, *step.caches, step.tables, step.lens, layout="HND"
        )


def graph_counter():
    """A backend that counts what it compiles: graphs, and their ops."""
    return importlib.import_module("torch._dynamo.testing").CompileCounter()


class CacheSteps:
    """A PagedKVCache with a sequence of 5 tokens, and its next steps."""

    def __init__(self, arrays, dtype):
        self.arrays, self.dtype = arrays, dtype
        self.cache = cupy_paged.PagedKVCache(
            1, NUM_BLOCKS, num_kv_heads=NUM_KV_HEADS, head_size=HEAD_SIZE,
            like=normal(arrays, 1, dtype=dtype),
        )  # fmt: skip
        self.sequence = self.cache.add(count=5)
        key = normal(arrays, 5, NUM_KV_HEADS, HEAD_SIZE, dtype=dtype)
        self.cache.write(0, key, key, self.cache.batch([self.sequence]))

    def tokens(self, seed):
        return (
            normal(self.arrays, 1, heads, HEAD_SIZE, dtype=self.dtype, seed=seed)
            for heads in (2 * NUM_KV_HEADS, NUM_KV_HEADS)
        )

    def step(self, query, key):
        doubled = query * 2
        self.cache.append(self.sequence, count=1)
        batch = self.cache.batch([self.sequence])
        self.cache.write(0, key, key, batch)
        return self.cache.attend(0, doubled, batch) + 1


def check_threads(arrays, surround):
    """Check that threads at work side by side do not disturb each other.

    surround    runs what it is given as one of them is to: on a stream of its own, for example
    """
    calls = [make(arrays) for make in CALLS.values()]
    expected = [call.run(call.function, arrays) for call in calls]
    failed = []

    def work():
        for make, want in zip(CALLS.values(), expected, strict=True):
            call = make(arrays)
            check_alike(call.run(getattr(registered(arrays), call.op), arrays), want)

    def attempt():
        try:
            for _ in range(3):
                surround(work)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=attempt) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
