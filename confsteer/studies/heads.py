"""Induction heads and the entropy neurons that they drive (Stolfo et al. 2024, arXiv 2406.16254, section 5).

A stretch of random tokens is read twice. At the second reading an induction head attends from a token to the one after its first
occurrence. BOS ablation removes a head: its attention row becomes one-hot on position 0. The change of the entropy neurons'
activations at the second reading is the part that comes from induction.

At position 0 a causal head can attend to nothing else. So its output there is the output of a one-hot row at any position. The
ablation copies it, and needs no attention weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from confsteer.bars import progress_bar
from confsteer.errors import UnsupportedModelError
from confsteer.last_layer.readout import Readout
from confsteer.last_layer.scores import TokenScores
from confsteer.model.anatomy import Anatomy
from confsteer.model.dissect import dissect
from confsteer.model.locate import input_device, unwrap
from confsteer.model.states import BATCH_SIZE, Recording
from confsteer.profile.profile import Profile
from confsteer.results.bootstrap import Change, Interval, ratio_interval
from confsteer.results.result import Result
from confsteer.studies.repetition import DEFAULT_REPETITION, Repetition, check_repetition, random_repeats
from confsteer.text.windows import FIRST_POSITIONS, Windows

INDUCTION_SCORE = 0.7
"""Score above which a head counts as an induction head, as in the paper."""
Head = tuple[int, int]
"""Layer and number of an attention head."""


class DrivenNeuron(Result):
    """An entropy neuron's mean activation, and its change by the ablation."""

    index: int
    first_mean: float
    """Mean of the first reading, unsteered."""
    second_mean: float
    """Mean of the second reading, unsteered."""
    change: Interval
    """Change of the second reading's mean by the ablation."""


class HeadStudy(Result):
    """Induction heads, and BOS ablation of all of them together. Intervals are of paired differences, over sequences."""

    model: str
    half: int
    sequences: int
    seed: int
    scores: tuple[tuple[float, ...], ...]
    """Score of every head, by layer: mean attention from a token of the second reading to the one after its first occurrence."""
    heads: tuple[Head, ...]
    """Heads that were ablated: those with a score above `INDUCTION_SCORE`."""
    neurons: tuple[DrivenNeuron, ...]
    entropy: Change
    """Change of the second reading's mean entropy."""
    loss: Change


def bos_ablation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    profile: Profile,
    *,
    repeat: Repetition = DEFAULT_REPETITION,
    progress: bool = False,
) -> HeadStudy:
    """Find the induction heads on repeated random tokens, ablate them, and measure the change in the entropy neurons.

    Args:
        model: the profile's model; it is put in evaluation mode.
        tokenizer: its tokenizer.
        profile: profile with the entropy neurons.
        repeat: number and length of the stretches of random tokens, and their seed.
        progress: whether to show a progress bar.

    Raises:
        NoNeuronsError: the profile has no entropy neurons.
        SettingError: `repeat` is out of range.
        ProfileMismatchError: the profile is of another model.
        UnsupportedModelError: the model gives no attention weights, or its heads were not found. See also `confsteer.steer`.
    """
    neurons = torch.tensor(profile.found("entropy"))
    check_repetition(model, tokenizer, repeat)
    model.eval()
    anatomy = dissect(model)
    anatomy.require_dense("the study of induction heads")
    profile.check_model(anatomy)
    windows = random_repeats(tokenizer, profile.model.tokenizer_size, repeat)
    scores = induction_scores(model, windows, repeat.half, progress=progress)
    heads = [(layer, head) for layer, head in (scores > INDUCTION_SCORE).nonzero().tolist()]
    with torch.no_grad():
        readout = anatomy.readout(profile.model.tokenizer_size)

        def read() -> _Sums:
            # Make a new recording each time: the second pass runs another model.
            recording = Recording(model, anatomy, windows, readout.unembedding.device, readout=readout)
            return _read(recording, readout, neurons, repeat.half, progress)

        unsteered = read()
        with ablated(model, anatomy, heads):
            after = read()
    counted = windows.n_tokens // repeat.sequences - FIRST_POSITIONS - 1 - repeat.half
    n = torch.full((repeat.sequences,), float(counted), dtype=torch.float64)
    return HeadStudy(
        model=profile.model.id,
        half=repeat.half,
        sequences=repeat.sequences,
        seed=repeat.seed,
        scores=tuple(tuple(layer) for layer in scores.tolist()),
        heads=tuple(heads),
        neurons=tuple(
            DrivenNeuron(
                index=int(index),
                first_mean=float(unsteered.first[:, row].sum() / n.sum()),
                second_mean=float(unsteered.second[:, row].sum() / n.sum()),
                change=ratio_interval(after.second[:, row] - unsteered.second[:, row], n),
            )
            for row, index in enumerate(neurons)
        ),
        entropy=Change.of(after.entropy - unsteered.entropy, unsteered.entropy, n),
        loss=Change.of(after.loss - unsteered.loss, unsteered.loss, n),
    )


class _Sums(NamedTuple):
    """Sums over the positions of a reading, float64."""

    first: Tensor
    """Activations at the first reading, ``[sequences, neurons]``."""
    second: Tensor
    """Activations at the second reading, ``[sequences, neurons]``."""
    entropy: Tensor
    """Entropy at the second reading, ``[sequences]``."""
    loss: Tensor


def _read(recording: Recording, readout: Readout, neurons: Tensor, half: int, show: bool) -> _Sums:
    """Run the model, as it is now, over every sequence."""
    first, second, scored = [], [], []
    tokens = recording.windows.n_tokens
    with progress_bar("sequences", tokens, show=show) as bar:
        for batch in recording.read(bar.update):
            positions = len(batch.targets) // len(batch.window.unique())
            activations = batch.activations[:, neurons].double().cpu().view(-1, positions, len(neurons))
            first.append(activations[:, : positions - half].sum(dim=1))
            second.append(activations[:, half:].sum(dim=1))
            token = TokenScores.of_residual(readout, batch.residual, batch.targets)
            values = torch.stack([token.entropy, token.nll]).double().cpu().view(2, -1, positions)
            scored.append(values[:, :, half:].sum(dim=2))
    entropy, loss = torch.cat(scored, dim=1)
    return _Sums(torch.cat(first), torch.cat(second), entropy, loss)


def induction_scores(model: PreTrainedModel, windows: Windows, half: int, *, progress: bool = False) -> Tensor:
    """Compute the mean attention of every head from a token of the second reading to the one after its first occurrence.

    Args:
        model: the model, in evaluation mode. During the call its attention is computed eagerly.
        windows: stretches of `half` tokens read twice, see `read_twice`.
        half: tokens of a stretch.
        progress: whether to show a progress bar.

    Returns:
        ``[layers, heads]`` float64 on the CPU.

    Raises:
        UnsupportedModelError: the model gives no attention weights.
    """
    base, device = unwrap(model), input_device(model)
    usual = base.config._attn_implementation
    total = torch.zeros(())
    base.set_attn_implementation("eager")
    try:
        with (
            torch.no_grad(),
            progress_bar("heads", windows.n_tokens, show=progress) as bar,
        ):
            for batch in windows.batches(BATCH_SIZE):
                output = base.base_model(input_ids=batch.input_ids.to(device), use_cache=False, output_attentions=True)
                if not output.attentions or any(weights is None for weights in output.attentions):
                    raise UnsupportedModelError(f"{base.config.model_type} gives no attention weights: its heads have no scores")
                # Take keys from the second token of the stretch on, which come after a first occurrence.
                first_key = batch.input_ids.shape[1] - 2 * half + 1
                diagonals = [w.diagonal(1 - half, dim1=2, dim2=3)[..., first_key:].double().cpu() for w in output.attentions]
                total = total + torch.stack([diagonal.mean(dim=2).sum(dim=0) for diagonal in diagonals])
                bar.update(int(batch.attention_mask.sum()))
    finally:
        base.set_attn_implementation(usual)
    return total / len(windows)


@contextlib.contextmanager
def ablated(model: PreTrainedModel, anatomy: Anatomy, heads: Iterable[Head]) -> Iterator[None]:
    """Make the attention rows of `heads` one-hot on position 0 within the context. Batches must not be padded on the left.

    Raises:
        UnsupportedModelError: the output projections of the attention were not found.
    """
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    base = unwrap(model)
    stacks = (module for module in base.modules() if isinstance(module, nn.ModuleList) and anatomy.last_layer in set(module))
    layers, n_heads = next(stacks), base.config.get_text_config().num_attention_heads
    with contextlib.ExitStack() as stack:
        for layer, chosen in by_layer.items():
            projection = _output_projection(layers[layer], base.config.model_type)

            def edit(module: nn.Module, args: tuple[Any, ...], chosen: list[int] = chosen) -> tuple[Any, ...]:
                by_head = args[0].unflatten(-1, (n_heads, -1)).clone()  # [batch, positions, heads, d_head]
                by_head[:, :, chosen] = by_head[:, :1, chosen]
                return (by_head.flatten(-2), *args[1:])

            stack.callback(projection.register_forward_pre_hook(edit).remove)
        yield


def _output_projection(layer: nn.Module, model_type: str) -> nn.Module:
    """Find the last linear map in the layer's attention."""
    attention = [m for name, m in layer.named_children() if "attn" in name or "attention" in name]
    linear = [m for module in attention for m in module.modules() if isinstance(m, nn.Linear | Conv1D)]
    if not linear:
        raise UnsupportedModelError(
            f"{model_type}: no attention was found in its layers ({type(layer).__name__}): no part with attn or attention in its "
            "name has a linear layer"
        )
    return linear[-1]
