import argparse
import json
import os
import random
import struct
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from shared.models import create
from shared.models.checkpoints import exchange_red_and_blue, load_backbone, save_safetensors
from shared.models.iresnet import IResNet


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
    found = load_backbone(model, path)
    assert same_weights(model, source)
    assert (found.left_out, found.kept, found.bgr) == ((), (), False)
    keys = [key for key in ("model", "state_dict") if key in wrap(source.state_dict())]
    assert str(found) == (f'state dict under "{keys[0]}"' if keys else "state dict")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("numpy_1", [True, False])
def test_repdistillers_files_load_with_their_options_and_numpy_scalars(
    tmp_path, source, zipped, numpy_1
):
    """The teacher's `opt` is a Namespace, the decayed rate in its optimizer a float64 of numpy."""
    rate = np.float64(0.05) * 0.1 ** np.sum(np.arange(3) > 1)
    content = {
        "opt": argparse.Namespace(model="resnet8", lr_decay_epochs=[150, 180, 210]),
        "model": source.state_dict(),
        "best_acc": torch.tensor([72.5]),
        "optimizer": {"state": {}, "param_groups": [{"lr": rate, "params": [0, 1]}]},
    }
    path = tmp_path / "resnet8_last.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    if numpy_1:
        rewrite(path, b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n", zipped)
    model = create("resnet8")
    assert str(load_backbone(model, path)) == 'state dict under "model"'
    assert same_weights(model, source)


def test_a_callback_that_lightning_names_by_class_is_passed_over(tmp_path, source):
    path = tmp_path / "a.ckpt"
    callbacks = {argparse.Namespace: {"best_model_path": "a.ckpt"}}
    torch.save({"state_dict": source.state_dict(), "callbacks": callbacks}, path)
    callback = b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n"
    rewrite(path, b"cargparse\nNamespace\n", callback)
    model = create("resnet8")
    load_backbone(model, path)
    assert same_weights(model, source)


def test_an_ignored_class_is_never_made(tmp_path, source, monkeypatch):
    """What stands beside the weights is not run, not even argparse's or numpy's own code."""

    def made(*args, **kwargs):
        raise AssertionError("code of the file's choice ran")

    content = {"model": source.state_dict(), "opt": argparse.Namespace(a=1), "n": np.float64(1)}
    torch.save(content, tmp_path / "a.pth")
    monkeypatch.setattr(argparse.Namespace, "__new__", made)
    monkeypatch.setattr(argparse.Namespace, "__init__", made)
    allowed = set(torch.serialization.get_safe_globals())
    load_backbone(create("resnet8"), tmp_path / "a.pth")
    assert set(torch.serialization.get_safe_globals()) == allowed  # for nobody else


def test_weights_that_are_numpy_arrays_are_refused(tmp_path):
    torch.save({"weight": np.float64(1), "bias": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth holds no state dict: entry 'weight' is"):
        load_backbone(nn.Linear(1, 1), tmp_path / "a.pth")
    torch.save({"weight": np.ones((1, 1)), "bias": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth is no readable checkpoint.*_reconstruct"):
        load_backbone(nn.Linear(1, 1), tmp_path / "a.pth")


def rewrite(path, old, new, zipped=True):
    """Exchanges bytes of the pickle in a torch file, with a checksum to match."""
    if not zipped:
        data = path.read_bytes()
        assert old in data
        path.write_bytes(data.replace(old, new))
        return
    with zipfile.ZipFile(path) as file:
        members = {info.filename: file.read(info) for info in file.infolist()}
    (name,) = (name for name in members if name.endswith("data.pkl"))
    assert old in members[name]
    members[name] = members[name].replace(old, new)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, data in members.items():
            file.writestr(name, data)


def small_face(**kwargs) -> IResNet:
    return IResNet((1, 1, 1, 1), size=16, dim=8, **kwargs)


def test_insightfaces_training_checkpoint_gives_its_backbone(tmp_path):
    source, model = small_face(), small_face()
    content = {
        "epoch": 20,
        "global_step": 1000,
        "state_dict_backbone": source.state_dict(),
        "state_dict_softmax_fc": {"weight": torch.zeros(5, 8)},
        "state_optimizer": {"state": {0: {"momentum_buffer": torch.zeros(1)}}, "param_groups": []},
        "state_lr_scheduler": {"base_lrs": [0.1], "last_epoch": 1000},
    }
    torch.save(content, tmp_path / "checkpoint_gpu_0.pt")
    found = load_backbone(model, tmp_path / "checkpoint_gpu_0.pt")
    assert found.layout == "InsightFace training checkpoint"
    assert same_weights(model, source)


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("resnet8", ("fc.weight", "fc.bias")),
        ("small-student", ("linear.weight", "bn.weight", "bn.bias", "bn.running_mean")),
        ("mobilenet-0.25", ("embedding.weight", "embedding.bias")),
    ],
)
def test_a_trunk_may_lack_or_differ_in_what_follows_its_last_map_and_nothing_else(
    tmp_path, name, after
):
    source, model = create(name), create(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = source.state_dict()
    lacking = {key: value for key, value in state.items() if key not in after}
    other = state | {after[0]: state[after[0]][:3].clone()}
    for content, kept, left_out in ((lacking, after, ()), (other, after[:1], after[:1])):
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=r"\d (missing|of another shape)"):
            load_backbone(model, tmp_path / "a.pth")
        found = load_backbone(model, tmp_path / "a.pth", trunk=True)
        assert (found.kept, found.left_out) == (kept, left_out) and kept[0] in str(found)
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key] if key in kept else state[key]), key
        model.load_state_dict(before)
    first = next(iter(state)) if name != "mobilenet-0.25" else "stem.0.weight"
    torch.save({key: value for key, value in state.items() if key != first}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"1 missing .{first}."):
        load_backbone(model, tmp_path / "a.pth", trunk=True)


@pytest.mark.parametrize("head", ["cosface", "softmax", "none"])
def test_a_recognisers_file_gives_its_backbone(tmp_path, head):
    from shared.config import Network
    from shared.models.recogniser import Recogniser, save

    source = Recogniser(Network("resnet8", head=head), 16, 5)
    save(source, tmp_path / "student.safetensors")
    model = create("resnet8", classes=5)
    found = load_backbone(model, tmp_path / "student.safetensors")
    assert same_weights(model, source.backbone)
    assert found.left_out == (("head.weight",) if head == "cosface" else ())
    assert found.layout == "backbone of a recogniser, safetensors"


@pytest.mark.parametrize("name", ["iresnet", "resnet8", "imagenet-resnet18", "small-student"])
def test_weights_for_bgr_give_for_rgb_what_they_gave_for_bgr(tmp_path, name):
    source, model = ((small_face() if name == "iresnet" else create(name)) for _ in range(2))
    source, model = source.double().eval(), model.double().eval()
    torch.save(source.state_dict(), tmp_path / "bgr.pth")
    found = load_backbone(model, tmp_path / "bgr.pth", bgr=True)
    assert found.bgr and str(found) == "state dict; BGR weights turned to RGB"
    rgb = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(model.features(rgb), source.features(rgb.flip(1)))
    assert not torch.allclose(model.features(rgb), source.features(rgb))


def test_red_and_blue_exchanged_twice_is_the_identity():
    model = small_face()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    exchange_red_and_blue(model)
    assert torch.equal(model.conv1.weight[:, [2, 1, 0]], before["conv1.weight"])
    exchange_red_and_blue(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.Conv2d(1, 2, 3)], ids=["none", "grey"])
def test_bgr_without_a_stem_of_three_channels_is_refused_and_changes_nothing(tmp_path, model):
    state = {key: torch.full_like(value, 7) for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="no convolution of three channels"):
        load_backbone(model, tmp_path / "a.pth", bgr=True)
    assert not any((value == 7).any() for value in model.state_dict().values())


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


@pytest.fixture(params=["zip", "old", "safetensors"])
def written(request, tmp_path, source):
    """The bytes of a checkpoint in each of the three formats."""
    path = tmp_path / request.param
    if request.param == "safetensors":
        save_safetensors(source, path, {})
    else:
        zipped = request.param == "zip"
        torch.save(source.state_dict(), path, _use_new_zipfile_serialization=zipped)
    return path.read_bytes()


def test_truncated_files_are_refused_by_name(tmp_path, written):
    draw = random.Random(0)
    places = [0, 1, 5, 8, 9, 100, 1000, len(written) // 2, len(written) - 2, len(written) - 1]
    places += [draw.randrange(len(written)) for _ in range(30)]
    model = create("resnet8")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = tmp_path / "cut.pth"
    for kept in places:
        path.write_bytes(written[:kept])
        with pytest.raises(ValueError, match=r"cut\.pth is no readable checkpoint") as info:
            load_backbone(model, path)
        assert "\n" not in str(info.value)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def flip_bits(tmp_path, written, draws):
    """A flipped bit gives other weights or a ValueError in one line, and then changes nothing."""
    draw = random.Random(1)
    model = create("resnet8")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path, refused = tmp_path / "bent.pth", 0
    for i in range(draws):
        # half of them among the names and shapes, which are few bytes of the file
        ends = (0, 4000) if i % 2 else (0, len(written))
        place = draw.randrange(*ends)
        bent = bytearray(written)
        bent[place] ^= 1 << draw.randrange(8)
        path.write_bytes(bent)
        try:
            load_backbone(model, path)
        except ValueError as error:
            refused += 1
            assert "bent.pth" in str(error) and "\n" not in str(error)
            now = model.state_dict()
            assert all(torch.equal(before[key], now[key]) for key in now)
        else:
            model.load_state_dict(before)
    assert refused > draws / 10


def test_a_flipped_bit_is_refused_in_one_line_or_only_a_weight(tmp_path, written):
    flip_bits(tmp_path, written, 60)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_thousands_of_flipped_bits(tmp_path, written):
    flip_bits(tmp_path, written, 800)


@pytest.mark.parametrize("kind", ["deflated", "declared"])
def test_a_zip_that_claims_more_than_it_has_is_refused(tmp_path, kind):
    path = tmp_path / "bomb.pth"
    torch.save({"weight": torch.zeros(1, 1), "bias": torch.zeros(1)}, path)
    with zipfile.ZipFile(path) as file:
        members = {info.filename: file.read(info) for info in file.infolist()}
    if kind == "deflated":
        members["archive/data/9"] = bytes(1 << 24)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, data in members.items():
                file.writestr(name, data)
    else:
        # size of the first storage in its entry of the central directory, 20 bytes before the name
        data = bytearray(path.read_bytes())
        name = next(name for name in members if name.endswith("data/0")).encode()
        at = data.rindex(name) - 22
        assert data[at : at + 4] == struct.pack("<I", 4)
        data[at : at + 4] = struct.pack("<I", 1 << 31)
        path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"bomb\.pth is no readable checkpoint.*claim [\d,]+ bytes"
    ):
        load_backbone(nn.Linear(1, 1), path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_storage_declared_larger_than_the_file_is_refused(tmp_path, zipped):
    path = tmp_path / "large.pth"
    state = {"weight": torch.zeros(1, 3), "bias": torch.zeros(1)}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    end = b"q\x06K\x03" if zipped else b"q\x06K\x03N"  # "cpu", then the number of elements
    rewrite(path, end, end.replace(b"K\x03", b"\x8a\x06" + (1 << 44).to_bytes(6, "little")), zipped)
    with pytest.raises(ValueError, match=r"large\.pth is no readable checkpoint"):
        load_backbone(nn.Linear(3, 1), path)


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize(
    "tensor",
    [torch.eye(3).to_sparse(), torch.empty(3, 3, device="meta")],
    ids=["sparse", "meta"],
)
def test_tensors_that_are_not_plain_are_refused_by_name(tmp_path, tensor):
    torch.save({"weight": tensor, "bias": torch.zeros(3)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth: weight is no plain tensor"):
        load_backbone(nn.Linear(3, 3), tmp_path / "a.pth")


def test_integers_do_not_pass_for_weights_but_half_precision_does(tmp_path):
    path, model = tmp_path / "a.pth", nn.Linear(3, 3)
    torch.save({"weight": torch.eye(3).long(), "bias": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"1 of another kind \(weight torch.int64 instead of"):
        load_backbone(model, path)
    torch.save({"weight": torch.eye(3).half(), "bias": torch.zeros(3)}, path)
    load_backbone(model, path)
    assert torch.equal(model.weight, torch.eye(3)) and model.weight.dtype == torch.float32


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
