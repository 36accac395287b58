"""Models and the trainable parameters put on them."""

from mtl.models.adapters import FullLayout, LoraLayout
from mtl.models.load import ModelSettings, load_model, load_tokenizer

__all__ = ["FullLayout", "LoraLayout", "ModelSettings", "load_model", "load_tokenizer"]
