"""Which way of routing? An experiment that anyone can repeat on a CPU.

    python examples/routing_study.py --quick     # about 3 minutes on two idle cores
    python examples/routing_study.py             # every variant, three seeds: 25 to 45 minutes
    python examples/routing_study.py --variants topk,none,kl --seeds 5

The same small GPT learns the same real text (the source of Python's standard library) with each
way of choosing experts, each balancing method, each rule of capacity and each measure of stability
that this package has, at equal arithmetic a token. Model, schedule and optimizer are Megatron's.
What comes out, in ``runs/routing_study``: a table (console, CSV), every measurement (JSON), a
picture (PNG, SVG), and what the figures say in words, with 95 % intervals over seeds, also where an
idea does not help. ``docs/routing_study.md`` reads one such run.

The parts are in ``tools/study``. To try a router of your own, add three lines to its
``variants.py``; a choice that you have registered outside of this package goes there by its name::

    Variant(name="mine", family="choice", says="my own idea",
            moe={"router_choice": "my_package.my_module:MyChoice"})

Needs matplotlib: ``pip install 'megatron-moe[study]'``.
"""

from megatron_moe.tools.study.command import study_command
from megatron_moe.tools.study.routing import ROUTING

if __name__ == "__main__":
    study_command(ROUTING)()
