"""Times that were published or taken in earlier runs, on one H100 80GB HBM3. Not measured here.

Microseconds, by shape and dtypes. FlashInfer's is the better of its CUDA-core and tensor-core
kernels. They hold on that device only, and b256_rag had other lengths of the same distribution.
"""

from __future__ import annotations

Key = tuple[str, str]


def _times(dtypes: str, **microseconds: float) -> dict[Key, float]:
    return {(shape, dtypes): time for shape, time in microseconds.items()}


_BF16_FLOORS = _times(
    "bf16", b1_8k=13.6, b1_128k=177.7, b8_4k=46.0, b64_2k=177.7, b128_1k=177.7, b256_rag=722,
    b32_mha=704.7, b32_g8=354.5, b64_d64=177.7, b32_d256=177.7,
)  # fmt: skip
_FP8_FLOORS = _times(
    "fp8", b1_8k=7.5, b1_128k=90.2, b8_4k=24.3, b64_2k=90.2, b256_rag=361, b32_g8=177.7
)
FLOORS = _BF16_FLOORS | _FP8_FLOORS

_FLASHINFER_BF16 = _times(
    "bf16", b1_8k=20.3, b1_128k=191.8, b8_4k=56.5, b64_2k=188.6, b128_1k=192.7, b256_rag=748.9,
    b32_mha=711.7, b32_g8=367.1, b64_d64=192.8, b32_d256=194.8,
)  # fmt: skip
_XQA_BF16 = _times(
    "bf16", b1_8k=20.5, b1_128k=207.5, b8_4k=58.4, b64_2k=198.3, b256_rag=781.3, b32_g8=452.2
)
_XQA_FP8 = _times(
    "fp8", b1_8k=15.5, b1_128k=129.7, b8_4k=33.8, b64_2k=106.2, b256_rag=462.3, b32_g8=190.0
)
_JAX_BF16 = _times(
    "bf16", b1_8k=64.1, b1_128k=318.6, b8_4k=94.6, b64_2k=264.2, b128_1k=271.2, b256_rag=1073.3,
    b32_mha=944.6, b32_g8=497.2,
)  # fmt: skip
_VLLM_V2_BF16 = _times(
    "bf16", b1_8k=30.5, b1_128k=366.0, b8_4k=103.4, b64_2k=342.9, b128_1k=345.6, b256_rag=1384.4,
    b32_mha=723.2, b32_g8=1246.8, b64_d64=411.0, b32_d256=480.8,
)  # fmt: skip

ATTENTION: dict[str, dict[Key, float]] = {
    "FlashInfer 0.6.4": _FLASHINFER_BF16 | _times("fp8", b1_128k=128.2, b64_2k=134.8),
    "XQA": _XQA_BF16 | _XQA_FP8,
    "JAX 0.11 Pallas": _JAX_BF16,
    "vLLM v2": _VLLM_V2_BF16,
}

MERGE = {"FlashInfer 0.6.4": {"512x32x128": 9.4, "4096x32x128": 38.9, "16384x32x128": 138.7}}


def target_efficiency(kv_bytes: int) -> float | None:
    """The efficiency that an attention op should reach. None below 16 MiB."""
    mib = kv_bytes / 2**20
    for least, target in ((256, 0.95), (128, 0.92), (32, 0.88), (16, 0.75)):
        if mib >= least:
            return target
    return None
