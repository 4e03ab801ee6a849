"""What goes wrong on a GPU."""


class DeviceError(RuntimeError):
    """No GPU, a driver or a build that does not fit, no memory, or a kernel that failed. One line."""


class OutOfMemory(DeviceError):
    """The GPU's memory does not suffice."""
