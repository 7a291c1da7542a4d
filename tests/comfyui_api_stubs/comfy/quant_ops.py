"""Quantized tensors, which are the real ones of `comfy_kitchen`; ComfyUI passes them on from here."""

from comfy_kitchen.tensor import QuantizedLayout, QuantizedTensor, register_layout_class

__all__ = ["QuantizedLayout", "QuantizedTensor", "register_layout_class"]
