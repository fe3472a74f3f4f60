"""Model and text to profile: the paper's procedure, stage by stage."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from confsteer.calibration.assemble import Measurements, assemble_profile, identify_corpus
from confsteer.calibration.passes import Passes
from confsteer.calibration.progress import Progress, sample_of_weights
from confsteer.calibration.stages import (
    SAMPLE_TOKENS,
    choose_neurons,
    find_null_direction,
    fold_layer,
    measure_activations,
    measure_contenders,
    measure_responses,
    measure_sample,
    other_null_spaces,
)
from confsteer.defaults import CALIBRATION_TOKENS, SEED, SOURCE, WINDOW
from confsteer.discovery.frequency import ranks_tokens
from confsteer.discovery.weights import WeightStatistics
from confsteer.distributed import this_process
from confsteer.errors import ProfileMismatchError, SettingError
from confsteer.model.anatomy import Anatomy
from confsteer.model.dissect import dissect
from confsteer.model.sampling import sample_windows
from confsteer.model.states import BATCH_SIZE, Recording
from confsteer.profile.profile import Profile
from confsteer.profile.schema import ModelIdentity, library_versions
from confsteer.text.counts import checked_counts, counts_sha256
from confsteer.text.several import Texts, join_windows, named_windows
from confsteer.text.windows import Windows, check_context, check_ids


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts | None = None,
    *,
    tokens: int | None = CALIBRATION_TOKENS,
    window: int = WINDOW,
    unigram_counts: NDArray[np.integer] | None = None,
    null_dims: int | None = None,
    null_direction: bool = False,
    scanned: Profile | None = None,
    seed: int = SEED,
    source: str = SOURCE,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> Profile:
    """Find a model's entropy and token-frequency neurons and measure what turning them does.

    Four passes: mean activations, over all the text; effects of every neuron, over a sample of it; exact effects of the neurons
    that the sample leaves in question, over all; response curves, over the sample. The model runs once over as much of the text
    as `confsteer.model.states.KEPT_BYTES` hold, and again over the rest for the third pass: memory does not grow with the text,
    but for four bytes per token.

    Of several texts the neurons are found on all tokens together, and each has a sample of its own. A dial's response is the mean
    of its responses on the texts, which count equally; the profile keeps those too, so that it can say how far they lie apart.

    In several processes (`confsteer.distributed.init_distributed`) each reads its share of the text, and all return the same
    profile.

    Args:
        model: a loaded causal language model; it is put in evaluation mode.
        tokenizer: its tokenizer.
        texts: one string per document, or conversations (see `confsteer.text.windows.make_windows`), or windows already made, for
            which `tokens`, `window` and `source` are not used; or several of these by name; sampled from the model itself if
            None.
        tokens: read at most this many of each text; all if None.
        window: tokens per window, windows do not cross documents.
        unigram_counts: how often each token occurs in text like the model's training text, by id; counted in `texts` if None,
            with a warning if that is too little to rank tokens.
        null_dims: directions counted as the unembedding's effective null space; read off its spectrum if None.
        null_direction: whether the entropy dial turns a constant in the residual right before the final norm, and no neurons.
            The constant is made by hand, along the direction that the unembedding reads least. It is for models without entropy
            neurons, or whose neurons the engine does not reach. Neurons are found and reported as usual.
        scanned: a profile of the same model, from `confsteer.scan` or an earlier calibration, whose statistics of the weights
            are taken over instead of computed again.
        seed: of the random directions that give chance levels, and of sampling.
        source: what the text is, for the profile, if it has no name.
        progress: whether to show a progress bar.
        checkpoint: file to write every minute what was added up so far; yours to remove once the profile is saved.
        resume: whether to go on from `checkpoint`, if the file is there: the profile is that of an uninterrupted run, bit for
            bit on the same machine. What was read is not read again, but for states that were kept for a later pass; text that
            the model writes itself is written again, the same.

    Returns:
        The profile; its lists are empty if the model has no such neurons.

    Raises:
        UnsupportedModelError: see `confsteer.model.dissect` and `confsteer.model.states.check_closed_form`.
        SteeringError: the model is being steered.
        CorpusError: a text is too short, or not of this model's tokenizer; or there is none.
        SettingError: the window is too short or longer than the model's context; `null_dims` is out of range or given beside
            `scanned`; there are more processes than batches of text, or several with a checkpoint.
        ProfileMismatchError: `scanned` is of another model.
        ResumeError: `checkpoint` is of another model, text or setting, or damaged.
    """
    model.eval()
    anatomy = dissect(model)
    if scanned is not None:
        _check_scan(scanned, anatomy, null_dims)
    if texts is None:
        most = CALIBRATION_TOKENS if tokens is None else tokens
        texts = sample_windows(model, tokenizer, tokens=most, window=window, seed=seed, progress=progress)

    # The text, and what it takes for this model to read it.
    by_name = dict(named_windows(texts, tokenizer, tokens=tokens, window=window, source=source))
    windows = join_windows(by_name)
    check_context(windows.window, model.config)
    check_ids(windows.token_ids, anatomy.vocab_size)
    _check_processes(windows, keeps_progress=bool(checkpoint or resume))

    # What the result depends on: an interrupted run of the same goes on.
    identity = ModelIdentity.of(model.config, tokenizer, anatomy, revision=getattr(model.config, "_commit_hash", None))
    counts = _token_counts(windows, unigram_counts, identity.tokenizer_size)
    settings = {"null_dims": null_dims, "null_direction": null_direction, "scan": scanned and scanned.checksum, "seed": seed}
    file = None if checkpoint is None else Path(checkpoint)
    kept = Progress(file, {} if file is None else _settings(model, identity, windows, counts) | settings, resume=resume)

    # The paper's procedure (arXiv 2406.16254, sections 2 to 4).
    with torch.no_grad():
        readout = anatomy.readout(identity.tokenizer_size)
        weights = None if scanned is None else _weights_of(scanned, identity)
        layer = fold_layer(readout, anatomy.experts, counts, weights=weights, null_dims=null_dims, seed=seed)
        recording = Recording(model, anatomy, windows, layer.device, this_process(), readout=readout, sample_tokens=SAMPLE_TOKENS)
        passes = Passes(recording, kept, show=progress)
        moments = measure_activations(passes, layer, identity)
        sample = measure_sample(passes, layer, moments)
        contenders = measure_contenders(passes, layer, moments, sample.effects)
        effects = sample.effects.with_rows(contenders.neurons, contenders.measured.effects)
        chosen = choose_neurons(layer, effects, contenders.neurons)
        direction = find_null_direction(passes, layer) if null_direction else None
        responses = measure_responses(passes, layer, chosen, moments, direction)
    corpus = identify_corpus(windows, counts, kept_tokens=moments.count)
    others = other_null_spaces(layer, effects, seed=seed)
    measured = Measurements(moments, effects, sample.tokens, contenders, chosen, others, direction, responses, list(by_name))
    return assemble_profile(identity, corpus, layer, measured, seed=seed)


def _check_scan(scanned: Profile, anatomy: Anatomy, null_dims: int | None) -> None:
    """
    Raises:
        ProfileMismatchError: the scan is of another model.
        SettingError: the size of the null space is given twice.
    """
    scanned.check_model(anatomy)
    if null_dims is not None:
        raise SettingError(f"null_dims={null_dims} beside a scan, which has {scanned.layer.null_dims}: give one of them")


def _weights_of(scanned: Profile, identity: ModelIdentity) -> WeightStatistics:
    """Take over the statistics of the weights.

    Raises:
        ProfileMismatchError: the scan leaves out other rows of the unembedding.
    """
    if scanned.model.tokenizer_size != identity.tokenizer_size:
        raise ProfileMismatchError(
            f"the scan is of {scanned.model.tokenizer_size:,} tokens; this tokenizer has {identity.tokenizer_size:,}"
        )
    return scanned.weights


def _check_processes(windows: Windows, *, keeps_progress: bool) -> None:
    """
    Raises:
        SettingError: there are several processes and a checkpoint, or more processes than batches of text.
    """
    n = this_process().world_size
    if n > 1 and keeps_progress:
        raise SettingError(f"{n} processes keep no checkpoint: their passes end together, their files would not")
    if len(windows) <= BATCH_SIZE * (n - 1):
        raise SettingError(f"{len(windows)} windows are too few for {n} processes, which read {BATCH_SIZE} at a time")


def _token_counts(windows: Windows, given: NDArray[np.integer] | None, tokenizer_size: int) -> Tensor:
    """Take the counts given, or count the text and warn if it is too short for that; int64 ``[tokenizer_size]``.

    Raises:
        CorpusError: the counts given are not of this tokenizer.
    """
    if given is not None:
        return checked_counts(given, tokenizer_size)
    counts = windows.counts(tokenizer_size)
    if not ranks_tokens(counts):
        warnings.warn(
            f"{windows.n_tokens:,} tokens of text are too few to rank the tokenizer's {tokenizer_size:,} by frequency, so "
            "token-frequency neurons and the unigram dial are of this text's frequencies only. Count a corpus like the model's "
            "training text, a minute's work, and give its counts: confsteer count MODEL --text CORPUS --out counts.npy, then "
            "--unigram counts.npy (count_tokens and unigram_counts in Python)",
            stacklevel=3,
        )
    return counts


def _settings(model: PreTrainedModel, identity: ModelIdentity, windows: Windows, counts: Tensor) -> dict[str, Any]:
    """Name what an interrupted run must have been of for this one to go on from it."""
    return {
        "versions": library_versions(),
        "model": identity.model_dump(mode="json"),
        "weights": sample_of_weights(model),
        "text": [windows.source, windows.sha256, windows.window, list(windows.special_ids), list(windows.text_starts)],
        "unigram counts": counts_sha256(counts),
    }
