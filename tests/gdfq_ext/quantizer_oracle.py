"""The quantizers written in NumPy, apart from the package: Eq. 6 in float32 step by step (exact) and in float64 (the
mathematics), and affine and symmetric as ONNX has them, with codes and a zero point."""

import numpy as np
import torch

F32 = np.float32


def to_numpy(tensor: torch.Tensor, dtype=np.float32) -> np.ndarray:
    return tensor.detach().double().numpy().astype(dtype)


def levels(x, lower, upper, bits, dtype=F32):
    """round(scale * x - zero) before the clamp, and scale, zero, all in `dtype`."""
    x, lower, upper = (np.asarray(value, dtype) for value in (x, lower, upper))
    with np.errstate(all="ignore"):
        width = np.maximum(upper - lower, dtype(1e-8))
        scale = np.where(upper >= lower, dtype(2**bits - 1) / width, dtype(np.nan)).astype(dtype)
        zero = np.rint(scale * lower) + dtype(2 ** (bits - 1))
        return np.rint(scale * x - zero), scale, zero


def inside(x, lower, upper, bits, dtype=F32):
    """Where no clamp happened; NaN counts as inside."""
    level, _, _ = levels(x, lower, upper, bits, dtype)
    return ~((level < -(2 ** (bits - 1))) | (level > 2 ** (bits - 1) - 1))


def quantize(x, lower, upper, bits, dtype=F32):
    """y of Eq. 6 in `dtype`."""
    level, scale, zero = levels(x, lower, upper, bits, dtype)
    with np.errstate(all="ignore"):
        return (np.clip(level, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + zero) / scale


def near_boundary(x, lower, upper, bits):
    """Where float32 rounding may choose the neighbouring level: scale * x - zero within its error of a half."""
    _, scale, zero = levels(x, lower, upper, bits, np.float64)
    exact = scale * np.asarray(x, np.float64) - zero
    error = (np.abs(scale * x) + np.abs(zero) + 1) * 2.0**-22
    return np.abs(np.abs(exact - np.rint(exact)) - 0.5) < error


def onnx_grid(lower, upper, bits, scheme):
    """scale, zero point, lowest and highest code, for finite ranges."""
    lower, upper = np.asarray(lower, F32), np.asarray(upper, F32)
    if scheme == "symmetric":
        highest = 2 ** (bits - 1) - 1
        return np.maximum(np.maximum(-lower, upper), F32(5e-9)) / F32(highest), np.zeros_like(lower), -highest, highest
    below, above = np.minimum(lower, F32(0)), np.maximum(upper, F32(0))
    scale = np.maximum(above - below, F32(1e-8)) / F32(2**bits - 1)
    return scale, np.clip(np.rint(-below / scale), 0, 2**bits - 1), 0, 2**bits - 1


def onnx_codes(x, lower, upper, bits, scheme):
    """QuantizeLinear before it saturates; numerators and sums in float64, which holds them, the quotient in float32."""
    scale, zero_point, _, _ = onnx_grid(lower, upper, bits, scheme)
    with np.errstate(over="ignore"):
        return np.rint((np.asarray(x, F32) / scale).astype(F32)).astype(np.float64) + zero_point


def onnx_quantize(x, lower, upper, bits, scheme):
    """DequantizeLinear of QuantizeLinear."""
    scale, zero_point, lowest, highest = onnx_grid(lower, upper, bits, scheme)
    codes = np.clip(onnx_codes(x, lower, upper, bits, scheme), lowest, highest)
    return (codes - zero_point).astype(F32) * scale


def onnx_inside(x, lower, upper, bits, scheme):
    """Where nothing saturates; NaN counts as inside."""
    _, _, lowest, highest = onnx_grid(lower, upper, bits, scheme)
    codes = onnx_codes(x, lower, upper, bits, scheme)
    return ~((codes < lowest) | (codes > highest))


def exactly(actual: torch.Tensor, expected: np.ndarray) -> None:
    """Bit for bit up to the sign of zero, after rounding `expected` (float32) to the type of `actual`."""
    rounded = torch.tensor(np.asarray(expected, F32)).to(actual.dtype)
    torch.testing.assert_close(actual.detach(), rounded, rtol=0, atol=0, equal_nan=True)
