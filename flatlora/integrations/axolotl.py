"""axolotl's plug-in: `adapter: flatlora` and `flat_rho: 0.05` in its YAML. Imports axolotl.

For axolotl the adapter is `lora`, or `qlora` with `load_in_4bit`. It creates or loads plain LoRA in its own way, and
the plug-in makes it flat in place. So what axolotl does for these two names (quantization, checkpointing, DPO, merging)
works the same. The keys `flat_...` stay in the configuration, and mark it.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from dataclasses import fields
from typing import Any, get_type_hints

from axolotl.integrations.base import BasePlugin
from peft import PeftModel
from pydantic import BaseModel, Field, create_model
from torch import nn
from transformers import Trainer

from ..training.model_parts import perturbations
from .callback import FlatLoraCallback
from .flat_arguments import FlatArguments, flat_config, flat_keys, make_model_flat, prepare_trainer

KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")

_hints = get_type_hints(FlatArguments)
_fields: Any = {
    each.name: (_hints[each.name], Field(default=None, description=each.metadata["help"]))
    for each in fields(FlatArguments)
}
FlatLoraArgs: type[BaseModel] = create_model("FlatLoraArgs", **_fields)


class FlatLoraPlugin(BasePlugin):
    """`plugins: [flatlora.integrations.axolotl.FlatLoraPlugin]`; newer versions of axolotl find it by themselves.

    It does nothing to a configuration that has neither `adapter: flatlora` nor a key `flat_...`.
    """

    def register(self, cfg: MutableMapping[str, Any]) -> None:
        """Check the keys of the YAML, before axolotl does, and translate `adapter: flatlora`.

        Raises:
            ValueError: an unknown key or a value out of its bounds, an adapter that is not LoRA, or an option of
                axolotl that does not go with the perturbation.
        """
        keys, adapter = flat_keys(cfg), cfg.get("adapter")
        if not keys and adapter != "flatlora":
            return
        if adapter not in ("flatlora", "lora", "qlora"):
            raise ValueError(f"{', '.join(keys)}: the adapter must be flatlora, lora, or qlora, got {adapter!r}")
        config = flat_config({**keys, **FlatLoraArgs(**keys).model_dump()})
        _refuse(cfg)
        if adapter == "flatlora":
            cfg["adapter"] = "qlora" if cfg.get("load_in_4bit") else "lora"
        cfg["flat_method"] = keys.get("flat_method", "flatlora")
        # older versions of axolotl create the adapter before they set torch's seed
        if getattr(config, "seed", 0) is None and cfg.get("seed") is not None:
            cfg["flat_seed"] = cfg["seed"]
        # axolotl switches them on if none of them is set
        cfg.update(dict.fromkeys(KERNELS, False))

    def get_input_args(self) -> str:
        return f"{__name__}.FlatLoraArgs"

    def post_lora_load(self, cfg: MutableMapping[str, Any], model: nn.Module) -> None:
        if flat_keys(cfg) and isinstance(model, PeftModel):
            _make_flat(model, cfg)

    def post_trainer_create(self, cfg: MutableMapping[str, Any], trainer: Trainer) -> None:
        if flat_keys(cfg):
            model: Any = trainer.model
            # the trainers of DPO and KTO create the adapter themselves
            if not perturbations(model):
                _make_flat(model, cfg)
            prepare_trainer(trainer, FlatLoraCallback())


def _make_flat(model: Any, cfg: MutableMapping[str, Any]) -> None:
    config = make_model_flat(model, cfg)
    # it saves flatlora_config.json beside the adapter
    model.peft_config[model.active_adapter] = config


def _refuse(cfg: MutableMapping[str, Any]) -> None:
    kernels = sorted(key for key, value in cfg.items() if re.fullmatch(r"(\w+_)?lora_\w*kernel", key) and value)
    if kernels:
        raise ValueError(
            f"{', '.join(kernels)} must be false, got true: these kernels compute LoRA layers without calling them, so "
            "the adapter would train without noise. Set them to false or remove them; the plug-in keeps them off."
        )
    if cfg.get("relora"):
        raise ValueError(
            "relora must be false, got true: it merges the adapter into the weight during training, and the schedule "
            "of the noise does not restart with it. Remove relora, or train with adapter: lora and without flat_ keys."
        )
