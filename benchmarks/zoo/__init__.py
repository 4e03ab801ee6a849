"""Networks as users bring them, written by the exporters that users have: what `make models` tries and docs/models.md
lists.
"""
