"""Where a steering stands in a body, whatever else the body has."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from confsteer import SteeringError
from confsteer.runtimes.vllm.front.places import WRAPPERS, steering_in

NAMES = st.text(max_size=5) | st.sampled_from(WRAPPERS)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=10,
)
OBJECTS = st.dictionaries(st.text(max_size=5), JSON, max_size=3)


@pytest.mark.parametrize(
    ("body", "asked"),
    [
        ({"vllm_xargs": {"confsteer": "entropy=0.3", "other": 1}}, "entropy=0.3"),
        ({"vllm_xargs": '{"confsteer": "entropy=0.3"}'}, "entropy=0.3"),
        ({"vllm_xargs": {"confsteer": "{}"}}, "{}"),
        ({"vllm_xargs": {"confsteer": [1]}}, [1]),
        ({"sampling_params": {"extra_args": {"confsteer": {"entropy": 0.3}}}}, {"entropy": 0.3}),
        ({"vllm_xargs": {"confsteer": None}}, None),
        ({"vllm_xargs": "confsteer"}, None),
        ({"metadata": {"confsteer": "a tag of theirs"}}, None),
        ({"messages": [{"content": "confsteer"}]}, None),
        ([{"confsteer": 1}], None),
        ("confsteer", None),
        (None, None),
    ],
)
def test_a_steering_in_its_place_is_found_and_words_are_only_words(body: Any, asked: Any) -> None:
    assert steering_in(body) == asked


@given(st.lists(st.sampled_from(WRAPPERS), max_size=3), st.text(), OBJECTS)
def test_a_steering_is_found_or_refused_in_whatever_is_taken_for_its_place(path: list[str], steering: str, others: Any) -> None:
    body: Any = {"confsteer": steering}
    for name in reversed(path):
        body = {**others, name: body}
    if path in (["vllm_xargs"], ["sampling_params", "extra_args"]):
        assert steering_in(body) == steering
    else:
        with pytest.raises(SteeringError, match=r"nothing reads a steering in .*vllm_xargs"):
            steering_in(body)


@given(JSON)
def test_anything_else_asks_for_nothing(body: Any) -> None:
    assert steering_in(body) is None
    assert steering_in({"vllm_xargs": json.dumps(body)}) is None


@pytest.mark.parametrize(
    "body",
    [
        {"vllm_xargs": {"confster": "entropy=0.3"}},
        {"vllm_xargs": {"entropy": 0.3}},
        {"sampling_params": {"extra_args": {"unigram": "0.3"}}},
        {"vllm_xargs": {"Confsteer": "entropy=0.3"}},
        {"vllm_xargs": {"conf_steer": "entropy=0.3", "other": 1}},
        {"vllm_xarg": {"confsteer": "entropy=0.3"}},
        {"vllm_args": {"confsteer": "entropy=0.3"}},
        {"sampling_params": {"extra_args": {"confsteers": "entropy=0.3"}}},
    ],
)
def test_a_misspelt_or_misplaced_name_is_refused_because_vllm_would_drop_it(body: Any) -> None:
    with pytest.raises(SteeringError, match=r"nothing reads a steering in \w+\..*: send \"vllm_xargs\": {\"confsteer\""):
        steering_in(body)


def test_two_steerings_are_refused() -> None:
    two = {"vllm_xargs": {"confsteer": "{}"}, "sampling_params": {"extra_args": {"confsteer": "entropy=0.1"}}}
    with pytest.raises(SteeringError, match=r"two steerings, in vllm_xargs\.confsteer and sampling_params\."):
        steering_in(two)


def test_an_object_is_answered_with_the_text_to_send() -> None:
    with pytest.raises(SteeringError) as caught:
        steering_in({"vllm_xargs": {"confsteer": {"entropy": 0.3}}})
    said = str(caught.value).partition("send ")[2]
    assert json.loads(json.loads("{" + said + "}")["confsteer"]) == {"entropy": 0.3}
