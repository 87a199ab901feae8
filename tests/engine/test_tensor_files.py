import json

import pytest
import torch

from nst_det.engine.safetensors_io import read_metadata, read_tensors, write_tensors
from nst_det.errors import UserError

TENSORS = {
    "scalar": torch.tensor(7),
    "none": torch.zeros(0, 3),
    "turned": torch.arange(6.0).reshape(2, 3).T,
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "mask": torch.tensor([True, False]),
    "learned": torch.nn.Parameter(torch.ones(2)),
}


@pytest.fixture
def path(tmp_path):
    write_tensors(tmp_path / "w.safetensors", TENSORS, {"classes": '["a"]'})
    return tmp_path / "w.safetensors"


def header(path, change):
    """Write the file with another header; its tensors stay as they are."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    values = json.loads(content[8:end])
    change(values)
    new = json.dumps(values).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + content[end:])


def test_tensors_of_any_kind_come_back(path):
    read = read_tensors(path)
    assert read.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value.detach())
    about = read_metadata(path)
    assert (about["format"], about["classes"], len(about["content_sha256"])) == ("pt", '["a"]', 64)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["__metadata__"].update(classes='["b"]'),
        lambda values: values["turned"].update(shape=[2, 3]),
        lambda values: values["half"].update(dtype="F16"),
        lambda values: values.update(ears=values.pop("mask")),
    ],
)
def test_a_header_that_is_not_as_it_was_written(path, change):
    header(path, change)
    with pytest.raises(UserError, match=r"w\.safetensors: damaged \(its content is not what was written"):
        read_tensors(path)


def test_a_header_written_in_another_order_is_the_same(path):
    header(path, lambda values: values.update(__metadata__=dict(reversed(values.pop("__metadata__").items()))))
    assert read_tensors(path).keys() == TENSORS.keys()
