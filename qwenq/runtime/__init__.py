"""Running a checkpoint where the user is: packed weights on torch's own kernels, placed as planned."""
