"""What export writes and the runtime reads: the manifest, the files, and the checks that come before an engine reads
them.
"""
