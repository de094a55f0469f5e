"""Checkpoints offline: inspect, reshard, verify, without GPU, Megatron or torch.

The flow, one folder a step: `read` (find it, tell its format, locate every atom) → `model` (atoms,
layouts, the table of what a model is made of) → `plan` (the target as data, every element accounted
for) → `write` (workers, journal, atomic publication). `stored` knows bytes: zip archives, pickles,
CRCs. `inspect`, `verify` and `cli` are the commands.
"""
