"""Results that no gradient comes back from: to ask for one is an error, and not silently zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, name: str, made: list[torch.Tensor], *sources: torch.Tensor
    ) -> torch.Tensor:
        ctx.made_by = name
        return made[0]  # which autograd sees for the first time, and so takes for no view

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> None:
        raise RuntimeError(
            f"backward: no gradient flows through {ctx.made_by}, which is for inference; needs "
            "torch.no_grad() around the call, and another attention to train"
        )


def followed(sources: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors that autograd follows at this moment; what is no tensor is passed over."""
    if not torch.is_grad_enabled():
        return []
    return [x for x in sources if isinstance(x, torch.Tensor) and x.requires_grad]


def has_tangents() -> bool:
    """Whether a tensor may have a tangent at this moment, as it may in torch's forward mode."""
    return getattr(forward_ad, "_current_level", 0) >= 0  # torch names it as it likes


def refuse_gradients(name: str, sources: Sequence[Any]) -> None:
    """Raises RuntimeError where autograd follows a source, backward or forward.

    For what has no result through which somebody would go back, to be told then.

    name       what they are given to, as the error calls it
    sources    tensors and others, which are passed over
    """
    refuse_tangents(name, sources)
    if followed(sources):
        raise RuntimeError(
            f"{name}: no gradient flows through it, and a tensor requires one: needs "
            "torch.no_grad() around the call, or detached tensors"
        )


def refuse_tangents(name: str, sources: Sequence[Any]) -> None:
    """Raises RuntimeError where a source has a tangent: nobody would come back for it."""
    if has_tangents() and any(_has_tangent(x) for x in sources if isinstance(x, torch.Tensor)):
        raise RuntimeError(
            f"forward mode: no tangent flows through {name}, which is for inference; needs "
            "detached tensors, and another attention to train"
        )


def _has_tangent(x: torch.Tensor) -> bool:
    try:
        return forward_ad.unpack_dual(x).tangent is not None
    except RuntimeError:  # torch.func.linearize asks where tangents cannot be seen
        return True


def without_gradient(name: str, made: torch.Tensor, sources: Sequence[Any]) -> torch.Tensor:
    """The tensor itself; where autograd follows a source, its backward is an error from then on.

    name       what has made it, as the error calls it
    sources    what it was made from, tensors and others

    Raises RuntimeError where a source has a tangent.
    """
    refuse_tangents(name, sources)
    tensors = followed(sources)
    return _NoGradient.apply(name, [made], *tensors) if tensors else made
