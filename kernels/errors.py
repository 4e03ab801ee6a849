"""Errors of the GPU."""


class DeviceError(RuntimeError):
    """No GPU, a wrong driver or build of the kernels, no memory, or a kernel that failed. The message is one line."""


class OutOfMemory(DeviceError):
    """The GPU has too little free memory."""
