import hashlib
import json
import shutil
from dataclasses import asdict

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from nst_det.engine.io import sha256_of_file, write_sealed_json
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
    load_strict,
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
    assert torch.__version__.startswith(card.versions["torch"])
    assert card.input == {"channel_order": "RGB", "mean": MEAN, "std": STD, "size": 32}
    assert load_card(path) == card


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


def test_parity_of_a_transformer_is_that_of_its_own_map(tmp_path):
    path, kwargs = tmp_path / "vit.safetensors", {"img_size": 32}
    card = make_card(arch="vit_tiny_patch16_224", arch_kwargs=kwargs)
    save_backbone(path, create_model(card.arch, 5, **kwargs), card)
    assert prove_parity(path) == 0.0


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


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda path: load_into(Bottomup("resnet18"), path), "nst_resnet10_w32.*resnet18"),
        (lambda path: load_into(create_model("resnet18", 5), path), "missing.*other shapes"),
        (lambda path: load_into(create_model("nst_resnet10_w32", 9), path), "fc.weight 5x256 for 9x256"),
        (lambda path: bottomup_from_file(path, ["res9"]), "'res9'"),
    ],
)
def test_another_architecture_is_refused(saved, make, named):
    with pytest.raises(UserError, match=f"small.safetensors.*{named}"):
        make(saved[0])


MISSING = object()


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        *((field, MISSING, f"'{field}' is missing") for field in ("arch", "num_classes", "input", "sha256")),
        ("sha256", "0" * 64, "sha256"),
        ("arch", "resnet18", "fit"),
        ("arch", "hf-hub:x/y", "'arch'"),
        ("arch", 3, "'arch'"),
        ("arch_kwargs", {"checkpoint_path": "/etc/passwd"}, "'checkpoint_path'"),
        ("arch_kwargs", {"width": 7}, "width"),
        ("num_classes", 10**9, "'num_classes'"),
        ("num_classes", True, "'num_classes'"),
        ("num_classes", 6, "fc.weight"),
        ("classes", "abc", "'classes'"),
        ("top1", "good", "'top1'"),
        ("input", {"channel_order": "GBR", "mean": MEAN, "std": STD}, "'input.channel_order'"),
        ("input", {"channel_order": "RGB", "mean": [123.7, 116.3, 103.5], "std": STD}, "'input.mean'"),
        ("input", {"channel_order": "RGB", "mean": MEAN, "std": [0.2, 0.2]}, "'input.std'"),
    ],
)
def test_a_card_that_cant_be_right_is_one_line(copied, field, value, named):
    path, card = copied
    write_card(path, {key: item for key, item in {**card, field: value}.items() if item is not MISSING})
    with pytest.raises(UserError, match=f"small.*{named}") as caught:
        load_backbone(path)
    assert "\n" not in str(caught.value)


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


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("small.safetensors", lambda whole: whole[: len(whole) // 2], "small.safetensors.*damaged"),
        ("small.safetensors", lambda whole: b"", "small.safetensors.*damaged"),
        ("small.safetensors", lambda whole: whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:], "sha256"),
        ("small.safetensors", None, "small.safetensors"),
        ("small.json", lambda whole: b"[1, 2]", "small.json"),
        ("small.json", lambda whole: b"{", "small.json.*JSON"),
        ("small.json", None, "small.json is missing"),
    ],
)
def test_damaged_files(copied, file, content, named):
    path = copied[0].with_name(file)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content(path.read_bytes()))
    with pytest.raises(UserError, match=named):
        load_backbone(copied[0])
    with pytest.raises(UserError, match="no such backbone file"):
        load_backbone(copied[0].with_name("other.safetensors"))


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
    for other, named in (
        (([0.5] * 3, STD), r"mean \(0.485, 0.456, 0.406\).*\(0.5, 0.5, 0.5\)"),
        ((MEAN, [1 / 255] * 3), "std"),
        ((MEAN, STD, "BGR"), "RGB.*BGR"),
    ):
        with pytest.raises(UserError, match=named):
            check_input_contract(card, *other)


@pytest.mark.parametrize("wrapped", [False, True])
def test_torchvisions_resnet_fits_timms(tmp_path, wrapped):
    theirs = torchvision.models.resnet18(num_classes=4).eval()
    state = theirs.state_dict()
    if wrapped:
        state = {"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}
    torch.save(state, tmp_path / "theirs.pth")
    model = timm.create_model("resnet18", num_classes=4).eval()
    load_strict(model, load_plain(tmp_path / "theirs.pth"), "theirs")
    images = torch.randn(1, 3, 64, 64)
    assert torch.allclose(model(images), theirs(images), atol=1e-5)


def under(prefix, weights):
    return {prefix + name: value for name, value in weights.items()}


WRAPPED = {
    "DataParallel": lambda own, other: under("module.", own),
    "Lightning": lambda own, other: {"state_dict": under("model.", own), "epoch": 3, "callbacks": {"best": None}},
    "Lightning with a loss": lambda own, other: {"state_dict": {**under("net.", own), "loss.weight": torch.ones(3)}},
    "torch.compile": lambda own, other: under("_orig_mod.", own),
    "compiled in parts": lambda own, other: {k.replace("layer1.", "layer1._orig_mod."): v for k, v in own.items()},
    "FSDP": lambda own, other: {k.replace("layer1.", "layer1._fsdp_wrapped_module."): v for k, v in own.items()},
    "mmpretrain": lambda own, other: {"state_dict": under("backbone.", own), "meta": {"time": "now"}},
    "DINO": lambda own, other: {
        "student": under("module.backbone.", own),
        "optimizer": {"state": {0: {"m": torch.ones(1)}}},
    },
    "timm, its average": lambda own, other: {"arch": "x", "state_dict": other, "state_dict_ema": own},
    "AveragedModel": lambda own, other: {"n_averaged": torch.tensor(7), **under("module.", own)},
    "timm in transformers": lambda own, other: under("timm_model.", own),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_what_tools_put_before_names_is_taken_off(tmp_path, wrapper, caplog):
    caplog.set_level("INFO")
    own, other = (timm.create_model("nst_resnet10_w32", num_classes=classes).state_dict() for classes in (4, 4))
    torch.save(WRAPPED[wrapper](own, other), tmp_path / "theirs.pth")
    found = load_plain(tmp_path / "theirs.pth", own)
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], value) for name, value in own.items())
    assert "theirs.pth: taken without '" in caplog.text


def test_of_several_state_dicts_none_is_guessed(tmp_path):
    own = timm.create_model("nst_resnet10_w32", num_classes=4).state_dict()
    torch.save({**under("student.", own), **under("teacher.", own)}, tmp_path / "both.pth")
    with pytest.raises(UserError, match=r"both.pth: .*student\., teacher\."):
        load_plain(tmp_path / "both.pth", own)
    # names of another network stay as they are, to be named
    torch.save(under("model.", {"a.weight": torch.ones(1)}), tmp_path / "other.pth")
    assert list(load_plain(tmp_path / "other.pth", own)) == ["model.a.weight"]


def test_tied_weights_are_written_and_read(tmp_path):
    model = create_model("nst_resnet10_w32", 4)
    # a parameter under two names, and a part of another tensor
    model.layer1[0].bn2.weight = model.layer1[0].bn1.weight
    model.layer1[0].bn1.running_mean = model.layer1[0].bn1.running_var[:]
    with torch.no_grad():
        model.layer1[0].bn1.weight.uniform_()
    path = tmp_path / "tied.safetensors"
    save_backbone(path, model, make_card(num_classes=4))
    found, _ = load_backbone(path)
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    # equal backbones are equal files, tied or not
    apart = create_model("nst_resnet10_w32", 4)
    load_strict(apart, found, "tied")
    save_backbone(tmp_path / "apart.safetensors", apart, make_card(num_classes=4))
    assert path.read_bytes() == (tmp_path / "apart.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("kind", "code"),
    [("float4_e2m1fn_x2", "F4"), ("float8_e4m3fn", "F8_E4M3"), ("int8", "I8"), ("complex64", "C64"), ("bool", "BOOL")],
)
def test_a_head_in_another_number_format_is_one_line(tmp_path, kind, code):
    model = create_model("nst_resnet10_w32", 4)
    path = tmp_path / "packed.safetensors"
    card = save_backbone(path, model, make_card(num_classes=4))
    packed = torch.zeros(4, 256, dtype=torch.uint8)
    dtype = getattr(torch, kind)
    state = {**model.state_dict(), "fc.weight": packed.view(dtype) if "float4" in kind else packed.to(dtype)}
    save_file(state, path)
    with pytest.raises(ValueError, match=f"fc.weight is written as {kind}"):
        load_strict(model, load_plain(path, state), "packed")
    write_sealed_json(tmp_path / "packed.json", {**asdict(card), "sha256": sha256_of_file(path)})
    with pytest.raises(UserError, match=f"packed.safetensors: fc.weight is written as {code}"):
        load_backbone(path)


def test_sparse_and_quantized_weights_are_one_line():
    model = create_model("nst_resnet10_w32", 4)
    head = model.fc.weight.detach()
    for value, named in (
        (head.to_sparse(), "sparse_coo"),
        (torch.quantize_per_tensor(head, 0.1, 0, torch.qint8), "qint8"),
    ):
        with pytest.raises(ValueError, match=f"fc.weight is written as {named}"):
            load_strict(model, {**model.state_dict(), "fc.weight": value}, "packed")


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


@pytest.mark.parametrize("name", ["list.pth", "text.pth", "none.pth"])
def test_what_is_no_state_dict(tmp_path, name):
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(UserError, match=name):
        load_plain(tmp_path / name)
