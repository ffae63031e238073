"""Loaders: each executes a plan over one kind of stored data. One file per loader."""
