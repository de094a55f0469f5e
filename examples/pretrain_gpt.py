"""Pretrain a GPT, dense or with our mixture-of-experts layer, without any magic.

Megatron-LM's own ``pretrain_gpt.py`` needs no change: ``megatron-moe run pretrain_gpt.py …`` puts
the layer into it. This script shows the same thing done openly, for those who write their own. It
stands on ``megatron.training`` from the megatron-core wheel alone, and three lines in ``main`` are
all that is ours:

1. ``extra_args_provider=add_moe_arguments`` adds the few options that Megatron has not;
2. ``gpt_config_from_args`` returns a model config whose builder puts our layer where Megatron's
   own options (``--num-experts``, ``--moe-layer-freq``) want a mixture of experts. Without
   ``--num-experts`` it is Megatron's own config, and the run is exactly stock;
3. ``report_expert_load`` writes how many tokens each expert got, at each validation.

On GPUs: ``torchrun --nproc-per-node 8 examples/pretrain_gpt.py <Megatron's options>``.
On a CPU: ``megatron-moe run --device cpu -n 2 examples/pretrain_gpt.py <Megatron's options>``.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import (
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor

from megatron_moe.mcore.arguments import add_moe_arguments
from megatron_moe.mcore.builder import gpt_config_from_args
from megatron_moe.telemetry.counters import expert_load

# What this small script leaves to Megatron-LM's own: refused by name, never ignored.
NOT_HERE = (
    "sft",
    "fim_data",
    "mtp_num_layers",
    "hybrid_context_parallel",
    "dataloader_inter_document_masking",
)


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, ...]:
    """Build the training, validation and test sets that ``--data-path`` and ``--split`` name.

    Args:
        num_samples: Sequences wanted of each of the three.
        vp_stage: Which of this rank's pipeline chunks asks, where pipelining is interleaved.
    """
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        full_validation=args.full_validation,
        multiple_validation_sets=args.multiple_validation_sets,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
    )

    def reads_data() -> bool:
        # Only the ends of the pipeline see tokens, and there one rank of each tensor group reads.
        first = parallel_state.get_tensor_model_parallel_rank() == 0
        return first and is_first_or_last_pipeline_stage(vp_stage)

    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, num_samples, reads_data, config).build()


datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # every rank calls it


def get_batch(data_iterator: Iterator[dict[str, Tensor]], vp_stage: int | None) -> dict[str, Any]:
    """Give this rank its part of the next micro-batch; nothing inside the pipeline.

    One rank of each tensor-parallel group reads and the others receive; then the sequence is cut
    over the context-parallel ranks.
    """
    args = get_args()
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(("tokens", "labels", "loss_mask", "position_ids", "attention_mask"))
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {"attention_mask": None}
    if tp_rank == 0:
        batch |= {
            name: value.cuda(non_blocking=True) for name, value in next(data_iterator).items()
        }
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(),
    )
    return get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group()
    )


def loss_function(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum the cross entropy over the tokens that count.

    Returns:
        The sum, the number of tokens, and both again for the log; Megatron divides.
    """
    mask = loss_mask.reshape(-1).float()
    loss = (losses.reshape(-1).float() * mask).sum()
    num_tokens = mask.sum().detach().int()
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


def forward_step(data_iterator: Iterator[dict[str, Tensor]], model: torch.nn.Module) -> Any:
    """Run one micro-batch; Megatron calls it once for each of a step's micro-batches."""
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    losses = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return losses, partial(loss_function, batch["loss_mask"])


def report_expert_load(model: list[torch.nn.Module]) -> None:
    """Print how many tokens chose each expert since the last validation; called at each one."""
    load = expert_load(model, reset=True)
    stage = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    if stage.rank() == 0:  # one rank of each pipeline stage: each knows its own layers
        for layer, counts_E in sorted(load.items()):
            print(f" expert load | layer {layer} | {' '.join(map(str, counts_E.tolist()))}")


def main() -> None:
    """Parse, build the configs, and hand over to Megatron's training loop."""
    args = parse_and_validate_args(extra_args_provider=add_moe_arguments)
    if unsupported := [name for name in NOT_HERE if getattr(args, name, None)]:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in unsupported)
        raise ValueError(
            f"{options}: this example has not got it; use Megatron-LM's pretrain_gpt.py"
        )
    pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        non_loss_data_func=report_expert_load,
    )


if __name__ == "__main__":
    main()
