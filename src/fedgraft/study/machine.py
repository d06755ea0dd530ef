"""A machine that training is planned for: how fast it multiplies matrices, how much it holds."""

import os
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from fedgraft.models import Precision, device, training_precision

Hardware = Literal["a100", "h100", "h200", "this"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """One kind of device, and how many of them work together, one process each."""

    name: str
    bfloat16_flops: float | None
    """Dense matrix products, FLOP/s; None where it trains in float32."""
    float32_flops: float
    memory_bytes: int
    """Of one device."""

    @property
    def precision(self) -> Precision:
        """What `precision: auto` is here."""
        return "float32" if self.bfloat16_flops is None else "bfloat16"

    def flops(self, precision: Precision) -> float:
        """FLOP/s of one device."""
        if precision == "float32" or self.bfloat16_flops is None:
            return self.float32_flops
        return self.bfloat16_flops


HARDWARE = MappingProxyType(
    {
        "a100": Machine(
            name="A100 40 GB",  # the paper's
            bfloat16_flops=312e12,
            float32_flops=19.5e12,
            memory_bytes=40 * 10**9,
        ),
        "h100": Machine(
            name="H100 80 GB",
            bfloat16_flops=989e12,
            float32_flops=67e12,
            memory_bytes=80 * 10**9,
        ),
        "h200": Machine(
            name="H200 141 GB",
            bfloat16_flops=989e12,
            float32_flops=67e12,
            memory_bytes=141 * 10**9,
        ),
    }
)
"""The makers' data sheets; float32 without TF32, as torch multiplies unless told otherwise."""


def this_machine() -> Machine:
    """The machine at hand, its rate measured by a few large matrix products."""
    import torch

    from fedgraft.training.watch import matrix_rate

    place, fast = device(), training_precision() == "bfloat16"
    if place.type == "cuda":
        memory = torch.cuda.get_device_properties(place).total_memory
        name = torch.cuda.get_device_name(place)
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        threads = torch.get_num_threads()
        name = f"this machine with {threads} thread{'s' if threads > 1 else ''}"
    return Machine(
        name=name,
        bfloat16_flops=matrix_rate(place.type, torch.bfloat16) if fast else None,
        float32_flops=matrix_rate(place.type, torch.float32),
        memory_bytes=memory,
    )


def machine(hardware: Hardware) -> Machine:
    """The machine of a name; `this` is measured, which takes a moment."""
    return this_machine() if hardware == "this" else HARDWARE[hardware]
