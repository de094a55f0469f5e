"""Pipeline stages and places: which layers where, which files, and what cannot be."""

import pytest

from megatron_moe.tools.checkpoint.errors import CheckpointError
from megatron_moe.tools.checkpoint.model.layout import Layout, Pipeline, Places


def stages(layout: Layout, num_layers: int, **how) -> list[list[tuple[int, ...]]]:
    made = Pipeline(num_layers=num_layers, **how).stages(layout)
    return [[chunk.layers for chunk in rank] for rank in made]


def test_even():
    assert stages(Layout(pp=2), 4) == [[(0, 1)], [(2, 3)]]
    assert stages(Layout(), 3) == [[(0, 1, 2)]]


def test_virtual_stages_go_round_the_ranks():
    assert stages(Layout(pp=2, vpp=2), 8) == [[(0, 1), (4, 5)], [(2, 3), (6, 7)]]


def test_uneven_ends():
    assert stages(Layout(pp=3), 7, first=1) == [[(0,)], [(1, 2, 3)], [(4, 5, 6)]]
    assert stages(Layout(pp=3), 7, last=1) == [[(0, 1, 2)], [(3, 4, 5)], [(6,)]]
    assert stages(Layout(pp=2), 3, first=2, last=1) == [[(0, 1)], [(2,)]]
    assert stages(Layout(pp=2, vpp=2), 6, first=2) == [[(0,), (3,)], [(1, 2), (4, 5)]]


def test_counted_ends():
    both = {"count_embedding": True, "count_loss": True}
    assert stages(Layout(pp=2), 6, **both) == [[(0, 1, 2)], [(3, 4, 5)]]
    assert stages(Layout(pp=4), 6, **both) == [[(0,)], [(1, 2)], [(3, 4)], [(5,)]]
    assert stages(Layout(pp=2, vpp=2), 6, **both) == [[(0,), (3, 4)], [(1, 2), (5,)]]


def test_ends_of_the_model_are_on_the_ends_of_the_pipeline():
    made = Pipeline(num_layers=4, mtp_layers=1).stages(Layout(pp=2, vpp=2))
    flat = [made[0][0], made[1][0], made[0][1], made[1][1]]
    assert [chunk.embedding for chunk in flat] == [True, False, False, False]
    assert [chunk.output for chunk in flat] == [False, False, False, True]
    assert [chunk.mtp for chunk in flat] == [(), (), (), (0,)]


@pytest.mark.parametrize(
    ("text", "layout", "layers", "expected"),
    [
        ("Ett|ttL", Layout(pp=2), 4, [[(0, 1)], [(2, 3)]]),
        ("Et*2|t*2,L", Layout(pp=2), 4, [[(0, 1)], [(2, 3)]]),
        ("Et|(tt|)*2L", Layout(pp=2, vpp=2), 5, [[(0,), (3, 4)], [(1, 2), ()]]),
        ("E|t*3|t|L", Layout(pp=4), 4, [[()], [(0, 1, 2)], [(3,)], [()]]),
        ("Et | t*10 L", Layout(pp=2), 11, [[(0,)], [tuple(range(1, 11))]]),
        ("E((t|)*2t)*2L", Layout(pp=5), 6, [[(0,)], [(1,)], [(2, 3)], [(4,)], [(5,)]]),
    ],
)
def test_custom_layouts(text, layout, layers, expected):
    assert stages(layout, layers, text=text) == expected


def test_a_custom_layout_places_mtp_layers_and_ends():
    made = Pipeline(num_layers=2, mtp_layers=1, text="E|tt|m|L").stages(Layout(pp=4))
    chunks = [rank[0] for rank in made]
    assert [chunk.mtp for chunk in chunks] == [(), (), (0,), ()]
    assert [chunk.embedding for chunk in chunks] == [True, False, False, False]
    assert [chunk.output for chunk in chunks] == [False, False, False, True]


@pytest.mark.parametrize(
    ("how", "layout", "message"),
    [
        (
            {},
            Layout(pp=3),
            r"4 layers over PP 3 · VPP 1: 4 layers do not divide "
            r"over 3 stages; pass "
            r"--decoder-first-pipeline-num-layers / --decoder-last-pipeline-num-layers",
        ),
        (
            {},
            Layout(pp=2, vpp=4),
            r"a stage's \[2, 2\] layers do not divide by VPP; " r".*--pipeline-layout",
        ),
        ({"first": 5}, Layout(pp=2), r"-1 layers do not divide over 1 stages"),
        ({"first": 1, "last": 1}, Layout(pp=2), r"2 layers do not divide over 0 stages"),
        (
            {"text": "Et|tttL"},
            Layout(pp=4),
            r"'Et\|tttL' has 2 stages, PP·VPP is 4: make " r"them equal",
        ),
        (
            {"text": "Et|ttL"},
            Layout(pp=2),
            r"'Et\|ttL' holds 3 decoder and 0 MTP layers, the "
            r"checkpoint 4 and 0: make them equal",
        ),
    ],
)
def test_what_cannot_be_dealt_is_refused(how, layout, message):
    with pytest.raises(CheckpointError, match=message):
        Pipeline(num_layers=4, **how).stages(layout)


def test_sizes_below_one_are_refused():
    with pytest.raises(CheckpointError, match=r"--ep 0: a parallel size is at least 1"):
        Layout(ep=0)
    with pytest.raises(CheckpointError, match=r"--vpp 2 with --pp 1: virtual stages divide"):
        Layout(vpp=2)


def test_ranks_that_experts_do_not_divide_are_refused():
    with pytest.raises(
        CheckpointError,
        match=r"--tp 2 --dp 1: a stage's 2 ranks are not a multiple of EP·ETP "
        r"= 4·1 = 4; pass a --dp",
    ):
        _ = Layout(tp=2, ep=4, etp=1).expert_dp
    assert Layout(tp=2, ep=4, etp=1).smallest_dp() == 2
    assert Layout(tp=2, ep=4, etp=1, dp=4).expert_dp == 2
    assert Layout(ep=4, cp=3).smallest_dp() == 12


def test_what_follows_from_sizes():
    assert Layout(tp=4).expert_tp == 4
    assert not Layout(tp=4).separate_experts
    assert Layout(tp=4, etp=1).separate_experts
    assert Layout(ep=2).separate_experts
    assert Layout(tp=2, pp=3, dp=4).world_size == 24
    assert str(Layout(tp=2, pp=2, ep=2, etp=1)) == "TP2·PP2·EP2·ETP1"
    assert str(Layout(tp=2, ep=2, dp=2)) == "TP2·PP1·EP2·ETP2·DP2"


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        # What Megatron was seen to write.
        (Layout(tp=2, pp=2, ep=2, etp=1), [(0, 0, 0), (0, 1, 0), (1, 0, 1), (1, 1, 1)]),
        # Ranks 0..3 have tp 0 1 0 1 and ep 0 1 0 1: two files, not the product's four.
        (Layout(tp=2, ep=2, etp=1, dp=2), [(0, 0, 0), (1, 0, 1)]),
        (Layout(ep=2, dp=2), [(0, 0, 0), (0, 0, 1)]),
        (Layout(ep=2, dp=4), [(0, 0, 0), (0, 0, 1)]),
        (Layout(tp=2), [(0, 0, 0), (1, 0, 0)]),
        (Layout(tp=2, etp=1), [(0, 0, 0), (1, 0, 0)]),
        (Layout(tp=4, ep=2, etp=2), [(0, 0, 0), (1, 0, 0), (2, 0, 1), (3, 0, 1)]),
    ],
)
def test_files_of_a_layout(layout, expected):
    found = sorted((c.tp, c.pp, c.ep) for c in Places(layout).files)
    assert found == expected
