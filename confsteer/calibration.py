"""Model and text to profile."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import math
import warnings
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from confsteer.anatomy import dissect, dtype_name
from confsteer.capture import stream
from confsteer.corpus import Document, Windows, check_context, make_windows, vocabulary_size
from confsteer.discovery import select
from confsteer.discovery.effects import TokenStates, ablation_effects, argmax_changes
from confsteer.discovery.frequency import Unigram, chance_frequency_cosine, frequency_cosine, ranks_tokens
from confsteer.discovery.readout import Readout
from confsteer.discovery.response import ResponseCurve, ResponseMeans, choose_positions
from confsteer.discovery.streaming import ActivationMoments, EffectMeans, Estimate, NeuronEffects
from confsteer.discovery.weights import weight_statistics
from confsteer.errors import CorpusError
from confsteer.profile import DIALS, CorpusIdentity, Dial, Layer, Measurement, ModelIdentity, Neuron, Profile, Response
from confsteer.sampling import sample_windows

BATCH_SIZE = 4
"""Windows per forward pass: about a thousand tokens, enough to keep matrix products busy."""
DEFAULT_TOKENS = 25_600


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Document] | Windows | None = None,
    *,
    tokens: int | None = DEFAULT_TOKENS,
    window: int = 256,
    unigram_counts: NDArray[np.integer] | None = None,
    null_dims: int | None = None,
    seed: int = 0,
    source: str = "texts",
    progress: bool = False,
) -> Profile:
    """Find a model's entropy and token-frequency neurons and measure what turning them does.

    Three passes over the text: mean activations; effects of every neuron; exact effects of the selected neurons and the
    response curves. Memory does not grow with the text, but for four bytes per token.

    Args:
        model: a loaded causal language model; it is put in evaluation mode.
        tokenizer: its tokenizer.
        texts: one string per document, or conversations (see `confsteer.corpus.make_windows`), or windows already made, for
            which `tokens`, `window` and `source` are not used; sampled from the model itself if None.
        tokens: read at most this many; all if None.
        window: tokens per window, windows do not cross documents.
        unigram_counts: how often each token occurs in text like the model's training text, by id; counted in `texts` if None,
            with a warning if that is too little to rank tokens.
        null_dims: directions counted as the unembedding's effective null space; read off its spectrum if None.
        seed: of the random directions that give chance levels, and of sampling.
        source: what the text is, for the profile.
        progress: whether to show a progress bar.

    Returns:
        The profile; its lists are empty if the model has no such neurons.

    Raises:
        UnsupportedModelError: see `confsteer.anatomy.dissect`.
        CorpusError: the text is too short, or not of this model's tokenizer.
        SettingError: the window is too short or longer than the model's context, or `null_dims` out of range.
    """
    model.eval()
    anatomy = dissect(model)
    if texts is None:
        texts = sample_windows(
            model, tokenizer, tokens=DEFAULT_TOKENS if tokens is None else tokens, window=window, seed=seed, progress=progress
        )
    windows = (
        texts if isinstance(texts, Windows) else make_windows(texts, tokenizer, window=window, max_tokens=tokens, source=source)
    )
    check_context(windows.window, model.config)
    if (largest := int(windows.token_ids.max())) >= anatomy.vocab_size:
        raise CorpusError(
            f"the tokenizer gives ids up to {largest}, the model has {anatomy.vocab_size}: they do not belong together"
        )
    tokenizer_size = min(vocabulary_size(tokenizer), anatomy.vocab_size)
    if unigram_counts is None:
        counts = windows.counts(tokenizer_size)
        if not ranks_tokens(counts):
            warnings.warn(
                f"{windows.n_tokens:,} tokens of text are too few to rank the tokenizer's {tokenizer_size:,} by frequency, so "
                "token-frequency neurons and the unigram dial are of this text's frequencies only: give counts of text like the "
                "model's training text (unigram_counts, or --unigram FILE.npy), or more text",
                stacklevel=2,
            )
    else:
        counts = _checked_counts(unigram_counts, tokenizer_size)

    with torch.no_grad():
        readout = anatomy.readout(tokenizer_size)
        device = readout.unembedding.device
        unigram = Unigram.from_counts(counts.to(device))

        def states(stage: str) -> Iterator[TokenStates]:
            with tqdm(total=windows.n_tokens, desc=stage, unit="tok", unit_scale=True, disable=not progress) as bar:
                yield from stream(model, anatomy, windows, batch_size=BATCH_SIZE, device=device, on_read=bar.update)

        weights = weight_statistics(readout, null_dims=null_dims, seed=seed)
        cosine = frequency_cosine(readout, unigram)
        chance_cosine = chance_frequency_cosine(readout, unigram, seed=seed)
        moments = ActivationMoments(readout.n_neurons)
        for batch in states("1/3 activations"):
            moments.update(batch.activations)
        if moments.count == 0:
            raise CorpusError("no token of the text counts: its windows are too short")
        mean, means = moments.mean.to(device), EffectMeans(readout.n_neurons)
        for batch in states("2/3 effects"):
            means.update(*ablation_effects(readout, batch, mean, unigram), batch.window)
        effects = means.result()
        entropy = select.entropy_neurons(weights, effects)
        selected: dict[Dial, list[int]] = {
            "entropy": entropy,
            "unigram": select.frequency_neurons(effects, cosine, chance_cosine, excluding=entropy),
        }
        slopes: dict[Dial, Tensor] = {"entropy": effects.entropy_slope.value, "unigram": effects.unigram_slope.value}
        closer = _look_closer(states("3/3 responses"), readout, selected, slopes, moments, unigram)

    statistics = {
        "norm": weights.norm,
        "logit_variance": weights.logit_variance,
        "null_fraction": weights.null_fraction,
        "frequency_cosine": cosine,
        "mean_activation": moments.mean,
        "std_activation": moments.std,
    }
    neurons = [
        _neuron(anatomy.layer, row, index, statistics, slopes[dial], closer)
        for row, (dial, index) in enumerate((dial, index) for dial in DIALS for index in selected[dial])
    ]
    config = model.config
    return Profile.create(
        model=ModelIdentity(
            id=str(config.name_or_path or config.model_type),
            revision=getattr(config, "_commit_hash", None),
            model_type=config.model_type,
            layer=anatomy.layer,
            n_neurons=anatomy.n_neurons,
            d_model=anatomy.d_model,
            vocab_size=anatomy.vocab_size,
            tokenizer_size=tokenizer_size,
            dtype=dtype_name(anatomy.dtype),
            fingerprints=anatomy.fingerprints(),
        ),
        corpus=CorpusIdentity(
            source=windows.source,
            sha256=windows.sha256,
            tokens=windows.n_tokens,
            kept_tokens=moments.count,
            windows=len(windows),
            window=windows.window,
            unigram_tokens=int(counts.sum()),
            unigram_sha256=hashlib.sha256(counts.numpy().astype("<i8").tobytes()).hexdigest(),
        ),
        seed=seed,
        versions={name: importlib.metadata.version(name) for name in ("confsteer", "torch", "transformers")},
        layer=Layer(
            null_dims=weights.null_dims,
            chance_null_fraction=weights.chance_null_fraction,
            chance_frequency_cosine=chance_cosine,
            entropy=float(closer.baseline.entropy),
            loss=float(closer.baseline.loss),
        ),
        entropy_neurons=tuple(neurons[: len(entropy)]),
        frequency_neurons=tuple(neurons[len(entropy) :]),
        response=closer.response,
        columns={
            **statistics,
            "singular_values": weights.singular_values,
            **{name: estimate.value for name, estimate in effects._asdict().items()},
            **{f"{name}_standard_error": estimate.standard_error for name, estimate in effects._asdict().items()},
        },
    )


def _checked_counts(counts: NDArray[np.integer], tokenizer_size: int) -> Tensor:
    """Counts ``[tokenizer_size]`` int64; longer arrays must have nothing in their padding."""
    if counts.ndim != 1 or not np.issubdtype(counts.dtype, np.integer) or (counts < 0).any():
        raise CorpusError(f"unigram counts must be a row of integers from 0 up, not {counts.dtype} of shape {counts.shape}")
    if len(counts) < tokenizer_size or counts[tokenizer_size:].any():
        raise CorpusError(f"there are unigram counts for {len(counts)} tokens; the tokenizer has {tokenizer_size}")
    return torch.from_numpy(counts[:tokenizer_size].astype(np.int64))


class _CloserLook(NamedTuple):
    """What the third pass measures."""

    effects: NeuronEffects
    """Of the reported neurons, exactly, in the order of the dials."""
    argmax_changed: Tensor
    response: dict[Dial, Response]
    baseline: ResponseMeans
    """Of the unsteered model."""


def _look_closer(
    states: Iterator[TokenStates],
    readout: Readout,
    selected: dict[Dial, list[int]],
    slopes: dict[Dial, Tensor],
    moments: ActivationMoments,
    unigram: Unigram,
) -> _CloserLook:
    """Exact effects of the reported neurons, and the response curve of each dial that has neurons."""
    device = readout.unembedding.device
    reported = torch.tensor([*selected["entropy"], *selected["unigram"]], dtype=torch.long, device=device)
    few = dataclasses.replace(readout, w_out=readout.w_out[reported])
    mean = moments.mean.to(device)[reported]
    means, changed = EffectMeans(len(reported)), torch.zeros(len(reported), dtype=torch.float64)
    nowhere = readout.w_out.new_zeros(readout.d_model)
    baseline = ResponseCurve(readout, nowhere, unigram, torch.zeros(1))
    curves: dict[Dial, ResponseCurve] = {}
    for first, batch in enumerate(states):
        if first == 0:
            for dial in DIALS:
                if selected[dial]:
                    index = torch.tensor(selected[dial], device=device)
                    push = (slopes[dial][selected[dial]].sign() * moments.std[selected[dial]]).to(device).float()
                    direction = push @ readout.w_out[index]
                    positions = choose_positions(readout, direction, unigram, batch.residual, dial=dial)
                    curves[dial] = ResponseCurve(readout, direction, unigram, positions)
        for curve in (baseline, *curves.values()):
            curve.update(batch.residual, batch.targets)
        if len(reported):
            theirs = batch._replace(activations=batch.activations[:, reported])
            means.update(*ablation_effects(few, theirs, mean, unigram, exact_above=-1.0), batch.window)
            changed += argmax_changes(few, theirs, mean).double().sum(dim=0).cpu()
    return _CloserLook(
        effects=means.result(),
        argmax_changed=changed / moments.count,
        response={
            dial: Response(**{name: tuple(column.tolist()) for name, column in curve.result()._asdict().items()})
            for dial, curve in curves.items()
        },
        baseline=baseline.result(),
    )


def _neuron(layer: int, row: int, index: int, statistics: dict[str, Tensor], slope: Tensor, closer: _CloserLook) -> Neuron:
    """Neuron `index` of the layer, which is number `row` of the reported ones."""
    effects = {name: _measurement(estimate, row) for name, estimate in closer.effects._asdict().items()}
    return Neuron(
        layer=layer,
        index=index,
        sign=1 if float(slope[index]) > 0 else -1,
        **{name: float(column[index]) for name, column in statistics.items()},
        norm_percentile=float(select.percentile(statistics["norm"])[index]),
        logit_variance_percentile=float(select.percentile(statistics["logit_variance"])[index]),
        total_effect=effects["total"],
        direct_effect=effects["direct"],
        mediation=effects["mediation"],
        loss_effect=effects["loss"],
        entropy_effect=effects["entropy"],
        entropy_effect_abs=effects["entropy_abs"],
        frequency_effect=effects["frequency"],
        frequency_mediation=effects["frequency_mediation"],
        argmax_changed=float(closer.argmax_changed[row]),
    )


def _measurement(estimate: Estimate, row: int) -> Measurement:
    error = float(estimate.standard_error[row])
    return Measurement(value=float(estimate.value[row]), standard_error=error if math.isfinite(error) else None)
