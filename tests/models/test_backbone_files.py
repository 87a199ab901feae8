import hashlib
import json
import shutil

import pytest
import timm
import torch
import torchvision

from nst_det.errors import UserError
from nst_det.models import (
    Bottomup,
    Card,
    bottomup_from_file,
    check_input_contract,
    create_model,
    input_contract,
    load_backbone,
    load_card,
    load_into,
    load_plain,
    prove_parity,
    save_backbone,
)

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def make_card(**fields):
    values = {
        "arch": "nst_resnet10_w32",
        "num_classes": 5,
        "classes": list("abcde"),
        "input": input_contract(MEAN, STD, "RGB", 32),
        "method": "kd",
        "weights": {"kd": 1.0},
        "teacher": {"name": "t"},
        "data": {"name": "shapes"},
        "top1": 0.5,
        "seed": 3,
    }
    return Card(**{**values, **fields})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "small.safetensors"
    torch.manual_seed(0)
    model = create_model("nst_resnet10_w32", 5)
    save_backbone(path, model, make_card())
    return path, model


@pytest.fixture
def copied(saved, tmp_path):
    """Path of a copy that a test may spoil, and its card as a dict, without its checksum."""
    for file in saved[0].parent.iterdir():
        shutil.copy(file, tmp_path / file.name)
    path = tmp_path / saved[0].name
    card = json.loads(path.with_suffix(".json").read_text())
    assert card.pop("content_sha256")
    return path, card


def write_card(path, card):
    path.with_suffix(".json").write_text(json.dumps(card))


def test_round_trip(saved):
    path, model = saved
    state, card = load_backbone(path)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert set(state) == set(model.state_dict())
    assert (card.arch, card.num_classes, card.method, card.top1, card.seed) == ("nst_resnet10_w32", 5, "kd", 0.5, 3)
    assert card.levels["res4"] == {"stride": 16, "channels": 128}
    assert card.params == sum(p.numel() for p in model.parameters())
    assert card.versions["torch"] == torch.__version__.split("+")[0] or card.versions["torch"] == torch.__version__
    assert card.input == {"channel_order": "RGB", "mean": MEAN, "std": STD, "size": 32}
    assert load_card(path) == card


def test_channels_last_weights_are_saved_as_they_are(tmp_path, saved):
    path = tmp_path / "last.safetensors"
    save_backbone(path, create_model("nst_resnet10_w32", 5).to(memory_format=torch.channels_last), make_card())
    state, _ = load_backbone(path)
    assert state["conv1.weight"].shape == (32, 3, 3, 3)


def test_a_classifier_and_a_bottom_up_are_filled(saved):
    path, model = saved
    classifier = create_model("nst_resnet10_w32", 5)
    load_into(classifier, path)
    assert torch.equal(classifier.fc.weight, model.fc.weight)
    bottomup = Bottomup("nst_resnet10_w32", ["res4"])
    assert not bottomup.loaded
    load_into(bottomup, path)
    assert bottomup.loaded
    assert torch.equal(bottomup.model.layer3[0].conv1.weight, model.layer3[0].conv1.weight)


def test_parity_is_zero_and_a_difference_is_seen(saved, monkeypatch):
    path, _ = saved
    assert prove_parity(path) == 0.0
    from nst_det.models import bottomup as handover

    def spoiled(*args):
        bottomup = bottomup_from_file(*args)
        with torch.no_grad():
            bottomup.model.layer2[0].bn1.weight[0] += 0.25
        return bottomup

    monkeypatch.setattr(handover, "bottomup_from_file", spoiled)
    assert prove_parity(path) > 1e-3


def test_another_architecture_is_refused(saved):
    path, _ = saved
    with pytest.raises(UserError, match="holds nst_resnet10_w32, the model is resnet18"):
        load_into(Bottomup("resnet18"), path)
    with pytest.raises(UserError, match="don't fit the model.*missing.*other shapes"):
        load_into(create_model("resnet18", 5), path)
    with pytest.raises(UserError, match=r"other shapes \(fc.weight 5x256 for 9x256"):
        load_into(create_model("nst_resnet10_w32", 9), path)
    with pytest.raises(UserError, match="has no level 'res9'"):
        bottomup_from_file(path, ["res9"])


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("sha256", "0" * 64, "the weights are not those of the card"),
        ("arch", "resnet18", "don't fit the model"),
        ("arch", "hf-hub:x/y", "field 'arch': unknown architecture"),
        ("arch", 3, "field 'arch' has the wrong type"),
        ("arch_kwargs", {"checkpoint_path": "/etc/passwd"}, "'checkpoint_path' is not allowed"),
        ("arch_kwargs", {"width": 7}, "doesn't take these arguments"),
        ("num_classes", 10**9, "outside 1 to 1000000"),
        ("num_classes", True, "wrong type"),
        ("num_classes", 6, "other shapes"),
        ("classes", "abc", "field 'classes' has the wrong type"),
        ("input", {"channel_order": "GBR", "mean": MEAN, "std": STD}, "'input.channel_order' must be RGB or BGR"),
        ("input", {"channel_order": "RGB", "mean": [123.7, 116.3, 103.5], "std": STD}, "'input.mean' must be three"),
        ("input", {"channel_order": "RGB", "mean": MEAN, "std": [0.2, 0.2]}, "'input.std' must be three"),
        ("top1", "good", "field 'top1' has the wrong type"),
    ],
)
def test_a_card_that_cant_be_right_is_refused(copied, field, value, says):
    path, card = copied
    write_card(path, {**card, field: value})
    with pytest.raises(UserError, match=says) as caught:
        load_backbone(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["arch", "num_classes", "input", "sha256"])
def test_a_card_without_a_field(copied, missing):
    path, card = copied
    del card[missing]
    write_card(path, card)
    with pytest.raises(UserError, match=f"field '{missing}' is missing"):
        load_backbone(path)


def test_a_card_that_is_not_as_it_was_written(copied):
    path, card = copied
    beside = path.with_suffix(".json")
    rest = json.dumps(card, sort_keys=True, separators=(",", ":"))
    seal = hashlib.sha256(rest.encode()).hexdigest()
    assert json.loads(beside.read_text()) == {**card, "content_sha256": seal}
    written = load_card(path)
    # order and spaces are nobody's business, and one written by hand has no checksum
    for same in ({"content_sha256": seal, **card}, dict(reversed(card.items()))):
        write_card(path, same)
        assert load_card(path) == written
    # a value, a name and a field of nobody's
    for other in ({**card, "top1": 0.25}, {**card, "seeds": 3}, {key: card[key] for key in card if key != "top1"}):
        write_card(path, {**other, "content_sha256": seal})
        with pytest.raises(UserError, match=r"small\.json: damaged, or edited by hand .*remove the field 'content_sh"):
            load_backbone(path)


def test_damaged_files(copied):
    path, card = copied
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged, or not a safetensors file"):
        load_backbone(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="damaged, or not a safetensors file"):
        load_backbone(path)
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    path.write_bytes(bytes(flipped))
    with pytest.raises(UserError, match="sha256 differs"):
        load_backbone(path)
    path.with_suffix(".json").write_text("[1, 2]")
    with pytest.raises(UserError, match="not a backbone card"):
        load_backbone(path)
    path.with_suffix(".json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_backbone(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(UserError, match="its card small.json is missing"):
        load_backbone(path)
    path.unlink()
    with pytest.raises(UserError, match="no such backbone file"):
        load_backbone(path)
    write_card(path, card)
    with pytest.raises(UserError, match="its card is here, the weights are not"):
        load_backbone(path)


def test_a_file_that_is_being_replaced_has_no_card(saved, tmp_path, monkeypatch):
    path = tmp_path / "again.safetensors"
    save_backbone(path, saved[1], make_card())
    monkeypatch.setattr("nst_det.models.io.sha256_of_file", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_backbone(path, saved[1], make_card())
    with pytest.raises(UserError, match="its card again.json is missing"):
        load_backbone(path)


def test_the_input_contract(saved):
    card = load_card(saved[0])
    check_input_contract(card, MEAN, STD)
    check_input_contract(card, [0.48501, 0.456, 0.406], STD)
    with pytest.raises(UserError, match=r"mean \(0.485, 0.456, 0.406\) in RGB, now mean is \(0.5, 0.5, 0.5\) in RGB"):
        check_input_contract(card, [0.5] * 3, STD)
    with pytest.raises(UserError, match="trained with std"):
        check_input_contract(card, MEAN, [1 / 255] * 3)
    with pytest.raises(UserError, match="trained on RGB images, now they are BGR"):
        check_input_contract(card, MEAN, STD, "BGR")


def test_torchvisions_resnet_fits_timms(tmp_path):
    theirs = torchvision.models.resnet18(num_classes=4).eval()
    for name in ("plain.pth", "wrapped.pth"):
        state = theirs.state_dict()
        if name == "wrapped.pth":
            state = {"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}
        torch.save(state, tmp_path / name)
        model = timm.create_model("resnet18", num_classes=4).eval()
        from nst_det.models import load_strict

        load_strict(model, load_plain(tmp_path / name), name)
        images = torch.randn(1, 3, 64, 64)
        assert torch.allclose(model(images), theirs(images), atol=1e-5)


class Trap:
    def __reduce__(self):
        import os

        return os.mkdir, (str(self.target),)


def test_a_pickle_is_not_executed(tmp_path):
    trap = Trap()
    trap.target = Trap.target = tmp_path / "sprung"
    torch.save({"conv1.weight": trap}, tmp_path / "trap.pth")
    with pytest.raises(UserError, match=r"not opened: it is a pickle that holds more than weights \(posix.mkdir\)"):
        load_plain(tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


def test_what_is_no_state_dict(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="not a state dict"):
        load_plain(tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(UserError, match="not a weights file"):
        load_plain(tmp_path / "text.pth")
    with pytest.raises(UserError, match="no such weights file"):
        load_plain(tmp_path / "none.pth")
