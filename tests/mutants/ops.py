"""Faults in the Python of the ops: checks, plans, parameters, streams."""

# ruff: noqa: E501  (sources as they are)

from mutants.mutant import Mutant

ATTENTION = "tests/test_attention.py"
DEVICES = "tests/test_devices.py"
ERRORS = "tests/test_errors.py"
IN_FLIGHT = "tests/test_in_flight.py"
MERGE = "tests/test_merge.py"
OVERLAP = "tests/test_overlap.py"
PLAN = "tests/test_attention_plan.py"
PREPARED = "tests/test_prepared.py"

MUTANTS = (
    Mutant(
        "the last partition has no scratch",
        "cupy_paged/attention_kernels.py",
        "-(-capacity // partition_size_of(capacity)), 1",
        "capacity // partition_size_of(capacity), 1",
        PLAN,
    ),
    Mutant(
        "partitions are counted by the longest sequence alone",
        "cupy_paged/attention_kernels.py",
        "        -(-longest_of_most // MIN_PARTITION_SIZE), -(-capacity",
        "        -(-capacity",
        PLAN,
    ),
    Mutant(
        "partition size grows one token late",
        "cupy_paged/attention_kernels.py",
        "size * ENOUGH_PARTITIONS <= seq_len:",
        "size * ENOUGH_PARTITIONS < seq_len:",
        PLAN,
    ),
    Mutant(
        "v_scale in place of k_scale, packed",
        "cupy_paged/attention_gpu.py",
        'scale_fields("k_scale", call.k_scale if',
        'scale_fields("k_scale", call.v_scale if',
        PLAN,
    ),
    Mutant(
        "scales of unquantised caches reach the kernel",
        "cupy_paged/attention_gpu.py",
        "reads_scales = is_fp8(call.cache_dtype)",
        "reads_scales = True",
        PREPARED,
    ),
    Mutant(
        "a table's stride is its width, packed",
        "cupy_paged/attention_gpu.py",
        '"block_tables_stride": call.block_tables.strides[0]',
        '"block_tables_stride": call.block_tables.shape[1]',
        PLAN,
    ),
    Mutant(
        "a query's heads are a head apart",
        "cupy_paged/attention_gpu.py",
        '"query_stride_head": query.strides[1]',
        '"query_stride_head": head_size',
        PLAN,
    ),
    Mutant(
        "values go by the keys' strides",
        "cupy_paged/attention_gpu.py",
        'cache_strides("value_strides", cache.value_strides)',
        'cache_strides("value_strides", cache.key_strides)',
        PLAN,
    ),
    Mutant(
        "scratch has room for the output alone",
        "cupy_paged/attention_gpu.py",
        "else tmp_out_bytes + 2 * state_bytes",
        "else tmp_out_bytes",
        PLAN,
    ),
    Mutant(
        "a launch alike with other strides is repeated",
        "cupy_paged/prepared.py",
        "key += x.dtype, x.shape, x.strides, memory.device_id",
        "key += x.dtype, x.shape, memory.device_id",
        PREPARED,
    ),
    Mutant(
        "a launch alike at an odd address is repeated",
        "cupy_paged/prepared.py",
        "    if bits % WIDEST_ACCESS:\n        key += [pointer % WIDEST_ACCESS for pointer in pointers]\n",
        "",
        PREPARED,
    ),
    Mutant(
        "the op does not wait for the other framework",
        "cupy_paged/streams.py",
        "    for other in others:\n        gpu.wait(device, stream, other)\n    yield",
        "    yield",
        DEVICES,
    ),
    Mutant(
        "the other framework does not wait for the op",
        "cupy_paged/streams.py",
        "    yield\n    for other in others:\n        gpu.wait(device, other, stream)\n",
        "    yield\n",
        DEVICES,
    ),
    Mutant(
        "arrays known by protocol are not kept until the op has run",
        "cupy_paged/streams.py",
        'if a.framework in ("jax", "dlpack")]',
        'if a.framework == "jax"]',
        IN_FLIGHT,
    ),
    Mutant(
        "a capture waits for other streams",
        "cupy_paged/streams.py",
        "    if not is_alone and not gpu.is_capturing(device, stream):",
        "    if not is_alone:",
        DEVICES,
    ),
    Mutant(
        "what is queued is let go before it has run",
        "cupy_paged/in_flight.py",
        "while queue and queue[0][0].done:",
        "while queue:",
        IN_FLIGHT,
    ),
    Mutant(
        "an array on another device is taken",
        "cupy_paged/checks.py",
        "if a.device != leader.device:",
        "if a.device is HOST and leader.device is not HOST:",
        PREPARED,
    ),
    Mutant(
        "overlapping elements may be written",
        "cupy_paged/checks.py",
        "            if stride <= extent:\n                return False\n",
        "",
        ERRORS,
    ),
    Mutant(
        "a read-only array is written",
        "cupy_paged/checks.py",
        "if not a.writable:",
        "if False:",
        ERRORS,
    ),
    Mutant(
        "NaN is a scale",
        "cupy_paged/checks.py",
        "if not abs(value) <= FLOAT32_MAX:",
        "if abs(value) > FLOAT32_MAX:",
        ERRORS,
    ),
    Mutant(
        "a bool is an int",
        "cupy_paged/checks.py",
        "if isinstance(value, bool) or not isinstance(value, numbers.Integral):",
        "if not isinstance(value, numbers.Integral):",
        ERRORS,
    ),
    Mutant(
        "no array is too wide for its rows",
        "cupy_paged/arrays.py",
        "if size != 1 and stride != expected:",
        "if size != 1 and stride < expected:",
        ERRORS,
    ),
    Mutant(
        "an odd address is read",
        "cupy_paged/arrays.py",
        "if found.pointer % itemsize(found.dtype):",
        "if False:",
        ERRORS,
    ),
    Mutant(
        "alignment forgets the strides",
        "cupy_paged/arrays.py",
        "                bits |= self.strides[dim] * size\n",
        "                pass\n",
        PLAN,
    ),
    Mutant(
        "a cache of other blocks is taken",
        "cupy_paged/layouts.py",
        '_match("num_blocks", key_cache, num_blocks, value_cache, value_cache.shape[0])',
        "pass",
        ERRORS,
    ),
    Mutant(
        "HND is taken where NHD fits as well",
        "cupy_paged/layouts.py",
        "if len(fits) != 1:",
        "if not fits:",
        ERRORS,
    ),
    Mutant(
        "num_heads need be no multiple of num_kv_heads",
        "cupy_paged/attention_checks.py",
        "if num_heads % cache.num_kv_heads:",
        "if num_heads < cache.num_kv_heads:",
        ERRORS,
    ),
    Mutant(
        "max_seq_len bounds nothing",
        "cupy_paged/attention_checks.py",
        "    if max_seq_len is not None:\n        capacity = min(",
        "    if max_seq_len is not None:\n        capacity = max(",
        ATTENTION,
    ),
    Mutant(
        "partitions of a scratch are too small for max_seq_len",
        "cupy_paged/attention_checks.py",
        "    while size * num_partitions < max_seq_len and size < MAX_PARTITION_SIZE:\n        size *= 2\n",
        "    while (size * 2) * num_partitions < max_seq_len and size < MAX_PARTITION_SIZE:\n        size *= 2\n",
        ATTENTION,
    ),
    Mutant(
        "scratch may share the cache's memory",
        "cupy_paged/attention_checks.py",
        "checks.are_apart(scratch, [out, *call.arrays])",
        "checks.are_apart(scratch)",
        ERRORS,
    ),
    Mutant(
        "an array's last byte is not its own",
        "cupy_paged/overlap.py",
        "return _Span(a.pointer, a.pointer + reach, period",
        "return _Span(a.pointer, a.pointer + reach - 1, period",
        OVERLAP,
    ),
    Mutant(
        "partitions' scratch of the host is of all heads",
        "cupy_paged/attention_host.py",
        "written = np.broadcast_to(live[:, None], state.shape[:3])",
        "written = np.ones(state.shape[:3], bool)",
        ATTENTION,
    ),
    Mutant(
        "host attention drops the last partition",
        "cupy_paged/attention_host.py",
        "num_partitions = -(-longest // partition_size)",
        "num_partitions = max(longest // partition_size, 1)",
        ATTENTION,
    ),
    Mutant(
        "the merged output's scale is multiplied, host",
        "cupy_paged/merge.py",
        "merged *= np.float32(1.0) / np.float32(checks.host_scale(scale))",
        "merged *= np.float32(checks.host_scale(scale))",
        MERGE,
    ),
)
