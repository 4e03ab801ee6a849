"""Runs the programs of one bundle over batches of images: opens programs, divides images into batches, and keeps
arrays on the host or on the GPU.
"""
