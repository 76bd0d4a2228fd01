"""Results that no gradient comes back from: to ask for one is an error, and not silently zero."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


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


def followed(sources: Iterable[Any]) -> list[torch.Tensor]:
    """The tensors that autograd follows at this moment; what is no tensor is passed over."""
    if not torch.is_grad_enabled():
        return []
    return [x for x in sources if isinstance(x, torch.Tensor) and x.requires_grad]


def without_gradient(name: str, made: torch.Tensor, sources: Iterable[Any]) -> torch.Tensor:
    """The tensor itself; where autograd follows a source, its backward is an error from then on.

    name       what has made it, as the error calls it
    sources    what it was made from, tensors and others
    """
    tensors = followed(sources)
    return _NoGradient.apply(name, [made], *tensors) if tensors else made
