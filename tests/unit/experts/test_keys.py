from megatron_moe.experts.keys import accept_grouped_keys, accept_sequential_keys

SEQUENTIAL = {
    "mlp.experts.local_experts.0.linear_fc1.weight": 1,
    "mlp.experts.local_experts.11.linear_fc2.bias": 2,
}
GROUPED = {"mlp.experts.linear_fc1.weight0": 1, "mlp.experts.linear_fc2.bias11": 2}


def test_each_spelling_is_read_by_the_other():
    state = dict(SEQUENTIAL)
    accept_sequential_keys(None, state, "mlp.experts.")
    assert state == GROUPED
    accept_grouped_keys(None, state, "mlp.experts.")
    assert state == SEQUENTIAL


def test_other_keys_stay_and_extra_state_goes():
    state = {"mlp.router.weight": 1, "mlp.experts.linear_fc1._extra_state": 2}
    accept_sequential_keys(None, state, "mlp.experts.")
    assert state == {"mlp.router.weight": 1}
