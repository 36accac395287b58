"""Gradient surgery: combines the tasks' gradient rows into one gradient."""

from mtl.surgery.aligned_mtl import AlignedMTL
from mtl.surgery.cagrad import CAGrad
from mtl.surgery.config import ConFIG
from mtl.surgery.cr_mogm import CRMOGM
from mtl.surgery.dualproj import DualProj
from mtl.surgery.every import Every
from mtl.surgery.fairgrad import FairGrad
from mtl.surgery.graddrop import GradDrop
from mtl.surgery.gradvac import GradVac
from mtl.surgery.gramian import GramianSurgery, gramian
from mtl.surgery.grouped import Grouped
from mtl.surgery.imtl_g import IMTLG
from mtl.surgery.mean import Mean
from mtl.surgery.mgda import MGDA
from mtl.surgery.nash_mtl import NashMTL
from mtl.surgery.normalized import Normalized
from mtl.surgery.pcd import PCD
from mtl.surgery.pcgrad import PCGrad
from mtl.surgery.sdmgrad import SDMGrad
from mtl.surgery.torchjd import TorchJD
from mtl.surgery.upgrad import UPGrad

__all__ = [
    "CRMOGM",
    "IMTLG",
    "MGDA",
    "PCD",
    "AlignedMTL",
    "CAGrad",
    "ConFIG",
    "DualProj",
    "Every",
    "FairGrad",
    "GradDrop",
    "GradVac",
    "GramianSurgery",
    "Grouped",
    "Mean",
    "NashMTL",
    "Normalized",
    "PCGrad",
    "SDMGrad",
    "TorchJD",
    "UPGrad",
    "gramian",
]
