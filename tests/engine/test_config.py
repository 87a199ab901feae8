import pytest
from fvcore.common.config import CfgNode

from nst_det.engine.config import expand_path, flat, load_config, merge_overrides, parse_value, plain, transfer_node
from nst_det.errors import UserError

# ten times itself, six times over
BOMB = "A0: &a0 [x]\n" + "".join(f"A{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 7))


def defaults() -> CfgNode:
    config = CfgNode({"SOLVER": {"BASE_LR": 0.1, "STEPS": (1, 2), "MAX_ITER": 10, "NESTEROV": False}, "NAME": "a"})
    config.TRANSFER = transfer_node()
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


def test_defaults_are_not_changed_and_result_is_frozen():
    tree = defaults()
    config = load_config(tree, None, ["SOLVER.BASE_LR", "1e-3"])
    assert (tree.SOLVER.BASE_LR, config.SOLVER.BASE_LR) == (0.1, 1e-3)
    with pytest.raises(AttributeError):
        config.NAME = "b"


def test_free_nodes_take_any_key_also_nested():
    config = load_config(defaults(), None, ["TRANSFER.OPTIONS", "{'kd': {'temperature': 2.0}}"])
    assert plain(config.TRANSFER.OPTIONS) == {"kd": {"temperature": 2.0}}
    config = load_config(defaults(), None, ["TRANSFER.TERM_LEVELS.fitnet", "['res4']"])
    assert plain(config.TRANSFER.TERM_LEVELS) == {"fitnet": ["res4"]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("SOLVER: {BASE_LRR: 1.0}", "unknown key SOLVER.BASE_LRR; did you mean SOLVER.BASE_LR"),
        ("SOLVER: 3", "SOLVER is a group of keys"),
        ("NAME: {A: 1}", "unknown key NAME"),
        ("SOLVER: {MAX_ITER: 1.5}", "SOLVER.MAX_ITER must be of type int"),
        ("SOLVER: {MAX_ITER: many}", "SOLVER.MAX_ITER must be of type int"),
        ("SOLVER: {NESTEROV: 1}", "SOLVER.NESTEROV must be of type bool"),
        ("SOLVER: {BASE_LR: true}", "SOLVER.BASE_LR must be of type float"),
        ("- 1", "must be a mapping"),
        ("1: 2", "must be a mapping"),
        ("a: [", "not valid YAML"),
        ('NAME: "\\UDDDDDDDD"', "not valid YAML"),
        ("NAME: !!int ''", "not valid YAML"),
        ("NAME: !!bool x", "not valid YAML"),
        ("NAME: !!timestamp x", "not valid YAML"),
        ("SOLVER: &a {MAX_ITER: *a}", "not valid YAML: an alias leads back to itself"),
        ("A: &a [*a]", "not valid YAML: an alias leads back to itself"),
        (BOMB, "not valid YAML: more than 100000 values"),
        ("_BASE_: x.yaml", "leads back to itself"),
        ("_BASE_: [x]", "_BASE_ must be the path"),
        ("_BASE_: missing.yaml", "missing.yaml: no such config file"),
        ("NAME: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_a_bad_file_is_one_line_that_names_file_and_key(tmp_path, text, said):
    file = write(tmp_path / "x.yaml", text)
    with pytest.raises(UserError) as caught:
        load_config(defaults(), file)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ".yaml" in str(caught.value)


def test_bad_overrides():
    with pytest.raises(UserError, match="'NAME' has no value"):
        load_config(defaults(), None, ["NAME"])
    with pytest.raises(UserError, match="command line: unknown key NAMES; did you mean NAME"):
        load_config(defaults(), None, ["NAMES", "b"])


def test_a_number_in_scientific_notation_is_a_number(tmp_path):
    file = write(tmp_path / "x.yaml", "SOLVER: {BASE_LR: 1e-4}")
    assert load_config(defaults(), file).SOLVER.BASE_LR == 1e-4


def test_expand_path(monkeypatch):
    monkeypatch.setenv("NST_DET_T", "/there")
    assert expand_path("$NST_DET_T/x", "DATA.ROOT") == "/there/x"
    assert expand_path("${NST_DET_T}/x", "DATA.ROOT") == "/there/x"
    monkeypatch.delenv("NST_DET_T")
    with pytest.raises(UserError, match="DATA.ROOT: the environment variable NST_DET_T is not set"):
        expand_path("$NST_DET_T/x", "DATA.ROOT")


def test_values_of_the_command_line():
    assert parse_value("3") == 3
    assert parse_value("(1, 2.5)") == (1, 2.5)
    assert parse_value("['a', \"b\"]") == ["a", "b"]
    assert parse_value("[ce, kd+nst-poly:50]") == ["ce", "kd+nst-poly:50"]
    assert parse_value("{at: 10.0}") == {"at": 10.0}
    for text in (
        "[a",
        "{a: [}",
        "res[3",
        "a: b",
        "None of these",
        "[" * 2000,
        "{{}}",
        "{[]}",
        '["\\UDDDDDDDD"]',
        "[!!bool x]",
    ):
        assert parse_value(text) == text


def test_an_option_among_the_pairs_is_named():
    with pytest.raises(UserError, match="--dry-run stands among the KEY VALUE pairs; put it before them"):
        merge_overrides(CfgNode({"SEED": 0}), ["SEED", "1", "--dry-run"])
