"""The report as a file: what it says, what it does without, and that no text of a model becomes markup."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from tandem.errors import UserError
from tandem.judge.verdicts import outcome
from tandem.report import numbers, page
from tandem.report.collect import OUTCOMES, column_order, read_run
from tandem.report.page import ReportOptions, write_report
from tandem.runs import append_jsonl
from tests.report import sample_run

ROOT = Path(__file__).parents[2]


class Parsed(HTMLParser):
    """Elements, attributes and text of a page, as a browser's parser would find them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data
        elif self.cdata_elem is None:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample_run.write_whole_run(tmp_path_factory.mktemp("runs") / "whole", prompts=40)


@pytest.fixture(scope="module")
def whole_page(whole: Path) -> Parsed:
    return Parsed(write_report(ReportOptions(str(whole))).read_text(encoding="utf-8"))


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy to be damaged, without the training logs, which take the longest to draw."""
    ignored = shutil.ignore_patterns("training_metrics.json", "logs", "report.html")
    return Path(shutil.copytree(whole, tmp_path / "copy", ignore=ignored))


def report_of(folder: Path) -> Parsed:
    return Parsed(write_report(ReportOptions(str(folder))).read_text(encoding="utf-8"))


def edit(path: Path, change: Any) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_whole_run_is_told(whole_page: Parsed) -> None:
    text = whole_page.text
    assert "DPO wins" in text
    # 20 wins of 28 decisive prompts: 0.714; Wilson's 95% interval by hand is 0.529 to 0.847
    assert "DPO beats Base on 71.4% of the 28 decisive prompts (95% interval 52.9% to 84.7%)" in text
    assert "On 60 pairs labelled by people the judge agrees with them in 90.0%" in text
    assert "the DPO model prefers the chosen answer in 98.0% (93.0% to 99.4%)" in text
    assert "train: 3 of 400 pairs are there more than once" in text
    assert "Chosen: 2 tokens trained, 1 cut at max_length" in text
    assert "The chat template refuses it: No." in text
    assert "learning_rate 2e-05 1e-06" in text
    assert "trl 1.16.0" in text
    assert "scripts/dpo.py --config" in text
    assert "the run folder has no" not in text
    assert "only a demonstration" not in text
    for title in (
        "SFT loss",
        "DPO loss",
        "Accuracy in training",
        "Reward margin",
        "Log-probabilities",
        "Margins",
        "Tail",
    ):
        assert title in text
    assert whole_page.tags.count("svg") == whole_page.tags.count("figure") == 9


def test_stage_metrics_are_combined(whole: Path, whole_page: Parsed) -> None:
    combined = json.loads((whole / "training_metrics.json").read_text())
    for stage in ("sft", "dpo"):
        assert combined[stage] == json.loads((whole / stage / "training_metrics.json").read_text())


def test_time_is_that_of_the_last_completed_run(whole: Path, whole_page: Parsed) -> None:
    assert read_run(whole).seconds["check"] == 9  # the log has 4 s of an earlier run too
    assert "dpo 2 min 51 s" in whole_page.text
    assert "judge 1 min 4 s not known" in whole_page.text  # no prices were given
    assert "All of them 9 min 2 s" in whole_page.text  # 9 + 78 + 11 + 171 + 12 + 96 + 101 + 64 = 542


def test_cost_stands_beside_the_time(copy: Path) -> None:
    edit(copy / "judge" / "usage.json", lambda usage: usage.update(cost=1.25))
    assert "judge 1 min 4 s 1.25" in report_of(copy).text


def test_models_are_told_apart(whole: Path, whole_page: Parsed) -> None:
    """Differences with their p, and the breakdown, as results.json has them."""
    results = json.loads((whole / "results.json").read_text())
    against_base, _, against_sft = results["differences"]
    text = whole_page.text
    assert "SFT less Base DPO less Base DPO less SFT" in text
    assert against_sft["metrics"]["preference_accuracy"]["value"] == pytest.approx(0.4)
    assert "Preference accuracy – – +40.0 points" in text
    assert f"Mean margin +{against_base['metrics']['mean_margin']['value']:.3f}" in text
    assert against_sft["metrics"]["mean_margin"]["p"] < 0.001 and "p < 0.001" in text
    for group in results["breakdown"]["length_difference"]:
        low, high = (f"{end:+d}".replace("-", "−") for end in group["tokens"])
        assert f"{low} to {high} tokens {group['n']} {100 * _accuracy(group, 'sft'):.1f}%" in text
    assert "helpful/test.jsonl 50 " in text
    assert f"harmless/{sample_run.HOSTILE.split()[0]}" in text


def _accuracy(group: Any, label: str) -> float:
    return group["models"][label]["preference_accuracy"]["value"]


def test_commands_are_those_that_ran_into_a_new_folder(whole: Path) -> None:
    assert page.commands(read_run(whole))["pipeline"] == [
        "git checkout 0123456789abcdef0123456789abcdef01234567",
        "source pipelines/lib.sh",
        "RUN=runs/demo_again",
        "ACCELERATE_CONFIG=accelerate_configs/cpu.yaml",
        "JUDGE_MODEL=/models/judge",
        "python scripts/check_data.py --dataset_name '/data/the sample' --report runs/demo_again/data.json",
        "launch scripts/sft.py --output_dir runs/demo_again/sft --mount_dir runs/demo_mirror",
        "launch scripts/dpo.py --model_name_or_path runs/demo_again/sft_merged --output_dir runs/demo_again/dpo",
        "with_local_judge python scripts/judge.py --run_dir runs/demo_again",
    ]


def test_every_reason_against_a_winner_is_told(copy: Path) -> None:
    reasons = ["dpo would not lead if all were lost", "the lead of dpo may be one of length alone"]
    sentence = f"No winner between dpo and base: {reasons[0]}."
    edit(copy / "judge_summary.json", lambda judge: judge.update(winner=None, conclusion=sentence, why=reasons))
    text = report_of(copy).text
    assert "No winner named No winner between DPO and Base: DPO would not lead if all were lost." in text
    assert "Besides: the lead of DPO may be one of length alone." in text


NONE = {"value": None, "low": None, "high": None, "n": 0}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, "Nothing says that this judge can decide anything. What"),
        ({"n_missing": 60}, "can decide anything: tried, it gave no verdict. What"),
        ({"n_identical": 60}, "both answers are the same in all 60 labelled pairs with a verdict"),
        ({"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 60}}, "This judge is too weak to decide anything."),
        (
            {"accuracy": {"value": 0.9, "low": 0.8, "high": 0.95, "n": 60}, "order_flip_rate": NONE | {"value": 0.7}},
            "This judge goes by the order of the answers too often to decide anything.",
        ),
    ],
)
def test_what_is_said_of_a_judge_has_its_own_cause(copy: Path, change: Any, told: str) -> None:
    """Nothing is worded from a number that is missing: not tried is not tried in vain is not too weak."""

    def as_if(judge: Any) -> None:
        parts = dict.fromkeys(judge["calibration"]["labelled"]["accuracy_by_length"], NONE)
        untried = {"n_missing": 0, "n_identical": 0, "accuracy": NONE, "accuracy_by_length": parts}
        judge["calibration"]["labelled"] |= untried | {"cohen_kappa": None} | change

    edit(copy / "judge_summary.json", as_if)
    text = report_of(copy).text
    assert told in text
    others = {"too weak to decide", "by the order of the answers too often", "it gave no verdict", "was not tried on"}
    wrong = [other for other in others if other in text and other not in told]
    assert wrong == (["was not tried on"] if not change else [])
    assert ("Cohen's" in text) is False


def test_a_table_without_a_number_is_a_sentence(copy: Path) -> None:
    edit(copy / "judge_summary.json", lambda judge: judge["result"].update(n_scored=0))
    text = report_of(copy).text
    assert "What it said No prompt of 40 has a verdict in both orders." in text
    assert "Win rate, both orders agreeing" not in text


def test_a_file_that_is_there_is_not_said_to_be_missing(copy: Path) -> None:
    (copy / "dpo_pipeline_sanity.log").write_text("== sft\n")
    assert "No times of the stages: nothing of them in dpo_pipeline_sanity.log" in report_of(copy).text


def test_lost_replies_link_to_their_prompts(whole_page: Parsed) -> None:
    """Of ten prompts the last has no verdict in one order."""
    assert "malformed: cut off – 10 , 20 , 30 , 40" in whole_page.text
    links = [value for name, value in whole_page.attributes if name == "href" and value and "#prompt-" in value]
    assert links == ["#prompt-10", "#prompt-20", "#prompt-30", "#prompt-40"]


def test_benchmarks_are_shown_before_and_after(copy: Path) -> None:
    models = {
        "base": {"value": 0.25, "low": 0.2, "high": 0.3, "n": 200},
        "dpo": {"value": 0.5, "low": None, "high": None, "n": 9},
    }
    row = {"task": f"t{sample_run.HOSTILE}", "metric": "acc", "higher_is_better": False, "models": models}
    edit(copy / "results.json", lambda results: results.update(benchmarks=[row]))
    parsed = report_of(copy)
    assert "acc, lower is better 0.250 0.200 to 0.300 – 0.500" in parsed.text and "img" not in parsed.tags
    edit(copy / "results.json", lambda results: results.update(benchmarks=[{}]))
    with pytest.raises(UserError, match=r"results\.json"):
        report_of(copy)


def test_other_judgements_in_the_folder_are_shown(copy: Path) -> None:
    summary = json.loads((copy / "judge_summary.json").read_text())
    summary |= {"labels": {"side_1": "chosen", "side_2": "dpo"}, "conclusion": "No winner between dpo and chosen: so."}
    summary["judge"]["model"] = f"/models/{sample_run.HOSTILE}"
    (copy / "judge_vs_chosen_summary.json").write_text(json.dumps(summary))
    text = report_of(copy).text
    assert "Also judged" in text and "DPO against Chosen in the data" in text
    assert "No winner between DPO and Chosen in the data: so." in text
    (copy / "judge_vs_chosen_summary.json").write_text('{"conclusion": "x"}')
    with pytest.raises(UserError, match=r"judge_vs_chosen_summary\.json"):
        report_of(copy)


def test_columns_have_one_order_on_every_page() -> None:
    assert column_order({"chosen", "dpo", "mine", "base", "sft"}) == ["base", "sft", "dpo", "mine", "chosen"]
    assert column_order(("chosen", "dpo")) == ["dpo", "chosen"]


def test_rows_agree_with_the_summary(whole: Path) -> None:
    """The page counts prompt by prompt from the log, the summary in arrays: they must agree."""
    run = read_run(whole)
    assert run.judge is not None
    result = run.judge["result"]
    counts = page.browser_data(run)["counts"]
    assert counts == {"won": 20, "lost": 8, "tie": 4, "disagree": 4, "unjudged": 4}
    assert counts["won"] == result["orders_agree"]["wins"]
    assert counts["lost"] == result["orders_agree"]["losses"]
    assert counts["tie"] + counts["disagree"] == result["orders_agree"]["ties"]
    assert counts["unjudged"] == result["n_missing"]


def test_model_text_stays_text(whole: Path, whole_page: Parsed) -> None:
    assert whole_page.tags.count("script") == 2
    assert "img" not in whole_page.tags
    assert "textarea" not in whole_page.tags
    assert not [name for name, _ in whole_page.attributes if name.startswith("on")]
    embedded = json.loads(whole_page.scripts[0])
    shown = [{name: value for name, value in row.items() if name != "formatted"} for row in embedded["rows"]]
    assert shown == read_run(whole).answers
    assert sample_run.HOSTILE in embedded["rows"][1]["answers"]["dpo"]
    assert sample_run.HOSTILE in embedded["rows"][1]["verdicts"][0]["text"]
    assert "<" not in whole_page.scripts[0]
    assert f"train: {sample_run.HOSTILE.split()[0]}" in whole_page.text


def test_hostile_names_stay_text(copy: Path) -> None:
    hostile = '"><script>alert(1)</script>'
    for stage in ("sft", "dpo"):
        edit(
            copy / stage / "run.json",
            lambda run: run["config"].update(model_name_or_path=hostile, dataset_name=hostile),
        )
        (copy / stage / "config.yaml").write_text(f"model_name_or_path: {hostile}\n")
    edit(copy / "results.json", lambda results: results.update(reference=hostile))
    parsed = report_of(copy)
    assert parsed.tags.count("script") == 2
    assert f"model_name_or_path: {hostile}" in parsed.text


def test_nothing_is_loaded_from_elsewhere(whole: Path, whole_page: Parsed) -> None:
    assert not {"link", "iframe", "img", "object"} & set(whole_page.tags)
    for name, value in whole_page.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value is not None and value.startswith("#")
    policy = next(value for _, value in whole_page.attributes if value and value.startswith("default-src"))
    digest = base64.b64encode(hashlib.sha256(whole_page.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


def test_ids_are_unique_and_references_hit(whole_page: Parsed) -> None:
    ids = [value for name, value in whole_page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {value[1:] for name, value in whole_page.attributes if name.endswith("href") and value}
    assert {name for name in used if not name.startswith("prompt-")} <= set(ids)  # the script draws the prompts


def test_results_alone_make_a_report(tmp_path: Path) -> None:
    sample_run.write_results(tmp_path)
    parsed = report_of(tmp_path)
    assert "Not judged" in parsed.text
    assert "No judgement: the run folder has no judge_summary.json" in parsed.text
    assert "No answers: the run folder has no dpo_comparison_results.json" in parsed.text
    assert "No training log of DPO: the run folder has no dpo/training_metrics.json" in parsed.text
    assert "script" not in parsed.tags
    assert not (tmp_path / "training_metrics.json").exists()


PIECES = {
    "results.json": "No held-out metrics",
    "judge_summary.json": "Not judged",
    "dpo_comparison_results.json": "No answers",
    "data_report.json": "No data check",
    "dpo_pipeline_sanity.log": "No times of the stages",
    "judge/usage.json": "Every verdict accounted for",
    ".stages": "One training stage, with every option that it had here",
    "judge/verdicts.jsonl": "Not judged 40",
    "sft": "Reproduce",
    "dpo": "Reproduce",
    "dpo/run.json": "Reproduce",
}


@pytest.mark.parametrize("piece", PIECES)
def test_any_piece_may_be_missing(copy: Path, piece: str) -> None:
    path = copy / piece
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    assert PIECES[piece] in report_of(copy).text


def test_generations_stand_in_for_the_comparison(tmp_path: Path) -> None:
    for label, text in (("dpo", "tuned"), ("base", "untuned")):
        record = {"prompt_id": "p", "messages": [{"role": "user", "content": "hi"}], "text": text}
        append_jsonl(tmp_path / f"generations_{label}.jsonl", record)
    run = read_run(tmp_path)
    assert run.labels == ["base", "dpo"]
    assert run.answers[0]["answers"] == {"base": "untuned", "dpo": "tuned"}
    assert run.answers[0]["outcome"] == "unjudged"


@pytest.mark.parametrize(("make", "message"), [(False, "no such folder"), (True, "nothing of a run in it")])
def test_no_run_is_one_line(tmp_path: Path, make: bool, message: str) -> None:
    folder = tmp_path / "run"
    if make:
        folder.mkdir()
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/report.py", "--run_dir", folder], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("results.json", "{"),
        ("results.json", '{"models": {"dpo": {"preference_accuracy": 0.9}}, "n_pairs": 3}'),
        ("results.json", '{"models": 3}'),
        ("dpo_comparison_results.json", '{"comparisons": [{"prompt_id": "x"}]}'),
        ("judge_summary.json", "{}"),
        ("judge/verdicts.jsonl", "no json\n"),
        ("data_report.json", '{"splits": {"train": {}}}'),
        ("dpo/training_metrics.json", '{"log_history": [{"loss": 1.0}]}'),
    ],
)
def test_damaged_file_is_named(copy: Path, name: str, content: str) -> None:
    (copy / name).write_text(content)
    with pytest.raises(UserError, match=r"cannot be read|not as this version") as error:
        write_report(ReportOptions(str(copy)))
    assert str(copy / name) in str(error.value)
    assert not (copy / "report.html").exists()


def test_numbers_that_json_lacks_are_gaps(copy: Path) -> None:
    metrics = '{"log_history": [{"step": 1, "loss": 1.0}, {"step": 2, "loss": NaN}, {"step": 3, "loss": 0.5}]}'
    (copy / "dpo" / "training_metrics.json").write_text(metrics)
    parsed = report_of(copy)
    labels = [value for name, value in parsed.attributes if name == "aria-label"]
    assert "DPO loss: training from 1 at step 1 to 0.5 at step 3" in labels


def test_lone_surrogate_is_written(copy: Path) -> None:
    edit(
        copy / "dpo_comparison_results.json", lambda value: value["comparisons"][0]["answers"].update(sft="\ud800 end")
    )
    row = json.loads(report_of(copy).scripts[0])["rows"][0]
    assert row["answers"]["sft"] == "? end"


def test_verdicts_on_other_answers_are_not_shown(copy: Path) -> None:
    edit(copy / "dpo_comparison_results.json", lambda value: value["comparisons"][0]["answers"].update(dpo="made anew"))
    run = read_run(copy)
    assert run.answers[0]["outcome"] == "unjudged"
    assert run.answers[0]["verdicts"] == []
    assert run.unmatched_verdicts == 2
    assert "2 verdicts on disk are on other answers or of another judge" in report_of(copy).text


def test_a_verdict_once_given_counts(copy: Path) -> None:
    log = copy / "judge" / "verdicts.jsonl"
    records = [record for line in log.read_text().splitlines() if (record := json.loads(line))["kind"] == "main"]
    failed = next(record for record in records if record["status"] == "malformed")
    fine = records[0]
    append_jsonl(log, failed | {"attempt": 2, "status": "ok", "verdict": "B", "rationale": "second try", "detail": ""})
    append_jsonl(log, fine | {"attempt": 2, "status": "error", "verdict": None, "rationale": "", "detail": "cut off"})
    rows = {row["prompt_id"]: row for row in read_run(copy).answers}
    assert rows[failed["prompt_id"]]["outcome"] == "won"
    assert rows[failed["prompt_id"]]["verdicts"][0]["text"] == "second try"
    assert rows[fine["prompt_id"]]["outcome"] == "won"


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ({"12": ["B"], "21": ["A"]}, "won"),
        ({"12": ["A"], "21": ["B"]}, "lost"),
        ({"12": ["tie"], "21": ["tie"]}, "tie"),
        ({"12": ["A"], "21": ["A"]}, "disagree"),  # the judge likes the first position
        ({"12": ["B"], "21": ["tie"]}, "disagree"),
        ({"12": ["B"], "21": []}, "unjudged"),
        ({"12": [], "21": []}, "unjudged"),
        ({"12": ["B", "B", "A"], "21": ["A"]}, "won"),  # two of three samples
        ({"12": ["B", "A"], "21": ["A", "B"]}, "tie"),
    ],
)
def test_outcome(verdicts: dict[str, list[str]], expected: str) -> None:
    records = [{"order": o, "verdict": v, "status": "ok"} for o, said in verdicts.items() for v in said]
    failed = [{"order": order, "verdict": None, "status": "refusal"} for order in verdicts]
    assert outcome(records + failed) == expected
    assert expected in OUTCOMES


def test_weak_judge_is_called_a_demonstration(tmp_path: Path) -> None:
    rows = sample_run.write_comparison(tmp_path, 24)
    sample_run.write_judgement(tmp_path, rows, lambda number, order: "B", labelled_right=0.5)
    text = report_of(tmp_path).text
    assert "No winner named" in text
    assert "only a demonstration" in text
    assert "it names the answer shown second in 100.0% of its decisions" in text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (40, "40"),
        (160800, "160,800"),
        (0.0130, "0.0130"),
        (-0.79, "−0.790"),
        (11.0, "11.0"),
        (123.4, "123"),
        (4321.5, "4,322"),
        (0, "0"),
    ],
)
def test_number(value: float, shown: str) -> None:
    assert numbers.number(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(9, "9 s"), (75, "1 min 15 s"), (3600, "1 h 0 min"), (7384, "2 h 3 min")]
)
def test_duration(seconds: int, shown: str) -> None:
    assert numbers.duration(seconds) == shown


def luminance(colour: str) -> float:
    """WCAG 2.1 relative luminance of #rrggbb."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_has_contrast_in_light_and_dark() -> None:
    css = (resources.files("tandem.report") / "templates" / "report.css").read_text()
    light, dark = (
        dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", block))
        for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    )
    assert light.keys() == dark.keys()
    for theme in (light, dark):
        on_page = [
            (theme[name], theme["page"]) for name in ("ink", "muted", "accent", "base", "sft", "dpo", "chosen", "lost")
        ]
        others = [(theme["ink"], theme["panel"]), (theme["warn-ink"], theme["warn-page"])]
        for ink, paper in on_page + others:
            low, high = sorted((luminance(ink), luminance(paper)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, paper)


def test_the_page_leaves_out_where_a_model_lies(tmp_path: Path) -> None:
    run = read_run(sample_run.write_whole_run(tmp_path / "run", prompts=4))
    shown = page.render(run).partition("</style>")[2]
    assert "SmolLM2-135M-Instruct, trained on sample" in shown
    assert "dataset_name: PATH_TO/sample" in shown
    for place in ("/models", "/data/", "/runs/", "/work/", str(tmp_path)):
        assert place not in shown, place


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a: /models/x/y\nb: ~/z/w", "a: PATH_TO/y\nb: PATH_TO/w"),
        ("--out '/data/the sample' --to=/a/b/c.json", "--out 'PATH_TO/the sample' --to=PATH_TO/c.json"),
        ("runs/demo/sft owner/name 1/2 https://host/v1/x", "runs/demo/sft owner/name 1/2 https://host/v1/x"),
    ],
)
def test_places_of_the_machine_are_taken_out_of_text(text: str, shown: str) -> None:
    assert page.without_places(text) == shown


def test_paper_has_every_column_and_every_prompt(tmp_path: Path) -> None:
    whole = page.render(read_run(sample_run.write_whole_run(tmp_path / "run", prompts=4)))
    printed = whole.partition("@media print {")[2].partition("</style>")[0]
    assert (
        ".scroll { overflow: visible; }" in printed
        and ".pair.short .answer :is(.text, .formatted), pre { max-height: none; }" in printed
    )
    assert 'addEventListener("beforeprint"' in whole
