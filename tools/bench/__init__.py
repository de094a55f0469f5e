"""Benchmarks that hold up on a shared machine; results in RESULTS.md.

``layer`` is the command: our MoE layer beside upstream's. It starts ``process``, which builds both
(``sides``), takes them in turns (``clock``), cuts them into stages (``phases``), and measures what
no layer can avoid (``limit``), what each holds for backward (``held``) and sends (``traffic``), at
the sizes of ``shapes``; ``tables`` shows it. ``experts`` is the same for the experts alone, in
every back end, and makes the table from which ``auto`` chooses one (``form_choice``); ``route``
is the same for the router alone. ``memory`` accounts for the bytes of a step by phase and recompute
setting (``live_bytes``); ``reshard`` is for the checkpoint tools.
"""
