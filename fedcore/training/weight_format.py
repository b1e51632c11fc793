"""In which numbers a base model is held: a floating type, or few bits by a library of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch

from fedcore.errors import FedcoreError, missing_extra

DtypeName = Literal["fp32", "bf16", "fp16"]
Quantisation = Literal["nf4", "int8", "torchao-int8"]

DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class WeightFormat:
    """How the weights of a base model are stored, and what it computes in.

    Adapters are fp32 whatever the base is.

    Attributes:
        dtype: of the weights that are not quantised.
        quantisation: of the linear layers but the head: by bitsandbytes 4-bit normal floats in
            blocks of 64, or 8-bit integers by row; by torchao 8-bit integers by row; None for none.
        compute: in what 4-bit weights are multiplied; ``dtype`` if None.
    """

    dtype: DtypeName = "fp32"
    quantisation: Quantisation | None = None
    compute: DtypeName | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the weights that are not quantised."""
        return DTYPES[self.dtype]

    def check(self) -> None:
        """Refuse a format that cannot be had, before anything is loaded.

        Raises:
            MissingExtraError: the library is not installed.
            FedcoreError: a type to compute in beside weights that have none of their own.
        """
        if self.compute is not None and self.quantisation != "nf4":
            raise FedcoreError(
                f"model.compute_dtype is {self.compute!r} and model.quantisation is "
                f"{self.quantisation!r}; it is for 'nf4': leave it out"
            )
        if self.quantisation is not None:
            library = "torchao" if self.quantisation == "torchao-int8" else "bitsandbytes"
            if find_spec(library) is None:
                raise missing_extra(library, "quantised")

    def arguments(self, device: torch.device) -> dict[str, Any]:
        """What ``from_pretrained`` takes to load weights in this format.

        Args:
            device: where quantised weights are put; others are left on the CPU.
        """
        arguments: dict[str, Any] = {"dtype": self.torch_dtype}
        if self.quantisation is None:
            return arguments
        from transformers import BitsAndBytesConfig, TorchAoConfig

        config: Any
        if self.quantisation == "torchao-int8":
            from torchao.quantization import Int8WeightOnlyConfig

            config = TorchAoConfig(Int8WeightOnlyConfig())
        elif self.quantisation == "nf4":
            config = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=DTYPES[self.compute or self.dtype],
            )
        else:
            config = BitsAndBytesConfig(load_in_8bit=True)
        return {**arguments, "quantization_config": config, "device_map": {"": device}}
