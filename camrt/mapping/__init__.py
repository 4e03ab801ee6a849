"""`camrt map`: explains images by the million, on one machine or on a cluster, into Parquet files."""
