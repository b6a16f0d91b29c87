import gc
from dataclasses import dataclass, field

import pytest
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from transformers import PreTrainedModel

from flatlora.ops import products


@pytest.fixture(autouse=True, scope="session")
def _nothing_to_collect():
    # a Trainer collects garbage when it starts: leave out all objects of the imports
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _one_thread():
    # several threads are slower than one on tensors this small
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Pass:
    """One forward pass of a model and its perturbed products, without those that backward recomputes."""

    grad: bool  # gradients were enabled
    training: bool  # the model was in training mode
    strengths: list[float] = field(
        default_factory=list
    )  # of the noise in each product, by its std and peft's merged weight
    samples: set[int] = field(default_factory=set)

    @property
    def rho(self):
        """The strength, which all products share."""
        assert max(self.strengths, default=0.0) - min(self.strengths, default=0.0) < 1e-5
        return max(self.strengths, default=0.0)


@pytest.fixture
def passes(monkeypatch):
    """passes(model): a list that grows with each pass of a transformers model (or of the given kind) inside.

    peft 0.20 calls the `forward` of its model, whose hooks do not run then, so a pass begins at its tuner.
    """

    def watch(model, kind=(PreTrainedModel, BaseTuner)):
        seen, entered = [], []
        perturb = products.perturb_weight

        def enter(module, args):
            entered.append(module)
            if len(entered) == 1:
                seen.append(Pass(torch.is_grad_enabled(), module.training))

        def leave(module, args, output):
            entered.pop()

        def spy(weight, norms, key, *args, **kwargs):
            made = perturb(weight, norms, key, *args, **kwargs)  # this may write the norms
            layers = (
                m for m in model.modules() if isinstance(m, LoraLayer)
            )  # look now, because a trainer may make them
            layer = next((m for m in layers if m.get_base_layer().weight.data_ptr() == weight.data_ptr()), None)
            if layer is not None and torch._C._current_graph_task_id() == -1:
                with torch.autocast(weight.device.type, enabled=False):
                    merged = weight + sum(layer.get_delta_weight(name) for name in layer.active_adapters)
                strength = norms * kwargs.get("relative", 1.0) * weight.shape[1] ** 0.5 / merged.norm(dim=1)
                assert strength.max() - strength.min() < 1e-5
                seen[-1].strengths.append(strength.mean().item())
                seen[-1].samples.add(key.tolist()[1])
            return made

        for module in model.modules():
            if isinstance(module, kind):
                module.register_forward_pre_hook(enter)
                module.register_forward_hook(leave)
        monkeypatch.setattr(products, "perturb_weight", spy)
        return seen

    return watch
