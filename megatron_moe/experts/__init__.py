"""Stage 3: compute.

Receives the rows of this rank's experts, grouped by expert, with their weights; gives one result a
row, already weighted. Separate because this is the stage with interchangeable engines:
``sequential`` (one expert after another: the reference), ``grouped`` (all experts in one stacked
weight, torch's own grouped GEMM) and, with Transformer Engine on CUDA, Megatron's TEGroupedMLP.

``activation`` and ``grouped_gemm`` import torch only.
"""
