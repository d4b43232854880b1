"""The sink of a fleet: what its topics hold, as Parquet files of a store, each record once."""
