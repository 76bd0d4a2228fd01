"""The ops that torch.compile takes, with tensors on a GPU: in graphs, and on streams of threads."""

import pytest

from support import compare, frameworks
from support.torch_derivatives_suite import TorchDerivativesSuite
from support.torch_ops_suite import (
    EAGER_AND_COMPILED,
    GraphBreaksSuite,
    Step,
    TorchOpsSuite,
    check_alike,
    check_threads,
)

TORCH = [arrays for arrays in frameworks.device() if arrays.name == "torch"]
# About 50 ms: far more than the host needs to queue what a test queues.
DELAY = 80_000_000


@pytest.fixture(params=TORCH, ids=lambda arrays: arrays.name)
def arrays(request):
    return request.param


class TestTorchOps(TorchOpsSuite, TorchDerivativesSuite):
    @EAGER_AND_COMPILED
    def test_the_current_stream_is_used(self, arrays, compiled):
        torch = arrays.torch
        step = Step(arrays)
        want = arrays.numpy(step.attend(*step.caches))
        run = step.compiled(step.attend) if compiled else step.attend
        stream = torch.cuda.Stream()
        right = step.query.clone()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            run(*step.caches)  # once before: compiling takes longer than the delay
            step.query.fill_(torch.nan)
            stream.synchronize()
            torch.cuda._sleep(DELAY)
            step.query.copy_(right)
            out = run(*step.caches)
            assert not stream.query(), "the call waited for the device"
            copied = out.clone()
        stream.synchronize()
        compare.bitwise(arrays.numpy(copied), want)

    @EAGER_AND_COMPILED
    def test_in_a_graph_that_torch_captures(self, arrays, compiled):
        torch = arrays.torch
        step = Step(arrays)
        caches = step.caches
        run = step.compiled(step.__call__) if compiled else step
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            run(*caches)  # once before, to compile
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            made = run(*caches)
        for seed in (10, 20, 30):
            new = Step(arrays, seed=seed)
            step.become(new)
            torch.cuda.synchronize()
            graph.replay()
            torch.cuda.synchronize()
            check_alike(step.results(made), new.results(new(*new.caches)))

    def test_in_graphs_that_the_compiler_captures(self, arrays):
        torch = arrays.torch
        step = Step(arrays)
        caches = [cache.contiguous() for cache in step.caches]
        for cache in caches:
            torch._dynamo.mark_static_address(cache)
        run = step.compiled(step.__call__, mode="reduce-overhead")
        for seed in range(5):  # the first calls are not replays
            new = Step(arrays, seed=seed)
            step.become(new)
            for cache, contents in zip(caches, new.caches, strict=True):
                cache.copy_(contents)
            torch.compiler.cudagraph_mark_step_begin()
            made = [x.clone() for x in run(*caches)]
            found = [arrays.numpy(x) for x in (*made, torch.stack(caches, 1))]
            check_alike(found, new.results(new(*new.caches)))

    def test_several_threads_on_streams_of_their_own(self, arrays):
        cuda = arrays.torch.cuda

        def on_a_stream(work):
            with cuda.stream(cuda.Stream()):
                work()

        check_threads(arrays, on_a_stream)


class TestGraphBreaks(GraphBreaksSuite):
    pass
