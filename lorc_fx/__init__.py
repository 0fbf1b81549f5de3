"""lorc_fx: torch.compile(model, backend="lorc") gives any decoder a compressed KV cache (LoRC, arXiv 2410.03111)."""

from . import schedulers
from .bases import register_basis
from .cache_file import load_cache, save_cache
from .calibrate import calibrate
from .calibration import Calibration
from .certify import Certificate, certify
from .errors import LorcError, LorcWarning
from .latent import LatentKV, cache_nbytes
from .options import PAPER, Options
from .passes.axes import Mixes
from .passes.rules import register_rule
from .records import Fidelity, Miss, Plan
from .report import Report, explain, make_plan
from .schedulers import register_scheduler
from .store import fidelity, reset
from .trim import trim_cache

__version__ = "0.1.0"

__all__ = [
    "PAPER",
    "Calibration",
    "Certificate",
    "Fidelity",
    "LatentKV",
    "LorcError",
    "LorcWarning",
    "Miss",
    "Mixes",
    "Options",
    "Plan",
    "Report",
    "cache_nbytes",
    "calibrate",
    "certify",
    "explain",
    "fidelity",
    "load_cache",
    "make_plan",
    "register_basis",
    "register_rule",
    "register_scheduler",
    "reset",
    "save_cache",
    "schedulers",
    "trim_cache",
]
