"""The bundle, which export writes and the runtime reads: its manifest, its files, and the checks of them, which run
before an engine reads a file.
"""
