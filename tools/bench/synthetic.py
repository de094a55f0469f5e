"""A big MoE checkpoint with optimizer, made in seconds: the bytes that resharding is timed on.

One small file holds a block of weights, the masters that round to them, and two moments; every
tensor is a window of that block, at an offset of its own. The resharder's writer then lays the
windows out in the wanted format, as it would a real run's tensors.
"""

from __future__ import annotations

import shutil
from argparse import Namespace
from dataclasses import dataclass
from math import prod
from pathlib import Path
from zlib import crc32

import numpy as np

from megatron_moe.tools.checkpoint.model.atoms import (
    MASTER,
    MOMENT1,
    MOMENT2,
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
from megatron_moe.tools.checkpoint.plan.compile import compile_plan
from megatron_moe.tools.checkpoint.plan.request import Request, resolve
from megatron_moe.tools.checkpoint.read.locate import Location, folder_name
from megatron_moe.tools.checkpoint.read.opened import Opened, OptimizerState
from megatron_moe.tools.checkpoint.stored import archive
from megatron_moe.tools.checkpoint.stored.dtypes import BY_NAME, FLOAT32, DType
from megatron_moe.tools.checkpoint.stored.pickles import Storage, StoredTensor
from megatron_moe.tools.checkpoint.write import manifest
from megatron_moe.tools.checkpoint.write.execute import Options, execute

ITERATION = 7
_BYTES = 2 + 3 * 4  # of a parameter: bf16 weight, three fp32 states
_SEED = 20261122
_BLOCK_FILE = "block.pt"
_SPARE = 1 << 16  # elements by which the block is longer than the largest tensor


@dataclass(frozen=True)
class Model:
    """Sizes of a model whose checkpoint has about a given size.

    Args:
        hidden: Hidden size.
        ffn: Of each expert; gated.
        layers: All of them MoE layers.
        experts: Of each layer.
    """

    hidden: int
    ffn: int
    layers: int = 4
    experts: int = 16

    @classmethod
    def of_bytes(cls, nbytes: float) -> Model:
        """Choose sizes so that weights and optimizer take about ``nbytes``, mostly in experts."""
        parameters = nbytes / _BYTES
        hidden = 1024
        while hidden > 32 and 32 * hidden**2 > 0.3 * parameters:
            hidden //= 2
        model = cls(hidden, 0)
        left = parameters - sum(prod(shape) for shape in model.shapes().values())
        ffn = left / (3 * model.layers * model.experts * hidden)
        return cls(hidden, max(round(ffn / 16) * 16, 16))

    def shapes(self) -> dict[str, Shape]:
        """Return every parameter's name with its shape."""
        hidden, vocabulary = self.hidden, 8 * self.hidden
        shapes: dict[str, Shape] = {"embedding.word_embeddings.weight": (vocabulary, hidden)}
        for layer in range(self.layers):
            at = f"decoder.layers.{layer}."
            shapes[at + "input_layernorm.weight"] = (hidden,)
            shapes[at + "self_attention.linear_proj.weight"] = (hidden, hidden)
            shapes[at + "self_attention.linear_qkv.weight"] = (3 * hidden, hidden)
            shapes[at + "pre_mlp_layernorm.weight"] = (hidden,)
            shapes[at + "mlp.router.weight"] = (self.experts, hidden)
            for expert in range(self.experts) if self.ffn else ():
                inner = f"{at}mlp.experts.{expert}."
                shapes[inner + "linear_fc1.weight.gate"] = (self.ffn, hidden)
                shapes[inner + "linear_fc1.weight.up"] = (self.ffn, hidden)
                shapes[inner + "linear_fc2.weight"] = (hidden, self.ffn)
        shapes["decoder.final_layernorm.weight"] = (hidden,)
        shapes["output_layer.weight"] = (vocabulary, hidden)
        return shapes

    def arguments(self, layout: Layout) -> Namespace:
        """Return those of Megatron's arguments that say what the model is."""
        return Namespace(
            num_layers=self.layers,
            hidden_size=self.hidden,
            num_attention_heads=max(self.hidden // 64, 4),
            num_experts=self.experts,
            moe_ffn_hidden_size=self.ffn,
            moe_layer_freq=1,
            moe_grouped_gemm=False,
            swiglu=True,
            untie_embeddings_and_output_weights=True,
            transformer_impl="local",
            bf16=True,
            fp16=False,
            padded_vocab_size=8 * self.hidden,
            make_vocab_size_divisible_by=1,
            use_distributed_optimizer=True,
            dist_ckpt_optim_fully_reshardable=True,
            overlap_grad_reduce=False,
            accumulate_allreduce_grads_in_fp32=True,
            sequence_parallel=layout.tp > 1,
            ckpt_format="torch_dist",
            world_size=layout.world_size,
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=None,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.expert_tp,
            context_parallel_size=1,
            data_parallel_size=layout.dp,
        )


def make(
    folder: Path,
    model: Model,
    layout: Layout,
    form: str,
    optimizer: str = "fully",
    workers: int = 2,
) -> int:
    """Write a checkpoint of a model.

    Args:
        folder: Gets ``iter_0000007`` and the tracker file.
        model: Its sizes.
        layout: Of the run that would have saved it.
        form: ``torch`` or ``torch_dist``.
        optimizer: ``fully`` or ``dp``; of no effect with ``torch``.
        workers: Processes that write.

    Returns:
        Bytes written. The same arguments give the same bytes.
    """
    block = folder.with_name(f".{folder.name}.block")
    block.mkdir(parents=True)
    length = max(prod(shape) for shape in model.shapes().values()) + _SPARE
    _write_block(block / _BLOCK_FILE, length)
    source = _windows(block, model, layout, length)
    wish = Request(
        tp=layout.tp, pp=layout.pp, ep=layout.ep, etp=layout.expert_tp, dp=layout.dp,
        form=form, optim=optimizer,
    )  # fmt: skip
    plan = compile_plan(source, resolve(source, wish))
    execute(plan, folder, Options(workers=workers, verify_source=False))
    shutil.rmtree(block)
    # A training run writes no manifest.
    (folder / folder_name(ITERATION) / manifest.NAME).unlink()
    return plan.write_bytes


_ROLES: dict[str, DType] = {
    WEIGHT: BY_NAME["bfloat16"], MASTER: FLOAT32, MOMENT1: FLOAT32, MOMENT2: FLOAT32
}  # fmt: skip


def _values(length: int) -> dict[str, np.ndarray]:
    """Return the block of each role; a master is its weight and a rest that rounds off."""
    random = np.random.default_rng(_SEED)
    master = random.standard_normal(length, np.float32) * np.float32(0.02)
    bits = master.view(np.uint32)
    weight = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    moment = random.standard_normal(length, np.float32) * np.float32(1e-3)
    return {WEIGHT: weight, MASTER: bits, MOMENT1: moment, MOMENT2: moment * moment}


def _write_block(path: Path, length: int) -> None:
    """Write the block as `torch.save` would write a list of four tensors."""
    stored = [
        StoredTensor(Storage(dtype, str(i), length), 0, (length,), (1,))
        for i, dtype in enumerate(_ROLES.values())
    ]
    skeleton = archive.begin(stored, "block")
    values = _values(length)
    with path.open("wb") as file:
        crcs = {}
        for i, role in enumerate(_ROLES):
            data = memoryview(values[role]).cast("B")
            crcs[f"data/{i}"] = crc32(data)
            file.seek(skeleton.add(f"data/{i}", len(data)))
            file.write(data)
        archive.close(skeleton)
        file.flush()
        skeleton.write(file.fileno(), crcs)


def _windows(folder: Path, model: Model, layout: Layout, length: int) -> Opened:
    """Describe every tensor as a window of the block."""
    records = [
        Record(_BLOCK_FILE, None, str(i), dtype, length, role)
        for i, (role, dtype) in enumerate(_ROLES.items())
    ]
    atoms: dict[AtomId, Held] = {}
    for number, (name, shape) in enumerate(model.shapes().items()):
        offset = number * 37 % _SPARE  # 37: no two experts alike, and rows do not line up
        for record, (role, dtype) in enumerate(_ROLES.items()):
            extent = Extent(record, (0,) * len(shape), shape, offset, row_major(shape))
            atoms[AtomId(name, role)] = Held(shape, dtype, [extent])
    group = {"wd_mult": 1.0, "lr_mult": 1.0, "is_decoupled_lr": False, "is_expert_parallel": False,
             "max_lr": 1e-3, "min_lr": 1e-4, "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8,
             "weight_decay": 0.1, "step": ITERATION}  # fmt: skip
    groups = [group, group | {"wd_mult": 0.0, "weight_decay": 0.0}]
    return Opened(
        # `torch`: whatever the target, all bytes are laid out anew.
        location=Location(folder, ITERATION, "torch"),
        dialect="0.19",
        args=model.arguments(layout),
        layout=layout,
        tensors=Tensors(folder, records, atoms),
        common={
            "checkpoint_version": 3.0,
            "iteration": ITERATION,
            "num_floating_point_operations_so_far": 0,
        },
        optimizer=OptimizerState("distributed", groups, None, ITERATION),
        inventory=take(atoms),
    )
