"""Faults in what torch and JAX are told of the operators."""

from mutants.mutant import Mutant

NO_GRADIENT = "cupy_paged/interop/no_gradient.py"
TORCH_OPS = "cupy_paged/interop/torch_ops.py"
GRAPH_BREAKS = "cupy_paged/graph_breaks.py"
JAX_OPS = "cupy_paged/interop/jax_ops.py"
TORCH = "tests/test_interop_torch.py::TestTorchOps::"
BREAKS = "tests/test_interop_torch.py::TestGraphBreaks::"
JAX = "tests/test_interop_jax.py::TestJaxOps::"

MUTANTS = (
    Mutant(
        "to go back through a result of an op is no error",
        NO_GRADIENT,
        "return _NoGradient.apply(name, [made], *tensors) if tensors else made",
        "return made",
        TORCH + "test_to_go_back_through_a_result_is_an_error",
    ),
    Mutant(
        "a result of an op is a view, and cannot be changed in place",
        NO_GRADIENT,
        "return made[0]  #",
        "return made[0].view_as(made[0])  #",
        TORCH + "test_to_go_back_through_a_result_is_an_error",
    ),
    Mutant(
        "an output keeps the gradient of what was in it",
        TORCH_OPS,
        "        if torch.is_grad_enabled() or has_tangents():\n            refuse_gradients",
        "        if has_tangents():\n            refuse_gradients",
        TORCH + "test_nothing_is_written_where_a_gradient_is_followed",
    ),
    Mutant(
        "compiled code writes where a gradient is followed",
        TORCH_OPS,
        """    def run(*args: Any, **options: Any) -> None:
        refuse_gradients(name, _sources(args, options))

    return run""",
        """    def run(*args: Any, **options: Any) -> None:
        pass

    return run""",
        TORCH + "test_nothing_compiled_writes_where_a_gradient_is_followed",
    ),
    Mutant(
        "a tangent is lost without a word",
        NO_GRADIENT,
        "    if has_tangents() and any(",
        "    if False and any(",
        TORCH + "test_derivatives_are_refused",
    ),
    Mutant(
        "transforms of torch.func see zeros",
        TORCH_OPS,
        '        library.impl(name, inside, "FuncTorchDynamicLayerFrontMode")\n',
        "",
        TORCH + "test_derivatives_are_refused",
    ),
    Mutant(
        "caches in lists are not looked at for gradients",
        TORCH_OPS,
        "        given += group\n",
        "        pass\n",
        TORCH + "test_nothing_is_written_where_a_gradient_is_followed",
    ),
    Mutant(
        "autograd is not told of writes",
        TORCH_OPS,
        "                    increment_version(tensor)",
        "                    pass",
        TORCH + "test_autograd_notices_what_was_written",
    ),
    Mutant(
        "torch.compile is not told that caches are written",
        TORCH_OPS,
        "Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slot_mapping",
        "Tensor key_cache, Tensor value_cache, Tensor slot_mapping",
        TORCH + "test_reads_after_a_write_are_not_those_before",
    ),
    Mutant(
        "torch.compile is told of another dtype",
        TORCH_OPS,
        "query.new_empty(query.shape[:2], dtype=torch.float32)",
        "query.new_empty(query.shape[:2])",
        TORCH + "test_opcheck",
    ),
    Mutant(
        "a warning of compiled code names a line of ours",
        TORCH_OPS,
        "                stacklevel=_callers_level(),",
        "                stacklevel=2,",
        TORCH + "test_compiling_for_gradients_warns",
    ),
    Mutant(
        "torch.compile goes inside of functions",
        GRAPH_BREAKS,
        "            function._torchdynamo_disable = _YES\n",
        "            pass\n",
        BREAKS + "test_functions_are_called_as_they_are",
    ),
    Mutant(
        "a full graph is refused without what to do",
        GRAPH_BREAKS,
        "            function._torchdynamo_disable_msg = REASON\n",
        "",
        BREAKS + "test_a_full_graph_is_refused_with_what_to_do",
    ),
    Mutant(
        "XLA is not told that values are written",
        JAX_OPS,
        """        {"k_scale": k_scale, "v_scale": v_scale},
        options,
        written=("key_cache", "value_cache"),""",
        """        {"k_scale": k_scale, "v_scale": v_scale},
        options,
        written=("key_cache",),""",
        JAX + "test_repeats_the_function",
    ),
    Mutant(
        "XLA is told of another dtype of quantised merges",
        JAX_OPS,
        "dtype = output.dtype if output_scale is None else jnp.float8_e4m3fn",
        "dtype = output.dtype",
        JAX + "test_repeats_the_function",
    ),
)
