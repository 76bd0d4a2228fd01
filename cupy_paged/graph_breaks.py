"""How torch.compile learns that the functions of the package run between its graphs.

They read addresses, streams and settings of the moment, which no graph can hold. Dynamo, the part
of torch that traces, looks for `_torchdynamo_disable` at a function before it goes inside, and
breaks the graph there. torch.compiler.disable sets that, too, but it needs torch, and its wrapper
takes time in every call, compiled or not.

A function between two graphs would still be compiled by itself, and so would those that it calls:
what is left alone altogether, Dynamo keeps by folders. The truth of the attribute is asked for by
Dynamo alone, while it traces, and before any of the functions runs: that is when it is told ours.

Where torch.compile is given a public function itself, Dynamo asks for nothing until that one calls
another. So those are marked, too, that the public ones call before they look into an array.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TypeVar

REASON = (
    "cupy_paged runs between the graphs of torch.compile; inside of one, and with fullgraph=True, "
    "it needs the ops of cupy_paged.interop.torch_ops, torch.ops.cupy_paged"
)

Marked = TypeVar("Marked")


class _Yes:
    def __bool__(self) -> bool:
        _skip_the_package()
        return True


@functools.cache
def _skip_the_package() -> None:
    # torch changes what is its own as it likes.
    with contextlib.suppress(ImportError, AttributeError, TypeError, AssertionError):
        from torch._dynamo import trace_rules

        trace_rules.add(__package__)


_YES = _Yes()


def breaks_graphs(marked: Marked) -> Marked:
    """Marks a function, or all that a class defines; what is called is the same as before."""
    members = vars(marked).values() if isinstance(marked, type) else [marked]
    for member in members:
        function = member.fget if isinstance(member, property) else member
        if callable(function) and hasattr(function, "__code__"):
            function._torchdynamo_disable = _YES
            function._torchdynamo_disable_msg = REASON
    return marked
