"""The dtypes of checkpoints: their names in safetensors, torch and NumPy, their sizes, and which holds all of which."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from gemma4_moe.errors import InputError, TensorShapeError, UsageError

if TYPE_CHECKING:
    import numpy as np


class FloatFormat(NamedTuple):
    """The values of a binary floating-point format.

    Attributes:
        precision: Significant bits of a normal number, the hidden one included.
        max_exponent: Exponent of the largest power of two.
        min_exponent: Exponent of the smallest normal power of two.
    """

    precision: int
    max_exponent: int
    min_exponent: int

    def holds(self, other: FloatFormat) -> bool:
        """Return whether every finite value of `other`, subnormals included, is a value of this format."""
        return (
            self.precision >= other.precision
            and self.max_exponent >= other.max_exponent
            and self.min_exponent - self.precision <= other.min_exponent - other.precision
        )


@dataclass(frozen=True, slots=True)
class DType:
    """One dtype.

    Attributes:
        name: Its name in torch and in a config.json, e.g. "bfloat16".
        tag: Its name in a safetensors header, e.g. "BF16".
        bits: Size of one element in bits; formats below eight bits are packed.
        float_format: Its values, if this package can compute with it, else None.
    """

    name: str
    tag: str
    bits: int
    float_format: FloatFormat | None = None

    @property
    def itemsize(self) -> int:
        """Size of one element in bytes. Only for dtypes of whole bytes."""
        return self.bits // 8

    def numpy(self) -> np.dtype[Any]:
        """Return the NumPy dtype; bfloat16 and float8 come from ml_dtypes."""
        import ml_dtypes
        import numpy as np

        return np.dtype(getattr(ml_dtypes, self.name, None) or self.name)


BFLOAT16 = DType("bfloat16", "BF16", 16, FloatFormat(8, 127, -126))
FLOAT16 = DType("float16", "F16", 16, FloatFormat(11, 15, -14))
FLOAT32 = DType("float32", "F32", 32, FloatFormat(24, 127, -126))
FLOAT8_E4M3 = DType("float8_e4m3fn", "F8_E4M3", 8, FloatFormat(4, 8, -6))

#: The dtypes that an expert tensor of a checkpoint or a model may have.
EXPERT_DTYPES = (BFLOAT16, FLOAT16, FLOAT32)
_EXPERT_NAMES = tuple(dtype.name for dtype in EXPERT_DTYPES)

#: Every dtype that the safetensors format names (safetensors 0.8, `Dtype`).
ALL = (
    *EXPERT_DTYPES,
    FLOAT8_E4M3,
    DType("float64", "F64", 64),
    DType("float8_e5m2", "F8_E5M2", 8),
    DType("float8_e4m3fnuz", "F8_E4M3FNUZ", 8),
    DType("float8_e5m2fnuz", "F8_E5M2FNUZ", 8),
    DType("float8_e8m0fnu", "F8_E8M0", 8),
    DType("float6_e2m3fn", "F6_E2M3", 6),
    DType("float6_e3m2fn", "F6_E3M2", 6),
    DType("float4_e2m1fn", "F4", 4),
    DType("complex64", "C64", 64),
    DType("int64", "I64", 64),
    DType("uint64", "U64", 64),
    DType("int32", "I32", 32),
    DType("uint32", "U32", 32),
    DType("int16", "I16", 16),
    DType("uint16", "U16", 16),
    DType("int8", "I8", 8),
    DType("uint8", "U8", 8),
    DType("bool", "BOOL", 8),
)

#: Other dtypes whose elements are values by themselves.
_PLAIN_NAMES = ("float64", "int64", "int32", "int16", "int8", "uint8", "bool")

BY_TAG = {dtype.tag: dtype for dtype in ALL}
BY_NAME = {dtype.name: dtype for dtype in ALL}


@cache
def named(name: str) -> DType:
    """Return the dtype of a torch or NumPy name, with or without the prefix "torch.".

    Raises:
        InputError: No dtype of the safetensors format has this name.
    """
    found = BY_NAME.get(name.removeprefix("torch."))
    if found is None:
        hint = "give the tensor one of these dtypes: safetensors has no others"
        raise InputError("unknown dtype", expected=f"one of {', '.join(BY_NAME)}", found=name, hint=hint)
    return found


def require_expert_dtype(tensor: str, dtype: str, hint: str | None = None) -> None:
    """Raise a TensorShapeError unless an expert tensor's `dtype`, torch's name, is in `EXPERT_DTYPES`."""
    name = dtype.removeprefix("torch.")
    if name not in _EXPERT_NAMES:
        expected = f"one of {', '.join(_EXPERT_NAMES)}"
        problem = "an expert tensor of a dtype that is not converted"
        own_hint = "cast the experts to one of these dtypes, or start from unquantised weights"
        if name == FLOAT8_E4M3.name:
            own_hint = "give gemma4-moe convert the directory: with their scales, it reads quantised weights"
        raise TensorShapeError(problem, tensor=tensor, expected=expected, found=name, hint=hint or own_hint)


def require_model_dtype(name: str, dtype: DType) -> None:
    """Check that libraries which load models take a tensor of this dtype without more: no packed or scaled format."""
    if dtype in EXPERT_DTYPES or dtype.name in _PLAIN_NAMES:
        return
    raise TensorShapeError(
        "a dtype in which no weight is loaded",
        tensor=name,
        expected=", ".join([*_EXPERT_NAMES, *_PLAIN_NAMES]),
        found=dtype.name,
        hint=f"cast it before: tensor.to(torch.{BFLOAT16.name})",
    )


def target_dtype(name: str) -> DType:
    """Return the dtype that `--dtype` names; a UsageError if expert tensors may not have it."""
    if name not in _EXPERT_NAMES:
        expected = f"keep, {', '.join(_EXPERT_NAMES)}"
        raise UsageError("no dtype to convert to", expected=expected, found=repr(name))
    return BY_NAME[name]


def cast_to(own: DType, wanted: DType | None) -> DType:
    """Return the dtype of a tensor of dtype `own` if floating-point tensors are cast to `wanted`."""
    return own if wanted is None or own.float_format is None else wanted


def is_exact(source: DType, target: DType) -> bool:
    """Return whether a cast from `source` to `target` keeps every finite value.

    A load in place rounds once only if this holds for the file's dtype and the model's: the load itself rounds before
    the scale multiplies. Between two dtypes of which one has no `FloatFormat`, only the identity is called exact.
    """
    if source.float_format is None or target.float_format is None:
        return source == target
    return target.float_format.holds(source.float_format)
