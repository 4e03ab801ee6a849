"""The embedded default: a small network and the pictures that it explains."""
