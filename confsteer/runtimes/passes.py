"""Forward passes of a causal language model: the positions that generate, and a check that passes are steered."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from confsteer.errors import SteeringError

_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", bool)
"""Whether torch.export runs the model. Releases before 2.7 cannot tell, and there it is False."""


class Asked(NamedTuple):
    """Arguments of a language model that decide which positions generate. Its layers are not given all of them."""

    logits_to_keep: int | Tensor = 0
    """Number of last positions whose logits are kept, or those positions themselves. 0 for all."""
    attention_mask: Any = None
    position_ids: Tensor | None = None
    continues: bool | Tensor = False
    """Whether the pass continues a cached text. A static cache gives a tensor, and reading it would wait for the device."""


def generating(asked: Asked, length: int, device: torch.device) -> Tensor | None:
    """Mark the positions of a pass whose logits choose a token.

    If only some logits are kept, theirs are the positions: a prompt's last one, drafted tokens, the last token of each packed
    request. If all are kept, a pass that continues a cached text is steered everywhere. Any other pass is steered at the last
    token of each text.

    Args:
        asked: see `Asked`.
        length: positions of the pass.
        device: device of the result.

    Returns:
        Booleans, ``[1 or rows, positions]``; None where all positions generate.

    Raises:
        SteeringError: the mask does not tell where the texts end.
    """
    kept, mask, position_ids, continues = asked
    if length == 1:
        return None
    position = torch.arange(length, device=device)
    if isinstance(kept, Tensor) or kept:
        chosen = kept if isinstance(kept, Tensor) else position[-kept:]
        return torch.zeros(1, length, dtype=torch.bool, device=device).index_fill(1, chosen.to(device, torch.int64), True)
    if not isinstance(continues, Tensor) and continues:
        return None
    if mask is None:
        marked = (position == length - 1)[None]
    elif isinstance(mask, Tensor) and mask.dim() == 2:
        # Steer the padding after the last token too: no token looks at it.
        marked = position >= ((mask[:, :length].to(device) != 0) * position).amax(-1, keepdim=True)
    else:
        raise SteeringError(
            'positions="generated" cannot tell from this attention mask where a text ends: give a mask of two dimensions '
            '(1 for tokens, 0 for padding), or logits_to_keep, or steer with positions="all"'
        )
    if position_ids is not None:
        # Find the ends of texts packed into one row, where the next position begins another. Require a start in all dimensions
        # of positions: an image is not at the start of all.
        begins = (position_ids == 0).all(dim=0) if position_ids.dim() == 3 else position_ids == 0
        marked = marked | nn.functional.pad(begins[..., 1:].to(device), (0, 1))
    return marked | continues.to(device) if isinstance(continues, Tensor) else marked


def continues(values: Iterable[Any], layer: int = 0) -> bool | Tensor:
    """Find whether the arguments of a pass have a cache that holds a text; see `Asked`.

    Args:
        values: the arguments.
        layer: index of a layer whose part of the cache is not yet written in this pass.
    """
    cache = next((value for value in values if isinstance(value, Cache)), None)
    if cache is None:
        return False
    past: int | Tensor = cache.get_seq_length(layer)
    return past > 0


def keeps_graphs(model: PreTrainedModel) -> bool:
    """Whether a model keeps CUDA graphs of its passes for later, as a persistent manager of continuous batching does."""
    manager: Any = getattr(model, "_cached_continuous_batching_manager", None)
    return manager is not None and any(manager.continuous_batching_config.cuda_graph_booleans)


def _depth(model: PreTrainedModel) -> int | None:
    return getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)


class Watch:
    """Notes on the passes of a language model: the arguments of each, and whether it reached the steering.

    Args:
        asks: whether to note the arguments.
    """

    def __init__(self, asks: bool) -> None:
        self.asks = asks
        self.asked: Asked | None = None
        """Arguments of the pass under way. None if inner modules are run by themselves."""
        self._reached: list[None] = []
        self._over = False

    def reach(self) -> None:
        """Note that the pass reaches the steering, with a new object each time, so that threads do not miss their own."""
        self._reached = []

    @contextmanager
    def over(self, model: PreTrainedModel) -> Iterator[None]:
        """Watch the passes of `model` within the context.

        Raises:
            SteeringError: within a pass, if it was not steered, or if it would export or trace the model.
        """
        forward, names = model.forward, tuple(inspect.signature(model.forward).parameters)
        depth = _depth(model)

        @functools.wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            # Do nothing after the context: somebody else may have wrapped this function meanwhile, and kept it.
            if self._over:
                return forward(*args, **kwargs)
            if _is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
                raise SteeringError(
                    "a model cannot be exported or traced while it is steered, for nothing would change or end the steering of "
                    "the result: leave the context first, or export a model that confsteer.bake has steered"
                )
            if self.asks:
                given = {**dict(zip(names, args, strict=False)), **kwargs}
                kept = given.get("logits_to_keep")
                texts = given.get("attention_mask"), given.get("position_ids")
                self.asked = Asked(0 if kept is None else kept, *texts, continues(given.values()))
            before = self._reached
            output = forward(*args, **kwargs)
            self.asked = None
            # Allow for two cases. Drafts of an early exit leave out the last layers, but the passes that verify them do not. And
            # another thread may have left the context during the pass.
            if self._reached is before and _depth(model) == depth and not self._over:
                raise SteeringError(
                    "the model ran without the module that carries the steering: nothing was steered. It was replaced, captured "
                    "(CUDA graphs) or fused, or compiled without guards: do that within the context, or not at all"
                )
            return output

        with replaced(model, "forward", watched):
            try:
                yield
            finally:
                self._over = True


@contextmanager
def replaced(module: nn.Module, name: str, attribute: Any) -> Iterator[None]:
    """Give a module an attribute of its own within the context."""
    before = vars(module).get(name)
    setattr(module, name, attribute)
    try:
        yield
    finally:
        # Leave it if somebody else has set it meanwhile.
        if vars(module).get(name) is attribute:
            if before is None:
                delattr(module, name)
            else:
                setattr(module, name, before)


def recompiled(module: nn.Module) -> AbstractContextManager[None]:
    """Make torch.compile treat a module as another one within the context.

    Compiled code is guarded against another ``forward``, but not against hooks that come or go. So code from before the context
    is not used in it, and code from within is not used afterwards. Both are found again when they fit.
    """
    forward = module.forward

    @functools.wraps(forward)
    def same(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return replaced(module, "forward", same)
