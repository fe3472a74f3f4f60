from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

import confsteer
from confsteer import Profile, Steering
from confsteer.cli import main
from confsteer.profile import store
from confsteer.profile.dials import DialEffect, dial_effect, example_effects, steering_effects
from confsteer.profile.hub import card
from confsteer.report import tables
from confsteer.steering import Dial
from tests.planted import planted


@functools.cache
def of_two_texts() -> Profile:
    model, tokenizer, texts, _ = planted("gpt2")
    return confsteer.calibrate(model, tokenizer, {"long": texts[5:], "short": texts[:5]}, window=64)


@pytest.fixture
def two() -> Profile:
    return of_two_texts()


def older(profile: Profile, folder: Path) -> Profile:
    """Write a profile as it was before there were several texts and temperatures, and read it."""
    document = json.loads((profile.save(folder) / store.FILE_NAME).read_text())
    del document["responses_by_text"], document["checksum"], document["format_version"]
    for curve in document["response"].values():
        del curve["temperature"]
    store.write(folder, document, profile.columns_file.file, profile.columns)
    return Profile.load(folder)


def printed(profile: Profile, capsys: Any) -> str:
    """Print it, and join the lines."""
    tables.print_profile(tables.console(), profile)
    return " ".join(capsys.readouterr().out.split())


@given(share=st.floats(-1, 1))
def test_the_promise_lies_inside_the_spread_and_neutral_is_no_temperature(share: float) -> None:
    profile = of_two_texts()
    low, high = profile.reach("entropy")
    effect = dial_effect(profile, "entropy", share * high if share > 0 else -share * low)
    assert effect.over_texts
    assert effect.temperature
    assert effect.temperatures_over_texts
    assert effect.over_texts[0] - 1e-9 <= effect.asked <= effect.over_texts[1] + 1e-9
    assert effect.temperature > 1 if effect.asked > 1e-6 else effect.temperature <= 1 + 1e-6


def test_one_text_has_no_spread() -> None:
    profile = planted("gpt2").profile
    for effect in example_effects(profile, "entropy"):
        assert effect.over_texts is None
        assert effect.temperatures_over_texts is None
        assert str(effect) == f"as a temperature {effect.temperature:.3f}"


def test_everything_that_shows_a_dial_says_how_far_its_word_carries(two: Profile, capsys: Any) -> None:
    effects = [*example_effects(two, "entropy"), *example_effects(two, "unigram")]
    assert len(effects) == 8
    shown, written = printed(two, capsys), card(two, "a/b")
    for effect in effects:
        assert "nats over the calibration texts, as a temperature" in str(effect)
        assert str(effect) in shown
        assert str(effect) in written


def test_a_profile_from_before_says_nothing_of_spread(two: Profile, capsys: Any, tmp_path: Path) -> None:
    before = older(two, tmp_path)
    assert before.responses_by_text == {}
    assert dial_effect(before, "entropy", 0.1) == DialEffect(0.1, None, None, None)
    for text in (printed(before, capsys), card(before, "a/b")):
        assert "calibration texts" not in text
        assert "temperature" not in text


def test_a_steering_has_an_effect_for_each_dial_that_it_turns(two: Profile) -> None:
    named = two.with_preset("calm", Steering(entropy=0.05, unigram=-0.01))
    assert steering_effects(named, Steering(scale={5: 0.0})) == {}
    of_preset = steering_effects(named, Steering(preset="calm", unigram=0.0))
    assert of_preset == {"entropy": dial_effect(two, "entropy", 0.05)}
    both = steering_effects(named, Steering(preset="calm"))
    assert both.keys() == {"entropy", "unigram"}
    gathered = tables.steered_dials(named, [Steering(), Steering(preset="calm"), Steering(entropy=0.05)])
    assert gathered == {dial: [effect] for dial, effect in both.items()}


def test_a_temperature_that_is_not_known_is_not_made_up(two: Profile) -> None:
    response = two.response["entropy"]
    *others, _ = response.temperature
    cut = response.model_copy(update={"temperature": (*others, None)})
    unknown = two.model_copy(update={"response": {**two.response, "entropy": cut}})
    effect = dial_effect(unknown, "entropy", two.reach("entropy")[1])
    assert effect.temperature is None
    assert "temperature" not in str(effect)


def test_the_picture_has_the_band_over_texts_and_the_temperatures(two: Profile) -> None:
    from confsteer.report.plots import draw_response, plot_response

    signs: dict[Dial, int] = {"entropy": 1, "unigram": -1}
    for dial, sign in signs.items():
        axes = Figure().subplots()
        draw_response(axes, two, dial)
        effect = dial_effect(two, dial, two.reach(dial)[1])
        x, y = np.asarray(axes.collections[0].get_paths()[0].vertices).T
        at_the_end = y[x == x.max()] * sign
        assert (at_the_end.min(), at_the_end.max()) == pytest.approx(effect.over_texts)
        (above,) = axes.child_axes
        assert above.get_xticklabels()[-1].get_text() == f"{effect.temperature:.2f}"
    assert len(plot_response(planted("gpt2").profile).axes) == 2


def test_generate_and_eval_say_what_is_known_of_the_dials_they_turn(two: Profile, tmp_path: Path) -> None:
    found = planted("gpt2")
    found._replace(profile=two).save(tmp_path)
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, found.texts[:4])))
    options = ["-p", str(tmp_path / "profile"), "-s", "entropy=0.1"]
    text = ["--text", str(tmp_path / "text.jsonl"), "--window", "64"]
    for command in (["generate", "t1 t2", str(tmp_path / "model"), *options], ["eval", str(tmp_path / "model"), *options, *text]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, (result.output, result.exception)
        assert f"entropy +0.100: {dial_effect(two, 'entropy', 0.1)}" in " ".join(result.output.split())
