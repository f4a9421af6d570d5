"""That docs/architecture.md says of each module what it is."""

from tests.modules import PAGE, SOURCE, first_sentence, page


def test_the_page_has_each_module():
    assert PAGE.read_text(encoding="utf-8") == page(), "a module is new or otherwise described: python -m tests.modules"


def test_each_module_says_what_it_is():
    assert not [path for path in SOURCE.rglob("*.py") if path.stem != "__init__" and not first_sentence(path)]
