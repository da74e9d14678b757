"""Stands in for srun: two tasks of one step on this machine, with the variables of SLURM's.

SIGUSR1 is passed on to the tasks, as by `--signal=USR1@SECONDS`. The code is the largest one.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

STEP = {
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_NODEID": "0",
}


def main() -> int:
    tasks: list[subprocess.Popen[bytes]] = []
    signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
    for number in ("0", "1"):
        names = {"SLURM_PROCID": number, "SLURM_LOCALID": number}
        tasks.append(subprocess.Popen(sys.argv[1:], env=os.environ | STEP | names))
    Path(os.environ["STAND_IN_SRUN"]).write_text(str(os.getpid()))
    return max(task.wait() for task in tasks)


if __name__ == "__main__":
    sys.exit(main())
