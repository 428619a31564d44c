import json
import os
import struct

import pytest
import torch
from torch import nn

from shared.models import create
from shared.models.checkpoints import load_backbone, save_safetensors


@pytest.fixture
def source():
    torch.manual_seed(0)
    model = create("resnet8")
    for buffer in model.buffers():
        buffer.copy_(torch.rand_like(buffer.float()) + 1)
    return model


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"epoch": 240, "model": state, "best_acc": torch.tensor(76.4)},
        lambda state: {"state_dict": state},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
    ],
    ids=["plain", "model", "state_dict", "module.", "model+module."],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_load_strictly(tmp_path, source, wrap, zipped):
    path = tmp_path / "ckpt_epoch_240.pth"
    torch.save(wrap(source.state_dict()), path, _use_new_zipfile_serialization=zipped)
    model = create("resnet8")
    load_backbone(model, path)
    assert same_weights(model, source)


def test_safetensors_written_by_hand_load(tmp_path):
    """Bytes after the format's description: length, JSON header, little-endian data."""
    model = nn.Linear(2, 1)
    header = {
        "weight": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]},
        "bias": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "weights.bin"  # told by content, not by suffix
    path.write_bytes(struct.pack("<Q", len(text)) + text + struct.pack("<3f", 1.5, -2.0, 0.25))
    load_backbone(model, str(path))
    assert model.weight.tolist() == [[1.5, -2.0]] and model.bias.tolist() == [0.25]


def test_saved_safetensors_round_trip_with_metadata_and_nothing_left_behind(tmp_path, source):
    path = tmp_path / "student.safetensors"
    path.write_bytes(b"an older file")
    source.to(memory_format=torch.channels_last)
    save_safetensors(source, path, {"recipe": "table1", "seed": "5"})
    assert os.listdir(tmp_path) == ["student.safetensors"]
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    assert header["__metadata__"] == {"recipe": "table1", "seed": "5"}
    assert header["fc.weight"]["shape"] == [100, 64]
    model = create("resnet8")
    load_backbone(model, path)
    assert same_weights(model, source)


def test_a_failed_save_leaves_the_old_file(tmp_path, source, monkeypatch):
    path = tmp_path / "student.safetensors"
    path.write_bytes(b"an older file")

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_safetensors(source, path, {})
    assert path.read_bytes() == b"an older file"
    assert os.listdir(tmp_path) == ["student.safetensors"]


def test_tied_weights_are_saved(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    save_safetensors(model, tmp_path / "tied.safetensors", {})
    other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    load_backbone(other, tmp_path / "tied.safetensors")
    assert torch.equal(other[1].weight, model[0].weight)


def test_metadata_must_be_text(tmp_path, source):
    with pytest.raises(ValueError, match="metadata 'seed': 5"):
        save_safetensors(source, tmp_path / "a.safetensors", {"seed": 5})


def test_a_mismatch_lists_missing_unexpected_and_reshaped_and_changes_nothing(tmp_path, source):
    state = source.state_dict()
    del state["conv1.weight"]
    state["head.gamma"] = torch.zeros(3)
    state["fc.weight"] = torch.zeros(10, 64)
    path = tmp_path / "other.pth"
    torch.save(state, path)
    model = create("resnet8")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError) as info:
        load_backbone(model, path)
    message = str(info.value)
    assert str(path) in message and "CifarResNet" in message
    assert "1 missing (conv1.weight)" in message
    assert "1 unexpected (head.gamma)" in message
    assert "1 of another shape (fc.weight [10, 64] instead of [100, 64])" in message
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_long_mismatch_is_shortened_with_counts(tmp_path, source):
    path = tmp_path / "resnet8.pth"
    torch.save(source.state_dict(), path)
    missing = 3 * 8 * 2 * (1 + 5)  # stages, further blocks, a convolution's and a BN's entries
    with pytest.raises(
        ValueError, match=rf"{missing} missing \(.*, and {missing - 4} more\)"
    ) as info:
        load_backbone(create("resnet56"), path)
    assert len(str(info.value)) < 600


class Malice:
    """Unpickled, it creates a file."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return (open, (str(self.witness), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path, source, zipped):
    witness, path = tmp_path / "witness", tmp_path / "evil.pth"
    state = {"model": source.state_dict(), "opt": Malice(witness)}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"evil\.pth is no readable checkpoint.*io\.open") as info:
        load_backbone(create("resnet8"), path)
    assert "weights_only" not in str(info.value)  # no advice to run it after all
    assert not witness.exists()
    torch.load(path, weights_only=False)["opt"].close()  # the file was indeed loaded: it works
    assert witness.exists()


def test_truncated_files_are_refused_by_name(tmp_path, source):
    torch.save(source.state_dict(), tmp_path / "zip")
    torch.save(source.state_dict(), tmp_path / "old", _use_new_zipfile_serialization=False)
    save_safetensors(source, tmp_path / "safe", {})
    for kind in ("zip", "old", "safe"):
        data = (tmp_path / kind).read_bytes()
        for kept in (0, 5, 9, 100, len(data) // 2, len(data) - 1):
            path = tmp_path / "cut.pth"
            path.write_bytes(data[:kept])
            with pytest.raises(ValueError, match=r"cut\.pth is no readable checkpoint"):
                load_backbone(create("resnet8"), path)


@pytest.mark.parametrize(
    "data",
    [b"hello, this is no checkpoint", b"\xff" * 64, struct.pack("<Q", 2**62) + b"{" * 20],
    ids=["text", "bytes", "huge safetensors header"],
)
def test_other_files_are_refused_by_name(tmp_path, data):
    path = tmp_path / "file.pt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"file\.pt is no readable checkpoint"):
        load_backbone(nn.Linear(1, 1), path)


@pytest.mark.parametrize(
    "content",
    [torch.zeros(3), [torch.zeros(3)], {}, {"lr": 0.1}, {3: torch.zeros(1)}],
    ids=["tensor", "list", "empty", "number", "integer key"],
)
def test_a_file_without_a_state_dict_is_refused_by_name(tmp_path, content):
    path = tmp_path / "file.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"file\.pt holds no state dict"):
        load_backbone(nn.Linear(1, 1), path)


def test_a_missing_file_is_told_by_its_own_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        load_backbone(nn.Linear(1, 1), tmp_path / "nowhere.pth")
