"""The kernels: one file each, with its checks, its NumPy specification and its launch; cuda/ has the CUDA sources."""
