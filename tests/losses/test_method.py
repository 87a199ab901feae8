import pytest

from nst_det.losses import Method, parse_method, terms


@pytest.mark.parametrize(
    ("word", "canonical"),
    [
        ("ce", "ce"),
        ("kd", "kd"),
        (" KD ", "kd"),
        ("nst-poly+kd", "kd+nst-poly"),
        ("kd:0.9+nst-poly:50", "kd:0.9+nst-poly:50"),
        ("kd:0.90+at:1e3", "kd:0.9+at:1000"),
        ("at:1e20", "at:1e20"),
        ("at:1e-7", "at:1e-07"),
        ("kd:0", "kd:0"),
    ],
)
def test_a_word_has_one_canonical_form_that_parses_to_itself(word, canonical):
    method = parse_method(word)
    assert method.word == str(method) == canonical
    assert parse_method(canonical) == method
    assert parse_method(method) is method


def test_a_weight_in_the_word_is_told_from_a_default():
    assert list(parse_method("nst-poly+kd:0.9")) == [("kd", 0.9), ("nst-poly", None)]
    assert parse_method("ce") == Method(())
    assert parse_method("kd").names == ("kd",)


def test_default_weights():
    weights = {name: term.weight for name, term in terms().items()}
    expected = {"kd": 1, "fitnet": 100, "at": 1000, "nst-linear": 50, "nst-poly": 50, "nst-gaussian": 100}
    assert expected.items() <= weights.items()
    assert list(expected) == list(weights)[: len(expected)]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("", "a term is missing"),
        ("kd+", "a term is missing"),
        ("kd+kd:2", "'kd' is named twice"),
        ("nst", "unknown term 'nst'; known: kd, fitnet"),
        ("scratch", "unknown term 'scratch'"),
        ("ce+kd", "leave it out"),
        ("kd:-1", "finite number >= 0"),
        ("kd:nan", "finite number >= 0"),
        ("kd:inf", "finite number >= 0"),
        ("kd:", "must be a number"),
        ("kd:1:2", "must be a number"),
    ],
)
def test_a_bad_word_gives_one_clear_line(word, said):
    with pytest.raises(ValueError) as caught:
        parse_method(word)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def printed(cli, capsys, monkeypatch, *words):
    monkeypatch.setenv("COLUMNS", "500")
    assert cli("methods", *words) == 0
    text = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")] for line in text.splitlines() if "│" in line]
    return {cells[1]: cells for cells in rows}, " ".join(text.split())


def test_every_term_is_listed_with_its_weight_and_source(cli, capsys, monkeypatch):
    rows, _ = printed(cli, capsys, monkeypatch)
    assert {name: (float(rows[name][3]), rows[name][4]) for name in terms()} == {
        name: (term.weight, term.source) for name, term in terms().items()
    }


def test_a_methods_own_terms_are_listed(cli, capsys, monkeypatch):
    rows, text = printed(cli, capsys, monkeypatch, "kd:0.9+nst-poly")
    assert rows.keys() == {"kd", "nst-poly"}
    assert rows["kd"][3] == "0.9"
    assert "kd has temperature=1.0 there" in text
    assert cli("methods", "kd+foo") == 2
    assert "unknown term 'foo'" in capsys.readouterr().err
