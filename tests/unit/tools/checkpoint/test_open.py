"""Checkpoints of both formats: every atom is found, with the value that was saved."""

import numpy as np
import pytest
import torch
from helpers import handmade
from helpers.handmade import Recipe, atoms, dist, legacy, read_back
from torch.distributed import checkpoint as dcp

from megatron_moe.tools.checkpoint.read.open import open_checkpoint
from megatron_moe.tools.checkpoint.stored.pickles import Literal

LAYOUTS = [
    {},
    {"tp": 2},
    {"tp": 2, "pp": 2, "ep": 2, "etp": 1},
    {"ep": 2, "dp": 2},
    {"tp": 2, "etp": 1},
    {"tp": 2, "ep": 2, "dp": 2},
    {"experts": 0, "tp": 2, "arguments": {"num_experts": None}},
]


def check(opened, recipe):
    for role in handmade.ROLES if recipe.optimizer else ("weight",):
        expected, found = atoms(recipe, role), read_back(opened, role)
        assert set(found) == set(expected)
        for name, whole in expected.items():
            assert (found[name] == whole).all(), (name, role)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("optimizer", [None, "plain", "distributed"])
def test_torch(tmp_path, layout, optimizer):
    recipe = Recipe(optimizer=optimizer, **layout)
    opened = open_checkpoint(legacy(tmp_path, recipe))
    check(opened, recipe)
    assert opened.location.form == "torch"
    assert (opened.layout.tp, opened.layout.pp, opened.layout.ep) == (
        recipe.tp,
        recipe.pp,
        recipe.ep,
    )
    assert opened.common["iteration"] == 7
    assert opened.inventory.num_experts == recipe.experts
    if optimizer is None:
        assert opened.optimizer is None
        assert opened.notes == ["no optimizer state"]
    else:
        assert (opened.optimizer.kind, opened.optimizer.step) == (optimizer, 7)
        assert (opened.optimizer.expert_groups is not None) == recipe.separate


@pytest.mark.parametrize("layout", [*LAYOUTS, {"etp": 2, "dp": 2}], ids=str)
@pytest.mark.parametrize("optimizer", [None, "plain", "fully", "dp"])
def test_torch_dist(tmp_path, layout, optimizer):
    recipe = Recipe(optimizer=optimizer, **layout)
    opened = open_checkpoint(dist(tmp_path, recipe))
    check(opened, recipe)
    assert (opened.location.form, opened.dialect) == ("torch_dist", "0.19")
    assert opened.stacked_layers
    assert opened.inventory.num_experts == recipe.experts
    assert set(opened.rng) == {(p, t) for p in range(recipe.pp) for t in range(recipe.tp)}
    assert isinstance(opened.rng[0, 0][0]["torch_rng_state"], Literal)
    if optimizer is None:
        assert opened.optimizer is None
    else:
        kind = {"fully": "fully_reshardable", "dp": "dp_reshardable"}.get(optimizer, "plain")
        assert (opened.optimizer.kind, opened.optimizer.step) == (kind, 7)


@pytest.mark.parametrize("write", [legacy, dist])
def test_the_optimizer_may_be_left_unread(tmp_path, write):
    recipe = Recipe(optimizer="plain")
    opened = open_checkpoint(write(tmp_path, recipe), optimizer=False)
    assert {atom.role for atom in opened.tensors.atoms} == {"weight"}
    assert opened.optimizer is None


def test_the_grouped_mlp_of_old(tmp_path):
    recipe = Recipe(tp=2)

    def regroup(name, state):
        model = state["model"]
        for layer in range(recipe.layers):
            prefix = f"decoder.layers.{layer}.mlp.experts."
            for number, linear in ((1, "linear_fc1"), (2, "linear_fc2")):
                keys = [f"{prefix}local_experts.{i}.{linear}.weight" for i in range(4)]
                together = torch.stack([model.pop(key).t() for key in keys])  # (e, in, out)
                # The parameter's own shape says otherwise: only memory is as above.
                shape = (handmade.HIDDEN, -1) if number == 1 else (-1, handmade.HIDDEN)
                model[f"{prefix}weight{number}"] = together.reshape(shape)

    opened = open_checkpoint(legacy(tmp_path, recipe, regroup))
    check(opened, recipe)
    assert opened.experts == "grouped_mlp"


@pytest.mark.parametrize("spelling", ["grouped", "single"])
def test_grouped_experts(tmp_path, spelling):
    recipe = Recipe(tp=2, ep=2, dp=2)

    def regroup(name, state):
        model = state["model"]
        for layer in range(recipe.layers):
            prefix = f"decoder.layers.{layer}.mlp.experts."
            for linear in ("linear_fc1", "linear_fc2"):
                mine = [model.pop(f"{prefix}local_experts.{i}.{linear}.weight") for i in range(2)]
                if spelling == "single":
                    model[f"{prefix}{linear}.weight"] = torch.stack(mine)
                for i, tensor in enumerate(mine if spelling == "grouped" else []):
                    model[f"{prefix}{linear}.weight{i}"] = tensor

    opened = open_checkpoint(legacy(tmp_path, recipe, regroup))
    check(opened, recipe)
    assert opened.experts == spelling


def test_tied_embeddings_are_one_atom(tmp_path):
    recipe = Recipe(pp=2, arguments={"untie_embeddings_and_output_weights": False})
    embedding = handmade.value(
        "embedding.word_embeddings.weight", (handmade.VOCAB, handmade.HIDDEN)
    )

    def tie(name, state):
        if "output_layer.weight" in state["model"]:
            state["model"]["output_layer.weight"] = embedding

    opened = open_checkpoint(legacy(tmp_path, recipe, tie))
    found = read_back(opened)
    assert "output_layer.weight" not in found
    assert (found["embedding.word_embeddings.weight"] == embedding.numpy()).all()


def test_virtual_stages_are_numbered_as_megatron_does(tmp_path):
    recipe = Recipe(pp=2, layers=4, arguments={"virtual_pipeline_model_parallel_size": 2})

    def split(name, state):
        model = state.pop("model")
        chunks = [{}, {}]
        for key, tensor in model.items():
            last = (
                key.startswith("decoder.layers.1.") or "final_layernorm" in key or "output" in key
            )
            chunks[last][key.replace("layers.1.", "layers.0.")] = tensor
        # Rank 0 was given layers 0 1 and rank 1 layers 2 3; with chunks they are 0 2 and 1 3.
        state["model0"], state["model1"] = chunks

    opened = open_checkpoint(legacy(tmp_path, recipe, split))
    found, expected = read_back(opened), atoms(recipe)
    for here, there in ((0, 0), (1, 2), (2, 1), (3, 3)):
        name = "decoder.layers.{}.self_attention.linear_qkv.weight"
        assert (found[name.format(here)] == expected[name.format(there)]).all()


def test_layers_apart_in_torch_dist(tmp_path):
    recipe = Recipe()

    def apart(saved):
        for key in [k for k in saved.tensors if k.startswith("decoder.layers.")]:
            (_, *shape), _ = saved.tensors.pop(key)
            whole = handmade.dist_tensors(recipe)[key]
            for layer in range(recipe.layers):
                own = key.replace("layers.", f"layers.{layer}.")
                saved.tensors[own] = (tuple(shape), [((0,) * len(shape), whole[layer])])

    opened = open_checkpoint(dist(tmp_path, recipe, apart))
    check(opened, recipe)
    assert not opened.stacked_layers


def test_unknown_tensors_of_torch_dist_pass_through(tmp_path):
    whole = torch.arange(6.0).reshape(2, 3)
    opened = open_checkpoint(
        dist(
            tmp_path,
            Recipe(),
            lambda saved: saved.tensors.update({"vision.w": ((2, 3), [((0, 0), whole)])}),
        )
    )
    assert opened.unknown == {"vision.w"}
    assert opened.inventory.unknown == ["vision.w"]
    assert (read_back(opened)["vision.w"] == whole.numpy()).all()


def test_what_torchs_own_saver_writes(tmp_path):
    """The hand-made files are like those of torch's saver: save with it and read."""
    recipe = Recipe()
    target = tmp_path / "iter_0000003"
    state: dict = dict(handmade.dist_tensors(recipe))
    state |= handmade.contents(recipe).objects
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.save(state, storage_writer=dcp.FileSystemWriter(target), planner=planner, no_dist=True)
    (target / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    check(open_checkpoint(tmp_path, iteration=3), recipe)


def test_torch_reads_the_hand_made_files(tmp_path):
    recipe = Recipe(tp=2)
    folder = dist(tmp_path, recipe) / "iter_0000007"
    expected = handmade.dist_tensors(recipe)
    state = {key: torch.zeros_like(tensor) for key, tensor in expected.items()}
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder), planner=planner, no_dist=True)
    for key, tensor in expected.items():
        assert np.array_equal(state[key].numpy(), tensor.numpy())
