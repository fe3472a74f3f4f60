"""A mixture of experts as the last layer of vLLM's model: its experts, their weights, and the check of both.

vLLM's kernels cannot be opened, and pack the experts' weights in ways of their own. So the weights are kept as they were loaded,
until the rows of the profile's neurons are read. Then the kernel itself is asked for the output of every expert. The output must
be what the kept weights give. Later, after weights may have changed, it must be the same again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from confsteer.errors import UnsupportedModelError
from confsteer.profile.profile import Profile
from confsteer.runtimes.vllm.out_of_reach import experts_out_of_reach
from confsteer.runtimes.vllm.worker.edits import ACTIVATIONS, OutputEdit, RoutedEdit, Rows
from confsteer.runtimes.vllm.worker.find import (
    NORM_TOLERANCE,
    Projection,
    find_norms,
    layer_of,
    norm_errors,
    other_weights,
    writes_of,
)
from confsteer.runtimes.vllm.worker.table import SteeringTable

INTERLEAVED = ("swigluoai",)
"""Activation functions whose gate and up projections alternate their rows, and do not follow each other."""
ANSWER_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative error of an expert's output that rounding explains, in each precision."""
SAME_ANSWERS = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
"""Largest relative difference between an expert's outputs for one input that the order of sums explains."""


class Loaded(NamedTuple):
    """Weights of a layer's experts as they were loaded, on the CPU: this rank's part of each expert."""

    w13: Tensor
    """Gate and up projection, ``[experts, 2 · units, d_model]``."""
    w2: Tensor
    """``[experts, d_model, units]``."""
    w13_bias: Tensor | None
    """``[experts, 2 · units]``."""
    w2_bias: Tensor | None
    """``[experts, d_model]``."""

    @classmethod
    def of(cls, experts: nn.Module) -> Loaded:
        """Copy the weights that vLLM's module of experts has at the moment."""
        names = ("w13_weight", "w2_weight", "w13_bias", "w2_bias")
        tensors = (getattr(experts, name, None) for name in names)
        w13, w2, w13_bias, w2_bias = (None if t is None else t.detach().to("cpu", copy=True) for t in tensors)
        assert w13 is not None and w2 is not None  # noqa: PT018
        return cls(w13, w2, w13_bias, w2_bias)

    def rows(self, experts: Sequence[int], units: Sequence[int], activation: str, like: Tensor) -> Rows:
        """Read the rows of some neurons by expert and number within, on the device and in the precision of a tensor."""
        expert, unit = (torch.tensor(one, dtype=torch.int64) for one in (experts, units))
        gate, up = (2 * unit, 2 * unit + 1) if activation in INTERLEAVED else (unit, unit + self.w13.shape[1] // 2)
        bias = [None, None] if self.w13_bias is None else [self.w13_bias[expert, gate], self.w13_bias[expert, up]]
        found = [self.w13[expert, gate], self.w13[expert, up], *bias, self.w2[expert, :, unit]]
        gate_row, up_row, gate_bias, up_bias, writes = (None if tensor is None else tensor.to(like) for tensor in found)
        assert gate_row is not None and up_row is not None and writes is not None  # noqa: PT018
        return Rows(gate_row, up_row, gate_bias, up_bias, writes)

    def answer(self, inputs: Tensor, activation: str) -> Tensor:
        """Compute the output of every expert, float32 ``[experts, d_model]``, for an input of its own ``[experts, d_model]``."""
        units, answers = range(self.w2.shape[2]), []
        for expert in range(len(self.w13)):
            rows = self.rows([expert] * len(units), units, activation, self.w13.float()[:0])
            gate, up = linear(inputs[expert], rows.gate, rows.gate_bias), linear(inputs[expert], rows.up, rows.up_bias)
            answers.append(ACTIVATIONS[activation](gate, up) @ rows.writes)
        return torch.stack(answers) if self.w2_bias is None else torch.stack(answers) + self.w2_bias.float()


@contextlib.contextmanager
def keeping_experts(profile: Profile) -> Iterator[list[Loaded]]:
    """Keep the weights of the last layer's experts that are loaded within the context, before a kernel packs them.

    Nothing is kept if the profile has no neurons in them.
    """
    kept: list[Loaded] = []
    if profile.model.experts is None or not profile.steerable:
        yield kept
        return
    process = UnquantizedFusedMoEMethod.process_weights_after_loading

    @functools.wraps(process)
    def keep_and_process(self: Any, experts: Any) -> Any:
        if str(profile.model.layer) in experts.layer_name.split("."):
            kept.append(Loaded.of(experts))
        return process(self, experts)

    UnquantizedFusedMoEMethod.process_weights_after_loading = keep_and_process
    try:
        yield kept
    finally:
        UnquantizedFusedMoEMethod.process_weights_after_loading = process


class Experts(NamedTuple):
    """The routed experts of the last layer."""

    name: str
    runner: MoERunner

    @property
    def routed(self) -> RoutedExperts:
        """The module that has the weights."""
        return self.runner.routed_experts

    @property
    def activation(self) -> str:
        """Name of the activation function."""
        return str(self.routed.activation.value)

    def asked(self) -> Tensor:
        """The input of each expert in `answers`, float32 ``[experts, d_model]``."""
        asked = torch.randn(self.routed.local_num_experts, self.routed.hidden_size, generator=torch.Generator().manual_seed(0))
        dtype: torch.dtype = self.runner.moe_config.in_dtype
        return asked.to(dtype).float()

    def answers(self) -> Tensor:
        """Ask the kernel for the output of every expert for an input of its own, ``[experts, d_model]`` on the CPU."""
        routed, count = self.routed, self.routed.local_num_experts
        device = routed.w2_weight.device
        # Give weight only to the first of each token's experts, which is the one that is asked.
        chosen = (torch.arange(count)[:, None] + torch.arange(routed.top_k)) % count
        weights = torch.zeros(count, routed.top_k)
        weights[:, 0] = 1
        indices = routed.quant_method.topk_indices_dtype or torch.int32
        with torch.no_grad():
            output = type(routed).forward_modular(
                routed,
                x=self.asked().to(device, routed.moe_config.in_dtype),
                topk_weights=weights.to(device),
                topk_ids=chosen.to(device, indices),
            )
        assert isinstance(output, Tensor)
        return output.cpu()


def answers_error(answers: Tensor, expected: Tensor) -> float:
    """Compare outputs of experts, ``[experts, d_model]``, by the largest relative error of any expert."""
    error = (answers.float() - expected.float()).norm(dim=1) / expected.float().norm(dim=1).clamp_min(1e-12)
    return float(error.max())


def find_experts(model: nn.Module, profile: Profile) -> Experts:
    """
    Raises:
        UnsupportedModelError: the last layer has no experts, or they cannot be steered. The message gives the reason.
    """
    identity = profile.model
    found = [
        Experts(name, module)
        for name, module in model.named_modules()
        if isinstance(module, MoERunner) and str(identity.layer) in name.split(".")
    ]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"vLLM's {type(model).__name__} has {len(found)} mixtures of experts in layer {identity.layer}, and the profile is "
            "of one: it is of another model, or vLLM runs this one by other modules than its own"
        )
    experts = found[0]
    if reason := _reason(experts, profile):
        raise experts_out_of_reach(profile, reason)
    return experts


def _reason(experts: Experts, profile: Profile) -> str | None:
    """Find the reason why these experts cannot be steered; None if they can. The configuration was checked before."""
    runner, routed, sizes = experts.runner, experts.routed, profile.model.experts
    config, method = runner.moe_config, routed.quant_method
    assert sizes is not None
    reasons = {
        f"vLLM has quantised them ({type(method).__name__})": not isinstance(method, UnquantizedFusedMoEMethod),
        "the kernel that vLLM has chosen routes tokens itself (--moe-backend chooses another)": bool(method.is_monolithic),
        "each rank's output is summed up inside the kernel": runner._fused_output_is_reduced,
        "they weigh their inputs": routed.apply_router_weight_on_input,
        "they work in a space of their own": runner.routed_input_transform is not None,
        "the shared expert is one of them": routed.expert_map_manager.num_fused_shared_experts > 0,
        f"their activation function is {experts.activation}": experts.activation not in ACTIVATIONS,
        "their activations are limited": routed.swiglu_limit is not None and experts.activation not in INTERLEAVED,
        f"there are {config.num_experts} of {config.intermediate_size} neurons, and the profile has {sizes}": (
            (config.num_experts, config.intermediate_size) != (sizes.number, sizes.units)
        ),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


class RoutedNeurons(NamedTuple):
    """The profile's neurons of routed experts that this rank holds."""

    experts: Experts
    positions: list[int]
    """Their positions in `Profile.steerable`."""
    of_expert: list[int]
    """Expert of each."""
    rows: Rows
    answers: Tensor
    """See `Experts.answers`."""

    def steer(self, table: SteeringTable, first: int) -> RoutedEdit:
        """Steer them from now on, by the table's columns from `first` on. Call it before compilation."""
        routed = self.experts.routed
        of_expert = torch.tensor(self.of_expert, device=self.rows.writes.device)
        scale = float(self.experts.runner.routed_scaling_factor)
        edit = RoutedEdit(table, first, self.rows, self.experts.activation, experts=of_expert, output_scale=scale)
        routed.add_module(MODULE, edit)
        run = routed.forward_modular

        @functools.wraps(run)
        def forward_modular(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            # Copy the input: kernels may write into it.
            change = edit(x, topk_weights, topk_ids)
            output = run(x, topk_weights, topk_ids, *args, **kwargs)
            if not isinstance(output, Tensor):
                raise UnsupportedModelError("vLLM's kernel leaves the experts' outputs unsummed: choose another --moe-backend")
            return _sum(output, change)

        # Replace the method: it is called by this name, inside the operator if there is one, and is no module to hook.
        routed.forward_modular = forward_modular
        return edit


MODULE = "confsteer"
"""Name of an edit among the modules where it is attached."""


def find_routed(model: nn.Module, profile: Profile, loaded: Sequence[Loaded]) -> RoutedNeurons:
    """Find the profile's neurons among the experts of `model`, and check that the kernel computes what it should.

    Args:
        model: the model as vLLM loaded it.
        profile: profile of this model, a mixture of experts.
        loaded: weights that `keeping_experts` kept.

    Raises:
        UnsupportedModelError: its experts cannot be steered. The message gives the reason.
        ProfileMismatchError: it has other weights.
    """
    experts, sizes = find_experts(model, profile), profile.model.experts
    assert sizes is not None
    if len(loaded) != 1:
        raise experts_out_of_reach(
            profile, "their weights were loaded as a kernel wants them, by another way than from a checkpoint"
        )
    (weights,) = loaded
    config, norms = experts.runner.moe_config, find_norms(model, experts.name, profile)
    per_rank = sizes.units // config.tp_size
    first = config.tp_rank * per_rank
    device_norms = norms._replace(final=norms.final.to(torch.device("cpu")))
    errors = [
        norm_errors(profile, device_norms.seen(weights.w2[expert, : profile.model.d_model, :per_rank].T.float()), row + first)
        for expert, row in enumerate(range(0, sizes.n_routed, sizes.units))
    ]
    if not float(torch.cat(errors).max()) <= NORM_TOLERANCE:
        raise other_weights(profile, f"{experts.name}: {float(torch.cat(errors).median()):.1e}")
    answers, expected = experts.answers(), weights.answer(experts.asked(), experts.activation)
    error = answers_error(answers, expected)
    if not error <= ANSWER_TOLERANCE[config.in_dtype]:
        raise experts_out_of_reach(profile, f"vLLM's kernel does not compute what they should (relative error {error:.1e})")
    pairs = [(position, *divmod(neuron.index, sizes.units)) for position, neuron in enumerate(profile.steerable)]
    held = [(p, e, u - first) for p, e, u in pairs if e < sizes.number and first <= u < first + per_rank]
    positions, of_expert, units = ([pair[i] for pair in held] for i in range(3))
    like = torch.empty(0, dtype=config.in_dtype, device=experts.routed.w2_weight.device)
    rows = weights.rows(of_expert, units, experts.activation, like)
    return RoutedNeurons(experts, positions, of_expert, rows, answers)


def _sum(output: Tensor, change: Tensor) -> Tensor:
    """Add a change to an output. The output may lack the padding that the change has."""
    both = output.float() + change[:, : output.shape[1]]
    return both.to(output.dtype)


class GatedNeurons(NamedTuple):
    """The profile's neurons of a shared expert behind a gate, a linear layer and a sigmoid, that this rank holds."""

    mlp: Any
    """The shared expert."""
    rows: Rows

    def steer(self, table: SteeringTable) -> None:
        """Steer them from now on, by the table's columns from the first on. Call it before compilation."""
        self.mlp.add_module(MODULE, OutputEdit(table, 0, self.rows, "silu"))

        def add_change(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
            weight = module.expert_gate(args[0])[0].float().sigmoid()
            return _sum(output, module.get_submodule(MODULE).change(args[0], weight, None))

        self.mlp.register_forward_hook(add_change)


def find_gated(model: nn.Module, projection: Projection, profile: Profile) -> GatedNeurons | None:
    """Find the profile's neurons of a shared expert with a gate. None if it has no gate.

    Raises:
        UnsupportedModelError: it has a gate of an unknown form.
    """
    mlp: Any = model.get_submodule(projection.name.rpartition(".")[0])
    if getattr(mlp, "expert_gate", None) is None:
        layer = model.get_submodule(layer_of(projection.name, profile.model.layer))
        if any("shared" in name and name.endswith("gate") for name, _ in layer.named_modules()):
            raise experts_out_of_reach(profile, "a gate on the shared expert is not where vLLM's other models have it")
        return None
    if not isinstance(getattr(mlp, "act_fn", None), SiluAndMul) or not hasattr(mlp, "gate_up_proj"):
        raise experts_out_of_reach(profile, "a shared expert with a gate is not of the form that vLLM's other models have")
    answers, units = writes_of(mlp.gate_up_proj).T, torch.tensor(projection.units(profile), dtype=torch.int64)
    found = (answers[units], answers[units + len(answers) // 2], projection.writes[units])
    gate, up, writes = (rows.to(mlp.gate_up_proj.params_dtype) for rows in found)
    return GatedNeurons(mlp, Rows(gate, up, None, None, writes))
