"""The workbench behind `python -m pallas_kernels`: finds kernels, checks, tunes and times them, and starts new ones."""
