"""Stage one on images without labels: what it reads, from whom it learns, and by what it judges."""

import shutil

import numpy as np
import pytest
import timm
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from nst_det.data.cifar import read_images
from nst_det.distillation.validation import TEMPERATURE, linear_probe, nearest
from nst_det.errors import UserError
from nst_det.models import classifier_from_file, load_card
from nst_det.models.bottomup import prove_parity
from tests.helpers.stage_one import metrics, run

FROZEN = {
    "vit_tiny_patch16_224": ({"img_size": 32, "depth": 4, "embed_dim": 48}, "res4:block4"),
    "convnext_atto": ({"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}, "res4"),
    # with classes of its own
    "resnet10t": ({"channels": [8, 16, 24, 32], "stem_width": 8}, "res4"),
}
OFF = {"DATA.LABELS": False, "SOLVER.CE_WEIGHT": 0.0, "SOLVER.MAX_ITER": 6}


def teacher_keys(folder, arch, num_classes=0):
    kwargs, level = FROZEN[arch]
    torch.manual_seed(3)
    torch.save(timm.create_model(arch, num_classes=num_classes, **kwargs).state_dict(), folder / "teacher.pth")
    weights = {"TEACHER.ARCH": arch, "TEACHER.ARCH_KWARGS": kwargs, "TEACHER.WEIGHTS": folder / "teacher.pth"}
    return {**weights, "TEACHER.SOLVER": {}, "STUDENT.ARCH": "resnet10t", "TRANSFER.LEVELS": [level]}


@pytest.fixture(scope="module")
def nested(images, tmp_path_factory):
    """The training images without their classes, some of them deep inside."""
    root = tmp_path_factory.mktemp("nested") / "found"
    (root / "a" / "b").mkdir(parents=True)
    for number, path in enumerate(sorted((images / "train").rglob("*.png"))):
        (root / ("" if number % 3 else "a/b") / f"{path.parent.name}_{path.name}").write_bytes(path.read_bytes())
    (root / "notes.txt").write_text("no image")
    (root / "a" / "around").symlink_to(root)
    return root


def test_any_nested_folder_is_read(nested, images, tmp_path):
    found = read_images(nested, 0.25, 0, labels=False)
    assert (found.classes, len(found.train), len(found.val)) == ((), 18, 6)
    assert not {*found.train.paths} & {*found.val.paths}
    assert sorted(path for path in (*found.train.paths, *found.val.paths) if "/" in path) == sorted(
        path.relative_to(nested).as_posix() for path in (nested / "a" / "b").iterdir()
    )
    assert {*found.train.labels, *found.val.labels} == {-1}
    # in an archive too, with the same split
    archive = read_images(shutil.make_archive(str(tmp_path / "found"), "tar", nested / "a/b"), 0.25, labels=False)
    assert (len(archive.train), len(archive.val), archive.train.image(0).shape) == (6, 2, (32, 32, 3))
    # of a labelled folder the splits stay
    split = read_images(images, labels=False)
    assert (split.classes, len(split.train), len(split.val), {*split.train.labels}) == ((), 24, 12, {-1})


@pytest.mark.parametrize("arch", FROZEN)
def test_a_student_learns_from_maps_and_has_no_head(nested, images, tmp_path, arch):
    keys = {**OFF, **teacher_keys(tmp_path, arch), "TEST.PROBE.ROOT": images, "STUDENT.ARCH": "resnet18"}
    results = run(nested, tmp_path / "out", METHODS=["nst-poly+fitnet"], **keys)
    (name, result), teacher = next(item for item in results.items() if item[0] != "teacher"), results["teacher"]
    losses = [row["loss/total"] for row in metrics(tmp_path / "out", name) if "loss/total" in row]
    assert losses[-1] < losses[0]
    assert not any("loss/ce" in row for row in metrics(tmp_path / "out", name))
    assert (result["measure"], result["top1"], teacher["measure"]) == ("knn", None, "knn")
    assert all(0 <= result[key] <= 1 for key in ("knn", "knn_start", "knn_best", "cka"))
    assert "agreement" not in result
    # by other images the teacher is another, too
    with pytest.raises(UserError, match=r"teacher: .*TEST\.PROBE\.FINGERPRINT"):
        run(nested, tmp_path / "out", **{**keys, "TEST.PROBE.ROOT": images / "val"}, METHODS=[])
    card = load_card(result["backbone"])
    assert (card.num_classes, card.classes, card.top1, card.measured["knn"]) == (0, [], None, result["knn"])
    assert (card.data["labels"], card.data["images"], card.data["probe"]) == (False, 22, images.name)
    model, _ = classifier_from_file(result["backbone"])
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, model.num_features)
    assert prove_parity(result["backbone"]) == 0


def test_kd_teaches_the_teachers_own_classes(nested, tmp_path):
    keys = {**OFF, **teacher_keys(tmp_path, "resnet10t", 7), "TEST.EVAL_PERIOD": 2, "SOLVER.AMP.ENABLED": False}
    results = run(nested, tmp_path / "out", METHODS=["kd", "fitnet"], **keys)
    assert [results[name]["measure"] for name in ("kd", "fitnet", "teacher")] == ["agreement", "cka", ""]
    assert {load_card(results[name]["backbone"]).num_classes for name in ("kd", "teacher")} == {7}
    rows = [row for row in metrics(tmp_path / "out", "kd") if "val/agreement" in row]
    assert len(rows) == 3
    assert results["kd"]["agreement_best"] == max(row["val/agreement"] for row in rows)
    # both begin with the same weights, whoever trains beside them
    alone = run(nested, tmp_path / "alone", METHODS=["fitnet"], **keys)
    assert alone["fitnet"]["sha256"] == results["fitnet"]["sha256"]
    # by hand: agreement with the teacher on the images that are held out
    classifiers = [classifier_from_file(results[name]["backbone"])[0] for name in ("kd", "teacher")]
    held = read_images(nested, 0.1, 0, labels=False).val
    pixels = torch.stack([torch.from_numpy(held.image(index)).permute(2, 0, 1) for index in range(len(held))]) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        best = [model((pixels - mean) / std).argmax(1) for model in classifiers]
    assert results["kd"]["agreement"] == float((best[0] == best[1]).double().mean())


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"SOLVER.CE_WEIGHT": 1.0}, r"SOLVER\.CE_WEIGHT.*DATA\.LABELS"),
        ({"SOLVER.LABEL_SMOOTHING": 0.1}, r"SOLVER\.LABEL_SMOOTHING.*DATA\.LABELS"),
        ({"DATA.PER_CLASS": 2}, r"DATA\.PER_CLASS.*DATA\.LABELS"),
        ({"TEACHER.EXPECTED_TOP1": 0.5}, r"TEACHER\.EXPECTED_TOP1.*DATA\.LABELS"),
        ({"TEACHER.WEIGHTS": ""}, r"TEACHER\.WEIGHTS.*DATA\.LABELS"),
        ({"METHODS": ["ce"]}, r"METHODS: ce .*DATA\.LABELS"),
        ({"METHODS": ["fitnet+dkd"]}, r"METHODS: dkd .*DATA\.LABELS"),
        ({"METHODS": ["kd"]}, r"METHODS: kd .*no classes"),
        ({"TRANSFER.AUTO_WEIGHT": {"fitnet": 1.0}}, r"TRANSFER\.AUTO_WEIGHT: fitnet.*DATA\.LABELS"),
        ({"DATA.REST": "unlabelled"}, r"DATA\.REST.*DATA\.LABELS"),
        ({"TEST.PROBE.BY": "linear", "TEST.PROBE.ROOT": ""}, r"TEST\.PROBE\.BY.*TEST\.PROBE\.ROOT"),
        ({"DATA.LABELS": True, "TEST.PROBE.ROOT": "x"}, r"TEST\.PROBE\.ROOT.*DATA\.LABELS"),
        ({"TEST.PROBE.ROOT": "/nowhere"}, r"/nowhere"),
        ({"TEST.PROBE.BY": "svm"}, r"TEST\.PROBE\.BY"),
        ({"DATA.MORE_ROOTS": ["ROOT/a"]}, r"DATA\.MORE_ROOTS: .*found/a are in .*found already"),
    ],
)
def test_what_needs_labels_is_refused(nested, tmp_path, keys, named):
    given = {**OFF, **teacher_keys(tmp_path, "resnet10t"), "METHODS": ["fitnet"], **keys}
    if more := given.get("DATA.MORE_ROOTS"):
        given["DATA.MORE_ROOTS"] = [root.replace("ROOT", str(nested)) for root in more]
    with pytest.raises(UserError, match=named) as caught:
        run(nested, tmp_path / "out", **given)
    assert "\n" not in str(caught.value)


def test_a_probe_of_one_image_a_class_is_refused(nested, images, tmp_path):
    for path in images.glob("train/*/000.png"):
        (tmp_path / "probe" / path.parent.name).mkdir(parents=True)
        shutil.copy(path, tmp_path / "probe" / path.parent.name)
    keys = {**OFF, **teacher_keys(tmp_path, "resnet10t"), "METHODS": ["fitnet"]}
    with pytest.raises(UserError, match=rf"TEST\.PROBE\.ROOT {tmp_path / 'probe'}: no images to judge by"):
        run(nested, tmp_path / "out", **keys, **{"TEST.PROBE.ROOT": tmp_path / "probe"})


def features(count, seed):
    noise = np.random.default_rng(seed)
    labels = noise.integers(0, 4, count)
    return torch.from_numpy(noise.standard_normal((count, 6)) + 0.7 * np.eye(6)[labels]).float(), labels


def test_probes_are_those_of_a_library():
    (bank, labels), (queries, _) = features(300, 0), features(200, 1)
    weights = lambda distances: np.exp((1 - distances) / TEMPERATURE)  # noqa: E731
    oracle = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=weights).fit(bank, labels)
    found = nearest(bank, torch.from_numpy(labels), queries, 20)
    assert found.tolist() == oracle.predict(queries).tolist()
    # more than there are
    assert len(nearest(bank[:5], torch.from_numpy(labels[:5]), queries, 20)) == len(queries)
    mean, std = bank.mean(0), bank.std(0)
    oracle = LogisticRegression(tol=1e-8, max_iter=1000).fit((bank - mean) / std, labels)
    found = linear_probe(bank, torch.from_numpy(labels), queries)
    assert found.tolist() == oracle.predict((queries - mean) / std).tolist()
