"""GPU arrays, the queue that takes launches, and, with PyCUDA, the device, its streams and its memory."""
