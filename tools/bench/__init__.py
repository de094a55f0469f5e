"""Benchmarks that hold up on a shared machine; results in RESULTS.md.

``layer`` is the command: our MoE layer beside upstream's. It starts ``process``, which builds both
(``sides``), takes them in turns (``clock``), cuts them into stages (``phases``), and measures what
no layer can avoid (``limit``), what each holds for backward (``held``) and sends (``traffic``), at
the sizes of ``shapes``; ``tables`` shows it. ``gemm`` compares forms of the experts' product.
``route`` is the same for the router alone, and ``reshard`` for the checkpoint tools.
"""
