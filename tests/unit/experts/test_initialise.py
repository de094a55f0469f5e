import torch

from megatron_moe.experts.initialise import draw_seed, initialise_expert


def _filled(num_shards, shard_dim, parts=1):
    full = (6, 4)
    out = []
    for rank in range(num_shards):
        shape = list(full)
        shape[shard_dim] //= num_shards
        mine = [torch.empty(shape) for _ in range(parts)]
        initialise_expert(
            mine,
            torch.nn.init.normal_,
            7,
            shard_dim=shard_dim,
            shard_rank=rank,
            num_shards=num_shards,
        )
        out.append(mine)
    return [torch.cat([mine[i] for mine in out], dim=shard_dim) for i in range(parts)]


def test_weights_do_not_depend_on_the_number_of_slices():
    for dim in (0, 1):
        for one, two in zip(_filled(1, dim, parts=2), _filled(2, dim, parts=2), strict=True):
            assert torch.equal(one, two)


def test_halves_differ_and_the_default_generator_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    gate, linear = _filled(1, 0, parts=2)
    assert not torch.equal(gate, linear)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_follow_the_default_generator():
    torch.manual_seed(3)
    one = draw_seed()
    torch.manual_seed(3)
    assert draw_seed() == one != draw_seed()
