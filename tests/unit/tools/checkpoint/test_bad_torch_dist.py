"""``torch_dist`` checkpoints that cannot be read: what is said of each."""

import pickle
from dataclasses import replace

import pytest
import torch
from helpers.handmade import Recipe, Saved, dist
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_moe.tools.checkpoint.errors import CheckpointError
from megatron_moe.tools.checkpoint.read.open import open_checkpoint

QKV = "decoder.layers.self_attention.linear_qkv.weight"
FC1 = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
COMMON = "common_state/shard_0_1"


def refuse(folder, message, **options):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder, **options)


def file(folder, name):
    return folder / "iter_0000007" / name


def common(change):
    """An edit of what all ranks share."""
    return lambda saved: change(saved.objects[COMMON][0])


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_truncated_file(tmp_path, kept):
    path = file(dist(tmp_path, Recipe()), "__0_0.distcp")
    size = len(path.read_bytes())
    path.write_bytes(path.read_bytes()[:kept])
    refuse(
        tmp_path,
        rf"__0_0\.distcp: truncated: {kept % size} bytes, \.metadata "
        rf"places \S+ up to byte {size}\. "
        r"Restore it from a copy",
    )


def test_a_missing_file(tmp_path):
    file(dist(tmp_path, Recipe()), "__1_0.distcp").unlink()
    refuse(tmp_path, r"__1_0\.distcp: missing; \.metadata places \S+ in it: complete the copy")


def test_a_missing_metadata(tmp_path):
    file(dist(tmp_path, Recipe()), ".metadata").unlink()
    refuse(tmp_path, r"iter_0000007: has metadata\.json but no \.metadata: the save did not finish")


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x02", b"PK\x03\x04"])
def test_metadata_that_is_no_pickle(tmp_path, content):
    file(dist(tmp_path, Recipe()), ".metadata").write_bytes(content)
    refuse(
        tmp_path,
        r"\.metadata: not a readable pickle .*truncated or damaged: restore it from a copy",
    )


def test_every_truncation_of_metadata(tmp_path):
    path = file(dist(tmp_path, Recipe()), ".metadata")
    whole = path.read_bytes()
    for length in range(0, len(whole), 101):
        path.write_bytes(whole[:length])
        refuse(tmp_path, r"\.metadata: not a readable pickle")


@pytest.mark.parametrize("content", [[1], {"a": 1}, None])
def test_metadata_of_something_else(tmp_path, content):
    file(dist(tmp_path, Recipe()), ".metadata").write_bytes(pickle.dumps(content))
    refuse(tmp_path, r"\.metadata: does not hold torch's checkpoint metadata")


def test_metadata_without_places(tmp_path):
    def forget(metadata):
        metadata.storage_data = None

    dist(tmp_path, Recipe(), edit_metadata=forget)
    refuse(tmp_path, r"\.metadata: does not hold torch's checkpoint metadata")


def test_metadata_that_could_act(tmp_path):
    def spoil(metadata):
        metadata.planner_data = eval

    dist(tmp_path, Recipe(), edit_metadata=spoil)
    refuse(tmp_path, r"\.metadata: its pickle asks for builtins\.eval, which could run code")


def test_a_chunk_that_is_in_no_file(tmp_path):
    def forget(metadata):
        del metadata.storage_data[MetadataIndex(QKV, torch.Size([0, 0, 0]))]

    dist(tmp_path, Recipe(), edit_metadata=forget)
    refuse(
        tmp_path,
        r"\.metadata lists a chunk of decoder\.layers\.self_attention\.linear_qkv\.weight at "
        r"\(0, 0, 0\) and places it in no file: the save did not finish",
    )


def chunks(metadata):
    return metadata.state_dict_metadata[QKV].chunks


def test_an_uncovered_part(tmp_path):
    dist(tmp_path, Recipe(), edit_metadata=lambda metadata: chunks(metadata).pop())
    refuse(
        tmp_path, r"linear_qkv\.weight: 48 of 96 elements are in no part: its chunks are not the"
    )


def test_overlapping_chunks(tmp_path):
    dist(
        tmp_path,
        Recipe(),
        edit_metadata=lambda metadata: chunks(metadata).append(chunks(metadata)[0]),
    )
    refuse(
        tmp_path, r"linear_qkv\.weight: the parts at \(0, 0, 0\) .* overlap: its chunks are not the"
    )


def test_a_chunk_outside(tmp_path):
    def grow(metadata):
        chunks(metadata)[1] = replace(chunks(metadata)[1], sizes=torch.Size([2, 12, 4]))

    dist(tmp_path, Recipe(), edit_metadata=grow)
    refuse(tmp_path, r"the part at \(1, 0, 0\) of shape \(2, 12, 4\) lies outside \(2, 12, 4\)")


def test_chunks_of_another_rank(tmp_path):
    def flatten(metadata):
        tensor = metadata.state_dict_metadata[QKV]
        tensor.size = torch.Size([96])

    dist(tmp_path, Recipe(), edit_metadata=flatten)
    refuse(tmp_path, r"the part at \(0, 0, 0\) of shape \(1, 12, 4\) lies outside \(96,\)")


def test_compressed_chunks(tmp_path):
    def compress(metadata):
        for info in metadata.storage_data.values():
            info.transform_descriptors = ["zstd"]

    dist(tmp_path, Recipe(), edit_metadata=compress)
    refuse(tmp_path, r"is stored compressed \(transform \['zstd'\]\): save without transforms")


def test_unknown_element_types(tmp_path):
    def retype(metadata):
        metadata.state_dict_metadata[QKV].properties.dtype = torch.qint8

    dist(tmp_path, Recipe(), edit_metadata=retype)
    refuse(tmp_path, r"asks for torch\.qint8, which could run code")


def test_files_outside_the_folder(tmp_path):
    def point(metadata):
        for info in metadata.storage_data.values():
            info.relative_path = "../../secret"

    (tmp_path / "secret").write_bytes(bytes(10**6))
    dist(tmp_path / "save", Recipe(), edit_metadata=point)
    refuse(tmp_path / "save", r"\.metadata places \S+ in '\.\./\.\./secret', outside its folder")


# What all ranks share.


def test_no_common_state(tmp_path):
    dist(tmp_path, Recipe(), lambda saved: saved.objects.pop(COMMON))
    refuse(
        tmp_path, r"neither common\.pt nor common_state/shard_0_1 is there: the save did not finish"
    )


def test_no_arguments(tmp_path):
    dist(tmp_path, Recipe(), common(lambda state: state.pop("args")))
    refuse(tmp_path, r"holds no 'args': not saved by Megatron's training loop")


def test_common_state_of_something_else(tmp_path):
    dist(tmp_path, Recipe(), lambda saved: saved.objects.update({COMMON: ["nothing"]}))
    refuse(tmp_path, r"\(common_state/shard_0_1\): holds str, not the state that ranks share")


def test_a_damaged_object(tmp_path):
    path = file(dist(tmp_path, Recipe()), "__0_0.distcp")
    data = bytearray(path.read_bytes())
    at = data.rfind(b"torch_rng_state")
    data[at] ^= 1
    path.write_bytes(data)
    refuse(
        tmp_path,
        r"__0_0\.distcp \(rng_state/shard_0\.0_1\.1\): record data\.pkl does "
        r"not match its CRC: .*Restore",
    )


def test_an_object_that_could_act(tmp_path):
    dist(tmp_path, Recipe(), common(lambda state: state.update(hook=eval)))
    refuse(
        tmp_path, r"__0_0\.distcp \(common_state/shard_0_1\): its pickle asks for builtins\.eval"
    )
    assert open_checkpoint(tmp_path, trusted=frozenset({"builtins.eval"})).optimizer is None


# What does not fit together.


@pytest.mark.parametrize("said", [8, 2, None])
def test_experts_that_the_arguments_do_not_know(tmp_path, said):
    dist(tmp_path, Recipe(arguments={"num_experts": said}))
    refuse(tmp_path, rf"its arguments say {said or 0} experts, its tensors hold 4")


@pytest.mark.parametrize("said", [1, 3])
def test_layers_that_the_arguments_do_not_know(tmp_path, said):
    dist(tmp_path, Recipe(arguments={"num_layers": said}))
    refuse(tmp_path, rf"holds 2 layers, its arguments say {said}: files of different runs")


def test_a_stack_of_another_height(tmp_path):
    def cut(saved: Saved):
        (_, *shape), parts = saved.tensors[QKV]
        saved.tensors[QKV] = ((1, *shape), parts[:1])

    dist(tmp_path, Recipe(), cut)
    refuse(
        tmp_path,
        r"self_attention\.linear_qkv\.weight holds 1 layers, its arguments say 2: files of",
    )


def test_a_lost_expert(tmp_path):
    def lose(saved: Saved):
        (layers, experts, *shape), _ = saved.tensors[FC1]
        whole = torch.zeros(layers, experts - 1, *shape)
        saved.tensors[FC1] = (tuple(whole.shape), [((0, 0, 0, 0), whole)])

    dist(tmp_path, Recipe(), lose)
    refuse(tmp_path, r"layer 0: mlp\.experts\.linear_fc1\.weight of experts \[3\] is missing")


# Optimizers.


def test_state_of_some_parameters_only(tmp_path):
    dist(
        tmp_path,
        Recipe(optimizer="fully"),
        lambda saved: saved.tensors.pop(f"optimizer.state.exp_avg.{QKV}"),
    )
    refuse(
        tmp_path,
        r"decoder\.layers\.0\.self_attention\.linear_qkv\.weight has no exp_avg, others have: the "
        r"optimizer state is not whole \(frozen parameters\?\)\. Pass --optim drop",
    )
    assert open_checkpoint(tmp_path, optimizer=False).optimizer is None


def test_state_of_another_shape(tmp_path):
    def spoil(saved: Saved):
        saved.tensors[f"optimizer.state.exp_avg.{QKV}"] = (
            (2, 8, 4),
            [((0, 0, 0), torch.ones(2, 8, 4))],
        )

    dist(tmp_path, Recipe(optimizer="fully"), spoil)
    refuse(tmp_path, r"linear_qkv\.weight \[exp_avg\] has shape \[8, 4\], its weight \[12, 4\]")


def test_a_lost_master(tmp_path):
    def lose(saved: Saved):
        shape, parts = saved.tensors[QKV]
        saved.tensors[QKV] = (shape, [(start, tensor.bfloat16()) for start, tensor in parts])
        del saved.tensors[f"optimizer.state.param.{QKV}"]

    dist(tmp_path, Recipe(optimizer="fully"), lose)
    refuse(tmp_path, r"layers\.0\.self_attention\.linear_qkv\.weight has no master, others have")


def test_mtp_layers_that_the_arguments_do_not_know(tmp_path):
    dist(tmp_path, Recipe(arguments={"mtp_num_layers": 1}))
    refuse(tmp_path, r"its arguments say 1 MTP layers, its tensors hold 0: files are missing")


def test_another_optimizer(tmp_path):
    key = f"optimizer.state.momentum_buffer.{QKV}"
    dist(
        tmp_path,
        Recipe(optimizer="fully"),
        lambda saved: saved.tensors.update({key: ((2,), [((0,), torch.ones(2))])}),
    )
    refuse(
        tmp_path,
        r"optimizer\.state\.momentum_buffer\.\S+ is optimizer state of a "
        r"kind that is not read \(Adam's",
    )
    open_checkpoint(tmp_path, optimizer=False)


def test_no_parameter_groups(tmp_path):
    dist(tmp_path, Recipe(optimizer="fully"), common(lambda state: state.pop("optimizer")))
    refuse(tmp_path, r"optimizer tensors without parameter groups: the save is not complete")


def bucket(saved: Saved, state: str) -> str:
    (key,) = [key for key in saved.tensors if key.endswith(f"bucket_idx_0.{state}")]
    return key


def shorter(saved: Saved, state: str) -> None:
    key = bucket(saved, state)
    (length,), parts = saved.tensors[key]
    saved.tensors[key] = ((length - 64,), [parts[0], (parts[1][0], parts[1][1][:-64])])


def test_a_flat_buffer_that_does_not_decode(tmp_path):
    def cut(saved: Saved):
        for state in ("param", "exp_avg", "exp_avg_sq"):
            shorter(saved, state)

    dist(tmp_path, Recipe(optimizer="dp"), cut)
    refuse(
        tmp_path,
        r"optimizer 0, dp_group_idx 0, buffer 0: buckets of \[\d+\] elements do not fit the model: "
        r"embedding\.word_embeddings\.weight ends at element \d+ of bucket 0, which has \d+\. .*"
        r"frozen or unknown parameters\?\)\. Pass --optim drop",
    )
    open_checkpoint(tmp_path, optimizer=False)


def test_buckets_of_unlike_lengths(tmp_path):
    dist(tmp_path, Recipe(optimizer="dp"), lambda saved: shorter(saved, "exp_avg"))
    refuse(
        tmp_path,
        r"dp_group_idx 0, buffer 0: its states have buckets of unlike shapes, .*--optim drop",
    )


@pytest.mark.parametrize("state", ["param", "exp_avg_sq"])
def test_a_lost_bucket(tmp_path, state):
    dist(tmp_path, Recipe(optimizer="dp"), lambda saved: saved.tensors.pop(bucket(saved, state)))
    refuse(tmp_path, r"dp_group_idx 0, buffer 0: its states have buckets of unlike shapes")


def test_a_buffer_that_the_model_does_not_have(tmp_path):
    def double(saved: Saved):
        for state in ("param", "exp_avg", "exp_avg_sq"):
            key = bucket(saved, state)
            saved.tensors[key.replace("gbuf_idx_0", "gbuf_idx_1")] = saved.tensors[key]

    dist(tmp_path, Recipe(optimizer="dp"), double)
    refuse(tmp_path, r"buffer 1: its arguments say 1 buffers on that rank")


def test_unknown_tensors_in_flat_buffers(tmp_path):
    dist(
        tmp_path,
        Recipe(optimizer="dp"),
        lambda saved: saved.tensors.update({"vision.w": ((2,), [((0,), torch.ones(2))])}),
    )
    refuse(
        tmp_path,
        r"vision\.w is in no rule, so the flat buffers of dp_reshardable "
        r"cannot be told apart: add a "
        r"Rule for it \(megatron_moe\.checkpoint_rules\), or pass --optim drop",
    )
