"""Training methods: one file each, the paper's equation and its hyper-parameters in one dataclass.

To add one, write its file and add its name here; `errors.py` and `online.py` have what methods share.
"""

from flax_pref.methods.chats import CHATS
from flax_pref.methods.d3po import D3PO
from flax_pref.methods.ddpo import DDPO
from flax_pref.methods.diffusion_dpo import DiffusionDPO
from flax_pref.methods.dmpo import DMPO
from flax_pref.methods.dspo import DSPO
from flax_pref.methods.errors import PairMethod
from flax_pref.methods.kto import KTO
from flax_pref.methods.mapo import MaPO
from flax_pref.methods.nft import DiffusionNFT
from flax_pref.methods.npo import NPO
from flax_pref.methods.online import OnlineMethod
from flax_pref.methods.positive_negative import PositiveNegative
from flax_pref.methods.positive_negative_dpo import PositiveNegativeDPO
from flax_pref.methods.sdpo import SDPO
from flax_pref.methods.snpo import SNPO
from flax_pref.methods.spo import SPO
from flax_pref.methods.tailorpo import TailorPO

Method = (
    PositiveNegative
    | DiffusionDPO
    | SDPO
    | NPO
    | PositiveNegativeDPO
    | CHATS
    | SNPO
    | DSPO
    | DMPO
    | KTO
    | MaPO
    | TailorPO
    | SPO
    | D3PO
    | DDPO
    | DiffusionNFT
)

__all__ = [
    "CHATS",
    "D3PO",
    "DDPO",
    "DMPO",
    "DSPO",
    "KTO",
    "NPO",
    "SDPO",
    "SNPO",
    "SPO",
    "DiffusionDPO",
    "DiffusionNFT",
    "MaPO",
    "Method",
    "OnlineMethod",
    "PairMethod",
    "PositiveNegative",
    "PositiveNegativeDPO",
    "TailorPO",
]
