"""``torch`` checkpoints that cannot be read: what is said of each."""

import pickle

import pytest
import torch
from helpers.handmade import Recipe, legacy

from megatron_moe.tools.checkpoint.errors import CheckpointError
from megatron_moe.tools.checkpoint.read.open import open_checkpoint

QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
FC1 = "decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight"


def refuse(folder, message, **options):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder, **options)


def remove(folder, name):
    for path in (folder / "iter_0000007" / name).iterdir():
        path.unlink()
    (folder / "iter_0000007" / name).rmdir()


@pytest.mark.parametrize("kept", [0, 100, 0.5, -1, -30])
def test_a_truncated_file(tmp_path, kept):
    folder = legacy(tmp_path, Recipe())
    path = folder / "iter_0000007" / "mp_rank_00" / "model_optim_rng.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept) if isinstance(kept, float) else kept])
    refuse(folder, r"mp_rank_00/model_optim_rng\.pt: .*truncated.*Restore it from a copy")


def test_a_truncated_optimizer_file(tmp_path):
    folder = legacy(tmp_path, Recipe(optimizer="distributed"))
    path = folder / "iter_0000007" / "mp_rank_00" / "distrib_optim.pt"
    path.write_bytes(path.read_bytes()[:-500])
    refuse(folder, r"mp_rank_00/distrib_optim\.pt: .*truncated")


def test_an_incomplete_folder(tmp_path):
    folder = legacy(tmp_path, Recipe(tp=2))
    (folder / "iter_0000007" / "mp_rank_01" / "model_optim_rng.pt").unlink()
    refuse(folder, r"mp_rank_01: model_optim_rng\.pt is missing: an incomplete copy or save")


def test_a_folder_of_another_name(tmp_path):
    folder = legacy(tmp_path, Recipe())
    (folder / "iter_0000007" / "mp_rank_00_old").mkdir()
    refuse(folder, r"mp_rank_00_old: not a name that Megatron gives")


def test_a_missing_rank(tmp_path):
    folder = legacy(tmp_path, Recipe(tp=2, ep=2, dp=2))
    remove(folder, "mp_rank_01_001")
    refuse(
        folder,
        r"no mp_rank file holds pp 0, ep 1, etp 1 of TP2·PP1·EP2·ETP2·DP2: "
        r"an incomplete copy, or a "
        r"save that was cut off\. Complete the copy, or take another iteration",
    )


def test_a_missing_stage(tmp_path):
    folder = legacy(tmp_path, Recipe(pp=2))
    remove(folder, "mp_rank_00_001")
    refuse(folder, r"no mp_rank file holds tp 0, pp 1 of TP1·PP2·EP1")


def test_files_that_megatron_up_to_0_18_did_not_write(tmp_path):
    folder = legacy(tmp_path, Recipe(tp=2, etp=1))
    remove(folder, "mp_rank_01")
    refuse(
        folder,
        r"no mp_rank file holds tp 1, pp 0 of TP2·PP1·EP1·ETP1: Megatron up to "
        r"0\.18 writes too few files "
        r"when TP > EP·ETP \(issue 4200\)",
    )


def test_expert_shards_that_were_lost(tmp_path):
    folder = legacy(tmp_path, Recipe(tp=1, etp=2, dp=2))
    refuse(
        folder,
        r"saved with ETP 2 > TP 1: the torch format has no ETP in its file "
        r"names, so ranks overwrote "
        r"one another and part of every expert is gone\. .*--ckpt-format torch_dist",
    )


@pytest.mark.parametrize(
    ("groups", "said"), [(2, ""), (1, r" \(and with grouped queries no conversion")]
)
def test_old_versions(tmp_path, groups, said):
    arguments = {"num_query_groups": groups, "group_query_attention": groups == 1}
    folder = legacy(
        tmp_path,
        Recipe(arguments=arguments),
        lambda name, state: state.update(checkpoint_version=1.0),
    )
    refuse(
        folder,
        rf"checkpoint version 1\.0 orders Q, K and V otherwise{said}.*load it with Megatron 0\.12",
    )


def test_no_arguments(tmp_path):
    folder = legacy(tmp_path, Recipe(), lambda name, state: state.pop("args"))
    refuse(
        folder, r"holds no 'args', from which the parallel sizes are known: not saved by Megatron"
    )


def test_no_model(tmp_path):
    folder = legacy(tmp_path, Recipe(), lambda name, state: state.pop("model"))
    refuse(folder, r"mp_rank_00/model_optim_rng\.pt: holds no 'model'")


def test_chunks_that_the_arguments_do_not_know(tmp_path):
    def split(name, state):
        state["model0"], state["model1"] = state.pop("model"), {}

    refuse(legacy(tmp_path, Recipe(pp=2), split), r"holds 2 model chunks, its arguments say VPP 1")


def test_layers_that_the_arguments_do_not_know(tmp_path):
    folder = legacy(tmp_path, Recipe(arguments={"num_layers": 3}))
    refuse(folder, r"its arguments say 3 layers, its files hold 2: a file is missing")


def test_mtp_layers_that_the_arguments_do_not_know(tmp_path):
    folder = legacy(tmp_path, Recipe(arguments={"mtp_num_layers": 1}))
    refuse(folder, r"its arguments say 1 MTP layers, its files hold 0")


@pytest.mark.parametrize("said", [8, 2])
def test_experts_that_the_arguments_do_not_know(tmp_path, said):
    folder = legacy(tmp_path, Recipe(arguments={"num_experts": said}))
    refuse(folder, rf"its arguments say {said} experts, its tensors hold 4")


def test_experts_where_the_arguments_know_none(tmp_path):
    folder = legacy(tmp_path, Recipe(arguments={"num_experts": None}))
    refuse(
        folder,
        r"holds .*\.mlp\.experts\..*, its arguments say None experts with EP 1: files of different",
    )


def test_a_lost_layer(tmp_path):
    def lose(name, state):
        for key in [k for k in state["model"] if k.startswith("decoder.layers.0.")]:
            del state["model"][key]

    refuse(legacy(tmp_path, Recipe(), lose), r"decoder layers \[0\] are missing")


def test_a_lost_expert(tmp_path):
    folder = legacy(tmp_path, Recipe(), lambda name, state: state["model"].pop(FC1))
    refuse(folder, r"layer 0: mlp\.experts\.linear_fc1\.weight of experts \[1\] is missing")


def test_an_unknown_key(tmp_path):
    name = "decoder.layers.0.mixer.in_proj.weight"
    folder = legacy(
        tmp_path, Recipe(), lambda _, state: state["model"].update({name: torch.ones(2)})
    )
    refuse(
        folder,
        r"mp_rank_00/model_optim_rng\.pt: "
        r"decoder\.layers\.0\.mixer\.in_proj\.weight is in no rule: .*"
        r"Add a Rule for it \(megatron_moe\.checkpoint_rules, docs/checkpoints\.md\)",
    )


def test_what_is_no_tensor(tmp_path):
    folder = legacy(tmp_path, Recipe(), lambda _, state: state["model"].update({QKV: [1]}))
    refuse(folder, r"linear_qkv\.weight is list, not a tensor")


def test_shapes_that_differ_between_files(tmp_path):
    def spoil(name, state):
        if name == "mp_rank_01":
            state["model"][QKV] = torch.ones(8, 4)

    refuse(
        legacy(tmp_path, Recipe(tp=2), spoil),
        r"mp_rank_01/model_optim_rng\.pt: "
        r"decoder\.layers\.0\.self_attention\.linear_qkv\.weight is "
        r"float32\[16, 4\] here and float32\[12, 4\] elsewhere: files of different runs were mixed",
    )


def test_types_that_differ_between_files(tmp_path):
    def spoil(name, state):
        if name == "mp_rank_01":
            state["model"][QKV] = state["model"][QKV].bfloat16()

    refuse(legacy(tmp_path, Recipe(tp=2), spoil), r"is bfloat16\[12, 4\] here and float32\[12, 4\]")


def test_stages_that_differ_between_files(tmp_path):
    def spoil(name, state):
        if name == "mp_rank_01":
            for key in [k for k in state["model"] if k.startswith("decoder.layers.1.")]:
                del state["model"][key]

    refuse(
        legacy(tmp_path, Recipe(tp=2), spoil),
        r"mp_rank_01/.*: holds \(1, 0\) decoder and MTP layers, another "
        r"file of the same stage \(2, 0\)",
    )


def test_a_tensor_that_one_file_lacks(tmp_path):
    def spoil(name, state):
        if name == "mp_rank_01":
            del state["model"][QKV]

    refuse(
        legacy(tmp_path, Recipe(tp=2), spoil),
        r"decoder\.layers\.0\.self_attention\.linear_qkv\.weight: 24 of 48 "
        r"elements are in no part: "
        r"it is not whole",
    )


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("layer_wise_optimizer_0.pt", r"layer-wise \(Muon\) optimizer state"),
        ("modelopt_state.pt", "ModelOpt state"),
        ("adapter_model.pt", "LoRA adapters"),
    ],
)
def test_foreign_files(tmp_path, file, what):
    folder = legacy(tmp_path, Recipe())
    (folder / "iter_0000007" / "mp_rank_00" / file).touch()
    refuse(folder, rf"mp_rank_00/{file}: {what} cannot be resharded; move it away")


def test_a_pickle_that_could_act(tmp_path):
    folder = legacy(tmp_path, Recipe(), lambda _, state: state.update(hook=print))
    refuse(
        folder,
        r"model_optim_rng\.pt: its pickle asks for builtins\.print, .*--trust builtins\.print",
    )
    open_checkpoint(folder, trusted=frozenset({"builtins.print"}))


def test_a_file_that_is_no_archive(tmp_path):
    folder = legacy(tmp_path, Recipe())
    path = folder / "iter_0000007" / "mp_rank_00" / "model_optim_rng.pt"
    path.write_bytes(pickle.dumps({"args": 1}))
    refuse(
        folder, r"no zip directory at the end of the \d+ bytes at 0: .*not written by torch\.save"
    )


# Optimizers.


def test_a_group_that_follows_another_rule(tmp_path):
    def spoil(name, state):
        state["optimizer"]["optimizer"]["param_groups"][0]["params"].pop()

    refuse(
        legacy(tmp_path, Recipe(optimizer="plain"), spoil),
        r"optimizer 0 has 23 parameters in group 0, the model 24 that "
        r"belong there: its groups follow "
        r"another rule\. Pass --optim drop",
    )


def test_another_optimizer(tmp_path):
    def spoil(name, state):
        for one in state["optimizer"]["optimizer"]["state"].values():
            del one["exp_avg_sq"]

    refuse(
        legacy(tmp_path, Recipe(optimizer="plain"), spoil),
        r"optimizer state of embedding\.word_embeddings\.weight lacks "
        r"exp_avg_sq: only Adam's is read",
    )


def test_state_of_another_model(tmp_path):
    def spoil(name, state):
        state["optimizer"]["optimizer"]["state"][0]["exp_avg"] = torch.ones(3)

    refuse(
        legacy(tmp_path, Recipe(optimizer="plain"), spoil),
        r"exp_avg of embedding\.word_embeddings\.weight is .*, its weight has shape \[16, 4\]: the "
        r"optimizer is not this model's",
    )


def respell(folder, change):
    path = folder / "iter_0000007" / "mp_rank_00" / "distrib_optim.pt"
    states = torch.load(path, weights_only=False)
    torch.save(change(states) or states, path)
    return folder


def test_a_flat_buffer_that_does_not_decode(tmp_path):
    def spoil(states):
        for buffers in states[0].values():
            buffers["numel_unpadded"] -= 64

    folder = respell(legacy(tmp_path, Recipe(optimizer="distributed")), spoil)
    refuse(
        folder,
        r"mp_rank_00/distrib_optim\.pt: optimizer 0, model chunk 0: holds \d+ elements; tried "
        r"\{'bucket size None': \d+.*\}\. The flat buffer cannot be decoded: .*--optim drop",
    )
    open_checkpoint(folder, optimizer=False)


def test_a_frozen_parameter(tmp_path):
    def spoil(states):
        for buffers in states[0].values():
            for key in ("param", "exp_avg", "exp_avg_sq"):
                buffers[key] = buffers[key][:-64].clone()
            buffers["numel_unpadded"] -= 64

    folder = respell(legacy(tmp_path, Recipe(optimizer="distributed")), spoil)
    refuse(folder, r"The flat buffer cannot be decoded: .*or parameters were frozen")


def test_a_buffer_shorter_than_it_says(tmp_path):
    def spoil(states):
        for buffers in states[0].values():
            buffers["exp_avg"] = buffers["exp_avg"][:-64].clone()

    folder = respell(legacy(tmp_path, Recipe(optimizer="distributed")), spoil)
    refuse(
        folder, r"model chunk 0: exp_avg has shape \[1792\], the buffer 1856 elements: .*damaged"
    )


def test_buckets_as_before_february_2024(tmp_path):
    def spoil(states):
        del states["buckets_coalesced"]

    folder = respell(legacy(tmp_path, Recipe(optimizer="distributed")), spoil)
    refuse(
        folder,
        r"distrib_optim\.pt: buffers in separate buckets, as before February 2024: load it with "
        r"Megatron 0\.12",
    )


def test_another_distributed_optimizer(tmp_path):
    def spoil(states):
        for buffers in states[0].values():
            del buffers["exp_avg_sq"]

    folder = respell(legacy(tmp_path, Recipe(optimizer="distributed")), spoil)
    refuse(folder, r"model chunk 0: lacks exp_avg_sq: only Adam's state is read")


def test_a_missing_optimizer_file(tmp_path):
    folder = legacy(tmp_path, Recipe(tp=2, optimizer="distributed"))
    (folder / "iter_0000007" / "mp_rank_01" / "distrib_optim.pt").unlink()
    refuse(folder, r"\[(master|exp_avg)\]: \d+ of \d+ elements are in no part: it is not whole")
