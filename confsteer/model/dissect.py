"""The numerical check, on the model at hand, that its last layer is what was found.

The result of the search is not trusted. `dissect` checks that the logits are ``unembed(norm(residual))``, and that an activation
moves the residual by its neuron's write. Otherwise it refuses the model.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from confsteer.errors import UnsupportedModelError
from confsteer.last_layer.readout import Readout, ReadoutState
from confsteer.model.anatomy import Anatomy, LastLayerStates
from confsteer.model.experts import MixtureAnatomy, writes_error
from confsteer.model.layers import adapters_off, own_arithmetic, relative_error
from confsteer.model.locate import locate, probe_ids, probe_logits, unwrap

_verified: weakref.WeakKeyDictionary[nn.Module, Anatomy] = weakref.WeakKeyDictionary()
_looking = threading.Lock()


def dissect(model: nn.Module) -> Anatomy:
    """Find the `Anatomy` of a loaded causal language model, and check it numerically: two short forward passes, once per model.

    PEFT's adapters and autocast are off during the check.

    Raises:
        UnsupportedModelError: something does not fit; the message says what.
    """
    # Take a lock: two threads that look at one model would meet each other's hooks.
    with _looking:
        anatomy, base = locate(model), unwrap(model)
        if _verified.get(base) != anatomy:
            with own_arithmetic(base), adapters_off(base):
                verify(base, anatomy)
            _verified[base] = anatomy
        return _verified[base]


def verify(base: PreTrainedModel, anatomy: Anatomy) -> None:
    """Check on the model at hand that its last layer is what `anatomy` says. Adapters and autocast must be off.

    Raises:
        UnsupportedModelError: logits are not ``unembed(norm(residual))``, or an activation does not move the residual by
            its neuron's write.
    """
    name = base.config.model_type
    ids = probe_ids(anatomy.vocab_size)
    states: list[LastLayerStates] = []
    with anatomy.recording(states.append):
        logits = probe_logits(base, ids)
        if len(states) != 1:
            raise UnsupportedModelError(
                f"{name}: the last MLP projection and the final norm should run once, in this order, in a forward pass; "
                f"they ran {len(states)} times"
            )
        before = states.pop()
    # Allow for half precision even with float32 weights: autocast inside ``forward``, or quantised layers below.
    halves = {anatomy.dtype, before.activations.dtype} & {torch.bfloat16, torch.float16}
    tolerance = 5e-2 if halves else 1e-3
    neurons = torch.linspace(0, anatomy.n_neurons - 1, steps=min(4, anatomy.n_neurons), device="cpu").long()
    readout = anatomy.readout(neurons=neurons)
    device = readout.w_out.device
    mlp_output = None if before.mlp_output is None else before.mlp_output.to(device)
    state = readout.state(before.residual.to(device), mlp_output)
    if not torch.isfinite(logits).all():
        raise UnsupportedModelError(f"{name}: the model's logits are not finite; its weights may be damaged")
    ours, theirs = readout.logits(state.residual), logits.flatten(0, -2).float().to(device)
    error = relative_error(ours - ours.mean(dim=-1, keepdim=True), theirs - theirs.mean(dim=-1, keepdim=True))
    if not error < tolerance:
        raise UnsupportedModelError(
            f"{name}: its logits are not its unembedding applied to its final norm (relative error {error:.1e}, at most "
            f"{tolerance:.0e}); something else happens to them"
        )
    if isinstance(anatomy, MixtureAnatomy):
        error = writes_error(anatomy, lambda: probe_logits(base, ids))
    else:
        error = _push_error(base, anatomy, neurons, readout, state)
    if not error < tolerance:
        raise UnsupportedModelError(
            f"{name}: a neuron of the last MLP does not move the residual by its output weights (relative error {error:.1e}, "
            f"at most {tolerance:.0e}); something else happens to the MLP's output before it is added"
        )


def _push_error(base: PreTrainedModel, anatomy: Anatomy, neurons: Tensor, readout: Readout, state: ReadoutState) -> float:
    """Push the neurons of `readout` in the model, and compare the residual's move with the closed form: the relative error."""
    # Push by as much as is there, so that rounding in half precision stays small beside it.
    write, onto = readout.w_out, state.residual
    if readout.write_norm is not None and state.mlp_output is not None:
        write, onto = readout.write_norm.inputs, state.mlp_output
    push = float(onto.norm(dim=-1).mean() / write.sum(dim=0).norm().clamp_min(1e-12))

    def push_activations(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        pushed = args[0].clone()
        pushed[..., neurons.to(pushed.device)] += push
        return (pushed, *args[1:])

    after: list[LastLayerStates] = []
    with anatomy.down_proj.register_forward_pre_hook(push_activations, prepend=True), anatomy.recording(after.append):
        probe_logits(base, probe_ids(anatomy.vocab_size))
    moved = readout.centre(after[0].residual.to(state.residual.device)) - state.residual
    expected = readout.residual_after(state, torch.full_like(write[:, 0], push)[None]) - state.residual
    return relative_error(moved, expected)
