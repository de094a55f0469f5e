"""The form in which runs of different layouts are compared: cutting and joining undo each other."""

import pytest
import torch
from helpers.canonical import Cut, Piece, assemble
from hypothesis import given
from hypothesis import strategies as st


def pieces_of(whole: torch.Tensor, dim: int, count: int, blocks: int) -> list[Piece]:
    cuts = [Cut(dim, index, count, blocks) for index in range(count)]
    return [Piece("w", cut, cut.take(whole)) for cut in cuts]


@given(st.integers(0, 1), st.integers(1, 4), st.sampled_from([1, 2]), st.randoms())
def test_parts_in_any_order_make_the_whole(dim, count, blocks, random):
    whole = torch.arange(24.0 * 24).reshape(24, 24)
    parts = pieces_of(whole, dim, count, blocks)
    ranks = [[piece] for piece in parts * 2]  # every part on two ranks
    random.shuffle(ranks)
    assert torch.equal(assemble(ranks)["w"], whole)


def test_a_gated_part_holds_gate_and_up_of_its_own_rows():
    whole = torch.arange(8)  # gate 0..3, up 4..7
    assert Cut(0, 1, 2, 2).take(whole).tolist() == [2, 3, 6, 7]


def test_replicas_that_drifted_apart_are_named():
    one, other = Piece("w", Cut(), torch.zeros(2)), Piece("w", Cut(), torch.ones(2))
    with pytest.raises(AssertionError, match="ranks 0, 1 on w: "):
        assemble([[one], [other]])


def test_a_missing_part_is_named():
    parts = pieces_of(torch.arange(8.0), 0, 4, 1)
    with pytest.raises(AssertionError, match=r"w: parts \[0, 1, 3\] of 4"):
        assemble([[parts[0]], [parts[1]], [parts[3]]])
