"""Triton Inference Server: a model repository, what runs in the server, and the check of a running one."""
