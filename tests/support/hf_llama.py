"""Llama models of transformers: a small random one, and the default model of examples/generate.py.

Each is a `Pair`: the model as transformers runs it, and the same over a `PagedCache`.
"""

import copy
import functools
import importlib
from typing import Any

import numpy as np

from support import frameworks, generation

# isort: split
from llama.checkpoint import Checkpoint
from llama.model import Config

VOCABULARY_SIZE = 97


class Pair:
    """`eager`, by transformers alone, and `ours`, with attn_implementation="cupy_paged"."""

    def __init__(self, arrays, model):
        self.arrays, self.torch = arrays, arrays.torch
        self.eager = model.eval().to(arrays.device)
        weights = {id(weight): weight for weight in self.eager.parameters()}
        self.ours = copy.deepcopy(self.eager, weights)  # which both have
        self.ours.set_attn_implementation(interop().NAME)

    def cache(self, num_blocks=64, **options):
        options = {"block_size": 4, "poison": True, **options}
        return interop().PagedCache(self.ours.config, num_blocks, **options)

    def tokens(self, rows):
        """[len(rows), longest] with padding on the left, and its mask."""
        longest = max(map(len, rows))
        ids = np.array([[0] * (longest - len(row)) + list(row) for row in rows])
        mask = np.array([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return self.tensor(ids), self.tensor(mask)

    def tensor(self, x):
        return self.torch.from_numpy(np.asarray(x)).to(self.arrays.device)

    def generate(self, model, ids, mask, *, seed=0, **options):
        """What `generate` returns, with the logits of each step; nothing ends a row early."""
        self.torch.manual_seed(seed)
        options = {
            "max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True,
            "output_logits": True, **options,
        }  # fmt: skip
        return model.generate(ids, attention_mask=mask, **options)


def interop():
    """cupy_paged.interop.transformers; skips the test without transformers."""
    frameworks.needed("transformers")
    return importlib.import_module("cupy_paged.interop.transformers")


def _model(**config: Any):
    transformers = importlib.import_module("transformers")
    config = transformers.LlamaConfig(
        pad_token_id=0, bos_token_id=1, eos_token_id=None, attn_implementation="eager", **config
    )
    return transformers.LlamaForCausalLM(config)


@functools.cache
def tiny(arrays, dtype="float32"):
    """Weights so large that attention is peaked, and what is to come depends on all that was."""
    interop()
    arrays.torch.manual_seed(0)
    model = _model(
        vocab_size=VOCABULARY_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
        initializer_range=0.3,
    )  # fmt: skip
    return Pair(arrays, model.to(getattr(arrays.torch, dtype)))


@functools.cache
def default_model(arrays, dtype="float32"):
    """The file of examples/generate.py. (By itself, transformers needs accelerate to read it.)"""
    interop()
    checkpoint = generation.default_checkpoint()
    c = Config.of(checkpoint)
    weights = _weights(checkpoint, c)
    model = _model(
        vocab_size=len(weights["model.embed_tokens.weight"]), hidden_size=c.hidden_size,
        intermediate_size=checkpoint.get("llama.feed_forward_length"),
        num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads, head_dim=c.head_size, rms_norm_eps=c.norm_epsilon,
        max_position_embeddings=c.context_length, tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "default", "rope_theta": checkpoint.get("llama.rope.freq_base"),
        },
    )  # fmt: skip
    tensors = {name: arrays.torch.from_numpy(weight) for name, weight in weights.items()}
    model.load_state_dict(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    return Pair(arrays, model.to(getattr(arrays.torch, dtype)))


_LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


def _weights(checkpoint: Checkpoint, c: Config) -> dict[str, np.ndarray]:
    """A checkpoint's tensors by the names that transformers has for them."""
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    for i in range(c.num_layers):
        names |= {f"blk.{i}.{ours}": f"model.layers.{i}.{name}" for ours, name in _LAYER.items()}
    weights = {}
    for ours, name in names.items():
        weight = checkpoint.tensor(f"{ours}.weight")
        if ours.endswith(("attn_q", "attn_k")):
            # The file has the two coordinates of a rotation side by side, transformers in halves.
            pairs = weight.reshape(-1, c.head_size // 2, 2, c.hidden_size)
            weight = pairs.swapaxes(1, 2).reshape(weight.shape)
        weights[f"{name}.weight"] = np.ascontiguousarray(weight)
    return weights
