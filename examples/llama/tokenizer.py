"""Text to tokens and back, from the vocabulary inside a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Encoder
from tokenizers.decoders import DecodeStream

from .checkpoint import Checkpoint

# llama.h, enum llama_token_type
CONTROL, USER_DEFINED, BYTE = 3, 4, 6

# Texts that end an answer whatever the file's eos token is: a base model's end of document,
# a chat model's end of turn.
STOP_TEXTS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|end|>")


class Tokenizer:
    """
    >>> tokenizer = Tokenizer(Checkpoint("model.gguf"))  # doctest: +SKIP
    >>> tokenizer.decode(tokenizer.encode("Hello"))  # doctest: +SKIP
    'Hello'
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        kind = checkpoint.get("tokenizer.ggml.model")
        if kind not in ("gpt2", "llama"):
            raise ValueError(f"model: tokenizer {kind!r}; this program knows 'gpt2' and 'llama'")
        self._vocabulary: list[str] = checkpoint.get("tokenizer.ggml.tokens")
        build = _byte_level if kind == "gpt2" else _sentencepiece
        self._encoder = build(checkpoint, self._vocabulary)
        types = checkpoint.get("tokenizer.ggml.token_type", [])
        self._encoder.add_special_tokens(
            [
                AddedToken(text, special=True, normalized=False)
                for text, token_type in zip(self._vocabulary, types, strict=False)
                if token_type == CONTROL
            ]
        )
        self._encoder.add_tokens(
            [
                AddedToken(text, special=False, normalized=False)
                for text, token_type in zip(self._vocabulary, types, strict=False)
                if token_type == USER_DEFINED
            ]
        )
        self.bos_token: int | None = checkpoint.get("tokenizer.ggml.bos_token_id", None)
        self.eos_token: int | None = checkpoint.get("tokenizer.ggml.eos_token_id", None)
        self.chat_template: str | None = checkpoint.get("tokenizer.chat_template", None)
        self._add_bos = checkpoint.get("tokenizer.ggml.add_bos_token", kind == "llama")
        ends = {self.eos_token, checkpoint.get("tokenizer.ggml.eot_token_id", None)}
        ends |= {self._encoder.token_to_id(text) for text in STOP_TEXTS}
        self.stop_tokens: frozenset[int] = frozenset(ends - {None})

    def encode(self, text: str) -> list[int]:
        ids = self._encoder.encode(text, add_special_tokens=False).ids
        if self._add_bos and self.bos_token is not None and ids[:1] != [self.bos_token]:
            ids = [self.bos_token, *ids]
        return ids

    def decode(self, ids: list[int]) -> str:
        return self._encoder.decode(ids, skip_special_tokens=True)

    def stream(self, prompt: list[int]) -> Callable[[int], str]:
        """What each token after `prompt` adds to the text; "" while a character is incomplete."""
        stream = DecodeStream(ids=prompt, skip_special_tokens=True)
        return lambda token: stream.step(self._encoder, token) or ""

    def chat(self, message: str) -> str:
        """`message` as a user's turn, in the file's own template, up to where the answer starts."""
        if self.chat_template is None:
            raise ValueError("--chat: the model file has no chat template")
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise RuntimeError(
                "--chat needs jinja2: pip install jinja2 (the demo extra has it)"
            ) from error

        def refuse(reason: str) -> None:
            raise TemplateError(reason)

        # The template comes with the file: it is a stranger's program.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        try:
            return environment.from_string(self.chat_template).render(
                messages=[{"role": "user", "content": message}],
                add_generation_prompt=True,
                bos_token=self._text(self.bos_token),
                eos_token=self._text(self.eos_token),
            )
        except TemplateError as error:
            raise ValueError(f"--chat: the model file's chat template fails: {error}") from error

    def _text(self, token: int | None) -> str:
        return "" if token is None else self._vocabulary[token]


# How text is cut before merges apply, by the name in tokenizer.ggml.pre.
_DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_GPT2 = ("gpt-2", "gpt2", "phi-2", "jina-es", "jina-de", "mpt", "olmo", "jais")
_LLAMA3 = ("llama3", "llama-v3", "llama-bpe", "falcon3")
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _cutter(name: str) -> pre_tokenizers.PreTokenizer:
    if name in _GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in _DIGITS_APART:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    if name in _LLAMA3 or name == "qwen2":
        digits = r"\p{N}{1,3}" if name in _LLAMA3 else r"\p{N}"
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS % digits), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    known = sorted({*_GPT2, *_DIGITS_APART, *_LLAMA3, "qwen2"})
    raise ValueError(f"model: tokenizer.ggml.pre is {name!r}; this program knows {known}")


def _byte_level(checkpoint: Checkpoint, vocabulary: list[str]) -> Encoder:
    name = checkpoint.get("tokenizer.ggml.pre")
    merges = [tuple(pair.split(" ", 1)) for pair in checkpoint.get("tokenizer.ggml.merges")]
    ids = {text: token for token, text in enumerate(vocabulary)}
    encoder = Encoder(models.BPE(ids, merges, ignore_merges=name in _LLAMA3))
    encoder.pre_tokenizer = _cutter(name)
    encoder.decoder = decoders.ByteLevel()
    return encoder


def _sentencepiece(checkpoint: Checkpoint, vocabulary: list[str]) -> Encoder:
    ids = {text: token for token, text in enumerate(vocabulary)}
    scores: list[float] = checkpoint.get("tokenizer.ggml.scores")
    # The file has scores and no merges: of two neighbours that make a token, the pair whose token
    # scores highest goes first.
    merges: list[tuple[Any, ...]] = []
    for text, token in ids.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                merges.append((-scores[token], ids[left], ids[right], left, right))
    merges.sort()
    unknown = vocabulary[checkpoint.get("tokenizer.ggml.unknown_token_id", 0)]
    encoder = Encoder(
        models.BPE(
            ids,
            [merge[3:] for merge in merges],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=BYTE in checkpoint.get("tokenizer.ggml.token_type"),
        )
    )
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    undo: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if checkpoint.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("▁"))
        undo.append(decoders.Strip(" ", 1, 0))
    encoder.normalizer = normalizers.Sequence(steps)
    encoder.decoder = decoders.Sequence(undo)
    return encoder
