"""vLLM's functions with ours in their place, on the arrays of a GPU."""

import pytest

from support import frameworks
from support.vllm_suite import VllmSuite


@pytest.fixture(params=frameworks.writable(frameworks.device()), ids=lambda arrays: arrays.name)
def arrays(request):
    return request.param


class TestVllm(VllmSuite):
    pass
