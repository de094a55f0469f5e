"""Stage 3: compute.

Receives the rows of this rank's experts, grouped by expert, with their weights; gives one result a
row, already weighted. Separate because this is the stage with interchangeable engines:
``sequential`` (one expert after another: the reference), ``grouped`` (all experts in two
``stacked`` weights, multiplied by one of the ``forms`` of a grouped GEMM) and, with Transformer
Engine on CUDA, Megatron's TEGroupedMLP.

Around the stacked experts' products: ``fp8`` rounds their operands, ``sparse`` masks their weights,
``offload`` keeps them in files. Only ``sequential``, ``grouped``, ``stacked`` and ``sharding``
import Megatron.
"""
