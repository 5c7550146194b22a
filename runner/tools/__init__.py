"""Tools that a model may call: how calls are read, a calculator, and a sandbox for Python code."""
