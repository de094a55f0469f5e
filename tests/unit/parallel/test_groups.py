from types import SimpleNamespace

import pytest
from helpers.alone import Alone, alone

from megatron_moe.parallel.groups import ExpertGroups, is_ordinary_expert


class Sized(Alone):
    def __init__(self, size):
        self._size = size

    def size(self):
        return self._size


def test_names_are_read_from_a_collection():
    names = ("ep", "expt_tp", "expt_dp", "tp_ep", "tp_cp", "tp_dp_cp")
    collection = SimpleNamespace(**{name: Sized(i + 1) for i, name in enumerate(names)})
    groups = ExpertGroups.from_collection(collection)
    assert [g.size() for g in (groups.ep, groups.etp, groups.edp)] == [1, 2, 3]


def test_missing_groups_are_named():
    with pytest.raises(ValueError, match=r"lacks expt_tp, tp_ep, tp_cp, tp_dp_cp"):
        ExpertGroups.from_collection(SimpleNamespace(ep=Alone()))


def test_experts_that_cannot_be_dealt_out():
    groups = ExpertGroups(
        ep=Sized(4), etp=Alone(), edp=None, tp_ep=Sized(4), tp_cp=Alone(), tp_dp_cp=Alone()
    )
    groups.check(8)
    with pytest.raises(ValueError, match=r"must divide num_moe_experts \(6\).* 1, 2, 3, 6"):
        groups.check(6)


def test_joint_group_of_another_size():
    groups = ExpertGroups(
        ep=Sized(2), etp=Sized(2), edp=None, tp_ep=Sized(2), tp_cp=Alone(), tp_dp_cp=Alone()
    )
    with pytest.raises(ValueError, match=r"joint expert group has 2 ranks"):
        groups.check(8)


def test_alone_needs_no_communication():
    alone().check(5)
    alone().bring_up()


def test_the_mark_for_ordinary_reduction():
    assert is_ordinary_expert(tp_size=2, etp_size=2, ep_size=1)
    assert not is_ordinary_expert(tp_size=2, etp_size=1, ep_size=1)
    assert not is_ordinary_expert(tp_size=1, etp_size=1, ep_size=2)
