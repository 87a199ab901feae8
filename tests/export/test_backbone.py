import json
import pickle
import re

import pytest
import timm
import torch
import torchvision
import yaml
from safetensors.torch import load_file

from nst_det.errors import UserError
from nst_det.exporting.backbone import TORCHVISION_ARCHS, export_detectron2, export_timm, export_torchvision
from nst_det.models import Card, create_model, input_contract, save_backbone

MEAN, STD = [0.5, 0.25, 0.125], [0.2, 0.3, 0.4]


def saved(folder, arch, order="RGB", **fields):
    torch.manual_seed(0)
    model = create_model(arch, 5, **fields.get("arch_kwargs", {})).train()
    with torch.no_grad():
        # statistics that are not those of a fresh network
        model(torch.randn(4, 3, 64, 64))
    card = Card(
        arch=arch,
        num_classes=5,
        classes=list("abcde"),
        input=input_contract(MEAN, STD, order, 64),
        method="kd+nst-poly",
        weights={"kd": 1.0, "nst-poly": 50.0},
        teacher={"arch": "resnet50", "top1": 0.75},
        data={"name": "shapes", "images": 1234},
        **{"top1": 0.5, **fields},
    )
    path = folder / "small.safetensors"
    save_backbone(path, model, card)
    return path, model.eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(7)))


@pytest.mark.parametrize("arch", ["resnet18", "nst_resnet10_w32"])
def test_timm_reads_the_folder_back(cli, tmp_path, arch, capsys):
    path, model = saved(tmp_path, arch)
    output = tmp_path / "exported"
    assert cli("export", "--format", "timm", "--weights", path, "--output", output) == 0
    assert "logits within 0 (limit 0.0001)" in capsys.readouterr().out
    config = json.loads((output / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == (arch, 5)
    assert config["label_names"] == list("abcde")
    pixels = {"mean": MEAN, "std": STD, "input_size": [3, 64, 64]}
    assert pixels.items() <= config["pretrained_cfg"].items()
    if arch == "resnet18":
        assert torch.equal(logits(timm.create_model(f"local-dir:{output}", pretrained=True)), logits(model))
    assert load_file(str(output / "model.safetensors")).keys() == model.state_dict().keys()
    own = timm.create_model(arch, num_classes=5, checkpoint_path=str(output / "model.safetensors"))
    assert torch.equal(logits(own), logits(model))
    card = (output / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["library_name"] == "timm"
    assert metadata["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.5
    for row in ("method | `kd+nst-poly`", "teacher | resnet50, top-1 0.7500", "trained on | shapes, 1,234 images"):
        assert f"| {row} |" in card
    assert ("local-dir:" in card) == (arch == "resnet18")


def test_the_program_of_a_card_builds_the_network_with_its_arguments(tmp_path, monkeypatch):
    path, model = saved(tmp_path, "nst_wrn", arch_kwargs={"depth": 10, "width": 1})
    monkeypatch.chdir(tmp_path)
    export_timm(str(path), tmp_path / "exported")
    (program,) = re.findall(r"```python\n(.*?)```", (tmp_path / "exported" / "README.md").read_text(), re.DOTALL)
    found = {}
    exec(program, found)
    assert torch.equal(logits(found["model"]), logits(model))


def test_torchvision_reads_the_file_back(tmp_path):
    path, model = saved(tmp_path, "resnet18", top1=None)
    exported = export_torchvision(str(path), tmp_path / "r18.pth")
    assert "logits within 0 (limit" in exported.agreement
    again = torchvision.models.resnet18(num_classes=5)
    again.load_state_dict(torch.load(tmp_path / "r18.pth", weights_only=True))
    torch.testing.assert_close(logits(again), logits(model))
    card = exported.files["card"].read_text()
    assert "Its accuracy was not measured." in card
    assert "model-index" not in card
    code = card.split("```python\n")[1].split("```")[0]
    assert "torchvision.models.resnet18(num_classes=5)" in code


@pytest.mark.parametrize("arch", TORCHVISION_ARCHS)
def test_timm_and_torchvision_mean_the_same_by_these_names(arch):
    with torch.device("meta"):
        ours = create_model(arch, 10).state_dict()
        theirs = torchvision.models.get_model(arch, weights=None, num_classes=10).state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: v.shape for name, v in theirs.items()}


@pytest.mark.parametrize(
    ("export", "order", "output", "named"),
    [
        (export_torchvision, "RGB", "out.pth", "nst_resnet10_w32"),
        (export_torchvision, "RGB", "out.pt", "--output"),
        (export_timm, "RGB", "", "--output"),
        (export_timm, "RGB", "out", "out: its logits"),
        (export_timm, "BGR", "out", "BGR"),
    ],
)
def test_what_can_not_be_exported_is_refused(tmp_path, monkeypatch, export, order, output, named):
    path, _ = saved(tmp_path, "nst_resnet10_w32", order)
    monkeypatch.setattr("nst_det.exporting.backbone.LIMIT", -1.0)
    with pytest.raises(UserError, match=named):
        export(str(path), tmp_path / output)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small.json", "small.safetensors"]


def test_detectron2_gets_a_card_as_well(cli, tmp_path, capsys):
    path, _ = saved(tmp_path, "resnet18")
    assert cli("export", "--format", "detectron2", "--weights", path, "--output", tmp_path / "r18.pkl") == 0
    printed = capsys.readouterr().out
    assert f"config    {tmp_path / 'r18.yaml'}" in printed
    assert f"card      {tmp_path / 'r18.md'}" in printed
    assert "compared  " in printed
    assert not any("fc" in key.split(".") for key in pickle.loads((tmp_path / "r18.pkl").read_bytes())["model"])
    card = (tmp_path / "r18.md").read_text()
    assert 'config.merge_from_file("r18.yaml")' in card
    assert "| method | `kd+nst-poly` |" in card


def test_a_failing_export_leaves_an_earlier_one(tmp_path, monkeypatch):
    path, _ = saved(tmp_path, "resnet18")
    exported = export_detectron2(str(path), tmp_path / "r18.pkl")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert {file.name for file in exported.files.values()} <= before.keys()

    def differ(*given):
        raise UserError(f"{given[-1]}: differs")

    monkeypatch.setattr("nst_det.exporting.backbone._compare_with_detectron2", differ)
    with pytest.raises(UserError, match=f"^{tmp_path}/r18.pkl: differs"):
        export_detectron2(str(path), tmp_path / "r18.pkl")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
