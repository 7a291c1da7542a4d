"""QVD's core: quantizers, folds, int8 layers and calibration of video diffusion models, on torch and safetensors."""

from qvd_core.calibrate import calibrate_model
from qvd_core.checkpoint import load_checkpoint, save_checkpoint
from qvd_core.convert import dequantize_model, quantize_model
from qvd_core.errors import QVDError
from qvd_core.families import find_family
from qvd_core.scales import Scales
from qvd_core.spec import QuantSpec
from qvd_core.temporal_table import offload_projections, precompute_tables

__version__ = "0.1.0"

__all__ = [
    "QVDError",
    "QuantSpec",
    "Scales",
    "calibrate_model",
    "dequantize_model",
    "find_family",
    "load_checkpoint",
    "offload_projections",
    "precompute_tables",
    "quantize_model",
    "save_checkpoint",
]
