"""CRC-32 of joined pieces against zlib's."""

import zlib

from megatron_moe.tools.checkpoint.stored import crc

DATA = bytes(range(256)) * 7


def test_combine_is_the_crc_of_the_whole():
    for cut in (0, 1, 255, 1000, len(DATA)):
        a, b = DATA[:cut], DATA[cut:]
        assert crc.combine(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(DATA)


def test_zeros():
    for count in (0, 1, 63, 64, 4096, 1_000_003):
        assert crc.zeros(count) == zlib.crc32(bytes(count))


def test_joined_takes_pieces_in_any_order():
    pieces = [(at, 256, zlib.crc32(DATA[at : at + 256])) for at in range(0, len(DATA), 256)]
    assert crc.joined(pieces[::-1], len(DATA), gaps_are_zero=False) == zlib.crc32(DATA)


def test_joined_fills_known_zeros():
    record = bytes(10) + DATA[:100] + bytes(5) + DATA[100:200] + bytes(77)
    pieces = [(10, 100, zlib.crc32(DATA[:100])), (115, 100, zlib.crc32(DATA[100:200]))]
    assert crc.joined(pieces, len(record), gaps_are_zero=True) == zlib.crc32(record)


def test_joined_does_not_guess_unknown_bytes():
    piece = (10, 100, zlib.crc32(DATA[:100]))
    assert crc.joined([piece], 110, gaps_are_zero=False) is None
    assert crc.joined([(0, *piece[1:])], 110, gaps_are_zero=False) is None
    assert crc.joined([(0, *piece[1:])], 100, gaps_are_zero=False) == piece[2]


def test_an_empty_record():
    assert crc.joined([], 0, gaps_are_zero=False) == zlib.crc32(b"")
    assert crc.joined([], 9, gaps_are_zero=True) == zlib.crc32(bytes(9))
