"""The code of examples/, and the tokens that its default model must make."""

import json
import sys
from functools import cache
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from llama.batch import Batch
from llama.checkpoint import Checkpoint
from llama.download import default_model
from llama.model import Llama

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
FIXTURE = json.loads((ROOT / "tests/fixtures/generation.json").read_text("utf-8"))
SEQUENCES = FIXTURE["sequences"]
TOKENIZED = FIXTURE["tokenizer"]
PROMPTS = [sequence["prompt_ids"] for sequence in SEQUENCES]
EXPECTED = [sequence["output_ids"] for sequence in SEQUENCES]


@cache
def default_checkpoint() -> Checkpoint:
    """Fetches the model where it is not yet; without a way to, the test fails and says so."""
    return Checkpoint(default_model())


def default_llama(xp=np, dtype: str = "float32") -> Llama:
    return Llama(default_checkpoint(), xp, dtype)


def outputs(model: Llama, prompts: list[list[int]], max_tokens: int, **options) -> list[list[int]]:
    """The tokens that follow each prompt, all prompts in one batch."""
    batch = Batch(model, prompts, max_tokens, **options)
    for _ in batch.run():
        pass
    return [request.output for request in batch.requests]


def default_model_outputs(max_tokens: int) -> list[list[int]]:
    return outputs(default_llama(), PROMPTS, max_tokens)


def first_divergence(made: list[int], expected: list[int]) -> int | None:
    """Where two runs of tokens first differ."""
    pairs = zip(made, expected, strict=True)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), None)
