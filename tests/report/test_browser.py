"""The report as a person meets it: opened in Chromium, filtered, searched and paged, by mouse and by keyboard."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tandem.report.page import ReportOptions, write_report
from tests.report import sample_run

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="needs Debian's chromium and chromium-driver")

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PROMPTS = 1000


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thousand prompts, the models' answers to each of 200 to 600 words."""
    folder = sample_run.write_whole_run(tmp_path_factory.mktemp("runs") / "large", PROMPTS, words=600)
    return write_report(ReportOptions(str(folder)))


@pytest.fixture
def page(driver: Any, report: Path) -> Any:
    resize(driver, 1280)
    driver.get(report.as_uri())
    return driver


def resize(driver: Any, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def texts(page: Any, selector: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map((element) => element.textContent)"
    return page.execute_script(script, selector)


def press(page: Any, selector: str) -> None:
    page.execute_script("arguments[0].click()", page.find_element(By.CSS_SELECTOR, selector))


def status(page: Any) -> str:
    return page.find_element(By.ID, "status").text


def test_large_report_is_small_and_quick(driver: Any, report: Path) -> None:
    assert 5e6 < report.stat().st_size < 15e6
    resize(driver, 1280)
    taken = []
    for _ in range(3):  # other tests may share the cores: the best of three counts
        start = time.monotonic()
        driver.get(report.as_uri())
        press(driver, '[data-outcome="lost"]')
        assert status(driver) == "Prompts 1 to 25 of 200"
        taken.append(time.monotonic() - start)
    assert min(taken) < 2


def test_no_console_message(page: Any) -> None:
    press(page, "#next")
    press(page, '[data-outcome="disagree"]')
    assert page.get_log("browser") == []


def test_filters_show_only_their_kind(page: Any) -> None:
    assert status(page) == f"Prompts 1 to 25 of {PROMPTS}"
    expected = {"won": 500, "lost": 200, "tie": 100, "disagree": 100, "unjudged": 100}  # sample_run.mixed_verdicts
    for outcome, count in expected.items():
        press(page, f'[data-outcome="{outcome}"]')
        assert status(page) == f"Prompts 1 to 25 of {count}"
        shown = page.execute_script("return [...document.querySelectorAll('#pairs .outcome')].map((e) => e.className)")
        assert set(shown) == {f"outcome {outcome}"}
        pressed = page.find_elements(By.CSS_SELECTOR, '[aria-pressed="true"]')
        assert [button.get_attribute("data-outcome") for button in pressed] == [outcome]


def test_search_narrows_and_says_when_nothing_is_left(page: Any) -> None:
    field = page.find_element(By.ID, "search")
    field.send_keys("QUESTION 777:")
    WebDriverWait(page, 5).until(lambda page: status(page) == "Prompts 1 to 1 of 1")
    assert texts(page, "#pairs h3") == ["Prompt 778"]
    field.send_keys(" nowhere")
    WebDriverWait(page, 5).until(lambda page: status(page) == "No prompt matches.")
    assert not page.find_element(By.ID, "next").is_enabled()


def test_pages_turn(page: Any) -> None:
    assert not page.find_element(By.ID, "previous").is_enabled()
    press(page, "#next")
    assert status(page) == f"Prompts 26 to 50 of {PROMPTS}"
    assert texts(page, "#pairs h3")[0] == "Prompt 26"
    for _ in range(PROMPTS // 25 - 2):
        press(page, "#next")
    assert status(page) == f"Prompts 976 to 1000 of {PROMPTS}"
    assert not page.find_element(By.ID, "next").is_enabled()
    press(page, "#previous")
    assert texts(page, "#pairs h3")[0] == "Prompt 951"


def test_hostile_answers_stay_text(page: Any) -> None:
    assert page.title == "large – Tandem report"  # each of the hostile texts sets another
    assert f"Sure. {sample_run.HOSTILE} done" in texts(page, ".answer.m-dpo .text")[1]
    assert any(sample_run.HOSTILE in text for text in texts(page, ".orders .text"))
    assert page.find_elements(By.CSS_SELECTOR, "main img, main textarea, main script") == []


def test_row_shows_all_answers_and_both_orders(page: Any) -> None:
    first = page.find_element(By.CSS_SELECTOR, ".pair")
    assert [heading.text for heading in first.find_elements(By.TAG_NAME, "h4")] == [
        "Base",
        "SFT",
        "DPO",
        "Chosen in the data",
    ]
    fold = first.find_element(By.CSS_SELECTOR, "details.rationales summary")
    page.execute_script("arguments[0].focus()", fold)
    fold.send_keys(Keys.ENTER)
    said = [block.text for block in first.find_elements(By.CSS_SELECTOR, ".orders b")]
    assert said == ["Base shown first: DPO is better", "DPO shown first: DPO is better"]
    assert texts(page, ".pair:nth-of-type(4) .answer.m-base .empty") == ["(empty)"]


def test_long_answers_unfold(page: Any) -> None:
    button = page.find_element(By.CSS_SELECTOR, ".pair .more")
    article = button.find_element(By.XPATH, "..")
    before = article.size["height"]
    page.execute_script("arguments[0].click()", button)
    assert button.get_attribute("aria-expanded") == "true"
    assert article.size["height"] > before


def test_keyboard_reaches_the_filters(page: Any) -> None:
    page.execute_script("document.querySelector('[data-outcome=all]').focus()")
    page.switch_to.active_element.send_keys(Keys.TAB, Keys.TAB)
    active = page.switch_to.active_element
    assert active.get_attribute("data-outcome") == "lost"
    outline = page.execute_script("return getComputedStyle(document.activeElement).outlineWidth")
    assert outline == "3px"
    active.send_keys(Keys.SPACE)
    assert status(page) == "Prompts 1 to 25 of 200"


def test_the_keyboard_alone_reaches_everything(page: Any) -> None:
    """From the top by Tab: every link, button, field, fold and scrolling table, each with a ring to be seen."""
    script = """
      const able = 'a[href], button:not(:disabled), input, summary, [tabindex="0"]';
      window.wanted = [...document.querySelectorAll(able)].filter((one) => one.checkVisibility());
      return window.wanted.length;"""
    count = page.execute_script(script)
    assert count > 60
    ActionChains(page).send_keys(Keys.TAB * count).perform()
    visited = """
      const at = window.wanted.indexOf(document.activeElement);
      return [at, getComputedStyle(document.activeElement).outlineStyle];"""
    assert page.execute_script(visited) == [count - 1, "solid"]
    for index in reversed(range(count - 1)):
        ActionChains(page).key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT).perform()
        assert page.execute_script(visited) == [index, "solid"]


@pytest.mark.parametrize("width", [390, 1280])
def test_page_does_not_scroll_sideways(page: Any, width: int) -> None:
    resize(page, width)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width


def test_dark_follows_the_system(page: Any) -> None:
    backgrounds = []
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        backgrounds.append(page.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert backgrounds == ["rgb(252, 252, 250)", "rgb(20, 23, 26)"]


def test_a_link_to_a_prompt_shows_it_whatever_was_filtered(driver: Any, report: Path) -> None:
    driver.get(report.as_uri())
    driver.find_element(By.CSS_SELECTOR, '[data-outcome="tie"]').click()
    lost = driver.find_element(By.CSS_SELECTOR, 'a[href="#prompt-60"]')
    driver.execute_script("arguments[0].click()", lost)
    article = WebDriverWait(driver, 10).until(lambda page: page.find_element(By.ID, "prompt-60"))
    assert article.find_element(By.CSS_SELECTOR, "details.rationales").get_attribute("open") is not None
    assert "no verdict (malformed)" in article.text
    assert driver.find_element(By.CSS_SELECTOR, '[data-outcome="all"]').get_attribute("aria-pressed") == "true"
    assert abs(driver.execute_script("return arguments[0].getBoundingClientRect().top", article)) < 300


def test_markdown_is_drawn_as_elements_and_text(driver: Any, tmp_path: Path) -> None:
    folder = sample_run.write_whole_run(tmp_path / "run", 3)
    comparison = folder / "dpo_comparison_results.json"
    results = json.loads(comparison.read_text())
    hostile = f"# Rice\n\n4. **rest** {sample_run.HOSTILE}\n5. `lid`"
    results["comparisons"][0]["answers"]["dpo"] = hostile
    comparison.write_text(json.dumps(results))
    driver.get(write_report(ReportOptions(str(folder))).as_uri())
    answer = driver.find_element(By.CSS_SELECTOR, "#prompt-1 .m-dpo .formatted")
    assert answer.find_element(By.TAG_NAME, "ol").get_attribute("start") == "4"
    assert answer.find_element(By.TAG_NAME, "strong").text == "rest"
    assert "</script><script>" in answer.text and answer.find_elements(By.TAG_NAME, "img") == []
    assert driver.title.startswith("run")
