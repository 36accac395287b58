"""Loss weighters: how much each task's loss counts."""

from mtl.weighters.coba import CoBa
from mtl.weighters.db_mtl import DBMTL
from mtl.weighters.dtp import DTP
from mtl.weighters.dwa import DWA
from mtl.weighters.equal import Equal
from mtl.weighters.excess_dro import ExcessDRO
from mtl.weighters.famo import FAMO
from mtl.weighters.gls import GLS
from mtl.weighters.gradnorm import GradNorm
from mtl.weighters.group_dro import GroupDRO
from mtl.weighters.igb import IGB
from mtl.weighters.imtl_l import IMTLL
from mtl.weighters.liebel_koerner import LiebelKoerner
from mtl.weighters.log_loss import LogLoss
from mtl.weighters.rlw import RLW
from mtl.weighters.static import Static
from mtl.weighters.stch import STCH
from mtl.weighters.uncertainty import Uncertainty
from mtl.weighters.uwso import UWSO

__all__ = [
    "DBMTL",
    "DTP",
    "DWA",
    "FAMO",
    "GLS",
    "IGB",
    "IMTLL",
    "RLW",
    "STCH",
    "UWSO",
    "CoBa",
    "Equal",
    "ExcessDRO",
    "GradNorm",
    "GroupDRO",
    "LiebelKoerner",
    "LogLoss",
    "Static",
    "Uncertainty",
]
