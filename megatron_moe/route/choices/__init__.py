"""The ways to choose experts, one family a file; ``--moe-router-choice`` names one.

``topk`` the K best, with groups and bias; Switch's one; GShard's two · ``adaptive`` as many as a
token needs · ``expert_choice`` experts choose tokens · ``sinkhorn`` a balanced assignment ·
``quantile`` thresholds that balance · ``hashing`` no router at all, as a baseline.
"""
