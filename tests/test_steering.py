from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from confsteer import NoNeuronsError, Profile, Steering, SteeringError
from confsteer.discovery.response import monotone_range
from confsteer.steering import DIALS, After, Dial, First, SteeringFields
from tests.models import ENTROPY_NEURONS, FREQUENCY_NEURON
from tests.planted import planted

NUMBER = st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: float(np.float32(x))).filter(lambda x: abs(x) <= 1e6)
KEY = st.one_of(st.integers(0, 10_000), st.sampled_from(["entropy", "frequency"]))
BOUNDS: st.SearchStrategy[Any] = st.one_of(
    st.tuples(NUMBER, NUMBER).map(lambda b: (min(b), max(b))),
    st.tuples(st.none(), NUMBER | st.none()),
    st.tuples(NUMBER, st.none()),
)
STEERING = st.builds(
    Steering,
    entropy=NUMBER | st.none(),
    unigram=NUMBER | st.none(),
    scale=st.dictionaries(KEY, NUMBER, max_size=3),
    shift=st.dictionaries(KEY, NUMBER, max_size=3),
    clamp=st.dictionaries(KEY, NUMBER | BOUNDS, max_size=3),
    positions=st.one_of(
        st.sampled_from(["all", "generated"]),
        st.builds(First, first=st.integers(1, 10**9)),
        st.builds(After, after=st.text(min_size=1, max_size=20) | st.lists(st.integers(0, 2**31), min_size=1).map(tuple)),
    ),
    preset=st.none() | st.sampled_from(["calibrated", "v1.2_a-b"]),
)


@pytest.fixture(scope="module")
def profile() -> Profile:
    return planted("gpt2").profile


def edit_of(profile: Profile, **request: Any) -> dict[int, Any]:
    """Neuron index -> (gain, bias, low, high)."""
    edit = profile.edit(Steering.parse(request))
    return {n.index: tuple(float(c[row]) for c in edit) for row, n in enumerate(profile.steerable)}


NEUTRAL = (1.0, 0.0, -np.inf, np.inf)


@given(STEERING)
def test_json_gives_back_the_same_steering(steering: Steering) -> None:
    assert Steering.parse(steering.model_dump_json()) == steering
    assert Steering.parse(json.loads(steering.model_dump_json())) == steering


@pytest.mark.parametrize(
    "text",
    [
        "entropy=+0.3",
        "entropy=-0.1 unigram=+0.05",
        "scale.757=0 scale.entropy=2",
        "clamp.757=1.5",
        "clamp.757=:2 clamp.frequency=-1:",
        "clamp.5=0:2 positions=generated",
        "preset=calm_2 entropy=+0.1 shift.5=-0.25",
        "entropy=+0.3 positions=first:20",
        "entropy=+0.3 positions=after:</think>",
        "positions=after:a=b:c",
        'positions={"after":[151668,271]}',
        r'positions={"after":"\u001b[1mThe\u0020answer:\n"}',
    ],
)
def test_text_and_str_are_inverses(text: str) -> None:
    assert str(Steering.parse(text)) == text


@given(STEERING)
def test_the_text_of_positions_is_one_printable_word_that_gives_them_back(steering: Steering) -> None:
    text = str(Steering(positions=steering.positions))
    assert text.isprintable()
    assert Steering.parse(text).positions == steering.positions


def test_editors_are_told_of_every_field() -> None:
    assert list(SteeringFields.__annotations__) == list(Steering.model_fields)


def test_nothing_asked_is_neutral(profile: Profile) -> None:
    assert str(Steering()) == "neutral"
    assert Steering.parse("neutral") == Steering()
    assert set(edit_of(profile).values()) == {NEUTRAL}
    assert set(edit_of(profile, entropy=0.0, unigram=0).values()) == {NEUTRAL}


def test_scaling_is_about_the_mean(profile: Profile) -> None:
    edit = edit_of(profile, scale={5: 0.25})
    gain, bias, low, high = edit[5]
    neuron = next(n for n in profile.entropy_neurons if n.index == 5)
    assert gain * neuron.mean_activation + bias == pytest.approx(neuron.mean_activation, rel=1e-5)
    assert gain == 0.25
    assert (low, high) == (-np.inf, np.inf)
    assert edit[11] == edit[FREQUENCY_NEURON] == NEUTRAL


def test_a_group_is_all_its_neurons(profile: Profile) -> None:
    edit = edit_of(profile, scale={"entropy": 0.0}, clamp={"frequency": (None, 1.0)})
    assert [edit[i][0] for i in ENTROPY_NEURONS] == [0.0, 0.0]
    assert edit[FREQUENCY_NEURON] == (1.0, 0.0, -np.inf, 1.0)


@pytest.mark.parametrize(("value", "bounds"), [(1.5, (1.5, 1.5)), ((0.0, 2.0), (0.0, 2.0)), ((None, 2.0), (-np.inf, 2.0))])
def test_clamps_are_bounds(profile: Profile, value: Any, bounds: tuple[float, float]) -> None:
    assert edit_of(profile, clamp={5: value})[5] == (1.0, 0.0, *bounds)


def test_a_shift_adds_to_what_the_scale_leaves(profile: Profile) -> None:
    scaled, both = edit_of(profile, scale={5: 0.25})[5], edit_of(profile, scale={5: 0.25}, shift={5: -0.5})[5]
    assert both == (scaled[0], pytest.approx(scaled[1] - 0.5, rel=1e-6), *scaled[2:])
    assert [edit_of(profile, shift={"entropy": 0.5})[i] for i in ENTROPY_NEURONS] == [(1.0, 0.5, -np.inf, np.inf)] * 2


def test_a_preset_is_its_steering_and_what_is_given_beside_it_takes_its_place(profile: Profile) -> None:
    calm = Steering(entropy=0.05, scale={5: 0.5})
    with_preset = profile.with_preset("calm", calm)
    assert profile.presets == {}
    assert edit_of(with_preset, preset="calm") == edit_of(profile, entropy=0.05, scale={5: 0.5})
    assert edit_of(with_preset, preset="calm", entropy=-0.02) == edit_of(profile, entropy=-0.02, scale={5: 0.5})
    assert edit_of(with_preset, preset="calm", scale={}) == edit_of(profile, entropy=0.05)
    assert with_preset.resolve(Steering(preset="calm", positions="generated")).positions == "generated"


def test_presets_that_do_not_work_are_refused(profile: Profile) -> None:
    with pytest.raises(SteeringError, match=r"preset 'calm': not in the profile of .*, which has loud"):
        edit_of(profile.with_preset("loud", Steering(entropy=0.05)), preset="calm")
    with pytest.raises(SteeringError, match="is made of another preset"):
        profile.with_preset("calm", Steering(preset="loud"))
    with pytest.raises(SteeringError, match="out of reach"):
        profile.with_preset("calm", Steering(entropy=100))
    with pytest.raises(SteeringError, match="preset: String should match"):
        profile.with_preset("<b>", Steering(entropy=0.05))


def test_a_marker_is_of_tokens_that_the_model_has(profile: Profile) -> None:
    marker = {"positions": {"after": [95]}}
    assert profile.resolve(Steering.parse(marker)).positions == After(after=(95,))
    with pytest.raises(SteeringError, match=r"positions=.*: 96 is no token of .*, whose ids end at 95"):
        edit_of(profile, positions={"after": [3, 96]})


@pytest.mark.parametrize("dial", DIALS)
def test_a_dial_pushes_each_neuron_by_its_sign_and_deviation(profile: Profile, dial: Dial) -> None:
    for share in (-0.8, -0.1, 0.1, 0.8):
        change = share * abs(profile.reach(dial)[int(share > 0)])
        position = profile.dial_position(dial, change)
        assert position * share > 0
        edit = edit_of(profile, **{dial: change})
        for neuron in profile.steerable:
            bias = position * neuron.sign * neuron.std_activation if neuron in profile.neurons(dial) else 0.0
            assert edit[neuron.index] == (1.0, pytest.approx(bias, rel=1e-5), -np.inf, np.inf)


@pytest.mark.parametrize("dial", DIALS)
def test_dial_positions_invert_the_response_curve(profile: Profile, dial: Dial) -> None:
    curve = profile.response[dial]
    first, last = monotone_range(curve.change(dial), curve.zero)
    for position, change in list(zip(curve.position, curve.change(dial), strict=True))[first : last + 1]:
        assert profile.dial_position(dial, change) == pytest.approx(position, abs=1e-9)
    low, high = profile.reach(dial)
    assert (low, high) == (curve.change(dial)[first], curve.change(dial)[last])
    positions = [profile.dial_position(dial, c) for c in np.linspace(low, high, 50)]
    assert positions == sorted(positions)


@pytest.mark.parametrize("dial", DIALS)
def test_out_of_reach_names_the_range(profile: Profile, dial: Dial) -> None:
    low, high = profile.reach(dial)
    for change in (low - 0.01, high + 0.01, 1e6):
        with pytest.raises(SteeringError, match=f"from {low:+.3f} to {high:+.3f} nats".replace("+", r"\+")):
            edit_of(profile, **{dial: change})


def test_a_dial_without_neurons_says_so(profile: Profile) -> None:
    silent = profile.model_copy(update={"frequency_neurons": (), "response": {"entropy": profile.response["entropy"]}})
    with pytest.raises(NoNeuronsError, match="no token-frequency neurons"):
        edit_of(silent, unigram=0.1)
    with pytest.raises(SteeringError, match="frequency neurons: not in the profile"):
        edit_of(silent, scale={"frequency": 0.0})


def test_a_neuron_outside_the_profile_is_refused_with_those_inside(profile: Profile) -> None:
    with pytest.raises(SteeringError, match=r"neuron 4: not in the profile of .*, which has 11, 5, 20"):
        edit_of(profile, scale={4: 0.0})


def test_a_neuron_named_as_in_tables_is_refused_with_its_name(profile: Profile) -> None:
    layer = profile.model.layer
    with pytest.raises(SteeringError, match=r"which has 11, 5, 20\. A request names a neuron without its layer: 5$"):
        edit_of(profile, scale={f"{layer}.5": 0.0})
    for key in (f"{layer + 1}.5", f"{layer}.4"):
        with pytest.raises(SteeringError, match=r"which has 11, 5, 20$"):
            edit_of(profile, scale={key: 0.0})


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({"entropie": 0.1}, "unknown key 'entropie'; a steering has entropy, unigram, scale, shift, clamp, positions, preset"),
        ({"entropy": "0.1"}, "entropy: Input should be a valid number"),
        ({"entropy": True}, "entropy: Input should be a valid number"),
        ({"entropy": float("nan")}, "entropy: Input should be a finite number"),
        ({"entropy": float("inf")}, "entropy: Input should be"),
        ({"entropy": 1e7}, "entropy: Input should be less than or equal to 1000000"),
        ({"scale": {"5": None}}, "scale.5"),
        ({"scale": {"five": 1.0}}, "scale.five"),
        ({"scale": [5]}, "scale: Input should be a valid dictionary"),
        ({"scale": {"5": 1.0, 5: 2.0}}, "a neuron is named twice"),
        ({"clamp": {"5": [2.0, 1.0]}}, "neuron 5: the lower bound 2 is above the upper bound 1"),
        ({"clamp": {"5": [1.0]}}, "clamp.5"),
        ({"positions": "some"}, 'positions: should be all, generated, {"first": N} or {"after": TEXT or token ids}'),
        ({"positions": {"before": "x"}}, "positions: should be all, generated"),
        ({"positions": {"first": 0}}, "positions.first: Input should be greater than or equal to 1"),
        ({"positions": {"first": 1, "after": "x"}}, "positions.first.after: Extra inputs are not permitted"),
        ({"positions": {"after": ""}}, "a marker is 1 to 200 characters, or as many token ids; this one is 0"),
        ({"positions": {"after": [5, -1]}}, "-1 is no token id"),
        ({"positions": {"after": [5, "x"]}}, "a marker is text, or a list of token ids (given [5, 'x'])"),
        ({"positions": {"after": [5, True]}}, "a marker is text, or a list of token ids"),
        ({"positions": {"after": 5}}, "a marker is text, or a list of token ids (given 5)"),
        ('{"positions": {"after": "\\ud800"}}', "half a character"),
        ("positions=first:many", "'many' is not a number of tokens"),
        ('positions={"after":"a b"}', r"write a space in it as \u0020"),
        ("{broken", "this is not JSON"),
        ("[" * 10_000, "not KEY=VALUE"),
        ('{"scale":' * 1_000, "not JSON"),
        ("entropy=0.1 " * 1_000, "a steering has at most 10,000 characters; this one has 12,000"),
        ({"preset": "no spaces"}, "preset: String should match pattern"),
        ("entropy", "'entropy' is not KEY=VALUE"),
        ("entropy=much", "'much' is not a number"),
        ("scale.5=1:2:3", "is not a number"),
        ("scale=1 scale.5=1", "'scale.5=1': scale has been given already, without a neuron"),
        ("positions=all positions.5=1", "positions has been given already"),
        ("entropy=0.1 entropy=0.2", "'entropy=0.2': entropy has been given already"),
        (3, "not int"),
        (None, "not NoneType"),
    ],
)
def test_wrong_requests_are_refused_with_a_sentence(request_: Any, sentence: str) -> None:
    with pytest.raises(SteeringError) as error:
        Steering.parse(request_)
    assert sentence in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=8) | st.sampled_from(list(Steering.model_fields)), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*Steering.model_fields, "x"]), JSON, max_size=4) | JSON)
def test_any_json_is_a_steering_or_a_clear_error(profile: Profile, request_: Any) -> None:
    for request in (request_, json.dumps(request_)):
        try:
            edit = profile.edit(Steering.parse(request))
        except (SteeringError, NoNeuronsError) as error:
            assert str(error)
        else:
            assert np.isfinite(edit.gain).all()
            assert np.isfinite(edit.bias).all()
            assert (edit.low <= edit.high).all()
