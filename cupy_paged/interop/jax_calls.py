"""A call of an op in JAX, as a callback of XLA's: from arguments to buffers, and back to results.

An op sees `TracedCall` alone; `_callback` is what runs, with the buffers that XLA lends it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cupy_paged import gpu
from cupy_paged.arrays import HOST, Array, array, is_array, location, meta
from cupy_paged.compiler import loading_beside_captures
from cupy_paged.dtypes import itemsize

try:
    from jax.experimental.buffer_callback import buffer_callback
except ImportError as error:
    raise ImportError(
        f"JAX {jax.__version__} has no jax.experimental.buffer_callback, 0.6.1 or newer does: "
        'pip install --upgrade "jax[cuda12]" (or [cuda13]; without either on a CPU)'
    ) from error

_INT64 = ("slot_mapping", "block_mapping")
"""Arguments that are int64, which JAX has only where it was enabled."""


class TracedCall:
    """A call of an op, of which JAX traces what is made out of arrays.

    name        of the op, for errors
    function    what runs, with all arguments by name, on arrays that it may write
    arrays      arguments that are arrays, or lists of them
    either      arguments that may be arrays, or else are a part of the compiled code
    options     the others
    written     those of `arrays` that `function` writes
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        arrays: dict[str, Any],
        either: dict[str, Any],
        options: dict[str, Any],
        written: tuple[str, ...] = (),
    ) -> None:
        self.name, self.function = name, function
        self.options = {**options, **{n: x for n, x in either.items() if not is_array(x)}}
        found = {**arrays, **{n: x for n, x in either.items() if is_array(x)}}
        found = {n: _operands(x, n) for n, x in found.items()}
        self.written = {n: x for n, x in found.items() if n in written}
        self.read = {n: x for n, x in found.items() if n not in written}

    def check(
        self, function: Callable[..., Any], made: dict[str, jax.ShapeDtypeStruct] | None = None
    ) -> Any:
        """What `function` returns for arrays of these shapes and dtypes, without memory."""
        given = {**self.written, **self.read, **(made or {})}
        leaves, tree = jax.tree.flatten(given)
        metas, pointer = [], 0
        for x in leaves:
            metas.append(meta(x.dtype.name, tuple(x.shape), pointer))
            # A multiple of what any address is a multiple of, and past all of the array.
            pointer += -(-math.prod(x.shape) * x.dtype.itemsize // 256) * 256 + 256
        described = jax.tree.unflatten(tree, metas)
        for name in _INT64:
            if name in described and described[name].dtype == "int32":
                described[name] = described[name]._replace(dtype="int64")
        return function(**described, **self.options, stream=0)

    def run(self, made: dict[str, jax.ShapeDtypeStruct] | None = None) -> dict[str, Any]:
        """Runs the function, for which XLA makes arrays like `made`, too.

        Returns, by name, what it writes: these, and its arguments as they are afterwards.
        """
        read = {n: _halves(x) if n in _INT64 else x for n, x in self.read.items()}
        written_leaves, written_tree = jax.tree.flatten(self.written)
        read_leaves, read_tree = jax.tree.flatten(read)
        made_leaves, made_tree = jax.tree.flatten(made or {})
        like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in written_leaves]
        operands = (*written_leaves, *read_leaves)
        results = [*like, *made_leaves]
        bound = buffer_callback(
            _callback(
                self.function, written_tree, read_tree, made_tree, tuple(self.options.items())
            ),
            results,
            vmap_method="sequential",
            input_output_aliases={i: i for i in range(len(like))},
            # A capture that nothing was queued in is an error of XLA's.
            command_buffer_compatible=all(math.prod(x.shape) for x in (*operands, *results)),
        )
        found = _without_gradient(self.name, bound)(*operands)
        split = len(like)
        return {
            **jax.tree.unflatten(written_tree, found[:split]),
            **jax.tree.unflatten(made_tree, found[split:]),
        }


def _operands(x: Any, name: str) -> Any:
    if isinstance(x, list | tuple):
        return [_operands(one, f"{name}[{i}]") for i, one in enumerate(x)]
    if not isinstance(x, jax.Array | np.ndarray):
        raise TypeError(f"{name}: got {type(x).__name__}, needs an array of JAX or NumPy")
    return jnp.asarray(x)


def _halves(x: jax.Array) -> jax.Array:
    """int32 as the lower and the higher half of each int64."""
    return jnp.stack([x, x >> 31], axis=-1) if x.dtype == jnp.int32 else x


def _without_gradient(
    name: str, run: Callable[..., list[jax.Array]]
) -> Callable[..., list[jax.Array]]:
    differentiable = jax.custom_jvp(run)

    @differentiable.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            f"{name}: has no gradient; where none is needed, pass it jax.lax.stop_gradient(x)"
        )

    return differentiable


@functools.lru_cache(maxsize=1024)  # JAX finds what it compiled by the identity of the callback
def _callback(
    function: Callable[..., Any],
    written: Any,
    read: Any,
    made: Any,
    options: tuple[tuple[str, Any], ...],
) -> Callable[..., None]:
    """What XLA calls with its buffers: `function` with them as its arguments.

    written, read, made    the structure of each kind of arguments
    """

    def run(context: Any, results: list[Any], *operands: Any) -> None:
        on_host = location(operands[0])[1] is HOST
        stream = None if on_host else context.stream
        lent = [_on_host(x) if on_host else _on_device(x, stream) for x in (*results, *operands)]
        split, start = written.num_leaves, len(results)
        for target, source in zip(lent[:split], lent[start : start + split], strict=True):
            _take_over(target, source, stream)
        given = {
            **jax.tree.unflatten(written, lent[:split]),
            **jax.tree.unflatten(made, lent[split:start]),
            **jax.tree.unflatten(read, lent[start + split :]),
        }
        for name in _INT64:
            if name in given:
                given[name] = _joined(given[name])
        with loading_beside_captures():  # XLA's are of the thread-local mode
            function(**given, **dict(options), stream=stream)

    return run


def _on_host(buffer: Any) -> np.ndarray:
    return np.asarray(buffer)


def _on_device(buffer: Any, stream: int) -> Array:
    """A buffer that XLA lends for the work that is queued on its stream now.

    So nobody has to be waited for, nor to be kept.
    """
    return array(buffer, "buffer", stream)._replace(owner=None, framework="xla")


def _take_over(target: np.ndarray | Array, source: np.ndarray | Array, stream: int | None) -> None:
    """Gives a result what its argument holds, where they are not the one buffer that was asked for.

    XLA parts them where it lets a call read and write slices of larger arrays in place, as in the
    loop that jax.vmap makes.
    """
    if isinstance(target, np.ndarray):
        if target.ctypes.data != source.ctypes.data:
            target[...] = source
    elif target.pointer != source.pointer:
        size = math.prod(target.shape) * itemsize(target.dtype)
        whole = target.pointer, size, source.pointer, size, size, 1
        gpu.copy_rows(target.device, stream, *whole)


def _joined(halves: np.ndarray | Array) -> np.ndarray | Array:
    """The int64 that `_halves` took apart, where they lie."""
    if halves.dtype != "int32":
        return halves
    if isinstance(halves, np.ndarray):
        return halves.view(np.int64)[..., 0]
    shape = halves.shape[:-1]
    return halves._replace(
        dtype="int64", shape=shape, strides=tuple(stride // 2 for stride in halves.strides[:-1])
    )
