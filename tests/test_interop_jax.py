"""The ops inside of jax.jit, with arrays on the host, and with a GPU that is a stand-in."""

import ctypes
import importlib
import os
import struct
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from cupy_paged import arrays as package_arrays
from cupy_paged import attention_kernels, compiler, counters, gpu, in_flight
from support import frameworks
from support.fake_cupy import FakeCuPy
from support.jax_ops_suite import CALLS, EVERY_CALL, JaxOpsSuite, attention, copy
from support.receipt import ROOT

NUMPY, *OTHERS = frameworks.host()
JAX = frameworks.only("jax", OTHERS)


def jax_calls():
    return importlib.import_module("cupy_paged.interop.jax_calls")


@pytest.fixture(params=JAX, ids=lambda arrays: arrays.name)
def arrays(request):
    return request.param


class TestJaxOps(JaxOpsSuite):
    @pytest.fixture
    def reference(self):
        return NUMPY


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("call", "name", "wrong", "message"),
    [
        (attention(), "block_tables", np.full((3, 3), 99, np.int32), r"block_tables\[0, 0\]: "),
        (copy(True), "block_mapping", np.array([[9, 0]]), "block_mapping: source block 9"),
    ],
    ids=["paged_attention", "copy_blocks"],
)
def test_what_contents_show_is_an_error_of_the_run(arrays, call, name, wrong, message, compiled):
    given = {**call.arguments(arrays), name: arrays.array(wrong)}
    run = arrays.jax.jit(call.run) if compiled else call.run
    with pytest.raises(arrays.jax.errors.JaxRuntimeError, match=f"IndexError: {message}"):
        arrays.jax.block_until_ready(run(**given))


def test_a_result_parted_from_its_argument_holds_what_that_held(arrays):
    structure = arrays.jax.tree.structure

    def add_to_first(cache, x, stream):
        cache[0] += x[0]

    trees = map(structure, ({"cache": 0}, {"x": 0}, {}))
    run = jax_calls()._callback(add_to_first, *trees, ())
    cache, result = np.arange(4.0), np.full(4, np.nan)
    run(None, [result], cache, np.array([5.0]))
    assert result.tolist() == [5, 1, 2, 3]
    assert cache.tolist() == [0, 1, 2, 3]
    run(None, [result], result, np.array([1.0]))
    assert result.tolist() == [6, 1, 2, 3]


def test_older_versions_are_named(arrays, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax.experimental.buffer_callback", None)
    for name in ("jax_ops", "jax_calls"):
        monkeypatch.delitem(sys.modules, f"cupy_paged.interop.{name}", raising=False)
    with pytest.raises(ImportError, match=rf"^JAX {arrays.jax.__version__} .* 0\.6\.1 or newer"):
        importlib.import_module("cupy_paged.interop.jax_ops")


# ---- what is queued on a GPU ----

DEVICE, STREAM = 1, 77


class Lent:
    """As a buffer that XLA lends: host memory that says it is on a GPU, by DLPack alone."""

    def __init__(self, host):
        self.host = np.array(host, order="C")

    def __dlpack_device__(self):
        return 2, DEVICE

    def __dlpack__(self, *, stream, max_version):
        bits = self.host.view(f"u{self.host.itemsize}")
        capsule = bits.__dlpack__(max_version=max_version)
        tensor, _ = package_arrays._read_capsule(capsule)
        tensor.device_type, tensor.device_id = self.__dlpack_device__()
        codes = {name: code for (code, _), name in package_arrays._DL_DTYPES.items()}
        tensor.code = codes[self.host.dtype.name]
        return capsule

    @property
    def address(self):
        return self.host.ctypes.data


@pytest.fixture
def machine(arrays, monkeypatch):
    """A FakeCuPy, with the parameters of its launches and the buffers that ops have made."""
    fake = FakeCuPy()
    fake.packed, fake.made = [], []
    size = attention_kernels.PARAMS.size
    fake.launched = lambda address: fake.packed.append(ctypes.string_at(address, size))
    fake.install(monkeypatch)
    monkeypatch.setattr(gpu, "_contexts", {})
    monkeypatch.setattr(in_flight, "_queues", {})
    for name, empty in (("_of_streams", {}), ("_slabs", {}), ("_kept", [])):
        monkeypatch.setattr(counters, name, empty)

    def buffer_callback(
        callback, results, *, input_output_aliases, command_buffer_compatible, vmap_method
    ):
        def run(*operands):
            read = [Lent(x) for x in operands]
            made = [Lent(np.zeros(x.shape, x.dtype)) for x in results]
            for operand, result in input_output_aliases.items():
                made[result] = read[operand]
            assert callback(SimpleNamespace(stream=STREAM), made, *read) is None
            fake.made, fake.may_be_captured = made, command_buffer_compatible
            return [arrays.array(x.host) for x in made]

        return run

    monkeypatch.setattr(jax_calls(), "buffer_callback", buffer_callback)
    gpu.device_limits.cache_clear()
    yield fake
    gpu.device_limits.cache_clear()
    assert fake.device == 0, "the current device was left changed"


@EVERY_CALL
@pytest.mark.parametrize("captured", [False, True], ids=["queued", "captured"])
def test_kernels_alone_are_queued_on_the_stream_of_xla(arrays, machine, make, captured):
    if captured:
        machine.capturing.add(STREAM)
    call = make()
    for first in (True, False):
        call.run(**call.arguments(arrays))
        calls = machine.take()
        assert {device for device, *_ in calls} == {DEVICE}
        names = [name for _, name, *_ in calls]
        assert ("loadKernel" in names) == first
        assert machine.may_be_captured
        queued = [call for call in calls if call[1] != "loadKernel"]
        clears = ["memsetAsync"] * (call.op == "paged_attention")
        assert [name for _, name, *_ in queued][: len(clears) + 1] == [*clears, "launchKernel"]
        assert {name for _, name, *_ in queued} == {*clears, "launchKernel"}
        assert {arguments[-1] for _, _, *arguments in queued} == {STREAM}
    assert not in_flight._queues


@pytest.mark.parametrize("name", ["paged_attention-long", "paged_attention"])
def test_scratch_and_counters_are_in_memory_of_xla(arrays, machine, name):
    call = CALLS[name]()
    call.run(**call.arguments(arrays))
    (workspace,) = (x for x in machine.made if x.host.dtype == np.uint8)
    fields = attention_kernels.PARAMS.pointers
    pointers = struct.unpack_from(f"@{len(fields)}P", machine.packed[0])
    at = dict(zip(fields, pointers, strict=True))
    (clear,) = (call for call in machine.take() if call[1] == "memsetAsync")
    _, _, cleared, value, num_bytes, _ = clear
    begin, end = workspace.address, workspace.address + workspace.host.nbytes
    assert value == 0 and cleared + num_bytes <= end
    assert pointers[-1] == cleared
    if name.endswith("long"):
        assert begin == at["tmp_out"] < at["exp_sums"] < at["max_logits"] < cleared
    else:
        assert cleared == begin


@pytest.mark.parametrize("name", ["paged_attention", "reshape_and_cache"])
def test_what_queues_nothing_stays_out_of_command_buffers(arrays, machine, name):
    # XLA refuses a capture in which nothing was queued.
    call = CALLS[name]()
    per_row = {"query", "block_tables", "seq_lens", "key", "value", "slot_mapping"}
    given = {name: x[:0] if name in per_row else x for name, x in call.given.items()}
    call._replace(given=given).run(**given)
    assert machine.take() == [] and not machine.may_be_captured


def test_a_capture_of_others_still_refuses_to_load(arrays, machine):
    call = attention()
    call.run(**call.arguments(arrays))
    machine.capturing.add(STREAM)
    kernel = compiler.Kernel("convert_fp8.cu", "never_used_before", 128)
    with pytest.raises(RuntimeError, match="first time inside a CUDA graph capture"):
        compiler.load(kernel, DEVICE, STREAM)


# ---- several devices ----

SHARDED = """
import jax, numpy
from jax.sharding import AxisType, PartitionSpec
from support.jax_ops_suite import attention

call = attention(seq_lens=(40, 17, 0, 5))
shared = {name: call.given.pop(name) for name in ("key_cache", "value_cache")}
mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,))
run = jax.shard_map(
    lambda rows: call.run(**rows, **shared),
    mesh=mesh, in_specs=PartitionSpec("rows"), out_specs=PartitionSpec("rows"),
)
out = jax.jit(run)(call.given)
assert len(out.devices()) == 2
numpy.testing.assert_array_equal(out, call.run(**call.given, **shared))
"""


def test_each_device_calls_with_its_own_part(arrays):
    flags = "--xla_force_host_platform_device_count=2"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
