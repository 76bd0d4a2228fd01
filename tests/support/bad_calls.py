"""Good calls of every operator on host arrays, and the ways to spoil them.

A spoiled call is (operator, what is wrong, change, error, message): `change` maps the arguments of
a good call to those that it replaces, and the message begins with the argument at fault.
"""

from typing import Any, NamedTuple

import numpy as np

from support import ops
from support.data import Case, build
from support.frameworks import NumPy

NUMPY = NumPy()


class BadCall(NamedTuple):
    operator: str
    wrong: str
    change: Any
    error: type[Exception]
    message: str

    def __str__(self):
        return f"{self.operator}: {self.wrong}"


def halves(*shape, fill=1.0):
    return np.full(shape, fill, np.float16)


def strided(array):
    """`array` as every other element, in its last dimension, of a wider one."""
    return np.repeat(array, 2, axis=-1)[..., ::2]


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def off_by(num_bytes):
    """A function: its array, at an address so many bytes past a multiple of 64."""

    def move(array):
        buffer = np.zeros(array.nbytes + 128, np.uint8)
        start = -buffer.ctypes.data % 64 + num_bytes
        moved = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        moved[...] = array
        return moved

    return move


def byte_swapped(array):
    """`array` with its values in the byte order that is not this machine's."""
    return array.astype(array.dtype.newbyteorder())


def overlapping(array):
    return np.lib.stride_tricks.as_strided(
        array.copy(), array.shape, (0, *array.strides[1:]), writeable=True
    )


def attention_arguments():
    """A good call: 2 sequences, 4 heads over 2 KV heads, head_size 64, block_size 16, "HND"."""
    problem = build(Case(seq_lens=(40, 17)))
    given = ops.arguments(problem, NUMPY)
    return {**given, "alibi_slopes": np.ones(4, np.float32), "out": halves(2, 4, 64)}


def v1_arguments():
    return {**attention_arguments(), "num_kv_heads": 2, "block_size": 16, "max_seq_len": 40}


def v2_arguments():
    sums = {name: np.ones((2, 4, 3), np.float32) for name in ("exp_sums", "max_logits")}
    return {**v1_arguments(), **sums, "tmp_out": halves(2, 4, 3, 64)}


def merge_arguments():
    lse = {
        name: np.zeros((4, 6), np.float32) for name in ("prefix_lse", "suffix_lse", "output_lse")
    }
    outputs = ("prefix_output", "suffix_output", "output")
    return {**lse, **{name: halves(6, 4, 64) for name in outputs}}


def writer_arguments():
    return {
        "key": halves(5, 2, 64),
        "value": halves(5, 2, 64),
        "slot_mapping": np.arange(5),
        "kv_cache_dtype": "auto",
        "k_scale": 1.0,
        "v_scale": 1.0,
    }


def vllm_arguments():
    caches = {
        "key_cache": halves(3, 2, 8, 16, 8, fill=7),
        "value_cache": halves(3, 2, 64, 16, fill=7),
    }
    return {**writer_arguments(), **caches}


def flash_arguments():
    caches = {name: halves(3, 16, 2, 64, fill=7) for name in ("key_cache", "value_cache")}
    return {**writer_arguments(), **caches}


def convert_arguments():
    return {"output": np.full((3, 8), 7, np.uint8), "input": halves(3, 8)}


def copy_arguments():
    key_caches, value_caches = ([halves(6, 2, 16, 64, fill=7) for _ in range(2)] for _ in range(2))
    mapping = {"block_mapping": np.array([[0, 1], [2, 3]])}
    return {"key_caches": key_caches, "value_caches": value_caches, **mapping}


def swap_arguments():
    sides = {"source": halves(6, 2, 16, 64), "destination": halves(4, 2, 16, 64, fill=7)}
    return {**sides, "block_mapping": np.array([[0, 1], [5, 3]])}


def gather_arguments():
    return {
        **{name: halves(7, 2, 64, fill=7) for name in ("key", "value")},
        **{name: halves(3, 2, 16, 64) for name in ("key_cache", "value_cache")},
        "block_tables": np.array([[2, 0], [1, -1]], np.int32),
        "cu_seq_lens": np.array([0, 4, 7], np.int32),
        "seq_starts": np.array([14, 0], np.int32),
        "layout": "HND",
    }


def layout_arguments():
    return {
        **{name: halves(3, 2, 16, 64) for name in ("key_cache", "value_cache")},
        "layout": "HND",
        **{name: halves(3, 16, 2, 64, fill=7) for name in ("new_key_cache", "new_value_cache")},
        "new_layout": "NHD",
    }


def mla_arguments():
    return {
        "kv_c": halves(5, 32),
        "k_pe": halves(5, 8),
        "kv_cache": halves(3, 16, 40, fill=7),
        "slot_mapping": np.arange(5),
        "kv_cache_dtype": "auto",
        "scale": 1.0,
    }


GOOD = {
    "paged_attention": attention_arguments,
    "paged_attention_v1": v1_arguments,
    "paged_attention_v2": v2_arguments,
    "merge_attn_states": merge_arguments,
    "reshape_and_cache": vllm_arguments,
    "reshape_and_cache_flash": flash_arguments,
    "convert_fp8": convert_arguments,
    "copy_blocks": copy_arguments,
    "swap_blocks": swap_arguments,
    "gather_cache": gather_arguments,
    "convert_layout": layout_arguments,
    "concat_and_cache_mla": mla_arguments,
}


def table(operator, *rows):
    return [BadCall(operator, *row) for row in rows]


def caches(*shape, dtype=np.float16):
    """A change of both caches to this shape."""
    return lambda _: {name: np.ones(shape, dtype) for name in ("key_cache", "value_cache")}


def to(**new):
    """A change of arguments to these values."""
    return lambda _: new


def via(name, spoil):
    """A change of one argument by a function of it."""
    return lambda given: {name: spoil(given[name])}


def bad_numbers(name, positive=True):
    """(what is wrong, change, error, message) for an argument that must be a finite number."""
    yield f"{name} is NaN", to(**{name: np.nan}), ValueError, rf"^{name}: .*nan.*finite"
    yield f"{name} is infinite", to(**{name: np.inf}), ValueError, rf"^{name}: .*inf.*finite"
    yield f"{name} is 1e300", to(**{name: 1e300}), ValueError, rf"^{name}: .*1e\+300.*float32"
    yield f"{name} is text", to(**{name: "1.0"}), TypeError, rf"^{name}: .*'1.0'.*number"
    yield f"{name} is a bool", to(**{name: True}), TypeError, rf"^{name}: .*True.*number"
    if positive:
        yield f"{name} is 0", to(**{name: 0.0}), ValueError, rf"^{name}: .*0.0.*positive"
        yield f"{name} is negative", to(**{name: -0.5}), ValueError, rf"^{name}: .*-0.5.*positive"
        yield f"{name} is 1e-50", to(**{name: 1e-50}), ValueError, rf"^{name}: .*1e-50.*float32"


def bad_scales(name):
    """As `bad_numbers`, for a scale that may also be a one-element float32 array."""
    yield from bad_numbers(name)
    yield f"{name} is None", to(**{name: None}), TypeError, rf"^{name}: .*None"
    yield f"{name} is 1e-39", to(**{name: 1e-39}), ValueError, rf"^{name}: .*1e-39.*not subnormal"
    yield f"{name} is a list", to(**{name: [1.0]}), TypeError, rf"^{name}: .*list.*number"
    yield f"{name} is complex", to(**{name: 1j}), TypeError, rf"^{name}: .*complex.*number"
    for wrong, value, error, message in (
        ("has 2 elements", np.ones(2, np.float32), ValueError, r"\(2,\).*one element"),
        ("has no element", np.ones(0, np.float32), ValueError, r"\(0,\).*one element"),
        ("is float16", np.ones(1, np.float16), TypeError, "float16.*float32"),
        ("is float64", np.ones(1), TypeError, "float64 is not supported, needs float32$"),
        ("is an array of 0", np.zeros(1, np.float32), ValueError, "0.0.*positive"),
        ("is an array of -1", np.full(1, -1, np.float32), ValueError, "-1.0.*positive"),
        ("is an array of NaN", np.full(1, np.nan, np.float32), ValueError, "nan.*finite"),
        ("is an array of 1e-39", np.full(1, 1e-39, np.float32), ValueError, "e-39.*subnormal"),
    ):
        yield f"{name} {wrong}", to(**{name: value}), error, rf"^{name}: .*{message}"


def bad_ints(name, at_least=None, too_large=None, at_most=None):
    """(what is wrong, change, error, message) for an argument that must be an int.

    at_most    where the argument has a largest value of its own, which errors then name
    """
    both = None if at_most is None else f"{at_least} to {at_most}$"
    message = f"^{name}: got ndarray, needs an int$"
    yield f"{name} is an array", to(**{name: np.ones((2, 4, 64))}), TypeError, message
    for value in (1.5, "2", True):
        message = rf"^{name}: .*{value!r}.*int"
        yield f"{name} is {value!r}", to(**{name: value}), TypeError, message
    if at_least is not None:
        low = at_least - 1
        message = rf"^{name}: got {low}, needs {both or f'at least {at_least}$'}"
        yield f"{name} is {low}", to(**{name: low}), ValueError, message
    if too_large is not None:
        message = rf"^{name}: got {too_large}, needs {both or 'at most'}"
        yield f"{name} is {too_large}", to(**{name: too_large}), ValueError, message


def bad_memory(*names):
    """(what is wrong, change, error, message) for arrays whose bytes no kernel can read."""
    for name in names:
        message = rf"^{name}: address 0x\w+ .*multiple"
        yield f"{name} has an odd address", via(name, off_by(1)), ValueError, message
        message = rf"^{name}: dtype \w+ \(byte-swapped\)"
        yield f"{name} is byte-swapped", via(name, byte_swapped), TypeError, message


def not_arrays(*names):
    for name in names:
        for value in ([1.0, 2.0], None, 3):
            kind = type(value).__name__
            message = rf"^{name}: .*{kind}.*array"
            yield f"{name} is a {kind}", to(**{name: value}), TypeError, message
