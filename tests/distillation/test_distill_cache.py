"""The teacher cache: the same bits as without, its size, and when it is refused."""

import json
import logging
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nst_det.distillation import cache as cache_writing
from nst_det.distillation import pipeline as stage
from nst_det.distillation.build import Teacher, initial_student
from nst_det.distillation.cache import (
    VERSION,
    Piece,
    TeacherCache,
    Trial,
    assemble,
    read_index,
    shard_path,
    total_bytes,
    what_to_keep,
)
from nst_det.distillation.config import load_distill_config
from nst_det.distillation.pipeline import distill
from nst_det.distillation.trainer import broken_outputs
from nst_det.engine.io import write_sealed_json
from nst_det.engine.metrics import read_metrics
from nst_det.errors import UserError
from nst_det.losses import ModelOutputs, build_transfer, register_term, terms, unregister_term
from nst_det.models import load_card, save_backbone

METHODS = ["ce", "nst-poly", "kd+at"]
VIEWS, IMAGES, BATCH = 2, 24, 7
ROWS = VIEWS * IMAGES


def words(images, output, **changes):
    values = {
        "NAME": "cached",
        "OUTPUT_DIR": output,
        "REGISTRY": output / "backbones",
        "METHODS": METHODS,
        "DATA.ROOT": images,
        "DATA.IMAGE_SIZE": 32,
        "DATA.AUGMENT.SHIFT": 2,
        "DATA.AUGMENT.HFLIP": 0.5,
        "TEACHER.ARCH": "nst_resnet10_w32",
        "TEACHER.SOLVER": {"MAX_ITER": 2},
        "TRANSFER.LEVELS": ["res3", "res4"],
        "SOLVER.BASE_LR": 1e-3,
        # two epochs and a half: every view is read, some again
        "SOLVER.MAX_ITER": 9,
        "SOLVER.IMS_PER_BATCH": BATCH,
        "SOLVER.AMP.ENABLED": False,
        "LOG_PERIOD": 1,
        "CACHE.VIEWS": VIEWS,
        **changes,
    }
    return [str(word) for pair in values.items() for word in pair]


def run(images, output, **changes):
    return distill(load_distill_config(None, words(images, output, **changes)))


@pytest.fixture(scope="module")
def teacher(images, tmp_path_factory):
    torch.set_num_threads(1)
    return run(images, tmp_path_factory.mktemp("teacher"), METHODS=[])["teacher"]["backbone"]


@pytest.fixture(scope="module")
def cached(images, teacher, tmp_path_factory):
    """A run that wrote its cache in shards of one batch."""
    folder = tmp_path_factory.mktemp("cached")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_writing, "SHARD_BYTES", 1)
        results = run(images, folder / "run", **{"TEACHER.WEIGHTS": teacher, "CACHE.DIR": folder / "cache"})
    return folder / "cache", results


@pytest.fixture
def counted(monkeypatch):
    """How many images each pass of a teacher saw."""
    seen, real = [], Teacher.raw

    def raw(self, images):
        seen.append(len(images))
        return real(self, images)

    monkeypatch.setattr(Teacher, "raw", raw)
    return seen


@pytest.fixture
def untrained(monkeypatch):
    """Training would raise another error."""
    monkeypatch.setattr(stage, "train_side_by_side", lambda *_, **__: 1 / 0)


def losses(folder, method):
    return read_metrics(folder / "students" / method / "metrics.jsonl")


def test_cached_and_uncached_runs_are_equal_to_the_bit(images, teacher, cached, tmp_path):
    _, results = cached
    live = run(images, tmp_path, **{"TEACHER.WEIGHTS": teacher})
    assert [live[word]["sha256"] for word in METHODS] == [results[word]["sha256"] for word in METHODS]
    other = run(images, tmp_path / "other", METHODS=["ce"], **{"TEACHER.WEIGHTS": teacher, "CACHE.VIEW_SEED": 1})
    assert other["ce"]["sha256"] != live["ce"]["sha256"], "the views come from their seed"


@pytest.mark.parametrize(("mine", "theirs"), [((3, 3), (3, 3)), ((4, 4), (8, 8)), ((12, 12), (12, 12))])
@pytest.mark.parametrize("name", terms())
def test_a_loss_reads_no_more_than_it_declares(name, mine, theirs):
    """With NaN in all outputs that it doesn't declare, of student and teacher, value and gradient stay."""
    generator, channels = torch.Generator().manual_seed(0), {"student": 6, "teacher": 6 if name == "pkd" else 9}

    def outputs(who, side):
        shapes = (4, 5), (4, channels[who], *side), (4, channels[who], *side), (4, channels[who])
        logits, used, unused, embedding = (torch.randn(shape, generator=generator) for shape in shapes)
        return ModelOutputs(logits, {"res3": used, "res4": unused}, embedding)

    student, teacher = outputs("student", mine), outputs("teacher", theirs)
    levels = {f"{who}_channels": {"res3": count} for who, count in channels.items()}
    widths = {"num_classes": 5, "student_embedding": 6, "teacher_embedding": channels["teacher"]}
    loss = build_transfer(name, levels=["res3"], **levels, **widths)
    trial = Trial({name: loss}, student, torch.device("cpu"))
    pieces = what_to_keep(trial.read(teacher))
    assert total_bytes(pieces) > 0
    less = ModelOutputs(*(torch.full((4, 5), math.nan) for _ in range(3)))
    less.maps = {level: torch.full_like(value, math.nan) for level, value in student.maps.items()}
    kind = terms()[name].student_kind
    if kind == "maps":
        less.maps["res3"] = student.maps["res3"]
    else:
        setattr(less, kind, student.of(kind))
    found = []
    for said, asked in (
        (student, teacher.images(slice(None))),
        (less, assemble(pieces, trial.values(teacher, pieces), 4, torch.device("cpu"))),
    ):
        torch.manual_seed(0)
        place = said.of(kind, "res3").requires_grad_()
        value = loss(said, asked)[name]
        found.append((value, torch.autograd.grad(value, place)[0]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


class Square(nn.Module):
    def __init__(self, pair):
        super().__init__()

    def forward(self, student, teacher, shared):
        energy = shared(("energy",), lambda: teacher.square().sum((1, 2, 3)))
        return ((student.square().sum((1, 2, 3)) - energy) * teacher.sum((1, 2, 3)).detach()).mean()


@pytest.mark.parametrize("reads", [None, ("energy",), ("energy", "output")])
def test_a_loss_from_outside_declares_too_little_or_nothing(images, teacher, tmp_path, untrained, reads):
    if reads:
        Square.reads = reads
    register_term("square", "maps", 1.0, "the test", "energies")(Square)
    keys = {"TEACHER.WEIGHTS": teacher, "CACHE.DIR": tmp_path / "cache", "METHODS": ["square+at"]}
    error = UserError if reads == ("energy",) else ZeroDivisionError
    try:
        with pytest.raises(error) as caught:
            run(images, tmp_path, **keys)
    finally:
        unregister_term("square")
        Square.__dict__.get("reads") and delattr(Square, "reads")
    if error is UserError:
        assert re.fullmatch("CACHE.DIR: the term square .*`reads`.*", str(caught.value))
        assert not (tmp_path / "cache").exists()
    else:
        assert {"res3", "res4"} < set(load_file(shard_path(tmp_path / "cache", 0)))


def test_every_registered_term_learns_the_same_from_a_cache(images, teacher, tmp_path):
    methods = list(terms())
    live = run(images, tmp_path / "live", METHODS=methods, **{"TEACHER.WEIGHTS": teacher, "SOLVER.MAX_ITER": 2})
    keys = {"TEACHER.WEIGHTS": teacher, "CACHE.DIR": tmp_path / "cache", "SOLVER.MAX_ITER": 2}
    kept = run(images, tmp_path / "kept", METHODS=methods, **keys)
    assert {word: live[word]["sha256"] for word in methods} == {word: kept[word]["sha256"] for word in methods}


def test_a_finished_cache_is_asked_in_the_teachers_place(images, teacher, cached, counted, tmp_path):
    folder, results = cached
    shards = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    again = run(images, tmp_path, **{"TEACHER.WEIGHTS": teacher, "CACHE.DIR": folder})
    # the trial alone: what the student and the teacher say about four images
    assert sum(counted) <= 2 * 4
    assert again["kd+at"]["sha256"] == results["kd+at"]["sha256"]
    assert shards == {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    # fewer methods read less of it
    fewer = run(images, tmp_path / "at", METHODS=["kd+at"], **{"TEACHER.WEIGHTS": teacher, "CACHE.DIR": folder})
    assert fewer["kd+at"]["sha256"] == results["kd+at"]["sha256"]


def test_attention_maps_are_kept_in_place_of_maps(images, teacher, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    keys = {"TEACHER.WEIGHTS": teacher, "CACHE.DIR": tmp_path / "cache", "SOLVER.MAX_ITER": 1}
    run(images, tmp_path, METHODS=["kd+at"], **keys)
    stored = load_file(shard_path(tmp_path / "cache", 0))
    shapes = {name: tuple(value.shape) for name, value in stored.items()}
    assert shapes == {
        "logits": (ROWS, 3),
        "res3 ('attention', 2.0, (4, 4))": (ROWS, 16),
        "res4 ('attention', 2.0, (2, 2))": (ROWS, 4),
    }
    size = sum(value.numel() * value.element_size() for value in stored.values())
    assert size == ROWS * 4 * (3 + 16 + 4)
    assert f"2 views of 24 images take {size / 1024:.4g} KiB (logits 12 B," in caplog.text
    assert "this run alone asks for 7 views and would be faster without" in caplog.text


def test_a_stopped_writer_goes_on(images, teacher, cached, tmp_path, monkeypatch):
    folder, _ = cached
    keys = {"TEACHER.WEIGHTS": teacher, "CACHE.DIR": tmp_path / "cache"}
    monkeypatch.setattr(cache_writing, "SHARD_BYTES", 1)
    real = cache_writing.save_file

    def stopping(tensors, path):
        if ".00003." in path:
            raise KeyboardInterrupt
        real(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(cache_writing, "save_file", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(images, tmp_path, **keys)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.safetensors")}
    assert len(before) == 3
    with pytest.raises(UserError, match=r"unfinished, .*'attention'.*; finish it"):
        run(images, tmp_path / "fewer", METHODS=["nst-poly"], **keys)
    # a shard's rows are the same whatever the size of a batch now; one of 5 doesn't divide a shard of 7
    run(images, tmp_path / "other", **keys, **{"SOLVER.IMS_PER_BATCH": 5, "SOLVER.MAX_ITER": 1})
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    shards = [json.loads((path / "index.json").read_text())["shards"] for path in (folder, tmp_path / "cache")]
    assert shards[0] == shards[1]
    assert len(shards[0]) == 7


def test_a_damaged_file_is_named_and_can_be_written_again(images, teacher, cached, tmp_path, untrained):
    folder = tmp_path / "cache"
    shutil.copytree(cached[0], folder)
    keys = {"TEACHER.WEIGHTS": teacher, "CACHE.DIR": folder}
    path = shard_path(folder, 4)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(UserError, match=rf"{path}: damaged \(its SHA-256 .* remove this file") as caught:
        run(images, tmp_path, **keys)
    assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(ZeroDivisionError):
        run(images, tmp_path, **keys)
    assert path.read_bytes() == whole
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "rows": index["rows"] + 1}))
    with pytest.raises(UserError, match=r"index.json: damaged, or edited by hand .*; remove the folder to write"):
        run(images, tmp_path, **keys)
    (folder / "index.json").write_text("{}")
    with pytest.raises(UserError, match=r"index.json: not the index of a teacher cache; remove the folder"):
        run(images, tmp_path, **keys)


@pytest.mark.parametrize(
    "changed",
    [
        *({"key": key} for key in ("{{}}", "open('x')", "(1", "[" * 2000)),
        *({"dtype": "load"}, {"dtype": "nothing"}, {"kind": "weights"}),
        *({"shape": ["a"]}, {"shape": 3}, {"unknown": 1}),
    ],
)
def test_an_index_made_by_hand_is_refused(tmp_path, changed):
    piece = {"kind": "maps", "place": "res3", "key": "", "shape": [4, 2, 2], "dtype": "float32", "kept": True}
    values = {"claim": {}, "pieces": [piece], "rows": 4, "shard_rows": 4, "shards": {}, "version": VERSION}
    write_sealed_json(tmp_path / "index.json", values)
    assert read_index(tmp_path).pieces == [Piece("maps", "res3", "", (4, 2, 2), "float32")]
    write_sealed_json(tmp_path / "index.json", {**values, "pieces": [{**piece, **changed}]})
    with pytest.raises(UserError, match=r"index.json: not the index of a teacher cache; remove the folder"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"DATA.AUGMENT.SHIFT": 3}, "was written with DATA.AUGMENT.SHIFT 2, now 3; name another CACHE.DIR or remove"),
        ({"DATA.IMAGE_SIZE": 48}, "was written with DATA.IMAGE_SIZE 32, now 48; name another CACHE.DIR or remove"),
        (
            {"CACHE.VIEWS": 1, "CACHE.DTYPE": "fp16"},
            "was written with CACHE.DTYPE 'auto', now 'fp16'; CACHE.VIEWS 2, now 1; name",
        ),
        (
            {"SOLVER.AMP": {"ENABLED": True, "DTYPE": "bf16"}},
            "was written with precision 'float32', now 'bfloat16'; name another CACHE.DIR or remove",
        ),
        ({"TRANSFER.LEVELS": ["res3", "res5"]}, "has no res5, but METHODS read it; it has .*logits.*; name"),
        ({"METHODS": ["at", "fitnet"]}, r"has no res3, res4, but METHODS read it; it has res3"),
        ({"METHODS": ["lp"]}, "has no embedding, but METHODS read it; it has res3"),
    ],
)
def test_a_stale_cache_is_refused(images, teacher, cached, tmp_path, untrained, keys, says):
    folder = cached[0]
    if keys.get("METHODS") == ["at", "fitnet"]:
        # one that keeps no maps
        folder = tmp_path / "cache"
        with pytest.raises(ZeroDivisionError):
            run(images, tmp_path / "at", METHODS=["at"], **{"TEACHER.WEIGHTS": teacher, "CACHE.DIR": folder})
    with pytest.raises(UserError, match=f"{folder}: this teacher cache {says}") as caught:
        run(images, tmp_path, **{"TEACHER.WEIGHTS": teacher, "CACHE.DIR": folder, **keys})
    assert "\n" not in str(caught.value)


def test_a_cache_of_another_teacher_or_of_other_data_is_refused(images, teacher, cached, tmp_path, untrained):
    keys = {"CACHE.DIR": cached[0]}
    other = tmp_path / "other.safetensors"
    network = initial_student(load_distill_config(None, words(images, tmp_path)), 3)
    card = load_card(teacher)
    save_backbone(other, network.model, card)
    with pytest.raises(UserError, match=f"written with TEACHER.SHA256 '{card.sha256}', now '[0-9a-f]{{64}}'; name"):
        run(images, tmp_path / "a", **keys, **{"TEACHER.WEIGHTS": other})
    more = tmp_path / "more"
    shutil.copytree(images, more)
    shutil.copy(more / "train" / "class0" / "000.png", more / "train" / "class0" / "new.png")
    with pytest.raises(UserError, match="written with DATA.FINGERPRINT '[0-9a-f]{64}', now '[0-9a-f]{64}'; name"):
        run(more, tmp_path / "b", **keys, **{"TEACHER.WEIGHTS": teacher})


def test_a_cache_that_is_too_large_is_refused_before_it_is_written(images, teacher, tmp_path, untrained, monkeypatch):
    folder = tmp_path / "cache"
    keys = {"TEACHER.WEIGHTS": teacher, "CACHE.DIR": folder, "METHODS": ["kd+at"]}
    size = r"2 views of 24 images take 4.312 KiB \(logits 12 B, res3 .* each\)"
    with pytest.raises(UserError, match=f"CACHE.MAX_GIB: {size}, more than 1e-06 GiB; raise it, or take fewer"):
        run(images, tmp_path, **keys, **{"CACHE.MAX_GIB": 1e-6})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4000))
    with pytest.raises(UserError, match=rf"CACHE.DIR: {folder}: {size}, but 3.906 KiB are free; name another folder"):
        run(images, tmp_path, **keys)
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_rounding_is_said_aloud(images, teacher, cached, tmp_path, caplog):
    keys = {"TEACHER.WEIGHTS": teacher, "CACHE.DIR": tmp_path / "cache", "CACHE.DTYPE": "fp16"}
    rounded = run(images, tmp_path, **keys)
    assert "CACHE.DTYPE fp16: the teacher's outputs are rounded" in caplog.text
    stored = load_file(shard_path(tmp_path / "cache", 0))
    assert {value.dtype for value in stored.values()} == {torch.float16}
    exact, _ = cached
    assert rounded["ce"]["sha256"] == cached[1]["ce"]["sha256"]
    assert rounded["kd+at"]["sha256"] != cached[1]["kd+at"]["sha256"]
    first = [losses(folder, "kd+at")[0]["loss/kd"] for folder in (tmp_path, exact.parent / "run")]
    assert first[0] == pytest.approx(first[1], rel=1e-2)


def test_views_need_a_number(tmp_path):
    with pytest.raises(UserError, match=re.escape("CACHE.VIEWS must be at least 1 where CACHE.DIR is set")):
        load_distill_config(None, words(tmp_path, tmp_path, **{"CACHE.VIEWS": 0, "CACHE.DIR": tmp_path}))
    with pytest.raises(UserError, match=re.escape("CACHE.DTYPE must be auto where CACHE.DIR is not set")):
        load_distill_config(None, words(tmp_path, tmp_path, **{"CACHE.DTYPE": "fp16"}))


def test_what_is_not_kept_is_not_taken_for_broken(images, teacher, tmp_path, monkeypatch):
    said = []
    real = TeacherCache.__call__

    def call(self, images, rows):
        said.append(real(self, images, rows))
        return said[-1]

    monkeypatch.setattr(TeacherCache, "__call__", call)
    keys = {"TEACHER.WEIGHTS": teacher, "CACHE.DIR": tmp_path / "cache", "SOLVER.MAX_ITER": 1}
    run(images, tmp_path, METHODS=["at"], **keys)
    outputs = said[0]
    assert outputs.maps["res3"].shape == (BATCH, 64, 4, 4)
    assert outputs.maps["res3"].isnan().all()
    assert outputs.logits is None
    assert broken_outputs(outputs) == []
    outputs.maps["res3"] = outputs.maps["res3"].clone()
    assert broken_outputs(outputs) == ["the teacher's map res3"]
