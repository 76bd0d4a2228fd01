"""The functions of the package as ops of torch, which torch.compile takes without a graph break.

    import cupy_paged.interop.torch_ops  # registers torch.ops.cupy_paged.*

An op has the arguments of the function of its name, and its checks. What differs:

- An op runs on torch's current stream, and takes no `stream`.
- Scales of quantised caches and outputs are one-element float32 tensors, as in vLLM's ops. Where
  the function has a default, None stands for it, and the scale is given by name. (An op that took
  floats would take tensors, too, and wait for the device to read them.)
- An op returns one kind of thing. What a function allocates where it is given no output, the op of
  its name always does; `_out` writes into the caller's, and `return_lse` is an op of its own:

      paged_attention(query, ...) -> out
      paged_attention_with_lse(query, ...) -> (out, lse)
      paged_attention_out(out, query, ...)
      merge_attn_states(prefix_output, prefix_lse, suffix_output, ...) -> (output, output_lse)
      merge_attn_states_out(output, prefix_output, ...)

paged_attention_v1, paged_attention_v2, reshape_and_cache, reshape_and_cache_flash,
concat_and_cache_mla, copy_blocks and gather_cache return nothing, and write what their functions
write.

No gradient flows through an op. Where a tensor requires one, outside of torch.no_grad(), to go back
through what an eager call returns is a RuntimeError. What a compiled one returns requires none, and
torch.compile then warns. An op that writes into tensors of the caller's is itself a RuntimeError
then, as torch's own ops with `out=` are, eager and compiled: an output would keep the gradient of
what was in it before. In forward mode, and in torch.func.grad, vjp, jvp and their kin, every op of
a tensor that they follow is one. torch.func.vmap calls an op that returns once for each example,
with a warning, and refuses those that write.

Autograd counts writes, as with torch's own ops: to go back through what was saved before is a
RuntimeError.

While torch traces, an op only says what it returns. A wrong argument raises what the function
raises, when the compiled code runs; one of a type that the op does not take is a RuntimeError.

Inductor, the default backend of torch.compile, writes in place where no two arguments of a graph
share a torch storage: each cache has its own, as in a PagedKVCache, or a layer's keys and values
are in one tensor, whose views are taken inside. Slices of a larger pool give the same results, as
do other backends, but all of the pool may be copied in every call. (torch.from_dlpack makes of a
slice a tensor with a storage of its own, in the same memory.) With mode="reduce-overhead", torch
copies inputs that are no parameters or buffers of a module, and were not marked by
`torch._dynamo.mark_static_address`.

An eager call passes through torch's dispatcher, which keeps the host busy for some microseconds
more than the function does. What is not compiled had better call the function.
"""

from __future__ import annotations

import functools
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

try:
    import torch
except ImportError as error:
    raise ImportError(
        f'cupy_paged.interop.torch_ops needs torch ({error}): pip install "cupy-paged[interop]"'
    ) from error

import cupy_paged
from cupy_paged.interop.no_gradient import (
    followed,
    has_tangents,
    refuse_gradients,
    without_gradient,
)

NAMESPACE = "cupy_paged"

_SPARSE = (
    "int tp_rank=0, int blocksparse_local_blocks=0, int blocksparse_vert_stride=0, "
    "int blocksparse_block_size=64, int blocksparse_head_sliding_step=0"
)
# Sizes may be symbols: a compiled graph serves those of other batches, too.
_ATTENTION = (
    "Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables, Tensor seq_lens, *, "
    'float? scale=None, str? layout=None, str kv_cache_dtype="auto", Tensor? k_scale=None, '
    f"Tensor? v_scale=None, Tensor? alibi_slopes=None, SymInt? max_seq_len=None, {_SPARSE}"
)
_VLLM_ATTENTION = (
    "Tensor query, Tensor key_cache, Tensor value_cache, SymInt num_kv_heads, float scale, "
    "Tensor block_tables, Tensor seq_lens, SymInt block_size, SymInt max_seq_len, "
    f"Tensor? alibi_slopes, str kv_cache_dtype, Tensor k_scale, Tensor v_scale, {_SPARSE}, *"
)
_WRITE = (
    "Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slot_mapping, "
    "str kv_cache_dtype, Tensor k_scale, Tensor v_scale"
)
_STATES = "Tensor prefix_output, Tensor prefix_lse, Tensor suffix_output, Tensor suffix_lse"


def _paged_attention_out(out: torch.Tensor, *inputs: Any, **options: Any) -> None:
    cupy_paged.paged_attention(*inputs, out=out, **options)


def _fake_attention(query: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return query.new_empty(query.shape)


def _fake_attention_with_lse(
    query: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=torch.float32)


def _fake_merge(
    prefix_output: torch.Tensor,
    prefix_lse: torch.Tensor,
    *_: Any,
    output_scale: torch.Tensor | None = None,
    **__: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = prefix_output.dtype if output_scale is None else torch.float8_e4m3fn
    return (
        prefix_output.new_empty(prefix_output.shape, dtype=dtype),
        prefix_lse.new_empty(prefix_lse.shape),
    )


# What ops return while torch traces; the others return nothing.
_FAKES: dict[str, Callable[..., Any]] = {
    "paged_attention": _fake_attention,
    "paged_attention_with_lse": _fake_attention_with_lse,
    "merge_attn_states": _fake_merge,
}


# What runs, and its schema after the name. A "!" marks what is written.
_OPS: dict[str, tuple[Callable[..., Any], str]] = {
    "paged_attention": (cupy_paged.paged_attention, f"({_ATTENTION}) -> Tensor"),
    "paged_attention_with_lse": (
        functools.partial(cupy_paged.paged_attention, return_lse=True),
        f"({_ATTENTION}) -> (Tensor out, Tensor lse)",
    ),
    "paged_attention_out": (_paged_attention_out, f"(Tensor(a!) out, {_ATTENTION}) -> ()"),
    "paged_attention_v1": (
        cupy_paged.paged_attention_v1,
        f"(Tensor(a!) out, {_VLLM_ATTENTION}, str? layout=None) -> ()",
    ),
    "paged_attention_v2": (
        cupy_paged.paged_attention_v2,
        "(Tensor(a!) out, Tensor(b!) exp_sums, Tensor(c!) max_logits, Tensor(d!) tmp_out, "
        f"{_VLLM_ATTENTION}, int? partition_size=None, str? layout=None) -> ()",
    ),
    "merge_attn_states": (
        functools.partial(cupy_paged.merge_attn_states, None),
        f"({_STATES}, *, SymInt? prefill_tokens_with_context=None, Tensor? output_scale=None) "
        "-> (Tensor output, Tensor output_lse)",
    ),
    "merge_attn_states_out": (
        cupy_paged.merge_attn_states,
        f"(Tensor(a!) output, {_STATES}, Tensor(b!)? output_lse=None, "
        "SymInt? prefill_tokens_with_context=None, *, Tensor? output_scale=None) -> ()",
    ),
    "reshape_and_cache": (cupy_paged.reshape_and_cache, f"({_WRITE}) -> ()"),
    "reshape_and_cache_flash": (
        cupy_paged.reshape_and_cache_flash,
        f'({_WRITE}, *, str layout="NHD") -> ()',
    ),
    "concat_and_cache_mla": (
        cupy_paged.concat_and_cache_mla,
        "(Tensor kv_c, Tensor k_pe, Tensor(a!) kv_cache, Tensor slot_mapping, str kv_cache_dtype, "
        "Tensor scale) -> ()",
    ),
    "copy_blocks": (
        cupy_paged.copy_blocks,
        "(Tensor(a!)[] key_caches, Tensor(b!)[] value_caches, Tensor block_mapping, *, "
        "str? layout=None) -> ()",
    ),
    "gather_cache": (
        cupy_paged.gather_cache,
        "(Tensor(a!) key, Tensor(b!) value, Tensor key_cache, Tensor value_cache, "
        "Tensor block_tables, Tensor cu_seq_lens, Tensor? seq_starts=None, "
        'str kv_cache_dtype="auto", *, str layout, Tensor? k_scale=None, Tensor? v_scale=None) '
        "-> ()",
    ),
}


def _sources(args: tuple[Any, ...], options: dict[str, Any]) -> list[Any]:
    """The arguments of an op, those in lists one by one."""
    given = [*args, *options.values()]
    for group in [x for x in args if isinstance(x, list)]:
        given += group
    return given


def _writing(name: str, function: Callable[..., Any], schema: str) -> Callable[..., Any]:
    """The function, which takes nothing that a gradient is asked of, as torch's own `out=` does.

    It then tells autograd what it has written.
    """
    written = [i for i, argument in enumerate(schema.split(",")) if "!" in argument]
    increment_version = torch.autograd.graph.increment_version

    def run(*args: Any, **options: Any) -> None:
        if torch.is_grad_enabled() or has_tangents():
            refuse_gradients(name, _sources(args, options))
        function(*args, **options)
        for i in written:
            given = args[i] if i < len(args) else None
            for tensor in given if isinstance(given, list) else (given,):
                if tensor is not None:
                    increment_version(tensor)

    return run


def _returning(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, through whose results nobody differentiates without being told."""

    def run(*args: Any, **options: Any) -> Any:
        made = function(*args, **options)
        if not (torch.is_grad_enabled() or has_tangents()):
            return made
        sources = (*args, *options.values())
        if isinstance(made, tuple):
            return tuple(without_gradient(name, x, sources) for x in made)
        return without_gradient(name, made, sources)

    return run


def _fake_writing(name: str) -> Callable[..., Any]:
    """What a writing op does while torch traces: compiled code would not refuse any more."""

    def run(*args: Any, **options: Any) -> None:
        refuse_gradients(name, _sources(args, options))

    return run


# What stands between a line that calls compiled code and an op that torch traces.
_ON_THE_WAY = {"torch", "cupy_paged", "contextlib", None}


def _callers_level() -> int:
    """The `stacklevel` of a warning in the function that asks, to name the line that called torch.

    How deep that is depends on the backend, and on torch's version.
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and _package_of(frame) in _ON_THE_WAY:
        frame, level = frame.f_back, level + 1
    return level


def _package_of(frame: types.FrameType) -> str | None:
    name = frame.f_globals.get("__name__")  # code that torch generates has none
    return name and name.partition(".")[0]


def _fake_returning(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """The fake, which warns where compiled code would be silent: nothing of it is there then."""

    def run(*args: Any, **options: Any) -> Any:
        if followed((*args, *options.values())):
            warnings.warn(
                f"no gradient flows through {name}, and a tensor requires one: needs "
                "torch.no_grad() around the compiled call",
                stacklevel=_callers_level(),
            )
        return fake(*args, **options)

    return run


def _below_autograd(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
    """What autograd runs for an op, in each transform of torch.func around it."""

    def run(*args: Any, **options: Any) -> Any:
        refuse_gradients(name, _sources(args, options))
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args, **options)

    return run


def _register() -> torch.library.Library:
    # torch.library.custom_op would say the same, with 8 us more of Python in every call.
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    # What compiled code makes for an op is laid out as in eager code; older versions of torch can
    # be asked for the order of the dimensions alone.
    strides = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)
    for name, (function, schema) in _OPS.items():
        called = f"torch.ops.{NAMESPACE}.{name}"
        if name in _FAKES:
            run, fake = _returning(called, function), _fake_returning(called, _FAKES[name])
        else:
            run, fake = _writing(called, function, schema), _fake_writing(called)
        transformed = f"_{name}"
        for defined in (name, transformed):
            library.define(defined + schema, tags=(torch.Tag.pt2_compliant_tag, strides))
            # For all devices: which ones it serves is for the function to say.
            library.impl(defined, run, "CompositeExplicitAutograd")
            torch.library.register_fake(f"{NAMESPACE}::{defined}", fake, lib=library)
        # A kernel of Python would take microseconds more in every call; torch's own guess is a
        # gradient that nobody computes.
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        # A transform of torch.func wraps tensors, and the function is given what is inside. Under a
        # key that calls have in transforms alone, and others need not pay for, they become calls of
        # an op beside this one, whose kernel for autograd sees them wrapped.
        inside = getattr(getattr(torch.ops, NAMESPACE), transformed).default
        library.impl(name, inside, "FuncTorchDynamicLayerFrontMode")
        library.impl(transformed, _below_autograd(called, inside), "Autograd")
    return library


_library = _register()  # ops live as long as it does
