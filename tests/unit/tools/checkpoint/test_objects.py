"""A flipped bit in what is not a tensor of the model is found too."""

from helpers.handmade import Recipe, dist, legacy

from megatron_moe.tools.checkpoint.read import objects
from megatron_moe.tools.checkpoint.read.open import open_checkpoint


def _flip(path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_whole_checkpoints_have_no_damage(tmp_path):
    for name, make in (("a", legacy), ("b", dist)):
        assert list(objects.damaged(open_checkpoint(make(tmp_path / name, Recipe())))) == []


def test_a_flipped_bit_in_an_object(tmp_path):
    opened = open_checkpoint(dist(tmp_path, Recipe()))
    key, place = next(iter(opened.objects.items()))
    path = opened.folder / place.path
    start = place.offset + path.read_bytes()[place.offset :].index(b"\x80\x02") + 2
    _flip(path, start)
    found = list(objects.damaged(opened))
    assert [(file, what) for file, what, _ in found] == [(place.path, key)]
    assert "record data.pkl does not match its CRC" in found[0][2]


def test_a_flipped_bit_in_a_legacy_pickle(tmp_path):
    opened = open_checkpoint(legacy(tmp_path, Recipe()))
    name = next(iter(opened.chunks))[0]
    data = (opened.folder / name).read_bytes()
    _flip(opened.folder / name, data.index(b"\x80\x02") + 200)
    causes = [cause for _, _, cause in objects.damaged(opened)]
    assert len(causes) == 1
    assert "record data.pkl does not match its CRC" in causes[0]
