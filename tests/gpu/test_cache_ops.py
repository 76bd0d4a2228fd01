"""The cache operators on a GPU, against the oracle."""

import pytest

from cupy_paged import gpu
from support import frameworks
from support.cache_suite import CacheSuite, ConvertSuite


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
    pass


class TestConvert(ConvertSuite):
    pass


class TestCacheOpsOnOlderChips(OnOlderChips):
    test_writes = CacheSuite.test_writes_the_tokens_and_nothing_else
    test_bits = CacheSuite.test_unquantised_bits_are_kept
    test_infinities = CacheSuite.test_quantised_infinities_saturate_and_nan_stays


class TestConvertOnOlderChips(OnOlderChips, ConvertSuite):
    pass
