"""What a system hands over to be measured: calls, and a look at what they wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


class Unsupported(Exception):
    """A system does not do what a case asks for. The message says what."""


class Like(NamedTuple):
    """How our op is to be called for the same result, over the same memory."""

    arrangement: str  # see benchmarks.data.reading
    tables: np.ndarray  # [num_sets, batch, max_num_blocks_per_seq]
    scale: float


@dataclass(frozen=True)
class Prepared:
    """
    arrays    the framework that replays the calls
    calls     one for each data set
    output    what the last of them wrote, float32 [batch, num_heads, head_size]: the last, because
              only a replay, and no warm-up, has run it
    """

    arrays: Any
    calls: Sequence[Callable[[], Any]]
    output: Callable[[], np.ndarray]
    like: Like | None = None
