"""Kernels compile for every architecture, without a GPU, and keep their state in registers.

The specialisations are the ones that the ops ask for: a fixed set that many models use, and a
sample of the rest, another one for each architecture.
"""

import concurrent.futures
import itertools
import math
import multiprocessing
import os
import random

import pytest

from cupy_paged import attention_kernels as attention
from cupy_paged import block_ops, block_runs, cache_ops, gpu, layout_ops, merge, mla
from cupy_paged.attention_kernels import HeadProblem, attention_plan
from cupy_paged.cache_ops import convert_kernel, write_kernel
from cupy_paged.compiler import Kernel, flatten, options
from cupy_paged.dtypes import FLOATS, itemsize
from cupy_paged.launch import ParamStruct
from cupy_paged.layouts import MAX_HEAD_SIZE
from cupy_paged.merge import merge_kernel
from support import nvrtc

pytest.importorskip("cupy", reason="CuPy brings NVRTC: the cuda12 and cuda13 extras have it")

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
SAMPLE = 6  # specialisations of paged_attention for each architecture, beside the fixed ones

REGISTERS_OF_AN_SM = 64 * 1024

DTYPES = [(query, cache) for query in FLOATS for cache in (query, "float8_e4m3fn", "float8_e5m2")]
LAYOUTS = ("vllm", "HND", "NHD")
HEAD_SIZES = range(8, MAX_HEAD_SIZE + 1, 8)
BLOCK_SIZES = (1, 7, 8, 16, 32, 33, 64, 100, 128, 250, 256)
GROUP_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 64)
SCRATCH = (None, "float32", "query")


def common_problems() -> list[HeadProblem]:
    """What popular models ask for."""
    shapes = [("vllm", 128, 1), ("HND", 128, 4), ("NHD", 128, 8), ("HND", 64, 3), ("NHD", 256, 2)]
    return [
        HeadProblem(
            "bfloat16", "bfloat16", layout, head_size, 16, group_size, 16, 16, 16, False, False
        )
        for layout, head_size, group_size in shapes
    ]


def sampled_problem(rng: random.Random) -> HeadProblem:
    query, cache = rng.choice(DTYPES)
    layout = rng.choice(LAYOUTS)
    head_size, block_size = rng.choice(HEAD_SIZES), rng.choice(BLOCK_SIZES)
    size = itemsize(cache)
    if layout == "vllm":
        head_size = -(-head_size * size // 16) * 16 // size
        key_row, value_row = 16, block_size * size
    else:
        key_row = value_row = head_size * size

    def alignment(row: int) -> int:
        return rng.choice([n for n in (1, 2, 4, 8, 16) if n >= size and row % n == 0])

    return HeadProblem(
        query_dtype=query,
        cache_dtype=cache,
        layout=layout,
        head_size=head_size,
        block_size=block_size,
        group_size=rng.choice(GROUP_SIZES),
        key_alignment=alignment(key_row),
        value_alignment=alignment(value_row),
        query_alignment=rng.choice((itemsize(query), 16)),
        has_alibi=rng.random() < 0.25,
        is_block_sparse=rng.random() < 0.25,
    )


def attention_kernels(sm: int) -> list[Kernel]:
    rng = random.Random(sm)
    shared = gpu.shared_bytes_of(sm)
    plans = [attention_plan(problem, sm, shared, "float32") for problem in common_problems()]
    for _ in range(SAMPLE):
        problem = sampled_problem(rng)
        scratch = rng.choice(SCRATCH)
        scratch = problem.query_dtype if scratch == "query" else scratch
        plans.append(attention_plan(problem, sm, shared, scratch))
    kernels = [kernel for plan in plans for kernel in (plan.kernel, plan.combine) if kernel]
    return list(dict.fromkeys(kernels))


def merge_kernels(sm: int) -> list[Kernel]:
    rng = random.Random(sm)
    return [
        merge_kernel(dtype, output, rng.choice(HEAD_SIZES), rng.choice((1, 2, 4)), row)
        for dtype in FLOATS
        for output, row in ((dtype, "uint32"), ("float8_e4m3fn", "uint32"), (dtype, "int64"))
    ]


def write_kernels(sm: int) -> list[Kernel]:
    rng = random.Random(sm)
    kernels = []
    for dtype, cache in DTYPES:
        most = 16 // itemsize(dtype)
        widths = [width for width in (1, 2, 4, 8) if width <= most]
        sizes = 16 * rng.randint(1, 32), rng.choice(BLOCK_SIZES)
        layout = rng.choice(LAYOUTS)
        kernels.append(
            write_kernel(dtype, cache, layout, *sizes, rng.choice(widths), rng.choice(widths))
        )
    return kernels


def convert_kernels(sm: int) -> list[Kernel]:
    pairs = itertools.product(FLOATS, ("float8_e4m3fn", "float8_e5m2"))
    return [convert_kernel(*order) for pair in pairs for order in (pair, pair[::-1])]


def move_kernels(sm: int) -> list[Kernel]:
    """Blocks, gathers, conversions of layouts and the MLA writer: some for each architecture."""
    rng = random.Random(sm)
    widths = 16, rng.choice((1, 2, 4, 8))
    kernels = [make(w) for w in widths for make in (block_ops.copy_kernel, block_runs.swap_kernel)]
    for layout in LAYOUTS:
        dtype, cache = rng.choice(DTYPES)
        head_size, block_size = 16 * rng.randint(1, 32), rng.choice(BLOCK_SIZES)
        new_layout = rng.choice([other for other in LAYOUTS if other != layout])
        size = itemsize(cache)
        key_width = rng.choice((1, 16 // max(size, itemsize(dtype))))
        value_width = key_width
        if layout == "vllm":
            value_width = 4 // size
        kernels.append(
            layout_ops.gather_kernel(
                cache, dtype, layout, head_size, block_size, key_width, value_width
            )
        )
        token_width = math.gcd(16 // size, block_size)
        kernels.append(
            layout_ops.layout_kernel(
                size, layout, new_layout, head_size, block_size, 16 // size, 4 // size, token_width
            )
        )
    dtype, cache = rng.choice(DTYPES)
    kernels.append(mla.concat_kernel(dtype, cache, rng.choice((1, 16 // itemsize(dtype)))))
    return kernels


SETS = {
    "paged_attention": attention_kernels,
    "merge_attn_states": merge_kernels,
    "reshape_and_cache": write_kernels,
    "convert_fp8": convert_kernels,
    "moves": move_kernels,
}

PARAMS = {
    "paged_attention.cu": attention.PARAMS,
    "merge_attn_states.cu": merge.PARAMS,
    "reshape_and_cache.cu": cache_ops.WRITE_PARAMS,
    "convert_fp8.cu": cache_ops.CONVERT_PARAMS,
    "copy_blocks.cu": block_ops.COPY_PARAMS,
    "swap_blocks.cu": block_runs.PARAMS,
    "gather_cache.cu": layout_ops.GATHER_PARAMS,
    "convert_layout.cu": layout_ops.CONVERT_PARAMS,
    "concat_and_cache_mla.cu": mla.PARAMS,
}


def flaws(kernel: Kernel, sm: int, defined: tuple[str, ...] = ()) -> str | None:
    """What is wrong with a kernel on an architecture. None if nothing is."""
    given = *options(), *(f"-D{name}" for name in defined)
    try:
        compiled = nvrtc.compile(flatten(kernel.source), [kernel.name], sm, given)
    except nvrtc.CompileError as error:
        return str(error)
    used = compiled.kernels[kernel.name]
    shared = kernel.shared_bytes + used.static_smem
    if used.spill_stores or used.spill_loads or used.stack:
        return f"spills: {used} in {kernel.name}"
    if used.registers * kernel.num_threads > REGISTERS_OF_AN_SM:
        return f"does not fit a multiprocessor: {used} in {kernel.name}"
    if shared > gpu.shared_bytes_of(sm):
        return f"{shared} bytes of shared memory in {kernel.name}"
    return None


@pytest.fixture(scope="module")
def workers():
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        yield pool


@pytest.mark.parametrize("sm", ARCHITECTURES, ids="sm_{}".format)
@pytest.mark.parametrize("kernels", SETS)
def test_kernels_compile_without_spills(workers, kernels, sm, tally):
    chosen = SETS[kernels](sm)
    found = [flaw for flaw in workers.map(flaws, chosen, itertools.repeat(sm)) if flaw]
    assert not found, f"{len(found)} of {len(chosen)} kernels:\n" + "\n".join(found)
    tally("compiled kernels", len(chosen))
    tally.each("architectures", sm)


@pytest.mark.parametrize("layout", ["vllm", "HND"])
def test_kernels_compile_as_racecheck_wants_them(layout):
    problem = HeadProblem("bfloat16", "bfloat16", layout, 128, 16, 4, 16, 16, 16, False, False)
    kernel = attention_plan(problem, 90, gpu.shared_bytes_of(90), None).kernel
    assert kernel.source == "paged_attention_mma.cu"
    assert "EVERY_LANE" in flatten(kernel.source)
    assert flaws(kernel, 90, ("CUPY_PAGED_EVERY_LANE",)) is None


@pytest.mark.parametrize(("filename", "params"), PARAMS.items(), ids=PARAMS)
def test_params_have_the_layout_that_python_packs(filename: str, params: ParamStruct):
    """A byte out of place would be read as another argument."""
    sizes = {"pointer": 8, "int64": 8, "int": 4, "float": 4}
    # NVRTC has no offsetof; this is what its front end makes of one.
    asserts = ["#define OFFSET(T, field) __INTADDR__(&(((T*)0)->field))"]
    name, offset = f"cupy_paged::{params.cpp_name}", 0
    for field, kind in params.fields.items():
        asserts.append(f'static_assert(OFFSET({name}, {field}) == {offset}, "{field}");')
        offset += sizes[kind]
    asserts.append(f'static_assert(sizeof({name}) == {params.size}, "size");')
    nvrtc.compile("\n".join([flatten(filename), *asserts]), [], 80, options())


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_kernels_are_told_distances_in_64_bits(params: ParamStruct):
    """With fewer, the product of a block's number and a stride would be of fewer, too."""
    distances = {
        name: kind
        for name, kind in params.fields.items()
        if ("stride" in name or name == "block_bytes") and not name.startswith("sparse_")
    }
    assert distances or params is cache_ops.CONVERT_PARAMS  # which are of one packed array
    assert set(distances.values()) <= {"int64"}, distances


@pytest.mark.parametrize("sm", [sm for sm in ARCHITECTURES if sm >= 80], ids="sm_{}".format)
@pytest.mark.parametrize("cache_dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
@pytest.mark.parametrize("group_size", [1, 2, 4, 7, 8, 16])
def test_usual_shapes_are_for_tensor_cores(sm, cache_dtype, head_size, group_size):
    """Whatever the scratch is: what computes must not depend on it, or a row's bits would."""
    for layout, scratch_dtype in itertools.product(LAYOUTS, ("float32", "bfloat16")):
        problem = HeadProblem(
            "bfloat16", cache_dtype, layout, head_size, 16, group_size, 16, 16, 16, False, False
        )
        plan = attention_plan(problem, sm, gpu.shared_bytes_of(sm), scratch_dtype)
        assert plan.kernel.source == "paged_attention_mma.cu"


def test_compiler_knows_every_architecture():
    assert set(ARCHITECTURES) <= set(nvrtc.supported_architectures())


def test_spills_are_seen():
    source = """
    __global__ void __launch_bounds__(1024) kernel(const float* in, float* out) {
        float x[200];
        for (int i = 0; i < 200; i++) x[i] = in[i * 1024 + threadIdx.x];
        __syncthreads();
        for (int i = 0; i < 200; i++) out[i * 1024 + threadIdx.x] = x[199 - i] * x[i];
    }
    """
    used = nvrtc.compile(source, ["kernel"], 80).kernels["kernel"]
    assert used.spill_stores > 0
    assert used.spill_loads > 0
    assert used.stack > 0


def test_shared_memory_and_lowered_names_are_read():
    source = """
    template <int N> __global__ void kernel(float* out) {
        __shared__ float x[N];
        x[threadIdx.x] = out[threadIdx.x];
        __syncthreads();
        out[threadIdx.x] = x[N - 1 - threadIdx.x];
    }
    """
    compiled = nvrtc.compile(source, ["kernel<64>", "kernel<32>"], 90)
    assert {name: used.static_smem for name, used in compiled.kernels.items()} == {
        "kernel<64>": 256,
        "kernel<32>": 128,
    }
    assert compiled.cubin.startswith(b"\x7fELF")


def test_compile_error_shows_the_log():
    with pytest.raises(nvrtc.CompileError, match="undefined_name"):
        nvrtc.compile("__global__ void kernel() { undefined_name(); }", ["kernel"], 75)
