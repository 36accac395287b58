"""Models and the trainable parameters put on them."""

from mtl.models.adapters import LoraLayout
from mtl.models.experts_layout import ExpertsLayout
from mtl.models.full_layout import FullLayout
from mtl.models.group_layout import GroupLayout
from mtl.models.load import ModelSettings, load_model, load_tokenizer
from mtl.models.shared_a_layout import SharedALayout

__all__ = [
    "ExpertsLayout",
    "FullLayout",
    "GroupLayout",
    "LoraLayout",
    "ModelSettings",
    "SharedALayout",
    "load_model",
    "load_tokenizer",
]
