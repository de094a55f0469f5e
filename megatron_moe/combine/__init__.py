"""Stage 4: results back to their tokens, by the same plan, in the reverse order.

Each step is the adjoint of its step in ``dispatch``: ⟨dispatch(x), y⟩ = ⟨x, combine(y)⟩. Weights
are applied where Megatron applies them, inside the experts, before the second linear layer.
"""
