"""The cache operators on host arrays, against the oracle."""

import pytest

from support import frameworks
from support.cache_suite import CacheSuite, ConvertSuite


@pytest.fixture(params=frameworks.writable(frameworks.host()), ids=lambda arrays: arrays.name)
def arrays(request):
    return request.param


class TestCacheOps(CacheSuite):
    pass


class TestConvert(ConvertSuite):
    pass
