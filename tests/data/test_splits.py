import pytest
from hypothesis import given
from hypothesis import strategies as st

from nst_det.data.splits import (
    JoinedVoc,
    cut_test_ids,
    equal_files,
    held_out,
    hold_out,
    ids_to_cut,
    known_pair,
    same_pictures,
    shared_images,
    write_pair,
)
from nst_det.data.voc import VocDataset
from nst_det.errors import UserError
from tests.helpers.voc import make, obj, write, write_list, xml


def many(root, names_of):
    """One image an entry; ``names_of`` is id to the classes in it."""
    annotations = {id_: xml("".join(obj(name) for name in names)) for id_, names in names_of.items()}
    return VocDataset(make(root, annotations), "train", classes=["cat", "dog", "owl"])


def test_each_group_gives_its_share_and_never_all_of_itself():
    groups = [[f"a{n}" for n in range(40)], [f"b{n}" for n in range(3)], ["c0"], []]
    kept = held_out(groups, 0.25)
    assert [sum(name[0] == letter for name in kept) for letter in "abc"] == [10, 1, 0]
    assert held_out(groups, 0.25) == kept
    assert held_out(groups, 0.25, seed=1) != kept
    assert held_out(groups, 0) == set()
    assert [sum(name[0] == letter for name in held_out(groups, 0.99)) for letter in "abc"] == [39, 2, 0]


def test_a_larger_share_keeps_what_the_smaller_kept_and_new_names_move_few():
    group = [f"{n:04d}" for n in range(400)]
    assert held_out([group], 0.1) < held_out([group], 0.2)
    before, after = held_out([group], 0.2), held_out([[*group, "new"]], 0.2)
    assert len(before ^ after) <= 2


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5])
def test_a_share_out_of_range_is_refused(fraction):
    with pytest.raises(UserError, match="val_fraction"):
        held_out([["a", "b"]], fraction)


def test_rare_classes_are_on_both_sides(tmp_path):
    # every image has a cat, some a dog, few an owl: an image counts for the rarest class in it
    names = {f"{n:03d}": ["cat"] + ["dog"] * (n % 4 == 0) + ["owl"] * (n % 20 == 0) for n in range(100)}
    data = many(tmp_path, names)
    left, kept = hold_out(data, 0.2)
    assert set(left.ids) | set(kept.ids) == set(data.ids)
    assert not set(left.ids) & set(kept.ids)
    assert list(left.ids) == sorted(left.ids)
    assert list(kept.ids) == sorted(kept.ids)
    # 5 images with an owl, 20 others with a dog, 75 with cats alone
    held = [tuple(names[id_]) for id_ in kept.ids]
    assert [held.count(group) for group in (("cat", "dog", "owl"), ("cat", "dog"), ("cat",))] == [1, 4, 15]
    assert kept.classes == data.classes
    assert list(kept.annotation(kept.ids[0]).names) == names[kept.ids[0]]
    with pytest.raises(UserError, match="train has too few images"):
        hold_out(data.subset(["001"]), 0.5)


def test_images_without_objects_are_cut_too_and_other_splits_are_not_read(tmp_path):
    data = many(tmp_path, {f"{n}": [] if n < 10 else ["cat"] for n in range(20)})
    write_list(tmp_path, "test", ["broken"])
    write(tmp_path / "Annotations" / "broken.xml", "<")
    left, kept = hold_out(data, 0.2)
    assert [int(id_) < 10 for id_ in kept.ids] == [True, True, False, False]
    assert len(left) == 16


# names of images, of which the first ones show one picture
VERSIONS = [
    (["s_jpg.rf.01ab", "s_jpg.rf.9", "t_jpg.rf.01ab"], 2),
    (["s.rf.aB-c_3", "s.rf.x", "s_2.rf.x"], 2),
    (["s", "s_aug_0", "s_aug12", "s-augmented", "s_aug_0_flip", "t_aug_0"], 5),
    (["s", "s_hflip", "s_rot90", "s-rotated-15", "s_mirrored", "s_1"], 5),
    (["s", "s - Copy", "s - Copy (2)", "copy_of_s", "Copy of s", "s copy 3", "s (2)"], 6),
    # a day in August, and Windows' numbers, are no versions
    (["shelf_aug_1", "shelf_aug_2"], 1),
    (["s", "s (1)", "s (2)"], 1),
]


@pytest.mark.parametrize(("names", "alike"), VERSIONS, ids=range(len(VERSIONS)))
def test_versions_of_a_picture_are_told_by_name(tmp_path, names, alike):
    files = {name: write(tmp_path / name, name) for name in names}
    picture_of = same_pictures(files)
    same = [picture_of[name] == picture_of[names[0]] for name in names]
    assert same == [index < alike for index in range(len(names))]
    assert same_pictures(dict(reversed(files.items()))) == picture_of


def test_files_of_equal_bytes_are_one_picture(tmp_path):
    long = b"x" * 9000
    contents = {"a": b"1", "b": b"2", "c": b"1", "d": long + b"1", "e": long + b"2", "f": b"1" + long, "g": long + b"1"}
    files = {name: write(tmp_path / name, content) for name, content in contents.items()}
    assert sorted(map(sorted, equal_files(files))) == [["a", "c"], ["d", "g"]]
    # by their bytes and by their names
    files |= {name: write(tmp_path / name, content) for name, content in (("b_flip", b"1"), ("z.rf.1", long))}
    files["z.rf.2"] = write(tmp_path / "z.rf.2", b"2")
    picture_of = same_pictures(files)
    assert {picture_of[name] for name in ("a", "b", "c", "b_flip", "z.rf.1", "z.rf.2")} == {"a"}


def test_no_cut_parts_a_picture(tmp_path):
    data = many(tmp_path, {f"s{n}.rf.{version}": ["cat"] for n in range(8) for version in "abc"})
    for id_ in ("s0.rf.a", "s1.rf.a"):
        write(tmp_path / "JPEGImages" / f"{id_}.jpg", b"equal")

    def shown(ids):
        return {"s0" if id_.startswith("s1.") else id_.split(".")[0] for id_ in ids}

    left, kept = hold_out(data, 0.3)
    assert not shown(left.ids) & shown(kept.ids)
    assert len(left) + len(kept) == 24
    assert len(shown(kept.ids)) == 2
    pictures = same_pictures({id_: data.image_path(id_) for id_ in data.ids})
    held = cut_test_ids({id_: ["cat"] for id_ in data.ids}, 0.2, pictures)
    assert 5 <= len(held) <= 8
    assert not shown(held) & shown(set(data.ids) - set(held))


def test_images_of_two_data_sets_that_are_the_same(tmp_path):
    one = many(tmp_path / "one", {"1": ["cat"], "2": ["dog"], "3": ["owl"]})
    two = many(tmp_path / "two", {"4": ["cat"], "5": ["dog"]})
    for id_ in "45":
        write(tmp_path / "two" / "JPEGImages" / f"{id_}.jpg", f"another {id_}")
    assert shared_images([one], [two]) == []
    write(tmp_path / "two" / "JPEGImages" / "5.jpg", one.image_path("2").read_bytes())
    assert shared_images([one], [two]) == [(one.image_path("2"), two.image_path("5"))]
    assert shared_images([two, one.subset("12")], [one.subset("13")]) == [(one.image_path("1"),) * 2]


def test_joined_folders_are_one_set_of_distinct_ids(tmp_path):
    one = many(tmp_path / "one", {"1": ["cat"], "2": ["dog"]})
    both = JoinedVoc((one, many(tmp_path / "two", {"3": ["owl"]})))
    assert [a.id for a in both.annotations()] == ["1", "2", "3"]
    assert len(both) == 3
    with pytest.raises(UserError, match="image '1' is in .*one and .*three"):
        JoinedVoc((one, many(tmp_path / "three", {"1": ["cat"]})))


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


def test_the_lists_that_belong_together(tmp_path):
    write_list(tmp_path, "train", "ab")
    write_list(tmp_path, "cat_train", ["a  1", "b -1"])
    assert known_pair(tmp_path) is None
    assert ids_to_cut(tmp_path) == ("a", "b")
    for name, ids, pair in (("val", "c", ("train", "val")), ("test", "d", ("train", "test"))):
        write_list(tmp_path, name, ids)
        assert known_pair(tmp_path) == pair
    write_list(tmp_path, "trainval", "abc")
    assert known_pair(tmp_path) == ("trainval", "test")
    assert known_pair(tmp_path, "val", "test") == ("val", "test")
    for test, key in (("", "--train .*--test"), ("val", "--train .*--test"), ("nothing", r"nothing\.txt")):
        with pytest.raises(UserError, match=key):
            known_pair(tmp_path, "val", test)


def test_unknown_lists_and_folders_without_any(tmp_path):
    for name in ("Annotations", "JPEGImages"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="no image"):
        ids_to_cut(tmp_path)
    for annotated, image in zip("abc", "bcd"):
        write(tmp_path / "Annotations" / f"{annotated}.xml")
        write(tmp_path / "JPEGImages" / f"{image}.jpg")
    assert ids_to_cut(tmp_path) == ("b", "c")
    assert write_pair(tmp_path, "bc", "c") == ("nst_det_train", "nst_det_test")
    assert known_pair(tmp_path) == ("nst_det_train", "nst_det_test")
    write_list(tmp_path, "monday", "b")
    write_list(tmp_path, "tuesday", "c")
    (tmp_path / "ImageSets" / "Main" / "nst_det_test.txt").unlink()
    with pytest.raises(UserError, match="lists monday, tuesday"):
        ids_to_cut(tmp_path)
