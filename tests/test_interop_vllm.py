"""vLLM's functions with ours in their place, on host arrays, and how they get there and go."""

import doctest
import inspect
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest

from cupy_paged.interop import replacement, vllm
from cupy_paged.interop.vllm import OPS, install
from support import compare, fake_vllm, frameworks
from support.receipt import ROOT
from support.vllm_suite import VllmSuite


@pytest.fixture(params=frameworks.writable(frameworks.host()), ids=lambda arrays: arrays.name)
def arrays(request):
    return request.param


class TestVllm(VllmSuite):
    pass


@pytest.fixture
def module():
    """The newest vLLM, which has dropped some of the ops."""
    return fake_vllm.module(without=fake_vllm.DROPPED)


def stand_ins(module):
    """The names in the module that hold one of our functions."""
    return {name for name, forms in OPS.items() if vars(module).get(name) in forms}


def plain(function):
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return inspect.Signature(parameters)


# ---- what is there ----


def test_every_signature_is_upstreams():
    upstream = fake_vllm.functions()
    assert OPS.keys() == upstream.keys()
    for name, function in upstream.items():
        assert plain(OPS[name][0]) == inspect.signature(function), name
        assert OPS[name][0] is getattr(vllm, name)


def test_older_signatures_are_upstreams():
    for name, function in fake_vllm.functions(fake_vllm.OLDER_SIGNATURES).items():
        if name != "merge_attn_states":  # whose newer parameters have defaults
            assert plain(OPS[name][1]) == inspect.signature(function), name


@pytest.mark.parametrize("source", [vllm, replacement])
def test_examples(source):
    assert doctest.testmod(source).failed == 0


def test_an_import_loads_neither_torch_nor_vllm():
    code = "import sys, cupy_paged.interop.vllm; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert not {"torch", "vllm", "cupy"} & set(done.stdout.split())


# ---- coming and going ----


def test_everything_is_put_back(module):
    before = dict(vars(module))
    handle = install(module)
    assert stand_ins(module) == OPS.keys()
    assert module.rms_norm is before["rms_norm"]
    handle.uninstall()
    assert dict(vars(module)) == before


def test_a_context_ends_after_an_error_too(module):
    before = dict(vars(module))
    with pytest.raises(KeyError), install(module) as handle:
        assert handle.module is module and stand_ins(module)
        raise KeyError
    assert dict(vars(module)) == before


def test_some_names_alone(module):
    with install(module, ["paged_attention_v1", "convert_fp8"]):
        assert stand_ins(module) == {"paged_attention_v1", "convert_fp8"}


def test_vllm_is_the_default(module, monkeypatch):
    fake_vllm.put_in_place(monkeypatch, module)
    with install() as handle:
        assert handle.module is module


def test_without_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"^install: cannot import vllm\._custom_ops .*pass"):
        install()


def test_a_second_install_is_refused(module):
    before = dict(vars(module))
    with install(module, ["convert_fp8"]):
        with pytest.raises(RuntimeError, match=r"^vllm\._custom_ops: is replaced already"):
            install(module, ["copy_blocks"])
        assert stand_ins(module) == {"convert_fp8"}
    with install(module):
        assert stand_ins(module) == OPS.keys()
    assert dict(vars(module)) == before


def test_modules_come_and_go_in_any_order(module):
    other = fake_vllm.module(name="aphrodite._custom_ops")
    before = dict(vars(module)), dict(vars(other))
    first, second = install(module), install(other)
    first.uninstall()
    assert dict(vars(module)) == before[0] and stand_ins(other) == OPS.keys()
    first = install(module)
    second.uninstall()
    assert dict(vars(other)) == before[1] and stand_ins(module) == OPS.keys()
    first.uninstall()
    assert dict(vars(module)) == before[0]


def test_a_spent_handle_does_nothing(module):
    spent = install(module)
    spent.uninstall()
    with install(module):
        spent.uninstall()
        assert stand_ins(module) == OPS.keys()


def test_what_others_have_set_since_stays(module):
    before = dict(vars(module))
    with install(module):
        module.convert_fp8 = module.copy_blocks = theirs = lambda *arguments: None
        del module.swap_blocks
    expected = {**before, "convert_fp8": theirs, "copy_blocks": theirs}
    del expected["swap_blocks"]
    assert dict(vars(module)) == expected


# ---- what does not fit ----


def test_an_older_form_gets_ours(arrays):
    module = fake_vllm.module(fake_vllm.OLDER_SIGNATURES)
    cache = np.arange(64, dtype=np.float32).reshape(2, 2, 16)
    with install(module):
        source, destination = arrays.array(cache), arrays.array(np.zeros_like(cache))
        module.swap_blocks(source, destination, np.array([[1, 0]]))
        compare.bitwise(arrays.numpy(destination)[0], cache[1])

        rows = arrays.array(np.zeros((3, 16), np.float32))
        tables, ends = np.array([[1, 0]], np.int32), np.array([0, 3], np.int32)
        module.gather_and_maybe_dequant_cache(
            source, rows, arrays.array(tables), arrays.array(ends), 1, "auto", 1.0
        )
        compare.bitwise(arrays.numpy(rows), cache[[1, 1, 0], [0, 1, 0]])


@pytest.mark.parametrize(
    "signature",
    [
        "concat_and_cache_mla(kv_c, k_pe, kv_cache, slot_mapping, kv_cache_dtype, kv_scale)",
        "convert_fp8(output, input, kv_dtype='fp8', scale=1.0)",
        "convert_fp8(output, input, scale=2.0, kv_dtype='fp8')",
        "convert_fp8(output, input, scale=1.0, kv_dtype='fp8', more=None)",
        "copy_blocks(key_caches, value_caches, *, block_mapping)",
        "copy_blocks(key_caches, value_caches)",
        "copy_blocks(*args, **kwargs)",
    ],
)
def test_another_signature_is_refused_and_nothing_replaced(signature):
    module = fake_vllm.module(signature)
    before = dict(vars(module))
    name = signature.partition("(")[0]
    with pytest.raises(TypeError, match=rf"^vllm\._custom_ops\.{name}: takes \(.*\), needs \("):
        install(module)
    assert dict(vars(module)) == before
    with install(module, OPS.keys() - {name}):
        assert stand_ins(module) == OPS.keys() - {name}


def test_what_is_no_function_is_refused(module):
    module.copy_blocks = 7
    with pytest.raises(TypeError, match=r"^vllm\._custom_ops\.copy_blocks: "):
        install(module)


def test_unknown_names_are_refused(module):
    with pytest.raises(ValueError, match=r"^names: unknown 'rms_norm'"):
        install(module, ["rms_norm"])


@pytest.mark.parametrize("module", ["vllm._custom_ops", ModuleType("torch.ops._C")])
def test_what_is_no_module_of_functions_is_refused(module):
    with pytest.raises(TypeError, match=r"^module: got .*, needs a module"):
        install(module)


def zeros(*shape, dtype=np.float16):
    return np.zeros(shape, dtype)


SLOTS = zeros(1, dtype=np.int64)
ROW, ROWS = zeros(1, 2, 8), zeros(3, 4, 2, 8)
LATENT = zeros(1, 8), zeros(1, 8), zeros(3, 4, 16), SLOTS
TABLES = zeros(2, 3, dtype=np.int32), zeros(3, dtype=np.int32)
REFUSED = {
    "another kv_cache_dtype": (
        "reshape_and_cache_flash",
        [ROW, ROW, ROWS, ROWS.copy(), SLOTS, "nvfp4", 1.0, 1.0],
        "kv_cache_dtype: unknown 'nvfp4'",
    ),
    "scales per head": (
        "reshape_and_cache_flash",
        [ROW, ROW, ROWS.astype(np.uint8), ROWS.astype(np.uint8), SLOTS, "fp8", np.ones(2, "f4"), 1],
        "k_scale: shape .*, needs one element",
    ),
    "DeepSeek's MLA cache": (
        "concat_and_cache_mla",
        [*LATENT, "fp8_ds_mla", 1.0],
        "kv_cache_dtype: unknown 'fp8_ds_mla'",
    ),
    "a conversion without fp8": (
        "convert_fp8",
        [zeros(4, dtype=np.uint8), zeros(4), 1.0, "auto"],
        "kv_dtype: unknown 'auto'",
    ),
    "no output": (
        "merge_attn_states",
        [None, ROW, zeros(2, 1, dtype=np.float32), ROW, zeros(2, 1, dtype=np.float32)],
        "output: got None, needs an array",
    ),
    "blocks of another length": (
        "swap_blocks",
        [ROWS, ROWS.copy(), 64, zeros(1, 2, dtype=np.int64)],
        "block_size_in_bytes: 64 does not match src's 128",
    ),
    "another number of sequences": (
        "cp_gather_cache",
        [zeros(3, 4, 16), zeros(5, 16), *TABLES, 3],
        r"batch_size: 3 does not match cu_seq_lens' shape \(3,\)",
    ),
    "entries of another length": (
        "cp_gather_cache",
        [zeros(3, 4, 32), zeros(5, 16), *TABLES, 2],
        r"dst: rows of shape \(16,\), needs",
    ),
    "an entry that has no halves": (
        "gather_cache",
        [zeros(3, 4, 24), zeros(5, 24), *TABLES, 2],
        "dst: entries of 24 elements, needs a multiple of 16",
    ),
    "a negative number of tokens": (
        "gather_and_maybe_dequant_cache",
        [zeros(3, 4, 16), zeros(5, 16), *TABLES, None, -1, "auto", 1.0],
        "num_tokens: got -1, needs at least 0",
    ),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_ours_do_not_support_is_their_own_error(module, wrong):
    name, positional, message = REFUSED[wrong]
    with install(module), pytest.raises((ValueError, TypeError), match=f"^{message}"):
        getattr(module, name)(*positional)
