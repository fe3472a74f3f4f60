"""A mixture of experts as the last layer: its modules, its neurons' activations and writes, and the check of both.

transformers keeps the experts of a layer in one module with three-dimensional weights, and runs them by one of several kernels.
None of the kernels is changed here. The module's inputs are hidden states, chosen experts and routing weights: from them every
neuron's activation is computed again. A steering is added to the module's output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from confsteer.errors import UnsupportedModelError
from confsteer.last_layer.experts import Experts
from confsteer.model.anatomy import Anatomy, LastLayerStates
from confsteer.model.layers import is_plain, on_device, output_weights, relative_error, sizes, without_adapter

WRITE_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm")
"""Names of a norm on the output of a layer's experts, before it is added to the residual."""


class Routed(NamedTuple):
    """Input of the experts in one pass, flattened over batch and positions."""

    inputs: Tensor
    """``[tokens, d_model]``. Llama 4 weights the input of each expert: ``[experts, tokens, d_model]``."""
    experts: Tensor
    """Experts that each token is routed to, ``[tokens, slots]``; −1 for none."""
    weights: Tensor
    """Routing weights of their outputs, ``[tokens, slots]``."""

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Routed:
        """Read the arguments of the experts' module."""
        given: list[Tensor] = [*args, *kwargs.values()]
        if not _weighs_inputs(module):
            inputs, experts, weights = (tensor.flatten(0, -2) for tensor in given[:3])
            return cls(inputs, experts, weights)
        number = module.get_parameter("down_proj").shape[0]
        inputs = given[0].unflatten(0, (number, -1))
        chosen = (inputs != 0).any(dim=-1).T  # an expert that is not chosen has the weight 0
        experts = torch.where(chosen, torch.arange(number, device=chosen.device), -1)
        return cls(inputs, experts, torch.ones_like(inputs[0, :, :1]).expand(-1, number))

    def of_expert(self, number: int) -> Tensor:
        """Inputs of one expert for all tokens, ``[tokens, d_model]``."""
        return self.inputs if self.inputs.dim() == 2 else self.inputs[number]


@dataclass(frozen=True, kw_only=True)
class MixtureAnatomy(Anatomy):
    """The modules at the end of a mixture of experts. `down_proj` is the module of the routed experts."""

    slots: int
    """Number of routed experts that work on each token."""
    shared: nn.Module | None
    """Output projection of the shared expert."""
    shared_gate: nn.Module | None
    """Linear layer that gates the shared expert: the sigmoid of its output multiplies the expert's."""
    shared_mlp: nn.Module | None
    """The shared expert."""
    stored: Callable[[int], Tensor] | None = None
    """Reader of an expert's output weights, ``[units, d_model]``, for a model that was laid out without them."""

    @property
    def experts(self) -> Experts:
        number, units = down_proj_of(self.down_proj).shape[:2]
        return Experts(number, units, 0 if self.shared is None else sizes(self.shared)[0])

    @property
    def n_neurons(self) -> int:
        return self.experts.n_neurons

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        return (self.down_proj,) if self.shared is None else (self.down_proj, self.shared)

    @property
    def keeps_rows(self) -> bool:
        """Whether the weights of an expert are stored as ``[units, d_model]``, and not the other way round."""
        return _is_transposed(self.down_proj)

    @property
    def linear_projections(self) -> tuple[nn.Module, ...]:
        return self.projections[1:]

    @property
    def quantised(self) -> bool:
        # Look at the shared expert and the unembedding only: quantised experts were refused.
        return not all(is_plain(module) for module in (self.unembedding, self.shared) if module is not None)

    def w_out(self, neurons: Tensor | None = None) -> Tensor:
        device = self.unembedding.get_parameter("weight").device
        if neurons is None:
            return torch.cat([rows.to(device) for rows in self.writes()])
        if not len(neurons):
            return torch.empty(0, self.d_model, dtype=self.dtype, device=device)
        experts, neurons = self.experts, neurons.cpu()
        of_shared = neurons >= experts.n_routed
        routed, shared = neurons[~of_shared], neurons[of_shared] - experts.n_routed
        rows = self.some_writes(routed // experts.units, routed % experts.units, shared)
        return rows[torch.cat([(~of_shared).nonzero()[:, 0], of_shared.nonzero()[:, 0]]).argsort().to(rows.device)]

    def some_writes(self, experts: Tensor, units: Tensor, shared: Tensor) -> Tensor:
        """Read the output weights of some neurons: units ``[n]`` of experts, then units ``[m]`` of the shared one."""
        with on_device(self.down_proj):
            down = down_proj_of(self.down_proj).detach()
            rows = down[experts.to(down.device), units.to(down.device)]
        if self.shared is None or not len(shared):
            return rows
        with on_device(without_adapter(self.shared)):
            writes = output_weights(self.shared)
            return torch.cat([rows, writes[shared.to(writes.device)].to(rows)])

    def row(self, neuron: int) -> Tensor:
        """Find the output weights of a neuron, ``[d_model]``, as a view: writing into it changes the model."""
        experts = self.experts
        if neuron < experts.n_routed:
            return down_proj_of(self.down_proj).detach()[neuron // experts.units, neuron % experts.units]
        assert self.shared is not None
        return output_weights(self.shared)[neuron - experts.n_routed]

    def writes(self) -> Iterator[Tensor]:
        """Yield the output weights of one expert after the other, ``[units, d_model]`` each, the shared one last."""
        if self.stored is not None:
            yield from map(self.stored, range(self.experts.number))
        else:
            with on_device(self.down_proj):
                yield from down_proj_of(self.down_proj).detach()
        if self.shared is not None:
            with on_device(without_adapter(self.shared)):
                yield output_weights(self.shared)

    def _note(self, pending: dict[str, Tensor], stack: contextlib.ExitStack) -> None:
        def keep_routed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            routed = Routed.of(module, args, kwargs)
            experts = routed.experts.topk(self.slots, dim=1).values if _weighs_inputs(module) else routed.experts
            routed = routed._replace(experts=experts, weights=routed.weights[:, : experts.shape[1]])
            pending["experts"] = experts.detach()
            pending["activations"] = slot_activations(module, routed).detach().flatten(1)

        def keep_shared(module: nn.Module, args: tuple[Any, ...]) -> None:
            pending["shared"] = args[0].detach().flatten(0, -2)

        def keep_gate(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            pending["gate"] = output.detach().flatten(0, -2).sigmoid()

        stack.callback(self.down_proj.register_forward_pre_hook(keep_routed, with_kwargs=True).remove)
        if self.shared is not None:
            stack.callback(self.shared.register_forward_pre_hook(keep_shared).remove)
        if self.shared_gate is not None:
            stack.callback(self.shared_gate.register_forward_hook(keep_gate).remove)

    def _gather(self, pending: dict[str, Tensor], residual: Tensor) -> LastLayerStates | None:
        if "activations" in pending and self.shared is not None:
            shared, gate = pending.pop("shared"), pending.pop("gate", None)
            shared = shared if gate is None else shared * gate.to(shared)
            pending["activations"] = torch.cat([pending["activations"], shared.to(pending["activations"])], dim=1)
        return super()._gather(pending, residual)


def find_experts(last_layer: nn.Module, model_type: str) -> str | None:
    """Find the path of the routed experts inside a layer; None in a dense layer.

    Raises:
        UnsupportedModelError: it has experts of an unknown form.
    """
    found: list[tuple[str, nn.Module]] = [
        (name, module)
        for name, module in last_layer.named_modules()
        if name.split(".")[-1] == "experts" or type(module).__name__.endswith("Experts")
    ]
    if not found:
        return None
    (path, module), *others = found
    if others or not (hasattr(module, "is_transposed") or _weighs_inputs(module)) or not _has_rows(module):
        raise UnsupportedModelError(
            f"the last layer of {model_type} is a mixture of experts ({', '.join(name for name, _ in found)}) that is not kept "
            "as transformers keeps most: one module of unquantised weights, without adapters, that is given hidden states, "
            "chosen experts and their weights. confsteer supports no other"
        )
    return path


def with_experts(anatomy: Anatomy, config: Any) -> MixtureAnatomy:
    """Add to an anatomy, whose `down_proj` is the routed experts, the other parts of a mixture of experts.

    Raises:
        UnsupportedModelError: it has shared experts of an unknown form.
    """
    named = [(name, m) for name, m in anatomy.last_layer.named_modules() if name.split(".")[-1].startswith("shared")]
    gates = [module for name, module in named if name.endswith("gate")]
    mlps = [module for name, module in named if not name.endswith("gate")]
    # The output projection is the last one to be registered.
    linear = [m for mlp in mlps for m in mlp.modules() if isinstance(m, nn.Linear) and sizes(m)[1] == anatomy.d_model][-1:]
    known = not gates or (mlps and all(hasattr(mlps[0], name) for name in ("gate_proj", "up_proj", "act_fn")))
    if not known or len(mlps) > 1 or len(gates) > 1 or len(linear) != len(mlps):
        raise UnsupportedModelError(
            f"the last layer of {config.model_type} has shared experts ({', '.join(name for name, _ in named)}) that are not one "
            "MLP with one output projection, which confsteer does not support"
        )
    return MixtureAnatomy(
        **{one.name: getattr(anatomy, one.name) for one in fields(anatomy) if not one.name.startswith("_")},
        slots=getattr(config, "num_experts_per_tok", 1),
        shared=linear[0] if linear else None,
        shared_gate=gates[0] if gates else None,
        shared_mlp=mlps[0] if mlps else None,
    )


def norm_after(last_layer: nn.Module) -> str | None:
    """Find the norm on the output of a layer's experts, by its name; None if there is none."""
    return next((name for name, _ in last_layer.named_children() if name in WRITE_NORMS), None)


def down_proj_of(module: nn.Module) -> Tensor:
    """Output weights of the experts, as a view ``[experts, units, d_model]``."""
    weight = module.get_parameter("down_proj")
    return weight if _is_transposed(module) else weight.transpose(1, 2)


def slot_activations(module: nn.Module, routed: Routed) -> Tensor:
    """Compute the factors of the writes of the neurons in each token's experts, ``[tokens, slots, units]``."""
    number, units, _ = down_proj_of(module).shape
    result = routed.inputs.new_zeros(*routed.experts.shape, units)
    for expert in range(number):
        rows, slot = (routed.experts == expert).nonzero(as_tuple=True)
        if len(rows):
            activations = _expert(module, routed.of_expert(expert)[rows], expert)
            result[rows, slot] = (activations.float() * routed.weights[rows, slot, None].float()).to(result.dtype)
    return result


def neuron_activations(module: nn.Module, routed: Routed, neurons: Sequence[tuple[int, int]]) -> Tensor:
    """Compute activations of some neurons as if every token were routed to them, without routing weights, ``[tokens, n]``.

    Args:
        module: the experts.
        routed: the input of the experts.
        neurons: expert and number of each neuron.
    """
    experts, units = zip(*neurons, strict=True)
    if routed.inputs.dim() == 2:
        return _neurons(module, routed.inputs, experts, units)
    # Go expert by expert: each has inputs of its own.
    each = [_neurons(module, routed.of_expert(expert), [expert], [unit]) for expert, unit in neurons]
    return torch.cat(each, dim=1)


def shared_activations(anatomy: MixtureAnatomy, inputs: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
    """Compute activations of some neurons of a shared expert with a gate, ``[tokens, n]``, and its gate, ``[tokens, 1]``."""
    mlp: Any = anatomy.shared_mlp
    assert anatomy.shared_gate is not None
    gate, up = (_some_outputs(linear, inputs, units) for linear in (mlp.gate_proj, mlp.up_proj))
    return mlp.act_fn(gate) * up, anatomy.shared_gate(inputs).sigmoid()


def _some_outputs(linear: nn.Module, inputs: Tensor, units: Tensor) -> Tensor:
    """Compute some outputs of a linear layer: where its weights are quantised or under an adapter, by way of all outputs."""
    if type(linear) is not nn.Linear or not is_plain(linear):
        outputs: Tensor = linear(inputs)
        return outputs[..., units]
    return nn.functional.linear(inputs, linear.weight[units], None if linear.bias is None else linear.bias[units])


def add_to_output(module: nn.Module, output: Tensor, change: Tensor) -> Tensor:
    """Add ``[tokens, d_model]`` to the output of the experts' module."""
    change = change.to(output.dtype)
    if _weighs_inputs(module):
        # Llama 4's output is that of each expert, to be added up.
        first = torch.arange(len(down_proj_of(module)), device=output.device) == 0
        change = (first[:, None, None] * change.expand(len(output) // len(first), -1)).flatten(0, 1)
    sum_of_both: Tensor = output.flatten(0, -2) + change
    return sum_of_both.view_as(output)


@torch.no_grad()
def writes_error(anatomy: MixtureAnatomy, run: Callable[[], Any], counted: slice = slice(None)) -> float:
    """Compare the neurons' writes to the residual with the model itself, in three passes: the largest relative error.

    The experts' output must be the activations times the writes. A change of that output must reach the residual, and so must a
    change of the shared expert's activations.

    Args:
        anatomy: the last layer.
        run: a function that runs the model, on the same text each time.
        counted: tokens to compare.
    """
    module, states = anatomy.down_proj, list[LastLayerStates]()
    with anatomy.recording(states.append):
        error, before = _output_error(module, run), states.pop()
        normed = before.mlp_output
        onto = (before.residual if normed is None else normed)[counted]
        # Push by as much as is there, so that rounding in half precision stays small beside it.
        size = float(onto.float().norm(dim=-1).mean())

        def moved_error(push: Tensor) -> float:
            """Relative error of the residual's move between the two passes, which should be `push`
            ``[tokens or 1, d_model]``.
            """
            moved = (states[-1].residual.float() - before.residual.float())[counted]
            push = push.to(moved.device).expand_as(before.residual)[counted]
            if anatomy.write_norm is None:
                return relative_error(moved, anatomy.residual_multiplier * push)
            norm = anatomy.write_norm
            return relative_error(moved, norm((onto.float() + push).to(onto.dtype)).float() - norm(onto).float())

        write = down_proj_of(module)[0].detach().float().sum(dim=0)
        push = (size / write.norm().clamp_min(1e-12) * write)[None]

        def push_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return add_to_output(module, output, push)

        with module.register_forward_hook(push_output):
            run()
        error = max(error, moved_error(push))
        if anatomy.shared is None:
            return error
        with on_device(without_adapter(anatomy.shared)):
            writes = output_weights(anatomy.shared).detach().float()
        by = size / float(writes.sum(dim=0).norm().clamp_min(1e-12))
        with anatomy.shared.register_forward_pre_hook(lambda module, args: (args[0] + by, *args[1:]), prepend=True):
            run()
        change = (states[-1].activations.float() - before.activations.float())[:, -len(writes) :]
        return max(error, moved_error(change.to(writes.device) @ writes))


def _output_error(module: nn.Module, run: Callable[[], Any]) -> float:
    """Compare the output of the experts with their neurons' activations times their writes."""
    errors: list[float] = []

    def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        ours, theirs = _output(module, Routed.of(module, args, kwargs)), output.flatten(0, -2)
        errors.append(relative_error(ours, theirs.float().unflatten(0, (-1, len(ours))).sum(dim=0)))

    with module.register_forward_hook(compare, with_kwargs=True):
        run()
    return max(errors)


def _output(module: nn.Module, routed: Routed) -> Tensor:
    """Add up the writes of all active neurons, and the experts' biases, ``[tokens, d_model]``."""
    activations, down = slot_activations(module, routed), down_proj_of(module)
    output = torch.zeros(len(activations), down.shape[-1], dtype=torch.float32, device=down.device)
    for expert, writes in enumerate(down):
        rows, slot = (routed.experts == expert).nonzero(as_tuple=True)
        output[rows] += activations[rows, slot].float() @ writes.float()
        if getattr(module, "has_bias", False):
            output[rows] += routed.weights[rows, slot, None].float() * module.get_parameter("down_proj_bias")[expert].float()
    return output


def _weighs_inputs(module: nn.Module) -> bool:
    """Whether these are the experts of Llama 4. Each of those is given all tokens, times its routing weights."""
    return type(module).__name__ == "Llama4TextExperts"


def _is_transposed(module: nn.Module) -> bool:
    return _weighs_inputs(module) or bool(module.is_transposed)


def _has_rows(module: nn.Module) -> bool:
    """Whether the weights are plain numbers in three dimensions, under the parameters' usual names."""
    name = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    weights = [dict(module.named_parameters(recurse=False)).get(one) for one in (name, "down_proj")]
    return all(w is not None and type(w.data) is Tensor and w.dim() == 3 and w.is_floating_point() for w in weights)


def _expert(module: nn.Module, inputs: Tensor, expert: int) -> Tensor:
    """Compute the activations of one expert, ``[tokens, units]``, of inputs ``[tokens, d_model]``."""
    name = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    weight = module.get_parameter(name)[expert]
    bias = module.get_parameter(f"{name}_bias")[expert] if getattr(module, "has_bias", False) else None
    return _activate(module, nn.functional.linear(inputs, weight.T if _is_transposed(module) else weight, bias))


def _neurons(module: nn.Module, inputs: Tensor, experts: Sequence[int], units: Sequence[int]) -> Tensor:
    """Compute the activations of some neurons of some experts, ``[tokens, n]``, of inputs ``[tokens, d_model]``."""
    gated = getattr(module, "has_gate", True)
    name = "gate_up_proj" if gated else "up_proj"
    stored = module.get_parameter(name)
    weight = stored.transpose(1, 2) if _is_transposed(module) else stored
    expert, unit = (torch.tensor(one, device=weight.device) for one in (experts, units))
    if not gated:
        columns = unit
    elif getattr(module, "is_concatenated", True):
        columns, expert = torch.cat([unit, unit + weight.shape[1] // 2]), expert.repeat(2)
    else:
        columns, expert = torch.stack([2 * unit, 2 * unit + 1], dim=1).flatten(), expert.repeat_interleave(2)
    bias = module.get_parameter(f"{name}_bias")[expert, columns] if getattr(module, "has_bias", False) else None
    return _activate(module, nn.functional.linear(inputs, weight[expert, columns], bias))


def _activate(module: nn.Module, projected: Tensor) -> Tensor:
    """Apply the experts' own activation function and their gate, in the order in which the module keeps them."""
    experts: Any = module
    activations: Tensor
    if hasattr(experts, "_apply_gate"):
        activations = experts._apply_gate(projected) if experts.has_gate else experts.act_fn(projected)
    else:
        gate, up = projected.chunk(2, dim=-1)
        activations = up * experts.act_fn(gate)
    return activations
