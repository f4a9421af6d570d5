"""The judge against a server that fails on purpose, killed and resumed; what it asks, and what it leaves on disk."""

import collections
import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tandem.errors import UserError
from tandem.judge.backends import batch as client
from tandem.judge.comparisons import load_comparisons
from tandem.judge.log import VerdictLog
from tandem.judge.options import JudgeOptions
from tandem.judge.requests import Comparison, Judge
from tandem.judge.run import judge
from tandem.runs import append_jsonl, read_jsonl
from tests.judge.fault_server import FAULTS, RETRY_AFTER, FaultServer, fair
from tests.judge.judge_once import FAULTY, comparisons, labelled, options

ROOT = Path(__file__).parents[2]
SECRET = "sk-test-0123456789"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The openai package's waits, a hundredth as long."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.005)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.05)
    monkeypatch.setattr(client, "BATCH_POLL", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@contextlib.contextmanager
def serving(**settings):
    server = FaultServer(**settings)
    with server.serving() as url:
        yield server, url


def ok_per_key(folder):
    return collections.Counter(line["key"] for line in read_jsonl(folder / "verdicts.jsonl") if line["status"] == "ok")


def questions(bodies):
    """The judged questions of requests; the probe's are not among them."""
    return [body["input"][-1]["content"] for body in bodies if "<answer_a>" in body["input"][-1]["content"]]


# ---- a healthy server


def test_a_run_from_end_to_end(tmp_path):
    with serving() as (server, url):
        summary = judge(options(url, str(tmp_path / "judge")), comparisons(60), labelled(20))
    assert summary["winner"] == "dpo", summary["conclusion"]
    assert json.loads((tmp_path / "judge_summary.json").read_text()) == summary
    assert summary["judge"]["schema_enforced"] is True
    assert summary["calibration"]["labelled"]["accuracy"]["value"] == 0.9
    assert summary["calibration"]["self_vs_self"]["tie_rate"]["value"] == 1.0
    # every pair in both orders, none twice, identical ones not at all
    asked = collections.Counter(questions(server.requests))
    assert summary["result"]["n_identical"] == 2
    assert len(asked) == 2 * (60 - 2 + 20) + 4  # an answer against itself reads the same in both orders
    assert set(asked.values()) == {1, 2}
    assert all(body["store"] is False and body["stream"] is False for body in server.requests)
    # a line of verdicts.jsonl says who was shown where, and what was said
    line = next(
        line for line in read_jsonl(tmp_path / "judge/verdicts.jsonl") if line["kind"] == "main" and line["rationale"]
    )
    assert (line["a"], line["b"]) == (("base", "dpo") if line["order"] == "12" else ("dpo", "base"))
    assert line["rationale"] == f"I prefer {line['verdict']}."


def test_identical_answers_are_a_tie_that_nobody_is_asked_for(tmp_path):
    pair = Comparison("p", [{"role": "user", "content": "?"}], "same", "same", "base", "dpo")
    with serving() as (server, url):
        summary = judge(options(url, str(tmp_path / "j"), self_pairs=0), [pair], [])
    assert questions(server.requests) == []
    assert summary["accounting"]["main"]["identical"] == 2
    assert summary["result"]["mean_score"]["value"] == 0.5
    assert [(one["verdict"], one["detail"]) for one in read_jsonl(tmp_path / "j/verdicts.jsonl")] == [
        ("tie", "identical answers")
    ] * 2


def test_an_identical_pair_does_not_answer_for_the_self_test(tmp_path):
    pair = Comparison("p", [{"role": "user", "content": "?"}], "same", "same", "base", "dpo")
    with serving(decide=lambda a, b: "A") as (server, url):
        summary = judge(options(url, str(tmp_path / "j"), self_pairs=1), [pair], [])
    assert len(questions(server.requests)) == 2
    assert summary["calibration"]["self_vs_self"]["first_position_rate"]["value"] == 1.0
    assert summary["result"]["mean_score"]["value"] == 0.5


def test_always_a_gives_no_winner_and_is_named(tmp_path):
    with serving(decide=lambda a, b: "A") as (_, url):
        summary = judge(options(url, str(tmp_path / "j")), comparisons(20), labelled(20))
    assert summary["winner"] is None
    assert "chance" in summary["conclusion"]
    assert summary["result"]["first_position_rate"]["value"] == 1.0
    assert summary["result"]["order_flip_rate"]["value"] == 1.0
    assert summary["calibration"]["labelled"]["cohen_kappa"] == pytest.approx(0)


def test_samples_are_separate_calls(tmp_path):
    with serving() as (server, url):
        summary = judge(options(url, str(tmp_path / "j"), samples=3, self_pairs=0), comparisons(4), [])
    assert summary["accounting"]["main"]["ok"] == 4 * 2 * 3
    assert set(collections.Counter(questions(server.requests)).values()) == {3}


def test_the_concurrency_limit_holds(tmp_path):
    with serving() as (server, url):
        server.delay = 0.02
        judge(options(url, str(tmp_path / "j"), max_concurrency=3), comparisons(20), [])
    assert server.most_active == 3


# ---- servers of several kinds


def test_a_server_without_schemas_is_asked_by_example_and_the_user_is_told(tmp_path, capsys):
    with serving() as (server, url):
        server.enforces_schema = False
        summary = judge(options(url, str(tmp_path / "j")), comparisons(10), labelled(10))
    assert summary["judge"]["schema_enforced"] is False
    assert summary["accounting"]["main"]["ok"] == 20
    judged = [body for body in server.requests if "<answer_a>" in body["input"][-1]["content"]]
    assert all("text" not in body and len(body["input"]) == 6 for body in judged)
    assert "does not enforce JSON schemas" in capsys.readouterr().err


def test_a_server_that_refuses_schemas_is_asked_by_example(tmp_path):
    with serving() as (server, url):
        server.refuses_schema = True
        summary = judge(options(url, str(tmp_path / "j")), comparisons(3), [])
    assert summary["judge"]["schema_enforced"] is False
    assert summary["accounting"]["main"]["ok"] == 6


def test_the_servers_kind_is_remembered_so_that_keys_do_not_change(tmp_path):
    with serving() as (server, url):
        server.enforces_schema = False
        judge(options(url, str(tmp_path / "j")), comparisons(3), [])
        server.enforces_schema = True
        count = len(server.requests)
        judge(options(url, str(tmp_path / "j")), comparisons(3), [])
        assert len(server.requests) == count
        # another model is another server
        judge(options(url, str(tmp_path / "j"), judge_model="n"), comparisons(3), [])
        assert len(server.requests) > count


@pytest.mark.parametrize(
    ("status", "named"),
    [(401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"), (404, "no model m"), (400, "400"), (500, "500")],
)
def test_a_server_that_cannot_be_used_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, status, named):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with serving() as (server, url):
        server.status = status
        with pytest.raises(UserError, match=named) as caught:
            judge(options(url, str(tmp_path / "j"), max_attempts=2), comparisons(3), [])
    assert SECRET not in str(caught.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_nobody_listening_is_one_line(tmp_path):
    with serving() as (_, url):
        pass
    with pytest.raises(UserError, match="does not answer"):
        judge(options(url, str(tmp_path / "j"), max_attempts=2), comparisons(3), [])


def test_a_server_that_dies_stops_the_run_and_the_next_one_goes_on(tmp_path):
    with serving() as (server, url):
        decided = 0

        def dying(a, b):
            nonlocal decided
            decided += 1
            if decided > 20:
                server.status = 500
            return fair(a, b)

        server.decide = dying
        with pytest.raises(UserError, match="in a row failed"):
            judge(options(url, str(tmp_path / "j"), max_attempts=1), comparisons(60), [])
        assert not (tmp_path / "judge_summary.json").exists()
        done = set(ok_per_key(tmp_path / "j"))
        assert len(done) >= 15
        server.status, server.decide = None, fair
        summary = judge(options(url, str(tmp_path / "j")), comparisons(60), [])
    assert summary["accounting"]["main"]["ok"] == 2 * 58
    assert set(ok_per_key(tmp_path / "j").values()) == {1}


def test_the_key_is_sent_and_is_in_no_file(tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with serving(share=0.3, faults=("500", "refusal", "schema_ignored")) as (server, url):
        # an answer through which the server repeats the key
        server.decide = lambda a, b: f"A {SECRET}" if "1 xxx" in a else fair(a, b)
        judge(options(url, str(tmp_path / "j"), max_attempts=3), comparisons(20), [])
        server.status = 418  # its error repeats it too
        with contextlib.suppress(UserError):
            judge(options(url, str(tmp_path / "j")), comparisons(40), [])
    assert server.keys_seen == {f"Bearer {SECRET}"}
    texts = [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    assert any("[key]" in text for text in texts)
    assert not any(SECRET in text for text in [*texts, caplog.text, *capsys.readouterr()])


# ---- faults


@pytest.mark.parametrize("key", ["x", "text", "output_text"])
def test_a_placeholder_for_a_key_leaves_the_replies_as_they_are(tmp_path, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with serving() as (server, url):
        judge(options(url, str(tmp_path / "j"), max_attempts=1), comparisons(10), [])
    assert set(ok_per_key(tmp_path / "j").values()) == {1}
    assert server.keys_seen == {f"Bearer {key}"}


def test_refusals_and_garbage_are_counted_and_never_scored(tmp_path):
    for fault, status in (("refusal", "refusal"), ("wrong_word", "malformed"), ("truncated_json", "malformed")):
        folder = tmp_path / fault
        with serving() as (server, url):
            healthy = judge(options(url, str(folder / "j"), self_pairs=0, max_attempts=2), comparisons(4), [])
            server.share, server.faults = 1.0, (fault,)
            summary = judge(options(url, str(folder / "j"), self_pairs=0, max_attempts=2), comparisons(10), [])
        counts = summary["accounting"]["main"]
        assert counts[status] == 2 * (10 - 4)
        assert counts["ok"] == healthy["accounting"]["main"]["ok"] == 8
        assert sum(counts.values()) == 2 * counts["verdicts"]
        assert summary["result"]["n_missing"] == 6
        attempts = collections.Counter(questions(server.requests)[8:])
        assert set(attempts.values()) == {2}  # the cap


@pytest.mark.parametrize(("failing", "ok", "requests"), [(2, 8, 3), (99, 0, 4)])
def test_a_request_that_failed_for_good_gets_one_more_chance(tmp_path, failing, ok, requests):
    """With --max_attempts 2 the openai package sends two requests a chance; two chances make four, never more."""
    with serving() as (server, url):
        judged = "<answer_a>"
        server.fault = lambda messages, attempt: (
            "500" if judged in messages[-1]["content"] and attempt <= failing else None
        )
        summary = judge(options(url, str(tmp_path / "j"), self_pairs=0, max_attempts=2), comparisons(4), [])
    assert summary["accounting"]["main"]["ok"] == ok
    assert summary["accounting"]["main"]["error"] == 8 - ok
    assert set(collections.Counter(questions(server.requests)).values()) == {requests}


def test_a_prompt_with_one_order_judged_is_missing_not_half_scored(tmp_path):
    pair = Comparison("p", [{"role": "user", "content": "?"}], "answer 1", "answer 2", "base", "dpo")
    with serving() as (server, url):
        judge(options(url, str(tmp_path / "j"), self_pairs=0), [pair], [])
        lines = (tmp_path / "j/verdicts.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "j/verdicts.jsonl").write_text(lines[0])
        (tmp_path / "j/raw.jsonl").unlink()
        server.fault = lambda messages, attempt: "500"
        summary = judge(options(url, str(tmp_path / "j"), self_pairs=0, max_attempts=1), [pair], [])
    assert (summary["result"]["n_scored"], summary["result"]["n_missing"]) == (0, 1)


def test_a_429_slows_down_and_its_retry_after_is_waited_for(tmp_path):
    with serving(share=0.3, faults=("429_retry_after",)) as (server, url):
        times = collections.defaultdict(list)
        log = server.fault

        def noting(messages, attempt):
            times[json.dumps(messages)].append(time.monotonic())
            return log(messages, attempt)

        server.fault = noting
        summary = judge(options(url, str(tmp_path / "j"), self_pairs=0), comparisons(10), [])
    assert summary["accounting"]["main"]["ok"] == 20
    gaps = [later - earlier for moments in times.values() for earlier, later in itertools.pairwise(moments)]
    assert server.met["429_retry_after"] == len(gaps) > 3
    assert min(gaps) >= RETRY_AFTER


def command_of(url, folder, pairs, batch=False):
    """`judge_once` as keywords of `subprocess.Popen`."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "JUDGE_BATCH": str(int(batch))}
    command = [sys.executable, "-m", "tests.judge.judge_once", url, str(folder), str(pairs)]
    return {"args": command, "cwd": ROOT, "env": environment, "stderr": subprocess.DEVNULL}


def judged_questions(folder, url, pairs):
    """Messages of the calls that have their ok on disk, as the server would get them once more."""
    calls = [
        *Judge(url, "m", True, None, 2048).calls("main", comparisons(pairs), 1),
        *Judge(url, "m", True, None, 2048).calls("labelled", labelled(pairs // 8), 1),
    ]
    done = ok_per_key(folder)
    return {json.dumps(call.messages) for call in calls if call.key in done and not call.free}


def killed_and_resumed(server, url, folder, pairs, kills, rng):
    """Run the judge in a process of its own, kill it `kills` times at random, let it end; the summary.

    What had its ok on disk when the process was killed must not be asked for again.
    """
    done: set[str] = set()
    seen = 0
    for kill in range(kills + 1):
        process = subprocess.Popen(**command_of(url, folder, pairs))
        if kill < kills:
            until = len(server.requests) + rng.randrange(3, 3 * pairs // kills)
            while len(server.requests) < until and process.poll() is None:
                time.sleep(0.002)
            time.sleep(rng.random() * 0.05)
            process.send_signal(signal.SIGKILL)
        process.wait()
        assert not done & {json.dumps(body["input"]) for body in server.requests[seen:]}
        seen = len(server.requests)
        done = judged_questions(folder, url, pairs)
        if kill < kills and rng.random() < 0.5 and (folder / "verdicts.jsonl").exists():
            with open(folder / "verdicts.jsonl", "a") as file:
                file.write('{"key": "torn')  # as a kill in the middle of a line leaves it
    assert process.returncode == 0
    assert len(done) > pairs
    return json.loads((folder.parent / "judge_summary.json").read_text())


def check_kills(tmp_path, pairs, kills, seed):
    rng = random.Random(seed)
    with serving(share=0.3) as (server, url):
        calm_options = options(url, str(tmp_path / "calm/judge"), **FAULTY)
        calm = judge(calm_options, comparisons(pairs), labelled(pairs // 8))
        met = set(server.met)
        server.reset()
        disturbed = killed_and_resumed(server, url, tmp_path / "killed/judge", pairs, kills, rng)
    assert disturbed == json.loads(json.dumps(calm))
    assert met == set(FAULTS)
    for kind, counts in calm["accounting"].items():
        assert counts["verdicts"] == sum(counts.values()) - counts["verdicts"], kind
        assert counts["ok"] + counts["identical"] == counts["verdicts"]
    for folder in ("calm/judge", "killed/judge"):
        assert set(ok_per_key(tmp_path / folder).values()) == {1}
    return calm


def test_killed_and_resumed_gives_the_summary_of_an_undisturbed_run(tmp_path):
    calm = check_kills(tmp_path, pairs=64, kills=3, seed=1)
    assert sum(counts["verdicts"] for counts in calm["accounting"].values()) == 2 * (64 + 8 + 4)


@pytest.mark.slow
def test_a_thousand_judgements_killed_ten_times(tmp_path):
    calm = check_kills(tmp_path, pairs=500, kills=10, seed=2)
    assert calm["accounting"]["main"]["verdicts"] == 1000


def test_two_judges_do_not_write_into_one_folder(tmp_path):
    """Two processes: the second is told which one is there; killed, that one is no longer in the way."""
    folder = tmp_path / "judge"
    with serving() as (server, url):
        server.delay = 0.2
        first = subprocess.Popen(**command_of(url, folder, 64))
        while not (folder / "verdicts.jsonl").exists() and first.poll() is None:
            time.sleep(0.01)
        second = subprocess.run(**command_of(url, folder, 64) | {"stderr": subprocess.PIPE}, check=False)
        holder = f"process {first.pid} on {socket.gethostname()}"
        assert f"UserError: {folder}: {holder} is writing there" in second.stderr.decode().splitlines()[-1]
        assert second.returncode != 0 and first.poll() is None
        first.kill()
        first.wait()
        server.delay = 0.0
        summary = judge(options(url, str(folder)), comparisons(64), labelled(8))
    assert summary["accounting"]["main"]["not_asked"] == 0
    assert set(ok_per_key(folder).values()) == {1}


def test_nothing_judged_is_asked_again(tmp_path):
    with serving(share=0.2, faults=("refusal", "500", "wrong_word")) as (server, url):
        first = judge(options(url, str(tmp_path / "j"), max_attempts=1), comparisons(40), [])
        asked_first = set(questions(server.requests))
        left = sum(first["accounting"]["main"][status] for status in ("refusal", "malformed", "error"))
        assert left > 5
        server.reset()
        server.share = 0.0
        second = judge(options(url, str(tmp_path / "j"), max_attempts=1), comparisons(40), [])
    assert second["accounting"]["main"]["ok"] == 2 * 39
    again = questions(server.requests)
    assert len(again) == left + sum(first["accounting"]["self"][s] for s in ("refusal", "malformed", "error"))
    assert set(again) <= asked_first
    assert set(ok_per_key(tmp_path / "j").values()) == {1}


def test_a_reply_on_disk_that_was_not_read_is_read_and_not_asked_for_again(tmp_path):
    with serving() as (server, url):
        first = judge(options(url, str(tmp_path / "j")), comparisons(5), [])
        file = tmp_path / "j/verdicts.jsonl"
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(lines[:-2]) + lines[-2][:30])  # killed after the replies, before their verdicts
        server.reset()
        assert judge(options(url, str(tmp_path / "j")), comparisons(5), []) == first
        assert server.requests == []


def test_the_raw_reply_is_on_disk_before_it_is_read(tmp_path, monkeypatch):
    def crash(body, lenient):
        raise RuntimeError("reading failed")

    with serving() as (_, url):
        judge(options(url, str(tmp_path / "j"), self_pairs=0), comparisons(1), [])
        monkeypatch.setattr("tandem.judge.log.verdicts.read_reply", crash)
        with pytest.raises(RuntimeError, match="reading failed"):
            judge(options(url, str(tmp_path / "j"), self_pairs=0), comparisons(3), [])
    assert len(read_jsonl(tmp_path / "j/raw.jsonl")) > 2 == len(read_jsonl(tmp_path / "j/verdicts.jsonl"))


@pytest.mark.parametrize(
    ("content", "message"), [("{not json}\n{}\n", "damaged"), ("{}\n", "line 1: not a verdict"), ("3\n", "line 1: not")]
)
def test_a_damaged_log_is_one_line(tmp_path, content, message):
    (tmp_path / "j").mkdir()
    (tmp_path / "j/verdicts.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        VerdictLog(options("http://localhost:1", str(tmp_path / "j")))


# ---- money


def test_a_dry_run_asks_and_writes_nothing_and_bounds_the_cost(tmp_path):
    prices = {"price_in": 1.0, "price_out": 4.0, "max_output_tokens": 50}
    with serving() as (server, url):
        estimate = judge(options(url, str(tmp_path / "j"), dry_run=True, **prices), comparisons(26), labelled(5))
        assert server.requests == [] and list(tmp_path.iterdir()) == []
        judge(options(url, str(tmp_path / "j"), **prices), comparisons(26), labelled(5))
        usage = json.loads((tmp_path / "j/usage.json").read_text())
        after = judge(options(url, str(tmp_path / "j"), dry_run=True, **prices), comparisons(26), labelled(5))
    assert estimate["verdicts"] == {"labelled": 10, "self": 8, "main": 52}
    assert estimate["identical"] == 2 and estimate["to_ask"] == 10 + 8 + 50 == usage["replies"] - 2
    assert estimate["cost_at_most"] == pytest.approx((estimate["input_tokens"] + 4 * 68 * 50) / 1e6)
    assert usage["cost"] < estimate["cost_at_most"]
    assert (after["to_ask"], after["judged_already"]) == (0, 68)


def test_max_cost_stops_before_it_is_reached_and_a_higher_one_goes_on(tmp_path):
    settings = {"price_in": 0.0, "price_out": 1e6 / 20, "max_output_tokens": 40, "max_concurrency": 4, "self_pairs": 0}
    with serving() as (server, url):  # every reply is 20 output tokens: 1 each, at most 2
        with pytest.raises(UserError, match=r"--max_cost 11.*10 spent, .*of 40 verdicts"):
            judge(options(url, str(tmp_path / "j"), max_cost=11.0, **settings), comparisons(20), [])
        assert len(questions(server.requests)) == 10
        assert not (tmp_path / "judge_summary.json").exists()
        summary = judge(options(url, str(tmp_path / "j"), max_cost=41.0, **settings), comparisons(20), [])
    assert summary["accounting"]["main"]["ok"] == 40 == len(questions(server.requests))
    assert json.loads((tmp_path / "j/usage.json").read_text())["cost"] == 40.0


# ---- batches


def test_batches_give_the_summary_of_single_requests(tmp_path):
    with serving(share=0.3, faults=("refusal", "wrong_word", "500")) as (server, url):
        single = judge(options(url, str(tmp_path / "a/j")), comparisons(16), labelled(4))
        sent = {json.dumps(body, sort_keys=True) for body in server.requests if "<answer_a>" in str(body)}
        server.reset()
        batch = judge(options(url, str(tmp_path / "b/j"), batch=True), comparisons(16), labelled(4))
        assert {json.dumps(body, sort_keys=True) for body in server.requests if "<answer_a>" in str(body)} == sent
        assert 1 < len(server.batches) <= 6
    assert batch == single


def test_a_killed_run_goes_on_waiting_for_the_same_batch(tmp_path):
    folder = tmp_path / "b/judge"
    with serving() as (server, url):
        server.batch_polls_needed = 10**9
        process = subprocess.Popen(**command_of(url, folder, 16, batch=True))
        deadline = time.monotonic() + 30
        while not any(batch["polls"] for batch in list(server.batches.values())) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert client.open_batches(folder) == ["batch-0"]
        server.batch_polls_needed = 0
        judge(options(url, str(folder), batch=True), comparisons(16), labelled(2))
        assert list(server.batches) == ["batch-0"] and client.open_batches(folder) == []
    assert set(ok_per_key(folder).values()) == {1}


def test_a_run_killed_before_it_knew_its_batch_finds_it(tmp_path):
    """Killed after the server had created the batch, before the reply that names it."""
    folder = tmp_path / "judge"
    with serving() as (server, url):
        started = threading.Event()

        def kill():
            started.wait()
            process.kill()
            process.wait()

        server.batch_created = kill
        process = subprocess.Popen(**command_of(url, folder, 16, batch=True))
        started.set()
        process.wait()
        assert list(server.batches) == ["batch-0"] and client.open_batches(folder) == []
        server.batch_created = lambda: None
        judge(options(url, str(folder), batch=True), comparisons(16), labelled(2))
        assert list(server.batches) == ["batch-0"]
    assert set(ok_per_key(folder).values()) == {1}


def test_a_batch_that_is_refused_is_one_line_and_not_waited_for_again(tmp_path):
    with serving() as (server, url):

        def refuse(batch):
            batch.update(status="failed", errors={"object": "list", "data": [{"message": "billing limit"}]})

        server.run_batch = refuse
        with pytest.raises(UserError, match="billing limit"):
            judge(options(url, str(tmp_path / "j"), batch=True), comparisons(3), [])
        assert client.open_batches(tmp_path / "j") == []


@pytest.mark.parametrize(("status", "message"), [(404, "has no Batch API"), (401, "OPENAI_API_KEY")])
def test_a_server_without_a_batch_api_is_one_line(tmp_path, status, message):
    with serving() as (server, url):
        server.batch_status = status
        with pytest.raises(UserError, match=message):
            judge(options(url, str(tmp_path / "j"), batch=True), comparisons(3), [])
    assert not (tmp_path / "j/batches.jsonl").exists()


def test_max_cost_holds_for_a_whole_batch(tmp_path):
    with serving() as (server, url):
        prices = {"price_in": 1.0, "price_out": 1.0, "max_cost": 1e-6}
        with pytest.raises(UserError, match="--max_cost"):
            judge(options(url, str(tmp_path / "j"), batch=True, **prices), comparisons(3), [])
        assert server.batches == {}


# ---- generations


def generations(folder, label, *texts):
    for index, text in enumerate(texts):
        message = {"role": "user", "content": str(index)}
        append_jsonl(
            folder / f"generations_{label}.jsonl", {"prompt_id": f"p{index}", "messages": [message], "text": text}
        )


def run_options(folder, **more):
    return JudgeOptions(judge_model="m", base_url="http://localhost:1", run_dir=str(folder), **more)


def test_comparisons_come_from_two_generation_files(tmp_path):
    generations(tmp_path, "sft", "s0", "s1")
    generations(tmp_path, "dpo", "d0", "d1")
    pairs = load_comparisons(run_options(tmp_path, against="sft"), [])
    assert [(pair.answer_1, pair.answer_2, pair.label_1, pair.label_2) for pair in pairs] == [
        ("s0", "d0", "sft", "dpo"),
        ("s1", "d1", "sft", "dpo"),
    ]


def test_generations_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"--run_dir .*/nope: no such folder$"):
        load_comparisons(run_options(tmp_path / "nope"), [])
    with pytest.raises(UserError, match=r"generations_base.jsonl: no such file"):
        load_comparisons(run_options(tmp_path), [])
    generations(tmp_path, "base", "b0")
    generations(tmp_path, "dpo", "d0", "d1")
    with pytest.raises(UserError, match="1 prompts are in one only"):
        load_comparisons(run_options(tmp_path), [])
    append_jsonl(tmp_path / "generations_base.jsonl", {"prompt_id": "p1", "messages": []})
    with pytest.raises(UserError, match=r"generations_base.jsonl row 2: field 'text' is missing"):
        load_comparisons(run_options(tmp_path), [])


def test_nothing_to_judge_is_said(tmp_path):
    with pytest.raises(UserError, match="nothing to judge"):
        judge(options("http://localhost:1", str(tmp_path / "j")), [], [])


def test_a_server_slower_than_the_timeout(tmp_path):
    """The default timeout would have waited for it."""
    with serving() as (server, url):
        server.delay = 0.6
        with pytest.raises(UserError, match=r"timed out.*; raise --timeout"):
            judge(options(url, str(tmp_path / "judge"), timeout=0.1, max_attempts=1), comparisons(2), [])
        server.delay = 0.0
        judge(options(url, str(tmp_path / "judge"), timeout=0.6, max_attempts=1), comparisons(2), [])
