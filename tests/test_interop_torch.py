"""The ops that torch.compile takes, with tensors on the host."""

import importlib
import inspect
import os
import subprocess
import sys

import pytest

import cupy_paged
from cupy_paged import graph_breaks
from cupy_paged.graph_breaks import REASON
from support import frameworks
from support.torch_derivatives_suite import TorchDerivativesSuite
from support.torch_ops_suite import GraphBreaksSuite, TorchOpsSuite

TORCH = frameworks.only("torch", frameworks.host())


@pytest.fixture(params=TORCH, ids=lambda arrays: arrays.name)
def arrays(request):
    return request.param


class TestTorchOps(TorchOpsSuite, TorchDerivativesSuite):
    pass


class TestGraphBreaks(GraphBreaksSuite):
    pass


def test_every_public_function_breaks_graphs():
    for name in cupy_paged.__all__:
        public = getattr(cupy_paged, name)
        if isinstance(public, type) and issubclass(public, Exception):
            continue
        members = vars(public).values() if isinstance(public, type) else [public]
        functions = [getattr(member, "fget", member) for member in members]
        marked = [f for f in functions if inspect.isfunction(f)]
        assert marked and all(vars(f)["_torchdynamo_disable_msg"] == REASON for f in marked), name


@pytest.mark.parametrize("error", [None, AttributeError, TypeError, AssertionError])
def test_a_dynamo_with_other_names_still_sees_the_mark(arrays, monkeypatch, error):
    told = []

    def add(folder):
        told.append(folder)
        if error:
            raise error("torch has changed")

    trace_rules = importlib.import_module("torch._dynamo.trace_rules")
    monkeypatch.setattr(trace_rules, "add", add)
    # Of its own, so that what the others have told Dynamo is not told again.
    monkeypatch.setattr(
        graph_breaks, "_skip_the_package", graph_breaks._skip_the_package.__wrapped__
    )
    assert cupy_paged.paged_attention._torchdynamo_disable
    assert told == ["cupy_paged"]


@pytest.mark.parametrize("name", ["paged_attention", "gather_cache"])
def test_what_is_compiled_first_in_a_process(arrays, name):
    """Then nothing has told Dynamo of the package before."""
    code = f"""
import warnings, torch
from support import frameworks
from support.torch_ops_suite import CALLS, check_alike, graph_counter

warnings.simplefilter("error", UserWarning)
(arrays,) = frameworks.only("torch", frameworks.host())
call, again = (CALLS[{name!r}](arrays) for _ in range(2))
found = call.run(torch.compile(call.function, backend=graph_counter()), arrays)
check_alike(found, again.run(again.function, arrays))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
