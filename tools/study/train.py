"""One variant with one seed, trained by Megatron's own schedule and optimizer on this CPU.

Imports Megatron: only for processes in which the CPU backend is active.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_moe.config import MoEConfig
from megatron_moe.layer import MoELayer
from megatron_moe.mcore.specs import gpt_block_spec
from megatron_moe.mcore.token_ids import feed_token_ids
from megatron_moe.telemetry.counters import routers_of, routing_counts
from megatron_moe.tools.bench.held import held_bytes
from megatron_moe.tools.study.history import Point, Run
from megatron_moe.tools.study.measures import LoadMeter, state_bytes
from megatron_moe.tools.study.plan import Plan
from megatron_moe.tools.study.text import Text
from megatron_moe.tools.study.variants import AUX_COEFF, Variant
from megatron_moe.tools.study.watch import RouterWatch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_FIRST_LOSS_SCALE = 2.0**16  # Megatron's 2**32 takes a dozen skipped updates to come down
_SCALE_GROWTHS = 8  # a run; Megatron's window of 1000 updates is longer than a run


def enter_world() -> None:
    """Become a Megatron world of one process, on one thread."""
    torch.set_num_threads(1)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)


def model_config(plan: Plan, variant: Variant) -> TransformerConfig:
    """Megatron's configuration of the small GPT, with the variant's changes."""
    width = plan.expert_ffn * variant.widen
    fields: dict[str, Any] = {
        "num_layers": plan.layers,
        "hidden_size": plan.hidden,
        "num_attention_heads": plan.heads,
        "ffn_hidden_size": width,
        "moe_ffn_hidden_size": width,
        "num_moe_experts": plan.experts,
        "moe_router_topk": plan.topk,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": AUX_COEFF,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": True,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": 0.06,
        "transformer_impl": "local",
        "use_cpu_initialization": True,
        "params_dtype": DTYPES[variant.precision],
        "bf16": variant.precision == "bf16",
        "fp16": variant.precision == "fp16",
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        # Before the model is built: the router adds its end of a global batch to it.
        "finalize_model_grads_func": finalize_model_grads,
    }
    return TransformerConfig(**(fields | dict(variant.model)))


def moe_options(plan: Plan, variant: Variant) -> MoEConfig:
    """Our options: the variant's, with shares of the run as steps."""
    steps = {name: round(share * plan.steps) for name, share in variant.schedule.items()}
    return MoEConfig(**variant.moe, **steps)


class Training:
    """A model with its optimizer, and what is read from its routers.

    Args:
        plan: Sizes.
        variant: Router and precision.
        text: What to train and validate on.
        seed: Of everything drawn.
    """

    def __init__(self, plan: Plan, variant: Variant, text: Text, seed: int) -> None:
        self.plan, self.text = plan, text
        self.batches = text.batches(plan, seed)
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        self.config = model_config(plan, variant)
        model = GPTModel(
            config=self.config,
            transformer_layer_spec=gpt_block_spec(self.config, moe=moe_options(plan, variant)),
            vocab_size=plan.vocab_size,
            max_sequence_length=plan.seq_length,
            position_embedding_type="rope",
        )
        settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        half = self.config.bf16 or self.config.fp16
        inner = Float16Module(self.config, model) if half else model
        self.model = DistributedDataParallel(self.config, settings, inner)
        self.optimizer = _optimizer(plan, self.config, self.model)
        self.config.grad_scale_func = self.optimizer.scale_loss
        feed_token_ids(model)  # what the plugin's own builder does
        self.watch = RouterWatch(model, routers_of(model), plan.experts)
        self.load = LoadMeter()
        self.skipped = 0

    def step(self, index: int) -> None:
        """Make update number ``index``, from 0, and count the load."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.plan, index)
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter(self.batches[index].split(self.plan.micro_batch)),
            model=self.model,
            num_microbatches=self.plan.num_micro_batches,
            seq_length=self.plan.seq_length,
            micro_batch_size=self.plan.micro_batch,
            forward_only=False,
        )
        made, *_ = self.optimizer.step()
        self.skipped += not made
        get_moe_metrics_tracker().clear()
        for counts in routing_counts(self.model, reset=True).values():
            self.load.add(counts.load_E, counts.dropped_E, counts.tokens)

    def measure(self, step: int) -> Point:
        """Take a measurement after ``step`` updates."""
        point = Point(
            step=step,
            loss=self._validate(),
            churn=self.watch.probe_churn(),
            context_churn=self.watch.context_churn(),
            **self.load.means(),
        )
        self.load.reset()
        return point

    def held(self) -> int:
        """Bytes that the first MoE layer keeps for the backward pass of one micro-batch."""
        shape = self.plan.seq_length, self.plan.micro_batch, self.plan.hidden
        x_SBD = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        layer = next(m for m in self.model.modules() if isinstance(m, MoELayer))
        held = held_bytes(layer, x_SBD.to(self.config.params_dtype).requires_grad_())
        get_moe_metrics_tracker().clear()
        return held

    def _validate(self) -> float:
        """Mean loss on the validation set."""
        self.model.eval()
        with torch.no_grad():
            batches = self.text.validation.split(self.plan.micro_batch)
            losses = [_losses(self.model, windows).mean() for windows in batches]
        self.model.train()
        return float(torch.stack(losses).mean())


def train(plan: Plan, variant: Variant, text: Text, seed: int, on_step: Callable[[], None]) -> Run:
    """Train one variant to the end.

    Args:
        plan: Sizes.
        variant: Router and precision.
        text: What to train and validate on.
        seed: Of everything drawn.
        on_step: Called after each update.

    Raises:
        FloatingPointError: The loss is no longer a number.
    """
    started, cpu_started = time.monotonic(), time.process_time()
    training = Training(plan, variant, text, seed)
    measured, points = set(plan.measured_steps()), []
    for index in range(plan.steps):
        training.step(index)
        if index + 1 in measured:
            points.append(training.measure(index + 1))
            if not math.isfinite(points[-1].loss):
                raise FloatingPointError(
                    f"{variant.name}, seed {seed}: the loss after {index + 1} steps is "
                    f"{points[-1].loss}"
                )
        on_step()
    return Run(
        variant=variant.name,
        seed=seed,
        points=tuple(points),
        seconds=time.monotonic() - started,
        cpu_seconds=time.process_time() - cpu_started,
        skipped=training.skipped,
        state_bytes=state_bytes(training.model.module, training.optimizer),
        held_bytes=training.held(),
    )


def learning_rate(plan: Plan, index: int) -> float:
    """Rise over the first tenth of the steps, then a cosine down to a tenth of the peak."""
    warm = max(1, plan.steps // 10)
    if index < warm:
        return plan.learning_rate * (index + 1) / warm
    done = (index - warm) / max(1, plan.steps - warm)
    return plan.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done))


def _optimizer(plan: Plan, model_config: TransformerConfig, model: Any) -> Any:
    config = OptimizerConfig(
        optimizer="adam",
        lr=plan.learning_rate,
        weight_decay=0.1,
        adam_beta2=0.95,
        clip_grad=1.0,
        params_dtype=model_config.params_dtype,
        bf16=model_config.bf16,
        fp16=model_config.fp16,
        initial_loss_scale=_FIRST_LOSS_SCALE,
        loss_scale_window=max(1, plan.steps // _SCALE_GROWTHS),
    )
    return get_megatron_optimizer(config, [model], use_gloo_process_groups=False)


def _losses(model: Any, windows: Tensor) -> Tensor:
    tokens, labels = windows[:, :-1], windows[:, 1:]
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return model(tokens, positions, None, labels=labels)


def _forward_step(windows: Iterator[Tensor], model: Any) -> tuple[Tensor, Any]:
    def loss_of(losses: Tensor) -> tuple[Tensor, Tensor, dict]:
        return losses.sum(), torch.tensor(losses.numel(), dtype=torch.int), {}

    return _losses(model, next(windows)), loss_of
