"""The catalog: an SQLite index over the logs, which can be made again from them row for row."""
