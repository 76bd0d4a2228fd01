"""Several sequences as one batch over one block pool, which they share and grow into."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from .cache import BlockPool
from .model import Array, Llama, Rows

Sampler = Callable[[np.ndarray | Array], list[int]]


@dataclass
class Request:
    """One prompt and what was made of it."""

    prompt: list[int]
    max_tokens: int
    output: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    num_cached: int = 0
    """How many tokens have their key and value in the cache."""
    finish_reason: str | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.output)

    def token(self, position: int) -> int:
        past = position - len(self.prompt)
        return self.prompt[position] if past < 0 else self.output[past]


@dataclass
class Timing:
    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    generated_tokens: int = 0
    """Without the first of each sequence, which the prompt's last row gives."""
    generation_seconds: float = 0.0


class Batch:
    """Runs prompts to their end, all live sequences in every step."""

    def __init__(
        self,
        model: Llama,
        prompts: Sequence[list[int]],
        max_tokens: int,
        *,
        block_size: int = 16,
        layout: str = "HND",
        stop_tokens: frozenset[int] = frozenset(),
        sample: Sampler | None = None,
        max_rows: int = 512,
    ) -> None:
        for number, prompt in enumerate(prompts, 1):
            if not prompt:
                raise ValueError(f"prompt {number} is empty")
            if len(prompt) >= model.config.context_length:
                raise ValueError(
                    f"prompt {number} has {len(prompt)} tokens; the model's context holds "
                    f"{model.config.context_length}, the answer included"
                )
        self.model = model
        self.requests = [
            Request(prompt, min(max_tokens, model.config.context_length - len(prompt)))
            for prompt in prompts
        ]
        self.stop_tokens = stop_tokens
        self.sample = sample or greedy
        self.max_rows = max_rows
        self.timing = Timing()
        worst = [math.ceil((len(r.prompt) + r.max_tokens) / block_size) for r in self.requests]
        self.pool = BlockPool(sum(worst))
        self.cache = model.new_cache(self.pool.num_blocks, block_size, layout)
        self._block_tables = np.zeros((len(prompts), max(worst)), np.int32)

    def run(self) -> Iterator[list[int]]:
        """Steps until all are finished; yields the indices of those that moved on."""
        while live := [i for i, r in enumerate(self.requests) if r.finish_reason is None]:
            prompting = [i for i in live if not self.requests[i].output]
            yield self._step(prompting or live, bool(prompting))

    def _step(self, indices: list[int], prompting: bool) -> list[int]:
        started = time.perf_counter()
        rows, sampled = self._rows(indices)
        logits = self.model.step(rows, self.cache)
        tokens = self.sample(logits) if sampled else []
        for index, token in zip(sampled, tokens, strict=True):
            self._append(self.requests[index], token)
        seconds = time.perf_counter() - started
        if prompting:
            self.timing.prompt_tokens += len(rows.tokens)
            self.timing.prompt_seconds += seconds
        else:
            self.timing.generated_tokens += len(tokens)
            self.timing.generation_seconds += seconds
        return sampled

    def _rows(self, indices: list[int]) -> tuple[Rows, list[int]]:
        """The next rows of these requests, and the requests that reach their last token."""
        index_of: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        sampled: list[int] = []
        for index in indices:
            request = self.requests[index]
            end = min(request.num_tokens, request.num_cached + self.max_rows - len(positions))
            self._grow(index, end)
            index_of += [index] * (end - request.num_cached)
            positions += range(request.num_cached, end)
            request.num_cached = end
            if end == request.num_tokens:
                wanted.append(len(positions) - 1)
                sampled.append(index)
            if len(positions) == self.max_rows:
                break
        position = np.array(positions)
        tables = self._block_tables[index_of]
        block_size = self.cache.block_size
        blocks = tables[np.arange(len(position)), position // block_size].astype(np.int64)
        tokens = [self.requests[i].token(p) for i, p in zip(index_of, positions, strict=True)]
        xp = self.model.xp
        rows = Rows(
            tokens=xp.asarray(np.array(tokens, np.int64)),
            positions=xp.asarray(position),
            block_tables=xp.asarray(tables),
            seq_lens=xp.asarray((position + 1).astype(np.int32)),
            slot_mapping=xp.asarray(blocks * block_size + position % block_size),
            max_seq_len=max(positions) + 1,
            wanted=xp.asarray(np.array(wanted, np.int64)),
        )
        return rows, sampled

    def _grow(self, index: int, num_tokens: int) -> None:
        blocks = self.requests[index].blocks
        while len(blocks) * self.cache.block_size < num_tokens:
            block = self.pool.allocate()
            self._block_tables[index, len(blocks)] = block
            blocks.append(block)

    def _append(self, request: Request, token: int) -> None:
        if token in self.stop_tokens:
            request.finish_reason = "stop"
        else:
            request.output.append(token)
            if len(request.output) == request.max_tokens:
                request.finish_reason = "length"
        if request.finish_reason:
            self.pool.free(request.blocks)
            request.blocks = []


def greedy(logits: Array) -> list[int]:
    return logits.argmax(axis=-1).tolist()


def sampler(temperature: float, seed: int) -> Sampler:
    """Draws from softmax(logits / temperature); temperature 0 is greedy."""
    if temperature == 0:
        return greedy
    random = np.random.default_rng(seed)

    def draw(logits: Array) -> list[int]:
        host = logits if isinstance(logits, np.ndarray) else logits.get()
        # Gumbel's trick: the largest of logits plus this noise is a draw from their softmax.
        noise = random.gumbel(size=host.shape)
        return (host / temperature + noise).argmax(axis=-1).tolist()

    return draw
