import pytest
import timm
import torch
from torch import nn

from nst_det.models import create_model, feature_levels, forward_outputs, take_levels
from nst_det.models.build import LevelInfo, classifier_names, embedding_width

# index, stride and channels as timm's own tables and the papers state them
KNOWN = {
    "resnet18": {"res2": (1, 4, 64), "res3": (2, 8, 128), "res4": (3, 16, 256), "res5": (4, 32, 512)},
    "mobilenetv3_large_100": {"res2": (1, 4, 24), "res3": (2, 8, 40), "res4": (3, 16, 112), "res5": (4, 32, 960)},
    "efficientnet_b0": {"res2": (1, 4, 24), "res3": (2, 8, 40), "res4": (3, 16, 112), "res5": (4, 32, 320)},
    "convnext_atto": {"res2": (0, 4, 40), "res3": (1, 8, 80), "res4": (2, 16, 160), "res5": (3, 32, 320)},
    # refuses other sizes than its own; twelve maps of one stride, the last of which is resized too
    "vit_tiny_patch16_224": {
        "res4": (11, 16, 192),
        "res3": (11, 8, 192, 16),
        "res5": (11, 32, 192, 16),
        **{f"block{number}": (number - 1, 16, 192) for number in range(1, 13)},
    },
    # convolutions without padding: 299 / 8 is 37, which stands for 32
    "inception_v3": {"res2": (1, 4, 192), "res3": (2, 8, 288), "res4": (3, 16, 768), "res5": (4, 32, 2048)},
    "nst_resnet10_w32": {"res2": (1, 4, 32), "res3": (2, 8, 64), "res4": (3, 16, 128), "res5": (4, 32, 256)},
    "nst_resnet18_w48": {"res2": (1, 4, 48), "res3": (2, 8, 96), "res4": (3, 16, 192), "res5": (4, 32, 384)},
}


@pytest.mark.parametrize("arch", KNOWN)
def test_levels_of_known_networks(arch):
    model = timm.create_model(arch, num_classes=3) if arch in timm.list_models() else create_model(arch, 3)
    assert feature_levels(model) == {name: LevelInfo(*values) for name, values in KNOWN[arch].items()}


@pytest.mark.parametrize("arch", ["nst_resnet10_w32", "mobilenetv3_large_100", "convnext_atto"])
def test_one_pass_gives_what_the_classifier_computes(arch):
    model = create_model(arch, 7).eval()
    images = torch.randn(2, 3, 64, 64)
    levels = take_levels(feature_levels(model), ["res3", "res5"], arch)
    with torch.no_grad():
        outputs = forward_outputs(model, images, levels)
        assert torch.equal(outputs.logits, model(images))
        assert torch.equal(model.get_classifier()(outputs.embedding), outputs.logits)
    assert {name: tuple(m.shape[1:]) for name, m in outputs.maps.items()} == {
        name: (info.channels, 64 // info.stride, 64 // info.stride) for name, info in levels.items()
    }
    assert outputs.embedding.shape == (2, embedding_width(model))
    alone = forward_outputs(model, images, {})
    assert alone.maps == {}
    assert torch.equal(alone.logits, outputs.logits)


def test_a_network_with_a_second_classifier_for_its_distillation_token():
    model = create_model("deit_tiny_distilled_patch16_224", 7, img_size=32, depth=2).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        outputs = forward_outputs(model, images, {})
        assert torch.equal(outputs.logits, model(images))
        assert torch.equal(
            (model.head(outputs.embedding) + model.head_dist(model.forward_features(images)[:, 1])) / 2, outputs.logits
        )
    assert classifier_names(model) == {
        f"{head}.{kind}" for head in ("head", "head_dist") for kind in ("weight", "bias")
    }


def test_a_transformers_levels_are_its_blocks_and_a_pyramid():
    model = create_model("vit_tiny_patch16_224", 7, img_size=64).eval()
    levels = feature_levels(model)
    with torch.no_grad():
        maps = model.forward_intermediates(torch.ones(1, 3, 64, 64), intermediates_only=True)
        found = forward_outputs(model, torch.ones(1, 3, 64, 64), levels).maps
    assert [found[f"block{number}"].equal(map_) for number, map_ in enumerate(maps, 1)] == [True] * 12
    assert found["res4"].equal(maps[-1])
    assert {name: found[name].shape[-1] for name in ("res3", "res4", "res5")} == {"res3": 8, "res4": 4, "res5": 2}
    torch.testing.assert_close(found["res5"][0, :, 0, 0], maps[-1][0, :, :2, :2].amax(dim=(1, 2)))
    # between two cells' centers, a quarter of the way
    wanted = 0.75 * maps[-1][0, :, 0, 0] + 0.25 * maps[-1][0, :, 0, 1]
    torch.testing.assert_close(found["res3"][0, :, 0, 1], wanted)
    with pytest.raises(ValueError, match="res3"):
        take_levels(levels, ["res3", "res4"], "vit")


def test_measuring_changes_nothing():
    model = create_model("nst_resnet10_w32", 5).train()
    model.layer1.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    feature_levels(model)
    embedding_width(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training
    assert not model.layer1.training


def test_a_head_with_batch_norm_counts_a_training_step_once():
    model = create_model("mobilenetv3_large_100", 5).train()
    forward_outputs(model, torch.randn(2, 3, 32, 32), {})
    counters = {int(value) for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
    assert counters == {1}


def test_a_network_without_intermediates_is_refused():
    with pytest.raises(ValueError, match="Linear has no forward_intermediates"):
        feature_levels(nn.Linear(2, 2))


def test_small_networks_have_the_stated_size():
    sizes = {
        arch: sum(p.numel() for p in create_model(arch, 12).parameters())
        for arch in ("nst_resnet10_w32", "nst_resnet18_w48")
    }
    assert sizes == {"nst_resnet10_w32": 1229484, "nst_resnet18_w48": 6289212}


@pytest.mark.parametrize(
    ("arch", "kwargs", "named"),
    [
        ("resnet81", {}, "'resnet81'"),
        ("hf-hub:somebody/model", {}, "hf-hub"),
        ("local-dir:/tmp", {}, "local-dir"),
        ("resnet18", {"checkpoint_path": "/tmp/x.pth"}, "'checkpoint_path'"),
        ("resnet18", {"pretrained_cfg": "x"}, "'pretrained_cfg'"),
        ("resnet18", {"stem_width": 10**9}, "'stem_width'"),
        ("resnet18", {"block_args": {"a": 1}}, "'block_args'"),
        ("resnet18", {"no_such": 1}, "resnet18.*no_such"),
        ("nst_resnet10_w32", {"no_such": 1}, "nst_resnet10_w32.*no_such"),
        ("resnet18", {"global_pool": "foo"}, "resnet18.*foo"),
        ("resnet18", {"act_layer": "foo"}, "resnet18.*foo"),
        ("vit_tiny_patch16_224", {"embed_dim": 100}, "vit_tiny_patch16_224.*100"),
        ("convnext_atto", {"dims": [10, 20]}, "convnext_atto.*10, 20"),
        *(("resnet18", {name: 5}, f"'{name}'") for name in ("num_classes", "pretrained", "arch")),
        ("nst_mlp_w1024", {"depth": 0}, "depth"),
        ("inception_bn", {"stride16_tap": "5a"}, "stride16_tap.*4a, 4b, 4c, 4d.*'5a'"),
        ("inception_bn", {"pre_activation_taps": ["4d", "5a"]}, "pre_activation_taps.*'5a'.*conv1, conv2, 3b, 4d, 5b"),
        ("inception_bn", {"widths": 3}, "inception_bn.*widths"),
    ],
)
def test_what_cannot_be_built_is_refused(arch, kwargs, named):
    with pytest.raises(ValueError, match=named):
        create_model(arch, 3, **kwargs)
