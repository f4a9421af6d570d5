import pytest

from tandem.errors import UserError
from tandem.servers import OPENAI_URL, api_key, checked_url


def test_openai_itself_needs_a_key_and_a_local_server_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert api_key("http://localhost:1/v1") is None
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        api_key(OPENAI_URL)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    assert api_key(OPENAI_URL) == "sk-1"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("localhost:8000", "--base_url localhost:8000: must start with http:// or https:// and name a host"),
        ("http://[::1", "--base_url http://[::1: Invalid IPv6 URL"),
        ("http://me:secret@host/v1", "--base_url must hold no credentials or query; put the key into $OPENAI_API_KEY"),
    ],
)
def test_addresses_that_are_refused(url: str, expected: str):
    with pytest.raises(UserError) as error:
        checked_url(url)
    assert str(error.value) == expected
    assert "secret" not in str(error.value)


def test_no_slash_at_the_end():
    assert checked_url("http://host/v1/") == "http://host/v1"
