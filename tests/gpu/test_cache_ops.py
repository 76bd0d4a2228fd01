"""The cache operators on a GPU, against the oracle."""

import numpy as np
import pytest

import cupy_paged
from cupy_paged import gpu
from support import compare, frameworks, oracle
from support.cache_suite import LAYOUTS, CacheSuite, ConvertSuite, tokens
from support.data import Case, empty_caches


@pytest.fixture(params=frameworks.writable(frameworks.device()), ids=lambda arrays: arrays.name)
def arrays(request):
    return request.param


class OnOlderChips:
    """The code paths of a Turing: software bfloat16 and float8."""

    @pytest.fixture
    def arrays(self, monkeypatch):
        monkeypatch.setattr(gpu, "emulated_sm", lambda: 75)
        return frameworks.device()[0]


class TestCacheOps(CacheSuite):
    @LAYOUTS
    def test_slots_past_the_end_are_skipped(self, arrays, rng, layout):
        case = Case(layout=layout)
        key, value = tokens(rng, case, 4)
        caches = empty_caches(case, 5, rng)  # of which three blocks are given
        made = [arrays.array(cache) for cache in caches]
        slot_mapping = arrays.array(np.array([48, 47, 79, 2**62]))
        written = arrays.array(key), arrays.array(value), *(cache[:3] for cache in made)
        if layout == "vllm":
            cupy_paged.reshape_and_cache(*written, slot_mapping, "auto", 1.0, 1.0)
        else:
            cupy_paged.reshape_and_cache_flash(
                *written, slot_mapping, "auto", 1.0, 1.0, layout=layout
            )
        slots = np.array([-1, 47, -1, -1])
        expected = oracle.reshape_and_cache(
            key, value, *caches, slots, layout=layout, block_size=case.block_size
        )
        for got, want in zip(made, expected, strict=True):
            compare.bitwise(arrays.numpy(got), want)


class TestConvert(ConvertSuite):
    pass


class TestCacheOpsOnOlderChips(OnOlderChips):
    test_writes = CacheSuite.test_writes_the_tokens_and_nothing_else
    test_bits = CacheSuite.test_unquantised_bits_are_kept
    test_infinities = CacheSuite.test_quantised_infinities_saturate_and_nan_stays


class TestConvertOnOlderChips(OnOlderChips, ConvertSuite):
    pass
