"""Datasets and caches in object stores: addresses (hf://, s3://, gs://, https://), pushing to them, staging from them.

address.py   an address, its file system (fsspec's), and errors in one line without secrets
listing.py   what lies at an address: names, sizes, checksums
staging.py   copy it to a local folder: resumable, compared with its checksums
pushing.py   copy a local folder there, with the checksums that staging compares
"""
