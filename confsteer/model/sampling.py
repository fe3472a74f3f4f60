"""Text that the model itself writes, for use where there is no corpus."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from confsteer.bars import progress_bar
from confsteer.defaults import SEED, WINDOW
from confsteer.errors import CorpusError
from confsteer.model.locate import input_device
from confsteer.text.windows import MIN_WINDOW, TokenizedDocument, Windows, check_context, cut_windows, vocabulary_size

BATCH_SIZE = 32
"""Documents sampled at a time."""
MAX_SHORT_DOCUMENTS = 100
"""Documents in a row without a window after which the model is taken not to write longer ones."""


def sample_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    window: int = WINDOW,
    seed: int = SEED,
    progress: bool = False,
) -> Windows:
    """Draw ancestral samples of the model: each token comes from its whole next-token distribution at temperature 1.

    A document starts with BOS. It starts with EOS where there is no BOS, and with a token drawn uniformly where there is
    neither. It ends at EOS or when the window is full. The sampled ids are the windows, because tokenizing the text again may
    give other tokens. ``generate()`` is not used: a model's own settings, such as top-k or a repetition penalty, apply there
    unless each is undone. The random states of the process and of the device are left alone.

    The caller must have put the model in evaluation mode.

    Args:
        model: the model.
        tokenizer: its tokenizer; ids that it does not have are not drawn.
        tokens: sample at most this many.
        window: tokens per window.
        seed: seed of the sampling.
        progress: whether to show a progress bar.

    Raises:
        SettingError: the window is too short or longer than the model's context, or `tokens` is too few.
        CorpusError: the model's documents end before they make a window.
    """
    check_context(window, model.config)
    with progress_bar("sample", tokens, show=progress) as bar:
        return cut_windows(
            (TokenizedDocument([], ids) for ids in _documents(model, tokenizer, tokens, window, seed, bar)),
            tokenizer,
            window=window,
            max_tokens=tokens,
            source=f"text sampled from the model itself (seed {seed})",
        )


def _documents(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int, window: int, seed: int, bar: tqdm[None]
) -> Iterator[list[int]]:
    """Yield sampled documents without end, in batches of the size that `tokens` needs if few documents are short."""
    device = input_device(model)
    generator = torch.Generator(device).manual_seed(seed)
    vocab = vocabulary_size(tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    start = eos if bos is None else bos
    # Read the generation config: chat models end a turn with a token of their own, and list it there.
    ends = model.generation_config.eos_token_id if model.generation_config else None
    end_ids = {*(ends if isinstance(ends, list) else [ends]), eos} - {None}
    end = torch.tensor(sorted(end_ids), dtype=torch.long, device=device)
    short = 0
    while short < MAX_SHORT_DOCUMENTS:
        rows = min(BATCH_SIZE, max(1, -(-tokens // window)))
        first = torch.randint(vocab, (rows, 1), generator=generator, device=device)
        if start is not None:
            first.fill_(start)
        for row in _sample(model, first, window, vocab, end, generator, bar).tolist():
            document = row[: next((i + 1 for i, token in enumerate(row) if i and token in end_ids), None)]
            if len(document) < MIN_WINDOW:
                short += 1
            else:
                short = 0
                tokens -= len(document)
                yield document
    raise CorpusError(
        f"the model ends its own texts too soon: {short} in a row had fewer than {MIN_WINDOW} tokens; give it some text"
    )


@torch.no_grad()
def _sample(
    model: PreTrainedModel, ids: Tensor, length: int, vocab: int, end: Tensor, generator: torch.Generator, bar: tqdm[None]
) -> Tensor:
    """Continue ``[rows, 1]`` to ``[rows, length]``, or until each row has ended."""
    cache, ended = None, torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    while ids.shape[1] < length and not ended.all():
        output = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        p = output.logits[:, -1, :vocab].float().softmax(dim=-1)
        sampled = torch.multinomial(p.to(ids.device), 1, generator=generator)
        ids = torch.cat([ids, sampled], dim=1)
        bar.update(int((~ended).sum()))
        ended |= torch.isin(sampled[:, 0], end)
    return ids
