"""Stage 1: which experts each token goes to, and with what weight.

Receives hidden states, gives one :class:`~megatron_moe.route.decision.Routing`: the decision as
integers, made once, which dispatch, losses, bias and telemetry all reuse. Separate because
everything after it only needs the decision, never the logits.

``router`` is the module that Megatron sees, made of parts (``part``):

* the decision: ``scores`` logits → what is ranked · ``choice``, ``choices/``, ``topk`` which
  experts · ``decision`` the record · ``capacity`` what an expert may take · ``scope`` whose tokens
* balance: ``balance`` the formulas · ``losses`` attached to the weights · ``softmax`` in one pass ·
  ``bias`` without a loss
* stability: ``memory`` one decision for two passes · ``schedule`` noise and phases · ``distil``
  what a gate learns first · ``hysteresis`` · ``probe`` churn · ``replay`` records
* ``options`` what cannot work together, said before anything is built

All but ``router`` and ``losses`` import torch only.
"""
