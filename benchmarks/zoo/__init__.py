"""Writes networks with the exporters that users have; `make models` tries them all and docs/models.md lists them."""
