# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Triton kernels that multiply: int8 rows x int8 (or packed 4-bit) weights, 16-bit rows x int8 weights, the epilogue.

Weights are read as they are stored, [N, K] with K innermost, which is what the tensor cores want of the second operand.
"""

import triton
import triton.language as tl


@triton.jit
def block_of(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The tile of this program: GROUP_M tiles down before one to the right, so that weights are read from L2."""
    program = tl.program_id(0)
    across = tl.cdiv(columns, BLOCK_N)
    group = program // (GROUP_M * across)
    height = tl.minimum(tl.cdiv(rows, BLOCK_M) - group * GROUP_M, GROUP_M)
    inner = program % (GROUP_M * across)
    return group * GROUP_M + inner % height, inner // height


@triton.jit
def dequantize(total, step, weight_scale_ptr, bias_ptr, n, columns):
    """float32 total * step * weight_scale + bias of a tile [BLOCK_M, BLOCK_N]; step [BLOCK_M]."""
    inside = n < columns
    y = total.to(tl.float32) * step[:, None]
    y = y * tl.load(weight_scale_ptr + n, mask=inside, other=0.0)[None, :]
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def add_residual(y, residual_ptr, gate_ptr, m, n, columns, residual_stride, rows_per_gate, inside):
    """residual + y * gate: gate [G, N], one row for each `rows_per_gate` rows of y."""
    if gate_ptr is not None:
        gate = gate_ptr + (m // rows_per_gate * columns)[:, None] + n[None, :]
        y = y * tl.load(gate, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = residual_ptr + m[:, None] * residual_stride + n[None, :]
        y = tl.load(residual, mask=inside, other=0.0).to(tl.float32) + y
    return y


@triton.jit
def _finish(
    total,
    step,
    out_ptr,
    weight_scale_ptr,
    bias_ptr,
    residual_ptr,
    gate_ptr,
    m,
    n,
    rows,
    columns,
    residual_stride,
    rows_per_gate,
):
    """Dequantize a tile of integer sums and store it."""
    y = dequantize(total, step, weight_scale_ptr, bias_ptr, n, columns)
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    y = add_residual(y, residual_ptr, gate_ptr, m, n, columns, residual_stride, rows_per_gate, inside)
    tl.store(out_ptr + m[:, None] * columns + n[None, :], y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def unpack(packed, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """int8 codes [ROWS, 2 * BYTES] of packed 4-bit ones [ROWS, BYTES]: the low nibble is the even one."""
    low = (packed << 4).to(tl.int8, bitcast=True) >> 4  # the shift of int8 spreads the sign
    high = packed.to(tl.int8, bitcast=True) >> 4
    return tl.reshape(tl.join(low, high), (ROWS, 2 * BYTES))


@triton.jit
def linear_kernel(
    codes_ptr,  # int8 [rows, terms]
    weight_ptr,  # int8 [columns, terms], or uint8 [columns, ceil(terms / 2)] where PACKED
    out_ptr,  # any float [rows, columns]
    step_ptr,  # float32 [rows], or [1] with step_stride 0
    weight_scale_ptr,  # float32 [columns]
    bias_ptr,  # any float [columns] or None
    residual_ptr,  # any float [rows, residual_stride] or None
    gate_ptr,  # any float [groups, columns] or None
    rows,
    columns,
    terms,
    weight_stride,
    step_stride,
    residual_stride,
    rows_per_gate,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_K divides terms: no masks in the loop
    PACKED: tl.constexpr,
    HALVES: tl.constexpr,  # finish the tile in two halves, which need fewer registers
):
    block_m, block_n = block_of(rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    m = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    byte = tl.arange(0, BLOCK_K // 2)
    # Rows beyond the matrix read one of its rows again and are not stored: no mask in the loop on their account.
    codes = codes_ptr + (m % rows)[:, None] * terms + k[None, :]
    weight_row = (n % columns).to(tl.int64) * weight_stride
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, terms, BLOCK_K):
        if EVEN_K:
            a = tl.load(codes)
        else:
            a = tl.load(codes, mask=(start + k < terms)[None, :], other=0)
        codes += BLOCK_K
        if PACKED:
            address = weight_ptr + weight_row[:, None] + (start // 2 + byte)[None, :]
            if EVEN_K:
                packed = tl.load(address)
            else:
                packed = tl.load(address, mask=(start // 2 + byte < (terms + 1) // 2)[None, :], other=0)
            b = tl.trans(unpack(packed, BLOCK_N, BLOCK_K // 2))
        else:
            address = weight_ptr + weight_row[None, :] + (start + k)[:, None]
            if EVEN_K:
                b = tl.load(address)
            else:
                b = tl.load(address, mask=(start + k < terms)[:, None], other=0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)
    step = tl.load(step_ptr + m * step_stride, mask=m < rows, other=0.0)
    if HALVES:
        left, right = tl.split(tl.permute(tl.reshape(total, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        n = block_n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        _finish(
            left, step, out_ptr, weight_scale_ptr, bias_ptr, residual_ptr, gate_ptr, m, n, rows, columns,
            residual_stride, rows_per_gate,
        )  # fmt: skip
        _finish(
            right, step, out_ptr, weight_scale_ptr, bias_ptr, residual_ptr, gate_ptr, m, n + BLOCK_N // 2, rows,
            columns, residual_stride, rows_per_gate,
        )  # fmt: skip
    else:
        _finish(
            total, step, out_ptr, weight_scale_ptr, bias_ptr, residual_ptr, gate_ptr, m, n, rows, columns,
            residual_stride, rows_per_gate,
        )  # fmt: skip


@triton.jit
def epilogue_kernel(
    total_ptr,  # int32 [rows, total_stride]
    out_ptr,  # any float [rows, columns]
    step_ptr,
    weight_scale_ptr,
    bias_ptr,
    residual_ptr,
    gate_ptr,
    rows,
    columns,
    total_stride,
    step_stride,
    residual_stride,
    rows_per_gate,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`linear_kernel` from the sum on, for sums that another library made."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    total = tl.load(total_ptr + m[:, None] * total_stride + n[None, :], mask=inside, other=0)
    step = tl.load(step_ptr + m * step_stride, mask=m < rows, other=0.0)
    _finish(
        total, step, out_ptr, weight_scale_ptr, bias_ptr, residual_ptr, gate_ptr, m, n, rows, columns,
        residual_stride, rows_per_gate,
    )  # fmt: skip


@triton.jit
def weight_only_kernel(
    x_ptr,  # 16-bit or 32-bit float [rows, terms]
    weight_ptr,  # int8 [columns, terms], or uint8 [columns, ceil(terms / 2)] where PACKED
    out_ptr,  # any float [rows, columns]
    weight_scale_ptr,  # float32 [columns]
    bias_ptr,  # any float [columns] or None
    rows,
    columns,
    terms,
    weight_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PACKED: tl.constexpr,
):
    """x times the codes, which every float type holds exactly, in float32 sums; the scale comes after."""
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    byte = tl.arange(0, BLOCK_K // 2)
    x = x_ptr + (m % rows).to(tl.int64)[:, None] * terms + k[None, :]
    weight_row = (n % columns).to(tl.int64) * weight_stride
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, terms, BLOCK_K):
        if EVEN_K:
            a = tl.load(x)
        else:
            a = tl.load(x, mask=(start + k < terms)[None, :], other=0.0)
        x += BLOCK_K
        if PACKED:
            address = weight_ptr + weight_row[:, None] + (start // 2 + byte)[None, :]
            if EVEN_K:
                packed = tl.load(address)
            else:
                packed = tl.load(address, mask=(start // 2 + byte < (terms + 1) // 2)[None, :], other=0)
            b = tl.trans(unpack(packed, BLOCK_N, BLOCK_K // 2))
        else:
            address = weight_ptr + weight_row[None, :] + (start + k)[:, None]
            if EVEN_K:
                b = tl.load(address)
            else:
                b = tl.load(address, mask=(start + k < terms)[:, None], other=0)
        total = tl.dot(a, b.to(a.dtype), total, input_precision="tf32x3")
    y = dequantize(total, tl.full((BLOCK_M,), 1.0, tl.float32), weight_scale_ptr, bias_ptr, n, columns)
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    address = out_ptr + m.to(tl.int64)[:, None] * columns + n[None, :]
    tl.store(address, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def unpack_kernel(packed_ptr, codes_ptr, terms, weight_stride, BLOCK_N: tl.constexpr, BYTES: tl.constexpr, columns):
    """uint8 [columns, ceil(terms / 2)] -> int8 [columns, terms]."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    k = tl.program_id(1) * BYTES * 2 + tl.arange(0, 2 * BYTES)
    mask = (n < columns)[:, None] & (byte < weight_stride)[None, :]
    packed = tl.load(packed_ptr + n[:, None] * weight_stride + byte[None, :], mask=mask, other=0)
    mask = (n < columns)[:, None] & (k < terms)[None, :]
    tl.store(codes_ptr + n[:, None] * terms + k[None, :], unpack(packed, BLOCK_N, BYTES), mask=mask)
