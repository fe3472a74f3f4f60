from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from confsteer.discovery.effects import ablation_effects
from confsteer.discovery.exact import ExactAblation
from confsteer.discovery.frequency import frequency_cosine
from confsteer.discovery.streaming import ActivationMoments, EffectMeans
from confsteer.discovery.token_effects import TokenEffects
from confsteer.last_layer.readout import FullOutputs, NormParameters, Readout
from confsteer.last_layer.states import TokenStates
from confsteer.last_layer.unigram import Unigram
from confsteer.model.anatomy import LastLayerStates
from confsteer.model.dissect import dissect
from tests.models import FAMILIES, VOCAB, TinyFamily, tiny_model


@pytest.fixture(autouse=True)
def single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every processor; what half precision leaves of the second order is in test_pairs.py."""
    monkeypatch.setattr("confsteer.discovery.moments.has_fast_bfloat16", lambda device: False)


def random_readout(
    *,
    d: int = 24,
    neurons: int = 40,
    vocab: int = 300,
    centred: bool,
    bias: bool,
    softcap: float | None = None,
    write_norm: bool = False,
    seed: int = 0,
) -> Readout:
    g = torch.Generator().manual_seed(seed)
    return Readout.fold(
        w_out=torch.randn(neurons, d, generator=g) * torch.rand(neurons, 1, generator=g),
        unembedding=torch.randn(vocab, d, generator=g) * 0.4,
        norm=NormParameters(
            gain=1 + 0.3 * torch.randn(d, generator=g),
            bias=0.2 * torch.randn(d, generator=g) if bias else None,
            epsilon=1e-5,
            centred=centred,
        ),
        unembedding_bias=0.5 * torch.randn(vocab, generator=g) if bias else None,
        softcap=softcap,
        write_norm=NormParameters(0.7 + 0.2 * torch.randn(d, generator=g), None, 1e-6, False) if write_norm else None,
    )


def random_states(readout: Readout, tokens: int = 60, scale: float = 1.0) -> TokenStates:
    g = torch.Generator().manual_seed(1)
    return TokenStates(
        activations=scale * torch.randn(tokens, readout.n_neurons, generator=g),
        residual=2 * torch.randn(tokens, readout.d_model, generator=g),
        mlp_output=None if readout.write_norm is None else 3 * torch.randn(tokens, readout.d_model, generator=g),
        targets=torch.randint(0, readout.vocab_size, (tokens,), generator=g),
        window=torch.arange(tokens) // 10,
    )


def random_mean(readout: Readout) -> Tensor:
    return 0.1 * torch.randn(readout.n_neurons, generator=torch.Generator().manual_seed(2))


def random_unigram(vocab: int) -> Unigram:
    return Unigram.from_counts((10_000 / torch.arange(1, vocab + 1)).long())


def by_definition(readout: Readout, states: TokenStates, mean: Tensor, unigram: Unigram) -> TokenEffects:
    """One pair after the other, in float64, as the definitions say: no expansion, no shared terms."""
    as64 = {f.name: v.double() for f in dataclasses.fields(readout) if isinstance(v := getattr(readout, f.name), Tensor)}
    W, b = as64["unembedding"], as64["logit_bias"]
    v, f = unigram.direction.double(), unigram.log_frequency.double().exp()
    out = TokenEffects(*(torch.zeros(states.activations.shape, dtype=torch.float64) for _ in TokenEffects._fields))

    def centre(h: Tensor) -> Tensor:
        return h - h.mean() if readout.centred else h

    def sigma(h: Tensor) -> Tensor:
        return (h.square().mean() + readout.epsilon).sqrt()

    def logits(h: Tensor, sigma: Tensor) -> Tensor:
        y = W @ (h / sigma) + b
        return y if readout.softcap is None else readout.softcap * (y / readout.softcap).tanh()

    def loss(z: Tensor, target: Tensor) -> Tensor:
        return z.logsumexp(0) - z[target]

    def entropy(z: Tensor) -> Tensor:
        return -(z.softmax(0) * z.log_softmax(0)).sum()

    def kl(z: Tensor) -> Tensor:
        return (f * (f.log() - z.log_softmax(0))).sum()

    for t, h in enumerate(states.residual.double()):
        h = centre(h)
        z, target = logits(h, sigma(h)), states.targets[t]
        for i in range(readout.n_neurons):
            delta = (mean[i] - states.activations[t, i]).double()
            if (norm := readout.write_norm) is None:
                ablated = h + delta * as64["w_out"][i]
            else:
                assert states.mlp_output is not None
                m = states.mlp_output[t].double()
                rho = (m.square().mean() + norm.epsilon).sqrt()
                after = m + delta * norm.inputs[i].double()
                written = h + centre(norm.gain.double() * delta * norm.inputs[i].double() / rho)
                before, after = (norm.gain.double() * x / (x.square().mean() + norm.epsilon).sqrt() for x in (m, after))
                ablated = h + centre(after - before)
            total, direct = logits(ablated, sigma(ablated)), logits(ablated, sigma(h))
            straight = direct if norm is None else logits(written, sigma(h))
            held = total - ((total - z) @ v) * v
            values = (
                loss(total, target) - loss(z, target),
                loss(direct, target) - loss(z, target),
                entropy(total) - entropy(z),
                entropy(direct) - entropy(z),
                entropy(straight) - entropy(z),
                kl(total) - kl(z),
                loss(held, target) - loss(z, target),
            )
            for column, value in zip(out, values, strict=True):
                column[t, i] = value
    return out


KINDS = pytest.mark.parametrize(
    "kind",
    [
        {"centred": True, "bias": True},
        {"centred": True, "bias": False},
        {"centred": False, "bias": True},
        {"centred": False, "bias": False},
        {"centred": False, "bias": False, "softcap": 8.0},
        {"centred": True, "bias": True, "softcap": 8.0},
        {"centred": False, "bias": False, "write_norm": True},
        {"centred": True, "bias": True, "write_norm": True, "softcap": 8.0},
    ],
    ids=str,
)


@KINDS
def test_exact_effects_equal_the_definition(kind: dict[str, Any]) -> None:
    readout = random_readout(**kind)
    states, mean, unigram = random_states(readout, tokens=20), random_mean(readout), random_unigram(readout.vocab_size)
    ((outputs, _),) = FullOutputs.stream(readout, states)
    effects = ExactAblation(readout, unigram).effects(outputs, mean - states.activations)
    for ours, theirs in zip(effects.effects, by_definition(readout, states, mean, unigram), strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=5e-6, rtol=1e-5)


@KINDS
def test_exact_pairs_equal_the_definition(kind: dict[str, Any]) -> None:
    readout = random_readout(**kind)
    states, mean, unigram = random_states(readout, tokens=20), random_mean(readout), random_unigram(readout.vocab_size)
    effects, _ = ablation_effects(readout, states, mean, unigram, pairs_above=-1.0)
    exact = by_definition(readout, states, mean, unigram)
    for name, ours, theirs in zip(effects._fields, effects, exact, strict=True):
        # Under a softcap pairs are held along v to first order only.
        loose = readout.softcap is not None and name == "loss_without_frequency"
        torch.testing.assert_close(ours.double(), theirs, atol=3e-2 if loose else 5e-6, rtol=1e-5)


@KINDS
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_expansion_is_within_a_thousandth_per_neuron(kind: dict[str, Any], scale: float) -> None:
    """Mean |Δ| of every neuron to 0.1 % of its exact value, or 1e-7 nats."""
    # The softcap that models have; one as tight as 8 leaves more to the second order than the expansion takes along.
    readout = random_readout(**(kind | ({"softcap": 30.0} if "softcap" in kind else {})))
    states, mean, unigram = random_states(readout, scale=scale), random_mean(readout), random_unigram(readout.vocab_size)
    fast, _ = ablation_effects(readout, states, mean, unigram)
    exact = by_definition(readout, states, mean, unigram)
    for name, ours, theirs in zip(fast._fields, fast, exact, strict=True):
        ours, theirs = ours.double().abs().mean(0), theirs.abs().mean(0)
        assert ((ours - theirs).abs() <= 1e-3 * theirs + 1e-7).all(), (name, ((ours - theirs).abs() / theirs).max())


def test_expansion_alone_is_second_order() -> None:
    """Without exact pairs the error falls eightfold or more when the effect is halved: what is left is third order."""
    readout = random_readout(centred=True, bias=True)
    unigram = random_unigram(readout.vocab_size)
    errors = []
    for scale in (0.4, 0.2):
        states, mean = random_states(readout, scale=scale), torch.zeros(readout.n_neurons)
        approximate, _ = ablation_effects(readout, states, mean, unigram, pairs_above=float("inf"))
        exact = by_definition(readout, states, mean, unigram)
        errors.append([float((a.double() - e).abs().mean()) for a, e in zip(approximate, exact, strict=True)])
    for coarse, fine in zip(*errors, strict=True):
        assert fine < coarse / 7


def test_slopes_are_derivatives_of_the_effects() -> None:
    readout = random_readout(centred=True, bias=True)
    states, unigram = random_states(readout, tokens=12), random_unigram(readout.vocab_size)
    _, slopes = ablation_effects(readout, states, random_mean(readout), unigram)
    v64 = unigram.log_frequency.double()
    for i in (0, 7):
        a = torch.zeros(12, dtype=torch.float64, requires_grad=True)
        h = readout.centre(states.residual).double() + a[:, None] * readout.w_out[i].double()
        x = h / (h.square().mean(-1, keepdim=True) + readout.epsilon).sqrt()
        log_p = (x @ readout.unembedding.double().T + readout.logit_bias.double()).log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum()
        unigram_kl = (log_p.exp() * (log_p - v64)).sum()
        for ours, quantity in ((slopes.entropy, entropy), (slopes.unigram_kl, unigram_kl)):
            (theirs,) = torch.autograd.grad(quantity, a, retain_graph=True)
            torch.testing.assert_close(ours[:, i].double(), theirs, atol=1e-5, rtol=1e-4)


@KINDS
def test_slopes_are_derivatives_of_what_steering_does(kind: dict[str, Any]) -> None:
    readout = random_readout(**kind)
    states, unigram = random_states(readout, tokens=12), random_unigram(readout.vocab_size)
    _, slopes = ablation_effects(readout, states, random_mean(readout), unigram)
    change = torch.zeros(12, readout.n_neurons, requires_grad=True)
    state = readout.state(states.residual, states.mlp_output)
    log_p = readout.logits(readout.residual_after(state, change)).log_softmax(-1)
    entropy, unigram_kl = -(log_p.exp() * log_p).sum(), (log_p.exp() * (log_p - unigram.log_frequency)).sum()
    for ours, quantity in ((slopes.entropy, entropy), (slopes.unigram_kl, unigram_kl)):
        (theirs,) = torch.autograd.grad(quantity, change, retain_graph=True)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_cosines_are_those_of_the_writes_to_the_logits() -> None:
    readout, unigram = random_readout(centred=True, bias=False), random_unigram(300)
    readout.w_out[3] = 0
    writes = readout.w_out.double() @ readout.unembedding.double().T
    v = unigram.direction.double()
    for i, (ours, write) in enumerate(
        zip(frequency_cosine(readout, unigram).tolist(), writes - writes.mean(1, keepdim=True), strict=True)
    ):
        assert ours == (0 if i == 3 else pytest.approx(float(write @ v / write.norm()), abs=1e-6))


def test_chunking_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    readout = random_readout(centred=True, bias=False)
    states, mean, unigram = random_states(readout), random_mean(readout), random_unigram(readout.vocab_size)
    whole, _ = ablation_effects(readout, states, mean, unigram)
    ((outputs, _),) = FullOutputs.stream(readout, states)
    exact = ExactAblation(readout, unigram).effects(outputs, mean - states.activations)
    monkeypatch.setattr("confsteer.discovery.moments.WORKING_SET", 7 * readout.vocab_size)
    monkeypatch.setattr("confsteer.last_layer.readout.STREAMED_SET", 7 * readout.vocab_size)
    monkeypatch.setattr("confsteer.last_layer.readout.CACHED_SET", 5 * 64)
    parts, _ = ablation_effects(readout, states, mean, unigram)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    ablation = ExactAblation(readout, unigram)
    in_chunks = [ablation.effects(out, mean - states.activations[rows]) for out, rows in FullOutputs.stream(readout, states)]
    assert len(in_chunks) > 1
    for one, parts_of_it in zip(exact.effects, zip(*(part.effects for part in in_chunks), strict=True), strict=True):
        # Sums over the vocabulary are taken in another order.
        torch.testing.assert_close(one, torch.cat(parts_of_it), atol=5e-6, rtol=1e-5)
    assert torch.equal(exact.argmax_changed, torch.cat([part.argmax_changed for part in in_chunks]))


RUN = ("gpt2", "llama", "gpt_neox", "granite", "phi", "cohere", "gemma2", "gemma3_text", "olmo2")


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.model_type in RUN])
def test_effects_equal_running_the_model_with_the_neuron_replaced(family: TinyFamily) -> None:
    model = tiny_model(*family)
    anatomy = dissect(model)
    readout = anatomy.readout()
    ids = torch.randint(1, VOCAB, (3, 12), generator=torch.Generator().manual_seed(3))
    recorded: list[LastLayerStates] = []

    def run() -> Tensor:
        with torch.no_grad():
            log_p: Tensor = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1).log_softmax(-1)
        return log_p

    with anatomy.recording(recorded.append):
        before = run()
    not_last = torch.ones(3, 12, dtype=torch.bool)
    not_last[:, -1] = False
    keep, targets = not_last.flatten(), ids[:, 1:].flatten()
    mlp_output = None if recorded[0].mlp_output is None else recorded[0].mlp_output[keep]
    states = TokenStates(recorded[0].activations[keep], recorded[0].residual[keep], mlp_output, targets, targets)
    mean = states.activations.mean(0)
    unigram = random_unigram(VOCAB)
    effects, _ = ablation_effects(readout, states, mean, unigram, pairs_above=-1.0)
    ((outputs, _),) = FullOutputs.stream(readout, states)
    changed = ExactAblation(readout, unigram).effects(outputs, mean - states.activations).argmax_changed
    f = unigram.log_frequency.exp()
    for i in (0, 3, anatomy.n_neurons - 1):

        def replace(module: torch.nn.Module, args: tuple[Tensor], i: int = i) -> tuple[Tensor]:
            replaced = args[0].clone()
            replaced[..., i] = mean[i]
            return (replaced,)

        handle = anatomy.down_proj.register_forward_pre_hook(replace)
        after = run()
        handle.remove()
        loss = (before - after).gather(1, targets[:, None])[:, 0]
        entropy = -(after.exp() * after).sum(-1) + (before.exp() * before).sum(-1)
        for ours, theirs in ((effects.loss, loss), (effects.entropy, entropy), (effects.frequency_kl, (before - after) @ f)):
            torch.testing.assert_close(ours[:, i], theirs, atol=1e-4, rtol=0)
        assert torch.equal(changed[:, i], after.argmax(-1) != before.argmax(-1))


def test_moments_equal_numpy_whatever_the_chunks() -> None:
    activations = 1000 + torch.randn(500, 3, dtype=torch.float64)
    moments = ActivationMoments(3)
    for chunk in activations.split([1, 0, 99, 400]):
        moments.update(chunk)
    assert moments.count == 500
    torch.testing.assert_close(moments.mean, activations.mean(0))
    torch.testing.assert_close(moments.std, activations.std(0))


def test_moments_of_half_precision_do_not_overflow() -> None:
    moments = ActivationMoments(1)
    moments.update(torch.full((70_000, 1), 60_000.0, dtype=torch.float16))
    assert float(moments.mean) == 60_000
    assert float(moments.std) == 0


def test_standard_errors_are_those_of_window_means() -> None:
    """With equal windows the mean over tokens is the mean of window means, and its error the textbook one."""
    readout = random_readout(centred=True, bias=False, neurons=3)
    states, unigram = random_states(readout), random_unigram(readout.vocab_size)
    effects, slopes = ablation_effects(readout, states, random_mean(readout), unigram)
    window = states.window
    means = EffectMeans(3)
    for half in (slice(0, 30), slice(30, 60)):
        means.update(TokenEffects(*(e[half] for e in effects)), window[half], type(slopes)(*(s[half] for s in slopes)))
    result = means.result()
    per_window = effects.entropy.double().view(6, 10, 3).mean(1)
    torch.testing.assert_close(result.entropy.value, per_window.mean(0))
    torch.testing.assert_close(result.entropy.standard_error, per_window.std(0) / 6**0.5)
    ratio = effects.direct_loss.abs().double().mean(0) / effects.loss.abs().double().mean(0)
    torch.testing.assert_close(result.mediation.value, 1 - ratio)
    jackknife = torch.stack(
        [1 - effects.direct_loss[window != w].abs().mean(0) / effects.loss[window != w].abs().mean(0) for w in range(6)]
    ).double()
    error = ((jackknife - jackknife.mean(0)).square().sum(0) * 5 / 6).sqrt()
    torch.testing.assert_close(result.mediation.standard_error, error, rtol=0.35, atol=0)


def test_one_window_has_no_standard_error_and_two_have() -> None:
    readout = random_readout(centred=True, bias=False, neurons=3)
    effects, _ = ablation_effects(readout, random_states(readout), random_mean(readout), random_unigram(readout.vocab_size))
    one, two = EffectMeans(3), EffectMeans(3)
    one.update(effects, torch.zeros(60, dtype=torch.long))
    assert not torch.isfinite(one.result().total.standard_error).any()
    two.update(effects, torch.arange(60) // 30)
    per_window = effects.loss.double().view(2, 30, 3).mean(1)
    torch.testing.assert_close(two.result().loss.standard_error, per_window.std(0) / 2**0.5)
