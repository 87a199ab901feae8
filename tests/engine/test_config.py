import logging
import re

import pytest
import yaml
from fvcore.common.config import CfgNode

from nst_det.engine.config import (
    expand_path,
    flat,
    load_config,
    parse_value,
    places,
    plain,
    read_yaml,
)
from nst_det.engine.keys import TRANSFER_KEYS, Key, config_tree
from nst_det.errors import UserError

# ten times itself, six times over
BOMB = "A0: &a0 [x]\n" + "".join(f"A{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 7))


def defaults() -> CfgNode:
    config = CfgNode({"SOLVER": {"BASE_LR": 0.1, "STEPS": (1, 2), "MAX_ITER": 10, "NESTEROV": False}, "NAME": "a"})
    config.TRANSFER = config_tree(TRANSFER_KEYS)
    return config


def write(path, text):
    path.write_text(text)
    return path


def test_base_file_is_merged_under_the_file_and_overrides_over_it(tmp_path):
    write(tmp_path / "base.yaml", "SOLVER: {BASE_LR: 0.5, MAX_ITER: 20}\nTRANSFER: {WEIGHTS: {at: 1.0}}\n")
    file = write(tmp_path / "x.yaml", "_BASE_: base.yaml\nSOLVER: {MAX_ITER: 30}\nTRANSFER: {WEIGHTS: {kd: 2}}\n")
    config = load_config(defaults(), file, ["SOLVER.NESTEROV", "True", "TRANSFER.WEIGHTS.at", "7"])
    assert flat(config) == {
        "SOLVER.BASE_LR": 0.5,
        "SOLVER.STEPS": (1, 2),
        "SOLVER.MAX_ITER": 30,
        "SOLVER.NESTEROV": True,
        "NAME": "a",
        "TRANSFER.LEVELS": [],
        "TRANSFER.WEIGHTS.at": 7.0,
        "TRANSFER.WEIGHTS.kd": 2,
        "TRANSFER.WARMUP_ITERS": 0,
    }


def test_another_network_has_none_of_the_arguments_of_the_one_before(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    name, arguments = Key("a", "a network"), Key({}, "its arguments")
    known = {"STUDENT.ARCH": name, "STUDENT.ARCH_KWARGS": arguments}
    known = config_tree(known | {"MODEL.TIMM.ARCH": name, "MODEL.TIMM.KWARGS": arguments})
    text = "STUDENT: {ARCH: r10, ARCH_KWARGS: {width: 8}}\nMODEL: {TIMM: {ARCH: r10, KWARGS: {width: 8}}}\n"
    file = write(tmp_path / "x.yaml", text)
    for words, student, bottom_up in (
        ([], {"width": 8}, {"width": 8}),
        (["STUDENT.ARCH", "r10"], {"width": 8}, {"width": 8}),
        (["STUDENT.ARCH", "r18"], {}, {"width": 8}),
        (["STUDENT.ARCH_KWARGS.depth", "3", "STUDENT.ARCH", "r18"], {"depth": 3}, {"width": 8}),
        (["MODEL.TIMM.ARCH", "r18", "STUDENT.ARCH_KWARGS", "{depth: 3}"], {"width": 8, "depth": 3}, {}),
    ):
        caplog.clear()
        config = load_config(known, file, words)
        assert (plain(config.STUDENT.ARCH_KWARGS), plain(config.MODEL.TIMM.KWARGS)) == (student, bottom_up)
        assert ("r18" in words) == ("ARGS of r10 are left out" in caplog.text)


def test_defaults_are_not_changed_the_result_is_frozen_and_free_nodes_take_any_key():
    tree = defaults()
    words = ["SOLVER.BASE_LR", "1e-3", "TRANSFER.OPTIONS", "{'kd': {'temperature': 2.0}}"]
    config = load_config(tree, None, [*words, "TRANSFER.TERM_LEVELS.fitnet", "['res4']"])
    assert (tree.SOLVER.BASE_LR, config.SOLVER.BASE_LR) == (0.1, 1e-3)
    assert plain(config.TRANSFER.OPTIONS) == {"kd": {"temperature": 2.0}}
    assert plain(config.TRANSFER.TERM_LEVELS) == {"fitnet": ["res4"]}
    with pytest.raises(AttributeError):
        config.NAME = "b"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("SOLVER: {BASE_LRR: 1.0}", "SOLVER.BASE_LRR; did you mean SOLVER.BASE_LR"),
        ("SOLVER: 3", "SOLVER"),
        ("SOLVER: {MAX_ITER: {A: 1}}", "SOLVER.MAX_ITER"),
        ("NAME: {A: 1}", "NAME"),
        ("NAMES: {A: 1}", "NAMES"),
        ("SOLVER: {MAX_ITER: 1.5}", "SOLVER.MAX_ITER"),
        ("SOLVER: {MAX_ITER: many}", "SOLVER.MAX_ITER"),
        ("SOLVER: {NESTEROV: 1}", "SOLVER.NESTEROV"),
        ("SOLVER: {BASE_LR: true}", "SOLVER.BASE_LR"),
        ("- 1", "mapping"),
        ("1: 2", "mapping"),
        ("a: [", "YAML"),
        ('NAME: "\\UDDDDDDDD"', "YAML"),
        ("NAME: !!int ''", "YAML"),
        ("NAME: !!bool x", "YAML"),
        ("NAME: !!timestamp x", "YAML"),
        ("SOLVER: &a {MAX_ITER: *a}", "YAML"),
        ("A: &a [*a]", "YAML"),
        (BOMB, "YAML"),
        ("_BASE_: x.yaml", "_BASE_"),
        ("_BASE_: [x]", "_BASE_"),
        ("_BASE_: missing.yaml", "missing.yaml"),
        ("NAME: !!python/object/apply:os.system ['true']", "YAML"),
    ],
)
def test_a_bad_file_is_one_line_that_names_file_and_key(tmp_path, text, named):
    with pytest.raises(UserError) as caught:
        load_config(defaults(), write(tmp_path / "x.yaml", text))
    assert re.match(rf"{tmp_path}/\w+\.yaml: .*{named}|{tmp_path}/missing\.yaml: ", str(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["NAME"], "'NAME'"),
        (["NAMES", "b"], "NAMES; did you mean NAME"),
        (["SOLVER.BASE_LR.A", "1"], "SOLVER.BASE_LR"),
        (["NAME", "1", "--dry-run"], "--dry-run"),
    ],
)
def test_bad_pairs_are_named(words, named):
    with pytest.raises(UserError, match=rf"^command line: .*{named}"):
        load_config(defaults(), None, words)


def test_values_of_another_type_that_lose_nothing(tmp_path):
    text = "SOLVER: {BASE_LR: 1e-4, STEPS: '(3, 4)'}\nNAME: 5\nTRANSFER: {OPTIONS: {mgd: {}}}"
    config = load_config(defaults(), write(tmp_path / "x.yaml", text), ["TRANSFER.OPTIONS.mgd.masked", "0"])
    assert (config.SOLVER.BASE_LR, config.SOLVER.STEPS, config.NAME) == (1e-4, (3, 4), "5")
    assert plain(config.TRANSFER.OPTIONS) == {"mgd": {"masked": 0}}


@pytest.mark.parametrize("text", ["[3, 4]", "'(3, 4)'", "3,4", "3, 4", "(3, 4)"])
def test_a_list_in_any_form(tmp_path, text):
    for file, words in (
        (write(tmp_path / "x.yaml", f"SOLVER:\n  STEPS: {text}\nTRANSFER:\n  LEVELS: res3, res4:res5\n"), []),
        (None, ["SOLVER.STEPS", text.strip("'"), "TRANSFER.LEVELS", "res3, res4:res5"]),
    ):
        config = load_config(defaults(), file, words)
        assert (config.SOLVER.STEPS, config.TRANSFER.LEVELS) == ((3, 4), ["res3", "res4:res5"])
    assert load_config(defaults(), None, ["SOLVER.STEPS", "5", "TRANSFER.LEVELS", "res3"]).SOLVER.STEPS == (5,)
    assert load_config(defaults(), None, ["SOLVER.STEPS", ""]).SOLVER.STEPS == ()
    for value in ("True", "None", "{a: 1}"):
        with pytest.raises(UserError, match=r"SOLVER\.STEPS"):
            load_config(defaults(), None, ["SOLVER.STEPS", value])


def test_paths_with_a_dot_are_relative_to_their_file(tmp_path):
    """Each to its own, a base's too; of the places of a ROOT the first that is there."""
    (tmp_path / "base").mkdir()
    write(tmp_path / "base" / "base.yaml", "A: {B: ./here, C: ['x', ../up]}\nD: there/x\n")
    text = "_BASE_: base/base.yaml\nA: {E: ../beside}\nROOT: [./gone, ./base, ../other]\nF: {ROOT: [./gone, /none]}\n"
    assert read_yaml(write(tmp_path / "x.yaml", text)) == {
        "A": {"B": f"{tmp_path}/base/here", "C": ["x", f"{tmp_path}/up"], "E": f"{tmp_path.parent}/beside"},
        "D": "there/x",
        "ROOT": f"{tmp_path}/base",
        "F": {"ROOT": f"{tmp_path}/gone"},
    }


def test_a_data_set_is_found_where_either_or_both_folders_are_moved(tmp_path, monkeypatch):
    for name in ("home/project/crops", "home/images"):
        (tmp_path / name).mkdir(parents=True)
    project = tmp_path / "home" / "project"
    paths = {"a": "images", "b": "project/crops"}
    roots = {name: places(tmp_path / "home" / path, project) for name, path in paths.items()}
    assert roots == {"a": ["../images", f"{tmp_path}/home/images"], "b": "./crops"}
    monkeypatch.chdir(tmp_path / "home")
    assert places("images", project) == roots["a"]
    assert places("$DATA/images", project) == "$DATA/images"
    # a project inside its images
    roots["c"] = places(".", project)
    write(project / "x.yaml", yaml.safe_dump({name.upper(): {"ROOT": root} for name, root in roots.items()}))

    def found(folder):
        tree = read_yaml(folder / "x.yaml")
        return [tree[name]["ROOT"] for name in "ABC"]

    (tmp_path / "deep" / "er").mkdir(parents=True)
    moved = project.rename(tmp_path / "deep" / "er" / "project")
    assert found(moved)[:2] == [f"{tmp_path}/home/images", f"{moved}/crops"]
    moved.rename(tmp_path / "home" / "again")
    home = (tmp_path / "home").rename(tmp_path / "elsewhere")
    assert found(home / "again") == [f"{home}/images", f"{home}/again/crops", str(home)]


def test_expand_path(monkeypatch):
    monkeypatch.setenv("NST_DET_T", "/there")
    assert [expand_path(text, "A") for text in ("$NST_DET_T/x", "${NST_DET_T}/x")] == ["/there/x"] * 2
    monkeypatch.delenv("NST_DET_T")
    with pytest.raises(UserError, match=r"^DATA\.ROOT: .*NST_DET_T"):
        expand_path("$NST_DET_T/x", "DATA.ROOT")


def test_values_of_the_command_line():
    assert parse_value("3") == 3
    assert parse_value("(1, 2.5)") == (1, 2.5)
    assert parse_value("['a', \"b\"]") == ["a", "b"]
    assert parse_value("[ce, kd+nst-poly:50]") == ["ce", "kd+nst-poly:50"]
    assert parse_value("{at: 10.0}") == {"at": 10.0}
    broken = ("[a", "{a: [}", "res[3", "a: b", "[" * 2000, "{{}}", "{[]}", '["\\UDDDDDDDD"]', "[!!bool x]")
    for text in (*broken, "None of these"):
        assert parse_value(text) == text
