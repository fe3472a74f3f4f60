from __future__ import annotations

import base64
import functools
import json
import os
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from confsteer import ConfsteerError, ProfileMismatchError, Steering
from confsteer.cli import main
from confsteer.evaluation.choices import ChoiceComparison, evaluate_choices
from confsteer.evaluation.comparison import TextComparison
from confsteer.evaluation.evaluate import Evaluation, evaluate
from confsteer.evaluation.metrics import METRICS
from confsteer.report.findings import AGAINST, significant_sign
from confsteer.report.page import render, write_report
from confsteer.report.results import read_result
from confsteer.results.bootstrap import Interval
from confsteer.studies.induction import induction
from confsteer.studies.repetition import Repetition
from confsteer.text.questions import Question
from confsteer.tuning.tune import Tuning
from tests.browser import chromium
from tests.models import zipf_texts
from tests.planted import planted


@functools.cache
def evaluation() -> Evaluation:
    """Of two texts, which are one text for speed, and of questions."""
    model, tokenizer, _, profile = planted("llama")
    texts, steerings = {"zipf": zipf_texts(8, 60, seed=5)}, [Steering(entropy=0.3), Steering(unigram=0.05)]
    result = evaluate(model, tokenizer, texts, profile, steerings, window=64)
    other = result.texts[0].model_copy(update={"source": "other"})
    study = induction(model, tokenizer, profile, repeat=Repetition(sequences=3, half=16))
    questions = [Question(text, ("t1", "t2 t3"), i % 2) for i, text in enumerate(zipf_texts(20, 9))]
    answered = evaluate_choices(model, tokenizer, {"quiz": questions}, profile, steerings)
    return result.model_copy(update={"texts": (*result.texts, other), "induction": study, "choices": answered})


def tuning(validation: Interval) -> Tuning:
    result = evaluation()
    return Tuning(
        model=result.model,
        profile=result.profile,
        versions=result.versions,
        parameters="dials",
        objective="nll",
        steering=Steering(entropy=0.3),
        temperature=1.1,
        tokens={"train": 700, "stop": 100, "validation": 100, "test": 300},
        validation=validation,
        texts=result.texts[:1],
        left_out=result.texts[1:],
        steps=7,
        seconds=3.2,
    )


class Page(HTMLParser):
    """What is on a page: its tables, its pictures, its text, and every tag with its attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.within = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.within = tag if tag in ("td", "th", "style") else self.within
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self.text += " "

    def handle_endtag(self, tag: str) -> None:
        self.within = "" if tag == self.within else self.within

    def handle_data(self, data: str) -> None:
        if self.within != "style":
            self.text += data
        if self.within in ("td", "th"):
            self.tables[-1][-1][-1] = f"{self.tables[-1][-1][-1]} {data}".strip()

    @property
    def words(self) -> str:
        return " ".join(self.text.split())

    @property
    def pictures(self) -> list[bytes]:
        sources = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
        return [base64.b64decode(source.partition(",")[2]) for source in sources]


@functools.cache
def html() -> str:
    return render(evaluation(), planted("llama").profile)


@functools.cache
def page() -> Page:
    return Page(html())


def numbers(cell: str) -> list[float]:
    """Value and interval of a cell, percentages as shares."""
    words = [word for word in cell.replace("−", "-").split() if word not in ("…", "better", "worse")]
    return [float(word.rstrip("%")) / (100 if word.endswith("%") else 1) for word in words]


def test_the_numbers_of_the_tables_are_the_results() -> None:
    result, tables = evaluation(), iter(page().tables)
    compared: list[TextComparison | ChoiceComparison] = [*result.texts, *result.choices]
    for text in compared:
        header, *rows = next(tables)
        names = [name for name in METRICS if name in text.rows[0].metrics]
        assert {name for row in text.rows for name in row.metrics} == set(names), "no metric is left out"
        assert header[1:] == [METRICS[name].label for name in names]
        for cells, row in zip(rows, text.rows, strict=True):
            assert cells[0].startswith(row.name)
            for cell, name in zip(cells[1:], names, strict=True):
                assert (cell == "–") == (name not in row.metrics)
                if cell == "–":
                    continue
                digits = METRICS[name].digits + 2 * METRICS[name].percent
                assert numbers(cell) == pytest.approx(row.metrics[name], abs=0.51 * 10**-digits)
        for kind in AGAINST if isinstance(text, ChoiceComparison) else [kind for kind in AGAINST if kind != "chance"]:
            _, *rows = next(tables)
            subtracted = [row for row in text.rows if kind in row.minus]
            for cells, row in zip(rows, subtracted, strict=True):
                there = [name for name in METRICS if any(name in other.minus[kind] for other in subtracted)]
                for cell, name in zip(cells[1:], there, strict=True):
                    if name not in row.minus[kind]:
                        assert cell == "–"
                        continue
                    difference = row.minus[kind][name]
                    assert numbers(cell) == pytest.approx(difference, abs=0.51 * 10 ** -METRICS[name].digits)
                    good = METRICS[name].better
                    verdict = {None: None, good: "better"}.get(significant_sign(difference), "worse") if good else None
                    assert [word for word in ("better", "worse") if word in cell] == ([verdict] if verdict else [])
    assert next(tables, None) is None


def test_differences_within_their_interval_are_called_none() -> None:
    assert significant_sign(Interval(-0.1, -0.3, 0.0)) is None
    assert significant_sign(Interval(0.0, 0.0, 0.0)) is None
    assert significant_sign(Interval(-0.1, -0.2, -0.01)) == "lower"
    assert significant_sign(Interval(0.1, 0.01, 0.2)) == "higher"


@pytest.mark.parametrize(
    ("ece", "matched", "sentences"),
    [
        (
            Interval(-0.02, -0.03, -0.01),
            Interval(-0.02, -0.03, -0.01),
            [
                "Yes: its ECE is lower, by 0.0200; from the fitted temperature no difference beyond the interval.",
                "ECE is lower by 0.0200 (0.0100 to 0.0300)",
                "Yes: the temperature of the same mean entropy is",
            ],
        ),
        (
            Interval(-0.02, -0.03, 0.01),
            Interval(-0.02, -0.03, 0.01),
            [
                "Not shown: no difference in ECE beyond the interval.",
                "ECE: no difference beyond the interval (−0.0300 to +0.0100)",
                "Not shown: no difference beyond the interval from the temperature",
            ],
        ),
        (
            Interval(0.02, 0.01, 0.03),
            Interval(0.02, 0.01, 0.03),
            [
                "No: its ECE is higher, by 0.0200.",
                "ECE is higher by 0.0200 (0.0100 to 0.0300)",
                "No: the temperature of the same mean entropy is",
            ],
        ),
    ],
)
def test_the_summary_says_what_the_intervals_say(ece: Interval, matched: Interval, sentences: list[str]) -> None:
    result = evaluation()
    neutral, *_ = result.texts[0].rows
    steering = result.texts[0].of_kind("steering")[0]
    nothing = dict.fromkeys(("loss", "brier"), Interval(0.0, -1.0, 1.0))
    differences: dict[Any, Any] = {"neutral": steering.minus["neutral"] | {"ece": ece}}
    differences |= {"matched temperature": nothing | {"ece": matched}, "temperature": nothing | {"ece": Interval(0.0, -1.0, 1.0)}}
    rows = (neutral, steering.model_copy(update={"minus": differences}))
    changed = result.model_copy(
        update={"texts": (result.texts[0].model_copy(update={"rows": rows}),), "induction": None, "choices": ()}
    )
    words = Page(render(changed, None)).words
    for sentence in sentences:
        assert sentence in words


@pytest.mark.parametrize(
    ("validation", "sentence"),
    [
        (Interval(-0.02, -0.03, -0.01), "Yes. On the validation split its loss less neutral's is −0.0200 (−0.0300 to −0.0100)"),
        (Interval(-0.02, -0.03, 0.01), "No, it is refused. On the validation split its loss less neutral's is −0.0200"),
    ],
)
def test_a_tuning_says_what_was_tuned_and_whether_it_gained(validation: Interval, sentence: str) -> None:
    found = Page(render(tuning(validation), None))
    assert "Tuning of" in found.words
    assert sentence in found.words
    assert "steering entropy=+0.3 temperature 1.1000, tuned together with the steering" in found.words
    assert "train 700, stop 100, validation 100, test 300" in found.words
    assert "other, fitted without it" in found.words
    assert "fitted on the split that was tuned on" in found.words
    assert len(found.tables) == 8


def test_every_picture_is_drawn_and_described() -> None:
    pictures = [attributes for tag, attributes in page().tags if tag == "img"]
    assert all(attributes["alt"] for attributes in pictures)
    # Per text: 4 reliability diagrams, 2 dials, risk, entropies, 3 by frequency; of the questions 4 and risk;
    # 4 of the profile, 3 of the study.
    assert len(pictures) == 2 * 11 + 5 + 4 + 3
    for picture in page().pictures:
        assert ElementTree.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"


def test_of_many_steerings_six_are_drawn_and_the_page_says_so() -> None:
    text = evaluation().texts[0]
    steering = text.of_kind("steering")[0]
    sweep = [steering.model_copy(update={"name": f"number {i}"}) for i in range(20)]
    best = steering.metrics["ece"]._replace(value=0.0)
    sweep[7] = sweep[7].model_copy(update={"metrics": steering.metrics | {"ece": best}})
    rows = (*text.rows[:2], *sweep)
    few = Page(render(evaluation().model_copy(update={"texts": (text.model_copy(update={"rows": rows}),), "choices": ()}), None))
    described = [a["alt"] or "" for tag, a in few.tags if tag == "img" if (a["alt"] or "").startswith("Reliability")]
    drawn = [alt for alt in described if "number" in alt]
    assert len(drawn) <= 6
    assert any("number 7:" in alt for alt in drawn)
    assert f"Of the 20 steerings {len(drawn)} are drawn" in few.words
    assert len(few.tables[0]) == 1 + len(rows), "the tables have them all"


HOSTILE = "<script>alert('x')</script><img src=x onerror=y>&\"'$\\frac$ {{ 7 * 7 }} \x00 -->" + "long" * 30


def hostile() -> Evaluation:
    """A result in which every text is `HOSTILE`."""
    result, (text, *_) = evaluation(), evaluation().texts
    study = result.induction
    assert study is not None
    rows = tuple(row.model_copy(update={"name": HOSTILE + row.name}) for row in text.rows)
    kinds = tuple(kind.model_copy(update={"source": HOSTILE}) for kind in study.kinds)
    update: dict[str, Any] = {"model": HOSTILE, "profile": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    update |= {"texts": (text.model_copy(update={"rows": rows, "source": HOSTILE}),), "choices": ()}
    return result.model_copy(update=update | {"induction": study.model_copy(update={"kinds": kinds})})


def test_nothing_of_a_result_is_markup_or_a_formula() -> None:
    found = Page(render(hostile(), None))
    for tag, attributes in found.tags:
        assert tag not in ("script", "iframe", "object", "link")
        assert not any(name.startswith("on") for name in attributes)
        assert tag != "img" or str(attributes["src"]).startswith("data:")
    assert "<script>alert('x')</script>" in found.text
    assert "{{ 7 * 7 }}" in found.text
    for picture in found.pictures:
        assert ElementTree.fromstring(picture).find(".//{http://www.w3.org/2000/svg}script") is None


def test_the_same_result_gives_the_same_bytes(tmp_path: Path) -> None:
    write_report(evaluation(), tmp_path / "a.html", planted("llama").profile)
    assert (tmp_path / "a.html").read_bytes() == html().encode()
    assert os.listdir(tmp_path) == ["a.html"], "nothing is left beside it"


def test_nothing_is_asked_of_anyone() -> None:
    """No address but the page's own, in any attribute, style or picture."""
    policy = [a["content"] for tag, a in page().tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    for tag, attributes in page().tags:
        assert tag != "a" or str(attributes["href"]).startswith("#")
        assert "url(" not in str(attributes.get("style"))
    for picture in page().pictures:
        for element in ElementTree.fromstring(picture).iter():
            for name, value in element.attrib.items():
                assert not name.endswith("href") or value.startswith(("#", "data:"))


def test_a_profile_of_another_model_is_refused() -> None:
    with pytest.raises(ProfileMismatchError, match="the result is of"):
        render(evaluation().model_copy(update={"model": "another"}), planted("llama").profile)


def test_a_profile_that_has_changed_is_said() -> None:
    profile = planted("llama").profile
    changed = profile.with_preset("calm", Steering(entropy=0.1))
    alone = evaluation().model_copy(update={"texts": (), "choices": (), "induction": None})
    assert changed.checksum in Page(render(alone, changed)).words
    assert "Drawn below is the profile as it is now" not in page().words


def test_the_command_reads_what_was_written(tmp_path: Path) -> None:
    for result in (tuning(Interval(-0.02, -0.03, -0.01)), evaluation()):
        (tmp_path / "r.json").write_text(result.model_dump_json())
        assert read_result(tmp_path / "r.json") == result
    planted("llama").profile.save(tmp_path / "profile")
    ran = CliRunner().invoke(main, ["report", str(tmp_path / "r.json"), "-p", str(tmp_path / "profile")])
    assert ran.exit_code == 0, ran.output
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == html()


def test_what_is_no_result_is_a_sentence(tmp_path: Path) -> None:
    whole = json.loads(evaluation().model_dump_json())
    headless = json.loads(json.dumps(whole))
    del headless["texts"][0]["rows"][0]
    bare = json.loads(json.dumps(whole))
    del bare["texts"][1]["rows"][3]["metrics"]["ece"]
    documents = {
        "not JSON": b"{",
        "a list": b"[]",
        "texts: Field required": json.dumps({k: v for k, v in whole.items() if k != "texts"}).encode(),
        "of this version's tuning: parameters": json.dumps(whole | {"objective": "nll"}).encode(),
        "the first row of 'zipf' is not neutral": json.dumps(headless).encode(),
        "on 'other' has no ece": json.dumps(bare).encode(),
    }
    file = tmp_path / "r.json"
    for sentence, content in documents.items():
        file.write_bytes(content)
        with pytest.raises(ConfsteerError, match=sentence):
            read_result(file)
        ran = CliRunner().invoke(main, ["report", str(file)])
        assert (ran.exit_code, "Traceback" in ran.output) == (1, False)
        assert not (tmp_path / "r.html").exists()
    with pytest.raises(ConfsteerError, match=r"cannot read .*nothing"):
        read_result(tmp_path / "nothing")
    with pytest.raises(ConfsteerError, match="cannot write"):
        write_report(evaluation().model_copy(update={"texts": (), "choices": ()}), tmp_path / "no" / "folder.html", None)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium."""
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    found = {"evaluation": html(), "hostile": render(hostile(), None), "tuning": render(tuning(Interval(0.1, -0.1, 0.2)), None)}
    for name, content in found.items():
        (folder / f"{name}.html").write_text(content, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in found}


@pytest.mark.browser
@pytest.mark.parametrize(
    ("name", "width", "height", "scripts"),
    [
        ("evaluation", 360, 740, True),
        ("evaluation", 360, 740, False),
        ("evaluation", 1280, 900, True),
        ("hostile", 360, 740, True),
        ("tuning", 360, 740, True),
    ],
)
def test_a_browser_shows_all_of_it(
    browser: Any, pages: dict[str, Path], name: str, width: int, height: int, scripts: bool
) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(pages[name].as_uri())
    # The page is there; what it looks like is asked in JavaScript.
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert browser.get_log("browser") == []
    pictures = browser.execute_script("return [...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth])")
    assert len(pictures) == len(Page(pages[name].read_text()).pictures) > 10
    assert all(complete and natural > 0 and shown > 250 for complete, natural, shown in pictures)
    inside, whole = browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
    assert inside == width
    assert whole <= width, "it scrolls sideways"
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in requests if not url.startswith("data:")] == [pages[name].as_uri()]
