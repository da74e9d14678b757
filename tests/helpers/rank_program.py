"""A rank that does what its own one of the arguments says: a number to exit with, sleep, die."""

import os
import signal
import sys
import time

from unicl_fast.system.program import begin_program

if __name__ == "__main__":
    begin_program()
    asked = sys.argv[1 + int(os.environ["RANK"])]
    os.write(1, b"started\n")  # one write: another rank writes to the same pipe
    if asked == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if asked == "sleep":
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(9))
        os.write(1, b"asleep\n")
        time.sleep(600)
    sys.exit(int(asked))
