"""Several samples of one long prompt, whose keys and values are computed and stored once.

    python examples/shared_prefix.py
    python examples/shared_prefix.py --samples 16 "$(cat story.txt)"

The first sample computes the prompt, the others are forks of it: they share its blocks, and each
goes on in blocks of its own. The same again without sharing shows what that saves: tokens to
compute, blocks, memory, and time before the first new token. What follows is the same work.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator

try:
    from llama.backend import BACKENDS, array_module, describe, finish
    from llama.batch import Sampler, sampler
    from llama.checkpoint import Checkpoint
    from llama.display import counter, display
    from llama.download import default_model
    from llama.model import Array, Llama
    from llama.tokenizer import Tokenizer

    from cupy_paged.sequences import Sequence
except ModuleNotFoundError as error:
    sys.exit(
        f'shared_prefix.py needs {error.name}: pip install -e ".[demo]" in the repository\'s root, '
        'or ".[demo,cuda12]" (cuda13) for a GPU'
    )

PROMPT = """\
The lighthouse at Carrow Point had been dark for eleven years when Ines came to see what could be \
saved. The stairs were sound. The lamp room had lost two panes, and gulls had nested where the oil \
was once kept, but the great lens stood whole under its sheet, and when she drew the sheet away it \
threw small rainbows over the walls. She swept for three days. On the fourth an old man rowed over \
from the village with bread and a sack of coal. He had been the last keeper's boy, he said, and \
had carried coal up those stairs every morning until the ships had instruments of their own and \
nobody needed a light. He asked what she wanted with it. She said that she did not know yet. He \
nodded, as though that were a good answer, and showed her where the spare wicks were, dry in a tin \
box behind the third step. That night a fog came in so thick that she could not see the rail from \
the door. Toward midnight she heard an engine, far out, then nearer, then much too near, and a \
voice calling over the water. She ran up the stairs with a match in her hand. The lens took the \
small flame and made of it a white road across the fog, and a fishing boat came slowly along it \
into the bay, its instruments dead, and three men standing in the bow with their faces lit.

The next morning,"""

MAX_ROWS = 512
"""Most tokens of the prompts in one step."""


def main() -> None:
    arguments = parse()
    try:
        run(arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except (MemoryError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"shared_prefix.py: {error}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt", nargs="?", default=PROMPT, metavar="PROMPT",
                        help="default: the beginning of a story")  # fmt: skip
    parser.add_argument("--samples", type=int, default=6, metavar="N",
                        help="how many to take (default 6)")  # fmt: skip
    parser.add_argument("--max-tokens", type=int, default=24, metavar="N",
                        help="new tokens for each sample (default 24)")  # fmt: skip
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T",
                        help="0: always the likeliest token (default 0.8)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", metavar="FILE.gguf",
                        help="default: SmolLM2-135M-Instruct, fetched once (98 MB)")  # fmt: skip
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument("--block-size", type=int, default=16, metavar="N",
                        help="tokens in a cache block (default 16)")  # fmt: skip
    arguments = parser.parse_args()
    for name, least in (("samples", 1), ("max_tokens", 1), ("block_size", 1), ("seed", 0)):
        if (value := getattr(arguments, name)) < least:
            parser.error(f"--{name.replace('_', '-')}: {value}; it must be at least {least}")
    if not 0 <= arguments.temperature < math.inf:
        parser.error(f"--temperature: {arguments.temperature}; it must be 0 or more, and finite")
    return arguments


class Samples:
    """Some samples of one prompt, taken side by side; with `share`, over one copy of it."""

    def __init__(
        self,
        model: Llama,
        prompt: list[int],
        count: int,
        max_tokens: int,
        *,
        share: bool,
        block_size: int = 16,
        stop_tokens: frozenset[int] = frozenset(),
        sample: Sampler,
    ) -> None:
        context = model.config.context_length
        if not prompt or len(prompt) + max_tokens > context:
            raise ValueError(
                f"prompt: has {len(prompt)} tokens, needs 1 to {context - max_tokens}, so that "
                f"{max_tokens} new ones fit into the model's context of {context}"
            )
        self.model, self.prompt, self.count, self.max_tokens = model, prompt, count, max_tokens
        self.share, self.stop_tokens, self.sample = share, stop_tokens, sample
        # Enough without sharing. The last token of a sample is never fed back.
        num_blocks = count * -(-(len(prompt) + max_tokens - 1) // block_size)
        # Here blocks are shared by forks, and nothing is looked up.
        self.cache = model.new_cache(num_blocks, block_size, prefix_caching=False)
        self.outputs: list[list[int]] = [[] for _ in range(count)]
        self.finished = [False] * count
        self.prompt_seconds = 0.0
        self.num_computed = 0
        """Tokens of prompts that were computed."""

    def run(self) -> Iterator[list[int]]:
        """Steps until all are finished; yields the samples that moved on, or [] in the prompts."""
        logits: list[Array] = []
        sequences = [self.cache.add(self.prompt) for _ in range(1 if self.share else self.count)]
        while pending := [s for s in sequences if s.num_pending]:
            started = time.perf_counter()
            logits.append(self._step(pending))
            self.num_computed = sum(s.num_written for s in sequences)
            finish(self.model.xp)
            self.prompt_seconds += time.perf_counter() - started
            yield []
        xp = self.model.xp
        first = xp.concatenate(logits)
        if self.share:
            sequences += [self.cache.fork(sequences[0]) for _ in range(self.count - 1)]
            first = xp.repeat(first, self.count, axis=0)
        yield from self._generate(sequences, first)

    def _generate(self, sequences: list[Sequence], logits: Array) -> Iterator[list[int]]:
        live = list(range(self.count))
        while True:
            moved = live
            for index, token in zip(moved, self.sample(logits), strict=True):
                if token not in self.stop_tokens:
                    self.outputs[index].append(token)
                self.finished[index] = (
                    token in self.stop_tokens or len(self.outputs[index]) == self.max_tokens
                )
            # Those that are finished keep their blocks, for the picture at the end.
            live = [index for index in live if not self.finished[index]]
            for index in live:
                self.cache.append(sequences[index], self.outputs[index][-1:])
            if live:
                logits = self._step([sequences[index] for index in live])
            yield moved
            if not live:
                return

    def _step(self, sequences: list[Sequence]) -> Array:
        """Logits after each sequence that this step brings to its end."""
        batch = self.cache.batch(sequences, each_token=True, max_tokens=MAX_ROWS)
        return self.model.step(batch, self.cache, batch.last_tokens[batch.completed])


def run(arguments: argparse.Namespace) -> None:
    xp = array_module(arguments.backend)
    checkpoint = Checkpoint(arguments.model or default_model())
    tokenizer = Tokenizer(checkpoint)
    prompt = tokenizer.encode(arguments.prompt)
    note(f"loading {checkpoint.path.name}")
    model = Llama(checkpoint, xp)

    def samples(share: bool) -> Samples:
        return Samples(
            model,
            prompt,
            arguments.samples,
            arguments.max_tokens,
            share=share,
            block_size=arguments.block_size,
            stop_tokens=tokenizer.stop_tokens,
            sample=sampler(arguments.temperature, arguments.seed),
        )

    with_sharing, without = samples(True), samples(False)
    if xp.__name__ == "cupy":
        note("compiling what the kernel caches do not hold yet")
        for _ in samples(True).run():
            pass
    note(f"{arguments.samples} samples of one prompt of {len(prompt)} tokens")
    show(with_sharing, tokenizer, arguments.prompt.rpartition("\n")[2])
    note("the same without sharing")
    count_steps(without)
    print(f"With sharing\n{with_sharing.cache}\n\nWithout\n{without.cache}\n")
    for line in comparison(with_sharing, without):
        print(line)
    print(f"backend     {describe(xp)}")


def note(text: str) -> None:
    print(f"shared_prefix.py: {text}", file=sys.stderr, flush=True)


def show(samples: Samples, tokenizer: Tokenizer, title: str) -> None:
    """Runs the samples; their texts grow on the screen."""
    view = display([f"[{i}] {title}" for i in range(1, samples.count + 1)], sys.stdout)
    streams = [tokenizer.stream(samples.prompt) for _ in range(samples.count)]
    shown = [0] * samples.count
    for moved in samples.run():
        for index in moved:
            new = samples.outputs[index][shown[index] :]
            shown[index] += len(new)
            text = "".join(streams[index](token) for token in new)
            view.add(index, text, samples.finished[index])
    view.close()


def count_steps(samples: Samples) -> None:
    """Runs the samples; says how far they are."""
    report = counter(sys.stderr)
    total = len(samples.prompt) * samples.count
    for _ in samples.run():
        longest = max(map(len, samples.outputs))
        report(
            f"{samples.num_computed} of {total} tokens of prompts, "
            f"{longest} of {samples.max_tokens} new ones of each sample"
        )
    report("")


def comparison(shared: Samples, apart: Samples) -> list[str]:
    """A table of what both runs took.

    Without the time of the sampling, which is the same work in both: only the machine's noise would
    be compared.
    """

    def row(name: str, one: float, other: float, unit: str, digits: int = 0) -> str:
        share = (other - one) / max(other, 1e-9)
        return (
            f"{name:<12}{one:>12,.{digits}f}{other:>12,.{digits}f}"
            f"{other - one:>12,.{digits}f} {unit} ({share:.0%})"
        )

    same = sum(map(list.__eq__, shared.outputs, apart.outputs))
    used, needed = shared.cache.num_used, apart.cache.num_used
    mebibytes = shared.cache.block_bytes / 2**20
    return [
        f"{'':<12}{'sharing':>12}{'without':>12}{'saved':>12}",
        row("prompt", shared.num_computed, apart.num_computed, "tokens computed"),
        row("blocks", used, needed, "blocks"),
        row("memory", used * mebibytes, needed * mebibytes, "MiB", 1),
        # Taken once, and on a machine that may be busy: no share of it is worth printing.
        f"{'time':<12}{shared.prompt_seconds:>12,.2f}{apart.prompt_seconds:>12,.2f}"
        f"{'':>12} s for the prompt",
        f"samples     {same} of {shared.count} the same",
    ]


if __name__ == "__main__":
    main()
