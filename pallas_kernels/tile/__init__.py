"""What kernels share on the device: the pipeline of the dense tile, SRead and SWrite."""
