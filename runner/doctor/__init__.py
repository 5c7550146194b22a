"""`python -m runner doctor` checks the machine; `python -m runner doctor engine` proves an engine's kernels."""
