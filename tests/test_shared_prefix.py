"""examples/shared_prefix.py on host arrays: sharing saves blocks, and changes no sample."""

import os
import subprocess
import sys

import numpy as np
import pytest

from support import generation
from support.tiny_llama import VOCABULARY, TinyLlama

# isort: split
import shared_prefix
from llama.batch import sampler
from llama.checkpoint import Checkpoint
from llama.model import Llama
from shared_prefix import Samples

COUNT, BLOCK_SIZE = 5, 8


@pytest.fixture
def model(tmp_path, seed):
    return Llama(Checkpoint(TinyLlama(seed).write(tmp_path / "tiny.gguf")))


@pytest.fixture
def take(model, rng):
    prompts = rng.integers(0, len(VOCABULARY), 64).tolist()

    def take(share, length=37, max_tokens=9, **options):
        samples = Samples(
            model, prompts[:length], COUNT, max_tokens, share=share, block_size=BLOCK_SIZE,
            sample=sampler(1.0, 3), **options,
        )  # fmt: skip
        for _ in samples.run():
            pass
        return samples

    return take


@pytest.mark.parametrize("share", [True, False])
def test_samples_are_those_of_a_dense_model(take, seed, share):
    samples = take(share)
    draw = sampler(1.0, 3)
    sequences = [list(samples.prompt) for _ in range(COUNT)]
    for _ in range(9):
        logits = np.stack([TinyLlama(seed).logits(sequence)[-1] for sequence in sequences])
        for sequence, token in zip(sequences, draw(logits), strict=True):
            sequence.append(token)
    assert samples.outputs == [sequence[37:] for sequence in sequences]
    assert len(set(map(tuple, samples.outputs))) == COUNT


@pytest.mark.parametrize("max_rows", [10, 512])
@pytest.mark.parametrize(
    ("length", "max_tokens", "shared"),
    [(32, 9, 4), (37, 9, 4), (5, 9, 0), (40, 2, 5), (37, 1, 5), (32, 1, 4)],
)
def test_blocks_of_the_prompt_are_stored_once(
    take, monkeypatch, length, max_tokens, shared, max_rows
):
    monkeypatch.setattr(shared_prefix, "MAX_ROWS", max_rows)
    one, other = take(True, length, max_tokens), take(False, length, max_tokens)
    assert one.outputs == other.outputs
    assert all(len(output) == max_tokens for output in one.outputs)
    assert other.cache.num_used == COUNT * -(-(length + max_tokens - 1) // BLOCK_SIZE)
    assert other.cache.num_used - one.cache.num_used == (COUNT - 1) * shared
    assert one.cache.pool.allocator.num_shared == shared
    assert (one.num_computed, other.num_computed) == (length, COUNT * length)


def test_a_stop_token_ends_its_sample_alone(take):
    stop = take(True).outputs[1][4]
    one, other = (take(share, stop_tokens=frozenset({stop})) for share in (True, False))
    assert one.outputs == other.outputs
    assert len(one.outputs[1]) <= 4
    assert all(one.finished)


def test_prompts_that_cannot_run(take):
    with pytest.raises(ValueError, match="prompt: has 0 tokens, needs 1 to 87"):
        take(True, 0)
    with pytest.raises(ValueError, match="prompt: has 64 tokens, needs 1 to 46, so that 50 new"):
        take(True, 64, 50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], ""),
        (["--samples", "0"], "--samples: 0; it must be at least 1"),
        (["--max-tokens", "0"], "--max-tokens: 0; it must be at least 1"),
        (["--temperature", "nan"], "--temperature: nan; it must be 0 or more, and finite"),
        (["--block-size", "300"], "block_size 300"),
        (["--model", "absent.gguf"], "shared_prefix.py: model: no file at absent.gguf"),
    ],
)
def test_command(tmp_path, seed, arguments, message):
    model = TinyLlama(seed).write(tmp_path / "tiny.gguf")
    done = subprocess.run(
        [sys.executable, generation.EXAMPLES / "shared_prefix.py", "--model", model,
         "--backend", "numpy", "--samples", "4", "--max-tokens", "9", "--temperature", "0",
         *arguments, "the 12 " * 8],
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": str(generation.ROOT), "PYTHONUTF8": "1"},
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert (done.returncode == 0) == (not arguments), done.stderr
    if arguments:
        assert message in done.stderr
    else:
        assert "[4] the 12" in done.stdout
        assert done.stdout.count("PagedKVCache: 2 layers") == 2
        assert "samples     4 of 4 the same" in done.stdout
        rows = [line.split() for line in done.stdout.splitlines()[-6:]]
        names = [name for name, *_ in rows]
        assert names == ["prompt", "blocks", "memory", "time", "samples", "backend"]
        one, other, saved, *unit = rows[0][1:]
        assert int(other) == 4 * int(one) == int(one) + int(saved)
        assert unit == ["tokens", "computed", "(75%)"]
