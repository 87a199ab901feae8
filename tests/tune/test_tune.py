import json
import math
import re
import shutil
import statistics
import sys

import pytest
import yaml

from nst_det.cli import main
from nst_det.comparison.config import load_comparison
from nst_det.comparison.launch_local import RunFailed
from nst_det.comparison.plan import make_plan, run_config
from nst_det.distillation.dataloader import read_data
from nst_det.distillation.fingerprint import teacher_claim
from nst_det.engine.run_dir import RunFolder
from nst_det.errors import UserError
from nst_det.losses import get_term
from nst_det.tune.config import Space, load_tuning
from nst_det.tune.run import search, tune, tuning_table
from tests.helpers import fake_stage
from tests.helpers.hub import NAME, offline_cache, snapshot, weights
from tests.helpers.small_comparison import COMPARE, DETECT, DISTILL, RunsHere, change, starts, write_comparison
from tests.helpers.voc import jpeg, write

optuna = pytest.importorskip("optuna")
METHODS = ["kd", "at", "kd+nst-poly", "cwd@det"]
TUNE = {
    "COMPARE": "compare.yaml",
    "TRIALS": 4,
    "SEEDS": [0, 1],
    "VAL_FRACTION": 0.25,
    "LEVELS": [["res4"], ["res3", "res4"]],
    "DET_LEVELS": [["p4"]],
}


def write_tune(folder, patch):
    """The YAML of a search whose runs train nothing, and whose test set isn't there: whoever opens it fails."""
    patch.setattr("nst_det.tune.run.LocalLauncher", RunsHere)
    patch.setenv("FAKE_STEP_SECONDS", "0")
    voc = {**DETECT["DATASETS"]["VOC"], "own_test": {"ROOT": "FOLDER/gone", "SPLIT": "test"}}
    transfer = {"LEVELS": ["res3"], "WEIGHTS": {"at": 10, "nst-poly": 10.0}}
    write_comparison(
        folder,
        compare={**COMPARE, "METHODS": METHODS, "THREADS": 1},
        distill={**DISTILL, "TEACHER": {"ARCH": "nst_resnet10_w32"}, "TRANSFER": transfer},
        # the best weights of a validation split, as init writes it
        detect={
            **DETECT,
            "DATASETS": {**DETECT["DATASETS"], "VOC": voc, "VAL_FRACTION": 0.2},
            "TEST": {"SELECT": "best", "EVAL_PERIOD": 4, "PATIENCE": 2},
        },
    )
    # the comparison's own folder is there
    change(folder / "compare.yaml", OUTPUT_DIR="./compared")
    (folder / "tune.yaml").write_text(yaml.safe_dump(TUNE))
    return folder / "tune.yaml"


@pytest.fixture
def tune_file(tmp_path, monkeypatch):
    return write_tune(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished search: its folder, what was asked, what was found and the file."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        tuning = load_tuning(write_tune(folder, patch), folder / "out")
        return folder, tuning, *tune(tuning)


def begun_below(folder):
    """How often each run folder was begun, by its path."""
    logs = folder.rglob("starts.log")
    return {log.parent.relative_to(folder).as_posix(): len(starts(log.parent)) for log in logs}


def test_every_method_gets_the_same_trials_and_what_is_shared_is_made_once(finished):
    _, tuning, found, _ = finished
    assert list(found) == METHODS
    begun = begun_below(tuning.folder)
    assert set(begun.values()) == {1}
    # a teacher, the detector that teaches, the backbone that cwd@det starts from, and in each trial every method
    expected = {"teacher/teacher", "detect/seed0/teacher"} | {f"distill/seed{seed}/students/ce" for seed in (0, 1)}
    for trial in range(4):
        for seed in (0, 1):
            expected |= {f"trials/{trial:03d}/distill/seed{seed}/students/{word}" for word in METHODS[:3]}
            expected.add(f"trials/{trial:03d}/detect/seed{seed}/cwd@det")
    assert set(begun) == expected
    assert all(best.trials == 4 for best in found.values())
    students = (tuning.folder / "trials").rglob("students/*/result.json")
    assert {json.loads(path.read_text())["steps"] for path in students} == {6}


def test_no_run_sees_the_test_data(finished):
    configs = [yaml.safe_load(path.read_text()) for path in finished[1].folder.rglob("configs/**/*.yaml")]
    stages = {tree["DATA"]["VAL_FROM"] if "DATA" in tree else tuple(tree["DATASETS"]["TEST"]) for tree in configs}
    assert stages == {"train", ()}
    assert {tree.get("DATA", tree.get("DATASETS"))["VAL_FRACTION"] for tree in configs} == {0.25}


def test_no_run_reads_a_cache_of_the_comparison_s_images(tune_file, tmp_path):
    keys = "[DISTILL.CACHE.VIEWS, 2, DISTILL.CACHE.DIR, cache, DISTILL.CACHE.DTYPE, fp16]"
    cache = load_tuning(tune_file, tmp_path / "out", ["OPTS", keys]).base.distill.CACHE
    assert (cache.VIEWS, cache.DIR, cache.DTYPE) == (2, "", "auto")


def test_the_first_trial_is_the_configured_setting_and_the_best_is_chosen(finished):
    _, tuning, found, _ = finished
    folder = tuning.folder / "trials"
    for word in METHODS[:3]:
        values = []
        for trial in range(4):
            paths = [folder / f"{trial:03d}/distill/seed{seed}/students/{word}/result.json" for seed in (0, 1)]
            values.append(statistics.fmean(json.loads(path.read_text())["top1"] for path in paths))
        assert (found[word].value, found[word].default) == (pytest.approx(max(values)), pytest.approx(values[0]))
    # at 10 on res3 by hand: a factor 4 from the best, other levels, and the mean of the seeds
    assert found["at"].default == pytest.approx(1 - math.log10(4) / 10 - 0.1 - 0.0005)
    assert found["at"].by_seed["0"] - found["at"].by_seed["1"] == pytest.approx(0.001)
    first = yaml.safe_load((folder / "000/configs/distill/seed0.yaml").read_text())["TRANSFER"]["BY_METHOD"]
    assert first["at"] == {"WEIGHTS": {"at": 10.0}, "LEVELS": ["res3"]}
    for word, best in found.items():
        for term, weight in best.settings["WEIGHTS"].items():
            low, high = tuning.spaces[word].weights[term]
            assert low <= weight <= high
    assert tuning.spaces["at"].weights == {"at": (1.0, 100.0)}
    # logits have no levels
    assert "LEVELS" not in found["kd"].settings
    columns = [list(column.cells) for column in tuning_table(tuning, found).columns]
    assert columns[:2] == [METHODS, ["top1", "top1", "top1", "map"]]
    assert columns[3][1] == f"{found['at'].value:.3f}"


def test_a_comparison_takes_what_was_found_and_names_the_budget(finished):
    folder, _, found, path = finished
    comparison = load_comparison(folder / "compare.yaml", folder / "after", ["TUNED", str(path)])
    assert {word: (tuned.settings, tuned.trials) for word, tuned in comparison.tuned.items()} == {
        word: (best.settings, 4) for word, best in found.items()
    }
    detector = next(run for run in make_plan(comparison) if run.row == "cwd@det")
    assert repr(found["cwd@det"].settings["WEIGHTS"]) in detector.options
    written = yaml.safe_load(path.read_text())
    assert written["budget"]["trials"] == 4
    assert written["methods"]["kd"]["value"] == pytest.approx(found["kd"].value, abs=1e-6)


def test_a_stopped_search_resumes_to_the_undisturbed_answer(finished, tune_file, tmp_path):
    folder = tmp_path / "out" / "trials" / "002" / "distill" / "seed1" / "students" / "at"
    folder.mkdir(parents=True)
    # this run fails, so the call ends with its trials asked for and not told
    (folder / "fails").touch()
    tuning = load_tuning(tune_file, tmp_path / "out")
    with pytest.raises(RunFailed, match="the images are gone"):
        tune(tuning)
    (folder / "fails").unlink()
    resumed, _ = tune(tuning)
    assert resumed == finished[2]
    begun = begun_below(tmp_path / "out")
    # nothing else that was begun is begun again
    assert {path for path, count in begun.items() if count > 1} == {"trials/002/distill/seed1/students/at"}
    assert set(begun) == set(begun_below(finished[1].folder))


def test_more_trials_and_methods_may_be_added_and_nothing_else_changed(tune_file, tmp_path):
    def of(*words):
        return tune(load_tuning(tune_file, tmp_path / "out", ["SEEDS", "[0]", *words]))[0]

    first = of("TRIALS", "2", "METHODS", "[kd]")
    more = of("TRIALS", "3", "METHODS", "[kd, at]")
    assert set(begun_below(tmp_path / "out" / "trials").values()) == {1}
    assert (tmp_path / "out/trials/002/distill/seed0/students/kd").is_dir()
    assert more["kd"].trials == more["at"].trials == 3
    assert more["kd"].value >= first["kd"].value
    # fewer are those that came first
    assert of("TRIALS", "2", "METHODS", "[kd]") == first
    for key, value in (("WEIGHT", "[0.5, 2.0]"), ("SEED", "1"), ("SEEDS", "[1]")):
        with pytest.raises(UserError, match=rf"TUNE\.{key} "):
            of("TRIALS", "2", "METHODS", "[kd]", key, value)


@pytest.mark.parametrize(("count", "named"), [(6, r"tune\.yaml: VAL_FRACTION.*"), (7, "")])
def test_too_few_images_are_left_to_train_on(tune_file, tmp_path, count, named):
    for number, file in enumerate(sorted((tmp_path / "images" / "cat").iterdir())):
        write(file, jpeg(8, 8 + number))
    for split in ("train", "val"):
        shutil.copytree(tmp_path / "images" / "cat", tmp_path / "images" / split / "cat")
    words = ["OPTS", f"[DISTILL.DATA.PER_CLASS, {count}]"]
    with pytest.raises(UserError, match=rf"{named}.*'cat'.*DATA\.PER_CLASS {count}") as caught:
        load_tuning(tune_file, tmp_path / "out", words)
    assert bool(named) == ("VAL_FRACTION" in str(caught.value))


def test_the_teacher_of_the_comparison_is_taken_if_it_is_the_one_that_would_be_trained(
    tune_file, tmp_path, monkeypatch
):
    comparison = load_comparison(tmp_path)
    (run,) = (run for run in make_plan(comparison) if run.kind == "teacher")
    config = run_config(comparison, run)
    file = comparison.folder / "backbones" / "small-teacher.safetensors"

    def taken(*words):
        return load_tuning(tmp_path, tmp_path / "out", words).base.distill.TEACHER.WEIGHTS

    folder = RunFolder(run.folders[0])
    with folder.opened(teacher_claim(config, read_data(config).fingerprint(), "", to_train=True)):
        assert taken() == ""
        folder.finish({})
    assert taken() == ""
    write(file, "weights")
    write(file.with_suffix(".json"), "{}")
    assert taken() == str(file)
    assert taken("OPTS", "[SEEDS, [7], DISTILL.SOLVER.CHECKPOINT_PERIOD, 2]") == str(file)
    # it learned from all labels
    assert taken("OPTS", "[DISTILL.DATA.PER_CLASS, 1]") == str(file)
    assert taken("OPTS", "[DISTILL.TEACHER.SOLVER.MAX_ITER, 9]") == ""
    # one that begins with published weights is another
    weights(snapshot(offline_cache(tmp_path, monkeypatch)) / "model.safetensors")
    assert taken("OPTS", f"[DISTILL.TEACHER.ARCH, {NAME}, DISTILL.TEACHER.WEIGHTS, {NAME}]") == NAME
    # no run trains one
    plan = make_plan(load_tuning(tmp_path, tmp_path / "out").base)
    assert {run.kind for run in plan} == {"students", "detector", "teacher detector"}
    # a search that has begun with its own keeps it
    (tmp_path / "out" / "teacher").mkdir(parents=True)
    assert taken() == ""
    write(tmp_path / "images" / "cat" / "g.jpg", "another image")
    assert load_tuning(tmp_path, tmp_path / "new").base.distill.TEACHER.WEIGHTS == ""


def test_a_method_of_stage_one_may_be_judged_by_its_detector(tune_file, tmp_path):
    words = ["OBJECTIVE", "map", "METHODS", "[at]", "TRIALS", "2", "SEEDS", "[0]"]
    found, _ = tune(load_tuning(tune_file, tmp_path / "out", words))
    assert found["at"].value == fake_stage.draw("at", 0)
    assert begun_below(tmp_path / "out")["trials/001/detect/seed0/at"] == 1


def test_generated_data_is_made_once(tune_file, tmp_path):
    words = ["METHODS", "[at, cwd@det]", "TRIALS", "2", "SEEDS", "[0]", "OPTS", "[DATA.GENERATE, {'seed': 0}]"]
    found, _ = tune(load_tuning(tune_file, tmp_path / "out", words))
    assert found["at"].trials == found["cwd@det"].trials == 2
    begun = begun_below(tmp_path / "out")
    assert begun["data"] == 1
    assert set(begun.values()) == {1}


def test_the_search_finds_what_is_best(tmp_path):
    """On a function: twice the trials get nearer than the first, and no trial lies outside."""
    space = {"a": Space({"w": (0.1, 1000.0)}, {"levels": ('["x"]', '["y"]')}, {"w": 1.0, "levels": '["x"]'})}

    def evaluate(number, settings):
        seen.append(settings["a"])
        weight, levels = settings["a"]["WEIGHTS"]["w"], settings["a"]["LEVELS"]
        return {"a": {0: -abs(math.log10(weight) - 2) - (levels == ["x"])}}

    seen = []
    best = search(tmp_path, space, 24, 0, evaluate)["a"]
    assert seen[0] == {"WEIGHTS": {"w": 1.0}, "LEVELS": ["x"]}
    assert len(seen) == 24
    assert best.settings["LEVELS"] == ["y"]
    assert 30 < best.settings["WEIGHTS"]["w"] < 300
    assert best.default == -3
    # all is in the storage
    assert search(tmp_path, space, 24, 0, None)["a"] == best


def test_a_stopped_trial_is_the_same_one_under_another_optuna(tmp_path, monkeypatch, caplog):
    space = {"a": Space({"w": (0.1, 1000.0)}, {}, {"w": 1.0})}
    seen, begun_with = [], optuna.__version__

    def evaluate(number, settings):
        seen.append(settings["a"]["WEIGHTS"]["w"])
        if len(seen) == 4:
            raise KeyboardInterrupt
        return {"a": {0: -abs(math.log10(seen[-1]) - 2)}}

    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, space, 6, 0, evaluate)
    # what another Optuna does: it draws other settings
    monkeypatch.setattr("optuna.__version__", "99.1")
    monkeypatch.setattr("nst_det.tune.run.derive_seed", lambda *_: 12345)
    found = search(tmp_path, space, 6, 0, evaluate)["a"]
    assert seen[3] == seen[4]
    assert (len(seen), found.trials) == (7, 6)
    (line,) = [message for message in caplog.messages if "99.1" in message]
    assert str(tmp_path) in line
    assert begun_with in line
    caplog.clear()
    assert search(tmp_path, space, 6, 0, None)["a"] == found


def test_a_search_that_was_killed_before_its_first_trial_began_goes_on(tmp_path, monkeypatch):
    space = {"a": Space({"w": (0.1, 1000.0)}, {}, {"w": 1.0})}
    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "ask", lambda *_: next(iter(())))
        with pytest.raises(StopIteration):
            search(tmp_path, space, 2, 0, None)
    found = search(tmp_path, space, 2, 0, lambda number, settings: {"a": {0: float(number)}})["a"]
    assert (found.trials, found.default) == (2, 0.0)
    assert search(tmp_path, space, 1, 0, None)["a"].settings == {"WEIGHTS": {"w": 1.0}}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_counts_as_0(tmp_path, caplog, value):
    space = {"a": Space({"w": (0.1, 1000.0)}, {}, {"w": 1.0})}

    def evaluate(number, settings):
        return {"a": {0: 0.5, 1: value if number in (0, 2) else 0.5 + number / 100}}

    found = search(tmp_path, space, 4, 0, evaluate)["a"]
    assert (found.value, found.default, found.trials) == (pytest.approx(0.515), None, 4)
    assert found.by_seed == {"0": 0.5, "1": pytest.approx(0.53)}
    assert [message.split(":")[0] for message in caplog.messages] == [
        str(tmp_path / "trials" / name) for name in ("000", "002")
    ]
    # fewer trials, of which none is left
    with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path / 'trials'))}: a .*METHODS.*TRANSFER\.WEIGHTS"):
        search(tmp_path, space, 1, 0, None)


@pytest.mark.parametrize(("word", "term"), [("kd+nst-poly", "nst-poly"), ("cwd@det", "cwd")])
def test_a_setting_whose_loss_is_not_finite_costs_no_other_method_anything(
    finished, tune_file, tmp_path, monkeypatch, word, term
):
    # the weight of the second trial is smaller than the configured one
    run = "distill/seed0" if word in METHODS[:3] else f"detect/seed0/{word}"
    node = yaml.safe_load((finished[1].folder / f"trials/001/configs/{run}.yaml").read_text())["TRANSFER"]
    most = node.get("BY_METHOD", {}).get(word, node)["WEIGHTS"][term]
    monkeypatch.setenv("FAKE_NOT_FINITE", f"{term} {most}")
    tuning = load_tuning(tune_file, tmp_path / "out")
    found, path = tune(tuning)
    assert {name: best for name, best in found.items() if name != word} == {
        name: best for name, best in finished[2].items() if name != word
    }
    best = found[word]
    assert (best.default, best.trials, best.settings["WEIGHTS"][term] <= most) == (None, 4, True)
    assert yaml.safe_load(path.read_text())["methods"][word]["value of the configured setting"] is None
    assert list(tuning_table(tuning, found).columns[2].cells)[METHODS.index(word)] == "not finite"
    # neither the other seed of it nor what was done was begun again
    assert set(begun_below(tmp_path / "out").values()) == {1}


def test_a_student_that_is_not_finite_costs_no_detector_that_begins_with_another(
    tune_file, tmp_path, monkeypatch, caplog
):
    # the configured weight, with which that detector's backbone is trained, is finite
    monkeypatch.setenv("FAKE_NOT_FINITE", f"kd {get_term('kd').weight}")
    tune(load_tuning(tune_file, tmp_path / "out", ["METHODS", "[kd, kd+cwd@det]"]))
    named = [message.split(": ")[1].split()[0] for message in caplog.messages if "counts as 0" in message]
    assert {*named} == {"kd"}
    done = [*(tmp_path / "out" / "trials").glob("*/detect/seed*/kd+cwd@det/result.json")]
    assert len(done) == TUNE["TRIALS"] * len(TUNE["SEEDS"])
    # why it is, with the run's log
    assert sum("(log: " in message for message in caplog.messages) >= len(named)


def test_a_method_without_a_finite_setting_is_named(tune_file, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_NOT_FINITE", "at 0")
    tuning = load_tuning(tune_file, tmp_path / "out")
    for _ in range(2):
        with pytest.raises(UserError, match=r"trials: at is not finite with any of its 4 settings; .*--output"):
            tune(tuning)
        begun = begun_below(tmp_path / "out")
        assert begun["trials/003/distill/seed1/students/kd"] == 1
        assert not any(name.endswith("/at") for name in begun)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("TRIALS 0", "tune.yaml: TRIALS"),
        ("SEED -1", "tune.yaml: SEED"),
        ("OBJECTIVE loss", "tune.yaml: OBJECTIVE"),
        ("WEIGHT [2.0,3.0]", "tune.yaml: WEIGHT"),
        ("LEVELS [res3]", "tune.yaml: LEVELS"),
        ("VAL_FRACTION 0.0", "tune.yaml: VAL_FRACTION"),
        ("METHODS [ce]", "tune.yaml: METHODS"),
        ("METHODS [nst-polly]", "nst-polly"),
        ("OPTIONS {kd:{temprature:[1.0]}}", "OPTIONS.kd.temprature must be a list for one of its options: temp"),
        ("OPTIONS {nst_poly:{bandwidth:[1.0]}}", "tune.yaml: OPTIONS: "),
        ("METHODS kd:2.0", "tune.yaml: METHODS kd:2"),
        ("TRIAL 3", "did you mean TRIALS"),
        ("COMPARE none.yaml", "none.yaml: no such config file"),
        # found before the first run
        ("LEVELS [[res9]]", "res9"),
        ("DET_LEVELS [[p9]]", "p9"),
    ],
)
def test_what_cannot_be_used_is_one_line(tune_file, tmp_path, words, named):
    words = words.replace(":", ": ", 2).split(" ", 1)
    with pytest.raises(UserError, match=re.escape(named)) as caught:
        tune(load_tuning(tune_file, tmp_path / "out", words))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_options_are_searched_where_they_are_named(tune_file):
    tuning = load_tuning(tune_file, overrides=["OPTIONS", "{kd: {temperature: [1.0, 2.0]}}"])
    space = tuning.spaces["kd+nst-poly"]
    assert space.choices["kd.temperature"] == ("4.0", "1.0", "2.0")
    node = space.settings({**space.default, "kd.temperature": "2.0"})
    assert node["OPTIONS"] == {"kd": {"temperature": 2.0}}
    assert not any(name.startswith("kd.") for name in tuning.spaces["at"].choices)


def test_without_optuna_one_line_names_what_to_install(tune_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SystemExit, match="2"):
        main(["tune", "--config-file", str(tune_file), "--output", str(tmp_path / "out")])
    assert "pip install optuna" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_comparison_without_detectors_is_searched_by_top1(tune_file, tmp_path):
    compare = {key: value for key, value in COMPARE.items() if key != "DETECT"}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump({**compare, "METHODS": ["kd", "at"], "THREADS": 1}))
    change(tune_file, TRIALS=2, DET_LEVELS=[])
    for number, file in enumerate(sorted((tmp_path / "images" / "cat").iterdir())):
        write(file, jpeg(8, 8 + number))
    # the comparison is judged on a part of images/cat
    with pytest.raises(UserError, match=r"compare\.yaml: DISTILL\.DATA\.ROOT .*val folder"):
        load_tuning(tune_file, tmp_path / "alone")
    for split in ("train", "val"):
        shutil.copytree(tmp_path / "images" / "cat", tmp_path / "images" / split / "cat")
    tuning = load_tuning(tune_file, tmp_path / "alone")
    found, path = tune(tuning)
    assert {word: best.trials for word, best in found.items()} == {"kd": 2, "at": 2}
    assert set(yaml.safe_load(path.read_text())["budget"]["steps"]) == {"stage one"}
    assert not (tmp_path / "alone/trials/000/detect").exists()
    # what was found is taken by a comparison
    tuned = load_comparison(tmp_path / "compare.yaml", None, ["TUNED", str(path)])
    assert tuned.tuned["at"].trials == 2
    with pytest.raises(UserError, match=r"tune\.yaml: OBJECTIVE"):
        load_tuning(tune_file, None, ["OBJECTIVE", "map"])
