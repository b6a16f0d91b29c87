"""What only some of the allowed versions of peft have."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import variants


def variants_by_name(*names: str) -> tuple[type, ...]:
    """The classes of LoRA variants that the installed peft has: `KasaLinearVariant` came with 0.21."""
    return tuple(getattr(variants, name) for name in names if hasattr(variants, name))


def adapted_dimensions(wrapper: Any) -> int:
    """The number of dimensions of the parameter that a `lora.ParamWrapper` adapts.

    Since 0.21 peft remembers it, because under ZeRO-3 the parameter is empty outside the forward. Before, it reads it
    where the layer is made, which ZeRO-3 does not allow, so the parameter is whole.
    """
    remembered: int | None = getattr(wrapper, "_param_ndim", None)
    return int(wrapper.get_param().dim()) if remembered is None else remembered
