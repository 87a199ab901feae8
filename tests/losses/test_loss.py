import math

import pytest
import torch

from nst_det.losses import LayerPair, ModelOutputs, at_loss, build_transfer, kd_loss, nst_loss, pair_shapes

STUDENT = {"res3": 6, "res4": 8}
TEACHER = {"res3": 6, "res4": 12, "res5": 16}
EVERY_MAP_TERM = "fitnet+at+nst-linear+nst-poly+nst-gaussian+vid+cwd+mgd+sp"


def build(method, **changes):
    arguments = {
        "levels": ["res3", ("res4", "res5")],
        "student_channels": STUDENT,
        "teacher_channels": TEACHER,
        "num_classes": 10,
        "student_embedding": 8,
        "teacher_embedding": 16,
    }
    return build_transfer(method, **{**arguments, **changes})


def outputs(seed=0, requires_grad=False, batch=4):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).requires_grad_(requires_grad)

    student = ModelOutputs(
        draw(batch, 10), {"res3": draw(batch, 6, 8, 8), "res4": draw(batch, 8, 4, 4)}, draw(batch, 8)
    )
    student.labels, student.boxes = torch.arange(batch), [torch.tensor([[0.1, 0.2, 0.5, 0.9]])] * batch
    maps = {"res3": draw(batch, 6, 8, 8), "res4": draw(batch, 12, 4, 4), "res5": draw(batch, 16, 2, 2)}
    return student, ModelOutputs(draw(batch, 10), maps, draw(batch, 16))


def test_terms_come_weighted_and_summed_over_levels():
    student, teacher = outputs()
    values = build("kd:0.9+at+nst-poly")(student, teacher)
    assert list(values) == ["kd", "at", "nst-poly"]
    torch.testing.assert_close(values["kd"], 0.9 * kd_loss(student.logits, teacher.logits))
    for name, weight, loss in (("at", 1000, at_loss), ("nst-poly", 50, nst_loss)):
        parts = [loss(student.maps[s], teacher.maps[t]) for s, t in (("res3", "res3"), ("res4", "res5"))]
        torch.testing.assert_close(values[name], weight * (parts[0] + parts[1]))


def test_labels_only_has_no_terms_and_needs_nothing():
    loss = build_transfer("ce")
    assert loss(ModelOutputs(), ModelOutputs()) == {}
    assert not list(loss.parameters())
    assert loss.reads("student") == frozenset()


def test_a_weight_in_the_method_goes_before_the_configuration_and_that_before_the_default():
    loss = build("kd:0.5+at+nst-poly", weights={"at": 7, "kd": 3.0, "vid": 2})
    assert loss.weights == {"kd": 0.5, "at": 7.0, "nst-poly": 50.0}
    before = loss(*outputs())["at"]
    loss.weights["at"] /= 4
    torch.testing.assert_close(loss(*outputs())["at"], before / 4)


def test_levels_of_a_term():
    loss = build("at+nst-poly", term_levels={"at": ["res4"], "nst-poly": ["res3:res4"], "vid": ["res3"]})
    # a student's level keeps its partner among the levels
    assert [pair.label for pair in loss.pairs["at"]] == ["res4:res5"]
    assert loss.pairs["nst-poly"] == (LayerPair("res3", "res4", 6, 12),)
    assert set(loss.student_levels) == {"res3", "res4"}
    assert set(loss.teacher_levels) == {"res4", "res5"}
    assert build("kd").student_levels == ()


def test_what_is_read_of_whom():
    loss = build("kd+at+vid-logits+lp")
    assert loss.reads("student") == {"logits", "maps", "embedding"}
    assert build("vid-logits").reads("student") == {"embedding"}
    assert build("vid-logits").reads("teacher") == {"logits"}


def test_options_reach_their_term():
    student, teacher = outputs()
    loss = build("kd", options={"kd": {"temperature": 2.0}, "at": {"power": 3}})
    torch.testing.assert_close(loss(student, teacher)["kd"], kd_loss(student.logits, teacher.logits, 2.0))


def test_numbers_that_yaml_reads_as_text_are_numbers():
    loss = build("kd", options={"kd": {"temperature": "2e0"}}, auto_weight={"kd": "1e-1"})
    assert loss.options["kd"] == {"temperature": 2.0}
    assert loss.balance.shares == {"kd": 0.1}


@pytest.mark.parametrize(
    ("method", "changes", "named"),
    [
        ("at", {"levels": []}, "no level.*res3, res4"),
        ("at", {"levels": ["res5"]}, "student has no level 'res5'.*res3, res4"),
        ("at", {"levels": [("res4", "res6")]}, "teacher has no level 'res6'.*res3, res4, res5"),
        ("at", {"levels": ["res3", "res3:res3"]}, "twice"),
        ("at", {"term_levels": {"at": ["res9"]}}, "'res9'"),
        ("at", {"student_vectors": ["res3", "res4"]}, "vectors.*fitnet"),
        ("at", {"weights": {"att": 1}}, "'att'"),
        ("at", {"weights": {"at": -1}}, "'at'.*-1"),
        ("at", {"weights": {"at": "many"}}, "'at'.*many"),
        ("at", {"options": {"at": {"p": 2}}}, "'p'.*power"),
        *(("at", {"options": {"at": {"power": power}}}, "at: power.*number") for power in ("two", True, math.inf)),
        ("at", {"options": {"at": 2}}, "OPTIONS: at.*2"),
        ("lp", {"options": {"lp": {"k": 2.5}}}, "lp: k.*2.5"),
        ("nst-poly", {"options": {"nst-poly": {"center": "false"}}}, "nst-poly: center.*True or False.*'false'"),
        *(("at", {"levels": [level]}, "level.*res3") for level in ({"res3": "res4"}, ["res3"], 3)),
        *(("at", {"term_levels": {"at": levels}}, "levels.*res4") for levels in ("res4", {"res4": "res5"})),
        ("at", {"auto_weight": {"nst-pol": 1}}, "'nst-pol'"),
        *(("at", {"auto_weight": {"at": share}}, "AUTO_WEIGHT.*'at'") for share in (0, -1.0, "half", True, math.nan)),
        ("pkd", {}, "res4:res5.*8.*16"),
        ("vid-logits", {"student_embedding": None}, "embedding"),
        ("vid-logits", {"num_classes": None}, "logits"),
    ],
)
def test_what_cannot_be_built_is_one_line(method, changes, named):
    with pytest.raises(ValueError, match=named) as caught:
        build(method, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("method", "named"), [("kd", "no logits"), ("at", "no map 'res3'"), ("lp", "no embedding")])
def test_an_output_that_is_not_there_is_named(method, named):
    for given in ((ModelOutputs(), outputs()[1]), (outputs()[0], ModelOutputs())):
        with pytest.raises(ValueError, match=named):
            build(method)(*given)


def test_gradient_reaches_the_student_and_the_adapters_and_not_the_teacher():
    student, teacher = outputs(requires_grad=True)
    loss = build("kd+vid-logits+lp+rkd+dkd+dist+reviewkd+" + EVERY_MAP_TERM)
    values = loss(student, teacher)
    assert all(value.shape == () for value in values.values())
    sum(values.values()).backward()
    for x in (student.logits, student.embedding, *student.maps.values()):
        assert x.grad is not None
        assert x.grad.abs().max() > 0
    for x in (teacher.logits, teacher.embedding, *teacher.maps.values()):
        assert x.grad is None
    for name, parameter in loss.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_adapters_are_in_the_state_dict_and_load_again():
    first, second = build("fitnet+vid+vid-logits"), build("fitnet+vid+vid-logits")
    student, teacher = outputs()
    assert "terms.vid.res4:res5.variance.alpha" in first.state_dict()
    assert first(student, teacher) != second(student, teacher)
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second(student, teacher), first(student, teacher))


def test_the_teachers_part_is_computed_once_for_all_students():
    teacher = outputs()[1]
    first = build(EVERY_MAP_TERM)(outputs(seed=5)[0], teacher)
    kept = teacher.shared_so_far()
    # the poly kernel goes by positions at res5 and by channels at res3
    assert {key[0] for place, key in kept if key[0].startswith("nst")} >= {"nst-mean", "nst-gram", "nst-poly"}
    again = build(EVERY_MAP_TERM)(outputs(seed=5)[0], teacher)
    now = teacher.shared_so_far()
    assert kept.keys() == now.keys()
    assert all(now[key] is value for key, value in kept.items())
    torch.testing.assert_close(again["nst-poly"], first["nst-poly"])


def test_shared_values_do_not_mix_levels_sizes_or_options():
    student, teacher = outputs()
    method = "at+nst-poly+nst-linear+cwd"
    options = {"nst-poly": {"center": True}, "at": {"power": 3}}
    # sizes of as many positions, which a key by positions would mix
    student.maps["res3"] = torch.randn(4, 6, 4, 4)
    other = ModelOutputs(student.logits, {"res3": torch.randn(4, 6, 2, 8), "res4": torch.randn(4, 8, 2, 8)})
    for first, second in ((student, other), (other, student)):
        shared = ModelOutputs(teacher.logits, teacher.maps)
        plain, special = build(method), build(method, options=options)
        special.load_state_dict(plain.state_dict())
        for loss in (plain, special):
            for mine in (first, second):
                alone = loss(mine, ModelOutputs(teacher.logits, dict(teacher.maps)))
                torch.testing.assert_close(loss(mine, shared), alone)


@pytest.mark.parametrize("name", ["nst-poly", "nst-linear", "nst-gaussian"])
def test_nst_options_center_and_relu(name):
    student, teacher = outputs()
    kernel = name.removeprefix("nst-")
    prepared = []
    for maps in (student.maps["res3"], teacher.maps["res3"]):
        positive = maps.clamp_min(0)
        prepared.append(positive - positive.mean((2, 3), keepdim=True))
    loss = build(f"{name}:1", levels=["res3"], options={name: {"center": True, "relu": True}})
    torch.testing.assert_close(loss(student, teacher)[name], nst_loss(*prepared, kernel))


def test_everything_is_computed_in_float32_under_autocast_and_of_low_precision_outputs():
    student, teacher = outputs(requires_grad=True)
    loss = build("kd+vid-logits+lp+" + EVERY_MAP_TERM).eval()
    exact = loss(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = loss(student, ModelOutputs(teacher.logits, teacher.maps, teacher.embedding))
    low = loss(
        *(
            ModelOutputs(x.logits.bfloat16(), {k: v.bfloat16() for k, v in x.maps.items()}, x.embedding.bfloat16())
            for x in (student, teacher)
        )
    )
    for name, value in exact.items():
        assert mixed[name].dtype == low[name].dtype == torch.float32
        assert torch.equal(mixed[name], value), name
        torch.testing.assert_close(low[name], value, rtol=0.05, atol=0.02)


def test_compiles_without_graph_breaks():
    student, teacher = outputs(requires_grad=True)
    loss = build("kd+vid-logits+lp+" + EVERY_MAP_TERM, levels=["res3"], term_levels={"nst-poly": ["res4"]}).eval()
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = [student.logits, student.embedding, *student.maps.values()]
    gradients = []
    for call in (loss, compiled):
        values = call(student, ModelOutputs(teacher.logits, teacher.maps, teacher.embedding))
        gradients.append((values, torch.autograd.grad(sum(values.values()), inputs, allow_unused=True)))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_shape_report():
    strides = {"res3": 8, "res4": 16}, {"res3": 8, "res5": 32}
    assert pair_shapes(build("kd+at"), *outputs(), *strides) == [
        ("kd", "logits: 10", "logits: 10", "none"),
        ("at", "res3: 6 x 8 x 8, stride 8", "res3: 6 x 8 x 8, stride 8", "none"),
        ("at", "res4: 8 x 4 x 4, stride 16", "res5: 16 x 2 x 2, stride 32", "student averaged down to 2 x 2"),
    ]
