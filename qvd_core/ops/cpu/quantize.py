"""quantize_rows and quantize_images by the C kernels; None where they do not apply and PyTorch has to."""

from __future__ import annotations

import ctypes
import math
from functools import cache

import torch
from torch import Tensor

from qvd_core.ops import semantics
from qvd_core.ops.cpu import library

_FOUND_NAN = -1  # the C functions' answer to static steps on an x that holds NaN
_OK = 0
_SPACE = 3  # spatial dimensions the C function works on
_LARGEST_ROTATION = 128

_int, _int64, _pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p


class _Images(ctypes.Structure):
    """struct quantize_images of quantize_images.c."""

    _fields_ = (
        *(("x", _pointer), ("shift", _pointer), ("inverse_scale", _pointer), ("border", _pointer)),
        *(("static_step", _pointer), ("codes", _pointer), ("step", _pointer)),
        *(("images", _int64), ("channels", _int64), ("image_stride", _int64), ("channel_stride", _int64)),
        *(("size", _int64 * _SPACE), ("stride", _int64 * _SPACE), ("low", _int64 * _SPACE), ("high", _int64 * _SPACE)),
        *(("step_stride", _int64), ("dtype", _int), ("limit", _int), ("rotation", _int)),
    )


def quantize_rows(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, static_step: Tensor | None, bits: int, rotation: int
) -> tuple[Tensor, Tensor] | None:
    """x [M, K] -> codes int8 [M, K], step float32 [M, 1] or as `static_step`; see `Backend.quantize_rows`.

    None where there is no library, and for empty x, other dtypes than float32, bfloat16 and float16, and rotations that
    are not a power of two up to 128.
    """
    kernels = library.load()
    if kernels is None or x.dim() != 2 or not is_supported(x, shift, scale, static_step, rotation, len(x)):
        return None
    if x.shape[1] > 1 and x.stride(1) != 1:
        x = x.contiguous()
    rows, channels = x.shape
    shift, inverse_scale = _per_channel(shift, scale)
    codes = torch.empty(rows, channels, dtype=torch.int8, device="cpu")
    step = torch.empty(rows, 1, dtype=torch.float32, device="cpu") if static_step is None else static_step.clone()
    status = _rows_function(kernels)(
        *(library.isa(kernels), torch.get_num_threads(), library.DTYPE_CODES[x.dtype]),
        *(x.data_ptr(), rows, channels, x.stride(0), _address(shift), _address(inverse_scale)),
        *(semantics.code_limit(bits), rotation, *_static(static_step), codes.data_ptr(), step.data_ptr()),
    )
    return _answer(status, codes, step)


def quantize_images(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    static_step: Tensor | None,
    bits: int,
    rotation: int,
    padding: list[int],
) -> tuple[Tensor, Tensor] | None:
    """x [B, C, *space] -> codes int8 [B, *padded space, C], step float32 [B, 1] or as `static_step`.

    See `Backend.quantize_images`. None as in `quantize_rows`, and for negative padding.
    """
    kernels = library.load()
    if kernels is None or not 3 <= x.dim() <= 2 + _SPACE or min(padding, default=0) < 0:
        return None
    if len(padding) != 2 * (x.dim() - 2) or not is_supported(x, shift, scale, static_step, rotation, len(x)):
        return None
    images, channels = x.shape[:2]
    shift, inverse_scale = _per_channel(shift, scale)
    zeros = x.new_zeros((1, channels), dtype=torch.float32)
    border = semantics.transform(zeros, shift, scale, rotation) if any(padding) else None
    low, high = padding[-2::-2], padding[-1::-2]
    space = [size + before + after for size, before, after in zip(x.shape[2:], low, high, strict=True)]
    codes = x.new_empty((images, *space, channels), dtype=torch.int8)
    step = x.new_empty((images, 1), dtype=torch.float32) if static_step is None else static_step.clone()
    static_address, step_stride = _static(static_step)
    dims = _merged(list(zip(x.shape[2:], x.stride()[2:], low, high, strict=True)))
    extents = ((_int64 * _SPACE)(*values) for values in zip(*dims, strict=True))  # size, stride, low, high
    call = _Images(
        *(x.data_ptr(), _address(shift), _address(inverse_scale), _address(border)),
        *(static_address, codes.data_ptr(), step.data_ptr()),
        *(images, channels, x.stride(0), x.stride(1), *extents, step_stride),
        *(library.DTYPE_CODES[x.dtype], semantics.code_limit(bits), rotation),
    )
    status = _images_function(kernels)(library.isa(kernels), torch.get_num_threads(), ctypes.byref(call))
    return _answer(status, codes, step)


def _merged(dims: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Spatial dimensions (size, stride, padding low, high) as `_SPACE` of them, outermost first, the inner ones long.

    A dimension without padding joins the one around it where both are evenly spaced: its lines follow each other.
    """
    merged = [dims[-1]]
    for size, stride, low, high in reversed(dims[:-1]):
        inner_size, inner_stride, inner_low, inner_high = merged[0]
        joins = size == 1 or stride == inner_size * inner_stride
        if joins and inner_low == inner_high == 0:
            merged[0] = (size * inner_size, inner_stride, low * inner_size, high * inner_size)
        else:
            merged.insert(0, (size, stride, low, high))
    return [(1, 0, 0, 0)] * (_SPACE - len(merged)) + merged


def is_supported(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, static_step: Tensor | None, rotation: int, steps: int
) -> bool:
    """Are these what the C functions read: x [M, K, ...] with `steps` rows or images."""
    channels = x.shape[1]
    if not (library.is_readable(x) and x.dtype in library.DTYPE_CODES and x.numel() > 0):
        return False
    for factor, shapes in ((shift, ((channels,),)), (scale, ((channels,),)), (static_step, ((1,), (steps, 1)))):
        if factor is not None and not (
            library.is_readable(factor) and factor.dtype == torch.float32 and factor.shape in shapes
        ):
            return False
    power_of_two = rotation & (rotation - 1) == 0
    fits = 1 < rotation <= _LARGEST_ROTATION and power_of_two and channels % rotation == 0
    return rotation in (0, 1) or fits


def _per_channel(shift: Tensor | None, scale: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Shift and 1 / scale, contiguous."""
    return (
        None if shift is None else shift.contiguous(),
        None if scale is None else scale.reciprocal().contiguous(),
    )


def _static(static_step: Tensor | None) -> tuple[int | None, int]:
    """Address of the static steps and the distance from one to the next, 0 where there is only one."""
    if static_step is None:
        return None, 0
    return static_step.data_ptr(), 0 if static_step.numel() == 1 else static_step.stride(0)


def _answer(status: int, codes: Tensor, step: Tensor) -> tuple[Tensor, Tensor] | None:
    if status == _FOUND_NAN:
        step.fill_(math.nan)
    elif status != _OK:
        return None
    return codes, step


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@cache
def _rows_function(kernels: ctypes.CDLL) -> ctypes._NamedFuncPointer:
    function = kernels.qvd_quantize_rows
    function.restype = _int
    function.argtypes = (
        *(_int, _int, _int, _pointer, _int64, _int64, _int64, _pointer, _pointer),
        *(_int, _int, _pointer, _int64, _pointer, _pointer),
    )
    return function


@cache
def _images_function(kernels: ctypes.CDLL) -> ctypes._NamedFuncPointer:
    function = kernels.qvd_quantize_images
    function.restype = _int
    function.argtypes = (_int, _int, ctypes.POINTER(_Images))
    return function
