"""Find the activation checkpoint that a forward runs in, and whether it is computed for the first time or again.

A recompute must have the noise of its own first forward, whoever called the model and whatever ran in between. So a
layer leaves a record on the object that lives from the first forward of a checkpoint to its recompute, and reads it
from there:

| checkpoint                                          | object               | found                              |
|-----------------------------------------------------|----------------------|------------------------------------|
| torch.utils.checkpoint, use_reentrant=False         | `_CheckpointFrame`   | on the stack, or in the pack hook  |
| an autograd Function: torch's use_reentrant=True,   | its `ctx`, the first | on the stack                       |
| DeepSpeed's, Unsloth's, a compiled forward          | argument             |                                    |

Frames of other functions are passed by without reading their locals, which would keep those alive.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.autograd.function import BackwardCFunction
from torch.utils import checkpoint as torch_checkpoint

_CHECKPOINT_FILE = torch_checkpoint.__file__
# attributes of a checkpoint object
_RECORDS = "_flatlora_records"  # {(layer, gradients enabled): records in the order of its forwards}
_READS = "_flatlora_reads"  # backward, and how many records of each key it has read
_FUNCTION_FILE = inspect.getfile(torch.autograd.Function)


class Checkpoints(NamedTuple):
    """The checkpoints around a forward, innermost first."""

    running: list[Any]  # whose first forward runs now
    recomputed: Any  # whose forward is computed again, or None

    def will_recompute_with_gradients(self) -> bool:
        """Does a checkpoint run its first forward under `no_grad`, so that gradients are off for its sake?"""
        return any(isinstance(checkpoint, BackwardCFunction) for checkpoint in self.running)

    def write(self, layer: int, record: Any) -> None:
        """Leave the record of a layer's forward for the recompute."""
        for checkpoint in self.running:
            records = checkpoint.__dict__.setdefault(_RECORDS, {})
            records.setdefault((layer, torch.is_grad_enabled()), []).append(record)

    def read(self, layer: int) -> Any:
        """The record of the first forward of a layer that is computed again; None if there is none.

        A layer may run several times, once under `no_grad`; but the first forward of a reentrant checkpoint is under
        it whole.
        """
        if self.recomputed is None:
            return None
        records, gradients = self.recomputed.__dict__.get(_RECORDS, {}), torch.is_grad_enabled()
        key = (layer, gradients) if (layer, gradients) in records else (layer, not gradients)
        found = records.get(key)
        return found[min(self._times_read(key), len(found) - 1)] if found else None

    def _times_read(self, key: tuple[int, bool]) -> int:
        """How often the backward that runs has read this key before."""
        backward, attributes = torch._C._current_graph_task_id(), self.recomputed.__dict__
        if attributes.get(_READS, (None,))[0] != backward:
            attributes[_READS] = (backward, Counter())
        counts = attributes[_READS][1]
        counts[key] += 1
        return int(counts[key]) - 1


def in_backward() -> bool:
    """Is this thread running a backward? Compiled code is traced as a forward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def may_be_checkpointed() -> bool:
    """Could a checkpoint be around this forward? False for an ordinary training forward, which is spared the search."""
    return not torch.is_grad_enabled() or _saved_tensors_hooks() is not None or in_backward()


def find_checkpoints() -> Checkpoints:
    """Search the stack of this thread."""
    running: list[Any] = []
    hooks = _saved_tensors_hooks()
    if hooks is not None:
        _add(running, _free_variable(hooks[0], "frame"))
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename == _CHECKPOINT_FILE:
            if code.co_name == "unpack_hook" and "frame" in code.co_freevars:
                return Checkpoints(running, frame.f_locals["frame"])
            if code.co_name == "checkpoint":
                generator = frame.f_locals.get("gen")
                _add(running, None if generator is None else generator.gi_frame.f_locals.get("new_frame"))
        if _may_have_ctx(frame):
            ctx = frame.f_locals.get(code.co_varnames[0])
            if isinstance(ctx, BackwardCFunction):
                if code.co_name != "forward":
                    return Checkpoints(running, ctx)
                if ctx.next_functions:  # none where gradients are off: there will be no backward
                    _add(running, ctx)
        frame = frame.f_back
    return Checkpoints(running, None)


def _may_have_ctx(frame: FrameType) -> bool:
    """Whether this looks like a method of an autograd Function: torch has called it, or its first argument is ctx."""
    code, caller = frame.f_code, frame.f_back
    if not code.co_argcount:
        return False
    by_name = code.co_varnames[0] == "ctx" and code.co_name in ("forward", "backward")  # inside torch.amp.custom_fwd
    return by_name or (caller is not None and caller.f_code.co_filename == _FUNCTION_FILE)


def _add(found: list[Any], checkpoint: Any) -> None:
    if checkpoint is not None and not any(checkpoint is other for other in found):
        found.append(checkpoint)


def _saved_tensors_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _free_variable(function: Any, name: str) -> Any:
    """A variable of the function around a hook of torch's checkpoint; None for another hook."""
    code = getattr(function, "__code__", None)
    if code is None or code.co_filename != _CHECKPOINT_FILE or name not in code.co_freevars:
        return None
    return function.__closure__[code.co_freevars.index(name)].cell_contents
