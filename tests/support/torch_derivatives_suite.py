"""What holds for `torch.ops.cupy_paged` where torch is asked for derivatives: there are none.

A test module mixes `TorchDerivativesSuite` into its subclass of `TorchOpsSuite`, whose fixtures it
uses.
"""

import linecache
import re
import warnings

import pytest

from support import compare
from support.torch_ops_suite import (
    BACKENDS,
    CALLS,
    EVERY_CALL,
    HEAD_SIZE,
    RETURNING,
    WRITING,
    Step,
    check_alike,
    normal,
    registered,
)


def differentiate(torch, mode, run, x):
    """Asks a function of a tensor for a derivative, in one of torch's ways."""
    func = torch.func
    if mode == "grad":
        func.grad(run)(x)
    elif mode == "vjp":
        func.vjp(run, x)
    elif mode == "jvp":
        func.jvp(run, (x,), (x,))
    elif mode == "linearize":
        func.linearize(run, x)
    else:
        forward_ad = torch.autograd.forward_ad
        with forward_ad.dual_level(), torch.no_grad():
            run(forward_ad.make_dual(x, x))


class TorchDerivativesSuite:
    @pytest.mark.parametrize("name", RETURNING)
    def test_to_go_back_through_a_result_is_an_error(self, arrays, name):
        torch = arrays.torch
        again = CALLS[name](arrays)
        want = again.run(again.function, arrays)
        for place in range(3):
            call = CALLS[name](arrays)
            op = getattr(registered(arrays), call.op)
            call.args[place].requires_grad_()
            made = op(*call.args, **call.keywords)
            made = made if isinstance(made, tuple) else (made,)
            check_alike([arrays.numpy(x.detach()) for x in made], want[: len(made)])
            message = rf"^backward: .*\.{call.op}, .* torch\.no_grad\(\)"
            for result in made:
                assert isinstance(result.grad_fn.name(), str)
                result.view(-1)[:1].zero_()  # it is no view, and may be written
                with pytest.raises(RuntimeError, match=message):
                    result.float().sum().backward()
            with torch.no_grad():
                made = op(*call.args, **call.keywords)
            assert not any(x.requires_grad for x in (made if isinstance(made, tuple) else [made]))

    def test_compiling_for_gradients_warns(self, arrays):
        torch, step = arrays.torch, Step(arrays)
        want = step.attend(*step.caches)
        step.query.requires_grad_()
        run = step.compiled(step.attend, backend="aot_eager")
        message = r"no gradient flows through .*\.paged_attention, "
        with pytest.warns(UserWarning, match=message) as warned:
            out = run(*step.caches)
        (found,) = {(x.filename, x.lineno) for x in warned if re.match(message, str(x.message))}
        assert linecache.getline(*found).strip() == "out = run(*step.caches)"
        assert not out.requires_grad
        compare.bitwise(arrays.numpy(out), arrays.numpy(want))
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("error", "no gradient")
            run(*step.caches)

    @pytest.mark.parametrize("name", WRITING)
    def test_nothing_is_written_where_a_gradient_is_followed(self, arrays, name):
        # An output would have the gradient of what was in it before, and none of the inputs.
        make, torch = CALLS[name], arrays.torch
        before = [arrays.numpy(x) for x in make(arrays).tensors(arrays)]
        again = make(arrays)
        want = again.run(again.function, arrays)
        for place in range(len(make(arrays).floats(arrays))):
            call = make(arrays)
            op = getattr(registered(arrays), call.op)
            leaf = call.floats(arrays)[place].requires_grad_()
            made = leaf.view_as(leaf)  # follows it, and is no leaf
            for followed in (leaf, made):
                given = call.replacing(leaf, followed)
                with pytest.raises(RuntimeError, match=rf"\.{call.op}: .* torch\.no_grad\(\)"):
                    op(*given.args, **given.keywords)
            check_alike([arrays.numpy(x.detach()) for x in call.tensors(arrays)], before)
            with torch.no_grad():
                op(*call.args, **call.keywords)
            check_alike([arrays.numpy(x.detach()) for x in call.tensors(arrays)], want)

    @BACKENDS
    @pytest.mark.parametrize("followed", ["key", "pair"])
    def test_nothing_compiled_writes_where_a_gradient_is_followed(self, arrays, backend, followed):
        step = Step(arrays)
        want = arrays.numpy(step.pair).copy()
        getattr(step, followed).requires_grad_()
        run = step.compiled(step.write, backend=backend)
        with pytest.raises(RuntimeError, match=r"reshape_and_cache_flash: no gradient flows"):
            run(*step.caches)
        compare.bitwise(arrays.numpy(step.pair.detach()), want)
        with arrays.torch.no_grad():
            run(*step.caches)
        assert (arrays.numpy(step.pair.detach()) != want).any()

    @EVERY_CALL
    @pytest.mark.parametrize("mode", ["grad", "vjp", "jvp", "linearize", "dual"])
    def test_derivatives_are_refused(self, arrays, make, mode):
        # Functions see what a transform has wrapped, and would give it zeros.
        torch = arrays.torch
        before = [arrays.numpy(x) for x in make(arrays).tensors(arrays)]
        for place in range(len(make(arrays).floats(arrays))):
            call = make(arrays)
            op = getattr(registered(arrays), call.op)
            tensor = call.floats(arrays)[place]

            def run(x, op=op, call=call, tensor=tensor):
                given = call.replacing(tensor, x)
                op(*given.args, **given.keywords)
                return x.float().sum()

            message = rf"\.{call.op}(: no gradient flows|, which is for inference)"
            with pytest.raises(RuntimeError, match=message):
                differentiate(torch, mode, run, tensor)
            if mode != "linearize":  # which calls it once before it asks for a derivative
                check_alike([arrays.numpy(x) for x in call.tensors(arrays)], before)

    def test_a_constant_inside_of_a_transform(self, arrays):
        # As the errors say: under torch.no_grad(), or of detached tensors.
        torch, step = arrays.torch, Step(arrays)
        query = step.query.clone()

        def product(x):
            step.query = x
            with torch.no_grad():
                constant = step.attend(*step.caches)
            return (x * constant).sum()

        def detached(x):
            step.query = x.detach()
            return x * step.attend(*step.caches)

        want = step.attend(*step.caches)
        compare.bitwise(arrays.numpy(torch.func.grad(product)(query)), arrays.numpy(want))
        ones = torch.ones_like(query)
        _, tangent = torch.func.jvp(detached, (query,), (ones,))
        compare.bitwise(arrays.numpy(tangent), arrays.numpy(want))

    def test_autograd_notices_what_was_written(self, arrays):
        step = Step(arrays)
        weight = normal(arrays, HEAD_SIZE).requires_grad_()
        for written in (0, 1):
            product = (step.caches[written] * weight).sum()
            step.write(*step.caches)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                product.backward()
