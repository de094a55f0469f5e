"""Stage 1: which experts each token goes to, and with what weight.

Receives hidden states, gives one :class:`Routing`: the decision as integers, made once, which
dispatch, losses, bias and telemetry all reuse. Separate because everything after it only needs
the decision, never the logits.

``scores`` logits → decision · ``topk`` the K best · ``capacity`` what an expert may take ·
``balance`` the losses · ``router`` the module that Megatron sees. All but ``router`` import torch
only.
"""
