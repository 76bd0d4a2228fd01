"""Text from a Llama-architecture GGUF file, every token's attention through cupy_paged.

    python examples/generate.py "The capital of France is" "Once upon a time"
    python examples/generate.py --chat "Why is the sky blue?"

All prompts run as one batch whose sequences share one pool of cache blocks. CuPy on a GPU, NumPy
without one: the same lines run on both.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

try:
    from llama.backend import BACKENDS, array_module, describe
    from llama.batch import Batch, sampler
    from llama.checkpoint import Checkpoint
    from llama.display import display
    from llama.download import default_model
    from llama.model import Llama
    from llama.tokenizer import Tokenizer

    from cupy_paged.layouts import LAYOUTS
except ModuleNotFoundError as error:
    sys.exit(
        f'generate.py needs {error.name}: pip install -e ".[demo]" in the repository\'s root, or '
        '".[demo,cuda12]" (cuda13) for a GPU'
    )

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):\n",
)
QUESTIONS = (
    "Why is the sky blue?",
    "Write a haiku about the sea.",
    "How do I boil an egg? Answer in three steps.",
)


def main() -> None:
    arguments = parse()
    try:
        run(arguments)
    except (MemoryError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"generate.py: {error}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="default: a few built-in ones")
    parser.add_argument("--chat", action="store_true", help="apply the file's chat template")
    parser.add_argument("--model", metavar="FILE.gguf",
                        help="default: SmolLM2-135M-Instruct, fetched once (98 MB)")  # fmt: skip
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N",
                        help="new tokens for each prompt (default 128)")  # fmt: skip
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32",
                        help="of weights, products and cache (default float32)")  # fmt: skip
    parser.add_argument("--block-size", type=int, default=16, metavar="N",
                        help="tokens in a cache block (default 16)")  # fmt: skip
    parser.add_argument("--layout", choices=LAYOUTS, default="HND", help="of the KV cache")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T",
                        help="0 (default): always the likeliest token")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write token ids and figures to FILE")
    arguments = parser.parse_args()
    if arguments.max_tokens < 1:
        parser.error(f"--max-tokens: {arguments.max_tokens}; it must be at least 1")
    if not 1 <= arguments.block_size <= 256:
        parser.error(f"--block-size: {arguments.block_size}; it must be 1 to 256")
    if not 0 <= arguments.temperature < math.inf:
        parser.error(f"--temperature: {arguments.temperature}; it must be 0 or more, and finite")
    if arguments.seed < 0:
        parser.error(f"--seed: {arguments.seed}; it must not be negative")
    if arguments.json and not Path(arguments.json).parent.is_dir():
        parser.error(f"--json: there is no folder {Path(arguments.json).parent}")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    xp = array_module(arguments.backend)
    if xp.__name__ == "numpy" and arguments.dtype == "float16":
        note("float16 is about 20 times slower than float32 here: NumPy has no BLAS for it")
    checkpoint = Checkpoint(arguments.model or default_model())
    tokenizer = Tokenizer(checkpoint)
    texts = arguments.prompts or (QUESTIONS if arguments.chat else PROMPTS)
    prompts = [tokenizer.encode(tokenizer.chat(t) if arguments.chat else t) for t in texts]
    note(f"loading {checkpoint.path.name}")
    model = Llama(checkpoint, xp, arguments.dtype)
    cache = {"block_size": arguments.block_size, "layout": arguments.layout}
    if xp.__name__ == "cupy":
        note("compiling what the kernel caches do not hold yet")
        for _ in Batch(model, [[0, 0]], 2, **cache).run():
            pass
    batch = Batch(
        model,
        prompts,
        arguments.max_tokens,
        stop_tokens=tokenizer.stop_tokens,
        sample=sampler(arguments.temperature, arguments.seed),
        **cache,
    )
    show(batch, tokenizer, texts, arguments.chat)
    summary = summarise(batch, checkpoint, xp, arguments)
    print("\n".join(f"{name:<12}{value}" for name, value in summary.items()))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(record(batch, tokenizer, texts, summary)))


def note(text: str) -> None:
    print(f"generate.py: {text}", file=sys.stderr, flush=True)


def show(batch: Batch, tokenizer: Tokenizer, texts: list[str], chat: bool) -> None:
    numbers = [f"[{i}] " if len(texts) > 1 else "" for i in range(1, len(texts) + 1)]
    titles = [n + (f"> {t}\n" if chat else t) for n, t in zip(numbers, texts, strict=True)]
    view = display(titles, sys.stdout)
    streams = [tokenizer.stream(request.prompt) for request in batch.requests]
    shown = [0] * len(texts)
    try:
        for indices in batch.run():
            for index in indices:
                request = batch.requests[index]
                new = request.output[shown[index] :]
                shown[index] += len(new)
                text = "".join(streams[index](token) for token in new)
                view.add(index, text, request.finish_reason is not None)
    except KeyboardInterrupt:
        pass
    view.close()


def summarise(
    batch: Batch, checkpoint: Checkpoint, xp: object, arguments: argparse.Namespace
) -> dict[str, str]:
    timing, cache = batch.timing, batch.cache

    def rate(tokens: int, seconds: float) -> str:
        return f"{tokens} tokens in {seconds:.2f} s, {tokens / max(seconds, 1e-9):.1f} tokens/s"

    return {
        "model": checkpoint.path.name,
        "prompt": rate(timing.prompt_tokens, timing.prompt_seconds),
        "generation": rate(timing.generated_tokens, timing.generation_seconds)
        + f", batch of {len(batch.requests)}",
        "blocks": f"{batch.peak_blocks} of {cache.num_blocks} used at the peak, "
        f"{cache.block_size} tokens ({cache.block_bytes / 1e6:.2f} MB) each, layout {cache.layout}",
        "backend": f"{describe(xp)}, {arguments.dtype}",
    }


def record(batch: Batch, tokenizer: Tokenizer, texts: list[str], summary: dict[str, str]) -> dict:
    return {
        "sequences": [
            {
                "prompt": text,
                "prompt_ids": request.prompt,
                "output_ids": request.output,
                "text": tokenizer.decode(request.output),
                "finish_reason": request.finish_reason,
            }
            for text, request in zip(texts, batch.requests, strict=True)
        ],
        "summary": summary,
        "timing": vars(batch.timing),
        "blocks": {"peak": batch.peak_blocks, "pool": batch.cache.num_blocks},
    }


if __name__ == "__main__":
    main()
