"""Checkpoints of random small models, made of nothing but atoms.

A seed is a checkpoint that no run has saved: a model's atoms, one behind the other in one file, as
if read by the tools. Resharded, it becomes a real checkpoint of whatever format and layout. Numbers
are random; weights are rounded by torch, not by the tools.
"""

import os
from argparse import Namespace
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_moe.tools.checkpoint.model.atoms import (
    STATES,
    WEIGHT,
    AtomId,
    Extent,
    Held,
    Record,
    Tensors,
)
from megatron_moe.tools.checkpoint.model.boxes import Shape, row_major
from megatron_moe.tools.checkpoint.model.inventory import take
from megatron_moe.tools.checkpoint.model.layout import Layout
from megatron_moe.tools.checkpoint.plan.compile import Plan, compile_plan
from megatron_moe.tools.checkpoint.plan.request import Request, resolve
from megatron_moe.tools.checkpoint.read.locate import Location
from megatron_moe.tools.checkpoint.read.open import open_checkpoint
from megatron_moe.tools.checkpoint.read.opened import Opened, OptimizerState
from megatron_moe.tools.checkpoint.stored.dtypes import BY_NAME
from megatron_moe.tools.checkpoint.write import execute as executor
from megatron_moe.tools.checkpoint.write.execute import Options, execute
from megatron_moe.tools.checkpoint.write.publish import publish, unfinished

SEED = "seed.pt"
ITERATION = 7


@dataclass(frozen=True, kw_only=True)
class Arch:
    """A model.

    Args:
        moe: For each decoder layer, whether it has experts.
        experts: Experts of such a layer.
        hidden: Width; ``ffn`` that of experts and dense layers.
        vocab: True vocabulary; padded to a multiple of ``divisible_by`` (and TP).
        half: Weights in bfloat16 with fp32 masters; else fp32 weights that are their own.
        gated: Gate and linear halves; and so on: parts that a model may have.
        engine: Run with Transformer Engine: its names of norms.
        grouped: Run with grouped experts; ``plugin`` with this project's layer.
    """

    moe: tuple[bool, ...] = (True, True)
    experts: int = 4
    hidden: int = 8
    ffn: int = 8
    vocab: int = 13
    divisible_by: int = 4
    half: bool = True
    gated: bool = True
    bias: bool = False
    norm_bias: bool = False
    qk_norm: bool = False
    shared: bool = False
    shared_gate: bool = False
    expert_bias: bool = False
    mtp: int = 0
    tied: bool = False
    engine: bool = False
    grouped: bool = False
    plugin: bool = False
    torch_adam: bool = False

    @property
    def padded(self) -> int:
        """Rows of the embedding in the seed, which has TP 1."""
        return -(-self.vocab // self.divisible_by) * self.divisible_by

    @property
    def spelling(self) -> str:
        """How a run with these flags spells experts."""
        if self.grouped and (self.engine or self.plugin):
            return "grouped" if self.engine else "stacked"
        return "sequential"

    def namespace(self) -> Namespace:
        """Return a run's arguments, parallel sizes all 1."""
        return Namespace(
            num_layers=len(self.moe),
            hidden_size=self.hidden,
            num_attention_heads=4,
            num_query_groups=4,
            num_experts=self.experts if any(self.moe) else None,
            moe_layer_freq=1 if all(self.moe) else [int(m) for m in self.moe],
            swiglu=self.gated,
            untie_embeddings_and_output_weights=not self.tied,
            vocab_size=self.vocab,
            padded_vocab_size=self.padded,
            make_vocab_size_divisible_by=self.divisible_by,
            mtp_num_layers=self.mtp or None,
            transformer_impl="transformer_engine" if self.engine else "local",
            moe_grouped_gemm=self.grouped,
            moe_single_grouped_weight=False,
            moe_layer_impl="plugin" if self.plugin else "megatron",
            bf16=self.half,
            fp16=False,
            accumulate_allreduce_grads_in_fp32=True,
            use_distributed_optimizer=True,
            dist_ckpt_optim_fully_reshardable=True,
            overlap_grad_reduce=False,
            ddp_bucket_size=None,
            ckpt_format="torch",
            no_save_rng=None,
            no_save_optim=None,
            sequence_parallel=False,
            tensor_model_parallel_size=1,
            pipeline_model_parallel_size=1,
            virtual_pipeline_model_parallel_size=None,
            pipeline_model_parallel_layout=None,
            decoder_first_pipeline_num_layers=None,
            decoder_last_pipeline_num_layers=None,
            expert_model_parallel_size=1,
            expert_tensor_parallel_size=1,
            context_parallel_size=1,
            data_parallel_size=1,
            world_size=1,
        )

    def shapes(self) -> dict[str, tuple[Shape, bool]]:
        """Return every atom's shape, and whether it is trained."""
        out: dict[str, tuple[Shape, bool]] = {}
        H = self.hidden
        out["embedding.word_embeddings.weight"] = ((self.padded, H), True)
        for number, moe in enumerate(self.moe):
            out |= self._layer(f"decoder.layers.{number}.", moe)
        out |= self._norm("decoder.final_layernorm")
        for number in range(self.mtp):
            prefix = f"mtp.layers.{number}."
            out |= self._norm(f"{prefix}enorm") | self._norm(f"{prefix}hnorm")
            out[f"{prefix}eh_proj.weight"] = ((H, 2 * H), True)
            out |= self._layer(f"{prefix}transformer_layer.", self.moe[-1])
            out |= self._norm(f"{prefix}final_layernorm")
        if not self.tied:
            out["output_layer.weight"] = ((self.padded, H), True)
        return out

    def _norm(self, name: str, size: int | None = None) -> dict[str, tuple[Shape, bool]]:
        kinds = ("weight", "bias") if self.norm_bias else ("weight",)
        return {f"{name}.{kind}": ((size or self.hidden,), True) for kind in kinds}

    def _layer(self, prefix: str, moe: bool) -> dict[str, tuple[Shape, bool]]:
        H = self.hidden
        attention = f"{prefix}self_attention."
        out = self._norm(f"{prefix}input_layernorm")
        out[f"{attention}linear_proj.weight"] = ((H, H), True)
        out[f"{attention}linear_qkv.weight"] = ((3 * H, H), True)
        if self.bias:
            out[f"{attention}linear_proj.bias"] = ((H,), True)
            out[f"{attention}linear_qkv.bias"] = ((3 * H,), True)
        if self.qk_norm:
            out |= self._norm(f"{attention}q_layernorm", H // 4)
            out |= self._norm(f"{attention}k_layernorm", H // 4)
        out |= self._norm(f"{prefix}pre_mlp_layernorm")
        if not moe:
            return out | self._feed_forward(f"{prefix}mlp.")
        out[f"{prefix}mlp.router.weight"] = ((self.experts, H), True)
        if self.expert_bias:
            out[f"{prefix}mlp.router.expert_bias"] = ((self.experts,), False)
        for expert in range(self.experts):
            out |= self._feed_forward(f"{prefix}mlp.experts.{expert}.")
        if self.shared:
            out |= self._feed_forward(f"{prefix}mlp.shared_experts.")
            if self.shared_gate:
                out[f"{prefix}mlp.shared_experts.gate_weight"] = ((1, H), True)
        return out

    def _feed_forward(self, prefix: str) -> dict[str, tuple[Shape, bool]]:
        out: dict[str, tuple[Shape, bool]] = {}
        for half in (".gate", ".up") if self.gated else ("",):
            out[f"{prefix}linear_fc1.weight{half}"] = ((self.ffn, self.hidden), True)
            if self.bias:
                out[f"{prefix}linear_fc1.bias{half}"] = ((self.ffn,), True)
        out[f"{prefix}linear_fc2.weight"] = ((self.hidden, self.ffn), True)
        if self.bias:
            out[f"{prefix}linear_fc2.bias"] = ((self.hidden,), True)
        return out


@dataclass
class _Bins:
    """Atoms of one element type and role, one behind the other."""

    tensors: Tensors
    sizes: dict[tuple[str, str], int] = field(default_factory=dict)

    def put(self, atom: AtomId, shape: Shape, dtype: str) -> None:
        bin_ = (atom.role, dtype)
        if bin_ not in self.sizes:
            self.sizes[bin_] = 0
        number, at = list(self.sizes).index(bin_), self.sizes[bin_]
        extent = Extent(number, (0,) * len(shape), shape, at, row_major(shape))
        self.tensors.atoms[atom] = Held(shape, BY_NAME[dtype], [extent])
        self.sizes[bin_] = at + prod(shape)


def seed(arch: Arch, folder: Path, *, optimizer: bool = True) -> Opened:
    """Return a model's atoms as a checkpoint opened; :func:`fill` makes its file.

    Args:
        arch: The model.
        folder: Where its file is, or would be.
        optimizer: Whether it has optimizer state.
    """
    tensors = Tensors(folder)
    bins = _Bins(tensors)
    weight = "bfloat16" if arch.half else "float32"
    shapes = arch.shapes()
    for name, (shape, trained) in shapes.items():
        bins.put(AtomId(name), shape, weight if trained else "float32")
    for role in STATES if optimizer else ():
        for name, (shape, trained) in shapes.items():
            if trained:
                bins.put(AtomId(name, role), shape, "float32")
    for key, ((role, dtype), numel) in enumerate(bins.sizes.items()):
        label = f"{role} in {dtype}"
        tensors.records.append(Record(SEED, None, str(key), BY_NAME[dtype], numel, label))
    common = {
        "checkpoint_version": 3.0,
        "iteration": ITERATION,
        "opt_param_scheduler": {"max_lr": 1e-3, "num_steps": 14},
        "num_floating_point_operations_so_far": 1.5e9,
    }
    return Opened(
        Location(folder, ITERATION, "torch"),
        "0.19",
        arch.namespace(),
        Layout(),
        tensors,
        common,
        OptimizerState("distributed", _groups(arch), None, 7) if optimizer else None,
        rng={(0, 0): [{"random_rng_state": (3, (1, 2, 3), None)}]},
        fused_norms=arch.engine,
        experts=arch.spelling,
        files={SEED: sum(record.nbytes for record in tensors.records)},
        inventory=take(tensors.atoms),
        extra_states={"self_attention.linear_qkv"} if arch.engine else set(),
    )


def _groups(arch: Arch) -> list[dict[str, Any]]:
    one: dict[str, Any] = {"is_expert_parallel": False, "wd_mult": 1.0, "lr": 1e-3, "step": 7}
    if arch.torch_adam:
        one["foreach"] = None
    return [one, one | {"wd_mult": 0.0}]


def fill(opened: Opened, random: np.random.Generator, *, zero_padding: bool = True) -> None:
    """Write a seed's file: random numbers, every master rounding to its weight.

    Args:
        opened: The seed.
        random: Source of numbers.
        zero_padding: Whether rows beyond the true vocabulary are zeros.
    """
    values: dict[int, torch.Tensor] = {}
    for number, record in enumerate(opened.tensors.records):
        drawn = random.standard_normal(record.numel, np.float32)
        values[number] = torch.from_numpy(drawn).to(getattr(torch, record.dtype.name))
    for atom, held in opened.tensors.atoms.items():
        (extent,) = held.extents
        mine = values[extent.record][extent.offset :][: prod(held.shape)].view(held.shape)
        vocabulary = atom.name.startswith(("embedding.", "output_layer."))
        if vocabulary and zero_padding:
            mine[opened.args.vocab_size :] = 0
        if atom.role == "exp_avg_sq":
            mine.abs_()
    for atom, held in opened.tensors.atoms.items():
        master = opened.tensors.atoms.get(AtomId(atom.name, "master"))
        if atom.role == WEIGHT and master is not None:
            (to,), (of,) = held.extents, master.extents
            count = prod(held.shape)
            values[to.record][to.offset :][:count] = values[of.record][of.offset :][:count].to(
                values[to.record].dtype
            )
    opened.folder.mkdir(parents=True, exist_ok=True)
    torch.save(list(values.values()), opened.folder / SEED)


def made(
    folder: Path,
    arch: Arch | None = None,
    *,
    number: int = 0,
    optimizer: bool = True,
    **wishes: Any,
) -> Path:
    """Write a real checkpoint of a random model; return the folder given to ``--save``.

    Args:
        folder: To write to; the seed goes beside it.
        arch: The model; a small one of two layers by default.
        number: Seed of the numbers.
        optimizer: Whether it has optimizer state.
        wishes: Options of :class:`Request`.
    """
    opened = seed(arch or Arch(), folder.with_name(f"{folder.name}.seed"), optimizer=optimizer)
    fill(opened, np.random.default_rng(number))
    reshard(opened, folder, **wishes)
    return folder


def planned(source: Opened, **wishes: Any) -> Plan:
    """Return the plan of a request."""
    return compile_plan(source, resolve(source, Request(**wishes)))


def reshard(source: Opened, out: Path, *, options: Options | None = None, **wishes: Any) -> Opened:
    """Reshard for real; return the output opened."""
    execute(planned(source, **wishes), out, options or Options(workers=1))
    return open_checkpoint(out)


def hollow(plan: Plan, out: Path) -> Opened:
    """Write a plan's output without its tensors' bytes; return it opened by the real reader."""
    folder = unfinished(out, plan)
    executor._prepare(plan, folder, fresh=True)
    for file in plan.target.files:
        with (folder / file.path).open("r+b") as opened:
            for skeleton in file.archives:
                skeleton.write(opened.fileno(), dict.fromkeys(skeleton.names, 0))
            for kept in file.kept:
                _copy_head(plan.source.folder / kept.path, kept, opened.fileno())
    return open_checkpoint(publish(folder, out, ITERATION).parent)


def _copy_head(path: Path, kept: Any, to: int) -> None:
    with path.open("rb") as source:
        data = os.pread(source.fileno(), kept.length, kept.source_offset)
    os.pwrite(to, data, kept.offset)
