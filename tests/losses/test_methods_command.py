import pytest

from nst_det.cli import main
from nst_det.losses import terms


def printed(capsys, *words):
    with pytest.raises(SystemExit) as left:
        main(["methods", *words])
    assert left.value.code == 0
    return capsys.readouterr().out


def test_every_term_is_listed_with_its_weight(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    rows = [[cell.strip() for cell in line.split("│")] for line in printed(capsys).splitlines() if "│" in line]
    for name, term in terms().items():
        (cells,) = [cells for cells in rows if cells[1] == name]
        assert float(cells[3]) == term.weight
        assert cells[4] == term.source


def test_what_logits_are_in_stage_two(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    said = printed(capsys, "kd")
    words = "in stage two those of both box heads on the student's proposals (kd has temperature=1.0 there)"
    assert words in " ".join(said.split())


def test_a_methods_own_terms(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    text = printed(capsys, "kd:0.9+nst-poly")
    assert "0.9" in text
    assert "nst-poly" in text
    assert "fitnet" not in text


def test_an_unknown_method_is_one_line_and_code_2(capsys):
    with pytest.raises(SystemExit) as left:
        main(["methods", "kd+foo"])
    assert left.value.code == 2
    assert "unknown term 'foo'" in capsys.readouterr().err
