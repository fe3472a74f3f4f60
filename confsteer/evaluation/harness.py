"""Run a model over text with several steerings and compare them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from pydantic import BaseModel, ConfigDict
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from confsteer.anatomy import input_device
from confsteer.capture import BATCH_SIZE
from confsteer.corpus import Document, Windows, check_context, make_windows
from confsteer.evaluation.metrics import BINS, Interval, ReliabilityBins, TokenScores, metrics
from confsteer.hf import steer
from confsteer.profile import Profile
from confsteer.steering import Steering


class ReliabilityBin(BaseModel):
    """Tokens whose top probability falls into ``[low, high)``."""

    model_config = ConfigDict(frozen=True)

    low: float
    high: float
    count: int
    confidence: float
    """Mean top probability."""
    accuracy: float
    """Share of right top predictions."""


class SteeringResult(BaseModel):
    """What one steering did."""

    model_config = ConfigDict(frozen=True)

    steering: Steering
    metrics: dict[str, Interval]
    """By the names of `confsteer.evaluation.metrics.Metrics`."""
    reliability: tuple[ReliabilityBin, ...]
    """Bins that hold tokens."""


class Evaluation(BaseModel):
    """Steerings compared on one text; the first is neutral."""

    model_config = ConfigDict(frozen=True)

    model: str
    source: str
    tokens: int
    """Tokens scored."""
    windows: int
    """Windows they are in, the unit of the bootstrap."""
    results: tuple[SteeringResult, ...]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Document] | Windows,
    profile: Profile,
    steerings: Sequence[Steering],
    *,
    tokens: int | None = None,
    window: int = 256,
    source: str = "texts",
    progress: bool = False,
) -> Evaluation:
    """Loss, entropy and calibration without steering and with each of `steerings`.

    The model runs with each steering, on the same windows and positions as calibration uses.

    Args:
        model: the profile's model.
        tokenizer: its tokenizer.
        texts: one string per document, or conversations (see `confsteer.corpus.make_windows`), or windows already made, for
            which `tokens`, `window` and `source` are not used.
        profile: see `confsteer.steer`.
        steerings: to compare with the unsteered model; all for every position.
        tokens: read at most this many.
        window: tokens per window.
        source: what the text is, for the report.
        progress: whether to show a progress bar.

    Raises:
        CorpusError: the text is too short.
        SettingError: the window is too short or longer than the model's context.
        SteeringError, ProfileMismatchError, NoNeuronsError: see `confsteer.steer`.
    """
    windows = make_windows(texts, tokenizer, window=window, max_tokens=tokens, source=source)
    check_context(windows.window, model.config)
    compared = [Steering(), *steerings]
    scores: list[list[TokenScores]] = [[] for _ in compared]
    window_of: list[torch.Tensor] = []
    vocab, inputs_on = profile.model.tokenizer_size, input_device(model)
    with (
        torch.no_grad(),
        steer(model, profile) as steerer,
        tqdm(total=windows.n_tokens * len(compared), desc="evaluate", unit="tok", unit_scale=True, disable=not progress) as bar,
    ):
        for first, batch in enumerate(windows.batches(BATCH_SIZE)):
            window_of.append(batch.window + first * BATCH_SIZE)
            ids, mask = batch.input_ids.to(inputs_on), batch.attention_mask.to(inputs_on)
            for collected, steering in zip(scores, compared, strict=True):
                steerer.update(steering)
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                kept = logits[batch.kept.to(logits.device)][:, :vocab]
                collected.append(TokenScores(*(s.cpu() for s in TokenScores.of(kept, batch.targets.to(logits.device)))))
                bar.update(int(batch.attention_mask.sum()))
    # Windows without a kept token are not part of the sample.
    _, window_index = torch.cat(window_of).unique(return_inverse=True)
    joined = [TokenScores(*map(torch.cat, zip(*collected, strict=True))) for collected in scores]
    return Evaluation(
        model=profile.model.id,
        source=windows.source,
        tokens=len(window_index),
        windows=int(window_index.max()) + 1,
        results=tuple(
            SteeringResult(
                steering=steering,
                metrics=metrics(one, window_index, unsteered=joined[0])._asdict(),
                reliability=_reliability(one),
            )
            for steering, one in zip(compared, joined, strict=True)
        ),
    )


def _reliability(scores: TokenScores) -> tuple[ReliabilityBin, ...]:
    bins = ReliabilityBins.per_window(scores, torch.zeros_like(scores.prediction), 1)
    rows = zip(*(column[0].tolist() for column in bins), strict=True)
    return tuple(
        ReliabilityBin(low=i / BINS, high=(i + 1) / BINS, count=int(n), confidence=confidence / n, accuracy=correct / n)
        for i, (n, confidence, correct) in enumerate(rows)
        if n
    )
