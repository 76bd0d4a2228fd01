"""The default model of examples/generate.py on a GPU, against the tokens of transformers."""

import cupy
import pytest

from cupy_paged.layouts import LAYOUTS
from support import generation

NUM_TOKENS = len(generation.EXPECTED[0])
# A float16 logit of this model is off by a few hundredths: a wider lead than this must hold.
FLOAT16_MARGIN = 0.5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_tokens(layout):
    model = generation.default_llama(cupy)
    made = generation.outputs(model, generation.PROMPTS, NUM_TOKENS, layout=layout)
    assert made == generation.EXPECTED


def test_float32_tokens_alone_and_in_a_batch():
    model = generation.default_llama(cupy)
    for prompt, expected in zip(generation.PROMPTS, generation.EXPECTED, strict=True):
        assert generation.outputs(model, [prompt], 32, block_size=8) == [expected[:32]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float16_divergence(layout, record_property, capsys):
    """float16 leaves float32's path where two tokens are nearly as likely, and not before."""
    model = generation.default_llama(cupy, "float16")
    made = generation.outputs(model, generation.PROMPTS, NUM_TOKENS, layout=layout)
    for number, (output, sequence) in enumerate(zip(made, generation.SEQUENCES, strict=True), 1):
        at = generation.first_divergence(output, sequence["output_ids"])
        margin = None if at is None else sequence["margins"][at]
        record_property(f"prompt {number}", {"first_divergence": at, "float32_margin": margin})
        with capsys.disabled():
            where = "none" if at is None else f"token {at}, float32 margin {margin}"
            print(f"\nfloat16 {layout}, prompt {number}: first divergence of {NUM_TOKENS}: {where}")
        assert at is None or at >= 4
        assert margin is None or margin < FLOAT16_MARGIN
