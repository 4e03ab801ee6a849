"""`camrt page`: a static page that explains pictures in the reader's own browser."""
