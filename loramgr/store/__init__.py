"""The store: files named by the sha256 of their bytes, and nothing about what the bytes mean."""
