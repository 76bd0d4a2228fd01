"""`merge_attn_states` on a GPU, against the oracle."""

import pytest

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
        monkeypatch.setenv("CUPY_PAGED_EMULATE_SM", "75")
        return frameworks.device()[0]
