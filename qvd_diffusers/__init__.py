"""QVD for diffusers: int8 quantization of video diffusion pipelines. Importing this package registers it."""

from qvd_core.errors import QVDError
from qvd_core.scales import Scales
from qvd_core.spec import QuantSpec
from qvd_diffusers.attention import set_attention
from qvd_diffusers.config import QVDConfig
from qvd_diffusers.import_hook import write_import_hook
from qvd_diffusers.pipeline import calibrate
from qvd_diffusers.quantize import quantize
from qvd_diffusers.quantizer import QVDQuantizer
from qvd_diffusers.registration import register

__all__ = [
    "QVDConfig",
    "QVDError",
    "QVDQuantizer",
    "QuantSpec",
    "Scales",
    "calibrate",
    "quantize",
    "register",
    "set_attention",
    "write_import_hook",
]

register()
