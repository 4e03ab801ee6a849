"""The GPU's side: arrays, the queue that kernels are launched on, and by PyCUDA the device, its streams and memory."""
