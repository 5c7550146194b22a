"""The command line: help, and the explanation of what is wrong with a config. Imports neither torch nor ray."""
