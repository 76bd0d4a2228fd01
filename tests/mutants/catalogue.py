"""All mutants."""

from mutants import (
    attention_kernels,
    block_pool,
    interop,
    kernel_cache,
    move_kernels,
    ops,
    reference,
)
from mutants.mutant import Mutant

MUTANTS: tuple[Mutant, ...] = (
    *attention_kernels.MUTANTS,
    *move_kernels.MUTANTS,
    *reference.MUTANTS,
    *ops.MUTANTS,
    *block_pool.MUTANTS,
    *kernel_cache.MUTANTS,
    *interop.MUTANTS,
)
