"""Gradient surgery: combines the tasks' gradient rows into one gradient."""

from mtl.surgery.gramian import GramianSurgery, gramian
from mtl.surgery.mean import Mean
from mtl.surgery.pcgrad import PCGrad

__all__ = ["GramianSurgery", "Mean", "PCGrad", "gramian"]
