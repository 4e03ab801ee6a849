"""`camrt check`: what a bundle stores to check a device with, and the check there, without PyTorch."""
