"""Students and teachers (timm models), their feature levels, backbone files and the registry behind ``backbone://``."""

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
    "register_handler",
    "registry_folders",
    "resolve",
    "save_backbone",
    "take_levels",
]
