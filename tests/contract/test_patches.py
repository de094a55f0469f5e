"""The declared patches fit the installed Megatron and torch, behave, and come out again exactly."""

import json
import os
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from megatron_moe.mcore.patching import Patch
from megatron_moe.patches import listing

FIT_AND_UNDO = """
import importlib.util
import json
import os
import torch
from megatron_moe.activate import activate
from megatron_moe.mcore.patching import PatchError, _places, check
from megatron_moe.patches import cpu, listing, megatron

with activate("cpu"):  # beside an engine that ends the process when it is imported
    hidden = importlib.util.find_spec("transformer_engine") is None
    during = dict(os.environ)
found_again = importlib.util.find_spec("transformer_engine") is not None
rows = listing.rows()
places = [place for patch in (*cpu.ALL, *megatron.ALL) for place in _places(patch)]
early = next(p for p in cpu.ALL if p.target == "torch.cuda.current_device")
with activate("cpu"):
    inside = [vars(place.owner)[place.name] is place.raw for place in places]
    exec("from torch.cuda import current_device", globals())
    try:
        activate("cpu")
        second = "was activated twice"
    except PatchError as refused:
        second = str(refused)
left = {
    f"{place.owner.__name__}.{place.name}"
    for place in places
    if vars(place.owner).get(place.name, "absent") is not place.raw
    and not (place.name not in vars(place.owner) and place.raw not in vars(place.owner).values())
}
print(json.dumps({
    "hidden": [hidden, found_again],
    "environment": [during["CUDA_VISIBLE_DEVICES"], os.environ.get("CUDA_VISIBLE_DEVICES")],
    "misfits": {row.patch.target: row.misfit for row in rows if row.misfit},
    "untouched": sum(inside),
    "second": second,
    "left": sorted(left),
    "imported meanwhile": current_device is torch.cuda.current_device,
    "available": torch.cuda.is_available(),
    "readme": listing.markdown(rows),
}))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """One fresh process: nothing may be in force when it starts."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "transformer_engine.py").write_text("raise SystemExit('imported')\n")
    env = os.environ | {"PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": "0"}
    command = [sys.executable, "-c", FIT_AND_UNDO]
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_every_patch_fits(report):
    assert report["misfits"] == {}


def test_applied_everywhere_and_undone_exactly(report):
    assert report["untouched"] == 0
    assert report["left"] == []
    assert report["imported meanwhile"]
    assert not report["available"]


def test_second_activation_is_refused(report):
    assert report["second"].endswith("already replaced; close the first activation")


def test_transformer_engine_is_hidden_meanwhile(report):
    assert report["hidden"] == [True, True]
    assert report["environment"] == ["", "0"]


def test_readme_has_the_table_of_today(report):
    readme = Path(__file__).parents[2] / "patches" / "README.md"
    assert report["readme"] in readme.read_text(), "run `megatron-moe patches --write`"


@pytest.mark.parametrize(("misfit", "code"), [(None, 0), ("source is 0, declared 1", 1)])
def test_listing_exits_with_1_when_a_patch_does_not_fit(monkeypatch, misfit, code):
    patch = Patch(
        target="torch.f",
        reason="no slot",
        retire_when="there is one",
        versions=">=2",
        distribution="torch",
        value=1,
    )
    monkeypatch.setattr(listing, "rows", lambda: [listing.Row(patch, "always", misfit)])
    done = CliRunner(env={"COLUMNS": "160"}).invoke(listing.command)
    assert done.exit_code == code
    assert "torch.f" in done.output
    assert (misfit or "yes") in done.output


def cpu_tensors(world):
    """Run in a worker: tensors asked for on a GPU."""
    made = [
        torch.zeros(2, device="cuda"),
        torch.tensor([1.0], device=torch.cuda.current_device()),
        torch.empty_like(torch.ones(3), device="cuda:1"),
        torch.arange(3, device=0, pin_memory=True),
        torch.ones(2).to("cuda"),
        torch.ones(2).to(torch.device("cuda", 0), torch.bfloat16),
        torch.ones(2).to(0),
        torch.ones(2).cuda(non_blocking=True).pin_memory(),
        torch.nn.Linear(2, 2).cuda().to("cuda").weight,
    ]
    return (
        {str(tensor.device) for tensor in made},
        made[5].dtype,
        torch.ones(2).to(torch.int8).dtype,
    )


def test_tensors_land_on_the_cpu(pool):
    assert pool.run(cpu_tensors, world_size=1) == [({"cpu"}, torch.bfloat16, torch.int8)]


def streams_and_memory(world):
    side, start, end = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True), torch.cuda.Event()
    side.wait_stream(torch.cuda.current_stream())
    start.record()
    with torch.cuda.stream(side):
        sum(range(10_000))
    end.record(side)
    end.synchronize()
    torch.cuda.synchronize()
    return start.elapsed_time(end), torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()


def test_streams_wait_for_nothing_and_memory_is_the_process(pool):
    [(milliseconds, now, peak)] = pool.run(streams_and_memory, world_size=1)
    assert 0 < milliseconds < 1e4
    assert 50e6 < now <= peak * 1.5


def random_states(world):
    """The tracker's states are apart from the default one, and come back after a fork."""
    from megatron.core.tensor_parallel.random import (
        get_cuda_rng_tracker,
        initialize_rng_tracker,
    )

    initialize_rng_tracker(force_reset=True)
    tracker = get_cuda_rng_tracker()
    torch.cuda.manual_seed(7)
    before = torch.cuda.get_rng_state()
    tracker.add("one", 11)
    tracker.add("two", 12)
    with tracker.fork("one"):
        first = torch.rand(4)
    with tracker.fork("two"):
        other = torch.rand(4)
    with tracker.fork("one"):
        second = torch.rand(4)
    untouched = torch.equal(before, torch.cuda.get_rng_state())
    torch.manual_seed(11)
    expected = torch.rand(8)
    return untouched, torch.equal(torch.cat([first, second]), expected), torch.equal(first, other)


def test_random_states_of_the_tracker(pool):
    assert pool.run(random_states, world_size=1) == [(True, True, False)]


def state_of_a_gpu(world):
    with pytest.raises(ValueError, match=r"was saved on a GPU .* load it with --no-load-rng"):
        torch.cuda.set_rng_state(torch.zeros(16, dtype=torch.uint8))


def test_random_state_of_a_gpu_is_refused(pool):
    pool.run(state_of_a_gpu, world_size=1)


def uneven_exchange(world):
    """Splits as tensors, and one rank that sends nothing."""
    sent = [[0, 0], [1, 2]][world.rank]
    received = [[0, 1], [0, 2]][world.rank]
    x = torch.arange(float(sum(sent))) + 10 * world.rank
    out = x.new_empty(sum(received))
    torch.distributed.all_to_all_single(
        out, x, torch.tensor(received), torch.tensor(sent), group=world.group
    )
    return out.tolist()


def test_all_to_all_takes_splits_as_tensors(pool):
    assert pool.run(uneven_exchange, world_size=2) == [[10.0], [11.0, 12.0]]


def norms(world, normalization, zero_centred):
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        normalization=normalization,
        layernorm_zero_centered_gamma=zero_centred,
        persist_layer_norm=False,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
    )
    norm = WrappedTorchNorm(config, 8, eps=1e-5)
    x = torch.randn(3, 8, dtype=torch.float32)
    marks = {name: parameter.sequence_parallel for name, parameter in norm.named_parameters()}
    at_start = norm(x)
    with torch.no_grad():
        norm.weight.add_(0.5)
    return x, at_start, norm(x), marks


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("zero_centred", [False, True])
def test_norms_under_sequence_parallelism(pool, normalization, zero_centred):
    [(x, at_start, later, marks)] = pool.run(norms, normalization, zero_centred, world_size=1)
    centred = x - x.mean(-1, keepdim=True) if normalization == "LayerNorm" else x
    expected = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(at_start, expected)
    torch.testing.assert_close(later, expected * 1.5)
    assert set(marks.values()) == {True}


def clipping(world):
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    clip_grad_by_total_norm_fp32([weight], max_norm=1.0, total_norm=5.0)
    return weight.grad, weight.grad.type()


def test_gradients_are_clipped_and_types_tell_the_truth_afterwards(pool):
    [(grad, name)] = pool.run(clipping, world_size=1)
    torch.testing.assert_close(grad, torch.tensor([0.6, 0.8]))
    assert name == "torch.FloatTensor"


def parsed(world, line, *, own=False):
    """Parse as an unmodified script does; with ``own``, as one that adds our flags itself."""
    from megatron.training import arguments

    from megatron_moe.mcore.arguments import add_moe_arguments

    def provider(parser: ArgumentParser) -> ArgumentParser:
        parser.add_argument("--of-the-script", default="kept")
        return add_moe_arguments(parser)

    sys.argv = ["script.py", *line.split()]
    args = arguments.parse_args(provider if own else None)
    names = (
        "moe_layer_impl distributed_backend transformer_impl bias_swiglu_fusion apply_rope_fusion"
    )
    found = {name: getattr(args, name) for name in names.split()}
    return found | {
        "attention": args.attention_backend.name,
        "of_the_script": getattr(args, "of_the_script", None),
    }


@pytest.mark.parametrize("own", [False, True])
def test_arguments_of_an_unmodified_script(pool, own):
    [found] = pool.run(parsed, "--transformer-impl local", own=own, world_size=1)
    assert found == {
        "moe_layer_impl": "plugin",
        "distributed_backend": "gloo",
        "transformer_impl": "local",
        "bias_swiglu_fusion": False,
        "apply_rope_fusion": False,
        "attention": "unfused",
        "of_the_script": "kept" if own else None,
    }


MODEL = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --vocab-size 32 "
    "--max-position-embeddings 8 --micro-batch-size 1 --train-iters 1 --mock-data "
    "--tokenizer-type NullTokenizer --disable-bias-linear"
)
HYBRID = MODEL.replace("--num-layers 2", "--hybrid-layer-pattern *E*E")


def configured(world, line, kind):
    """Return the class of a GPT's configuration, or whether a hybrid gets a stack of ours."""
    from megatron.training import argument_utils, arguments

    sys.argv = ["script.py", *line.split()]
    args = arguments.parse_and_validate_args()
    if kind == "gpt":
        return type(argument_utils.gpt_config_from_args(args)).__name__
    return argument_utils.hybrid_config_from_args(args).hybrid_stack_spec is not None


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", "GPTModelConfig"),
        ("--num-experts 4", "MoEGPTModelConfig"),
        ("--num-experts 4 --moe-layer-impl megatron", "GPTModelConfig"),
    ],
)
def test_whose_gpt_is_built(pool, flags, expected):
    assert pool.run(configured, f"{MODEL} {flags}", "gpt", world_size=1) == [expected]


@pytest.mark.parametrize(
    ("flags", "ours"),
    [
        ("", False),
        ("--num-experts 4", True),
        ("--num-experts 4 --moe-layer-impl megatron", False),
        ("--num-experts 4 --spec megatron_moe.mcore.specs hybrid_stack_spec", True),
    ],
)
def test_whose_hybrid_stack_is_built(pool, flags, ours):
    assert pool.run(configured, f"{HYBRID} {flags}", "hybrid", world_size=1) == [ours]


def refused_option(world):
    with pytest.raises(ValueError, match="moe_shared_expert_overlap = True is not honoured"):
        configured(
            world,
            f"{MODEL} --num-experts 4 --moe-shared-expert-overlap "
            "--moe-shared-expert-intermediate-size 16 --moe-token-dispatcher-type alltoall",
            "gpt",
        )
    assert not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1


def test_option_that_is_not_honoured_is_refused_before_groups_are_made(pool):
    pool.run(refused_option, world_size=1)


def older_script(world):
    """A script that hands pretrain() a model_provider instead of a configuration."""
    from types import SimpleNamespace

    from megatron.training import arguments, pretrain

    sys.argv = ["script.py", *f"{MODEL} --num-experts 4".split()]
    arguments.parse_and_validate_args()
    with pytest.raises(ValueError, match="builds its model with a model_provider, which"):
        pretrain(SimpleNamespace(model=None), None, None, None, model_provider=print)


def test_older_script_is_told_that_the_layer_does_not_reach_it(pool):
    pool.run(older_script, world_size=1)


def helpers_are_there(world):
    from megatron.core.datasets.utils import compile_helpers

    compile_helpers()  # without the patch: SystemExit, as the wheel has no Makefile
    from megatron.core.datasets import helpers_cpp

    return hasattr(helpers_cpp, "build_sample_idx_int32")


def test_compiled_helpers_of_the_wheel_are_used(pool):
    assert pool.run(helpers_are_there, world_size=1) == [True]


def synchronous_save(world, folder):
    import multiprocessing

    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    tensor = torch.arange(4.0)
    dist_checkpointing.save({"a": ShardedTensor.from_rank_offsets("a", tensor)}, folder)
    blank = {"a": ShardedTensor.from_rank_offsets("a", torch.zeros(4))}
    loaded = dist_checkpointing.load(blank, folder)["a"]
    return loaded, multiprocessing.active_children(), filesystem_async._results_queue


def test_saving_spawns_no_process(pool, tmp_path):
    [(loaded, children, queue)] = pool.run(synchronous_save, str(tmp_path), world_size=1)
    torch.testing.assert_close(loaded, torch.arange(4.0))
    assert children == []
    assert queue is None


def bucket_sizes(world, sizes):
    """Lay out parameters of ``sizes``; the last one is a shared embedding in its own bucket."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    parameters[0].shared_embedding = True  # laid out from the last to the first
    layout = DistributedOptimizer._compute_per_buffer_param_layout(
        parameters, None, 1, DistributedDataParallelConfig(use_distributed_optimizer=True)
    )
    return layout.per_bucket_numel_unpadded, layout.bucket_indices


@pytest.mark.parametrize(
    ("sizes", "unpadded"),
    [((64, 32), [32, 64]), ((64, 128), [128, 64]), ((64, 32, 64), [128, 64])],
)
def test_a_bucket_ends_with_its_last_parameter(pool, sizes, unpadded):
    """The third is one that Megatron can save: it keeps the size that its checkpoints have."""
    [(found, indices)] = pool.run(bucket_sizes, sizes, world_size=1)
    assert found == unpadded
    assert all(size <= end - start for size, (start, end) in zip(found, indices, strict=True))
