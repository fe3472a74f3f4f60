"""The scan: from weights on disk to a profile of candidates."""

from __future__ import annotations

from typing import NamedTuple

import torch

from confsteer.bars import progress_bar
from confsteer.discovery.weights import weight_statistics
from confsteer.model.checkpoint import read_last_layer
from confsteer.model.loading import DEMO_NAME, load_tokenizer, source_of
from confsteer.profile.profile import Profile
from confsteer.profile.schema import Layer, ModelIdentity, library_versions
from confsteer.profile.store import WEIGHT_COLUMNS


class Scan(NamedTuple):
    """Profile that `scan` made, and the tensors that it read."""

    profile: Profile
    """Profile of the weights alone: no corpus, no neurons, no dials."""
    tensors: tuple[str, ...]
    """Names of the tensors that were read, as in the checkpoint."""
    bytes_read: int
    """Size of these tensors, in bytes."""
    bytes_total: int | None
    """Size of the whole checkpoint, in bytes. None if its index does not say."""


def scan(
    name: str | None,
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    null_dims: int | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> Scan:
    """Compute the statistics of the last MLP's neurons from weights alone, without building the model.

    Only the unembedding, the final norm and the last MLP's output projection are read from the checkpoint. The model is laid out
    without weights, and its structure tells where they are. The numerical check of `confsteer.calibrate` needs the whole model,
    and is not made here.

    Args:
        name: hub id, folder or ``.gguf`` file; the bundled demonstration model if None. From the hub, only files with a
            tensor that is needed are downloaded.
        gguf_file: GGUF file of that hub repository or folder.
        revision: branch, tag or commit on the hub.
        null_dims: directions counted as the unembedding's effective null space; found from its spectrum if None.
        seed: seed of the random directions that give the chance level.
        trust_remote_code: whether to run code that comes with the model.
        progress: whether to show a progress bar.

    Raises:
        LoadError: there is no such model, or its checkpoint cannot be read. It must have whole float32, bfloat16 or float16
            tensors in safetensors files, or be a GGUF file whose last layer can be read alone.
        UnsupportedModelError: see `confsteer.model.locate`.
        SettingError: `null_dims` is out of range.
    """
    source = source_of(name, gguf_file)
    with progress_bar("reading", 3, "step", show=progress) as bar, torch.no_grad():
        last = read_last_layer(source, gguf_file=gguf_file, revision=revision, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(source, file=last.file, revision=last.commit or revision, trust_remote_code=trust_remote_code)
        bytes_read, bytes_total, names = last.bytes_read, last.bytes_total, (*last.tensors, *last.streamed)
        bar.update()
        bar.set_description("hashing")
        if name is None:
            last.config.name_or_path = DEMO_NAME
        identity = ModelIdentity.of(last.config, tokenizer, last.anatomy, revision=last.commit)
        bar.update()
        bar.set_description("statistics")
        anatomy = last.anatomy
        # Read neurons of experts a second time, one expert at a time: all at once may not fit into memory.
        readout = anatomy.readout(identity.tokenizer_size, None if anatomy.experts is None else torch.empty(0, dtype=torch.long))
        # Free the raw weights, to make room for the float64 copies of the folded ones.
        writes = None if anatomy.experts is None else map(readout.folded, anatomy.scaled_writes())
        del last
        weights = weight_statistics(readout, writes, null_dims=null_dims, seed=seed)
        bar.update()
    profile = Profile.create(
        model=identity,
        corpus=None,
        seed=seed,
        versions=library_versions(),
        layer=Layer(
            null_dims=weights.null_dims,
            cliff=weights.cliff,
            chance_null_fraction=weights.chance_null_fraction,
            chance_frequency_cosine=None,
            entropy=None,
            loss=None,
        ),
        entropy_neurons=(),
        frequency_neurons=(),
        response={},
        columns={name: getattr(weights, name) for name in WEIGHT_COLUMNS},
    )
    return Scan(profile, names, bytes_read, bytes_total)
