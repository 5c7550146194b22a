"""The command line: main.py dispatches, verb.py parses, and every verb is a file. Imports neither torch nor ray."""
