"""The registry of borrowed names: complete, right about what is installed, and loud when one of them is renamed."""

import ast
import functools
import inspect
import types
from pathlib import Path

import pytest
import torch

from tandem import contract
from tandem.errors import UserError

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "tandem"


@pytest.fixture(autouse=True)
def looked_up_anew():
    contract.check.cache_clear()
    yield
    contract.check.cache_clear()


def test_the_installed_packages_hold_it():
    assert contract.installed() is contract.MAIN
    contract.check()


def rename(borrowed: contract.Borrowed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the package call it something else."""
    owner = contract.resolve(borrowed.owner)
    if owner is torch.UntypedStorage:  # written in C, it cannot be changed: another takes its place
        monkeypatch.setattr(torch, "UntypedStorage", type("UntypedStorage", (), {}))
        return
    for cls in getattr(owner, "__mro__", (owner,)):
        if borrowed.name in vars(cls):
            monkeypatch.delattr(cls, borrowed.name)
        if borrowed.name in vars(cls).get("__annotations__", {}):
            monkeypatch.delitem(cls.__annotations__, borrowed.name)
        if not isinstance(cls, type):
            continue
        for value in list(vars(cls).values()):  # an attribute of objects: rewrite the methods that mention it
            function = inspect.unwrap(getattr(value, "fget", None) or getattr(value, "__func__", value))
            if isinstance(function, types.FunctionType) and borrowed.name in contract.names_in(function.__code__):
                monkeypatch.setattr(function, "__code__", renamed(function.__code__, borrowed.name))


def renamed(code: types.CodeType, name: str) -> types.CodeType:
    names = tuple(f"{each}_renamed" if each == name else each for each in code.co_names)
    constants = tuple(renamed(each, name) if isinstance(each, types.CodeType) else each for each in code.co_consts)
    return code.replace(co_names=names, co_consts=constants)


@pytest.mark.parametrize("borrowed", contract.MAIN.borrowed, ids=lambda each: f"{each.owner}.{each.name}")
def test_a_renamed_one_is_one_line(borrowed: contract.Borrowed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(contract, "MAIN", contract.Contract("", contract.MAIN.versions, (borrowed,)))
    contract.check()
    contract.check.cache_clear()
    with monkeypatch.context() as patch:
        rename(borrowed, patch)
        with pytest.raises(UserError) as refused:
            contract.check()
    said = str(refused.value)
    assert borrowed.name in said and "\n" not in said
    assert f"{borrowed.package}{contract.MAIN.versions[borrowed.package]}" in said


def test_changed_parameters_and_fields_are_told(monkeypatch: pytest.MonkeyPatch):
    from trl.trainer import dpo_trainer

    monkeypatch.setattr(dpo_trainer, "add_fused_lm_head", lambda model, heads: None)
    with pytest.raises(UserError, match=r"add_fused_lm_head takes \['model', 'heads'\]"):
        contract.check()
    output = contract.Borrowed("trl.trainer.utils", "FusedCausalLMOutput", "", "", fields=("loss", "no_such"))
    assert output.problem() == "trl.trainer.utils.FusedCausalLMOutput lacks no_such"


@pytest.mark.parametrize("package", contract.MAIN.versions)
def test_another_version_is_refused_unless_it_is_asked_for(package: str, monkeypatch: pytest.MonkeyPatch):
    stated = contract.MAIN.versions | {package: ">=99,<100"}
    monkeypatch.setattr(contract, "MAIN", contract.Contract("", stated, ()))
    with pytest.raises(UserError, match=rf"{package} \S+ is installed, .* {package}>=99,<100.*{contract.UNTESTED}=1"):
        contract.check()
    monkeypatch.setenv(contract.UNTESTED, "1")
    contract.check()


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(contract, "MAIN", contract.Contract("", {"no-such-package": ">=1"}, ()))
    with pytest.raises(UserError, match="no-such-package is not installed: pip install 'no-such-package>=1'"):
        contract.check()


@functools.cache
def trees() -> dict[str, ast.Module]:
    return {str(path.relative_to(SOURCE)): ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))}


def own_names() -> set[str]:
    """Names that Tandem's own classes, functions and assignments give."""
    names = {"_asdict", "_replace"}  # of named tuples: public, whatever they look like
    for node in (node for tree in trees().values() for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def private_names_of_others() -> dict[str, str]:
    """Private attributes and modules that the source takes from elsewhere, each with a file that does."""
    own, found = own_names(), {}
    for file, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                of_super = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super"
                if node.attr not in own or of_super:
                    found[node.attr] = file
            elif isinstance(node, ast.ImportFrom) and any(
                part.startswith("_") for part in (node.module or "").split(".")
            ):
                found |= {alias.name: file for alias in node.names}
    return found


def test_every_private_name_of_others_is_registered():
    registered = {each.name for each in (*contract.MAIN.borrowed, *contract.GAUDI.borrowed)}
    missing = {name: file for name, file in private_names_of_others().items() if name not in registered}
    assert "_fsdp_param_group" in private_names_of_others()
    assert not missing


def test_what_is_registered_is_used_and_tested():
    for each in (*contract.MAIN.borrowed, *contract.GAUDI.borrowed):
        assert each.name in (SOURCE / f"{each.used_in.replace('.', '/')}.py").read_text(), each
        assert (ROOT / each.test).is_file(), each


def test_an_extra_is_installed_into_a_checkout_or_beside_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert contract.extra("vllm") == "pip install -e '.[vllm]'"
    monkeypatch.setattr(contract, "__file__", str(tmp_path / "lib" / "site-packages" / "tandem" / "contract.py"))
    assert contract.extra("vllm") == "pip install 'tandem-dpo[vllm]'"
