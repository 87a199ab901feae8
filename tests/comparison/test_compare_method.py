import pytest

from nst_det.comparison.config import parse_row


@pytest.mark.parametrize(
    ("word", "canonical", "backbone", "detector"),
    [
        ("ce", "ce", "ce", "ce"),
        ("nst-poly+kd", "kd+nst-poly", "kd+nst-poly", "ce"),
        ("cwd@det", "cwd@det", "ce", "cwd"),
        ("cwd@det:5", "cwd@det:5", "ce", "cwd:5"),
        (" CWD@det : 5", "cwd@det:5", "ce", "cwd:5"),
        ("nst-poly@det+kd:0.9+cwd@det:2", "kd:0.9+nst-poly@det+cwd@det:2", "kd:0.9", "nst-poly+cwd:2"),
        ("nst-poly+nst-poly@det", "nst-poly+nst-poly@det", "nst-poly", "nst-poly"),
    ],
)
def test_words_are_parted_by_stage(word, canonical, backbone, detector):
    row = parse_row(word)
    assert (row.word, row.backbone.word, row.detector.word) == (canonical, backbone, detector)
    assert parse_row(row.word) == row


def test_labels_are_in_every_row():
    assert parse_row("ce+cwd@det") == parse_row("cwd@det")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("ce@det", "leave out @det"),
        ("cwd@detector", "write a term as"),
        ("cwd:5@det", "write a term as"),
        ("cwd@det@det", "write a term as"),
        ("@det", "write a term as"),
        ("kd+", "write a term as"),
        ("cwd@det+cwd@det", "twice"),
        ("nst-polly@det", "nst-poly"),
    ],
)
def test_other_words_are_refused(word, message):
    with pytest.raises(ValueError, match=message):
        parse_row(word)
