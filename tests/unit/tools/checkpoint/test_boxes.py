"""Boxes: examples that can be read; the laws are in tests/property."""

from megatron_moe.tools.checkpoint.model.boxes import (
    boxes_of_range,
    fault_of_cover,
    overlap,
    row_major,
)


def test_row_major():
    assert row_major((2, 3, 4)) == (12, 4, 1)
    assert row_major(()) == ()


def test_overlap():
    assert overlap((0, 0), (4, 4), (2, 3), (9, 9)) == ((2, 3), (2, 1))
    assert overlap((0,), (4,), (4,), (4,)) is None
    assert overlap((), (), (), ()) == ((), ())


def test_a_range_is_a_tail_whole_rows_and_a_head():
    assert list(boxes_of_range((4, 5), 3, 17)) == [
        ((0, 3), (1, 2), 3),
        ((1, 0), (2, 5), 5),
        ((3, 0), (1, 2), 15),
    ]
    assert list(boxes_of_range((4, 5), 6, 8)) == [((1, 1), (1, 2), 6)]
    assert list(boxes_of_range((4, 5), 5, 5)) == []
    assert list(boxes_of_range((), 0, 1)) == [((), (), 0)]


def test_faults_of_a_cover_are_named():
    assert fault_of_cover([((0, 0), (2, 4)), ((2, 0), (2, 4))], (4, 4)) is None
    assert fault_of_cover([((), ())], ()) is None
    assert fault_of_cover([((0, 0), (2, 4))], (4, 4)) == "8 of 16 elements are in no part"
    assert fault_of_cover([], (3,)) == "3 of 3 elements are in no part"
    assert fault_of_cover([((0,), (3,)), ((2,), (2,))], (4,)) == (
        "the parts at (0,) (3,) and (2,) (2,) overlap"
    )
    assert fault_of_cover([((0, 0), (2, 4)), ((0, 0), (2, 4))], (4, 4)) == (
        "the parts at (0, 0) (2, 4) and (0, 0) (2, 4) overlap"
    )
    assert (
        fault_of_cover([((2,), (3,))], (4,)) == "the part at (2,) of shape (3,) lies outside (4,)"
    )
    assert fault_of_cover([((-1,), (3,))], (4,)) == (
        "the part at (-1,) of shape (3,) lies outside (4,)"
    )


def test_parts_of_another_rank_are_a_fault():
    assert fault_of_cover([((0, 0), (4, 4))], (4,)) == (
        "the part at (0, 0) of shape (4, 4) lies outside (4,)"
    )


def test_empty_parts_cover_nothing():
    assert fault_of_cover([((0,), (0,)), ((0,), (4,))], (4,)) is None
