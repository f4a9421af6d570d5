"""`accelerate launch` that keeps the script's exit code: `python -m tandem.launch --config_file FILE SCRIPT …`.

accelerate turns every failure into exit code 1 and a traceback of its own, which would hide whether a run was wrong
(2), stopped by an alarm (3) or preempted (75).
"""

import subprocess
import sys

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(argv: list[str]) -> int:
    """Launch as the command line says; the exit code of the script, or of the first of its processes that failed."""
    try:
        launch_command(launch_command_parser().parse_args(argv))
    except subprocess.CalledProcessError as error:
        return error.returncode
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
