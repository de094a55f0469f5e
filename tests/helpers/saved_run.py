"""A run of Megatron's own training that saves, or resumes from, a checkpoint: as a value.

What is in the files is what a user's run writes: arguments come from real flags, the model, the
optimizer and the scheduler from Megatron's ``setup_model_and_optimizer``, the files from its
``save_checkpoint``. This half knows nothing of Megatron; the half that trains is `saving.py`.

    losses = pool.run(train_and_save, run, str(folder), world_size=run.world_size)[0]
    again = pool.run(resume, other, str(folder), world_size=other.world_size)[0]
    assert_same_losses(again, losses[2:], bf16=run.bf16)
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.layout import Layout

SAMPLES = 4  # of a global batch
VOCABULARY = 61  # padded to 64 wherever TP divides 8, so that the softmax is over the same rows

MODEL = (
    *("--num-layers", "4", "--hidden-size", "16", "--num-attention-heads", "4"),
    *("--ffn-hidden-size", "24", "--moe-ffn-hidden-size", "16"),
    *("--num-experts", "4", "--moe-router-topk", "2", "--moe-aux-loss-coeff", "1e-2"),
    *("--position-embedding-type", "rope", "--normalization", "RMSNorm"),
)

# As a user has them, but for the epsilon: with a small one, a gradient that is zero but for
# rounding takes a full step in a direction of its own in each layout.
TRAINING = (
    *("--seq-length", "8", "--max-position-embeddings", "8", "--micro-batch-size", "1"),
    *("--global-batch-size", str(SAMPLES), "--train-iters", "20", "--seed", "7"),
    *("--lr", "2e-2", "--min-lr", "2e-3", "--lr-decay-style", "cosine", "--lr-warmup-iters", "1"),
    *("--adam-eps", "1e-3", "--weight-decay", "1e-2", "--clip-grad", "0.5"),
    *("--init-method-std", "0.2"),  # large, so that every weight is felt in the loss
    *("--hidden-dropout", "0", "--attention-dropout", "0", "--mock-data"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCABULARY)),
    *("--make-vocab-size-divisible-by", "8", "--moe-token-dispatcher-type", "alltoall"),
    *("--moe-router-dtype", "fp32", "--eval-iters", "0", "--log-interval", "1"),
)

_OPTIMIZERS = {
    "none": (),
    "plain": (),
    "distributed": ("--use-distributed-optimizer",),
    "fully": ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"),
}


_LIMITS = {False: (2e-6, 2e-6), True: (2e-3, 1.2e-2)}  # by bf16; of the first step and the others


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """How a run is trained and in what form it is saved, or resumed.

    Args:
        layout: Sizes of the parallel axes.
        world_size: Ranks.
        flags: Megatron's flags that differ from :data:`MODEL` and :data:`TRAINING`; the last wins.
        form: ``torch`` or ``torch_dist``.
        optimizer: ``plain``; ``distributed`` (in ``torch_dist``: ``dp_reshardable``); ``fully``
            (``fully_reshardable``); ``none`` to save and load none (training is with ``plain``).
        bf16: Whether weights are bf16 with fp32 masters; else all is fp32.
        impl: Whose MoE layer: ``plugin`` or ``megatron``.
        overlap: Whether gradients are reduced during the backward pass, in several buckets.
        base: Whether the model is :data:`MODEL` with ``flags``; else ``flags`` are all of it.
    """

    layout: Layout = field(default_factory=Layout)
    world_size: int = 2
    flags: tuple[str, ...] = ()
    form: str = "torch_dist"
    optimizer: str = "distributed"
    bf16: bool = True
    impl: str = "plugin"
    overlap: bool = False
    base: bool = True

    def command_line(self) -> list[str]:
        """Return Megatron's flags for this run, without the folders."""
        assert self.layout.fits(self.world_size), f"{self.layout} on {self.world_size} ranks"
        assert (self.form, self.optimizer) != ("torch", "fully"), "the plain form has no such kind"
        sizes = self.layout
        words = [
            *(MODEL if self.base else ()),
            *TRAINING,
            *("--tensor-model-parallel-size", str(sizes.tp)),
            *("--pipeline-model-parallel-size", str(sizes.pp)),
            *("--context-parallel-size", str(sizes.cp)),
            *("--expert-model-parallel-size", str(sizes.ep)),
            *("--expert-tensor-parallel-size", str(sizes.etp)),
            *("--moe-layer-impl", self.impl, "--ckpt-format", self.form),
            *_OPTIMIZERS[self.optimizer],
        ]
        if sizes.vpp and "--pipeline-model-parallel-layout" not in self.flags:
            words += ["--num-virtual-stages-per-pipeline-rank", str(sizes.vpp)]
        if sizes.tp > 1:
            words.append("--sequence-parallel")
        if self.bf16:
            words.append("--bf16")
        if self.overlap:
            words += ["--overlap-grad-reduce", "--ddp-bucket-size", "1000"]
        if self.form != "torch" or self.optimizer != "distributed":
            # Making them costs a second, and each group is gloo's already.
            words.append("--disable-gloo-process-groups")
        return [*words, *self.flags]


def train_and_save(
    world: Any, run: SavedRun, folder: str, before: int = 2, more: int = 5
) -> list[float]:
    """Train ``before`` steps, save, train ``more``; return each step's loss, the same on any rank.

    To be sent to the pool. The loss is the mean over the global batch.
    """
    from helpers import saving

    return saving.train_and_save(run, folder, before, more)


def resume(
    world: Any, run: SavedRun, folder: str, more: int = 5, strict: bool = True
) -> list[float]:
    """Start anew from the checkpoint in ``folder`` and train ``more`` steps; return their losses.

    To be sent to the pool. The run sees the batches that the saved run went on with. With
    ``optimizer="none"`` neither moments nor the schedule of the learning rate are read, so that
    only the first loss is that of the saved run.

    Args:
        world: The team.
        run: How to go on; the model must be that of the checkpoint.
        folder: Where ``latest_checkpointed_iteration.txt`` stands.
        more: Steps.
        strict: Whether a key that is left over on either side fails the call.
    """
    from helpers import saving

    return saving.resume(run, folder, more, strict)


def assert_same_losses(
    found: list[float], expected: list[float], *, bf16: bool = True, exact: bool = False
) -> None:
    """Compare the losses of two runs step by step.

    Megatron's own changes of layout differ by at most 3e-7 in fp32. In bf16 that is 1e-3 in the
    first step and 6e-3 later, where a wrong moment may hide: compare other layouts in fp32.

    Args:
        found: What a resumed run computed.
        expected: What the saved run went on with.
        bf16: Whether weights and activations are; else they are fp32.
        exact: Whether the layouts are the same, so that every bit is.
    """
    assert len(found) == len(expected), f"{len(found)} losses, expected {len(expected)}"
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        limit = 0.0 if exact else _LIMITS[bf16][min(step, 1)]
        what = f"loss of step {step} after the resume: {one!r}, expected {other!r}"
        assert abs(one - other) <= limit * abs(other), f"{what}; all: {found} and {expected}"


def iteration_folder(folder: Path | str) -> Path:
    """Return the folder of the checkpoint that the tracker names."""
    name = (Path(folder) / "latest_checkpointed_iteration.txt").read_text().strip()
    return Path(folder) / (name if name == "release" else f"iter_{int(name):07d}")


_GATED = ("--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights")
_ATTENTION = ("--group-query-attention", "--num-query-groups", "2", "--qk-layernorm")
_SHARED = ("--moe-shared-expert-intermediate-size", "16", "--moe-shared-expert-gate")
_BIASED = ("--moe-router-enable-expert-bias", "--moe-router-score-function", "sigmoid")
_RICH = (*_GATED, *_ATTENTION, "--add-qkv-bias", *_SHARED, *_BIASED)
_MTP = ("--mtp-num-layers", "1")
_DENSE_FIRST = ("--moe-layer-freq", "([0]*1+[1]*3)")
_UNEVEN = ("--decoder-first-pipeline-num-layers", "1")
_STACKED = ("--moe-grouped-gemm",)

# All state that a router can have of its own: cut, iteration, probe with its ring, cache.
ROUTER_STATE = (
    *("--moe-router-choice", "top_p", "--moe-probe-tokens", "4", "--moe-hysteresis-margin", "0.1"),
    *("--moe-router-freeze-iter", "4"),
)

# Checkpoints that have, between them, every form, kind of optimizer, axis and part of a model.
DOZEN: dict[str, SavedRun] = {
    "dist_fully_tp2ep2": SavedRun(layout=Layout(tp=2, ep=2), optimizer="fully", flags=_GATED),
    "dist_fully_tp2etp2": SavedRun(
        layout=Layout(tp=2, etp=2), optimizer="fully", flags=(*_GATED, *_DENSE_FIRST, *_STACKED)
    ),
    "dist_fully_mtp_shared_bias": SavedRun(
        layout=Layout(ep=2), optimizer="fully", flags=(*_RICH, *_MTP)
    ),
    "dist_fully_pp2_tied": SavedRun(
        layout=Layout(pp=2), optimizer="fully", flags=("--swiglu", "--disable-bias-linear")
    ),
    "dist_fully_uneven_dp2": SavedRun(
        layout=Layout(pp=2),
        world_size=4,
        optimizer="fully",
        flags=("--num-layers", "5", *_GATED, *_UNEVEN, "--decoder-last-pipeline-num-layers", "4"),
    ),
    "dist_fully_fp32": SavedRun(layout=Layout(ep=2), optimizer="fully", flags=_GATED, bf16=False),
    "dist_dp_tp2pp2ep2": SavedRun(
        layout=Layout(tp=2, pp=2, ep=2), world_size=4, flags=(*_GATED, *_STACKED)
    ),
    "dist_dp_dp2_buckets": SavedRun(flags=_RICH, overlap=True),
    "dist_dp_etp2": SavedRun(layout=Layout(etp=2), flags=_GATED),
    "dist_dp_vpp_tied": SavedRun(
        layout=Layout(pp=2, vpp=2), flags=("--disable-bias-linear", "--swiglu", *_SHARED)
    ),
    "dist_plain_ep2": SavedRun(
        layout=Layout(ep=2), optimizer="plain", impl="megatron", flags=_GATED
    ),
    "dist_plain_biases": SavedRun(layout=Layout(tp=2, ep=2), optimizer="plain", flags=_STACKED),
    "dist_none_ep2": SavedRun(layout=Layout(ep=2), optimizer="none", flags=_RICH),
    "dist_fully_router_state": SavedRun(
        layout=Layout(ep=2), optimizer="fully", flags=(*_GATED, *ROUTER_STATE), bf16=False
    ),
    "torch_distopt_tp2pp2ep2": SavedRun(
        layout=Layout(tp=2, pp=2, ep=2), world_size=4, form="torch", flags=_RICH
    ),
    "torch_distopt_vpp": SavedRun(
        layout=Layout(pp=2, vpp=2), form="torch", flags=(*_GATED, *_DENSE_FIRST)
    ),
    "torch_distopt_dp2_buckets": SavedRun(
        layout=Layout(ep=2), form="torch", overlap=True, flags=(*_GATED, *_STACKED)
    ),
    "torch_distopt_pp2_tied": SavedRun(layout=Layout(pp=2), form="torch"),
    "torch_distopt_mtp": SavedRun(layout=Layout(tp=2, ep=2), form="torch", flags=(*_RICH, *_MTP)),
    "torch_plain_ep2": SavedRun(
        layout=Layout(ep=2), form="torch", optimizer="plain", impl="megatron", flags=_GATED
    ),
    "torch_plain_tp2_biases": SavedRun(layout=Layout(tp=2, ep=2), form="torch", optimizer="plain"),
    "torch_plain_fp32": SavedRun(
        layout=Layout(tp=2), form="torch", optimizer="plain", flags=_RICH, bf16=False
    ),
    "torch_none_ep2": SavedRun(layout=Layout(ep=2), form="torch", optimizer="none", flags=_GATED),
}
