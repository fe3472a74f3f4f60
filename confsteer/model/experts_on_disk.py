"""The output weights of experts on disk, read one expert at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightRenaming, rename_source_key

from confsteer.errors import LoadError
from confsteer.model.experts import MixtureAnatomy


class StoredExperts(NamedTuple):
    """Where the output weights of each expert are in a checkpoint of safetensors."""

    names: list[str]
    """Names of the tensors: one for each expert in order, or a single one for all."""
    shard_of: Mapping[str, str]
    """Name of a tensor -> file that has it."""
    locate: Callable[[str], Path]
    """Function from the name of a file to the file, which it downloads if needed."""
    anatomy: MixtureAnatomy

    def read(self, expert: int) -> Tensor:
        """Read the output weights of one expert, ``[units, d_model]``.

        Raises:
            LoadError: they have the wrong type or shape, or are not finite.
        """
        several = len(self.names) > 1
        name = self.names[expert if several else 0]
        with safe_open(self.locate(self.shard_of[name]), framework="pt") as file:
            weight: Tensor = file.get_tensor(name) if several else file.get_slice(name)[expert]
        shape = self.anatomy.down_proj.get_parameter("down_proj").shape[1:]
        if weight.shape != shape or not weight.is_floating_point() or weight.element_size() < 2:
            raise LoadError(
                f"{name} is {str(weight.dtype).removeprefix('torch.')} {list(weight.shape)} for one expert; it should be "
                f"{list(shape)} in float32, bfloat16 or float16. If the checkpoint is quantised, scan the one it was made from"
            )
        if not weight.isfinite().all():
            raise LoadError(f"{name} has numbers that are not finite: the checkpoint is damaged")
        return weight if self.anatomy.keeps_rows else weight.T

    @property
    def n_bytes(self) -> int:
        """Size of all of them in the checkpoint."""
        first = self.read(0)
        return first.nbytes * self.anatomy.experts.number


def stored_experts(
    model: PreTrainedModel, anatomy: MixtureAnatomy, source: str, shard_of: Mapping[str, str], locate: Callable[[str], Path]
) -> StoredExperts:
    """Find the experts of the last layer in a checkpoint: in one tensor, as in memory, or in one for each.

    Args:
        model: the model, laid out without weights.
        anatomy: its anatomy.
        source: the checkpoint, for messages.
        shard_of: name of each tensor -> file that has it.
        locate: a function that finds a file by its name.

    Raises:
        LoadError: they are not there, or in another form.
    """
    own = next(path for path, module in model.named_modules() if module is anatomy.down_proj) + ".down_proj"
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    # Know one conversion only: tensors of single experts, stacked. Others are refused.
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    merging = [entry for entry in converters if [type(operation) for operation in entry.operations] == [MergeModulelist]]
    parameters, found, by_expert = model.state_dict(), list[str](), dict[int, str]()
    for name in shard_of:
        renamed, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        number = re.search(r"\.(\d+)\.[^.]+\.weight$", name)
        if renamed != own:
            continue
        if converter is None:
            found = [name]
        elif number is not None and any(entry.source_patterns and converter in entry.source_patterns for entry in merging):
            by_expert[int(number[1])] = name
    names = found or [by_expert[number] for number in sorted(by_expert)]
    if not found and sorted(by_expert) != list(range(anatomy.experts.number)):
        raise LoadError(
            f"the checkpoint of {source} has the output weights of {len(by_expert)} of the {anatomy.experts.number} experts of "
            f"{own} in a form that is known: it is incomplete, or quantised"
        )
    return StoredExperts(names, shard_of, locate, anatomy)


def with_stored(anatomy: MixtureAnatomy, stored: StoredExperts) -> MixtureAnatomy:
    """Make the anatomy of a model without weights read its experts from disk."""
    return replace(anatomy, stored=stored.read)
