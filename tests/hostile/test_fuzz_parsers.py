"""The parsers of tests/fuzz/fuzz_parsers.py under hypothesis: nothing but a UserError comes out."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import fuzz_parsers as fuzz

PARSERS = fuzz._parsers()
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def mutated(data, draw):
    """Bytes with a few changed, cut and doubled."""
    data = bytearray(data)
    for _ in range(draw(st.integers(0, 5))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        how = draw(st.sampled_from(["set", "cut", "insert", "double"]))
        if how == "set" and data:
            data[at] = draw(st.integers(0, 255))
        elif how == "cut":
            del data[at : at + draw(st.integers(1, 20))]
        elif how == "insert":
            data[at:at] = draw(st.binary(max_size=8) | st.sampled_from([b"-1", b"1e999", b"null", b"{", b"[]", b'"']))
        else:
            data += data[at:]
    return bytes(data)


@pytest.mark.parametrize("name", PARSERS)
@given(data=st.data())
@FUZZ
def test_mutated_and_random_bytes(name, data):
    seed = fuzz.SEEDS.get(name, b"")
    content = mutated(seed, data.draw) if data.draw(st.booleans()) else data.draw(st.binary(max_size=200))
    fuzz.check(name, PARSERS[name], content)


@pytest.mark.parametrize("name", ["card", "detections", "coco names", "cache"])
@given(value=json_values, data=st.data())
@FUZZ
def test_json_in_which_some_values_are_others(name, value, data):
    tree = json.loads(fuzz.SEEDS[name])
    node = tree
    while isinstance(node, dict | list) and node:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if data.draw(st.booleans()) or not isinstance(node[key], dict | list):
            node[key] = value
            break
        node = node[key]
    fuzz.check(name, PARSERS[name], json.dumps(tree).encode())
