"""`camrt deploy`: bundles for other people's servers."""
