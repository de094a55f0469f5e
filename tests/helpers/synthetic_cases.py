"""Hypothesis strategies: random models, and layouts that are legal for them."""

from typing import Any

from helpers.synthetic import Arch
from hypothesis import strategies as st


@st.composite
def architectures(draw: Any, *, layers: int = 4) -> Arch:
    """Draw a model: dense, MoE or mixed, with any of its optional parts."""
    kind = draw(st.sampled_from(["moe", "moe", "dense", "mixed"]))
    count = draw(st.integers(1, layers))
    moe = {
        "moe": [True] * count,
        "dense": [False] * count,
        "mixed": draw(st.lists(st.booleans(), min_size=count, max_size=count)),
    }[kind]
    flags = {
        name: draw(st.booleans())
        for name in (
            "gated", "bias", "norm_bias", "qk_norm", "shared", "shared_gate", "expert_bias", "tied",
            "engine", "grouped", "plugin", "torch_adam",
        )
    }  # fmt: skip
    return Arch(
        moe=tuple(moe),
        experts=draw(st.sampled_from([2, 3, 4, 6])),
        mtp=draw(st.sampled_from([0, 0, 0, 1, 2])),
        vocab=draw(st.integers(5, 24)),
        divisible_by=draw(st.sampled_from([1, 2, 4, 8])),
        half=draw(st.sampled_from([True, True, False])),
        **flags,
    )


@st.composite
def requests(draw: Any, arch: Arch, *, optimizer: bool = True) -> dict[str, Any]:
    """Draw a target that is legal for a model, as options of `Request`, none left open."""
    form = draw(st.sampled_from(["torch", "torch_dist"]))
    tp = draw(st.sampled_from([1, 2, 4]))
    divisors = [n for n in (1, 2, 3, 4) if arch.experts % n == 0] if any(arch.moe) else [1]
    ep = draw(st.sampled_from(divisors))
    etp = draw(st.sampled_from([n for n in (1, 2, 4) if form == "torch_dist" or n <= tp]))
    dp = 1
    while tp * dp % (ep * etp):
        dp += 1
    optims = ["plain", "fully", "dp"] if optimizer else ["keep"]
    wishes = {
        "form": form,
        "tp": tp,
        "ep": ep,
        "etp": etp,
        "dp": dp * draw(st.sampled_from([1, 2])),
        "optim": draw(st.sampled_from(optims)),
        "dialect": draw(st.sampled_from(["0.16", "0.17", "0.19"])),
        "divisible_by": draw(st.sampled_from([1, 2, 4, 8])),
        "links": draw(st.booleans()),
    }
    # Names in torch files, the order in flat buffers of both. GroupedMLP has no biases.
    spellings = ["sequential", "grouped", "stacked", "single"]
    spellings += [] if arch.bias else ["grouped_mlp"]
    wishes["experts"] = draw(st.sampled_from(spellings))
    specs = {"grouped": ["te"], "single": ["te"], "stacked": ["local"]}
    wishes["spec"] = draw(st.sampled_from(specs.get(wishes["experts"], ["local", "te"])))
    return wishes | draw(pipelines(len(arch.moe), arch.mtp))


@st.composite
def pipelines(draw: Any, layers: int, mtp: int) -> dict[str, Any]:
    """Draw how layers are dealt to stages: evenly, with uneven ends, or as a text says."""
    pp = draw(st.integers(1, 3))
    vpp = draw(st.integers(1, 2)) if pp > 1 else 1
    how = draw(st.sampled_from(["even", "ends", "text"]))
    sizes: dict[str, Any] = {"pp": pp, "vpp": vpp}
    if how == "ends" and pp > 1:
        for first in range(vpp, layers, vpp):
            left = layers - first
            for last in [None, *range(vpp, left, vpp)]:
                rest, stages = left - (last or 0), pp - 1 - (last is not None)
                if stages and rest and rest % (stages * vpp) == 0 and draw(st.booleans()):
                    return sizes | {"first": first, "last": last}
    if layers % (pp * vpp) == 0 and how != "text":
        return sizes
    edges = sorted(
        draw(st.lists(st.integers(0, layers), min_size=pp * vpp - 1, max_size=pp * vpp - 1))
    )
    counts = [b - a for a, b in zip([0, *edges], [*edges, layers], strict=True)]
    text = "|".join("t" * count for count in counts)
    return sizes | {"pipeline_layout": f"E{text}{'m' * mtp}L"}


@st.composite
def journeys(draw: Any, *, layers: int = 4) -> tuple[Arch, list[dict[str, Any]], bool]:
    """Draw a model, targets A, B and C, and whether there is an optimizer."""
    arch = draw(architectures(layers=layers))
    optimizer = draw(st.sampled_from([True, True, True, False]))
    return arch, [draw(requests(arch, optimizer=optimizer)) for _ in range(3)], optimizer
