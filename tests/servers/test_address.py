import pytest

from tandem.errors import UserError
from tandem.judge.options import JudgeOptions
from tandem.servers.address import OPENAI_URL, api_key, checked_url, parse_address


def test_openai_itself_needs_a_key_and_a_local_server_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert api_key("http://localhost:1/v1") is None
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        api_key(OPENAI_URL)
    monkeypatch.setenv("OPENAI_API_KEY", " sk-1\r\n")
    assert api_key(OPENAI_URL) == "sk-1"


@pytest.mark.parametrize("key", ["sk-ключ", "sk-1\nsk-2", "sk 1"])
def test_a_key_that_no_request_can_carry(monkeypatch: pytest.MonkeyPatch, key: str):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="copy the key once more") as error:
        api_key("http://localhost:1/v1")
    assert key not in str(error.value)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("localhost:8000", "--base_url localhost:8000: must start with http:// or https:// and name a host"),
        ("http://[::1", "--base_url http://[::1: Invalid IPv6 URL"),
        ("http://h:port/v1", "--base_url http://h:port/v1: Port could not be cast to integer value as 'port'"),
        ("http://me:secret@host/v1", "--base_url must hold no credentials"),
        ("http://host/v1?key=secret", "--base_url must hold no credentials"),
    ],
)
def test_addresses_that_are_refused(url: str, expected: str):
    with pytest.raises(UserError) as error:
        checked_url(url)
    assert str(error.value).startswith(expected)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "bases", "form"),
    [
        (" http://host/v1/ ", ["http://host/v1"], None),
        ("http://host:8000", ["http://host:8000", "http://host:8000/v1"], None),
        ("http://host/proxy/", ["http://host/proxy", "http://host/proxy/v1"], None),
        ("http://host/v1/chat/completions/", ["http://host/v1"], "chat"),
        ("http://host/v1/responses", ["http://host/v1"], "responses"),
        ("https://g.example/v1beta/openai/", ["https://g.example/v1beta/openai"], None),
    ],
)
def test_an_address_taken_apart(url: str, bases: list[str], form: str | None):
    address = parse_address(checked_url(url))
    assert (address.bases, address.form, address.query) == (bases, form, {})


def test_azure():
    url = checked_url("https://me.openai.azure.com/openai/deployments/m/chat/completions?api-version=2024-10-21")
    address = parse_address(url)
    assert address.bases == ["https://me.openai.azure.com/openai/deployments/m"]
    assert (address.form, address.query) == ("chat", {"api-version": "2024-10-21"})


def test_the_environments_address(monkeypatch: pytest.MonkeyPatch):
    given = {"judge_model": "m", "generations_a": "a", "generations_b": "b"}
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert JudgeOptions(**given).url == OPENAI_URL
    monkeypatch.setenv("OPENAI_BASE_URL", "http://host:1/v1/\n")
    assert JudgeOptions(**given).url == "http://host:1/v1"
    assert JudgeOptions(**given, base_url="http://other/v1").url == "http://other/v1"
