"""Element types by torch's name: size, storage class and the integer numpy type that carries it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DType:
    """An element type.

    Args:
        name: Torch's, as in ``torch.bfloat16``.
        itemsize: Bytes.
        storage: Class of typed storage that `torch.save` names; empty for types without one.
    """

    name: str
    itemsize: int
    storage: str

    @property
    def carrier(self) -> str:
        """Numpy type of equal size; moving bytes needs no arithmetic."""
        return f"<u{self.itemsize}" if self.itemsize <= 8 else "<c16"


_ALL = [
    DType("float64", 8, "DoubleStorage"),
    DType("float32", 4, "FloatStorage"),
    DType("float16", 2, "HalfStorage"),
    DType("bfloat16", 2, "BFloat16Storage"),
    DType("int64", 8, "LongStorage"),
    DType("int32", 4, "IntStorage"),
    DType("int16", 2, "ShortStorage"),
    DType("int8", 1, "CharStorage"),
    DType("uint8", 1, "ByteStorage"),
    DType("bool", 1, "BoolStorage"),
    DType("complex64", 8, "ComplexFloatStorage"),
    DType("complex128", 16, "ComplexDoubleStorage"),
    DType("float8_e4m3fn", 1, ""),
    DType("float8_e5m2", 1, ""),
    DType("uint16", 2, ""),
    DType("uint32", 4, ""),
    DType("uint64", 8, ""),
]
BY_NAME = {dtype.name: dtype for dtype in _ALL}
BY_STORAGE = {dtype.storage: dtype for dtype in _ALL if dtype.storage}
FLOAT32 = BY_NAME["float32"]
