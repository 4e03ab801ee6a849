"""`camrt serve`: explanations over HTTP, batched across requests."""
