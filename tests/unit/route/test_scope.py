"""Whose tokens a rule looks at; gathering over several ranks is in test_routing_layouts.py."""

from types import SimpleNamespace

import pytest
import torch
from helpers.alone import Alone

from megatron_moe.route.scope import SCOPES, gather_scope, ranks_of


def test_the_ranks_of_each_scope():
    groups = SimpleNamespace(tp_cp="micro-batch", tp_dp_cp="global batch")
    found = [ranks_of(scope, groups) for scope in SCOPES]
    assert found == ["micro-batch", "micro-batch", "global batch"]


def test_unknown_scope():
    with pytest.raises(ValueError, match=r"scope \(day\) must be one of micro_batch, sequence"):
        ranks_of("day", None)


def test_one_rank_gathers_nothing():
    rows, valid = torch.randn(5, 2), torch.arange(5) < 3
    found = gather_scope(rows, valid, Alone())
    assert found.rows is rows
    assert found.valid_A is valid
    assert torch.equal(rows[found.mine], rows)
