"""A call like an earlier one is not checked again, and is queued as if it were.

CuPy and torch are stand-ins here, and arrays of theirs are host memory that says it is on a device.
"""

import ctypes
import struct
import sys
import threading
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
from test_errors import BAD_CALLS

import cupy_paged
from cupy_paged import attention, cache_ops, compiler, counters, gpu, in_flight, merge, prepared
from cupy_paged.attention_kernels import PARAMS
from support import bad_calls, fake_cupy, ops
from support.bad_calls import NUMPY, attention_arguments, off_by, v1_arguments
from support.data import Case, build
from support.fake_cupy import FakeCuPy, FakeTorch

GOOD = {"paged_attention": attention_arguments, "paged_attention_v1": v1_arguments}
FRAMEWORKS = {"cupy": fake_cupy.ndarray, "torch": fake_cupy.Tensor}


class Machine:
    """A fake CuPy and torch, and what was launched on them."""

    def __init__(self):
        self.cupy = FakeCuPy()
        self.cupy.launched = self._launched
        self.torch = FakeTorch(self.cupy)
        self.checked, self.packed = 0, []

    def _launched(self, address):
        self.packed.append(ctypes.string_at(address, PARAMS.size))

    def run(self, operator, kind, given, device=0):
        """What a call comes to: its error, or its calls of CUDA, parameters and results."""
        self.cupy.take()
        self.packed.clear()
        given = {
            name: kind(x, device) if isinstance(x, np.ndarray) else x for name, x in given.items()
        }
        try:
            result = getattr(cupy_paged, operator)(**given)
        except Exception as error:
            return type(error), str(error)
        # Without what is done once, and addresses that are never the same.
        calls = [
            call[:2] + call[3:] if call[1] in ("alloc", "torch.empty") else call
            for call in self.cupy.take()
            if call[1] != "RawModule" and call[-1] != fake_cupy.NEW_STREAM
        ]
        return calls, [unpacked(packed) for packed in self.packed], described(result)


def unpacked(packed):
    """The fields of AttentionParams by name; "new" for addresses of memory that the op obtained."""
    codes = {"pointer": "P", "int64": "q", "int": "i", "float": "f"}
    layout = "@" + "".join(codes[kind] for kind in PARAMS.fields.values()) + "0q"
    fields = dict(zip(PARAMS.fields, struct.unpack(layout, packed), strict=True))
    for name in "exp_sums", "max_logits":
        fields[name] -= fields["tmp_out"]
    for name in "out", "lse", "tmp_out", "work":
        if fields[name] and fields[name] % fake_cupy.APART == 0:
            fields[name] = "new"
    return fields


def described(result):
    """What kind of arrays an op returned."""
    if isinstance(result, tuple):
        return tuple(map(described, result))
    return result and (type(result), result.shape, result.dtype)


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    modules = {"torch": machine.torch, "cupy": SimpleNamespace(ndarray=fake_cupy.ndarray)}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(gpu, "cupy", lambda: machine.cupy)
    monkeypatch.setattr(in_flight, "_queues", {})
    monkeypatch.setattr(prepared, "_calls", {})
    monkeypatch.setattr(compiler, "_loaded", {})
    for name in "_of_streams", "_slabs":
        monkeypatch.setattr(counters, name, {})
    monkeypatch.setattr(counters, "_kept", [])
    check = attention.check_call

    def counting(*arguments):
        machine.checked += 1
        return check(*arguments)

    monkeypatch.setattr(attention, "check_call", counting)
    caches = [prepared._describer, gpu.device_limits, gpu.external_stream]
    for cache in caches:
        cache.cache_clear()
    yield machine
    for cache in caches:
        cache.cache_clear()
    assert machine.cupy.device == 0, "the current device was left changed"


def forget():
    prepared._calls.clear()


def moved(given):
    """The same arrays at other addresses."""
    return {n: NUMPY.array(x) if isinstance(x, np.ndarray) else x for n, x in given.items()}


def wide(**changes):
    """A good call whose sequences may have several partitions."""
    problem = build(Case(seq_lens=(40, 17)))
    given = {**ops.arguments(problem, NUMPY), "block_tables": np.zeros((2, 100), np.int32)}
    return {**given, "max_seq_len": None, **changes}


CALLS = {
    "out=": ("paged_attention", attention_arguments),
    "a new out": ("paged_attention", lambda: {**attention_arguments(), "out": None}),
    "scratch": ("paged_attention", wide),
    "lse": ("paged_attention", lambda: wide(return_lse=True)),
    "v1": ("paged_attention_v1", v1_arguments),
    "arrays of scales": (
        "paged_attention",
        lambda: wide(
            key_cache=np.ones((9, 2, 16, 64), np.uint8),
            value_cache=np.ones((9, 2, 16, 64), np.uint8),
            kv_cache_dtype="fp8",
            k_scale=np.ones(1, np.float32),
            v_scale=np.ones(1, np.float32),
        ),
    ),
    "scales that nobody reads": (
        "paged_attention",
        lambda: wide(k_scale=np.ones(1, np.float32), v_scale=np.ones(1, np.float32)),
    ),
    "block-sparse": ("paged_attention", lambda: wide(blocksparse_vert_stride=4)),
    "float32": (
        "paged_attention",
        lambda: wide(**{n: np.ones(s, np.float32) for n, s in (
            ("query", (2, 4, 64)), ("key_cache", (3, 2, 16, 64)), ("value_cache", (3, 2, 16, 64))
        )}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FRAMEWORKS.values(), ids=FRAMEWORKS)
@pytest.mark.parametrize("name", CALLS)
def test_a_repeated_call_is_queued_as_if_it_were_checked(machine, kind, name):
    operator, arguments = CALLS[name]
    first = arguments()
    machine.run(operator, kind, first)
    assert (machine.checked, len(prepared._calls)) == (1, 1)
    given = moved(first)
    again = machine.run(operator, kind, given)
    assert (machine.checked, len(prepared._calls)) == (1, 1)
    calls, params, _ = again
    assert params and {call[1] for call in calls} >= {"launchKernel"}
    forget()
    assert machine.run(operator, kind, given) == again
    assert machine.checked == 2


@pytest.mark.parametrize("kind", FRAMEWORKS.values(), ids=FRAMEWORKS)
@pytest.mark.parametrize(
    ("operator", "first", "params"),
    [
        ("merge_attn_states", "output", merge.PARAMS),
        ("reshape_and_cache", "key", cache_ops.WRITE_PARAMS),
        ("reshape_and_cache_flash", "key", cache_ops.WRITE_PARAMS),
        ("convert_fp8", "output", cache_ops.CONVERT_PARAMS),
    ],
)
def test_other_operators_launch_with_their_structs(machine, kind, operator, first, params):
    arguments = bad_calls.GOOD[operator]()
    seen = []
    machine.cupy.launched = lambda address: seen.append(ctypes.string_at(address, params.size))
    machine.run(operator, kind, arguments)
    (packed,) = seen
    assert struct.unpack_from("@P", packed) == (arguments[first].ctypes.data,)


def torch_has(bad):
    """Whether torch has arrays like those of a bad call: none of it is byte-swapped."""
    good = GOOD[bad.operator]()
    changed = {**good, **bad.change(good)}.values()
    return all(x.dtype.isnative for x in changed if isinstance(x, np.ndarray))


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        pytest.param(kind, bad, id=f"{name}-{bad}")
        for name, kind in FRAMEWORKS.items()
        for bad in BAD_CALLS
        if bad.operator in GOOD and (kind is not fake_cupy.Tensor or torch_has(bad))
    ],
)
def test_a_call_that_changed_is_checked_again(machine, kind, bad):
    good = GOOD[bad.operator]()
    assert machine.run(bad.operator, kind, good)[1]
    changed = {**good, **bad.change(good)}
    machine.run(bad.operator, kind, good)
    warm = machine.run(bad.operator, kind, changed)
    forget()
    assert machine.run(bad.operator, kind, changed) == warm


GOOD_CHANGES = {
    "query": lambda g: {"query": np.repeat(g["query"], 2, axis=0)[::2]},
    "query's address": lambda g: {"query": off_by(2)(g["query"])},
    "key_cache's address": lambda g: {"key_cache": off_by(8)(g["key_cache"])},
    "value_cache's strides": lambda g: {"value_cache": np.repeat(g["value_cache"], 2, 0)[::2]},
    "layout": lambda g: {"layout": None},
    "block_tables": lambda g: {"block_tables": np.zeros((2, 99), np.int32)},
    "rows of block_tables": lambda g: {"block_tables": np.zeros((2, 99), np.int32)[:, :60]},
    "scale": lambda g: {"scale": 0.25},
    "an int for a float": lambda g: {"scale": 1},
    "max_seq_len": lambda g: {"max_seq_len": 33},
    "no alibi_slopes": lambda g: {"alibi_slopes": None},
    "an array for a scale": lambda g: {"k_scale": np.ones(1, np.float32)},
    "arrays for both scales": lambda g: dict.fromkeys(
        ("k_scale", "v_scale"), np.ones(1, np.float32)
    ),
    "dtype": lambda g: {
        name: np.ones(g[name].shape, np.float32)
        for name in ("query", "key_cache", "value_cache", "out")
    },
    "out's strides": lambda g: {"out": np.zeros((2, 8, 64), np.float16)[:, ::2]},
    "no out": lambda g: {"out": None},
    "lse": lambda g: {"return_lse": True},
    "stream": lambda g: {"stream": 77},
    "another sparse pattern": lambda g: {"blocksparse_vert_stride": 8, "tp_rank": 1},
}


@pytest.mark.parametrize("kind", FRAMEWORKS.values(), ids=FRAMEWORKS)
@pytest.mark.parametrize("what", GOOD_CHANGES)
def test_a_good_change_is_seen(machine, kind, what):
    good = attention_arguments()
    machine.run("paged_attention", kind, good)
    changed = {**good, **GOOD_CHANGES[what](good)}
    first = machine.run("paged_attention", kind, changed)
    again = machine.run("paged_attention", kind, changed)
    forget()
    assert machine.run("paged_attention", kind, changed) == first == again
    assert first[1]


@pytest.mark.parametrize("kind", FRAMEWORKS.values(), ids=FRAMEWORKS)
def test_devices_and_streams_are_told_apart(machine, kind):
    streams = {fake_cupy.ndarray: machine.cupy, fake_cupy.Tensor: machine.torch}[kind]
    for _ in range(2):
        for device in 0, 1:
            for stream in 300, 301, 0, 2:
                streams.current_streams[device] = stream
                calls, *_ = machine.run("paged_attention", kind, wide(), device)
                *_, launch = calls
                assert (launch[0], launch[1], launch[-1]) == (device, "launchKernel", stream)
                allocated = [call[-1] for call in calls if call[1] in ("alloc", "torch.empty")]
                assert allocated == [stream, stream]
    assert machine.checked == 2


@pytest.mark.parametrize("kind", FRAMEWORKS.values(), ids=FRAMEWORKS)
@pytest.mark.parametrize("name", [n for n, x in v1_arguments().items() if hasattr(x, "shape")])
def test_an_array_on_another_device_is_refused(machine, kind, name):
    good = v1_arguments()
    machine.run("paged_attention_v1", kind, good)
    changed = {**good, name: kind(good[name], device=1)}
    error, message = machine.run("paged_attention_v1", kind, changed)
    assert error is ValueError and "is on cuda:1" in message


@pytest.mark.parametrize("kind", FRAMEWORKS.values(), ids=FRAMEWORKS)
def test_another_stream_than_the_current_one(machine, kind):
    machine.run("paged_attention", kind, wide())
    calls, *_ = machine.run("paged_attention", kind, wide(stream=77))
    assert [call[-1] for call in calls] == [77, 77, 77]
    assert machine.checked == 1


@pytest.mark.parametrize("kind", FRAMEWORKS.values(), ids=FRAMEWORKS)
def test_a_capture_is_checked_and_gets_memory_of_its_own(machine, kind):
    given = wide(out=np.zeros((2, 4, 64), np.float16))
    eager, captured = ["alloc" if kind is fake_cupy.ndarray else "torch.empty"], ["mallocAsync"]
    for run, capturing in enumerate((False, True, False)):
        machine.cupy.capturing = {100, 200} if capturing else set()
        calls, *_ = machine.run("paged_attention", kind, given)
        expected = (
            [*captured, "launchKernel", "freeAsync"] if capturing else [*eager, "launchKernel"]
        )
        assert [call[1] for call in calls] == expected
        assert machine.checked == 1 + (run > 0)


def test_arrays_of_two_frameworks_are_checked_each_time(machine):
    given = wide(seq_lens=fake_cupy.Tensor(np.ones(2, np.int32)))
    for run in 1, 2:
        calls, *_ = machine.run("paged_attention", fake_cupy.ndarray, given)
        assert [call[1] for call in calls].count("streamWaitEvent") == 2
        assert machine.checked == run
    assert not prepared._calls


def test_a_subclass_is_checked_each_time(machine):
    class Tagged(fake_cupy.Tensor):
        pass

    for run in 1, 2:
        assert machine.run("paged_attention", Tagged, wide())[1]
        assert machine.checked == run


def test_the_emulated_chip_is_seen(machine, monkeypatch):
    kernels = []
    for sm in "", "75", "", "75":
        monkeypatch.setenv("CUPY_PAGED_EMULATE_SM", sm)
        calls, *_ = machine.run("paged_attention", fake_cupy.ndarray, wide())
        kernels.append([call[2] for call in calls if call[1] == "launchKernel"])
    assert kernels[0] == kernels[2] != kernels[1] == kernels[3]
    assert machine.checked == 2


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ({"scale": 1.0}, {"scale": True}),
        ({"k_scale": 1.0}, {"k_scale": True}),
        ({"max_seq_len": 40}, {"max_seq_len": 40.0}),
        ({"blocksparse_vert_stride": 0}, {"blocksparse_vert_stride": False}),
    ],
    ids=str,
)
def test_equal_values_of_another_type_are_checked(machine, good, bad):
    machine.run("paged_attention", fake_cupy.ndarray, wide(**good))
    error, _ = machine.run("paged_attention", fake_cupy.ndarray, wide(**bad))
    assert error is TypeError


def test_scales_go_to_the_kernel_for_fp8_alone(machine):
    for name, expected in ("arrays of scales", True), ("scales that nobody reads", False):
        operator, arguments = CALLS[name]
        for _ in range(2):
            _, (fields,), _ = machine.run(operator, fake_cupy.ndarray, arguments())
            assert bool(fields["k_scale_array"]) == bool(fields["v_scale_array"]) == expected
            assert fields["k_scale"] == fields["v_scale"] == 1


def test_an_argument_that_cannot_be_hashed_is_checked(machine):
    given = wide(layout=["HND"])
    error, message = machine.run("paged_attention", fake_cupy.ndarray, given)
    assert (error, message[:7]) == (ValueError, "layout:")


def test_what_is_kept_has_an_end(machine, monkeypatch):
    monkeypatch.setattr(prepared, "MOST", 10)
    for max_seq_len in range(100, 125):
        machine.run("paged_attention", fake_cupy.ndarray, wide(max_seq_len=max_seq_len))
        assert len(prepared._calls) <= 10


def test_kept_arrays_are_released(machine):
    class Done:
        done = True

    machine.run("paged_attention", fake_cupy.ndarray, wide())
    in_flight._queues[0, 5] = deque([(Done(), [])])
    machine.run("paged_attention", fake_cupy.ndarray, wide())
    assert machine.checked == 1 and not in_flight._queues


def test_a_thread_without_a_context_gets_one(machine):
    machine.run("paged_attention", fake_cupy.ndarray, wide())
    machine.cupy.has_context = False
    calls, *_ = machine.run("paged_attention", fake_cupy.ndarray, wide())
    assert calls[-1][1] == "launchKernel" and machine.cupy.has_context


def test_threads_never_share_a_struct(machine):
    """Each launch reads the addresses of its own call, however threads interleave."""
    seen, failures, local = [], [], threading.local()

    def launched(address):
        packed = ctypes.string_at(address, PARAMS.size)
        assert unpacked(packed)["out"] == local.out
        seen.append(local.out)

    machine.cupy.launched = launched
    machine.cupy.log = lambda *_: None
    switch = sys.getswitchinterval()

    def work():
        try:
            given = {
                name: fake_cupy.ndarray(x) if isinstance(x, np.ndarray) else x
                for name, x in attention_arguments().items()
            }
            local.out = given["out"].data.ptr
            for _ in range(300):
                cupy_paged.paged_attention(**given)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    assert not failures and len(seen) == 8 * 300
