"""How programs end, for whoever starts them: one number for each kind of end. 0: all is done."""

EXIT_FAULT = 1
"""A fault that is said in a sentence: a disk, a device, a loss that is not finite, a lost rank."""
EXIT_WRONG_INPUT = 2
"""Wrong input or usage: the same again would end the same."""
EXIT_HUNG = 70
"""EX_SOFTWARE of sysexits.h: a stage outlasted its limit. (124 would be taken for timeout(1)'s.)"""
EXIT_INTERRUPTED = 75
"""EX_TEMPFAIL of sysexits.h: asked to stop, stopped where it can go on."""
EXIT_ABORTED = 130
"""As shells have it for Ctrl-C; here for the second one."""
