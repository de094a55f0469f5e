"""From ``torch_dist`` to ``torch_dist`` also goes what has no rule, or no certain cut."""

import pytest
import torch
from helpers.handmade import Recipe, dist

from megatron_moe.tools.checkpoint.errors import CheckpointError
from megatron_moe.tools.checkpoint.plan.compile import compile_plan
from megatron_moe.tools.checkpoint.plan.request import Request, resolve
from megatron_moe.tools.checkpoint.read.open import open_checkpoint
from megatron_moe.tools.checkpoint.read.values import AtomReader
from megatron_moe.tools.checkpoint.verify import compare, verify
from megatron_moe.tools.checkpoint.write.execute import Options, execute

# Multi-latent attention as Megatron 0.19 keys it: [layers, out, in], whatever the build.
_LATENT = {
    "decoder.layers.self_attention.linear_q_down_proj.weight": (2, 6, 8),
    "decoder.layers.self_attention.linear_q_up_proj.layer_norm_weight": (2, 6),
    "decoder.layers.self_attention.linear_q_up_proj.weight": (2, 12, 6),
    "decoder.layers.self_attention.linear_kv_down_proj.weight": (2, 5, 8),
    "decoder.layers.self_attention.linear_kv_up_proj.layer_norm_weight": (2, 4),
    "decoder.layers.self_attention.linear_kv_up_proj.weight": (2, 16, 4),
    "vision.patches.weight": (3, 7),
}


@pytest.fixture
def source(tmp_path):
    def add(saved):
        generator = torch.Generator().manual_seed(3)
        for key, shape in _LATENT.items():
            whole = torch.randn(shape, generator=generator)
            boxes = [((i, *(0,) * (whole.dim() - 1)), whole[i : i + 1]) for i in range(shape[0])]
            saved.tensors[key] = (shape, boxes)

    return open_checkpoint(dist(tmp_path / "source", Recipe(tp=2), add))


def test_every_element_arrives(source, tmp_path):
    request = Request(tp=1, pp=2, ep=2, etp=1)
    execute(compile_plan(source, resolve(source, request)), tmp_path / "out", Options())
    new = open_checkpoint(tmp_path / "out")
    assert new.unknown == {"vision.patches.weight"}
    assert verify(new).faults == []
    assert compare(source, new, {}, {}) == []
    with AtomReader(new) as reader:
        held = next(h for a, h in new.tensors.atoms.items() if a.name == "vision.patches.weight")
        values = next(reader.blocks(held)).view("float32")
    generator = torch.Generator().manual_seed(3)
    drawn = {key: torch.randn(shape, generator=generator) for key, shape in _LATENT.items()}
    assert torch.equal(torch.from_numpy(values), drawn["vision.patches.weight"])


def test_a_rank_of_its_own_is_refused(source):
    with pytest.raises(CheckpointError, match=r"vision\.patches\.weight is in no rule"):
        resolve(source, Request(form="torch"))
