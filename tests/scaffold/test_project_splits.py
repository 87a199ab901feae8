import pytest
from hypothesis import given
from hypothesis import strategies as st

from nst_det.data.splits import cut_test_ids, ids_to_cut, known_pair, write_pair
from nst_det.errors import UserError


@given(
    st.dictionaries(st.text("abc012", min_size=1, max_size=4), st.sets(st.sampled_from("XYZ")), min_size=2),
    st.floats(0.05, 0.9),
)
def test_every_class_stays_and_no_more_is_held_out_than_asked(classes_of, fraction):
    held = cut_test_ids(classes_of, fraction)
    assert len(held) <= max(1, round(fraction * len(classes_of)))
    assert len(held) < len(classes_of)
    assert held == [id_ for id_ in classes_of if id_ in set(held)]
    rest = {name for id_, names in classes_of.items() if id_ not in held for name in names}
    assert rest == {name for names in classes_of.values() for name in names}
    assert set(cut_test_ids(dict(reversed(classes_of.items())), fraction)) == set(held)


def test_a_fifth_is_held_out():
    assert len(cut_test_ids({str(n): ["cat"] for n in range(30)}, 0.2)) == 6


def lists(root, **names):
    folder = root / "ImageSets" / "Main"
    folder.mkdir(parents=True, exist_ok=True)
    for name, ids in names.items():
        (folder / f"{name}.txt").write_text("".join(f"{id_}\n" for id_ in ids))
    return root


def test_the_lists_that_belong_together(tmp_path):
    lists(tmp_path, train="ab", cat_train=["a  1", "b -1"])
    assert known_pair(tmp_path) is None
    assert ids_to_cut(tmp_path) == ("a", "b")
    lists(tmp_path, val="c")
    assert known_pair(tmp_path) == ("train", "val")
    lists(tmp_path, test="d")
    assert known_pair(tmp_path) == ("train", "test")
    lists(tmp_path, trainval="abc")
    assert known_pair(tmp_path) == ("trainval", "test")
    assert known_pair(tmp_path, "val", "test") == ("val", "test")
    with pytest.raises(UserError, match="name both lists, or neither"):
        known_pair(tmp_path, "val")
    with pytest.raises(UserError, match="both are val"):
        known_pair(tmp_path, "val", "val")
    with pytest.raises(UserError, match="no such list"):
        known_pair(tmp_path, "val", "nothing")


def test_lists_that_say_nothing_and_folders_without_any(tmp_path):
    for name in ("Annotations", "JPEGImages"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="no image with an annotation of the same name"):
        ids_to_cut(tmp_path)
    for id_ in "abc":
        (tmp_path / "Annotations" / f"{id_}.xml").touch()
    for id_ in "bcd":
        (tmp_path / "JPEGImages" / f"{id_}.jpg").touch()
    assert ids_to_cut(tmp_path) == ("b", "c")
    assert write_pair(tmp_path, "bc", "c") == ("nst_det_train", "nst_det_test")
    assert known_pair(tmp_path) == ("nst_det_train", "nst_det_test")
    lists(tmp_path, monday="b", tuesday="c")
    (tmp_path / "ImageSets" / "Main" / "nst_det_test.txt").unlink()
    with pytest.raises(UserError, match="lists monday, tuesday, and none of them says what it is for"):
        ids_to_cut(tmp_path)
