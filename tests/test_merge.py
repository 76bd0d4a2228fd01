"""`merge_attn_states` on host arrays, against the oracle."""

import pytest

from support import frameworks
from support.merge_suite import MergeSuite


@pytest.fixture(params=frameworks.writable(frameworks.host()), ids=lambda arrays: arrays.name)
def arrays(request):
    return request.param


class TestMerge(MergeSuite):
    pass
