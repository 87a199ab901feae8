"""The teacher cache: the same bits as without, its size, and when it is refused."""

import json
import logging
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nst_det.distillation import cache as cache_writing
from nst_det.distillation import pipeline
from nst_det.distillation.build import Teacher, initial_student
from nst_det.distillation.cache import (
    Index,
    Piece,
    TeacherCache,
    Trial,
    assemble,
    is_stand_in,
    read_index,
    shard_path,
    total_bytes,
    what_to_keep,
)
from nst_det.distillation.trainer import broken_outputs, moved
from nst_det.engine.io import write_sealed_json
from nst_det.errors import UserError
from nst_det.losses import ModelOutputs, build_transfer, register_term, terms, unregister_term
from nst_det.models import load_card, save_backbone
from tests.helpers.stage_one import config, metrics
from tests.helpers.stage_one import run as run_small

METHODS = ["ce", "nst-poly", "kd+at"]
# there are no boxes here
TERMS = [name for name, term in terms().items() if term.truth != "boxes"]
VIEWS, IMAGES, BATCH = 2, 24, 7
ROWS = VIEWS * IMAGES
# nine steps are two epochs and a half: every view is read, some again
KEYS = {"METHODS": METHODS, "CACHE.VIEWS": VIEWS, "SOLVER.MAX_ITER": 9, "SOLVER.AMP.ENABLED": False}


@pytest.fixture
def run(images, taught):
    """``run(output, folder)``: a run with a cache in ``folder``, or with none."""

    def start(output, folder="", source=images, **keys):
        return run_small(source, output, **{**KEYS, **taught, "CACHE.DIR": folder, **keys})

    return start


@pytest.fixture(scope="module")
def cached(images, finished, tmp_path_factory):
    """A cache in shards of one batch, and the results of the run that wrote it."""
    folder = tmp_path_factory.mktemp("cached")
    torch.set_num_threads(1)
    keys = {"TEACHER.WEIGHTS": finished[1]["teacher"]["backbone"], "CACHE.DIR": folder / "cache"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_writing, "SHARD_BYTES", 1)
        return folder / "cache", run_small(images, folder / "run", **KEYS, **keys)


@pytest.fixture
def untrained(monkeypatch):
    """Training would raise another error."""
    monkeypatch.setattr(pipeline, "StageOneTrainer", lambda *_: 1 / 0)


def hashes(results, methods):
    return [results[method]["sha256"] for method in methods]


def written(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


def test_cached_and_uncached_runs_are_equal_to_the_bit(run, cached, tmp_path):
    live = run(tmp_path)
    assert hashes(live, METHODS) == hashes(cached[1], METHODS)
    other = run(tmp_path / "other", METHODS=["ce"], **{"CACHE.VIEW_SEED": 1})
    assert other["ce"]["sha256"] != live["ce"]["sha256"], "the views come from their seed"


def test_every_registered_term_learns_the_same_from_a_cache(run, tmp_path):
    keys = {"METHODS": TERMS, "SOLVER.MAX_ITER": 2}
    live, kept = run(tmp_path / "live", **keys), run(tmp_path / "kept", tmp_path / "cache", **keys)
    assert hashes(live, TERMS) == hashes(kept, TERMS)


@pytest.mark.parametrize(("mine", "theirs"), [((3, 3), (3, 3)), ((4, 4), (8, 8)), ((12, 12), (12, 12))])
@pytest.mark.parametrize("name", TERMS)
def test_a_loss_reads_no_more_than_it_declares(name, mine, theirs):
    """With NaN in all outputs that it doesn't declare, of student and teacher, value and gradient stay."""
    generator, channels = torch.Generator().manual_seed(0), {"student": 6, "teacher": 6 if name == "pkd" else 9}

    def outputs(who, side):
        shapes = (4, 5), (4, channels[who], *side), (4, channels[who], *side), (4, channels[who])
        logits, used, unused, embedding = (torch.randn(shape, generator=generator) for shape in shapes)
        return ModelOutputs(logits, {"res3": used, "res4": unused}, embedding, torch.arange(4))

    student, teacher = outputs("student", mine), outputs("teacher", theirs)
    levels = {f"{who}_channels": {"res3": count} for who, count in channels.items()}
    widths = {"num_classes": 5, "student_embedding": 6, "teacher_embedding": channels["teacher"]}
    loss = build_transfer(name, levels=["res3"], **levels, **widths)
    trial = Trial({name: loss}, student, torch.device("cpu"))
    pieces = what_to_keep(trial.read(teacher))
    assert total_bytes(pieces) > 0
    less = ModelOutputs(*(torch.full((4, 5), math.nan) for _ in range(3)), torch.arange(4))
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
def test_a_loss_from_outside_declares_too_little_or_nothing(run, tmp_path, untrained, monkeypatch, reads):
    if reads:
        monkeypatch.setattr(Square, "reads", reads, raising=False)
    register_term("square", "maps", 1.0, "the test", "energies")(Square)
    too_little = reads == ("energy",)
    try:
        with pytest.raises(UserError if too_little else ZeroDivisionError) as caught:
            run(tmp_path, tmp_path / "cache", METHODS=["square+at"])
    finally:
        unregister_term("square")
    if too_little:
        assert "CACHE.DIR: the term square reads more" in str(caught.value)
        assert not (tmp_path / "cache").exists()
    else:
        assert {"res3", "res4"} == set(load_file(shard_path(tmp_path / "cache", 0)))


def test_a_finished_cache_is_asked_in_the_teachers_place(run, cached, tmp_path, monkeypatch):
    (folder, results), asked, raw = cached, [], Teacher.raw
    monkeypatch.setattr(Teacher, "raw", lambda self, images: (asked.append(len(images)), raw(self, images))[1])
    shards = written(folder)
    again = run(tmp_path, folder)
    # the trial alone: student and teacher on four images
    assert sum(asked) <= 2 * 4
    assert again["kd+at"]["sha256"] == results["kd+at"]["sha256"]
    assert shards == written(folder)
    # fewer methods read less of it
    assert run(tmp_path / "at", folder, METHODS=["kd+at"])["kd+at"]["sha256"] == results["kd+at"]["sha256"]


def test_attention_maps_are_kept_in_place_of_maps(run, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run(tmp_path, tmp_path / "cache", METHODS=["kd+at"], **{"SOLVER.MAX_ITER": 1, "SOLVER.WARMUP_ITERS": 0})
    stored = load_file(shard_path(tmp_path / "cache", 0))
    assert {name: tuple(value.shape) for name, value in stored.items()} == {
        "logits": (ROWS, 3),
        "res3 ('attention', 2.0, (4, 4))": (ROWS, 16),
        "res4 ('attention', 2.0, (2, 2))": (ROWS, 4),
    }
    size = sum(value.numel() * value.element_size() for value in stored.values())
    assert size == ROWS * 4 * (3 + 16 + 4)
    assert f"2 views of 24 images take {size / 1024:.4g} KiB (logits 12 B," in caplog.text
    assert "this run reads only 7 views and would be faster without" in caplog.text


def test_a_stopped_writer_resumes(run, cached, tmp_path, monkeypatch):
    folder, save = tmp_path / "cache", cache_writing.save_file
    monkeypatch.setattr(cache_writing, "SHARD_BYTES", 1)

    def stopping(tensors, path):
        if ".00003." in path:
            raise KeyboardInterrupt
        save(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(cache_writing, "save_file", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, folder)
    before = written(folder)
    assert len(before) == 3
    with pytest.raises(UserError, match=rf"{folder}: .*unfinished.*'attention'"):
        run(tmp_path / "fewer", folder, METHODS=["nst-poly"])
    # a shard's rows are the same whatever the size of a batch now; one of 5 doesn't divide a shard of 7
    run(tmp_path / "other", folder, **{"SOLVER.IMS_PER_BATCH": 5, "SOLVER.MAX_ITER": 2})
    assert before.items() < written(folder).items()
    shards = [json.loads((path / "index.json").read_text())["shards"] for path in (cached[0], folder)]
    assert shards[0] == shards[1]
    assert len(shards[0]) == 7


@pytest.mark.parametrize("keys", [{"METHODS": ["fitnet"], "TRANSFER.LEVELS": ["res4"]}, {"METHODS": ["kd"]}])
def test_an_unfinished_cache_wants_methods_that_read_its_maps(run, tmp_path, untrained, keys):
    folder, methods = tmp_path / "cache", ["fitnet", "kd"]
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "all", folder, METHODS=methods)
    shard_path(folder, 0).unlink()
    with pytest.raises(UserError, match=rf"{folder}: .*unfinished.* its res3"):
        run(tmp_path / "fewer", folder, **keys)


def test_a_damaged_file_is_named_and_can_be_written_again(run, cached, tmp_path, untrained):
    folder = tmp_path / "cache"
    shutil.copytree(cached[0], folder)
    path, index = shard_path(folder, 4), folder / "index.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(UserError, match=rf"{path}: damaged .* remove this file"):
        run(tmp_path, folder)
    path.unlink()
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, folder)
    assert path.read_bytes() == whole
    values = json.loads(index.read_text())
    for content in ({**values, "rows": values["rows"] + 1}, {}):
        index.write_text(json.dumps(content))
        with pytest.raises(UserError, match=rf"{index}: .*remove the folder"):
            run(tmp_path, folder)


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
    values = {"claim": {}, "pieces": [piece], "rows": 4, "shard_rows": 4, "shards": {}}
    write_sealed_json(tmp_path / "index.json", values)
    assert read_index(tmp_path).pieces == [Piece("maps", "res3", "", (4, 2, 2), "float32")]
    write_sealed_json(tmp_path / "index.json", {**values, "pieces": [{**piece, **changed}]})
    with pytest.raises(UserError, match=r"index.json: .*remove the folder"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"DATA.AUGMENT.SHIFT": 3}, "DATA.AUGMENT.SHIFT 2, now 3"),
        ({"DATA.IMAGE_SIZE": 48}, "DATA.IMAGE_SIZE 32, now 48"),
        ({"CACHE.VIEWS": 1, "CACHE.DTYPE": "fp16"}, "CACHE.DTYPE 'auto', now 'fp16'; CACHE.VIEWS 2, now 1"),
        ({"SOLVER.AMP": {"ENABLED": True, "DTYPE": "bf16"}}, "precision 'float32', now 'bfloat16'"),
        ({"TRANSFER.LEVELS": ["res3", "res5"]}, "no res5, .* has .*logits"),
        ({"METHODS": ["at", "fitnet"]}, "no res3, res4, .* has res3"),
        ({"METHODS": ["lp"]}, "no embedding, .* has res3"),
    ],
)
def test_a_stale_cache_is_refused(run, cached, tmp_path, untrained, keys, named):
    folder = cached[0]
    if keys.get("METHODS") == ["at", "fitnet"]:
        # one that keeps no maps
        folder = tmp_path / "cache"
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "at", folder, METHODS=["at"])
    with pytest.raises(UserError, match=f"{folder}: .*{named}") as caught:
        run(tmp_path, folder, **keys)
    assert "\n" not in str(caught.value)


def test_a_cache_of_another_teacher_or_of_other_data_is_refused(run, images, taught, cached, tmp_path, untrained):
    other, more = tmp_path / "other.safetensors", tmp_path / "more"
    card = load_card(taught["TEACHER.WEIGHTS"])
    save_backbone(other, initial_student(config(images, tmp_path), 3).model, card)
    with pytest.raises(UserError, match=f"TEACHER.SHA256 '{card.sha256}', now '[0-9a-f]{{64}}'"):
        run(tmp_path / "a", cached[0], **{"TEACHER.WEIGHTS": other})
    shutil.copytree(images, more)
    shutil.copy(more / "train" / "class0" / "000.png", more / "train" / "class0" / "new.png")
    with pytest.raises(UserError, match="DATA.FINGERPRINT '[0-9a-f]{64}', now '[0-9a-f]{64}'"):
        run(tmp_path / "b", cached[0], more)


def test_a_cache_that_is_too_large_is_refused_before_it_is_written(run, tmp_path, untrained, monkeypatch):
    folder, size = tmp_path / "cache", r"2 views of 24 images take 4.312 KiB"
    with pytest.raises(UserError, match=f"CACHE.MAX_GIB: {size}"):
        run(tmp_path, folder, METHODS=["kd+at"], **{"CACHE.MAX_GIB": 1e-6})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4000))
    with pytest.raises(UserError, match=f"CACHE.DIR: {folder}: {size}"):
        run(tmp_path, folder, METHODS=["kd+at"])
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_rows_for_a_gpu_are_gathered_where_it_takes_them_itself(tmp_path, monkeypatch):
    piece, kept = Piece("maps", "res3", "", (4, 2, 2), "float32"), torch.randn(6, 4, 2, 2)
    for shard in range(2):
        save_file({"res3": kept[3 * shard :][:3]}, shard_path(tmp_path, shard))
    empty, pinned = torch.empty, []
    monkeypatch.setattr(
        torch, "empty", lambda *size, dtype, pin_memory: (pinned.append(pin_memory), empty(*size, dtype=dtype))[1]
    )
    monkeypatch.setattr(cache_writing, "assemble", lambda pieces, values, *_: values)
    rows = torch.tensor([4, 0, 3])
    for device in ("cuda", "cpu"):
        cache = TeacherCache(tmp_path, Index({}, [piece], 6, 3), torch.device(device))
        assert torch.equal(cache(torch.zeros(3), rows)["res3"], kept[rows])
    assert pinned == [True, False]


def test_rounding_is_logged(run, cached, tmp_path, caplog):
    (folder, exact), keys = cached, {"CACHE.DTYPE": "fp16"}
    rounded = run(tmp_path, tmp_path / "cache", **keys)
    assert "CACHE.DTYPE fp16: the teacher's outputs are rounded" in caplog.text
    stored = load_file(shard_path(tmp_path / "cache", 0))
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert rounded["ce"]["sha256"] == exact["ce"]["sha256"]
    assert rounded["kd+at"]["sha256"] != exact["kd+at"]["sha256"]
    first = [metrics(output, "kd+at")[0]["loss/kd"] for output in (tmp_path, folder.parent / "run")]
    assert first[0] == pytest.approx(first[1], rel=1e-2)


def test_what_is_not_kept_is_not_taken_for_broken(run, tmp_path, monkeypatch):
    seen, call = [], TeacherCache.__call__
    monkeypatch.setattr(TeacherCache, "__call__", lambda *args: (seen.append(call(*args)), seen[-1])[1])
    run(tmp_path, tmp_path / "cache", METHODS=["at"], **{"SOLVER.MAX_ITER": 2})
    outputs = seen[0]
    assert outputs.maps["res3"].shape == (BATCH, 64, 4, 4)
    assert outputs.maps["res3"].isnan().all()
    assert outputs.logits is None
    assert broken_outputs(outputs) == []
    # in a dump and its replay neither
    assert is_stand_in(moved(outputs.maps, torch.device("meta"))["res3"])
    outputs.maps["res3"] = outputs.maps["res3"].clone()
    assert broken_outputs(outputs) == ["the teacher's map res3"]
