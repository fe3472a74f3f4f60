from __future__ import annotations

import http.server
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from confsteer import (
    Neuron,
    NoNeuronsError,
    Profile,
    ProfileCorruptError,
    ProfileError,
    ProfileNotFoundError,
    ProfileVersionError,
    Response,
)
from confsteer.discovery.response import monotone_range
from confsteer.files import shipped_profiles
from confsteer.profile.hub import card
from confsteer.profile.profile import schema
from confsteer.profile.schema import Measurement
from confsteer.profile.store import FILE_NAME, find_profile
from confsteer.steering import Steering
from tests.paths import ROOT
from tests.planted import planted

SCHEMA = ROOT / "calibrations" / "profile.schema.json"


@pytest.fixture(scope="module")
def profile() -> Profile:
    return planted("gpt2").profile


@pytest.fixture
def saved(profile: Profile, tmp_path: Path) -> Path:
    return profile.save(tmp_path / "p")


def test_presets_survive_the_disk_and_are_checked_when_read(profile: Profile, tmp_path: Path) -> None:
    named = profile.with_preset("calm", Steering(entropy=0.05, clamp={5: (None, 2.0)}))
    named.save(tmp_path / "named")
    assert Profile.load(tmp_path / "named") == named
    assert named.checksum != profile.checksum == Profile.load(profile.save(tmp_path / "plain")).checksum
    assert json.loads((tmp_path / "plain" / "profile.json").read_text())["checksum"] == profile.checksum
    broken = named.model_copy(update={"presets": {"calm": Steering(scale={4: 0.0})}})
    broken.save(tmp_path / "broken")
    with pytest.raises(ProfileCorruptError, match="neuron 4: not in the profile"):
        Profile.load(tmp_path / "broken")


def test_a_profile_survives_the_disk(profile: Profile, saved: Path) -> None:
    loaded = Profile.load(saved)
    assert loaded == profile
    assert set(loaded.columns) == set(profile.columns)
    for name, column in profile.columns.items():
        assert torch.equal(loaded.columns[name], column)


FINITE = st.floats(allow_nan=False, allow_infinity=False)
POSITIVE = st.floats(0, 1e300)
SHARE = st.floats(0, 1)
MEASUREMENT = st.builds(Measurement, value=FINITE, standard_error=POSITIVE | st.none())


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    base = planted("gpt2").profile

    def neuron(index: int) -> Neuron:
        fields: dict[str, Any] = {"layer": base.model.layer, "index": index, "sign": draw(st.sampled_from([-1, 1]))}
        for name, field in Neuron.model_fields.items():
            if field.annotation is Measurement:
                fields[name] = draw(MEASUREMENT)
            elif field.annotation == Measurement | None:
                fields[name] = draw(MEASUREMENT | st.none())
            elif name.endswith("percentile"):
                fields[name] = draw(st.floats(0, 100))
            elif name in ("null_fraction", "argmax_changed"):
                fields[name] = draw(SHARE)
            elif name == "frequency_cosine":
                fields[name] = draw(st.floats(-1, 1))
            elif name not in {*fields, "name", "active"}:  # which only a mixture of experts has
                fields[name] = draw(POSITIVE)
        return Neuron(**fields)

    indices = draw(st.lists(st.integers(0, base.model.n_neurons - 1), unique=True, max_size=3))
    cut = draw(st.integers(0, len(indices)))
    points = sorted({0.0, *draw(st.lists(FINITE, max_size=4))})

    def curve() -> Response:
        columns: dict[str, Any] = {
            name: tuple(draw(FINITE) for _ in points) for name in Response.model_fields if name != "position"
        }
        columns["argmax_changed"] = tuple(draw(SHARE) for _ in points)
        columns["temperature"] = tuple(draw(POSITIVE.filter(bool) | st.none()) for _ in points) if draw(st.booleans()) else ()
        return Response(position=tuple(points), **columns)

    response = {}
    if indices[:cut]:
        response["entropy"] = curve()
    if indices[cut:]:
        response["unigram"] = curve()
    fields = {name: getattr(base, name) for name in Profile.model_fields if name != "columns_file"}
    assert base.corpus is not None
    fields["corpus"] = base.corpus.model_copy(update={"source": draw(st.text(max_size=20))})
    names = draw(st.lists(st.text(max_size=20), unique=True, max_size=2))
    fields["responses_by_text"] = {name: {dial: curve() for dial in response} for name in names}
    fields["entropy_neurons"] = tuple(neuron(i) for i in indices[:cut])
    fields["frequency_neurons"] = tuple(neuron(i) for i in indices[cut:])
    norm = torch.full((base.model.n_neurons,), draw(FINITE), dtype=torch.float64)
    return Profile.create(columns={**base.columns, "norm": norm}, **fields | {"response": response})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(drawn=profiles())
def test_any_profile_survives_the_disk(tmp_path: Path, drawn: Profile) -> None:
    assert Profile.load(drawn.save(tmp_path / "p")) == drawn
    assert len(list((tmp_path / "p").iterdir())) == 2, "columns of an earlier profile are removed"


@given(changes=st.lists(st.floats(-3, 3), min_size=1, max_size=12), start=st.integers(0, 11))
def test_monotone_range_is_the_widest_rising_stretch(changes: list[float], start: int) -> None:
    start %= len(changes)
    low, high = monotone_range(changes, start)
    assert low <= start <= high
    inside = changes[low : high + 1]
    assert all(a < b for a, b in itertools.pairwise(inside))
    assert low == 0 or changes[low - 1] >= changes[low]
    assert high == len(changes) - 1 or changes[high + 1] <= changes[high]


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((folder / FILE_NAME).read_text())
    change(document)
    (folder / FILE_NAME).write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("damage", "error", "sentence"),
    [
        (lambda d: d.update(format_version=4), ProfileVersionError, "format version 4; this confsteer reads versions 1, 2, 3"),
        (lambda d: d.update(format_version=True), ProfileVersionError, "format version True"),
        (lambda d: d.pop("format_version"), ProfileVersionError, "format version None"),
        (lambda d: d.update(surprise=1), ProfileCorruptError, "surprise: Extra inputs are not permitted"),
        (lambda d: d["model"].update(surprise=1), ProfileCorruptError, "model.surprise"),
        (lambda d: d.pop("corpus"), ProfileCorruptError, "corpus: Field required"),
        (lambda d: d["entropy_neurons"][0].update(sign=2), ProfileCorruptError, "entropy_neurons.0.sign"),
        (lambda d: d["entropy_neurons"][0].update(norm=float("nan")), ProfileCorruptError, "norm"),
        (lambda d: d["entropy_neurons"][0].update(norm="8"), ProfileCorruptError, "norm"),
        (lambda d: d["entropy_neurons"][0].update(index=10**6), ProfileCorruptError, "beyond the layer's 128 neurons"),
        (lambda d: d["entropy_neurons"].append(d["entropy_neurons"][0]), ProfileCorruptError, "listed twice"),
        (lambda d: d["response"].pop("entropy"), ProfileCorruptError, "if and only if it has neurons"),
        (lambda d: d["response"]["entropy"]["loss"].pop(), ProfileCorruptError, "differ in length"),
        (lambda d: d["response"]["entropy"]["position"].reverse(), ProfileCorruptError, "positions must rise"),
        (lambda d: d["entropy_neurons"][0].update(mean_activation=9.0), ProfileCorruptError, "was changed after it was written"),
        (lambda d: d.pop("checksum"), ProfileCorruptError, "was changed after it was written"),
        (lambda d: d["columns_file"].update(file="../x.safetensors"), ProfileCorruptError, "columns_file.file"),
    ],
)
def test_a_damaged_profile_is_refused_with_what_is_wrong(
    saved: Path, damage: Callable[[dict[str, Any]], Any], error: type[ProfileError], sentence: str
) -> None:
    rewrite(saved, damage)
    with pytest.raises(error) as caught:
        Profile.load(saved)
    assert sentence in str(caught.value)


def test_truncation_is_noticed_wherever_it_happens(saved: Path) -> None:
    for file in (saved / FILE_NAME, next(saved.glob("columns-*"))):
        whole = file.read_bytes()
        for length in (0, 1, len(whole) // 2, len(whole) - 3):
            file.write_bytes(whole[:length])
            with pytest.raises(ProfileCorruptError):
                Profile.load(saved)
        file.write_bytes(whole)
    Profile.load(saved)


def test_a_changed_or_missing_columns_file_is_noticed(saved: Path) -> None:
    (columns,) = saved.glob("columns-*")
    damaged = bytearray(columns.read_bytes())
    damaged[-1] ^= 1
    columns.write_bytes(damaged)
    with pytest.raises(ProfileCorruptError, match="SHA-256"):
        Profile.load(saved)
    columns.unlink()
    with pytest.raises(ProfileCorruptError, match="cannot read"):
        Profile.load(saved)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"a": 1, "a": 2}', "[" * 100_000, "\x00\xff", '{"format_version": 1}'])
def test_what_is_not_a_profile_is_refused(saved: Path, text: str) -> None:
    (saved / FILE_NAME).write_text(text, encoding="latin-1")
    with pytest.raises(ProfileCorruptError):
        Profile.load(saved)


def test_saving_replaces_the_old_profile_in_one_step(profile: Profile, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever write fails, the folder holds the old profile."""
    newer = Profile.create(
        columns={**profile.columns, "norm": torch.ones(profile.model.n_neurons)},
        **{name: getattr(profile, name) for name in Profile.model_fields if name not in ("columns_file", "seed")},
        seed=7,
    )
    real = os.replace
    for failing in (1, 2):
        calls = 0

        def replace(source: str, target: Path, failing: int = failing) -> None:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError(28, "No space left on device")
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(ProfileError, match="No space left on device"):
            newer.save(saved)
        monkeypatch.setattr(os, "replace", real)
        assert Profile.load(saved) == profile
        assert len(list(saved.iterdir())) == 2, "nothing of the new one stays behind"
    newer.save(saved)
    assert Profile.load(saved) == newer
    assert len(list(saved.iterdir())) == 2


def test_a_place_that_cannot_be_written_is_a_clear_error(profile: Profile, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ProfileError, match="cannot write the profile"):
        profile.save(tmp_path / "file" / "p")


def test_the_checked_in_schema_is_the_current_one() -> None:
    """To renew: python -c "import json, confsteer.profile.profile as p; print(json.dumps(p.schema(), indent=1))"."""
    assert json.loads(SCHEMA.read_text()) == schema()


def test_profiles_are_found_by_folder_and_by_name(saved: Path) -> None:
    assert find_profile(saved) == saved
    for name, folder in shipped_profiles().items():
        assert find_profile(name) == folder
        Profile.load(name)
    assert "confsteer-demo" in shipped_profiles()


def test_a_profile_is_shown_in_a_line() -> None:
    profile = Profile.load("confsteer-demo")
    counts = f"{len(profile.entropy_neurons)} entropy and {len(profile.frequency_neurons)} token-frequency neurons in layer 3"
    assert repr(profile) == str(profile) == f"<Profile of confsteer-demo: {counts}>"


def test_what_was_measured_cannot_be_changed(profile: Profile) -> None:
    for part, field in ((profile, "seed"), (profile.layer, "null_dims"), (profile.entropy_neurons[0], "sign")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, field, getattr(part, field))


def test_what_is_no_profile_says_what_would_be_one(tmp_path: Path) -> None:
    with pytest.raises(ProfileNotFoundError, match=r"folder, a hub repository .* or one of confsteer-demo"):
        Profile.load("nothing-of-this-name")
    with pytest.raises(ProfileNotFoundError, match=r"has no profile\.json"):
        Profile.load(tmp_path)
    with pytest.raises(ProfileNotFoundError, match="the hub gave no such repository"):
        Profile.load("nobody/nothing")


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of a model hub as one upload and one download of small files need."""

    files: dict[str, bytes]
    commit = "0123456789abcdef0123456789abcdef01234567"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, body: Any, status: int = 200, **headers: str) -> None:
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(payload)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)

    def do_POST(self) -> None:
        import base64

        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.answer({"url": f"http://{self.headers['Host']}/someone/profile", "name": "someone/profile"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif self.path.endswith("/commit/main"):
            for line in body.splitlines():
                operation = json.loads(line)
                if operation["key"] == "file":
                    self.files[operation["value"]["path"]] = base64.b64decode(operation["value"]["content"])
                elif operation["key"] == "deletedFile":
                    del self.files[operation["value"]["path"]]
            self.answer(
                {"commitUrl": f"http://{self.headers['Host']}/c/{self.commit}", "commitOid": self.commit, "success": True}
            )
        elif "/paths-info/" in self.path:
            self.answer([])
        else:
            self.answer({"error": f"unexpected POST {self.path}"}, 404)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if "/resolve/" in path:
            content = self.files[path.split("/", 5)[5]]
            import hashlib

            etag = '"' + hashlib.sha256(content).hexdigest() + '"'
            self.answer(content, ETag=etag, X_Repo_Commit=self.commit, Content_Type="application/octet-stream")
        elif "/tree/" in path:
            self.answer([{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in self.files.items()])
        elif path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in self.files]
            self.answer({"id": "someone/profile", "sha": self.commit, "siblings": siblings, "private": False})
        else:
            self.answer({"error": f"unexpected GET {path}"}, 404)

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def hub() -> Iterator[tuple[str, dict[str, bytes]]]:
    files: dict[str, bytes] = {"columns-000000000000.safetensors": b"of an earlier profile"}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (Hub,), {"files": files}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", files
    server.shutdown()


def test_a_profile_is_pushed_with_a_card_and_loaded_by_its_repository(
    saved: Path, profile: Profile, hub: tuple[str, dict[str, bytes]], tmp_path: Path
) -> None:
    """In a process of its own: huggingface_hub reads its address when it is imported."""
    endpoint, files = hub
    environment = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": "hf_test",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
    }
    environment["HF_HUB_DISABLE_XET"] = "1"

    def confsteer(*arguments: str) -> str:
        command = [sys.executable, "-m", "confsteer", *arguments]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    assert "someone/profile" in confsteer("push", str(saved), "someone/profile")
    assert set(files) == {"README.md", ".gitattributes", FILE_NAME, profile.columns_file.file} - {".gitattributes"}
    card = files["README.md"].decode()
    assert "confsteer.steer(model, 'someone/profile', entropy=+0.2)" in card
    assert all(f"| {n.layer}.{n.index} |" in card for n in profile.entropy_neurons)
    shutil.rmtree(saved)
    shown = confsteer("show", "someone/profile")
    assert all(f"{n.layer}.{n.index}" in shown for n in profile.entropy_neurons)


def test_a_card_is_plain_text_whatever_the_profile_says(profile: Profile) -> None:
    assert profile.corpus is not None
    hostile = profile.model_copy(update={"corpus": profile.corpus.model_copy(update={"source": "<script>\n---\n# `x` [y](z)"})})
    assert "<script>" not in card(hostile, "a/b")
    assert "script ---" not in card(hostile, "a/b").splitlines()


def test_neurons_without_a_sign_are_reported_and_no_dial_turns_them() -> None:
    profile = planted("gpt2").profile
    unsigned = tuple(neuron.model_copy(update={"sign": 0}) for neuron in profile.entropy_neurons)
    fields = {name: getattr(profile, name) for name in Profile.model_fields}
    with pytest.raises(ValidationError, match="must have a response curve if and only if it has neurons with a sign"):
        Profile(**fields | {"entropy_neurons": unsigned})
    response = {dial: curve for dial, curve in profile.response.items() if dial != "entropy"}
    without = Profile(**fields | {"entropy_neurons": unsigned, "response": response})
    with pytest.raises(NoNeuronsError, match=r"entropy neurons of .* have no clear sign on the calibration text"):
        without.edit(Steering(entropy=0.1))
    index = unsigned[0].index
    assert without.edit(Steering(scale={index: 2.0})).gain.max() == 2
    # One without a sign stays where it is when the dial turns the others.
    mixed = Profile(**fields | {"entropy_neurons": (unsigned[0], *profile.entropy_neurons[1:])})
    assert mixed.edit(Steering(entropy=0.1)).bias[0] == 0
    assert f"| {unsigned[0].layer}.{index} | none |" in card(mixed, "a/b")
