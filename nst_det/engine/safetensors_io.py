"""Tensors as ``.safetensors`` files that carry the checksum of their content."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nst_det.engine.io import CHECKSUM_KEY, atomic_path
from nst_det.errors import UserError


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    """Write tensors with their metadata, atomically, and with the checksum of both."""
    kept = own_memory(tensors)
    metadata = {"format": "pt", **(about or {})}
    metadata[CHECKSUM_KEY] = _checksum(kept, metadata)
    with atomic_path(path) as temporary:
        save_file(kept, str(temporary), metadata=metadata)


def own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous copies on the CPU: safetensors refuses tensors that share memory, as tied weights do."""
    return {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors onto the CPU; a file without a checksum is accepted as it is."""
    metadata = read_metadata(path)
    tensors = load_tensors(path)
    recorded = metadata.pop(CHECKSUM_KEY, None)
    if recorded is not None and recorded != _checksum(tensors, metadata):
        raise UserError(
            f"{path}: damaged (its content is not what was written: SHA-256 differs); get it again, or remove it and "
            "write it again with the command that made it"
        )
    return tensors


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors onto the CPU, without a look at the checksum."""
    try:
        return load_file(str(path))
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        # the last two for number formats that safetensors or torch doesn't know
        raise UserError(f"{path}: its tensors can't be read ({error}); get it again, or write it as float32") from error


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read the metadata alone, without a look at the checksum."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: damaged, or not a safetensors file ({error}); get it again") from error


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
