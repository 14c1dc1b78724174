"""What holds for all tests."""

import signal

# A shell starts what it puts into the background deaf to Ctrl-C, and a run keeps that, as it should: the tests' own
# runs are to hear it, wherever the tests are started from.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
