"""QuantSpec: the grid a tensor is quantized to.

No torch in here, so that configs are checked in milliseconds, and not frozen, so that Hydra can override its fields.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from enum import Enum, StrEnum
from typing import Any, Optional

from .errors import SpecError, did_you_mean


class Granularity(StrEnum):
    """What shares one scale: the tensor, one output channel, or ``group_size`` consecutive inputs of a channel."""

    tensor = "tensor"
    channel = "channel"
    group = "group"


class ScaleDtype(StrEnum):
    """The dtype a scale is stored in. A bf16 scale is exact in fp16 (from 2^-17 up) and in fp32."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Codebook(StrEnum):
    """A table of levels that codes point into, in place of evenly spaced ones: NF4's, or the layer's own.

    ``nf4_double`` is NF4 whose scales are quantized too (``qat.double_quantization``), as QLoRA has it.
    """

    nf4 = "nf4"
    nf4_double = "nf4_double"
    custom = "custom"


class Init(StrEnum):
    """How a weight's step sizes start, and for those that read calibration data also where the weight itself does.

    From the weight alone: LSQ's 2<|v|>/sqrt(Q_P); max|v|/Q_P, which is round-to-nearest if never trained; the step size
    of least squared error; or HQQ's real zero points, of least error in a norm in which outliers count little. With
    calibration data (``qat.ptq``): GPTQ, GPTAQ, AWQ, SignRound, LSQ trained one block at a time, and for the levels of
    custom codebooks SqueezeLLM. Activations start at the least squared error where the word is one of weights only.
    """

    lsq = "lsq"
    minmax = "minmax"
    mse = "mse"
    hqq = "hqq"
    gptq = "gptq"
    gptaq = "gptaq"
    awq = "awq"
    signround = "signround"
    blockwise = "blockwise"
    squeezellm = "squeezellm"

    @property
    def reads_data(self) -> bool:
        """Whether ``qat.calibrate`` sets the weights' step sizes, and not ``qat.prepare``."""
        return self not in (Init.lsq, Init.minmax, Init.mse, Init.hqq)

    @property
    def of_activations(self) -> Init:
        """How an activation's step size starts."""
        return self if self in (Init.lsq, Init.minmax, Init.mse) else Init.mse


class Dynamic(StrEnum):
    """How a runtime rounds a linear layer's input to int8 as it comes: ExecuTorch's way, or llama.cpp's.

    A spec has a scale that is learned; here it follows from the values (``qat.quantizers.dynamic`` has the arithmetic).
    """

    int8_token = "int8_token"
    q8_0 = "q8_0"


class WeightQuantizer(StrEnum):
    """Where a weight's step sizes come from: LSQ learns them, or each forward takes them from the weight's range."""

    lsq = "lsq"
    minmax = "minmax"


class ActivationQuantizer(StrEnum):
    """Where an activation's step size comes from.

    LSQ learns it (with ``symmetric=False`` LSQ+, which learns an offset too), PACT learns the clipping bound, and
    minmax follows the range of the batches that are trained on.
    """

    lsq = "lsq"
    pact = "pact"
    minmax = "minmax"


@dataclass
class QuantSpec:
    """Bits, granularity and scale dtype of a quantized tensor.

    Codes run from ``-q_n`` to ``q_p`` (Q_N and Q_P of LSQ, arXiv:1902.08153, section 2); with a codebook they are the
    indices of its 2^bits levels, from 0.

    Args:
        bits: 2 to 8.
        granularity: "tensor", "channel" or "group". Defaults to "group" where ``group_size`` is given, else "channel".
        group_size: consecutive inputs that share a scale; only with granularity "group".
        signed: weights are always signed. For an activation, None means that calibration detects it (unsigned if
            no value is negative).
        symmetric: True for no zero point.
        scale_dtype: the dtype the scale is rounded to inside the training forward and stored in: bfloat16 unless
            given, and always float32 with a codebook.
        codebook: "nf4" or, with scales of 8 bits, "nf4_double" (QLoRA, arXiv:2305.14314, 4 bits), or "custom" for
            levels that the layer stores itself, one table an output channel; for weights only. The scale is then not
            learned: it is the largest magnitude of what shares it, as in bitsandbytes (``qat.codebook`` has the
            arithmetic).
        zero_point_dtype: None for zero points among the codes; "float16" and the like for real ones, of weights, as HQQ
            and QA-LoRA have them; only with ``symmetric=False``.

    Raises:
        SpecError: a field out of range, or fields that contradict each other.
    """

    bits: int = 4
    granularity: Optional[Granularity] = None  # noqa: UP045  OmegaConf 2.3 reads Optional, not "| None"
    group_size: Optional[int] = None  # noqa: UP045
    signed: Optional[bool] = None  # noqa: UP045
    symmetric: bool = True
    scale_dtype: Optional[ScaleDtype] = None  # noqa: UP045
    codebook: Optional[Codebook] = None  # noqa: UP045
    zero_point_dtype: Optional[ScaleDtype] = None  # noqa: UP045

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise SpecError(f"bits={self.bits!r}: give a whole number from 2 to 8")
        for name, value in (("symmetric", self.symmetric), ("signed", self.signed)):
            if not isinstance(value, bool) and (value is not None or name == "symmetric"):
                raise SpecError(f"{name}={value!r}: give True or False" + (" or None" if name == "signed" else ""))
        if self.granularity is None:
            self.granularity = Granularity.channel if self.group_size is None else Granularity.group
        self.granularity = as_member(Granularity, "granularity", self.granularity)
        if self.codebook is not None:
            self._check_codebook()
        if self.scale_dtype is None:
            self.scale_dtype = ScaleDtype.bfloat16 if self.codebook is None else ScaleDtype.float32
        self.scale_dtype = as_member(ScaleDtype, "scale_dtype", self.scale_dtype)
        if self.zero_point_dtype is not None:
            self.zero_point_dtype = as_member(ScaleDtype, "zero_point_dtype", self.zero_point_dtype)
            if self.symmetric:
                raise SpecError("zero_point_dtype is for symmetric=False: drop one of the two")
        if self.granularity is Granularity.group:
            if isinstance(self.group_size, bool) or not isinstance(self.group_size, int) or self.group_size < 1:
                raise SpecError(f"granularity='group' needs a positive group_size, not {self.group_size!r}")
        elif self.group_size is not None:
            raise SpecError(
                f"group_size={self.group_size} contradicts granularity={self.granularity.value!r}: "
                "drop one of the two, or set granularity='group'"
            )

    def _check_codebook(self) -> None:
        self.codebook = as_member(Codebook, "codebook", self.codebook)
        most = 4  # indices lie in int8, and more levels than this gain nothing over even ones
        nf4 = self.codebook is not Codebook.custom
        if self.bits > most or (nf4 and self.bits != 4):
            bits = "4 bits" if nf4 else f"2 to {most} bits"
            raise SpecError(f"codebook={self.codebook.value!r} has {bits}, not {self.bits}; codebook: null has any")
        if not self.symmetric or self.signed is False:
            raise SpecError("a codebook has its own zero and sign: drop symmetric=False and signed=False")
        if self.scale_dtype not in (None, "float32"):
            raise SpecError("the scale of a codebook is float32, as in bitsandbytes: drop scale_dtype")

    @property
    def q_n(self) -> int:
        """The magnitude of the lowest code."""
        return 0 if self._counts_from_zero else 2 ** (self.bits - 1)

    @property
    def q_p(self) -> int:
        """The highest code."""
        return 2**self.bits - 1 if self._counts_from_zero else 2 ** (self.bits - 1) - 1

    @property
    def holds_integers(self) -> bool:
        """Whether a value is a difference of integers times its scale: no codebook, and no real zero point."""
        return self.codebook is None and self.zero_point_dtype is None

    @property
    def _counts_from_zero(self) -> bool:
        return self.signed is False or self.codebook is not None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {key: value.value if isinstance(value, Enum) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantSpec:
        """Build a spec from plain values; SpecError names an unknown key."""
        check_keys(values, "QuantSpec")
        return cls(**values)

    def override(self, values: dict[str, Any]) -> QuantSpec:
        """Return a copy with some fields replaced.

        A new granularity or group size lets the other one follow, and a new codebook the scale's dtype.

        Raises:
            SpecError: an unknown field, or a value out of range.
        """
        check_keys(values, "QuantSpec")
        merged = self.to_dict()
        if "granularity" in values and "group_size" not in values:
            merged["group_size"] = merged["group_size"] if values["granularity"] == "group" else None
        if "group_size" in values and "granularity" not in values:
            merged["granularity"] = None
        if "codebook" in values:
            merged["scale_dtype"] = None
        return QuantSpec(**{**merged, **values})

    def __str__(self) -> str:
        if self.codebook is not None:
            name = f"codebook{self.bits}" if self.codebook is Codebook.custom else self.codebook.value
            return f"{name} {self._where}"
        sign = "u" if self.signed is False else ""
        zero = "" if self.symmetric else " asymmetric" if self.zero_point_dtype is None else " real zero points"
        return f"{sign}int{self.bits} {self._where}{zero}"

    @property
    def _where(self) -> str:
        return f"g{self.group_size}" if self.granularity is Granularity.group else self.granularity.value


def check_keys(values: dict[str, Any], what: str) -> None:
    """Raise SpecError for a key that is no field of QuantSpec."""
    known = [field.name for field in fields(QuantSpec)]
    for key in values:
        if key not in known:
            raise SpecError(f"unknown key {key!r} in {what}{did_you_mean(str(key), known)}")


def as_member(enum: type[Enum], name: str, value: Any) -> Enum:
    """Return the member with that value; SpecError names the field and the known words."""
    try:
        return enum(value)
    except ValueError:
        words = [member.value for member in enum]
        raise SpecError(f"{name}={value!r} is unknown{did_you_mean(str(value), words)}") from None
