"""Fast kernels that give the bits of the torch reference."""
