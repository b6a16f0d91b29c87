"""ms-swift: `--tuner_type flatlora` and `--callbacks flatlora`. Imports ms-swift, and registers both with it.

Pass this file, or a file of your own that imports it, as `--external_plugins`. The settings are environment variables
in ms-swift's way, so `--model_kwargs '{"flat_rho": 0.05}'` and `ENV: {FLAT_RHO: 0.05}` set them too.

ms-swift creates the adapter as its plain LoRA, and the tuner makes it flat in place.
"""

from __future__ import annotations

import copy
import json
import os
import weakref
from typing import Any

from peft import PeftModel
from swift.callbacks import callbacks_map
from swift.tuner_plugin import PeftTuner, tuners_map
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

# absolute, because ms-swift loads this file outside its package
from flatlora.config import PerturbedLoraConfig, load_own
from flatlora.integrations.callback import FlatLoraCallback
from flatlora.integrations.flat_arguments import flat_keys, make_model_flat, prepare_trainer

NAME = "flatlora"
_configs: weakref.WeakKeyDictionary[nn.Module, PerturbedLoraConfig] = weakref.WeakKeyDictionary()


class FlatLoraTuner(PeftTuner):
    """ms-swift's LoRA, with the perturbation that `FLAT_...` in the environment describes."""

    @staticmethod
    def prepare_model(args: Any, model: nn.Module) -> nn.Module:
        """Add a new adapter.

        Raises:
            ValueError: an option of ms-swift that does not go with the perturbation, an unknown setting, or a layer
                that cannot be perturbed.
        """
        from swift.pipelines.train.tuner import prepare_adapter

        _check(args)
        lora_args = copy.copy(args)
        lora_args.tuner_type = "lora"
        return _make_flat(prepare_adapter(lora_args, model), settings_of_environment())

    @staticmethod
    def from_pretrained(model: nn.Module, model_id: str, **kwargs: Any) -> nn.Module:
        """Load an adapter, which continues to train with its saved settings and those that are set anew."""
        loaded: PeftModel = PeftTuner.from_pretrained(model, model_id, **kwargs)
        # a second adapter is the reference of DPO, KTO or GRPO
        if not kwargs.get("is_trainable") or kwargs.get("adapter_name", "default") != "default":
            return loaded
        given = settings_of_environment()
        # another method would not know the saved settings
        return _make_flat(loaded, given if "flat_method" in given else {**_saved_settings(model_id), **given})

    @staticmethod
    def save_pretrained(model: nn.Module, save_directory: str, *args: Any, **kwargs: Any) -> None:
        PeftTuner.save_pretrained(model, save_directory, *args, **kwargs)
        config = _configs.get(model)
        if config is not None:
            config.save_own(save_directory)


class SwiftFlatLoraCallback(FlatLoraCallback):
    """[`FlatLoraCallback`] as ms-swift creates callbacks. It also adds the second pass of FMLoRA and LoRA-SAM."""

    def __init__(self, args: TrainingArguments, trainer: Any) -> None:
        super().__init__()
        self._trainer = weakref.ref(trainer)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer: Any = self._trainer()
        prepare_trainer(trainer, self)


def settings_of_environment() -> dict[str, Any]:
    """The settings `FLAT_...`, as numbers where they are numbers."""
    return {name.lower(): _value(text) for name, text in os.environ.items() if flat_keys({name.lower(): text})}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _saved_settings(folder: str) -> dict[str, Any]:
    own = load_own(folder) or {}
    method = own.pop("config_class", "FlatLoraConfig").removesuffix("Config")
    return {"flat_method": method, **{f"flat_{name}": value for name, value in own.items()}}


def _make_flat(model: Any, settings: dict[str, Any]) -> nn.Module:
    # ms-swift reads its own options (LoRA+) from its own configuration, so that stays in the model
    _configs[model] = make_model_flat(model, settings)
    return model  # type: ignore[no-any-return]


def _check(args: Any) -> None:
    if NAME not in args.callbacks:
        raise ValueError(
            "tuner_type flatlora needs callbacks flatlora, which sets the length of the schedule and saves the state "
            f"of the noise, got callbacks {args.callbacks}. Add --callbacks flatlora."
        )
    if args.tuner_backend != "peft":
        raise ValueError(f"tuner_backend must be 'peft' for tuner_type flatlora, got {args.tuner_backend!r}")
    if getattr(args, "use_swift_lora", False):
        raise ValueError("use_swift_lora must be false for tuner_type flatlora, got true: those are no layers of peft")
    if args.init_weights == "lora-ga":
        raise ValueError("init_weights lora-ga is not possible with tuner_type flatlora: use another, such as 'true'")


tuners_map[NAME] = FlatLoraTuner
callbacks_map[NAME] = SwiftFlatLoraCallback
