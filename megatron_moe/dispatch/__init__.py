"""Stage 2: tokens to their experts.

Receives hidden states and a :class:`~megatron_moe.route.decision.Routing`, gives the rows that this
rank's experts compute on, grouped by local expert, and one frozen :class:`~.plan.DispatchPlan`,
made once and used four times: dispatch, combine and both backwards.

A row changes its place three times on the way out, and three times back:

1. *token order → expert order* on the sending rank (``permute``), so that what goes to one rank
   lies together;
2. *sender → owner* (``exchange``): all-to-all over EP, then all-gather over ETP, whose ranks hold
   slices of the same experts;
3. *source order → local-expert order* on the owner, so that one expert's rows lie together.

``plan`` the record · ``permute`` and ``exchange`` the movements · ``dispatcher`` what the layer
calls. All import torch only.
"""
