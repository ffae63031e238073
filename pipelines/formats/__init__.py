"""Reading what tools/convert.py wrote: .beton, shards, resident arrays."""
