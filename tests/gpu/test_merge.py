"""`merge_attn_states` on a GPU, against the oracle."""

import pytest

from cupy_paged import gpu
from support import frameworks
from support.merge_suite import MergeSuite


@pytest.fixture(params=frameworks.writable(frameworks.device()), ids=lambda arrays: arrays.name)
def arrays(request):
    return request.param


class TestMerge(MergeSuite):
    pass


class TestMergeOnOlderChips:
    test_selection = MergeSuite.test_an_empty_side_is_selected_away
    test_float8_output = MergeSuite.test_float8_output

    @pytest.fixture
    def arrays(self, monkeypatch):
        monkeypatch.setattr(gpu, "emulated_sm", lambda: 75)
        return frameworks.device()[0]
