"""Samplers: how many examples of each task a step sees."""

from mtl.samplers.equal import Equal
from mtl.samplers.performance import Performance
from mtl.samplers.proportional import Proportional
from mtl.samplers.temperature import Temperature

__all__ = ["Equal", "Performance", "Proportional", "Temperature"]
