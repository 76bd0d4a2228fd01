"""Models of transformers over a `PagedCache`, on the CPU, and what they are refused."""

import gc
import importlib
from types import SimpleNamespace

import pytest

from support import compare, frameworks, hf_llama
from support.transformers_suite import (
    TOLERANCE,
    TransformersSuite,
    check_default_model,
    logits,
    random_rows,
)

TORCH = frameworks.only("torch", frameworks.host())


@pytest.fixture(params=TORCH, ids=lambda arrays: arrays.name)
def arrays(request):
    return request.param


@pytest.fixture(autouse=True, scope="module")
def caches_end_here():
    """And not in a later test with a stand-in for torch: errors and their frames are cycles."""
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def one_thread(arrays):
    """Threads of torch wait for each other by spinning, which is slow where others compute, too."""
    before = arrays.torch.get_num_threads()
    arrays.torch.set_num_threads(1)
    yield
    arrays.torch.set_num_threads(before)


@pytest.fixture
def pair(arrays):
    return hf_llama.tiny(arrays)


class TestTransformers(TransformersSuite):
    pass


def test_default_model(arrays):
    check_default_model(hf_llama.default_model(arrays))


# ---- masks ----


@pytest.fixture
def started(pair, rng):
    """A cache of two rows of 5 and 9 tokens, their ids and mask, and tokens to go on with."""
    cache = pair.cache()
    ids, mask = pair.tokens(random_rows(rng, 5, 9))
    logits(pair, pair.ours, ids, mask, past_key_values=cache)
    more, shown = pair.tokens(random_rows(rng, 2, 2))
    return cache, ids, pair.torch.cat([mask, shown], 1), more


def check_goes_on(pair, cache, ids, mask, more):
    """That nothing has become of what was refused."""
    want = logits(pair, pair.eager, pair.torch.cat([ids, more], 1), mask)
    got = logits(pair, pair.ours, more, mask, past_key_values=cache)
    compare.close(got, want, "float32", tolerance=TOLERANCE)


@pytest.mark.parametrize(
    ("row", "column", "shows"), [(0, 3, 1), (0, 6, 0), (1, 0, 0)], ids=["shown", "hidden", "first"]
)
def test_a_mask_must_fit_what_is_cached(pair, started, row, column, shows):
    cache, ids, mask, more = started
    wrong = mask.clone()
    wrong[row, column] = shows
    with pytest.raises(ValueError, match=f"attention_mask: does not fit .* row {row}, column"):
        logits(pair, pair.ours, more, wrong, past_key_values=cache)
    check_goes_on(pair, cache, ids, mask, more)


def test_padding_is_not_shown_for_want_of_a_mask(pair, started):
    cache, ids, mask, more = started
    with pytest.raises(ValueError, match="does not fit the cache from row 0, column 0 on"):
        pair.ours(more, past_key_values=cache)
    check_goes_on(pair, cache, ids, mask, more)


def test_a_mask_has_two_dimensions_and_every_column(pair, started):
    cache, ids, mask, more = started
    with pytest.raises(ValueError, match=r"attention_mask: shape \(2, 9\), needs \(2, 11\)"):
        pair.ours(more, attention_mask=mask[:, :9], past_key_values=cache)
    with pytest.raises(ValueError, match="attention_mask: has 4 dimensions, needs 2"):
        pair.ours(more, attention_mask=pair.torch.zeros(2, 1, 2, 11), past_key_values=cache)
    check_goes_on(pair, cache, ids, mask, more)


def test_a_batch_has_the_rows_of_the_cache(pair, started):
    cache, ids, mask, more = started
    with pytest.raises(ValueError, match="past_key_values: has 2 rows, the batch 4"):
        logits(pair, pair.ours, more.repeat(2, 1), mask.repeat(2, 1), past_key_values=cache)
    check_goes_on(pair, cache, ids, mask, more)


# ---- what is not supported ----


def test_other_attention_and_other_caches(pair, rng):
    transformers = importlib.import_module("transformers")
    prompts = random_rows(rng, 5, 9)
    ids, mask = pair.tokens(prompts)
    cache = pair.cache()
    with pytest.raises(RuntimeError, match=r'attn_implementation: layer 0 .* "cupy_paged"'):
        logits(pair, pair.eager, ids, mask, past_key_values=cache)
    cache.update(*pair.torch.ones(2, 2, 2, 9, 16), 0)
    cache.reset()  # forgets that, too
    want = logits(pair, pair.eager, ids, mask)
    got = logits(pair, pair.ours, ids, mask, past_key_values=cache)
    compare.close(got, want, "float32", tolerance=TOLERANCE)
    for other in (None, transformers.DynamicCache()):
        with pytest.raises(TypeError, match="past_key_values: is no PagedCache"):
            pair.ours(ids, past_key_values=other)


def test_models_with_more_to_their_attention(pair):
    transformers = importlib.import_module("transformers")
    paged_cache = hf_llama.interop().PagedCache
    for config, message in (
        (transformers.MistralConfig(sliding_window=64), "sliding_window 64, needs None"),
        (transformers.Gemma2Config(), "layers of sliding_attention, needs full_attention alone"),
        (transformers.T5Config(), "of an encoder and a decoder"),
        (transformers.LlamaConfig(num_kv_shared_layers=2), "num_kv_shared_layers 2, needs 0"),
        (transformers.LlamaConfig(attention_chunk_size=8), "attention_chunk_size 8, needs None"),
    ):
        with pytest.raises(ValueError, match=f"config: .*{message}"):
            paged_cache(config, 16)
    with pytest.raises(ValueError, match="num_blocks: got 0"):
        paged_cache(pair.ours.config, 0)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float64", "auto", "torch.float16"])
def test_a_dtype_of_no_cache_is_refused_before_a_model_runs(pair, dtype):
    wrong = pair.torch.float16 if dtype == "torch.float16" else dtype
    with pytest.raises(ValueError, match=rf"^dtype: got {wrong!r}, needs one of float16, .*, fp8"):
        pair.cache(dtype=wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, "dropout: got 0.1, needs 0.0"),
        ({"output_attentions": True}, "output_attentions: "),
        ({"is_causal": False}, "is_causal: got False"),
        ({"softcap": 30.0}, "softcap: the model has it"),
        ({"sliding_window": 4}, "sliding_window: the model has it"),
        ({"s_aux": 1.0}, "s_aux: the model has it"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_attention_of_other_kinds(pair, started, options, message):
    cache, ids, mask, more = started
    key = value = pair.torch.ones(2, 2, 2, 16)
    query = pair.torch.ones(2, 4, 2, 16)
    module = SimpleNamespace(num_key_value_groups=2, training=False)
    marked = cache.update(key, value, 0)
    with pytest.raises(ValueError, match=message):
        hf_llama.interop().attention(module, query, *marked, mask, **options)
    check_goes_on(pair, cache, ids, mask, more)


def test_masks_of_other_kinds(pair, rng):
    pair = hf_llama.Pair(pair.arrays, pair.eager)
    pair.ours.config.is_causal = False
    ids, mask = pair.tokens(random_rows(rng, 5))
    with pytest.raises(ValueError, match=r"attention_mask: .* bidirectional_mask_function"):
        pair.ours(ids, attention_mask=mask, past_key_values=pair.cache())


@pytest.mark.parametrize("followed", ["query", "key", "value"])
def test_to_go_back_through_the_attention_is_an_error(pair, followed):
    torch = pair.torch
    given = {"query": torch.ones(1, 4, 3, 16), "key": torch.ones(1, 2, 3, 16)}
    given["value"] = given["key"].clone()
    given[followed].requires_grad_()
    module = SimpleNamespace(num_key_value_groups=2, training=False)
    cache = pair.cache()
    for new in (slice(0, 2), slice(2, 3)):  # a prompt, and a step
        query, key, value = (x[:, :, new] for x in given.values())
        for layer in range(3):
            marked = cache.update(key, value, layer)
            out, _ = hf_llama.interop().attention(module, query, *marked, None)
            with pytest.raises(RuntimeError, match=r"^backward: .* PagedCache, .*no_grad\(\)"):
                out.sum().backward()


def test_training_is_refused(pair):
    ids, _ = pair.tokens([[3, 4, 5]])
    pair.ours.train()
    with pytest.raises(ValueError, match=r"^query: needs a gradient.*model\.eval\(\)"):
        pair.ours(ids, past_key_values=pair.cache(), labels=ids)
    with pair.torch.no_grad():
        pair.ours(ids, past_key_values=pair.cache())


def test_a_cache_of_fewer_layers_is_told(pair):
    ids, mask = pair.tokens([[3, 4, 5]])
    layers = pair.ours.config.num_hidden_layers
    pair.ours.config.num_hidden_layers -= 1
    cache = pair.cache()
    pair.ours.config.num_hidden_layers = layers
    with pytest.raises(ValueError, match=f"^config: the cache was made for {layers - 1} layers"):
        logits(pair, pair.ours, ids, mask, past_key_values=cache)
