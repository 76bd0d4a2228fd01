"""The ops that torch.compile takes, with tensors on the host."""

import pytest

from support import frameworks
from support.torch_ops_suite import TorchOpsSuite

TORCH = frameworks.only("torch", frameworks.host())


@pytest.fixture(params=TORCH, ids=lambda arrays: arrays.name)
def arrays(request):
    return request.param


class TestTorchOps(TorchOpsSuite):
    pass
