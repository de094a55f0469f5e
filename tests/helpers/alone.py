"""Process groups of one rank, for tests that need no processes."""

from megatron_moe.parallel.groups import ExpertGroups


class Alone:
    """Stands in for a process group of one rank."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def alone() -> ExpertGroups:
    return ExpertGroups(
        **dict.fromkeys(("ep", "etp", "edp", "tp_ep", "tp_cp", "tp_dp_cp"), Alone())
    )
