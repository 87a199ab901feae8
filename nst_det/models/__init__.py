"""Students and teachers (timm models), their feature levels, backbone files and the registry behind ``backbone://``."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nst_det.models.bottomup import Bottomup, bottomup_from_file, classifier_from_file, load_into, prove_parity
    from nst_det.models.build import (
        LEVELS,
        NORM_POLICIES,
        LevelInfo,
        count_parameters,
        create_model,
        feature_levels,
        forward_outputs,
        take_levels,
    )
    from nst_det.models.card import Card, check_input_contract, input_contract
    from nst_det.models.io import load_backbone, load_card, load_plain, load_strict, save_backbone
    from nst_det.models.registry import (
        BackboneHandler,
        check_name,
        path_manager,
        register_handler,
        registry_folders,
        resolve,
    )
    from nst_det.models.weights import recognize

__all__ = [
    "LEVELS",
    "NORM_POLICIES",
    "BackboneHandler",
    "Bottomup",
    "Card",
    "LevelInfo",
    "bottomup_from_file",
    "check_input_contract",
    "check_name",
    "classifier_from_file",
    "count_parameters",
    "create_model",
    "feature_levels",
    "forward_outputs",
    "input_contract",
    "load_backbone",
    "load_card",
    "load_into",
    "load_plain",
    "load_strict",
    "path_manager",
    "prove_parity",
    "recognize",
    "register_handler",
    "registry_folders",
    "resolve",
    "save_backbone",
    "take_levels",
]

# the files that have them; the first two can be read without torch and timm, which take seconds to import
_FILES = ("registry", "card", "build", "bottomup", "io", "weights")


def __getattr__(name: str) -> Any:
    for file in _FILES if name in __all__ else ():
        module = import_module(f"{__name__}.{file}")
        if name in vars(module):
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
