"""Property tests draw the same examples in every run, and are not timed: CI machines are noisy."""

import signal

from hypothesis import settings

from runner.precision import cpu_matmul
from runner.schema import CpuMatmul

# What the trainers and engines under test are compared with takes the way that they take.
cpu_matmul.install(CpuMatmul.auto)

settings.register_profile("runner", derandomize=True, deadline=None)
settings.load_profile("runner")

# A shell starts background jobs with SIGINT ignored, and children inherit that: tests that send Ctrl-C would send it
# into the void.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
