"""The teacher cache: what is stored, whether it matches, how it is filled, checked and priced."""
