"""What holds for `PagedCache` with tensors on the host and on a GPU alike.

A test module subclasses `TransformersSuite` and gives it a fixture `arrays`, an adapter of
`support.frameworks` for torch. Dead memory is NaN in all caches here.
"""

import copy
import gc
import importlib

import numpy as np
import pytest

from cupy_paged import NeverFits, OutOfBlocks, PagedKVCache
from support import compare, generation, hf_llama

LENGTHS = 1, 7, 16, 33
# Of logits in float32, after layers whose sums have other orders; what is wrong is off by about 1.
TOLERANCE = 1e-4


def random_rows(rng, *lengths):
    return [rng.integers(1, hf_llama.VOCABULARY_SIZE, length).tolist() for length in lengths]


def num_blocks(lengths, block_size=4):
    return sum(-(-length // block_size) for length in lengths)


def check_same(pair, got, want):
    """The same tokens, and nearly the same logits in every step."""
    np.testing.assert_array_equal(got.sequences.cpu(), want.sequences.cpu())
    for step, (logits, wanted) in enumerate(zip(got.logits, want.logits, strict=True)):
        logits, wanted = pair.arrays.numpy(logits), pair.arrays.numpy(wanted)
        compare.close(logits, wanted, "float32", f"logits of step {step}", TOLERANCE)


def logits(pair, model, ids, mask, **options):
    """Logits after the last column, of one forward pass."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with pair.torch.no_grad():
        made = model(ids, attention_mask=mask, position_ids=positions, **options).logits
    return pair.arrays.numpy(made[:, -1])


def check_default_model(pair, num_tokens=24):
    """The tokens of the default model, of prompts of unequal lengths, beside those of eager."""
    prompts, expected = generation.PROMPTS[:3], generation.EXPECTED[:3]
    ids, mask = pair.tokens(prompts)
    want = pair.generate(pair.eager, ids, mask, max_new_tokens=num_tokens)
    cache = pair.cache(64, block_size=16, poison=False)
    got = pair.generate(pair.ours, ids, mask, max_new_tokens=num_tokens, past_key_values=cache)
    check_same(pair, got, want)
    made = got.sequences[:, ids.shape[1] :].tolist()
    assert made == [tokens[:num_tokens] for tokens in expected]
    held = [len(prompt) + num_tokens - 1 for prompt in prompts]
    assert [len(row) for row in cache.kv_cache.sequences] == held


class TransformersSuite:
    @pytest.fixture
    def pair(self, arrays):
        return hf_llama.tiny(arrays)

    @pytest.mark.parametrize(
        ("layout", "block_size"), [("HND", 4), ("NHD", 16), ("vllm", 5)], ids=str
    )
    @pytest.mark.parametrize("lengths", [(33,), LENGTHS], ids=["alone", "batch"])
    def test_greedy(self, pair, rng, lengths, layout, block_size):
        ids, mask = pair.tokens(random_rows(rng, *lengths))
        want = pair.generate(pair.eager, ids, mask)
        cache = pair.cache(layout=layout, block_size=block_size)
        check_same(pair, pair.generate(pair.ours, ids, mask, past_key_values=cache), want)
        # The last token is never fed back, and padding is nowhere.
        held = [length + 11 for length in lengths]
        assert [len(row) for row in cache.kv_cache.sequences] == held
        assert cache.kv_cache.num_used == num_blocks(held, block_size)
        assert cache.get_seq_length() == max(held)
        assert cache.kv_cache.key_caches[0].device == ids.device

    def test_decoding_attends_to_pages_and_prompts_do_not(self, pair, rng, monkeypatch):
        rows = []
        attend = PagedKVCache.attend

        def counted(cache, layer, query, batch, **options):
            rows.append((layer, len(query)))
            return attend(cache, layer, query, batch, **options)

        monkeypatch.setattr(PagedKVCache, "attend", counted)
        ids, mask = pair.tokens(random_rows(rng, 5, 3))
        pair.generate(pair.ours, ids, mask, past_key_values=pair.cache())
        assert rows == [(layer, 2) for _ in range(11) for layer in range(3)]

    def test_samples(self, pair, rng, seed):
        ids, mask = pair.tokens(random_rows(rng, 9, 20))
        options = {"do_sample": True, "num_return_sequences": 3, "seed": seed}
        want = pair.generate(pair.eager, ids, mask, **options)
        cache = pair.cache(128)
        check_same(
            pair, pair.generate(pair.ours, ids, mask, past_key_values=cache, **options), want
        )
        assert cache.batch_size == 6
        assert cache.kv_cache.num_used == 3 * num_blocks([9 + 11, 20 + 11])

    def test_samples_of_a_prompt_that_is_computed_once(self, pair, rng, seed):
        ids, mask = pair.tokens(random_rows(rng, 18))
        many_ids, many_mask = ids.repeat(5, 1), mask.repeat(5, 1)
        options = {"do_sample": True, "seed": seed}
        want = pair.generate(pair.eager, many_ids, many_mask, **options)
        cache = pair.cache()
        logits(pair, pair.ours, ids[:, :-1], mask[:, :-1], past_key_values=cache)
        cache.batch_repeat_interleave(5)
        assert cache.batch_size == 5 and cache.kv_cache.num_used == num_blocks([17])
        got = pair.generate(pair.ours, many_ids, many_mask, past_key_values=cache, **options)
        check_same(pair, got, want)
        # Four full blocks of the prompt are everyone's; what follows is each row's own.
        assert cache.kv_cache.num_used == 4 + 5 * num_blocks([18 + 11 - 16])
        assert cache.kv_cache.statistics.copies == 4  # one row may keep the last block

    def test_beams_share_blocks(self, pair, rng, monkeypatch):
        lengths, num_beams = (18, 7), 4
        ids, mask = pair.tokens(random_rows(rng, *lengths))
        options = {"num_beams": num_beams, "num_return_sequences": 2, "output_scores": True}
        want = pair.generate(pair.eager, ids, mask, **options)
        cache = pair.cache(96)
        reorder, copies = cache.reorder_cache, []

        def checked(beam_idx):
            reorder(beam_idx)
            kv = cache.kv_cache
            for prompt, length in enumerate(lengths):
                beams = cache.sequences[prompt * num_beams : (prompt + 1) * num_beams]
                prefixes = {tuple(row.blocks[: length // 4]) for row in beams}
                assert len(prefixes) == 1, "beams of a prompt have its blocks more than once"
            own = sum(num_beams * num_blocks([cache.get_seq_length()]) for _ in lengths)
            shared = (num_beams - 1) * sum(length // 4 for length in lengths)
            assert kv.num_used <= own - shared
            copies.append(kv.statistics.copies)

        monkeypatch.setattr(cache, "reorder_cache", checked)
        got = pair.generate(pair.ours, ids, mask, past_key_values=cache, **options)
        np.testing.assert_array_equal(got.sequences.cpu(), want.sequences.cpu())
        scores = (pair.arrays.numpy(x.sequences_scores) for x in (got, want))
        compare.close(*scores, "float32", "scores", TOLERANCE)
        # A step copies the last block of a row at most.
        assert len(copies) == 12 and copies[0] == 0 < copies[-1]
        assert max(np.diff(copies)) <= len(lengths) * (num_beams - 1)

    def test_a_conversation_goes_on(self, pair, rng):
        """The second turn hides what was written after the end of the first row."""
        ids, mask = pair.tokens(random_rows(rng, 6, 17))
        first = pair.generate(pair.eager, ids, mask)
        answers = first.sequences[:, ids.shape[1] :].tolist()
        end = next(token for token in answers[0][3:9] if token not in answers[1])
        options = {"eos_token_id": end}
        cache = pair.cache()
        first = pair.generate(pair.ours, ids, mask, past_key_values=cache, **options)
        answer = first.sequences[:, ids.shape[1] :]
        length = 1 + answer[0].tolist().index(end)
        assert length < answer.shape[1] == 12
        assert len(cache.sequences[0]) == 6 + 11

        more, _ = pair.tokens(random_rows(rng, 9, 9))
        ids = pair.torch.cat([first.sequences, more], 1)
        shown = pair.torch.ones_like(ids[:, mask.shape[1] :])
        shown[0, length : answer.shape[1]] = 0
        mask = pair.torch.cat([mask, shown], 1)
        want = pair.generate(pair.eager, ids, mask)
        check_same(pair, pair.generate(pair.ours, ids, mask, past_key_values=cache), want)
        held = (mask.sum(1) + 11).tolist()
        assert [len(row) for row in cache.sequences] == held
        assert cache.kv_cache.num_used == num_blocks(held)

    def test_a_prompt_in_chunks(self, pair, rng):
        """Some chunks have padding alone, for one row or for all."""
        ids, mask = pair.tokens(random_rows(rng, 4, 11))
        padding = pair.torch.zeros_like(ids[:, :7])
        ids, mask = (pair.torch.cat([padding, x], 1) for x in (ids, mask))
        want = pair.generate(pair.eager, ids, mask)
        got = pair.generate(
            pair.ours, ids, mask, past_key_values=pair.cache(), prefill_chunk_size=5
        )
        check_same(pair, got, want)

    def test_guesses_are_taken_back(self, pair, rng, monkeypatch):
        """Prompt lookup feeds several tokens at once, and crops those that were wrong."""
        ids, mask = pair.tokens([random_rows(rng, 5)[0] * 5])
        # Before 5.13, prompt lookup needs an end-of-sequence token: one that never comes.
        options = {"output_logits": False, "max_new_tokens": 20, "eos_token_id": 10**6}
        want = pair.generate(pair.eager, ids, mask, **options)
        cache = pair.cache()
        crop, removed = cache.crop, []

        def count_and_crop(length):
            before = cache.get_seq_length()
            crop(length)
            removed.append(before - cache.get_seq_length())

        monkeypatch.setattr(cache, "crop", count_and_crop)
        got = pair.generate(
            pair.ours, ids, mask, past_key_values=cache, prompt_lookup_num_tokens=3, **options
        )
        np.testing.assert_array_equal(got.sequences.cpu(), want.sequences.cpu())
        assert max(removed) > 0
        assert cache.kv_cache.num_used == num_blocks([cache.get_seq_length()])

    def test_a_copy_goes_on_by_itself(self, pair, rng):
        prompts = random_rows(rng, 10, 14)
        ids, mask = pair.tokens(prompts)
        cache = pair.cache()
        logits(pair, pair.ours, ids, mask, past_key_values=cache)
        twin = copy.deepcopy(cache)
        kv = cache.kv_cache
        assert twin.kv_cache is kv and kv.num_used == num_blocks([10, 14])
        for one in (twin, cache, twin):
            more, shown = pair.tokens(random_rows(rng, 5, 5))
            now = pair.torch.cat([ids, more], 1), pair.torch.cat([mask, shown], 1)
            want = logits(pair, pair.eager, *now)
            got = logits(pair, pair.ours, more, now[1], past_key_values=one)
            compare.close(got, want, "float32", tolerance=TOLERANCE)
            one.crop(-5)
        del twin, one
        gc.collect()
        assert kv.sequences == cache.sequences and kv.num_used == num_blocks([10, 14])

    def test_rows_are_selected(self, pair, rng):
        prompts = random_rows(rng, 10, 14, 3)
        ids, mask = pair.tokens(prompts)
        cache = pair.cache()
        cache.batch_select_indices(pair.tensor([0]))  # of none
        cache.batch_repeat_interleave(2)
        assert cache.batch_size == -1 and not cache.is_initialized
        logits(pair, pair.ours, ids, mask, past_key_values=cache)
        cache.batch_select_indices(pair.tensor([2, 0]))
        assert cache.kv_cache.num_used == num_blocks([3, 10])
        ids, mask = ids[[2, 0]], mask[[2, 0]]
        more, shown = pair.tokens(random_rows(rng, 2, 2))
        ids, mask = pair.torch.cat([ids, more], 1), pair.torch.cat([mask, shown], 1)
        want = logits(pair, pair.eager, ids, mask)
        got = logits(pair, pair.ours, more, mask, past_key_values=cache)
        compare.close(got, want, "float32", tolerance=TOLERANCE)
        cache.batch_select_indices(pair.tensor([False, True]))
        assert cache.kv_cache.num_used == num_blocks([12])

    def test_too_few_blocks_change_nothing(self, pair, rng):
        prompts = random_rows(rng, 5, 9)
        ids, mask = pair.tokens(prompts)
        cache = pair.cache(8)
        for too_many, error in ((12, OutOfBlocks), (30, NeverFits)):
            logits(pair, pair.ours, ids, mask, past_key_values=cache)
            more, shown = pair.tokens(random_rows(rng, too_many, too_many))
            with pytest.raises(error):
                logits(
                    pair, pair.ours, more, pair.torch.cat([mask, shown], 1), past_key_values=cache
                )
            assert cache.get_seq_length() == 9 and cache.kv_cache.num_used == num_blocks([5, 9])
            now = pair.torch.cat([ids, more[:, :3]], 1), pair.torch.cat([mask, shown[:, :3]], 1)
            got = logits(pair, pair.ours, more[:, :3], now[1], past_key_values=cache)
            compare.close(got, logits(pair, pair.eager, *now), "float32", tolerance=TOLERANCE)
            cache.reset()
        ids, mask = pair.tokens(random_rows(rng, 33))
        with pytest.raises(NeverFits):
            logits(pair, pair.ours, ids, mask, past_key_values=cache)
        assert cache.kv_cache.num_used == 0

    def test_reset_and_end_give_blocks_back(self, pair, rng):
        cache = pair.cache()
        for lengths in ((4, 8), (13,), (2, 2, 2)):
            ids, mask = pair.tokens(random_rows(rng, *lengths))
            got = logits(pair, pair.ours, ids, mask, past_key_values=cache)
            compare.close(got, logits(pair, pair.eager, ids, mask), "float32", tolerance=TOLERANCE)
            assert cache.kv_cache.num_used == num_blocks(lengths)
            cache.reset()
            assert cache.kv_cache.num_used == 0 and cache.get_seq_length() == 0

    def test_a_step_that_broke_off_is_forgotten(self, pair, rng):
        ids, mask = pair.tokens(random_rows(rng, 5, 9))
        cache = pair.cache()
        logits(pair, pair.ours, ids, mask, past_key_values=cache)
        more, shown = pair.tokens(random_rows(rng, 6, 6))
        mask = pair.torch.cat([mask, shown], 1)

        def fail(*_):
            raise ZeroDivisionError

        for layer, new in enumerate((1, 3, 4)):
            hook = pair.ours.model.layers[layer].mlp.register_forward_hook(fail)
            with pytest.raises(ZeroDivisionError):
                now = more[:, :new], mask[:, : 9 + new]
                logits(pair, pair.ours, *now, past_key_values=cache)
            hook.remove()
        # The last layer had attended before it failed: the step was at its end for the cache.
        assert cache.get_seq_length() == 13
        cache.crop(-4)
        want = logits(pair, pair.eager, pair.torch.cat([ids, more], 1), mask)
        got = logits(pair, pair.ours, more, mask, past_key_values=cache)
        compare.close(got, want, "float32", tolerance=TOLERANCE)

    def test_forward_in_grad_mode_and_no_backward(self, pair, rng):
        ids, _ = pair.tokens(random_rows(rng, 9))
        made = pair.ours(ids, past_key_values=pair.cache(), labels=ids)
        with pair.torch.no_grad():
            want = pair.ours(ids, past_key_values=pair.cache(), labels=ids)
        got, want = (pair.arrays.numpy(x.logits.detach()) for x in (made, want))
        compare.close(got, want, "float32", tolerance=TOLERANCE)
        with pytest.raises(RuntimeError, match=r"^backward: .* PagedCache, .*torch\.no_grad\(\)"):
            made.loss.backward()
        pair.ours.zero_grad()  # of what comes after the last attention

    def test_compiled_gives_the_same_tokens(self, pair, rng):
        """With graphs broken around the cache."""
        torch = pair.torch
        torch.compiler.reset()
        counter = importlib.import_module("torch._dynamo.testing").CompileCounter()
        compiled = torch.compile(pair.ours, backend=counter)
        lengths = 9, 5
        ids, mask = pair.tokens(random_rows(rng, *lengths))
        made = {}
        for model in (pair.ours, compiled):
            cache, new, shown = pair.cache(), ids, mask
            for _ in range(4):
                found = logits(pair, model, new, shown, past_key_values=cache)
                made.setdefault(model, []).append(found)
                new = pair.tensor(found.argmax(-1)[:, None])
                shown = torch.cat([shown, torch.ones_like(new)], 1)
            assert [len(row) for row in cache.sequences] == [length + 3 for length in lengths]
        want, got = map(np.stack, made.values())
        compare.close(got, want, "float32", tolerance=TOLERANCE)
        np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))
        assert counter.frame_count > 3, "torch has compiled nothing"

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_half_precision(self, arrays, pair, rng, dtype):
        """No further from float32 than eager is, within a factor."""
        half = hf_llama.tiny(arrays, dtype)
        ids, mask = pair.tokens(random_rows(rng, *LENGTHS))
        cache = half.cache()
        for columns in (25, 26, 27, 33):
            now = ids[:, :columns], mask[:, :columns]
            new = now[0][:, cache.get_seq_length() :]
            got = logits(half, half.ours, new, now[1], past_key_values=cache)
            want, eager = logits(pair, pair.eager, *now), logits(half, half.eager, *now)
            live = now[1].sum(1).cpu().numpy() > 0
            error, eager_error = (
                np.linalg.norm(x[live].astype(np.float64) - want[live]) for x in (got, eager)
            )
            assert error <= 3 * eager_error, f"{columns} columns"
        assert cache.kv_cache.dtype == dtype

    def test_fp8(self, pair, rng):
        """A prompt attends to its keys and values as they are, all else to what the cache has."""
        torch, scales = pair.torch, {"k_scale": 0.11, "v_scale": [0.07, 0.3, 0.13]}

        def rounded(x, scale):
            return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale

        class RoundedCache(importlib.import_module("transformers").DynamicCache):
            def update(self, key, value, layer, *args, **options):
                is_prompt = self.get_seq_length(layer) == 0
                kept = super().update(
                    rounded(key, scales["k_scale"]), rounded(value, scales["v_scale"][layer]), layer
                )
                return (key, value) if is_prompt else kept

        ids, mask = pair.tokens(random_rows(rng, *LENGTHS))
        cache, other = pair.cache(dtype="fp8", **scales), RoundedCache()
        for columns in (slice(0, 30), slice(30, 31), slice(31, 33)):
            shown = mask[:, : columns.stop]
            want = logits(pair, pair.eager, ids[:, columns], shown, past_key_values=other)
            got = logits(pair, pair.ours, ids[:, columns], shown, past_key_values=cache)
            live = shown.sum(1).cpu().numpy() > 0
            # Where the models differ by float32's rounding, a value may be rounded the other way.
            error = np.linalg.norm(got[live] - want[live]) / np.linalg.norm(want[live])
            assert error < 0.02
        assert cache.kv_cache.dtype == "fp8"
        exact = logits(pair, pair.eager, ids, mask)
        assert np.linalg.norm(got - exact) > 0.02 * np.linalg.norm(exact)
