"""Model and text to profile."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from confsteer.calibration.passes import Checkpoint, sample_of_weights
from confsteer.discovery import select
from confsteer.discovery.effects import ablation_effects
from confsteer.discovery.exact import TokenEffects, exact_effects
from confsteer.discovery.frequency import chance_frequency_cosine, frequency_cosine, ranks_tokens
from confsteer.discovery.moments import tokens_at_once
from confsteer.discovery.response import ResponseCurve, choose_positions
from confsteer.discovery.streaming import ActivationMoments, EffectMeans, NeuronEffects, WithError
from confsteer.discovery.weights import weight_statistics
from confsteer.distributed import all_reduce, broadcast, this_process
from confsteer.errors import CorpusError, ProfileMismatchError, SettingError, UnsupportedModelError
from confsteer.last_layer.readout import FullOutputs, Readout
from confsteer.last_layer.unigram import Unigram
from confsteer.model.dissect import dissect
from confsteer.model.sampling import sample_windows
from confsteer.model.states import BATCH_SIZE, Recording, regroup
from confsteer.profile.profile import Profile
from confsteer.profile.schema import CorpusIdentity, Layer, Measurement, ModelIdentity, Neuron, Response, library_versions
from confsteer.steering import DIALS, Dial
from confsteer.text.counts import checked_counts
from confsteer.text.windows import Document, Windows, check_context, check_ids, make_windows

DEFAULT_TOKENS = 25_600
CURVE_TOKENS = 4096
"""Response curves are measured on about this many tokens, spread evenly over the text: what a dial does differs more from
one text to the next than this sample differs from its text."""
POSITION_SAMPLE = 64
"""Tokens on which the range of each response curve is found."""


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Document] | Windows | None = None,
    *,
    tokens: int | None = DEFAULT_TOKENS,
    window: int = 256,
    unigram_counts: NDArray[np.integer] | None = None,
    null_dims: int | None = None,
    scanned: Profile | None = None,
    seed: int = 0,
    source: str = "texts",
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> Profile:
    """Find a model's entropy and token-frequency neurons and measure what turning them does.

    Three passes over the text: mean activations; effects of every neuron; exact effects of the selected neurons and the
    response curves. The model runs once over as much of it as `confsteer.model.states.KEPT_BYTES` hold, and again in every pass
    over the rest: memory does not grow with the text, but for four bytes per token.

    In several processes (`confsteer.distributed.init_distributed`) each reads its share of the text, and all return the same
    profile.

    Args:
        model: a loaded causal language model; it is put in evaluation mode.
        tokenizer: its tokenizer.
        texts: one string per document, or conversations (see `confsteer.text.windows.make_windows`), or windows already made, for
            which `tokens`, `window` and `source` are not used; sampled from the model itself if None.
        tokens: read at most this many; all if None.
        window: tokens per window, windows do not cross documents.
        unigram_counts: how often each token occurs in text like the model's training text, by id; counted in `texts` if None,
            with a warning if that is too little to rank tokens.
        null_dims: directions counted as the unembedding's effective null space; read off its spectrum if None.
        scanned: a profile of the same model, from `confsteer.scan` or an earlier calibration, whose statistics of the weights
            are taken over instead of computed again.
        seed: of the random directions that give chance levels, and of sampling.
        source: what the text is, for the profile.
        progress: whether to show a progress bar.
        checkpoint: file to write every minute what was added up so far; yours to remove once the profile is saved.
        resume: whether to go on from `checkpoint`, if the file is there: the profile is that of an uninterrupted run, bit for
            bit on the same machine. What was read is not read again, but for states that were kept for a later pass; text that
            the model writes itself is written again, the same.

    Returns:
        The profile; its lists are empty if the model has no such neurons.

    Raises:
        UnsupportedModelError: see `confsteer.model.dissect`.
        CorpusError: the text is too short, or not of this model's tokenizer.
        SettingError: the window is too short or longer than the model's context, `null_dims` is out of range or given beside
            `scanned`, or there are more processes than batches of text, or several with a checkpoint.
        ProfileMismatchError: `scanned` is of another model.
        ResumeError: `checkpoint` is of another model, text or setting, or damaged.
    """
    model.eval()
    anatomy = dissect(model)
    if scanned is not None:
        scanned.check_model(anatomy)
        if null_dims is not None:
            raise SettingError(f"null_dims={null_dims} beside a scan, which has {scanned.layer.null_dims}: give one of them")
    if texts is None:
        texts = sample_windows(
            model, tokenizer, tokens=DEFAULT_TOKENS if tokens is None else tokens, window=window, seed=seed, progress=progress
        )
    windows = make_windows(texts, tokenizer, window=window, max_tokens=tokens, source=source)
    check_context(windows.window, model.config)
    check_ids(windows.token_ids, anatomy.vocab_size)
    process = this_process()
    if process.world_size > 1 and (checkpoint or resume):
        raise SettingError(f"{process.world_size} processes keep no checkpoint: their passes end together, their files would not")
    if len(windows) <= BATCH_SIZE * (process.world_size - 1):
        raise SettingError(
            f"{len(windows)} windows are too few for {process.world_size} processes, which read {BATCH_SIZE} at a time"
        )
    identity = ModelIdentity.of(model.config, tokenizer, anatomy, revision=getattr(model.config, "_commit_hash", None))
    tokenizer_size = identity.tokenizer_size
    if scanned is not None and scanned.model.tokenizer_size != tokenizer_size:
        raise ProfileMismatchError(
            f"the scan is of {scanned.model.tokenizer_size:,} tokens; this tokenizer has {tokenizer_size:,}"
        )
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
        counts = checked_counts(unigram_counts, tokenizer_size)
    unigram_sha256 = hashlib.sha256(counts.numpy().astype("<i8").tobytes()).hexdigest()
    kept_sums = Checkpoint(
        None if checkpoint is None else Path(checkpoint),
        {}
        if checkpoint is None
        else {
            "versions": library_versions(),
            "model": identity.model_dump(mode="json"),
            "weights": sample_of_weights(model),
            "text": [windows.source, windows.sha256, windows.window, *windows.special_ids],
            "unigram counts": unigram_sha256,
            "null_dims": null_dims,
            "scan": scanned and scanned.checksum,
            "seed": seed,
        },
        resume=resume,
    )

    with torch.no_grad():
        readout = anatomy.readout(tokenizer_size)
        device = readout.unembedding.device
        unigram = Unigram.from_counts(counts.to(device))

        recording = Recording(model, anatomy, windows, device, process)

        def bar(stage: str) -> tqdm[NoReturn]:
            return tqdm(
                total=windows.n_tokens // process.world_size, desc=stage, unit="tok", unit_scale=True, disable=not progress
            )

        weights = weight_statistics(readout, null_dims=null_dims, seed=seed) if scanned is None else scanned.weights
        cosine = frequency_cosine(readout, unigram)
        chance_cosine = chance_frequency_cosine(readout, unigram, seed=seed)
        moments = ActivationMoments(readout.n_neurons)
        with bar("1/3 activations") as shown:
            for batch in kept_sums.read("activations", recording, moments.sums, shown.update):
                moments.update(batch.activations)
        moments.pool(all_reduce)
        if moments.count == 0:
            raise CorpusError("no token of the text counts: its windows are too short")
        if not (moments.mean.isfinite().all() and moments.std.isfinite().all()):
            raise UnsupportedModelError(
                f"the activations of {identity.id} are not finite on this text: its weights are damaged, or too large for "
                f"{identity.dtype} (--dtype float32)"
            )
        mean, means = moments.mean.to(device), EffectMeans(readout.n_neurons)
        with bar("2/3 effects") as shown:
            at_once = tokens_at_once(readout.n_neurons)
            for batch in kept_sums.read("effects", recording, means.sums, shown.update, at_least=at_once):
                token_effects, token_slopes = ablation_effects(readout, batch, mean, unigram)
                means.update(token_effects, batch.window, token_slopes)
        means.pool(all_reduce)
        effects = means.result()
        entropy = select.entropy_neurons(weights, effects)
        selected: dict[Dial, list[int]] = {
            "entropy": entropy,
            "unigram": select.frequency_neurons(effects, cosine, chance_cosine, excluding=entropy),
        }
        slopes: dict[Dial, Tensor] = {"entropy": effects.entropy_slope.value, "unigram": effects.unigram_slope.value}
        with bar("3/3 responses") as shown:
            closer = _look_closer(recording, kept_sums, shown.update, readout, selected, slopes, moments, unigram)

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
    return Profile.create(
        model=identity,
        corpus=CorpusIdentity(
            source=windows.source,
            sha256=windows.sha256,
            tokens=windows.n_tokens,
            kept_tokens=moments.count,
            windows=len(windows),
            window=windows.window,
            unigram_tokens=int(counts.sum()),
            unigram_sha256=unigram_sha256,
        ),
        seed=seed,
        versions=library_versions(),
        layer=Layer(
            null_dims=weights.null_dims,
            chance_null_fraction=weights.chance_null_fraction,
            chance_frequency_cosine=chance_cosine,
            entropy=closer.entropy,
            loss=closer.loss,
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


class _CloserLook(NamedTuple):
    """What the third pass measures."""

    effects: NeuronEffects
    """Of the reported neurons, exactly, in the order of the dials."""
    uncapped: NeuronEffects | None
    """The same of the logits before a softcap, in a model that has one."""
    argmax_changed: Tensor
    response: dict[Dial, Response]
    entropy: float
    """Of the unsteered model, in nats, as is the loss."""
    loss: float


def _look_closer(
    recording: Recording,
    kept_sums: Checkpoint,
    on_read: Callable[[int], object],
    readout: Readout,
    selected: dict[Dial, list[int]],
    slopes: dict[Dial, Tensor],
    moments: ActivationMoments,
    unigram: Unigram,
) -> _CloserLook:
    """Exact effects of the reported neurons, and the response curve of each dial that has neurons."""
    device = readout.unembedding.device
    reported = torch.tensor([*selected["entropy"], *selected["unigram"]], dtype=torch.long, device=device)
    few, mean = readout.select(reported), moments.mean.to(device)[reported]
    uncapped = None if readout.softcap is None else dataclasses.replace(few, softcap=None)
    means, uncapped_means = EffectMeans(len(reported)), EffectMeans(len(reported))
    changed = torch.zeros(len(reported), dtype=torch.float64)
    pushes = {
        dial: (slopes[dial].sign() * moments.std * _among(selected[dial], moments.std)).float().to(device) for dial in DIALS
    }
    unsteered = ResponseCurve(readout, torch.zeros_like(pushes["entropy"]), unigram, torch.zeros(1))
    at_once = tokens_at_once(len(reported))

    dials = [dial for dial in DIALS if selected[dial]]

    def choose() -> Tensor:
        first = next(regroup(recording.read(), at_once))
        sample = first.at(slice(None, None, max(1, len(first.targets) // POSITION_SAMPLE)))
        return broadcast(torch.stack([choose_positions(readout, pushes[dial], unigram, sample, dial=dial) for dial in dials]))

    positions = kept_sums.once("positions", choose) if dials else ()
    curves = {dial: ResponseCurve(readout, pushes[dial], unigram, row) for dial, row in zip(dials, positions, strict=True)}
    stride = max(1, moments.count // CURVE_TOKENS)
    accumulators: tuple[EffectMeans | ResponseCurve, ...] = (means, uncapped_means, unsteered, *curves.values())
    sums = [changed, *(tensor for accumulator in accumulators for tensor in accumulator.sums)]
    for batch in kept_sums.read("responses", recording, sums, on_read, at_least=at_once):
        # Every stride-th token of each window, in however many processes and batches the windows come.
        in_window = torch.arange(len(batch.window), device=device) - torch.searchsorted(batch.window, batch.window)
        sampled = in_window % stride == 0
        exact, before_cap = [], []
        for outputs, rows in FullOutputs.stream(readout, batch):
            unsteered.update(outputs)
            for curve in curves.values():
                curve.update(outputs.at(sampled[rows]))
            delta = mean.float() - batch.activations[rows][:, reported].float()
            exact.append(exact_effects(few, outputs, delta, unigram))
            if uncapped is not None:
                before_cap.append(exact_effects(uncapped, outputs, delta, unigram))
        for effect_means, parts in ((means, exact), (uncapped_means, before_cap)):
            if parts:
                columns = zip(*(effects for effects, _ in parts), strict=True)
                effect_means.update(TokenEffects(*map(torch.cat, columns)), batch.window)
        changed += torch.cat([one for _, one in exact]).double().sum(dim=0).cpu()
    for accumulator in accumulators:
        accumulator.pool(all_reduce)
    baseline = unsteered.result()
    return _CloserLook(
        effects=means.result(),
        uncapped=None if uncapped is None else uncapped_means.result(),
        argmax_changed=all_reduce(changed) / moments.count,
        response={
            dial: Response(**{name: tuple(column.tolist()) for name, column in curve.result()._asdict().items()})
            for dial, curve in curves.items()
        },
        entropy=float(baseline.entropy),
        loss=float(baseline.loss),
    )


def _among(neurons: list[int], like: Tensor) -> Tensor:
    """1 for each of `neurons`, 0 for the others, ``[n_neurons]``."""
    mask = torch.zeros_like(like)
    mask[neurons] = 1
    return mask


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
        total_effect_uncapped=closer.uncapped and _measurement(closer.uncapped.total, row),
        entropy_effect_abs_uncapped=closer.uncapped and _measurement(closer.uncapped.entropy_abs, row),
    )


def _measurement(estimate: WithError, row: int) -> Measurement:
    error = float(estimate.standard_error[row])
    return Measurement(value=float(estimate.value[row]), standard_error=error if math.isfinite(error) else None)
