"""`merge_attn_states` on a GPU, against the oracle."""

import cupy
import pytest

import cupy_paged
from cupy_paged import gpu
from support import frameworks
from support.merge_suite import MergeSuite


@pytest.fixture(params=frameworks.writable(frameworks.device()), ids=lambda arrays: arrays.name)
def arrays(request):
    return request.param


class TestMerge(MergeSuite):
    pass


@pytest.mark.parametrize("head_size", [80, 96, 512])
@pytest.mark.parametrize("into", ["prefix", "suffix"])
def test_many_rows_replaced_in_place(head_size, into):
    """More rows than a device merges at a time, many of them of two warps, which drift apart."""
    shape = num_tokens, num_heads, _ = 40_000, 8, head_size
    random = cupy.random.default_rng(11)
    sides = [
        (
            random.standard_normal(shape, cupy.float32).astype(cupy.float16),
            random.standard_normal((num_heads, num_tokens), cupy.float32),
        )
        for _ in range(2)
    ]
    prefix, suffix = sides
    expected = cupy.empty_like(prefix[0]), cupy.empty_like(prefix[1])
    cupy_paged.merge_attn_states(expected[0], *prefix, *suffix, expected[1])
    for _ in range(5):
        prefix, suffix = ([array.copy() for array in side] for side in sides)
        output, lse = prefix if into == "prefix" else suffix
        cupy_paged.merge_attn_states(output, *prefix, *suffix, lse)
        assert (output == expected[0]).all()
        assert (lse == expected[1]).all()


class TestMergeOnOlderChips:
    test_selection = MergeSuite.test_an_empty_side_is_selected_away
    test_float8_output = MergeSuite.test_float8_output

    @pytest.fixture
    def arrays(self, monkeypatch):
        monkeypatch.setattr(gpu, "emulated_sm", lambda: 75)
        return frameworks.device()[0]
