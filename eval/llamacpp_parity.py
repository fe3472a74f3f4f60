"""llama.cpp with exported and baked steerings against transformers with the same steering, on the same text.

    pip download --no-deps xllamacpp==2026.10.11549 && unzip xllamacpp-*.whl -d FOLDER
    CONFSTEER_LLAMACPP=FOLDER PYTHONPATH=. python eval/llamacpp_parity.py --json eval/llamacpp.json
    CONFSTEER_LLAMACPP=FOLDER PYTHONPATH=. python eval/llamacpp_parity.py model.gguf:PROFILE ... --json eval/llamacpp.json

Without models the bundled one is run, as a file of float32. A quantised file is run as it is and with all its weights
dequantised to float32: llama.cpp quantises activations before it multiplies them by quantised weights, which transformers does
not, and that difference is there without any steering too.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click
import gguf
import numpy as np
import torch
from torch import Tensor, nn

import confsteer
from confsteer import Profile, Steering, SteeringError
from confsteer.defaults import AFTER_NORM_TOKENS
from confsteer.model.checkpoint import LastLayer, read_last_layer
from confsteer.model.loading import DEMO_NAME, load_model
from confsteer.model.locate import locate
from confsteer.runtimes.llamacpp.adapters import export
from confsteer.runtimes.llamacpp.after_norm import DialAfterNorm, dial_after_norm
from confsteer.runtimes.llamacpp.baking import bake_file
from confsteer.text.sources import python_docs
from confsteer.text.windows import make_windows
from tests.model import gguf_files
from tests.runtimes.llamacpp.library import VERSION, Llama

WINDOW = 128


class Case(NamedTuple):
    """A way to have llama.cpp steer."""

    name: str
    steering: Steering


class Text(NamedTuple):
    """A text that both read, with what transformers predicts on it under each steering."""

    ids: list[int]
    expected: dict[str, Tensor]
    after_norm: DialAfterNorm | None
    """The entropy dial of a model with a norm on the MLP's output."""


def dials(profile: Profile) -> list[Case]:
    """The entropy dial, half of its way up and down."""
    low, high = profile.reach("entropy")
    settings = {"entropy dial, up": round(0.5 * high, 2), "entropy dial, down": round(0.5 * low, 2)}
    return [Case(name, Steering(entropy=change)) for name, change in settings.items()]


def cases(profile: Profile) -> list[Case]:
    """Dials up and down, gains with and without a constant."""
    neuron = profile.entropy_neurons[0]
    gain = Steering(scale={neuron.index: 3.0}, shift={neuron.index: 2.0 * neuron.mean_activation})
    return [
        *dials(profile),
        Case("a neuron's gain tripled", gain),
        Case("entropy neurons ablated", Steering(scale={"entropy": 0.0})),
    ]


def log_probabilities(model: nn.Module, ids: list[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


def compare(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """Differences between predictions in nats: of a log-probability, of the mean entropy, and as a divergence."""
    entropy = [float(torch.special.entr(log_p.exp()).sum(-1).mean()) for log_p in (ours, theirs)]
    likely = theirs > np.log(1e-3)
    return {
        "largest difference of a log-probability": float((ours - theirs).abs().max()),
        "largest where the probability is above 0.001": float((ours - theirs).abs()[likely].max()),
        "mean divergence": float((theirs.exp() * (theirs - ours)).sum(-1).mean()),
        "difference of the mean entropy": entropy[0] - entropy[1],
    }


def dequantised(source: Path, target: Path) -> Path:
    """Copy a GGUF file with every tensor in float32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            kind, *inner = field.types
            writer.add_key_value(name, field.contents(), kind, sub_type=inner[-1] if inner else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def bundled(place: Path) -> Path:
    """Write the bundled model as a file of float32; its vocabulary is of names, for llama.cpp gets token ids."""
    model = confsteer.demo.load().model
    count = model.config.vocab_size
    words = {"tokens": [f"t{i}" for i in range(count)], "token_type": [1] * count}
    return gguf_files.write(place / "demo.gguf", model, says={f"tokenizer.ggml.{key}": value for key, value in words.items()})


def rows(file: Path, cache: Literal["F32", "F16"], text: Text, profile: Profile, last: LastLayer) -> Iterator[dict[str, Any]]:
    """Run one file with every case, exported and baked."""
    ids, expected, after_norm = text
    with tempfile.TemporaryDirectory() as folder, Llama(file, cache=cache) as llama:
        plain = llama.log_probabilities(ids)
        yield {"case": "unsteered"} | compare(plain, expected["unsteered"])
        vector, lora = Path(folder) / "v.gguf", Path(folder) / "l.gguf"
        for case in cases(profile):
            moved = compare(expected[case.name], expected["unsteered"])
            says: dict[str, Any] = {"case": case.name, "steering": str(case.steering)}
            says |= {"steering moves": moved["largest difference of a log-probability"]}
            says |= {"steering changes the mean entropy by": moved["difference of the mean entropy"]}
            try:
                _export(case.steering, profile, last, vector, lora)
            except SteeringError as error:
                yield says | {"refused": str(error)}
                continue
            if vector.exists():
                llama.control((vector, 1.0), first=last.anatomy.layer, last=last.anatomy.layer)
            llama.lora(lora if lora.exists() else None)
            yield says | {"how": "adapters"} | compare(llama.log_probabilities(ids), expected[case.name])
            llama.control(first=0, last=0)
            llama.lora(None)
            vector.unlink(missing_ok=True)
            lora.unlink(missing_ok=True)
            baked = _baked(case.steering, profile, last, Path(folder), cache, ids, expected[case.name])
            yield says | {"how": "baked"} | baked
        for case in dials(profile) if after_norm else ():
            export(case.steering, profile, last, control_vector=vector, after_norm=after_norm)
            llama.control((vector, 1.0), first=last.anatomy.layer, last=last.anatomy.layer)
            given, dial = llama.log_probabilities(ids), expected[case.name]
            says = {"case": _after(case), "steering": str(case.steering)}
            says |= {"changes the mean entropy by": compare(given, plain)["difference of the mean entropy"]}
            says |= {"mean divergence of unsteered from the neurons' dial": compare(plain, dial)["mean divergence"]}
            yield says | {"from the neurons' dial": compare(given, dial)} | compare(given, expected[_after(case)])
            llama.control(first=0, last=0)
        unchanged = torch.equal(llama.log_probabilities(ids), plain)
        yield {"case": "unsteered again", "the same to the bit": unchanged}


def _after(case: Case) -> str:
    return f"{case.name}, as a constant after the norm"


def predictions(model: Any, tokenizer: Any, ids: list[int], profile: Profile) -> Text:
    """Have transformers predict a text under each steering."""
    expected = {"unsteered": log_probabilities(model, ids)}
    with confsteer.steer(model, profile) as steerer:
        for case in cases(profile):
            steerer.update(case.steering)
            expected[case.name] = log_probabilities(model, ids)
    anatomy = locate(model)
    if anatomy.write_norm is None:
        return Text(ids, expected, None)
    # Measure the dial after the norm on another text, and put its constant before the final norm.
    windows = make_windows(
        python_docs("calibration"), tokenizer, window=WINDOW, max_tokens=AFTER_NORM_TOKENS, source="other text"
    )
    dial = dial_after_norm(model, windows, profile)
    for case in dials(profile):
        constant = dial.at(case.steering.entropy or 0).constant.float()
        hook = anatomy.final_norm.register_forward_pre_hook(lambda module, args, c=constant: (args[0] + c, *args[1:]))
        expected[_after(case)] = log_probabilities(model, ids)
        hook.remove()
    return Text(ids, expected, dial)


def _export(steering: Steering, profile: Profile, last: LastLayer, vector: Path, lora: Path) -> None:
    """Export to the files that the steering takes."""
    if not steering.scale:
        export(steering, profile, last, control_vector=vector)
    elif steering.shift:
        export(steering, profile, last, lora=lora)
    else:
        export(steering, profile, last, control_vector=vector, lora=lora)


def _baked(
    steering: Steering, profile: Profile, last: LastLayer, folder: Path, cache: Any, ids: list[int], expected: Tensor
) -> dict[str, Any]:
    out = folder / "baked.gguf"
    try:
        bake_file(steering, profile, last, out)
    except SteeringError as error:
        return {"refused": str(error)}
    with Llama(out, cache=cache) as llama:
        found = compare(llama.log_probabilities(ids), expected)
    out.unlink()
    return found


def measure(name: str, source: str | None, profile: Profile, tokens: int, folder: Path) -> dict[str, Any]:
    """Run one model in every form."""
    model, tokenizer = load_model(source, device="cpu")
    windows = make_windows(python_docs("held-out"), tokenizer, window=WINDOW, max_tokens=tokens)
    ids = next(windows.batches(1)).input_ids[0].tolist()
    text = predictions(model, tokenizer, ids, profile)
    del model
    forms = {"float32": bundled(folder)} if source is None else {"as it is": Path(source)}
    if source is not None:
        forms["dequantised to float32"] = dequantised(Path(source), folder / "float32.gguf")
    found = []
    caches: list[Literal["F32", "F16"]] = ["F32", "F16"]
    for form, file in forms.items():
        last = read_last_layer(str(file))
        for cache in caches:
            for row in rows(file, cache, text, profile, last):
                print(name, form, cache, row, flush=True)
                found.append({"weights": form, "KV cache": cache} | row)
    return {"model": name, "layer": profile.model.layer, "positions": len(ids), "rows": found}


@click.command()
@click.argument("models", nargs=-1, metavar="[FILE.gguf:PROFILE]...")
@click.option("--tokens", default=WINDOW, show_default=True, help="Of the Python documentation, at most.")
@click.option("--json", "as_json", type=click.Path(path_type=Path))
def main(models: tuple[str, ...], tokens: int, as_json: Path | None) -> None:
    asked = [(None, DEMO_NAME), *(model.rsplit(":", 1) for model in models)]
    results = []
    for source, profile in asked:
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure(str(profile), source, Profile.load(str(profile)), tokens, Path(folder)))
    if as_json:
        as_json.write_text(json.dumps({"xllamacpp": VERSION, "models": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
