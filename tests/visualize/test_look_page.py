import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nst_det.cli import main
from nst_det.errors import UserError
from nst_det.models import Card, create_model, forward_outputs, input_contract, save_backbone
from nst_det.models.build import feature_levels
from nst_det.visualize.measures import (
    Looked,
    common_levels,
    compare_level,
    compare_levels,
    linear_cka,
    look_at,
    read_squares,
)

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def call(*words):
    with pytest.raises(SystemExit) as ended:
        main(["look", *map(str, words)])
    return ended.value.code


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
    looked = look_at(str(tmp_path / "x.safetensors"), images)
    assert looked.name == "x (ce)"
    pixels = images.numpy().astype(np.float64) / 255
    if order == "BGR":
        pixels = pixels[:, ::-1]
    normalized = (pixels - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    with torch.no_grad():
        wanted = forward_outputs(model, torch.from_numpy(normalized).float(), feature_levels(model)).maps
    assert looked.maps.keys() == wanted.keys()
    for level, maps in wanted.items():
        torch.testing.assert_close(looked.maps[level], maps, rtol=1e-4, atol=1e-5)


def test_squares_are_the_images_middle(made, images):
    assert images.shape == (2, 3, 64, 64)
    np.testing.assert_array_equal(images[1].permute(1, 2, 0), np.asarray(Image.open(made / "images" / "1.png")))


def looked(maps, name="n"):
    return Looked(name, Card("nst_resnet10_w32", 4, input=input_contract(MEAN, STD, "RGB", 64)), {"res3": maps})


def test_a_student_that_is_the_teacher_is_at_no_distance():
    teacher = torch.rand(2, 12, 6, 6, generator=torch.Generator().manual_seed(0))
    turned = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    networks = [looked(teacher), looked(teacher[:, turned]), looked(torch.rand(2, 5, 3, 3))]
    level = compare_level(networks, "res3")
    assert level.mmd[0]["poly"] < 1e-6 < level.mmd[1]["poly"]
    assert level.nearest[0] == pytest.approx(1)
    assert level.nearest[1] < 1
    # the same channel by another number
    norms = torch.nn.functional.adaptive_avg_pool2d(teacher, 3).square().sum((0, 2, 3))
    assert level.shown[0].tolist() == norms.argsort(descending=True)[:8].tolist()
    assert turned[level.shown[1]].tolist() == level.shown[0].tolist()
    assert [len(points) for points in level.pca.points] == [12, 12, 5]
    np.testing.assert_allclose(level.pca.points[1], level.pca.points[0][turned], atol=1e-9)
    assert level.tsne is None


def test_dead_channels_are_counted_and_left_out():
    teacher, student = torch.rand(1, 6, 4, 4), torch.rand(1, 4, 4, 4)
    teacher[:, 2] = 0
    student[:, :3] = 0
    level = compare_level([looked(teacher), looked(student)], "res3")
    assert level.dead == [1, 3]
    assert 2 not in level.shown[0]
    assert [len(points) for points in level.pca.points] == [5, 1]


def test_cka_between_levels_at_one_size():
    generator = torch.Generator().manual_seed(0)
    teacher = Looked("t", looked(torch.zeros(1)).card, {"res3": torch.rand(3, 4, 8, 8, generator=generator)})
    teacher.maps["res4"] = torch.rand(3, 100, 4, 4, generator=generator)
    cka = compare_levels(teacher, teacher, ["res3", "res4"])
    np.testing.assert_allclose(cka.values.diagonal(), 1)
    assert cka.values[0, 1] == pytest.approx(float(cka.values[1, 0]), rel=1e-9)
    pooled = teacher.maps["res3"].reshape(3, 4, 4, 2, 4, 2).mean((3, 5))
    flat = [maps.permute(0, 2, 3, 1).reshape(48, -1) for maps in (pooled, teacher.maps["res4"])]
    assert cka.values[0, 1] == pytest.approx(linear_cka(*flat), rel=1e-5)
    # 192 positions for 4 channels, 48 for 100
    assert cka.few.tolist() == [[False, True], [True, True]]


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.images, self.links, self.ids = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        if tag == "img":
            self.images.append(values)
        self.links += [values[key] for key in ("href", "src", "xlink:href") if key in values]


def test_the_command_writes_one_page_that_needs_nothing_else(made, tmp_path, capsys):
    output = tmp_path / "out" / "look.html"
    weights = [word for name in ("teacher", "before", "after") for word in ("--weights", made / f"{name}.safetensors")]
    assert call(*weights, "--image", made / "images", "--output", output, "--levels", "res3", "res4") == 0
    said = capsys.readouterr().out
    assert "2 images of 64 pixels" in said
    assert re.search(r"res4  after \(nst-poly\): MMD \(poly\) [\d.e-]+, nearest channel 0\.\d+, CKA 0\.\d+\*", said)
    text = output.read_text()
    page = Page(text)
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert "http:" not in text.replace("http://www.w3.org/", "")
    assert "https:" not in text
    assert len(page.ids) == len(set(page.ids))
    # the image, and eight maps of three networks at two levels
    assert len(page.images) == 1 + 2 * 3 * 8
    assert all(image["alt"] for image in page.images)
    # a bar chart, a plane a student and level, a CKA table a student
    assert text.count('role="img"') == 1 + 2 * 2 + 2
    looked = look_at(str(made / "after.safetensors"), read_squares([str(made / "images")], 64)[1])
    assert f"of {looked.maps['res3'].shape[1]}</td>" in text


def test_tsne_on_request(made, tmp_path):
    pytest.importorskip("sklearn")
    weights = [word for name in ("teacher", "after") for word in ("--weights", made / f"{name}.safetensors")]
    words = [*weights, "--image", made / "images" / "1.png", "--levels", "res4", "--tsne"]
    assert call(*words, "--output", tmp_path / "look.html") == 0
    assert "<h3>t-SNE</h3>" in (tmp_path / "look.html").read_text()


def test_wrong_calls_end_in_one_line(made, tmp_path, capsys):
    teacher, image = made / "teacher.safetensors", made / "images" / "1.png"
    two = ("--weights", teacher, "--weights", made / "after.safetensors")
    for words, said in (
        (("--weights", teacher, "--image", image), "--weights: give it twice or more"),
        ((*two, "--image", tmp_path), "no image or video in this folder"),
        ((*two, "--image", image, "--size", "9"), "--size: 9"),
        ((*two, "--image", image, "--levels", "res9"), "has no res9; it has res2, res3, res4, res5"),
        (("--weights", teacher, "--weights", tmp_path / "x.safetensors", "--image", image), "no such backbone file"),
    ):
        assert call(*words, "--output", tmp_path / "look.html") == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert said in line
    assert not (tmp_path / "look.html").exists()


def test_levels_in_common(images):
    one, other = looked(torch.zeros(1, 1, 1, 1)), Looked("o", looked(torch.zeros(1)).card, {"res4": torch.zeros(1)})
    with pytest.raises(UserError, match="no level in common"):
        common_levels([one, other], [])
    assert common_levels([one, one], []) == ["res3"]


def test_too_many_images(tmp_path, monkeypatch):
    monkeypatch.setattr("nst_det.visualize.measures.MOST_IMAGES", 1)
    for name in "ab":
        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / f"{name}.png")
    with pytest.raises(UserError, match="name at most 1"):
        read_squares([str(Path(tmp_path))], 32)
