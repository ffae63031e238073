"""Data loading by plan: everything random is computed up front, loaders only execute it."""
