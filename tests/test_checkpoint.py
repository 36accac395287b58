import json

import pytest
import torch

from mtl.checkpoint import find_checkpoint, load_checkpoint, pack, save_checkpoint, unpack
from mtl.errors import UserError

STATE = {
    "numbers": {"step": 3, "value": 0.1 + 0.2, "none": None, "names": ["情感", "🙂"]},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0), "m": torch.arange(4.0)}}, "betas": (0.9, 0.999)},
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
}


def test_round_trip_is_exact(tmp_path):
    save_checkpoint(tmp_path, 3, STATE, keep_last=2)
    loaded = load_checkpoint(tmp_path)
    assert loaded["numbers"] == STATE["numbers"]
    assert loaded["optimizer"]["betas"] == (0.9, 0.999)
    assert torch.equal(loaded["optimizer"]["state"][0]["m"], torch.arange(4.0))
    assert torch.equal(loaded["half"], STATE["half"])
    assert loaded["half"].dtype == torch.bfloat16


def test_tensors_that_share_memory_are_saved_apart(tmp_path):
    flat = torch.arange(6.0)
    save_checkpoint(tmp_path, 1, {"a": flat[:3], "b": flat[2:], "c": flat[::2]}, keep_last=1)
    loaded = load_checkpoint(tmp_path)
    assert loaded["a"].tolist() == [0, 1, 2]
    assert loaded["b"].tolist() == [2, 3, 4, 5]
    assert loaded["c"].tolist() == [0, 2, 4]


def test_only_plain_values_and_tensors():
    with pytest.raises(TypeError, match="set"):
        pack({"a": {1, 2}}, {})
    tensors = {}
    packed = pack({1: "a", "b": (1, [torch.ones(1)])}, tensors)
    assert unpack(json.loads(json.dumps(packed)), tensors) == {1: "a", "b": (1, [torch.ones(1)])}


def test_old_checkpoints_are_deleted_and_the_newest_is_latest(tmp_path):
    for step in (5, 10, 100, 1000):
        save_checkpoint(tmp_path, step, {"step": step}, keep_last=2)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000100", "step-001000"]
    assert find_checkpoint(tmp_path).name == "step-001000"
    assert load_checkpoint(tmp_path)["step"] == 1000
    assert load_checkpoint(tmp_path / "step-000100")["step"] == 100


def test_the_checkpoint_just_written_is_never_deleted(tmp_path):
    for step in (999_999, 1_000_000):
        save_checkpoint(tmp_path, step, {"step": step}, keep_last=1)
    assert load_checkpoint(tmp_path)["step"] == 1_000_000
    save_checkpoint(tmp_path, 85, {"step": 85}, keep_last=1)  # resumed from an older one, say
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000085"]


def test_an_unfinished_write_is_not_a_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 1, {"step": 1}, keep_last=2)
    (tmp_path / "step-000002.tmp").mkdir()
    assert load_checkpoint(tmp_path)["step"] == 1
    save_checkpoint(tmp_path, 2, {"step": 2}, keep_last=2)
    assert load_checkpoint(tmp_path)["step"] == 2
    assert not (tmp_path / "step-000002.tmp").exists()


@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_is_found_and_named(tmp_path, name, damage):
    folder = save_checkpoint(tmp_path, 1, STATE, keep_last=1)
    file = folder / name
    content = bytearray(file.read_bytes())
    if damage == "delete":
        file.unlink()
    elif damage == "truncate":
        file.write_bytes(content[:-3])
    else:
        position = content.index(b"sha256") if name == "manifest.json" else len(content) // 2
        content[position] ^= 1
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"step-000001|no checkpoint there"):
        load_checkpoint(tmp_path)


def test_no_checkpoint_is_a_clear_line(tmp_path):
    with pytest.raises(UserError, match="no checkpoint there"):
        find_checkpoint(tmp_path)
