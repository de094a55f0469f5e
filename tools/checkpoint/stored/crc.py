"""CRC-32 of pieces put together, so that a record may be read or written in any order."""

from __future__ import annotations

from functools import lru_cache

_POLYNOMIAL = 0xEDB88320  # zip's, bit-reversed; bit 31 is x^0


def _times(a: int, b: int) -> int:
    """Multiply two polynomials over GF(2) modulo zip's."""
    product = 0
    while a:
        if a & 0x80000000:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@lru_cache(maxsize=4096)
def _shift(num_bytes: int) -> int:
    """x^(8·num_bytes) modulo the polynomial."""
    result, square = 0x80000000, 0x00800000  # 1, x^8
    while num_bytes:
        if num_bytes & 1:
            result = _times(result, square)
        square = _times(square, square)
        num_bytes >>= 1
    return result


def combine(first: int, second: int, second_bytes: int) -> int:
    """Return the CRC-32 of A ‖ B from those of A and B and the length of B in bytes."""
    return _times(_shift(second_bytes), first) ^ second


def zeros(num_bytes: int) -> int:
    """Return the CRC-32 of ``num_bytes`` zero bytes."""
    # The register after n zero bytes from the initial all-ones, inverted.
    return _times(_shift(num_bytes), 0xFFFFFFFF) ^ 0xFFFFFFFF


def joined(pieces: list[tuple[int, int, int]], size: int, gaps_are_zero: bool) -> int | None:
    """Return the CRC-32 of a record from its pieces.

    Args:
        pieces: ``(offset, bytes, crc)`` of parts, disjoint, in any order.
        size: Bytes of the record.
        gaps_are_zero: Whether bytes in no piece are known to be zero.

    Returns:
        None when bytes are in no piece and unknown.
    """
    crc, at = 0, 0
    for offset, length, part in sorted(pieces):
        if offset > at:
            if not gaps_are_zero:
                return None
            crc = combine(crc, zeros(offset - at), offset - at)
        crc = combine(crc, part, length)
        at = offset + length
    if at < size:
        return combine(crc, zeros(size - at), size - at) if gaps_are_zero else None
    return crc
