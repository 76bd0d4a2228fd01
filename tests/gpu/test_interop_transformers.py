"""Models of transformers over a `PagedCache`, on a GPU."""

import pytest

from support import frameworks, hf_llama
from support.transformers_suite import TransformersSuite, check_default_model

TORCH = [arrays for arrays in frameworks.device() if arrays.name == "torch"]


@pytest.fixture(params=TORCH, ids=lambda arrays: arrays.name)
def arrays(request):
    return request.param


class TestTransformers(TransformersSuite):
    pass


def test_default_model(arrays):
    check_default_model(hf_llama.default_model(arrays))
