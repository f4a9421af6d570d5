"""`accelerate launch` that keeps the script's exit code: `python -m tandem.launch --config_file FILE SCRIPT …`.

accelerate turns every failure into exit code 1 and a traceback of its own, which would hide whether a run had wrong
input (2), was stopped by an alarm (3) or was preempted (75). SIGTERM is passed on to the script's processes, which save
a checkpoint. `python -m tandem.launch torchrun …` does the same for torchrun, which can also start several processes on
a CPU, and start them again after one has died (`--max-restarts`, docs/resume.md).
"""

import os
import signal
import subprocess
import sys
from types import FrameType

import psutil
import torch.distributed.run as torchrun
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from tandem.errors import Preempted, UserError
from tandem.ranks import be_launcher

# For saving a checkpoint after SIGTERM, and for ranks to end that wait in a collective for one that has died
_SAVING_SECONDS = 120


def main(argv: list[str]) -> int:
    """Launch what `argv` says. Returns the exit code of the script, or of the first of its processes that failed."""
    be_launcher()
    # torchrun's agent handles SIGTERM itself, and waits this long before it kills its workers
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SAVING_SECONDS))
    signal.signal(signal.SIGTERM, _pass_on)
    try:
        if argv[:1] == ["torchrun"]:
            torchrun.main(argv[1:])
        else:
            launch_command(launch_command_parser().parse_args(argv))
    except (FileNotFoundError, ValueError, ImportError) as error:  # a wrong config file, or DeepSpeed is missing
        print(f"UserError: the launch cannot start: {' '.join(str(error).split())}", file=sys.stderr)
        return UserError.exit_code
    except subprocess.CalledProcessError as error:
        return error.returncode
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except SignalException as stop:
        return Preempted.exit_code if stop.sigval == signal.SIGTERM else 128 + stop.sigval
    return 0


def _pass_on(number: int, frame: FrameType | None) -> None:
    for process in psutil.Process().children():
        process.send_signal(number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
