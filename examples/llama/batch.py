"""Several sequences as one batch over one block pool, which they share and grow into."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from cupy_paged import sequences

from .model import Array, Llama

Sampler = Callable[[np.ndarray | Array], list[int]]


@dataclass
class Request:
    """One prompt and what was made of it."""

    prompt: list[int]
    max_tokens: int
    sequence: sequences.Sequence
    """The prompt and all of the output but a last token that is not fed back."""
    output: list[int] = field(default_factory=list)
    finish_reason: str | None = None


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
        self.stop_tokens = stop_tokens
        self.sample = sample or greedy
        self.max_rows = max_rows
        self.timing = Timing()
        limits = [min(max_tokens, model.config.context_length - len(p)) for p in prompts]
        num_blocks = sum(
            -(-(len(prompt) + limit) // block_size)
            for prompt, limit in zip(prompts, limits, strict=True)
        )
        self.cache = model.new_cache(num_blocks, block_size, layout)
        self.peak_blocks = 0
        self.requests = [
            Request(prompt, limit, self.cache.add(prompt))
            for prompt, limit in zip(prompts, limits, strict=True)
        ]

    def run(self) -> Iterator[list[int]]:
        """Steps until all are finished; yields the indices of those that moved on."""
        while live := [i for i, r in enumerate(self.requests) if r.finish_reason is None]:
            prompting = [i for i in live if not self.requests[i].output]
            yield self._step(prompting or live, bool(prompting))

    def _step(self, indices: list[int], prompting: bool) -> list[int]:
        started = time.perf_counter()
        # A row for each token serves both: in generation, each sequence has one token to compute.
        batch = self.cache.batch(
            [self.requests[i].sequence for i in indices], each_token=True, max_tokens=self.max_rows
        )
        self.peak_blocks = max(self.peak_blocks, self.cache.num_used)
        logits = self.model.step(batch, self.cache, batch.last_tokens[batch.completed])
        sampled = [indices[i] for i in batch.completed]
        tokens = self.sample(logits) if sampled else []
        for index, token in zip(sampled, tokens, strict=True):
            self._append(self.requests[index], token)
        seconds = time.perf_counter() - started
        if prompting:
            self.timing.prompt_tokens += len(batch.token_ids)
            self.timing.prompt_seconds += seconds
        else:
            self.timing.generated_tokens += len(tokens)
            self.timing.generation_seconds += seconds
        return sampled

    def _append(self, request: Request, token: int) -> None:
        if token in self.stop_tokens:
            request.finish_reason = "stop"
        else:
            request.output.append(token)
            if len(request.output) == request.max_tokens:
                request.finish_reason = "length"
        if request.finish_reason:
            self.cache.free(request.sequence)
        else:
            self.cache.append(request.sequence, [token])


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
