"""What a run needs before it starts: parameters, memory, placement and traffic, from the config alone. Torch-free."""
