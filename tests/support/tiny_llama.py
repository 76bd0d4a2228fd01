"""A random Llama of a few thousand weights: as a GGUF file, and as a dense float64 forward pass.

The forward pass follows the architecture's papers and Hugging Face's convention, where a rotation
joins coordinates i and i + head_size / 2; the file follows GGUF's, where they are neighbours.
"""

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["t h", "Ġ th", "th e", "1 2", "a b"]
VOCABULARY = CONTROL + sorted(ByteLevel.alphabet()) + [pair.replace(" ", "") for pair in MERGES]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class TinyLlama:
    seed: int
    num_layers: int = 2
    num_heads: int = 6
    num_kv_heads: int = 2
    head_size: int = 8
    hidden_size: int = 40
    ffn_size: int = 56
    context_length: int = 96
    freq_base: float = 500.0
    tied: bool = True
    linear_scaling: float | None = None
    rope_factors: bool = False

    def weights(self) -> dict[str, np.ndarray]:
        """By GGUF's names, q and k in Hugging Face's order."""
        rng = np.random.default_rng(self.seed)
        hidden, q_size = self.hidden_size, self.num_heads * self.head_size
        kv_size = self.num_kv_heads * self.head_size
        shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(VOCABULARY), hidden)}
        if not self.tied:
            shapes["output"] = (len(VOCABULARY), hidden)
        for i in range(self.num_layers):
            shapes |= {
                f"blk.{i}.attn_q": (q_size, hidden),
                f"blk.{i}.attn_k": (kv_size, hidden),
                f"blk.{i}.attn_v": (kv_size, hidden),
                f"blk.{i}.attn_output": (hidden, q_size),
                f"blk.{i}.ffn_gate": (self.ffn_size, hidden),
                f"blk.{i}.ffn_up": (self.ffn_size, hidden),
                f"blk.{i}.ffn_down": (hidden, self.ffn_size),
            }
        weights = {
            # Large enough that attention is far from uniform and logits far from equal.
            name: rng.normal(0, 2 / shape[-1] ** 0.5, shape).astype(np.float32)
            for name, shape in shapes.items()
        }
        norms = [f"blk.{i}.{n}_norm" for i in range(self.num_layers) for n in ("attn", "ffn")]
        for name in [*norms, "output_norm"]:
            weights[name] = rng.uniform(0.5, 1.5, hidden).astype(np.float32)
        if self.rope_factors:
            weights["rope_freqs"] = rng.uniform(1, 8, self.head_size // 2).astype(np.float32)
        return weights

    def write(self, path: Path) -> Path:
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(self.num_layers)
        writer.add_context_length(self.context_length)
        writer.add_embedding_length(self.hidden_size)
        writer.add_feed_forward_length(self.ffn_size)
        writer.add_head_count(self.num_heads)
        writer.add_head_count_kv(self.num_kv_heads)
        writer.add_key_length(self.head_size)
        writer.add_rope_dimension_count(self.head_size)
        writer.add_rope_freq_base(self.freq_base)
        writer.add_layer_norm_rms_eps(1e-5)
        if self.linear_scaling:
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(self.linear_scaling)
        add_vocabulary(writer)
        for name, weight in self.weights().items():
            heads = {"q": self.num_heads, "k": self.num_kv_heads}.get(name.rpartition("attn_")[2])
            if heads:
                halves = weight.reshape(heads, 2, self.head_size // 2, self.hidden_size)
                weight = halves.swapaxes(1, 2).reshape(weight.shape)
            writer.add_tensor(f"{name}.weight", np.ascontiguousarray(weight))
        return finish(writer, path)

    def logits(self, tokens: list[int]) -> np.ndarray:
        """float64 [len(tokens), vocab_size]"""
        w = {name: weight.astype(np.float64) for name, weight in self.weights().items()}
        length, half = len(tokens), self.head_size // 2
        frequencies = self.freq_base ** (-np.arange(half) / half) / w.get("rope_freqs", 1)
        angles = np.arange(length)[:, None, None] * frequencies / (self.linear_scaling or 1)
        turn = np.exp(1j * angles)

        def norm(x, name):
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w[name]

        def rotate(heads):
            turned = (heads[..., :half] + 1j * heads[..., half:]) * turn
            return np.concatenate([turned.real, turned.imag], -1)

        x = w["token_embd"][tokens]
        for i in range(self.num_layers):
            normed = norm(x, f"blk.{i}.attn_norm")
            q, k, v = (
                (normed @ w[f"blk.{i}.attn_{n}"].T).reshape(length, -1, self.head_size)
                for n in "qkv"
            )
            group = self.num_heads // self.num_kv_heads
            k, v = np.repeat(rotate(k), group, 1), np.repeat(v, group, 1)
            scores = np.einsum("ihd,jhd->hij", rotate(q), k) * self.head_size**-0.5
            scores[:, np.triu(np.ones((length, length), bool), 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            attended = np.einsum("hij,jhd->ihd", weights, v).reshape(length, -1)
            x = x + attended @ w[f"blk.{i}.attn_output"].T
            normed = norm(x, f"blk.{i}.ffn_norm")
            gate = normed @ w[f"blk.{i}.ffn_gate"].T
            hidden = gate / (1 + np.exp(-gate)) * (normed @ w[f"blk.{i}.ffn_up"].T)
            x = x + hidden @ w[f"blk.{i}.ffn_down"].T
        return norm(x, "output_norm") @ w["token_embd" if self.tied else "output"].T

    def greedy(self, prompt: list[int], max_tokens: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(max_tokens):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]


def add_vocabulary(writer: gguf.GGUFWriter, pre: str = "smollm") -> None:
    types = [gguf.TokenType.CONTROL] * len(CONTROL)
    types += [gguf.TokenType.NORMAL] * (len(VOCABULARY) - len(CONTROL))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(VOCABULARY)
    writer.add_token_types(types)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)


def finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
