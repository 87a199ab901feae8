import re

import numpy as np
import pytest
import torch
from PIL import Image

from nst_det.errors import UserError
from nst_det.models import Card, create_model, forward_outputs, input_contract, save_backbone
from nst_det.models.build import feature_levels
from nst_det.visualize.measures import (
    FeatureMaps,
    cka_of_levels,
    common_levels,
    compare_level,
    feature_maps,
    linear_cka,
    read_squares,
)
from tests.helpers.page import Page

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def save(path, arch, seed, order="RGB", method="ce"):
    torch.manual_seed(seed)
    model = create_model(arch, 4).eval()
    save_backbone(path, model, Card(arch, 4, input=input_contract(MEAN, STD, order, 64), method=method))
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A teacher, two students and two images."""
    folder = tmp_path_factory.mktemp("look")
    save(folder / "teacher.safetensors", "nst_resnet18_w48", 0)
    save(folder / "before.safetensors", "nst_resnet10_w32", 1)
    save(folder / "after.safetensors", "nst_resnet10_w32", 2, method="nst-poly")
    (folder / "images").mkdir()
    for seed, shape in enumerate([(80, 100, 3), (64, 64, 3)]):
        pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{seed}.png")
    return folder


@pytest.fixture(scope="module")
def images(made):
    return read_squares([str(made / "images")], 64)[1]


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_maps_are_those_of_the_classifier_on_its_own_pixels(tmp_path, images, order):
    model = save(tmp_path / "x.safetensors", "nst_resnet10_w32", 3, order)
    network = feature_maps(str(tmp_path / "x.safetensors"), images)
    assert network.name == "x (ce)"
    pixels = images.numpy().astype(np.float64) / 255
    if order == "BGR":
        pixels = pixels[:, ::-1]
    normalized = (pixels - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    with torch.no_grad():
        wanted = forward_outputs(model, torch.from_numpy(normalized).float(), feature_levels(model)).maps
    assert network.maps.keys() == wanted.keys()
    for level, maps in wanted.items():
        torch.testing.assert_close(network.maps[level], maps, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("arch", "level"), [("nst_wrn16_1", "conv3"), ("vit_tiny_patch16_224", "block12")])
def test_networks_that_no_detector_can_have_are_looked_at(tmp_path, arch, level):
    kwargs = {"img_size": 32} if arch.startswith("vit") else {}
    torch.manual_seed(0)
    model = create_model(arch, 4, **kwargs).eval()
    card = Card(arch, 4, kwargs, input=input_contract(MEAN, STD, "RGB", 32))
    save_backbone(tmp_path / "x.safetensors", model, card)
    maps = feature_maps(str(tmp_path / "x.safetensors"), torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).maps
    assert level in maps
    assert all(map_.dim() == 4 for map_ in maps.values())


def test_squares_are_the_images_middle(made, images):
    assert images.shape == (2, 3, 64, 64)
    np.testing.assert_array_equal(images[1].permute(1, 2, 0), np.asarray(Image.open(made / "images" / "1.png")))


def network(**maps):
    return FeatureMaps("n", Card("nst_resnet10_w32", 4, input=input_contract(MEAN, STD, "RGB", 64)), maps)


def test_a_student_that_is_the_teacher_is_at_no_distance():
    teacher = torch.rand(2, 12, 6, 6, generator=torch.Generator().manual_seed(0))
    turned = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    networks = [network(res3=maps) for maps in (teacher, teacher[:, turned], torch.rand(2, 5, 3, 3))]
    level = compare_level(networks, "res3")
    assert level.mmd[0]["poly"] < 1e-6 < level.mmd[1]["poly"]
    assert level.nearest[0] == pytest.approx(1)
    assert level.nearest[1] < 1
    # the same channel by another number
    norms = torch.nn.functional.adaptive_avg_pool2d(teacher, 3).square().sum((0, 2, 3))
    assert level.shown[0].tolist() == norms.argsort(descending=True)[:8].tolist()
    assert turned[level.shown[1]].tolist() == level.shown[0].tolist()
    (pca,) = level.planes
    assert [len(points) for points in pca.points] == [12, 12, 5]
    np.testing.assert_allclose(pca.points[1], pca.points[0][turned], atol=1e-9)


def test_mmd_is_the_definition_and_nearest_the_best_cosine():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.rand(2, 4, 6, 5, generator=generator), torch.rand(2, 7, 6, 5, generator=generator)
    level = compare_level([network(res3=teacher), network(res3=student)], "res3")
    mmd = []
    for one, other in zip(student.double(), teacher.double()):
        s, t = (x.flatten(1) / x.flatten(1).norm(dim=1, keepdim=True) for x in (one, other))
        mmd.append(float(((t @ t.T) ** 2).mean() + ((s @ s.T) ** 2).mean() - 2 * ((t @ s.T) ** 2).mean()))
    assert level.mmd[0]["poly"] == pytest.approx(np.mean(mmd), rel=1e-4)
    assert level.mmd[0].keys() == {"linear", "poly", "gaussian"}
    cosines = []
    for channel in range(7):
        flat = teacher[:, channel].flatten()
        cosines.append([float(torch.cosine_similarity(flat, student[:, k].flatten(), dim=0)) for k in range(4)])
    assert level.nearest[0] == pytest.approx(np.max(cosines, axis=1).mean(), rel=1e-5)
    assert level.shown[1].tolist() == [int(np.argmax(cosines[channel])) for channel in level.shown[0]]
    np.testing.assert_allclose(level.cosine[1], [max(cosines[channel]) for channel in level.shown[0]], rtol=1e-5)


def test_dead_channels_are_counted_and_left_out():
    teacher, student = torch.rand(1, 6, 4, 4), torch.rand(1, 4, 4, 4)
    teacher[:, 2] = 0
    student[:, :3] = 0
    level = compare_level([network(res3=teacher), network(res3=student)], "res3")
    assert level.dead == [1, 3]
    assert 2 not in level.shown[0]
    assert [len(points) for points in level.planes[0].points] == [5, 1]


def test_cka_between_levels_at_one_size():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.rand(3, 4, 8, 8, generator=generator), torch.rand(3, 100, 4, 4, generator=generator)]
    teacher = network(res3=maps[0], res4=maps[1])
    values, few = cka_of_levels(teacher, teacher, ["res3", "res4"])
    np.testing.assert_allclose(values.diagonal(), 1)
    assert values[0, 1] == pytest.approx(float(values[1, 0]), rel=1e-9)
    pooled = maps[0].reshape(3, 4, 4, 2, 4, 2).mean((3, 5))
    flat = [map_.permute(0, 2, 3, 1).reshape(48, -1) for map_ in (pooled, maps[1])]
    assert values[0, 1] == pytest.approx(linear_cka(*flat), rel=1e-5)
    # 192 positions for 4 channels, 48 for 100
    assert few.tolist() == [[False, True], [True, True]]


def test_the_command_writes_one_page_that_needs_nothing_else(cli, made, tmp_path, capsys):
    output = tmp_path / "out" / "look.html"
    weights = [word for name in ("teacher", "before", "after") for word in ("--weights", made / f"{name}.safetensors")]
    assert cli("look", *weights, "--image", made / "images", "--output", output, "--levels", "res3", "res4") == 0
    printed = capsys.readouterr().out
    assert "2 images of 64 pixels" in printed
    assert re.search(r"res4  after \(nst-poly\): MMD \(poly\) [\d.e-]+, nearest channel 0\.\d+, CKA 0\.\d+\*", printed)
    page = Page(output.read_text())
    page.check_self_contained()
    # the image, and eight maps of three networks at two levels
    assert len(page.all("img")) == 1 + 2 * 3 * 8
    assert all(image["alt"] for image in page.all("img"))
    # a bar chart, a plane a student and level, a CKA table a student
    assert [svg["role"] for svg in page.all("svg")] == ["img"] * (1 + 2 * 2 + 2)
    assert "of 64</td>" in page.html


def test_tsne_on_request(cli, made, tmp_path):
    pytest.importorskip("sklearn")
    weights = [word for name in ("teacher", "after") for word in ("--weights", made / f"{name}.safetensors")]
    words = [*weights, "--image", made / "images" / "1.png", "--levels", "res4", "--tsne"]
    assert cli("look", *words, "--output", tmp_path / "look.html") == 0
    assert "<h3>t-SNE</h3>" in (tmp_path / "look.html").read_text()


def test_wrong_calls_end_in_one_line(cli, made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nst_det.visualize.measures.MOST_IMAGES", 1)
    teacher, image = made / "teacher.safetensors", made / "images" / "1.png"
    two = ("--weights", teacher, "--weights", made / "after.safetensors")
    for words, named in (
        (("--weights", teacher, "--image", image), "--weights: give it twice"),
        ((*two, "--image", tmp_path), str(tmp_path)),
        ((*two, "--image", made / "images"), "at most 1"),
        ((*two, "--image", image, "--size", "9"), "--size: 9"),
        ((*two, "--image", image, "--levels", "res9"), "res9"),
        (("--weights", teacher, "--weights", tmp_path / "x.safetensors", "--image", image), "x.safetensors"),
    ):
        assert cli("look", *words, "--output", tmp_path / "look.html") == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert named in line
    assert not (tmp_path / "look.html").exists()


def test_levels_in_common():
    one, other = network(res3=torch.zeros(1)), network(res4=torch.zeros(1))
    with pytest.raises(UserError, match="--weights"):
        common_levels([one, other], [])
    assert common_levels([one, one], []) == ["res3"]
