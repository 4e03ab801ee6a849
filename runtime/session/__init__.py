"""The programs of one bundle, run over batches of images: where they are opened, how batches are cut, where arrays
lie.
"""
