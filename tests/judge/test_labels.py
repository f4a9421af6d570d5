"""People's labels: the page that asks for them, the file that it saves, and what comes of it."""

import json
import re
import shutil
import time

import pytest

from tandem.errors import UserError
from tandem.judge.labels import PAGE, draw, is_first_part, read_labels, write_page
from tandem.judge.requests import Comparison, text_digest
from tandem.judge.run import judge
from tests.judge.fault_server import FaultServer
from tests.judge.judge_once import comparisons, labelled, options

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\u2028"


def asked(page):
    """What the page holds."""
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    return json.loads(text)["pairs"]


def written(folder, pairs, count=1000, seed=0):
    write_page(folder, pairs, count, seed)
    return (folder / PAGE).read_text(encoding="utf-8")


def label(pair, verdict, annotator="me"):
    a, b = pair["digests"]
    return {"prompt_id": pair["prompt_id"], "verdict": verdict, "a": a, "b": b, "annotator": annotator}


def save(path, labels):
    path.write_text("".join(json.dumps(each) + "\n" for each in labels))
    return str(path)


def better(pair):
    """What `fault_server.fair` would say without a fault: the greater number after `answer`."""
    a, b = (int(answer.split()[1]) for answer in pair["answers"])
    return "A" if a > b else "B" if b > a else "tie"


# ---- the page


def test_the_page_is_blind_and_shuffled(tmp_path):
    pairs = comparisons(200)
    page = written(tmp_path, pairs)
    shown = asked(page)
    assert "base" not in re.sub(r"base(0|\d+|-uri)|of base\?", "", page) and "dpo" not in page
    differing = {pair.prompt_id: pair for pair in pairs if not pair.identical}
    assert {pair["prompt_id"] for pair in shown} == differing.keys()
    side_1_first = [pair["answers"][0] == differing[pair["prompt_id"]].answer_1 for pair in shown]
    assert 60 < sum(side_1_first) < 130
    order = [pair["prompt_id"] for pair in shown]
    assert order != [pair.prompt_id for pair in pairs if not pair.identical]
    fewer = asked(written(tmp_path, pairs, 30))
    assert [pair["prompt_id"] for pair in fewer] == order[:30]
    assert [pair["prompt_id"] for pair in asked(written(tmp_path, pairs, seed=1))] != order


def test_what_models_wrote_stays_text(tmp_path):
    page = written(tmp_path, [Comparison("p", [{"role": "user", "content": HOSTILE}], HOSTILE, "b\ud800", "x", "y")])
    assert page.count("<script") == 2 and "<img" not in page
    assert HOSTILE in asked(page)[0]["answers"]
    assert str(tmp_path) not in page


# ---- the file


def one_pair():
    return Comparison("p", [], "worse", "better", "base", "dpo")


@pytest.mark.parametrize(("verdict", "score"), [("A", 0.0), ("B", 1.0), ("tie", 0.5)])
def test_digests_say_whose_answer_was_chosen(tmp_path, verdict, score):
    sides = {"a": text_digest("worse"), "b": text_digest("better")}
    file = tmp_path / "labels.jsonl"
    file.write_text(json.dumps({"prompt_id": "p", "verdict": verdict, **sides}))  # no newline, no annotator
    assert read_labels(file, [one_pair()]) == {"p": score}
    turned = {"prompt_id": "p", "verdict": verdict, "a": sides["b"], "b": sides["a"]}
    file.write_text("\ufeff" + json.dumps(turned) + "\n\n")
    assert read_labels(file, [one_pair()]) == {"p": 1 - score}


def test_several_people_are_averaged_and_the_last_word_of_one_counts(tmp_path):
    sides = {"prompt_id": "p", "a": text_digest("worse"), "b": text_digest("better")}
    said = [("x", "A"), ("x", "B"), ("y", "tie")]
    file = save(tmp_path / "l.jsonl", [sides | {"annotator": name, "verdict": verdict} for name, verdict in said])
    assert read_labels(file, [one_pair()]) == {"p": 0.75}


GOOD = {"prompt_id": "p", "verdict": "A", "a": text_digest("worse"), "b": text_digest("better")}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no label in it"),
        ("prompt_id,verdict\np,A\n", "line 1: not JSON: Expecting value at character 1, near 'prompt_id,verdict'"),
        ("{", "line 1: not JSON"),
        ("[" * 100_000, "begins a list"),
        ("[]", "row 1: begins a list, but .jsonl has an object a line"),
        (json.dumps(GOOD) + "\n\n3", "line 3: must be an object"),
        (json.dumps(GOOD) + "\n3", "line 2: must be an object"),
        (json.dumps(GOOD | {"prompt_id": "q"}), "line 1: prompt_id 'q' is none of the compared prompts"),
        (json.dumps(GOOD | {"prompt_id": ["p"]}), "is none of the compared prompts"),
        (json.dumps(GOOD | {"verdict": "a"}), "verdict must be A, B or tie, not 'a'"),
        (json.dumps(GOOD | {"verdict": ["A"]}), "verdict must be A, B or tie"),
        (json.dumps(GOOD | {"a": "0" * 16}), "a label on other answers to this prompt"),
        (json.dumps({"prompt_id": "p", "verdict": "A"}), "a label on other answers to this prompt"),
        (json.dumps(GOOD | {"b": GOOD["a"]}), "a label on other answers to this prompt"),
    ],
)
def test_what_is_no_label_is_named(tmp_path, text, said):
    file = tmp_path / "labels.jsonl"
    file.write_text(text)
    with pytest.raises(UserError, match=re.escape(said)):
        read_labels(file, [one_pair()])


def test_only_the_first_of_the_page_are_a_draw():
    pairs = comparisons(60)
    order = [pair.prompt_id for pair in draw(pairs, 3)]
    assert is_first_part(dict.fromkeys(order[:40], 1.0), pairs, 3)
    assert not is_first_part(dict.fromkeys(order[1:41], 1.0), pairs, 3)


# ---- what comes of it


def test_a_run_is_corrected_by_labels(tmp_path):
    """The second run asks the judge nothing; one label on other answers ends it before anything is asked."""
    pairs, folder, server = comparisons(50), tmp_path / "judge", FaultServer()
    with server.serving() as url:
        plain = judge(options(url, str(folder)), pairs, labelled(30))
        shown = asked((folder / PAGE).read_text())
        file = save(tmp_path / "labels.jsonl", [label(pair, better(pair)) for pair in shown[:36]])
        count = len(server.requests)
        again = judge(options(url, str(folder), human_labels=file), pairs, labelled(30))
        stale = save(tmp_path / "stale.jsonl", [label(shown[0], "A") | {"a": "0" * 16}])
        with pytest.raises(UserError, match="other answers"):
            judge(options(url, str(tmp_path / "third"), human_labels=stale), pairs, labelled(30))
    assert len(server.requests) == count and not (tmp_path / "third").exists()
    assert plain["result"]["corrected"]["by_people"] is None
    rates = plain["result"]["corrected"]["by_error_rates"]
    assert rates["low"] < rates["value"] < rates["high"] and "as often as on the pairs labelled" in rates["assumes"]
    found = again["result"]["corrected"]
    assert found["drawn"] is True and found["weight"] == pytest.approx(1 / (1 + 36 / 12))
    mean = again["result"]["mean_score"]["value"]
    assert found["by_people"]["n"] == 36 and abs(found["by_people"]["value"] - mean) < 0.15
    widths = [found[name]["high"] - found[name]["low"] for name in ("by_people", "people_alone")]
    assert widths[0] < widths[1]
    assert "Corrected by the labels of people on 36 of the pairs dpo scores" in again["conclusion"]
    assert len(shown) == 48  # of 50 pairs two are the same on both sides: ties, which nobody is asked about


def test_no_page_is_written_where_none_is_wanted(tmp_path):
    with FaultServer().serving() as url:
        judge(options(url, str(tmp_path / "judge"), label_pairs=0, self_pairs=0), comparisons(2), [])
        judge(options(url, str(tmp_path / "dry"), dry_run=True), comparisons(2), [])
    assert not (tmp_path / "judge" / PAGE).exists() and not (tmp_path / "dry").exists()


def test_labels_that_people_and_judge_disagree_on_name_no_winner(tmp_path):
    pairs = comparisons(50)
    shown = asked(written(tmp_path, pairs, seed=42))
    coin = [label(pair, "AB"[index % 2]) for index, pair in enumerate(shown[:40])]
    with FaultServer().serving() as url:
        given = options(url, str(tmp_path / "judge"), human_labels=save(tmp_path / "l.jsonl", coin))
        summary = judge(given, pairs, labelled(20))
    assert summary["winner"] is None
    assert "people_do_not_say_so" in [cause["cause"] for cause in summary["causes"]]


# ---- in a browser

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="needs Debian's chromium and chromium-driver")
def test_a_person_labels_goes_back_comes_again_and_saves(tmp_path):
    from selenium import webdriver
    from selenium.webdriver.common.by import By

    pairs = [
        Comparison(f"p{n}", [{"role": "user", "content": HOSTILE}], f"one {n} {HOSTILE}", f"two {n}", "base", "dpo")
        for n in range(3)
    ]
    url = (tmp_path / PAGE).as_uri()
    shown = asked(written(tmp_path, pairs))
    setting = webdriver.ChromeOptions()
    setting.binary_location = CHROMIUM
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"):
        setting.add_argument(flag)
    setting.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    setting.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "saved")})
    setting.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=setting, service=webdriver.ChromeService(CHROMEDRIVER))
    try:
        driver.get(url)
        body = driver.find_element(By.TAG_NAME, "body")
        assert driver.title == "Which answer is better?"
        assert driver.find_element(By.ID, "answer-a").text == shown[0]["answers"][0].strip().replace("\u2028", "")
        held = "document.dispatchEvent(new KeyboardEvent('keydown', { key: 'a', repeat: true }))"
        driver.execute_script(held)  # a key held down labels one pair, not one after another
        assert driver.find_element(By.ID, "where").text == "Pair 1 of 3; 0 labelled."
        body.send_keys("a")
        driver.find_element(By.CSS_SELECTOR, '[data-verdict="B"]').click()
        driver.find_element(By.ID, "annotator").send_keys("ab n")  # a name is no verdict
        driver.get(url)  # closed and opened again
        assert driver.find_element(By.ID, "where").text == "Pair 3 of 3; 2 labelled."
        driver.find_element(By.ID, "back").click()
        driver.find_element(By.TAG_NAME, "body").send_keys("n")
        driver.find_element(By.TAG_NAME, "body").send_keys("b")
        driver.find_element(By.ID, "save").click()
        file = tmp_path / "saved" / "human_labels.jsonl"
        for _ in range(100):
            if file.exists():
                break
            time.sleep(0.05)
        verdicts = ["A", "tie", "B"]
        expected = [label(pair, verdict, "ab n") for pair, verdict in zip(shown, verdicts, strict=True)]
        assert [json.loads(line) for line in file.read_text().splitlines()] == expected
        assert read_labels(file, pairs).keys() == {"p0", "p1", "p2"}
        assert driver.title == "Which answer is better?" and driver.get_log("browser") == []
        driver.set_window_size(500, 900)
        assert driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        driver.save_screenshot(str(tmp_path / "narrow.png"))
    finally:
        driver.quit()
