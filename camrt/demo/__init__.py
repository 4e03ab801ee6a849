"""The demo: a small network in the package, and the drawn pictures that it explains."""
