"""Loss weighters: how much each task's loss counts."""

from mtl.weighters.equal import Equal
from mtl.weighters.static import Static
from mtl.weighters.uncertainty import Uncertainty

__all__ = ["Equal", "Static", "Uncertainty"]
