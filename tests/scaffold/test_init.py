import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

from nst_det.comparison.config import load_comparison, row_weights
from nst_det.comparison.plan import make_plan, run_config
from nst_det.comparison.stages import check_data_folders, check_distill_losses, merge_stage
from nst_det.data.coco import CocoSource
from nst_det.data.folders import read_image_folder
from nst_det.data.splits import hold_out
from nst_det.data.voc import VocDataset
from nst_det.detection.config import load_detect_config
from nst_det.detection.torchvision import build_detector
from nst_det.distillation.build import initial_student, initial_teacher
from nst_det.distillation.config import load_distill_config, transfer_of
from nst_det.engine.config import flat, read_yaml
from nst_det.errors import UserError
from nst_det.losses import build_transfer, terms
from nst_det.models.build import classifier_names
from nst_det.scaffold.init import init_project
from tests.helpers.hub import offline_cache
from tests.helpers.layouts import LAYOUTS
from tests.helpers.voc import write, write_list

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture
def voc(thirty, tmp_path):
    return Path(shutil.copytree(thirty, tmp_path / "voc"))


def test_thirty_images_become_a_comparison(voc, tmp_path, cli, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli("init", "my_project", "--voc", "voc", "--device", "cpu") == 0
    assert "nst-det compare my_project --seeds 0 --methods ce,nst-poly" in capsys.readouterr().out
    monkeypatch.chdir("/")
    comparison = load_comparison(tmp_path / "my_project")
    runs = make_plan(comparison)
    for run in runs:
        run_config(comparison, run)
    # a teacher, three seeds of students, and of seven detectors
    assert len(runs) == 1 + 3 + 3 * 7
    check_data_folders(comparison.distill, comparison.detect, comparison.engine, "here")
    assert comparison.folder == tmp_path / "my_project" / "output"
    detect, train = comparison.detect, VocDataset(voc, "trainval")
    assert Path(detect.DATASETS.VOC.own_train.ROOT) == voc
    assert (detect.DATASETS.VOC.own_train.SPLIT, detect.DATASETS.VOC.own_test.SPLIT) == ("trainval", "test")
    assert tuple(detect.DATASETS.CLASSES) == train.classes
    assert detect.MODEL.ROI_HEADS.NUM_CLASSES == 3
    assert (detect.SOLVER.MAX_ITER, detect.SOLVER.IMS_PER_BATCH) == (150, 4)
    # anchors by hand; these images are 160 pixels at most already
    shapes = np.array([(a.width, a.height) for a in train.annotations()])
    shortest, longest = detect.INPUT.MIN_SIZE_TEST, detect.INPUT.MAX_SIZE_TEST
    short, long = np.median(shapes.min(axis=1)), np.median(shapes.max(axis=1))
    # no image is padded, and none enlarged
    assert (shortest % 32, longest % 32) == (0, 0)
    assert 0 <= short - shortest < 32
    assert 0 <= longest - shortest * long / short < 32
    # the weights that are best on a part of the training images are tested
    kept = hold_out(train, detect.DATASETS.VAL_FRACTION)[1]
    assert 3 <= len(kept) <= 8
    assert (detect.TEST.SELECT, detect.TEST.EVAL_PERIOD, detect.TEST.PATIENCE) == ("best", 25, 0)
    assert detect.SOLVER.CHECKPOINT_PERIOD == 25
    sides, names = [], []
    for annotation in train.annotations():
        sizes = annotation.width, annotation.height
        scale = min(shortest / min(sizes), longest / max(sizes))
        for item in annotation.objects:
            xmin, ymin, xmax, ymax = item.box
            if not item.difficult:
                sides.append(scale * ((xmax - xmin + 1) * (ymax - ymin + 1)) ** 0.5)
                names.append(item.name)
    # every class as often as the others: copies of each box, as many as make the classes equal
    times = np.lcm.reduce([names.count(name) for name in set(names)])
    copies = np.repeat(sides, [times // names.count(name) for name in names])
    wanted = [max(np.quantile(copies, q), s) for q, s in zip((0.1, 0.3, 0.5, 0.7, 0.9), (4, 8, 16, 32, 64))]
    np.testing.assert_allclose(np.array(detect.MODEL.ANCHOR_GENERATOR.SIZES)[:, 0], wanted, atol=1.5)
    assert abs(detect.MODEL.ROI_BOX_HEAD.CANONICAL_BOX_SIZE - np.median(sides)) <= 0.75
    folder = read_image_folder(comparison.distill.DATA.ROOT)
    assert set(folder.classes) == {*train.classes, "background"}
    tested = set(VocDataset(voc, "test").ids)
    assert not {Path(path).stem.split("_")[0] for path in (*folder.train.paths, *folder.val.paths)} & tested


def test_the_detector_is_the_small_one_of_the_packaged_configs(thirty, tmp_path):
    project = init_project(tmp_path / "mine", thirty)
    own = flat(load_detect_config(tmp_path / "mine" / "detect.yaml"))
    packaged = flat(load_detect_config(CONFIGS / "detect" / "small_cpu.yaml"))
    differing = {key for key in own | packaged if own.get(key) != packaged.get(key)}
    fitted = {"MODEL.ANCHOR_GENERATOR.SIZES", "MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.ROI_BOX_HEAD.CANONICAL_BOX_SIZE"}
    fitted |= {f"INPUT.{edge}_SIZE_{when}" for edge in ("MIN", "MAX") for when in ("TRAIN", "TEST")}
    fitted |= {"SOLVER.MAX_ITER", "SOLVER.IMS_PER_BATCH", "SOLVER.CHECKPOINT_PERIOD", "OUTPUT_DIR"}
    fitted |= {"TEST.SELECT", "TEST.EVAL_PERIOD", "MODEL.TIMM.ARCH"}
    assert {key for key in differing if not key.startswith(("DATASETS.", "MODEL.TIMM.KWARGS."))} <= fitted
    assert "_BASE_" not in (tmp_path / "mine" / "detect.yaml").read_text()
    assert (project.images, project.cut) == ((24, 6), False)


def test_on_a_gpu_a_project_is_what_practitioners_begin_with(thirty, tmp_path, monkeypatch, cli, capsys):
    offline_cache(tmp_path, monkeypatch)
    monkeypatch.setattr("nst_det.scaffold.init._device_here", lambda: "cuda")
    monkeypatch.setenv("VOC_ROOT", str(tmp_path))
    assert cli("init", str(tmp_path / "mine"), "--voc", str(thirty)) == 0
    brought = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bring ")]
    assert [re.findall(r"(model\.safetensors) from \S+/timm/(\S+) into /", line) for line in brought] == [
        [("model.safetensors", name)] for name in ("resnet18.tv_in1k", "resnet50.tv_in1k")
    ]
    comparison = load_comparison(tmp_path / "mine" / "compare.yaml")
    keys = {
        "distill": r"TEACHER\.(ARCH|PRETRAINED)|DATA\.(MEAN|STD)|SOLVER\.AMP\..*",
        "detect": r"SOLVER\.(AMP\..*|OPTIMIZER)|DATALOADER\.NUM_WORKERS|CUDNN_BENCHMARK|MODEL\.(FPN\..*|PIXEL_\w+|"
        r"TIMM\.ARCH|(RPN|ROI_HEADS)\.BATCH_SIZE_PER_IMAGE|ROI_BOX_HEAD\.(FC_DIM|POOLER_\w+))",
    }
    packaged = {
        "distill": load_distill_config(CONFIGS / "distill/imagenet_r50_to_r18.yaml", ["DATA.ROOT", "x"]),
        "detect": load_detect_config(CONFIGS / "detect/voc/voc07_r18_fpn.yaml"),
    }
    for stage, pattern in keys.items():
        own, theirs = flat(getattr(comparison, stage)), flat(packaged[stage])
        alike = [key for key in theirs if re.fullmatch(pattern, key)]
        assert len(alike) > 5
        assert {key: own[key] for key in alike} == {key: theirs[key] for key in alike}
    distill = comparison.distill
    assert (distill.STUDENT.ARCH, distill.STUDENT.PRETRAINED) == ("resnet18.tv_in1k", True)
    assert distill.DATALOADER.NUM_WORKERS == -1
    runs = [run for run in make_plan(comparison) if run.row in ("scratch", "imagenet")]
    starts = {run.row: run_config(comparison, run) for run in runs}
    pretrained = {row: (config.MODEL.TIMM.PRETRAINED, config.MODEL.WEIGHTS) for row, config in starts.items()}
    assert pretrained == {"scratch": (False, ""), "imagenet": (True, "")}
    # before anything is trained
    with pytest.raises(UserError, match=r"TEACHER\.PRETRAINED: resnet50.*model\.safetensors"):
        check_distill_losses(comparison.distill, comparison.students, "here")


def test_named_networks_work_as_soon_as_their_files_are_there(thirty, tmp_path, monkeypatch):
    offline_cache(tmp_path, monkeypatch)
    names = ("test_resnet", "test_efficientnet.r160_in1k")
    project = init_project(tmp_path / "mine", thirty, device="cpu", student=names[0], teacher=names[1])
    theirs = {}
    for name, line in zip(names, project.to_bring):
        folder = Path(line.split(" into ")[1].split(" (")[0])
        folder.mkdir(parents=True)
        theirs[name] = timm.create_model(name)
        save_file(theirs[name].state_dict(), folder / "model.safetensors")
    comparison = load_comparison(tmp_path / "mine" / "compare.yaml")
    check_distill_losses(comparison.distill, comparison.students, "here")
    # test_resnet's images, not ImageNet's
    assert (comparison.distill.DATA.MEAN, comparison.detect.MODEL.PIXEL_MEAN) == ([0.5] * 3, [127.5] * 3)
    made = [initial_student(comparison.distill, 4).model, initial_teacher(comparison.distill, list("abcd")).model]
    detect = merge_stage(comparison.detect, comparison.row_opts["imagenet"], "here")
    made.append(build_detector(detect).backbone.bottom_up.model)
    for model, name in zip(made, (*names, names[0])):
        own, whole = model.state_dict(), theirs[name].state_dict()
        kept = [key for key in own if key not in classifier_names(theirs[name])]
        assert len(kept) > 20
        assert all(torch.equal(own[key], whole[key]) for key in kept)


@pytest.mark.parametrize(
    ("who", "name", "named"),
    [
        ("student", "resnet81", "resnet18"),
        ("student", "resnet18.tv_in", "resnet18.tv_in1k"),
        ("student", "vit_tiny_patch16_224", "vit_tiny.*res2"),
        ("teacher", "nix", "nix"),
    ],
)
def test_networks_that_cannot_be_used_are_named(thirty, tmp_path, who, name, named):
    with pytest.raises(UserError, match=f"--{who}: .*{named}"):
        init_project(tmp_path / "mine", thirty, **{who: name})
    assert not (tmp_path / "mine").exists()


def test_no_method_of_a_project_is_moved_off_its_default_weight(thirty, tmp_path):
    init_project(tmp_path / "mine", thirty)
    named = [f"{name}@det" if term.truth == "boxes" else name for name, term in terms().items()]
    words = ["METHODS", f"[{', '.join([*named, 'cwd@det', 'kd+nst-poly@det'])}]"]
    comparison = load_comparison(tmp_path / "mine" / "compare.yaml", overrides=words)
    # what the documentation says, read from its table
    rows = re.findall(r"^\| \[`(\S+)`\]\S+ \|[^|]+\| (\S+) \|", (CONFIGS.parent / "docs/methods.md").read_text(), re.M)
    documented = {name: float(weight) for name, weight in rows}
    assert set(documented) == set(terms())
    seen = {}
    for row in comparison.methods.values():
        nodes = (transfer_of(comparison.distill, row.backbone.word), comparison.detect.TRANSFER)
        assert {one.source for one in row_weights(row, comparison.tuned, nodes)} <= {"default"}
        for method, node in zip((row.backbone, row.detector), nodes):
            # where maps are compared has nothing to do with it
            widths = {"levels": ["a"], "student_channels": {"a": 2}, "teacher_channels": {"a": 2}, "num_classes": 2}
            built = build_transfer(method, weights=node.WEIGHTS, student_embedding=2, teacher_embedding=2, **widths)
            seen |= built.weights
    assert seen == documented


def test_without_lists_a_fifth_is_held_out_and_a_second_project_takes_the_same(voc, tmp_path):
    shutil.rmtree(voc / "ImageSets")
    project = init_project(tmp_path / "one", voc)
    assert (project.images, project.cut) == ((24, 6), True)
    train, test = (VocDataset(voc, name).ids for name in ("nst_det_train", "nst_det_test"))
    assert not set(train) & set(test)
    again = init_project(tmp_path / "two", voc)
    assert (again.values.train, again.values.test, again.cut) == ("nst_det_train", "nst_det_test", False)


@pytest.mark.parametrize("with_objects", [True, False])
def test_of_three_lists_one_is_validated_on(voc, tmp_path, with_objects):
    lists = voc / "ImageSets" / "Main"
    ids = (lists / "trainval.txt").read_text().split()
    test = (lists / "test.txt").read_text().split()
    for path in lists.iterdir():
        path.unlink()
    for name, part in (("train", ids[4:]), ("val", ids[:4]), ("test", test)):
        write_list(voc, name, part)
    for path in (voc / "Annotations" / f"{id_}.xml" for id_ in ids[:4]):
        # a class that is there alone, or nothing
        change = ("<name>[^<]*</name>", "<name>rare</name>") if with_objects else ("<object>.*?</object>", "")
        path.write_text(re.sub(*change, path.read_text(), flags=re.DOTALL))
    project = init_project(tmp_path / "project", voc)
    detect = load_comparison(tmp_path / "project").detect
    assert (project.values.train, project.values.test) == ("train", "test")
    assert detect.TEST.SELECT == "best"
    if with_objects:
        assert detect.DATASETS.VOC[detect.DATASETS.VAL[0]].SPLIT == "val"
        assert (len(detect.DATASETS.VAL), detect.DATASETS.VAL_FRACTION) == (1, 0)
        assert "rare" in detect.DATASETS.CLASSES
    else:
        assert (detect.DATASETS.VAL, detect.DATASETS.VAL_FRACTION) == ([], 0.2)
    (voc / "Annotations" / f"{ids[0]}.xml").unlink()
    with pytest.raises(UserError, match=rf"{ids[0]}\.xml"):
        init_project(tmp_path / "lost", voc, train="train", test="test")


def test_own_classification_data_is_taken(thirty, tmp_path):
    images = thirty.parent / "shapes_cls"
    init_project(tmp_path / "mine", thirty, images)
    assert read_yaml(tmp_path / "mine" / "distill.yaml")["DATA"]["ROOT"] == str(images)
    assert not (tmp_path / "mine" / "data").exists()


def test_a_detector_trained_alone_is_not_above_those_of_the_comparison(thirty, tmp_path):
    init_project(tmp_path / "mine", thirty)
    alone = Path(load_detect_config(tmp_path / "mine" / "detect.yaml").OUTPUT_DIR).resolve()
    runs = make_plan(load_comparison(tmp_path / "mine" / "compare.yaml"))
    folders = [folder for run in runs for folder in run.folders]
    assert len(folders) > 10
    assert not any(alone in folder.parents for folder in folders)


def test_images_without_labels_are_taken(thirty, tmp_path, cli, capsys, monkeypatch):
    images = tmp_path / "found"
    shutil.copytree(thirty / "JPEGImages", images / "deep" / "inside")
    assert cli("init", tmp_path / "mine", "--voc", thirty, "--unlabelled", images) == 0
    shown = capsys.readouterr().out
    assert "--methods nst-poly" in shown
    assert "30 images without labels, 3 of them held out" in " ".join(shown.split())
    comparison = load_comparison(tmp_path / "mine" / "compare.yaml")
    distill = comparison.distill
    assert (str(images), False, True) == (distill.DATA.ROOT, distill.DATA.LABELS, distill.TEACHER.PRETRAINED)
    assert [*comparison.methods] == ["kd", "fitnet", "at", "nst-poly", "kd+nst-poly"]
    for run in make_plan(comparison):
        run_config(comparison, run)
    monkeypatch.setattr("nst_det.models.build.published_file", lambda arch: None)
    check_distill_losses(distill, comparison.students, "mine")
    assert not (tmp_path / "mine" / "data").exists()


def test_a_published_teacher_without_classes_has_no_kd(thirty, tmp_path, monkeypatch):
    (tmp_path / "found").mkdir()
    shutil.copy(next((thirty / "JPEGImages").iterdir()), tmp_path / "found")
    offline_cache(tmp_path, monkeypatch)
    name = "convnextv2_atto.fcmae"
    init_project(tmp_path / "mine", thirty, unlabelled=tmp_path / "found", teacher=name, device="cpu")
    comparison = load_comparison(tmp_path / "mine" / "compare.yaml")
    assert (comparison.distill.TEACHER.ARCH, [*comparison.methods]) == (name, ["fitnet", "at", "nst-poly"])
    monkeypatch.setattr("nst_det.models.build.published_file", lambda arch: None)
    check_distill_losses(comparison.distill, comparison.students, "mine")


def test_names_that_yaml_would_read_otherwise(voc, tmp_path):
    """A class called ``no``, a folder with a colon and a quote."""
    for path in (voc / "Annotations").iterdir():
        path.write_text(path.read_text().replace("<name>square</name>", "<name>no</name>"))
    odd = voc.rename(tmp_path / "it's: #1 {x}")
    init_project(tmp_path / "007", odd)
    datasets = read_yaml(tmp_path / "007" / "detect.yaml")["DATASETS"]
    assert datasets["VOC"]["own_train"]["ROOT"] == str(odd)
    assert "no" in datasets["CLASSES"]
    assert tuple(datasets["CLASSES"]) == VocDataset(odd, "trainval").classes
    assert load_comparison(tmp_path / "007" / "compare.yaml").name == "007"


def as_coco(voc, split, file):
    """A VOC list as COCO JSON, by hand."""
    data = VocDataset(voc, split)
    tree = {"images": [], "annotations": [], "categories": [{"id": i, "name": n} for i, n in enumerate(data.classes)]}
    for number, annotation in enumerate(data.annotations()):
        name = data.image_path(annotation.id).name
        size = {"width": annotation.width, "height": annotation.height}
        tree["images"].append({"id": number, "file_name": name, **size})
        for item in annotation.objects:
            xmin, ymin, xmax, ymax = item.box
            box = [xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1]
            entry = {"image_id": number, "category_id": data.classes.index(item.name), "bbox": box}
            tree["annotations"].append({**entry, "iscrowd": int(item.difficult)})
    file.write_text(json.dumps(tree))
    return file


def test_coco_annotations_become_a_project_like_the_one_from_voc(thirty, tmp_path, monkeypatch, cli):
    files = [as_coco(thirty, split, tmp_path / f"{split}.json") for split in ("trainval", "test")]
    monkeypatch.chdir(tmp_path)
    assert cli("init", "mine", "--coco", *files, "--images", thirty / "JPEGImages", "--device", "cpu") == 0
    root = tmp_path / "mine" / "data" / "voc"
    for split, theirs in (("train", "trainval"), ("test", "test")):
        mine, wanted = VocDataset(root, split), VocDataset(thirty, theirs)
        assert (mine.ids, mine.classes) == (wanted.ids, wanted.classes)
        for one, other in zip(mine.annotations(), wanted.annotations()):
            # COCO knows no truncated objects
            assert (one.names, one.width, one.height) == (other.names, other.width, other.height)
            np.testing.assert_array_equal(one.boxes, other.boxes)
            np.testing.assert_array_equal(one.difficult, other.difficult)
    comparison = load_comparison(tmp_path / "mine" / "compare.yaml")
    check_data_folders(comparison.distill, comparison.detect, comparison.engine, "here")
    assert Path(comparison.detect.DATASETS.VOC.own_train.ROOT) == root
    # the configs are those that the VOC folder itself gets
    init_project(tmp_path / "other", thirty, device="cpu")
    trees = [yaml.safe_load((tmp_path / name / "detect.yaml").read_text()) for name in ("mine", "other")]
    for tree in trees:
        del tree["DATASETS"]["VOC"], tree["OUTPUT_DIR"]
    assert trees[0] == trees[1]


def test_one_file_is_cut(thirty, tmp_path):
    source = CocoSource((as_coco(thirty, "trainval", tmp_path / "all.json"),), (thirty / "JPEGImages",))
    project = init_project(tmp_path / "mine", source)
    assert (project.cut, sum(project.images)) == (True, 24)
    assert project.values.voc == project.report.root == tmp_path / "mine" / "data" / "voc"


@pytest.mark.parametrize("name", ["flat", "Roboflow", "lower-case", "YOLO above"])
def test_init_takes_it_and_leaves_it_as_it_is(thirty, tmp_path, cli, name):
    root = tmp_path / "data"
    data = VocDataset(thirty, "trainval")
    for number, id_ in enumerate(data.ids):
        split = "test" if number % 4 == 0 else "train"
        item = data.annotation(id_)
        sides = np.array([item.width, item.height])
        low, high = item.boxes[:, :2] / sides, item.boxes[:, 2:] / sides
        rows = np.hstack([data.labels(item)[:, None], (low + high) / 2, high - low]).round(6).tolist()
        labels = "\n".join(" ".join(map(str, row)) for row in rows)
        for file in LAYOUTS[name][0].format(id_, split).split():
            path = write(root / file, labels)
            source = {".jpg": data.image_path(id_), ".xml": data.annotation_path(id_)}.get(path.suffix)
            if source:
                shutil.copy(source, path)
    if name.startswith("YOLO"):
        write(root / "data.yaml", f"names: {list(data.classes)}")
    before = sorted(root.rglob("*"))
    assert cli("init", tmp_path / "mine", "--voc", root, "--device", "cpu") == 0
    assert sorted(root.rglob("*")) == before
    made = tmp_path / "mine" / "data" / "voc"
    pair = ("train", "test") if LAYOUTS[name][2] else ("nst_det_train", "nst_det_test")
    parts = [VocDataset(made, split, data.classes) for split in pair]
    assert sorted(parts[0].ids + parts[1].ids) == sorted(data.ids)
    for part in parts:
        for item in part.annotations():
            np.testing.assert_allclose(item.boxes, data.annotation(item.id).boxes, atol=2e-3)


def test_the_list_that_is_validated_on_is_checked_as_well(voc, tmp_path):
    ids = VocDataset(voc, "trainval").ids
    for name, part in (("train", ids[2:20]), ("test", ids[20:]), ("val", ids[:2])):
        write(voc / "ImageSets" / "Main" / f"{name}.txt", "\n".join(part))
    image = VocDataset(voc, "val").image_path(ids[0])
    image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(UserError, match=rf"unreadable image: JPEGImages/{image.name}"):
        init_project(tmp_path / "mine", voc, train="train", test="test")


def test_lists_that_share_images_are_named(voc, tmp_path, cli, capsys):
    data = VocDataset(voc, "trainval")
    learn, exam = list(data.ids[:20]), [data.ids[0], *data.ids[20:]]
    shutil.copy(data.image_path(learn[1]), data.image_path(exam[1]))
    shutil.copy(data.annotation_path(learn[1]), data.annotation_path(exam[1]))
    for name, ids in (("learn", learn), ("exam", exam)):
        write(voc / "ImageSets" / "Main" / f"{name}.txt", "\n".join(ids))
    words = ("--voc", voc, "--train", "learn", "--test", "exam", "--device", "cpu")
    assert cli("init", tmp_path / "mine", *words) == 0
    said = capsys.readouterr().out
    assert "id in two lists: ImageSets/Main/exam.txt: " + learn[0] in said
    assert f"same image in two lists: JPEGImages/{data.image_path(exam[1]).name}: in exam" in said


# FOLDER has the data: voc (an image is cut off), JSON files, and an empty folder
@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("mine --voc FOLDER/voc", "unreadable image: JPEGImages/"),
        ("mine --voc FOLDER/cut", "unreadable image: JPEGImages/"),
        ("mine --voc FOLDER/none", "none: no such folder"),
        ("empty --voc FOLDER/voc", "empty: is there already"),
        ("my^project --voc FOLDER/voc", "'my^project'"),
        ("mine --voc FOLDER/voc --images FOLDER/empty FOLDER/empty", "--images: "),
        ("mine --voc FOLDER/cut --images FOLDER/empty --unlabelled FOLDER/empty", "--unlabelled: "),
        ("mine --voc FOLDER/linked", "link to outside: JPEGImages/"),
        ("flat/mine --voc FOLDER/flat", "flat/mine: would be inside "),
        ("mine --coco FOLDER/a.json", "--images"),
        ("mine --coco FOLDER/a.json --images FOLDER/empty FOLDER/empty", "COCO: "),
        ("mine --coco FOLDER/a.json --images FOLDER/none", "none: no such folder"),
        ("mine --coco FOLDER/none.json --images FOLDER/empty", "none.json: no such file"),
        ("mine --coco FOLDER/list.json --images FOLDER/empty", "list.json: not COCO's object detection format"),
        ("mine --coco FOLDER/half.json --images FOLDER/empty", "half.json: not valid JSON"),
    ],
)
def test_what_cannot_be_used_is_named_and_nothing_is_left(voc, tmp_path, monkeypatch, cli, capsys, words, named):
    image = next((voc / "JPEGImages").iterdir())
    image.write_bytes(image.read_bytes()[:200])
    # a folder without lists, which would be cut
    shutil.rmtree(Path(shutil.copytree(voc, tmp_path / "cut")) / "ImageSets")
    (tmp_path / "empty").mkdir()
    linked = Path(shutil.copytree(voc, tmp_path / "linked")) / "JPEGImages" / image.name
    linked.unlink()
    linked.symlink_to(image)
    (tmp_path / "flat").mkdir()
    for path in (*(voc / "JPEGImages").iterdir(), *(voc / "Annotations").iterdir()):
        shutil.copy(path, tmp_path / "flat")
    for name, content in (("a.json", "{}"), ("list.json", "[1, 2]"), ("half.json", '{"images": [')):
        (tmp_path / name).write_text(content)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    assert cli("init", *words.replace("FOLDER", str(tmp_path)).split()) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert named in line
    assert sorted(tmp_path.rglob("*")) == before
