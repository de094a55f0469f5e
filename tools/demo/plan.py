"""What the demo trains: sizes, and the options of Megatron that follow from them.

Both models do the same arithmetic for a token: the dense one has one feed-forward network, as wide
as the ``topk`` experts that a token visits in the mixture, which merely has more to choose from.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of the models, the data and the runs.

    Args:
        layers: Transformer layers; each has experts in the mixture.
        hidden: Width of the residual stream.
        heads: Attention heads.
        seq_length: Tokens in a sequence.
        vocab_size: Tokens to learn from the text.
        experts: Experts in a layer.
        topk: Experts that a token visits.
        expert_ffn: Width of one expert.
        global_batch: Sequences in a step, over all processes.
        iterations: Steps until the checkpoint.
        tail: Steps after it, trained twice: without a break, and resumed in another layout.
        eval_interval: Steps between validations.
        eval_iters: Batches in a validation.
        learning_rate: Its peak.
        text_mb: Megabytes of text to read.
    """

    layers: int = 3
    hidden: int = 128
    heads: int = 4
    seq_length: int = 128
    vocab_size: int = 1024
    experts: int = 8
    topk: int = 2
    expert_ffn: int = 256
    global_batch: int = 16
    iterations: int = 400
    tail: int = 20
    eval_interval: int = 100
    eval_iters: int = 8
    learning_rate: float = 3e-3
    text_mb: int = 5

    @property
    def train_iters(self) -> int:
        """Steps of a run that nothing interrupts."""
        return self.iterations + self.tail

    @property
    def tokens_per_step(self) -> int:
        """Tokens that a step trains on."""
        return self.global_batch * self.seq_length

    def parameters(self, *, experts: int, ffn: int) -> int:
        """Parameters of a model, or of the part that a token meets.

        Args:
            experts: Feed-forward networks counted in a layer; 1 and no router for a dense model.
            ffn: Width of each.
        """
        norm = 2 * self.hidden
        attention = (3 + 1) * self.hidden**2
        router = self.experts * self.hidden if ffn == self.expert_ffn else 0
        layer = 2 * norm + attention + router + experts * 2 * self.hidden * ffn
        return (self.vocab_size + self.seq_length) * self.hidden + self.layers * layer + norm

    @property
    def dense_ffn(self) -> int:
        """Width of the dense twin's feed-forward network."""
        return self.topk * self.expert_ffn

    @property
    def dense_parameters(self) -> int:
        """All of the dense twin."""
        return self.parameters(experts=1, ffn=self.dense_ffn)

    @property
    def active_parameters(self) -> int:
        """The part of the mixture that one token meets."""
        return self.parameters(experts=self.topk, ffn=self.expert_ffn)

    @property
    def moe_parameters(self) -> int:
        """All of the mixture."""
        return self.parameters(experts=self.experts, ffn=self.expert_ffn)


FULL = Plan()
QUICK = Plan(
    layers=2,
    hidden=64,
    seq_length=64,
    vocab_size=1024,
    expert_ffn=64,
    global_batch=8,
    iterations=8,
    tail=2,
    eval_interval=4,
    eval_iters=2,
    text_mb=1,
)


def shared_options(plan: Plan) -> list[str]:
    """Everything the runs have in common, but for the data."""
    return _options(
        num_layers=plan.layers,
        hidden_size=plan.hidden,
        num_attention_heads=plan.heads,
        seq_length=plan.seq_length,
        max_position_embeddings=plan.seq_length,
        disable_bias_linear=True,
        init_method_std=0.06,
        # Without dropout a resumed run must repeat the losses of one that was not interrupted.
        attention_dropout=0.0,
        hidden_dropout=0.0,
        micro_batch_size=plan.global_batch // 2,
        global_batch_size=plan.global_batch,
        train_iters=plan.train_iters,
        lr=plan.learning_rate,
        min_lr=plan.learning_rate / 10,
        lr_decay_style="cosine",
        lr_warmup_iters=max(1, plan.train_iters // 10),
        weight_decay=0.1,
        clip_grad=1.0,
        eval_interval=plan.eval_interval,
        eval_iters=plan.eval_iters,
        log_interval=1,
        num_workers=0,
        seed=1234,
    )


def dense_options(plan: Plan) -> list[str]:
    """The dense twin, on two processes that each take half of the batch."""
    return _options(ffn_hidden_size=plan.dense_ffn)


def expert_options(plan: Plan) -> list[str]:
    """The mixture, whatever the layout."""
    return _options(
        ffn_hidden_size=plan.expert_ffn,
        num_experts=plan.experts,
        moe_router_topk=plan.topk,
        # The weights of a token's experts sum to 1; the twin adds its two halves at full weight.
        moe_router_topk_scaling_factor=float(plan.topk),
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.01,
        moe_token_dispatcher_type="alltoall",
        use_distributed_optimizer=True,
        ckpt_format="torch_dist",
        dist_ckpt_optim_fully_reshardable=True,
    )


def first_layout(plan: Plan, checkpoints: str) -> list[str]:
    """Each of two processes owns half of the experts (EP=2) and takes half of the batch (DP=2)."""
    return _options(expert_model_parallel_size=2, save=checkpoints, save_interval=plan.iterations)


def second_layout(plan: Plan, checkpoints: str) -> list[str]:
    """Two processes share every matrix, experts too, and every sequence (TP=2 with SP, EP=1)."""
    return _options(
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        expert_model_parallel_size=1,
        load=checkpoints,
        ckpt_step=plan.iterations,
    )


def _options(**values: str | int | float | bool) -> list[str]:
    """Spell ``num_layers=4`` as ``--num-layers 4``, and True as the bare flag."""
    words = []
    for name, value in values.items():
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(f"{value:g}" if isinstance(value, float) else str(value))
    return words
