"""Completions of the `tandem` command for bash and zsh, made from the commands' own options."""

import contextlib
import importlib
import io
import re
from collections.abc import Sequence

from tandem.errors import UserError

_OPTION = re.compile(r"^  (--\w+)", re.MULTILINE)
_BASH = """\
_tandem() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" words
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{commands}"
    else
        case "${{COMP_WORDS[1]//-/_}}" in
{cases}
        *) words="" ;;
        esac
    fi
    case "$word" in
    --*) ;;
    *) [ "$COMP_CWORD" -eq 1 ] || {{ COMPREPLY=($(compgen -f -- "$word")); return; }} ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o filenames -F _tandem tandem"""
_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def completion(shell: str, commands: Sequence[str]) -> str:
    """The text that `source <(tandem completion SHELL)` reads.

    Raises:
        UserError: `shell` is neither bash nor zsh.
    """
    if shell not in ("bash", "zsh"):
        raise UserError(f"tandem completion takes bash or zsh, not {shell or 'nothing'}")
    cases = "\n".join(f'        {name}) words="{" ".join(options(name))}" ;;' for name in commands)
    text = _BASH.format(commands=" ".join([*commands, "completion", "doctor"]), cases=cases)
    return _ZSH + text if shell == "zsh" else text


def options(command: str) -> list[str]:
    """The flags of a command, as its --help lists them."""
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen), contextlib.suppress(SystemExit):
        importlib.import_module(f"tandem.commands.{command}").main(["--help"])
    return _OPTION.findall(screen.getvalue())
