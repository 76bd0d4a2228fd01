"""GGUF: hyperparameters by key, tensors by name, quantised ones expanded to float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

_REQUIRED = object()


class Checkpoint:
    """One GGUF file. Remembers which tensors were asked for, so that none is missed in silence."""

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"model: no file at {path}")
        try:
            self._reader = GGUFReader(path)
        except ValueError as error:
            raise ValueError(f"model: {path} is no GGUF file ({error})") from error
        self.path = path
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self._unread = set(self._tensors)

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """The metadata value of `key`."""
        field = self._reader.get_field(key)
        if field is not None:
            return field.contents()
        if default is _REQUIRED:
            raise ValueError(f"model: {self.path} has no {key}, which this program needs")
        return default

    def has(self, name: str) -> bool:
        return name in self._tensors

    def tensor(self, name: str) -> np.ndarray:
        """Tensor `name` as float32; a matrix is [out_features, in_features]."""
        if name not in self._tensors:
            raise ValueError(f"model: {self.path} has no tensor {name}")
        tensor = self._tensors[name]
        self._unread.discard(name)
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise ValueError(
                f"model: tensor {name} is {kind}, which the gguf package cannot expand; "
                "use a file in Q4_0, Q4_1, Q8_0, a K-quant, F16, BF16 or F32"
            ) from error
        # A view of the file would turn every product into page faults, and pins the mapping.
        return np.array(values, dtype=np.float32)

    def unread(self) -> list[str]:
        """Tensors that the file holds and nobody asked for."""
        return sorted(self._unread)
