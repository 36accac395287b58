"""Samplers: how many examples of each task a step sees."""

from mtl.samplers.annealed import Annealed
from mtl.samplers.curriculum import Curriculum
from mtl.samplers.doremi import DoReMi
from mtl.samplers.equal import Equal
from mtl.samplers.exp3 import Exp3
from mtl.samplers.exp3s import Exp3S
from mtl.samplers.performance import Performance
from mtl.samplers.proportional import Proportional
from mtl.samplers.skillit import SkillIt
from mtl.samplers.specified import Specified
from mtl.samplers.temperature import Temperature
from mtl.samplers.unimax import UniMax

__all__ = [
    "Annealed",
    "Curriculum",
    "DoReMi",
    "Equal",
    "Exp3",
    "Exp3S",
    "Performance",
    "Proportional",
    "SkillIt",
    "Specified",
    "Temperature",
    "UniMax",
]
